# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Teacher pairs (noise, condition) -> sample: made once, shared by all students, safe to interrupt.

The shards hold images (or latents), labels (which condition) and seeds. The noise is not stored: its seed gives it
back.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.utils.data import Dataset, Subset
from tqdm.auto import tqdm

from .account import add_accounts, hardware, multiply, peak_memory
from .denoiser import Denoiser
from .files import check_writable, write_json
from .flops import count_work
from .sampling import SAMPLERS
from .shards import Rows, Shards, read_index


MADE_BY = "training_scripts/generate_pairs.py"
# The identity of the conditions 0 ... num_classes - 1.
CLASSES = "classes"


def pair_seeds(seed: int, pairs: range) -> torch.Tensor:
    """The noise seeds of some pairs of the set made with `seed`: LongTensor [len(pairs)], values in [0, 2^32).

    torch's CPU generator uses only the low 32 bits of a seed, so hashed seeds would soon meet (birthday paradox).
    Stepping by an odd number visits all 2^32 values before one comes again.
    """
    start = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "little")
    return (start + 0x9E3779B1 * torch.arange(pairs.start, pairs.stop)) % 2**32


def pair_noise(seeds: Sequence[int] | torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Unit-variance noise, one generator per seed: a pair's noise does not depend on its batch.

    Args:
        seeds: [B] whole numbers in [0, 2^32).
        shape: of one sample, (C, H, W).

    Returns:
        float32 [B, *shape], on the CPU.
    """
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds])


def _shards(folder: Path, index: dict, argument: str) -> Shards:
    return Shards(folder, index, index["num_pairs"], "pairs", argument, MADE_BY)


class PairDataset(Dataset):
    """The full pair set, all conditions: the regression of every student uses all of it (MSD, arXiv 2410.23274).

    Every shard is checked against its SHA-256 when the set is opened; the images stay in their files until asked for.
    As with `ImageDataset`, a batch comes whole from `__getitems__`.

    Args:
        pairs_dir: a folder made by `generate_pairs`.
        teacher_fingerprint: `files.model_fingerprint` of the teacher; None leaves that unchecked.
        conditions: [n, ...], what the networks take for each label; None: the labels themselves.
        identity: of these conditions, as given to `generate_pairs`.

    Raises:
        FileNotFoundError: no such folder, or no index in it.
        ValueError: the pairs were made by another teacher or for other conditions, or a shard is missing or corrupt
            (it is named).
    """

    def __init__(
        self,
        pairs_dir: str | Path,
        teacher_fingerprint: str | None = None,
        conditions: torch.Tensor | Rows | None = None,
        identity: str = CLASSES,
    ):
        path = Path(pairs_dir)
        index = read_index(path, "pairs_dir", MADE_BY)
        if teacher_fingerprint not in (None, index["fingerprint"]):
            raise ValueError(
                f"pairs_dir: the pairs at {path} were made by another teacher (fingerprint "
                f"{index['fingerprint'][:12]}, this teacher's is {teacher_fingerprint[:12]}); make this teacher's pairs with "
                f"{MADE_BY} in another --output_dir"
            )
        # Absent in pairs of before there were captions.
        if index.get("identity") != identity:
            raise ValueError(
                f"pairs_dir: the pairs at {path} were made for other conditions (captions or classes); make new ones "
                f"with {MADE_BY} in another --output_dir"
            )
        shards = [tensors for tensors, _ in _shards(path, index, "pairs_dir").read_all()]
        self.image_shape = tuple(index["image_shape"])
        self.num_conditions = index["num_conditions"]
        self.labels = torch.cat([shard["labels"] for shard in shards])
        self._conditions = torch.arange(self.num_conditions) if conditions is None else conditions
        self._seeds = torch.cat([shard["seeds"] for shard in shards])
        self._images = Rows([shard["images"] for shard in shards])

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, rows: torch.Tensor) -> Subset:
        """The pairs of some conditions only, in their old order: an ablation, since it costs a student modes.

        Args:
            rows: which of the conditions, LongTensor [n].

        Raises:
            ValueError: no pair has one of them.
        """
        mine = torch.isin(self.labels, rows).nonzero().flatten().tolist()
        if not mine:
            raise ValueError(f"pairs_dir: none of the {len(self)} pairs has one of a part's {len(rows)} conditions")
        return Subset(self, mine)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """{"noise": float32 [C, H, W], "cond": [...], "images": float32 [C, H, W]}."""
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int] | torch.Tensor) -> dict[str, torch.Tensor]:
        """{"noise": float32 [B, C, H, W], "cond": [B, ...], "images": float32 [B, C, H, W]}, in order."""
        indices = torch.as_tensor(indices, dtype=torch.long)
        noise = pair_noise(self._seeds[indices], self.image_shape)
        return {"noise": noise, "cond": self._conditions[self.labels[indices]], "images": self._images[indices]}


def generate_pairs(
    teacher: Denoiser,
    output_dir: str | Path,
    num_pairs: int,
    conditions: torch.Tensor | Rows,
    image_shape: tuple[int, int, int],
    fingerprint: str,
    identity: str = CLASSES,
    seed: int = 0,
    sampler: str = "heun",
    num_steps: int = 18,
    guidance_scale: float | None = None,
    shard_size: int = 1024,
    batch_size: int = 64,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = True,
) -> int:
    """Samples the teacher into a folder of pairs, or continues one that was begun.

    Pair i has condition i mod n and noise of its own, so the set depends neither on the number of processes nor on
    interruptions: good shards are kept; missing and corrupt ones are made (again). Samplers are deterministic, as for
    DMD's pairs (arXiv 2311.18828). Each process adds what its shards cost to a file of its own, for `pairs_account`.

    Args:
        teacher: put into eval mode; samples on the device of its parameters.
        output_dir: folder to make or continue; shared by the processes.
        num_pairs: size of the whole set.
        conditions: [n, ...] as the teacher takes them: `torch.arange(num_classes)`, or prompt embeddings.
        image_shape: of one sample, (C, H, W).
        fingerprint: `files.model_fingerprint` of the teacher, for `PairDataset` to check.
        identity: of the conditions, for `PairDataset` to check.
        seed: of the whole set.
        sampler: one of `sampling.SAMPLERS`.
        num_steps, guidance_scale: of the sampler.
        shard_size: pairs per file, which is what an interruption may lose.
        batch_size: samples per network call; with another one the images may differ in the last bits.
        rank: this process makes the shards j with j mod world_size == rank.
        world_size: number of processes.
        progress: shows a bar with rate and remaining time.

    Returns:
        The number of pairs this call made, those it kept not counted.

    Raises:
        ValueError: a number out of range; `output_dir` cannot be written, or holds pairs made with other settings (the
            setting is named); the teacher gave a value that is not finite.
    """
    index = {
        "fingerprint": fingerprint,
        "num_pairs": num_pairs,
        "num_conditions": len(conditions),
        "identity": identity,
        "image_shape": list(image_shape),
        "seed": seed,
        "sampler": sampler,
        "num_steps": num_steps,
        "guidance_scale": None if guidance_scale is None else float(guidance_scale),
        "shard_size": shard_size,
    }
    _check_settings(index, batch_size, rank, world_size)
    folder = check_writable(output_dir, "output_dir")
    teacher.eval()
    work: dict = {}

    def make_shard(pairs: range, bar: tqdm):
        began = time.perf_counter()
        tensors = _make_shard(teacher, conditions, index, pairs, batch_size, bar, work)
        cost = {**multiply(work, len(pairs), work["pairs"]), "seconds": time.perf_counter() - began}
        _add_to_account(folder / f"account_{rank}.json", cost, next(teacher.parameters()).device)
        return tensors, {}

    return _shards(folder, index, "output_dir").make(make_shard, rank, world_size, progress)


def _check_settings(index: dict, batch_size: int, rank: int, world_size: int) -> None:
    names = ("num_pairs", "num_conditions", "num_steps", "shard_size")
    for name, value in {**{name: index[name] for name in names}, "batch_size": batch_size}.items():
        if value < 1:
            raise ValueError(f"{name}: got {value}; at least 1 is needed")
    if len(index["image_shape"]) != 3 or min(index["image_shape"]) < 1:
        raise ValueError(f"image_shape: got {index['image_shape']}; (C, H, W), each at least 1, is needed")
    if index["sampler"] not in SAMPLERS:
        raise ValueError(f"sampler: got {index['sampler']!r}; one of {', '.join(SAMPLERS)} is needed")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: got {rank} with world_size {world_size}; allowed is [0, world_size)")


def _add_to_account(path: Path, cost: dict, device: torch.device):
    cost |= {"peak_memory": peak_memory(device), "hardware": [hardware(device)]}
    earlier = [json.loads(path.read_text())] if path.exists() else []
    write_json(path, add_accounts([*earlier, cost]))


def pairs_account(pairs_dir: str | Path) -> dict:
    """What a set of pairs cost, see `account`: "pairs" made (more than there are, if damaged ones were made again),
    "passes" of the teacher, "flops", "seconds", summed over processes, "peak_memory" and "hardware".

    Empty if nobody kept account of all of them, as in sets of earlier versions.

    Raises:
        FileNotFoundError, ValueError: it is no folder of pairs.
    """
    total = add_accounts([json.loads(path.read_text()) for path in sorted(Path(pairs_dir).glob("account_*.json"))])
    complete = total.get("pairs", 0) >= read_index(pairs_dir, "pairs_dir", MADE_BY)["num_pairs"]
    return total if complete else {}


def _make_shard(
    teacher: Denoiser,
    conditions: torch.Tensor | Rows,
    index: dict,
    pairs: range,
    batch_size: int,
    bar: tqdm,
    work: dict,
) -> dict[str, torch.Tensor]:
    """Makes the pairs of a shard. The first batch of all is counted, and `work` filled with what it took."""
    seeds = pair_seeds(index["seed"], pairs)
    labels = torch.arange(pairs.start, pairs.stop) % index["num_conditions"]
    sample, device = SAMPLERS[index["sampler"]], next(teacher.parameters()).device
    images = []
    for batch_seeds, batch_labels in zip(seeds.split(batch_size), labels.split(batch_size)):
        z = pair_noise(batch_seeds, index["image_shape"]).to(device)
        cond = conditions[batch_labels].to(device)
        with nullcontext({}) if work else count_work({"teacher": teacher.model}) as counted:
            x0 = sample(teacher, z, cond, index["num_steps"], index["guidance_scale"])
        if not work:
            work.update(counted, pairs=len(z))
        images.append(x0.float().cpu())
        if not images[-1].isfinite().all():
            raise ValueError(f"teacher: made an image that is not finite, among labels {batch_labels.tolist()}")
        bar.update(len(z))
    return {"images": torch.cat(images), "labels": labels, "seeds": seeds}
