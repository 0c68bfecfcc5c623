# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Teacher pairs (noise, label) -> image: made once, shared by all students, safe to interrupt.

A folder of pairs is `index.json` (how they were made) and shards `pairs-00000.safetensors` ..., each with images,
labels, seeds and the SHA-256 of those and of the index. The noise is not stored: its seed gives it back.
"""

import hashlib
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm

from .denoiser import Denoiser
from .files import check_writable, load_tensors, save_tensors, write_json
from .files import fingerprint as sha256_of
from .sampling import sample_heun


INDEX_NAME = "index.json"


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


class PairDataset(torch.utils.data.Dataset):
    """The full pair set, all labels: the regression of every student uses all of it (MSD, arXiv 2410.23274).

    Every shard is checked against its SHA-256 when the set is opened; the images stay in their files until asked for.
    As with `ImageDataset`, a batch comes whole from `__getitems__`.

    Args:
        pairs_dir: a folder made by `generate_pairs`.
        teacher_fingerprint: `files.model_fingerprint` of the teacher; None leaves that unchecked.

    Raises:
        FileNotFoundError: no such folder, or no index in it.
        ValueError: the pairs were made by another teacher, or a shard is missing or corrupt (it is named).
    """

    def __init__(self, pairs_dir: str | Path, teacher_fingerprint: str | None = None):
        path = Path(pairs_dir)
        index = _read_index(path, "pairs_dir")
        if teacher_fingerprint not in (None, index["fingerprint"]):
            raise ValueError(
                f"pairs_dir: the pairs at {path} were made by another teacher (fingerprint "
                f"{index['fingerprint'][:12]}, this teacher's is {teacher_fingerprint[:12]}); make this teacher's pairs with "
                "training_scripts/generate_pairs.py in another --output_dir"
            )
        shards = []
        for shard in range(_num_shards(index)):
            try:
                shards.append(_read_shard(path, index, shard))
            except (FileNotFoundError, ValueError) as error:
                raise ValueError(
                    f"{error}; run training_scripts/generate_pairs.py --output_dir {path} again with the settings in "
                    f"its {INDEX_NAME}: it keeps the good shards and makes the others"
                ) from error
        self.image_shape = tuple(index["image_shape"])
        self.num_classes = index["num_classes"]
        self.labels = torch.cat([shard["labels"] for shard in shards])
        self._seeds = torch.cat([shard["seeds"] for shard in shards])
        self._images = [shard["images"] for shard in shards]
        self._shard_size = index["shard_size"]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """{"noise": float32 [C, H, W], "labels": int64 [], "images": float32 [C, H, W]}."""
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int] | torch.Tensor) -> dict[str, torch.Tensor]:
        """{"noise": float32 [B, C, H, W], "labels": int64 [B], "images": float32 [B, C, H, W]}, in order."""
        indices = torch.as_tensor(indices, dtype=torch.long)
        labels, seeds = self.labels[indices], self._seeds[indices]
        # `stack` copies out of the mapped files.
        images = torch.stack([self._images[i // self._shard_size][i % self._shard_size] for i in indices.tolist()])
        return {"noise": pair_noise(seeds, self.image_shape), "labels": labels, "images": images}


def generate_pairs(
    teacher: Denoiser,
    output_dir: str | Path,
    num_pairs: int,
    num_classes: int,
    image_shape: tuple[int, int, int],
    fingerprint: str,
    seed: int = 0,
    num_steps: int = 18,
    guidance_scale: float | None = None,
    shard_size: int = 1024,
    batch_size: int = 64,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = True,
) -> int:
    """Samples the teacher with Heun's method into a folder of pairs, or continues one that was begun.

    Pair i has label i mod num_classes and noise of its own, so the set depends neither on the number of processes nor
    on interruptions: good shards are kept; missing and corrupt ones are made (again). No churn, as for DMD's pairs
    (arXiv 2311.18828).

    Args:
        teacher: put into eval mode; samples on the device of its parameters.
        output_dir: folder to make or continue; shared by the processes.
        num_pairs: size of the whole set.
        num_classes: labels are 0 ... num_classes - 1.
        image_shape: of one sample, (C, H, W).
        fingerprint: `files.model_fingerprint` of the teacher, for `PairDataset` to check.
        seed: of the whole set.
        num_steps: as in `sample_heun`.
        guidance_scale: as in `sample_heun`.
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
        "num_classes": num_classes,
        "image_shape": list(image_shape),
        "seed": seed,
        "num_steps": num_steps,
        "guidance_scale": None if guidance_scale is None else float(guidance_scale),
        "shard_size": shard_size,
    }
    _check_numbers(index, batch_size, rank, world_size)
    folder = check_writable(output_dir, "output_dir")
    _check_same_settings(folder, index)
    mine = range(rank, _num_shards(index), world_size)
    todo = [shard for shard in mine if not _is_good(folder, index, shard)]
    to_make, total = (sum(len(_pairs_of(index, shard)) for shard in shards) for shards in (todo, mine))
    teacher.eval()
    with tqdm(total=total, initial=total - to_make, unit="pair", desc="pairs", disable=not progress) as bar:
        for shard in todo:
            tensors = _make_shard(teacher, index, shard, batch_size, bar)
            # Not earlier: settings that the sampler refuses leave no index behind.
            write_json(folder / INDEX_NAME, index)
            metadata = {"sha256": sha256_of(tensors, index, {"shard": shard})}
            save_tensors(folder / _shard_name(shard), tensors, metadata)
    # Again, for a folder of good shards that had lost its index.
    write_json(folder / INDEX_NAME, index)
    return to_make


def _check_numbers(index: dict, batch_size: int, rank: int, world_size: int) -> None:
    names = ("num_pairs", "num_classes", "num_steps", "shard_size")
    for name, value in {**{name: index[name] for name in names}, "batch_size": batch_size}.items():
        if value < 1:
            raise ValueError(f"{name}: got {value}; at least 1 is needed")
    if len(index["image_shape"]) != 3 or min(index["image_shape"]) < 1:
        raise ValueError(f"image_shape: got {index['image_shape']}; (C, H, W), each at least 1, is needed")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: got {rank} with world_size {world_size}; allowed is [0, world_size)")


def _check_same_settings(folder: Path, index: dict) -> None:
    if not (folder / INDEX_NAME).exists():
        return
    existing = _read_index(folder, "output_dir")
    for name, value in index.items():
        if existing.get(name) != value:
            raise ValueError(
                f"{name}: got {value}, but the pairs in output_dir {folder} were made with {existing.get(name)}; use "
                "the same settings to continue them, or another output_dir"
            )


def _read_index(folder: Path, argument: str) -> dict:
    path = folder / INDEX_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{argument}: {folder} holds no {INDEX_NAME}; a folder of generate_pairs is needed")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{argument}: {path} is no JSON ({error}); delete it and generate the pairs again") from error


def _num_shards(index: dict) -> int:
    return math.ceil(index["num_pairs"] / index["shard_size"])


def _pairs_of(index: dict, shard: int) -> range:
    first = shard * index["shard_size"]
    return range(first, min(first + index["shard_size"], index["num_pairs"]))


def _shard_name(shard: int) -> str:
    return f"pairs-{shard:05d}.safetensors"


def _read_shard(folder: Path, index: dict, shard: int) -> dict[str, torch.Tensor]:
    """The tensors (maps of the file), or an error that says why they are not what the index promises."""
    path = folder / _shard_name(shard)
    tensors, metadata = load_tensors(path, "pairs_dir")
    if metadata.get("sha256") != sha256_of(tensors, index, {"shard": shard}):
        raise ValueError(f"pairs_dir: {path} is corrupt (its SHA-256 is not that of its content and {INDEX_NAME})")
    return tensors


def _is_good(folder: Path, index: dict, shard: int) -> bool:
    try:
        _read_shard(folder, index, shard)
    except FileNotFoundError:
        return False
    except ValueError as error:
        warnings.warn(f"{error}; it is made again", stacklevel=3)
        return False
    return True


def _make_shard(teacher: Denoiser, index: dict, shard: int, batch_size: int, bar: tqdm) -> dict[str, torch.Tensor]:
    pairs = _pairs_of(index, shard)
    seeds, labels = pair_seeds(index["seed"], pairs), torch.arange(pairs.start, pairs.stop) % index["num_classes"]
    device = next(teacher.parameters()).device
    images = []
    for batch_seeds, batch_labels in zip(seeds.split(batch_size), labels.split(batch_size)):
        z = pair_noise(batch_seeds, index["image_shape"]).to(device)
        x0 = sample_heun(teacher, z, batch_labels.to(device), index["num_steps"], index["guidance_scale"])
        images.append(x0.float().cpu())
        if not images[-1].isfinite().all():
            raise ValueError(f"teacher: made an image that is not finite, among labels {batch_labels.tolist()}")
        bar.update(len(z))
    return {"images": torch.cat(images), "labels": labels, "seeds": seeds}
