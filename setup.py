# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Ranges are what the code needs; `constraints.txt` holds the versions it is tested with."""

import re
from pathlib import Path

from setuptools import find_packages, setup


here = Path(__file__).parent

# Where the lower bounds come from:
#   diffusers 0.42    `dtype=` in from_pretrained, and the table of loadable classes that `hub.py` enters itself in
#   transformers 5    `dtype=` as well
#   torch 2.6         what transformers 5 and diffusers 0.42 ask for
#   huggingface-hub, safetensors   what diffusers 0.42 asks for
#   peft 0.17         what diffusers 0.42 asks for
core = [
    "diffusers>=0.42,<1.0",
    "huggingface-hub>=1.32,<3.0",
    "numpy>=2.0",
    "peft>=0.17",
    "pillow>=11.0",
    "safetensors>=0.8.0",
    "torch>=2.6",
    "transformers>=5.0,<6.0",
]
training = [
    "accelerate>=1.10",
    "datasets>=5.0",
    "matplotlib>=3.9",
    "pyyaml>=6.0",
    "scikit-learn>=1.5",
    "scipy>=1.13",
    "tensorboard>=2.18",
    "tqdm>=4.66.3",
]

setup(
    name="diffusers_msd",
    version=re.search(r'__version__ = "(.+)"', (here / "src/diffusers_msd/__init__.py").read_text())[1],
    description="Multi-student distillation of diffusion models into one-step generators, as a diffusers pipeline",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The diffusers_msd authors",
    license="Apache-2.0",
    package_dir={"": "src"},
    packages=find_packages("src"),
    entry_points={"console_scripts": ["diffusers-msd = diffusers_msd.cli:main"]},
    python_requires=">=3.11",
    install_requires=core,
    extras_require={
        "training": training,
        "demo": ["gradio>=6.0", "matplotlib>=3.9"],
        "ray": ["ray>=2.50"],
        "serve": ["fastapi>=0.165", "ray[serve]>=2.60"],
        "docs": ["mkdocs-material>=9.6", "mkdocstrings[python]>=1.0"],
        # These two need torchvision, which has to be built for the installed torch.
        "lpips": ["lpips>=0.1.4"],
        "fid": ["torch-fidelity>=0.4.0"],
        "dev": [
            *training,
            "hypothesis>=6.100",
            "playwright>=1.50",
            "pytest>=8.0",
            "ruff>=0.17,<0.18",
            "torchmetrics>=1.6",
        ],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
