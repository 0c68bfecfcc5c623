# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""What evaluation scripts share: which models, images and their features from given noise, and the table of results."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import PartialState
from torch import nn
from tqdm.auto import tqdm

from .account import hardware, latency, storage_bytes
from .data import ImageDataset
from .files import load_model
from .inception import InceptionFeatures
from .metrics import FeatureNet, weights_hash
from .pairs import pair_noise, pair_seeds
from .runs import training_record
from .shards import Shards


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
def generate_features(
    sample: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    feature_net: nn.Module,
    folder: Path,
    index: dict,
    image_shape: tuple[int, ...],
    batch_size: int,
    state: PartialState,
) -> tuple[torch.Tensor, torch.Tensor | None, float | None] | None:
    """Features of generated images, on any number of processes; the images are not kept.

    Image i has class i mod num_classes and a seed of its own. A batch always holds the same images, and is made by one
    process: the features are the same, bit for bit, for any number of processes. They are files until all are there, so
    an interrupted evaluation goes on.

    Args:
        sample: noise [B, C, H, W] and labels [B] on the device -> images [B, C', H', W'], about [-1, 1].
        feature_net: gives (features [B, D], logits [B, num_classes or 0]).
        folder: of the files, shared by the processes.
        index: what the images are made of: "num_images", "num_classes", "seed", and what else decides on them.
        image_shape: of the noise, (C, H, W).
        batch_size: images at a time.
        state: this process, and how many there are.

    Returns:
        In the main process: features float32 [N, D]; which images are classified as asked, boolean [N] (None without
        logits); images per second of this process (None if all were there already). In the others None.

    Raises:
        ValueError: the folder holds features of other images (the setting is named).
    """
    made = seconds = 0.0

    def make_batch(rows: range, bar: tqdm | None = None):
        nonlocal made, seconds
        labels = torch.arange(rows.start, rows.stop) % index["num_classes"]
        z = pair_noise(pair_seeds(index["seed"], rows), image_shape)
        began = time.perf_counter()
        # To the CPU, so that the device has finished when the clock is read.
        images = sample(z.to(state.device), labels.to(state.device)).clamp(-1, 1).cpu()
        made, seconds = made + len(rows), seconds + time.perf_counter() - began
        features, logits = (output.cpu() for output in feature_net(images.to(state.device)))
        if bar is not None:
            bar.update(len(rows))
        return {"features": features, **({"correct": logits.argmax(dim=1) == labels} if logits.shape[1] else {})}, {}

    # A file is a batch.
    index = {**index, "sample_batch_size": batch_size, "shard_size": batch_size}
    shards = Shards(folder, index, index["num_images"], "features", "output_dir", "training_scripts/evaluate.py")
    # A first call is slow; it is not counted.
    make_batch(range(min(batch_size, index["num_images"])))
    made = seconds = 0.0
    shards.make(make_batch, state.process_index, state.num_processes, state.is_local_main_process)
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    tensors = [tensors for tensors, _ in shards.read_all()]
    columns = {name: torch.cat([part[name] for part in tensors]) for name in tensors[0]}
    return columns["features"], columns.get("correct"), made / seconds if made else None


@torch.no_grad()
def dataset_features(feature_net: nn.Module, dataset: ImageDataset, batch_size: int = 256) -> Iterator[torch.Tensor]:
    """Features [B, D] of a data set's images, in order, batch by batch, on the CPU."""
    device = next(feature_net.parameters()).device
    for start in tqdm(range(0, len(dataset), batch_size), desc="features of the data set", unit="batch"):
        batch = dataset.__getitems__(range(start, min(start + batch_size, len(dataset))))
        yield feature_net(batch["images"].to(device))[0].cpu()


@torch.no_grad()
def model_cost(
    path: str,
    sample: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    image_shape: tuple[int, ...],
    device: torch.device,
) -> dict:
    """What a model cost, and what it costs to keep and to call; entries of its row in the results.

    Args:
        path: its folder, or Hub id.
        sample: noise [1, C, H, W] and labels [1] on the device -> images.
        image_shape: of the noise, (C, H, W).
        device: of the calls.

    Returns:
        "training_seconds" of all students, or None; "training", see `training_record`; "storage_bytes", or None for a
        Hub id; "latency" of one image, see `account.latency`, with "hardware".
    """
    z = pair_noise(pair_seeds(0, range(1)), image_shape).to(device)
    label = torch.zeros(1, dtype=torch.long, device=device)
    record = training_record(Path(path))
    return {
        "training_seconds": record.get("seconds"),
        "training": record,
        "storage_bytes": storage_bytes(path),
        "latency": {**latency(lambda: sample(z, label)), "hardware": hardware(device)},
    }


# A column of the table: a row of results -> its cell, empty where there is nothing to say.
COLUMNS = {
    "FD": lambda r: f"{r['fd']:.4f}",
    "KID": lambda r: f"{r['kid']:.2f} ± {r['kid_std']:.2f}" if "kid" in r else "",
    "class accuracy": lambda r: (
        f"{100 * r['class_accuracy']:.2f} %" if "class_accuracy" in r and "retrieval@5" not in r else ""
    ),
    "retrieval@1": lambda r: f"{100 * r['class_accuracy']:.2f} %" if "retrieval@5" in r else "",
    "retrieval@5": lambda r: f"{100 * r['retrieval@5']:.2f} %" if "retrieval@5" in r else "",
    "precision": lambda r: f"{r['precision']:.3f}" if "precision" in r else "",
    "recall": lambda r: f"{r['recall']:.3f}" if "recall" in r else "",
    "retrieval@1 of each part": lambda r: ", ".join(
        f"{100 * part['class_accuracy']:.1f} %" for part in r.get("parts", {}).values() if "retrieval@5" in r
    ),
    "FD of each part": lambda r: ", ".join(f"{part['fd']:.4f}" for part in r.get("parts", {}).values()),
    "parameters per student": lambda r: f"{r['parameters']:,}",
    "in total": lambda r: f"{r['parameters_total']:,}",
    "training s": lambda r: f"{r['training_seconds']:.0f}" if r["training_seconds"] else "",
    "training TFLOP, with pairs": lambda r: (
        f"{r['training']['flops_with_pairs'] / 1e12:,.2f}" if "flops_with_pairs" in r.get("training", {}) else ""
    ),
    "storage MB": lambda r: f"{r['storage_bytes'] / 1e6:.2f}" if r.get("storage_bytes") else "",
    "ms at batch 1 (wall)": lambda r: f"{r['latency']['wall_ms']:.1f}" if "latency" in r else "",
    "images / s": lambda r: f"{r['images_per_second']:.0f}" if r["images_per_second"] else "",
}


def markdown_table(rows: list[dict]) -> str:
    """The results, a model a row; a column appears if some row has something to say in it."""
    names = [name for name, cell in COLUMNS.items() if any(cell(r) for r in rows)]
    lines = ["| model | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {r['model']} | " + " | ".join(COLUMNS[n](r) or "-" for n in names) + " |" for r in rows]
    return "\n".join(lines)
