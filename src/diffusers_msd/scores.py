# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Every metric of a model's images, overall and for each part of a partition, and the table of several models."""

from pathlib import Path
from typing import Optional

import torch
from torch import nn

from .feature_net import extract_features
from .files import atomic_write, write_json
from .metrics import (
    cross_seed_diversity,
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    not_finite,
    precision_recall,
)


# Neighbours whose distances precision and recall, and density and coverage, take for radii.
_MANIFOLD_K, _COVERAGE_K = 3, 5


def evaluate_images(
    feature_net: nn.Module,
    generated: torch.Tensor,
    labels: torch.Tensor,
    real_images: torch.Tensor,
    real_labels: torch.Tensor,
    parts: Optional[dict[int, torch.Tensor]] = None,
) -> dict:
    """Every metric of a set of generated images, over all classes and over each part of a partition.

    Args:
        feature_net: any module that gives (features `[B, D]`, logits `[B, num_classes]`).
        generated: `[N, C, H, W]` float in [-1, 1].
        labels: `[N]` integer, the class asked for, in [0, num_classes).
        real_images: `[M, C, H, W]` float in [-1, 1].
        real_labels: `[M]` integer, in [0, num_classes).
        parts: classes of each part, `{k: LongTensor}`; each part needs 4 generated and 6 real images.

    Returns:
        What `evaluate_features` gives; `class_accuracy` is the share of generated images classified as asked.

    Raises:
        TypeError: an argument is not a tensor, or labels are not integers.
        ValueError: wrong shapes or lengths, values not finite, labels out of range, or a part with too few images.
    """
    _check_images(generated, labels, "generated", "labels")
    _check_images(real_images, real_labels, "real_images", "real_labels")
    labels, real_labels = labels.cpu(), real_labels.cpu()
    masks = part_masks(labels, real_labels, parts)
    num_classes = extract_features(feature_net, generated[:1])[1].shape[1]
    for name, have in (("labels", labels), ("real_labels", real_labels)):
        if have.min() < 0 or have.max() >= num_classes:
            raise ValueError(f"`{name}` must lie in [0, {num_classes}), got {have.min()} to {have.max()}.")

    features, logits = extract_features(feature_net, generated)
    real_features, _ = extract_features(feature_net, real_images)
    correct = logits.argmax(dim=1) == labels
    columns = {"features": features, "logits": logits, "labels": labels, "class_accuracy": correct}
    return evaluate_features(columns, real_features, masks)


def part_masks(
    labels: torch.Tensor, real_labels: torch.Tensor, parts: Optional[dict[int, torch.Tensor]] = None
) -> dict[Optional[int], tuple[torch.Tensor, torch.Tensor]]:
    """Which generated and which real images belong to each part, and under None all of them.

    Args:
        labels, real_labels: `[N]` and `[M]` integer, on the CPU.
        parts: classes of each part, `{k: LongTensor}`.

    Returns:
        Part to boolean `[N]` and `[M]`.

    Raises:
        ValueError: fewer than 4 generated or 6 real images, in all or in a part: some metric is not defined then.
    """
    masks = {None: (torch.ones_like(labels, dtype=torch.bool), torch.ones_like(real_labels, dtype=torch.bool))}
    for part, classes in (parts or {}).items():
        masks[part] = tuple(torch.isin(have, classes.cpu()) for have in (labels, real_labels))
    for part, both in masks.items():
        for name, least, mask in zip(("generated", "real_images"), (_MANIFOLD_K + 1, _COVERAGE_K + 1), both):
            if mask.sum() < least:
                where = "" if part is None else f" of the classes in `parts[{part}]`"
                raise ValueError(f"`{name}` must hold >= {least} images{where}, got {int(mask.sum())}.")
    return masks


def evaluate_features(
    generated: dict[str, torch.Tensor],
    real: torch.Tensor,
    masks: dict[Optional[int], tuple[torch.Tensor, torch.Tensor]],
) -> dict:
    """Every metric, from what was measured of each image.

    Args:
        generated: as `metrics_without_real` takes it.
        real: features `[M, D]`.
        masks: of `part_masks`.

    Returns:
        `fd`, `kid`, `kid_std`, `precision`, `recall` (k = 3), `density`, `coverage` (k = 5), those of
        `metrics_without_real`, `num_real`; and, if there are parts, `parts: {k: the same keys}`.
    """
    results = {
        part: _metrics({name: column[mine] for name, column in generated.items()}, real[in_real])
        for part, (mine, in_real) in masks.items()
    }
    overall = results.pop(None)
    return {**overall, "parts": results} if results else overall


def _metrics(generated: dict[str, torch.Tensor], real: torch.Tensor) -> dict:
    features = generated["features"]
    kid, kid_std = kernel_distance(real, features)
    precision, recall = precision_recall(real, features, _MANIFOLD_K)
    density, coverage = density_coverage(real, features, _COVERAGE_K)
    return {
        "fd": frechet_distance(real, features),
        "kid": kid,
        "kid_std": kid_std,
        "precision": precision,
        "recall": recall,
        "density": density,
        "coverage": coverage,
        **metrics_without_real(generated),
        "num_real": len(real),
    }


def metrics_without_real(generated: dict[str, torch.Tensor]) -> dict:
    """The metrics that need no real images.

    Args:
        generated: what was measured of N generated images: `features` `[N, D]`; `labels` `[N]` integer, the condition;
            `logits` `[N, C]` of a classifier, if there is one; any other column `[N]` is a number per image.

    Returns:
        The mean of each column of numbers under its name, `inception_score` (of all images at once) if there are
        logits, `diversity` if some condition has two images, `num_generated`.
    """
    numbers = {name: c.double().mean().item() for name, c in generated.items() if name not in _ARRAYS}
    scores = {"inception_score": inception_score(generated["logits"])[0]} if "logits" in generated else {}
    if len(generated["labels"].unique()) < len(generated["labels"]):
        scores["diversity"] = cross_seed_diversity(generated["features"], generated["labels"])
    return {**numbers, **scores, "num_generated": len(generated["labels"])}


_ARRAYS = {"features", "logits", "labels"}


def _check_images(images: torch.Tensor, labels: torch.Tensor, images_name: str, labels_name: str) -> None:
    for name, value in ((images_name, images), (labels_name, labels)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"`{name}` must be a torch.Tensor, got {type(value)}.")
    shape = tuple(images.shape)
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(f"`{images_name}` must be a float tensor [N, C, H, W], got {images.dtype}, shape {shape}.")
    if bad := not_finite(images):
        raise ValueError(f"`{images_name}` must be finite, got NaN or infinity in {bad}.")
    if labels.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        raise TypeError(f"`{labels_name}` must hold integers, got dtype {labels.dtype}.")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"`{labels_name}` must have shape [{shape[0]}], got {tuple(labels.shape)}.")


# A column of the table: a row of results -> its cell, empty where there is nothing to say. What is not here (density,
# coverage, Inception score, all but the FD of parts) is in results.json.
COLUMNS = {
    "FD": lambda r: f"{r['fd']:.4f}",
    "KID": lambda r: f"{r['kid']:.2f} ± {r['kid_std']:.2f}" if "kid" in r else "",
    "class accuracy": lambda r: (
        f"{100 * r['class_accuracy']:.2f} %" if "class_accuracy" in r and "retrieval@5" not in r else ""
    ),
    "retrieval@1": lambda r: f"{100 * r['class_accuracy']:.2f} %" if "retrieval@5" in r else "",
    "retrieval@5": lambda r: f"{100 * r['retrieval@5']:.2f} %" if "retrieval@5" in r else "",
    "CLIP score": lambda r: f"{r['clip_score']:.2f}" if "clip_score" in r else "",
    "precision": lambda r: f"{r['precision']:.3f}" if "precision" in r else "",
    "recall": lambda r: f"{r['recall']:.3f}" if "recall" in r else "",
    "diversity": lambda r: f"{r['diversity']:.3f}" if "diversity" in r else "",
    "LPIPS between seeds": lambda r: f"{r['lpips']:.3f}" if "lpips" in r else "",
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


def save_results(output_dir: Path, rows: list[dict], protocol: str, config) -> str:
    """Writes results.json (everything) and results.md (the table and the protocol).

    Args:
        output_dir: a folder.
        rows: a model each.
        protocol: one line that says what the numbers are of.
        config: the settings, a dataclass.

    Returns:
        The text of results.md.
    """
    text = f"{markdown_table(rows)}\n\n{protocol}\n"
    write_json(output_dir / "results.json", {"rows": rows, "protocol": protocol, "config": vars(config)})
    atomic_write(output_dir / "results.md", text)
    return text
