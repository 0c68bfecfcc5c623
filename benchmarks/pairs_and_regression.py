# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Two students of the digits: the regression on all pairs, on those of a student's own part, and without regression.

python benchmarks/pairs_and_regression.py --output_dir runs/experiments --workers 2
"""

from experiment import DIGITS, run_experiment


K2 = [*DIGITS, "--num_students", 2]
VARIANTS = {
    "K2": K2,
    "K2,_pairs_of_the_part": [*K2, "--filter_pairs"],
    "K2,_no_regression": [*K2, "--regression_weight", 0],
}
EXPECTED = {
    "all pairs are better than those of the part (the paper's choice)": ["K2", "K2,_pairs_of_the_part"],
    "DM is better with the regression than without": ["K2", "K2,_no_regression"],
}


if __name__ == "__main__":
    run_experiment("pairs_and_regression", __doc__, VARIANTS, EXPECTED)
