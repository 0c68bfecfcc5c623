# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Teachers on disk: a diffusers folder with `unet/` and `scheduler/`."""

from pathlib import Path

import diffusers
from diffusers import DDPMScheduler, ModelMixin, SchedulerMixin, UNet2DModel

from .files import atomic_directory, load_model, model_fingerprint, write_json


def save_teacher(path: Path, model: ModelMixin, scheduler: SchedulerMixin, record: dict | None = None):
    """Writes a teacher into a folder, each part atomically; `record` (how it was trained) goes to `teacher.json`."""
    path = Path(path)
    for name, part in (("unet", model), ("scheduler", scheduler)):
        with atomic_directory(path / name) as folder:
            part.save_pretrained(folder)
    write_json(path / "teacher.json", {**(record or {}), "fingerprint": model_fingerprint(model, scheduler)})


def load_teacher(path: str) -> tuple[ModelMixin, SchedulerMixin]:
    """Loads a class-conditional pixel-space teacher, a local folder or a Hub id with `unet/` and `scheduler/`.

    Returns:
        (model in float32 without gradient, scheduler).

    Raises:
        FileNotFoundError, ValueError: something is missing, truncated or unknown, with its place.
    """
    model = load_model(UNet2DModel, path, "pretrained_teacher_model", subfolder="unet")
    if not model.config.num_class_embeds:
        raise ValueError(
            f"pretrained_teacher_model: {path} is not class-conditional; a UNet2DModel with num_class_embeds is needed"
        )
    try:
        name = DDPMScheduler.load_config(path, subfolder="scheduler")["_class_name"]
    except OSError as error:
        raise FileNotFoundError(f"pretrained_teacher_model: {path} has no readable scheduler/: {error}") from error
    if name not in dir(diffusers):
        raise ValueError(f"pretrained_teacher_model: {path}: diffusers has no scheduler {name!r}")
    scheduler = load_model(getattr(diffusers, name), path, "pretrained_teacher_model", subfolder="scheduler")
    return model.requires_grad_(False).eval(), scheduler
