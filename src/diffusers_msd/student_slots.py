# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""K students as components of a pipeline: `unet_0 ... unet_63`, each saved, loaded, added and left out on its own."""

import copy
import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel, UNet2DModel

from .adapters import LoraStudent, attach, base_of
from .assembly import load_parts, load_router
from .hub import SafePipeline
from .pipeline_inputs import SLOTS, check_students, networks_of
from .residents import OPTIONS, ResidentStudents, SavedStudents
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


def needs_all_students(method: Callable) -> Callable:
    """Refuses a method of the pipeline where students come and go."""

    @wraps(method)
    def checked(self, *args, **kwargs):
        if self.residents is not None:
            raise ValueError(f"{method.__name__}: it needs all students; load without max_resident_students for it")
        return method(self, *args, **kwargs)

    return checked


class StudentSlots(SafePipeline):
    """The part of `MultiStudentPipeline` that holds its components; how they make images is in the class itself.

    Attributes:
        residents: what loads the students that have no component, see `from_pretrained`; else None.
    """

    residents: ResidentStudents | None = None

    # They go over the components, so students that are loaded later would be missed.
    enable_model_cpu_offload = needs_all_students(SafePipeline.enable_model_cpu_offload)
    enable_sequential_cpu_offload = needs_all_students(SafePipeline.enable_sequential_cpu_offload)
    enable_group_offload = needs_all_students(SafePipeline.enable_group_offload)
    enable_attention_slicing = needs_all_students(SafePipeline.enable_attention_slicing)
    enable_xformers_memory_efficient_attention = needs_all_students(
        SafePipeline.enable_xformers_memory_efficient_attention
    )

    @property
    def students(self) -> dict[int, UNet2DModel | UNet2DConditionModel]:
        """The students that are present, {k: unet}; of LoRA students the one base, see `fuse_student`.

        Those that are loaded when needed are here without weights (device meta).
        """
        return networks_of(self._members, self.unet)

    @property
    def _members(self) -> dict[int, Student]:
        # What is in the slots, networks or adapters, and the shapes of what is loaded later.
        later = {} if self.residents is None else self.residents.shapes
        now = {k: getattr(self, slot) for k, slot in enumerate(SLOTS) if getattr(self, slot) is not None}
        return dict(sorted({**later, **now}.items()))

    def use_student(self, k: int, function: Callable):
        """`function(unet)` of student k, whether it is a component or loaded for this, see `ResidentStudents.use`."""
        unet = getattr(self, SLOTS[k])
        return self.residents.use(k, function) if unet is None else function(unet)

    def in_running_order(self, students: Iterable[int]) -> list[int]:
        """The numbers once each and ascending, but those of students that still have to be loaded last."""
        resident = [] if self.residents is None else self.residents.resident
        return sorted(set(students), key=lambda k: (getattr(self, SLOTS[k]) is None and k not in resident, k))

    def to(self, *args, **kwargs):
        """As in diffusers; students that are loaded later follow."""
        super().to(*args, **kwargs)
        if self.residents is not None:
            kwargs.pop("silence_dtype_warnings", None)
            self.residents.to(*args, **kwargs)
        return self

    @property
    def device(self) -> torch.device:
        """Where the students run."""
        return super().device if self.residents is None else self.residents.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the first student if students are loaded when needed, else of the first component."""
        return super().dtype if self.residents is None else next(iter(self.residents.shapes.values())).dtype

    @property
    def components(self) -> dict:
        """As in diffusers, less the empty slots; a student that was left out is kept as None."""
        routed = SLOTS[: 0 if self.router is None else self.router.num_students]
        return {name: c for name, c in super().components.items() if c is not None or name in routed}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, max_resident_students: int | None = None, **kwargs):
        """As `SafePipeline.from_pretrained`; `unet_1=None` leaves student 1 out, it is not even downloaded.

        (diffusers' generic `DiffusionPipeline.from_pretrained` would load it all the same, and load all at once.)

        Args:
            pretrained_model_name_or_path: a folder, or a repo id on the Hub.
            max_resident_students: load, and download, a student when a condition is first routed to it, and have at
                most this many in memory; the least recently used one leaves. In [1, number of students]. None loads
                all of them now. Calls in several threads are safe, on one CUDA stream. Students that are given
                (`unet_1=net`, `add_student`) are not counted.
            kwargs: as there; with `max_resident_students` only components and `residents.OPTIONS`.

        Raises:
            ValueError: also if a part of the router has no student and none was left out there, now or at the save.
        """
        residents, given = None, kwargs
        if max_resident_students is not None:
            unknown = sorted(set(kwargs) - {*OPTIONS, *inspect.signature(cls.__init__).parameters})
            if unknown:
                raise ValueError(
                    f"{unknown[0]}: not possible with max_resident_students, which takes {', '.join(OPTIONS)} and "
                    "components"
                )
            saved = SavedStudents(cls, pretrained_model_name_or_path, kwargs)
            residents = ResidentStudents(saved.load, saved.shapes, max_resident_students)
            given = saved.options_for_the_rest(kwargs)
        pipe = super().from_pretrained(pretrained_model_name_or_path, **given)
        if residents is not None:
            pipe.residents = residents
            check_students(pipe.students, pipe.router, pipe.vae, pipe.text_encoder)
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
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs):
        """As in diffusers; ValueError for a pipeline that was loaded with `max_resident_students`."""
        if isinstance(pipeline, StudentSlots) and pipeline.residents is not None:
            raise ValueError("pipeline: it was loaded with max_resident_students, so its students are no components")
        return super().from_pipe(pipeline, **kwargs)

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
        others = {other: member for other, member in self._members.items() if other != k}
        networks = networks_of({**others, k: unet}, self.unet)
        check_students(networks, self.router, self.vae, self.text_encoder)
        if isinstance(unet, LoraStudent):
            attach(self.unet, {SLOTS[k]: unet}, replace=True)
        self.register_modules(**{SLOTS[k]: unet})

    @property
    def student_parameters(self) -> dict[int, int]:
        """How many parameters each student that is present has, {k: number}; of a LoRA student its adapter alone."""
        return {k: member.num_parameters() for k, member in self._members.items()}

    def count_parameters(self) -> tuple[int, int]:
        """Parameters of the largest network that makes an image, and of all students with what they share."""
        sizes = self.student_parameters.values()
        shared = 0 if self.unet is None else base_of(self.unet).num_parameters()
        return shared + max(sizes), shared + sum(sizes)

    @needs_all_students
    def fuse_student(self, k: int) -> UNet2DModel | UNet2DConditionModel:
        """Student k as an ordinary network of its own; of a LoRA student the sum of base and adapter.

        Args:
            k: one of the students that are present.

        Raises:
            ValueError: `k` is not present.
        """
        if k not in self.students:
            raise ValueError(f"k: {k!r} is not present, allowed are {list(self.students)}")
        member = self._members[k]
        return member.fuse(self.unet) if isinstance(member, LoraStudent) else member

    @needs_all_students
    def fuse_students(self) -> "StudentSlots":
        """This pipeline with each LoRA student as a full network: K times the memory, and no PEFT to run it."""
        parts = {**self.components, **{SLOTS[k]: self.fuse_student(k) for k in self.students}}
        return type(self)(**{**parts, "unet": None}, student_timesteps=self.config.student_timesteps)

    @needs_all_students
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
