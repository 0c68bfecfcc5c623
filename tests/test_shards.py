# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Rows over pieces, and shards that keep less than they cover. (Resuming and damage are tried in test_pairs.)"""

import pytest
import torch

from diffusers_msd.shards import Rows, Shards, read_index


PIECES = [torch.arange(6).reshape(3, 2), torch.arange(6, 8).reshape(1, 2), torch.arange(8, 14).reshape(3, 2)]


@pytest.mark.parametrize("indices", [[0, 6, 3], torch.tensor([2, 2, 4]), slice(1, 5), [0]])
def test_rows_are_those_of_the_concatenation(indices):
    assert torch.equal(Rows(PIECES)[indices], torch.cat(PIECES)[indices])
    assert Rows(PIECES).shape == (7, 2)


def test_a_part_of_a_part_counts_its_own_rows():
    part = Rows(PIECES).part(torch.tensor([6, 1, 3])).part(torch.tensor([2, 0]))
    assert len(part) == 2 and torch.equal(part[[0, 1]], torch.cat(PIECES)[[3, 6]])


def test_rows_are_copies():
    pieces = [torch.zeros(2, 2)]
    Rows(pieces)[[0]].fill_(1)
    assert not pieces[0].any()


def test_rows_outside_are_refused():
    with pytest.raises(IndexError):
        Rows(PIECES)[[7]]


def test_shards_of_unequal_length_come_back_whole_and_other_settings_are_named(tmp_path):
    def keep_even(rows, bar):
        bar.update(len(rows))
        return {"n": torch.tensor([row for row in rows if row % 2 == 0])}, {"first": str(rows[0])}

    shards = Shards(tmp_path, {"shard_size": 3, "rule": "even"}, 8, "numbers", "output_dir", "the script")
    assert [list(shards.rows(i)) for i in range(len(shards))] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert shards.make(keep_even, progress=False) == 8
    assert shards.make(keep_even, progress=False) == 0
    tensors, metadata = zip(*shards.read_all())
    assert Rows([t["n"] for t in tensors])[:].tolist() == [0, 2, 4, 6]
    assert [m["first"] for m in metadata] == ["0", "3", "6"]
    other = Shards(tmp_path, {"shard_size": 3, "rule": "odd"}, 8, "numbers", "output_dir", "the script")
    with pytest.raises(ValueError, match="rule: got odd, but the numbers in output_dir"):
        other.make(keep_even, progress=False)
    assert read_index(tmp_path, "output_dir", "the script")["rule"] == "even"
