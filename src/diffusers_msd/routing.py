# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Which student serves which condition (MSD, arXiv 2410.23274: disjoint, balanced parts, alike inside a part)."""

from abc import ABC, abstractmethod

import numpy as np
import torch

from .saved_component import SavedComponent


class ConditionRouter(SavedComponent, ABC):
    """Maps conditions to students: a component of the pipeline that is no `nn.Module`.

    A module's tensors would be cast by `pipe.to(torch.float16)` and the routing would change. A subclass is one class:

    - `__init__` takes `num_students` first and calls `register_to_config` with everything that is not a tensor;
    - arguments that are tensors are named in `tensor_arguments` and kept as attributes of the same names;
    - `__call__` answers.
    """

    tensor_arguments = ()

    @property
    def num_students(self):
        """`int`: The number of parts K; students are numbered 0 ... K-1."""
        return self.config.num_students

    @abstractmethod
    def __call__(self, class_labels=None, embeddings=None):
        """Says which student serves each condition.

        Args:
            class_labels (`torch.LongTensor` of shape `[B]`, *optional*): Class conditions.
            embeddings (`torch.Tensor` of shape `[B, D]`, *optional*): Embedded conditions, such as pooled prompts.

        Returns:
            `torch.LongTensor` of shape `[B]`: Students, on the CPU, where a batch is cut into groups.

        Raises:
            ValueError: The argument this router goes by is absent, another is given, or a value is out of range.
        """

    def margins(self, embeddings=None, class_labels=None):
        """How far each condition lies from the nearest cut, beyond which another student would serve it.

        Args:
            embeddings, class_labels: As for a call.

        Returns:
            `torch.DoubleTensor` of shape `[B]`: Distances in the units of the embeddings; infinite where there are no
            cuts, as in a table of classes.
        """
        return torch.full((len(self(class_labels, embeddings)),), torch.inf, dtype=torch.float64)

    def tensors(self):
        return {name: vars(self)[name] for name in self.tensor_arguments}

    @classmethod
    def from_saved(cls, config, load):
        tensors = load() if cls.tensor_arguments else {}
        if set(tensors) != set(cls.tensor_arguments):
            raise ValueError(
                f"pretrained_model_name_or_path: its file holds the tensors {sorted(tensors)}; a {cls.__name__} has "
                f"{sorted(cls.tensor_arguments)}."
            )
        return cls.from_config(config, **tensors)


class ClassRouter(ConditionRouter):
    """A table from class labels to students.

    The table is part of `config.json`: integers are exact there, and it can be read and edited by hand.

    Args:
        num_students (`int`): The number of parts K, from 1 to the number of classes.
        class_to_student (`torch.LongTensor` of shape `[num_classes]`, or a sequence of `int`): The student of each
            class, in [0, K). Every student has at least one class.

    Raises:
        TypeError: A value is no integer.
        ValueError: A size or a student is out of range, or a student has no class.
    """

    def __init__(self, num_students, class_to_student):
        table = _as_integers(class_to_student, "class_to_student").clone()
        _check_parts(len(table), num_students, "num_students")
        outside = table[(table < 0) | (table >= num_students)]
        if len(outside):
            raise ValueError(
                f"class_to_student: it holds student {int(outside[0])}; with num_students={num_students} the values "
                f"0 ... {num_students - 1} are allowed."
            )
        sizes = torch.bincount(table, minlength=num_students)
        if (sizes == 0).any():
            raise ValueError(
                f"class_to_student: it gives no class to students {torch.nonzero(sizes == 0).flatten().tolist()}; "
                f"each of the {num_students} students needs at least one."
            )
        self.class_to_student = table
        self.register_to_config(num_students=int(num_students), class_to_student=table.tolist())

    @classmethod
    def consecutive(cls, num_classes, k):
        """Cuts the labels into `k` runs of neighbours, sizes within 1 (the paper's partition of ImageNet).

        Args:
            num_classes (`int`): The number of classes.
            k (`int`): The number of parts, in [1, num_classes].
        """
        _check_parts(num_classes, k, "k")
        return cls(k, torch.arange(num_classes) * k // num_classes)

    @classmethod
    def random(cls, num_classes, k, seed=0):
        """Deals the labels out at random, sizes within 1 (the paper's ablation).

        Args:
            num_classes (`int`): The number of classes.
            k (`int`): The number of parts, in [1, num_classes].
            seed (`int`): Of a generator of its own; the global one is left alone.
        """
        _check_parts(num_classes, k, "k")
        order = torch.randperm(num_classes, generator=torch.Generator().manual_seed(seed))
        table = torch.empty(num_classes, dtype=torch.long)
        table[order] = torch.arange(num_classes) * k // num_classes
        return cls(k, table)

    @classmethod
    def from_embeddings(cls, embeddings, k, balanced=True, seed=0):
        """Puts classes with similar embeddings together: k-means on squared Euclidean distances.

        For a teacher `UNet2DModel`, `teacher.class_embedding.weight` is such an embedding. With `balanced`, each step
        of Lloyd's iteration assigns the classes to the centres at the least total cost under equal sizes, a linear
        assignment: cubic in the number of classes (a second for 1,000). Parts are numbered by their first class.

        Args:
            embeddings (`torch.Tensor` or `np.ndarray` of shape `[num_classes, D]`): One row per class, finite.
            k (`int`): The number of parts, in [1, num_classes].
            balanced (`bool`): Sizes within 1; otherwise sizes as k-means finds them.
            seed (`int`): Of the initial centres.

        Raises:
            ValueError: `embeddings` is no matrix or not finite, or `k` is out of range.
        """
        points = torch.as_tensor(embeddings).detach().cpu().double().numpy()
        if points.ndim != 2 or not np.isfinite(points).all():
            raise ValueError(
                f"embeddings: got shape {list(points.shape)}, finite={bool(np.isfinite(points).all())}; a finite "
                "matrix [num_classes, D] is needed."
            )
        _check_parts(len(points), k, "k")
        # A table also for those who never fit one: scikit-learn is needed here only.
        from sklearn.cluster import KMeans

        kmeans = KMeans(n_clusters=k, n_init=10, random_state=seed).fit(points)
        table = _balanced_parts(points, kmeans.cluster_centers_) if balanced else kmeans.labels_
        _, first, part = np.unique(table, return_index=True, return_inverse=True)
        return cls(k, np.argsort(np.argsort(first))[part])

    def __call__(self, class_labels=None, embeddings=None):
        """Looks the labels up (see [`ConditionRouter.__call__`])."""
        if class_labels is None or embeddings is not None:
            raise ValueError(
                f"class_labels: a ClassRouter goes by them alone, got class_labels={type(class_labels).__name__}, "
                f"embeddings={type(embeddings).__name__}."
            )
        labels = _as_integers(class_labels, "class_labels")
        outside = labels[(labels < 0) | (labels >= len(self.class_to_student))]
        if len(outside):
            raise ValueError(
                f"class_labels: {int(outside[0])} is out of range; this router knows the classes "
                f"0 ... {len(self.class_to_student) - 1}."
            )
        return self.class_to_student[labels]

    def classes(self, k):
        """The classes of part `k`.

        Args:
            k (`int`): A student, in [0, num_students).

        Returns:
            `torch.LongTensor`: Ascending class labels, at least one.
        """
        if k not in range(self.num_students):
            raise ValueError(f"k: got {k!r}; this router has the students 0 ... {self.num_students - 1}.")
        return torch.nonzero(self.class_to_student == k).flatten()

    @property
    def part_sizes(self):
        """`list[int]`: The number of classes of each student."""
        return torch.bincount(self.class_to_student, minlength=self.num_students).tolist()

    @property
    def imbalance(self):
        """`float`: Largest part over mean part; 1.0 is perfect balance."""
        return max(self.part_sizes) * self.num_students / len(self.class_to_student)

    def report(self):
        """`str`: The imbalance, then one line per part with its size and classes."""
        lines = [f"{len(self.class_to_student)} classes, {self.num_students} students, imbalance {self.imbalance:.2f}"]
        for k, size in enumerate(self.part_sizes):
            lines.append(f"student {k}: {size} classes: {_runs(self.classes(k).tolist())}")
        return "\n".join(lines)


def _as_integers(values, argument):
    try:
        values = torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{argument}: got {values!r}; integers of shape [N] are allowed ({error}).") from error
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"{argument}: got {values.dtype}; integers are allowed.")
    if values.ndim != 1:
        raise ValueError(f"{argument}: got shape {list(values.shape)}; one dimension, [N], is allowed.")
    return values.long()


def _check_parts(num_classes, k, argument):
    for name, value in (("num_classes", num_classes), (argument, k)):
        if type(value) is not int:
            raise TypeError(f"{name}: got {value!r}; an int is allowed.")
    if num_classes < 1:
        raise ValueError(f"num_classes: got {num_classes}; at least one class is needed.")
    if not 1 <= k <= num_classes:
        raise ValueError(f"{argument}: got {k}; with {num_classes} classes 1 ... {num_classes} are allowed.")


def _balanced_parts(points, centers, max_iterations=100):
    # Neither the assignment nor the means raise the total cost and there are finitely many tables, so it ends.
    from scipy.spatial.distance import cdist

    table = np.full(len(points), -1)
    for _ in range(max_iterations):
        previous, table = table, _balanced_assignment(cdist(points, centers, "sqeuclidean"))
        if (table == previous).all():
            break
        centers = np.stack([points[table == part].mean(axis=0) for part in range(len(centers))])
    return table


def _balanced_assignment(costs):
    # Every centre has `size` seats and one spare. A spare costs more than all else together, so no more of them are
    # taken than the remainder of the division.
    from scipy.optimize import linear_sum_assignment

    num_points, k = costs.shape
    seats = np.repeat(np.arange(k), num_points // k)
    spare_cost = 1 + num_points * costs.max()
    _, chosen = linear_sum_assignment(np.hstack([costs[:, seats], costs + spare_cost]))
    return np.concatenate([seats, np.arange(k)])[chosen]


def _runs(labels):
    # [0, 1, 2, 5] -> "0-2, 5"
    starts = [i for i in range(len(labels)) if i == 0 or labels[i] != labels[i - 1] + 1]
    ends = [i - 1 for i in starts[1:]] + [len(labels) - 1]
    return ", ".join(
        str(labels[i]) if i == j else f"{labels[i]}-{labels[j]}" for i, j in zip(starts, ends, strict=True)
    )
