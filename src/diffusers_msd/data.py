# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Labelled image datasets: scikit-learn's digits, (Fashion-)MNIST's files, and all that HF `datasets` reads.

`datasets` and `sklearn` are imported where they are used: neither is needed to read the other's data.
"""

import gzip
import io
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from .shards import Rows
from .zipped_images import load_zip


# Where Debian's package dataset-fashion-mnist puts the four IDX files.
FASHION_MNIST_DIR = Path("/usr/share/datasets/fashion-mnist")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


@dataclass
class DataConfig:
    """Which images to train on: one of `dataset_name` and `train_data_dir` (both for fashion_mnist's files)."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "'digits' (8x8, scikit-learn's), 'fashion_mnist', or the name of a Hub dataset."},
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of the Hub dataset, for those that have several."}
    )
    dataset_split: str = field(
        default="train", metadata={"help": "Split to read: 'train', 'test', or any split of the Hub dataset."}
    )
    train_data_dir: str | None = field(
        default=None,
        metadata={
            "help": "Local folder: class folders of images, images with metadata.jsonl, *.parquet, webdataset *.tar, or IDX "
            "files (*-ubyte[.gz]); or a zip in EDM's format (PNG files and dataset.json)."
        },
    )
    image_column: str = field(default="image", metadata={"help": "Column of the images (Hub and parquet)."})
    label_column: str = field(default="label", metadata={"help": "Column of the labels (Hub and parquet)."})
    caption_column: str = field(
        default="text", metadata={"help": "Column of the captions (text-conditional teachers only)."}
    )
    resolution: int | None = field(
        default=None, metadata={"help": "Side of the images in pixels; default: the model's, else the data's own."}
    )
    resize: bool = field(
        default=False, metadata={"help": "Resize, center-crop and convert images of another size or mode."}
    )
    resize_method: str = field(
        default="lanczos",
        metadata={
            "help": "How: lanczos, as EDM's ImageNet-64, or adm, as Dhariwal and Nichol's (halved by means, then bicubic).",
            "choices": ["lanczos", "adm"],
        },
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Use only so many images, drawn once at random; more of them include fewer."}
    )
    train_samples_seed: int = field(default=0, metadata={"help": "Seed of the choice of max_train_samples."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where HF datasets keeps downloads and its cache."})


class ImageDataset(torch.utils.data.Dataset):
    """Labelled images in [-1, 1], or labelled latents.

    A batch comes whole from `__getitems__`, so a `DataLoader` over it needs a `collate_fn` that returns its argument.

    Args:
        read: takes row numbers (a list of n ints) to images, float32 [n, C, H, W].
        labels: LongTensor [N], values in [0, num_classes).
        num_classes: number of classes of the whole dataset; a part of it keeps this number.
        image_shape: (C, H, W).
        rows: the row of each sample; default: 0 ... N-1.
        conditions: [num_classes, ...], what the networks take for each label; default: the labels themselves.
    """

    def __init__(
        self,
        read: Callable[[list[int]], torch.Tensor],
        labels: torch.Tensor,
        num_classes: int,
        image_shape: tuple[int, int, int],
        rows: torch.Tensor | None = None,
        conditions: torch.Tensor | Rows | None = None,
    ):
        self.labels = labels
        self.num_classes = num_classes
        self.image_shape = image_shape
        self._read = read
        self._rows = torch.arange(len(labels)) if rows is None else rows
        self._conditions = torch.arange(num_classes) if conditions is None else conditions

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """{"images": float32 [C, H, W], "cond": the label, int64 [], or its condition [...]}."""
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int] | torch.Tensor) -> dict[str, torch.Tensor]:
        """{"images": float32 [B, C, H, W], "cond": int64 [B], or [B, ...]}, in the order of `indices`."""
        indices = torch.as_tensor(indices, dtype=torch.long)
        images = self._read(self._rows[indices].tolist())
        return {"images": images, "cond": self._conditions[self.labels[indices]]}

    def part(self, classes: torch.Tensor | Sequence[int]) -> "ImageDataset":
        """The samples whose label is in `classes`, in their old order.

        Raises:
            ValueError: no sample has one of these labels, or a class is outside [0, num_classes).
        """
        classes = torch.as_tensor(classes, dtype=torch.long)
        wrong = classes[(classes < 0) | (classes >= self.num_classes)]
        if len(wrong):
            raise ValueError(f"classes: got {wrong.tolist()}; allowed are classes in [0, {self.num_classes})")
        return self._select(torch.isin(self.labels, classes).nonzero()[:, 0], f"classes: {classes.tolist()}")

    def _select(self, indices: torch.Tensor, argument: str) -> "ImageDataset":
        if not len(indices):
            raise ValueError(f"{argument} leaves none of the {len(self)} images; at least one is needed")
        return ImageDataset(
            self._read,
            self.labels[indices],
            self.num_classes,
            self.image_shape,
            self._rows[indices],
            self._conditions,
        )


def load_images(config: DataConfig, channels: int, resolution: int | None = None) -> ImageDataset:
    """Opens the dataset that `config` names, checking every image's size and mode first.

    Digits are v / 8 - 1 for v in 0 ... 16, 8-bit images v / 127.5 - 1. 28x28 IDX images (MNIST, Fashion-MNIST) come as
    they are, with a frame of 2 background pixels for 32, or as the 2x2 means of those 32x32 images for 16.

    Args:
        config: what to read; with `config.resize` every image is resized (its shorter side, see `fit_image`),
            center-cropped and converted.
        channels: 1, 3 or 4 (modes L, RGB, RGBA).
        resolution: side in pixels, as the model needs it; default: `config.resolution`, else the data's own.

    Returns:
        The images, encoded ones decoded when they are asked for.

    Raises:
        ValueError: images of another size, mode or label range than allowed (the file or row is named), a corrupt
            file, an unknown split or column, or arguments that contradict each other.
        FileNotFoundError: a folder or file is missing, or the Hub has no such dataset.
    """
    if channels not in _MODES:
        raise ValueError(f"channels: got {channels}; allowed are {sorted(_MODES)}")
    if resolution is not None and config.resolution not in (None, resolution):
        raise ValueError(f"resolution: got {config.resolution}, but the model needs {resolution}; leave it out")
    resolution = config.resolution if resolution is None else resolution
    if resolution is not None and resolution < 1:
        raise ValueError(f"resolution: got {resolution}; at least 1 pixel is needed")
    if config.max_train_samples is not None and config.max_train_samples < 1:
        raise ValueError(f"max_train_samples: got {config.max_train_samples}; at least 1 is needed")
    folder = config.train_data_dir
    if folder is not None and not Path(folder).is_dir() and not _is_zip(folder):
        raise FileNotFoundError(f"train_data_dir: {folder} is no folder and no zip; an existing one is needed")
    dataset = _open(config, channels, resolution)
    if config.max_train_samples is not None and config.max_train_samples < len(dataset):
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(config.train_samples_seed))
        dataset = dataset._select(order[: config.max_train_samples].sort().values, "max_train_samples")
    return dataset


def _is_zip(path: str) -> bool:
    return path.endswith(".zip") and Path(path).is_file()


def _open(config: DataConfig, channels: int, resolution: int | None) -> ImageDataset:
    name, folder = config.dataset_name, config.train_data_dir
    if name is None and folder is None:
        raise ValueError("dataset_name: got None, and train_data_dir: got None; one of the two is needed")
    if name not in (None, "fashion_mnist") and folder is not None:
        raise ValueError(f"train_data_dir: got {folder} beside dataset_name {name!r}; only one of the two is allowed")
    if name == "digits":
        return _digits(config, channels, resolution)
    if folder is not None and _is_zip(folder):
        if config.dataset_split != "train":
            raise ValueError(f"dataset_split: got {config.dataset_split!r}; a zip has only 'train', all its images")
        return _from_hf(load_zip(folder, config.cache_dir), config, channels, resolution)
    if name == "fashion_mnist" and folder is None and not FASHION_MNIST_DIR.is_dir():
        images = _from_hf(load_hf(config, "zalando-datasets/fashion_mnist"), config, channels=1, resolution=28)
        pixels = images.__getitems__(range(len(images)))["images"][:, 0].add(1).mul(127.5).round().byte().numpy()
        return _mnist(pixels, images.labels.numpy(), config, channels, resolution)
    if name == "fashion_mnist" or (folder is not None and any(Path(folder).glob("*-ubyte*"))):
        images, labels = _read_idx_split(folder or FASHION_MNIST_DIR, config.dataset_split)
        return _mnist(images, labels, config, channels, resolution)
    return _from_hf(load_hf(config, name), config, channels, resolution)


# Images held in memory.


def _read_array(pixels: torch.Tensor, white: int, rows: list[int]) -> torch.Tensor:
    return pixels[rows].float().div(white / 2).sub(1)


def _from_arrays(images, labels, white, config, channels, resolution) -> ImageDataset:
    """Grey images [N, S, S] with integer values 0 ... white."""
    side = images.shape[-1]
    resolution = resolution or side
    if (channels, resolution) != (1, side):
        if not config.resize:
            raise ValueError(
                f"resolution: the images are {side}x{side} of mode L; {resolution}x{resolution} of mode "
                f"{_MODES[channels]} is needed; set resize to convert them"
            )
        grey = np.rint(images * (255 / white)).astype(np.uint8)
        fitted = [fit_image(Image.fromarray(image), channels, resolution, config.resize_method) for image in grey]
        images, white = np.stack(fitted), 255
    pixels = torch.from_numpy(images).reshape(-1, resolution, resolution, channels).permute(0, 3, 1, 2).contiguous()
    labels = torch.from_numpy(labels.astype(np.int64))
    read = partial(_read_array, pixels, white)
    return ImageDataset(read, labels, int(labels.max()) + 1, (channels, resolution, resolution))


def _digits(config, channels, resolution) -> ImageDataset:
    from sklearn.datasets import load_digits

    if config.dataset_split != "train":
        raise ValueError(f"dataset_split: got {config.dataset_split!r}; digits has only 'train', all 1797 images")
    digits = load_digits()
    return _from_arrays(digits.images.astype(np.int16), digits.target, 16, config, channels, resolution)


def _mnist(images, labels, config, channels, resolution) -> ImageDataset:
    white = 255
    if images.shape[1:] == (28, 28) and resolution in (16, 32):
        # A frame keeps the strokes as they were drawn, and 32 can be halved without a rest.
        images = np.pad(images, ((0, 0), (2, 2), (2, 2)))
        if resolution == 16:
            # Sums instead of means: nothing is rounded.
            images, white = images.reshape(-1, 16, 2, 16, 2).sum((2, 4), dtype=np.int16), 4 * 255
    return _from_arrays(images, labels, white, config, channels, resolution)


def _read_idx_split(folder: str | Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    prefixes = {"train": "train", "test": "t10k"}
    if split not in prefixes:
        raise ValueError(f"dataset_split: got {split!r}; the IDX files have {sorted(prefixes)}")
    arrays = []
    for name in (f"{prefixes[split]}-images-idx3-ubyte", f"{prefixes[split]}-labels-idx1-ubyte"):
        paths = [path for path in (Path(folder, name), Path(folder, name + ".gz")) if path.is_file()]
        if not paths:
            raise FileNotFoundError(f"train_data_dir: {folder} holds neither {name} nor {name}.gz; one is needed")
        arrays.append(_read_idx(paths[0]))
    images, labels = arrays
    if images.ndim != 3 or images.shape[1] != images.shape[2] or labels.shape != images.shape[:1] or not len(labels):
        raise ValueError(
            f"train_data_dir: {folder} holds images {images.shape}, labels {labels.shape}; [N, S, S], [N] are needed"
        )
    return images, labels


def _read_idx(path: Path) -> np.ndarray:
    """Reads unsigned bytes in the IDX format: 0, 0, type 8, number of axes, big-endian axis lengths, data."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"train_data_dir: {path} is truncated or corrupt ({error})") from error
    if content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * content[3]:
        raise ValueError(f"train_data_dir: {path} starts with {content[:4].hex()}; 000008.. is needed (IDX of bytes)")
    shape = np.frombuffer(content, ">u4", content[3], offset=4).tolist()
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * content[3])
    if values.size != math.prod(shape):
        raise ValueError(f"train_data_dir: {path} is truncated or corrupt: {values.size} bytes for the shape {shape}")
    return values.reshape(shape).copy()


# Images read through HF datasets, decoded when they are asked for.


def load_hf(config: DataConfig, name: str | None):
    """The split of a data set that HF `datasets` reads: `name` on the Hub, or the folder `config.train_data_dir`."""
    import datasets

    if name is None:
        argument, data_dir = f"train_data_dir: {config.train_data_dir}", config.train_data_dir
        folders = {"*.parquet": "parquet", "*.tar": "webdataset"}
        name = next((name for suffix, name in folders.items() if any(Path(data_dir).rglob(suffix))), "imagefolder")
    else:
        argument, data_dir = f"dataset_name: {name!r}", None
    options = {"data_dir": data_dir, "split": config.dataset_split, "cache_dir": config.cache_dir}
    try:
        return datasets.load_dataset(name, config.dataset_config_name, **options)
    except OSError as error:
        raise FileNotFoundError(f"{argument} holds no images, or no such dataset can be reached: {error}") from error
    except (ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{argument}, dataset_split {config.dataset_split!r} cannot be read: {error}") from error


def _from_hf(dataset, config: DataConfig, channels: int, resolution: int | None) -> ImageDataset:
    for argument, column in (("image_column", config.image_column), ("label_column", config.label_column)):
        if column not in dataset.column_names:
            raise ValueError(
                f"{argument}: got {column!r}; the columns are {dataset.column_names} (a folder of images has labels "
                "when it holds at least two class folders)"
            )
    labels, num_classes = _hf_labels(dataset.select_columns([config.label_column]), config.label_column)
    dataset = dataset.select_columns([config.image_column]).rename_columns({config.image_column: "image"})
    dataset = undecoded(dataset, config)
    if resolution is None:
        resolution = open_image(dataset[0]["image"], 0)[0].width
    if not config.resize:
        for row, record in enumerate(dataset["image"]):
            image, where = open_image(record, row)
            with image:
                _check_image(image, where, channels, resolution)
    read = partial(_read_hf, dataset, channels, resolution, config.resize_method)
    return ImageDataset(read, labels, num_classes, (channels, resolution, resolution))


def _hf_labels(dataset, column: str) -> tuple[torch.Tensor, int]:
    import datasets

    if dataset.features[column] in (datasets.Value("string"), datasets.Value("large_string")):
        dataset = dataset.class_encode_column(column)
    feature, labels = dataset.features[column], dataset.with_format("numpy")[:][column]
    if not len(labels) or labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise ValueError(f"label_column: {column!r} holds {feature}; a whole number in every row is needed")
    num_classes = feature.num_classes if isinstance(feature, datasets.ClassLabel) else int(labels.max()) + 1
    if labels.min() < 0 or labels.max() >= num_classes:
        row = int(np.flatnonzero((labels < 0) | (labels >= num_classes))[0])
        raise ValueError(f"label_column: {column!r} is {labels[row]} in row {row}; [0, {num_classes}) is allowed")
    return torch.from_numpy(labels.astype(np.int64)), num_classes


def _read_hf(dataset, channels: int, resolution: int, method: str, rows: list[int]) -> torch.Tensor:
    images = []
    for row, record in zip(rows, dataset[rows]["image"]):
        image, where = open_image(record, row)
        try:
            images.append(fit_image(image, channels, resolution, method))
        except (OSError, SyntaxError) as error:
            raise ValueError(f"image_column: {where} is truncated or corrupt ({error})") from error
    return as_pixels(images)


def undecoded(dataset, config: DataConfig):
    """Leaves the images of column "image" as records of their bytes and path, so that errors can name the file.

    Raises:
        ValueError: the column holds no images.
    """
    import datasets

    try:
        return dataset.cast_column("image", datasets.Image(decode=False))
    except NotImplementedError as error:
        raise ValueError(f"image_column: {config.image_column!r} holds no images ({error})") from error


def as_pixels(images: list[np.ndarray]) -> torch.Tensor:
    """8-bit images [H, W, C] as float32 [N, C, H, W] in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def open_image(record: dict | None, row: int) -> tuple[Image.Image, str]:
    """Reads the header only (PIL decodes at the first use of the pixels). Also says what to call it in an error."""
    if record is None:
        raise ValueError(f"image_column: row {row} is empty; an image in every row is needed")
    where = record["path"] or f"row {row}"
    try:
        return Image.open(record["path"] if record["bytes"] is None else io.BytesIO(record["bytes"])), where
    except OSError as error:
        raise ValueError(f"image_column: {where} is no readable image ({error})") from error


def _check_image(image: Image.Image, where: str, channels: int, resolution: int) -> None:
    if image.size != (resolution, resolution) or image.mode != _MODES[channels]:
        raise ValueError(
            f"resolution: {where} is {image.width}x{image.height} of mode {image.mode}; {resolution}x{resolution} of "
            f"mode {_MODES[channels]} is needed; set resize to convert all images"
        )


def fit_image(image: Image.Image, channels: int, resolution: int, method: str = "lanczos") -> np.ndarray:
    """Turned upright; if need be converted, shorter side resized and center-cropped: uint8 [H, W, C].

    Args:
        image: of any size and mode.
        channels, resolution: of the result.
        method: "lanczos", or "adm": halved by 2x2 means while that stays at least as large, then bicubic, as ImageNet-64
            was made for ADM (arXiv 2105.05233).
    """
    image = ImageOps.exif_transpose(image).convert(_MODES[channels])
    size = (resolution, resolution)
    if image.size != size and method == "adm":
        while min(image.size) >= 2 * resolution:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = resolution / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
        image = image.crop((left, top, left + resolution, top + resolution))
    elif image.size != size:
        image = ImageOps.fit(image, size, method=Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(resolution, resolution, channels)
