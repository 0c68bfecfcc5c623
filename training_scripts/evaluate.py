# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Compares a teacher and pipelines on the same labels and the same per-image seeds: a table, a picture, a plot.

    python training_scripts/evaluate.py --models teacher=runs/digits_teacher K=1=runs/digits_k1 K=2=runs/digits_k2 \
        --dataset_name digits --feature_net training_scripts/assets/features-digits --output_dir runs/digits_results

Classes are exactly balanced, and image i of a class has the same noise for every model and every batch size. Writes
results.json, results.md, samples.png, and learning_curves.png if a model's folder holds the logs of its training.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch

from diffusers_msd import MultiStudentPipeline
from diffusers_msd.config import parse_config, run_script
from diffusers_msd.data import DataConfig, load_images
from diffusers_msd.denoiser import denoiser_for, num_classes, sample_shape
from diffusers_msd.evaluation import generate, markdown_table, named_folders
from diffusers_msd.files import atomic_write, check_writable, load_model, write_json
from diffusers_msd.metrics import FeatureNet, describe_feature_net, evaluate_images
from diffusers_msd.pairs import pair_noise, pair_seeds
from diffusers_msd.plots import plot_learning_curves, plot_samples
from diffusers_msd.runs import training_record
from diffusers_msd.sampling import sample_heun
from diffusers_msd.schedule import NoiseSchedule
from diffusers_msd.teachers import load_teacher


@dataclass
class EvaluationConfig:
    """What is compared and how."""

    models: list[str] = field(
        metadata={"help": "name=folder (or Hub id) of a teacher or pipeline, each; no = in the folder."}
    )
    feature_net: str = field(metadata={"help": "Folder of the feature network the metrics are computed on."})
    output_dir: str = field(metadata={"help": "Folder of the results."})
    num_images: int = field(default=5000, metadata={"help": "Images per model, a multiple of the number of classes."})
    num_inference_steps: int = field(default=18, metadata={"help": "Heun steps of the teacher."})
    sample_batch_size: int = field(default=256, metadata={"help": "Images per batch, for quality and speed."})
    seed: int = field(default=1_000_000, metadata={"help": "Seed of the evaluation's noise."})
    device: str = field(
        default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "Where to generate."}
    )


class Teacher:
    """A many-step teacher, called like a pipeline."""

    def __init__(self, path: str, num_steps: int, device: str):
        self.model, scheduler = load_teacher(path)
        self.denoiser = denoiser_for(self.model.to(device), NoiseSchedule.from_scheduler(scheduler))
        self.num_steps = num_steps

    def sample(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return sample_heun(self.denoiser, z, labels, self.num_steps)

    def parts(self):
        return None

    def parameters(self) -> list[int]:
        return [self.model.num_parameters()]


class Students:
    """A pipeline of one-step students."""

    def __init__(self, path: str, device: str):
        self.pipe = MultiStudentPipeline.from_pretrained(path).to(device)
        self.pipe.set_progress_bar_config(disable=True)
        self.model = self.pipe.students[0]

    def sample(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.pipe(class_labels=labels, latents=z, output_type="latent").images

    def parts(self):
        router = self.pipe.router
        return {k: router.classes(k) for k in range(router.num_students)} if router.num_students > 1 else None

    def parameters(self) -> list[int]:
        return [unet.num_parameters() for unet in self.pipe.students.values()]


def open_model(path: str, config: EvaluationConfig):
    """A folder with unet/ and scheduler/ is a teacher, everything else is loaded as a pipeline."""
    if (Path(path) / "unet").is_dir():
        return Teacher(path, config.num_inference_steps, config.device)
    return Students(path, config.device)


def evaluate(name: str, path: str, config: EvaluationConfig, feature_net, real: dict, samples: dict) -> dict:
    """One model's row; a row of samples per class is added to `samples`."""
    model = open_model(path, config)
    classes = num_classes(model.model)
    if config.num_images % classes or config.num_images < 4 * classes:
        raise ValueError(
            f"num_images: a multiple of the {classes} classes and at least {4 * classes} expected, "
            f"got {config.num_images}"
        )
    labels = torch.arange(config.num_images) % classes
    z = pair_noise(pair_seeds(config.seed, range(config.num_images)), sample_shape(model.model))
    images, speed = generate(model.sample, z, labels, config.sample_batch_size, config.device)
    samples[name] = images[: classes * 4].reshape(4, classes, *images.shape[1:]).transpose(0, 1)
    row = evaluate_images(feature_net, images, labels, real["images"], real["cond"], model.parts())
    parameters = model.parameters()
    return {
        "model": name,
        **row,
        "parameters": max(parameters),
        "parameters_total": sum(parameters),
        "training_seconds": training_record(Path(path)).get("seconds"),
        "images_per_second": speed,
    }


def main():
    config, data = parse_config([EvaluationConfig, DataConfig], __doc__)
    models = named_folders(config.models)
    if config.sample_batch_size < 1:
        raise ValueError(f"sample_batch_size: at least 1 expected, got {config.sample_batch_size}")
    output_dir = check_writable(config.output_dir, "output_dir")
    feature_net = load_model(FeatureNet, config.feature_net, "feature_net").to(config.device).eval()
    shape = sample_shape(open_model(next(iter(models.values())), config).model)
    dataset = load_images(data, shape[0], shape[1])
    real = dataset.__getitems__(range(len(dataset)))

    samples: dict[str, torch.Tensor] = {}
    rows = [evaluate(name, path, config, feature_net, real, samples) for name, path in models.items()]
    described = describe_feature_net(feature_net)
    protocol = f"{config.num_images} images per model against {len(dataset)} real ones; {described}"
    table = f"{markdown_table(rows)}\n\n{protocol}\n"
    write_json(output_dir / "results.json", {"rows": rows, "protocol": protocol, "config": vars(config)})
    atomic_write(output_dir / "results.md", table)
    plot_samples(samples, output_dir / "samples.png")
    plot_learning_curves({name: Path(path) for name, path in models.items()}, output_dir / "learning_curves.png")
    print(table)
    print(json.dumps({"files": sorted(p.name for p in output_dir.iterdir())}))


if __name__ == "__main__":
    run_script(main)
