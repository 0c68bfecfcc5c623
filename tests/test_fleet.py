# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""What training K students side by side is made of, without Ray: flags, progress, lifelines, locks."""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from filelock import FileLock
from helpers import edm_scheduler, tiny_unet
from test_scripts import DATA, SCRIPTS, SHORT, run

from diffusers_msd import distillation
from diffusers_msd.config import parse_own
from diffusers_msd.progress import View, progress_of, show_end
from diffusers_msd.teachers import save_teacher


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    save_teacher(folder, tiny_unet(10), edm_scheduler())
    return folder


@pytest.fixture(autouse=True)
def neighbours(monkeypatch):
    """Scripts import one another."""
    monkeypatch.syspath_prepend(str(SCRIPTS))


# ------------------------------------------------------------------ flags


@dataclass
class Own:
    """Flags of one script."""

    cpus: float = field(default=1, metadata={"help": "A number."})


@pytest.mark.parametrize("own", [["--cpus", "0.5"], ["--cpus=0.5"]])
@pytest.mark.parametrize("place", [0, 2, 5])
def test_flags_of_a_script_are_taken_out_of_those_it_hands_on(own, place):
    others = ["--stages", "dm", "adm", "--dry_run", "--num_students=2"]
    # Not between a flag and its values.
    place = {0: 0, 2: 3, 5: 5}[place]
    config, rest = parse_own(Own, "", others[:place] + own + others[place:])
    assert config.cpus == 0.5 and rest == others


@pytest.mark.parametrize(
    "name, flags",
    [
        ("cpus_per_student", ["--cpus_per_student", 0]),
        ("cpus_per_student", ["--cpus_per_student", "nan"]),
        ("argument --cpus_per_student", ["--cpus_per_student", "many"]),
        ("gpus_per_student", ["--gpus_per_student", 2]),
        ("gpus_per_student", ["--gpus_per_student", -0.5]),
        ("max_restarts", ["--max_restarts", -1]),
        ("address", ["--address", "ray://head:10001"]),
        ("--max_restart", ["--max_restart", 1]),
        ("student_index", ["--student_index", 0]),
        ("student_index, dry_run", ["--dry_run"]),
        ("push_to_hub", ["--push_to_hub"]),
        ("resume_from_checkpoint", ["--resume_from_checkpoint", "checkpoint-1"]),
        ("max_train_steps", ["--max_train_steps", 1, 2, 3]),
        ("pairs_dir", ["--pairs_arguments", "--num_pairs 2"]),
        ("--num_pair", ["--pairs_dir", "pairs", "--pairs_arguments", "--num_pair 2"]),
        ("feature_net", ["--evaluate_arguments", "--feature_net nowhere --dataset_name digits"]),
    ],
)
def test_bad_flags_are_one_line_before_anything_is_started(name, flags, teacher, tmp_path, capsys):
    arguments = ["--pretrained_teacher_model", teacher, "--output_dir", tmp_path / "run", *flags]
    assert run("train_students_ray.py", *arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: {name}")
    assert not (tmp_path / "run" / "run.json").exists()


def test_help_shows_the_own_flags_and_where_the_others_are(capsys):
    assert run("train_students_ray.py", "--help") == 0
    shown = capsys.readouterr().out
    assert "--max_restarts" in shown and "--evaluate_arguments" in shown and "train_msd.py" in shown


def test_a_token_is_refused_and_not_shown(teacher, tmp_path, capsys):
    arguments = ["--pretrained_teacher_model", teacher, "--output_dir", tmp_path, "--hub_token", "hf_secret"]
    assert run("train_students_ray.py", *arguments) == 2
    shown = capsys.readouterr()
    assert "push_to_hub" in shown.err and "hf_secret" not in shown.err + shown.out


# ------------------------------------------------------------------ one trainer, one driver


def test_a_student_that_another_process_trains_is_refused(teacher, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(distillation, "STOPPING", 0)
    arguments = ["--pretrained_teacher_model", teacher, "--regression_weight", 0, "--stages", "dm", *SHORT, *DATA]
    arguments += ["--num_students", 2, "--output_dir", tmp_path, "--resume_from_checkpoint", "latest"]
    with FileLock(tmp_path / "student_1.lock"):
        assert run("train_msd.py", *arguments, "--student_index", 1) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("error: output_dir: another process trains student")
        assert not (tmp_path / "student_1").exists()
        # Another student is no reason to wait.
        assert run("train_msd.py", *arguments, "--student_index", 0) == 0
    assert run("train_msd.py", *arguments, "--student_index", 1) == 0
    assert (tmp_path / "model_index.json").is_file()


def test_a_second_driver_of_a_run_is_refused(tmp_path):
    fleet = pytest.importorskip("diffusers_msd.fleet")
    with fleet.only_driver(tmp_path) as site:
        site.check()
        with pytest.raises(ValueError, match="output_dir: another train_students_ray.py"):
            with fleet.only_driver(tmp_path):
                pass
    with fleet.only_driver(tmp_path):
        # The first one has ended; a node where its folder is still mounted under this name is not ours.
        with pytest.raises(ValueError, match="output_dir: .* shared disk"):
            site.check()


@pytest.mark.parametrize("address", ["127.0.0.1:9", "nobody.invalid:6379", "127.0.0.1", "127.0.0.1:port", ""])
def test_an_address_where_nobody_answers_is_refused_at_once(address):
    fleet = pytest.importorskip("diffusers_msd.fleet")
    with pytest.raises(ValueError, match="^address: local, auto or host:port"):
        with fleet.connect(address):
            pass


# ------------------------------------------------------------------ lifeline


SCRIPT = """
import signal, sys, time
from pathlib import Path
def save(signum, frame):
    Path(sys.argv[1]).write_text("saved")
    sys.exit(130)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
while True:
    time.sleep(0.05)
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    return [sys.executable, "-m", "diffusers_msd.lifeline", str(tmp_path / "script.py"), str(tmp_path / "left")]


PARENT = """
import subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
process.stdout.readline()
print("ready", flush=True)
process.wait()
"""


def test_a_script_ends_when_its_parent_is_killed(script, tmp_path):
    # It holds the parent's standard error, which therefore ends when it does.
    parent = subprocess.Popen([sys.executable, "-c", PARENT, *script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert parent.stdout.readline() == b"ready\n"
    parent.kill()
    parent.communicate()
    assert (tmp_path / "left").read_text() == "saved"


def test_a_script_has_its_arguments_neighbours_and_status(tmp_path):
    (tmp_path / "neighbour.py").write_text("STATUS = 3\n")
    (tmp_path / "script.py").write_text("import sys, neighbour; print(sys.argv); sys.exit(neighbour.STATUS)\n")
    command = [sys.executable, "-m", "diffusers_msd.lifeline", str(tmp_path / "script.py"), "--a", "b"]
    # Not `run`, which closes standard input.
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.wait() == 3
    assert process.communicate()[0] == f"{[str(tmp_path / 'script.py'), '--a', 'b']}\n"


# ------------------------------------------------------------------ progress


def write_log(folder: Path, lines: list[dict], rest: str = "", finished: bool = False):
    (folder / "final").mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + rest)
    if finished:
        (folder / "final" / "summary.json").write_text("{}")


def test_progress_adds_finished_stages_and_the_lines_of_the_current_one(tmp_path):
    stages, steps = ["tsm", "dm", "adm"], [10, 20, 30]
    assert progress_of(tmp_path, stages, steps).position == 0
    write_log(tmp_path / "tsm", [{"step": 10, "student/loss": 9.0}], finished=True)
    lines = [{"step": 5, "student/loss": 0.51234}, {"step": 5, "validation/fd": 7.0}, {"step": 10, "critic/loss": 1.0}]
    write_log(tmp_path / "dm", lines, rest='{"step": 15, "stud')
    progress = progress_of(tmp_path, stages, steps)
    assert progress.position == 20
    assert progress.shown == {"stage": "dm", "loss": "0.512", "fd": "7"}
    (tmp_path / "dm" / "final" / "summary.json").write_text("{}")
    assert progress_of(tmp_path, stages, steps).position == 30


def test_the_view_shows_where_students_are_and_that_one_fell_back(tmp_path, capsys):
    write_log(tmp_path / "student_0" / "dm", [{"step": 4, "student/loss": 0.5}])
    view = View(tmp_path, ["dm"], [8], 2)
    view.update()
    view.restarts[0] = 1
    (tmp_path / "student_0" / "dm" / "log.jsonl").write_text('{"step": 2}\n')
    view.update()
    view.close()
    shown = capsys.readouterr().err
    assert "student 0:  50%" in shown and "4/8" in shown and "stage dm, loss 0.5, restarts 0" in shown
    assert "student 0:  25%" in shown and "2/8" in shown and "restarts 1" in shown
    assert "student 1:   0%" in shown


def test_the_end_of_a_log_is_shown_without_overwritten_bars(tmp_path, capsys):
    log = tmp_path / "job.log"
    log.write_text("".join(f"line {i}\n" for i in range(30)) + "bar 1\rbar 2\rbar 3\nerror: why\n")
    show_end(log)
    shown = capsys.readouterr().err
    assert shown == "\n".join(
        [f"--- the end of {log}", *(f"line {i}" for i in range(17, 30)), "bar 3", "error: why", "---\n"]
    )
    show_end(tmp_path / "missing.log")


# ------------------------------------------------------------------ Slurm


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Runs the body of the job array; srun ends with `status` and writes down what it was to run."""

    def task(status: int, *arguments) -> tuple[int, str]:
        tools = tmp_path / "tools"
        tools.mkdir(exist_ok=True)
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        for name, code in (("srun", status), ("scontrol", 0)):
            (tools / name).write_text(f'#!/bin/bash\necho "{name} $@" >> {calls}\nexit {code}\n')
            (tools / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(tools), prepend=":")
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
        monkeypatch.setenv("SLURM_JOB_ID", "42")
        process = subprocess.run(["bash", str(SCRIPTS / "slurm_array.sh"), *arguments])
        return process.returncode, calls.read_text()

    return task


@pytest.mark.parametrize("status, after", [(0, ""), (2, ""), (130, "scontrol requeue 42\n")])
def test_a_task_of_the_array_trains_its_student_and_is_queued_again_if_it_was_stopped(slurm, status, after):
    ended, calls = slurm(status, "--num_students", "2", "--output_dir", "a folder")
    trained = "srun python training_scripts/train_msd.py --num_students 2 --output_dir a folder --student_index 1"
    assert calls == f"{trained} --resume_from_checkpoint latest\n{after}"
    assert ended == (0 if status == 130 else status)
