# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""A small network whose features the metrics can use where no Inception network is at hand.

Print `describe_feature_net` beside every number it gives.
"""

from typing import Optional

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from .files import fingerprint


class FeatureNet(ModelMixin, ConfigMixin):
    """Small convolutional classifier with a linear bottleneck before its head: the features.

    Per entry of `channels`: 3x3 convolution, GroupNorm, SiLU, max pool by 2. The features are a linear projection of
    all that is left, positions included; the head reads their SiLU. An image's features do not depend on its batch.

    Args:
        in_channels: channels of the images.
        sample_size: side the images are resized to, in pixels; at least 2 ** len(channels).
        num_classes: outputs of the classifier.
        feature_dim: D of the features.
        channels: width of each stage, multiples of 8.
        heldout_accuracy: share of held-out images classified right, in [0, 1], by resolution in pixels ("32").
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        sample_size: int = 8,
        num_classes: int = 10,
        feature_dim: int = 64,
        channels: tuple[int, ...] = (32, 64),
        heldout_accuracy: Optional[dict[str, float]] = None,
    ):
        super().__init__()
        side = sample_size // 2 ** len(channels)
        if side < 1:
            raise ValueError(f"`sample_size` must be >= {2 ** len(channels)} for {channels}, got {sample_size}.")
        if any(width % 8 for width in channels):
            raise ValueError(f"`channels` must be multiples of 8, got {channels}.")
        layers = []
        for width_in, width in zip((in_channels, *channels), channels):
            conv = nn.Conv2d(width_in, width, 3, padding=1)
            layers += [conv, nn.GroupNorm(8, width), nn.SiLU(), nn.MaxPool2d(2)]
        self.body = nn.Sequential(*layers)
        self.projection = nn.Linear(channels[-1] * side**2, feature_dim)
        self.head = nn.Linear(feature_dim, num_classes)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features and class logits of images.

        Args:
            images: `[B, in_channels, H, W]` in [-1, 1]; resized bilinearly, antialiased, to `sample_size`.

        Returns:
            Features `[B, feature_dim]` and logits `[B, num_classes]`.

        Raises:
            ValueError: `images` does not have four dimensions or has another number of channels.
        """
        channels = self.config.in_channels
        if images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(f"`images` must have shape [B, {channels}, H, W], got {tuple(images.shape)}.")
        size = (self.config.sample_size,) * 2
        if images.shape[-2:] != size:
            images = F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)
        features = self.projection(self.body(images).flatten(1))
        return features, self.head(F.silu(features))


def weights_hash(module: nn.Module) -> str:
    """First 12 hex digits of a sha256 over the names, dtypes, shapes and bytes of a module's weights and buffers."""
    return fingerprint(module.state_dict())[:12]


def describe_feature_net(feature_net: FeatureNet) -> str:
    """One line to print beside every number: the hash of the network's weights and its held-out accuracies."""
    accuracies = feature_net.config.heldout_accuracy or {}
    measured = ", ".join(f"{100 * value:.2f} % at {size} px" for size, value in accuracies.items())
    return f"FeatureNet {weights_hash(feature_net)}, held-out accuracy {measured or 'not measured'}"


@torch.no_grad()
def extract_features(
    feature_net: nn.Module, images: torch.Tensor, batch_size: int = 256
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and logits of many images, in eval mode, `batch_size` at a time on the network's device.

    Args:
        feature_net: any module that gives (features `[B, D]`, logits `[B, num_classes]`).
        images: `[N, C, H, W]` in [-1, 1], N >= 1.
        batch_size: images per forward pass.

    Returns:
        Features `[N, D]` and logits `[N, num_classes]` on the CPU.
    """
    device, was_training = next(feature_net.parameters(), images).device, feature_net.training
    feature_net.eval()
    try:
        outputs = [[out.cpu() for out in feature_net(batch.to(device))] for batch in images.split(batch_size)]
    finally:
        feature_net.train(was_training)
    features, logits = zip(*outputs)
    return torch.cat(features), torch.cat(logits)
