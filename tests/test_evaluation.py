# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""evaluate.py against statistics of real images, on one process and on two, and after an interruption."""

import itertools
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import edm_scheduler, tiny_pipeline, tiny_unet
from test_distributed import launch
from test_scripts import SCRIPTS, assert_refused, run

from diffusers_msd import MultiStudentPipeline
from diffusers_msd.data import DataConfig, load_images
from diffusers_msd.feature_net import FeatureNet
from diffusers_msd.feature_statistics import load_statistics
from diffusers_msd.objectives import DISTANCES, l2_distance
from diffusers_msd.pairs import pair_noise, pair_seeds
from diffusers_msd.scores import evaluate_images, markdown_table
from diffusers_msd.teachers import save_teacher


DIGITS = ["--dataset_name", "digits"]
FEATURES = SCRIPTS / "assets" / "features-digits"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_teacher(folder / "teacher", tiny_unet(10), edm_scheduler())
    tiny_pipeline(2, 10).save_pretrained(folder / "students")
    return [f"teacher={folder / 'teacher'}", f"students={folder / 'students'}"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "digits.npz"
    assert run("make_reference.py", *DIGITS, "--feature_net", FEATURES, "--output", path) == 0
    return path


def command(models, output: Path, *arguments) -> list[str]:
    settings = ["--num_images", 100, "--num_inference_steps", 2, "--sample_batch_size", 7, "--feature_net", FEATURES]
    return ["--models", *models, *map(str, [*settings, "--output_dir", output, *arguments])]


def rows_of(output: Path) -> dict[str, dict]:
    rows = json.loads((output / "results.json").read_text())["rows"]
    return {row["model"]: {k: v for k, v in row.items() if k not in ("images_per_second", "latency")} for row in rows}


@pytest.fixture(scope="module")
def results(models, tmp_path_factory):
    output = tmp_path_factory.mktemp("results")
    assert run("evaluate.py", *command(models, output, *DIGITS)) == 0
    return output


def test_the_numbers_are_those_of_all_images_at_once(models, results):
    net = FeatureNet.from_pretrained(FEATURES, use_safetensors=True)
    pipe = MultiStudentPipeline.from_pretrained(models[1].split("=")[1])
    pipe.set_progress_bar_config(disable=True)
    labels = torch.arange(100) % 10
    z = pair_noise(pair_seeds(1_000_000, range(100)), (1, 8, 8))
    images = pipe(class_labels=labels, latents=z, output_type="latent").images.clamp(-1, 1)
    dataset = load_images(DataConfig("digits"), 1)
    real = dataset.__getitems__(range(len(dataset)))
    parts = {0: torch.arange(5), 1: torch.arange(5, 10)}
    expected = evaluate_images(net, images, labels, real["images"], real["cond"], parts)
    row = rows_of(results)["students"]
    assert row.keys() - expected.keys() == {
        *("model", "parameters", "parameters_total"),
        *("training_seconds", "training", "storage_bytes"),
    }
    for key in expected.keys() - {"parts"}:
        assert row[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-6), key
        assert row["parts"]["1"][key] == pytest.approx(expected["parts"][1][key], rel=1e-3, abs=1e-6), key
    assert not (results / ".features").exists()


def test_two_processes_give_the_same_numbers_to_the_last_bit(models, results, tmp_path):
    launched = command(models, tmp_path, *DIGITS)
    result = launch(str(SCRIPTS / "evaluate.py"), *launched, ACCELERATE_USE_CPU="true")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("100 images per model") == 1
    assert rows_of(tmp_path) == rows_of(results)


def test_an_interrupted_evaluation_goes_on_and_another_one_is_refused(models, results, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path: None)
        assert run("evaluate.py", *command(models, tmp_path, *DIGITS)) == 0
    (tmp_path / "results.json").unlink()
    batches = sorted((tmp_path / ".features" / "students").glob("*.safetensors"))
    assert len(batches) == 15
    for batch in batches[3:]:
        batch.unlink()
    kept = batches[0].stat().st_mtime_ns
    capsys.readouterr()
    assert_refused(capsys, run("evaluate.py", *command(models, tmp_path, *DIGITS, "--seed", 3)), "seed: got 3")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path: None)
        assert run("evaluate.py", *command(models, tmp_path, *DIGITS)) == 0
    assert batches[0].stat().st_mtime_ns == kept
    assert rows_of(tmp_path) == rows_of(results)


def test_distance_to_the_statistics_of_a_data_set_is_the_distance_to_it(models, results, reference, tmp_path, capsys):
    assert run("evaluate.py", *command(models, tmp_path, "--reference", reference)) == 0
    for name, row in rows_of(tmp_path).items():
        assert row["fd"] == pytest.approx(rows_of(results)[name]["fd"], rel=1e-6)
        for key in ("class_accuracy", "inception_score", "diversity"):
            assert row[key] == rows_of(results)[name][key]
        assert "kid" not in row
    _, sha256 = load_statistics(reference, "reference")
    assert sha256 in (tmp_path / "results.md").read_text() and sha256 in capsys.readouterr().out
    assert sha256 in json.loads((tmp_path / "results.json").read_text())["protocol"]


def test_a_table_without_metrics_of_samples_leaves_their_columns_out():
    row = {"model": "a", "fd": 1.5, "parameters": 1, "parameters_total": 2, "training_seconds": None}
    table = markdown_table([{**row, "images_per_second": None}])
    assert table.splitlines()[0] == "| model | FD | parameters per student | in total |"


def test_a_reference_that_does_not_fit_is_refused(models, reference, tmp_path, capsys):
    torch.manual_seed(0)
    FeatureNet(in_channels=1, sample_size=8, feature_dim=4, channels=(8,)).save_pretrained(tmp_path / "other")
    arguments = command(models, tmp_path / "out", "--reference", reference)
    status = run("evaluate.py", *arguments, "--feature_net", tmp_path / "other")
    assert_refused(capsys, status, "reference", "was made with FeatureNet", "feature_net is FeatureNet")
    assert_refused(capsys, run("evaluate.py", *arguments, *DIGITS), "reference", "leave dataset_name")
    assert_refused(capsys, run("evaluate.py", *arguments, "--reference", "none.npz"), "reference", "none.npz")
    FeatureNet(in_channels=1, sample_size=8, num_classes=3, channels=(8,)).save_pretrained(tmp_path / "three")
    status = run("evaluate.py", *command(models, tmp_path / "out", *DIGITS), "--feature_net", tmp_path / "three")
    assert_refused(capsys, status, "feature_net: it knows 3 classes", "10")
    arguments = [*DIGITS, "--feature_net", FEATURES]
    assert_refused(capsys, run("make_reference.py", *arguments, "--output", "a.npy"), "output", "a.npy")


def test_a_model_that_makes_nan_is_refused_with_the_numbers_of_the_images(tmp_path, capsys):
    pipe = tiny_pipeline(2, 10)
    with torch.no_grad():
        pipe.unet_1.conv_out.bias.fill_(torch.nan)  # the student of the classes 5 to 9
    pipe.save_pretrained(tmp_path / "broken")
    status = run("evaluate.py", *command([f"broken={tmp_path / 'broken'}"], tmp_path / "out", *DIGITS))
    assert_refused(capsys, status, "models: broken made NaN or infinity in 2 of 7 samples (5, 6)")


def test_a_part_without_enough_images_is_refused_by_its_number_before_anything_is_generated(models, tmp_path, capsys):
    arguments = command(models[1:], tmp_path, *DIGITS, "--max_train_samples", 8)
    assert_refused(capsys, run("evaluate.py", *arguments), "`real_images` must hold >= 6 images", "`parts[0]`, got")
    assert not (tmp_path / ".features").exists()


def test_lpips_is_the_mean_over_pairs_of_seeds(models, tmp_path, monkeypatch, capsys):
    arguments = command(models[1:], tmp_path, *DIGITS, "--lpips_conditions", 3)
    monkeypatch.setitem(sys.modules, "lpips", None)  # what Python itself does for a module that cannot be imported
    assert_refused(capsys, run("evaluate.py", *arguments), "lpips_conditions: ", "diffusers_msd[lpips]")
    monkeypatch.setitem(DISTANCES, "lpips", lambda: l2_distance)
    assert run("evaluate.py", *arguments) == 0
    pipe = MultiStudentPipeline.from_pretrained(models[1].split("=")[1])
    pipe.set_progress_bar_config(disable=True)
    means = []
    for label in (0, 4, 9):
        z = torch.cat(
            [pair_noise(pair_seeds(1_000_000, range(row, row + 1)), (1, 8, 8)) for row in range(label, 40, 10)]
        )
        images = pipe(class_labels=[label] * 4, latents=z, output_type="latent").images.clamp(-1, 1)
        pairs = [((a - b) ** 2).mean().item() for a, b in itertools.combinations(images, 2)]
        means.append(sum(pairs) / len(pairs))
    assert rows_of(tmp_path)["students"]["lpips"] == pytest.approx(sum(means) / 3, rel=1e-4)
    assert "LPIPS between seeds" in (tmp_path / "results.md").read_text()


@pytest.mark.parametrize(
    "script, protocol",
    [
        ("evaluate.py", ["ImageNet-64", "50,000", "one seed per image", "imagenet-64x64.npz", "Inception"]),
        ("evaluate_text.py", ["COCO-30k", "30,000 captions", "512x512", "256x256 (Lanczos)", "clean-fid"]),
    ],
)
def test_help_states_the_published_protocol(script, protocol, capsys):
    assert run(script, "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert all(words in text for words in protocol)
