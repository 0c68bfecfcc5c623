# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""K students side by side, on a Ray cluster of several node processes and as a job array; what dies changes nothing."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
from helpers import edm_scheduler, tiny_unet
from test_scripts import DATA, SCRIPTS
from test_training import different, log_of

from diffusers_msd import MultiStudentPipeline
from diffusers_msd.teachers import save_teacher


cluster_utils = pytest.importorskip("ray.cluster_utils")
pytestmark = pytest.mark.services

ROOT = SCRIPTS.parent
# Of anything that is waited for; a busy machine is slow.
PATIENCE = 1800
STEPS = 40


@pytest.fixture(scope="module", autouse=True)
def environment():
    """Of nodes, drivers and the run to compare with: one thread each, and this package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(ROOT / "src"))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        yield


@pytest.fixture(scope="module")
def cluster():
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    """Of two students of a tiny teacher; checkpoints come often."""
    folder = tmp_path_factory.mktemp("shared")
    save_teacher(folder / "teacher", tiny_unet(10), edm_scheduler())
    flags = ["--pretrained_teacher_model", folder / "teacher", "--pairs_dir", folder / "pairs", *DATA]
    flags += ["--num_students", 2, "--train_batch_size", 4, "--max_train_steps", STEPS, "--student_update_interval", 1]
    flags += ["--logging_steps", 1, "--checkpointing_steps", 4, "--report_to", "none"]
    return [str(flag) for flag in flags]


PAIRS = "--num_pairs 20 --num_inference_steps 2"


@pytest.fixture(scope="module")
def reference(flags, tmp_path_factory) -> Path:
    """Both students one after another, in one process."""
    folder = tmp_path_factory.mktemp("reference")
    teacher, pairs = flags[1], flags[3]
    made = ["generate_pairs.py", "--pretrained_teacher_model", teacher, "--output_dir", pairs, *PAIRS.split()]
    for script, *arguments in (made, ["train_msd.py", *flags, "--output_dir", str(folder)]):
        subprocess.run([sys.executable, str(SCRIPTS / script), *arguments], check=True)
    return folder


def assert_same(run: Path, reference: Path):
    for k in range(2):
        assert different(run / f"unet_{k}", reference / f"unet_{k}") == []
        for stage in ("dm", "adm"):
            assert (
                different(run / f"student_{k}" / stage / "final", reference / f"student_{k}" / stage / "final") == []
            )
            assert log_of(run / f"student_{k}" / stage) == log_of(reference / f"student_{k}" / stage)
    assert MultiStudentPipeline.from_pretrained(run).route(class_labels=[0, 9]) == [0, 1]


class Driver:
    """`train_students_ray.py` in a process of its own.

    Args:
        run: the output folder.
        arguments: of the script.
    """

    def __init__(self, run: Path, *arguments: str):
        self.run, self.output = run, run.with_name(f"{run.name}.driver")
        command = [sys.executable, str(SCRIPTS / "train_students_ray.py"), *arguments, "--output_dir", str(run)]
        with self.output.open("ab") as file:
            # Where a shell started the tests in the background, its children ignore Ctrl-C.
            heard = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, preexec_fn=heard)

    def trainer(self, k: int) -> psutil.Process | None:
        """The process that trains student k, if there is one."""
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            if str(self.run) in line and line[-4:-2] == ["--student_index", str(k)]:
                return process
        return None

    def trainer_with_checkpoint(self, k: int) -> psutil.Process:
        """As soon as student k has one."""
        self.until(lambda: any((self.run / f"student_{k}").glob("*/checkpoint-*")))
        assert not (self.run / f"student_{k}" / "adm" / "final").exists()
        return self.trainer(k)

    def until(self, condition):
        """Waits for something that happens while the driver runs."""
        began = time.monotonic()
        while not condition():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() - began < PATIENCE, self.text()
            time.sleep(0.05)

    def text(self) -> str:
        return self.output.read_text()

    def wait(self) -> int:
        return self.process.wait(PATIENCE)


@pytest.fixture
def drive():
    """Starts drivers; none outlives its test."""
    drivers = []

    def start(*arguments) -> Driver:
        drivers.append(Driver(*arguments))
        return drivers[-1]

    yield start
    for driver in drivers:
        if driver.process.poll() is None:
            driver.process.kill()
            driver.process.wait()


def ends(*processes: psutil.Process | None):
    """Waits for the ends of processes."""
    _, alive = psutil.wait_procs([p for p in processes if p is not None], timeout=PATIENCE)
    assert not alive


def test_a_killed_trainer_and_a_killed_node_change_no_weight(cluster, flags, reference, drive, tmp_path):
    evaluation = f"--dataset_name digits --feature_net {SCRIPTS / 'assets' / 'features-digits'} --num_images 40"
    own = ["--address", cluster.address, "--pairs_arguments", PAIRS]
    own += ["--evaluate_arguments", f"{evaluation} --num_inference_steps 2"]
    driver = drive(tmp_path / "run", *own, *flags)

    driver.trainer_with_checkpoint(0).kill()
    driver.until(lambda: "student 0: exit status -9" in driver.text())

    trainer = driver.trainer_with_checkpoint(1)
    above = {process.pid for process in trainer.parents()}
    (node,) = [n for n in cluster.worker_nodes if n.all_processes["raylet"][0].process.pid in above]
    cluster.remove_node(node, allow_graceful=False)
    # Its second trainer must not begin beside it.
    ends(trainer)
    driver.until(lambda: "student 1: its process or node was lost" in driver.text())
    cluster.add_node(num_cpus=1)

    assert driver.wait() == 0, driver.text()
    assert_same(tmp_path / "run", reference)
    assert "restarts 1" in driver.text() and "| model" in driver.text()
    assert (tmp_path / "run" / "results" / "samples.png").is_file()


def test_an_interrupted_and_a_killed_driver_go_on_when_started_again(cluster, flags, reference, drive, tmp_path):
    arguments = (tmp_path / "run", "--address", cluster.address, *flags)
    driver = drive(*arguments)
    trainers = [driver.trainer_with_checkpoint(0), driver.trainer(1)]
    driver.process.send_signal(signal.SIGINT)
    assert driver.wait() == 130, driver.text()
    # It has waited for them.
    assert not any(trainer.is_running() for trainer in trainers if trainer is not None)

    driver = drive(*arguments)
    driver.until(lambda: driver.trainer(0) is not None)
    trainers = [driver.trainer_with_checkpoint(k) for k in range(2)]
    driver.process.kill()
    again = drive(*arguments)
    assert again.wait() == 0, again.text()
    ends(*trainers)
    assert_same(tmp_path / "run", reference)


def test_a_student_that_always_fails_does_not_stop_the_other(flags, reference, drive, tmp_path):
    (tmp_path / "run" / "student_1").mkdir(parents=True)
    (tmp_path / "run" / "student_1" / "dm").write_text("in the way")
    driver = drive(tmp_path / "run", "--max_restarts", "1", "--cpus_per_student", "0.5", *flags)
    assert driver.wait() == 2, driver.text()
    text = driver.text()
    assert text.splitlines()[-1].startswith("error: student 1: exit status 2 on ")
    assert "after 1 restarts" in text and "--- the end of" in text and "File exists" in text
    assert (tmp_path / "run" / "student_1" / "job.log").read_text().count("error: ") == 2
    final = Path("student_0") / "adm" / "final"
    assert different(tmp_path / "run" / final, reference / final) == []


@pytest.mark.parametrize(
    "error, changes",
    [
        ("num_students: 1 to 10", ["--num_students", "99"]),
        ("cpus_per_student, gpus_per_student: no node", ["--gpus_per_student", "0.5"]),
        ("pairs_dir: ", ["--pairs_dir", "nowhere"]),
    ],
)
def test_what_cannot_work_is_said_before_a_student_is_started(error, changes, cluster, flags, drive, tmp_path):
    driver = drive(tmp_path / "run", "--address", cluster.address, *flags, *changes)
    assert driver.wait() == 2
    assert driver.text().splitlines()[-1].startswith(f"error: {error}")
    assert not list((tmp_path / "run").glob("student_*/job.log"))


def test_the_tasks_of_a_job_array_make_the_same_pipeline(flags, reference, tmp_path):
    for name, line in (("srun", 'exec "$@"'), ("python", f'exec {sys.executable} "$@"')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    tools = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "1"}
    command = ["bash", str(SCRIPTS / "slurm_array.sh"), *flags, "--output_dir", str(tmp_path / "run")]
    tasks = [
        subprocess.Popen(command, env={**os.environ, **tools, "SLURM_ARRAY_TASK_ID": str(k)}, cwd=ROOT)
        for k in range(2)
    ]
    assert [task.wait() for task in tasks] == [0, 0]
    assert_same(tmp_path / "run", reference)
