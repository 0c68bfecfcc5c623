# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""How well images fit their captions, by a CLIP model of transformers."""

import torch
from safetensors import SafetensorError
from transformers import CLIPModel, CLIPProcessor

from .feature_net import weights_hash


class ClipScore:
    """Cosine of an image and its caption in CLIP's space, negative ones as 0, times 100.

    Numbers of different CLIP models cannot be compared: `name` says which one it is, with the hash of its weights.

    Args:
        path: folder or Hub id of a `CLIPModel` with its processor, such as openai/clip-vit-base-patch16.
        device: where it runs.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: its weights do not fit its config.

    Source: Hessel et al. 2021 (arXiv 2104.08718), eq. 1, with the factor 100 that is usual now instead of 2.5.
    """

    def __init__(self, path: str, device: torch.device | str):
        try:
            model, info = CLIPModel.from_pretrained(
                path, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
            self.processor = CLIPProcessor.from_pretrained(path)
        except (OSError, ValueError, SafetensorError) as error:
            raise FileNotFoundError(
                f"clip_model: {path} is neither a folder nor a Hub repository with a CLIPModel in safetensors and its "
                f"processor: {error}"
            ) from error
        if info["missing_keys"]:
            raise ValueError(f"clip_model: the weights at {path} lack {sorted(info['missing_keys'])[:3]} and others")
        self.model = model.to(device).eval()
        self.name = f"CLIPModel {weights_hash(model)}"

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, captions: list[str]) -> torch.Tensor:
        """Scores in [0, 100], float32 [B] on the model's device.

        Args:
            images: [B, 3, H, W] in [-1, 1]; rounded to 8 bits and resized as the model's processor says.
            captions: B strings; what exceeds the text model's length is cut off.
        """
        pixels = images.clamp(-1, 1).add(1).mul(127.5).round().byte().cpu()
        inputs = self.processor(text=captions, images=list(pixels), return_tensors="pt", padding=True, truncation=True)
        outputs = self.model(**inputs.to(self.model.device))
        return 100 * (outputs.image_embeds * outputs.text_embeds).sum(dim=1).clamp(min=0)
