# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Variants of a digits run against one another over several seeds: what the experiments beside this file share.

An experiment is a dict {name: flags of train_msd.py}. A variant is trained once for each seed, in the folder
`<output_dir>/seed_<s>/<name>`, so experiments that share an output folder share the runs of variants they both name.
"""

import json
import os
import shlex
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

from pipeline import table
from quickstart import FEATURES, SCRIPTS, TEACHER, run, run_recipe, script
from verdict import mean_and_error, verdict

from diffusers_msd.config import parse_config, run_script
from diffusers_msd.files import atomic_write, check_writable, write_json
from diffusers_msd.plots import subplots


DIGITS = ["--config", SCRIPTS / "configs" / "digits_msd.yaml", "--validation_steps", 0]
SMOKE = ["--max_train_steps", 4, "--gan_warmup_steps", 0, "--lr_warmup_steps", 0, "--train_batch_size", 8]


@dataclass
class SeedsConfig:
    """Of every experiment: where, with which seeds, how many runs at a time."""

    output_dir: str | None = field(
        default=None, metadata={"help": "Folder of pairs, runs and results; default: runs/experiments (..._smoke)."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the training, each."})
    workers: int = field(default=1, metadata={"help": "Runs at a time, each with one thread."})
    smoke: bool = field(default=False, metadata={"help": "Four iterations a stage, few images: does it run at all?"})

    def __post_init__(self):
        # Runs of four iterations must not be taken for finished ones.
        self.output_dir = self.output_dir or ("runs/experiments_smoke" if self.smoke else "runs/experiments")


@dataclass
class ExperimentConfig(SeedsConfig):
    """What is run."""

    variants: list[str] = field(default_factory=list, metadata={"help": "Rows of the table; default: all."})

    @property
    def num_images(self) -> int:
        return 100 if self.smoke else 2000


class Experiment:
    """Trains variants with every seed and writes results.json, results.md and results.png in a folder of its name.

    Args:
        name: of the folder and of the results.
        config: what is run.
        variants: {name: flags of train_msd.py}.
        expected: claims to be judged, {claim: names of variants, best first}, by their Fréchet distances.
    """

    def __init__(self, name: str, config: ExperimentConfig, variants: dict[str, list], expected: dict[str, list[str]]):
        if unknown := set(config.variants) - set(variants):
            raise ValueError(f"variants: some of {', '.join(variants)} expected, got {', '.join(sorted(unknown))}")
        self.name, self.config = name, config
        # Four rows show that it runs.
        rows = config.variants or list(variants)[: 4 if config.smoke else None]
        self.variants = {variant: variants[variant] for variant in rows}
        self.expected = {claim: order for claim, order in expected.items() if set(order) <= set(self.variants)}
        self.root = check_writable(config.output_dir, "output_dir")

    def run(self):
        """All of it; what is there already is not done again."""
        self.train()
        results = {seed: self.evaluate(seed) for seed in self.config.seeds}
        folder = self.root / self.name
        folder.mkdir(exist_ok=True)
        report = f"{self.summary(results)}\n\n{self.verdicts(results)}".strip()
        write_json(folder / "results.json", {"seeds": results, "commands": self.commands()})
        atomic_write(folder / "results.md", report + "\n")
        self.plot(results, folder / "results.png")
        print(report)

    def train(self):
        """Every variant with every seed, several at a time."""
        pairs = script(
            "generate_pairs.py", "--pretrained_teacher_model", TEACHER, "--output_dir", self.root / "pairs",
            "--num_pairs", self.config.num_images, *(["--num_inference_steps", 2] if self.config.smoke else []),
        )  # fmt: skip
        run(pairs, self.root / "pairs.log", threads=os.cpu_count() or 1)
        with ThreadPoolExecutor(self.config.workers) as pool:
            jobs = [(seed, variant) for seed in self.config.seeds for variant in self.variants]
            for future in [pool.submit(self.train_one, *job) for job in jobs]:
                future.result()

    def command(self, seed: int, variant: str) -> list[str]:
        """What trains a variant."""
        return script(
            "train_msd.py", *self.variants[variant], *(SMOKE if self.config.smoke else []),
            "--pretrained_teacher_model", TEACHER, "--pairs_dir", self.root / "pairs",
            "--validation_feature_net", FEATURES, "--seed", seed, "--output_dir", self.folder(seed, variant),
            "--resume_from_checkpoint", "latest",
        )  # fmt: skip

    def commands(self) -> dict[str, str]:
        """Of the first seed, to be pasted."""
        return {name: shlex.join(self.command(self.config.seeds[0], name)) for name in self.variants}

    def folder(self, seed: int, variant: str) -> Path:
        return self.root / f"seed_{seed}" / variant

    def train_one(self, seed: int, variant: str):
        folder = self.folder(seed, variant)
        folder.parent.mkdir(exist_ok=True)
        # No with_suffix: names hold points.
        run(self.command(seed, variant), folder.with_name(f"{variant}.log"), threads=1)
        print(f"trained: seed {seed}, {variant}", flush=True)

    def evaluate(self, seed: int) -> dict[str, dict]:
        """The metrics of each variant."""
        results = self.root / self.name / f"seed_{seed}"
        results.parent.mkdir(exist_ok=True)
        command = script(
            "evaluate.py", "--models", *(f"{variant}={self.folder(seed, variant)}" for variant in self.variants),
            "--dataset_name", "digits", "--num_images", self.config.num_images, "--feature_net", FEATURES,
            "--output_dir", results,
        )  # fmt: skip
        run(command, results.with_suffix(".log"), threads=os.cpu_count() or 1)
        return {row["model"]: row for row in json.loads((results / "results.json").read_text())["rows"]}

    def summary(self, results: dict[int, dict]) -> str:
        """The table: a variant a row, means over the seeds with their standard errors."""
        header = ["variant", f"FD, seeds {' '.join(map(str, results))}", "FD", "class accuracy, %"]
        header += ["precision", "recall", "parameters", "training TFLOP, with pairs", "training s"]
        lines = []
        for variant in self.variants:
            rows = [rows[variant] for rows in results.values()]
            fd, accuracy, precision, recall, parameters, seconds = (
                [row[key] for row in rows]
                for key in ("fd", "class_accuracy", "precision", "recall", "parameters_total", "training_seconds")
            )
            lines.append([variant.replace("_", " "), ", ".join(f"{value:.2f}" for value in fd)])
            lines[-1] += [f"**{mean_and_error(fd, 2)}**", mean_and_error([100 * value for value in accuracy], 2)]
            lines[-1] += [mean_and_error(precision), mean_and_error(recall)]
            # Runs of earlier versions kept no account.
            flops = rows[0]["training"].get("flops_with_pairs")
            lines[-1] += [f"{parameters[0]:,}", f"{flops / 1e12:.1f}" if flops else "-", f"{mean(seconds):.0f}"]
        return table(header, lines)

    def verdicts(self, results: dict[int, dict]) -> str:
        """A line per claim."""
        fd = {variant: [rows[variant]["fd"] for rows in results.values()] for variant in self.variants}
        return "\n".join(f"* {claim}: **{verdict(fd, order)}**" for claim, order in self.expected.items())

    def plot(self, results: dict[int, dict], path: Path):
        """Each seed's Fréchet distance as a point, their mean as a line."""
        figure, axis = subplots(1, 1, (7, 0.8 + 0.32 * len(self.variants)))
        for y, variant in enumerate(self.variants):
            values = [rows[variant]["fd"] for rows in results.values()]
            axis.plot(values, [y] * len(values), "o", color="C0", markersize=4, alpha=0.6)
            axis.plot([mean(values)], [y], "|", color="black", markersize=14)
        axis.set_yticks(range(len(self.variants)), [variant.replace("_", " ") for variant in self.variants])
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("{x:g}")
        axis.tick_params(axis="x", which="both", labelsize=7)
        axis.set_xlabel("Fréchet distance, one point per seed, and their mean")
        axis.grid(axis="x", alpha=0.3)
        figure.savefig(path, dpi=100)


def run_experiment(name: str, description: str, variants: dict[str, list], expected: dict[str, list[str]]):
    """The command line of an experiment; arguments as for `Experiment`, `description` is shown by --help."""
    run_main(lambda: Experiment(name, parse_config([ExperimentConfig], description)[0], variants, expected).run())


def run_main(main):
    """Runs an experiment; errors are one line, a failed script is shown by the end of its log."""
    run_recipe(lambda: run_script(main))
