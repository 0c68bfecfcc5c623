# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Large tables of tensors on disk: made once, in pieces, safe to interrupt; read row by row.

A folder is `index.json` (how the rows were made) and shards `<stem>-00000.safetensors` ..., each with the SHA-256 of
its content and of the index, so that pieces of another making, and damaged ones, are known as such.
"""

import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from .files import fingerprint, load_tensors, save_tensors, write_json


INDEX_NAME = "index.json"


def read_index(folder: str | Path, argument: str, made_by: str) -> dict:
    """The settings a folder of shards was made with.

    Args:
        folder: the folder.
        argument: the name of the caller's argument that it came from, for the error text.
        made_by: what makes such folders, for the error text.

    Raises:
        FileNotFoundError: there is no index.
        ValueError: it is damaged.
    """
    path = Path(folder, INDEX_NAME)
    if not path.is_file():
        raise FileNotFoundError(f"{argument}: {folder} holds no {INDEX_NAME}; a folder of {made_by} is needed")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{argument}: {path} is no JSON ({error}); delete it and run {made_by} again") from error


@dataclass(frozen=True)
class Shards:
    """A folder of shards.

    Args:
        folder: where.
        index: how the rows are made, JSON-like; its "shard_size" is the number of source rows per shard.
        num_rows: of the source. A shard may keep less rows than it covers.
        stem: of the files' names.
        argument: the name of the caller's argument that `folder` came from, for error texts.
        made_by: what makes such folders, for error texts.
    """

    folder: Path
    index: dict
    num_rows: int
    stem: str
    argument: str
    made_by: str

    def __len__(self) -> int:
        """How many shards there are when all are made."""
        return math.ceil(self.num_rows / self.index["shard_size"])

    def rows(self, shard: int) -> range:
        """The source rows that a shard covers."""
        first = shard * self.index["shard_size"]
        return range(first, min(first + self.index["shard_size"], self.num_rows))

    def path(self, shard: int) -> Path:
        return self.folder / f"{self.stem}-{shard:05d}.safetensors"

    def read(self, shard: int, checksum: bool = True) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The tensors of a shard (maps of the file) and its metadata.

        Without `checksum` only the header and the length of the file are checked, and no content is read.

        Raises:
            FileNotFoundError, ValueError: it is missing, truncated, or not what the index promises.
        """
        tensors, metadata = load_tensors(self.path(shard), self.argument)
        if checksum and metadata.get("sha256") != fingerprint(tensors, self.index, {"shard": shard}):
            raise ValueError(
                f"{self.argument}: {self.path(shard)} is corrupt (its SHA-256 is not that of its content and "
                f"{INDEX_NAME})"
            )
        return tensors, metadata

    def read_all(self, checksum: bool = True) -> list[tuple[dict[str, torch.Tensor], dict[str, str]]]:
        """All shards, in order.

        Raises:
            ValueError: one is missing or damaged (it is named).
        """
        shards = []
        for shard in range(len(self)):
            try:
                shards.append(self.read(shard, checksum))
            except (FileNotFoundError, ValueError) as error:
                raise ValueError(
                    f"{error}; run {self.made_by} --output_dir {self.folder} again with the settings in its "
                    f"{INDEX_NAME}: it keeps the good shards and makes the others"
                ) from error
        return shards

    def make(
        self,
        make_shard: Callable[[range, tqdm], tuple[dict[str, torch.Tensor], dict[str, str]]],
        rank: int = 0,
        world_size: int = 1,
        progress: bool = True,
    ) -> int:
        """Makes the shards j with j mod world_size == rank that are not there yet or damaged.

        Args:
            make_shard: called with the source rows and the progress bar, which it moves by one per row; gives the
                tensors and more metadata.
            rank, world_size: this process, and how many share the folder.
            progress: shows a bar with rate and remaining time.

        Returns:
            How many source rows were gone through, those of shards that were kept not counted.

        Raises:
            ValueError: the folder holds shards made with other settings (the setting is named).
        """
        self._check_same_settings()
        mine = range(rank, len(self), world_size)
        todo = [shard for shard in mine if not self._is_good(shard)]
        to_make, total = (sum(len(self.rows(shard)) for shard in shards) for shards in (todo, mine))
        bar = tqdm(total=total, initial=total - to_make, unit="row", desc=self.stem, disable=not progress)
        with bar:
            for shard in todo:
                tensors, metadata = make_shard(self.rows(shard), bar)
                # Not earlier: settings that are refused while computing leave no index behind.
                write_json(self.folder / INDEX_NAME, self.index)
                sha256 = fingerprint(tensors, self.index, {"shard": shard})
                save_tensors(self.path(shard), tensors, {**metadata, "sha256": sha256})
        # Again, for a folder of good shards that had lost its index.
        write_json(self.folder / INDEX_NAME, self.index)
        return to_make

    def _check_same_settings(self):
        if not (self.folder / INDEX_NAME).exists():
            return
        existing = read_index(self.folder, self.argument, self.made_by)
        for name, value in self.index.items():
            if existing.get(name) != value:
                raise ValueError(
                    f"{name}: got {value}, but the {self.stem} in {self.argument} {self.folder} were made with "
                    f"{existing.get(name)}; use the same settings to continue them, or another {self.argument}"
                )

    def _is_good(self, shard: int) -> bool:
        try:
            self.read(shard)
        except FileNotFoundError:
            return False
        except ValueError as error:
            warnings.warn(f"{error}; it is made again", stacklevel=3)
            return False
        return True


class Rows:
    """The rows of some tensors as if they were one [N, ...]; those that are asked for are read, and no others.

    Args:
        pieces: tensors [n_i, ...] of the same shape but for n_i, such as maps of files.
        rows: which of their rows these are, LongTensor [N]; default: all.
    """

    def __init__(self, pieces: Sequence[torch.Tensor], rows: torch.Tensor | None = None):
        self._pieces = list(pieces)
        self._starts = torch.tensor([0, *(len(piece) for piece in self._pieces)]).cumsum(0)
        self._rows = torch.arange(int(self._starts[-1])) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), *self._pieces[0].shape[1:]))

    def __getitem__(self, indices: torch.Tensor | Sequence[int] | slice) -> torch.Tensor:
        """Copies of some rows, in the order asked for."""
        rows = self._rows[indices]
        places = torch.searchsorted(self._starts, rows, right=True) - 1
        # `stack` copies out of the mapped files.
        return torch.stack(
            [self._pieces[p][r] for p, r in zip(places.tolist(), (rows - self._starts[places]).tolist())]
        )

    def part(self, indices: torch.Tensor) -> "Rows":
        """Some of the rows, still unread."""
        return Rows(self._pieces, self._rows[indices])
