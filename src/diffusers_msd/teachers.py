# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Teachers on disk: a diffusers folder with `unet/` and `scheduler/`, and for text `vae/`, `text_encoder/`, ..."""

from pathlib import Path
from typing import NamedTuple

import diffusers
import torch
from diffusers import AutoencoderKL, DDPMScheduler, ModelMixin, SchedulerMixin, UNet2DConditionModel, UNet2DModel
from safetensors import SafetensorError
from transformers import CLIPTextModel, CLIPTokenizer

from .files import atomic_directory, load_model, model_fingerprint, write_json


TEACHERS = {"UNet2DModel": UNet2DModel, "UNet2DConditionModel": UNet2DConditionModel}


class TextParts(NamedTuple):
    """What surrounds the UNet of a Stable Diffusion teacher, without gradient."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL


def save_teacher(path: Path, model: ModelMixin, scheduler: SchedulerMixin, record: dict | None = None) -> dict:
    """Writes a teacher into a folder, each part atomically.

    Returns:
        What it writes to `teacher.json`: `record` (how the teacher was made) and its fingerprint.
    """
    path = Path(path)
    for name, part in (("unet", model), ("scheduler", scheduler)):
        with atomic_directory(path / name) as folder:
            part.save_pretrained(folder)
    record = {**(record or {}), "fingerprint": model_fingerprint(model, scheduler)}
    write_json(path / "teacher.json", record)
    return record


def _class_name(path: str | Path, subfolder: str, config_class: type, argument: str) -> str:
    try:
        return config_class.load_config(path, subfolder=subfolder)["_class_name"]
    except OSError as error:
        raise FileNotFoundError(f"{argument}: {path} has no readable {subfolder}/: {error}") from error


def _teacher_class(path: str | Path, argument: str = "pretrained_teacher_model") -> type:
    name = _class_name(path, "unet", UNet2DModel, argument)
    if name not in TEACHERS:
        raise ValueError(f"{argument}: {path}: unet/ is a {name}; one of {', '.join(TEACHERS)} is needed")
    return TEACHERS[name]


def load_unet(
    path: str | Path, argument: str = "pretrained_teacher_model", dtype: torch.dtype | None = None
) -> ModelMixin:
    """Loads the network of a teacher of any family; arguments and errors as `load_text_encoder`."""
    return load_model(_teacher_class(path, argument), path, argument, subfolder="unet", dtype=dtype)


def load_teacher(path: str, argument: str = "pretrained_teacher_model") -> tuple[ModelMixin, SchedulerMixin]:
    """Loads a teacher's network and scheduler, from a local folder or a Hub id with `unet/` and `scheduler/`.

    Args:
        path: the folder or Hub id.
        argument: the name of the caller's argument that it came from, for error texts.

    Returns:
        (a class-conditional `UNet2DModel` or a `UNet2DConditionModel`, in float32 without gradient; scheduler).

    Raises:
        FileNotFoundError, ValueError: something is missing, truncated or unknown, with its place.
    """
    model = load_unet(path, argument)
    if isinstance(model, UNet2DModel) and not model.config.num_class_embeds:
        raise ValueError(f"{argument}: {path} is not class-conditional; a UNet2DModel with num_class_embeds is needed")
    scheduler = load_scheduler(path, argument)
    return model.requires_grad_(False).eval(), scheduler


def load_teacher_shape(path: str) -> tuple[ModelMixin, SchedulerMixin]:
    """As `load_teacher`, but the network is on the meta device: its weights are neither downloaded nor read."""
    teacher_class = _teacher_class(path)
    with torch.device("meta"):
        model = teacher_class.from_config(teacher_class.load_config(path, subfolder="unet"))
    return model.eval(), load_scheduler(path, "pretrained_teacher_model")


def load_scheduler(path: str | Path, argument: str) -> SchedulerMixin:
    """Loads a scheduler of any class of diffusers from `scheduler/`; errors name `argument`."""
    name = _class_name(path, "scheduler", DDPMScheduler, argument)
    if name not in dir(diffusers):
        raise ValueError(f"{argument}: {path}: diffusers has no scheduler {name!r}")
    return load_model(getattr(diffusers, name), path, argument, subfolder="scheduler")


def load_text_encoder(
    path: str | Path, argument: str = "pretrained_teacher_model", dtype: torch.dtype | None = None
) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """Loads tokenizer and text encoder of a Stable Diffusion teacher.

    Args:
        path: a folder or Hub id.
        argument: the name of the caller's argument that it came from, for error texts.
        dtype: of the weights; None for float32.

    Raises:
        FileNotFoundError, ValueError: something is missing or damaged, with its place.
    """
    try:
        text_encoder = CLIPTextModel.from_pretrained(
            path, subfolder="text_encoder", use_safetensors=True, dtype=dtype or torch.float32
        )
        tokenizer = CLIPTokenizer.from_pretrained(path, subfolder="tokenizer")
    except SafetensorError as error:
        raise ValueError(f"{argument}: {path} has a damaged text_encoder/: {error}") from error
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{argument}: {path} has no readable text_encoder/ and tokenizer/ (CLIP): {error}"
        ) from error
    # transformers makes up an empty vocabulary where it finds no files.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise FileNotFoundError(f"{argument}: {path} has no tokenizer/ with a vocabulary")
    return tokenizer, text_encoder.requires_grad_(False).eval()


def load_text_parts(
    path: str | Path, argument: str = "pretrained_teacher_model", dtype: torch.dtype | None = None
) -> TextParts:
    """Loads tokenizer, text encoder and VAE; arguments and errors as `load_text_encoder`."""
    return TextParts(*load_text_encoder(path, argument, dtype), load_vae(path, argument, dtype))


def load_vae(
    path: str | Path, argument: str = "pretrained_teacher_model", dtype: torch.dtype | None = None
) -> AutoencoderKL:
    """Loads the VAE of a Stable Diffusion teacher; arguments and errors as `load_text_encoder`."""
    return load_model(AutoencoderKL, path, argument, subfolder="vae", dtype=dtype).requires_grad_(False).eval()


def decode_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Latents as a teacher sees them [B, C, h, w] to images, about [-1, 1], float32 [B, 3, H, W]."""
    latents = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    return vae.decode(latents.to(vae.dtype), return_dict=False)[0].float()
