# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""What is shipped can be made again, and the quickstart keeps its promises. Minutes each."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from diffusers_msd import MultiStudentPipeline
from diffusers_msd.files import model_fingerprint
from diffusers_msd.teachers import load_teacher


SCRIPTS = Path(__file__).parents[1] / "training_scripts"
ASSETS = SCRIPTS / "assets"


def run(script: str, *arguments):
    subprocess.run([sys.executable, str(SCRIPTS / script), *(str(a) for a in arguments)], check=True)


def evaluate(tmp_path: Path, **models) -> dict[str, dict]:
    arguments = [f"{name}={path}" for name, path in models.items()]
    run("evaluate.py", "--models", *arguments, "--dataset_name", "digits", "--num_images", 2000,
        "--feature_net", ASSETS / "features-digits", "--output_dir", tmp_path / "results")  # fmt: skip
    return {row["model"]: row for row in json.loads((tmp_path / "results" / "results.json").read_text())["rows"]}


def test_the_shipped_teacher_is_the_one_its_record_describes():
    model, scheduler = load_teacher(str(ASSETS / "digits-teacher"))
    record = json.loads((ASSETS / "digits-teacher" / "teacher.json").read_text())
    assert model_fingerprint(model, scheduler) == record["fingerprint"]
    assert list(model.config.block_out_channels) == record["settings"]["teacher_channels"]


@pytest.mark.slow
def test_the_recorded_command_retrains_a_teacher_as_good_as_the_shipped_one(tmp_path):
    run("train_teacher.py", "--config", SCRIPTS / "configs" / "digits_teacher.yaml", "--output_dir", tmp_path / "new")
    rows = evaluate(tmp_path, shipped=ASSETS / "digits-teacher", new=tmp_path / "new")
    assert rows["new"]["class_accuracy"] > rows["shipped"]["class_accuracy"] - 0.01
    assert rows["new"]["fd"] < 1.5 * rows["shipped"]["fd"]


@pytest.mark.slow
def test_the_quickstart_ends_with_good_students_a_picture_and_a_table(tmp_path):
    run("quickstart.py", "--output_dir", tmp_path)
    rows = {r["model"]: r for r in json.loads((tmp_path / "results" / "results.json").read_text())["rows"]}
    assert list(rows) == ["teacher", "K=1", "K=2", "K=2 smaller"]
    for name in ("K=1", "K=2", "K=2 smaller"):
        assert rows[name]["class_accuracy"] >= 0.97 * rows["teacher"]["class_accuracy"], name
    assert rows["K=2 smaller"]["parameters"] < 0.5 * rows["K=2"]["parameters"]
    for picture in ("samples.png", "learning_curves.png"):
        assert Image.open(tmp_path / "results" / picture).size > (300, 300)
    pipe = MultiStudentPipeline.from_pretrained(tmp_path / "K2")
    assert pipe(class_labels=[0, 9]).student_indices == [0, 1]
