# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Pictures and distances while a student trains."""

from pathlib import Path

import torch
from diffusers import ModelMixin

from .denoiser import Denoiser, sample_shape
from .feature_net import extract_features
from .grids import save_grid
from .metrics import frechet_distance
from .pairs import pair_noise


class Validation:
    """Draws a grid (a row per condition shown, fixed seeds) and measures the part's Fréchet distance.

    Args:
        student: the student in training.
        part: the conditions of its part [n, ...].
        shown: those of the grid [m, ...].
        make_decoder: called with the device, gives the map from samples to images; what it holds lives no longer than
            one validation.
        folder: of the grids.
        feature_net: of the distance, None for no distance.
        real: the part's data.
        num_images: per distance.
    """

    columns = 8

    def __init__(self, student: Denoiser, part, shown, make_decoder, folder: Path, feature_net, real, num_images: int):
        self.student, self.part, self.shown, self.make_decoder = student, part, shown, make_decoder
        self.folder, self.feature_net, self.num_images = folder, feature_net, num_images
        if feature_net is not None:
            # Ten thousand real images settle the distance well below its differences between students.
            samples = real.__getitems__(range(0, len(real), -(-len(real) // 10_000)))["images"]
            with torch.no_grad():
                self.real_features = extract_features(feature_net, self.decode(samples))[0]

    def decode(self, samples: torch.Tensor) -> torch.Tensor:
        decoder = self.make_decoder(self.student.model.device)
        return torch.cat([decoder(batch).cpu() for batch in samples.split(64)])

    def generate(self, cond: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
        device = self.student.model.device
        z = pair_noise(seeds, sample_shape(self.student.model))
        batches = [self.student.generate(a.to(device), b.to(device)) for a, b in zip(z.split(256), cond.split(256))]
        return self.decode(torch.cat(batches))

    def __call__(self, step: int, model: ModelMixin) -> dict[str, float]:
        cond = self.shown.repeat_interleave(self.columns, dim=0)
        images = self.generate(cond, torch.arange(self.columns).repeat(len(self.shown)))
        save_grid(images, self.columns, self.folder / f"samples-{step:07d}.png")
        if self.feature_net is None:
            return {}
        seeds = torch.arange(self.num_images)
        images = self.generate(self.part[seeds % len(self.part)], seeds)
        return {"fd": frechet_distance(self.real_features, extract_features(self.feature_net, images)[0])}
