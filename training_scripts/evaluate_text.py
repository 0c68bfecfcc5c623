# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Compares text-to-image teachers and pipelines on the same captions and noise: a table and a picture.

    python training_scripts/evaluate_text.py --models teacher=runs/emoji_teacher K=1=runs/emoji_k1 K=4=runs/emoji_k4 \
        --captions_dir runs/emoji_captions --train_data_dir runs/emoji/train --resolution 32 \
        --contrastive_net runs/emoji_base/contrastive --output_dir runs/emoji_results

Every caption is drawn the same number of times. Image i has the same caption and noise for every model, every batch size
and any number of processes (`accelerate launch --num_processes n`). Images of another size than `--resolution` are
resized to it (Lanczos, on 8 bits) before anything is measured.

Distances are computed on the image features of a contrastive network, or of `--feature_net inception`. Agreement with
the caption is the contrastive network's retrieval accuracy: how often the own caption is nearest to an image among all
captions; and with `--clip_model` the CLIP score. Parts are those of the pipeline with most students, for every model.

Protocol of the published COCO-30k FIDs: 30,000 captions of COCO-2014's validation set, one image of 512x512 each, resized
to 256x256 (Lanczos), Inception features as clean-fid computes them, against the real images at 256x256. That is
`--resolution 256 --feature_net inception` with a data set of these captions and images. The Inception network here is
the same, but it enlarges images as TensorFlow does and clean-fid as PIL does, so the last digits differ. Give the FID
after a fixed number of iterations, not only the best of several.

Writes results.json (every metric, overall and per part; docs/method.md defines them), results.md (a table of most) and
samples.png.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from PIL import Image

from diffusers_msd import MultiStudentPipeline
from diffusers_msd.captions import CaptionCache, load_captions, read_images
from diffusers_msd.clip_score import ClipScore
from diffusers_msd.conditions import conditions_for
from diffusers_msd.config import parse_config, run_script
from diffusers_msd.data import DataConfig, as_pixels, fit_image
from diffusers_msd.denoiser import denoiser_for, sample_shape
from diffusers_msd.evaluation import (
    UNFINISHED,
    distance_between_seeds,
    measure_images,
    model_row,
    named_folders,
    open_feature_net,
    open_lpips,
    spread,
)
from diffusers_msd.feature_net import weights_hash
from diffusers_msd.files import check_writable, fingerprint, load_model, model_fingerprint
from diffusers_msd.pairs import pair_noise, pair_seeds
from diffusers_msd.plots import plot_samples
from diffusers_msd.retrieval import ContrastiveNet
from diffusers_msd.sampling import SAMPLERS
from diffusers_msd.schedule import NoiseSchedule
from diffusers_msd.scores import evaluate_features, metrics_without_real, part_masks, save_results
from diffusers_msd.teachers import load_teacher


@dataclass
class TextEvaluationConfig:
    """What is compared and how."""

    models: list[str] = field(metadata={"help": "name=folder of a Stable Diffusion teacher or a pipeline, each."})
    captions_dir: str = field(metadata={"help": "Folder of cache_captions.py."})
    output_dir: str = field(metadata={"help": "Folder of the results."})
    contrastive_net: str | None = field(
        default=None, metadata={"help": "Folder of the network of the retrieval accuracy, and of the distances."}
    )
    feature_net: str | None = field(
        default=None,
        metadata={"help": "Distances on the features of this network instead: inception (extra `fid`), or a folder."},
    )
    clip_model: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the CLIP model of the CLIP score; default: no score."}
    )
    images_per_caption: int = field(default=1, metadata={"help": "Images of each caption."})
    sampler: str = field(default="dpm", metadata={"help": "Sampler of teachers.", "choices": list(SAMPLERS)})
    num_inference_steps: int = field(default=20, metadata={"help": "Steps of teachers."})
    guidance_scale: float = field(default=2.0, metadata={"help": "Guidance of teachers."})
    sample_batch_size: int = field(default=64, metadata={"help": "Images per batch, for quality and speed."})
    seed: int = field(default=1_000_000, metadata={"help": "Seed of the evaluation's noise."})
    num_shown: int = field(default=12, metadata={"help": "Captions in the picture, spread over all."})
    lpips_conditions: int = field(
        default=0, metadata={"help": "LPIPS between four images of each of so many captions (extra `lpips`); 0: none."}
    )

    def __post_init__(self):
        for name, least in (("images_per_caption", 1), ("sample_batch_size", 1), ("lpips_conditions", 0)):
            if vars(self)[name] < least:
                raise ValueError(f"{name}: at least {least} expected, got {vars(self)[name]}")
        if self.contrastive_net is None and self.feature_net is None:
            raise ValueError("contrastive_net: it or feature_net is needed, for the features of the distances")


class Teacher:
    """A many-step teacher, called like a pipeline."""

    router = None

    def __init__(self, path: str, config: TextEvaluationConfig, captions: list[str], device: torch.device):
        self.unet, scheduler = load_teacher(path)
        self.conditions = conditions_for(self.unet, path, config.captions_dir)
        schedule = NoiseSchedule.from_scheduler(scheduler)
        sampling = {
            "sampler": config.sampler,
            "num_inference_steps": config.num_inference_steps,
            "guidance_scale": config.guidance_scale,
        }
        self.made_by = {"model": model_fingerprint(self.unet, scheduler), **sampling}
        self.denoiser = denoiser_for(self.unet.to(device), schedule, null_cond=self.conditions.null)
        self.decode, self.config = self.conditions.decoder(device), config
        self.parameters = self.parameters_total = self.unet.num_parameters()

    def sample(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        cond = self.conditions.values[labels.cpu()].to(z.device)
        settings = (self.config.num_inference_steps, self.config.guidance_scale)
        return self.decode(SAMPLERS[self.config.sampler](self.denoiser, z, cond, *settings))


class Students:
    """A pipeline of one-step students, given the captions as text."""

    def __init__(self, path: str, config: TextEvaluationConfig, captions: list[str], device: torch.device):
        self.pipe = MultiStudentPipeline.from_pretrained(path).to(device)
        self.pipe.set_progress_bar_config(disable=True)
        self.unet, self.router, self.captions = self.pipe.students[0], self.pipe.router, captions
        students = {str(k): model_fingerprint(unet, self.pipe.scheduler) for k, unet in self.pipe.students.items()}
        self.made_by = {"model": fingerprint(self.router.tensors(), self.router.config, students)}
        self.parameters, self.parameters_total = self.pipe.count_parameters()

    def sample(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        prompts = [self.captions[i] for i in labels.tolist()]
        return self.pipe(prompts, latents=z, output_type="pt").images * 2 - 1


class Judge:
    """What is measured of images and their captions: features, retrieval of the caption, CLIP score."""

    def __init__(self, config: TextEvaluationConfig, resolution: int, cache: CaptionCache, device: torch.device):
        self.captions, self.resolution, self.device = cache.captions, resolution, device
        self.contrastive_net = self.feature_net = self.clip_score = None
        self.names = []
        if config.contrastive_net is not None:
            net = load_model(ContrastiveNet, config.contrastive_net, "contrastive_net")
            self.contrastive_net = net.requires_grad_(False).to(device).eval()
            self.texts = net.embed_texts(torch.cat(cache.pooled("eos")).float().to(device))
            self.names.append(f"ContrastiveNet {weights_hash(net)}")
        if config.feature_net is not None:
            self.feature_net, name = open_feature_net(config.feature_net, device)
            self.names.append(name)
        if config.clip_model is not None:
            self.clip_score = ClipScore(config.clip_model, device)
            self.names.append(self.clip_score.name)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images [B, 3, H, W] in [-1, 1] and the numbers of their captions [B] to columns for `measure_images`."""
        images, columns = resized(images, self.resolution).to(self.device), {}
        if self.feature_net is not None:
            columns["features"] = self.feature_net(images)[0]
        else:
            columns["features"] = self.contrastive_net.image_features(images)
        if self.contrastive_net is not None:
            cosines = self.contrastive_net.embed_images(images) @ self.texts.T
            nearest = cosines.topk(min(5, len(self.texts))).indices == labels.to(self.device)[:, None]
            columns |= {"class_accuracy": nearest[:, 0].clone(), "retrieval@5": nearest.any(dim=1)}
        if self.clip_score is not None:
            columns["clip_score"] = self.clip_score(images, [self.captions[i] for i in labels.tolist()])
        return columns


def resized(images: torch.Tensor, resolution: int) -> torch.Tensor:
    """Images [B, 3, H, W] in [-1, 1] of another size as 8-bit ones of this size, by Lanczos; on the CPU then."""
    if images.shape[-2:] == (resolution, resolution):
        return images
    pixels = images.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return as_pixels([fit_image(Image.fromarray(image), 3, resolution) for image in pixels])


def open_model(path: str, config: TextEvaluationConfig, captions: list[str], device) -> Teacher | Students:
    """A folder with unet/ is a teacher, everything else is loaded as a pipeline."""
    return (Teacher if (Path(path) / "unet").is_dir() else Students)(path, config, captions, device)


def common_parts(models: dict[str, Teacher | Students], cache: CaptionCache) -> dict[int, torch.Tensor] | None:
    """The captions of each part of the largest router; None if no pipeline has more than one student."""
    routers = [model.router for model in models.values() if model.router is not None and model.router.num_students > 1]
    if not routers:
        return None
    router = max(routers, key=lambda r: r.num_students)
    assigned = router(embeddings=torch.cat(cache.pooled(router.config.pooling)))
    return {k: torch.nonzero(assigned == k).flatten() for k in range(router.num_students)}


@torch.no_grad()
def images_of(model, captions: torch.Tensor, config: TextEvaluationConfig, device, columns: int = 4) -> torch.Tensor:
    """Images of a few captions [n] from noise that all models share: [n, columns, 3, H, W]."""
    labels = captions.repeat(columns)
    z = pair_noise(pair_seeds(config.seed + 1, range(len(labels))), sample_shape(model.unet)).to(device)
    batches = zip(z.split(config.sample_batch_size), labels.split(config.sample_batch_size))
    images = torch.cat([model.sample(*batch).cpu() for batch in batches]).clamp(-1, 1)
    return images.reshape(columns, len(captions), *images.shape[1:]).transpose(0, 1)


def measure_model(model: Teacher | Students, name: str, judge: Judge, cache: CaptionCache, config, state):
    """`measure_images` of one model."""
    index = {
        "num_images": len(cache) * config.images_per_caption,
        "num_classes": len(cache),
        "captions": cache.identity,
        "seed": config.seed,
        "resolution": judge.resolution,
        "measured_by": judge.names,
        **model.made_by,
    }
    folder = Path(config.output_dir) / UNFINISHED / name
    return measure_images(
        model.sample, judge, folder, index, sample_shape(model.unet), config.sample_batch_size, state
    )


def measure_real(judge: Judge, dataset, cache: CaptionCache, batch_size: int) -> dict[str, torch.Tensor]:
    """The columns of `measure_images` for the real images that can be read."""
    batches = []
    for rows, labels in zip(cache.rows.split(batch_size), torch.arange(len(cache)).split(batch_size)):
        images, kept = read_images(dataset, rows, judge.resolution)
        if kept.any():
            columns = {name: column.cpu() for name, column in judge(images, labels[kept]).items()}
            batches.append({**columns, "labels": labels[kept]})
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def describe_real(real: dict[str, torch.Tensor]) -> str:
    scores = metrics_without_real(real)
    known = [f"retrieval@1 {100 * scores['class_accuracy']:.2f} %"] if "class_accuracy" in scores else []
    known += [f"CLIP score {scores['clip_score']:.2f}"] if "clip_score" in scores else []
    return f"{len(real['labels'])} real ones" + (f" (their own: {', '.join(known)})" if known else "")


def main():
    config, data = parse_config([TextEvaluationConfig, DataConfig], __doc__)
    paths = named_folders(config.models)
    if data.resolution is None:
        raise ValueError("resolution: the side of the images in pixels is needed")
    output_dir = check_writable(config.output_dir, "output_dir")
    # Said outright: left to itself it sees one process where several were launched on CPUs.
    state = PartialState(cpu=not torch.cuda.is_available())
    lpips = open_lpips() if config.lpips_conditions else None
    cache = CaptionCache(config.captions_dir)
    captions, num_captions = cache.captions, len(cache)
    judge = Judge(config, data.resolution, cache, state.device)
    dataset = load_captions(data, with_images=True)
    models = {name: open_model(path, config, captions, state.device) for name, path in paths.items()}
    parts = common_parts(models, cache)
    labels = torch.arange(num_captions * config.images_per_caption) % num_captions
    # Refuses parts without enough images before any is generated.
    part_masks(labels, torch.arange(num_captions), parts)

    shown = spread(num_captions, config.num_shown)
    shown_real, readable = read_images(dataset, cache.rows[shown], data.resolution)
    shown = shown[readable]
    rows, samples, made = [], {"real": shown_real[:, None]}, []
    for name, model in models.items():
        made.append(measure_model(model, name, judge, cache, config, state))
        if state.is_main_process:
            samples[name] = images_of(model, shown, config, state.device)
            row = model_row(name, paths[name], model, sample_shape(model.unet), state.device)
            if lpips is not None:
                several = images_of(model, spread(num_captions, config.lpips_conditions), config, state.device)
                row["lpips"] = distance_between_seeds(several, lpips)
            rows.append(row)
        # The other processes wait meanwhile: beside them, one image would take longer.
        state.wait_for_everyone()
    if not state.is_main_process:
        return
    real = measure_real(judge, dataset, cache, config.sample_batch_size)
    masks = part_masks(labels, real["labels"], parts)
    for row, (columns, speed) in zip(rows, made):
        row |= evaluate_features(columns, real["features"], masks)
        row["images_per_second"] = speed
    protocol = (
        f"{len(labels)} images per model against {describe_real(real)}; measured by {', '.join(judge.names)}; teachers: "
        f"{config.num_inference_steps} steps of {config.sampler}, guidance {config.guidance_scale}"
    )
    table = save_results(output_dir, rows, protocol, config)
    plot_samples(samples, output_dir / "samples.png", [captions[i] for i in shown])
    shutil.rmtree(output_dir / UNFINISHED)
    print(table)


if __name__ == "__main__":
    run_script(main)
