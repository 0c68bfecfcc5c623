# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""What each setting that saves memory gives, per stage: the estimate, and for small networks what is really held.

    OMP_NUM_THREADS=1 python benchmarks/memory.py --size digits --output runs/memory_digits.json
    OMP_NUM_THREADS=1 python benchmarks/memory.py --size sd15 --limits_gb 24 40 --output runs/memory_sd15.json

Every number is of one device. Estimated is what `memory.estimate_memory` says, which needs no weights. Measured
(`digits` and `fashion`) are two iterations of the real turns in the package's `Trainer`, each setting in a process of
its own: "live" is the most that tensors held at a time, "resident" how far the process grew since before the networks
were made. That is on the CPU, with norms in float32 under bf16, as GPUs have them.
"""

import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from diffusers import EDMEulerScheduler, ModelMixin, SchedulerMixin, UNet2DModel
from full_size_step import ITERATIONS, BareTrainer, resident_bytes
from full_size_step import SIZES as FULL_SIZES
from pipeline import NETS, SCRIPTS, table
from torch import nn
from training_step import RandomData

from diffusers_msd.adapters import lora_config, lora_network
from diffusers_msd.config import parse_config, run_script
from diffusers_msd.denoiser import denoiser_for, sample_shape
from diffusers_msd.files import check_writable, write_json
from diffusers_msd.memory import LiveBytes, estimate_memory, float32_under_autocast, without_data
from diffusers_msd.schedule import NoiseSchedule
from diffusers_msd.stage_config import StageConfig
from diffusers_msd.stages import STAGES, Turn, build_stage
from diffusers_msd.training_config import TrainingConfig, autocast_dtype


class Size(NamedTuple):
    """A teacher without its weights, and how its students are trained here."""

    make: Callable[[], ModelMixin]
    scheduler: SchedulerMixin
    conditions: torch.Tensor
    batch_size: int
    rank: int
    guidance_scale: float | None = None
    measured: bool = False


def digits_net() -> UNet2DModel:
    folder = SCRIPTS / "assets" / "digits-teacher"
    return UNet2DModel.from_config(UNet2DModel.load_config(folder, subfolder="unet"))


def full_size(name: str, batch_size: int) -> Size:
    full = FULL_SIZES[name]
    guidance_scale = 1.75 if full.guided else None
    return Size(partial(full.make, 64), full.scheduler, full.conditions, batch_size, 64, guidance_scale)


SIZES = {
    "digits": Size(digits_net, EDMEulerScheduler(), torch.arange(10), 32, 4, measured=True),
    "fashion": Size(NETS["fashion"], EDMEulerScheduler(), torch.arange(10), 8, 16, measured=True),
    "imagenet64": full_size("imagenet64", 35),
    "sd15": full_size("sd15", 4),
}


class Setting(NamedTuple):
    """`training` are settings of `TrainingConfig`, `lora` the roles that are adapters on the teacher."""

    text: str
    training: dict = {}
    lora: tuple[str, ...] = ()


BF16 = {"gradient_checkpointing": True, "mixed_precision": "bf16"}
ADAM8 = BF16 | {"use_8bit_adam": True}
BOTH = ("student", "fake score")
SETTINGS = {
    "full": Setting("full students"),
    "checkpointing": Setting("+ gradient checkpointing", {"gradient_checkpointing": True}),
    "bf16": Setting("+ bf16: activations, teacher", BF16),
    "bf16_2": Setting("... in 2 micro-batches", BF16 | {"gradient_accumulation_steps": 2}),
    "bf16_4": Setting("... in 4 micro-batches", BF16 | {"gradient_accumulation_steps": 4}),
    "lora_student": Setting("... LoRA student", BF16, ("student",)),
    "lora": Setting("... LoRA student and fake score", BF16, BOTH),
    "lora_4": Setting("... both LoRA, 4 micro-batches", BF16 | {"gradient_accumulation_steps": 4}, BOTH),
    "adam8": Setting("+ 8-bit Adam", ADAM8),
    "no_ema": Setting("+ no EMA", ADAM8 | {"ema_decay": 0.0}),
    "no_ema_4": Setting("+ 4 micro-batches", ADAM8 | {"ema_decay": 0.0, "gradient_accumulation_steps": 4}),
}


@dataclass
class BenchmarkConfig:
    """What is estimated and measured."""

    size: str = field(default="digits", metadata={"help": "Network.", "choices": list(SIZES)})
    stages: list[str] = field(
        default_factory=lambda: list(STAGES), metadata={"help": "Stages.", "choices": list(STAGES)}
    )
    settings: list[str] = field(
        default_factory=lambda: list(SETTINGS), metadata={"help": "Rows of the table.", "choices": list(SETTINGS)}
    )
    batch_size: int | None = field(default=None, metadata={"help": "Samples per update and device; default: by size."})
    limits_gb: list[float] = field(
        default_factory=list,
        metadata={"help": "Memory of devices; the largest micro-batch that fits there with 1 GB to spare."},
    )
    output: str | None = field(default=None, metadata={"help": "JSON file of the figures."})

    def __post_init__(self):
        self.batch_size = self.batch_size or SIZES[self.size].batch_size
        if self.batch_size < 1:
            raise ValueError(f"batch_size: a number >= 1 expected, got {self.batch_size}")


class CountingTrainer(BareTrainer):
    """Notes what stays alive between steps."""

    def __init__(self, live: LiveBytes, *args):
        super().__init__(*args)
        self.live = live

    def _after_step(self, bar, interrupted: bool):
        self.kept = self.live.now


def training_config(setting: Setting, batch_size: int) -> TrainingConfig:
    """For a batch that is cut evenly into the setting's micro-batches (rounded up)."""
    passes = setting.training.get("gradient_accumulation_steps", 1)
    return TrainingConfig(
        **setting.training, train_batch_size=-(-batch_size // passes), max_train_steps=[ITERATIONS], report_to="none"
    )


def build_turns(stage: str, size: Size, setting: Setting, training: TrainingConfig, place: Callable) -> list[Turn]:
    """The turns of a stage as train_msd.py builds them, of networks that `place` makes from a function."""
    dtype = autocast_dtype(training)
    # nn.Module's own: the method of diffusers warns of layers that are to stay in float32, though there are none.
    teacher = place(lambda: nn.Module.to(size.make(), dtype).eval())

    def network(role: str) -> ModelMixin:
        if role in setting.lora:
            return place(lambda: lora_network(teacher, lora_config(teacher, size.rank)).eval())
        return place(lambda: size.make().eval())

    # The tsm stage has no fake score.
    models = [network("student"), teacher, None if stage == "tsm" else network("fake score")]
    schedule = NoiseSchedule.from_scheduler(size.scheduler)
    settings = {"null_cond": size.conditions[0] if size.guidance_scale else None, "autocast_dtype": dtype}
    nets = [model and denoiser_for(model, schedule, **settings) for model in models]
    weights = StageConfig(student_update_interval=[1], guidance_scale=size.guidance_scale)
    return build_stage(stage, *nets, size.conditions, weights)


def estimate(stage: str, size: Size, setting: Setting, batch_size: int) -> dict:
    def place(make: Callable) -> ModelMixin:
        with torch.device("meta"):
            model = make()
        return without_data(model)

    training = training_config(setting, batch_size)
    return estimate_memory(build_turns(stage, size, setting, training, place), training, size.conditions[:1])


def measure(stage: str, size_name: str, setting_name: str, batch_size: int) -> dict:
    """Two iterations in this process; bytes."""
    size, setting = SIZES[size_name], SETTINGS[setting_name]
    training = training_config(setting, batch_size)
    before = resident_bytes()
    turns = build_turns(stage, size, setting, training, lambda make: make())
    networks = [network for turn in turns for network in (turn, *turn.frozen.values())]
    for module in {module for network in networks for module in network.modules()}:
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            # As a GPU does.
            module.float().register_forward_pre_hook(float32_under_autocast)
    weights = {id(p): p for network in networks for p in (*network.parameters(), *network.buffers())}.values()
    shape = sample_shape(next(iter(turns[0].models().values())))
    data = {need: RandomData(shape, len(size.conditions), need == "pairs") for need in ("images", "pairs")}
    with tempfile.TemporaryDirectory() as folder, LiveBytes(weights) as live:
        trainer = CountingTrainer(live, Accelerator(cpu=True), turns, data, training, Path(folder), stage)
        trainer.fit()
    size_of_weights = sum(tensor.nbytes for tensor in weights)
    return {
        "weights": size_of_weights,
        "kept": trainer.kept,
        "live": size_of_weights + live.peak,
        "resident": resident_bytes() - before,
    }


def largest_batch(stage: str, size: Size, setting: Setting, estimated: dict, limits: list[float]) -> list[int | None]:
    """Samples per pass that the estimate has room for within each limit; None without micro-batches.

    With those all gradients are there during a pass, which so grows by the same for every sample: two passes give all
    others. Otherwise gradients take the place of activations that are done with, and a pass grows more and more.
    """
    passes = setting.training.get("gradient_accumulation_steps", 1)
    if passes == 1 or not limits:
        return [None] * len(limits)
    small, turns = estimated["batch_size"], estimated["turns"]
    larger = estimate(stage, size, setting, 2 * small * passes)["turns"]
    result = []
    for limit in limits:
        free = (limit - 1) * 1e9 - estimated["resident"]
        room = [small * (1 + (free - turns[t]["pass"]) / (larger[t]["pass"] - turns[t]["pass"])) for t in turns]
        updates = max(turn["update"] for turn in turns.values())
        result.append(max(0, int(min(room))) if updates <= free else 0)
    return result


def figures(config: BenchmarkConfig) -> Iterator[dict]:
    """One entry per stage and setting."""
    size = SIZES[config.size]
    jobs = [(stage, name) for stage in config.stages for name in config.settings]
    measured = {}
    if size.measured:
        # Its processes are forked from one that has imported everything and made nothing.
        context = multiprocessing.get_context("forkserver")
        with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
            for stage, name in jobs:
                # bitsandbytes keeps its states on a GPU.
                if not SETTINGS[name].training.get("use_8bit_adam"):
                    run = pool.submit(measure, stage, config.size, name, config.batch_size)
                    measured[stage, name] = run.result()
    for stage, name in jobs:
        estimated = estimate(stage, size, SETTINGS[name], config.batch_size)
        yield {
            "stage": stage,
            "setting": name,
            "estimate": estimated,
            "measured": measured.get((stage, name)),
            "largest_batch": largest_batch(stage, size, SETTINGS[name], estimated, config.limits_gb),
        }


def row(entry: dict, unit: float) -> list[str]:
    """A line of the table, sizes in `unit` bytes."""
    e, measured = entry["estimate"], entry["measured"]
    turn, top = max(((n, max(t["pass"], t["update"])) for n, t in e["turns"].items()), key=lambda item: item[1])
    sizes = [sum(e["weights"].values()), sum(e["optimizer"].values()) + e["ema"]]
    cells = [entry["stage"], SETTINGS[entry["setting"]].text, *(f"{size / unit:.2f}" for size in sizes)]
    cells += [f"{top / unit:.2f} ({turn})", f"**{e['peak'] / unit:.2f}**"]
    if measured is not None:
        cells += [f"{measured['live'] / unit:.2f}", f"{measured['resident'] / unit:.2f}"]
    return cells + ["-" if batch is None else str(batch) for batch in entry["largest_batch"]]


def peaks(results: list[dict], unit: float) -> str:
    """The table of docs/results.md: a setting a row, a stage a column, "estimated / measured" peaks."""
    stages = list(dict.fromkeys(entry["stage"] for entry in results))
    rows: dict[str, list[str]] = {}
    for entry in results:
        measured = entry["measured"] and f" / {entry['measured']['live'] / unit:.1f}"
        cell = f"{entry['estimate']['peak'] / unit:.1f}{measured or ''}"
        rows.setdefault(SETTINGS[entry["setting"]].text, []).append(cell)
    return table(["setting", *stages], [[name, *cells] for name, cells in rows.items()])


def main():
    (config,) = parse_config([BenchmarkConfig], __doc__)
    if config.output is not None:
        check_writable(Path(config.output).parent, "output")
    size, results = SIZES[config.size], []
    unit, name = (1e6, "MB") if size.measured else (1e9, "GB")
    header = ["stage", "setting", "weights", "optimizer, EMA", "largest pass or update (turn)", "peak, estimated"]
    if size.measured:
        header += ["live, measured", "resident, measured"]
    header += [f"micro-batch on {limit:g} GB" for limit in config.limits_gb]
    print(f"\n{config.size}, batch {config.batch_size}, LoRA of rank {size.rank}, torch {torch.__version__}; {name}\n")
    print(table(header, []))
    for entry in figures(config):
        results.append(entry)
        cells = row(entry, unit)
        print(table(cells + ["-"] * (len(header) - len(cells)), []).splitlines()[0], flush=True)
    print(f"\npeaks, estimated{' / measured (live)' if size.measured else ''}:\n\n{peaks(results, unit)}")
    if config.output is not None:
        write_json(config.output, {"config": asdict(config), "results": results})


if __name__ == "__main__":
    run_script(main)
