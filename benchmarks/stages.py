# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""One student of the digits: DM alone, ADM alone, DM then ADM; the discriminator on the fake score or on the teacher.

    python benchmarks/stages.py --output_dir runs/experiments --workers 2

All have 1,050 iterations.
"""

from experiment import DIGITS, run_experiment


VARIANTS = {
    "K1": DIGITS,
    "K1,_DM_alone": [*DIGITS, "--stages", "dm", "--max_train_steps", 1050, "--learning_rate", 7e-4],
    "K1,_ADM_alone": [*DIGITS, "--stages", "adm", "--max_train_steps", 1050, "--learning_rate", 2e-4],
    "K1,_GAN_on_the_teacher": [*DIGITS, "--gan_features", "teacher"],
}
EXPECTED = {
    "DM then ADM is better than DM alone": ["K1", "K1,_DM_alone"],
    "DM then ADM is better than ADM alone": ["K1", "K1,_ADM_alone"],
    "the fake score's features are better for the GAN than the teacher's": ["K1", "K1,_GAN_on_the_teacher"],
}


if __name__ == "__main__":
    run_experiment("stages", __doc__, VARIANTS, EXPECTED)
