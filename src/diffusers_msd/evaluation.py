# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""What evaluation scripts share: which models, images from given noise, and what is measured of each image."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from accelerate import PartialState
from torch import nn
from tqdm.auto import tqdm

from .account import hardware, latency, storage_bytes
from .data import ImageDataset
from .feature_net import FeatureNet, weights_hash
from .files import load_model
from .inception import InceptionFeatures
from .metrics import not_finite
from .objectives import DISTANCES
from .pairs import pair_noise, pair_seeds
from .runs import training_record
from .shards import Shards


# Folder beside the results of an evaluation: what is measured of each image, until all of it is there.
UNFINISHED = ".features"


class EvaluatedModel(Protocol):
    """A teacher or a pipeline: images from noise, and how many parameters answer one call and are there in all."""

    parameters: int
    parameters_total: int

    def sample(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Noise [B, C, H, W] and labels [B] on the device -> images [B, C', H', W'], about [-1, 1]."""


def named_folders(entries: list[str]) -> dict[str, str]:
    """Reads `name=folder` arguments (no = in the folder; a Hub id is allowed) as {name: folder}.

    Raises:
        FileNotFoundError, ValueError: an entry has no name, or is neither a local folder nor a Hub id.
    """
    folders = {}
    for entry in entries:
        name, found, path = entry.rpartition("=")
        if not found or not name:
            raise ValueError(f"models: name=folder expected, got {entry!r}")
        folders[name] = path
    for path in folders.values():
        if not Path(path).is_dir() and len(Path(path).parts) != 2:
            raise FileNotFoundError(f"models: {path} is neither a local folder nor a Hub id")
    return folders


@torch.no_grad()
def generate(
    sample: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    z: torch.Tensor,
    labels: torch.Tensor,
    batch_size: int,
    device: str,
) -> tuple[torch.Tensor, float]:
    """Makes images from given noise.

    Args:
        sample: noise [B, C, H, W] and labels [B] on the device -> images [B, C', H', W'], about [-1, 1].
        z: unit-variance noise [N, C, H, W].
        labels: [N], which condition.
        batch_size, device: of the calls.

    Returns:
        All images, clamped to [-1, 1], on the CPU; images per second after a warm-up batch.
    """
    sample(z[:batch_size].to(device), labels[:batch_size].to(device))
    began = time.perf_counter()
    batches = [sample(a.to(device), b.to(device)).cpu() for a, b in zip(z.split(batch_size), labels.split(batch_size))]
    return torch.cat(batches).clamp(-1, 1), len(z) / (time.perf_counter() - began)


def open_feature_net(name: str, device: str | torch.device) -> tuple[nn.Module, str]:
    """Loads what makes the features: `inception`, or the folder of a `FeatureNet`.

    Returns:
        A module that gives features [B, D] and logits [B, num_classes or 0]; its name with the hash of its weights.

    Raises:
        FileNotFoundError, ValueError: there is no such folder, or it is damaged.
        ImportError: Inception without the extra `fid`.
    """
    net = InceptionFeatures() if name == "inception" else load_model(FeatureNet, name, "feature_net")
    return net.to(device).eval(), f"{type(net).__name__} {weights_hash(net)}"


@torch.no_grad()
def measure_images(
    sample: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    measure: Callable[[torch.Tensor, torch.Tensor], dict[str, torch.Tensor]],
    folder: Path,
    index: dict,
    image_shape: tuple[int, ...],
    batch_size: int,
    state: PartialState,
) -> tuple[dict[str, torch.Tensor], float | None] | None:
    """What is measured of generated images, on any number of processes; the images are not kept.

    Image i has condition i mod num_classes and a seed of its own. A batch always holds the same images, and is made by
    one process: the numbers are the same, bit for bit, for any number of processes. They are files until all are there,
    so an interrupted evaluation goes on.

    Args:
        sample: noise [B, C, H, W] and labels [B] on the device -> images [B, C', H', W'], about [-1, 1].
        measure: images in [-1, 1] and labels [B], on the device -> named columns [B, ...], as
            `scores.metrics_without_real` takes them, without the labels.
        folder: of the files, shared by the processes; its name is that of the model.
        index: what the images are made of: "num_images", "num_classes", "seed", and what else decides on the numbers.
        image_shape: of the noise, (C, H, W).
        batch_size: images at a time.
        state: this process, and how many there are.

    Returns:
        In the main process: the columns [N, ...] with "labels", on the CPU; images per second of this process (None if
        all were there already). In the others None.

    Raises:
        ValueError: the folder holds numbers of other images (the setting is named), or an image is not finite.
    """
    made = seconds = 0.0
    num_images, num_classes = index["num_images"], index["num_classes"]

    def make_batch(rows: range, bar: tqdm | None = None):
        nonlocal made, seconds
        labels = (torch.arange(rows.start, rows.stop) % num_classes).to(state.device)
        z = pair_noise(pair_seeds(index["seed"], rows), image_shape).to(state.device)
        began = time.perf_counter()
        # To the CPU, so that the device has finished when the clock is read.
        images = sample(z, labels).cpu()
        made, seconds = made + len(rows), seconds + time.perf_counter() - began
        if bad := not_finite(images, rows.start):
            raise ValueError(f"models: {folder.name} made NaN or infinity in {bad}")
        columns = measure(images.clamp(-1, 1).to(state.device), labels)
        if bar is not None:
            bar.update(len(rows))
        return {name: column.cpu() for name, column in columns.items()}, {}

    # A file is a batch.
    index = {**index, "sample_batch_size": batch_size, "shard_size": batch_size}
    shards = Shards(folder, index, num_images, "features", "output_dir", "the same script")
    # A first call is slow; it is not counted.
    make_batch(range(min(batch_size, num_images)))
    made = seconds = 0.0
    shards.make(make_batch, state.process_index, state.num_processes, state.is_local_main_process)
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    tensors = [tensors for tensors, _ in shards.read_all()]
    columns = {name: torch.cat([part[name] for part in tensors]) for name in tensors[0]}
    return {**columns, "labels": torch.arange(num_images) % num_classes}, made / seconds if made else None


@torch.no_grad()
def dataset_features(feature_net: nn.Module, dataset: ImageDataset, batch_size: int = 256) -> Iterator[torch.Tensor]:
    """Features [B, D] of a data set's images, in order, batch by batch, on the CPU."""
    device = next(feature_net.parameters()).device
    for start in tqdm(range(0, len(dataset), batch_size), desc="features of the data set", unit="batch"):
        batch = dataset.__getitems__(range(start, min(start + batch_size, len(dataset))))
        yield feature_net(batch["images"].to(device))[0].cpu()


def spread(num_conditions: int, wanted: int) -> torch.Tensor:
    """So many conditions, or all there are, at equal distances."""
    return torch.linspace(0, num_conditions - 1, min(num_conditions, wanted)).long()


@torch.no_grad()
def model_row(name: str, path: str, model: EvaluatedModel, image_shape: tuple[int, ...], device: torch.device) -> dict:
    """A model's row in the results, before its quality: what it cost, and what it costs to keep and to call.

    Args:
        name: of the row.
        path: the model's folder, or Hub id.
        model: loaded from it.
        image_shape: of the noise, (C, H, W).
        device: of the calls.

    Returns:
        "model", "parameters" (of one call) and "parameters_total"; "training_seconds" of all students, or None;
        "training", see `training_record`; "storage_bytes", or None for a Hub id; "latency" of one image, see
        `account.latency`, with "hardware".
    """
    z = pair_noise(pair_seeds(0, range(1)), image_shape).to(device)
    label = torch.zeros(1, dtype=torch.long, device=device)
    record = training_record(Path(path))
    return {
        "model": name,
        "parameters": model.parameters,
        "parameters_total": model.parameters_total,
        "training_seconds": record.get("seconds"),
        "training": record,
        "storage_bytes": storage_bytes(path),
        "latency": {**latency(lambda: model.sample(z, label)), "hardware": hardware(device)},
    }


def open_lpips() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """LPIPS (VGG) between images [B, C, H, W] in [-1, 1] -> [B].

    Raises:
        ImportError: without the extra `lpips`.
    """
    try:
        return DISTANCES["lpips"]()
    except ImportError as error:
        raise ImportError("lpips_conditions: needs the extra lpips: pip install 'diffusers_msd[lpips]'") from error


@torch.no_grad()
def distance_between_seeds(images: torch.Tensor, distance: Callable) -> float:
    """Mean distance between two images of the same condition: over the pairs of each condition, then over conditions.

    Args:
        images: [conditions, n, C, H, W] in [-1, 1], n >= 2.
        distance: [B, C, H, W], [B, C, H, W] -> [B], such as that of `open_lpips`.
    """
    first, second = torch.combinations(torch.arange(images.shape[1])).T
    means = [distance(of_one[first], of_one[second]).double().mean() for of_one in images]
    return torch.stack(means).mean().item()
