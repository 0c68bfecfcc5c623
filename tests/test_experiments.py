# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""The parts of the experiments in benchmarks/ that decide on a number; `make experiments-smoke` runs them as wholes."""

import sys
from pathlib import Path

import pytest
import torch


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def benchmarks():
    paths = [str(BENCHMARKS), str(BENCHMARKS.parent / "training_scripts")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*paths, *sys.path])
        yield


@pytest.fixture
def experiment(tmp_path):
    from experiment import Experiment, ExperimentConfig

    config = ExperimentConfig(output_dir=str(tmp_path), seeds=[0, 1, 2])
    variants = {"K1": ["--num_students", 1], "K2": ["--num_students", 2]}
    return Experiment("test", config, variants, {"two are better": ["K2", "K1"], "one is better": ["K1", "K2"]})


def results(fd: dict[str, list[float]]) -> dict[int, dict]:
    names = ("class_accuracy", "precision", "recall", "parameters_total", "training_seconds")
    other = {**dict.fromkeys(names, 1), "training": {"flops_with_pairs": 2.5e12}}
    return {seed: {name: {"fd": values[seed], **other} for name, values in fd.items()} for seed in range(3)}


def test_every_variant_is_trained_in_its_own_folder_with_its_own_flags(experiment):
    commands = experiment.commands()
    assert set(commands) == {"K1", "K2"}
    for k in (1, 2):
        assert f"--num_students {k} " in commands[f"K{k}"] and commands[f"K{k}"].count("--seed 0") == 1
        assert f"seed_0/K{k}" in commands[f"K{k}"]


def test_table_gives_each_seed_and_the_mean_and_claims_are_judged_by_the_distances(experiment):
    measured = results({"K1": [3.0, 3.1, 3.2], "K2": [1.0, 1.2, 1.3]})
    lines = experiment.summary(measured).splitlines()
    assert lines[2].startswith("| K1 | 3.00, 3.10, 3.20 | **3.10 ± 0.06** | 100.00 ± 0.00 |")
    assert lines[2].endswith("| 1 | 2.5 | 1 |")
    assert experiment.verdicts(measured).splitlines() == ["* two are better: **yes**", "* one is better: **no**"]
    experiment.plot(measured, experiment.root / "plot.png")
    assert (experiment.root / "plot.png").stat().st_size > 1000


def test_rows_can_be_chosen_by_name_only(tmp_path):
    from experiment import Experiment, ExperimentConfig

    variants = {"K1": [], "K2": []}
    with pytest.raises(ValueError, match="^variants: some of K1, K2 expected, got K3"):
        Experiment("test", ExperimentConfig(output_dir=str(tmp_path), variants=["K3"]), variants, {})
    chosen = Experiment("test", ExperimentConfig(output_dir=str(tmp_path), variants=["K2"]), variants, {"x": ["K1"]})
    assert list(chosen.variants) == ["K2"] and chosen.expected == {}


def test_classes_are_moved_in_the_order_of_their_distance_to_the_next_students_classes():
    from routing_errors import moved_first

    # Students 0 at 0 and 1, student 1 at 10 and 14; the next of student 1 is student 0.
    features = torch.tensor([[0.0], [1.0], [10.0], [14.0]])
    # Distances to the other centre: 12, 11 (from 12); 9.5, 13.5 (from 0.5).
    assert moved_first(torch.tensor([0, 0, 1, 1]), features).tolist() == [2, 1, 0, 3]


def test_misrouted_requests_are_those_asked_for():
    from routing_errors import misrouted

    labels, order = torch.arange(20_000) % 4, torch.tensor([2, 1, 0, 3])
    assert misrouted("requests", 0.3, labels, order, 0).double().mean() == pytest.approx(0.3, abs=0.02)
    assert torch.equal(misrouted("classes", 0.5, labels, order, 0), torch.isin(labels, torch.tensor([1, 2])))
    boundary = misrouted("boundary", 0.5, labels, order, 0)
    assert not boundary[torch.isin(labels, torch.tensor([0, 3]))].any()
    assert boundary[labels == 2].double().mean() == pytest.approx(0.5, abs=0.03)
    for kind in ("requests", "classes", "boundary"):
        assert not misrouted(kind, 0.0, labels, order, 0).any()
