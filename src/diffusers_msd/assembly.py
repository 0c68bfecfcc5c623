# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""The parts of a pipeline from different places: students of several runs, VAE and text encoder of the teacher."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import (
    DiffusionPipeline,
    ModelMixin,
    UNet2DConditionModel,
    UNet2DModel,
)

from .adapters import LoraStudent
from .files import load_model
from .pipeline_inputs import SHARED_SETTINGS, SLOTS, check_students, networks_of
from .routing import ConditionRouter
from .teachers import TEACHERS, load_scheduler, load_text_parts, load_unet


def load_parts(
    base: str | Path | DiffusionPipeline,
    students: Sequence,
    router: ConditionRouter,
    dtype: torch.dtype | None,
    **given,
) -> dict:
    """The components of `MultiStudentPipeline.from_students`, all but the router; errors name `students[k]`."""
    if len(students) not in range(1, len(SLOTS) + 1):
        raise ValueError(f"students: 1 ... {len(SLOTS)} expected, got {len(students)}")
    if len(students) != router.num_students:
        raise ValueError(f"students: the router has {router.num_students} parts, got {len(students)} students")
    unets = [load_student(source, k, dtype) for k, source in enumerate(students)]
    present = {k: unet for k, unet in enumerate(unets) if unet is not None}
    if not present:
        raise ValueError("students: at least one is needed, got None alone")
    adapters = any(isinstance(unet, LoraStudent) for unet in unets)
    if adapters and "unet" not in given:
        given["unet"] = load_base_network(base, dtype)
    networks = networks_of(present, given.get("unet"))
    takes_prompts = any(isinstance(network, UNet2DConditionModel) for network in networks.values())
    parts = {**load_base(base, takes_prompts, dtype), **given}
    check_students(networks, router, parts.get("vae"), parts.get("text_encoder"), "students[{}]")
    return {**parts, **dict(zip(SLOTS, unets))}


def load_student(source, k: int, dtype: torch.dtype | None) -> ModelMixin | None:
    """One student, wherever it lies.

    Args:
        source: a model or `LoraStudent`, which is used as it is; None for a student that is left out; or a folder or Hub id: of a
            single net or adapter, of a `MultiStudentPipeline` (its `unet_<k>`), of another pipeline (its `unet`), or with the
            subfolder, "repo::subfolder".
        k: which student it shall be.
        dtype: what the weights are loaded in; None for float32.

    Raises:
        TypeError, FileNotFoundError, ValueError: naming `students[k]`.
    """
    argument = f"students[{k}]"
    if source is None or isinstance(source, (LoraStudent, *SHARED_SETTINGS)):
        return source
    if not isinstance(source, (str, Path)):
        raise TypeError(f"{argument}: a model, a folder, a Hub id or None expected, got {type(source).__name__}")
    path, subfolder = _place(str(source), k)
    try:
        name = UNet2DModel.load_config(path, subfolder=subfolder)["_class_name"]
    except OSError as error:
        raise FileNotFoundError(
            f"{argument}: {source} is neither a net nor a pipeline with one in {subfolder}/: {error}"
            if subfolder
            else f"{argument}: {source} is neither a net nor a pipeline, on disk or on the Hub: {error}"
        ) from error
    if name == LoraStudent.__name__:
        return LoraStudent.from_pretrained(path, subfolder=subfolder)
    if name not in TEACHERS:
        raise ValueError(f"{argument}: {source} holds a {name}; one of {', '.join(TEACHERS)} is needed")
    return load_model(TEACHERS[name], path, argument, subfolder=subfolder, dtype=dtype)


def _place(source: str, k: int) -> tuple[str, str | None]:
    path, _, subfolder = source.partition("::")
    if subfolder:
        return path, subfolder
    try:
        index = DiffusionPipeline.load_config(path)
    except OSError:
        # No pipeline: the net itself, or nothing, which shows when its config is read.
        return path, None
    return path, f"unet_{k}" if index["_class_name"] == "MultiStudentPipeline" else "unet"


def load_router(source: ConditionRouter | str | Path) -> ConditionRouter:
    """A router as it is, or from a folder or Hub id, "repo::subfolder" if it does not lie at the root."""
    if isinstance(source, ConditionRouter):
        return source
    if not isinstance(source, (str, Path)):
        raise TypeError(f"router: a ConditionRouter, a folder or a Hub id expected, got {type(source).__name__}")
    path, _, subfolder = str(source).partition("::")
    try:
        return ConditionRouter.from_pretrained(path, subfolder=subfolder or None)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"router: {error}") from error


def load_base_network(source: str | Path | DiffusionPipeline, dtype: torch.dtype | None) -> ModelMixin:
    """The network that LoRA students were trained on: `unet` of a pipeline, or in its folder or repository.

    Raises:
        FileNotFoundError, ValueError: naming `base`.
    """
    if isinstance(source, DiffusionPipeline):
        if source.components.get("unet") is None:
            raise ValueError(f"base: this {type(source).__name__} has no unet, which LoRA students run on")
        return source.unet
    return load_unet(source, "base", dtype).eval()


def load_base(source: str | Path | DiffusionPipeline, takes_prompts: bool, dtype: torch.dtype | None) -> dict:
    """What the students share with their teacher, {name of the component: component}.

    Args:
        source: a folder or Hub id with `scheduler/` and, for prompts, `vae/`, `text_encoder/` and `tokenizer/`; or a
            loaded pipeline with such components.
        takes_prompts: whether the last three are needed.
        dtype: what weights are loaded in; None for float32.

    Raises:
        FileNotFoundError, ValueError: naming `base`, with the part that is missing or damaged.
    """
    names = ("scheduler", "vae", "text_encoder", "tokenizer") if takes_prompts else ("scheduler",)
    if isinstance(source, DiffusionPipeline):
        missing = [name for name in names if source.components.get(name) is None]
        if missing:
            raise ValueError(f"base: this {type(source).__name__} has no {', '.join(missing)}")
        return {name: source.components[name] for name in names}
    scheduler = load_scheduler(source, "base")
    return {"scheduler": scheduler, **(load_text_parts(source, "base", dtype)._asdict() if takes_prompts else {})}
