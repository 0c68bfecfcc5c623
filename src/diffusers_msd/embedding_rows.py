# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Embeddings that may be larger than memory: shards, read as if they were one matrix, some rows at a time."""

import numpy as np
import torch


# Rows that are in memory at once while routing and fitting.
CHUNK = 16_384
# Rows that settle principal axes and balance. A part of 1/K is then off by some sqrt(K / SAMPLE) of its size, 1 % at K=8.
SAMPLE = 65_536


def as_shards(embeddings, k):
    """Checks what can be checked without reading: one or more arrays or tensors [n, D], N >= k rows in all."""
    shards = list(embeddings) if isinstance(embeddings, (list, tuple)) else [embeddings]
    for shard in shards:
        check_matrix(shard, shards[0].shape[-1])
    num_points = sum(map(len, shards))
    if type(k) is not int:
        raise TypeError(f"k: got {k!r}; an int is allowed.")
    if not 1 <= k <= num_points:
        raise ValueError(f"k: got {k}; with {num_points} embeddings 1 ... {num_points} are allowed.")
    return shards


def check_matrix(rows, width):
    """Raises TypeError or ValueError unless `rows` is an array or tensor of floats [N, width]."""
    if not isinstance(rows, (torch.Tensor, np.ndarray)):
        raise TypeError(f"embeddings: got a {type(rows).__name__}; an array or tensor of floats is needed.")
    floating = rows.is_floating_point() if isinstance(rows, torch.Tensor) else rows.dtype.kind == "f"
    if not floating or rows.ndim != 2 or rows.shape[1] != width:
        raise ValueError(f"embeddings: got {rows.dtype} {list(rows.shape)}; floats of shape [N, {width}] are needed.")


def to_numpy(rows, dtype=np.float64):
    """An array or tensor as a NumPy array; a value that is not finite is a ValueError."""
    if isinstance(rows, torch.Tensor):
        # bfloat16 is unknown to NumPy.
        rows = rows.detach().cpu()
        rows = (rows.float() if rows.dtype == torch.bfloat16 else rows).numpy()
    rows = np.asarray(rows, dtype=dtype)
    if not np.isfinite(rows).all():
        raise ValueError("embeddings: a value is not finite; finite floats are needed.")
    return rows


def chunks(shards):
    """Yields all rows in their order: float64 [n, D], n of CHUNK; one empty chunk if there are no rows."""
    starts = np.cumsum([0, *map(len, shards)])
    for start in range(0, max(1, starts[-1]), CHUNK):
        # Slices, not index arrays: of a memory map only these rows are read.
        pieces = [shard[max(0, start - a) : max(0, start + CHUNK - a)] for shard, a in zip(shards, starts)]
        pieces = [to_numpy(piece) for piece in pieces if len(piece)] or [to_numpy(shards[0])]
        yield pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def sample(shards, seed):
    """At most SAMPLE rows, drawn with `seed`, in their order: float32 [n, D]."""
    starts = np.cumsum([0, *map(len, shards)])
    rows = np.sort(np.random.default_rng(seed).permutation(starts[-1])[:SAMPLE])
    pieces = [rows[(rows >= a) & (rows < b)] - a for a, b in zip(starts, starts[1:])]
    return np.concatenate([to_numpy(shard[piece], np.float32) for shard, piece in zip(shards, pieces) if len(piece)])


def spread(points):
    """Pieces of about CHUNK, each from end to end of `points` [n, D].

    For fits that stream: data may be sorted, and what one piece lacks is forgotten or never learnt.
    """
    pieces = -(-len(points) // CHUNK)
    return [points[piece::pieces] for piece in range(pieces)]
