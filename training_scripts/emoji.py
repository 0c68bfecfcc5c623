# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Text to image from nothing but a font: emoji, a teacher of them, and one-step students by quadrants of the prompts.

    sudo apt-get install fonts-noto-color-emoji
    python training_scripts/emoji.py

Makes, through the same scripts a Stable Diffusion teacher takes: the data set (pictures and names of about 3,700
emoji), a small VAE, text encoder and teacher, its pairs, one student (K=1) and four (K=4), and the comparison. It can
be interrupted: run again, it continues.
"""

import os
import time
from pathlib import Path

from quickstart import SCRIPTS, folder_of, recipe_arguments, run, run_recipe, script, student_jobs, train_all


CONFIGS = SCRIPTS / "configs"
# Name of the run, its config, K.
RUNS = [("K=1", "emoji_msd.yaml", 1), ("K=4", "emoji_msd.yaml", 4)]
# What the teacher is sampled with, for pairs and for comparison; the DM loss has the same guidance in its config.
SAMPLING = ["--sampler", "dpm", "--num_inference_steps", 20, "--guidance_scale", 2]


def teacher_steps(output_dir: Path, seed: int) -> list[tuple[str, Path, list[str]]]:
    """Everything before the students: what is said, what it makes, the command."""
    data, base, captions = output_dir / "data", output_dir / "base", output_dir / "captions"
    teacher, pairs = output_dir / "teacher", output_dir / "pairs"
    images = ["--train_data_dir", data / "train", "--resolution", 32]
    return [
        ("data set: pictures and names", data / "train", script("prepare_emoji.py", "--output_dir", data)),
        (
            "VAE, tokenizer, text encoder",
            base / "text_parts.json",
            script("train_text_parts.py", "--config", CONFIGS / "emoji_text_parts.yaml", *images,
                   "--output_dir", base, "--seed", seed),
        ),
        (
            "embeddings and latents",
            captions / "latents" / "index.json",
            script("cache_captions.py", "--pretrained_teacher_model", base, *images, "--output_dir", captions),
        ),
        (
            "teacher",
            teacher / "model_index.json",
            script("train_text_teacher.py", "--config", CONFIGS / "emoji_teacher.yaml", "--pretrained_base_model", base,
                   "--captions_dir", captions, "--output_dir", teacher, "--seed", seed,
                   "--resume_from_checkpoint", "latest"),
        ),
        (
            "pairs",
            None,
            script("generate_pairs.py", "--pretrained_teacher_model", teacher, "--captions_dir", captions,
                   "--output_dir", pairs, "--num_pairs", 4000, "--seed", seed, *SAMPLING),
        ),
    ]  # fmt: skip


def main():
    arguments = recipe_arguments(__doc__, "runs/emoji", RUNS)
    output_dir = Path(arguments.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    threads = os.cpu_count() or 1
    began = time.monotonic()
    steps = teacher_steps(output_dir, arguments.seed)
    for number, (what, made, command) in enumerate(steps, start=1):
        if made is not None and made.exists():
            continue
        log = output_dir / f"{Path(command[1]).stem}.log"
        print(f"{number}/{len(steps) + 2} {what} (tail -f {log})", flush=True)
        run(command, log, threads)
    print(f"{len(steps) + 1}/{len(steps) + 2} students: {arguments.workers} at a time", flush=True)
    teacher, captions, pairs = output_dir / "teacher", output_dir / "captions", output_dir / "pairs"
    settings = [
        "--pretrained_teacher_model", teacher, "--captions_dir", captions, "--pairs_dir", pairs,
        "--seed", arguments.seed,
    ]  # fmt: skip
    train_all(output_dir, *student_jobs(output_dir, RUNS, settings), arguments.workers)
    print(f"{len(steps) + 2}/{len(steps) + 2} evaluation", flush=True)
    models = [f"teacher={teacher}"] + [f"{name}={folder_of(output_dir, name)}" for name, _, _ in RUNS]
    results = output_dir / "results"
    run(
        script("evaluate_text.py", "--models", *models, "--captions_dir", captions,
               "--train_data_dir", output_dir / "data" / "train", "--resolution", 32,
               "--contrastive_net", output_dir / "base" / "contrastive", "--output_dir", results, *SAMPLING),
        output_dir / "evaluate_text.log",
        threads,
    )  # fmt: skip
    print((results / "results.md").read_text())
    print(f"Picture: {results / 'samples.png'}; parts: {folder_of(output_dir, 'K=4') / 'partition.txt'}")
    print(f"Use it:  MultiStudentPipeline.from_pretrained({str(folder_of(output_dir, 'K=4'))!r})('red apple')")
    print(f"Took {time.monotonic() - began:.0f} s.")


if __name__ == "__main__":
    run_recipe(main)
