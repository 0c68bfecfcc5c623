# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Variants of a digits run against one another over several seeds: what the experiments beside this file share."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

from pipeline import table
from quickstart import FEATURES, TEACHER, run, script

from diffusers_msd.config import parse_config
from diffusers_msd.files import atomic_write, check_writable, write_json


@dataclass
class ExperimentConfig:
    """What is run."""

    output_dir: str = field(metadata={"help": "Folder of pairs, runs and results."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the training, each."})
    workers: int = field(default=1, metadata={"help": "Runs at a time, each with one thread."})
    variants: list[str] = field(default_factory=list, metadata={"help": "Rows of the table; default: all."})


def train(output_dir: Path, seed: int, variant: str, flags: list):
    folder = output_dir / f"seed_{seed}" / variant
    folder.parent.mkdir(exist_ok=True)
    command = script(
        "train_msd.py", *flags, "--pretrained_teacher_model", TEACHER, "--pairs_dir", output_dir / "pairs",
        "--validation_feature_net", FEATURES, "--seed", seed,
        "--output_dir", folder, "--resume_from_checkpoint", "latest",
    )  # fmt: skip
    run(command, folder.with_suffix(".log"), threads=1)
    print(f"trained: seed {seed}, {variant}", flush=True)


def evaluate(output_dir: Path, seed: int, variants: list[str]) -> list[dict]:
    folder = output_dir / f"seed_{seed}"
    command = script(
        "evaluate.py", "--models", *(f"{variant}={folder / variant}" for variant in variants),
        "--dataset_name", "digits", "--num_images", 2000, "--feature_net", FEATURES,
        "--output_dir", folder / "results",
    )  # fmt: skip
    run(command, folder / "evaluate.log", threads=os.cpu_count() or 1)
    return json.loads((folder / "results" / "results.json").read_text())["rows"]


def mean_error(values: list[float]) -> str:
    """Mean and its standard error."""
    error = f" ± {stdev(values) / len(values) ** 0.5:.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{error}"


def summary(results: dict[int, list[dict]], variants: list[str]) -> str:
    lines = []
    for variant in variants:
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
    header = ["variant", f"FD, seeds {seeds}", "FD", "class accuracy", "precision", "recall", "training s"]
    return table(header, lines)


def run_experiment(description: str, variants: dict[str, list]):
    """Trains every variant with every seed, then writes results.json and results.md, and prints the table.

    Args:
        description: of the command line.
        variants: {name: flags of train_msd.py}.
    """
    (config,) = parse_config([ExperimentConfig], description)
    if unknown := set(config.variants) - set(variants):
        raise ValueError(f"variants: some of {', '.join(variants)} expected, got {', '.join(sorted(unknown))}")
    variants = {name: variants[name] for name in config.variants or variants}
    output_dir = check_writable(config.output_dir, "output_dir")
    pairs = script("generate_pairs.py", "--pretrained_teacher_model", TEACHER, "--num_pairs", 2000)
    run([*pairs, "--output_dir", str(output_dir / "pairs")], output_dir / "pairs.log", threads=os.cpu_count() or 1)
    with ThreadPoolExecutor(config.workers) as pool:
        jobs = [(output_dir, seed, name, flags) for seed in config.seeds for name, flags in variants.items()]
        for future in [pool.submit(train, *job) for job in jobs]:
            future.result()
    results = {seed: evaluate(output_dir, seed, list(variants)) for seed in config.seeds}
    write_json(output_dir / "results.json", results)
    atomic_write(output_dir / "results.md", summary(results, list(variants)) + "\n")
    print(summary(results, list(variants)))
