# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""The 2-D toy of `toy.py`: a mixture of Gaussians with its exact denoiser, and many small MLPs trained as one.

A sample is a "picture" of 2 channels and one pixel, [B, 2, 1, 1], so the package's schedule, losses, stages and samplers
serve as they are. Students are stacked: row i of a batch belongs to network i mod S, and S matrix products are one.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, EDMEulerScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from diffusers_msd.denoiser import Denoiser
from diffusers_msd.schedule import NoiseSchedule, expand


CLUSTERS = 8
# sigma_data is the standard deviation of a coordinate over the mixture: sqrt(0.5^2 / 2 + 0.1^2 / 2 + 0.005^2) = 0.36.
# sigma_max: 28 of those. At the 160 of EDM, levels would be spent where nothing is left to see; at less, the start of the
# ODE, which ignores that a cluster lies 0.5 off the centre, would show (here 0.05 standard deviations of the noise).
SCHEDULER = EDMEulerScheduler(sigma_min=0.002, sigma_max=10.0, sigma_data=0.36)


@dataclass(frozen=True)
class Mixture:
    """8 clusters on a circle, each of 8 Gaussians on a small circle; a condition is a cluster."""

    outer_radius: float = 0.5
    inner_radius: float = 0.1
    std: float = 0.005

    def means(self) -> torch.Tensor:
        """[8 clusters, 8 components, 2], float64."""
        angle = torch.arange(8, dtype=torch.float64) * (2 * math.pi / 8)
        circle = torch.stack([angle.cos(), angle.sin()], dim=1)
        return self.outer_radius * circle[:, None] + self.inner_radius * circle

    def sample(self, cluster: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """float32 [B, 2, 1, 1] for clusters LongTensor [B]."""
        component = torch.randint(8, (len(cluster),), generator=generator)
        noise = torch.randn(len(cluster), 2, generator=generator, dtype=torch.float64)
        return (self.means()[cluster, component] + self.std * noise).float()[..., None, None]


class MixtureDenoiser(nn.Module):
    """The exact posterior mean of a cluster's Gaussians: called as `Denoiser`, without a network.

    x_t of component j is N(m_j, s^2 + sigma^2). So E[x0 | x_t] = sum_j w_j (m_j + s^2 / (s^2 + sigma^2) (x_t - m_j)) with
    w = softmax_j(-|x_t - m_j|^2 / (2 (s^2 + sigma^2))), in float64; softmax shifts by the maximum.
    """

    def __init__(self, mixture: Mixture, schedule: NoiseSchedule):
        super().__init__()
        self.mixture = mixture
        self.schedule = schedule
        self.register_buffer("means", mixture.means())

    def forward(self, x_t, t, cond, guidance_scale=None):
        x = x_t.double().flatten(1)[:, None]
        variance = expand(self.schedule.sigma(t), x) ** 2 + self.mixture.std**2
        means = self.means[cond]
        weights = (-((x - means) ** 2).sum(dim=2, keepdim=True) / (2 * variance)).softmax(dim=1)
        x0 = (weights * (means + self.mixture.std**2 / variance * (x - means))).sum(dim=1)
        return x0.to(x_t.dtype).reshape(x_t.shape)


class StackedLinear(nn.Module):
    """S linear layers: [S, n, inputs] -> [S, n, outputs], initialised as `nn.Linear`."""

    def __init__(self, stack: int, inputs: int, outputs: int):
        super().__init__()
        bound = inputs**-0.5
        self.weight = nn.Parameter(torch.empty(stack, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(stack, 1, outputs).uniform_(-bound, bound))

    def forward(self, x):
        return torch.baddbmm(self.bias, x, self.weight)


def stacked_mlp(stack: int, widths: list[int]) -> nn.Sequential:
    """Linear layers with SiLU in between."""
    layers: list[nn.Module] = []
    for inputs, outputs in zip(widths, widths[1:]):
        layers += [StackedLinear(stack, inputs, outputs), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


class StackedMLP(ModelMixin, ConfigMixin):
    """S small networks of a point, its noise level and its cluster.

    Args:
        stack: S.
        width: of the hidden layers.
    """

    @register_to_config
    def __init__(self, stack: int = 1, width: int = 64, in_channels: int = 2, sample_size: int = 1):
        super().__init__()
        self.encoder = nn.Sequential(
            stacked_mlp(stack, [in_channels + 1 + CLUSTERS, width, width]),
            nn.SiLU(),
        )
        self.mid_block = stacked_mlp(stack, [width, width, in_channels])

    def forward(self, x, timestep, cond):
        inputs = torch.cat([x.flatten(1), timestep[:, None], F.one_hot(cond, CLUSTERS)], dim=1)
        hidden = self.encoder(inputs.view(-1, self.config.stack, inputs.shape[1]).transpose(0, 1))
        return self.mid_block(hidden).transpose(0, 1).reshape(x.shape)

    def stacked(self, stack: int) -> "StackedMLP":
        """`stack` copies of this one network (S = 1)."""
        copies = StackedMLP(**{**self.config, "stack": stack})
        copies.load_state_dict({name: w.expand(stack, -1, -1) for name, w in self.state_dict().items()})
        return copies


class StackedDenoiser(Denoiser):
    """Calls a `StackedMLP`; features are the hidden activations [S, n, width] half-way."""

    def call_network(self, x, timestep, cond):
        return self.model(x, timestep, cond)

    def tap(self, store):
        return self.model.mid_block.register_forward_pre_hook(lambda module, args: store(args[0]))


class StackedHead(ModelMixin, ConfigMixin):
    """S discriminators on the features of S fake scores: [S, n, width] -> logits [n S], row i of network i mod S."""

    @register_to_config
    def __init__(self, stack: int, width: int):
        super().__init__()
        self.layers = stacked_mlp(stack, [width, width, 1])

    def forward(self, features):
        return self.layers(features).transpose(0, 1).flatten()


class StackedParts:
    """The conditions of S students, indexed as one table: `parts[rows]` gives row i to student i mod S.

    Each student of K has 8 / K consecutive clusters; the table has 8 rows, so a student with fewer sees each of its
    clusters as often.

    Args:
        num_students: every K whose students are in the stack, one after another.
    """

    def __init__(self, num_students: tuple[int, ...]):
        sizes = [CLUSTERS // k for k in num_students for _ in range(k)]
        self.sizes = torch.tensor(sizes)
        self.first = torch.tensor([i * (CLUSTERS // k) for k in num_students for i in range(k)])

    def __len__(self):
        return CLUSTERS

    def __getitem__(self, rows):
        rows = torch.as_tensor(rows).view(-1, len(self.sizes))
        return (self.first + rows % self.sizes).flatten()


def toy_schedule() -> NoiseSchedule:
    return NoiseSchedule.from_scheduler(SCHEDULER)
