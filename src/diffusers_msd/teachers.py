# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Teachers on disk: a diffusers folder with `unet/` and `scheduler/`, and for text `vae/`, `text_encoder/`, ..."""

from pathlib import Path
from typing import NamedTuple

import diffusers
from diffusers import AutoencoderKL, DDPMScheduler, ModelMixin, SchedulerMixin, UNet2DConditionModel, UNet2DModel
from transformers import CLIPTextModel, CLIPTokenizer

from .files import atomic_directory, load_model, model_fingerprint, write_json


TEACHERS = {"UNet2DModel": UNet2DModel, "UNet2DConditionModel": UNet2DConditionModel}


class TextParts(NamedTuple):
    """What surrounds the UNet of a Stable Diffusion teacher, in float32 without gradient."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL


def save_teacher(path: Path, model: ModelMixin, scheduler: SchedulerMixin, record: dict | None = None):
    """Writes a teacher into a folder, each part atomically; `record` (how it was trained) goes to `teacher.json`."""
    path = Path(path)
    for name, part in (("unet", model), ("scheduler", scheduler)):
        with atomic_directory(path / name) as folder:
            part.save_pretrained(folder)
    write_json(path / "teacher.json", {**(record or {}), "fingerprint": model_fingerprint(model, scheduler)})


def _class_name(path: str, subfolder: str, config_class: type) -> str:
    try:
        return config_class.load_config(path, subfolder=subfolder)["_class_name"]
    except OSError as error:
        raise FileNotFoundError(f"pretrained_teacher_model: {path} has no readable {subfolder}/: {error}") from error


def load_teacher(path: str) -> tuple[ModelMixin, SchedulerMixin]:
    """Loads a teacher's network and scheduler, from a local folder or a Hub id with `unet/` and `scheduler/`.

    Returns:
        (a class-conditional `UNet2DModel` or a `UNet2DConditionModel`, in float32 without gradient; scheduler).

    Raises:
        FileNotFoundError, ValueError: something is missing, truncated or unknown, with its place.
    """
    name = _class_name(path, "unet", UNet2DModel)
    if name not in TEACHERS:
        raise ValueError(
            f"pretrained_teacher_model: {path}: unet/ is a {name}; one of {', '.join(TEACHERS)} is needed"
        )
    model = load_model(TEACHERS[name], path, "pretrained_teacher_model", subfolder="unet")
    if isinstance(model, UNet2DModel) and not model.config.num_class_embeds:
        raise ValueError(
            f"pretrained_teacher_model: {path} is not class-conditional; a UNet2DModel with num_class_embeds is needed"
        )
    name = _class_name(path, "scheduler", DDPMScheduler)
    if name not in dir(diffusers):
        raise ValueError(f"pretrained_teacher_model: {path}: diffusers has no scheduler {name!r}")
    scheduler = load_model(getattr(diffusers, name), path, "pretrained_teacher_model", subfolder="scheduler")
    return model.requires_grad_(False).eval(), scheduler


def load_text_parts(path: str) -> TextParts:
    """Loads tokenizer, text encoder and VAE of a Stable Diffusion teacher.

    Raises:
        FileNotFoundError, ValueError: something is missing or damaged, with its place.
    """
    try:
        tokenizer = CLIPTokenizer.from_pretrained(path, subfolder="tokenizer")
        text_encoder = CLIPTextModel.from_pretrained(path, subfolder="text_encoder", use_safetensors=True)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"pretrained_teacher_model: {path} has no readable tokenizer/ and text_encoder/ (CLIP, safetensors): {error}"
        ) from error
    vae = load_vae(path)
    return TextParts(tokenizer, text_encoder.float().requires_grad_(False).eval(), vae)


def load_vae(path: str) -> AutoencoderKL:
    """Loads the VAE of a Stable Diffusion teacher, in float32 without gradient; errors as `load_text_parts`."""
    return load_model(AutoencoderKL, path, "pretrained_teacher_model", subfolder="vae").requires_grad_(False).eval()
