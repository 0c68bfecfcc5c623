# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Samples (noise, condition, image) pairs from a teacher, for the regression of the DM stage.

    accelerate launch training_scripts/generate_pairs.py --pretrained_teacher_model runs/digits_teacher \
        --output_dir runs/digits_pairs --num_pairs 4000

For a text-conditional teacher the conditions are the captions of `--captions_dir`, the images are latents, and
`--guidance_scale` with `--sampler dpm` or `ddim` is what one would sample it with. Run again after an interruption, it continues with the missing shards and makes damaged ones anew. All K students
share one set of pairs.
"""

from dataclasses import dataclass, field

import torch
from accelerate import PartialState

from diffusers_msd.conditions import conditions_for
from diffusers_msd.config import parse_config, run_script
from diffusers_msd.denoiser import denoiser_for, sample_shape
from diffusers_msd.files import check_writable, model_fingerprint
from diffusers_msd.pairs import generate_pairs
from diffusers_msd.sampling import SAMPLERS
from diffusers_msd.schedule import NoiseSchedule
from diffusers_msd.teachers import load_teacher


@dataclass
class PairsConfig:
    """Which pairs to make."""

    pretrained_teacher_model: str = field(metadata={"help": "Folder or Hub id of the teacher (unet/, scheduler/)."})
    output_dir: str = field(metadata={"help": "Folder of the pairs."})
    captions_dir: str | None = field(
        default=None, metadata={"help": "Folder of cache_captions.py; text-conditional teachers need it."}
    )
    num_pairs: int = field(default=25000, metadata={"help": "How many; conditions take turns. DMD used 25,000."})
    sampler: str = field(
        default="heun",
        metadata={"help": "heun, or for DDPM-like teachers ddim and dpm of diffusers.", "choices": list(SAMPLERS)},
    )
    num_inference_steps: int = field(default=18, metadata={"help": "Steps of the sampler; DMD used 256 of Heun."})
    guidance_scale: float | None = field(default=None, metadata={"help": "Classifier-free guidance of the teacher."})
    sample_batch_size: int = field(default=256, metadata={"help": "Samples per forward pass."})
    shard_size: int = field(default=1024, metadata={"help": "Pairs per file."})
    seed: int = field(default=0, metadata={"help": "Seed of the noise."})


def main():
    (config,) = parse_config([PairsConfig], __doc__)
    # Said outright: left to itself it sees one process where several were launched on CPUs.
    state = PartialState(cpu=not torch.cuda.is_available())
    output_dir = check_writable(config.output_dir, "output_dir")
    path = config.pretrained_teacher_model
    model, scheduler = load_teacher(path)
    conditions = conditions_for(model, path, config.captions_dir)
    fingerprint, schedule = model_fingerprint(model, scheduler), NoiseSchedule.from_scheduler(scheduler)
    with torch.no_grad():
        generate_pairs(
            denoiser_for(model.to(state.device), schedule, null_cond=conditions.null),
            output_dir,
            num_pairs=config.num_pairs,
            conditions=conditions.values,
            image_shape=sample_shape(model),
            fingerprint=fingerprint,
            identity=conditions.identity,
            seed=config.seed,
            sampler=config.sampler,
            num_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            shard_size=config.shard_size,
            batch_size=config.sample_batch_size,
            rank=state.process_index,
            world_size=state.num_processes,
            progress=state.is_local_main_process,
        )


if __name__ == "__main__":
    run_script(main)
