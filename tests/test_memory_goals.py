# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""The configs for one GPU fit on it by their own dry run, and the peaks that their documentation claims are true."""

import sys

import pytest
import torch
from test_scripts import SCRIPTS, run
from transformers import CLIPTextConfig


sys.path.insert(0, str(SCRIPTS.parent / "benchmarks"))
from full_size_step import SIZES  # noqa: E402


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Folders with the config files of full-size teachers, which is all that a dry run reads."""
    folders = {}
    for name, size in SIZES.items():
        folders[name] = tmp_path_factory.mktemp(name)
        with torch.device("meta"):
            size.make(64).save_config(folders[name] / "unet")
        size.scheduler.save_pretrained(folders[name] / "scheduler")
    CLIPTextConfig(hidden_size=768, max_position_embeddings=77).save_pretrained(folders["sd15"] / "text_encoder")
    return folders


# Of the memory a tenth stays free, for CUDA itself and what is not counted.
@pytest.mark.slow
@pytest.mark.parametrize(
    "config, size, claimed, memory",
    [
        ("sd15_1x40gb", "sd15", 35.4, 40),
        ("sd15_1x24gb", "sd15", 19.5, 24),
        ("sd15_1x24gb_lora", "sd15", 15.1, 24),
        ("imagenet64_1gpu", "imagenet64", 13.3, 16),
    ],
)
def test_a_config_for_one_gpu_fits_by_its_dry_run(config, size, claimed, memory, teachers, tmp_path, capsys):
    arguments = ["--config", SCRIPTS / "configs" / f"{config}.yaml", "--pretrained_teacher_model", teachers[size]]
    assert run("train_msd.py", *arguments, "--num_students", 4, "--output_dir", tmp_path, "--dry_run") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("peak")]
    peaks = [float(line.split()[-2]) for line in lines]
    assert len(peaks) == 2 and max(peaks) == pytest.approx(claimed, abs=0.06) and max(peaks) <= 0.9 * memory
