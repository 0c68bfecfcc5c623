# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""How a run is trained: its settings, its devices, its precision."""

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, LoggerType, ProjectConfiguration
from diffusers.optimization import TYPE_TO_SCHEDULER_FUNCTION


@dataclass
class TrainingConfig:
    """How a stage is trained. Flag names follow diffusers' examples."""

    seed: int = field(default=0, metadata={"help": "Seed of everything drawn in training."})
    train_batch_size: int = field(default=64, metadata={"help": "Samples per device and forward pass."})
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "Forward passes per update; the result equals one pass over the larger batch."}
    )
    max_train_steps: list[int] = field(
        default_factory=lambda: [1000], metadata={"help": "Iterations. One value, or one per stage."}
    )
    learning_rate: list[float] = field(
        default_factory=lambda: [1e-4],
        metadata={"help": "Peak learning rate of every optimizer. One value, or one per stage."},
    )
    lr_scheduler: str = field(
        default="constant_with_warmup",
        metadata={"help": "A schedule of diffusers.optimization: constant, constant_with_warmup, linear, cosine, ..."},
    )
    lr_warmup_steps: int = field(default=0, metadata={"help": "Iterations of linear warm-up."})
    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW beta1."})
    adam_beta2: float = field(default=0.999, metadata={"help": "AdamW beta2."})
    adam_weight_decay: float = field(default=0.01, metadata={"help": "AdamW weight decay."})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "AdamW epsilon."})
    use_8bit_adam: bool = field(default=False, metadata={"help": "8-bit AdamW of bitsandbytes."})
    max_grad_norm: float = field(default=10.0, metadata={"help": "Gradients are clipped to this norm."})
    ema_decay: float = field(
        default=0.999, metadata={"help": "Decay of the averaged weights that a stage ends with; 0 turns EMA off."}
    )
    mixed_precision: str | None = field(
        default=None,
        metadata={
            "help": "no or bf16 (activations; weights stay float32). Default: what accelerate was launched with."
        },
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Less memory for about a third more time."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that load data ahead."})
    logging_steps: int = field(
        default=50, metadata={"help": "Losses are averaged and logged every so many iterations."}
    )
    validation_steps: int = field(
        default=0, metadata={"help": "A validation grid every so many iterations; 0: end only."}
    )
    checkpointing_steps: int = field(default=500, metadata={"help": "A checkpoint every so many iterations."})
    checkpoints_total_limit: int | None = field(
        default=None, metadata={"help": "The newest so many checkpoints of a stage are kept; default: all."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "'latest', or the name of a checkpoint, such as checkpoint-500; newer ones are then deleted."
        },
    )
    max_nonfinite_steps: int = field(
        default=10,
        metadata={"help": "Training stops after so many NaN or infinite updates in a row (each is skipped)."},
    )
    report_to: str = field(
        default="tensorboard", metadata={"help": "Tracker of accelerate: tensorboard, wandb, ..., none."}
    )
    logging_dir: str = field(default="logs", metadata={"help": "Folder of the tracker's files inside output_dir."})

    def __post_init__(self):
        positive = ("train_batch_size", "gradient_accumulation_steps", "logging_steps", "checkpointing_steps",
                    "max_nonfinite_steps", "max_grad_norm")  # fmt: skip
        values = asdict(self)
        for name in positive:
            if values[name] <= 0:
                raise ValueError(f"{name}: a number > 0 expected, got {values[name]}")
        if min(self.max_train_steps) < 1:
            raise ValueError(f"max_train_steps: numbers > 0 expected, got {self.max_train_steps}")
        schedules = [schedule.value for schedule in TYPE_TO_SCHEDULER_FUNCTION]
        if self.lr_scheduler not in schedules:
            raise ValueError(f"lr_scheduler: one of {', '.join(schedules)} expected, got {self.lr_scheduler!r}")
        trackers = ("none", *(tracker.value for tracker in LoggerType))
        if self.report_to not in trackers:
            raise ValueError(f"report_to: one of {', '.join(trackers)} expected, got {self.report_to!r}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay: a number in [0, 1) expected, got {self.ema_decay}")
        if self.checkpoints_total_limit is not None and self.checkpoints_total_limit < 1:
            raise ValueError(f"checkpoints_total_limit: at least 1 expected, got {self.checkpoints_total_limit}")
        autocast_dtype(self)


def create_accelerator(config: TrainingConfig, output_dir: Path) -> Accelerator:
    """The `Accelerator` of a run: devices, processes and trackers. Precision and accumulation are done here instead.

    Raises:
        ValueError: for an unsupported kind of distribution, precision or tracker.
    """
    log_with = None if config.report_to == "none" else config.report_to
    project = ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / config.logging_dir))
    accelerator = Accelerator(mixed_precision="no", log_with=log_with, project_config=project)
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"accelerate: launched as {launched} processes, but they do not see each other; on the CPU set "
            "ACCELERATE_USE_CPU=true"
        )
    supported = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if accelerator.distributed_type not in supported:
        raise ValueError(
            f"accelerate: {accelerator.distributed_type} is not supported, use one process or data parallelism (DDP)"
        )
    return accelerator


def autocast_dtype(config: TrainingConfig) -> torch.dtype | None:
    """The dtype networks run in: `mixed_precision`, else what `accelerate launch` asked for; None is full precision.

    Raises:
        ValueError: for anything but no and bf16.
    """
    precision = config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16"):
        raise ValueError(
            f"mixed_precision: no or bf16 expected, got {precision!r} (fp16 makes distribution matching diverge)"
        )
    return torch.bfloat16 if precision == "bf16" else None
