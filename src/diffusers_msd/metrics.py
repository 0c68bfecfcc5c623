# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""How far generated samples are from real ones: distances on feature arrays, and a small network that makes features.

The distances take `[N, D]` arrays of any module's features and compute in float64. `FeatureNet` serves where no
Inception network is at hand; print `describe_feature_net` beside every number it gives.
"""

from typing import Optional, Union

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from .feature_statistics import FeatureStatistics
from .files import fingerprint


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
    if bad := int((~torch.isfinite(tensor)).any(dim=1).sum()):
        raise ValueError(f"`{name}` must be finite, got NaN or infinity in {bad} of {tensor.shape[0]} samples.")
    return tensor.to(torch.float64)


def _feature_pair(real: Array, generated: Array, min_samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both arrays as finite float64 `[N, D]` tensors on the device of `real`, or an error naming the argument."""
    real, generated = _feature_array(real, "real", min_samples), _feature_array(generated, "generated", min_samples)
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
    estimate is still biased upwards for small N: compare only numbers with the same N.

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
        # Rounding leaves eigenvalues of zero a little below it.
        return features.mean, values.clamp(min=0).sqrt()[:, None] * vectors.T
    features = _feature_array(features, name, min_samples=2)
    mean = features.mean(dim=0)
    return mean, torch.linalg.qr(features - mean, mode="r").R / (len(features) - 1) ** 0.5


def kernel_distance(
    real: Array, generated: Array, num_subsets: int = 100, subset_size: Optional[int] = None, seed: int = 0
) -> tuple[float, float]:
    """Kernel inception distance: unbiased squared MMD with the kernel `(x.y / D + 1)^3`, averaged over random subsets.

    Args:
        real: features `[N, D]`, N >= 4.
        generated: features `[M, D]`, M >= 4.
        num_subsets: how many subsets are drawn from each set, without replacement inside one subset.
        subset_size: samples per subset, from 2 to min(N, M). Default: 1000, or half of the smaller set where that is
            less, so that the subsets differ and the standard deviation means something.
        seed: of the subsets; the global generator is not used.

    Returns:
        Mean over the subsets (unbiased, so it can be slightly negative) and standard deviation (0 for one subset).

    Raises:
        TypeError: an argument is not an array of real numbers, or a count is not an int.
        ValueError: wrong shape, too few samples, other D, values not finite, or a count out of its range.

    Source: Binkowski et al. 2018 (arXiv 1801.01401), section 4 and eq. 4.
    """
    real, generated = _feature_pair(real, generated, min_samples=4)
    _positive_int(num_subsets, "num_subsets")
    smaller = min(len(real), len(generated))
    size = min(1000, smaller // 2) if subset_size is None else _positive_int(subset_size, "subset_size", low=2)
    if size > smaller:
        raise ValueError(f"`subset_size` must be at most the smaller set's {smaller} samples, got {size}.")
    generator = torch.Generator().manual_seed(seed)
    estimates = []
    for _ in range(num_subsets):
        x = real[torch.randperm(len(real), generator=generator)[:size].to(real.device)]
        y = generated[torch.randperm(len(generated), generator=generator)[:size].to(real.device)]
        estimates.append(_unbiased_mmd2(x, y))
    std, mean = torch.std_mean(torch.stack(estimates), correction=0)
    return mean.item(), std.item()


def _unbiased_mmd2(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    n, dim = x.shape
    k_xx, k_yy, k_xy = ((a @ b.T / dim + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = k_xx.sum() - k_xx.trace() + k_yy.sum() - k_yy.trace()
    return within / (n * (n - 1)) - 2 * k_xy.mean()


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
    real, generated = _feature_pair(real, generated, min_samples=k + 1)
    return _inside_manifold(generated, real, k), _inside_manifold(real, generated, k)


def _distance_blocks(rows: torch.Tensor, columns: torch.Tensor):
    # Not through a matrix product: there |x - y| of equal rows comes out as 1e-8, not 0, and equal samples need 0.
    for block in rows.split(max(1, _BLOCK_ELEMENTS // len(columns))):
        yield torch.cdist(block, columns, compute_mode="donot_use_mm_for_euclid_dist")


def _inside_manifold(queries: torch.Tensor, samples: torch.Tensor, k: int) -> float:
    # A sample is its own nearest at distance 0, hence the (k + 1)-th smallest.
    radii = torch.cat([block.kthvalue(k + 1, dim=1).values for block in _distance_blocks(samples, samples)])
    inside = [(block <= radii).any(dim=1) for block in _distance_blocks(queries, samples)]
    return torch.cat(inside).double().mean().item()


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


def evaluate_images(
    feature_net: nn.Module,
    generated: torch.Tensor,
    labels: torch.Tensor,
    real_images: torch.Tensor,
    real_labels: torch.Tensor,
    parts: Optional[dict[int, torch.Tensor]] = None,
) -> dict:
    """Every metric of a set of generated images, over all classes and over each part of a partition.

    Args:
        feature_net: any module that gives (features `[B, D]`, logits `[B, num_classes]`).
        generated: `[N, C, H, W]` float in [-1, 1].
        labels: `[N]` integer, the class asked for, in [0, num_classes).
        real_images: `[M, C, H, W]` float in [-1, 1].
        real_labels: `[M]` integer, in [0, num_classes).
        parts: classes of each part, `{k: LongTensor}`; each part needs 4 images of either kind.

    Returns:
        `fd`, `kid`, `kid_std`, `precision`, `recall` (k = 3), `class_accuracy` (share of generated images classified
        as asked), `num_generated`, `num_real`; and, if `parts` is given, `parts: {k: the same keys}`.

    Raises:
        TypeError: an argument is not a tensor, or labels are not integers.
        ValueError: wrong shapes or lengths, values not finite, labels out of range, or a part with too few images.
    """
    _check_images(generated, labels, "generated", "labels")
    _check_images(real_images, real_labels, "real_images", "real_labels")
    labels, real_labels = labels.cpu(), real_labels.cpu()
    masks = part_masks(labels, real_labels, parts)
    num_classes = extract_features(feature_net, generated[:1])[1].shape[1]
    for name, have in (("labels", labels), ("real_labels", real_labels)):
        if have.min() < 0 or have.max() >= num_classes:
            raise ValueError(f"`{name}` must lie in [0, {num_classes}), got {have.min()} to {have.max()}.")

    features, logits = extract_features(feature_net, generated)
    real_features, _ = extract_features(feature_net, real_images)
    return evaluate_features(features, logits.argmax(dim=1) == labels, real_features, masks)


def part_masks(
    labels: torch.Tensor, real_labels: torch.Tensor, parts: Optional[dict[int, torch.Tensor]] = None
) -> dict[Optional[int], tuple[torch.Tensor, torch.Tensor]]:
    """Which generated and which real images belong to each part, and under None all of them.

    Args:
        labels, real_labels: `[N]` and `[M]` integer, on the CPU.
        parts: classes of each part, `{k: LongTensor}`.

    Returns:
        Part to boolean `[N]` and `[M]`.

    Raises:
        ValueError: less than 4 images of either kind, in all or in a part.
    """
    masks = {None: (torch.ones_like(labels, dtype=torch.bool), torch.ones_like(real_labels, dtype=torch.bool))}
    for part, classes in (parts or {}).items():
        masks[part] = tuple(torch.isin(have, classes.cpu()) for have in (labels, real_labels))
    for part, both in masks.items():
        for name, mask in zip(("generated", "real_images"), both):
            if mask.sum() < 4:
                where = "" if part is None else f" of the classes in `parts[{part}]`"
                raise ValueError(f"`{name}` must hold >= 4 images{where}, got {int(mask.sum())}.")
    return masks


def evaluate_features(
    generated: torch.Tensor,
    correct: Optional[torch.Tensor],
    real: torch.Tensor,
    masks: dict[Optional[int], tuple[torch.Tensor, torch.Tensor]],
) -> dict:
    """What `evaluate_images` gives, from features that are there already.

    Args:
        generated: features `[N, D]`.
        correct: boolean `[N]`, classified as asked; None leaves `class_accuracy` out.
        real: features `[M, D]`.
        masks: of `part_masks`.
    """
    results = {
        part: _metrics(real[in_real], generated[mine], None if correct is None else correct[mine])
        for part, (mine, in_real) in masks.items()
    }
    overall = results.pop(None)
    return {**overall, "parts": results} if results else overall


def _metrics(real: torch.Tensor, generated: torch.Tensor, correct: Optional[torch.Tensor]) -> dict:
    kid, kid_std = kernel_distance(real, generated)
    precision, recall = precision_recall(real, generated)
    return {
        "fd": frechet_distance(real, generated),
        "kid": kid,
        "kid_std": kid_std,
        "precision": precision,
        "recall": recall,
        **({} if correct is None else {"class_accuracy": correct.double().mean().item()}),
        "num_generated": len(generated),
        "num_real": len(real),
    }


def _check_images(images: torch.Tensor, labels: torch.Tensor, images_name: str, labels_name: str) -> None:
    for name, value in ((images_name, images), (labels_name, labels)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"`{name}` must be a torch.Tensor, got {type(value)}.")
    shape = tuple(images.shape)
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(f"`{images_name}` must be a float tensor [N, C, H, W], got {images.dtype}, shape {shape}.")
    if not torch.isfinite(images).all():
        raise ValueError(f"`{images_name}` must be finite, got NaN or infinity.")
    if labels.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        raise TypeError(f"`{labels_name}` must hold integers, got dtype {labels.dtype}.")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"`{labels_name}` must have shape [{shape[0]}], got {tuple(labels.shape)}.")
