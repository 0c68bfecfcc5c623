# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""The cache of captions and images: what is in it, what is skipped, what is refused, and that it goes on."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from helpers import tiny_text_encoder, tiny_tokenizer, tiny_vae
from PIL import Image

from diffusers_msd.captions import (
    CaptionCache,
    cache_embeddings,
    cache_latents,
    load_captions,
    read_images,
    vae_fingerprint,
)
from diffusers_msd.data import DataConfig
from diffusers_msd.prompts import embed_prompts, pool_embeddings


WORDS = ["red cat", "blue moon", "a dog", "green sun", "old house", "small boat", "tall tree", "two birds"]
# Row 2 has no caption, row 5 no readable image.
CAPTIONS = [*WORDS[:2], "", *WORDS[3:]]
CLEAN = [0, 1, 3, 4, 6, 7]


def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    lines = []
    for row, (image, caption) in enumerate(zip(pixels(), CAPTIONS)):
        (folder / f"{row}.png").write_bytes(b"not a picture" if row == 5 else png(image))
        lines.append(json.dumps({"file_name": f"{row}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    tokenizer = tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return tokenizer, tiny_text_encoder(), tiny_vae()


def make(folder, data, parts, shard_size=3, **changes):
    tokenizer, text_encoder, vae = parts
    dataset = load_captions(DataConfig(train_data_dir=str(data), **changes), with_images=True)
    cache_embeddings(folder, dataset, tokenizer, text_encoder, shard_size=shard_size, batch_size=2, progress=False)
    cache_latents(folder, dataset, vae, 16, shard_size=shard_size, batch_size=2, progress=False)
    return CaptionCache(folder)


@pytest.fixture(scope="module")
def cache(tmp_path_factory, data, parts):
    return make(tmp_path_factory.mktemp("cache"), data, parts)


def test_embeddings_are_the_text_encoders_in_float16_and_rows_without_caption_are_left_out(cache, parts):
    assert cache.captions == [c for c in CAPTIONS if c] and cache.skipped == 1
    assert cache.rows.tolist() == [0, 1, 3, 4, 5, 6, 7]
    for i, caption in enumerate(cache.captions):
        embeddings, mask = embed_prompts(*parts[:2], [caption])
        assert torch.allclose(cache.embeddings[[i]].float(), embeddings, atol=5e-3)
        for pooling in ("mean", "eos"):
            pooled = torch.cat(cache.pooled(pooling))[i]
            assert torch.allclose(pooled.float(), pool_embeddings(embeddings, mask, pooling)[0], atol=5e-3)
    assert torch.allclose(cache.null_embedding.float(), embed_prompts(*parts[:2], [""])[0][0], atol=5e-3)


def test_latents_are_the_vaes_scaled_means_with_the_embedding_of_their_own_caption(cache, parts):
    images, vae = cache.images(vae_fingerprint(parts[2])), parts[2]
    assert [cache.captions[label] for label in images.labels] == [CAPTIONS[row] for row in CLEAN]
    batch = images.__getitems__(range(len(images)))
    x = torch.from_numpy(pixels()[CLEAN]).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        expected = vae.encode(x).latent_dist.mean * vae.config.scaling_factor
    assert batch["images"].dtype == torch.float32
    assert torch.allclose(batch["images"], expected, atol=2e-3 * expected.abs().max())
    assert torch.equal(batch["cond"], cache.embeddings[images.labels])


def test_a_part_holds_the_images_of_its_captions_alone(cache):
    part = cache.images().part(torch.tensor([0, 4, 6]))  # caption 4 has no image
    assert part.labels.tolist() == [0, 6]


def test_what_is_skipped_is_named(tmp_path, data, parts, caplog):
    import logging

    for name in ("diffusers_msd.captions", "diffusers"):
        logging.getLogger(name).addHandler(caplog.handler)
    make(tmp_path, data, parts)
    assert "caption_column: row 2 has no caption" in caplog.text
    assert "image_column: row 5 cannot be read" in caplog.text and "5.png" in caplog.text


def test_a_lost_or_damaged_shard_alone_is_made_again(tmp_path, data, parts):
    whole = make(tmp_path, data, parts)
    expected = whole.embeddings[:], whole.images().__getitems__(range(6))["images"]
    lost, damaged = (
        tmp_path / "embeddings" / "embeddings-00001.safetensors",
        tmp_path / "latents" / "latents-00000.safetensors",
    )
    kept = tmp_path / "embeddings" / "embeddings-00000.safetensors"
    before = kept.stat().st_mtime_ns
    lost.unlink()
    damaged.write_bytes(damaged.read_bytes()[:-4])
    with pytest.raises(ValueError, match="captions_dir: .*embeddings-00001.* is missing.*cache_captions.py"):
        CaptionCache(tmp_path)
    with pytest.warns(UserWarning, match="latents-00000.*made again"):
        again = make(tmp_path, data, parts)
    assert torch.equal(again.embeddings[:], expected[0])
    assert torch.equal(again.images().__getitems__(range(6))["images"], expected[1])
    assert kept.stat().st_mtime_ns == before


def test_another_encoder_vae_or_data_set_is_refused_by_name(tmp_path, data, parts):
    cache = make(tmp_path, data, parts)
    tokenizer, text_encoder, vae = parts
    dataset = load_captions(DataConfig(train_data_dir=str(data)), with_images=True)
    with pytest.raises(ValueError, match="text_encoder: got"):
        cache_embeddings(tmp_path, dataset, tokenizer, tiny_text_encoder(seed=1), shard_size=3, progress=False)
    with pytest.raises(ValueError, match="vae: got"):
        cache_latents(tmp_path, dataset, tiny_vae(seed=1), 16, shard_size=3, progress=False)
    with pytest.raises(ValueError, match="captions: got"):
        cache_embeddings(
            tmp_path, dataset.select(range(8)[::-1]), tokenizer, text_encoder, shard_size=3, progress=False
        )
    with pytest.raises(ValueError, match="captions_dir: the latents .* another VAE"):
        cache.images(vae_fingerprint(tiny_vae(seed=1)))


def test_the_identity_follows_captions_and_encoder(cache, tmp_path, data, parts):
    assert make(tmp_path / "a", data, parts, shard_size=3).identity == cache.identity
    other = (parts[0], tiny_text_encoder(seed=1), parts[2])
    assert make(tmp_path / "b", data, other).identity != cache.identity


def test_parquet_and_webdataset_give_the_same_rows(tmp_path, parts):
    import datasets

    (tmp_path / "parquet").mkdir(), (tmp_path / "tar").mkdir()
    rows = [{"image": {"bytes": png(p), "path": None}, "text": c} for p, c in zip(pixels()[:4], WORDS)]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "parquet" / "train.parquet"))
    with tarfile.open(tmp_path / "tar" / "train.tar", "w") as tar:
        for i, row in enumerate(rows):
            for suffix, content in (("png", row["image"]["bytes"]), ("txt", row["text"].encode())):
                info = tarfile.TarInfo(f"{i:03d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    a = make(tmp_path / "a", tmp_path / "parquet", parts)
    b = make(tmp_path / "b", tmp_path / "tar", parts, image_column="png", caption_column="txt")
    assert a.captions == b.captions == WORDS[:4]
    assert torch.equal(a.images().__getitems__([0, 3])["images"], b.images().__getitems__([0, 3])["images"])


def test_real_images_are_aligned_with_the_captions(cache, data):
    images, kept = read_images(load_captions(DataConfig(train_data_dir=str(data)), True), cache.rows, 16)
    assert cache.rows[kept].tolist() == CLEAN
    assert torch.equal(images, torch.from_numpy(pixels()[CLEAN]).permute(0, 3, 1, 2).float() / 127.5 - 1)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"caption_column": "caption"}, r"caption_column: got 'caption'; the columns are \["),
        ({"image_column": "text"}, "caption_column: got 'text', which is image_column too"),
        ({"image_column": "picture"}, "image_column: got 'picture'"),
    ],
)
def test_missing_columns_are_named(data, changes, message):
    with pytest.raises(ValueError, match=message):
        load_captions(DataConfig(train_data_dir=str(data), **changes), with_images=True)


def test_a_folder_that_is_no_cache_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="captions_dir: .*index.json; .*cache_captions.py"):
        CaptionCache(tmp_path)
