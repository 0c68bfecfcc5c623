# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""K one-step students behind one diffusers pipeline."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from .denoiser import denoiser_for, sample_shape
from .hub import SafePipeline
from .routing import ConditionRouter
from .schedule import NoiseSchedule


SLOTS = tuple(f"unet_{k}" for k in range(64))
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# What students must have in common to stand in for one another.
SHARED_SETTINGS = ("in_channels", "out_channels", "sample_size", "num_class_embeds")


@dataclass
class MultiStudentPipelineOutput(BaseOutput):
    """What `MultiStudentPipeline` returns.

    Args:
        images: by `output_type`: list of B PIL images ("pil"); float32 array [B, H, W, C] in [0, 1] ("np"); float32
            tensor [B, C, H, W] in [0, 1] ("pt"); float32 tensor as the students made it, not clamped ("latent").
        student_indices: which student made each image, B integers.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    student_indices: list[int]


def _with_student_slots(init: Callable) -> Callable:
    # diffusers reads a pipeline's components from the signature and the annotations of its `__init__`. Writing the
    # 64 slots there, instead of in the source, makes each student a component of its own: an own folder, dtype,
    # device, variant, offload hook and download.
    signature = inspect.signature(init)
    parameters = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    for slot in SLOTS:
        kind = UNet2DModel if slot == "unet_0" else UNet2DModel | None
        default = inspect.Parameter.empty if slot == "unet_0" else None
        parameters.append(inspect.Parameter(slot, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind))
        init.__annotations__[slot] = kind
    init.__annotations__.pop("students", None)
    init.__signature__ = signature.replace(parameters=parameters)
    return init


def _check_student(k: int, unet: UNet2DModel, router: ConditionRouter | None, first: UNet2DModel) -> None:
    if not isinstance(unet, UNet2DModel):
        raise TypeError(f"unet_{k}: a UNet2DModel is needed, got {type(unet).__name__}")
    if router is not None and k >= router.num_students:
        raise ValueError(f"unet_{k}: the router has {router.num_students} parts, no condition leads to this student")
    if unet.config.sample_size is None:
        raise ValueError(f"unet_{k}: its config has no sample_size; the size of the images is needed")
    for setting in SHARED_SETTINGS:
        got, expected = unet.config[setting], first.config[setting]
        if got != expected:
            raise ValueError(f"unet_{k}: {setting} is {got}, the other students have {expected}; they must agree")


class MultiStudentPipeline(SafePipeline):
    r"""Class-conditional image generation in one network call, by the student that knows the class.

    Multi-student distillation (arXiv 2410.23274): the router splits the conditions into K parts, and student k serves
    part k. A batch is grouped by student: each used student runs once per call, an unused one never.

    Students are ordinary diffusers models in folders `unet_0 ... unet_{K-1}`: `from_pretrained(path, unet_1=None)`
    leaves one out, `UNet2DModel.from_pretrained(path, subfolder="unet_1")` loads one alone, `add_student` puts one in.
    Text set as `model_card_details` becomes part of the model card at the next save.

    Args:
        scheduler: the teacher's scheduler; it says how the students are preconditioned and what noise they start from.
        router: says which student serves a condition; `router.num_students` is K.
        vae: decodes latents to images; None for students that work on pixels.
        text_encoder, tokenizer: None, for class-conditional students.
        unet_0 ... unet_63: the students. Those below K are to be given; give None for one that is left out.

    Raises:
        TypeError: an argument is not one of the above, or a student is not a `UNet2DModel`.
        ValueError: the router has more parts than there are students or fewer, or two students differ in channels,
            size or number of classes.
    """

    model_cpu_offload_seq = "->".join(["text_encoder", *SLOTS, "vae"])
    _optional_components = ["vae", "text_encoder", "tokenizer", *SLOTS[1:]]
    _callback_tensor_inputs = ["latents"]
    # Steps of a call, which callbacks ask for.
    num_timesteps = 1

    @_with_student_slots
    def __init__(
        self,
        scheduler: SchedulerMixin,
        router: ConditionRouter,
        vae: AutoencoderKL | None = None,
        text_encoder: torch.nn.Module | None = None,
        tokenizer=None,
        **students: UNet2DModel | None,
    ):
        super().__init__()
        unknown = sorted(set(students) - set(SLOTS))
        if unknown:
            raise TypeError(f"{unknown[0]}: not a component; students are named unet_0 ... {SLOTS[-1]}")
        if router is not None:
            if not isinstance(router, ConditionRouter):
                raise TypeError(f"router: a ConditionRouter is needed, got {type(router).__name__}")
            missing = [f"unet_{k}" for k in range(router.num_students) if f"unet_{k}" not in students]
            if missing:
                raise ValueError(
                    f"router: it has {router.num_students} parts, but {', '.join(missing)} is not given; give one "
                    f"student per part (at most {len(SLOTS)}), or None to leave it out"
                )
        students = {slot: students.get(slot) for slot in SLOTS}
        given = {k: unet for k, unet in enumerate(students.values()) if unet is not None}
        for k, unet in given.items():
            _check_student(k, unet, router, next(iter(given.values())))
        self.register_modules(
            scheduler=scheduler, router=router, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, **students
        )
        self.image_processor = VaeImageProcessor()
        # Markdown that `save_pretrained` adds to the model card, such as the record of a training run.
        self.model_card_details = ""
        # Filled by `enable_model_cpu_offload`.
        self._all_hooks = []

    @property
    def students(self) -> dict[int, UNet2DModel]:
        """The students that are present, {k: unet}."""
        return {k: getattr(self, slot) for k, slot in enumerate(SLOTS) if getattr(self, slot) is not None}

    @property
    def components(self) -> dict:
        """As in diffusers, less the empty slots; a student that was left out is kept as None."""
        routed = SLOTS[: 0 if self.router is None else self.router.num_students]
        return {name: c for name, c in super().components.items() if c is not None or name in routed}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As `SafePipeline.from_pretrained`; `unet_1=None` leaves student 1 out, it is not even downloaded.

        (diffusers' generic `DiffusionPipeline.from_pretrained` would load it all the same.)

        Raises:
            ValueError: also if a part of the router has no student and was not left out by name.
        """
        pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        parts = range(0 if pipe.router is None else pipe.router.num_students)
        missing = [SLOTS[k] for k in parts if k not in pipe.students and SLOTS[k] not in kwargs]
        if missing:
            raise ValueError(
                f"router: it has {len(parts)} parts, but {pretrained_model_name_or_path} has no {', '.join(missing)}; "
                "pass None for a slot to load the pipeline without it"
            )
        return pipe

    def add_student(self, k: int, unet: UNet2DModel) -> None:
        """Puts a student in, or replaces one. (Assigning `pipe.unet_3 = unet` to an empty slot would not be saved.)

        Args:
            k: the part of the router that it serves, in [0, K).
            unet: a `UNet2DModel` with the same channels, size and number of classes as the other students.

        Raises:
            TypeError, ValueError: `k` is not a part of the router, or `unet` does not fit the others.
        """
        if k not in range(len(SLOTS)):
            raise ValueError(f"k: {k!r} is not a student, allowed are 0 ... {len(SLOTS) - 1}")
        others = [unet for other, unet in self.students.items() if other != k]
        _check_student(k, unet, self.router, (others or [unet])[0])
        self.register_modules(**{SLOTS[k]: unet})

    def route(self, prompt=None, class_labels=None, prompt_embeds=None) -> list[int]:
        """Which student serves each condition, B indices in [0, K). Arguments and errors as for a call."""
        labels = self.encode_condition(prompt, class_labels, prompt_embeds)
        if self.router is None:
            raise ValueError("router: this pipeline has none, pass student= to say which student shall run")
        return self.router(class_labels=labels).tolist()

    def encode_condition(self, prompt=None, class_labels=None, prompt_embeds=None) -> torch.Tensor:
        """Checks the condition and turns it into what the students take: class labels, LongTensor [B] on the CPU.

        Raises:
            ValueError: not exactly one condition, a prompt for class-conditional students, or labels not integers.
        """
        given = {"prompt": prompt, "class_labels": class_labels, "prompt_embeds": prompt_embeds}
        given = [name for name, value in given.items() if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"prompt, prompt_embeds, class_labels: give exactly one, got {', '.join(given) or 'none'}"
            )
        if class_labels is None:
            raise ValueError(f"{given[0]}: this pipeline is class-conditional: pass class_labels")
        try:
            labels = torch.as_tensor(class_labels, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"class_labels: integers expected, got {class_labels!r}") from error
        if labels.numel() == 0:
            raise ValueError("class_labels: at least one is needed, got none")
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool or labels.ndim > 1:
            raise ValueError(f"class_labels: an integer or a flat list of them expected, got {class_labels!r}")
        return labels.long().reshape(-1)

    def check_inputs(
        self, labels, num_images_per_prompt, generator, latents, output_type, student, callback_tensor_inputs
    ) -> None:
        """Refuses bad arguments of a call before anything is computed."""
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type: {output_type!r} is not one of {', '.join(OUTPUT_TYPES)}")
        if not isinstance(num_images_per_prompt, int) or num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt: an integer >= 1 expected, got {num_images_per_prompt!r}")
        if student is not None and (isinstance(student, bool) or student not in self.students):
            raise ValueError(f"student: {student!r} is not present, allowed are {sorted(self.students)}")
        if not self.students:
            raise ValueError("unet_0: this pipeline has no students, use add_student")
        unknown = sorted(set(callback_tensor_inputs) - set(self._callback_tensor_inputs))
        if unknown:
            raise ValueError(f"callback_on_step_end_tensor_inputs: {unknown}: not in {self._callback_tensor_inputs}")
        num_embeddings = next(iter(self.students.values())).config.num_class_embeds
        if num_embeddings is not None and not 0 <= labels.min() <= labels.max() < num_embeddings:
            raise ValueError(f"class_labels: allowed are 0 ... {num_embeddings - 1}, got {labels.tolist()}")
        self._check_noise(len(labels) * num_images_per_prompt, generator, latents)

    def _check_noise(self, batch_size: int, generator, latents) -> None:
        generators = generator if isinstance(generator, list) else [generator]
        if not all(g is None or isinstance(g, torch.Generator) for g in generators):
            raise ValueError(f"generator: a torch.Generator or a list of them expected, got {generator!r}")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"generator: a list needs one per image, got {len(generator)} for {batch_size} images")
        shape = (batch_size, *self._latent_shape())
        if latents is not None and (not isinstance(latents, torch.Tensor) or tuple(latents.shape) != shape):
            got = tuple(latents.shape) if isinstance(latents, torch.Tensor) else type(latents).__name__
            raise ValueError(f"latents: a tensor of shape {shape} expected, got {got}")

    def choose_students(self, labels: torch.Tensor, student: int | None) -> list[int]:
        """The student of each label [B]: the given one, else the router's; ValueError if that one was left out."""
        if student is not None:
            return [student] * len(labels)
        chosen, present = self.route(class_labels=labels), list(self.students)
        for label, k in zip(labels.tolist(), chosen):
            if k not in present:
                raise ValueError(
                    f"class_labels: label {label} belongs to student {k}, which is absent (present are {present}); "
                    "load it too, or choose another with student="
                )
        return chosen

    def _latent_shape(self) -> tuple[int, int, int]:
        return sample_shape(next(iter(self.students.values())))

    def prepare_latents(self, batch_size: int, generator, latents: torch.Tensor | None) -> torch.Tensor:
        """The unit-variance noise that the students start from, float32 [B, C, H, W] on the execution device."""
        if latents is not None:
            return latents.to(self._execution_device, torch.float32)
        # In float32 whatever the students' dtype: the same seed means the same noise in fp16 as in fp32.
        shape = (batch_size, *self._latent_shape())
        return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)

    def generate(self, latents: torch.Tensor, labels: torch.Tensor, student_indices: list[int]) -> torch.Tensor:
        """Noise [B, C, H, W] and labels [B] to samples [B, C, H, W], float32: one call of each student in use."""
        schedule, students = NoiseSchedule.from_scheduler(self.scheduler), self.students
        samples = torch.empty_like(latents)
        for k in self.progress_bar(sorted(set(student_indices))):
            unet = students[k]
            rows = [i for i, chosen in enumerate(student_indices) if chosen == k]
            made = denoiser_for(unet, schedule).generate(latents[rows], labels[rows].to(latents.device))
            samples[rows] = made.to(samples)
            # A hook sends only its neighbour in the offload order back: students with a gap between them would stay.
            for hook in self._all_hooks:
                if hook.model is unet:
                    hook.offload()
        return samples

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Samples to images, about [-1, 1]; the identity without a VAE."""
        if self.vae is None:
            return latents
        config = self.vae.config
        latents = latents / config.scaling_factor + (config.shift_factor or 0.0)
        return self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0].float()

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        class_labels: int | Sequence[int] | torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        student: int | None = None,
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
    ) -> MultiStudentPipelineOutput | tuple:
        r"""Makes one image (or more) per condition, in the order of the conditions. Exactly one condition is given.

        Args:
            prompt, prompt_embeds: refused by class-conditional students.
            class_labels: integers in [0, num_classes), B of them or a single one.
            num_images_per_prompt: images per condition, side by side in the output.
            generator: a list of one per image makes an image depend on its own (label, seed) alone, whoever else is
                in the batch; a single one draws the noise of the whole batch; None uses the global one.
            latents: noise of variance 1 to start from, [B * num_images_per_prompt, C, H, W], instead of `generator`.
            output_type: "pil", "np" [B, H, W, C] and "pt" [B, C, H, W] in [0, 1], or "latent", unclamped.
            student: use this student for all, whatever the router says.
            return_dict: False returns the tuple (images, student_indices).
            callback_on_step_end: called once, as `f(pipe, step, timestep, {"latents": samples [B, C, H, W]})`; the
                "latents" in the dict it returns replace the samples.
            callback_on_step_end_tensor_inputs: what the callback gets, of `_callback_tensor_inputs`.

        Raises:
            ValueError: an argument is out of its range, or a label belongs to a student that was left out.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        labels = self.encode_condition(prompt, class_labels, prompt_embeds)
        callback_inputs = callback_on_step_end_tensor_inputs
        self.check_inputs(labels, num_images_per_prompt, generator, latents, output_type, student, callback_inputs)
        chosen = self.choose_students(labels, student)
        student_indices = [k for k in chosen for _ in range(num_images_per_prompt)]
        labels = labels.repeat_interleave(num_images_per_prompt)

        latents = self.prepare_latents(len(labels), generator, latents)
        latents = self.generate(latents, labels, student_indices)

        if callback_on_step_end is not None:
            callback_kwargs = {"latents": latents} if "latents" in callback_inputs else {}
            timestep = NoiseSchedule.from_scheduler(self.scheduler).last
            latents = callback_on_step_end(self, 0, timestep, callback_kwargs).pop("latents", latents)

        images = latents
        if output_type != "latent":
            images = self.image_processor.postprocess(self.decode_latents(latents), output_type=output_type)
        self.maybe_free_model_hooks()
        return MultiStudentPipelineOutput(images, student_indices) if return_dict else (images, student_indices)
