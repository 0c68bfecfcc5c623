# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""What each exact saving gives: the way the package does it against the plain way to the same result.

    OMP_NUM_THREADS=1 python benchmarks/savings.py --size fashion --output runs/savings.json

Both ways take turns in one process. Times are processor times (medians), memory is the most that tensors held beside
what was there: ratios are the result. The other tables are errors of gradients and shares of arithmetic.
"""

import copy
import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from diffusers import EDMEulerScheduler, ModelMixin
from diffusers.training_utils import EMAModel
from diffusers.utils import logging
from pipeline import NETS, table, take_turns
from torch.utils.flop_counter import FlopCounterMode

from diffusers_msd.config import parse_config, run_script
from diffusers_msd.denoiser import Denoiser, denoiser_for, num_classes, sample_shape
from diffusers_msd.draws import Draws
from diffusers_msd.files import check_writable, write_json
from diffusers_msd.memory import LiveBytes
from diffusers_msd.objectives import dm_loss
from diffusers_msd.schedule import NoiseSchedule
from diffusers_msd.stage_config import StageConfig
from diffusers_msd.stages import Turn, build_stage


SCHEDULE = NoiseSchedule.from_scheduler(EDMEulerScheduler())
T = 500


@dataclass
class BenchmarkConfig:
    """What is compared."""

    size: str = field(default="fashion", metadata={"help": "Network.", "choices": ["digits", "fashion"]})
    batch_size: int = field(default=8, metadata={"help": "Samples, a multiple of 4."})
    repeats: int = field(default=7, metadata={"help": "How often each way is timed."})
    compile: bool = field(default=False, metadata={"help": "Also torch.compile, which needs a C++ compiler."})
    output: str | None = field(default=None, metadata={"help": "JSON file of the figures."})

    def __post_init__(self):
        if self.batch_size < 4 or self.batch_size % 4:
            raise ValueError(f"batch_size: a multiple of 4 expected, got {self.batch_size}")
        if self.repeats < 1:
            raise ValueError(f"repeats: a number >= 1 expected, got {self.repeats}")


class Saving(NamedTuple):
    """Two ways to one result."""

    name: str
    ours: Callable[[], object]
    plain: Callable[[], object]


def denoiser(net: ModelMixin, dtype: torch.dtype | None = None) -> Denoiser:
    return denoiser_for(net, SCHEDULE, null_cond=torch.tensor(0), autocast_dtype=dtype)


def both_passes(net: ModelMixin, x: torch.Tensor, cond: torch.Tensor):
    """Forward and backward."""
    with torch.enable_grad():
        denoiser(net)(x, T, cond).square().mean().backward()
    net.zero_grad(set_to_none=True)


def two_guided_calls(teacher: Denoiser, x: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
    uncond = teacher(x, T, torch.zeros_like(cond))
    return uncond + 2.0 * (teacher(x, T, cond) - uncond)


def encode(fake_score: Denoiser, batches: list[torch.Tensor], cond: torch.Tensor):
    """The encoder's features of each batch, and back."""
    with torch.enable_grad():
        features = [fake_score.features(x, T, cond.repeat(len(x) // len(cond))) for x in batches]
        sum(f.square().sum() for f in features).backward()
    fake_score.zero_grad(set_to_none=True)


def encode_by_whole_passes(fake_score: Denoiser, x: torch.Tensor, cond: torch.Tensor):
    """As `encode`, of features that a hook takes while the whole network runs."""
    features = []
    handle = fake_score.tap(features.append)
    with torch.enable_grad():
        fake_score(x, T, cond)
        features[0].square().sum().backward()
    handle.remove()
    fake_score.zero_grad(set_to_none=True)


def adamw(net: ModelMixin, **kind: bool) -> Callable[[], object]:
    """A step of AdamW on weights and gradients of its own."""
    parameters = [torch.nn.Parameter(p.detach().clone()) for p in net.parameters()]
    for p in parameters:
        p.grad = torch.randn_like(p)
    return torch.optim.AdamW(parameters, lr=1e-5, **kind).step


def average(net: ModelMixin, foreach: bool) -> Callable[[], object]:
    parameters = list(net.parameters())
    return partial(EMAModel(parameters, decay=0.999, foreach=foreach).step, parameters)


def savings(net: ModelMixin, x: torch.Tensor, cond: torch.Tensor, compiled: bool) -> list[Saving]:
    half, last = copy.deepcopy(net).to(torch.bfloat16), copy.deepcopy(net).to(memory_format=torch.channels_last)
    full, cast = denoiser(net), denoiser(net, torch.bfloat16)
    fused = partial(adamw, net, fused=True)
    rows = [
        Saving("pass without gradient in bf16, not float32", lambda: cast(x, T, cond), lambda: full(x, T, cond)),
        Saving(
            "teacher stored in bf16, not cast at each call",
            lambda: denoiser(half, torch.bfloat16)(x, T, cond),
            lambda: cast(x, T, cond),
        ),
        Saving(
            "guidance: one batch, not two calls",
            lambda: full(x, T, cond, 2.0),
            lambda: two_guided_calls(full, x, cond),
        ),
        Saving(
            "real and fake through the encoder: one batch, not two",
            lambda: encode(full, [torch.cat([x, x])], cond),
            lambda: encode(full, [x, x], cond),
        ),
        Saving(
            "features: the encoder alone, not the whole network",
            lambda: encode(full, [x], cond),
            lambda: encode_by_whole_passes(full, x, cond),
        ),
        Saving("AdamW: fused, not foreach", fused(), adamw(net, foreach=True)),
        Saving("AdamW: fused, not a loop", fused(), adamw(net, foreach=False)),
        Saving("EMA: foreach, not a loop", average(net, True), average(net, False)),
        Saving(
            "not done: channels_last, forward and backward",
            lambda: both_passes(last, x.to(memory_format=torch.channels_last), cond),
            lambda: both_passes(net, x, cond),
        ),
    ]
    if compiled:
        quick = copy.deepcopy(net)
        quick.compile()
        name = "not done: torch.compile, forward and backward"
        rows.append(Saving(name, lambda: both_passes(quick, x, cond), lambda: both_passes(net, x, cond)))
    return rows


@torch.no_grad()
def peak_bytes(run: Callable) -> int:
    # All that exist: in-place operations and views name them too.
    existing = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    with LiveBytes(existing) as live:
        run()
    return live.peak


def compare(saving: Saving, repeats: int) -> dict:
    """Milliseconds and bytes of both ways, and the medians of their ratios."""
    ways = {"ours": saving.ours, "plain": saving.plain}
    began = time.process_time()
    saving.ours(), saving.plain()
    first = time.process_time() - began
    seconds = take_turns(ways, repeats, lambda: None, time.process_time)
    return {
        "saving": saving.name,
        "first_seconds": first,
        "ms": {way: 1000 * median(times) for way, times in seconds.items()},
        "time_ratio": median(a / b for a, b in zip(seconds["ours"], seconds["plain"])),
        "peak": {way: peak_bytes(run) for way, run in ways.items()},
    }


def dm_gradient_errors(shape: tuple[int, ...]) -> list[dict]:
    """Relative error of the DM gradient by its form and precision, for gradients of some sizes relative to x.

    The plain form is a pseudo-target: 0.5 |x - (x - g)|^2. Subtracting g from x and x again loses what is below the
    precision of x.
    """
    generator = torch.Generator().manual_seed(0)
    x, towards, between = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    results = []
    for scale in (1.0, 0.1, 0.01):
        teacher_x0 = x + towards
        fake_x0 = teacher_x0 + scale * between
        exact = x.clone().requires_grad_()
        dm_loss(exact, teacher_x0, fake_x0).sum().backward()
        direct = x.float().requires_grad_()
        dm_loss(direct, teacher_x0.float(), fake_x0.float()).sum().backward()
        forms = {"direct, float32": direct.grad}
        g = direct.grad * x[0].numel()
        for dtype in (torch.float32, torch.bfloat16):
            rounded = x.to(dtype).requires_grad_()
            target = (rounded - g.to(dtype)).detach()
            (0.5 * (rounded - target) ** 2).flatten(1).mean(1).sum().backward()
            forms[f"pseudo-target, {str(dtype).removeprefix('torch.')}"] = rounded.grad
        errors = {
            form: ((grad.double() - exact.grad).norm() / exact.grad.norm()).item() for form, grad in forms.items()
        }
        results.append({"scale": scale, "errors": errors})
    return results


def turns_of(net: ModelMixin, stage: str, conditions: torch.Tensor) -> list[Turn]:
    return build_stage(stage, *(denoiser(copy.deepcopy(net)) for _ in range(3)), conditions, StageConfig())


def loss_of(turn: Turn, batch: dict, size: int, rows: slice) -> torch.Tensor:
    part = {key: value[rows] for key, value in batch.items()}
    return turn(dict.fromkeys(turn.needs, part), Draws((0,), size, rows))["loss"].mean()


def gradient(turn: Turn, batch: dict, size: int, passes: int) -> torch.Tensor:
    """Of a whole batch in so many passes, as one vector."""
    turn.claim()
    turn.zero_grad(set_to_none=True)
    step = size // passes
    for start in range(0, size, step):
        (loss_of(turn, batch, size, slice(start, start + step)) / passes).backward()
    return torch.cat([p.grad.flatten() for p in turn.parameters() if p.grad is not None])


def by_turn(net: ModelMixin, batch: dict, size: int) -> list[dict]:
    """Of each turn: how far four micro-batches are from one batch, and what the student's samples cost in it."""
    results = []
    noise = batch["noise"]
    with torch.no_grad(), FlopCounterMode(display=False) as generating:
        denoiser(net).generate(noise, batch["cond"])
    for stage in ("dm", "adm"):
        turns = turns_of(net, stage, batch["cond"].unique())
        flops = {}
        for turn in turns:
            turn.claim()
            with FlopCounterMode(display=False) as counter:
                loss_of(turn, batch, size, slice(None)).backward()
            flops[turn.name] = counter.get_total_flops()
        saved = generating.get_total_flops() / 5 / (flops["student"] / 5 + flops["critic"])
        for turn in turns:
            entry = {"stage": stage, "turn": turn.name, "saved_by_reuse": saved, "difference": {}}
            for dtype in (torch.float32, torch.float64):
                torch.set_default_dtype(dtype)
                for network in (turn, *turn.frozen.values()):
                    network.to(dtype)
                converted = {
                    key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()
                }
                whole, parts = (gradient(turn, converted, size, passes) for passes in (1, 4))
                entry["difference"][str(dtype)] = ((whole - parts).abs().max() / whole.abs().max()).item()
            torch.set_default_dtype(torch.float32)
            for network in (turn, *turn.frozen.values()):
                network.float()
            results.append(entry)
    return results


def report(rows: list[dict], errors: list[dict], turns: list[dict]) -> str:
    """The figures as Markdown."""
    compared = [
        [r["saving"], f"{r['ms']['ours']:.1f}", f"{r['ms']['plain']:.1f}", f"**{r['time_ratio']:.2f}**"]
        + [f"{r['peak'][way] / 1e6:.2f}" for way in ("ours", "plain")]
        for r in rows
    ]
    gradients = [[f"{e['scale']:g}", *(f"{error:.1e}" for error in e["errors"].values())] for e in errors]
    exact = [
        [t["stage"], t["turn"], *(f"{d:.1e}" for d in t["difference"].values()), f"{100 * t['saved_by_reuse']:.1f} %"]
        for t in turns
    ]
    return "\n\n".join(
        [
            table(["saving", "ms", "ms, plain", "time ratio", "peak MB", "peak MB, plain"], compared),
            "Relative error of the DM gradient against float64:",
            table(["size of g / size of x", *errors[0]["errors"]], gradients),
            "Largest difference of a gradient from four micro-batches to that from one batch, relative to the largest "
            "gradient; and the share of a stage's arithmetic (interval 5) that re-using the student's batch would save:",
            table(["stage", "turn", "float32", "float64", "saved by re-use (not done)"], exact),
        ]
    )


def main():
    (config,) = parse_config([BenchmarkConfig], __doc__)
    if config.output is not None:
        check_writable(Path(config.output).parent, "output")
    logging.set_verbosity_error()
    torch.manual_seed(0)
    net = NETS[config.size]().requires_grad_(True).eval()
    x, images, noise = torch.randn(3, config.batch_size, *sample_shape(net))
    cond = torch.arange(config.batch_size) % num_classes(net)
    rows = [compare(saving, config.repeats) for saving in savings(net, x, cond, config.compile)]
    errors = dm_gradient_errors(x.shape)
    turns = by_turn(net, {"images": images, "noise": noise, "cond": cond}, config.batch_size)
    print(f"\n{config.size}, batch {config.batch_size}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"{config.repeats} rounds\n")  # fmt: skip
    print(report(rows, errors, turns))
    if config.output is not None:
        write_json(
            config.output, {"config": asdict(config), "savings": rows, "gradient_errors": errors, "turns": turns}
        )


if __name__ == "__main__":
    run_script(main)
