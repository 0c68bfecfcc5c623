# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""What evaluation scripts share: which models, images from given noise, and the table of results."""

import time
from collections.abc import Callable
from pathlib import Path

import torch


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


# A column of the table: a row of results -> its cell, empty where there is nothing to say.
COLUMNS = {
    "FD": lambda r: f"{r['fd']:.4f}",
    "KID": lambda r: f"{r['kid']:.2f} ± {r['kid_std']:.2f}",
    "class accuracy": lambda r: f"{100 * r['class_accuracy']:.2f} %" if "retrieval@5" not in r else "",
    "retrieval@1": lambda r: f"{100 * r['class_accuracy']:.2f} %" if "retrieval@5" in r else "",
    "retrieval@5": lambda r: f"{100 * r['retrieval@5']:.2f} %" if "retrieval@5" in r else "",
    "precision": lambda r: f"{r['precision']:.3f}",
    "recall": lambda r: f"{r['recall']:.3f}",
    "retrieval@1 of each part": lambda r: ", ".join(
        f"{100 * part['class_accuracy']:.1f} %" for part in r.get("parts", {}).values() if "retrieval@5" in r
    ),
    "FD of each part": lambda r: ", ".join(f"{part['fd']:.4f}" for part in r.get("parts", {}).values()),
    "parameters per student": lambda r: f"{r['parameters']:,}",
    "in total": lambda r: f"{r['parameters_total']:,}",
    "training s": lambda r: f"{r['training_seconds']:.0f}" if r["training_seconds"] else "",
    "images / s": lambda r: f"{r['images_per_second']:.0f}",
}


def markdown_table(rows: list[dict]) -> str:
    """The results, a model a row; a column appears if some row has something to say in it."""
    names = [name for name, cell in COLUMNS.items() if any(cell(r) for r in rows)]
    lines = ["| model | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {r['model']} | " + " | ".join(COLUMNS[n](r) or "-" for n in names) + " |" for r in rows]
    return "\n".join(lines)
