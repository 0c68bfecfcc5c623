# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""A smaller student of the digits teacher: from random or inherited weights, with and without the TSM stage.

    python benchmarks/small_students.py --output_dir runs/small_students

K = 1. Every variant has the same number of iterations: those of TSM go to DM where there is no TSM, which is more
arithmetic, not less. Writes results.json and results.md, means over the seeds with their standard errors, and can be
interrupted: run again, it continues.
"""

from experiment import run_experiment
from pipeline import SCRIPTS
from quickstart import run_recipe

from diffusers_msd.config import run_script


CONFIG = ["--config", SCRIPTS / "configs" / "digits_msd_small.yaml"]
STAGES = {
    # The iterations of TSM added to those of DM; the rates are those of the config.
    "no_TSM": ["--stages", "dm", "adm", "--allow_random_student", "--max_train_steps", 1500, 450,
               "--learning_rate", 1e-3, 2e-4],
    "TSM": [],
}  # fmt: skip
VARIANTS = {
    f"{init}_{tsm}": [*CONFIG, "--student_init", init, *flags]
    for tsm, flags in STAGES.items()
    for init in ("random", "inherit")
}


if __name__ == "__main__":
    run_recipe(lambda: run_script(lambda: run_experiment(__doc__, VARIANTS)))
