# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""What an iteration of each stage costs: passes through the networks, seconds by part, peak memory.

    OMP_NUM_THREADS=1 python benchmarks/training_step.py --size digits --output runs/training_step.json

Runs the stages' own turns in the package's own `Trainer`, without its files, on random data. Hooks count and time.
F is one forward of a batch through a whole UNet, E one through its encoder alone. A backward pass counts 2 through a
trained network (gradients of activations and of weights) and 1 through a frozen one.
"""

import multiprocessing
import resource
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import torch
from accelerate import Accelerator
from diffusers import EDMEulerScheduler
from diffusers.utils import logging
from pipeline import NETS, set_up_device, table, take_turns
from torch import nn
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

from diffusers_msd.config import parse_config, run_script
from diffusers_msd.denoiser import Denoiser, denoiser_for, num_classes, sample_shape
from diffusers_msd.files import check_writable, write_json
from diffusers_msd.pairs import pair_noise
from diffusers_msd.schedule import NoiseSchedule
from diffusers_msd.stage_config import StageConfig
from diffusers_msd.stages import STAGES, Turn, build_stage
from diffusers_msd.students import create_student
from diffusers_msd.training import Trainer
from diffusers_msd.training_config import TrainingConfig, autocast_dtype


ROLES = ["student", "teacher", "fake score", "discriminator"]
REST = "noise, losses"
PARTS = [*ROLES, "optimizer, EMA", "data", REST]


@dataclass
class BenchmarkConfig:
    """What is measured."""

    size: str = field(default="digits", metadata={"help": "Network.", "choices": list(NETS)})
    batch_size: int = field(default=32, metadata={"help": "Samples per turn."})
    stages: list[str] = field(
        default_factory=lambda: list(STAGES), metadata={"help": "Stages.", "choices": list(STAGES)}
    )
    intervals: list[int] = field(default_factory=lambda: [1, 2, 5], metadata={"help": "Student update intervals."})
    updates: int = field(default=10, metadata={"help": "Student updates measured of each, after one of warm-up."})
    mixed_precision: str = field(default="no", metadata={"help": "Precision of training.", "choices": ["no", "bf16"]})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "cuda or cpu."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads; default: what torch chooses."})
    output: str | None = field(default=None, metadata={"help": "JSON file of the figures."})

    def __post_init__(self):
        for name, values in (("updates", [self.updates]), ("intervals", self.intervals)):
            if min(values) < 1:
                raise ValueError(f"{name}: numbers >= 1 expected, got {values}")


class Meter:
    """Seconds by part and passes through layers, by hooks; every moment belongs to one part.

    On a GPU it waits for the device at each change of part, so an iteration takes a little longer than without it.
    """

    def __init__(self, wait: Callable[[], None]):
        self.wait, self.part, self.began = wait, REST, time.perf_counter()
        self.seconds: dict[str, float] = defaultdict(float)
        self.samples: Counter = Counter()

    def enter(self, part: str):
        self.wait()
        now = time.perf_counter()
        self.seconds[self.part] += now - self.began
        self.part, self.began = part, now

    def watch(self, role: str, network: nn.Module, first: nn.Module, last: nn.Module):
        """Follows a network: what passes its `first` layer but not its `last` one went through the encoder alone."""
        network.register_forward_pre_hook(lambda module, args: self.enter(role))
        # Always: the pass through the encoder alone leaves by an exception.
        network.register_forward_hook(lambda module, args, output: self.enter(REST), always_call=True)
        first.register_forward_hook(partial(self._passed, role, "first"))
        last.register_forward_hook(partial(self._passed, role, "last"))

    def _passed(self, role: str, end: str, layer: nn.Module, args: tuple, output: torch.Tensor):
        self.samples[role, end, "forward"] += len(output)
        cost = 2 if layer.weight.requires_grad else 1

        def backward(gradient: torch.Tensor):
            self.enter(role)
            self.samples[role, end, "backward"] += cost * len(gradient)

        if output.requires_grad:
            output.register_hook(backward)
            if role == "discriminator" and end == "first":
                args[0].register_hook(lambda gradient: self.enter("fake score"))


class MeteredAccelerator(Accelerator):
    """Tells a meter where a backward pass ends."""

    def __init__(self, meter: Meter, **kwargs):
        super().__init__(**kwargs)
        self.meter = meter

    def backward(self, loss: torch.Tensor, **kwargs):
        super().backward(loss, **kwargs)
        self.meter.enter("optimizer, EMA")


class MeteredTrainer(Trainer):
    """The trainer's loop without its files; `turns_run` holds (turn, seconds, samples) of each turn."""

    def __init__(self, *args):
        super().__init__(*args)
        self.turns_run: list[tuple[str, dict, Counter]] = []

    def _run_turn(self, turn: Turn, batches: dict):
        meter = self.accelerator.meter
        meter.enter("data")
        meter.seconds.clear(), meter.samples.clear()
        super()._run_turn(turn, batches)
        meter.enter(REST)
        self.turns_run.append((turn.name, dict(meter.seconds), meter.samples.copy()))

    def _after_step(self, bar, interrupted: bool):
        pass

    def _save_final(self):
        pass


class RandomData(Dataset):
    """Images with labels in memory; the noise that a pair has comes from its seed, as in `PairDataset`."""

    def __init__(self, shape: tuple[int, int, int], num_classes: int, pairs: bool, size: int = 512):
        self.images, self.labels = torch.rand(size, *shape) * 2 - 1, torch.arange(size) % num_classes
        self.pairs = pairs

    def __len__(self):
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        noise = {"noise": pair_noise(indices, self.images.shape[1:])} if self.pairs else {}
        return {"images": self.images[indices], "cond": self.labels[indices], **noise}


def build_nets(config: BenchmarkConfig, dtype: torch.dtype | None, meter: Meter) -> dict[str, Denoiser]:
    """Student, teacher and fake score as in train_msd.py, followed by the meter."""
    net = NETS[config.size]().to(config.device)
    models = {role: create_student(net).eval() for role in ("student", "fake score")}
    # It is only read, so it may live in the lower precision.
    models["teacher"] = net.requires_grad_(False).eval().to(dtype or torch.float32)
    for role, model in models.items():
        meter.watch(role, model, model.conv_in, model.conv_out)
    schedule = NoiseSchedule.from_scheduler(EDMEulerScheduler())
    return {role: denoiser_for(model, schedule, autocast_dtype=dtype) for role, model in models.items()}


def memory_bytes(device: str) -> int:
    """The most that was in use so far: allocated on a GPU, resident in the process on a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_stage(stage: str, interval: int, config: BenchmarkConfig) -> dict:
    """Trains one stage at one interval in a process of its own; seconds and passes per turn, and peak memory."""
    meter, before = Meter(set_up_device(config.device, config.threads)), memory_bytes(config.device)
    logging.set_verbosity_error()
    training = TrainingConfig(
        train_batch_size=config.batch_size,
        max_train_steps=[interval * (config.updates + 1)],
        mixed_precision=config.mixed_precision,
        report_to="none",
    )
    nets = build_nets(config, autocast_dtype(training), meter)
    shape = sample_shape(nets["teacher"].model)
    classes = torch.arange(num_classes(nets["teacher"].model), device=config.device)
    weights = StageConfig(student_update_interval=[interval])
    turns = build_stage(stage, nets["student"], nets["teacher"], nets["fake score"], classes, weights)
    for turn in turns:
        turn.register_forward_pre_hook(lambda module, args: meter.enter(REST))
        if "discriminator" in turn.models():
            head = turn.models()["discriminator"]
            meter.watch("discriminator", head, head.layers[0], head.layers[-1])
    data = {need: RandomData(shape, len(classes), need == "pairs") for need in ("images", "pairs")}
    accelerator = MeteredAccelerator(meter, cpu=config.device == "cpu")
    with tempfile.TemporaryDirectory() as folder:
        trainer = MeteredTrainer(accelerator, turns, data, training, Path(folder), f"{stage}, interval {interval}")
        trainer.fit()
    # One student update is a round; the first one is the warm-up.
    runs = trainer.turns_run[len(trainer.turns_run) // (config.updates + 1) :]
    result = {"stage": stage, "interval": interval, "before_bytes": before, "peak_bytes": memory_bytes(config.device)}
    result["turns"] = {}
    for turn in turns:
        seconds, samples = zip(*(run[1:] for run in runs if run[0] == turn.name))
        total = sum(samples, Counter())
        result["turns"][turn.name] = {
            "per_iteration": len(seconds) / (interval * config.updates),
            "seconds": {part: median(s.get(part, 0.0) for s in seconds) for part in PARTS},
            "passes": {role: passes(role, total, len(samples) * config.batch_size) for role in ROLES},
        }
    return result


def passes(role: str, samples: Counter, total: int) -> dict[str, float]:
    """Batches that went through the whole network (F) and the encoder alone (E), forward and back."""
    whole = {way: samples[role, "last", way] / total for way in ("forward", "backward")}
    encoder = {way: samples[role, "first", way] / total - whole[way] for way in whole}
    return {"F": whole["forward"], "F back": whole["backward"], "E": encoder["forward"], "E back": encoder["backward"]}


def cost(turn: dict) -> tuple[float, float]:
    """What a turn costs in (F, E); the discriminator's head, a few layers, is not counted."""
    unets = [turn["passes"][role] for role in ROLES[:3]]
    return sum(p["F"] + p["F back"] for p in unets), sum(p["E"] + p["E back"] for p in unets)


def encoder_share(config: BenchmarkConfig) -> dict[str, float]:
    """E / F of a forward, in floating-point operations (exact) and in seconds."""
    wait = set_up_device(config.device, config.threads)
    denoiser = denoiser_for(NETS[config.size]().to(config.device), NoiseSchedule.from_scheduler(EDMEulerScheduler()))
    x = torch.randn(config.batch_size, *sample_shape(denoiser.model), device=config.device)
    cond = torch.zeros(len(x), dtype=torch.long, device=config.device)
    cases = {"E": lambda: denoiser.features(x, 500, cond), "F": lambda: denoiser(x, 500, cond)}
    flops = {}
    for name, case in cases.items():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            case()
        flops[name] = counter.get_total_flops()
    seconds = take_turns(cases, 3 * config.updates, wait)
    return {"flops": flops["E"] / flops["F"], "seconds": median(e / f for e, f in zip(seconds["E"], seconds["F"]))}


def report(results: list[dict], share: dict[str, float]) -> str:
    """The figures as Markdown."""
    turns, iterations, memory = {}, [], defaultdict(list)
    for r in results:
        stage, f, e, seconds = r["stage"], 0.0, 0.0, Counter()
        for name, turn in r["turns"].items():
            cells = [" + ".join(f"{n:g} {k}" for k, n in turn["passes"][role].items() if n) or "-" for role in ROLES]
            turn_f, turn_e = cost(turn)
            turns[stage, name] = [stage, name, *cells, f"**{turn_f:g} F + {turn_e:g} E**"]
            f, e = f + turn["per_iteration"] * turn_f, e + turn["per_iteration"] * turn_e
            seconds.update({part: turn["per_iteration"] * s for part, s in turn["seconds"].items()})
        cells = [f"{1000 * s:.1f} ({100 * s / seconds.total():.0f} %)" for s in (seconds[part] for part in PARTS)]
        counted = f"{f:.3g} F + {e:.3g} E = {f + share['flops'] * e:.2f} F"
        iterations.append([stage, str(r["interval"]), counted, *cells, f"**{1000 * seconds.total():.1f}**"])
        memory[stage].append((r["peak_bytes"] / 2**20, r["before_bytes"] / 2**20))
    memory = [[stage, *(f"{max(column):.0f}" for column in zip(*values))] for stage, values in memory.items()]
    return "\n\n".join(
        [
            "Passes of a turn, in batches:",
            table(["stage", "turn", *ROLES, "cost of the UNets"], list(turns.values())),
            f"E / F is {share['flops']:.3f} of the operations, {share['seconds']:.3f} of the time. Milliseconds of an "
            "iteration (share), from the medians of the turns:",
            table(["stage", "interval", "cost", *PARTS, "sum"], iterations),
            "Peak memory in MiB:",
            table(["stage", "peak", "of it before anything is built"], memory),
        ]
    )


def main():
    (config,) = parse_config([BenchmarkConfig], __doc__)
    if config.output is not None:
        check_writable(Path(config.output).parent, "output")
    # A process for each, so that peak memory is its own. Only the student's turns of DM and ADM have an interval.
    jobs = [(s, i) for s in config.stages for i in (config.intervals if s != "tsm" else [1])]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        results = list(pool.map(run_stage, *zip(*jobs), [config] * len(jobs)))
    # Not before: a new process starts with the peak memory of the one that made it.
    share = encoder_share(config)
    print(f"\n{config.size}, batch {config.batch_size}, {config.device}, precision {config.mixed_precision}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}, {config.updates} student updates each\n")  # fmt: skip
    print(report(results, share))
    if config.output is not None:
        write_json(config.output, {"config": asdict(config), "encoder_share": share, "results": results})


if __name__ == "__main__":
    run_script(main)
