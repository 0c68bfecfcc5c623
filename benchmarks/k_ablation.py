# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""How many students? K = 1, 2, 5, 10 on the digits at the same budget per student and at the same budget in total.

    python benchmarks/k_ablation.py --output_dir runs/experiments --workers 2

At the same budget per student, K students cost K times as much. The controls that cost as much as one: 1/K of the
iterations each (rates and warm-ups shrink with them), or 1/K of the batch each, which is the paper's. And one student that
costs K times as much: of K times the parameters (random weights, so with a TSM stage), or with K times the batch.
"""

from experiment import DIGITS, run_experiment


def iterations(dm: int, adm: int) -> list:
    """Of the two stages, with warm-ups in proportion to those of the config (700 and 350)."""
    return ["--max_train_steps", dm, adm, "--gan_warmup_steps", dm // 7, "--lr_warmup_steps", dm // 14]


def wider(*channels: int) -> list:
    stages = ["--stages", "tsm", "dm", "adm", "--max_train_steps", 600, 700, 350]
    return [*DIGITS, "--student_channels", *channels, *stages, "--learning_rate", 2e-3, 7e-4, 2e-4]


VARIANTS = {
    "K1": DIGITS,
    "K2": [*DIGITS, "--num_students", 2],
    "K5": [*DIGITS, "--num_students", 5],
    "K10": [*DIGITS, "--num_students", 10],
    "K2,_half_the_iterations": [*DIGITS, "--num_students", 2, *iterations(350, 175)],
    "K5,_a_fifth_of_the_iterations": [*DIGITS, "--num_students", 5, *iterations(140, 70)],
    "K2,_half_the_batch": [*DIGITS, "--num_students", 2, "--train_batch_size", 16],
    "K1,_2.2_x_the_parameters": wider(24, 48),
    "K1,_5.2_x_the_parameters": wider(48, 64),
    "K1,_2_x_the_batch": [*DIGITS, "--train_batch_size", 64],
    "K1,_5_x_the_batch": [*DIGITS, "--train_batch_size", 160],
}
EXPECTED = {
    "same budget per student: the more students the better (the paper's table)": ["K10", "K5", "K2", "K1"],
    "K=5 is better than K=1 at the same budget per student": ["K5", "K1"],
    "K=2 is better than K=1 at the same total, iterations halved": ["K2,_half_the_iterations", "K1"],
    "K=2 is better than K=1 at the same total, batch halved": ["K2,_half_the_batch", "K1"],
    "K=5 is better than K=1 at the same total": ["K5,_a_fifth_of_the_iterations", "K1"],
    "K=2 is better than one student of 2.2 times the parameters": ["K2", "K1,_2.2_x_the_parameters"],
    "K=5 is better than one student of 5.2 times the parameters": ["K5", "K1,_5.2_x_the_parameters"],
    "K=2 is better than one student with twice the batch": ["K2", "K1,_2_x_the_batch"],
    "K=5 is better than one student with five times the batch": ["K5", "K1,_5_x_the_batch"],
}


if __name__ == "__main__":
    run_experiment("k_ablation", __doc__, VARIANTS, EXPECTED)
