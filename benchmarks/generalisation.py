# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Do teacher and student know the digits, or their training images? Against the number of training images.

    python benchmarks/generalisation.py --workers 2

For each seed and number N: a teacher is trained on N random digits and distilled into one student (K = 1, DM and ADM,
on the same N images). Then all are given the same noise and classes, and compared by the probability flow distance
(`diffusers_msd.pfd`): with the training set's own flow (E_mem), and with the shipped teacher's, which was trained on all
1,797 digits and stands in for the true distribution (E_gen). The student is its own map, so its numbers are paired-noise
distances.

Writes results.json, results.md and results.png, means over the seeds with their standard errors, and can be
interrupted: run again, it continues. `--smoke` shows in a minute that everything runs.
"""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean

import torch
from experiment import FEATURES, SCRIPTS, TEACHER, SeedsConfig, run, run_main, script
from pipeline import table
from verdict import mean_and_error, standard_error, verdict

from diffusers_msd import Denoiser, MultiStudentPipeline, NoiseSchedule, denoiser_for
from diffusers_msd.config import parse_config
from diffusers_msd.data import DataConfig, load_images
from diffusers_msd.feature_net import FeatureNet
from diffusers_msd.files import atomic_write, check_writable, load_model, write_json
from diffusers_msd.pairs import pair_noise, pair_seeds
from diffusers_msd.pfd import EmpiricalDenoiser, heun_map, paired_distance
from diffusers_msd.plots import plot_series
from diffusers_msd.runs import claim_run
from diffusers_msd.teachers import load_teacher


@dataclass
class GeneralisationConfig(SeedsConfig):
    """What is trained and compared."""

    sizes: list[int] = field(
        default_factory=lambda: [30, 100, 300, 1000, 1797], metadata={"help": "Numbers of training images."}
    )
    teacher_steps: int = field(default=1500, metadata={"help": "Iterations of each teacher."})
    student_steps: list[int] = field(
        default_factory=lambda: [400, 200], metadata={"help": "Iterations of DM and of ADM."}
    )
    num_pairs: int = field(default=2000, metadata={"help": "Teacher pairs of each distillation."})
    num_noises: int = field(default=1000, metadata={"help": "Noises that the distances are estimated on."})


# Whatever else is said.
SMOKE = {
    "sizes": [30, 60],
    "teacher_steps": 4,
    "student_steps": [2, 2],
    "num_pairs": 20,
    "num_noises": 20,
}

# Seed of the noises, apart from those of the pairs.
NOISE = 1_000_000
MEMORY, TRUTH = "its training set", "the truth"
# Title of a distance: the two maps between which it is.
DISTANCES = {
    "teacher: E_mem": ("teacher", MEMORY),
    "teacher: E_gen": ("teacher", TRUTH),
    "perfect memory: E_gen": (MEMORY, TRUTH),
    "student to its teacher": ("student", "teacher"),
    "student to its training set": ("student", MEMORY),
    "student to the truth": ("student", TRUTH),
}
SPACES = ["pixels", "features"]


def train(folder: Path, seed: int, size: int, config: GeneralisationConfig):
    """A teacher and its student, from the same images; what is there already is left as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    teacher, pairs, student = folder / "teacher", folder / "pairs", folder / "student"
    flags = ["--max_train_samples", size, "--train_samples_seed", seed, "--seed", seed]
    flags += ["--resume_from_checkpoint", "latest"]
    if not (teacher / "teacher.json").is_file():
        command = script(
            "train_teacher.py", "--config", SCRIPTS / "configs" / "digits_teacher.yaml", *flags,
            "--max_train_steps", config.teacher_steps, "--output_dir", teacher,
        )  # fmt: skip
        run(command, folder / "teacher.log", threads=1)
    if not (student / "model_index.json").is_file():
        command = script("generate_pairs.py", "--pretrained_teacher_model", teacher, "--num_pairs", config.num_pairs)
        run([*command, "--output_dir", str(pairs)], folder / "pairs.log", threads=1)
        command = script(
            "train_msd.py", "--config", SCRIPTS / "configs" / "digits_msd.yaml", *flags, "--num_students", 1,
            "--max_train_steps", *config.student_steps, "--pretrained_teacher_model", teacher, "--pairs_dir", pairs,
            "--validation_feature_net", FEATURES, "--validation_steps", 0, "--output_dir", student,
        )  # fmt: skip
        run(command, folder / "student.log", threads=1)
    print(f"trained: seed {seed}, {size} images", flush=True)


def open_teacher(path: Path) -> Denoiser:
    model, scheduler = load_teacher(str(path))
    return denoiser_for(model, NoiseSchedule.from_scheduler(scheduler))


@torch.no_grad()
def measure(folder: Path, seed: int, size: int, config: GeneralisationConfig) -> dict:
    """All distances of one teacher and its student, in pixels and in features."""
    data = load_images(DataConfig("digits", max_train_samples=size, train_samples_seed=seed), channels=1)
    images = data.__getitems__(range(len(data)))["images"]
    # A small set may lack a class; there it has no flow to compare with.
    classes = data.labels.unique()
    labels = classes[torch.arange(config.num_noises) % len(classes)]
    noise = pair_noise(pair_seeds(NOISE, range(config.num_noises)), data.image_shape)
    teacher, truth = open_teacher(folder / "teacher"), open_teacher(TEACHER)
    pipe = MultiStudentPipeline.from_pretrained(folder / "student")
    pipe.set_progress_bar_config(disable=True)
    samples = {
        "teacher": heun_map(teacher, labels)(noise),
        TRUTH: heun_map(truth, labels)(noise),
        MEMORY: heun_map(EmpiricalDenoiser(images, teacher.schedule, data.labels), labels)(noise),
        "student": pipe(class_labels=labels, latents=noise, output_type="latent").images,
    }
    spaces = dict(zip(SPACES, (None, load_model(FeatureNet, FEATURES, "feature_net"))))
    distances = {
        space: {title: paired_distance(samples[a], samples[b], net)._asdict() for title, (a, b) in DISTANCES.items()}
        for space, net in spaces.items()
    }
    return {"seed": seed, "size": size, "classes": len(classes), **distances}


def roots(rows: list[dict], space: str, title: str) -> dict[int, list[float]]:
    """{number of images: the distance with each seed}."""
    sizes = sorted({row["size"] for row in rows})
    return {size: [row[space][title]["root"] for row in rows if row["size"] == size] for size in sizes}


def summary(rows: list[dict], config: GeneralisationConfig) -> str:
    """A table per space, with its verdicts."""
    parts = [
        f"Root form of the distance over {config.num_noises} noises; mean and standard error over the seeds "
        f"{' '.join(map(str, config.seeds))}. {config.teacher_steps} iterations of the teacher, "
        f"{' + '.join(map(str, config.student_steps))} of the student."
    ]
    for space in SPACES:
        columns = {title: roots(rows, space, title) for title in DISTANCES}
        lines = [
            [str(size), *(mean_and_error(values[size]) for values in columns.values())]
            for size in columns["teacher: E_mem"]
        ]
        rises = verdict(columns["teacher: E_mem"], sorted(config.sizes))
        falls = verdict(columns["teacher: E_gen"], sorted(config.sizes, reverse=True))
        parts += [f"In {space}:", table(["images", *DISTANCES], lines)]
        parts.append(f"* With more images E_mem rises: **{rises}**\n* With more images E_gen falls: **{falls}**")
    return "\n\n".join(parts)


def plot(rows: list[dict], path: Path):
    panels = {
        f"PFD in {space}": {
            title: {size: (mean(values), standard_error(values)) for size, values in roots(rows, space, title).items()}
            for title in DISTANCES
        }
        for space in SPACES
    }
    plot_series(panels, "training images", path)


def main():
    (config,) = parse_config([GeneralisationConfig], __doc__)
    if config.smoke:
        config = replace(config, **SMOKE)
    output_dir = check_writable(Path(config.output_dir) / "generalisation", "output_dir")
    budget = {name: vars(config)[name] for name in ("teacher_steps", "student_steps", "num_pairs", "num_noises")}
    claim_run(output_dir, budget)
    began = time.monotonic()
    jobs = [
        (output_dir / f"seed_{seed}" / f"{n}_images", seed, n, config) for seed in config.seeds for n in config.sizes
    ]
    with ThreadPoolExecutor(config.workers) as pool:
        for future in [pool.submit(train, *job) for job in jobs]:
            future.result()
    for folder, *job in jobs:
        if not (folder / "row.json").is_file():
            write_json(folder / "row.json", measure(folder, *job))
    rows = [json.loads((folder / "row.json").read_text()) for folder, *_ in jobs]
    write_json(output_dir / "results.json", {"budget": budget, "rows": rows})
    atomic_write(output_dir / "results.md", summary(rows, config) + "\n")
    plot(rows, output_dir / "results.png")
    print(f"{summary(rows, config)}\n\nTook {time.monotonic() - began:.0f} s.")


if __name__ == "__main__":
    run_main(main)
