# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Images and captions in one space: a small network for it, its loss, and how often a caption is found again.

The method is CLIP's (Radford et al. 2021, arXiv 2103.00020), at a size that trains in minutes on a CPU.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn


# CLIP's bounds: it starts at 0.07, and logits are scaled by 100 at most.
_FIRST_TEMPERATURE = 0.07
_LOWEST_TEMPERATURE = 0.01


class ContrastiveNet(ModelMixin, ConfigMixin):
    """A convolutional image encoder, and projections of images and pooled text into one space.

    Args:
        in_channels: of the images.
        sample_size: side of the images, divisible by 2^stages.
        channels: width of each stage, multiples of 8; each stage halves the side.
        feature_dim: D, width of the image features that distances (FD, KID) are computed on.
        text_dim: hidden size of the text encoder.
        projection_dim: P, width of the common space.
        accuracy: retrieval accuracy on the training images, for the record.

    Raises:
        ValueError: `sample_size` or `channels` do not fit.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        sample_size: int = 32,
        channels: tuple[int, ...] = (32, 64, 128),
        feature_dim: int = 128,
        text_dim: int = 128,
        projection_dim: int = 128,
        accuracy: dict[str, float] | None = None,
    ):
        super().__init__()
        if sample_size < 1 or sample_size % 2 ** len(channels):
            raise ValueError(f"sample_size: a multiple of {2 ** len(channels)} expected, got {sample_size}")
        if not channels or any(width % 8 or width < 8 for width in channels):
            raise ValueError(f"channels: multiples of 8 expected, got {channels}")
        layers = []
        for width_in, width in zip((in_channels, *channels), channels):
            conv = nn.Conv2d(width_in, width, 3, padding=1)
            layers += [conv, nn.GroupNorm(8, width), nn.SiLU(), nn.MaxPool2d(2)]
        side = sample_size // 2 ** len(channels)
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * side**2, feature_dim))
        self.image_projection = nn.Linear(feature_dim, projection_dim, bias=False)
        self.text_projection = nn.Linear(text_dim, projection_dim, bias=False)
        self.log_temperature = nn.Parameter(torch.tensor(_FIRST_TEMPERATURE).log())

    @property
    def temperature(self) -> torch.Tensor:
        """What cosines are divided by, a learned number >= 0.01."""
        return self.log_temperature.exp().clamp(min=_LOWEST_TEMPERATURE)

    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        """Features [N, D] of images [N, C, S, S] in [-1, 1], for distances between sets of images.

        Raises:
            ValueError: images of another shape.
        """
        config = self.config
        expected = (config.in_channels, config.sample_size, config.sample_size)
        if images.shape[1:] != expected:
            raise ValueError(f"images: [N, {', '.join(map(str, expected))}] expected, got {list(images.shape)}")
        return self.body(images)

    def embed_images(self, images: torch.Tensor) -> torch.Tensor:
        """Unit vectors [N, P] of images [N, C, S, S] in [-1, 1]."""
        return F.normalize(self.image_projection(F.silu(self.image_features(images))), dim=-1)

    def embed_texts(self, pooled: torch.Tensor) -> torch.Tensor:
        """Unit vectors [N, P] of captions, given by the text encoder's vector of the end of text [N, text_dim]."""
        return F.normalize(self.text_projection(pooled), dim=-1)


def contrastive_loss(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, temperature: torch.Tensor | float
) -> torch.Tensor:
    """The symmetric cross-entropy of finding each image's caption in the batch, and each caption's image.

    Args:
        image_embeds: unit vectors [B, P].
        text_embeds: unit vectors [B, P]; row i belongs to image i.
        temperature: cosines are divided by it; > 0.

    Returns:
        [B], each sample's mean of both directions; log B if nothing is known.

    Source: Radford et al. 2021 (arXiv 2103.00020), figure 3.
    """
    logits = image_embeds @ text_embeds.T / temperature
    target = torch.arange(len(logits), device=logits.device)
    return (
        F.cross_entropy(logits, target, reduction="none") + F.cross_entropy(logits.T, target, reduction="none")
    ) / 2


@torch.no_grad()
def retrieval_accuracy(
    image_embeds: torch.Tensor,
    caption_rows: torch.Tensor,
    text_embeds: torch.Tensor,
    top: Sequence[int] = (1, 5),
    block: int = 1024,
) -> dict[int, float]:
    """How often an image's own caption is among the nearest of all captions, by the cosine, in float64.

    A caption that is just as near as the own one counts as nearer: embeddings that say nothing score nothing.

    Args:
        image_embeds: [N, P], N >= 1.
        caption_rows: integers [N] in [0, M): the row of each image's caption.
        text_embeds: [M, P].
        top: for each k in it, the share of images whose caption is among the k nearest; 1 <= k <= M.
        block: images compared at a time.

    Returns:
        {k: share in [0, 1]}.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, a row or a k out of its range.
    """
    for name, embeds in (("image_embeds", image_embeds), ("text_embeds", text_embeds)):
        if embeds.ndim != 2 or not len(embeds):
            raise ValueError(f"{name}: [N, P] with N >= 1 expected, got {list(embeds.shape)}")
        if not torch.isfinite(embeds).all():
            raise ValueError(f"{name}: finite numbers expected, got NaN or infinity")
    if image_embeds.shape[1] != text_embeds.shape[1]:
        raise ValueError(f"text_embeds: width {image_embeds.shape[1]} expected, got {text_embeds.shape[1]}")
    captions = len(text_embeds)
    if caption_rows.shape != image_embeds.shape[:1] or caption_rows.is_floating_point():
        raise ValueError(f"caption_rows: {len(image_embeds)} integers expected, got {list(caption_rows.shape)}")
    if caption_rows.min() < 0 or caption_rows.max() >= captions:
        raise ValueError(f"caption_rows: [0, {captions}) expected, got {caption_rows.min()} to {caption_rows.max()}")
    if not top or min(top) < 1 or max(top) > captions:
        raise ValueError(f"top: numbers from 1 to the {captions} captions expected, got {tuple(top)}")
    images, texts = (F.normalize(embeds.double().cpu(), dim=-1) for embeds in (image_embeds, text_embeds))
    nearer = []
    for rows, part in zip(caption_rows.cpu().split(block), images.split(block)):
        cosines = part @ texts.T
        nearer.append((cosines >= cosines.gather(1, rows[:, None])).sum(dim=1))
    rank = torch.cat(nearer)
    return {k: (rank <= k).double().mean().item() for k in top}
