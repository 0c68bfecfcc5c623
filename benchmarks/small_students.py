# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""A smaller student of the digits teacher: from random or inherited weights, with and without the TSM stage.

    python benchmarks/small_students.py --output_dir runs/small_students

K = 1. Every variant has the same number of iterations: those of TSM go to DM where there is no TSM, which is more
arithmetic, not less. Writes results.json, results.md and results.png, and can be interrupted: run again, it continues.
"""

from experiment import SCRIPTS, run_experiment


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
EXPECTED = {
    "random weights need TSM": ["random_TSM", "random_no_TSM"],
    "inherited weights need TSM": ["inherit_TSM", "inherit_no_TSM"],
    "with TSM, inherited weights are better than random ones": ["inherit_TSM", "random_TSM"],
}


if __name__ == "__main__":
    run_experiment("small_students", __doc__, VARIANTS, EXPECTED)
