# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or absent: atomic saves, fingerprints of weights, and loading that never unpickles."""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from diffusers import ModelMixin, SchedulerMixin
from diffusers.utils import CONFIG_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes


# "name" or "owner/name", the only two forms the Hub knows.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sibling(path: Path) -> Path:
    # A hidden name nobody else uses. Not from `tempfile`, whose files are private whatever the user's umask says.
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Writes a folder beside its final place and renames it there once it is complete.

    A process killed inside the block leaves `path` as it was (and a hidden `.<name>.*` sibling). An existing folder is
    replaced: it is renamed aside, the new one takes its name, then the old one is deleted. Safe with several writers
    of the same path: the last one wins.

    Args:
        path: the folder to make or replace. Its parents are made.

    Yields:
        An empty temporary folder on the same file system.

    Raises:
        ValueError: `path` is a file.
    """
    path = Path(path).resolve()
    if path.is_file():
        raise ValueError(f"path: {path} is a file; a folder or a free name is allowed.")
    temporary = _sibling(path)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _fsync(file)
        _rename_over(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _rename_over(source: Path, path: Path) -> None:
    # A folder cannot be renamed onto one that is not empty. Another writer may put its own at `path` between our two
    # renames, hence the loop.
    while True:
        try:
            os.rename(source, path)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        aside = _sibling(path)
        try:
            os.rename(path, aside)
        except FileNotFoundError:
            continue
        shutil.rmtree(aside)
    _fsync(path.parent)


def atomic_write(path: str | Path, content: bytes | str) -> None:
    """Writes a file beside its final place and renames it there: a reader sees the old file or the new, never a part.

    Args:
        path: the file to make or replace. Its parents are made.
        content: what it shall hold; text is written as UTF-8.
    """
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(path)
    try:
        with open(temporary, "xb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _fsync(path.parent)


def write_json(path: str | Path, obj) -> None:
    """Writes `obj` as indented JSON, atomically (see [`atomic_write`])."""
    atomic_write(path, json.dumps(obj, indent=2) + "\n")


def save_tensors(path: str | Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file, atomically.

    Args:
        path: the file.
        tensors: any shapes and dtypes; tensors on a device are copied to the CPU.
        metadata: kept in the file's header.
    """
    # Clones, because safetensors refuses tensors that share storage.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    atomic_write(path, safetensors_bytes(tensors, metadata))


def load_tensors(path: str | Path, argument: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Reads a safetensors file.

    The tensors are maps of the file: the operating system reads a page when it is used and may drop it again. Clone
    what is to be changed, or to outlive the file.

    Args:
        path: the file.
        argument: the name of the caller's argument that `path` came from, for the error text.

    Returns:
        The tensors, and the metadata of the header.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is truncated or no safetensors file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{argument}: {path} is missing; a safetensors file is needed there.")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{argument}: {path} is truncated or corrupt ({error}); a whole safetensors file is needed."
        ) from error


def fingerprint(state_dict: dict[str, torch.Tensor], *configs: dict) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors, and over the configs as canonical JSON.

    Args:
        state_dict: the order of its entries does not matter; dtypes do.
        configs: JSON-like dicts. Their top-level keys that start with "_" (versions, paths, class names) are
            left out, so that saving and loading changes nothing.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    for config in configs:
        public = {key: value for key, value in config.items() if not key.startswith("_")}
        digest.update(json.dumps(public, sort_keys=True, default=_as_json).encode())
    return digest.hexdigest()


def _as_json(value):
    # What diffusers' own `to_json_string` turns into JSON besides the plain types.
    if isinstance(value, np.ndarray):
        return value.tolist()
    return str(value)


def model_fingerprint(model: ModelMixin, scheduler: SchedulerMixin) -> str:
    """The [`fingerprint`] of a diffusers model with its scheduler: same weights, dtype and settings, same string.

    Take it before the model is cast, compiled or wrapped: dtypes and tensor names count.

    Args:
        model: any diffusers model.
        scheduler: its scheduler.

    Returns:
        64 hexadecimal digits.
    """
    return fingerprint(model.state_dict(), model.config, scheduler.config)


def check_writable(path: str | Path, argument: str) -> Path:
    """Makes a folder and proves that files can be written in it.

    Args:
        path: the folder; made with its parents when absent.
        argument: the name of the caller's argument, for the error text.

    Returns:
        The folder.

    Raises:
        ValueError: The folder cannot be made or written.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(f"{argument}: cannot write in {path} ({error.strerror}); give a writable folder.") from error
    return path


def _is_local(path: str | Path) -> bool:
    # A missing "runs/teacher" has the form of a Hub id; an existing folder "runs" says that a local path was meant.
    if Path(path).exists() or _HUB_ID.fullmatch(str(path)) is None:
        return True
    return len(Path(path).parts) == 2 and Path(path).parent.is_dir()


def public_name(path: str | Path) -> str:
    """What a folder or Hub id may be called in public: a Hub id as it is, a local folder by its own name alone."""
    return Path(path).resolve().name if _is_local(path) else str(path)


def load_model(cls: type, path: str | Path, argument: str, **kwargs):
    """`cls.from_pretrained` from safetensors only, with errors that say which argument is wrong and how.

    Unlike diffusers, weights that are missing or left over are an error: a net with some random layers is not loaded.

    Args:
        cls: a diffusers model or scheduler class.
        path: a local folder, or a Hub id.
        argument: the name of the caller's argument, for the error text.
        kwargs: for `from_pretrained`, such as `subfolder` or `dtype`.

    Returns:
        An instance of `cls`.

    Raises:
        FileNotFoundError: The folder or a file in it is missing, or the Hub has no such repository.
        ValueError: A file is truncated, corrupt, or does not fit the config.
    """
    is_model = issubclass(cls, ModelMixin)
    config_name = CONFIG_NAME if is_model else cls.config_name
    folder = Path(path, kwargs.get("subfolder") or "")
    local = _is_local(path)
    if local and not (folder / config_name).is_file():
        raise FileNotFoundError(
            f"{argument}: {folder} holds no {config_name}; a folder saved by {cls.__name__}.save_pretrained, or a "
            "Hub id, is allowed."
        )
    if local and is_model and not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(
            f"{argument}: {folder} holds no *.safetensors file; weights are loaded from those only."
        )
    if is_model:
        kwargs = {**kwargs, "use_safetensors": True, "output_loading_info": True}
    try:
        loaded = cls.from_pretrained(path, **kwargs)
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(error, OSError) and not local:
            raise FileNotFoundError(
                f"{argument}: {path} is neither a local folder nor a Hub repository with a {cls.__name__}: {error}"
            ) from error
        raise ValueError(
            f"{argument}: a file of {folder} is truncated, corrupt or does not fit its {config_name}: {error}"
        ) from error
    if not is_model:
        return loaded
    model, info = loaded
    if info["missing_keys"] or info["unexpected_keys"]:
        raise ValueError(
            f"{argument}: the weights at {folder} do not fit its {config_name}: missing {info['missing_keys'][:3]}, "
            f"unexpected {info['unexpected_keys'][:3]} (the first three of each); both must be empty."
        )
    # Where it was loaded from is a path of this machine, which saving would pass on.
    model.register_to_config(_name_or_path="")
    return model
