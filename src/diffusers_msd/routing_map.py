# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Who answers what, as a picture: conditions in a plane, coloured by their student."""

import math
import textwrap
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import UNet2DModel

from .denoiser import num_classes
from .pipeline_msd import MultiStudentPipeline
from .plots import subplots


# So many conditions are named in the picture; of more, the names would hide the points.
NAMED = 40
# Ten colours in each of seven shapes tell 64 students apart.
MARKERS = "osD^vP*"
# Prompts embedded at a time.
CHUNK = 64


@dataclass(frozen=True)
class Plane:
    """The plane through a cloud of points along its two axes of largest variance.

    Args:
        center: of the cloud, [D].
        axes: orthonormal, [2, D].
        share: of the variance that is seen in this plane, in [0, 1].
    """

    center: np.ndarray
    axes: np.ndarray
    share: float

    @classmethod
    def through(cls, points: np.ndarray) -> "Plane":
        """The plane of `points` [N, D], N and D at least 2."""
        center = points.mean(axis=0)
        _, deviations, axes = np.linalg.svd(points - center, full_matrices=False)
        variances = deviations**2
        return cls(center, axes[:2], float(variances[:2].sum() / max(variances.sum(), 1e-12)))

    def project(self, points: np.ndarray) -> np.ndarray:
        """[N, D] to [N, 2]."""
        return (points - self.center) @ self.axes.T


class RoutingMap:
    """The conditions of a pipeline in a plane, and who answers each.

    Prompts lie by the embeddings that the router reads. Classes lie by the students' class embeddings, which no table
    looks at, or in a grid in the order of their labels where those are not in memory.

    Args:
        pipe: with a router.
        prompts: two or more to be shown, if the pipeline takes prompts.

    Attributes:
        conditions: N prompts, or all class labels.
        students: of each.
        margins: of each, as of `MultiStudentPipeline.margins`.
        points: [N, 2].
        axes: what the plane is, in words.

    Raises:
        TypeError, ValueError: there is no router, or `prompts` are not for this pipeline.
    """

    def __init__(self, pipe: MultiStudentPipeline, prompts: list[str] | None = None):
        if pipe.router is None:
            raise ValueError("pipe: it has no router, so there is nothing to draw")
        if pipe.takes_prompts and (prompts is None or len(prompts) < 2):
            raise ValueError(f"prompts: at least 2 are needed for a map, got {prompts!r}")
        if not pipe.takes_prompts and prompts is not None:
            raise ValueError("prompts: this pipeline goes by class_label")
        self.pipe = pipe
        unet = next(iter(pipe.students.values()))
        self.conditions = list(prompts or range(num_classes(unet)))
        if pipe.takes_prompts:
            embeddings = self._embed(self.conditions)
            routed_by = {"embeddings": torch.from_numpy(embeddings)}
            self._lay_out(embeddings, "prompts by the embeddings that the router reads")
        else:
            routed_by = {"class_labels": torch.tensor(self.conditions)}
            self._lay_out_classes(unet)
        self.students = pipe.router(**routed_by).tolist()
        self.margins = pipe.router.margins(**routed_by).tolist()

    def _embed(self, prompts: list[str]) -> np.ndarray:
        # A thousand prompts at once would take gigabytes in a large text encoder.
        chunks = [prompts[i : i + CHUNK] for i in range(0, len(prompts), CHUNK)]
        encoded = [self.pipe.routed_by(*self.pipe.encode_condition(prompt=chunk))["embeddings"] for chunk in chunks]
        return torch.cat(encoded).numpy()

    def _lay_out_classes(self, unet: UNet2DModel):
        in_memory = isinstance(unet.class_embedding, torch.nn.Embedding) and unet.device.type != "meta"
        if in_memory and len(self.conditions) > 2:
            weight = unet.class_embedding.weight.detach().float().cpu().numpy()
            return self._lay_out(weight[self.conditions], "classes by the class embeddings of a student")
        columns = math.ceil(len(self.conditions) ** 0.5)
        self.points = np.array([(label % columns, -(label // columns)) for label in self.conditions], dtype=float)
        self.axes = "classes in the order of their labels"

    def _lay_out(self, embeddings: np.ndarray, what: str):
        self.plane = Plane.through(embeddings)
        self.points = self.plane.project(embeddings)
        self.axes = f"{what};\nthis plane has {self.plane.share:.0%} of their variance"

    def place(self, condition: str | int) -> np.ndarray:
        """Where a condition lies, [2]; a prompt need not be one of those that are shown."""
        if self.pipe.takes_prompts:
            return self.plane.project(self._embed([condition]))[0]
        return self.points[condition]

    def draw(self, current: str | int | None = None):
        """A matplotlib `Figure` of the map, with a ring where `current` lies."""
        figure, axis = subplots(1, 1, figsize=(5, 4.5))
        named = len(self.conditions) <= NAMED
        size = 240 if named and not self.pipe.takes_prompts else 24
        for k in sorted(set(self.students)):
            mine = self.points[np.array(self.students) == k]
            style = {"color": f"C{k % 10}", "marker": MARKERS[k // 10], "label": f"student {k}"}
            axis.scatter(*mine.T, s=size, alpha=0.85, linewidths=0, **style)
        if named:
            self._name_points(axis)
        if current is not None:
            ring = {"facecolors": "none", "edgecolors": "black", "linewidths": 2, "label": "this one"}
            axis.scatter(*self.place(current), s=size + 160, **ring)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.margins(0.15, 0.08)
        axis.set_xlabel(self.axes, fontsize=8)
        legend = {"loc": "lower center", "bbox_to_anchor": (0.5, 1), "frameon": False, "markerscale": 5 / size**0.5}
        axis.legend(ncols=4, fontsize=8, **legend)
        return figure

    def _name_points(self, axis):
        # Words beside the points, numbers inside.
        style = (
            {"xytext": (4, 4)}
            if self.pipe.takes_prompts
            else {"xytext": (0, 0), "ha": "center", "va": "center", "color": "white"}
        )
        for condition, point in zip(self.conditions, self.points):
            text = textwrap.shorten(str(condition), 24, placeholder="...")
            # Dollars in a prompt are no formula.
            axis.annotate(text, point, textcoords="offset points", fontsize=8, parse_math=False, **style)
