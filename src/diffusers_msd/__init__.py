# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Multi-student distillation for diffusers: one teacher becomes K one-step students behind one pipeline.

What serving needs is imported here. Training (`data`, `objectives`, `stages`, `training`) and `metrics` are imported
by name, so that serving pulls in neither accelerate's training side nor datasets.
"""

# diffusers finds the load method of a component of ours through the base classes in this very namespace.
from diffusers import ModelMixin, SchedulerMixin

from .adapters import LoraStudent
from .denoiser import Denoiser, denoiser_for
from .embedding_routing import EmbeddingRouter
from .hub import register_classes
from .pipeline_msd import MultiStudentPipeline, MultiStudentPipelineOutput
from .routing import ClassRouter, ConditionRouter
from .sampling import sample_heun
from .schedule import NoiseSchedule
from .students import create_student


__version__ = "0.1.0.dev0"

__all__ = [
    "ClassRouter",
    "ConditionRouter",
    "Denoiser",
    "EmbeddingRouter",
    "LoraStudent",
    "ModelMixin",
    "MultiStudentPipeline",
    "MultiStudentPipelineOutput",
    "NoiseSchedule",
    "SchedulerMixin",
    "create_student",
    "denoiser_for",
    "sample_heun",
]

register_classes(MultiStudentPipeline)
