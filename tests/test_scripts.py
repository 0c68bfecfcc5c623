# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""The scripts, from the teacher to the table, on tiny nets and scikit-learn's digits."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import edm_scheduler, tiny_unet
from PIL import Image
from test_training import different, hashes, log_of, tensors_in

from diffusers_msd import MultiStudentPipeline
from diffusers_msd.feature_net import FeatureNet
from diffusers_msd.students import create_student
from diffusers_msd.teachers import load_teacher, save_teacher


SCRIPTS = Path(__file__).parents[1] / "training_scripts"
DATA = ["--dataset_name", "digits"]
SHORT = ["--train_batch_size", "4", "--max_train_steps", "2", "--logging_steps", "1", "--checkpointing_steps", "1"]
SHORT += ["--report_to", "none"]


def run(script: str, *arguments) -> int:
    """The exit status of a script, run as `python script.py arguments` in this process: importing torch takes long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *(str(argument) for argument in arguments)])
        try:
            runpy.run_path(str(SCRIPTS / script), run_name="__main__")
        except SystemExit as exit:
            return exit.code
    return 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("scripts")


TEACHER = ["--image_channels", 1, "--teacher_channels", 8, 16, "--teacher_blocks", 1, "--attention_head_dim", 8, *DATA]


@pytest.fixture(scope="module")
def teacher(folder):
    # The default tracker is tried here.
    status = run(
        "train_teacher.py", *TEACHER, *SHORT, "--report_to", "tensorboard", "--output_dir", folder / "teacher"
    )
    assert status == 0
    return folder / "teacher"


@pytest.fixture(scope="module")
def pairs(folder, teacher):
    arguments = ["--num_pairs", 20, "--num_inference_steps", 2, "--shard_size", 12]
    assert (
        run("generate_pairs.py", "--pretrained_teacher_model", teacher, "--output_dir", folder / "made", *arguments)
        == 0
    )
    return folder / "made"


@pytest.fixture(scope="module")
def feature_net(folder):
    torch.manual_seed(0)
    FeatureNet(in_channels=1, sample_size=8, num_classes=10, feature_dim=4, channels=(8,)).save_pretrained(
        folder / "f"
    )
    return folder / "f"


def distil(teacher, pairs, output_dir, *arguments) -> int:
    settings = ["--pretrained_teacher_model", teacher, "--pairs_dir", pairs, "--output_dir", output_dir]
    return run("train_msd.py", *settings, *DATA, *SHORT, "--student_update_interval", 1, *arguments)


@pytest.fixture(scope="module")
def same_size(folder, teacher, pairs, feature_net):
    """K = 2, dm adm, from a config file, with the Fréchet distance at each validation."""
    config = folder / "msd.yaml"
    config.write_text(f"num_students: 2\nstages: [dm, adm]\nvalidation_feature_net: {feature_net}\n")
    arguments = ["--num_validation_images", 20, "--validation_steps", 1]
    assert distil(teacher, pairs, folder / "same", "--config", config, *arguments) == 0
    return folder / "same"


@pytest.fixture(scope="module")
def smaller(folder, teacher, pairs):
    """K = 2, tsm dm adm, students half as wide, classes split at random."""
    arguments = ["--student_channels", 4, 8, "--num_students", 2, "--partition", "random"]
    assert distil(teacher, pairs, folder / "smaller", *arguments, "--stages", "tsm", "dm", "adm") == 0
    return folder / "smaller"


@pytest.fixture(scope="module")
def lora(folder, teacher, pairs):
    """K = 2, dm adm, students and fake scores as adapters."""
    arguments = ["--student_type", "lora", "--fake_score_type", "lora", "--rank", 2, "--num_students", 2]
    assert distil(teacher, pairs, folder / "lora", *arguments) == 0
    return folder / "lora"


def picture(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image


# ------------------------------------------------------------------ what the scripts leave


def test_trained_teacher_is_a_diffusers_folder_with_its_record(teacher):
    model, scheduler = load_teacher(teacher)
    assert model.config.num_class_embeds == 10 and tuple(model.config.block_out_channels) == (8, 16)
    settings = json.loads((teacher / "teacher.json").read_text())["settings"]
    assert settings["max_train_steps"] == [2] and settings["dataset_name"] == "digits"
    assert different(teacher / "unet", teacher / "training" / "final" / "unet") == []
    grid = picture(teacher / "training" / "samples-0000002.png")
    # Eight columns and a row per class, of 8x8 pixels with a frame of one pixel, four times enlarged.
    assert grid.format == "PNG" and grid.size == (8 * 40, 10 * 40)
    assert list((teacher / "training" / "logs").rglob("events.out.tfevents.*"))
    assert [line["step"] for line in log_of(teacher / "training")] == [1, 2]


def test_distilled_run_leaves_students_checkpoints_logs_grids_and_a_pipeline(same_size):
    settings = json.loads((same_size / "run.json").read_text())
    assert settings["num_students"] == 2 and settings["stages"] == ["dm", "adm"]
    assert "student 1: 5 classes: 5-9" in (same_size / "partition.txt").read_text()
    for k in range(2):
        for stage in ("dm", "adm"):
            part = same_size / f"student_{k}" / stage
            assert (part / "final" / "student" / "config.json").is_file()
            assert json.loads((part / "final" / "summary.json").read_text())["steps"] == 2
            assert [path.name for path in sorted(part.glob("checkpoint-*"))] == ["checkpoint-1", "checkpoint-2"]
            # A row per class of the part.
            assert picture(part / "samples-0000001.png").size == (8 * 40, 5 * 40)
            distances = [line["validation/fd"] for line in log_of(part) if "validation/fd" in line]
            assert len(distances) == 2 and all(d > 0 for d in distances)
        # The stage starts from the one before, and the pipeline's student is the last one.
        assert different(same_size / f"unet_{k}", same_size / f"student_{k}" / "adm" / "final" / "student") == []
    card = (same_size / "README.md").read_text()
    assert "DM (distribution matching), then ADM" in card and "consecutive" in card


@pytest.mark.parametrize("name", ["same_size", "smaller"])
def test_output_folder_is_a_pipeline_of_k_students(name, request):
    folder = request.getfixturevalue(name)
    pipe = MultiStudentPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    output = pipe(class_labels=list(range(10)), generator=[torch.Generator().manual_seed(i) for i in range(10)])
    assert output.student_indices == pipe.route(class_labels=list(range(10)))
    assert sorted(output.student_indices) == [0] * 5 + [1] * 5
    assert len(output.images) == 10 and output.images[0].size == (8, 8)
    widths = (8, 16) if name == "same_size" else (4, 8)
    assert [tuple(unet.config.block_out_channels) for unet in pipe.students.values()] == [widths] * 2
    assert different(folder / "unet_0", folder / "unet_1") != []


def test_each_stage_starts_where_the_one_before_ended(smaller):
    """After one step, weights are near their start; students of the two stages before are farther."""
    part = smaller / "student_1"
    for before, after in (("tsm", "dm"), ("dm", "adm")):
        start = tensors_in(part / before / "final" / "student")
        first = tensors_in(part / after / "checkpoint-1" / "student")
        # One step of Adam with learning rate 1e-4 (and weight decay) moves no weight farther than about that.
        assert max((first[name] - start[name]).abs().max() for name in start) < 1.1e-4
    fake = tensors_in(part / "dm" / "final" / "fake_score")
    first = tensors_in(part / "adm" / "checkpoint-1" / "fake_score")
    assert max((first[name] - fake[name]).abs().max() for name in fake) < 1.1e-4


def test_lora_students_are_one_teacher_and_adapters(lora, teacher):
    pipe = MultiStudentPipeline.from_pretrained(lora)
    assert different(lora / "unet", teacher / "unet") == []
    assert len(pipe(class_labels=list(range(10))).images) == 10
    for k in range(2):
        first, last = (tensors_in(lora / f"student_{k}" / stage / "final" / "student") for stage in ("dm", "adm"))
        assert all(": unet." in name and ".lora_" in name for name in last)
        # Trained from where the stage before ended.
        assert 0 < max((last[name] - first[name]).abs().max() for name in first) < 2.2e-4
        assert different(lora / f"unet_{k}", lora / f"student_{k}" / "adm" / "final" / "student") == []
        fake = tensors_in(lora / f"student_{k}" / "adm" / "final" / "fake_score")
        assert fake.keys() == last.keys() and any(not torch.equal(fake[name], last[name]) for name in fake)
    state = tensors_in(lora / "student_0" / "adm" / "checkpoint-2")
    moments = [t.numel() for name, t in state.items() if "optimizer_student" in name and name.endswith("exp_avg")]
    assert sum(moments) == sum(tensor.numel() for tensor in last.values())


def test_lora_run_continues_bit_for_bit(lora, teacher, pairs, tmp_path):
    broken = shutil.copytree(lora, tmp_path / "broken")
    for remains in ("student_0/dm/final", "student_0/dm/checkpoint-2", "student_0/adm", "student_1/adm"):
        shutil.rmtree(broken / remains)
    arguments = ["--student_type", "lora", "--fake_score_type", "lora", "--rank", 2, "--num_students", 2]
    assert distil(teacher, pairs, broken, *arguments, "--resume_from_checkpoint", "checkpoint-1") == 0
    for name in ("unet_0", "unet_1"):
        assert different(lora / name, broken / name) == []


def test_jobs_of_single_students_give_the_same_weights_as_one_job_of_all(folder, teacher, pairs, same_size, capsys):
    jobs = folder / "jobs"
    assert distil(teacher, pairs, jobs, "--num_students", 2, "--student_index", 1) == 0
    assert "1 of 2 students are finished" in capsys.readouterr().out
    assert not (jobs / "model_index.json").exists()
    assert distil(teacher, pairs, jobs, "--num_students", 2, "--student_index", 0) == 0
    assert "is ready" in capsys.readouterr().out
    for name in ("unet_0", "unet_1", "student_0", "student_1"):
        assert different(same_size / name, jobs / name) == []


def test_finished_run_started_again_trains_nothing(teacher, pairs, same_size, capsys):
    before = hashes(same_size)
    arguments = ["--num_students", 2, "--stages", "dm", "adm"]
    assert distil(teacher, pairs, same_size, *arguments) == 0
    assert "is ready" in capsys.readouterr().out
    after = hashes(same_size)
    assert {name for name in before if after[name] != before[name]} <= {"README.md", "model_index.json"}


def test_run_continues_from_a_checkpoint_given_by_name(folder, teacher, pairs, same_size, tmp_path):
    """The name is of the stage that was interrupted; later ones have no such checkpoint and start from the beginning."""
    broken = shutil.copytree(same_size, tmp_path / "broken")
    for remains in ("student_0/dm/final", "student_0/dm/checkpoint-2", "student_0/adm", "student_1/adm"):
        shutil.rmtree(broken / remains)
    assert distil(teacher, pairs, broken, "--num_students", 2, "--resume_from_checkpoint", "checkpoint-1") == 0
    for name in ("unet_0", "unet_1"):
        assert different(same_size / name, broken / name) == []


def test_evaluation_leaves_a_table_and_pictures(folder, teacher, same_size, smaller, lora, feature_net, capsys):
    models = [f"teacher={teacher}", f"K=2={same_size}", f"small={smaller}", f"lora={lora}"]
    arguments = ["--feature_net", feature_net, "--num_images", 80, "--num_inference_steps", 2, *DATA]
    assert run("evaluate.py", "--models", *models, *arguments, "--output_dir", folder / "results") == 0
    printed = capsys.readouterr().out
    results = json.loads((folder / "results" / "results.json").read_text())
    rows = {row["model"]: row for row in results["rows"]}
    assert list(rows) == ["teacher", "K=2", "small", "lora"]
    for row in rows.values():
        assert row["fd"] > 0 and 0 <= row["class_accuracy"] <= 1 and 0 <= row["recall"] <= 1
        assert row["images_per_second"] > 0 and row["num_generated"] == 80 and row["num_real"] == 1797
    assert rows["K=2"]["parameters_total"] == 2 * rows["K=2"]["parameters"] == 2 * rows["teacher"]["parameters"]
    assert rows["small"]["parameters"] < rows["teacher"]["parameters"] / 2
    assert rows["lora"]["parameters"] < rows["lora"]["parameters_total"] < 1.5 * rows["teacher"]["parameters"]
    assert rows["K=2"]["training_seconds"] > 0 and rows["teacher"]["training_seconds"] is None
    training = rows["K=2"]["training"]
    assert training["flops_with_pairs"] == training["flops"] + training["pairs"]["flops"]
    assert training["flops"] == sum(student["flops"] for student in training["students"].values()) > 0
    assert training["pairs"]["passes"]["teacher"]["forward"] > 0 and rows["teacher"]["training"] == {}
    assert rows["small"]["storage_bytes"] < rows["K=2"]["storage_bytes"]
    assert rows["lora"]["latency"]["wall_ms"] > 0
    assert set(rows["K=2"]["parts"]) == {"0", "1"}
    table = (folder / "results" / "results.md").read_text()
    assert table in printed and table.count("\n|") == 5 and "held-out accuracy" in table
    for name in ("samples.png", "learning_curves.png"):
        colours = picture(folder / "results" / name).convert("RGB").getcolors(2**24)
        assert len(colours) > 10, name


def test_evaluation_is_the_same_for_every_batch_size(folder, teacher, same_size, feature_net):
    rows = []
    for size in (80, 7):
        models = [f"teacher={teacher}", f"students={same_size}"]
        arguments = ["--feature_net", feature_net, "--num_images", 80, "--num_inference_steps", 2, *DATA]
        output = folder / f"batch_{size}"
        assert (
            run("evaluate.py", "--models", *models, *arguments, "--sample_batch_size", size, "--output_dir", output)
            == 0
        )
        rows.append(json.loads((output / "results.json").read_text())["rows"])
    for a, b in zip(*rows):
        assert a["fd"] == pytest.approx(b["fd"], rel=1e-3)
        assert a["class_accuracy"] == b["class_accuracy"]


# ------------------------------------------------------------------ processes of their own


def environment() -> dict[str, str]:
    """The same package, and as many threads as here, so that sums are the same."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())}


def test_accelerate_launch_gives_the_same_weights(teacher, pairs, tmp_path):
    settings = ["--stages", "dm", "--pretrained_teacher_model", teacher, "--pairs_dir", pairs, *DATA, *SHORT]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", 1]
    command += [SCRIPTS / "train_msd.py", *settings, "--output_dir", tmp_path / "launched"]
    result = subprocess.run([*map(str, command)], env=environment(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert run("train_msd.py", *settings, "--output_dir", tmp_path / "here") == 0
    assert different(tmp_path / "launched" / "unet_0", tmp_path / "here" / "unet_0") == []


def test_ctrl_c_writes_a_checkpoint_and_the_run_resumes_bit_for_bit(folder, teacher, pairs, tmp_path):
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    settings = ["--stages", "dm", "--max_train_steps", 25, "--checkpointing_steps", 100]
    command = ["--pretrained_teacher_model", teacher, "--pairs_dir", pairs, *DATA, *SHORT, "--output_dir", broken]
    process = subprocess.Popen(
        [sys.executable, SCRIPTS / "train_msd.py", *map(str, [*command, *settings, "--student_update_interval", 1])],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    log = broken / "student_0" / "dm" / "log.jsonl"
    try:
        while process.poll() is None and not (log.exists() and log.read_text()):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, error
    assert "continue with --resume_from_checkpoint latest" in error.splitlines()[-1] and "Traceback" not in error
    (checkpoint,) = log.parent.glob("checkpoint-*")
    assert 1 <= int(checkpoint.name.split("-")[1]) < 25

    assert distil(teacher, pairs, broken, *settings, "--resume_from_checkpoint", "latest") == 0
    assert distil(teacher, pairs, whole, *settings) == 0
    assert different(whole / "unet_0", broken / "unet_0") == []
    assert log_of(whole / "student_0" / "dm") == log_of(log.parent)


# ------------------------------------------------------------------ bad input


def assert_refused(capsys, status: int, *texts: str):
    """Status 2 and one line that holds the texts, progress bars (of loading) not counted."""
    error = capsys.readouterr().err
    assert status == 2, error
    lines = [line for line in error.replace("\r", "\n").splitlines() if line.strip() and "%|" not in line]
    assert len(lines) == 1 and lines[0].startswith("error: "), error
    for text in texts:
        assert text in lines[0]


def tiny_teacher(path: Path, **unet) -> Path:
    save_teacher(path, tiny_unet(**unet), edm_scheduler())
    return path


@pytest.mark.parametrize("arguments, texts", [
    (["--num_students", 11], ["num_students", "11", "1 to 10"]),
    (["--num_students", 0], ["num_students", "0"]),
    (["--num_students", 2, "--student_index", 2], ["student_index", "2", "0 to 1"]),
    (["--push_to_hub"], ["hub_license", "apache-2.0"]),
    (["--push_to_hub", "--hub_license", "mit", "--hub_model_id", "../elsewhere"], ["repo_id", "../elsewhere"]),
    (["--student_channels", 4, 8], ["stages", "tsm", "--student_init inherit", "--allow_random_student"]),
    (["--student_channels", 4, 7, "--stages", "tsm", "dm"], ["student_channels", "[4, 7]"]),
    (["--student_channels", 8, 32, "--student_init", "inherit", "--stages", "tsm"], ["student_channels", "32", "16"]),
    (["--student_blocks", 2, "--student_init", "inherit", "--stages", "tsm"], ["student_blocks", "2"]),
    (["--student_init", "sliced"], ["student_init", "sliced"]),
    (["--student_preset", "sd15-83"], ["student_preset", "UNet2DConditionModel", "[8, 16]"]),
    (["--student_preset", "imagenet64-42", "--student_blocks", 1], ["student_preset", "student_blocks"]),
    (["--student_channels", 4, "--stages", "tsm", "dm"], ["student_channels", "[4]", "2"]),
    (["--student_blocks", 0, "--stages", "tsm", "dm"], ["student_blocks", "0"]),
    (["--student_type", "lora", "--rank", 0], ["rank", "0"]),
    (["--student_type", "lora", "--lora_target_modules", "to_z"], ["lora_target_modules", "to_z"]),
    (["--student_type", "lora", "--student_channels", 4, 8, "--stages", "tsm"], ["student_type", "student_channels"]),
    (["--stages", "adm", "dm"], ["stages", "tsm dm adm", "['adm', 'dm']"]),
    (["--stages", "dm", "dm"], ["stages", "['dm', 'dm']"]),
    (["--stages", "gan"], ["stages", "gan"]),
    (["--max_train_steps", 1, 2, 3], ["max_train_steps", "2 (one per stage)", "[1, 2, 3]"]),
    (["--student_update_interval", 0], ["student_update_interval", "0"]),
    (["--pairs_dir", "runs/none"], ["pairs_dir", "runs/none"]),
    (["--pretrained_teacher_model", "runs/none/at/all"], ["pretrained_teacher_model", "runs/none/at/all"]),
    (["--dataset_split", "test"], ["dataset_split", "test"]),
    (["--resolution", 16], ["resolution", "16", "8"]),
    (["--train_data_dir", "none", "--dataset_name", "fashion_mnist"], ["train_data_dir", "none"]),
    # These 12 digits hold zeros but no ones: student 0 could be trained, student 1 not.
    (["--max_train_samples", 12, "--num_students", 10], ["classes: [1]", "none of the 12 images"]),
    (["--validation_feature_net", "runs/none/at/all"], ["validation_feature_net", "runs/none/at/all"]),
    (["--guidance_scale", 2.0, "--stages", "tsm", "dm"], ["guidance_scale", "2.0"]),
    (["--mixed_precision", "fp16"], ["mixed_precision", "fp16"]),
    (["--learning_rat", "1e-3"], ["--learning_rat", "did you mean --learning_rate?"]),
    (["--train_batch_size", "four"], ["train_batch_size", "four"]),
    (["--report_to", "nobody"], ["report_to", "nobody"]),
    (["--config", "none.yaml"], ["config", "none.yaml"]),
])  # fmt: skip
def test_bad_input_to_train_msd_is_refused_before_training(arguments, texts, teacher, pairs, tmp_path, capsys):
    status = distil(teacher, pairs, tmp_path / "run", *arguments)
    assert_refused(capsys, status, *texts)
    assert not list(tmp_path.glob("run/student_*"))


def test_dm_without_pairs_is_refused(teacher, tmp_path, capsys):
    arguments = ["--pretrained_teacher_model", teacher, "--output_dir", tmp_path, *DATA, *SHORT]
    assert_refused(capsys, run("train_msd.py", *arguments), "pairs_dir", "generate_pairs.py")


def test_dm_without_regression_needs_no_pairs(teacher, tmp_path):
    arguments = ["--pretrained_teacher_model", teacher, "--output_dir", tmp_path, *SHORT, "--stages", "dm"]
    assert run("train_msd.py", *arguments, "--regression_weight", 0) == 0
    assert MultiStudentPipeline.from_pretrained(tmp_path).students.keys() == {0}


@pytest.mark.parametrize("k, same", [(1, True), (2, False)])
def test_filtered_pairs_are_those_of_the_students_part(k, same, teacher, pairs, tmp_path):
    arguments = ["--stages", "dm", "--num_students", k, "--student_index", 0]
    assert distil(teacher, pairs, tmp_path / "all", *arguments) == 0
    assert distil(teacher, pairs, tmp_path / "part", *arguments, "--filter_pairs") == 0
    changed = different(*(tmp_path / name / "student_0" / "dm" / "final" / "student" for name in ("all", "part")))
    assert (changed == []) == same


@pytest.mark.parametrize("init, allowed", [("random", ["--allow_random_student"]), ("inherit", [])])
def test_smaller_student_may_start_without_tsm(init, allowed, teacher, pairs, tmp_path):
    arguments = ["--student_channels", 4, 8, "--stages", "dm", "--max_train_steps", 1, *allowed]
    arguments += ["--student_init", init, "--learning_rate", 0, "--ema_decay", 0]
    assert distil(teacher, pairs, tmp_path, *arguments) == 0
    model = MultiStudentPipeline.from_pretrained(tmp_path).students[0]
    inherited = create_student(load_teacher(teacher)[0], [4, 8], init="inherit")
    assert torch.equal(model.conv_in.weight, inherited.conv_in.weight) == (init == "inherit")


def test_pairs_of_another_teacher_are_refused(teacher, pairs, tmp_path, capsys):
    other = tiny_teacher(tmp_path / "other", num_classes=10)
    assert_refused(capsys, distil(other, pairs, tmp_path / "run"), "pairs_dir", "another teacher", "generate_pairs.py")


def test_corrupt_pairs_are_refused_by_name(teacher, pairs, tmp_path, capsys):
    copy = shutil.copytree(pairs, tmp_path / "copy")
    shard = copy / "pairs-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    assert_refused(capsys, distil(teacher, copy, tmp_path / "run"), "pairs_dir", shard.name, "generate_pairs.py")


@pytest.mark.parametrize("script", ["train_teacher.py", "generate_pairs.py", "train_msd.py", "evaluate.py"])
def test_unwritable_output_folder_is_refused(script, teacher, pairs, feature_net, same_size, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    output_dir = tmp_path / "file" / "run"
    arguments = {
        "train_teacher.py": [*TEACHER, *SHORT],
        "generate_pairs.py": ["--pretrained_teacher_model", teacher],
        "train_msd.py": ["--pretrained_teacher_model", teacher, "--pairs_dir", pairs, *DATA, *SHORT],
        "evaluate.py": ["--models", f"a={same_size}", "--feature_net", feature_net, *DATA],
    }[script]
    assert_refused(capsys, run(script, *arguments, "--output_dir", output_dir), "output_dir", str(output_dir))


@pytest.mark.parametrize("script", ["generate_pairs.py", "train_msd.py"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "no scheduler"])
def test_damaged_teacher_is_refused(script, damage, teacher, pairs, tmp_path, capsys):
    copy = shutil.copytree(teacher, tmp_path / "copy")
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "missing":
        weights.unlink()
    else:
        shutil.rmtree(copy / "scheduler")
    arguments = ["--pretrained_teacher_model", copy, "--output_dir", tmp_path / "run"]
    if script == "train_msd.py":
        arguments += ["--pairs_dir", pairs, *DATA, *SHORT]
    assert_refused(capsys, run(script, *arguments), "pretrained_teacher_model", str(copy))


def test_teacher_without_classes_is_refused(pairs, tmp_path, capsys):
    other = tiny_teacher(tmp_path / "other", num_classes=None)
    assert_refused(capsys, distil(other, pairs, tmp_path / "run"), "pretrained_teacher_model", "class")
    arguments = ["--pretrained_teacher_model", other, "--output_dir", tmp_path / "more"]
    assert_refused(capsys, run("generate_pairs.py", *arguments), "pretrained_teacher_model", "class")


def test_more_students_than_a_pipeline_holds_are_refused(pairs, tmp_path, capsys):
    other = tiny_teacher(tmp_path / "other", num_classes=70)
    status = distil(other, pairs, tmp_path / "run", "--num_students", 65, "--regression_weight", 0, "--stages", "dm")
    assert_refused(capsys, status, "num_students", "65", "64")


def test_images_that_do_not_fit_the_teacher_are_refused(pairs, tmp_path, capsys):
    large = tiny_teacher(tmp_path / "large", num_classes=10, sample_size=16)
    status = distil(large, pairs, tmp_path / "run", "--stages", "adm")
    assert_refused(capsys, status, "resolution", "8x8", "16x16")
    few = tiny_teacher(tmp_path / "few", num_classes=4)
    assert_refused(capsys, distil(few, pairs, tmp_path / "run", "--stages", "adm"), "dataset_name", "10 classes", "4")


def test_teacher_whose_features_fit_no_discriminator_is_refused_before_other_stages(pairs, tmp_path, capsys):
    odd = tiny_teacher(tmp_path / "odd", num_classes=10, sample_size=12)
    arguments = ["--stages", "dm", "adm", "--regression_weight", 0, "--resize"]
    assert_refused(capsys, distil(odd, pairs, tmp_path / "run", *arguments), "size", "power of two")
    assert not list(tmp_path.glob("run/student_*"))


@pytest.mark.parametrize("arguments, texts", [
    (["--num_students", 5], ["num_students = 2", "now it is 5"]),
    (["--num_students", 2, "--seed", 1], ["seed = 0", "now it is 1"]),
    (["--num_students", 2, "--stages", "tsm", "dm", "adm"], ["stages", "['dm', 'adm']"]),
    (["--num_students", 2, "--partition", "random"], ["partition"]),
])  # fmt: skip
def test_output_folder_of_another_run_is_refused(arguments, texts, teacher, pairs, same_size, capsys):
    before = hashes(same_size)
    assert_refused(capsys, distil(teacher, pairs, same_size, *arguments), "output_dir", str(same_size), *texts)
    assert hashes(same_size) == before


def test_checkpoints_of_an_unfinished_run_are_not_overwritten(teacher, pairs, same_size, tmp_path, capsys):
    copy = shutil.copytree(same_size, tmp_path / "copy")
    shutil.rmtree(copy / "student_0" / "adm" / "final")
    status = distil(teacher, pairs, copy, "--num_students", 2)
    assert_refused(capsys, status, "output_dir", "--resume_from_checkpoint latest")
    status = distil(teacher, pairs, copy, "--num_students", 2, "--resume_from_checkpoint", "checkpoint-9")
    assert_refused(capsys, status, "resume_from_checkpoint", "checkpoint-9", "checkpoint-1, checkpoint-2")


@pytest.mark.parametrize("arguments, texts", [
    (["--image_channels", 3], ["resolution", "RGB"]),
    (["--dataset_name", "digits", "--train_data_dir", "x"], ["train_data_dir", "x"]),
    (["--teacher_channels", 8, 16, 32, 64, 128], ["teacher_channels", "5"]),
    (["--attention_levels", 3], ["attention_levels", "3"]),
    (["--max_train_steps", 1, 2], ["max_train_steps", "[1, 2]"]),
    (["--image_channel", 1], ["--image_channel", "did you mean --image_channels?"]),
])  # fmt: skip
def test_bad_input_to_train_teacher_is_refused(arguments, texts, tmp_path, capsys):
    status = run("train_teacher.py", *TEACHER, *SHORT, "--output_dir", tmp_path / "t", *arguments)
    assert_refused(capsys, status, *texts)
    assert not list(tmp_path.glob("t/training/checkpoint-*"))


@pytest.mark.parametrize("arguments, texts", [
    (["--num_pairs", 0], ["num_pairs", "0"]),
    (["--num_pairs", 40], ["num_pairs", "40", "20"]),
    (["--guidance_scale", 2.0], ["guidance_scale", "2.0"]),
])  # fmt: skip
def test_bad_input_to_generate_pairs_is_refused(arguments, texts, teacher, pairs, capsys):
    before = hashes(pairs)
    command = ["--pretrained_teacher_model", teacher, "--output_dir", pairs, "--num_pairs", 20]
    status = run("generate_pairs.py", *command, "--num_inference_steps", 2, "--shard_size", 12, *arguments)
    assert_refused(capsys, status, *texts)
    assert hashes(pairs) == before


@pytest.mark.parametrize("arguments, texts", [
    (["--models", "runs/digits"], ["models", "runs/digits"]),
    (["--models", "a=runs/none/at/all"], ["models", "runs/none/at/all"]),
    (["--num_images", 85], ["num_images", "10", "85"]),
    (["--num_images", 20], ["num_images", "20", "40"]),
    (["--num_images", 0], ["num_images", "0"]),
    (["--sample_batch_size", 0], ["sample_batch_size", "0"]),
    (["--feature_net", "runs/none/at/all"], ["feature_net", "runs/none/at/all"]),
])  # fmt: skip
def test_bad_input_to_evaluate_is_refused(arguments, texts, same_size, feature_net, tmp_path, capsys):
    command = ["--models", f"a={same_size}", "--feature_net", feature_net, "--num_images", 80, *DATA]
    assert_refused(capsys, run("evaluate.py", *command, "--output_dir", tmp_path, *arguments), *texts)
    assert not (tmp_path / "results.json").exists()
