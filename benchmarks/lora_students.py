# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Two LoRA students of the digits teacher, with LoRA and with full fake scores, against two full students.

    python benchmarks/lora_students.py --output_dir runs/lora_students

K = 2, the same iterations and batches. Writes results.json, results.md and results.png, and can be interrupted: run
again, it continues.
"""

from experiment import SCRIPTS, run_experiment


K2 = ["--num_students", 2]
LORA = ["--config", SCRIPTS / "configs" / "digits_msd_lora.yaml", *K2]
VARIANTS = {
    "full": ["--config", SCRIPTS / "configs" / "digits_msd.yaml", *K2],
    "LoRA_students": [*LORA, "--fake_score_type", "full"],
    "LoRA_students_and_fake_scores": LORA,
}
EXPECTED = {"LoRA students are worse than full ones": ["full", "LoRA_students_and_fake_scores"]}


if __name__ == "__main__":
    run_experiment("lora_students", __doc__, VARIANTS, EXPECTED)
