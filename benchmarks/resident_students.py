# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Memory and time of students that are loaded when needed, against a pipeline that has all of them.

    OMP_NUM_THREADS=1 python benchmarks/resident_students.py --output runs/bench/residents.json

K copies of a class-conditional UNet of 52.8 M random weights on 32x32 images are saved and loaded with
`max_resident_students` n = 1 ... K. Memory is what the process has resident, each n in a process of its own, with calls
that go round all students. Time is that of a call whose student is there (hit) and of one whose student has to be
loaded (miss), by turns with the same call of the eager pipeline. The files were just written, so that a miss
reads the system's cache and no disk.
"""

import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import cycle
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from diffusers import EDMEulerScheduler, UNet2DModel
from pipeline import table, take_turns

from diffusers_msd import ClassRouter, MultiStudentPipeline
from diffusers_msd.config import parse_config, run_script
from diffusers_msd.files import check_writable, write_json


@dataclass
class BenchmarkConfig:
    """What is measured."""

    num_students: int = field(default=4, metadata={"help": "K."})
    batch_sizes: list[int] = field(default_factory=lambda: [1], metadata={"help": "Images per timed call."})
    rounds: int = field(default=2, metadata={"help": "How often all students are called when memory is measured."})
    repeats: int = field(default=7, metadata={"help": "How often each case is timed."})
    output: str | None = field(default=None, metadata={"help": "JSON file of the figures."})

    def __post_init__(self):
        if min(self.num_students - 1, self.rounds, self.repeats, *self.batch_sizes) < 1:
            raise ValueError("num_students, rounds, repeats, batch_sizes: >= 1 expected, num_students >= 2")


def save(folder: str, num_students: int) -> int:
    """Saves a pipeline of random students, one class each, and returns the bytes of one student's weights."""
    students = {}
    for k in range(num_students):
        students[f"unet_{k}"] = UNet2DModel(
            sample_size=32,
            block_out_channels=(128, 256, 448),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=64,
            num_class_embeds=num_students,
        ).eval()
    router = ClassRouter.consecutive(num_students, num_students)
    MultiStudentPipeline(EDMEulerScheduler(), router, **students).save_pretrained(folder)
    return sum(parameter.nbytes for parameter in students["unet_0"].parameters())


def load(folder: str, n: int | None) -> MultiStudentPipeline:
    pipe = MultiStudentPipeline.from_pretrained(folder, max_resident_students=n)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: MultiStudentPipeline, label: int, size: int) -> None:
    pipe(class_labels=[label] * size, generator=torch.Generator().manual_seed(0), output_type="latent")


def resident_bytes() -> int:
    """The most that was resident in this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory(folder: str, n: int | None, config: BenchmarkConfig) -> int:
    """Bytes that the pipeline and its calls added to this process at their peak; n = None is the eager pipeline."""
    before = resident_bytes()
    pipe = load(folder, n)
    for _ in range(config.rounds):
        for label in range(config.num_students):
            call(pipe, label, 1)
    return resident_bytes() - before


def times(folder: str, size: int, config: BenchmarkConfig) -> dict[str, list[float]]:
    """Seconds of processor time of the same call, `config.repeats` times each."""
    eager, hits, misses = load(folder, None), load(folder, 1), load(folder, 1)
    other = cycle(range(config.num_students))
    cases = {
        "eager": lambda: call(eager, 0, size),
        "hit": lambda: call(hits, 0, size),
        "miss": lambda: call(misses, next(other), size),
    }
    return take_turns(cases, config.repeats, lambda: None, time.process_time)


def main():
    (config,) = parse_config([BenchmarkConfig], __doc__, None)
    if config.output is not None:
        check_writable(Path(config.output).parent, "output")
    context = multiprocessing.get_context("spawn")
    with TemporaryDirectory() as folder, ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        # Every task in a process of its own, which starts without the peak of another.
        weights = pool.submit(save, folder, config.num_students).result()
        limits = [*range(1, config.num_students + 1), None]
        peaks = {n: pool.submit(memory, folder, n, config).result() for n in limits}
        seconds = {size: pool.submit(times, folder, size, config).result() for size in config.batch_sizes}
    print(f"\nOne student has {weights / 1e6:.0f} MB of weights. torch {torch.__version__}\n")
    rows = [[str(n or "all, eager"), f"{peak / 1e6:.0f}", f"{peak / weights:.2f}"] for n, peak in peaks.items()]
    print(table(["max_resident_students", "MB added to the process", "in students"], rows) + "\n")
    rows = [
        [str(size), *(f"{1000 * median(spent[case]):.0f}" for case in spent)]
        + [f"{median(a / b for a, b in zip(spent[case], spent['eager'])):.3f}" for case in ("hit", "miss")]
        for size, spent in seconds.items()
    ]
    print(table(["batch", "eager ms", "hit ms", "miss ms", "hit / eager", "miss / eager"], rows))
    if config.output is not None:
        results = {"weights": weights, "peaks": {str(n): peak for n, peak in peaks.items()}, "seconds": seconds}
        write_json(config.output, {"config": asdict(config), **results})


if __name__ == "__main__":
    run_script(main)
