# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""K students side by side: a job of `train_msd.py` for each, placed by Ray and started again when it dies."""

import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from .files import atomic_write
from .lifeline import GRACE
from .progress import View, show_end


try:
    import ray
    from ray.cloudpickle import register_pickle_by_value
    from ray.exceptions import GetTimeoutError, NodeDiedError, RayTaskError, WorkerCrashedError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ImportError as error:
    raise ImportError("ray: needs the extra `ray`: pip install 'diffusers_msd[ray]'") from error

# The functions below go to the nodes themselves, not by name: a process that starts a job and waits for it then needs
# neither torch nor this package in its memory.
register_pickle_by_value(sys.modules[__name__])

# Seconds between two looks at the students.
INTERVAL = 1.0
# Seconds in which the nodes have to answer; they may have to start a process for it.
ANSWER = 300


# ------------------------------------------------------------------ what nodes and driver share


@dataclass(frozen=True)
class Site:
    """Paths that have to mean the same on every node.

    Args:
        working_dir: where the command was given; relative paths are from here.
        output_dir: of the run.
        name: of this driver; `output_dir` holds it in a file.
    """

    working_dir: Path
    output_dir: Path
    name: str

    @property
    def name_file(self) -> Path:
        return self.output_dir / ".driver"

    def is_current(self) -> bool:
        """Whether this driver is at work and no later one, as this node sees it."""
        try:
            return self.name_file.read_text() == self.name
        except FileNotFoundError:
            return False

    def check(self):
        """Refuses a node that does not see the driver's folders.

        Raises:
            ValueError: naming the node and the folder.
        """
        host = os.uname().nodename
        if not self.is_current():
            raise ValueError(f"output_dir: {self.output_dir} on {host} is not the driver's; a shared disk is needed")
        if not self.working_dir.is_dir():
            raise ValueError(
                f"working folder: {host} has no {self.working_dir}; start the command in a folder that all nodes share"
            )


@contextmanager
def only_driver(output_dir: Path) -> Iterator[Site]:
    """The site of a run, which no other driver has at the same time.

    Args:
        output_dir: an absolute path of a folder that can be written.

    Raises:
        ValueError: another driver works there.
    """
    site = Site(Path.cwd(), output_dir, uuid.uuid4().hex)
    try:
        with FileLock(output_dir / ".driver.lock", timeout=0):
            atomic_write(site.name_file, site.name)
            try:
                yield site
            finally:
                site.name_file.unlink(missing_ok=True)
    except Timeout as error:
        raise ValueError(
            f"output_dir: another train_students_ray.py works in {output_dir}; wait for its end"
        ) from error


@contextmanager
def connect(address: str) -> Iterator[None]:
    """Joins a Ray cluster, or starts one of this machine alone (`local`), and leaves or ends it.

    Raises:
        ValueError: nobody answers at the address.
    """
    try:
        if address not in ("local", "auto"):
            # Ray itself tries for many minutes.
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"address: local, auto or host:port of a Ray cluster expected: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


# ------------------------------------------------------------------ jobs


# A job has a process of its own, which ends with it; Ray repeats none by itself, restarts are counted here.
@ray.remote(max_calls=1, max_retries=0)
def _check_site(site: Site):
    site.check()


@ray.remote(max_calls=1, max_retries=0)
def _check_run(site: Site, configs: tuple):
    from diffusers_msd.distillation import Run

    site.check()
    os.chdir(site.working_dir)
    Run(*configs)


@ray.remote(max_calls=1, max_retries=0)
def _run_script(site: Site, command: list[str], log: Path):
    """Runs a script with its output at the end of a log file, in the environment of the node.

    It is told to stop when the driver says so, or has a successor.

    Raises:
        ChildProcessError: it ended with another status than 0.
        ValueError: this node does not see the driver's folders.
    """
    site.check()
    log.parent.mkdir(exist_ok=True)
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "diffusers_msd.lifeline", *command],
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=site.working_dir,
        )
        try:
            while process.poll() is None and site.is_current():
                time.sleep(0.5)
        finally:
            process.stdin.close()
            process.wait()
    if process.returncode:
        raise ChildProcessError(f"exit status {process.returncode} on {os.uname().nodename}")


def _result(job: ray.ObjectRef, timeout: float | None = None):
    """What a job returned; its own error is raised, not Ray's around it."""
    try:
        return ray.get(job, timeout=timeout)
    except RayTaskError as error:
        raise error.cause from None
    except (WorkerCrashedError, NodeDiedError) as error:
        # Ray's text is a page of possible causes.
        raise ChildProcessError(f"its process or node was lost ({type(error).__name__})") from None


class Fleet:
    """The jobs of a run on a Ray cluster.

    Every node that can run one is asked whether it sees the driver's folders.

    Args:
        site: what nodes and driver share.
        cpus, gpus: of a job.

    Raises:
        ValueError: no node has so many; or one that has does not see the folders, or does not answer.
    """

    def __init__(self, site: Site, cpus: float, gpus: float):
        self.site, self.resources = site, {"CPU": cpus, "GPU": gpus}
        self.options = {"num_cpus": cpus, "num_gpus": gpus}
        nodes = [
            node
            for node in ray.nodes()
            if node["Alive"] and all(node["Resources"].get(name, 0) >= n for name, n in self.resources.items())
        ]
        if not nodes:
            raise ValueError(f"cpus_per_student, gpus_per_student: no node of the cluster has {self.resources}")
        self.num_nodes = len(nodes)
        # All at once; hosts may have the same name.
        answers = [(node["NodeManagerHostname"], self._ask(node["NodeID"])) for node in nodes]
        for host, answer in answers:
            try:
                _result(answer, ANSWER)
            except GetTimeoutError as error:
                raise ValueError(f"address: node {host} does not answer") from error

    def _ask(self, node_id: str) -> ray.ObjectRef:
        there = NodeAffinitySchedulingStrategy(node_id, soft=False)
        return _check_site.options(num_cpus=0, scheduling_strategy=there).remote(self.site)

    def check_run(self, configs: tuple):
        """Raises what `train_msd.py` refuses before it trains, found out on a node."""
        _result(_check_run.options(**self.options).remote(self.site, configs))

    def run(self, command: list[str], log: Path):
        """Runs a script as a job.

        Raises:
            ChildProcessError: it failed; the end of its log is shown.
        """
        job = self._start(command, log)
        try:
            _result(job)
        except ChildProcessError as error:
            show_end(log)
            raise ChildProcessError(f"{Path(command[0]).name}: {error}; its output is in {log}") from None
        except (KeyboardInterrupt, SystemExit):
            self._stop([job])
            raise

    def _start(self, command: list[str], log: Path) -> ray.ObjectRef:
        return _run_script.options(**self.options).remote(self.site, command, log)

    def _stop(self, jobs: list[ray.ObjectRef]):
        """Ends all jobs and waits for them; students write a checkpoint before."""
        # Not by ray.cancel (2.60), which aborts the driver if a job ends at the same moment.
        self.site.name_file.unlink()
        ray.wait(jobs, num_returns=len(jobs), timeout=GRACE + 10)

    def train_students(self, command: list[str], view: View, max_restarts: int):
        """Trains all students to their ends, at the same time as far as the cluster has room.

        A student that dies is started again at once, from its last checkpoint. One that has died too often does not
        keep the others from their ends.

        Args:
            command: `train_msd.py` with the flags of the run.
            view: of all students.
            max_restarts: of each student.

        Raises:
            ChildProcessError: a student died too often; the end of its log is shown.
        """
        logs = {k: self.site.output_dir / f"student_{k}" / "job.log" for k in view.students}

        def start(k: int) -> ray.ObjectRef:
            own = ["--student_index", str(k), "--resume_from_checkpoint", "latest"]
            return self._start([*command, *own], logs[k])

        failed = {}
        jobs = {start(k): k for k in view.students}
        try:
            while jobs:
                done, _ = ray.wait(list(jobs), timeout=INTERVAL)
                for job in done:
                    k = jobs.pop(job)
                    try:
                        _result(job)
                    except Exception as error:  # Whatever it was, the others go on.
                        if view.restarts[k] == max_restarts:
                            failed[k] = error
                        else:
                            view.restarts[k] += 1
                            view.say(f"student {k}: {error}; restart {view.restarts[k]} of {max_restarts}")
                            jobs[start(k)] = k
                view.update()
        finally:
            view.close()
            if jobs:
                self._stop(list(jobs))
        for k in failed:
            show_end(logs[k])
        if failed:
            errors = ", ".join(f"student {k}: {error}" for k, error in failed.items())
            raise ChildProcessError(
                f"{errors}, after {max_restarts} restarts; the work of all students is kept, the same command goes on"
            )
