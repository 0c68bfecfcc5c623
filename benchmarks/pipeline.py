# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Time of a mixed batch over K students against one student of the same size on the whole batch.

    OMP_NUM_THREADS=1 python benchmarks/pipeline.py --size digits --batch_sizes 64 256 --output runs/pipeline.json

All cases take turns in one process, so that whatever else the machine does slows them alike: the ratios are the
result, the milliseconds belong to the machine. Besides the pipelines it times the bare networks (is the cost in the
network calls or around them?), a batch of one (what does a call cost however small it is?) and the routing.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import torch
from diffusers import EDMEulerScheduler, UNet2DModel
from diffusers.utils import logging
from tqdm.auto import tqdm

from diffusers_msd import ClassRouter, MultiStudentPipeline
from diffusers_msd.config import parse_config, run_script
from diffusers_msd.data import DataConfig
from diffusers_msd.denoiser import denoiser_for, sample_shape
from diffusers_msd.files import check_writable, write_json
from diffusers_msd.schedule import NoiseSchedule
from diffusers_msd.students import create_student
from diffusers_msd.teachers import load_teacher
from diffusers_msd.training_config import TrainingConfig


SCRIPTS = Path(__file__).resolve().parents[1] / "training_scripts"
sys.path.insert(0, str(SCRIPTS))
from train_teacher import TeacherConfig, build_unet  # noqa: E402


# Width, depth and attention of the ImageNet-64 nets of EDM and DMD2 (arXiv 2105.05233, table 12): 295.9 M parameters.
IMAGENET64 = TeacherConfig("", 3, [192, 384, 576, 768], teacher_blocks=3, attention_levels=3, attention_head_dim=64)


def fashion_net() -> UNet2DModel:
    argv = ["--config", str(SCRIPTS / "configs" / "fashion_mnist_teacher.yaml"), "--output_dir", ""]
    config, data, _ = parse_config([TeacherConfig, DataConfig, TrainingConfig], "", argv)
    return build_unet(config, (config.image_channels, data.resolution, data.resolution), num_classes=10)


# The trained net of the quickstart, then random ones: the time does not depend on the weights.
NETS: dict[str, Callable[[], UNet2DModel]] = {
    "digits": lambda: load_teacher(str(SCRIPTS / "assets" / "digits-teacher"))[0],
    "fashion": fashion_net,
    "imagenet64": lambda: build_unet(IMAGENET64, (3, 64, 64), num_classes=1000),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class BenchmarkConfig:
    """What is timed."""

    size: str = field(default="digits", metadata={"help": "Network.", "choices": list(NETS)})
    batch_sizes: list[int] = field(default_factory=lambda: [64, 256], metadata={"help": "Images per call."})
    num_students: int = field(default=4, metadata={"help": "K; every student gets as many images of a batch."})
    repeats: int = field(default=30, metadata={"help": "How often each case is timed."})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "Where."})
    dtype: str = field(default="float32", metadata={"help": "Of the weights.", "choices": list(DTYPES)})
    threads: int | None = field(default=None, metadata={"help": "CPU threads; default: what torch chooses."})
    output: str | None = field(default=None, metadata={"help": "JSON file of the figures."})

    def __post_init__(self):
        if self.num_students < 1 or self.repeats < 1:
            raise ValueError(f"num_students, repeats: >= 1 expected, got {self.num_students} and {self.repeats}")
        for size in self.batch_sizes:
            if size < 2 or size % self.num_students:
                raise ValueError(f"batch_sizes: multiples of num_students={self.num_students} expected, got {size}")


def set_up_device(device: str, threads: int | None) -> Callable[[], None]:
    """Sets the number of threads and returns the function that waits for the device."""
    if threads is not None:
        torch.set_num_threads(threads)
    return torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None


@torch.no_grad()
def take_turns(cases: dict[str, Callable], repeats: int, wait: Callable[[], None]) -> dict[str, list[float]]:
    """Seconds of each case, `repeats` times; round i times every case once, starting from another one each time."""
    for case in cases.values():
        case()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    names = list(cases)
    for i in tqdm(range(repeats), desc="rounds"):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            wait()
            began = time.perf_counter()
            cases[name]()
            wait()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def build_pipeline(net: UNet2DModel, num_students: int) -> MultiStudentPipeline:
    """A pipeline of copies of `net`, each with memory of its own."""
    students = {f"unet_{k}": create_student(net).to(net.dtype).eval() for k in range(num_students)}
    router = ClassRouter.consecutive(net.config.num_class_embeds, num_students)
    pipe = MultiStudentPipeline(EDMEulerScheduler(), router, **students).to(net.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def measure(one: MultiStudentPipeline, many: MultiStudentPipeline, size: int, config: BenchmarkConfig, wait) -> dict:
    """The figures of one batch size, times in milliseconds."""
    # Neighbours in the batch belong to different students; each student gets the same number of images.
    num_students, router = config.num_students, many.router
    in_turn = torch.arange(size // num_students)
    labels = [router.classes(k)[in_turn % router.part_sizes[k]] for k in range(num_students)]
    labels = torch.stack(labels, dim=1).flatten()
    z = torch.randn(size, *sample_shape(one.unet_0), device=config.device)
    schedule = NoiseSchedule.from_scheduler(one.scheduler)
    denoisers = [denoiser_for(unet, schedule) for unet in many.students.values()]
    rows = [torch.nonzero(router(class_labels=labels) == k).flatten() for k in range(num_students)]
    pieces = [(z[r.to(z.device)], labels[r].to(z.device)) for r in rows]
    on_device = labels.to(z.device)
    seconds = take_turns(
        {
            "one": lambda: one(class_labels=labels, latents=z, output_type="latent"),
            "many": lambda: many(class_labels=labels, latents=z, output_type="latent"),
            "net": lambda: denoisers[0].generate(z, on_device),
            "nets": lambda: [denoiser.generate(*piece) for denoiser, piece in zip(denoisers, pieces)],
            "single": lambda: denoisers[0].generate(z[:1], on_device[:1]),
            "route": lambda: many.route(class_labels=labels),
        },
        config.repeats,
        wait,
    )
    best = {name: 1000 * min(times) for name, times in seconds.items()}
    # Time of a call as fixed + size * marginal, through the batch of one and the whole batch.
    fixed = max(0.0, best["single"] - (best["net"] - best["single"]) / (size - 1))
    return {
        "batch_size": size,
        "median_ms": {name: 1000 * median(times) for name, times in seconds.items()},
        "min_ms": best,
        "ratio": median(m / o for m, o in zip(seconds["many"], seconds["one"])),
        "ratio_of_minima": best["many"] / best["one"],
        "ratio_nets": median(m / o for m, o in zip(seconds["nets"], seconds["net"])),
        "ratio_nets_of_minima": best["nets"] / best["net"],
        "fixed_ms": fixed,
        "ratio_from_fixed": 1 + (num_students - 1) * fixed / best["net"],
        "routing_share": median(r / n for r, n in zip(seconds["route"], seconds["net"])),
    }


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def report(figures: list[dict], num_students: int) -> str:
    """The figures as Markdown."""
    k = num_students
    names = ["batch", "pipeline, one student", f"pipeline, K={k}", "one net, whole batch", f"{k} nets, their parts",
             "one net, batch of 1", "routing"]  # fmt: skip
    times = []
    for f in figures:
        times.append([str(f["batch_size"])] + [f"{f['median_ms'][n]:.2f} / {f['min_ms'][n]:.2f}" for n in f["min_ms"]])
    headings = ["batch", f"pipeline, K={k} / one student", f"{k} nets / one net", "fixed ms of a call",
                "ratio that alone gives", "routing / one forward"]  # fmt: skip
    ratios = [
        [
            str(f["batch_size"]),
            f"**{f['ratio']:.3f}** / {f['ratio_of_minima']:.3f}",
            f"{f['ratio_nets']:.3f} / {f['ratio_nets_of_minima']:.3f}",
            f"{f['fixed_ms']:.2f}",
            f"{f['ratio_from_fixed']:.3f}",
            f"{100 * f['routing_share']:.3f} %",
        ]
        for f in figures
    ]
    return "\n\n".join(["Milliseconds, median / minimum:", table(names, times),
                        "Ratios, median of the rounds / of the minima:", table(headings, ratios)])  # fmt: skip


def main():
    (config,) = parse_config([BenchmarkConfig], __doc__)
    if config.output is not None:
        check_writable(Path(config.output).parent, "output")
    wait = set_up_device(config.device, config.threads)
    # Of the advice that every cast prints.
    logging.set_verbosity_error()
    torch.manual_seed(0)
    net = NETS[config.size]().to(config.device, DTYPES[config.dtype])
    one, many = build_pipeline(net, 1), build_pipeline(net, config.num_students)
    figures = [measure(one, many, size, config, wait) for size in config.batch_sizes]
    print(f"\n{config.size}: {net.num_parameters():,} parameters, {config.dtype}, {config.device}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}, {config.repeats} rounds\n")  # fmt: skip
    print(report(figures, config.num_students))
    if config.output is not None:
        write_json(config.output, {"config": asdict(config), "parameters": net.num_parameters(), "figures": figures})


if __name__ == "__main__":
    run_script(main)
