# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Mean and covariance of features: all that a Fréchet distance needs of the real images. Files of them, as EDM's."""

import hashlib
import io
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np
import torch

from .files import atomic_write


@dataclass(frozen=True)
class FeatureStatistics:
    """Moments of a set of features.

    Args:
        mean: float64 [D].
        covariance: float64 [D, D], unbiased.
        num_samples: N; None where it is not known, as in EDM's files.
        feature_net: what made the features, as `evaluation.open_feature_net` calls it; None where it is not known.
    """

    mean: torch.Tensor
    covariance: torch.Tensor
    num_samples: Optional[int] = None
    feature_net: Optional[str] = None

    @classmethod
    def of(cls, batches: Iterable[torch.Tensor], feature_net: Optional[str] = None) -> "FeatureStatistics":
        """The moments of features that need not fit into memory: batches [n, D], N >= 2 in all.

        Each batch is centred on its own mean before it is added, so features far from the origin cost no accuracy. The
        order of the batches is the order of summation.

        Raises:
            ValueError: fewer than two samples, or values that are not finite.
        """
        count, mean, scatter = 0, 0.0, 0.0
        for batch in batches:
            batch = batch.double()
            n, own_mean = len(batch), batch.mean(dim=0)
            shift = own_mean - mean
            centred = batch - own_mean
            # Chan, Golub and LeVeque 1979, eq. 2.1.
            scatter = scatter + centred.T @ centred + shift[:, None] * shift * (n * count / (n + count))
            mean = mean + shift * (n / (n + count))
            count += n
        if count < 2:
            raise ValueError(f"batches: at least 2 samples are needed, got {count}")
        if not (torch.isfinite(mean).all() and torch.isfinite(scatter).all()):
            raise ValueError("batches: features must be finite, got NaN or infinity")
        return cls(mean, scatter / (count - 1), count, feature_net)


def save_statistics(path: str | Path, statistics: FeatureStatistics) -> None:
    """Writes an .npz with `mu` and `sigma`, as EDM's reference files have them, and what else is known."""
    arrays = {"mu": statistics.mean.numpy(), "sigma": statistics.covariance.numpy()}
    known = {"num_samples": statistics.num_samples, "feature_net": statistics.feature_net}
    file = io.BytesIO()
    np.savez(file, **arrays, **{name: np.array(value) for name, value in known.items() if value is not None})
    atomic_write(path, file.getvalue())


def load_statistics(path: str | Path, argument: str) -> tuple[FeatureStatistics, str]:
    """Reads an .npz with `mu` [D] and `sigma` [D, D], such as EDM's `imagenet-64x64.npz`; nothing is unpickled.

    Args:
        path: the file.
        argument: the name of the caller's argument that it came from, for error texts.

    Returns:
        The statistics, and the SHA-256 of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, holds pickled objects, or lacks one of the two.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{argument}: {path} is no file; an .npz with mu and sigma is needed")
    content = path.read_bytes()
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        mean, covariance = (torch.from_numpy(arrays[name].astype(np.float64)) for name in ("mu", "sigma"))
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{argument}: {path} is no .npz of arrays mu and sigma ({error})") from error
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"{argument}: {path} holds mu {list(mean.shape)} and sigma {list(covariance.shape)}; [D] and [D, D] are needed"
        )
    if not (torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
        raise ValueError(f"{argument}: {path} holds NaN or infinity; finite numbers are needed")
    known = {name: arrays[name].item() for name in ("num_samples", "feature_net") if name in arrays}
    return FeatureStatistics(mean, covariance, **known), hashlib.sha256(content).hexdigest()
