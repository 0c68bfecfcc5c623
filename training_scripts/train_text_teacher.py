# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Trains a small latent text-to-image teacher on a cache of captions: a Stable Diffusion pipeline of any size.

    accelerate launch training_scripts/train_text_teacher.py --config training_scripts/configs/emoji_teacher.yaml \
        --pretrained_base_model runs/emoji_base --captions_dir runs/emoji_captions --output_dir runs/emoji_teacher

The output folder loads with `StableDiffusionPipeline.from_pretrained`; checkpoints, logs and sample grids lie in
`training/`. Whoever has a Stable Diffusion checkpoint needs none of this: `train_msd.py` takes it as it is.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import DDIMScheduler, ModelMixin, StableDiffusionPipeline, UNet2DConditionModel

from diffusers_msd.captions import CaptionCache, vae_fingerprint
from diffusers_msd.config import for_stage, parse_config, run_script
from diffusers_msd.denoiser import denoiser_for
from diffusers_msd.draws import derive_seed
from diffusers_msd.files import check_writable, load_model
from diffusers_msd.grids import save_grid
from diffusers_msd.hub import whole_save
from diffusers_msd.pairs import pair_noise
from diffusers_msd.prompts import encoder_fingerprint
from diffusers_msd.sampling import SAMPLERS
from diffusers_msd.schedule import NoiseSchedule
from diffusers_msd.stages import DenoisingTurn
from diffusers_msd.teachers import TextParts, decode_latents, load_text_parts
from diffusers_msd.training import Trainer
from diffusers_msd.training_config import TrainingConfig, autocast_dtype, create_accelerator


@dataclass
class TextTeacherConfig:
    """The teacher's network and noise."""

    pretrained_base_model: str = field(metadata={"help": "Folder or Hub id with tokenizer/, text_encoder/ and vae/."})
    captions_dir: str = field(metadata={"help": "Folder of cache_captions.py, made with that base model."})
    output_dir: str = field(metadata={"help": "Folder of the teacher."})
    teacher_channels: list[int] = field(
        default_factory=lambda: [64, 128], metadata={"help": "Channels of each resolution, from fine to coarse."}
    )
    teacher_blocks: int = field(default=2, metadata={"help": "Residual blocks per resolution."})
    attention_levels: int = field(
        default=1, metadata={"help": "The coarsest so many resolutions have cross-attention to the prompt."}
    )
    attention_heads: int = field(default=4, metadata={"help": "Heads of each attention layer."})
    prediction_type: str = field(
        default="v_prediction",
        metadata={"help": "What the network predicts.", "choices": ["epsilon", "v_prediction", "sample"]},
    )
    cond_dropout: float = field(
        default=0.1, metadata={"help": "Share of samples trained with the empty prompt, for guidance."}
    )
    guidance_scale: float = field(default=3.0, metadata={"help": "Guidance of the sample grids."})


def build_unet(config: TextTeacherConfig, latent_shape: tuple[int, int, int], cross_attention_dim: int):
    """A UNet in the layout of Stable Diffusion's."""
    levels = len(config.teacher_channels)
    if latent_shape[1] % 2 ** (levels - 1):
        raise ValueError(f"teacher_channels: {levels} resolutions need latents divisible by {2 ** (levels - 1)}")
    if not 1 <= config.attention_levels <= levels:
        raise ValueError(f"attention_levels: 1 to {levels} expected, got {config.attention_levels}")
    plain = levels - config.attention_levels
    return UNet2DConditionModel(
        sample_size=latent_shape[1],
        in_channels=latent_shape[0],
        out_channels=latent_shape[0],
        block_out_channels=tuple(config.teacher_channels),
        layers_per_block=config.teacher_blocks,
        down_block_types=("DownBlock2D",) * plain + ("CrossAttnDownBlock2D",) * config.attention_levels,
        up_block_types=("CrossAttnUpBlock2D",) * config.attention_levels + ("UpBlock2D",) * plain,
        cross_attention_dim=cross_attention_dim,
        # diffusers' name; for this class it is the number of heads.
        attention_head_dim=config.attention_heads,
        norm_num_groups=math.gcd(32, *config.teacher_channels),
    )


def save_pipeline(output_dir: Path, base: TextParts, unet: UNet2DConditionModel, scheduler: DDIMScheduler):
    """The whole Stable Diffusion folder."""
    pipe = StableDiffusionPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with whole_save(output_dir, None, pipe.config_name) as staged:
        pipe.save_pretrained(staged)


def main():
    teacher_config, config = parse_config([TextTeacherConfig, TrainingConfig], __doc__)
    config = for_stage(config, 0, 1)
    if not 0 <= teacher_config.cond_dropout < 1:
        raise ValueError(f"cond_dropout: a number in [0, 1) expected, got {teacher_config.cond_dropout}")
    output_dir = check_writable(teacher_config.output_dir, "output_dir")
    base = load_text_parts(teacher_config.pretrained_base_model)
    cache = CaptionCache(teacher_config.captions_dir)
    if cache.text_encoder_fingerprint != encoder_fingerprint(base.text_encoder):
        raise ValueError("captions_dir: its embeddings are of another text encoder than pretrained_base_model's")
    dataset = cache.images(vae_fingerprint(base.vae))
    accelerator = create_accelerator(config, output_dir / "training")
    accelerator.init_trackers("train_text_teacher")

    torch.manual_seed(derive_seed(config.seed, "teacher"))
    unet = build_unet(teacher_config, dataset.image_shape, cache.embeddings.shape[-1])
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=teacher_config.prediction_type,
    )
    denoiser = denoiser_for(
        unet,
        NoiseSchedule.from_scheduler(scheduler),
        null_cond=cache.null_embedding,
        autocast_dtype=autocast_dtype(config),
    )
    shown = torch.linspace(0, len(cache) - 1, 8).long()

    def validate(step: int, model: ModelMixin):
        model.eval()
        device, columns = accelerator.device, 8
        z = pair_noise(torch.arange(columns).repeat(len(shown)), dataset.image_shape).to(device)
        cond = cache.embeddings[shown].repeat_interleave(columns, 0).to(device)
        latents = SAMPLERS["dpm"](denoiser, z, cond, 20, teacher_config.guidance_scale)
        images = decode_latents(base.vae.to(device), latents).cpu()
        save_grid(images, columns, output_dir / "training" / f"samples-{step:07d}.png")
        model.train()

    turn = DenoisingTurn(denoiser, log_sigma=None, cond_dropout=teacher_config.cond_dropout)
    trainer = Trainer(
        accelerator, [turn], {"images": dataset}, config, output_dir / "training", "teacher", validate=validate
    )
    final = trainer.fit()
    if accelerator.is_main_process:
        save_pipeline(output_dir, base, load_model(UNet2DConditionModel, final / "unet", "output_dir"), scheduler)
        print(f"StableDiffusionPipeline.from_pretrained({str(output_dir)!r}) is ready")
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main)
