# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""The commands of docs/recipes/imagenet64.md on images of 8x8 pixels and four classes."""

import json

import numpy as np
import pytest
from helpers import edm_scheduler, tiny_unet
from test_data import encoded, random_images, write_zip
from test_scripts import SCRIPTS, SHORT, run

from diffusers_msd import MultiStudentPipeline
from diffusers_msd.feature_net import FeatureNet
from diffusers_msd.teachers import save_teacher


CONFIGS = SCRIPTS / "configs"


def imagenet_net():
    return tiny_unet(4, channels=3)


def test_dry_run_needs_the_teachers_config_files_only_and_no_lpips(tmp_path, capsys):
    imagenet_net().save_config(tmp_path / "teacher" / "unet")
    edm_scheduler().save_pretrained(tmp_path / "teacher" / "scheduler")
    arguments = ["--config", CONFIGS / "imagenet64_8gpu.yaml", "--pretrained_teacher_model", tmp_path / "teacher"]
    assert run("train_msd.py", *arguments, "--output_dir", tmp_path / "run", "--dry_run") == 0
    printed = capsys.readouterr().out
    dm, adm = printed.split("--- adm ---")
    assert "one sample: 3x8x8" in dm and "not counted: the network of the lpips distance" in dm
    assert "20,000 iterations" in dm and "140,000 iterations" in adm and "not counted" not in adm
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dtype", ["no", "bf16"])
def test_dry_run_of_adapters_counts_them_as_what_is_trained(dtype, tmp_path, capsys):
    imagenet_net().save_config(tmp_path / "teacher" / "unet")
    edm_scheduler().save_pretrained(tmp_path / "teacher" / "scheduler")
    arguments = ["--student_type", "lora", "--fake_score_type", "lora", "--rank", 2, "--mixed_precision", dtype]
    arguments += ["--pretrained_teacher_model", tmp_path / "teacher", "--output_dir", tmp_path / "run", "--dry_run"]
    assert run("train_msd.py", *arguments, "--stages", "tsm", "dm", "adm", "--max_train_steps", 10) == 0
    printed = capsys.readouterr().out.splitlines()

    def weights(role: str) -> list[float]:
        return [float(line.split()[-2]) for line in printed if line.startswith(role + ",") and line.endswith("MB")]

    (teacher,), (adapter,) = map(set, (weights("teacher"), weights("student")))
    assert set(weights("fake_score")) == {adapter} and adapter < teacher


def test_recipe_from_the_zip_to_the_distance(tmp_path):
    images = random_images(16, (8, 8, 3))
    names = [f"00000/img{i:08d}.png" for i in range(16)]
    data = tmp_path / "data.zip"
    write_zip(data, dict(zip(names, map(encoded, images))), [[name, i % 4] for i, name in enumerate(names)])
    data = ["--train_data_dir", data, "--cache_dir", tmp_path / "cache"]
    teacher, pairs, run_dir = (tmp_path / name for name in ("teacher", "pairs", "k2"))
    save_teacher(teacher, imagenet_net(), edm_scheduler())
    FeatureNet(3, 8, num_classes=4, feature_dim=4, channels=(8,)).save_pretrained(tmp_path / "features")

    settings = ["--num_pairs", 8, "--num_inference_steps", 2, "--pretrained_teacher_model", teacher]
    assert run("generate_pairs.py", *settings, "--output_dir", pairs) == 0
    settings = ["--config", CONFIGS / "imagenet64_1gpu.yaml", "--pretrained_teacher_model", teacher, *data, *SHORT]
    # Without LPIPS, which needs a torchvision.
    settings += ["--regression_distance", "l2", "--gradient_accumulation_steps", 1, "--dataloader_num_workers", 0]
    settings += ["--student_update_interval", 1, "--pairs_dir", pairs, "--num_students", 2, "--output_dir", run_dir]
    settings += ["--max_train_steps", 1, "--mixed_precision", "no"]
    assert run("train_msd.py", *settings) == 0
    pipe = MultiStudentPipeline.from_pretrained(run_dir)
    assert pipe.route(class_labels=[0, 1, 2, 3]) == [0, 0, 1, 1]

    reference = tmp_path / "reference.npz"
    features = ["--feature_net", tmp_path / "features"]
    assert run("make_reference.py", *data, *features, "--output", reference) == 0
    with np.load(reference, allow_pickle=False) as file:
        assert file["mu"].shape == (4,) and file["sigma"].shape == (4, 4) and file["num_samples"] == 16
    settings = ["--models", f"teacher={teacher}", f"K=2={run_dir}", *features, "--reference", reference]
    settings += ["--num_images", 16, "--num_inference_steps", 2, "--output_dir", tmp_path / "results"]
    assert run("evaluate.py", *settings) == 0
    rows = json.loads((tmp_path / "results" / "results.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["teacher", "K=2"] and all(row["fd"] > 0 for row in rows)
