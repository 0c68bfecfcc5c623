# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Data sets in EDM's zip format: PNG files, and a `dataset.json` of {"labels": [[file name, class], ...]}.

The zip is read once, into the cache of HF `datasets`, which maps it into memory afterwards. Zip files from elsewhere
are not trusted: nothing is extracted by its own name, sizes are bounded before anything is decompressed, and only PNG
files pass.
"""

import json
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path


LABELS_FILE = "dataset.json"
# 1.3 million labels are 50 MB; a PNG of 1024x1024 is a few MB.
MAX_LABELS_BYTES = 2**29
MAX_IMAGE_BYTES = 2**25
_PNG = b"\x89PNG\r\n\x1a\n"


def load_zip(path: str | Path, cache_dir: str | None = None):
    """The images and labels of a zip as a `datasets.Dataset` with columns image (undecoded) and label.

    Args:
        path: the zip.
        cache_dir: of HF datasets; the images take as much space there again as in the zip.

    Raises:
        ValueError: no zip, no labels, an image without label or that is no PNG, or a file that is too large or
            damaged (it is named).
    """
    import datasets

    path = Path(path).resolve()
    _labels(path)
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64")})
    # Size and time of change, so that another zip of the same name is not taken from the cache.
    source = {"path": str(path), "size": path.stat().st_size, "changed": path.stat().st_mtime_ns}
    try:
        return datasets.Dataset.from_generator(_records, features, cache_dir, gen_kwargs={"source": source})
    except datasets.exceptions.DatasetGenerationError as error:
        # It wraps what `_records` raised.
        raise ValueError(str(error.__cause__ or error)) from error


def _records(source: dict) -> Iterator[dict]:
    path = Path(source["path"])
    with zipfile.ZipFile(path) as archive:
        for name, label in _labels(path):
            content = _read(archive, path, name, MAX_IMAGE_BYTES)
            if not content.startswith(_PNG):
                raise ValueError(f"train_data_dir: {path}: {name} is no PNG file; only those are read")
            yield {"image": {"bytes": content, "path": name}, "label": label}


def _labels(path: Path) -> list[tuple[str, int]]:
    """File names and classes, in the order of the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            labels = json.loads(_read(archive, path, LABELS_FILE, MAX_LABELS_BYTES))["labels"]
    except (zipfile.BadZipFile, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"train_data_dir: {path} is no zip with a readable {LABELS_FILE} ({type(error).__name__}: {error})"
        ) from error
    good = isinstance(labels, list) and all(
        isinstance(entry, list) and [type(value) for value in entry] == [str, int] for entry in labels
    )
    if not good or not labels:
        raise ValueError(
            f'train_data_dir: {path}: {LABELS_FILE} must hold {{"labels": [[file name, class], ...]}} with whole numbers'
        )
    return [(name, label) for name, label in labels]


def _read(archive: zipfile.ZipFile, path: Path, name: str, limit: int) -> bytes:
    try:
        info = archive.getinfo(name)
    except KeyError as error:
        raise ValueError(f"train_data_dir: {path} holds no file {name!r}, which it needs") from error
    if info.file_size > limit:
        raise ValueError(f"train_data_dir: {path}: {name} is larger than {limit} bytes, which are allowed")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # zipfile decompresses the others without a bound.
        raise ValueError(f"train_data_dir: {path}: {name} is neither stored nor deflated; other methods are not read")
    try:
        with archive.open(info) as file:
            # Not `archive.read`: it decompresses up to 2 GB before it looks at the size.
            return file.read(info.file_size)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise ValueError(f"train_data_dir: {path}: {name} is truncated or corrupt ({error})") from error
