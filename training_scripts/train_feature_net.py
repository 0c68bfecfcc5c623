# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Trains the small classifier whose features the metrics are computed on, and measures it on held-out images.

    python training_scripts/train_feature_net.py --dataset_name digits --output_dir runs/features-digits
    python training_scripts/train_feature_net.py --dataset_name fashion_mnist --output_dir runs/features-fashion-mnist

The two networks in training_scripts/assets/ were made by these commands. Digits: a fixed stratified 80/20 split.
Fashion-MNIST: its train and test splits; half of every batch is reduced to 16x16, so that one network serves both.
"""

import argparse
import sys
import time

import torch
import torch.nn.functional as F
from sklearn.model_selection import train_test_split
from tqdm.auto import tqdm

from diffusers_msd.data import DataConfig, load_images
from diffusers_msd.feature_net import FeatureNet, describe_feature_net, extract_features
from diffusers_msd.files import atomic_directory, check_writable


def shift(images, generator):
    """Moves each image by -1, 0 or 1 pixel in either direction; background comes in at the edge."""
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)
    corners = torch.randint(3, (len(images), 2, 1), generator=generator)
    rows, columns = (corners + torch.arange(images.shape[-1])).unbind(dim=1)
    batch = torch.arange(len(images))[:, None, None]
    return padded[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def mirror_and_reduce(images, generator):
    """Mirrors each image with probability 1/2; reduces the first half of the batch to half its side and back."""
    mirrored = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    images = torch.where(mirrored, images.flip(-1), images)
    half = len(images) // 2
    small = F.avg_pool2d(images[:half], 2)
    # The same resizing as FeatureNet's own, which is what a 16x16 image meets at evaluation.
    back = F.interpolate(small, size=images.shape[-2:], mode="bilinear", antialias=True, align_corners=False)
    return torch.cat([back, images[half:]])


# Side the network works at, width of its stages, epochs, what is done to the images of a batch while training, and the
# resolutions the network is measured at.
SETTINGS = {
    "digits": {"sample_size": 8, "channels": (48, 96), "epochs": 40, "augment": shift, "resolutions": (8,)},
    "fashion_mnist": {
        "sample_size": 32,
        "channels": (24, 48, 64),
        "epochs": 5,
        "augment": mirror_and_reduce,
        "resolutions": (32, 16),
    },
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", choices=sorted(SETTINGS), default="digits", help="Images to train on.")
    parser.add_argument("--train_data_dir", help="Folder of the Fashion-MNIST IDX files, if not found by itself.")
    parser.add_argument("--output_dir", required=True, help="Folder of the saved network; replaced if it exists.")
    parser.add_argument("--num_train_epochs", type=int, help="Passes over the data; default: what was shipped.")
    parser.add_argument("--train_batch_size", type=int, default=64, help="Images per update, at least 2.")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="Peak of the one-cycle schedule.")
    parser.add_argument("--seed", type=int, default=0, help="Of the initial weights, the order and the augmentation.")
    args = parser.parse_args(argv)
    if args.num_train_epochs is None:
        args.num_train_epochs = SETTINGS[args.dataset_name]["epochs"]
    for name, low in (("num_train_epochs", 1), ("train_batch_size", 2)):
        if getattr(args, name) < low:
            parser.error(f"`{name}` must be at least {low}, got {getattr(args, name)}.")
    return args


def load_split(dataset_name, split, resolution, train_data_dir=None):
    """Images `[N, 1, H, W]` in [-1, 1] and labels `[N]` of a split, "train" or "test".

    The digits have no test split of their own: 360 of the 1797, stratified by class, always the same, are held out.
    """
    own_test = dataset_name != "digits"
    config = DataConfig(dataset_name, dataset_split=split if own_test else "train", train_data_dir=train_data_dir)
    dataset = load_images(config, channels=1, resolution=resolution)
    indices = range(len(dataset))
    if not own_test:
        parts = train_test_split(indices, test_size=0.2, stratify=dataset.labels.numpy(), random_state=0)
        indices = sorted(parts[0] if split == "train" else parts[1])
    batch = dataset.__getitems__(list(indices))
    return batch["images"], batch["cond"]


def train(net, images, labels, args):
    """Cross-entropy with AdamW and a one-cycle learning rate; deterministic by `args.seed`."""
    generator = torch.Generator().manual_seed(args.seed)
    steps = args.num_train_epochs * (len(images) // args.train_batch_size)
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.learning_rate, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=args.learning_rate, total_steps=steps)
    augment = SETTINGS[args.dataset_name]["augment"]
    net.train()
    progress = tqdm(total=steps, desc="feature net", unit="step")
    for _ in range(args.num_train_epochs):
        order = torch.randperm(len(images), generator=generator).split(args.train_batch_size)
        for rows in order[: len(images) // args.train_batch_size]:
            _, logits = net(augment(images[rows], generator))
            loss = F.cross_entropy(logits, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            progress.update()
        progress.set_postfix(loss=f"{loss.item():.4f}")
    progress.close()
    return net.eval()


def accuracy(net, images, labels):
    _, logits = extract_features(net, images)
    return (logits.argmax(dim=1) == labels).double().mean().item()


def main(args):
    check_writable(args.output_dir, "output_dir")
    settings = SETTINGS[args.dataset_name]
    images, labels = load_split(args.dataset_name, "train", settings["sample_size"], args.train_data_dir)
    if len(images) < args.train_batch_size:
        raise ValueError(f"`train_batch_size` must be at most {len(images)}, the images, got {args.train_batch_size}.")
    heldout = {r: load_split(args.dataset_name, "test", r, args.train_data_dir) for r in settings["resolutions"]}
    torch.manual_seed(args.seed)
    net = FeatureNet(in_channels=1, sample_size=settings["sample_size"], channels=settings["channels"])
    parameters = sum(p.numel() for p in net.parameters())
    print(f"{args.dataset_name}: {len(images)} training images, {parameters} parameters")
    start = time.perf_counter()
    train(net, images, labels, args)
    print(f"trained in {time.perf_counter() - start:.1f} s")
    net.register_to_config(heldout_accuracy={str(r): accuracy(net, *split) for r, split in heldout.items()})
    with atomic_directory(args.output_dir) as folder:
        net.save_pretrained(folder)
    for resolution, (held_images, _) in heldout.items():
        print(f"held out: {len(held_images)} images at {resolution} px")
    print(describe_feature_net(net))


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, TypeError, FileNotFoundError) as error:
        print(f"train_feature_net.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
