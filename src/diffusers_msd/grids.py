# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Pictures of samples."""

import io
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import make_image_grid
from PIL import Image

from .files import atomic_write


def image_grid(images: torch.Tensor, columns: int, min_side: int = 32) -> Image.Image:
    """Lays out images [N, 1 or 3, H, W] in [-1, 1] row by row, framed; small ones are enlarged, pixels kept sharp.

    Raises:
        ValueError: if N is no multiple of `columns`.
    """
    if len(images) % columns:
        raise ValueError(f"columns: {len(images)} images do not fill rows of {columns}")
    images = F.pad(images.float().clamp(-1, 1), (1, 1, 1, 1))
    array = VaeImageProcessor.pt_to_numpy((images + 1) / 2)
    factor = max(1, -(-min_side // images.shape[-1]))
    size = (images.shape[-1] * factor, images.shape[-2] * factor)
    pictures = [p.convert("RGB").resize(size, Image.NEAREST) for p in VaeImageProcessor.numpy_to_pil(array)]
    return make_image_grid(pictures, rows=len(images) // columns, cols=columns)


def save_grid(images: torch.Tensor, columns: int, path: Path):
    """`image_grid` as a PNG file, written atomically."""
    buffer = io.BytesIO()
    image_grid(images, columns).save(buffer, format="PNG")
    atomic_write(path, buffer.getvalue())
