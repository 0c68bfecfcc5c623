# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Whether an experiment reproduced an expected order: one rule for every table."""

from itertools import pairwise
from statistics import mean, stdev

import numpy as np
from scipy.stats import t as student_t


SIGNIFICANCE = 0.05


def verdict(values: dict[str, list[float]], order: list[str]) -> str:
    """Was the expected order seen, its opposite, or neither?

    Seeds are paired: the s-th value of every name comes from seed s, which shares its draws and its evaluation. For two
    neighbours of `order` the differences (worse - better) over the seeds give a one-sided Student's t test, mean
    difference over its standard error, with one degree of freedom less than seeds.

    * "yes": every neighbour is significantly worse than the one before it, each at 5 %. That all of them are is the
      claim, so no correction is due.
    * "no": some neighbour, or the last name against the first, is significantly *better*. One of several tests suffices,
      so each has its share of the 5 % (Bonferroni).
    * "within noise": anything else; also a single seed, whose noise is unknown.

    With three seeds a mean difference has to exceed 2.9 of its standard errors. The usual 2 would be exceeded by chance in
    one of eleven comparisons.

    Args:
        values: one number per seed, lower is better, by name; at least the names of `order`.
        order: two names or more, the expected best first.

    Returns:
        "yes", "no" or "within noise".

    Raises:
        ValueError: fewer than two names, or a name twice; names without values; unequal numbers of seeds; no seed; values
            that are not finite.
    """
    _check(values, order)
    samples = {name: np.asarray(values[name], dtype=np.float64) for name in order}
    pairs = list(pairwise(order))
    if all(_p_value(samples[worse] - samples[better]) < SIGNIFICANCE for better, worse in pairs):
        return "yes"
    if len(order) > 2:
        pairs.append((order[0], order[-1]))
    if any(_p_value(samples[better] - samples[worse]) < SIGNIFICANCE / len(pairs) for better, worse in pairs):
        return "no"
    return "within noise"


def _p_value(differences: np.ndarray) -> float:
    """Of the one-sided test that the differences are above 0; NaN where nothing can be said, which is below no level."""
    n = len(differences)
    if n < 2:
        return float("nan")
    # Equal differences have no spread: infinitely significant, or 0/0 if they are 0.
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(student_t.sf(differences.mean() / (differences.std(ddof=1) / n**0.5), n - 1))


def _check(values: dict[str, list[float]], order: list[str]):
    if len(order) < 2 or len(set(order)) < len(order):
        raise ValueError(f"order: at least two different names expected, got {order}")
    if missing := [name for name in order if name not in values]:
        raise ValueError(f"values: {missing} of order are missing, there are {sorted(values)}")
    counts = {name: len(values[name]) for name in order}
    if len(set(counts.values())) > 1 or 0 in counts.values():
        raise ValueError(f"values: one number per seed expected, as many for each name, got {counts}")
    if bad := [name for name in order if not np.isfinite(values[name]).all()]:
        raise ValueError(f"values: finite numbers expected, got others for {bad}")


def standard_error(values: list[float]) -> float:
    """Of the mean; 0 for a single value, whose error is unknown."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def mean_and_error(values: list[float], digits: int = 3) -> str:
    """Mean over the seeds and its standard error, both with `digits` decimals; of one seed its value alone."""
    error = f" ± {standard_error(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{error}"
