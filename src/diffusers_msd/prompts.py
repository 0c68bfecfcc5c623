# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Prompts to embeddings: what the networks see [B, L, D], and the one vector [B, D] a prompt is routed by."""

import hashlib
import threading

import torch
from diffusers.utils import logging


logger = logging.get_logger(__name__)

# A fast tokenizer keeps padding and truncation from call to call, so two threads would get each other's.
_TOKENIZING = threading.Lock()


def check_prompts(prompt) -> list[str]:
    """A prompt, or a list of them, as a list.

    Raises:
        TypeError: something is not a string.
        ValueError: there is none, or one is empty (guidance alone knows the empty prompt, students never see it), or
            not valid Unicode.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt) if isinstance(prompt, (list, tuple)) else None
    if prompts is None or not all(isinstance(p, str) for p in prompts):
        raise TypeError(f"prompt: a string or a list of strings expected, got {prompt!r}")
    if not prompts:
        raise ValueError("prompt: at least one is needed, got an empty list")
    for i, text in enumerate(prompts):
        if not text.strip():
            raise ValueError(f"prompt: number {i} is empty ({text!r}); words are needed, the router goes by them")
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"prompt: number {i} is not valid Unicode, it has half of a surrogate pair ({text!r})")
    return prompts


@torch.no_grad()
def embed_prompts(
    tokenizer, text_encoder, prompts: list[str], device: torch.device | str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the text encoder as diffusers' Stable Diffusion pipeline does.

    Args:
        tokenizer: of the teacher; what exceeds its `model_max_length` is cut off with a warning.
        text_encoder: of the teacher, a CLIP text model.
        prompts: B strings; the empty one is allowed, for guidance.
        device: where the encoder runs, if that is not where its weights rest (sequential offload).

    Returns:
        (embeddings [B, L, D] in the encoder's dtype, mask LongTensor [B, L]: 1 on real tokens, 0 on padding), on the
        device that the encoder runs on.
    """
    device, length = device or text_encoder.device, tokenizer.model_max_length
    with _TOKENIZING:
        tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        whole = tokenizer(prompts, verbose=False).input_ids
    for text, ids in zip(prompts, whole):
        if len(ids) > length:
            lost = tokenizer.decode(ids[length - 1 : -1])
            logger.warning(f"prompt: {text!r} has more than the {length} tokens that are read; cut off: {lost!r}")
    mask = tokens.attention_mask.to(device)
    # Stable Diffusion 1 was trained without the mask; encoders that want it say so in their config.
    used = mask if getattr(text_encoder.config, "use_attention_mask", False) else None
    return text_encoder(tokens.input_ids.to(device), attention_mask=used)[0], mask


def _pool_mean(embeddings: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weights = mask.to(embeddings)[..., None]
    return (embeddings * weights).sum(dim=1) / weights.sum(dim=1)


def _pool_eos(embeddings: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    # Real tokens come first, and the last of them ends the text.
    return embeddings[torch.arange(len(mask), device=mask.device), mask.sum(dim=1) - 1]


POOLINGS = {"mean": _pool_mean, "eos": _pool_eos}


def pool_embeddings(embeddings: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """One vector per prompt, float32 [B, D] on the CPU, for an `EmbeddingRouter`.

    Args:
        embeddings: [B, L, D].
        mask: [B, L], 1 on real tokens (start and end of text included), 0 on padding.
        pooling: "mean" over the real tokens, or "eos", the vector of the end of text.
    """
    return POOLINGS[pooling](embeddings.float(), mask.to(embeddings.device)).cpu()


def encoder_fingerprint(text_encoder: torch.nn.Module) -> str:
    """Tells text encoders apart whatever precision they are loaded in: SHA-256 over the signs of all weights.

    A cast to float16 or bfloat16 rounds a weight but keeps its sign (also of what becomes zero), so the fingerprint
    of a half-precision copy is that of the original, while any training flips some sign among so many.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(text_encoder.named_parameters()):
        digest.update(str(tuple(parameter.shape)).encode())
        digest.update(torch.signbit(parameter.detach()).cpu().numpy().tobytes())
    return digest.hexdigest()
