# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Compares text-to-image teachers and pipelines on the same captions and noise: a table and a picture.

    python training_scripts/evaluate_text.py --models teacher=runs/emoji_teacher K=1=runs/emoji_k1 K=4=runs/emoji_k4 \
        --captions_dir runs/emoji_captions --train_data_dir runs/emoji/train --resolution 32 \
        --contrastive_net runs/emoji_base/contrastive --output_dir runs/emoji_results

Every caption is drawn the same number of times. Distances are computed on the image features of a contrastive network.
Agreement with the caption is its retrieval accuracy: how often the own caption is nearest to an image among all
captions. Parts are those of the pipeline with most students, for every model.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from diffusers_msd import MultiStudentPipeline
from diffusers_msd.captions import CaptionCache, load_captions, read_images
from diffusers_msd.conditions import conditions_for
from diffusers_msd.config import parse_config, run_script
from diffusers_msd.data import DataConfig
from diffusers_msd.denoiser import denoiser_for, sample_shape
from diffusers_msd.evaluation import generate, markdown_table, model_cost, named_folders
from diffusers_msd.files import atomic_write, check_writable, load_model, write_json
from diffusers_msd.metrics import evaluate_images, extract_features, weights_hash
from diffusers_msd.pairs import pair_noise, pair_seeds
from diffusers_msd.plots import plot_samples
from diffusers_msd.retrieval import ContrastiveNet
from diffusers_msd.sampling import SAMPLERS
from diffusers_msd.schedule import NoiseSchedule
from diffusers_msd.teachers import load_teacher


@dataclass
class TextEvaluationConfig:
    """What is compared and how."""

    models: list[str] = field(metadata={"help": "name=folder of a Stable Diffusion teacher or a pipeline, each."})
    captions_dir: str = field(metadata={"help": "Folder of cache_captions.py."})
    contrastive_net: str = field(metadata={"help": "Folder of the network the metrics are computed on."})
    output_dir: str = field(metadata={"help": "Folder of the results."})
    images_per_caption: int = field(default=1, metadata={"help": "Images of each caption."})
    sampler: str = field(default="dpm", metadata={"help": "Sampler of teachers.", "choices": list(SAMPLERS)})
    num_inference_steps: int = field(default=20, metadata={"help": "Steps of teachers."})
    guidance_scale: float = field(default=2.0, metadata={"help": "Guidance of teachers."})
    sample_batch_size: int = field(default=64, metadata={"help": "Images per batch, for quality and speed."})
    seed: int = field(default=1_000_000, metadata={"help": "Seed of the evaluation's noise."})
    num_shown: int = field(default=12, metadata={"help": "Captions in the picture, spread over all."})
    device: str = field(
        default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "Where to generate."}
    )


class Teacher:
    """A many-step teacher, called like a pipeline."""

    router = None

    def __init__(self, path: str, config: TextEvaluationConfig, captions: list[str]):
        self.unet, scheduler = load_teacher(path)
        self.conditions = conditions_for(self.unet, path, config.captions_dir)
        schedule = NoiseSchedule.from_scheduler(scheduler)
        self.denoiser = denoiser_for(self.unet.to(config.device), schedule, null_cond=self.conditions.null)
        self.decode, self.config = self.conditions.decoder(config.device), config
        self.parameters = self.parameters_total = self.unet.num_parameters()

    def sample(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        cond = self.conditions.values[labels.cpu()].to(z.device)
        settings = (self.config.num_inference_steps, self.config.guidance_scale)
        return self.decode(SAMPLERS[self.config.sampler](self.denoiser, z, cond, *settings))


class Students:
    """A pipeline of one-step students, given the captions as text."""

    def __init__(self, path: str, config: TextEvaluationConfig, captions: list[str]):
        self.pipe = MultiStudentPipeline.from_pretrained(path).to(config.device)
        self.pipe.set_progress_bar_config(disable=True)
        self.unet, self.router, self.captions = self.pipe.students[0], self.pipe.router, captions
        self.parameters, self.parameters_total = self.pipe.count_parameters()

    def sample(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        prompts = [self.captions[i] for i in labels.tolist()]
        return self.pipe(prompts, latents=z, output_type="pt").images * 2 - 1


class CaptionJudge(torch.nn.Module):
    """Images to (features [B, D], cosines with every caption [B, N]): a classifier whose classes are the captions."""

    def __init__(self, net: ContrastiveNet, pooled: torch.Tensor):
        super().__init__()
        self.net = net
        self.texts = net.embed_texts(pooled).detach()

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.net.image_features(images), self.net.embed_images(images) @ self.texts.T


def open_model(path: str, config: TextEvaluationConfig, captions: list[str]) -> Teacher | Students:
    """A folder with unet/ is a teacher, everything else is loaded as a pipeline."""
    return (Teacher if (Path(path) / "unet").is_dir() else Students)(path, config, captions)


def common_parts(models: dict[str, Teacher | Students], cache: CaptionCache) -> dict[int, torch.Tensor] | None:
    """The captions of each part of the largest router; None if no pipeline has more than one student."""
    routers = [model.router for model in models.values() if model.router is not None and model.router.num_students > 1]
    if not routers:
        return None
    router = max(routers, key=lambda r: r.num_students)
    assigned = router(embeddings=torch.cat(cache.pooled(router.config.pooling)))
    return {k: torch.nonzero(assigned == k).flatten() for k in range(router.num_students)}


def show(model, captions: torch.Tensor, config: TextEvaluationConfig, columns: int = 4) -> torch.Tensor:
    """Images of a few captions [n] from noise that all models share: [n, columns, 3, H, W]."""
    labels = captions.repeat(columns)
    z = pair_noise(pair_seeds(config.seed + 1, range(len(labels))), sample_shape(model.unet)).to(config.device)
    images = torch.cat([model.sample(*batch).cpu() for batch in zip(z.split(64), labels.split(64))])
    return images.reshape(columns, len(captions), *images.shape[1:]).transpose(0, 1)


def evaluate(name: str, path: str, model, judge: CaptionJudge, labels, real: dict, parts, config) -> dict:
    """One model's row."""
    z = pair_noise(pair_seeds(config.seed, range(len(labels))), sample_shape(model.unet))
    images, speed = generate(model.sample, z, labels, config.sample_batch_size, config.device)
    row = evaluate_images(judge, images, labels, real["images"], real["labels"], parts)
    logits = extract_features(judge, images)[1]
    row["retrieval@5"] = (logits.topk(5).indices == labels[:, None]).any(dim=1).double().mean().item()
    return {
        "model": name,
        **row,
        "parameters": model.parameters,
        "parameters_total": model.parameters_total,
        **model_cost(path, model.sample, sample_shape(model.unet), torch.device(config.device)),
        "images_per_second": speed,
    }


def main():
    config, data = parse_config([TextEvaluationConfig, DataConfig], __doc__)
    paths = named_folders(config.models)
    if data.resolution is None:
        raise ValueError("resolution: the side of the images in pixels is needed")
    output_dir = check_writable(config.output_dir, "output_dir")
    cache = CaptionCache(config.captions_dir)
    captions = cache.captions
    net = load_model(ContrastiveNet, config.contrastive_net, "contrastive_net").to(config.device).eval()
    judge = CaptionJudge(net, torch.cat(cache.pooled("eos")).float().to(config.device))
    real_images, kept = read_images(load_captions(data, with_images=True), cache.rows, data.resolution)
    real = {"images": real_images, "labels": torch.arange(len(cache))[kept]}
    labels = torch.arange(len(cache)).repeat(config.images_per_caption)

    models = {name: open_model(path, config, captions) for name, path in paths.items()}
    parts = common_parts(models, cache)
    real_logits = extract_features(judge, real_images)[1]
    real_top1 = (real_logits.argmax(dim=1) == real["labels"]).double().mean().item()
    rows, samples = [], {}
    shown = torch.linspace(0, len(cache) - 1, min(config.num_shown, len(cache))).long()
    for name, model in models.items():
        row = evaluate(name, paths[name], model, judge, labels, real, parts, config)
        rows.append(row)
        with torch.no_grad():
            samples[name] = show(model, shown, config)
        print(f"{name}: FD {row['fd']:.4f}, retrieval@1 {100 * row['class_accuracy']:.2f} %", flush=True)
    protocol = (
        f"{len(labels)} images per model against {len(real_images)} real ones; features and captions of ContrastiveNet "
        f"{weights_hash(net)}, whose retrieval@1 on the real images is {100 * real_top1:.2f} %; teachers: "
        f"{config.num_inference_steps} steps of {config.sampler}, guidance {config.guidance_scale}"
    )
    table = f"{markdown_table(rows)}\n\n{protocol}\n"
    write_json(output_dir / "results.json", {"rows": rows, "protocol": protocol, "config": vars(config)})
    atomic_write(output_dir / "results.md", table)
    shown_real = {"real": real_images[[int(torch.searchsorted(real["labels"], i)) for i in shown]][:, None]}
    plot_samples({**shown_real, **samples}, output_dir / "samples.png", [captions[i] for i in shown])
    print(table)


if __name__ == "__main__":
    run_script(main)
