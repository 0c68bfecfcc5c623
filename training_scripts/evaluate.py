# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Compares a teacher and pipelines on the same labels and the same per-image seeds: a table, a picture, a plot.

    python training_scripts/evaluate.py --models teacher=runs/digits_teacher K=1=runs/digits_k1 K=2=runs/digits_k2 \
        --dataset_name digits --feature_net training_scripts/assets/features-digits --output_dir runs/digits_results

Classes are exactly balanced, and image i has the same class and noise for every model, every batch size and any number
of processes (`accelerate launch --num_processes n`). Instead of a data set, `--reference` takes the statistics of one:
of make_reference.py, or EDM's with `--feature_net inception`. Then the Fréchet distance is the only metric that compares
with real images.

Protocol of the published ImageNet-64 FIDs: 50,000 generated images, 50 of each class, one seed per image, the Inception
network of 2015 ported from TensorFlow, and EDM's reference statistics imagenet-64x64.npz, whose SHA-256 stands beside
the number. That is `--num_images 50000 --feature_net inception --reference imagenet-64x64.npz`.

Writes results.json (every metric, overall and per part; docs/method.md defines them), results.md (a table of most),
samples.png, and learning_curves.png if a model's folder holds the logs of its training.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState

from diffusers_msd import MultiStudentPipeline
from diffusers_msd.conditions import conditions_for
from diffusers_msd.config import parse_config, run_script
from diffusers_msd.data import DataConfig, ImageDataset, load_images
from diffusers_msd.denoiser import denoiser_for, sample_shape
from diffusers_msd.evaluation import (
    UNFINISHED,
    dataset_features,
    distance_between_seeds,
    generate,
    measure_images,
    model_row,
    named_folders,
    open_feature_net,
    open_lpips,
    spread,
)
from diffusers_msd.feature_net import FeatureNet, describe_feature_net
from diffusers_msd.feature_statistics import FeatureStatistics, load_statistics
from diffusers_msd.files import check_writable, fingerprint, model_fingerprint
from diffusers_msd.metrics import frechet_distance
from diffusers_msd.pairs import pair_noise, pair_seeds
from diffusers_msd.plots import plot_learning_curves, plot_samples
from diffusers_msd.sampling import sample_heun
from diffusers_msd.schedule import NoiseSchedule
from diffusers_msd.scores import evaluate_features, metrics_without_real, part_masks, save_results
from diffusers_msd.teachers import load_teacher


@dataclass
class EvaluationConfig:
    """What is compared and how."""

    models: list[str] = field(
        metadata={"help": "name=folder (or Hub id) of a teacher or pipeline, each; no = in the folder."}
    )
    feature_net: str = field(
        metadata={"help": "What the metrics are computed on: folder of a feature network, or inception (extra `fid`)."}
    )
    output_dir: str = field(metadata={"help": "Folder of the results."})
    reference: str | None = field(
        default=None,
        metadata={"help": "Statistics of the real images (.npz with mu and sigma) instead of a data set."},
    )
    num_images: int = field(default=5000, metadata={"help": "Images per model, a multiple of the number of classes."})
    num_inference_steps: int = field(default=18, metadata={"help": "Heun steps of the teacher."})
    sample_batch_size: int = field(default=256, metadata={"help": "Images per batch, for quality and speed."})
    seed: int = field(default=1_000_000, metadata={"help": "Seed of the evaluation's noise."})
    lpips_conditions: int = field(
        default=0, metadata={"help": "LPIPS between four images of each of so many classes (extra `lpips`); 0: none."}
    )

    def __post_init__(self):
        for name, least in (("sample_batch_size", 1), ("num_images", 1), ("lpips_conditions", 0)):
            if vars(self)[name] < least:
                raise ValueError(f"{name}: at least {least} expected, got {vars(self)[name]}")


class Teacher:
    """A many-step teacher, called like a pipeline."""

    parts = None

    def __init__(self, path: str, num_steps: int, device: torch.device):
        self.model, scheduler = load_teacher(path)
        self.num_classes = len(conditions_for(self.model, path).values)
        self.scheduler, self.num_steps = scheduler, num_steps
        self.denoiser = denoiser_for(self.model.to(device), NoiseSchedule.from_scheduler(scheduler))
        self.parameters = self.parameters_total = self.model.num_parameters()

    def sample(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return sample_heun(self.denoiser, z, labels, self.num_steps)

    def made_by(self) -> dict:
        return {"model": model_fingerprint(self.model, self.scheduler), "num_inference_steps": self.num_steps}


class Students:
    """A pipeline of one-step students."""

    def __init__(self, path: str, device: torch.device):
        self.pipe = MultiStudentPipeline.from_pretrained(path).to(device)
        self.pipe.set_progress_bar_config(disable=True)
        self.model, router = self.pipe.students[0], self.pipe.router
        self.num_classes = len(router.class_to_student)
        several = router.num_students > 1
        self.parts = {k: router.classes(k) for k in range(router.num_students)} if several else None
        self.parameters, self.parameters_total = self.pipe.count_parameters()

    def sample(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.pipe(class_labels=labels, latents=z, output_type="latent").images

    def made_by(self) -> dict:
        students = {str(k): model_fingerprint(unet, self.pipe.scheduler) for k, unet in self.pipe.students.items()}
        return {"model": fingerprint({"router": self.pipe.router.class_to_student}, students)}


def measure_model(model: Teacher | Students, name: str, config: EvaluationConfig, net, net_name: str, state):
    """`measure_images` of one model: features, logits, and whether an image is of the class asked for."""
    if isinstance(net, FeatureNet) and net.config.num_classes < model.num_classes:
        raise ValueError(f"feature_net: it knows {net.config.num_classes} classes, {name} has {model.num_classes}")
    index = {
        "num_images": config.num_images,
        "num_classes": model.num_classes,
        "seed": config.seed,
        "feature_net": net_name,
        **model.made_by(),
    }

    def measure(images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        features, logits = net(images)
        # Inception's classes are not those asked for.
        correct = {"class_accuracy": logits.argmax(dim=1) == labels} if isinstance(net, FeatureNet) else {}
        return {"features": features, "logits": logits, **correct}

    folder = Path(config.output_dir) / UNFINISHED / name
    shape = sample_shape(model.model)
    return measure_images(model.sample, measure, folder, index, shape, config.sample_batch_size, state)


def quality(columns: dict[str, torch.Tensor], reference: ImageDataset | FeatureStatistics, real, masks) -> dict:
    """The metrics of one model: all of them against a data set, one distance against statistics."""
    if isinstance(reference, ImageDataset):
        return evaluate_features(columns, real, masks)
    return {"fd": frechet_distance(reference, columns["features"]), **metrics_without_real(columns)}


def open_model(path: str, config: EvaluationConfig, device: torch.device) -> Teacher | Students:
    """A folder without router/ is a teacher, everything else is loaded as a pipeline.

    Raises:
        ValueError: its classes do not divide the number of images, or are too many.
    """
    is_teacher = (Path(path) / "unet").is_dir() and not (Path(path) / "router").is_dir()
    model = Teacher(path, config.num_inference_steps, device) if is_teacher else Students(path, device)
    if config.num_images % model.num_classes or config.num_images < 4 * model.num_classes:
        raise ValueError(
            f"num_images: a multiple of the {model.num_classes} classes and at least {4 * model.num_classes} expected, "
            f"got {config.num_images}"
        )
    return model


def open_reference(config: EvaluationConfig, data: DataConfig, shape: tuple, feature_net, name: str, device):
    """What the models are compared with, a data set or statistics, and one line that says so.

    Raises:
        FileNotFoundError, ValueError: neither or both, or statistics of another feature network.
    """
    if config.reference is None:
        dataset = load_images(data, shape[0], shape[1])
        return dataset, f"{len(dataset)} real ones"
    if data.dataset_name is not None or data.train_data_dir is not None:
        raise ValueError("reference: it takes the place of a data set; leave dataset_name and train_data_dir out")
    reference, sha256 = load_statistics(config.reference, "reference")
    if reference.feature_net not in (None, name):
        raise ValueError(f"reference: {config.reference} was made with {reference.feature_net}, feature_net is {name}")
    with torch.no_grad():
        width = feature_net(torch.zeros(1, *shape, device=device))[0].shape[1]
    if width != len(reference.mean):
        raise ValueError(
            f"reference: {config.reference} is of {len(reference.mean)} features, feature_net gives {width}"
        )
    return reference, f"the statistics {Path(config.reference).name} (SHA-256 {sha256})"


def images_of(model: Teacher | Students, classes: torch.Tensor, config: EvaluationConfig, device) -> torch.Tensor:
    """Four of the evaluated images of each of some classes: [classes, 4, C, H, W]."""
    rows = [int(c) + j * model.num_classes for c in classes for j in range(4)]
    shape = sample_shape(model.model)
    z = torch.cat([pair_noise(pair_seeds(config.seed, range(row, row + 1)), shape) for row in rows])
    images, _ = generate(model.sample, z, classes.repeat_interleave(4), config.sample_batch_size, device)
    return images.reshape(len(classes), 4, *images.shape[1:])


def main():
    config, data = parse_config([EvaluationConfig, DataConfig], __doc__)
    models = named_folders(config.models)
    # Said outright: left to itself it sees one process where several were launched on CPUs.
    state = PartialState(cpu=not torch.cuda.is_available())
    output_dir = check_writable(config.output_dir, "output_dir")
    feature_net, net_name = open_feature_net(config.feature_net, state.device)
    shape = sample_shape(open_model(next(iter(models.values())), config, state.device).model)
    reference, against = open_reference(config, data, shape, feature_net, net_name, state.device)
    described = describe_feature_net(feature_net) if isinstance(feature_net, FeatureNet) else net_name
    lpips = open_lpips() if config.lpips_conditions else None

    made, rows, samples = [], [], {}
    for name, path in models.items():
        model = open_model(path, config, state.device)
        masks = None
        if isinstance(reference, ImageDataset):
            # Refuses parts without enough images before any is generated.
            labels = torch.arange(config.num_images) % model.num_classes
            masks = part_masks(labels, reference.labels, model.parts)
        made.append((measure_model(model, name, config, feature_net, net_name, state), masks))
        if state.is_main_process:
            samples[name] = images_of(model, spread(model.num_classes, 10), config, state.device)
            row = model_row(name, path, model, sample_shape(model.model), state.device)
            if lpips is not None:
                several = images_of(model, spread(model.num_classes, config.lpips_conditions), config, state.device)
                row["lpips"] = distance_between_seeds(several, lpips)
            rows.append(row)
        # The other processes wait meanwhile: beside them, one image would take longer.
        state.wait_for_everyone()
    if not state.is_main_process:
        return
    real = None
    if isinstance(reference, ImageDataset):
        real = torch.cat(list(dataset_features(feature_net, reference, config.sample_batch_size)))
    for row, ((columns, speed), masks) in zip(rows, made):
        row |= quality(columns, reference, real, masks)
        row["images_per_second"] = speed

    protocol = f"{config.num_images} images per model against {against}; {described}"
    table = save_results(output_dir, rows, protocol, config)
    classes = [f"class {c}" for c in spread(model.num_classes, 10)]
    plot_samples(samples, output_dir / "samples.png", classes)
    plot_learning_curves({name: Path(path) for name, path in models.items()}, output_dir / "learning_curves.png")
    shutil.rmtree(output_dir / UNFINISHED)
    print(table)
    print(json.dumps({"files": sorted(p.name for p in output_dir.iterdir())}))


if __name__ == "__main__":
    run_script(main)
