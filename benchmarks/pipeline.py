# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Time of a mixed batch over K students against one student of the same size on the whole batch.

    OMP_NUM_THREADS=1 python benchmarks/pipeline.py --size digits --batch_sizes 64 256 --output runs/pipeline.json
    OMP_NUM_THREADS=1 python benchmarks/pipeline.py --size text_small --batch_sizes 64 --output runs/pipeline.json

The sizes `text_...` are prompts through Stable Diffusion networks, against diffusers' own pipeline at one step. All cases take turns in one process, so that whatever else the machine does slows them alike: the ratios are the
result, the milliseconds belong to the machine. Besides the pipelines it times the bare networks (is the cost in the
network calls or around them?), a batch of one (what does a call cost however small it is?) and the routing.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from diffusers import (
    AutoencoderKL,
    EDMEulerScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.utils import logging
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel

from diffusers_msd import ClassRouter, EmbeddingRouter, MultiStudentPipeline
from diffusers_msd.config import parse_config, run_script
from diffusers_msd.data import DataConfig
from diffusers_msd.denoiser import denoiser_for, num_classes, sample_shape
from diffusers_msd.files import check_writable, write_json
from diffusers_msd.prompts import pool_embeddings
from diffusers_msd.schedule import NoiseSchedule
from diffusers_msd.students import create_student
from diffusers_msd.teachers import load_teacher
from diffusers_msd.training_config import TrainingConfig


SCRIPTS = Path(__file__).resolve().parents[1] / "training_scripts"
sys.path[:0] = [str(SCRIPTS), str(SCRIPTS.parent / "tests")]
from helpers import random_prompts, tiny_text_encoder, tiny_text_unet, tiny_tokenizer, tiny_vae  # noqa: E402
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


def text_encoder(width: int, layers: int, heads: int, length: int) -> CLIPTextModel:
    """A CLIP text model of random weights for the character tokenizer of the tests."""
    tokens = {"vocab_size": 190, "bos_token_id": 188, "eos_token_id": 189, "pad_token_id": 189}
    size = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    config = CLIPTextConfig(**tokens, **size, num_attention_heads=heads, max_position_embeddings=length)
    return CLIPTextModel(config).eval()


def vae(channels: tuple[int, ...], layers: int = 1) -> AutoencoderKL:
    """A VAE of 4 latent channels that halves the side once per level after the first."""
    down, up = ("DownEncoderBlock2D",) * len(channels), ("UpDecoderBlock2D",) * len(channels)
    return AutoencoderKL(
        down_block_types=down,
        up_block_types=up,
        block_out_channels=channels,
        layers_per_block=layers,
        norm_num_groups=16,
        latent_channels=4,
    ).eval()


def tiny_text_parts() -> tuple:
    return tiny_text_unet(), tiny_vae(), tiny_text_encoder()


def small_text_parts() -> tuple:
    unet = tiny_text_unet(
        cross_attention_dim=128, block_out_channels=(48, 96), attention_head_dim=4, norm_num_groups=16
    )
    return unet, vae((32, 64, 64)), text_encoder(128, layers=3, heads=4, length=24)


def quarter_text_parts() -> tuple:
    # Stable Diffusion 1.5 at a quarter of the channels: layers, levels and heads are its own.
    unet = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(80, 160, 320, 320),
        cross_attention_dim=192,
        attention_head_dim=8,
        norm_num_groups=16,
    ).eval()
    return unet, vae((32, 64, 128, 128), layers=2), text_encoder(192, layers=12, heads=12, length=77)


# UNet, VAE and text encoder, all of random weights.
TEXT_PARTS: dict[str, Callable[[], tuple]] = {
    "text_tiny": tiny_text_parts,
    "text_small": small_text_parts,
    "text_quarter": quarter_text_parts,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class BenchmarkConfig:
    """What is timed."""

    size: str = field(default="digits", metadata={"help": "Network.", "choices": [*NETS, *TEXT_PARTS]})
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
def take_turns(
    cases: dict[str, Callable], repeats: int, wait: Callable[[], None], clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each case, `repeats` times; round i times every case once, starting from another one each time."""
    for case in cases.values():
        case()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    names = list(cases)
    for i in tqdm(range(repeats), desc="rounds"):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            wait()
            began = clock()
            cases[name]()
            wait()
            seconds[name].append(clock() - began)
    return seconds


def build_pipeline(net: UNet2DModel, num_students: int) -> MultiStudentPipeline:
    """A pipeline of copies of `net`, each with memory of its own."""
    students = {f"unet_{k}": create_student(net).to(net.dtype).eval() for k in range(num_students)}
    router = ClassRouter.consecutive(num_classes(net), num_students)
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


def stock_pipeline(size: str, device: str, dtype: torch.dtype) -> StableDiffusionPipeline:
    """diffusers' pipeline of the parts of `size`, set up to take the one step that a student takes."""
    unet, decoder, encoder = TEXT_PARTS[size]()
    with TemporaryDirectory() as folder:
        tokenizer = tiny_tokenizer(Path(folder), encoder.config.max_position_embeddings)
    pipe = StableDiffusionPipeline(
        decoder, encoder, tokenizer, unet, LCMScheduler(), None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device, dtype)


def text_pipeline(stock: StableDiffusionPipeline, prompts: list[str], num_students: int) -> MultiStudentPipeline:
    """Students like the UNet of `stock`, each with memory of its own, and a router that cuts `prompts` evenly."""
    students = {f"unet_{k}": create_student(stock.unet).to(stock.unet.dtype).eval() for k in range(num_students)}
    parts = {"vae": stock.vae, "text_encoder": stock.text_encoder, "tokenizer": stock.tokenizer}
    whole = MultiStudentPipeline(stock.scheduler, None, **parts, **students).to(stock.device)
    pooled = pool_embeddings(*whole.encode_prompt(prompts), "eos")
    pipe = MultiStudentPipeline(
        stock.scheduler, EmbeddingRouter.fit_quadrants(pooled, num_students, pooling="eos"), **parts, **students
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def measure_text(stock: StableDiffusionPipeline, size: int, config: BenchmarkConfig, wait) -> dict:
    """Seconds of stock and of K students on one prompt and on `size` prompts, an equal number per student."""
    prompts = random_prompts(size)
    many = text_pipeline(stock, prompts, config.num_students)
    embeds, mask = many.encode_prompt(prompts)
    chosen = many.route(prompts)
    rows = [[i for i, k in enumerate(chosen) if k == student] for student in many.students]
    z = torch.randn(size, *sample_shape(stock.unet), device=config.device)
    denoisers = [denoiser_for(unet, NoiseSchedule.from_scheduler(many.scheduler)) for unet in many.students.values()]
    one_step = {"num_inference_steps": 1, "guidance_scale": 1.0}
    latent = {"output_type": "latent"}
    cases = {
        "stock": lambda: stock(prompts, latents=z, **one_step, **latent),
        "many": lambda: many(prompts, latents=z, **latent),
        "net": lambda: denoisers[0].generate(z, embeds),
        "nets": lambda: [denoiser.generate(z[r], embeds[r]) for denoiser, r in zip(denoisers, rows)],
        "encode": lambda: many.encode_prompt(prompts),
        "route": lambda: many.route(prompt_embeds=embeds, prompt_mask=mask),
        "stock_1": lambda: stock(prompts[0], latents=z[:1], **one_step, **latent),
        "many_1": lambda: many(prompts[0], latents=z[:1], **latent),
        "stock_1_image": lambda: stock(prompts[0], latents=z[:1], **one_step, output_type="pt"),
        "many_1_image": lambda: many(prompts[0], latents=z[:1], output_type="pt"),
        "route_1": lambda: many.route(prompt_embeds=embeds[:1], prompt_mask=mask[:1]),
    }
    # Processor time leaves out what other jobs take of a CPU; that of several threads would be their sum.
    alone = config.device == "cpu" and torch.get_num_threads() == 1
    seconds = take_turns(cases, config.repeats, wait, time.process_time if alone else time.perf_counter)
    pairs = {
        "one prompt": ("many_1", "stock_1"),
        "one image": ("many_1_image", "stock_1_image"),
        "batch": ("many", "stock"),
        "nets of a batch": ("nets", "net"),
        "routing in a call of one": ("route_1", "many_1"),
        "routing in a call": ("route", "many"),
    }
    return {
        "batch_size": size,
        "clock": "processor time" if alone else "wall time",
        "median_ms": {name: 1000 * median(times) for name, times in seconds.items()},
        "min_ms": {name: 1000 * min(times) for name, times in seconds.items()},
        "ratios": {name: median(a / b for a, b in zip(seconds[x], seconds[y])) for name, (x, y) in pairs.items()},
        "ratios_of_minima": {name: min(seconds[x]) / min(seconds[y]) for name, (x, y) in pairs.items()},
        "images_per_second": {name: size / median(seconds[name]) for name in ("stock", "many")},
        "offload": offloaded_parts(many, prompts, config.device),
    }


def mebibytes(model: torch.nn.Module) -> float:
    return sum(p.nbytes for p in model.parameters()) / 2**20


def offloaded_parts(pipe: MultiStudentPipeline, prompts: list[str], device: str) -> dict:
    """Which parts `enable_model_cpu_offload` has on the device while each part runs, in a call with `prompts`.

    Counted from accelerate's hooks, one that sends a part there and one that takes it back; so it also works where
    the device is the CPU itself and nothing really moves. Weights alone: activations come on top.

    Returns:
        {"MiB": weights of each part, "while": [(running part, parts on the device)] in order}.
    """
    names = {model: name for name, model in pipe.components.items() if isinstance(model, torch.nn.Module)}
    present: list[str] = []
    seen: list[tuple[str, list[str]]] = []

    def watch(hook):
        send, take_back = hook.pre_forward, hook.init_hook

        def sent(module, *args, **kwargs):
            present.append(names[module])
            seen.append((names[module], list(present)))
            return send(module, *args, **kwargs)

        def taken_back(module):
            if names[module] in present:
                present.remove(names[module])
            return take_back(module)

        hook.pre_forward, hook.init_hook = sent, taken_back

    pipe.enable_model_cpu_offload(device=device)
    for model in names:
        watch(model._hf_hook)
    pipe(prompts, output_type="np")
    pipe.remove_all_hooks()
    pipe.to(device)
    return {"MiB": {name: mebibytes(model) for model, name in names.items()}, "while": seen}


def text_report(figures: list[dict], num_students: int) -> str:
    """The figures of prompts as Markdown."""
    k, blocks = num_students, []
    for f in figures:
        n = f["batch_size"]
        what = {
            "stock": f"stock, {n} prompts",
            "many": f"K={k}, {n} prompts",
            "net": "one bare net on them",
            "nets": f"{k} bare nets, their parts",
            "encode": "encoding them",
            "route": "routing them",
            "stock_1": "stock, one prompt",
            "many_1": f"K={k}, one prompt",
            "stock_1_image": "stock, one prompt, decoded",
            "many_1_image": f"K={k}, one prompt, decoded",
            "route_1": "routing it",
        }
        rows = [[text, f"{f['median_ms'][name]:.2f}", f"{f['min_ms'][name]:.2f}"] for name, text in what.items()]
        blocks.append(table(["case", "median ms", "minimum ms"], rows))
        rows = [[name, f"{r:.4f}", f"{f['ratios_of_minima'][name]:.4f}"] for name, r in f["ratios"].items()]
        blocks.append(table(["ratio", "median of the rounds", "of the minima"], rows))
        blocks.append(f"Images per second: {f['images_per_second']}, all in {f['clock']}")
        size = f["offload"]["MiB"]
        rows = [[name, ", ".join(on), f"{sum(size[o] for o in on):.2f}"] for name, on in f["offload"]["while"]]
        rows.append(["all parts", "", f"{sum(size.values()):.2f}"])
        blocks.append(table(["while it runs", "on the device", "MiB of weights"], rows))
    return "\n\n".join(blocks)


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
    if config.size in TEXT_PARTS:
        stock = stock_pipeline(config.size, config.device, DTYPES[config.dtype])
        net, text = stock.unet, text_report
        figures = [measure_text(stock, size, config, wait) for size in config.batch_sizes]
    else:
        net, text = NETS[config.size]().to(config.device, DTYPES[config.dtype]), report
        one, many = build_pipeline(net, 1), build_pipeline(net, config.num_students)
        figures = [measure(one, many, size, config, wait) for size in config.batch_sizes]
    print(f"\n{config.size}: {net.num_parameters():,} parameters, {config.dtype}, {config.device}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}, {config.repeats} rounds\n")  # fmt: skip
    print(text(figures, config.num_students))
    if config.output is not None:
        write_json(config.output, {"config": asdict(config), "parameters": net.num_parameters(), "figures": figures})


if __name__ == "__main__":
    run_script(main)
