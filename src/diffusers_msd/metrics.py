# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""How far generated samples are from real ones, and from one another, on the features of any module.

All take `[N, D]` arrays and compute in float64. The order of the rows changes nothing but the last digits of a sum.
"""

import warnings
from collections.abc import Iterator
from typing import Optional, Union

import numpy as np
import torch

from .feature_statistics import FeatureStatistics
from .pfd import probability_flow_distance  # noqa: F401  a metric like the others, on two maps


Array = Union[torch.Tensor, np.ndarray]

# One block of pairwise distances: 2**24 float64 values are 128 MiB, whatever the number of samples.
_BLOCK_ELEMENTS = 2**24


def _feature_array(array: Array, name: str, min_samples: int) -> torch.Tensor:
    """A finite float64 `[N, D]` tensor, or an error naming the argument."""
    if not isinstance(array, (torch.Tensor, np.ndarray)):
        raise TypeError(f"`{name}` must be a torch.Tensor or a numpy.ndarray of shape [N, D], got {type(array)}.")
    tensor = torch.as_tensor(array).detach()
    if tensor.is_complex():
        raise TypeError(f"`{name}` must hold real numbers, got dtype {tensor.dtype}.")
    if tensor.ndim != 2 or tensor.shape[1] == 0:
        raise ValueError(f"`{name}` must have shape [N, D] with D >= 1, got {tuple(tensor.shape)}.")
    if tensor.shape[0] < min_samples:
        raise ValueError(f"`{name}` must hold at least {min_samples} samples, got {tensor.shape[0]}.")
    if bad := not_finite(tensor):
        raise ValueError(f"`{name}` must be finite, got NaN or infinity in {bad}.")
    return tensor.to(torch.float64)


def not_finite(samples: torch.Tensor, first: int = 0) -> str:
    """Which samples `[N, ...]`, numbered from `first`, hold NaN or infinity: "2 of 9 samples (4, 7)"; "" if none do."""
    bad = (~torch.isfinite(samples.flatten(1))).any(dim=1).nonzero().flatten().tolist()
    numbers = ", ".join(str(first + row) for row in bad[:10]) + (", ..." if len(bad) > 10 else "")
    return f"{len(bad)} of {len(samples)} samples ({numbers})" if bad else ""


def _feature_pair(
    real: Array, generated: Array, min_real: int, min_generated: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both arrays as finite float64 `[N, D]` tensors on the device of `real`, or an error naming the argument."""
    real, generated = _feature_array(real, "real", min_real), _feature_array(generated, "generated", min_generated)
    if real.shape[1] != generated.shape[1]:
        raise ValueError(f"`generated` must have the {real.shape[1]} features of `real`, got {generated.shape[1]}.")
    return real, generated.to(real.device)


def _positive_int(value: int, name: str, low: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be an int, got {value!r}.")
    if value < low:
        raise ValueError(f"`{name}` must be at least {low}, got {value}.")
    return value


def frechet_distance(real: Union[Array, FeatureStatistics], generated: Union[Array, FeatureStatistics]) -> float:
    """Squared 2-Wasserstein distance of the Gaussians fitted to two feature sets: FID on any features.

    `|mu_r - mu_g|^2 + tr(S_r) + tr(S_g) - 2 tr((S_r S_g)^(1/2))` with unbiased covariances. If `S = R^T R`, the last
    trace is the sum of the singular values of `R_r R_g^T`. `R` comes from a QR decomposition of the centred samples:
    no covariance is formed or rooted, and fewer samples than features (rank-deficient `S`) cost no accuracy. The
    estimate is still biased upwards for small N: compare only numbers with the same N. A warning says so where a set
    has no more samples than features.

    Args:
        real: features `[N, D]`, N >= 2, or their statistics.
        generated: features `[M, D]`, M >= 2, or their statistics.

    Returns:
        The distance in squared feature units, >= 0.

    Raises:
        TypeError: an argument is not an array of real numbers.
        ValueError: wrong shape, too few samples, other D, or values that are not finite.

    Source: Heusel et al. 2017 (arXiv 1706.08500), eq. 6; Dowson and Landau 1982.
    """
    (real_mean, real_root), (mean, root) = _gaussian(real, "real"), _gaussian(generated, "generated")
    if len(real_mean) != len(mean):
        raise ValueError(f"`generated` must have the {len(real_mean)} features of `real`, got {len(mean)}.")
    mean, root = mean.to(real_mean.device), root.to(real_mean.device)
    cross_term = torch.linalg.svdvals(real_root @ root.T).sum()
    distance = (real_mean - mean).square().sum() + real_root.square().sum() + root.square().sum() - 2 * cross_term
    return max(distance.item(), 0.0)


def _gaussian(features: Union[Array, FeatureStatistics], name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [D] and a root R [n, D] of the covariance R^T R, float64."""
    if isinstance(features, FeatureStatistics):
        values, vectors = torch.linalg.eigh(features.covariance)
        _warn_of_few(features.num_samples, len(features.mean), name)
        # Rounding leaves eigenvalues of zero a little below it.
        return features.mean, values.clamp(min=0).sqrt()[:, None] * vectors.T
    features = _feature_array(features, name, min_samples=2)
    _warn_of_few(*features.shape, name)
    mean = features.mean(dim=0)
    return mean, torch.linalg.qr(features - mean, mode="r").R / (len(features) - 1) ** 0.5


def _warn_of_few(num_samples: Optional[int], dim: int, name: str) -> None:
    if num_samples is not None and num_samples <= dim:
        # Without the number of samples: Python shows a text once, so models and parts do not each repeat it.
        warnings.warn(
            f"`{name}` holds no more samples than its {dim} features: the covariance is rank-deficient and the Fréchet "
            "distance biased upwards; compare it only with distances of as many samples.",
            stacklevel=4,
        )


def kernel_distance(
    real: Array, generated: Array, num_subsets: int = 100, subset_size: Optional[int] = None, seed: int = 0
) -> tuple[float, float]:
    """Kernel inception distance: unbiased squared MMD with the kernel `(x.y / D + 1)^3`.

    The paper averages it over random subsets. The average over all subsets there are is the estimate on the whole sets,
    which is computed here in blocks: nothing is drawn for it. Random subsets give the standard deviation only, and are
    drawn from sorted samples, so the order of these does not matter.

    Args:
        real: features `[N, D]`, N >= 4.
        generated: features `[M, D]`, M >= 4.
        num_subsets: how many subsets are drawn from each set, without replacement inside one subset.
        subset_size: samples per subset, from 2 to min(N, M). Default: 1000, or half of the smaller set where that is
            less, so that the subsets differ and the standard deviation means something.
        seed: of the subsets; the global generator is not used.

    Returns:
        The estimate (unbiased, so it can be slightly negative) and its standard deviation over subsets (0 for one).

    Raises:
        TypeError: an argument is not an array of real numbers, or a count is not an int.
        ValueError: wrong shape, too few samples, other D, values not finite, or a count out of its range.

    Source: Binkowski et al. 2018 (arXiv 1801.01401), section 4 and eq. 4.
    """
    real, generated = _feature_pair(real, generated, 4, 4)
    _positive_int(num_subsets, "num_subsets")
    smaller = min(len(real), len(generated))
    size = min(1000, smaller // 2) if subset_size is None else _positive_int(subset_size, "subset_size", low=2)
    if size > smaller:
        raise ValueError(f"`subset_size` must be at most the smaller set's {smaller} samples, got {size}.")
    generator = torch.Generator().manual_seed(seed)
    sets = [_sorted_rows(real), _sorted_rows(generated)]
    estimates = []
    for _ in range(num_subsets):
        drawn = [rows[torch.randperm(len(rows), generator=generator)[:size].to(rows.device)] for rows in sets]
        estimates.append(_unbiased_mmd2(*drawn))
    return _unbiased_mmd2(real, generated).item(), torch.stack(estimates).std(correction=0).item()


def _sorted_rows(rows: torch.Tensor) -> torch.Tensor:
    order = np.lexsort(rows.T.flip(0).cpu().numpy())  # by the first feature, then by the second, ...
    return rows[torch.from_numpy(order).to(rows.device)]


def _unbiased_mmd2(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    def kernel(products: torch.Tensor) -> torch.Tensor:
        return products.div_(x.shape[1]).add_(1).pow_(3)  # in place: memory is what limits this

    def total(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return sum(kernel(block @ b.T).sum() for block in _row_blocks(a, b))

    def within(a: torch.Tensor) -> torch.Tensor:
        return (total(a, a) - kernel(a.square().sum(dim=1)).sum()) / (len(a) * (len(a) - 1))

    return within(x) + within(y) - 2 * total(x, y) / (len(x) * len(y))


def precision_recall(real: Array, generated: Array, k: int = 3) -> tuple[float, float]:
    """Precision (quality) and recall (coverage) of k-nearest-neighbour manifold estimates.

    A set's manifold is the union of balls around its samples, each reaching to the sample's k-th neighbour in the set.
    Precision is the share of generated samples inside the real manifold, recall the share of real samples inside the
    generated one. Distances are computed in blocks, so memory does not grow with N * M.

    Args:
        real: features `[N, D]`, N > k.
        generated: features `[M, D]`, M > k.
        k: neighbour that sets a ball's radius, >= 1 (3 in the paper).

    Returns:
        Precision and recall, each in [0, 1].

    Raises:
        TypeError: an argument is not an array of real numbers, or `k` is not an int.
        ValueError: wrong shape, not more than `k` samples, other D, values that are not finite, or `k` < 1.

    Source: Kynkaanniemi et al. 2019 (arXiv 1904.06991), eq. 1 and 2.
    """
    _positive_int(k, "k")
    real, generated = _feature_pair(real, generated, k + 1, k + 1)
    return _inside_manifold(generated, real, k), _inside_manifold(real, generated, k)


def _row_blocks(rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return rows.split(max(1, _BLOCK_ELEMENTS // len(columns)))


def _distance_blocks(rows: torch.Tensor, columns: torch.Tensor) -> Iterator[torch.Tensor]:
    # Not through a matrix product: there |x - y| of equal rows comes out as 1e-8, not 0, and equal samples need 0.
    for block in _row_blocks(rows, columns):
        yield torch.cdist(block, columns, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(samples: torch.Tensor, k: int) -> torch.Tensor:
    # A sample is its own nearest at distance 0, hence the (k + 1)-th smallest.
    return torch.cat([block.kthvalue(k + 1, dim=1).values for block in _distance_blocks(samples, samples)])


def _inside_manifold(queries: torch.Tensor, samples: torch.Tensor, k: int) -> float:
    radii = _radii(samples, k)
    inside = [(block <= radii).any(dim=1) for block in _distance_blocks(queries, samples)]
    return torch.cat(inside).double().mean().item()


def density_coverage(real: Array, generated: Array, k: int = 5) -> tuple[float, float]:
    """Density (quality) and coverage of the real samples' k-nearest-neighbour balls.

    A ball reaches from a real sample to its k-th neighbour among the real ones, border included. Density is the number
    of balls around a generated sample, over k; coverage the share of balls with a generated sample in them. One real
    outlier adds one ball to a sum here, while it can raise the precision of everything near it to 1.

    Args:
        real: features `[N, D]`, N > k.
        generated: features `[M, D]`, M >= 1.
        k: neighbour that sets a ball's radius, >= 1 (5 in the paper).

    Returns:
        Density, >= 0 and about 1 for samples of the same distribution; coverage, in [0, 1].

    Raises:
        TypeError: an argument is not an array of real numbers, or `k` is not an int.
        ValueError: wrong shape, not more than `k` real samples, other D, values that are not finite, or `k` < 1.

    Source: Naeem et al. 2020 (arXiv 2002.09797), eq. 3 and 4.
    """
    _positive_int(k, "k")
    real, generated = _feature_pair(real, generated, k + 1, 1)
    radii, inside = _radii(real, k), 0
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for block in _distance_blocks(generated, real):
        within = block <= radii
        inside += within.sum().item()
        covered |= within.any(dim=0)
    return inside / (k * len(generated)), covered.double().mean().item()


def inception_score(logits: Array, splits: int = 1) -> tuple[float, float]:
    """exp of the mean KL divergence between a sample's class probabilities and those of all samples together.

    High if every sample is clearly of one class and the classes are evenly spread; it knows nothing of real images.

    Args:
        logits: class logits `[N, C]`, N >= `splits`.
        splits: groups of consecutive samples with a score each. Published values use 10. More of them give lower
            scores (arXiv 1801.01973), and with more than one the order of the samples matters.

    Returns:
        Mean over the groups, in [1, C], and standard deviation (0 for one).

    Raises:
        TypeError: `logits` is not an array of real numbers, or `splits` is not an int.
        ValueError: wrong shape, fewer samples than `splits`, values that are not finite, or `splits` < 1.

    Source: Salimans et al. 2016 (arXiv 1606.03498), section 4.
    """
    logits = _feature_array(logits, "logits", _positive_int(splits, "splits"))
    scores = []
    for group in logits.log_softmax(dim=1).tensor_split(splits):
        log_mean = group.logsumexp(dim=0) - np.log(len(group))
        scores.append((group.exp() * (group - log_mean)).sum(dim=1).mean().exp())
    std, mean = torch.std_mean(torch.stack(scores), correction=0)
    return mean.item(), std.item()


def cross_seed_diversity(features: Array, labels: torch.Tensor) -> float:
    """Mean distance between two samples of the same condition: what the seed changes.

    Args:
        features: `[N, D]`.
        labels: `[N]` integer, the condition of each. Those with one sample are left out, the others count alike.

    Returns:
        The mean over conditions of the mean Euclidean distance over pairs, in feature units.

    Raises:
        TypeError: `features` is not an array of real numbers.
        ValueError: wrong shape, values that are not finite, or no condition with two samples.
    """
    features = _feature_array(features, "features", 2)
    if labels.shape != features.shape[:1]:
        raise ValueError(f"`labels` must have shape [{len(features)}], got {tuple(labels.shape)}.")
    sizes = labels.unique(return_counts=True)[1]
    if sizes.max() < 2:
        raise ValueError(f"`labels` must name a condition twice, got {len(sizes)} conditions of one sample each.")
    groups = features[labels.argsort().to(features.device)].split(sizes.tolist())
    distances = [
        sum(block.sum() for block in _distance_blocks(group, group)) / (len(group) * (len(group) - 1))
        for group in groups
        if len(group) > 1
    ]
    return torch.stack(distances).mean().item()
