# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Two iterations of each stage at the size of real teachers: does it run, and is the memory the estimated one?

    OMP_NUM_THREADS=2 python benchmarks/full_size_step.py --weights bfloat16 --sample_size 32 --train_batch_size 1
    OMP_NUM_THREADS=2 python benchmarks/full_size_step.py --size imagenet64 --ema_decay 0 --train_batch_size 1

Three UNets of random weights, of Stable Diffusion 1.5 (859.5 M) or ImageNet-64 (295.9 M), the stages' own turns and the package's `Trainer` without its files. Each turn
runs in both iterations: the first one makes the optimizers' moments, the second one has the peak. Every stage has a
process of its own. On a CPU memory is the growth of the resident process since before anything was built, on a GPU
what torch allocated. The settings of training (`--gradient_checkpointing`, `--mixed_precision`, `--ema_decay`, ...) are
flags too.
"""

import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, EDMEulerScheduler, ModelMixin, SchedulerMixin, UNet2DConditionModel
from pipeline import DTYPES, IMAGENET64, build_unet, table
from torch.utils.data import Dataset

from diffusers_msd.config import parse_config, run_script
from diffusers_msd.denoiser import denoiser_for, sample_shape
from diffusers_msd.files import check_writable, write_json
from diffusers_msd.memory import estimate_memory, format_estimate, without_data
from diffusers_msd.schedule import NoiseSchedule
from diffusers_msd.stage_config import StageConfig
from diffusers_msd.stages import STAGES, Turn, build_stage
from diffusers_msd.training import Trainer
from diffusers_msd.training_config import TrainingConfig, autocast_dtype


# The UNet of Stable Diffusion 1.5; what is not said is the class's default, as in its own config.
SD15 = {"cross_attention_dim": 768, "attention_head_dim": 8, "block_out_channels": (320, 640, 1280, 1280)}


class FullSize(NamedTuple):
    """A teacher's size."""

    make: Callable[[int], ModelMixin]  # of the side of its samples
    scheduler: SchedulerMixin
    conditions: torch.Tensor
    guided: bool


SIZES = {
    "sd15": FullSize(
        lambda side: UNet2DConditionModel(sample_size=side, **SD15),
        DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        torch.zeros(4, 77, 768),
        guided=True,
    ),
    # 1001 classes: the last row stands for none.
    "imagenet64": FullSize(
        lambda side: build_unet(IMAGENET64, (3, side, side), num_classes=1001),
        EDMEulerScheduler(),
        torch.arange(1000),
        guided=False,
    ),
}
ITERATIONS = 2


@dataclass
class BenchmarkConfig:
    """What is run."""

    stages: list[str] = field(
        default_factory=lambda: list(STAGES), metadata={"help": "Stages.", "choices": list(STAGES)}
    )
    size: str = field(default="sd15", metadata={"help": "Of which teacher.", "choices": list(SIZES)})
    weights: str = field(
        default="float32",
        metadata={"help": "Dtype of the UNets' weights; training itself keeps float32.", "choices": list(DTYPES)},
    )
    sample_size: int = field(default=64, metadata={"help": "Side of the samples; 64 is 512 pixels for sd15."})
    guidance_scale: float = field(default=2.0, metadata={"help": "Guidance on the teacher of sd15; 1 is off."})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "cuda or cpu."})
    output: str | None = field(default=None, metadata={"help": "JSON file of the figures."})

    def __post_init__(self):
        if self.sample_size < 8 or self.sample_size % 8:
            raise ValueError(f"sample_size: a multiple of 8 expected, got {self.sample_size}")


class RandomSamples(Dataset):
    """Sixteen samples with noise and condition."""

    def __init__(self, shape: tuple[int, ...], conditions: torch.Tensor):
        self.shape, self.conditions = shape, conditions

    def __len__(self):
        return 16

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        images, noise = torch.randn(2, len(indices), *self.shape)
        return {
            "images": images,
            "noise": noise,
            "cond": self.conditions[torch.tensor(indices) % len(self.conditions)],
        }


class BareTrainer(Trainer):
    """The trainer's loop without its files."""

    def _after_step(self, bar, interrupted: bool):
        pass

    def _save_final(self):
        pass


def build_turns(stage: str, config: BenchmarkConfig, training: TrainingConfig, place: Callable) -> list[Turn]:
    """The turns of a stage, of networks that `place` makes from a function that makes one."""

    size = SIZES[config.size]

    def make() -> ModelMixin:
        torch.set_default_dtype(DTYPES[config.weights])
        unet = size.make(config.sample_size).eval()
        torch.set_default_dtype(torch.float32)
        return unet

    null = size.conditions[0] if size.guided else None
    settings = {"null_cond": null, "autocast_dtype": autocast_dtype(training)}
    schedule = NoiseSchedule.from_scheduler(size.scheduler)
    # The tsm stage has no fake score.
    nets = [denoiser_for(place(make), schedule, **settings) for _ in range(2 if stage == "tsm" else 3)]
    weights = StageConfig(student_update_interval=[1], guidance_scale=config.guidance_scale if size.guided else None)
    return build_stage(stage, *nets, *[None] * (3 - len(nets)), size.conditions, weights)


def estimate(stage: str, config: BenchmarkConfig, training: TrainingConfig) -> dict:
    def place(make: Callable) -> ModelMixin:
        with torch.device("meta"):
            unet = make()
        return without_data(unet)

    turns = build_turns(stage, config, training, place)
    return estimate_memory(turns, training, SIZES[config.size].conditions[:1])


def measure(stage: str, config: BenchmarkConfig, training: TrainingConfig) -> dict:
    """Peak bytes of the iterations in this process, and seconds of one."""
    on_gpu = torch.device(config.device).type == "cuda"
    before = 0 if on_gpu else resident_bytes()
    turns = build_turns(stage, config, training, lambda make: make().to(config.device))
    shape = sample_shape(next(iter(turns[0].models().values())))
    data = dict.fromkeys(("images", "pairs"), RandomSamples(shape, SIZES[config.size].conditions))
    with tempfile.TemporaryDirectory() as folder:
        trainer = BareTrainer(Accelerator(cpu=not on_gpu), turns, data, training, Path(folder), stage)
        began = time.perf_counter()
        trainer.fit()
        seconds = (time.perf_counter() - began) / ITERATIONS
    peak = torch.cuda.max_memory_allocated() if on_gpu else resident_bytes()
    losses = {name: values[-1] for name, values in trainer.window.items() if name.endswith("/loss")}
    return {"seconds": seconds, "before": before, "peak": peak - before, "losses": losses}


def resident_bytes() -> int:
    """The most that was resident in this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main():
    config, training = parse_config([BenchmarkConfig, TrainingConfig], __doc__, None)
    if config.output is not None:
        check_writable(Path(config.output).parent, "output")
    training.max_train_steps, training.report_to = [ITERATIONS], "none"
    context = multiprocessing.get_context("spawn")
    results = {}
    for stage in config.stages:
        # A new process starts without the peak of another.
        with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
            estimated = pool.submit(estimate, stage, config, training).result()
            print(f"\n{stage}\n{format_estimate(estimated)}\n", flush=True)
            results[stage] = {"estimate": estimated, **pool.submit(measure, stage, config, training).result()}
    rows = [
        [stage, f"{r['estimate']['peak'] / 1e9:.2f}", f"**{r['peak'] / 1e9:.2f}**", f"{r['seconds']:.0f}"]
        + [", ".join(f"{name} {value:.3g}" for name, value in r["losses"].items())]
        for stage, r in results.items()
    ]
    print(f"\n{config.size}, {config.device}, weights {config.weights}, samples {config.sample_size}, batch "
          f"{training.train_batch_size}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")  # fmt: skip
    print(table(["stage", "estimated GB", "measured GB", "seconds per iteration", "losses of the last"], rows))
    if config.output is not None:
        write_json(config.output, {"config": asdict(config), "training": asdict(training), "results": results})


if __name__ == "__main__":
    run_script(main)
