# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
import shutil

import pytest
import torch
from helpers import edm_scheduler, tiny_unet

from diffusers_msd.denoiser import denoiser_for
from diffusers_msd.files import model_fingerprint
from diffusers_msd.pairs import PairDataset, generate_pairs, pair_noise, pair_seeds
from diffusers_msd.sampling import sample_heun
from diffusers_msd.schedule import NoiseSchedule


SHAPE = (1, 8, 8)
# 10 pairs in shards of 4, 4 and 2.
SETTINGS = {
    "num_pairs": 10,
    "conditions": torch.arange(4),
    "image_shape": SHAPE,
    "num_steps": 2,
    "shard_size": 4,
    "batch_size": 3,
}


@pytest.fixture(scope="module")
def teacher():
    return denoiser_for(tiny_unet(), NoiseSchedule.from_scheduler(edm_scheduler()))


def generate(teacher, folder, **changes):
    settings = {**SETTINGS, "fingerprint": "f" * 64, "progress": False, **changes}
    return generate_pairs(teacher, folder, **settings)


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory):
    """A finished set that tests read or copy, never change."""
    folder = tmp_path_factory.mktemp("pairs")
    assert generate(teacher, folder) == 10
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def contents(folder):
    """Without the accounts, which have seconds in them."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith("account_")}


class Stop(Exception):
    pass


def interrupt_after(teacher, calls):
    """Raises in the teacher's forward pass once it has run `calls` times; returns the handle that ends this."""
    left = [calls]

    def hook(module, args):
        if left[0] == 0:
            raise Stop
        left[0] -= 1

    return teacher.register_forward_pre_hook(hook)


def test_a_pair_is_the_teachers_heun_sample_of_its_noise_and_label(teacher, whole):
    dataset = PairDataset(whole, "f" * 64)
    batch = dataset.__getitems__(range(10))
    assert dataset.labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1] and len(dataset) == 10
    assert torch.equal(batch["cond"], dataset.labels)
    assert batch["noise"].dtype == batch["images"].dtype == torch.float32
    assert torch.equal(batch["noise"], pair_noise(pair_seeds(0, range(10)), SHAPE))
    expected = sample_heun(teacher, batch["noise"], batch["cond"], num_steps=2)
    # Batches of 3 here, of 10 there. An untrained teacher's images are large.
    assert expected.std() > 1
    assert (batch["images"] - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_batch_keeps_the_order_of_its_indices_and_equals_single_items(whole):
    dataset = PairDataset(whole)
    batch = dataset.__getitems__(torch.tensor([9, 0, 4, 9]))
    for row, index in enumerate([9, 0, 4, 9]):
        assert all(torch.equal(batch[name][row], dataset[index][name]) for name in ("noise", "cond", "images"))
    with pytest.raises(IndexError):
        dataset[10]


def test_a_part_has_the_pairs_of_its_conditions_only(whole):
    dataset = PairDataset(whole)
    part = dataset.part(torch.tensor([1, 3]))
    batch = part.__getitems__([0, 1, 4])
    assert len(part) == 5 and batch["cond"].tolist() == [1, 3, 1]
    expected = dataset.__getitems__([1, 3, 9])
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match="^pairs_dir: none of the 10 pairs"):
        dataset.part(torch.tensor([4]))


def test_changing_a_batch_does_not_change_the_set(whole):
    before, dataset = contents(whole), PairDataset(whole)
    dataset.__getitems__([0, 1])["images"].zero_()
    dataset[0]["images"].zero_()
    assert dataset.__getitems__([0, 1])["images"].abs().sum() > 0
    assert contents(whole) == before


def test_an_interrupted_run_continues_where_it_stopped(teacher, whole, tmp_path):
    # A shard of 4 is two batches of 2 * 2 - 1 network calls; the ninth call is in the second shard.
    handle = interrupt_after(teacher, calls=8)
    with pytest.raises(Stop):
        generate(teacher, tmp_path / "out")
    handle.remove()
    first = tmp_path / "out" / "pairs-00000.safetensors"
    assert sorted(contents(tmp_path / "out")) == ["index.json", "pairs-00000.safetensors"]
    stamp = first.stat().st_mtime_ns, first.stat().st_ino
    with pytest.raises(ValueError, match="pairs-00001.safetensors is missing.*generate_pairs.py --output_dir"):
        PairDataset(tmp_path / "out")
    assert generate(teacher, tmp_path / "out") == 6
    assert (first.stat().st_mtime_ns, first.stat().st_ino) == stamp
    assert contents(tmp_path / "out") == contents(whole)
    assert generate(teacher, tmp_path / "out") == 0


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def truncate_header(path):
    path.write_bytes(path.read_bytes()[:20])


def flip_in_tensors(path):
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def flip_in_label_dtype(path):
    content = path.read_bytes()
    assert content.count(b'"I64"') == 2
    path.write_bytes(content.replace(b'"I64"', b'"U64"'))


def another_shard(path):
    shutil.copy(path.with_name("pairs-00000.safetensors"), path)


@pytest.mark.parametrize("damage", [truncate, truncate_header, flip_in_tensors, flip_in_label_dtype, another_shard])
def test_a_corrupt_shard_is_named_and_only_that_one_made_again(teacher, whole, copy, damage):
    damage(copy / "pairs-00001.safetensors")
    others = [path for path in copy.iterdir() if path.name in ("pairs-00000.safetensors", "pairs-00002.safetensors")]
    inodes = [path.stat().st_ino for path in others]
    with pytest.raises(ValueError, match="pairs-00001.safetensors is .*corrupt.*generate_pairs.py --output_dir"):
        PairDataset(copy)
    with pytest.warns(UserWarning, match="pairs-00001.safetensors is .*corrupt.*made again"):
        assert generate(teacher, copy) == 4
    assert [path.stat().st_ino for path in others] == inodes
    assert contents(copy) == contents(whole)


def test_two_ranks_make_the_pairs_of_one_process(teacher, whole, tmp_path):
    # The later rank first: neither waits for the other's files.
    assert generate(teacher, tmp_path, rank=1, world_size=2) == 4
    assert generate(teacher, tmp_path, rank=0, world_size=2) == 6
    assert contents(tmp_path) == contents(whole)


def test_more_ranks_than_shards_is_no_error(teacher, whole, tmp_path):
    assert [generate(teacher, tmp_path, rank=rank, world_size=5) for rank in range(5)] == [4, 4, 2, 0, 0]
    assert contents(tmp_path) == contents(whole)


@pytest.mark.parametrize(
    "name, value",
    [
        ("fingerprint", "e" * 64),
        ("num_pairs", 11),
        ("conditions", torch.arange(3)),
        ("image_shape", (1, 16, 16)),
        ("seed", 1),
        ("num_steps", 3),
        ("guidance_scale", 2),
        ("shard_size", 5),
    ],
)
def test_other_settings_in_the_same_folder_are_named_and_nothing_is_touched(teacher, copy, name, value):
    before = contents(copy)
    with pytest.raises(ValueError, match=f"{name}: got .* were made with .*output_dir"):
        generate(teacher, copy, **{name: value})
    assert contents(copy) == before


def test_shards_of_another_teacher_are_not_kept_when_the_index_is_lost(teacher, whole, copy):
    (copy / "index.json").unlink()
    assert generate(teacher, copy) == 0
    assert contents(copy) == contents(whole)
    (copy / "index.json").unlink()
    with pytest.warns(UserWarning, match="corrupt"):
        assert generate(teacher, copy, fingerprint="e" * 64) == 10
    PairDataset(copy, "e" * 64)


def test_pairs_of_another_teacher_are_refused(teacher, tmp_path):
    made_by = model_fingerprint(teacher.model, edm_scheduler())
    generate(teacher, tmp_path, num_pairs=2, fingerprint=made_by)
    PairDataset(tmp_path, made_by)
    other = model_fingerprint(tiny_unet(seed=1), edm_scheduler())
    with pytest.raises(
        ValueError, match=f"pairs_dir: .*another teacher.*{made_by[:12]}.*{other[:12]}.*generate_pairs.py"
    ):
        PairDataset(tmp_path, other)


def test_a_folder_without_pairs_and_a_broken_index_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="pairs_dir: .*none holds no index.json"):
        PairDataset(tmp_path / "none")
    (tmp_path / "index.json").write_text('{"num_pairs": ')
    with pytest.raises(ValueError, match="pairs_dir: .*index.json is no JSON"):
        PairDataset(tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_pairs": 0}, "num_pairs: got 0"),
        ({"conditions": torch.arange(0)}, "num_conditions: got 0"),
        ({"num_steps": 0}, "num_steps: got 0"),
        ({"shard_size": -1}, "shard_size: got -1"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"image_shape": (8, 8)}, r"image_shape: got \[8, 8\]"),
        ({"rank": 2, "world_size": 2}, "rank: got 2"),
        ({"guidance_scale": 2.0}, "guidance_scale: 2.0"),
    ],
)
def test_bad_settings_are_named_and_leave_no_index(teacher, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        generate(teacher, tmp_path / "out", **changes)
    assert not (tmp_path / "out" / "index.json").exists()


def test_an_unwritable_folder_is_named_before_the_teacher_runs(teacher, tmp_path):
    (tmp_path / "file").write_text("")
    handle = interrupt_after(teacher, calls=0)
    with pytest.raises(ValueError, match="output_dir: cannot write in"):
        generate(teacher, tmp_path / "file")
    handle.remove()


def test_a_teacher_that_makes_nan_writes_no_shard(tmp_path):
    unet = tiny_unet()
    unet.conv_out.bias.data.fill_(float("nan"))
    teacher = denoiser_for(unet, NoiseSchedule.from_scheduler(edm_scheduler()))
    with pytest.raises(ValueError, match=r"teacher: .*not finite.* \[0, 1, 2\]"):
        generate(teacher, tmp_path)
    assert contents(tmp_path) == {}


def test_dropout_of_the_teacher_is_off(whole, tmp_path):
    teacher = denoiser_for(tiny_unet(dropout=0.5).train(), NoiseSchedule.from_scheduler(edm_scheduler()))
    generate(teacher, tmp_path)
    assert contents(tmp_path) == contents(whole)


def test_noise_of_a_pair_does_not_depend_on_its_batch_and_is_standard_normal():
    seeds = pair_seeds(3, range(2000))
    noise = pair_noise(seeds, SHAPE)
    assert torch.equal(noise[[1999, 7]], pair_noise(seeds[[1999, 7]], SHAPE))
    flat = noise.flatten(1).double()
    assert abs(flat.mean()) < 0.02 and abs(flat.std() - 1) < 0.02
    # Neighbouring pairs share nothing: the mean of 1999 correlations over 64 values has deviation 0.003.
    assert abs((flat[1:] * flat[:-1]).mean()) < 0.015


def test_no_two_pairs_share_a_seed_and_other_sets_have_others():
    seeds = pair_seeds(0, range(300_000))
    # Random 32-bit values would meet about ten times among so many.
    assert len(seeds.unique()) == len(seeds)
    assert 0 <= seeds.min() and seeds.max() < 2**32
    assert torch.equal(pair_seeds(0, range(5, 9)), seeds[5:9])
    assert not torch.isin(pair_seeds(1, range(1000)), seeds).any()
