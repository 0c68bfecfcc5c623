# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Plots of results, with matplotlib."""

from pathlib import Path

import torch

from .grids import image_grid
from .runs import read_logs


def subplots(rows: int, columns: int, figsize: tuple[float, float], **kwargs):
    """A figure and its axes, as of `matplotlib.pyplot.subplots`; needs no display, and need not be closed.

    Args:
        rows, columns: of axes.
        figsize: width and height in inches.
        kwargs: of `matplotlib.figure.Figure.subplots`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=figsize, layout="tight")
    return figure, figure.subplots(rows, columns, **kwargs)


def plot_samples(samples: dict[str, torch.Tensor], path: Path, conditions: list[str] | None = None):
    """Saves one picture: a row per condition, a block of columns per model, from the same noise.

    Args:
        samples: by model name [rows, n, C, H, W] in [-1, 1], the same number of rows for all.
        path: of the PNG file.
        conditions: what the rows show; default: the classes 0, 1, ...
    """
    grids = {name: image_grid(images.flatten(0, 1), columns=images.shape[1]) for name, images in samples.items()}
    rows = len(next(iter(samples.values())))
    height = next(iter(grids.values())).height
    names = [str(name) for name in (range(rows) if conditions is None else conditions)]
    widths = [grid.width for grid in grids.values()]
    # Names of 7 points take some 0.055 inches a letter.
    size = (sum(widths) / 100 + 0.2 * len(grids) + 0.3 + 0.055 * max(map(len, names)), height / 100 + 0.4)
    figure, axes = subplots(1, len(grids), figsize=size, squeeze=False, width_ratios=widths)
    for axis, (name, grid) in zip(axes[0], grids.items()):
        axis.imshow(grid, interpolation="nearest")
        axis.set_title(name, fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    axes[0][0].set_yticks([height / rows * (i + 0.5) for i in range(rows)], labels=names, fontsize=7)
    if conditions is None:
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
    figure, axes = subplots(1, len(panels), figsize=(10, 4))
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


def plot_margins(router, embeddings: torch.Tensor, path: Path):
    """Saves how sure a router is: a histogram of the margins of each part, and the sizes of the parts.

    What lies near 0 is ambiguous: a little beside, another student would answer.

    Args:
        router: an `EmbeddingRouter` of two or more students.
        embeddings: [N, D] of the prompts, as for a call of the router.
        path: of the PNG file.

    Raises:
        ValueError: the router has one student, and so no cuts.
    """
    if router.num_students == 1:
        raise ValueError("router: with one student there are no cuts to be near to; two or more are needed")
    part, margins = router(embeddings=embeddings), router.margins(embeddings)
    students = range(router.num_students)
    figure, (left, right) = subplots(1, 2, figsize=(9, 3.5))
    colors = [f"C{k % 10}" for k in students]
    left.hist(
        [margins[part == k].numpy() for k in students],
        bins=50,
        range=(0, float(margins.max())),
        histtype="step",
        color=colors,
        label=[f"student {k}" for k in students],
    )
    left.set_xlabel("margin: distance to the nearest cut")
    left.set_ylabel("prompts")
    left.legend(fontsize=7, reverse=True)
    sizes = torch.bincount(part, minlength=router.num_students)
    right.bar(students, sizes.numpy(), color=colors)
    right.axhline(len(part) / router.num_students, color="black", linestyle="--", linewidth=1)
    right.set_xticks(students)
    right.set_xlabel("student")
    right.set_title("part sizes (dashed: equal parts)", fontsize=10)
    figure.savefig(path, dpi=120)


def plot_series(panels: dict[str, dict[str, dict[float, tuple[float, float]]]], x_label: str, path: Path):
    """Saves a panel of lines with error bars for each entry, the x axis logarithmic.

    Args:
        panels: {title: {name of a line: {x: (value, its error)}}}, x > 0.
        x_label: of every panel.
        path: of the PNG file.
    """
    figure, axes = subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False)
    for axis, (title, lines) in zip(axes[0], panels.items()):
        for name, points in lines.items():
            values, errors = zip(*points.values())
            axis.errorbar(list(points), values, errors, marker=".", capsize=2, label=name)
        axis.set_xscale("log")
        axis.set_xticks(ticks := sorted({x for points in lines.values() for x in points}), labels=map(str, ticks))
        axis.minorticks_off()
        axis.set_xlabel(x_label)
        axis.set_title(title, fontsize=10)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=100)
