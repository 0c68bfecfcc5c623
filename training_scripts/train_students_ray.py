# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Trains K students side by side on Ray, a job of train_msd.py for each, on one machine or a cluster.

    python training_scripts/train_students_ray.py --config training_scripts/configs/digits_msd.yaml \
        --pretrained_teacher_model training_scripts/assets/digits-teacher --pairs_dir runs/digits_pairs \
        --num_students 2 --output_dir runs/digits_k2 --pairs_arguments "--num_pairs 2000"

Every other flag is one of train_msd.py (`--help` of which explains it), and so is what `--config` may hold. A student
that dies is started again from its last checkpoint, on any node. The same command again, after whatever end, goes on. On
a cluster, give `--address`, and an `--output_dir` that all nodes share.
"""

import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from evaluate import EvaluationConfig, open_feature_net, open_model, open_reference
from evaluate_text import TextEvaluationConfig
from generate_pairs import PairsConfig
from train_msd import CONFIGS

from diffusers_msd.conditions import ConditionConfig
from diffusers_msd.config import for_stage, parse_config, parse_own, run_script
from diffusers_msd.data import DataConfig
from diffusers_msd.denoiser import sample_shape
from diffusers_msd.distillation import MSDConfig
from diffusers_msd.files import check_writable
from diffusers_msd.progress import View
from diffusers_msd.training_config import TrainingConfig


SCRIPTS = Path(__file__).resolve().parent


@dataclass
class FleetConfig:
    """Where and how often students are started, and what is done before and after."""

    address: str = field(
        default="local", metadata={"help": "host:port of a Ray cluster, auto for this machine's, local for a new one."}
    )
    cpus_per_student: float = field(default=1, metadata={"help": "CPUs of each job; also its threads, rounded down."})
    gpus_per_student: float = field(
        default=0, metadata={"help": "GPUs of each job, at most 1; a fraction shares one. 0: it trains on the CPU."}
    )
    max_restarts: int = field(default=3, metadata={"help": "How often a student that dies is started again."})
    pairs_arguments: str | None = field(
        default=None,
        metadata={"help": "Make the pairs of pairs_dir first, with these flags of generate_pairs.py in quotes."},
    )
    evaluate_arguments: str | None = field(
        default=None,
        metadata={
            "help": "Compare teacher and pipeline at the end, with these flags of evaluate.py (for prompts, of "
            "evaluate_text.py) in quotes."
        },
    )

    def __post_init__(self):
        if not self.cpus_per_student > 0:
            raise ValueError(f"cpus_per_student: a number > 0 expected, got {self.cpus_per_student}")
        if not 0 <= self.gpus_per_student <= 1:
            raise ValueError(f"gpus_per_student: a number in [0, 1] expected, got {self.gpus_per_student}")
        if self.max_restarts < 0:
            raise ValueError(f"max_restarts: a number >= 0 expected, got {self.max_restarts}")
        if self.address.startswith("ray://"):
            raise ValueError("address: Ray's client is not supported; run this on a node of the cluster, with auto")


def check_flags(config: MSDConfig, training: TrainingConfig):
    """Refuses flags of train_msd.py that mean nothing here."""
    if config.student_index is not None or config.dry_run:
        raise ValueError("student_index, dry_run: are for train_msd.py; here all students are trained")
    if config.push_to_hub or config.hub_token:
        raise ValueError("push_to_hub: publish the pipeline when it is ready, no token is handed to the jobs")
    if training.resume_from_checkpoint not in (None, "latest"):
        raise ValueError("resume_from_checkpoint: is always latest here; train_msd.py can go back to an earlier one")


def pairs_command(arguments: str, config: MSDConfig, condition: ConditionConfig) -> list[str]:
    """The job that makes the pairs; bad flags are an error."""
    if config.pairs_dir is None:
        raise ValueError("pairs_dir: needed with pairs_arguments, as the folder of the pairs")
    flags = [*shlex.split(arguments), "--pretrained_teacher_model", config.pretrained_teacher_model]
    flags += ["--output_dir", config.pairs_dir]
    if condition.captions_dir is not None:
        flags += ["--captions_dir", condition.captions_dir]
    parse_config([PairsConfig], "", flags)
    return [str(SCRIPTS / "generate_pairs.py"), *flags]


def evaluation_command(arguments: str, config: MSDConfig, condition: ConditionConfig, results: Path) -> list[str]:
    """The job that compares teacher and pipeline; bad flags, and files that are not there, are an error."""
    teacher = config.pretrained_teacher_model
    flags = [*shlex.split(arguments), "--output_dir", str(results)]
    flags += ["--models", f"teacher={teacher}", f"K={config.num_students}={results.parent}"]
    if condition.captions_dir is not None:
        flags += ["--captions_dir", condition.captions_dir]
        parse_config([TextEvaluationConfig, DataConfig], "", flags)
        return [str(SCRIPTS / "evaluate_text.py"), *flags]
    evaluation, data = parse_config([EvaluationConfig, DataConfig], "", flags)
    device = torch.device("cpu")
    feature_net, name = open_feature_net(evaluation.feature_net, device)
    shape = sample_shape(open_model(teacher, evaluation, device).model)
    open_reference(evaluation, data, shape, feature_net, name, device)
    return [str(SCRIPTS / "evaluate.py"), *flags]


def main():
    # Here, so that a missing extra is one line.
    from diffusers_msd.fleet import Fleet, connect, only_driver

    own, flags = parse_own(FleetConfig, __doc__)
    configs = parse_config(CONFIGS, __doc__, flags)
    config, condition, *_, stage, training = configs
    check_flags(config, training)
    count = len(config.stages)
    steps = [for_stage(training, i, count).max_train_steps[0] for i in range(count)]
    output_dir = check_writable(config.output_dir, "output_dir").resolve()
    pairs = own.pairs_arguments and pairs_command(own.pairs_arguments, config, condition)
    evaluation = own.evaluate_arguments and evaluation_command(
        own.evaluate_arguments, config, condition, output_dir / "results"
    )

    with only_driver(output_dir) as site, connect(own.address):
        fleet = Fleet(site, own.cpus_per_student, own.gpus_per_student)
        print(f"{config.num_students} students; jobs of {fleet.resources} on {fleet.num_nodes} nodes", flush=True)
        if pairs:
            # All but what needs the pairs.
            fleet.check_run((*configs[:-2], replace(stage, regression_weight=0.0), training))
            print("pairs", flush=True)
            fleet.run(pairs, output_dir / "pairs.log")
        fleet.check_run(configs)
        view = View(output_dir, config.stages, steps, config.num_students)
        fleet.train_students([str(SCRIPTS / "train_msd.py"), *flags], view, own.max_restarts)
        print(f"MultiStudentPipeline.from_pretrained({str(output_dir)!r}) is ready", flush=True)
        if evaluation:
            fleet.run(evaluation, output_dir / "evaluate.log")
            print((output_dir / "results" / "results.md").read_text())


if __name__ == "__main__":
    run_script(main)
