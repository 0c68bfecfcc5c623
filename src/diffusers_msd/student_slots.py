# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""K students as components of a pipeline: `unet_0 ... unet_63`, each saved, loaded, added and left out on its own."""

import copy
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel, UNet2DModel

from .adapters import LoraStudent, attach, base_of
from .assembly import load_parts, load_router
from .hub import SafePipeline
from .pipeline_inputs import SLOTS, check_students, networks_of
from .routing import ConditionRouter


Student = UNet2DModel | UNet2DConditionModel | LoraStudent


def with_student_slots(init: Callable) -> Callable:
    """Puts the slots into the signature of a pipeline's `__init__`, in place of `**students`."""
    # diffusers reads a pipeline's components from the signature and the annotations of its `__init__`. Writing the
    # 64 slots there, instead of in the source, makes each student a component of its own: an own folder, dtype,
    # device, variant, offload hook and download.
    signature = inspect.signature(init)
    parameters = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    for slot in SLOTS:
        kind = Student if slot == "unet_0" else Student | None
        default = inspect.Parameter.empty if slot == "unet_0" else None
        parameters.append(inspect.Parameter(slot, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind))
        init.__annotations__[slot] = kind
    init.__annotations__.pop("students", None)
    init.__signature__ = signature.replace(parameters=parameters)
    return init


class StudentSlots(SafePipeline):
    """The part of `MultiStudentPipeline` that holds its components; how they make images is in the class itself."""

    @property
    def students(self) -> dict[int, UNet2DModel | UNet2DConditionModel]:
        """The students that are present, {k: unet}; of LoRA students the one base, see `fuse_student`."""
        present = {k: getattr(self, slot) for k, slot in enumerate(SLOTS) if getattr(self, slot) is not None}
        return networks_of(present, self.unet)

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
            ValueError: also if a part of the router has no student and none was left out there, now or at the save.
        """
        pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        parts = range(0 if pipe.router is None else pipe.router.num_students)
        missing = [SLOTS[k] for k in parts if k not in pipe.students and SLOTS[k] not in kwargs]
        # One that was left out when the pipeline was saved is in the index, as [null, null].
        index = cls.load_config(pretrained_model_name_or_path, **kwargs) if missing else {}
        missing = [slot for slot in missing if slot not in index]
        if missing:
            raise ValueError(
                f"router: it has {len(parts)} parts, but {pretrained_model_name_or_path} has no {', '.join(missing)}; "
                "pass None for a slot to load the pipeline without it"
            )
        return pipe

    @classmethod
    def from_students(
        cls,
        base: str | Path | DiffusionPipeline,
        students: Sequence,
        router: ConditionRouter | str | Path,
        dtype: torch.dtype | None = None,
        **kwargs,
    ) -> "StudentSlots":
        """A pipeline of students from several places, each trained on its own, with the rest from the teacher.

        Args:
            base: a folder, Hub id or loaded pipeline that gives `scheduler` and, for prompts, `vae`, `text_encoder`
                and `tokenizer`; such as the teacher.
            students: K of them. Each is a model, None to leave it out, or a folder or Hub id: a single net, a
                `MultiStudentPipeline` (entry k takes its `unet_<k>`), another pipeline (its `unet`), or
                "repo::subfolder".
            router: a router, or its folder or Hub id ("repo::router" for that of a pipeline).
            dtype: what weights are loaded in, safetensors only; None for float32. Models are taken as they are.
            kwargs: further arguments of the constructor; `vae=`, ... also replace what `base` has.

        Raises:
            TypeError, FileNotFoundError, ValueError: a part is missing, damaged or does not fit, by its name, such as
                `students[2]`.
        """
        router = load_router(router)
        parts = load_parts(base, students, router, dtype, **kwargs)
        return cls(router=router, **parts)

    def add_student(self, k: int, unet: Student) -> None:
        """Puts a student in, or replaces one. (Assigning `pipe.unet_3 = unet` to an empty slot would not be saved.)

        Args:
            k: the part of the router that it serves, in [0, K).
            unet: a model of the other students' family, channels, size and condition; or, beside LoRA students, a
                `LoraStudent` of the same base.

        Raises:
            TypeError, ValueError: `k` is not a part of the router, or `unet` does not fit the others.
        """
        if k not in range(len(SLOTS)):
            raise ValueError(f"k: {k!r} is not a student, allowed are 0 ... {len(SLOTS) - 1}")
        others = {other: getattr(self, SLOTS[other]) for other in self.students if other != k}
        networks = networks_of({**others, k: unet}, self.unet)
        check_students(networks, self.router, self.vae, self.text_encoder)
        if isinstance(unet, LoraStudent):
            attach(self.unet, {SLOTS[k]: unet}, replace=True)
        self.register_modules(**{SLOTS[k]: unet})

    def count_parameters(self) -> tuple[int, int]:
        """Parameters of the largest network that makes an image, and of all students with what they share."""
        sizes = [getattr(self, SLOTS[k]).num_parameters() for k in self.students]
        if self.unet is None:
            return max(sizes), sum(sizes)
        shared = base_of(self.unet).num_parameters()
        return shared + max(sizes), shared + sum(sizes)

    def fuse_student(self, k: int) -> UNet2DModel | UNet2DConditionModel:
        """Student k as an ordinary network of its own; of a LoRA student the sum of base and adapter.

        Args:
            k: one of the students that are present.

        Raises:
            ValueError: `k` is not present.
        """
        if k not in self.students:
            raise ValueError(f"k: {k!r} is not present, allowed are {list(self.students)}")
        return self.students[k] if self.unet is None else getattr(self, SLOTS[k]).fuse(self.unet)

    def fuse_students(self) -> "StudentSlots":
        """This pipeline with each LoRA student as a full network: K times the memory, and no PEFT to run it."""
        parts = {**self.components, **{SLOTS[k]: self.fuse_student(k) for k in self.students}}
        return type(self)(**{**parts, "unet": None}, student_timesteps=self.config.student_timesteps)

    def save_pretrained(self, save_directory: str | Path, **kwargs):
        """As `SafePipeline.save_pretrained`; the base of LoRA students is saved without them, as it was before."""
        saved = copy.copy(self)
        if self.unet is not None:
            saved.unet = base_of(self.unet)
        return super(StudentSlots, saved).save_pretrained(save_directory, **kwargs)

    def enable_vae_slicing(self) -> None:
        """Decodes one image of a batch after the other: less memory."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Back to decoding the batch at once."""
        self.vae.disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Decodes large images in overlapping tiles: less memory."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Back to decoding whole images."""
        self.vae.disable_tiling()
