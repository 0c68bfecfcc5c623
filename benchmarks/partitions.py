# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Two students of the digits: how the ten classes are parted among them.

    python benchmarks/partitions.py --output_dir runs/experiments --workers 2

Consecutive labels, which mean nothing here; at random, another way with each seed; k-means on the teacher's class
embeddings; k-means on the mean feature of each class's real images, in parts of equal size or as k-means finds them.
"""

from pathlib import Path

import torch
from experiment import DIGITS, FEATURES, Experiment, ExperimentConfig, run_main

from diffusers_msd import ClassRouter
from diffusers_msd.config import parse_config
from diffusers_msd.data import DataConfig, load_images
from diffusers_msd.evaluation import dataset_features, open_feature_net


K2 = [*DIGITS, "--num_students", 2]
EXPECTED = {
    "semantic parts are better than random ones: class embeddings": ["K2,_class_embeddings", "K2,_random"],
    "semantic parts are better than random ones: image features": ["K2,_image_features", "K2,_random"],
    "equal parts are better than what k-means finds": ["K2,_image_features", "K2,_image_features,_unequal"],
}


def class_features() -> torch.Tensor:
    """The mean feature of each class's real images [10, D]."""
    dataset = load_images(DataConfig(dataset_name="digits"), 1, 8)
    net, _ = open_feature_net(str(FEATURES), "cpu")
    features = torch.cat(list(dataset_features(net, dataset)))
    return torch.stack([features[dataset.labels == label].mean(dim=0) for label in range(dataset.num_classes)])


def variants(folder: Path) -> dict[str, list]:
    """Saves the routers in `folder`, and gives the flags."""
    features = class_features()
    for name, balanced in (("equal", True), ("unequal", False)):
        ClassRouter.from_embeddings(features, 2, balanced).save_pretrained(folder / name)
    return {
        "K2": K2,
        "K2,_random": [*K2, "--partition", "random"],
        "K2,_class_embeddings": [*K2, "--partition", "kmeans"],
        "K2,_image_features": [*K2, "--router", folder / "equal"],
        "K2,_image_features,_unequal": [*K2, "--router", folder / "unequal"],
    }


def main():
    (config,) = parse_config([ExperimentConfig], __doc__)
    Experiment("partitions", config, variants(Path(config.output_dir) / "routers"), EXPECTED).run()


if __name__ == "__main__":
    run_main(main)
