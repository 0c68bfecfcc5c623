# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Distils a teacher into K one-step students: TSM, DM and ADM stages of multi-student distillation.

    accelerate launch training_scripts/train_msd.py --config training_scripts/configs/digits_msd.yaml \
        --pretrained_teacher_model runs/digits_teacher --pairs_dir runs/digits_pairs \
        --num_students 2 --output_dir runs/digits_k2

Text-conditional teachers (Stable Diffusion) take `--captions_dir` in place of a data set; see cache_captions.py.

When every student is there, `--output_dir` is a `MultiStudentPipeline`. Students share only the teacher, the pairs and
the router: K jobs with `--student_index 0 ... K-1` and the same output folder give the same weights as one job of all.
"""

from pathlib import Path

from diffusers_msd.adapters import AdapterConfig
from diffusers_msd.conditions import ConditionConfig
from diffusers_msd.config import parse_config, run_script
from diffusers_msd.data import DataConfig
from diffusers_msd.distillation import MSDConfig, Run
from diffusers_msd.dry_run import dry_run
from diffusers_msd.publishing import check_address, push
from diffusers_msd.stage_config import StageConfig
from diffusers_msd.students import StudentConfig
from diffusers_msd.training_config import TrainingConfig


CONFIGS = [MSDConfig, ConditionConfig, StudentConfig, AdapterConfig, DataConfig, StageConfig, TrainingConfig]


def main():
    config, condition, student, adapter, data, stage, training = parse_config(CONFIGS, __doc__)
    if config.push_to_hub and training.report_to == "wandb" and config.hub_token:
        raise ValueError("hub_token: with --report_to wandb it would be uploaded; use `hf auth login` instead")
    repo_id = config.hub_model_id or Path(config.output_dir).resolve().name
    if config.push_to_hub:
        if config.hub_license is None:
            raise ValueError("hub_license: nothing is pushed without one; give its identifier, such as apache-2.0")
        check_address(repo_id, config.hub_license, token=config.hub_token)
    if config.dry_run:
        dry_run(config, student, adapter, stage, training)
        return
    run = Run(config, condition, student, adapter, data, stage, training)
    run.accelerator.init_trackers("train_msd")
    indices = range(config.num_students) if config.student_index is None else [config.student_index]
    for k in indices:
        run.train_student(k)
    if run.accelerator.is_main_process:
        pipe = run.assemble()
        if pipe is None:
            print(f"{len(run.finals())} of {config.num_students} students are finished in {run.output_dir}")
        else:
            print(f"MultiStudentPipeline.from_pretrained({str(run.output_dir)!r}) is ready")
            if config.push_to_hub:
                push(run.output_dir, repo_id, config.hub_license, token=config.hub_token)
    run.accelerator.end_training()


if __name__ == "__main__":
    run_script(main)
