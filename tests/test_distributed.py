# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Several processes on the CPU. Each pays for importing torch and diffusers, so there is one such run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_worker import train
from test_training import log_of, make_config, make_pairs, state_of, tensors_in

from diffusers_msd.training_config import create_accelerator


def launch(*command: str, **environment: str) -> subprocess.CompletedProcess:
    # The parent's paths, so that the same package is imported; --standalone finds a free port.
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *command],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    one, two, pairs_dir = (tmp_path_factory.mktemp(name) for name in ("one", "two", "pairs"))
    make_pairs(pairs_dir)
    train(one, pairs_dir, 4)
    worker = str(Path(__file__).with_name("distributed_worker.py"))
    result = launch(worker, str(two), str(pairs_dir), "2", ACCELERATE_USE_CPU="true")
    assert result.returncode == 0, result.stderr
    assert "2 processes trained dm" in result.stdout and "2 processes trained adm" in result.stdout
    return one, two


@pytest.mark.parametrize("case", ["dm", "adm"])
def test_two_processes_equal_one_with_the_same_global_batch(case, runs):
    one, two = (folder / case for folder in runs)
    a, b = ({k: v / 0.1 for k, v in tensors_in(run / "checkpoint-1").items() if "exp_avg" in k} for run in (one, two))
    largest = max(gradient.abs().max() for name, gradient in a.items() if name.endswith("exp_avg")).item()
    for name, gradient in a.items():
        torch.testing.assert_close(b[name], gradient, rtol=1e-4, atol=1e-6 * largest, msg=name)
    weights, others = tensors_in(one / "final"), tensors_in(two / "final")
    start = tensors_in(one / "checkpoint-1")
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=0, atol=1e-6, msg=name)
    assert max((weights[name] - start[name]).abs().max() for name in weights) > 1e-3
    for line, other in zip(log_of(one), log_of(two), strict=True):
        assert line == pytest.approx(other, rel=1e-4)
    accounts = [json.loads((run / "final" / "summary.json").read_text()) for run in (one, two)]
    for key in ("steps", "flops", "passes", "images_seen"):
        assert accounts[0][key] == accounts[1][key], key
    assert [account["processes"] for account in accounts] == [1, 2]
    assert state_of(one / "checkpoint-4")["settings"] == state_of(two / "checkpoint-4")["settings"]


def test_processes_that_do_not_find_each_other_are_an_error(tmp_path, monkeypatch):
    """Without an accelerator, accelerate heeds a launch only if it asks for the CPU: else copies race for the files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="accelerate: .*2 processes.*ACCELERATE_USE_CPU"):
        create_accelerator(make_config(), tmp_path)
