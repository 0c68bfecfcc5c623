# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Which samples make up which batch: a function of (seed, position) alone, as with `Draws`."""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch.utils.data import DataLoader, Dataset

from .draws import derive_seed


def global_batch(num_items: int, total: int, position: int, keys: tuple) -> list[int]:
    """Indices of the `position`-th global batch of `total` items from an endless run of shuffled epochs.

    A function of its arguments alone, so that data order survives a resume and does not depend on the processes.
    """
    indices: list[int] = []
    epoch, offset = divmod(position * total, num_items)
    while len(indices) < total:
        order = _epoch_order(num_items, (*keys, epoch))
        indices += order[offset : offset + total - len(indices)].tolist()
        epoch, offset = epoch + 1, 0
    return indices


@lru_cache(maxsize=4)
def _epoch_order(num_items: int, keys: tuple) -> torch.Tensor:
    return torch.randperm(num_items, generator=torch.Generator().manual_seed(derive_seed(*keys)))


def _as_is(batch):
    return batch


def load_batches(
    dataset: Dataset, positions: range, total: int, rows: list[slice], keys: tuple, num_workers: int = 0
) -> Iterator[dict[str, torch.Tensor]]:
    """This process's batches of the global batches at `positions`, one per slice of `rows`.

    Args:
        dataset: its `__getitems__(indices)` gives a whole batch.
        positions: of the global batches, see `global_batch`.
        total: size of a global batch.
        rows: the slices of it that this process works on, in order.
        keys: seed of the order.
        num_workers: processes that load ahead.
    """
    indices = (batch[r] for p in positions for batch in [global_batch(len(dataset), total, p, keys)] for r in rows)
    # A generator of its own: otherwise the loader draws from torch's global one.
    loader = DataLoader(
        dataset, batch_sampler=indices, collate_fn=_as_is, num_workers=num_workers, generator=torch.Generator()
    )
    return iter(loader)
