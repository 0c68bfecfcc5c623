# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Tiny real components shared by the tests: nets of a few thousand weights, the EDM scheduler, whole pipelines."""

import torch
from diffusers import EDMEulerScheduler, UNet2DModel

from diffusers_msd import ClassRouter, MultiStudentPipeline


def tiny_unet(
    num_classes: int | None = 4,
    sample_size: int = 8,
    channels: int = 1,
    seed: int = 0,
    block_out_channels: tuple[int, ...] = (8, 16),
    **config,
) -> UNet2DModel:
    """A class-conditional `UNet2DModel` with attention, in evaluation mode; other seeds give other weights.

    Parameters that start at zero (biases) are drawn at random too, so that no layer is silent in a comparison.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DModel(
            sample_size=sample_size,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=block_out_channels,
            layers_per_block=1,
            down_block_types=("DownBlock2D",) * (len(block_out_channels) - 1) + ("AttnDownBlock2D",),
            up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (len(block_out_channels) - 1),
            norm_num_groups=4,
            attention_head_dim=8,
            num_class_embeds=num_classes,
            **config,
        )
    with torch.no_grad():
        for parameter in unet.parameters():
            if not parameter.any():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return unet.eval()


def edm_scheduler() -> EDMEulerScheduler:
    """EDM's schedule: sigma from 0.002 to 80, sigma_data 0.5, 1000 noise levels."""
    return EDMEulerScheduler()


def tiny_pipeline(k: int = 2, num_classes: int = 4, **unet_kwargs) -> MultiStudentPipeline:
    """K tiny students of different weights behind a consecutive `ClassRouter`, without a progress bar."""
    students = {f"unet_{i}": tiny_unet(num_classes, seed=i, **unet_kwargs) for i in range(k)}
    pipe = MultiStudentPipeline(edm_scheduler(), ClassRouter.consecutive(num_classes, k), **students)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(*seeds: int) -> list[torch.Generator]:
    """One CPU generator per image."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]
