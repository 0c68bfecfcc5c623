# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""What the parts of a pipeline and the arguments of a call must be: each check names its argument, before compute."""

import torch
from diffusers import AutoencoderKL, ModelMixin, UNet2DConditionModel, UNet2DModel
from transformers import CLIPTextModel

from .adapters import LoraStudent
from .embedding_routing import EmbeddingRouter
from .prompts import POOLINGS, encoder_fingerprint
from .routing import ClassRouter, ConditionRouter
from .schedule import NoiseSchedule


SLOTS = tuple(f"unet_{k}" for k in range(64))
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# The families of students, and what those of one family must have in common to stand in for one another.
SHARED_SETTINGS: dict[type, tuple[str, ...]] = {
    UNet2DModel: ("in_channels", "out_channels", "sample_size", "num_class_embeds"),
    UNet2DConditionModel: ("in_channels", "out_channels", "sample_size", "cross_attention_dim"),
}
# Conditions besides the prompt's embeddings, such as SDXL's; a student that asks for one would get none.
OTHER_CONDITIONS = ("addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim_type")


# Parts


def check_students(
    students: dict[int, ModelMixin],
    router: ConditionRouter | None,
    vae: AutoencoderKL | None,
    text_encoder: CLIPTextModel | None,
    name: str = "unet_{}",
) -> None:
    """Refuses students that do not fit one another or the other components, and a router that does not fit them.

    Args:
        students: those that are present, {k: unet}; the first one is what the others are compared with.
        router, vae, text_encoder: the other components.
        name: what student k is called in an error.

    Raises:
        TypeError, ValueError: naming the component.
    """
    first = next(iter(students.values()), None)
    for k, unet in students.items():
        check_student(name.format(k), unet, first)
        check_fits(name.format(k), unet, vae, text_encoder)
    if router is None:
        return
    check_router(router, first, text_encoder)
    for k in students:
        if k >= router.num_students:
            raise ValueError(
                f"{name.format(k)}: the router has {router.num_students} parts, no condition leads to this student"
            )


def networks_of(students: dict[int, ModelMixin | LoraStudent], base: ModelMixin | None) -> dict[int, ModelMixin]:
    """The network that each student runs on: itself, or for an adapter its base.

    Raises:
        ValueError: adapters without a base, a base without adapters, or both kinds of students at once.
    """
    adapters = [k for k, student in students.items() if isinstance(student, LoraStudent)]
    if base is None:
        if adapters:
            raise ValueError(f"unet: unet_{adapters[0]} is a LoRA student, give the network that it was trained on")
        return students
    others = [k for k in students if k not in adapters]
    if others:
        raise ValueError(
            f"unet_{others[0]}: got a {type(students[others[0]]).__name__}; with a base `unet` all students are LoRA "
            "students"
        )
    return dict.fromkeys(students, base)


def check_student(argument: str, unet: ModelMixin, first: ModelMixin) -> None:
    """Refuses a student that is of no known family, or that does not agree with the first one.

    Raises:
        TypeError, ValueError: with `argument`, the name of the student.
    """
    allowed = [family for family in SHARED_SETTINGS if isinstance(first, family)] or list(SHARED_SETTINGS)
    if not isinstance(unet, tuple(allowed)):
        names = " or ".join(family.__name__ for family in allowed)
        raise TypeError(f"{argument}: a {names} is needed, got {type(unet).__name__}")
    if unet.config.sample_size is None:
        raise ValueError(f"{argument}: its config has no sample_size; the size of the images is needed")
    for setting in SHARED_SETTINGS[allowed[0]]:
        got, expected = unet.config[setting], first.config[setting]
        if got != expected:
            raise ValueError(f"{argument}: {setting} is {got}, the other students have {expected}; they must agree")
    for setting in OTHER_CONDITIONS if isinstance(unet, UNet2DConditionModel) else ():
        if unet.config[setting] is not None:
            raise ValueError(f"{argument}: {setting} is {unet.config[setting]!r}; students are given the prompt alone")


def check_fits(argument: str, unet: ModelMixin, vae: AutoencoderKL | None, text_encoder: CLIPTextModel | None) -> None:
    """Refuses a student whose latents the VAE cannot decode, or that does not read the text encoder's embeddings."""
    if vae is not None and unet.config.in_channels != vae.config.latent_channels:
        raise ValueError(
            f"{argument}: in_channels is {unet.config.in_channels}, latents of the vae have "
            f"{vae.config.latent_channels} channels; they must agree"
        )
    if text_encoder is not None and isinstance(unet, UNet2DConditionModel):
        width = text_encoder.config.hidden_size
        if unet.config.cross_attention_dim != width:
            raise ValueError(
                f"{argument}: cross_attention_dim is {unet.config.cross_attention_dim}, embeddings of the text_encoder "
                f"have {width}; they must agree"
            )


def check_router(router: ConditionRouter, first: ModelMixin | None, text_encoder: CLIPTextModel | None) -> None:
    """Refuses a router of another kind of condition than the students', or fitted on another encoder's embeddings."""
    if not isinstance(router, ConditionRouter):
        raise TypeError(f"router: a ConditionRouter is needed, got {type(router).__name__}")
    if first is not None:
        wrong, kind = (
            (ClassRouter, "prompts") if isinstance(first, UNet2DConditionModel) else (EmbeddingRouter, "labels")
        )
        if isinstance(router, wrong):
            raise ValueError(f"router: students that take {kind} cannot be routed by {wrong.__name__}")
    if not isinstance(router, EmbeddingRouter):
        return
    if (router.config.pooling or "mean") not in POOLINGS:
        raise ValueError(f"router: its pooling is {router.config.pooling!r}, known are {', '.join(POOLINGS)}")
    width = router.directions.shape[1]
    # Students that do not fit the encoder were refused before.
    expected = text_encoder.config.hidden_size if text_encoder is not None else width
    expected = first.config.cross_attention_dim if first is not None else expected
    if width != expected:
        raise ValueError(
            f"router: it cuts embeddings of {width} numbers, the text_encoder and students have {expected}"
        )
    fitted_on = router.config.text_encoder_fingerprint
    if fitted_on is not None and text_encoder is not None and fitted_on != encoder_fingerprint(text_encoder):
        raise ValueError(
            "router, text_encoder: the router was fitted on embeddings of another text encoder, so it would send "
            "prompts to the wrong students; use the text_encoder of the teacher"
        )


def check_timesteps(student_timesteps: dict, schedule: NoiseSchedule) -> None:
    """Refuses noise indices that do not start at pure noise, or do not fall.

    Raises:
        TypeError: no dict with a list of integers under "timesteps" alone.
        ValueError: the list is empty, does not start at `schedule.last`, does not fall strictly, or ends below 0.
    """
    values = student_timesteps.get("timesteps") if isinstance(student_timesteps, dict) else None
    if not isinstance(values, (list, tuple)) or len(student_timesteps) != 1 or any(type(t) is not int for t in values):
        raise TypeError(
            'student_timesteps: a dict {"timesteps": [...]} with a list of integers expected, '
            f"got {student_timesteps!r}"
        )
    falling = all(a > b for a, b in zip(values, values[1:]))
    if not values or values[0] != schedule.last or values[-1] < 0 or not falling:
        raise ValueError(
            f"student_timesteps: integers that fall strictly from {schedule.last}, the pure noise, to 0 or above "
            f"expected, got {list(values)}"
        )


# Arguments of a call


def check_one_condition(takes_prompts: bool, **conditions) -> str:
    """The name of the one condition that is given; ValueError if it is none, several, or not for these students."""
    given = [name for name, value in conditions.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"{', '.join(conditions)}: give exactly one, got {', '.join(given) or 'none'}")
    if takes_prompts and given[0] == "class_labels":
        raise ValueError("class_labels: the students of this pipeline take prompts: pass prompt or prompt_embeds")
    if not takes_prompts and given[0] != "class_labels":
        raise ValueError(f"{given[0]}: this pipeline is class-conditional: pass class_labels")
    return given[0]


def read_labels(class_labels, num_embeddings: int | None) -> torch.Tensor:
    """Class labels as a LongTensor [B] on the CPU.

    Args:
        class_labels: an integer, or a flat list or tensor of them.
        num_embeddings: how many classes the students know; None if they know none or are not there.

    Raises:
        ValueError: anything else, no labels at all, or a label that the students do not know.
    """
    try:
        labels = torch.as_tensor(class_labels, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"class_labels: integers expected, got {class_labels!r}") from error
    if labels.numel() == 0:
        raise ValueError("class_labels: at least one is needed, got none")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool or labels.ndim > 1:
        raise ValueError(f"class_labels: an integer or a flat list of them expected, got {class_labels!r}")
    labels = labels.long().reshape(-1)
    if num_embeddings is not None and not 0 <= labels.min() <= labels.max() < num_embeddings:
        raise ValueError(f"class_labels: allowed are 0 ... {num_embeddings - 1}, got {labels.tolist()}")
    return labels


def check_embeddings(prompt_embeds, prompt_mask, width: int | None) -> None:
    """Refuses embeddings that are not finite floats [B, L, width], and a mask that is not 0 and 1, [B, L]."""
    got = describe(prompt_embeds)
    if (
        not isinstance(prompt_embeds, torch.Tensor)
        or not prompt_embeds.is_floating_point()
        or prompt_embeds.ndim != 3
        or prompt_embeds.numel() == 0
        or prompt_embeds.shape[2] != (width or prompt_embeds.shape[2])
    ):
        raise ValueError(f"prompt_embeds: a tensor of floats [B, L, {width or 'D'}] expected, got {got}")
    if not bool(prompt_embeds.isfinite().all()):
        raise ValueError("prompt_embeds: a value is not finite; finite floats are needed")
    if prompt_mask is None:
        return
    shape = tuple(prompt_embeds.shape[:2])
    if not isinstance(prompt_mask, torch.Tensor) or tuple(prompt_mask.shape) != shape:
        raise ValueError(f"prompt_mask: a tensor of shape {shape} expected, got {describe(prompt_mask)}")
    if not bool(((prompt_mask == 0) | (prompt_mask == 1)).all()) or not bool((prompt_mask == 1).any(dim=1).all()):
        raise ValueError("prompt_mask: 1 on real tokens and 0 on padding expected, with a real token in each row")


def check_choices(output_type, num_images_per_prompt, student, present: list[int]) -> None:
    """Refuses an unknown output type, a count below 1, and a student that is not there."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type: {output_type!r} is not one of {', '.join(OUTPUT_TYPES)}")
    if not isinstance(num_images_per_prompt, int) or num_images_per_prompt < 1:
        raise ValueError(f"num_images_per_prompt: an integer >= 1 expected, got {num_images_per_prompt!r}")
    if student is not None and (isinstance(student, bool) or student not in present):
        raise ValueError(f"student: {student!r} is not present, allowed are {present}")
    if not present:
        raise ValueError("unet_0: this pipeline has no students, use add_student")


def check_steps(num_inference_steps, timesteps: list[int]) -> None:
    """Refuses more steps than the students were trained for."""
    if num_inference_steps is None:
        return
    if type(num_inference_steps) is not int or not 1 <= num_inference_steps <= len(timesteps):
        raise ValueError(
            f"num_inference_steps: an integer in 1 ... {len(timesteps)} expected, got {num_inference_steps!r}; the "
            f"students were trained for the timesteps {list(timesteps)}"
        )


def check_side(argument: str, value, native: int, factor: int, free: bool) -> int:
    """Pixels of one side of an image to the side of its latents; None means `native` latents.

    A UNet that halves an odd side makes up for it when it doubles, so multiples of the VAE's `factor` are enough.
    """
    if value is None or value == native * factor:
        return native
    if not free:
        raise ValueError(f"{argument}: class-conditional students make images of {native * factor}, got {value!r}")
    if type(value) is not int or value < 1 or value % factor:
        raise ValueError(f"{argument}: a positive multiple of {factor} pixels expected, got {value!r}")
    return value // factor


def check_noise(generator, latents, shape: tuple[int, ...]) -> None:
    """Refuses generators and latents that do not make noise of `shape` [B, C, H, W]."""
    generators = generator if isinstance(generator, list) else [generator]
    if not all(g is None or isinstance(g, torch.Generator) for g in generators):
        raise ValueError(f"generator: a torch.Generator or a list of them expected, got {generator!r}")
    if isinstance(generator, list) and len(generator) != shape[0]:
        raise ValueError(f"generator: a list needs one per image, got {len(generator)} for {shape[0]} images")
    if latents is not None and (not isinstance(latents, torch.Tensor) or tuple(latents.shape) != shape):
        raise ValueError(f"latents: a tensor of shape {shape} expected, got {describe(latents)}")


def describe(value) -> str:
    """Shape and dtype of a tensor, the type of anything else, for an error text."""
    return f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__
