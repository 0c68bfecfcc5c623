# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Trains a small class-conditional EDM teacher (a `UNet2DModel` with an `EDMEulerScheduler`) on labelled images.

    accelerate launch training_scripts/train_teacher.py --config training_scripts/configs/digits_teacher.yaml \
        --output_dir runs/digits_teacher

writes `unet/`, `scheduler/` and `teacher.json` into the output folder, with checkpoints, logs and sample grids in
`training/`. Any other class-conditional teacher that diffusers can load works for `train_msd.py` as well.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import EDMEulerScheduler, ModelMixin, UNet2DModel

from diffusers_msd.config import for_stage, parse_config, run_script
from diffusers_msd.data import DataConfig, load_images
from diffusers_msd.denoiser import Denoiser, denoiser_for
from diffusers_msd.draws import derive_seed
from diffusers_msd.files import check_writable, load_model
from diffusers_msd.grids import save_grid
from diffusers_msd.pairs import pair_noise
from diffusers_msd.sampling import sample_heun
from diffusers_msd.schedule import NoiseSchedule
from diffusers_msd.stages import DenoisingTurn
from diffusers_msd.teachers import save_teacher
from diffusers_msd.training import Trainer
from diffusers_msd.training_config import TrainingConfig, autocast_dtype, create_accelerator


@dataclass
class TeacherConfig:
    """The teacher's network and noise."""

    output_dir: str = field(metadata={"help": "Folder of the teacher."})
    image_channels: int = field(default=3, metadata={"help": "1 for grey images, 3 for colour."})
    teacher_channels: list[int] = field(
        default_factory=lambda: [64, 128], metadata={"help": "Channels of each resolution, from fine to coarse."}
    )
    teacher_blocks: int = field(default=2, metadata={"help": "Residual blocks per resolution."})
    attention_levels: int = field(default=1, metadata={"help": "The coarsest so many resolutions have attention."})
    attention_head_dim: int = field(default=32, metadata={"help": "Channels per attention head."})
    dropout: float = field(
        default=0.0, metadata={"help": "Dropout of the residual blocks while training the teacher."}
    )
    sigma_data: float = field(default=0.5, metadata={"help": "Standard deviation of the data in [-1, 1] (EDM)."})
    sigma_max: float = field(default=80.0, metadata={"help": "Highest noise level (EDM)."})
    log_sigma_mean: float = field(default=-1.2, metadata={"help": "Mean of ln sigma in training (EDM's P_mean)."})
    log_sigma_std: float = field(default=1.2, metadata={"help": "Its standard deviation (EDM's P_std)."})


def build_unet(config: TeacherConfig, image_shape: tuple[int, int, int], num_classes: int) -> UNet2DModel:
    """An ADM-like UNet (arXiv 2105.05233) in the layout that EDM's ImageNet nets have in diffusers."""
    channels, height, _ = image_shape
    levels = len(config.teacher_channels)
    if height % 2 ** (levels - 1):
        raise ValueError(f"teacher_channels: {levels} resolutions need images divisible by {2 ** (levels - 1)}")
    if not 0 <= config.attention_levels <= levels:
        raise ValueError(f"attention_levels: 0 to {levels} expected, got {config.attention_levels}")
    plain = levels - config.attention_levels
    groups = min(32, config.teacher_channels[0] // 4)
    return UNet2DModel(
        sample_size=height,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(config.teacher_channels),
        layers_per_block=config.teacher_blocks,
        down_block_types=("ResnetDownsampleBlock2D",) * plain + ("AttnDownBlock2D",) * config.attention_levels,
        up_block_types=("AttnUpBlock2D",) * config.attention_levels + ("ResnetUpsampleBlock2D",) * plain,
        attention_head_dim=config.attention_head_dim,
        norm_num_groups=groups,
        attn_norm_num_groups=groups,
        resnet_time_scale_shift="scale_shift",
        downsample_type="resnet",
        upsample_type="resnet",
        dropout=config.dropout,
        num_class_embeds=num_classes,
    )


def validation_grid(denoiser: Denoiser, num_classes: int, shape: tuple[int, int, int], columns: int, path: Path):
    """A row of samples per class, from fixed seeds."""
    device = denoiser.model.device
    labels = torch.arange(num_classes).repeat_interleave(columns)
    z = pair_noise(torch.arange(columns).repeat(num_classes), shape)
    save_grid(sample_heun(denoiser, z.to(device), labels.to(device)).cpu(), columns, path)


def main():
    teacher_config, data_config, config = parse_config([TeacherConfig, DataConfig, TrainingConfig], __doc__)
    config = for_stage(config, 0, 1)
    output_dir = check_writable(teacher_config.output_dir, "output_dir")
    dataset = load_images(data_config, teacher_config.image_channels)
    accelerator = create_accelerator(config, output_dir / "training")
    accelerator.init_trackers("train_teacher")

    torch.manual_seed(derive_seed(config.seed, "teacher"))
    unet = build_unet(teacher_config, dataset.image_shape, dataset.num_classes)
    scheduler = EDMEulerScheduler(sigma_max=teacher_config.sigma_max, sigma_data=teacher_config.sigma_data)
    denoiser = denoiser_for(unet, NoiseSchedule.from_scheduler(scheduler), autocast_dtype=autocast_dtype(config))
    turn = DenoisingTurn(denoiser, (teacher_config.log_sigma_mean, teacher_config.log_sigma_std))

    def validate(step: int, model: ModelMixin):
        model.eval()
        path = output_dir / "training" / f"samples-{step:07d}.png"
        validation_grid(denoiser, dataset.num_classes, dataset.image_shape, columns=8, path=path)
        model.train()

    unet.train()
    trainer = Trainer(
        accelerator, [turn], {"images": dataset}, config, output_dir / "training", "teacher", validate=validate
    )
    final = trainer.fit()
    if accelerator.is_main_process:
        unet = load_model(UNet2DModel, final / "unet", "output_dir")
        settings = {**vars(data_config), **vars(teacher_config), **vars(config)}
        del settings["output_dir"], settings["resume_from_checkpoint"]
        save_teacher(output_dir, unet, scheduler, {"settings": settings})
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main)
