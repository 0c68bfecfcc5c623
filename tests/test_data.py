# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
import gzip
import io
import json
import tracemalloc
import zipfile

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from diffusers_msd import data, zipped_images
from diffusers_msd.data import DataConfig, fit_image, load_images


def random_images(n, shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    content = header + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_idx_folder(folder, images, labels, prefix="train", suffix=".gz"):
    write_idx(folder / f"{prefix}-images-idx3-ubyte{suffix}", images)
    write_idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}", np.asarray(labels, np.uint8))


def write_image_folder(folder, images, labels):
    for i, (image, label) in enumerate(zip(images, labels)):
        (folder / f"class_{label}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"class_{label}" / f"{i}.png")


def encoded(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


def write_parquet(folder, images, labels, label_type=None, columns=("image", "label")):
    folder.mkdir(exist_ok=True)
    features = {columns[0]: datasets.Image(), columns[1]: label_type or datasets.Value("int64")}
    table = {columns[0]: [{"bytes": encoded(image), "path": None} for image in images], columns[1]: labels}
    datasets.Dataset.from_dict(table, features=datasets.Features(features)).to_parquet(folder / "part-0.parquet")


@pytest.fixture
def config(tmp_path):
    """A config of a local folder; HF datasets' cache stays out of the home directory."""

    def make(folder, **kwargs):
        return DataConfig(train_data_dir=str(folder), cache_dir=str(tmp_path / "cache"), **kwargs)

    return make


def test_digits_are_exactly_v_over_8_minus_1():
    digits, dataset = load_digits(), load_images(DataConfig("digits"), channels=1)
    batch = dataset.__getitems__(range(len(dataset)))
    assert len(dataset) == 1797 and dataset.num_classes == 10 and dataset.image_shape == (1, 8, 8)
    assert batch["images"].dtype == torch.float32 and batch["cond"].dtype == torch.int64
    assert np.array_equal(batch["images"][:, 0].numpy(), digits.images / 8 - 1)
    assert batch["cond"].tolist() == digits.target.tolist()


def test_a_batch_keeps_the_order_of_its_indices_and_equals_single_items():
    dataset = load_images(DataConfig("digits"), channels=1)
    batch = dataset.__getitems__(torch.tensor([5, 2, 5]))
    for row, index in enumerate([5, 2, 5]):
        assert torch.equal(batch["images"][row], dataset[index]["images"])
        assert batch["cond"][row] == dataset[index]["cond"]
    with pytest.raises(IndexError):
        dataset[1797]


def test_a_part_holds_exactly_the_samples_of_its_classes():
    dataset = load_images(DataConfig("digits"), channels=1)
    part = dataset.part(torch.tensor([7, 3]))
    rows = [i for i, label in enumerate(dataset.labels.tolist()) if label in (3, 7)]
    assert part.num_classes == 10 and len(part) == len(rows)
    expected, got = dataset.__getitems__(rows), part.__getitems__(range(len(part)))
    assert torch.equal(expected["images"], got["images"]) and torch.equal(expected["cond"], got["cond"])
    assert set(part.part([3]).labels.tolist()) == {3}


def test_an_empty_part_and_unknown_classes_are_errors():
    dataset = load_images(DataConfig("digits"), channels=1)
    with pytest.raises(ValueError, match=r"classes: \[3\] leaves none of the \d+ images"):
        dataset.part([7]).part([3])
    with pytest.raises(ValueError, match=r"classes: got \[10\]; allowed .* \[0, 10\)"):
        dataset.part([3, 10])


def test_max_train_samples_draws_the_same_samples_of_many_classes_every_time():
    config = DataConfig("digits", max_train_samples=100)
    first, second = load_images(config, 1), load_images(config, 1)
    assert len(first) == 100 and first.num_classes == 10
    assert torch.equal(first.labels, second.labels) and len(set(first.labels.tolist())) == 10
    assert len(load_images(DataConfig("digits", max_train_samples=5000), 1)) == 1797


def test_another_seed_draws_other_samples_and_more_samples_include_fewer():
    def drawn(count, seed):
        dataset = load_images(DataConfig("digits", max_train_samples=count, train_samples_seed=seed), 1)
        return {tuple(image.flatten().tolist()) for image in dataset.__getitems__(range(count))["images"]}

    assert drawn(30, 1) < drawn(100, 1)
    assert len(drawn(100, 0) & drawn(100, 1)) < 20


def test_a_loader_with_workers_gives_the_same_batches(tmp_path, config):
    images, labels = random_images(6, (8, 8)), [0, 1, 0, 1, 0, 1]
    write_parquet(tmp_path / "data", images, labels)
    dataset = load_images(config(tmp_path / "data"), 1)
    loader = torch.utils.data.DataLoader(dataset, 4, num_workers=1, collate_fn=lambda batch: batch)
    batches = list(loader)
    assert [len(batch["cond"]) for batch in batches] == [4, 2]
    assert torch.equal(torch.cat([batch["images"] for batch in batches]), dataset.__getitems__(range(6))["images"])


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_are_read_exactly(tmp_path, config, suffix):
    images, labels = random_images(4, (28, 28)), [2, 0, 1, 2]
    write_idx_folder(tmp_path, images, labels, suffix=suffix)
    dataset = load_images(config(tmp_path), 1)
    assert dataset.image_shape == (1, 28, 28) and dataset.num_classes == 3 and dataset.labels.tolist() == labels
    pixels = dataset.__getitems__(range(4))["images"][:, 0]
    assert torch.equal(pixels, torch.from_numpy(images).float() / 127.5 - 1)
    assert pixels.max() == 1 or images.max() < 255


def test_fashion_mnist_is_framed_to_32_and_averaged_to_16(tmp_path, monkeypatch):
    images = random_images(3, (28, 28))
    write_idx_folder(tmp_path, images, [0, 1, 1], prefix="t10k")
    monkeypatch.setattr(data, "FASHION_MNIST_DIR", tmp_path)
    config = DataConfig("fashion_mnist", dataset_split="test")
    at_32 = load_images(config, 1, 32).__getitems__(range(3))["images"]
    at_16 = load_images(config, 1, 16).__getitems__(range(3))["images"]
    assert torch.equal(at_32[:, :, 2:-2, 2:-2], load_images(config, 1, 28).__getitems__(range(3))["images"])
    frame = torch.ones(32, 32, dtype=torch.bool)
    frame[2:-2, 2:-2] = False
    assert (at_32[:, :, frame] == -1).all()
    assert torch.allclose(at_16, torch.nn.functional.avg_pool2d(at_32, 2), atol=1e-6)


def test_corrupt_idx_files_are_named(tmp_path, config):
    images = random_images(4, (28, 28))
    write_idx_folder(tmp_path, images, [0, 1, 2, 3])
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for content in (
        whole[:-20],
        b"no gzip",
        gzip.compress(gzip.decompress(whole)[:-1]),
        gzip.compress(b"\0\0\x0d\x03"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="train_data_dir: .*train-images-idx3-ubyte.gz"):
            load_images(config(tmp_path), 1)
    write_idx(path, images[:3])
    with pytest.raises(ValueError, match=r"train_data_dir: .*\(3, 28, 28\), labels \(4,\)"):
        load_images(config(tmp_path), 1)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="train_data_dir: .*train-images-idx3-ubyte"):
        load_images(config(tmp_path), 1)


def test_class_folders_become_labels(tmp_path, config):
    images, labels = random_images(6, (8, 8, 3)), [1, 0, 2, 1, 0, 2]
    write_image_folder(tmp_path / "data", images, labels)
    dataset = load_images(config(tmp_path / "data"), 3)
    assert dataset.image_shape == (3, 8, 8) and dataset.num_classes == 3
    assert sorted(dataset.labels.tolist()) == sorted(labels)
    for label in range(3):
        part = dataset.part([label])
        got = ((part.__getitems__(range(2))["images"] + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        expected = images[[i for i in range(6) if labels[i] == label]]
        assert np.array_equal(got, expected)


def test_a_parquet_folder_is_read_by_its_columns(tmp_path, config):
    images = random_images(4, (8, 8))
    write_parquet(
        tmp_path / "data", images, ["dog", "cat", "cat", "dog"], datasets.Value("string"), ("pixels", "kind")
    )
    dataset = load_images(config(tmp_path / "data", image_column="pixels", label_column="kind"), 1)
    assert dataset.labels.tolist() == [1, 0, 0, 1] and dataset.num_classes == 2
    got = dataset.__getitems__([3, 0])["images"][:, 0]
    assert torch.equal(got, torch.from_numpy(images[[3, 0]]).float() / 127.5 - 1)
    with pytest.raises(ValueError, match="image_column: got 'image'; the columns are .*'pixels'"):
        load_images(config(tmp_path / "data"), 1)
    with pytest.raises(ValueError, match="dataset_split 'tset'.*train"):
        load_images(config(tmp_path / "data", dataset_split="tset"), 1)


@pytest.mark.parametrize(
    "labels, label_type, message",
    [
        ([0, -1, 1], datasets.Value("int64"), r"is -1 in row 1; \[0, 2\) is allowed"),
        ([0, -1, 1], datasets.ClassLabel(names=["a", "b"]), r"is -1 in row 1; \[0, 2\) is allowed"),
        ([0.0, 0.5, 1.0], datasets.Value("float32"), "a whole number in every row"),
        ([0, None, 1], datasets.Value("int64"), "a whole number in every row"),
    ],
)
def test_labels_that_are_no_classes_are_errors(tmp_path, config, labels, label_type, message):
    write_parquet(tmp_path / "data", random_images(3, (8, 8)), labels, label_type)
    with pytest.raises(ValueError, match="label_column: 'label' .*" + message):
        load_images(config(tmp_path / "data"), 1)


def test_images_of_a_wrong_size_or_mode_are_named_before_training(tmp_path, config):
    images = list(random_images(4, (8, 8)))
    write_image_folder(tmp_path / "size", images[:3] + [images[3][:, :6]], [0, 1, 0, 1])
    with pytest.raises(
        ValueError, match=r"resolution: .*3\.png is 6x8 of mode L; 8x8 of mode L is needed; set resize"
    ):
        load_images(config(tmp_path / "size"), 1)
    write_parquet(tmp_path / "mode", images[:3] + [np.zeros((8, 8, 3), np.uint8)], [0, 1, 0, 1])
    with pytest.raises(ValueError, match="resolution: row 3 is 8x8 of mode RGB; 8x8 of mode L is needed"):
        load_images(config(tmp_path / "mode"), 1)
    with pytest.raises(ValueError, match="resolution: row 0 is 8x8 of mode L; 16x16 of mode L is needed"):
        load_images(config(tmp_path / "mode"), 1, 16)
    with pytest.raises(ValueError, match="resolution: the images are 8x8 of mode L; 8x8 of mode RGB is needed"):
        load_images(DataConfig("digits"), 3)


def test_resize_crops_the_center_and_converts(tmp_path, config):
    wide = np.zeros((8, 24), np.uint8)
    wide[:, 8:16] = 255
    write_image_folder(tmp_path / "data", [wide, random_images(1, (16, 16, 3))[0]], [0, 1])
    dataset = load_images(config(tmp_path / "data", resize=True), 3, 8)
    assert dataset.image_shape == (3, 8, 8)
    assert (dataset.part([0])[0]["images"] == 1).all()
    digits = load_images(DataConfig("digits", resize=True), 3, 16)
    plain = load_images(DataConfig("digits"), 1)[0]["images"]
    assert digits[0]["images"].shape == (3, 16, 16)
    shrunk = torch.nn.functional.avg_pool2d(digits[0]["images"], 2)
    assert (shrunk - plain).abs().mean() < 0.15


def test_broken_image_files_are_named(tmp_path, config):
    images = random_images(4, (8, 8))
    write_image_folder(tmp_path / "data", images, [0, 1, 0, 1])
    broken = tmp_path / "data" / "class_1" / "3.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:60])
    dataset = load_images(config(tmp_path / "data"), 1)
    with pytest.raises(ValueError, match=r"image_column: .*3\.png is truncated or corrupt"):
        dataset.__getitems__(range(4))
    broken.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"image_column: .*3\.png is no readable image"):
        load_images(config(tmp_path / "data"), 1)


def test_columns_that_hold_no_images_are_errors(tmp_path, config):
    empty = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    for name, images, features in (
        ("numbers", [1, 2], None),
        ("texts", ["a", "b"], None),
        ("nulls", [None] * 2, empty),
    ):
        (tmp_path / name).mkdir()
        table = datasets.Dataset.from_dict({"image": images, "label": [0, 1]}, features=features)
        table.to_parquet(tmp_path / name / "a.parquet")
        with pytest.raises(ValueError, match="image_column: .*(holds no images|no readable image|row 0 is empty)"):
            load_images(config(tmp_path / name), 1, 8)


def test_a_folder_without_class_folders_or_images_is_an_error(tmp_path, config):
    write_image_folder(tmp_path / "one", random_images(1, (8, 8)), [0])
    with pytest.raises(ValueError, match="label_column: got 'label'; .*two class folders"):
        load_images(config(tmp_path / "one"), 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="train_data_dir: .*empty holds no images"):
        load_images(config(tmp_path / "empty"), 1)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match="train_data_dir: .*bad.* cannot be read"):
        load_images(config(tmp_path / "bad"), 1)


@pytest.mark.parametrize(
    "config, channels, resolution, error, message",
    [
        (DataConfig(), 1, None, ValueError, "dataset_name: got None, and train_data_dir: got None"),
        (DataConfig("digits", train_data_dir="."), 1, None, ValueError, "train_data_dir: got .*'digits'"),
        (DataConfig("digits", dataset_split="test"), 1, None, ValueError, "dataset_split: got 'test'"),
        (DataConfig("digits"), 2, None, ValueError, r"channels: got 2; allowed are \[1, 3, 4\]"),
        (DataConfig("digits", resolution=16), 1, 8, ValueError, "resolution: got 16, but the model needs 8"),
        (DataConfig("digits", resolution=0), 1, None, ValueError, "resolution: got 0"),
        (DataConfig("digits", max_train_samples=0), 1, None, ValueError, "max_train_samples: got 0"),
        (DataConfig(train_data_dir="no/such/folder"), 1, None, FileNotFoundError, "train_data_dir: no/such/folder"),
    ],
)
def test_contradicting_arguments_are_named(config, channels, resolution, error, message):
    with pytest.raises(error, match=message):
        load_images(config, channels, resolution)


# EDM's zip


def write_zip(path, files, labels, method=zipfile.ZIP_STORED):
    """Files by name, and `labels` as the content of dataset.json."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr("dataset.json", labels if isinstance(labels, bytes) else json.dumps({"labels": labels}))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_in_edms_format_is_read_by_its_labels_and_again_from_the_cache(tmp_path, config, method):
    images, labels = random_images(6, (8, 8, 3)), [2, 0, 1, 2, 0, 1]
    names = [f"0000{i // 3}/img{i:08d}.png" for i in range(6)]
    path = tmp_path / "data.zip"
    write_zip(path, {n: encoded(image) for n, image in zip(names, images)}, list(zip(names, labels)), method)
    for _ in range(2):
        dataset = load_images(config(path), 3)
        assert dataset.labels.tolist() == labels and dataset.num_classes == 3 and dataset.image_shape == (3, 8, 8)
        pixels = dataset.__getitems__([4, 1])["images"].permute(0, 2, 3, 1)
        assert torch.equal(pixels, torch.from_numpy(images[[4, 1]]).float() / 127.5 - 1)
    # Another file of the same name is not taken from the cache.
    write_zip(path, {"a.png": encoded(images[0])}, [["a.png", 0]], method)
    assert len(load_images(config(path), 3)) == 1
    with pytest.raises(ValueError, match="dataset_split: got 'test'"):
        load_images(config(path, dataset_split="test"), 3)


PNG = encoded(random_images(1, (8, 8))[0])
MANY = [["a.png", 0]]


@pytest.mark.parametrize(
    "files, labels, message",
    [
        ({"a.png": PNG}, b"no json", "no zip with a readable dataset.json"),
        ({"a.png": PNG}, b"[1]", "no zip with a readable dataset.json"),
        ({"a.png": PNG}, None, "dataset.json must hold"),
        ({"a.png": PNG}, [], "dataset.json must hold"),
        ({"a.png": PNG}, [["a.png", 0.5]], "dataset.json must hold"),
        ({"a.png": PNG}, [["a.png", True]], "dataset.json must hold"),
        ({"a.png": PNG}, [["a.png", -1]], "label_column: 'label' is -1 in row 0"),
        ({"a.png": PNG}, [["b.png", 0]], "holds no file 'b.png'"),
        ({"a.png": PNG}, [["../../etc/passwd", 0]], "holds no file '../../etc/passwd'"),
        ({"a.png": b"GIF89a"}, MANY, "a.png is no PNG file"),
    ],
)
def test_zips_that_are_not_in_edms_format_are_errors(tmp_path, config, files, labels, message):
    write_zip(tmp_path / "data.zip", files, labels)
    with pytest.raises(ValueError, match=message):
        load_images(config(tmp_path / "data.zip"), 1)


def test_hostile_zips_are_refused_before_anything_large_is_decompressed(tmp_path, config, monkeypatch):
    path = tmp_path / "data.zip"
    monkeypatch.setattr(zipped_images, "MAX_IMAGE_BYTES", 10_000)
    bomb = PNG + bytes(50_000_000)
    write_zip(path, {"a.png": bomb}, MANY, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    with pytest.raises(ValueError, match="train_data_dir: .*a.png is larger than 10000 bytes"):
        load_images(config(path), 1)
    # The directory says 5,000 bytes, the stream holds 50 million.
    content = path.read_bytes()
    size = len(bomb).to_bytes(4, "little")
    path.write_bytes(content.replace(size, (5000).to_bytes(4, "little")))
    tracemalloc.start()
    with pytest.raises(ValueError, match="train_data_dir: .*a.png is truncated or corrupt"):
        load_images(config(path), 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 25_000_000
    write_zip(path, {"a.png": PNG}, MANY, zipfile.ZIP_LZMA)
    with pytest.raises(ValueError, match="neither stored nor deflated"):
        load_images(config(path), 1)
    path.write_bytes(b"no zip")
    with pytest.raises(ValueError, match="train_data_dir: .*data.zip is no zip"):
        load_images(config(path), 1)
    write_zip(path, {"a.png": PNG}, MANY)
    path.write_bytes(path.read_bytes().replace(PNG[40:60], bytes(20)))
    with pytest.raises(ValueError, match="train_data_dir: .*a.png is truncated or corrupt"):
        load_images(config(path), 1)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="train_data_dir: .*data.zip is no folder and no zip"):
        load_images(config(path), 1)


def test_adm_resizing_halves_by_means_and_crops_the_center():
    """Two halvings are exact means of 4x4 pixels; nothing is left for the bicubic filter to do."""
    image = random_images(1, (32, 48, 3))[0]
    got = fit_image(Image.fromarray(image), 3, 8, "adm").astype(float)
    means = image.reshape(8, 4, 12, 4, 3).mean((1, 3))[:, 2:10]
    # Each halving rounds to whole numbers twice, along rows and along columns.
    assert abs(got - means).max() <= 2
    # From 12 to 8 there is no halving: bicubic alone.
    image = Image.fromarray(image[:12, :16])
    expected = np.asarray(image.resize((11, 8), Image.Resampling.BICUBIC))[:, 1:9]
    assert np.array_equal(fit_image(image, 3, 8, "adm"), expected)
    assert not np.array_equal(fit_image(image, 3, 8), expected)
