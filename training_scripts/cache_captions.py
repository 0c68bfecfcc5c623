# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Computes what training on captions needs, once: text embeddings, and latents of the images.

    accelerate launch training_scripts/cache_captions.py --pretrained_teacher_model path/to/sd \
        --train_data_dir path/to/images --caption_column text --output_dir runs/captions

Images come with captions as HF `datasets` reads them: a folder with metadata.jsonl, parquet, webdataset, or a name on
the Hub. Run again after an interruption, it goes on. All students, pairs and partitions share one such folder.
"""

from dataclasses import dataclass, field

import torch
from accelerate import PartialState

from diffusers_msd.captions import CaptionCache, cache_embeddings, cache_latents, load_captions
from diffusers_msd.config import parse_config, run_script
from diffusers_msd.data import DataConfig
from diffusers_msd.files import check_writable
from diffusers_msd.teachers import load_text_parts


@dataclass
class CacheConfig:
    """What is computed with what."""

    pretrained_teacher_model: str = field(metadata={"help": "Folder or Hub id with tokenizer/, text_encoder/, vae/."})
    output_dir: str = field(metadata={"help": "Folder of the cache."})
    captions_only: bool = field(
        default=False, metadata={"help": "Embeddings only: enough for pairs and the DM stage, which see no images."}
    )
    text_encode_batch_size: int = field(default=64, metadata={"help": "Captions per pass of the text encoder."})
    vae_encode_batch_size: int = field(default=8, metadata={"help": "Images per pass of the VAE."})
    shard_size: int = field(default=4096, metadata={"help": "Rows per file."})


def main():
    config, data = parse_config([CacheConfig, DataConfig], __doc__)
    for name in ("text_encode_batch_size", "vae_encode_batch_size", "shard_size"):
        if vars(config)[name] < 1:
            raise ValueError(f"{name}: at least 1 expected, got {vars(config)[name]}")
    if not config.captions_only and data.resolution is None:
        raise ValueError("resolution: the side of the images in pixels is needed, such as 512 for Stable Diffusion 1")
    state = PartialState(cpu=not torch.cuda.is_available())
    check_writable(config.output_dir, "output_dir")
    parts = load_text_parts(config.pretrained_teacher_model)
    dataset = load_captions(data, with_images=not config.captions_only)
    shared = {
        "shard_size": config.shard_size,
        "rank": state.process_index,
        "world_size": state.num_processes,
        "progress": state.is_local_main_process,
    }
    text_encoder = parts.text_encoder.to(state.device)
    cache_embeddings(
        config.output_dir, dataset, parts.tokenizer, text_encoder, config.text_encode_batch_size, **shared
    )
    if not config.captions_only:
        vae = parts.vae.to(state.device)
        cache_latents(config.output_dir, dataset, vae, data.resolution, config.vae_encode_batch_size, **shared)
    state.wait_for_everyone()
    if state.is_main_process:
        cache = CaptionCache(config.output_dir)
        images = "" if config.captions_only else f", {len(cache.images())} latents"
        print(f"{len(cache)} embeddings{images} in {config.output_dir}; {cache.skipped} rows without caption skipped")


if __name__ == "__main__":
    run_script(main)
