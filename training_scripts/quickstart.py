# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""The whole method on scikit-learn's digits in minutes: pairs -> partition -> [TSM ->] DM -> ADM -> pipeline -> table.

    python training_scripts/quickstart.py

Distils the shipped teacher into one student (K=1), two students (K=2) and two smaller students, through the same
scripts a real run uses. Students do not depend on each other, so all run side by side. It ends with samples.png,
learning_curves.png and a table in the output folder, and can be interrupted: run again, it continues.
"""

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm.auto import tqdm


SCRIPTS = Path(__file__).resolve().parent
TEACHER = SCRIPTS / "assets" / "digits-teacher"
FEATURES = SCRIPTS / "assets" / "features-digits"

# Name of the run, its config, K, what it differs in.
RUNS = [
    ("K=2 smaller", "digits_msd_small.yaml", 2),
    ("K=2", "digits_msd.yaml", 2),
    ("K=1", "digits_msd.yaml", 1),
]


def folder_of(output_dir: Path, name: str) -> Path:
    """The folder of a run; "=" separates names from folders for evaluate.py."""
    return output_dir / name.replace("=", "").replace(" ", "_")


def script(name: str, *arguments) -> list[str]:
    return [sys.executable, str(SCRIPTS / name), *(str(a) for a in arguments)]


def run(command: list[str], log: Path, threads: int):
    """Runs a script with its output in a log file; a failure shows the end of it."""
    # Waiting threads sleep instead of spinning: on a busy machine spinning ones starve those that work.
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    with log.open("ab") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
    if code:
        tail = log.read_text(errors="replace").replace("\r", "\n").splitlines()[-15:]
        raise RuntimeError(f"{Path(command[1]).name} ended with status {code}; the end of {log}:\n" + "\n".join(tail))


def steps_done(output_dir: Path) -> int:
    """Iterations logged so far by all students."""
    lines = [log.read_text().splitlines() for log in output_dir.glob("*/student_*/*/log.jsonl")]
    return sum(int(last.split('"step": ')[1].split(",")[0].rstrip("}")) for *_, last in filter(None, lines))


def student_jobs(output_dir: Path, runs: list[tuple[str, str, int]], settings: list) -> tuple[list, int]:
    """One command with its log per student of each run, and how many iterations all of them have.

    Args:
        output_dir: folder of the runs.
        runs: name, config file, K.
        settings: flags of train_msd.py that all runs have.
    """
    import yaml

    jobs, total = [], 0
    for name, config, k in runs:
        total += k * sum(yaml.safe_load((SCRIPTS / "configs" / config).read_text())["max_train_steps"])
        for index in range(k):
            folder = folder_of(output_dir, name)
            command = script(
                "train_msd.py", "--config", SCRIPTS / "configs" / config, *settings, "--num_students", k,
                "--student_index", index, "--output_dir", folder, "--resume_from_checkpoint", "latest",
            )  # fmt: skip
            jobs.append((command, output_dir / f"{folder.name}_student_{index}.log"))
    return jobs, total


def train_all(output_dir: Path, jobs: list, total: int, workers: int):
    """Runs the jobs, `workers` at a time, with one progress bar over all iterations."""
    bar = tqdm(total=total, desc=f"distilling {len(jobs)} students", unit="it", initial=steps_done(output_dir))
    with bar, ThreadPoolExecutor(workers) as pool:
        # All at once even on fewer cores: with one thread each they share them evenly, and no core idles at the end.
        threads = max(1, (os.cpu_count() or 1) // workers)
        futures = [pool.submit(run, *job, threads) for job in jobs]
        while not all(f.done() for f in futures):
            time.sleep(1)
            bar.update(steps_done(output_dir) - bar.n)
            if any(f.done() and f.exception() for f in futures):
                pool.shutdown(cancel_futures=True)
        for future in futures:
            if not future.cancelled():
                future.result()


def recipe_arguments(description: str, output_dir: str, runs: list[tuple[str, str, int]]) -> argparse.Namespace:
    """The command line of a recipe: `output_dir`, `seed`, and `workers`, by default as many as there are students."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default=output_dir, help="Folder of everything that is made.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the training.")
    parser.add_argument("--workers", type=int, default=sum(k for *_, k in runs), help="Students at a time.")
    return parser.parse_args()


def main():
    arguments = recipe_arguments(__doc__, "runs/quickstart", RUNS)
    output_dir = Path(arguments.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()

    print("1/3 pairs: the shipped teacher draws its own samples")
    pairs = output_dir / "pairs"
    run(
        script("generate_pairs.py", "--pretrained_teacher_model", TEACHER, "--output_dir", pairs, "--num_pairs", 2000),
        output_dir / "pairs.log",
        threads=os.cpu_count() or 1,
    )
    print(f"2/3 students: {arguments.workers} at a time")
    settings = [
        "--pretrained_teacher_model", TEACHER, "--validation_feature_net", FEATURES, "--pairs_dir", pairs,
        "--seed", arguments.seed,
    ]  # fmt: skip
    train_all(output_dir, *student_jobs(output_dir, RUNS, settings), arguments.workers)
    print("3/3 evaluation")
    models = [f"teacher={TEACHER}"] + [f"{name}={folder_of(output_dir, name)}" for name, _, _ in RUNS[::-1]]
    results = output_dir / "results"
    run(
        script("evaluate.py", "--models", *models, "--dataset_name", "digits", "--feature_net", FEATURES,
               "--num_images", 2000, "--output_dir", results),
        output_dir / "evaluate.log",
        threads=os.cpu_count() or 1,
    )  # fmt: skip
    print((results / "results.md").read_text())
    print(f"Pictures: {results / 'samples.png'}, {results / 'learning_curves.png'}")
    print(
        f"Use it:   MultiStudentPipeline.from_pretrained({str(folder_of(output_dir, 'K=2'))!r})(class_labels=[3, 7])"
    )
    print(f"Took {time.monotonic() - began:.0f} s.")


def run_recipe(main):
    """Runs a recipe: a failed script is shown by the end of its log, an interrupt says how to go on."""
    try:
        main()
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again to continue", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run_recipe(main)
