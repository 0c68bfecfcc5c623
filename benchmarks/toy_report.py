# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Distances, table and picture of `toy.py`."""

from pathlib import Path

import torch
from pipeline import table
from verdict import mean_and_error, verdict

from diffusers_msd.plots import subplots


BIN = 0.02
EXTENT = 0.8
# Name, heading, decimals.
METRICS = {"l1": ("l1", 4), "histogram_l1": ("histogram l1", 3), "energy": ("energy x 1000", 3)}


def energy_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| for samples x [n, 2] and y [m, 2] independent of each other.

    The unbiased estimate (U-statistic: a sample is not compared with itself), so it may be a little below 0.

    Source: Szekely and Rizzo 2013, "Energy statistics: a class of statistics based on distances".
    """

    def within(a: torch.Tensor) -> torch.Tensor:
        return torch.cdist(a, a).sum() / (len(a) * (len(a) - 1))

    return (2 * torch.cdist(x, y).mean() - within(x) - within(y)).item()


def histogram_l1(x: torch.Tensor, y: torch.Tensor) -> float:
    """sum_b |p_b - q_b| over square bins of side `BIN`, in [0, 2], for samples x and y [n, 2].

    What lies outside [-EXTENT, EXTENT] counts in the bin at the border.
    """
    side = round(2 * EXTENT / BIN)

    def shares(a: torch.Tensor) -> torch.Tensor:
        column, row = ((a + EXTENT) / BIN).floor().long().clamp(0, side - 1).unbind(dim=1)
        return torch.bincount(side * row + column, minlength=side**2) / len(a)

    return (shares(x) - shares(y)).abs().sum().item()


def report(rows: list[dict], floors: dict[str, dict[str, float]]) -> str:
    """A Markdown table with its verdict per teacher and stage.

    Args:
        rows: results of one teacher, stage, K, divisor of the budget and seed each.
        floors: by teacher the distances of its own samples from other noise.
    """
    return "\n\n".join(
        f"**{teacher} teacher, {stage.upper()}**\n\n{_table(rows, floors[teacher], teacher, stage)}"
        for teacher in floors
        for stage in dict.fromkeys(row["stage"] for row in rows)
    ) + "\n"  # fmt: skip


def _table(rows: list[dict], floor: dict[str, float], teacher: str, stage: str) -> str:
    rows = [row for row in rows if (row["teacher"], row["stage"]) == (teacher, stage)]
    students = sorted({row["K"] for row in rows})
    budgets = {"equal per student": lambda k: 1, "equal in total": lambda k: k}
    header, verdicts = ["K"], []
    lines = [[str(k)] for k in students]
    last = ["teacher, other noise"]
    for budget, divisor in budgets.items():
        found = []
        for metric, (heading, digits) in METRICS.items():
            scale = 1000 if metric == "energy" else 1
            values = {
                str(k): [scale * row[metric] for row in rows if (row["K"], row["divisor"]) == (k, divisor(k))]
                for k in students
            }
            header.append(f"{heading}, {budget}")
            for line in lines:
                line.append(mean_and_error(values[line[0]], digits))
            last.append("-" if metric == "l1" else f"{scale * floor[metric]:.{digits}f}")
            found.append(f"{heading.removesuffix(' x 1000')} {verdict(values, [str(k) for k in reversed(students)])}")
        verdicts.append(f"{budget}: {', '.join(found)}")
    return f"{table(header, [*lines, last])}\n\nOrder reproduced (more students are better): {'; '.join(verdicts)}."


def plot_students(panels: dict[str, dict[str, torch.Tensor]], path: Path, shown: int = 150):
    """Saves a grid of scatter plots, coloured by student.

    Args:
        panels: samples [clusters, n, 2] by row and by column; a column named "K = ..." is coloured by its K students.
        path: of the PNG file.
        shown: samples of each cluster.
    """
    columns = len(next(iter(panels.values())))
    figure, axes = subplots(len(panels), columns, (2.2 * columns, 2.2 * len(panels)), squeeze=False)
    for line, (row, samples) in zip(axes, panels.items()):
        for axis, (column, x) in zip(line, samples.items()):
            k = int(column.removeprefix("K = ")) if column.startswith("K = ") else 1
            for cluster, points in enumerate(x):
                color = "black" if column == "teacher" else f"C{cluster * k // len(x)}"
                axis.plot(*points[:shown].T, ".", markersize=1, color=color)
            axis.set(xlim=(-0.7, 0.7), ylim=(-0.7, 0.7), xticks=[], yticks=[], aspect="equal")
            axis.set_title(column, fontsize=8)
        line[0].set_ylabel(row, fontsize=8)
    figure.savefig(path, dpi=80)
