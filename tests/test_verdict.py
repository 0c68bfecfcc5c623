# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""The rule by which the experiments say whether an expected order was reproduced."""

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_rel


sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from verdict import mean_and_error, verdict  # noqa: E402


GOOD = [1.0, 1.2, 0.9]


def plus(values, *differences):
    return [value + difference for value, difference in zip(values, differences)]


@pytest.mark.parametrize(
    "second, expected",
    [
        (plus(GOOD, 0.5, 0.6, 0.4), "yes"),
        (plus(GOOD, -0.5, -0.6, -0.4), "no"),
        (plus(GOOD, 0.5, -0.6, 0.4), "within noise"),
        # Mean over standard error is 2.3: more than 2, but three seeds need 2.92.
        (plus(GOOD, 0.1, 0.3, 0.6), "within noise"),
        (GOOD, "within noise"),
        # The same difference for every seed has no spread at all.
        ([1.5, 1.7, 1.4], "yes"),
    ],
)
def test_two_names(second, expected):
    assert verdict({"K=1": second, "K=2": GOOD}, ["K=2", "K=1"]) == expected


def test_seeds_are_paired():
    """Seeds differ by far more than the names do, but every seed agrees."""
    seeds = [1.0, 5.0, 20.0]
    assert verdict({"better": seeds, "worse": plus(seeds, 0.10, 0.12, 0.11)}, ["better", "worse"]) == "yes"


def test_every_neighbour_has_to_be_worse():
    """The ends are far apart, but two in the middle are equal within noise."""
    values = {"a": GOOD, "b": plus(GOOD, 1, 1.1, 0.9), "c": plus(GOOD, 1.1, 1.0, 1.0), "d": plus(GOOD, 3, 3.1, 2.9)}
    assert verdict(values, ["a", "b", "d"]) == "yes"
    assert verdict(values, ["a", "b", "c", "d"]) == "within noise"


def test_one_reversed_neighbour_is_enough_for_no():
    values = {"a": GOOD, "b": plus(GOOD, 1, 1.1, 0.9), "c": plus(GOOD, 0.2, 0.22, 0.21), "d": plus(GOOD, 3, 3.1, 2.9)}
    assert verdict(values, ["a", "b", "c", "d"]) == "no"


def test_a_slow_reversal_shows_at_the_ends():
    """No neighbour is significantly better; the last name against the first is."""
    values = {"a": [0.0, 0.0, 0.0], "b": [-0.4, -0.1, -0.9], "c": [-1.0, -1.1, -0.95]}
    assert verdict({**values, "c": [-0.5, -0.6, -1.2]}, ["a", "b", "c"]) == "within noise"
    assert verdict(values, ["a", "b", "c"]) == "no"


def test_no_is_as_rare_as_promised_where_all_are_equal():
    """Of experiments without any effect 5 % are called no (here plus three standard errors), hardly any yes."""
    rng = np.random.default_rng(0)
    order = ["a", "b", "c", "d"]
    found = [verdict(dict(zip(order, rng.normal(size=(4, 3)).tolist())), order) for _ in range(2000)]
    assert found.count("no") < 0.065 * 2000
    assert found.count("yes") < 0.01 * 2000


def test_agrees_with_the_paired_t_test_of_scipy():
    rng = np.random.default_rng(1)
    seen = set()
    for _ in range(300):
        better, worse = rng.normal(size=4), rng.normal(0.7, size=4)
        expected = "within noise"
        if ttest_rel(worse, better, alternative="greater").pvalue < 0.05:
            expected = "yes"
        if ttest_rel(worse, better, alternative="less").pvalue < 0.05:
            expected = "no"
        assert verdict({"better": better.tolist(), "worse": worse.tolist()}, ["better", "worse"]) == expected
        seen.add(expected)
    assert seen == {"yes", "no", "within noise"}


def test_one_seed_tells_nothing():
    assert verdict({"a": [0.0], "b": [1.0]}, ["a", "b"]) == "within noise"


@pytest.mark.parametrize(
    "values, order, named",
    [
        ({"a": GOOD}, ["a"], "order"),
        ({"a": GOOD}, ["a", "a"], "order"),
        ({"a": GOOD}, ["a", "b"], "values"),
        ({"a": GOOD, "b": GOOD[:2]}, ["a", "b"], "values"),
        ({"a": [], "b": []}, ["a", "b"], "values"),
        ({"a": GOOD, "b": [1.0, float("nan"), 1.0]}, ["a", "b"], "values"),
    ],
)
def test_bad_input_names_the_argument(values, order, named):
    with pytest.raises(ValueError, match=f"^{named}: "):
        verdict(values, order)


def test_mean_and_error():
    assert mean_and_error([1.0, 2.0, 3.0]) == "2.000 ± 0.577"
    assert mean_and_error([1.0, 2.0, 3.0], digits=1) == "2.0 ± 0.6"
    assert mean_and_error([1.5]) == "1.500"
