# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Probability flow distance: two models compared by where their probability-flow ODEs carry the same noise.

A map takes noise [M, ...] to samples [M, ...]. With `teacher` trained on `images` and `truth` the model that stands for
the true distribution, all with the noise `schedule`, the two errors of arXiv 2505.20123 are

    flow = heun_map(teacher, labels)
    e_gen = probability_flow_distance(flow, heun_map(truth, labels), noise)
    e_mem = probability_flow_distance(flow, heun_map(EmpiricalDenoiser(images, schedule, image_labels), labels), noise)

A one-step student put in as a map of its own,

    probability_flow_distance(lambda z: student.generate(z, labels), flow, noise)

differs from the teacher in the distribution, or in which noise becomes which sample, or in both. This number is called
the *paired-noise teacher distance* here; it is no distance of distributions.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from .denoiser import Denoiser
from .feature_net import extract_features
from .sampling import sample_heun
from .schedule import NoiseSchedule, expand


Map = Callable[[torch.Tensor], torch.Tensor]


class FlowDistance(NamedTuple):
    """A distance with its Monte-Carlo standard errors.

    `squared` is the mean of |a - b|^2 over the noises and `root` its root, the metric: |.| sums over all elements. The
    error of the root is to first order; the root of a mean is a little low on average for few noises.
    """

    root: float
    root_error: float
    squared: float
    squared_error: float
    num_noises: int

    def __float__(self) -> float:
        return self.root


def probability_flow_distance(
    map_p: Map, map_q: Map, noise: torch.Tensor, features: nn.Module | None = None
) -> FlowDistance:
    """PFD(p, q) = sqrt(E |psi(map_p(z)) - psi(map_q(z))|^2) over noise z that both maps share.

    Both maps should be solved alike; the convention is `heun_map`'s (Heun, 18 steps, rho 7, for EDM 0.002 ... 80).

    Args:
        map_p, map_q: take all the noise to samples [M, ...] of one shape; conditions are bound in them, sample i of
            both having the same.
        noise: unit-variance noise [M, ...], M >= 2, one seed per sample (`pairs.pair_noise`). In float64 a network's
            ODE is solved in float64 around the network.
        features: psi, a module that gives (features [B, D], anything else), such as a `FeatureNet`; None for the
            samples themselves. Samples are not clamped.

    Returns:
        The distance, in units of the samples or features, and its errors.

    Raises:
        TypeError: `noise` is not a tensor of floats.
        ValueError: fewer than two noises, noise or samples that are not finite, or samples of two shapes or not one per
            noise.

    Source: arXiv 2505.20123.
    """
    _check_floats(noise, "noise")
    if noise.ndim < 2 or len(noise) < 2:
        raise ValueError(f"noise: [M, ...] with M >= 2 expected, got the shape {list(noise.shape)}")
    samples = [_checked(flow(noise), name, len(noise)) for name, flow in (("map_p", map_p), ("map_q", map_q))]
    return paired_distance(*samples, features)


@torch.no_grad()
def paired_distance(
    samples_p: torch.Tensor, samples_q: torch.Tensor, features: nn.Module | None = None
) -> FlowDistance:
    """`probability_flow_distance` of samples that are there already: sample i of both from the same noise.

    Args:
        samples_p, samples_q: [M, ...], of one shape, M >= 2.
        features: as in `probability_flow_distance`.

    Raises:
        ValueError: samples of two shapes, fewer than two, or not finite.
    """
    if samples_p.shape != samples_q.shape or len(samples_p) < 2:
        raise ValueError(
            f"samples_p, samples_q: one shape [M, ...] with M >= 2 expected, got {list(samples_p.shape)} and "
            f"{list(samples_q.shape)}"
        )
    a, b = (_checked(x, name, len(x)) for name, x in (("samples_p", samples_p), ("samples_q", samples_q)))
    if features is not None:
        a, b = (extract_features(features, x.float())[0] for x in (a, b))
    squares = (a.double() - b.double()).flatten(1).square().sum(dim=1)
    squared, error = squares.mean().item(), (squares.std() / len(squares) ** 0.5).item()
    root = squared**0.5
    return FlowDistance(root, error / (2 * root) if root else 0.0, squared, error, len(squares))


def _checked(samples: torch.Tensor, argument: str, count: int) -> torch.Tensor:
    if len(samples) != count:
        raise ValueError(f"{argument}: {count} samples expected, one per noise, got {len(samples)}")
    if bad := int((~samples.isfinite()).flatten(1).any(dim=1).sum()):
        raise ValueError(f"{argument}: finite samples expected, got NaN or infinity in {bad} of {count}")
    return samples


def heun_map(
    denoiser: Denoiser,
    cond: torch.Tensor | None = None,
    num_steps: int = 18,
    guidance_scale: float | None = None,
    batch_size: int = 256,
) -> Map:
    """The probability-flow map of a denoiser, as `sample_heun` solves it, `batch_size` samples at a time.

    Args:
        denoiser, num_steps, guidance_scale: as in `sample_heun`.
        cond: conditions [M, ...] of the noise that the map will be given; None for no condition.
        batch_size: samples per call of the denoiser.
    """

    def flow(noise: torch.Tensor) -> torch.Tensor:
        if cond is not None and len(cond) != len(noise):
            raise ValueError(f"cond: {len(noise)} conditions expected, one per noise, got {len(cond)}")
        batches = [slice(start, start + batch_size) for start in range(0, len(noise), batch_size)]
        return torch.cat(
            [
                sample_heun(denoiser, noise[rows], None if cond is None else cond[rows], num_steps, guidance_scale)
                for rows in batches
            ]
        )

    return flow


class ExactDenoiser(Denoiser):
    """The posterior mean E[x0 | x_t] of a distribution that is known: a mixture of labelled components.

    A class is the mixture of the components with its label. A subclass says `posterior_mean`.

    Args:
        components, elements: how many components there are, and how many elements a sample has.
        schedule: the noise; for a paired comparison that of the other model.
        labels: LongTensor [components], the class of each; None if there are no classes.
    """

    def __init__(self, components: int, elements: int, schedule: NoiseSchedule, labels: torch.Tensor | None):
        super().__init__(None, schedule)
        if labels is not None and (labels.shape != (components,) or labels.dtype != torch.long):
            raise ValueError(
                f"labels: int64 [{components}] expected, one per component, got {labels.dtype} {list(labels.shape)}"
            )
        self.elements = elements
        self.register_buffer("components", torch.arange(components))
        self.register_buffer("labels", labels)

    def posterior_mean(
        self, x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor, members: torch.Tensor
    ) -> torch.Tensor:
        """E[x0 | x] under the components `members` (LongTensor [n]).

        All float64: x [B, D] = alpha x0 + sigma noise, alpha and sigma [B, 1]; result [B, D].
        """
        raise NotImplementedError

    def forward(self, x_t, t, cond=None, guidance_scale=None):
        """As `Denoiser.forward`, for x_t [B, ...]; without `cond` over all components. Computed in float64.

        Raises:
            ValueError: samples of another size, labels that no component has, labels where there are no classes, or
                guidance.
        """
        if guidance_scale not in (None, 1):
            raise ValueError(
                f"guidance_scale: an exact distribution is not guided, leave it out; got {guidance_scale}"
            )
        x = x_t.flatten(1).double()
        if x.shape[1] != self.elements:
            raise ValueError(f"x_t: samples of {self.elements} elements expected, got the shape {list(x_t.shape)}")
        alpha, sigma = (expand(level(t), x).expand(len(x), 1) for level in (self.schedule.alpha, self.schedule.sigma))
        x0 = torch.empty_like(x)
        for rows, members in self._groups(len(x), cond):
            x0[rows] = self.posterior_mean(x[rows], alpha[rows], sigma[rows], members)
        return x0.reshape(x_t.shape).to(x_t.dtype if x_t.dtype == torch.float64 else torch.float32)

    def _groups(self, count: int, cond: torch.Tensor | None) -> list[tuple]:
        """The rows of each class of a batch, with the components they are compared with."""
        if cond is None:
            return [(slice(None), self.components)]
        if self.labels is None:
            raise ValueError("cond: this distribution was made without labels, leave it out")
        if cond.shape != (count,):
            raise ValueError(f"cond: labels [{count}] expected, got the shape {list(cond.shape)}")
        unknown = cond[~torch.isin(cond, self.labels)].unique()
        if len(unknown):
            raise ValueError(f"cond: classes of the distribution expected, it has none of {unknown.tolist()}")
        return [(cond == label, self.components[self.labels == label]) for label in cond.unique()]


class EmpiricalDenoiser(ExactDenoiser):
    """The exact denoiser of a training set: what a teacher would be that learnt its images by heart.

        E[x0 | x_t] = sum_i w_i y_i,    w = softmax_i(-|x_t - alpha y_i|^2 / (2 sigma^2))

    The sums run over chunks of images with the largest exponent so far taken out, so memory does not grow with
    B * N, and no noise level overflows.

    Args:
        images: y, floats [N, ...], finite; kept as they are, converted to float64 chunk by chunk.
        schedule: the noise.
        labels: LongTensor [N]; with them a condition is compared with the images of its class alone.
        chunk_size: images at a time.

    Raises:
        TypeError: `images` is not a tensor of floats.
        ValueError: no images, values that are not finite, or labels of another length.

    Source: arXiv 2206.00364, appendix B.3.
    """

    def __init__(
        self,
        images: torch.Tensor,
        schedule: NoiseSchedule,
        labels: torch.Tensor | None = None,
        chunk_size: int = 4096,
    ):
        _check_floats(images, "images")
        if images.ndim < 2 or not len(images):
            raise ValueError(f"images: [N, ...] with N >= 1 expected, got the shape {list(images.shape)}")
        if chunk_size < 1:
            raise ValueError(f"chunk_size: at least 1 expected, got {chunk_size}")
        super().__init__(len(images), images[0].numel(), schedule, labels)
        self.register_buffer("images", images.flatten(1))
        self.chunk_size = chunk_size

    def posterior_mean(self, x, alpha, sigma, members):
        largest = torch.full_like(alpha, -torch.inf)
        total, weighted = torch.zeros_like(alpha), torch.zeros_like(x)
        for chunk in members.split(self.chunk_size):
            y = self.images[chunk].to(x.dtype)
            # |x|^2 is the same for all images and drops out.
            exponents = (alpha * (x @ y.T) - alpha**2 * y.square().sum(dim=1) / 2) / sigma**2
            new_largest = torch.maximum(largest, exponents.amax(dim=1, keepdim=True))
            weights, shrink = (exponents - new_largest).exp(), (largest - new_largest).exp()
            total = shrink * total + weights.sum(dim=1, keepdim=True)
            weighted = shrink * weighted + weights @ y
            largest = new_largest
        return weighted / total


class GaussianMixtureDenoiser(ExactDenoiser):
    """The exact denoiser of a mixture of K Gaussians, and so its exact score, (alpha E[x0 | x_t] - x_t) / sigma^2.

    Args:
        weights: [K], positive; only their ratios count.
        means: [K, D].
        covariances: [K, D, D], symmetric and positive semi-definite.
        schedule: the noise.
        labels: LongTensor [K], the class of each component.

    Raises:
        TypeError: an argument is not a tensor of floats.
        ValueError: wrong shapes, values that are not finite, or what is no weight or no covariance.
    """

    def __init__(
        self,
        weights: torch.Tensor,
        means: torch.Tensor,
        covariances: torch.Tensor,
        schedule: NoiseSchedule,
        labels: torch.Tensor | None = None,
    ):
        for name, value in (("weights", weights), ("means", means), ("covariances", covariances)):
            _check_floats(value, name)
        if weights.ndim != 1 or not len(weights) or float(weights.min()) <= 0:
            raise ValueError(f"weights: positive numbers [K] expected, got {weights.tolist()}")
        if means.ndim != 2 or len(means) != len(weights):
            raise ValueError(f"means: [{len(weights)}, D] expected, got the shape {list(means.shape)}")
        components, elements = means.shape
        if covariances.shape != (components, elements, elements):
            raise ValueError(
                f"covariances: {[components, elements, elements]} expected, got the shape {list(covariances.shape)}"
            )
        values, vectors = torch.linalg.eigh(covariances.double())
        if not torch.allclose(covariances, covariances.mT) or bool((values < -1e-6 * values.abs().max()).any()):
            raise ValueError("covariances: symmetric and positive semi-definite matrices expected")
        super().__init__(components, elements, schedule, labels)
        self.register_buffer("log_weights", weights.double().log())
        self.register_buffer("means", means.double())
        # Rounding leaves eigenvalues of zero a little below it.
        self.register_buffer("eigenvalues", values.clamp(min=0))
        self.register_buffer("eigenvectors", vectors)

    def posterior_mean(self, x, alpha, sigma, members):
        means, values, vectors = self.means[members], self.eigenvalues[members], self.eigenvectors[members]
        alpha, sigma = alpha[:, None], sigma[:, None]
        # [B, K, D] along the axes of each component.
        offsets = torch.einsum("bkd,kde->bke", x[:, None] - alpha * means, vectors)
        variances = alpha**2 * values + sigma**2
        exponents = self.log_weights[members] - (variances.log() + offsets**2 / variances).sum(dim=2) / 2
        posteriors = means + torch.einsum("bke,kde->bkd", alpha * values / variances * offsets, vectors)
        return (exponents.softmax(dim=1)[..., None] * posteriors).sum(dim=1)


def _check_floats(value: torch.Tensor, argument: str):
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        raise TypeError(f"{argument}: a tensor of floats expected, got {type(value).__name__}")
    if not bool(value.isfinite().all()):
        raise ValueError(f"{argument}: finite numbers expected, got NaN or infinity")
