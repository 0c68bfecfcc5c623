# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Two LoRA students of the digits teacher, with LoRA and with full fake scores, against two full students.

    python benchmarks/lora_students.py --output_dir runs/lora_students

K = 2, the same iterations and batches. Writes results.json and results.md, means over the seeds with their standard
errors, and can be interrupted: run again, it continues.
"""

from experiment import run_experiment
from pipeline import SCRIPTS
from quickstart import run_recipe

from diffusers_msd.config import run_script


K2 = ["--num_students", 2]
LORA = ["--config", SCRIPTS / "configs" / "digits_msd_lora.yaml", *K2]
VARIANTS = {
    "full": ["--config", SCRIPTS / "configs" / "digits_msd.yaml", *K2],
    "LoRA_students": [*LORA, "--fake_score_type", "full"],
    "LoRA_students_and_fake_scores": LORA,
}


if __name__ == "__main__":
    run_recipe(lambda: run_script(lambda: run_experiment(__doc__, VARIANTS)))
