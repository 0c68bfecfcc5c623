# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Every loss: value and gradient against the closed form in double precision, and what it must not touch."""

import sys

import pytest
import torch
from torch.nn.functional import softplus

from diffusers_msd.objectives import (
    DISTANCES,
    denoising_loss,
    dm_loss,
    gan_discriminator_loss,
    gan_generator_loss,
    l1_distance,
    l2_distance,
    regression_loss,
    tsm_loss,
)


SHAPE = (3, 2, 4, 5)
CHW = 2 * 4 * 5


def draw(*seeds, shape=SHAPE):
    return [
        torch.randn(shape, generator=torch.Generator().manual_seed(s), dtype=torch.float64).requires_grad_()
        for s in seeds
    ]


def mean_chw(values: torch.Tensor) -> torch.Tensor:
    return values.sum(dim=(1, 2, 3)) / CHW


WEIGHT = torch.tensor([0.5, 4.0, 30.0], dtype=torch.float64)

# Losses that are their own gradient's integral (dm_loss is not: its weight and direction are held fixed).
SMOOTH = {
    "denoising": (lambda a, b: denoising_loss(a, b.detach(), WEIGHT), SHAPE),
    "tsm": (lambda a, b: tsm_loss(a, b, WEIGHT), SHAPE),
    "l2": (l2_distance, SHAPE),
    "l1": (l1_distance, SHAPE),
    "regression": (regression_loss, SHAPE),
    "gan_generator": (lambda a, b: gan_generator_loss(a), (3,)),
    "gan_discriminator": (gan_discriminator_loss, (3,)),
}


# ---------------------------------------------------------------------- distribution matching


def test_dm_loss_has_the_gradient_g_over_chw():
    x, teacher, fake = draw(0, 1, 2)
    dm_loss(x, teacher, fake).sum().backward()
    w = mean_chw((x - teacher).abs()).reshape(-1, 1, 1, 1)
    g = (fake - teacher) / w
    assert torch.allclose(x.grad, (g / CHW).detach(), rtol=1e-14, atol=0)


def test_dm_loss_value_is_half_the_mean_square_of_g():
    x, teacher, fake = draw(0, 1, 2)
    loss = dm_loss(x, teacher, fake)
    g = (fake - teacher) / mean_chw((x - teacher).abs()).reshape(-1, 1, 1, 1)
    assert loss.shape == (3,) and loss.dtype == torch.float64
    assert torch.allclose(loss, mean_chw(g**2) / 2, rtol=1e-14)


def test_dm_loss_sends_no_gradient_to_teacher_and_fake_score():
    x, teacher, fake = draw(0, 1, 2)
    dm_loss(x, teacher, fake).sum().backward()
    assert teacher.grad is None and fake.grad is None


def test_dm_loss_vanishes_where_the_fake_score_equals_the_teacher():
    x, teacher = draw(0, 1)
    loss = dm_loss(x, teacher, teacher)
    loss.sum().backward()
    assert torch.equal(loss, torch.zeros(3).double()) and torch.equal(x.grad, torch.zeros(SHAPE).double())


def test_dm_loss_stays_finite_where_the_teacher_reproduces_the_sample():
    x, fake = draw(0, 2)
    teacher = x.detach().clone()
    teacher[1:] += 1
    for f in (fake, teacher):
        x.grad = None
        loss = dm_loss(x, teacher, f)
        loss.sum().backward()
        assert loss.isfinite().all() and x.grad.isfinite().all()
    assert x.grad.abs().max() == 0  # fake == teacher, even where the weight is 0


def test_dm_loss_on_bfloat16_is_computed_in_float32():
    x, teacher, fake = (v.detach().bfloat16() for v in draw(0, 1, 2))
    wide, narrow = x.float().requires_grad_(), x.clone().requires_grad_()
    exact, loss = dm_loss(wide, teacher.float(), fake.float()), dm_loss(narrow, teacher, fake)
    assert loss.dtype == torch.float32 and torch.equal(loss, exact)
    loss.sum().backward(), exact.sum().backward()
    assert narrow.grad.dtype == torch.bfloat16 and torch.equal(narrow.grad, wide.grad.bfloat16())


def test_dm_gradient_without_its_weight_is_the_gradient_of_the_kl_between_gaussians():
    # Student N(b, a^2), teacher N(m, s^2), both under noise sigma. From the x0 predictions,
    # (F - R) / sigma^2 is the difference of the scores, whose mean over samples is d KL / d(a, b).
    m, s, sigma = 0.3, 0.6, 0.8
    a, b = torch.tensor([0.9, -0.4], dtype=torch.float64).requires_grad_()
    var_f, var_r = a**2 + sigma**2, s**2 + sigma**2
    kl = 0.5 * ((var_f + (b - m) ** 2) / var_r - 1 - (var_f / var_r).log())
    expected = torch.stack(torch.autograd.grad(kl, (a, b)))

    # Gauss-Hermite nodes make the mean over z and eps exact (the integrand is a polynomial).
    nodes, weights = (torch.as_tensor(v) for v in __import__("numpy").polynomial.hermite_e.hermegauss(8))
    weights = weights / weights.sum()
    z, eps = (v.reshape(-1, 1, 1, 1) for v in torch.meshgrid(nodes, nodes, indexing="ij"))
    joint = torch.outer(weights, weights).flatten()
    x = a * z + b
    with torch.no_grad():
        x_t = x + sigma * eps
        fake, teacher = b + a**2 / var_f * (x_t - b), m + s**2 / var_r * (x_t - m)
        w = (x - teacher).abs().flatten()
    loss = (joint * dm_loss(x, teacher, fake) * w).sum() / sigma**2
    assert torch.allclose(torch.stack(torch.autograd.grad(loss, (a, b))), expected, rtol=1e-10)


# ---------------------------------------------------------------------- the others


def test_denoising_loss_equals_its_closed_form():
    prediction, x0 = draw(0, 1)
    loss = denoising_loss(prediction, x0.detach(), WEIGHT)
    assert torch.allclose(loss, WEIGHT * mean_chw((prediction - x0) ** 2), rtol=1e-14)
    loss.sum().backward()
    expected = 2 * WEIGHT.reshape(-1, 1, 1, 1) * (prediction - x0) / CHW
    assert torch.allclose(prediction.grad, expected.detach(), rtol=1e-13)


def test_denoising_loss_takes_float64_weights_to_float32_samples():
    prediction, x0 = (v.detach().float() for v in draw(0, 1))
    loss = denoising_loss(prediction, x0, WEIGHT)
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, WEIGHT.float() * mean_chw((prediction - x0) ** 2), rtol=1e-6)


def test_tsm_loss_is_the_denoising_loss_without_gradient_to_the_teacher():
    student, teacher = draw(0, 1)
    loss = tsm_loss(student, teacher, WEIGHT)
    assert torch.equal(loss, denoising_loss(student, teacher, WEIGHT))
    loss.sum().backward()
    assert student.grad.any() and teacher.grad is None


@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 1, 3, 3)])
def test_gan_losses_equal_their_closed_form(shape):
    fake, real = draw(0, 1, shape=shape)
    n = fake[0].numel()
    generator, discriminator = gan_generator_loss(fake), gan_discriminator_loss(fake, real)
    assert generator.shape == discriminator.shape == (5,)
    assert torch.allclose(generator, softplus(-fake).reshape(5, -1).mean(1), rtol=1e-14)
    assert torch.allclose(discriminator, (softplus(fake) + softplus(-real)).reshape(5, -1).mean(1), rtol=1e-14)
    (d_generator,) = torch.autograd.grad(generator.sum(), fake)
    assert torch.allclose(d_generator, -torch.sigmoid(-fake) / n, rtol=1e-13)
    d_fake, d_real = torch.autograd.grad(discriminator.sum(), (fake, real))
    assert torch.allclose(d_fake, torch.sigmoid(fake) / n, rtol=1e-13)
    assert torch.allclose(d_real, -torch.sigmoid(-real) / n, rtol=1e-13)


def test_gan_losses_of_extreme_logits_are_finite():
    logits = torch.tensor([-1e4, 1e4])
    assert gan_generator_loss(logits).tolist() == [1e4, 0]
    assert gan_discriminator_loss(logits, logits).tolist() == [1e4, 1e4]


def test_the_gan_is_at_rest_where_the_logit_is_the_log_density_ratio():
    # For densities p (real) and q (fake) at one point the discriminator's loss q softplus(l) + p softplus(-l)
    # is least at l = log(p / q).
    p, q = torch.tensor([0.2, 0.7, 1.5]).double(), torch.tensor([0.9, 0.7, 0.1]).double()
    logit = (p / q).log().requires_grad_()
    (q * gan_discriminator_loss(logit, torch.full_like(p, 1e3)) + p * gan_generator_loss(logit)).sum().backward()
    assert torch.allclose(logit.grad, torch.zeros(3).double(), atol=1e-15)


def test_distances_and_regression_equal_their_closed_form():
    x, target = draw(0, 1)
    l2, l1 = mean_chw((x - target) ** 2), mean_chw((x - target).abs())
    assert torch.allclose(DISTANCES["l2"]()(x, target), l2, rtol=1e-14)
    assert torch.allclose(DISTANCES["l1"]()(x, target), l1, rtol=1e-14)
    assert torch.allclose(regression_loss(x, target), l2, rtol=1e-14)
    assert torch.allclose(regression_loss(x, target, l1_distance), l1, rtol=1e-14)


@pytest.mark.parametrize("distance", [l2_distance, l1_distance])
def test_regression_sends_no_gradient_to_the_pairs(distance):
    x, target = draw(0, 1)
    regression_loss(x, target, distance).sum().backward()
    assert x.grad.any() and target.grad is None


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_equal_finite_differences_in_double_precision(name):
    loss, shape = SMOOTH[name]
    a, b = draw(0, 1, shape=shape)
    assert torch.autograd.gradcheck(lambda a: loss(a, b.detach()), (a,))


@pytest.mark.parametrize("name", ["dm", *SMOOTH])
def test_a_samples_loss_and_gradient_do_not_depend_on_the_others(name):
    loss, shape = SMOOTH.get(name, (lambda a, b: dm_loss(a, b, 2 * b), SHAPE))
    a, b = draw(0, 1, shape=shape)
    values = loss(a, b)
    assert values.shape == (3,)
    (gradient,) = torch.autograd.grad(values[1], a)
    assert gradient[1].abs().max() > 0 and gradient[[0, 2]].abs().max() == 0
    # Other companions, same sample.
    with torch.no_grad():
        others_a, others_b = a.clone(), b.clone()
        others_a[[0, 2]] += 5
        others_b[[0, 2]] -= 3
        assert torch.equal(loss(others_a, others_b)[1], values[1])


def test_without_lpips_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)  # what Python itself does for a module that cannot be imported
    with pytest.raises(ImportError, match=r"pip install 'diffusers_msd\[lpips\]'.*regression_distance"):
        DISTANCES["lpips"]()
