# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Trains what surrounds the UNet of a small text-to-image teacher: tokenizer, VAE and text encoder.

    python training_scripts/prepare_emoji.py --output_dir runs/emoji
    accelerate launch training_scripts/train_text_parts.py --config training_scripts/configs/emoji_text_parts.yaml \
        --train_data_dir runs/emoji/train --output_dir runs/emoji_base

The text encoder is trained together with an image encoder by CLIP's contrastive loss (arXiv 2103.00020). The image
encoder stays in `contrastive/`: the metrics of the recipe are computed on its features. All images are held in memory.
"""

import json
import math
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ModelMixin
from diffusers.optimization import get_scheduler
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusers_msd.captions import is_caption, load_captions
from diffusers_msd.config import for_stage, parse_config, run_script
from diffusers_msd.data import DataConfig, ImageDataset, fit_image, open_image
from diffusers_msd.draws import derive_seed
from diffusers_msd.files import atomic_directory, check_writable, load_model, write_json
from diffusers_msd.grids import save_grid
from diffusers_msd.prompts import embed_prompts, pool_embeddings
from diffusers_msd.retrieval import ContrastiveNet, contrastive_loss, retrieval_accuracy
from diffusers_msd.stages import Turn
from diffusers_msd.training import Trainer
from diffusers_msd.training_config import TrainingConfig, autocast_dtype, create_accelerator


START, END, END_OF_WORD = "<|startoftext|>", "<|endoftext|>", "</w>"


@dataclass
class TextPartsConfig:
    """The small networks. TrainingConfig's settings are those of the VAE."""

    output_dir: str = field(metadata={"help": "Folder of tokenizer, VAE, text encoder and image encoder."})
    vocab_size: int = field(default=1536, metadata={"help": "Tokens of the vocabulary, 514 at least."})
    max_length: int = field(default=24, metadata={"help": "Tokens per caption, start and end of text included."})
    vae_channels: list[int] = field(
        default_factory=lambda: [16, 64, 64],
        metadata={"help": "Channels of each resolution; all but the last are halved."},
    )
    vae_blocks: int = field(default=1, metadata={"help": "Residual blocks per resolution of the encoder."})
    latent_channels: int = field(default=4, metadata={"help": "Channels of the latents."})
    kl_weight: float = field(default=1e-6, metadata={"help": "Weight of the KL term, summed over a latent (nats)."})
    text_hidden_size: int = field(default=128, metadata={"help": "Width of the text encoder."})
    text_layers: int = field(default=3, metadata={"help": "Its layers."})
    text_heads: int = field(default=4, metadata={"help": "Its attention heads."})
    image_channels: list[int] = field(
        default_factory=lambda: [32, 64, 128], metadata={"help": "Channels of the image encoder's stages."}
    )
    feature_dim: int = field(default=128, metadata={"help": "Width of the image features."})
    projection_dim: int = field(default=128, metadata={"help": "Width of the space of images and captions."})
    contrastive_steps: int = field(default=1000, metadata={"help": "Iterations of the contrastive training."})
    contrastive_batch_size: int = field(default=256, metadata={"help": "Pairs per iteration, told from each other."})
    contrastive_learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate; cosine after it."})

    def __post_init__(self):
        if self.vocab_size < 514:
            raise ValueError(f"vocab_size: at least 514 (all bytes, and two marks) expected, got {self.vocab_size}")
        if self.max_length < 3:
            raise ValueError(f"max_length: at least 3 expected (start, a word, end), got {self.max_length}")
        for name in ("contrastive_steps", "contrastive_batch_size"):
            if vars(self)[name] < 1:
                raise ValueError(f"{name}: at least 1 expected, got {vars(self)[name]}")


def load_pairs(config: DataConfig) -> tuple[ImageDataset, list[str]]:
    """The images, labelled by the row of their caption, and the captions.

    Raises:
        FileNotFoundError, ValueError: the data cannot be read, or a row has no caption or no image (it is named).
    """
    dataset = load_captions(config, with_images=True)
    captions = dataset["caption"][:]
    pixels, resolution = [], config.resolution
    for row, record in enumerate(tqdm(dataset["image"], desc="images", unit="image")):
        if not is_caption(captions[row]):
            raise ValueError(f"caption_column: row {row} has no caption ({captions[row]!r})")
        image, where = open_image(record, row)
        resolution = image.width if resolution is None else resolution
        if image.size != (resolution, resolution) and not config.resize:
            raise ValueError(f"resolution: {where} is {image.width}x{image.height}, not {resolution}; set resize")
        pixels.append(fit_image(image, 3, resolution))
    tensor = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    rows = torch.arange(len(captions))
    return ImageDataset(partial(_read, tensor), rows, len(rows), tuple(tensor.shape[1:])), captions


def _read(pixels: torch.Tensor, rows: list[int]) -> torch.Tensor:
    return pixels[rows].float() / 127.5 - 1


# ------------------------------------------------------------------ tokenizer


def train_tokenizer(captions: list[str], vocab_size: int, max_length: int) -> CLIPTokenizer:
    """A byte-level BPE tokenizer in CLIP's format, its merges learned from captions.

    The vocabulary is laid out as CLIP's: bytes, bytes at the end of a word, merges, start and end of text. The end of
    text also pads.
    """
    template = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix=END_OF_WORD))
    learner.normalizer, learner.pre_tokenizer = template.normalizer, template.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=alphabet,
            end_of_word_suffix=END_OF_WORD,
            show_progress=False,
        ),
    )
    # The learner counts only those bytes at the end of a word that it saw.
    room = vocab_size - 2 * len(alphabet) - 2
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]][:room]
    tokens = [*alphabet, *(letter + END_OF_WORD for letter in alphabet), *("".join(m) for m in merges), START, END]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def coverage(tokenizer: CLIPTokenizer, captions: list[str]) -> float:
    """The share of captions that are read to their end."""
    lengths = [len(ids) for ids in tokenizer(captions, verbose=False).input_ids]
    return sum(length <= tokenizer.model_max_length for length in lengths) / len(lengths)


# ------------------------------------------------------------------ VAE


class AutoencoderTurn(Turn):
    """Trains a VAE by the L1 distance to the image plus a small KL divergence (arXiv 2112.10752, appendix G).

    Args:
        vae: the network to train.
        kl_weight: of the KL divergence, summed over a latent; the distance is the mean over a picture's values.
    """

    name = "vae"
    needs = ("images",)

    def __init__(self, vae: AutoencoderKL, kl_weight: float):
        super().__init__()
        self.vae = vae
        self.kl_weight = kl_weight

    def models(self):
        return {"vae": self.vae}

    def forward(self, batch, draw):
        images = batch["images"]["images"]
        posterior = self.vae.encode(images).latent_dist
        latents = posterior.mean + posterior.std * draw.normal(*posterior.mean.shape[1:])
        distance = (self.vae.decode(latents).sample - images).abs().mean(dim=(1, 2, 3))
        kl = posterior.kl()
        return {"loss": distance + self.kl_weight * kl, "l1": distance, "kl": kl}


def build_vae(config: TextPartsConfig, resolution: int) -> AutoencoderKL:
    levels = len(config.vae_channels)
    if resolution % 2 ** (levels - 1):
        raise ValueError(f"vae_channels: {levels} resolutions need images divisible by {2 ** (levels - 1)}")
    return AutoencoderKL(
        block_out_channels=tuple(config.vae_channels),
        layers_per_block=config.vae_blocks,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=config.latent_channels,
        norm_num_groups=min(32, config.vae_channels[0] // 2),
        sample_size=resolution,
    )


def train_vae(vae: AutoencoderKL, dataset: ImageDataset, parts: TextPartsConfig, config, accelerator) -> AutoencoderKL:
    """Trains in `output_dir/training` and returns the averaged network."""
    folder = Path(parts.output_dir) / "training"
    rows = torch.linspace(0, len(dataset) - 1, 32).long()

    def validate(step: int, model: ModelMixin):
        images = dataset.__getitems__(rows)["images"]
        latents = model.encode(images.to(model.device)).latent_dist.mean
        pairs = torch.stack([images, model.decode(latents).sample.cpu()], dim=1)
        save_grid(pairs.flatten(0, 1), 16, folder / f"reconstructions-{step:07d}.png")

    turn = AutoencoderTurn(vae, parts.kl_weight)
    trainer = Trainer(accelerator, [turn], {"images": dataset}, config, folder, "vae", validate=validate)
    return load_model(AutoencoderKL, trainer.fit() / "vae", "output_dir").to(accelerator.device).eval()


@torch.no_grad()
def measure_vae(vae: AutoencoderKL, dataset: ImageDataset, batch_size: int = 64) -> dict[str, float]:
    """Of the posterior's means over the data: "latent_mean", "latent_std"; of their decoded pictures: "psnr" in dB."""
    means, error = [], 0.0
    for rows in tqdm(torch.arange(len(dataset)).split(batch_size), desc="measure vae", unit="batch"):
        images = dataset.__getitems__(rows)["images"].to(vae.device)
        means.append(vae.encode(images).latent_dist.mean)
        difference = vae.decode(means[-1]).sample.clamp(-1, 1) - images
        error += difference.double().square().mean(dim=(1, 2, 3)).sum().item()
    latents = torch.cat(means).double()
    # The peak is the width of [-1, 1].
    psnr = 10 * math.log10(4 / (error / len(dataset)))
    return {"latent_mean": latents.mean().item(), "latent_std": latents.std().item(), "psnr": psnr}


# ------------------------------------------------------------------ text and image encoder


def build_text_encoder(config: TextPartsConfig, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.text_hidden_size,
            intermediate_size=4 * config.text_hidden_size,
            num_hidden_layers=config.text_layers,
            num_attention_heads=config.text_heads,
            max_position_embeddings=config.max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Moves each image by up to 2 pixels (its edge is drawn out) and adds a little noise.

    Nothing is mirrored: captions tell left from right.
    """
    size = images.shape[-1]
    padded = F.pad(images, (2, 2, 2, 2), mode="replicate")
    corners = torch.randint(5, (len(images), 2, 1), generator=generator).to(images.device)
    rows, columns = (corners + torch.arange(size, device=images.device)).unbind(dim=1)
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    moved = padded[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return moved + 0.05 * torch.randn(images.shape, generator=generator).to(images.device)


def train_contrastive(
    text_encoder: CLIPTextModel,
    net: ContrastiveNet,
    tokenizer: CLIPTokenizer,
    dataset: ImageDataset,
    captions: list[str],
    config: TextPartsConfig,
    seed: int,
):
    """Trains both networks with AdamW and a cosine schedule, captions against images; a function of `seed`."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "contrastive"))
    device = net.device
    tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    parameters = [*text_encoder.parameters(), *net.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.contrastive_learning_rate, weight_decay=0.01, fused=True)
    steps, batch_size = config.contrastive_steps, min(config.contrastive_batch_size, len(captions))
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=min(100, steps // 10), num_training_steps=steps)
    text_encoder.train()
    net.train()
    order = torch.empty(0, dtype=torch.long)
    bar = tqdm(range(steps), desc="contrastive", unit="it", dynamic_ncols=True)
    for step in bar:
        if len(order) < batch_size:
            order = torch.randperm(len(captions), generator=generator)
        rows, order = order[:batch_size], order[batch_size:]
        ids, mask = (tokens[name][rows].to(device) for name in ("input_ids", "attention_mask"))
        # What follows the end of a text cannot change its vector: the longest text of the batch is length enough.
        longest = int(mask.sum(dim=1).max())
        hidden = text_encoder(ids[:, :longest]).last_hidden_state
        pooled = pool_embeddings(hidden, mask[:, :longest], "eos").to(device)
        images = augment(dataset.__getitems__(rows)["images"].to(device), generator)
        loss = contrastive_loss(net.embed_images(images), net.embed_texts(pooled), net.temperature).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3g}", temperature=f"{net.temperature.item():.3g}")
    text_encoder.eval()
    net.eval()


@torch.no_grad()
def measure_retrieval(text_encoder, net, tokenizer, dataset, captions, batch_size: int = 256) -> dict[str, float]:
    """Retrieval accuracy, top 1 and top 5 of all captions, on the images as they are."""
    images, texts = [], []
    for rows in tqdm(torch.arange(len(dataset)).split(batch_size), desc="measure retrieval", unit="batch"):
        images.append(net.embed_images(dataset.__getitems__(rows)["images"].to(net.device)))
        embeddings, mask = embed_prompts(tokenizer, text_encoder, [captions[row] for row in rows])
        texts.append(net.embed_texts(pool_embeddings(embeddings, mask, "eos").to(net.device)))
    top = (1, min(5, len(captions)))
    accuracy = retrieval_accuracy(torch.cat(images), torch.arange(len(captions)), torch.cat(texts), top)
    return {f"top_{k}": share for k, share in accuracy.items()}


# ------------------------------------------------------------------ the run


def save_part(part, path: Path):
    with atomic_directory(path) as folder:
        part.save_pretrained(folder)


def make_vae(dataset: ImageDataset, parts: TextPartsConfig, config: TrainingConfig, accelerator) -> dict:
    """Trains `vae/`, scaled so that latents have unit variance, and returns what was measured."""
    torch.manual_seed(derive_seed(config.seed, "vae"))
    vae = train_vae(build_vae(parts, dataset.image_shape[1]), dataset, parts, config, accelerator)
    if not accelerator.is_main_process:
        return {}
    record = measure_vae(vae, dataset)
    vae.register_to_config(scaling_factor=1 / record["latent_std"])
    save_part(vae, Path(parts.output_dir, "vae"))
    print(f"VAE: PSNR {record['psnr']:.2f} dB, scaling factor {vae.config.scaling_factor:.4f}")
    return record


def make_encoders(dataset: ImageDataset, captions: list[str], parts: TextPartsConfig, seed: int, device) -> dict:
    """Trains `tokenizer/`, `text_encoder/` and `contrastive/`, and returns what was measured."""
    tokenizer = train_tokenizer(captions, parts.vocab_size, parts.max_length)
    torch.manual_seed(derive_seed(seed, "text_parts"))
    text_encoder = build_text_encoder(parts, tokenizer).to(device)
    net = ContrastiveNet(
        sample_size=dataset.image_shape[1],
        channels=tuple(parts.image_channels),
        feature_dim=parts.feature_dim,
        text_dim=parts.text_hidden_size,
        projection_dim=parts.projection_dim,
    ).to(device)
    train_contrastive(text_encoder, net, tokenizer, dataset, captions, parts, seed)
    accuracy = measure_retrieval(text_encoder, net, tokenizer, dataset, captions)
    net.register_to_config(accuracy=accuracy)
    for name, part in {"tokenizer": tokenizer, "text_encoder": text_encoder, "contrastive": net}.items():
        save_part(part, Path(parts.output_dir, name))
    covered = coverage(tokenizer, captions)
    found = ", ".join(f"{name} {100 * share:.1f} %" for name, share in accuracy.items())
    print(f"captions found by their images: {found}; captions read whole: {100 * covered:.1f} %")
    return {"retrieval": accuracy, "captions_read_whole": covered}


def main():
    parts, data_config, config = parse_config([TextPartsConfig, DataConfig, TrainingConfig], __doc__)
    config = for_stage(config, 0, 1)
    if autocast_dtype(config) is not None:
        raise ValueError("mixed_precision: no expected, these small networks are trained in full precision")
    output_dir = check_writable(parts.output_dir, "output_dir")
    dataset, captions = load_pairs(data_config)
    accelerator = create_accelerator(config, output_dir / "training")
    accelerator.init_trackers("train_text_parts")
    times = [time.perf_counter()]
    record = {"images": len(captions), **make_vae(dataset, parts, config, accelerator)}
    times.append(time.perf_counter())
    if accelerator.is_main_process:
        record |= make_encoders(dataset, captions, parts, config.seed, accelerator.device)
        times.append(time.perf_counter())
        settings = {**vars(data_config), **vars(parts), **vars(config)}
        del settings["output_dir"], settings["resume_from_checkpoint"]
        seconds = {"vae": times[1] - times[0], "encoders": times[2] - times[1]}
        write_json(output_dir / "text_parts.json", {**record, "seconds": seconds, "settings": settings})
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main)
