# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Routing by prompt embedding: balanced parts of a cloud of points, found by streaming over it.

MSD (arXiv 2410.23274) cuts the prompts' space into four quadrants, because plain k-means gave very uneven parts. Here
both are balanced: medians along principal axes, and k-means whose cells are moved until they are equally full.
"""

import textwrap
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from .embedding_rows import CHUNK, as_shards, check_matrix, chunks, sample, spread
from .routing import ConditionRouter


# A prompt is called ambiguous if its margin is below this fraction of the median margin.
AMBIGUOUS = 0.1


class EmbeddingRouter(ConditionRouter):
    r"""Cuts the space of embeddings e [D] into K parts. Make one by a `fit_...` method.

    | kind | student of e | tensors |
    |---|---|---|
    | `kmeans` | argmin_k \|e - d_k\|^2 - o_k, a power diagram: the offsets make the parts equal | d [K, D], o [K] |
    | `quadrants` | a binary tree: at level l, above or below the node's cut along axis d_l | d [log2 K, D], o [K-1] |
    | `random` | floor(K frac(d . e + o)), with a phase that turns many times over the cloud | d [1, D], o [1] |

    Everything is computed in float64 from the saved float32 tensors, so routing does not depend on a device or batch.

    Args:
        num_students (`int`): The number of parts K.
        kind (`str`): One of the above.
        directions (`torch.FloatTensor` of shape `[M, D]`): See the table.
        offsets (`torch.FloatTensor` of shape `[N]`): See the table.
        part_sizes (`list[int]`): How many of the embeddings that it was fitted on each part got.
        pooling (`str`, *optional*): How prompts were embedded, "mean" or "eos".
        text_encoder_fingerprint (`str`, *optional*): What embedded them (`prompts.encoder_fingerprint`).

    Raises:
        ValueError: `kind` is unknown, or a tensor does not have its shape.
    """

    tensor_arguments = ("directions", "offsets")

    def __init__(
        self, num_students, kind, directions, offsets, part_sizes, pooling=None, text_encoder_fingerprint=None
    ):
        if kind not in _KINDS:
            raise ValueError(f"kind: got {kind!r}; one of {', '.join(_KINDS)} is allowed.")
        rows, cuts = _KINDS[kind].sizes(num_students)
        if directions.ndim != 2 or len(directions) != rows or tuple(offsets.shape) != (cuts,):
            raise ValueError(
                f"directions, offsets: got shapes {list(directions.shape)} and {list(offsets.shape)}; a {kind} router "
                f"of {num_students} parts has [{rows}, D] and [{cuts}]."
            )
        self.directions, self.offsets = directions.float(), offsets.float()
        self.register_to_config(
            num_students=num_students,
            kind=kind,
            part_sizes=list(part_sizes),
            pooling=pooling,
            text_encoder_fingerprint=text_encoder_fingerprint,
        )

    @classmethod
    def fit_kmeans(cls, embeddings, k, balanced=True, seed=0, **recorded):
        """Puts similar embeddings together: mini-batch k-means, then equal parts.

        With `balanced`, the offsets of the cells are found by coordinate descent on the dual of the transport problem
        from the points to the K centres with equal masses, alternating with the centres, on at most 65,536 points.

        Args:
            embeddings (`torch.Tensor`, `np.ndarray` or a list of them): [N, D] of any float dtype, or shards of that.
                Memory maps (of NumPy, or as safetensors gives them) are read a chunk at a time: of N points only a
                few numbers each are kept.
            k (`int`): The number of parts, in [1, N].
            balanced (`bool`): Equal parts; otherwise as k-means finds them.
            seed (`int`): Of the initial centres and of the sample.
            recorded: `pooling` and `text_encoder_fingerprint`, kept in the config.

        Raises:
            TypeError, ValueError: `embeddings` is no finite matrix, `k` is out of range, or so many embeddings are alike
                that a part stays empty.
        """
        from sklearn.cluster import MiniBatchKMeans

        shards = as_shards(embeddings, k)
        points, num_points = sample(shards, seed), sum(map(len, shards))
        kmeans = MiniBatchKMeans(k, random_state=seed, batch_size=CHUNK)
        # The first call chooses the initial centres: not from the first shard alone.
        for piece in spread(points):
            kmeans.partial_fit(piece)
        # Few points are passed over more often: a hundred updates settle the centres.
        for _ in range(max(1, 100 * CHUNK // max(CHUNK, num_points))):
            for chunk in chunks(shards):
                # scikit-learn refuses a last chunk of fewer points than centres.
                if len(chunk) >= k:
                    kmeans.partial_fit(chunk.astype(np.float32))
        centers, offsets = kmeans.cluster_centers_, np.zeros(k)
        if balanced:
            for _ in range(10):
                scores = _scores(points, centers)
                offsets = _balancing_offsets(scores)
                part = (scores + offsets).argmax(axis=1)
                # A centre that no point is nearest to stays where it is.
                for j in np.unique(part):
                    centers[j] = points[part == j].mean(axis=0, dtype=np.float64)
            offsets = _balancing_offsets(_scores(points, centers))
        return cls._fitted(shards, k, "kmeans", centers, offsets, recorded)

    @classmethod
    def fit_quadrants(cls, embeddings, k, seed=0, **recorded):
        """Median cuts along the log2(k) leading principal axes, each half cut at its own median: equal parts.

        The axes are those of at most 65,536 points, the medians those of all.

        Args:
            embeddings, recorded: As `fit_kmeans`.
            k (`int`): The number of parts, a power of two in [1, N].
            seed (`int`): Of the sample.

        Raises:
            TypeError, ValueError: As `fit_kmeans`, or `k` is no power of two.
        """
        shards = as_shards(embeddings, k)
        if k & (k - 1):
            raise ValueError(f"k: got {k}; quadrants are cut in halves, so a power of two is needed (2, 4, 8, ...).")
        levels = max(1, _levels(k))
        if levels > shards[0].shape[1]:
            raise ValueError(f"k: got {k}; embeddings of {shards[0].shape[1]} dimensions have fewer axes than cuts.")
        axes = _principal_axes(sample(shards, seed), levels)
        projections = np.concatenate([chunk @ axes.T.astype(np.float64) for chunk in chunks(shards)])
        cuts, node = [], np.zeros(len(projections), dtype=np.int64)
        for level in range(_levels(k)):
            level_cuts = np.array([np.median(projections[node == j, level]) for j in range(2**level)])
            node = 2 * node + (projections[:, level] > level_cuts[node])
            cuts.extend(level_cuts)
        return cls._fitted(shards, k, "quadrants", axes, np.array(cuts), recorded)

    @classmethod
    def fit_random(cls, embeddings, k, seed=0, **recorded):
        """Parts without meaning, the control of the paper's ablation: near prompts go to any student, always the same.

        Args:
            embeddings, recorded: As `fit_kmeans`.
            k (`int`): The number of parts, in [1, N].
            seed (`int`): Of the direction.
        """
        shards = as_shards(embeddings, k)
        direction = np.random.default_rng(seed).standard_normal((1, shards[0].shape[1]))
        deviation = np.std(np.concatenate([(chunk @ direction[0]) for chunk in chunks(shards)]))
        # A hundred turns per standard deviation: neighbours part, rounding errors of an encoder do not matter.
        direction *= 100 / max(deviation, 1e-12)
        return cls._fitted(shards, k, "random", direction, np.zeros(1), recorded)

    @classmethod
    def _fitted(cls, shards, k, kind, directions, offsets, recorded):
        directions, offsets = (torch.from_numpy(np.array(a, dtype=np.float32)) for a in (directions, offsets))
        part, _ = _route(shards, k, kind, directions, offsets)
        sizes = np.bincount(part, minlength=k).tolist()
        if 0 in sizes:
            raise ValueError(
                f"embeddings: they leave students {[j for j in range(k) if not sizes[j]]} of {k} without any; too many "
                "are alike, a smaller k is needed."
            )
        return cls(k, kind, directions, offsets, sizes, **recorded)

    def __call__(self, class_labels=None, embeddings=None):
        """Routes embeddings (see [`ConditionRouter.__call__`])."""
        return self._route(class_labels, embeddings)[0]

    def margins(self, embeddings=None, class_labels=None):
        """Euclidean distances to the nearest cut (see [`ConditionRouter.margins`]); infinite if K = 1."""
        return self._route(class_labels, embeddings)[1]

    def _route(self, class_labels, embeddings):
        if embeddings is None or class_labels is not None:
            raise ValueError(
                f"embeddings: an EmbeddingRouter goes by them alone, got class_labels={type(class_labels).__name__}, "
                f"embeddings={type(embeddings).__name__}."
            )
        check_matrix(embeddings, self.directions.shape[1])
        part, margin = _route([embeddings], self.num_students, self.config.kind, self.directions, self.offsets)
        return torch.from_numpy(part), torch.from_numpy(margin)

    def report(self, prompts, embeddings, examples=5):
        """Says in words what the parts are, so that a partition can be judged by reading it.

        Args:
            prompts (`list[str]`): N prompts, those it was fitted on or others.
            embeddings (`torch.Tensor` or `np.ndarray` of shape `[N, D]`): Of these prompts, as for a call.
            examples (`int`): How many typical prompts of each part are quoted: the ones with the largest margins.

        Returns:
            `str`: The balance; quantiles of the margins and the share of ambiguous prompts (margin below a tenth of
            the median); for each part its size, typical prompts and the most ambiguous one, with their margins.

        Raises:
            TypeError, ValueError: `embeddings` as for a call; there is not one prompt for each, or `examples` < 1.
        """
        part, margin = (column.numpy() for column in self._route(None, embeddings))
        if len(prompts) != len(part) or not len(part):
            raise ValueError(f"prompts: got {len(prompts)} for {len(part)} embeddings; one for each is needed.")
        if examples < 1:
            raise ValueError(f"examples: got {examples}; at least 1 is needed.")
        sizes = np.bincount(part, minlength=self.num_students)
        lines = [
            f"{len(part):,} prompts, {self.num_students} students ({self.config.kind}), "
            f"imbalance {sizes.max() * self.num_students / len(part):.3f}"
        ]
        if self.num_students > 1:
            lines.append(_describe_margins(margin))
        for k, size in enumerate(sizes):
            lines += ["", f"student {k}: {size:,} prompts ({size / len(part):.1%})"]
            rows = np.flatnonzero(part == k)
            rows = rows[np.argsort(-margin[rows], kind="stable")]
            # Data sets repeat prompts: each is quoted once.
            distinct = list({prompts[row]: row for row in rows[::-1]}.values())[::-1]
            quoted = [("typical", row) for row in distinct[:examples]]
            if self.num_students > 1:
                quoted += [("ambiguous", row) for row in distinct[-1:]]
            lines += [f"  {kind:<9} {margin[row]:.4g}  {_shorten(prompts[row])}" for kind, row in quoted]
        return "\n".join(lines)

    @property
    def part_sizes(self):
        """`list[int]`: How many of the embeddings that it was fitted on each part got."""
        return self.config.part_sizes

    @property
    def imbalance(self):
        """`float`: Largest part over mean part; 1.0 is perfect balance."""
        return max(self.part_sizes) * self.num_students / sum(self.part_sizes)


def _route_kmeans(points, k, directions, offsets):
    centers, offsets = directions.double().numpy(), offsets.double().numpy()
    scores = _scores(points, centers) + offsets
    part = scores.argmax(axis=1)
    # The cut between parts i and j is a plane of normal 2 (d_i - d_j).
    normals = 2 * np.linalg.norm(centers[:, None] - centers, axis=-1)
    behind = scores[np.arange(len(points)), part, None] - scores
    with np.errstate(divide="ignore", invalid="ignore"):
        distances = behind / normals[part]
    # No plane separates a part from itself, nor equal centres.
    return part, np.where(np.isnan(distances), np.inf, distances).min(axis=1, initial=np.inf)


def _route_quadrants(points, k, directions, offsets):
    projections, cuts = points @ directions.double().numpy().T, offsets.double().numpy()
    node, margin = np.zeros(len(points), dtype=np.int64), np.full(len(points), np.inf)
    for level in range(_levels(k)):
        # Level l has 2^l cuts, saved one level after the other.
        above = projections[:, level] - cuts[2**level - 1 + node]
        node, margin = 2 * node + (above > 0), np.minimum(margin, np.abs(above))
    return node, margin


def _route_random(points, k, directions, offsets):
    direction = directions.double().numpy()[0]
    place = k * ((points @ direction + offsets.double().numpy()[0]) % 1)
    part = np.minimum(place.astype(np.int64), k - 1)
    margin = np.minimum(place - part, part + 1 - place) / (k * np.linalg.norm(direction))
    return part, margin if k > 1 else np.full(len(points), np.inf)


class _Kind(NamedTuple):
    route: Callable  # points [n, D] (float64), K, directions, offsets -> students [n], margins [n]
    sizes: Callable  # K -> number of directions, number of offsets


_KINDS = {
    "kmeans": _Kind(_route_kmeans, lambda k: (k, k)),
    "quadrants": _Kind(_route_quadrants, lambda k: (max(1, _levels(k)), k - 1)),
    "random": _Kind(_route_random, lambda k: (1, 1)),
}


def _route(shards, k, kind, directions, offsets):
    # Fitting and answering take the same way through the same chunks, so the recorded part sizes are those of a call.
    routed = [_KINDS[kind].route(chunk, k, directions, offsets) for chunk in chunks(shards)]
    return tuple(np.concatenate(column) for column in zip(*routed))


def _principal_axes(points, count):
    # Of the covariance: exact, and ten times as fast as the decompositions of the points in IncrementalPCA.
    points -= points.mean(axis=0, dtype=np.float64)
    _, axes = np.linalg.eigh((points.T @ points).astype(np.float64))
    axes = axes.T[: -count - 1 : -1]
    # Either sign is right; this one does not depend on the linear algebra library.
    return (axes * np.sign(axes[np.arange(count), np.abs(axes).argmax(axis=1), None])).astype(np.float32)


def _levels(k):
    # log2 of a power of two: how often halves are cut.
    return k.bit_length() - 1


def _scores(points, centers):
    # Largest where |e - c_k|^2 is smallest; |e|^2 is the same for all k and is left out.
    return 2 * points @ centers.T.astype(points.dtype) - (centers.astype(points.dtype) ** 2).sum(axis=1)


def _balancing_offsets(scores, sweeps=100):
    # Coordinate descent on mean_i max_k (scores_ik + o_k) - mean(o): where it is least, every part has N/K points.
    # For one o_k with the others fixed the solution is a quantile.
    num_points, k = scores.shape
    offsets, seats = np.zeros(k), num_points // k
    if k == 1:
        return offsets
    for _ in range(sweeps):
        for j in range(k):
            others = np.delete(scores + offsets, j, axis=1).max(axis=1)
            needed = np.partition(others - scores[:, j], (seats - 1, seats))
            offsets[j] = needed[seats - 1 : seats + 1].mean()
        sizes = np.bincount((scores + offsets).argmax(axis=1), minlength=k)
        if sizes.max() - sizes.min() <= 1 + 1e-3 * seats:
            break
    return offsets - offsets.mean()


def _describe_margins(margin):
    levels = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95)
    quantiles = ", ".join(f"{level:.0%} {value:.4g}" for level, value in zip(levels, np.quantile(margin, levels)))
    share = np.mean(margin < AMBIGUOUS * np.median(margin))
    return f"margins to the nearest cut: {quantiles}; ambiguous (below {AMBIGUOUS} of the median): {share:.1%}"


def _shorten(prompt):
    return textwrap.shorten(prompt, 100, placeholder=" ...")
