# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Converts an EDM checkpoint into a teacher that diffusers loads; nothing in the file is executed.

    python training_scripts/convert_edm.py --checkpoint edm-imagenet-64x64-cond-adm.pkl --output_dir runs/edm_teacher

It takes NVIDIA's pickles of the ADM network (DhariwalUNet) and OpenAI's edm_imagenet64_ema.pt.
"""

from dataclasses import dataclass, field

from diffusers_msd.config import parse_config, run_script
from diffusers_msd.convert import convert_edm


@dataclass
class ConvertConfig:
    """What is converted."""

    checkpoint: str = field(metadata={"help": "A .pkl of NVIDIA's EDM, or a .pt of OpenAI's consistency_models."})
    output_dir: str = field(metadata={"help": "Folder of the teacher: a free name, or an empty folder."})
    sample_size: int = field(
        default=64, metadata={"help": "Side of the images, for OpenAI's files, which do not say it."}
    )


def main():
    (config,) = parse_config([ConvertConfig], __doc__)
    record = convert_edm(config.checkpoint, config.output_dir, config.sample_size)
    print(f"SHA-256 of {record['converted_from']}: {record['sha256']}")
    print(f"fingerprint of the teacher: {record['fingerprint']}")
    print(f"{record['network']}\n\nThe teacher is in {config.output_dir}. Go on with:\n")
    for script in ("generate_pairs.py", "train_msd.py"):
        print(f"    accelerate launch training_scripts/{script} --pretrained_teacher_model {config.output_dir} ...")


if __name__ == "__main__":
    run_script(main)
