# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Tiny real components shared by the tests: nets of a few thousand weights, schedulers, whole pipelines."""

import json
import random
import socket
import string
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EDMEulerScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
)

from diffusers_msd import ClassRouter, EmbeddingRouter, MultiStudentPipeline
from diffusers_msd.prompts import embed_prompts, encoder_fingerprint, pool_embeddings


def tiny_unet(
    num_classes: int | None = 4,
    sample_size: int = 8,
    channels: int = 1,
    seed: int = 0,
    block_out_channels: tuple[int, ...] = (8, 16),
    **config,
) -> UNet2DModel:
    """A class-conditional `UNet2DModel` with attention, in evaluation mode; other seeds give other weights.

    Parameters that start at zero (biases) are drawn at random too, so that no layer is silent in a comparison.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DModel(
            sample_size=sample_size,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=block_out_channels,
            layers_per_block=1,
            down_block_types=("DownBlock2D",) * (len(block_out_channels) - 1) + ("AttnDownBlock2D",),
            up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (len(block_out_channels) - 1),
            norm_num_groups=4,
            attention_head_dim=8,
            num_class_embeds=num_classes,
            **config,
        )
    with torch.no_grad():
        for parameter in unet.parameters():
            if not parameter.any():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return unet.eval()


def edm_scheduler() -> EDMEulerScheduler:
    """EDM's schedule: sigma from 0.002 to 80, sigma_data 0.5, 1000 noise levels."""
    return EDMEulerScheduler()


def tiny_pipeline(k: int = 2, num_classes: int = 4, **unet_kwargs) -> MultiStudentPipeline:
    """K tiny students of different weights behind a consecutive `ClassRouter`, without a progress bar."""
    students = {f"unet_{i}": tiny_unet(num_classes, seed=i, **unet_kwargs) for i in range(k)}
    pipe = MultiStudentPipeline(edm_scheduler(), ClassRouter.consecutive(num_classes, k), **students)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(*seeds: int) -> list[torch.Generator]:
    """One CPU generator per image."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def tiny_tokenizer(folder: Path, max_length: int = 16) -> CLIPTokenizer:
    """A character-level CLIP tokenizer; its two files are written into `folder`."""
    characters = [chr(c) for c in range(33, 127)]
    vocabulary = characters + [c + "</w>" for c in characters] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=max_length)


def tiny_text_encoder(seed: int = 0, hidden_size: int = 16, max_length: int = 16) -> CLIPTextModel:
    """A CLIP text model for `tiny_tokenizer`; prompts differ clearly in what it says."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = CLIPTextConfig(
            vocab_size=190,
            hidden_size=hidden_size,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=max_length,
            bos_token_id=188,
            eos_token_id=189,
            pad_token_id=189,
            initializer_factor=10.0,
        )
        return CLIPTextModel(config).eval()


def tiny_clip(folder: Path, seed: int = 0) -> Path:
    """The folder, made, of a random `CLIPModel` with its processor."""
    folder.mkdir()
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"vocab_size": 190, "bos_token_id": 188, "eos_token_id": 189, "pad_token_id": 189}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = CLIPConfig(
            text_config={**layers, **special, "max_position_embeddings": 16},
            vision_config={**layers, "image_size": 16, "patch_size": 8},
            projection_dim=8,
            initializer_factor=10.0,
        )
        CLIPModel(config).save_pretrained(folder)
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(processor, tiny_tokenizer(folder)).save_pretrained(folder)
    return folder


def tiny_vae(seed: int = 0) -> AutoencoderKL:
    """An `AutoencoderKL` of 4 latent channels that halves the side of RGB images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
        ).eval()


def tiny_text_unet(seed: int = 0, cross_attention_dim: int = 16, **config) -> UNet2DConditionModel:
    """A `UNet2DConditionModel` on latents [4, 8, 8], in evaluation mode; other seeds give other weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        settings = {
            "sample_size": 8,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": cross_attention_dim,
            "attention_head_dim": 8,
            "norm_num_groups": 4,
        }
        return UNet2DConditionModel(**{**settings, **config}).eval()


def sd_scheduler(prediction_type: str = "epsilon") -> DDIMScheduler:
    """Stable Diffusion's schedule: scaled-linear betas from 0.00085 to 0.012, 1000 timesteps."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


def tiny_stable_diffusion(folder: Path, prediction_type: str = "epsilon") -> StableDiffusionPipeline:
    """A whole Stable Diffusion teacher of tiny parts; `folder` takes the tokenizer's files."""
    pipe = StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_text_encoder(),
        tokenizer=tiny_tokenizer(folder),
        unet=tiny_text_unet(),
        scheduler=sd_scheduler(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def random_prompts(n: int = 16, seed: int = 0) -> list[str]:
    """Prompts of two to ten random letters, none twice."""
    draw = random.Random(seed)
    words: dict[str, None] = {}
    while len(words) < n:
        words["".join(draw.choices(string.ascii_lowercase, k=draw.randint(2, 10)))] = None
    return list(words)


def tiny_text_router(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, k: int, **recorded) -> EmbeddingRouter:
    """Quadrants of `random_prompts()`, an equal number in each part."""
    pooled = pool_embeddings(*embed_prompts(tokenizer, text_encoder, random_prompts()), "eos")
    fingerprint = encoder_fingerprint(text_encoder)
    return EmbeddingRouter.fit_quadrants(
        pooled, k, **{"pooling": "eos", "text_encoder_fingerprint": fingerprint, **recorded}
    )


def tiny_text_pipeline(folder: Path, k: int = 4, **parts) -> MultiStudentPipeline:
    """K tiny students of prompts behind `tiny_text_router`; `folder` takes the tokenizer's files.

    Args:
        folder: an existing folder.
        k: a power of two.
        parts: arguments of the pipeline to use instead or besides.
    """
    tokenizer, text_encoder = tiny_tokenizer(folder), tiny_text_encoder()
    components = {
        "scheduler": sd_scheduler(),
        "router": tiny_text_router(tokenizer, text_encoder, k),
        "vae": tiny_vae(),
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        **{f"unet_{i}": tiny_text_unet(seed=i) for i in range(k)},
    }
    pipe = MultiStudentPipeline(**{**components, **parts})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def free_port() -> int:
    """A port that nobody listens at now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
