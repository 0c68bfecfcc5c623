# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""What things cost: accounts of training and of pairs, added up; storage and latency of what came out.

An account is a dict that goes into a JSON file. Its entries, where they apply:

    steps, pairs      iterations done, pairs made
    images_seen       {data set: samples read from it}, of all processes
    passes            {role: {way: samples that went through the network}}, see `flops.PassCounter`; of all processes
    flops             multiplications and additions of matrix products, convolutions and attention; of all processes
    seconds           wall time of the loop; of pairs, where processes do not wait for one another, its sum over them
    processes         how many worked at a time
    peak_memory       {what was measured: bytes}, see `peak_memory`; of the process that needed most
    hardware          what it ran on, a list
"""

import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
from accelerate import Accelerator
from diffusers import ModelMixin

from .flops import count_work


# What two accounts have together is the sum of these.
_SUMMED = ("steps", "pairs", "images_seen", "passes", "flops", "seconds")


def add_accounts(accounts: list[dict]) -> dict:
    """One account of several: sums, the largest peak of memory, all hardware.

    An entry that one of them lacks (older runs have fewer) is left out, since a sum without it would be too small.
    """
    total = {key: _sum([a[key] for a in accounts]) for key in _SUMMED if _in_all(key, accounts)}
    if _in_all("peak_memory", accounts):
        total["peak_memory"] = _largest([a["peak_memory"] for a in accounts])
    if _in_all("hardware", accounts):
        total["hardware"] = sorted({name for a in accounts for name in a["hardware"]})
    return total


def _in_all(key: str, accounts: list[dict]) -> bool:
    return bool(accounts) and all(key in account for account in accounts)


def _sum(values: list):
    if not isinstance(values[0], dict):
        return sum(values)
    names = dict.fromkeys(name for value in values for name in value)
    return {name: _sum([value[name] for value in values if name in value]) for name in names}


def _largest(peaks: list[dict[str, int]]) -> dict[str, int]:
    names = dict.fromkeys(name for peak in peaks for name in peak)
    return {name: max(peak.get(name, 0) for peak in peaks) for name in names}


def multiply(work, times: int, per: int = 1):
    """Every number in nested dicts times `times` / `per`. What is counted grows with the batch, so nothing is rounded."""
    if isinstance(work, dict):
        return {name: multiply(value, times, per) for name, value in work.items()}
    return work * times // per


class StageAccount:
    """Keeps the account of a stage. Its turns run again and again alike, so the first run of each is counted for all.

    Args:
        accelerator: all its processes do the same, each on its share of the batch.
        global_batch_size: samples of a turn, of all processes.
    """

    def __init__(self, accelerator: Accelerator, global_batch_size: int):
        self.accelerator, self.global_batch_size = accelerator, global_batch_size
        self.work: dict[str, dict] = {}
        # Of jobs before this one, which were interrupted.
        self.earlier_peak: dict[str, int] = {}
        if accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(accelerator.device)

    @contextmanager
    def run_of(
        self, turn: str, networks: Callable[[], dict[str, ModelMixin]], needs: tuple[str, ...]
    ) -> Iterator[None]:
        """To be put around the passes of a turn.

        Args:
            turn: its name.
            networks: gives its networks by role; called at its first run only, since finding them takes a moment.
            needs: the data sets it takes batches from.
        """
        if turn in self.work:
            yield
            return
        with count_work(networks()) as work:
            yield
        images = dict.fromkeys(needs, self.global_batch_size)
        self.work[turn] = {**multiply(work, self.accelerator.num_processes), "images_seen": images}

    def state(self) -> dict:
        """For a checkpoint; to be called by all processes."""
        return {"work": self.work, "peak_memory": self._peak_memory()}

    def go_on_from(self, state: dict):
        """Takes up the account of an interrupted run."""
        self.work, self.earlier_peak = state["work"], state["peak_memory"]

    def total(self, runs: dict[str, int]) -> dict:
        """The account, given how often each turn ran; to be called by all processes."""
        # Of a turn that was not seen (its run was resumed from a checkpoint without account) nothing is known.
        work = [multiply(self.work.get(turn, {}), times) for turn, times in runs.items() if times > 0]
        return {
            **add_accounts(work),
            "processes": self.accelerator.num_processes,
            "peak_memory": self._peak_memory(),
            "hardware": [hardware(self.accelerator.device)],
        }

    def _peak_memory(self) -> dict[str, int]:
        device = self.accelerator.device
        here = {
            name: int(self.accelerator.gather(torch.tensor([size], device=device)).max())
            for name, size in peak_memory(device).items()
        }
        return _largest([here, self.earlier_peak])


def peak_memory(device: torch.device) -> dict[str, int]:
    """The most memory that was in use, {what was measured: bytes}.

    "gpu_allocated" is what torch had allocated there since its statistics were last reset. On a CPU it is
    "process_resident", the high-water mark of the whole process since it was started: Python and torch are in it, and
    what it did before.
    """
    if device.type == "cuda":
        return {"gpu_allocated": torch.cuda.max_memory_allocated(device)}
    # In bytes on macOS, else in KiB.
    unit = 1 if sys.platform == "darwin" else 1024
    return {"process_resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def hardware(device: torch.device) -> str:
    """What a device is called; of a CPU its instructions, and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def storage_bytes(folder: str | Path) -> int | None:
    """Bytes on disk of a teacher's or pipeline's components (the folders with a config); None if it is not local.

    Checkpoints, logs and results that lie beside them do not count.
    """
    components = {config.parent for config in Path(folder).glob("*/*config.json")}
    files = [file for component in components for file in component.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files) or None


def latency(call: Callable[[], torch.Tensor], calls: int = 10) -> dict[str, float]:
    """How long a call takes, the median of several after one that does not count.

    Args:
        call: gives a tensor, whose copy to the CPU is waited for.
        calls: how many.

    Returns:
        {"wall_ms": milliseconds by the clock, "processor_ms": of all threads of this process}. On a busy CPU the second
        is the steadier; of a GPU it says nothing.
    """
    wall, processor = [], []
    call().cpu()
    for _ in range(calls):
        began = time.perf_counter(), time.process_time()
        call().cpu()
        wall.append(time.perf_counter() - began[0])
        processor.append(time.process_time() - began[1])
    return {"wall_ms": 1000 * median(wall), "processor_ms": 1000 * median(processor)}
