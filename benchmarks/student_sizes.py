# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""What smaller students save: parameters, multiplications and latency against their teacher.

    OMP_NUM_THREADS=1 python benchmarks/student_sizes.py --teacher imagenet64 --repeats 5
    OMP_NUM_THREADS=1 python benchmarks/student_sizes.py --teacher training_scripts/assets/digits-teacher \
        --student_channels 16 16 --repeats 100

One forward per image, as a one-step student does. A named teacher has random weights, on which the time does not depend,
and is compared with all published sizes; `--student_preset`, `--student_channels` and `--student_blocks` name another.
All networks take turns in one process, so the ratios are the result; the milliseconds belong to the machine.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import torch
from diffusers import ModelMixin, UNet2DConditionModel
from diffusers.utils import logging
from full_size_step import PROMPT_SHAPE, SD15
from pipeline import DTYPES, NETS, set_up_device, table, take_turns
from torch.utils.flop_counter import FlopCounterMode

from diffusers_msd.config import parse_config, run_script
from diffusers_msd.denoiser import sample_shape
from diffusers_msd.files import check_writable, write_json
from diffusers_msd.students import PRESETS, StudentConfig, check_preset, create_student
from diffusers_msd.teachers import load_teacher


TEACHERS: dict[str, Callable[[], ModelMixin]] = {
    "imagenet64": NETS["imagenet64"],
    "sd15": lambda: UNet2DConditionModel(sample_size=64, **SD15),
}


@dataclass
class BenchmarkConfig:
    """What is timed."""

    teacher: str = field(metadata={"help": f"A folder with unet/ and scheduler/, or {' or '.join(TEACHERS)}."})
    batch_size: int = field(default=1, metadata={"help": "Images per forward."})
    repeats: int = field(default=5, metadata={"help": "How often each network is timed."})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "Where."})
    dtype: str = field(default="float32", metadata={"help": "Of the weights.", "choices": list(DTYPES)})
    threads: int | None = field(default=None, metadata={"help": "CPU threads; default: what torch chooses."})
    output: str | None = field(default=None, metadata={"help": "JSON file of the figures."})

    def __post_init__(self):
        if self.batch_size < 1 or self.repeats < 1:
            raise ValueError(f"batch_size, repeats: >= 1 expected, got {self.batch_size} and {self.repeats}")


def sizes(config: BenchmarkConfig, student: StudentConfig, teacher: ModelMixin) -> dict[str, dict]:
    """The students' names, and the arguments that make them."""
    if student.student_preset is not None:
        check_preset(student.student_preset, teacher)
        return {student.student_preset: PRESETS[student.student_preset]}
    if student.student_channels is not None or student.student_blocks is not None:
        return {"student": {"channels": student.student_channels, "blocks": student.student_blocks}}
    presets = {name: size for name, size in PRESETS.items() if name.split("-")[0] == config.teacher}
    if not presets:
        raise ValueError(f"student_preset: {config.teacher} has no published sizes; say student_channels or _blocks")
    return presets


def forward(model: ModelMixin, batch_size: int) -> Callable[[], object]:
    """A call of the network on random input."""
    like = {"device": model.device, "dtype": model.dtype}
    x, t = torch.randn(batch_size, *sample_shape(model), **like), torch.ones(batch_size, device=model.device)
    if isinstance(model, UNet2DConditionModel):
        width = model.config.cross_attention_dim
        return lambda: model(x, t, torch.zeros(batch_size, PROMPT_SHAPE[0], width, **like))
    return lambda: model(x, t, torch.zeros(batch_size, dtype=torch.long, device=model.device))


@torch.no_grad()
def multiplications(model: ModelMixin) -> int:
    """Multiply-accumulate operations of one image, of matrix products and convolutions."""
    # torch has no count of its CPU attention; on the meta device it takes another.
    with torch.device("meta"):
        shape = type(model).from_config(model.config)
    with FlopCounterMode(display=False) as counter:
        forward(shape, 1)()
    return counter.get_total_flops() // 2


def measure(models: dict[str, ModelMixin], config: BenchmarkConfig, wait) -> list[dict]:
    """A row per network, the teacher first."""
    # Processor time leaves out what other jobs take of a CPU; that of several threads would be their sum.
    alone = config.device == "cpu" and torch.get_num_threads() == 1
    calls = {name: forward(model, config.batch_size) for name, model in models.items()}
    seconds = take_turns(calls, config.repeats, wait, time.process_time if alone else time.perf_counter)
    return [
        {
            "name": name,
            "parameters": model.num_parameters(),
            "macs": multiplications(model),
            "clock": "processor time" if alone else "wall time",
            "median_ms": 1000 * median(seconds[name]),
            "min_ms": 1000 * min(seconds[name]),
            "ratio": median(a / b for a, b in zip(seconds[name], seconds["teacher"])),
        }
        for name, model in models.items()
    ]


def report(rows: list[dict]) -> str:
    teacher = rows[0]

    def against(row: dict, key: str) -> str:
        return f"{100 * (row[key] / teacher[key] - 1):+.0f} %"

    lines = [
        [row["name"], f"{row['parameters'] / 1e6:.4g} M", against(row, "parameters")]
        + [f"{row['macs'] / 1e9:.4g} G", against(row, "macs")]
        + [f"{row['median_ms']:.1f} / {row['min_ms']:.1f}", f"**{100 * (row['ratio'] - 1):+.0f} %**"]
        for row in rows
    ]
    time_name = f"{teacher['clock']}, ms, median / minimum"
    return table(["network", "parameters", "", "MACs of an image", "", time_name, "median of the rounds"], lines)


def main():
    config, student = parse_config([BenchmarkConfig, StudentConfig], __doc__)
    if config.output is not None:
        check_writable(Path(config.output).parent, "output")
    wait = set_up_device(config.device, config.threads)
    # Of the advice that every cast prints.
    logging.set_verbosity_error()
    torch.manual_seed(0)
    teacher = TEACHERS[config.teacher]() if config.teacher in TEACHERS else load_teacher(config.teacher)[0]
    models = {"teacher": teacher}
    for name, size in sizes(config, student, teacher).items():
        models[name] = create_student(teacher, **size)
    models = {name: model.to(config.device, DTYPES[config.dtype]).eval() for name, model in models.items()}
    rows = measure(models, config, wait)
    print(f"\n{config.teacher}: batch {config.batch_size}, {config.dtype}, {config.device}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}, {config.repeats} rounds\n")  # fmt: skip
    print(report(rows))
    if config.output is not None:
        write_json(config.output, {"config": asdict(config), "rows": rows})


if __name__ == "__main__":
    run_script(main)
