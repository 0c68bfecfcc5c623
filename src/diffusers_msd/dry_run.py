# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""What a run will need, printed before anything is trained or downloaded."""

from dataclasses import replace

import torch
from torch import nn

from .adapters import AdapterConfig, lora_network
from .conditions import CONDITIONS
from .config import for_stage
from .denoiser import Denoiser, denoiser_for, sample_shape
from .distillation import MSDConfig
from .memory import cache_bytes, estimate_memory, format_estimate, without_data
from .objectives import PERCEPTUAL
from .schedule import NoiseSchedule
from .stage_config import StageConfig
from .stages import build_stage
from .students import StudentConfig, check_preset, create_student
from .teachers import load_teacher_shape
from .training_config import TrainingConfig, autocast_dtype


def dry_run(
    config: MSDConfig, student: StudentConfig, adapter: AdapterConfig, stage: StageConfig, training: TrainingConfig
):
    """Prints what each stage of one student will need, on networks without weights."""
    path = config.pretrained_teacher_model
    teacher, scheduler = load_teacher_shape(path)
    if student.student_preset is not None:
        check_preset(student.student_preset, teacher)
    cond = CONDITIONS[type(teacher)].example(teacher, path)
    schedule, dtype = NoiseSchedule.from_scheduler(scheduler), autocast_dtype(training)

    def denoiser(kind="full", channels=None, blocks=None, weight_dtype=None) -> Denoiser:
        with torch.device("meta"):
            if kind == "lora":
                model = lora_network(frozen.model, adapter.lora(teacher)).eval()
            else:
                # nn.Module's own: diffusers' warns of layers that are to stay in float32, though there are none.
                model = nn.Module.to(create_student(teacher, channels, blocks), weight_dtype).eval()
        return denoiser_for(without_data(model), schedule, null_cond=cond[0], autocast_dtype=dtype)

    frozen = denoiser(weight_dtype=dtype)

    print(
        f"one sample: {'x'.join(map(str, sample_shape(teacher)))}; one condition: {list(cond.shape[1:]) or 'a class'}"
    )
    for i, name in enumerate(config.stages):
        settings, run = for_stage(stage, i, len(config.stages)), for_stage(training, i, len(config.stages))
        # A perceptual distance brings a network with weights, which a dry run does without.
        uncounted = settings.regression_distance if settings.regression_distance in PERCEPTUAL else None
        settings = settings if uncounted is None else replace(settings, regression_distance="l2")
        nets = (
            denoiser(adapter.student_type, student.student_channels, student.student_blocks),
            frozen,
            denoiser(adapter.fake_score_type),
        )
        estimate = estimate_memory(build_stage(name, *nets, cond, settings), run, cond)
        print(f"\n--- {name} ---\n{format_estimate(estimate, run.max_train_steps[0], config.dry_run_tflops)}")
        if name == "dm" and uncounted is not None and settings.regression_weight > 0:
            print(f"not counted: the network of the {uncounted} distance (and of latents, the VAE before it)")
    if cond.ndim > 1:
        disk = cache_bytes(sample_shape(teacher), cond, 1_000_000)
        print("\ncache of a million captions: " + ", ".join(f"{k} {v / 1e9:.0f} GB" for k, v in disk.items()))
