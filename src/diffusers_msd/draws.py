# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Random numbers that depend on what they are for, not on how the work is split."""

import hashlib

import torch


def derive_seed(*keys: int | str) -> int:
    """A 63-bit seed from any mix of integers and names (torch's CPU generator uses its low 32 bits)."""
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Draws:
    """The random numbers of one training step, a function of (seed, keys) alone.

    Everything is drawn on the CPU for the whole global batch and then cut to the caller's rows. So a resumed run, a
    run split over more processes, and one with more accumulation steps see the same numbers as the plain run.

    Args:
        keys: what the numbers are for: (seed, stage, turn, step).
        total: size of the global batch.
        rows: the rows of it that this call works on.
        device: where the numbers are wanted.
    """

    def __init__(self, keys: tuple, total: int, rows: slice, device: torch.device | str = "cpu"):
        self.generator = torch.Generator().manual_seed(derive_seed(*keys))
        self.total = total
        self.rows = rows
        self.device = device

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal, float32 [rows, *shape]."""
        return torch.randn(self.total, *shape, generator=self.generator)[self.rows].to(self.device)

    def index(self, low: int, high: int) -> torch.Tensor:
        """Uniform integers of [low, high], both inclusive; LongTensor [rows], on the CPU."""
        return torch.randint(low, high + 1, (self.total,), generator=self.generator)[self.rows]
