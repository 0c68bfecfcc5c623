# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""The parts of the 2-D toy: its exact denoiser, its stacked networks and its distances."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F


sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from toy_models import (  # noqa: E402
    CLUSTERS,
    Mixture,
    MixtureDenoiser,
    StackedDenoiser,
    StackedHead,
    StackedMLP,
    StackedParts,
    toy_schedule,
)
from toy_report import energy_distance, histogram_l1  # noqa: E402

from diffusers_msd.sampling import sample_heun  # noqa: E402


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("sigma", [0.01, 0.05, 0.5, 5.0])
def test_exact_denoiser_follows_from_the_density(generator, sigma):
    """Tweedie: E[x0 | x_t] = x_t + sigma^2 grad log p(x_t), the gradient taken by autograd."""
    mixture, schedule = Mixture(), toy_schedule()
    cond = torch.arange(CLUSTERS).repeat(4)
    noise = torch.randn(len(cond), 2, 1, 1, generator=generator, dtype=torch.float64)
    x = (mixture.sample(cond, generator).double() + sigma * noise).requires_grad_()
    t = schedule.from_ratio(sigma)
    variance = schedule.sigma(t) ** 2 + mixture.std**2
    squares = ((x.flatten(1)[:, None] - mixture.means()[cond]) ** 2).sum(dim=2)
    log_density = (-squares / (2 * variance)).logsumexp(dim=1)
    (score,) = torch.autograd.grad(log_density.sum(), x)
    x0 = MixtureDenoiser(mixture, schedule)(x.detach(), t, cond)
    torch.testing.assert_close(x0, x.detach() + schedule.sigma(t) ** 2 * score, rtol=1e-9, atol=1e-12)


def test_the_exact_teachers_ode_ends_in_the_mixture(generator):
    mixture = Mixture()
    cond = torch.arange(CLUSTERS).repeat_interleave(200)
    noise = torch.randn(len(cond), 2, 1, 1, generator=generator)
    x = sample_heun(MixtureDenoiser(mixture, toy_schedule()), noise, cond, num_steps=32).flatten(1)
    distances = torch.cdist(x[:, None], mixture.means()[cond].float())[:, 0]
    assert (distances.amin(dim=1) < 4 * mixture.std).float().mean() > 0.99
    # Each of the 64 has about its share of 25.
    counts = F.one_hot(distances.argmin(dim=1), 8).view(CLUSTERS, 200, 8).sum(dim=1)
    assert counts.min() > 5 and counts.max() < 60


def test_a_stack_is_its_networks_side_by_side(generator):
    """Row i of a batch is computed by network i mod S, and by nothing else."""
    torch.manual_seed(0)
    stack, schedule = StackedMLP(3, width=8), toy_schedule()
    x = torch.randn(12, 2, 1, 1, generator=generator)
    t, cond = torch.linspace(0, 999, 12), torch.arange(12) % CLUSTERS
    together = StackedDenoiser(stack, schedule)(x, t, cond)
    for i in range(3):
        alone = StackedMLP(1, width=8)
        alone.load_state_dict({name: weight[[i]] for name, weight in stack.state_dict().items()})
        expected = StackedDenoiser(alone, schedule)(x[i::3], t[i::3], cond[i::3])
        torch.testing.assert_close(together[i::3], expected)


def test_copies_of_one_network_are_equal(generator):
    torch.manual_seed(0)
    one, schedule = StackedMLP(1, width=8), toy_schedule()
    x, cond = torch.randn(6, 2, 1, 1, generator=generator), torch.arange(6)
    copies = StackedDenoiser(one.stacked(3), schedule)
    torch.testing.assert_close(copies(x, 500, cond), StackedDenoiser(one, schedule)(x, 500, cond))


def test_a_heads_logits_are_in_the_order_of_the_rows(generator):
    torch.manual_seed(0)
    denoiser, head = StackedDenoiser(StackedMLP(3, width=8), toy_schedule()), StackedHead(3, 8)
    x, cond = torch.randn(6, 2, 1, 1, generator=generator), torch.arange(6)
    logits = head(denoiser.features(x, 500, cond))
    changed = x.clone()
    changed[4] += 1
    assert (head(denoiser.features(changed, 500, cond)) != logits).tolist() == [False] * 4 + [True, False]


def test_parts_are_consecutive_and_equal():
    parts = StackedParts((1, 2, 8))
    rows = torch.arange(CLUSTERS).repeat_interleave(11)
    served = parts[rows].view(CLUSTERS, 11).T.tolist()
    assert served[0] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert served[1:3] == [[0, 1, 2, 3] * 2, [4, 5, 6, 7] * 2]
    assert served[3:] == [[c] * 8 for c in range(CLUSTERS)]


def test_energy_distance(generator):
    """By hand for points on a line; unbiased for equal distributions; positive for others."""
    x, y = torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 0.0], [3.0, 0.0]])
    # Across: 0, 3, 1, 2; within: 1 and 3.
    assert energy_distance(x, y) == pytest.approx(2 * 1.5 - 1 - 3)
    samples = torch.randn(100, 2, 50, 2, generator=generator, dtype=torch.float64)
    same = torch.tensor([energy_distance(a, b) for a, b in samples])
    assert abs(same.mean()) < 3 * same.std() / 10
    assert energy_distance(samples[0, 0], samples[0, 1] + 1) > same.max()


def test_histogram_l1():
    x = torch.tensor([[0.0, 0.0], [0.01, 0.01], [0.5, 0.5], [9.0, 9.0]])
    assert histogram_l1(x, x) == 0
    assert histogram_l1(x, x + torch.tensor([0.2, 0.0])) == pytest.approx(1.5)
    assert histogram_l1(x[:2], x[2:]) == 2
