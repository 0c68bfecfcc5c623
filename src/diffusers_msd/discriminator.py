# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""The GAN head on the fake score's features."""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn


class DiscriminatorHead(ModelMixin, ConfigMixin):
    """Features [B, channels, size, size] to one logit per sample, in float32.

    Strided 4x4 convolutions with GroupNorm and SiLU bring the features to 1x1, then a 1x1 convolution gives the
    logit. For size 8 this is DMD2's head (arXiv 2405.14867): 4x4 stride 2, 4x4 stride 4, 1x1.

    Args:
        channels: channels of the features.
        size: height and width of the features, a power of two.

    Raises:
        ValueError: if `size` is not a power of two.
    """

    @register_to_config
    def __init__(self, channels: int, size: int):
        super().__init__()
        if size < 1 or size & (size - 1):
            raise ValueError(f"size: the tapped features must be a power of two wide, got {size}")
        # A group needs some members: at 1x1 a group of one channel would always normalise to zero.
        groups = max(g for g in (1, 2, 4, 8, 16, 32) if channels % g == 0 and (g == 1 or channels // g >= 16))
        layers: list[nn.Module] = []
        while size > 4:
            layers += [
                nn.Conv2d(channels, channels, 4, stride=2, padding=1),
                nn.GroupNorm(groups, channels),
                nn.SiLU(),
            ]
            size //= 2
        layers += [nn.Conv2d(channels, channels, size), nn.GroupNorm(groups, channels), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 1))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[B, channels, size, size] -> logits [B]."""
        return self.layers(features).flatten()
