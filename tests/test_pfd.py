# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Probability flow distance against closed forms of Gaussians; the exact denoisers against their densities."""

import pytest
import torch
from helpers import edm_scheduler, tiny_pipeline, tiny_unet
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_msd import Denoiser, NoiseSchedule, denoiser_for, sample_heun
from diffusers_msd.feature_net import FeatureNet
from diffusers_msd.pfd import (
    EmpiricalDenoiser,
    GaussianMixtureDenoiser,
    heun_map,
    paired_distance,
    probability_flow_distance,
)


EDM = NoiseSchedule.from_scheduler(edm_scheduler())
SIGMA_MAX = 80.0
VP = NoiseSchedule(
    torch.linspace(0.99, 0.1, 50, dtype=torch.float64),
    (1 - torch.linspace(0.99, 0.1, 50, dtype=torch.float64) ** 2).sqrt(),
    "epsilon",
    lambda t, sigma: t,
    noise_scale=1.0,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(dim: int, seed: int) -> torch.Tensor:
    root = normal(dim, dim, seed=seed)
    return root @ root.T / dim + 0.05 * torch.eye(dim)


def gaussian(mean: torch.Tensor, cov: torch.Tensor) -> GaussianMixtureDenoiser:
    return GaussianMixtureDenoiser(torch.ones(1), mean[None], cov[None], EDM)


def mixture(seed: int, components: int = 3, dim: int = 2, schedule=EDM, labels=None) -> GaussianMixtureDenoiser:
    covariances = torch.stack([covariance(dim, seed=10 * seed + k) for k in range(components)])
    weights = normal(components, seed=seed).exp()
    return GaussianMixtureDenoiser(
        weights, 2 * normal(components, dim, seed=seed + 100), covariances, schedule, labels
    )


def closed_form_map(mean: torch.Tensor, cov: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, b) of the map x_T -> A x_T + b of a Gaussian N(m, S).

    At noise sigma the density is N(m, S + sigma^2 I), so the ODE dx/dsigma = -sigma * score is
    dx/dsigma = sigma (S + sigma^2 I)^-1 (x - m). Along an eigenvector of S with eigenvalue s^2, u = x - m obeys
    du/u = sigma dsigma / (s^2 + sigma^2), so u is proportional to sqrt(s^2 + sigma^2): from sigma_max to 0 it shrinks by
    a = sqrt(s^2 / (s^2 + sigma_max^2)). Hence A has the eigenvectors of S with eigenvalues a, and b = (I - A) m.
    """
    values, vectors = torch.linalg.eigh(cov)
    a = vectors @ torch.diag((values / (values + SIGMA_MAX**2)).sqrt()) @ vectors.T
    return a, mean - a @ mean


def closed_form_pfd(p: tuple, q: tuple) -> float:
    """With x_T = sigma_max z the difference is linear, E |(A_p - A_q) x_T + b_p - b_q|^2 = sigma_max^2 |A_p - A_q|_F^2 +
    |b_p - b_q|^2."""
    (a, b), (c, d) = closed_form_map(*p), closed_form_map(*q)
    return float(SIGMA_MAX**2 * (a - c).square().sum() + (b - d).square().sum())


GAUSSIANS = {
    "diagonal": (
        (torch.tensor([0.3, -1.0]).double(), torch.diag(torch.tensor([0.25, 4.0])).double()),
        (torch.tensor([-0.5, 0.2]).double(), torch.diag(torch.tensor([1.0, 0.5])).double()),
    ),
    "full": ((normal(2, seed=1), covariance(2, seed=2)), (normal(2, seed=3), covariance(2, seed=4))),
    "same mean": ((normal(3, seed=1), covariance(3, seed=2)), (normal(3, seed=1), covariance(3, seed=5))),
}


@pytest.mark.parametrize("name", GAUSSIANS)
def test_the_distance_of_two_gaussians_is_the_closed_form(name):
    p, q = GAUSSIANS[name]
    noise = normal(4000, len(p[0]))
    maps = [heun_map(gaussian(*model), num_steps=128, batch_size=1500) for model in (p, q)]
    got = probability_flow_distance(*maps, noise)
    # The solver against the exact maps of the same noise: no Monte-Carlo error.
    exact = [SIGMA_MAX * noise @ a.T + b for a, b in (closed_form_map(*p), closed_form_map(*q))]
    assert got.squared == pytest.approx(float((exact[0] - exact[1]).square().sum(dim=1).mean()), rel=2e-3)
    # The estimate against the expectation.
    assert abs(got.squared - closed_form_pfd(p, q)) < 4 * got.squared_error
    assert abs(got.root - closed_form_pfd(p, q) ** 0.5) < 4 * got.root_error
    assert got.root == pytest.approx(got.squared**0.5) and got.num_noises == 4000
    assert got.squared_error < 0.1 * got.squared


def test_the_standard_errors_are_those_of_repeated_estimates():
    (a, b), (c, d) = (closed_form_map(*model) for model in GAUSSIANS["full"])
    estimates = [
        probability_flow_distance(
            lambda z: SIGMA_MAX * z @ a.T + b, lambda z: SIGMA_MAX * z @ c.T + d, normal(200, 2, seed=seed)
        )
        for seed in range(400)
    ]
    for value, error in (("squared", "squared_error"), ("root", "root_error")):
        values, errors = (torch.tensor([e._asdict()[key] for e in estimates]) for key in (value, error))
        assert float(values.std()) == pytest.approx(float(errors.mean()), rel=0.15)


def test_equal_models_are_at_distance_zero_and_the_order_does_not_matter():
    p, q, noise = heun_map(mixture(1)), heun_map(mixture(2)), normal(64, 2)
    assert probability_flow_distance(p, p, noise) == (0, 0, 0, 0, 64)
    assert probability_flow_distance(p, q, noise) == probability_flow_distance(q, p, noise)
    assert probability_flow_distance(p, q, noise).root > 0.1


@pytest.mark.parametrize("features", [None, FeatureNet(1, 2, feature_dim=4, channels=(8,))])
def test_the_triangle_inequality_holds_for_the_root(features):
    noise = normal(32, 1, 2, 2)
    maps = [heun_map(mixture(seed, dim=4)) for seed in range(6)]
    triples = torch.randperm(6, generator=torch.Generator().manual_seed(0)).repeat(3).unfold(0, 3, 1)
    for i, j, k in triples.tolist():
        ij, jk, ik = (
            probability_flow_distance(maps[a], maps[b], noise, features).root for a, b in ((i, j), (j, k), (i, k))
        )
        assert ik <= ij + jk + 1e-9


def test_features_are_compared_instead_of_samples():
    net, (p, q) = FeatureNet(1, 8), (normal(10, 1, 8, 8, seed=seed).float() for seed in (0, 1))
    with torch.no_grad():
        expected = (net(p)[0] - net(q)[0]).square().sum(dim=1).mean()
    assert paired_distance(p, q, net).squared == pytest.approx(float(expected), rel=1e-5)
    assert probability_flow_distance(lambda z: p, lambda z: q, p, net) == paired_distance(p, q, net)


def test_a_map_does_not_depend_on_its_batches_and_takes_conditions_with_them():
    denoiser, z, cond = denoiser_for(tiny_unet(), EDM), normal(7, 1, 8, 8), torch.tensor([0, 1, 2, 3, 3, 2, 1])
    at_once = sample_heun(denoiser, z, cond, num_steps=3)
    assert torch.allclose(heun_map(denoiser, cond, num_steps=3, batch_size=2)(z), at_once, atol=1e-4)
    assert not torch.allclose(heun_map(denoiser, cond.flip(0), num_steps=3)(z)[:3], at_once[:3], atol=1e-3)


def test_a_student_and_a_teacher_are_at_a_paired_noise_distance():
    pipe, labels, z = tiny_pipeline(), torch.arange(6) % 4, normal(6, 1, 8, 8).float()
    teacher = heun_map(denoiser_for(tiny_unet(seed=5), EDM), labels)
    distance = probability_flow_distance(
        lambda z: pipe(class_labels=labels, latents=z, output_type="latent").images, teacher, z
    )
    students = [denoiser_for(pipe.students[int(pipe.router(class_labels=[c])[0])], EDM) for c in labels]
    with torch.no_grad():
        images = torch.cat([s.generate(z[i : i + 1], labels[i : i + 1]) for i, s in enumerate(students)])
    assert distance.squared == pytest.approx(float((images - teacher(z)).square().sum((1, 2, 3)).mean()), rel=1e-4)


# The exact denoisers.


def noisy(schedule: NoiseSchedule, x0: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return schedule.add_noise(x0, normal(*x0.shape, seed=9), t)


@pytest.mark.parametrize("schedule", [EDM, VP])
def test_the_denoiser_of_a_mixture_has_the_gradient_of_its_log_density_as_score(schedule):
    components, dim = 3, 4
    denoiser = mixture(3, components, dim, schedule)
    t = torch.linspace(0, schedule.last, 12, dtype=torch.float64)
    x = noisy(schedule, 3 * normal(12, dim), t).requires_grad_()
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    # The density of x_t, made of torch's own Gaussians, sample by sample.
    covariances = torch.stack([covariance(dim, seed=30 + k) for k in range(components)])
    density = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=normal(components, seed=3).expand(12, -1)),
        torch.distributions.MultivariateNormal(
            alpha[:, None, None] * 2 * normal(components, dim, seed=103),
            (alpha**2)[:, None, None, None] * covariances + (sigma**2)[:, None, None, None] * torch.eye(dim),
        ),
    )
    (score,) = torch.autograd.grad(density.log_prob(x).sum(), x)
    with torch.no_grad():
        ours = (alpha[:, None] * denoiser(x, t) - x) / sigma[:, None] ** 2
    assert torch.allclose(ours, score, rtol=1e-6, atol=1e-6)


def brute_force(images: torch.Tensor, x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The posterior mean by differences, all at once."""
    offsets = x[:, None] - alpha[:, None, None] * images[None]
    weights = (-offsets.square().sum(dim=2) / (2 * sigma[:, None] ** 2)).softmax(dim=1)
    return weights @ images


@pytest.mark.parametrize("schedule", [EDM, VP])
def test_the_empirical_denoiser_is_the_mean_of_the_images_weighted_by_likelihood(schedule):
    images = normal(50, 6)
    t = torch.linspace(0, schedule.last, 40, dtype=torch.float64)
    x = noisy(schedule, images[:40], t)
    expected = brute_force(images, x, schedule.alpha(t), schedule.sigma(t))
    assert torch.allclose(EmpiricalDenoiser(images, schedule)(x, t), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("labels", [None, torch.arange(101) % 3])
def test_chunks_of_images_change_nothing(labels):
    images, t = normal(101, 1, 4, 4), torch.linspace(0, 999, 60, dtype=torch.float64)
    x = noisy(EDM, images[:60], t)
    cond = None if labels is None else torch.arange(60) % 3
    whole, *chunked = (EmpiricalDenoiser(images, EDM, labels, size)(x, t, cond) for size in (1000, 1, 7, 100))
    for other in chunked:
        assert (other - whole).abs().max() < 1e-12


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_sixty_thousand_images_are_never_compared_all_at_once():
    images = torch.randn(60_000, 1, 4, 4)
    denoiser, x = EmpiricalDenoiser(images, EDM, chunk_size=1000), torch.randn(128, 1, 4, 4)
    with LargestTensor() as largest:
        denoiser(x, 500)
    assert largest.elements == 128 * 1000


def test_labels_compare_an_image_with_those_of_its_class():
    images, labels = normal(30, 5), torch.arange(30) % 3
    x, cond = noisy(EDM, images[:10], torch.tensor(600.0)), torch.tensor([0, 2, 2, 1, 0, 0, 1, 2, 1, 0])
    got = EmpiricalDenoiser(images, EDM, labels)(x, 600, cond)
    for label in range(3):
        alone = EmpiricalDenoiser(images[labels == label], EDM)(x[cond == label], 600)
        assert torch.allclose(got[cond == label], alone, rtol=1e-12)
    assert torch.allclose(
        EmpiricalDenoiser(images, EDM, labels)(x, 600), EmpiricalDenoiser(images, EDM)(x, 600), rtol=1e-12
    )


def test_points_are_gaussians_without_width():
    images, t = normal(9, 3), torch.linspace(300, 999, 20, dtype=torch.float64)
    x, labels, cond = noisy(EDM, images[:1].expand(20, -1), t), torch.arange(9) % 2, torch.arange(20) % 2
    points = GaussianMixtureDenoiser(torch.ones(9), images, torch.zeros(9, 3, 3), EDM, labels)
    for c in (None, cond):
        assert torch.allclose(points(x, t, c), EmpiricalDenoiser(images, EDM, labels)(x, t, c), rtol=1e-8, atol=1e-8)


def test_tiny_noise_neither_overflows_nor_forgets_the_nearest_image():
    tiny = NoiseSchedule(
        torch.ones(2).double(), torch.tensor([1e-7, 80]).double(), "edm", lambda t, sigma: t, 80.0, 0.5
    )
    images = 100 * normal(20, 8)
    x = images.flip(0) + 1e-3
    for denoiser in (
        EmpiricalDenoiser(images, tiny, chunk_size=3),
        GaussianMixtureDenoiser(torch.ones(20), images, torch.zeros(20, 8, 8), tiny),
    ):
        assert torch.equal(denoiser(x, 0), images.flip(0))
        # Far away from all images as well.
        assert bool(denoiser(1e6 * normal(5, 8), 0).isfinite().all())


def test_the_flow_of_a_training_set_ends_at_its_images():
    images, labels = normal(12, 1, 2, 2), torch.arange(12) % 4
    cond = torch.arange(40) % 4
    samples = heun_map(EmpiricalDenoiser(images, EDM, labels), cond)(normal(40, 1, 2, 2, seed=3))
    distances, nearest = torch.cdist(samples.flatten(1), images.flatten(1)).min(dim=1)
    assert float(distances.median()) < 1e-3
    assert torch.equal(labels[nearest], cond)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_denoisers_are_denoisers_and_keep_shape_and_dtype(dtype):
    denoiser = EmpiricalDenoiser(normal(5, 1, 2, 2), EDM)
    x0 = denoiser(normal(3, 1, 2, 2).to(dtype), torch.tensor([0, 500, 999]))
    assert isinstance(denoiser, Denoiser) and x0.dtype == dtype and x0.shape == (3, 1, 2, 2)
    assert torch.isfinite(denoiser.generate(normal(3, 1, 2, 2))).all()


# Bad input.


def identity(z: torch.Tensor) -> torch.Tensor:
    return z


Z = normal(4, 1, 2, 2)


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        ((identity, identity, [1.0, 2.0]), TypeError, "noise: a tensor of floats expected"),
        ((identity, identity, torch.arange(4)), TypeError, "noise: a tensor of floats expected"),
        ((identity, identity, Z[:1]), ValueError, "noise: .* M >= 2 expected"),
        ((identity, identity, torch.full((4, 2), torch.nan)), ValueError, "noise: finite"),
        ((lambda z: z[1:], identity, Z), ValueError, "map_p: 4 samples expected"),
        ((identity, lambda z: z / 0, Z), ValueError, "map_q: finite samples expected, got .* in 4 of 4"),
        ((identity, lambda z: z[..., :1], Z), ValueError, "samples_p, samples_q: one shape"),
        ((heun_map(mixture(0, dim=4), torch.arange(3)), identity, Z), ValueError, "cond: 4 conditions expected"),
    ],
)
def test_bad_maps_and_noise_are_refused(arguments, error, text):
    with pytest.raises(error, match=f"^{text}"):
        probability_flow_distance(*arguments)


def test_bad_samples_are_refused_before_the_other_map_is_paid_for():
    calls = []
    with pytest.raises(ValueError, match="^map_p"):
        probability_flow_distance(lambda z: z * torch.nan, calls.append, Z)
    assert calls == []


@pytest.mark.parametrize(
    "make, error, text",
    [
        (lambda: EmpiricalDenoiser(Z.long(), EDM), TypeError, "images: a tensor of floats expected"),
        (lambda: EmpiricalDenoiser(Z[:0], EDM), ValueError, r"images: \[N, ...\] with N >= 1"),
        (lambda: EmpiricalDenoiser(Z / 0, EDM), ValueError, "images: finite"),
        (lambda: EmpiricalDenoiser(Z, EDM, torch.zeros(3).long()), ValueError, r"labels: int64 \[4\] expected"),
        (lambda: EmpiricalDenoiser(Z, EDM, torch.zeros(4)), ValueError, r"labels: int64 \[4\] expected"),
        (lambda: EmpiricalDenoiser(Z, EDM, chunk_size=0), ValueError, "chunk_size: at least 1"),
        (lambda: mixture(0)(Z, 5), ValueError, "x_t: samples of 2 elements expected"),
        (lambda: EmpiricalDenoiser(Z, EDM)(Z, 5, torch.zeros(4).long()), ValueError, "cond: .* without labels"),
        (lambda: EmpiricalDenoiser(Z, EDM, torch.arange(4))(Z, 5, torch.tensor([0, 9, 1, 7])), ValueError,
         r"cond: .* none of \[7, 9\]"),
        (lambda: EmpiricalDenoiser(Z, EDM, torch.arange(4))(Z, 5, torch.arange(3)), ValueError, r"cond: labels \[4\]"),
        (lambda: EmpiricalDenoiser(Z, EDM)(Z, 5, None, 2.0), ValueError, "guidance_scale: .* not guided"),
        (lambda: GaussianMixtureDenoiser(torch.tensor([1.0, 0.0]), Z[:2, 0, 0], torch.eye(2).expand(2, 2, 2), EDM),
         ValueError, "weights: positive"),
        (lambda: GaussianMixtureDenoiser(torch.ones(3), Z[:2, 0, 0], torch.eye(2).expand(2, 2, 2), EDM),
         ValueError, r"means: \[3, D\] expected"),
        (lambda: GaussianMixtureDenoiser(torch.ones(2), Z[:2, 0, 0], torch.eye(3).expand(2, 3, 3), EDM),
         ValueError, r"covariances: \[2, 2, 2\] expected"),
        (lambda: GaussianMixtureDenoiser(torch.ones(2), Z[:2, 0, 0], -torch.eye(2).expand(2, 2, 2), EDM),
         ValueError, "covariances: symmetric and positive"),
        (lambda: GaussianMixtureDenoiser(torch.ones(1), Z[:1, 0, 0], torch.ones(1, 2, 2).triu(), EDM),
         ValueError, "covariances: symmetric and positive"),
        (lambda: GaussianMixtureDenoiser([1.0], Z[:1, 0, 0], torch.eye(2)[None], EDM), TypeError, "weights: a tensor"),
    ],
)  # fmt: skip
def test_bad_distributions_and_calls_are_refused(make, error, text):
    with pytest.raises(error, match=f"^{text}"):
        make()
