# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""A smaller student of the digits teacher: from random or inherited weights, with and without the TSM stage.

    python benchmarks/small_students.py --output_dir runs/small_students

K = 1. Every variant has the same number of iterations: those of TSM go to DM where there is no TSM, which is more
arithmetic, not less. Writes results.json and results.md, means over the seeds with their standard errors, and can be
interrupted: run again, it continues. One student at a time, with one thread.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

from pipeline import SCRIPTS, table
from quickstart import FEATURES, TEACHER, run, run_recipe, script

from diffusers_msd.config import parse_config, run_script
from diffusers_msd.files import atomic_write, check_writable, write_json


CONFIG = SCRIPTS / "configs" / "digits_msd_small.yaml"
STAGES = {
    "TSM": [],
    # The iterations of TSM added to those of DM; the rates are those of the config.
    "no_TSM": ["--stages", "dm", "adm", "--allow_random_student", "--max_train_steps", 1500, 450,
               "--learning_rate", 1e-3, 2e-4],
}  # fmt: skip
VARIANTS = {f"{init}_{tsm}": (init, tsm) for tsm in ("no_TSM", "TSM") for init in ("random", "inherit")}


@dataclass
class ExperimentConfig:
    """What is run."""

    output_dir: str = field(metadata={"help": "Folder of pairs, runs and results."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the training, each."})


def train(output_dir: Path, seed: int, variant: str):
    folder = output_dir / f"seed_{seed}" / variant
    folder.parent.mkdir(exist_ok=True)
    init, tsm = VARIANTS[variant]
    command = script(
        "train_msd.py", "--config", CONFIG, "--pretrained_teacher_model", TEACHER, "--pairs_dir", output_dir / "pairs",
        "--validation_feature_net", FEATURES, "--student_init", init, *STAGES[tsm], "--seed", seed,
        "--output_dir", folder, "--resume_from_checkpoint", "latest",
    )  # fmt: skip
    run(command, folder.with_suffix(".log"), threads=1)
    print(f"trained: seed {seed}, {variant}", flush=True)


def evaluate(output_dir: Path, seed: int) -> list[dict]:
    folder = output_dir / f"seed_{seed}"
    command = script(
        "evaluate.py", "--models", *(f"{variant}={folder / variant}" for variant in VARIANTS),
        "--dataset_name", "digits", "--num_images", 2000, "--feature_net", FEATURES,
        "--output_dir", folder / "results",
    )  # fmt: skip
    run(command, folder / "evaluate.log", threads=os.cpu_count() or 1)
    return json.loads((folder / "results" / "results.json").read_text())["rows"]


def mean_error(values: list[float]) -> str:
    """Mean and its standard error."""
    error = f" ± {stdev(values) / len(values) ** 0.5:.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{error}"


def summary(results: dict[int, list[dict]]) -> str:
    lines = []
    for variant in VARIANTS:
        rows = [row for seed in results.values() for row in seed if row["model"] == variant]
        fd, accuracy, precision, recall = (
            [row[key] for row in rows] for key in ("fd", "class_accuracy", "precision", "recall")
        )
        lines.append(
            [variant.replace("_", ", ", 1).replace("_", " "), ", ".join(f"{value:.2f}" for value in fd)]
            + [f"**{mean_error(fd)}**", mean_error([100 * value for value in accuracy]) + " %"]
            + [mean_error(precision), mean_error(recall), f"{mean(row['training_seconds'] for row in rows):.0f}"]
        )
    seeds = " ".join(map(str, results))
    header = ["start", f"FD, seeds {seeds}", "FD", "class accuracy", "precision", "recall", "training s"]
    return table(header, lines)


def main():
    (config,) = parse_config([ExperimentConfig], __doc__)
    output_dir = check_writable(config.output_dir, "output_dir")
    pairs = script("generate_pairs.py", "--pretrained_teacher_model", TEACHER, "--num_pairs", 2000)
    run([*pairs, "--output_dir", str(output_dir / "pairs")], output_dir / "pairs.log", threads=os.cpu_count() or 1)
    for seed in config.seeds:
        for variant in VARIANTS:
            train(output_dir, seed, variant)
    results = {seed: evaluate(output_dir, seed) for seed in config.seeds}
    write_json(output_dir / "results.json", results)
    atomic_write(output_dir / "results.md", summary(results) + "\n")
    print(summary(results))


if __name__ == "__main__":
    run_recipe(lambda: run_script(main))
