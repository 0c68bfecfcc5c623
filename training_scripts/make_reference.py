# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Statistics of a data set's features, for `evaluate.py --reference`: one file, so that many evaluations share it.

    python training_scripts/make_reference.py --dataset_name digits \
        --feature_net training_scripts/assets/features-digits --output runs/digits_reference.npz

The file holds `mu` and `sigma` as EDM's do, the number of images, and the hash of the feature network.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from diffusers_msd.config import parse_config, run_script
from diffusers_msd.data import DataConfig, load_images
from diffusers_msd.evaluation import dataset_features, open_feature_net
from diffusers_msd.feature_net import FeatureNet
from diffusers_msd.feature_statistics import FeatureStatistics, load_statistics, save_statistics
from diffusers_msd.files import check_writable


@dataclass
class ReferenceConfig:
    """Which statistics to make."""

    feature_net: str = field(metadata={"help": "Folder of a feature network, or inception (extra `fid`)."})
    output: str = field(metadata={"help": "The file to write, .npz."})
    batch_size: int = field(default=256, metadata={"help": "Images per forward pass."})

    def __post_init__(self):
        if not self.output.endswith(".npz"):
            raise ValueError(f"output: a file name that ends in .npz expected, got {self.output}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size: at least 1 expected, got {self.batch_size}")


def main():
    config, data = parse_config([ReferenceConfig, DataConfig], __doc__)
    check_writable(Path(config.output).parent, "output")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    feature_net, name = open_feature_net(config.feature_net, device)
    channels = feature_net.config.in_channels if isinstance(feature_net, FeatureNet) else 3
    dataset = load_images(data, channels)
    statistics = FeatureStatistics.of(dataset_features(feature_net, dataset, config.batch_size), name)
    save_statistics(config.output, statistics)
    _, sha256 = load_statistics(config.output, "output")
    print(f"{statistics.num_samples} images, {len(statistics.mean)} features of {name}: {config.output}, {sha256}")


if __name__ == "__main__":
    run_script(main)
