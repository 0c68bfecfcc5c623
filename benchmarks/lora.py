# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""K LoRA students on one base against K full students: disk, memory of the weights, and time of a mixed batch.

    OMP_NUM_THREADS=1 python benchmarks/lora.py --size digits --rank 6 --output runs/lora.json

All cases take turns in one process; the ratios are the result. "mixed" is the pipeline's way, every row with its own
adapter in one forward; "in turn" runs one forward per student; "full" is a pipeline of the same students, fused.
"""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from diffusers import EDMEulerScheduler
from pipeline import NETS, set_up_device, table, take_turns

from diffusers_msd import ClassRouter, LoraStudent, MultiStudentPipeline
from diffusers_msd.adapters import adapter_parameters, lora_config, lora_network
from diffusers_msd.config import parse_config, run_script
from diffusers_msd.denoiser import num_classes, sample_shape
from diffusers_msd.files import check_writable, write_json


@dataclass
class BenchmarkConfig:
    """What is measured."""

    size: str = field(default="digits", metadata={"help": "Network.", "choices": list(NETS)})
    rank: int = field(default=64, metadata={"help": "Rank of the adapters."})
    num_students: list[int] = field(default_factory=lambda: [2, 4, 8], metadata={"help": "K, each."})
    batch_size: int = field(default=8, metadata={"help": "Images per call, evenly over the students."})
    repeats: int = field(default=20, metadata={"help": "How often each case is timed."})
    output: str | None = field(default=None, metadata={"help": "JSON file of the figures."})


def lora_pipeline(base, rank: int, k: int) -> MultiStudentPipeline:
    """K students of random matrices on `base`."""
    students = {}
    for i in range(k):
        network = lora_network(base, lora_config(base, rank), seed=i)
        for parameter in adapter_parameters(network):
            torch.nn.init.normal_(parameter.data, std=0.02)
        students[f"unet_{i}"] = LoraStudent.of(network)
    router = ClassRouter.consecutive(num_classes(base), k)
    pipe = MultiStudentPipeline(EDMEulerScheduler(), router, unet=base, **students)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def megabytes_on_disk(pipe: MultiStudentPipeline) -> float:
    with TemporaryDirectory() as folder:
        pipe.save_pretrained(Path(folder, "pipe"))
        return sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors")) / 1e6


def measure(k: int, config: BenchmarkConfig, wait) -> dict:
    lora = lora_pipeline(NETS[config.size]().eval(), config.rank, k)
    full = lora.fuse_students()
    full.set_progress_bar_config(disable=True)
    classes = [lora.router.classes(i) for i in range(k)]
    labels = [int(classes[i % k][i // k % len(classes[i % k])]) for i in range(config.batch_size)]
    mine = [[row for row in range(config.batch_size) if row % k == i] for i in range(k)]
    z = torch.randn(config.batch_size, *sample_shape(lora.unet))

    def call(pipe, rows, **student):
        chosen = [labels[row] for row in rows]
        return pipe(class_labels=chosen, latents=z[rows], output_type="latent", **student).images

    everything = list(range(config.batch_size))
    mixed, apart = call(lora, everything), call(full, everything)
    cases = {
        "mixed": lambda: call(lora, everything),
        "in turn": lambda: [call(lora, rows) for rows in mine],
        "full": lambda: call(full, everything),
        "one full student": lambda: call(full, everything, student=0),
    }
    alone = torch.get_num_threads() == 1
    seconds = take_turns(cases, config.repeats, wait, time.process_time if alone else time.perf_counter)
    one = full.unet_0.num_parameters()
    return {
        "K": k,
        "parameters of a full student": one,
        "parameters of an adapter": lora.unet_0.num_parameters(),
        "MB on disk, LoRA": megabytes_on_disk(lora),
        "MB on disk, full": megabytes_on_disk(full),
        "storage in full students": (one + k * lora.unet_0.num_parameters()) / one,
        "largest difference to full students": (mixed - apart).abs().max().item(),
        "largest sample": apart.abs().max().item(),
        "clock": "processor time" if alone else "wall time",
        "median ms": {name: 1000 * median(times) for name, times in seconds.items()},
        "ratio to full": {
            name: median(a / b for a, b in zip(times, seconds["full"])) for name, times in seconds.items()
        },
    }


def main():
    (config,) = parse_config([BenchmarkConfig], __doc__)
    if config.output:
        check_writable(Path(config.output).absolute().parent, "output")
    torch.manual_seed(0)
    wait = set_up_device("cpu", None)
    rows = [measure(k, config, wait) for k in config.num_students]
    columns = [
        "K",
        "MB on disk, LoRA",
        "MB on disk, full",
        "storage",
        "mixed",
        "in turn",
        "one full student",
        "difference",
    ]
    lines = [
        [row["K"], f"{row['MB on disk, LoRA']:.1f}", f"{row['MB on disk, full']:.1f}"]
        + [f"{row['storage in full students']:.2f} full students"]
        + [f"{row['ratio to full'][name]:.2f}" for name in ("mixed", "in turn", "one full student")]
        + [f"{row['largest difference to full students']:.1e} of {row['largest sample']:.1f}"]
        for row in rows
    ]
    print(table(columns, [[str(cell) for cell in line] for line in lines]))
    if config.output:
        write_json(config.output, {"config": asdict(config), "rows": rows})


if __name__ == "__main__":
    run_script(main)
