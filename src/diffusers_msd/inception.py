# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""The Inception network that published FIDs are computed with, from the package torch-fidelity (extra `fid`)."""

import os
from typing import Optional
from unittest import mock

import torch
from torch import nn


class InceptionFeatures(nn.Module):
    """TensorFlow's Inception v3 of 2015, ported: 2048 features and 1008 class logits per image.

    torch-fidelity downloads the weights (96 MB) at the first use. They are read without running code from the file.

    Args:
        weights: a file of the same weights that is there already.

    Raises:
        ImportError: without torch-fidelity, or without a torchvision that fits the installed torch.
    """

    def __init__(self, weights: Optional[str] = None):
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        # torchvision raises a RuntimeError where it was built for another torch.
        except (ImportError, RuntimeError) as error:
            raise ImportError(
                "feature_net: 'inception' needs torch-fidelity and a torchvision that fits the installed torch: "
                f"pip install 'diffusers_msd[fid]' ({error})"
            ) from error
        # It reads its file with torch.load, which would run what a hostile file says; torch has a switch against that.
        with mock.patch.dict(os.environ, TORCH_FORCE_WEIGHTS_ONLY_LOAD="1"):
            self.net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], weights)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features of images.

        Args:
            images: [B, 3, H, W] in [-1, 1]; rounded to 8 bits, as if they had been saved, and resized by the network.

        Returns:
            Features [B, 2048] and logits [B, 1008], without the last layer's bias as Inception scores are published.
            The order of the classes is the network's own: its logits tell nothing of the class asked for.
        """
        pixels = images.clamp(-1, 1).add(1).mul(127.5).round().byte()
        features, logits = self.net(pixels)
        return features, logits
