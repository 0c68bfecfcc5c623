# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Captions and images as a text-conditional teacher sees them: embeddings and latents, computed once and kept on disk.

A folder of them has two tables. `embeddings/` depends on the captions and the text encoder only, `latents/` on the
images and the VAE too, so another VAE costs no second pass of the text encoder. Training reads the rows it needs and
holds neither text encoder nor VAE.
"""

import hashlib
import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.utils import logging
from tqdm.auto import tqdm

from .data import DataConfig, ImageDataset, as_pixels, fit_image, load_hf, open_image, undecoded
from .files import check_writable, fingerprint, load_tensors, save_tensors
from .prompts import POOLINGS, embed_prompts, encoder_fingerprint, pool_embeddings
from .shards import Rows, Shards, read_index


logger = logging.get_logger(__name__)

MADE_BY = "training_scripts/cache_captions.py"
NULL_FILE = "null.safetensors"


def _table(name: str, folder: Path, index: dict, argument: str) -> Shards:
    return Shards(folder / name, index, index["num_rows"], name, argument, MADE_BY)


def is_caption(value) -> bool:
    """Whether a row's caption says something."""
    return isinstance(value, str) and bool(value.strip())


def load_captions(config: DataConfig, with_images: bool):
    """Opens a HF data set with captions: an imagefolder with metadata, parquet, webdataset, or a name on the Hub.

    Returns:
        A `datasets.Dataset` with the column "caption" and, if asked for, "image" (undecoded).

    Raises:
        FileNotFoundError, ValueError: it cannot be read, or a column is missing (those there are are named).
    """
    if with_images and config.image_column == config.caption_column:
        raise ValueError(f"caption_column: got {config.caption_column!r}, which is image_column too; two are needed")
    dataset = load_hf(config, config.dataset_name)
    columns = {config.caption_column: ("caption_column", "caption")}
    if with_images:
        columns[config.image_column] = ("image_column", "image")
    for column, (argument, _) in columns.items():
        if column not in dataset.column_names:
            raise ValueError(f"{argument}: got {column!r}; the columns are {dataset.column_names}")
    dataset = dataset.select_columns(list(columns))
    dataset = dataset.rename_columns({old: new for old, (_, new) in columns.items() if old != new})
    if with_images:
        dataset = undecoded(dataset, config)
    if config.max_train_samples is not None and config.max_train_samples < len(dataset):
        dataset = dataset.shuffle(seed=config.train_samples_seed).select(range(config.max_train_samples))
    return dataset


def cache_embeddings(
    output_dir: str | Path,
    dataset,
    tokenizer,
    text_encoder,
    batch_size: int = 64,
    shard_size: int = 4096,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = True,
) -> Shards:
    """Embeds all captions into `output_dir/embeddings`, or goes on with it.

    A row without a caption (None, no text, or blank) is skipped with a warning that names it, and counted.

    Args:
        output_dir: the folder of the cache.
        dataset: from `load_captions`.
        tokenizer, text_encoder: the teacher's.
        batch_size: captions per pass of the encoder.
        shard_size: captions per file, which is what an interruption may lose.
        rank, world_size, progress: as in `Shards.make`.

    Raises:
        ValueError: `output_dir` cannot be written, or holds embeddings of other captions or another encoder.
    """
    folder = check_writable(output_dir, "output_dir")
    index = {
        "text_encoder": encoder_fingerprint(text_encoder),
        "captions": _captions_digest(dataset),
        "num_rows": len(dataset),
        "shard_size": shard_size,
    }

    def make_shard(rows: range, bar: tqdm):
        captions = dataset[rows.start : rows.stop]["caption"]
        good = [i for i, caption in enumerate(captions) if is_caption(caption)]
        for i in sorted(set(range(len(captions))) - set(good)):
            logger.warning(f"caption_column: row {rows[i]} has no caption ({captions[i]!r}); it is skipped")
        bar.update(len(captions) - len(good))
        pieces = []
        for start in range(0, len(good), batch_size):
            embeddings, mask = embed_prompts(tokenizer, text_encoder, [captions[i] for i in good[start:][:batch_size]])
            pooled = {name: pool_embeddings(embeddings, mask, name).half() for name in POOLINGS}
            pieces.append({"embeddings": embeddings.half().cpu(), **pooled})
            bar.update(len(mask))
        if not pieces:
            raise ValueError(f"caption_column: rows {rows[0]} to {rows[-1]} have no caption at all")
        tensors = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
        tensors["rows"] = torch.tensor(rows)[good]
        return tensors, {"captions": json.dumps([captions[i] for i in good])}

    shards = _table("embeddings", folder, index, "output_dir")
    shards.make(make_shard, rank, world_size, progress)
    null, _ = embed_prompts(tokenizer, text_encoder, [""])
    save_tensors(shards.folder / NULL_FILE, {"embeddings": null[0].half()})
    return shards


@torch.no_grad()
def cache_latents(
    output_dir: str | Path,
    dataset,
    vae: AutoencoderKL,
    resolution: int,
    batch_size: int = 8,
    shard_size: int = 4096,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = True,
) -> Shards:
    """Encodes all images with a caption into `output_dir/latents`, or goes on with it.

    Latents are the posterior's means, shifted and scaled as the teacher sees them. An image that cannot be read is
    skipped with a warning that names it, and counted.

    Args:
        output_dir, shard_size, rank, world_size, progress: as `cache_embeddings`.
        dataset: from `load_captions`, with images: brought to `resolution` (shorter side, Lanczos, center crop, RGB).
        vae: the teacher's.
        resolution: side of the images in pixels.
        batch_size: images per pass of the VAE.

    Raises:
        ValueError: `output_dir` cannot be written, or holds latents of other data or another VAE.
    """
    folder = check_writable(output_dir, "output_dir")
    index = {
        "vae": vae_fingerprint(vae),
        "captions": _captions_digest(dataset),
        "resolution": resolution,
        "num_rows": len(dataset),
        "shard_size": shard_size,
    }
    shift, scale = vae.config.shift_factor or 0.0, vae.config.scaling_factor

    def make_shard(rows: range, bar: tqdm):
        latents, kept = [], []
        for start in range(rows.start, rows.stop, batch_size):
            batch = dataset[start : min(start + batch_size, rows.stop)]
            images = {
                start + i: _read(*entry, start + i, resolution)
                for i, entry in enumerate(zip(batch["image"], batch["caption"]))
            }
            images = {row: image for row, image in images.items() if image is not None}
            if images:
                pixels = as_pixels(list(images.values()))
                mean = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mean
                latents.append(((mean.float() - shift) * scale).half().cpu())
                kept += images
            bar.update(len(batch["caption"]))
        if not latents:
            raise ValueError(
                f"image_column: rows {rows[0]} to {rows[-1]} have no readable image with a caption at all"
            )
        return {"latents": torch.cat(latents), "rows": torch.tensor(kept)}, {}

    shards = _table("latents", folder, index, "output_dir")
    shards.make(make_shard, rank, world_size, progress)
    return shards


def _read(record: dict | None, caption, row: int, resolution: int) -> np.ndarray | None:
    if not is_caption(caption):
        return None  # Said by `cache_embeddings`.
    try:
        image, where = open_image(record, row)
        return fit_image(image, 3, resolution)
    except (OSError, SyntaxError, ValueError) as error:
        logger.warning(f"image_column: row {row} cannot be read ({error}); it is skipped")
        return None


def read_images(dataset, rows: torch.Tensor, resolution: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Some images of a data set in memory.

    Args:
        dataset: from `load_captions`, with images.
        rows: LongTensor [N].
        resolution: as in `cache_latents`; images that cannot be read are left out as there.

    Returns:
        (images float32 [n, 3, H, W] in [-1, 1], which of `rows` they are: BoolTensor [N]).
    """
    entries = [dataset[row] for row in rows.tolist()]
    images = [_read(e["image"], e["caption"], row, resolution) for e, row in zip(entries, rows.tolist())]
    kept = torch.tensor([image is not None for image in images])
    if not kept.any():
        return torch.empty(0, 3, resolution, resolution), kept
    return as_pixels([image for image in images if image is not None]), kept


def vae_fingerprint(vae: AutoencoderKL) -> str:
    """SHA-256 of a VAE's weights and settings."""
    return fingerprint(vae.state_dict(), vae.config)


def _captions_digest(dataset) -> str:
    digest = hashlib.sha256()
    for batch in dataset.select_columns(["caption"]).iter(10_000):
        digest.update(json.dumps(batch["caption"]).encode())
    return digest.hexdigest()


class CaptionCache:
    """What `cache_embeddings` and `cache_latents` made, read when asked for.

    Args:
        captions_dir: their `output_dir`.

    Attributes:
        rows: the row of the data set of each caption, LongTensor [N], ascending.
        embeddings: [N, L, D]; null_embedding: that of the empty prompt [L, D].
        identity: names these captions with this encoder, in this order.
        skipped: rows that had no caption.

    Raises:
        FileNotFoundError, ValueError: a table is missing, damaged or unfinished (the file is named).
    """

    def __init__(self, captions_dir: str | Path):
        self.folder = Path(captions_dir)
        index = read_index(self.folder / "embeddings", "captions_dir", MADE_BY)
        shards = _table("embeddings", self.folder, index, "captions_dir").read_all(checksum=False)
        self._tensors = [tensors for tensors, _ in shards]
        self._captions = [metadata["captions"] for _, metadata in shards]
        self.rows = torch.cat([tensors["rows"] for tensors in self._tensors])
        self.text_encoder_fingerprint, self._digest = index["text_encoder"], index["captions"]
        self.skipped = index["num_rows"] - len(self.rows)
        self.identity = fingerprint({"rows": self.rows}, index)
        self.embeddings = Rows([tensors["embeddings"] for tensors in self._tensors])
        self.null_embedding = load_tensors(self.folder / "embeddings" / NULL_FILE, "captions_dir")[0]["embeddings"]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def captions(self) -> list[str]:
        """All captions, in the order of `embeddings`."""
        return [caption for captions in self._captions for caption in json.loads(captions)]

    def pooled(self, pooling: str) -> list[torch.Tensor]:
        """One vector per caption, float16 [n, D] shards: what an `EmbeddingRouter` is fitted on."""
        return [tensors[pooling] for tensors in self._tensors]

    def images(self, vae_id: str | None = None) -> ImageDataset:
        """The latents, each labelled with the number of its caption; batches give the caption's embedding.

        Args:
            vae_id: `vae_fingerprint` of the teacher's VAE; None leaves that unchecked.

        Raises:
            FileNotFoundError, ValueError: there are no latents, or those of other captions or another VAE.
        """
        index = read_index(self.folder / "latents", "captions_dir", MADE_BY)
        if vae_id not in (None, index["vae"]):
            raise ValueError(
                f"captions_dir: the latents in {self.folder} are of another VAE than the teacher's; make new ones "
                f"with {MADE_BY} in another --output_dir"
            )
        if index["captions"] != self._digest:
            raise ValueError(
                f"captions_dir: latents and embeddings in {self.folder} are of different data; make new ones"
            )
        shards = [
            tensors for tensors, _ in _table("latents", self.folder, index, "captions_dir").read_all(checksum=False)
        ]
        labels = torch.searchsorted(self.rows, torch.cat([tensors["rows"] for tensors in shards]))
        latents = Rows([tensors["latents"] for tensors in shards])
        read = partial(_read_rows, latents)
        return ImageDataset(read, labels, len(self), tuple(latents.shape[1:]), conditions=self.embeddings)


def _read_rows(latents: Rows, rows: list[int]) -> torch.Tensor:
    return latents[rows].float()
