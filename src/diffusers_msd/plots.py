# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Plots of results, with matplotlib."""

from pathlib import Path

import torch

from .grids import image_grid
from .runs import read_logs


def _figure(*args, **kwargs):
    import matplotlib

    # Results are files; no display is needed.
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt.subplots(*args, **kwargs)


def plot_samples(samples: dict[str, torch.Tensor], path: Path):
    """Saves one picture: a row per class, a block of columns per model, from the same noise.

    Args:
        samples: by model name [num_classes, n, C, H, W] in [-1, 1], the same shape for all.
        path: of the PNG file.
    """
    grids = {name: image_grid(images.flatten(0, 1), columns=images.shape[1]) for name, images in samples.items()}
    rows = len(next(iter(samples.values())))
    width, height = next(iter(grids.values())).size
    size = (len(grids) * (width / 100 + 0.2) + 0.4, height / 100 + 0.4)
    figure, axes = _figure(1, len(grids), figsize=size, squeeze=False, layout="tight")
    for axis, (name, grid) in zip(axes[0], grids.items()):
        axis.imshow(grid, interpolation="nearest")
        axis.set_title(name, fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([height / rows * (i + 0.5) for i in range(rows)], labels=range(rows), fontsize=7)
    axes[0][0].set_ylabel("class", fontsize=8)
    figure.savefig(path, dpi=150)


def plot_learning_curves(runs: dict[str, Path], path: Path):
    """Saves the validation distance and the fake score's loss over the iterations of each run's students.

    Stages follow each other on the axis. Runs without logs are left out; nothing is written if none has any.

    Args:
        runs: folders by name.
        path: of the PNG file.
    """
    curves = {}
    for name, folder in runs.items():
        for student, points in read_logs(folder).items():
            curves[f"{name}, {student.replace('_', ' ')}"] = points
    if not curves:
        return
    panels = {"validation/fd": "Fréchet distance of the part", "critic/fake_score": "fake-score loss"}
    figure, axes = _figure(1, len(panels), figsize=(10, 4), layout="tight")
    for axis, (key, title) in zip(axes, panels.items()):
        for name, points in curves.items():
            chosen = [(p["position"], p[key]) for p in points if key in p]
            if chosen:
                axis.plot(*zip(*chosen), marker=".", label=name)
        axis.set_xlabel("iterations over all stages")
        axis.set_title(title, fontsize=10)
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=120)
