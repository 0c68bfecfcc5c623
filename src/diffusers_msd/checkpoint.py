# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Training checkpoints as plain files: diffusers folders, safetensors, JSON. Nothing is pickled or half-written.

checkpoint-1000/
  student/ student_ema/ fake_score/ discriminator/     ordinary diffusers folders, each loads alone
  optimizer_student.safetensors  optimizer_critic.safetensors
  state.json                                           step, LR schedules, EMA, counters
"""

import json
import re
import shutil
from pathlib import Path

import torch
from diffusers import ModelMixin

from .adapters import LoraStudent, lora_layers
from .files import load_model, load_tensors, save_tensors


STATE_FILE = "state.json"
_STATE_ENTRIES = {"step", "seconds", "window", "skipped", "ema_step", "schedules", "settings"}


def save_optimizer(optimizer: torch.optim.Optimizer, path: Path):
    """Writes an optimizer's state: tensors as safetensors, everything else as JSON in its metadata."""
    state = optimizer.state_dict()
    tensors = {}
    numbers: dict[str, dict] = {}
    for index, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                numbers.setdefault(str(index), {})[key] = value
    save_tensors(path, tensors, {"numbers": json.dumps(numbers), "param_groups": json.dumps(state["param_groups"])})


def load_optimizer(optimizer: torch.optim.Optimizer, path: Path):
    """Reads what `save_optimizer` wrote, bit for bit.

    Raises:
        FileNotFoundError, ValueError: a missing or truncated file, by name.
    """
    tensors, metadata = load_tensors(path, "resume_from_checkpoint")
    try:
        state: dict[int, dict] = {int(i): dict(values) for i, values in json.loads(metadata["numbers"]).items()}
        for name, tensor in tensors.items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": json.loads(metadata["param_groups"])})
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"resume_from_checkpoint: {path} is damaged or of another optimizer ({error}); an older checkpoint or "
            "another --output_dir is allowed"
        ) from error


def save_weights(model: ModelMixin, folder: Path):
    """Saves a network as a diffusers folder, or, if it is a base with an adapter, the adapter alone."""
    if lora_layers(model):
        LoraStudent.of(model).save_pretrained(folder)
    else:
        model.save_pretrained(folder)


def load_weights(model: ModelMixin, folder: Path, argument: str = "resume_from_checkpoint"):
    """Copies what `save_weights` wrote into `model`.

    Raises:
        FileNotFoundError, ValueError: a missing, truncated or different network, by name, as a fault of `argument`.
    """
    try:
        if lora_layers(model):
            LoraStudent.from_pretrained(folder).load_into(model)
        else:
            model.load_state_dict(load_model(type(model), folder, argument).state_dict())
    except RuntimeError as error:
        raise ValueError(f"resume_from_checkpoint: {folder} holds a network of another shape: {error}") from error


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def find_checkpoint(folder: Path, name: str | None) -> Path | None:
    """The checkpoint to resume from: None for `name` None, or for "latest" where there is none yet.

    Raises:
        FileNotFoundError: a checkpoint given by name is not there, or lacks its state.
    """
    if name is None:
        return None
    existing = checkpoints(folder)
    if name == "latest":
        if not existing:
            return None
        path = existing[-1]
    else:
        path = folder / Path(name).name
    if not (path / STATE_FILE).is_file():
        raise FileNotFoundError(
            f"resume_from_checkpoint: {path} is not a complete checkpoint (no {STATE_FILE}); "
            f"there are: {', '.join(p.name for p in existing) or 'none'}"
        )
    return path


def read_state(checkpoint: Path) -> dict:
    """The JSON state of a checkpoint.

    Raises:
        ValueError: if it is damaged.
    """
    try:
        state = json.loads((checkpoint / STATE_FILE).read_text())
        missing = _STATE_ENTRIES - state.keys()
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        return state
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"resume_from_checkpoint: {checkpoint / STATE_FILE} is damaged ({error}); resume from an older checkpoint"
        ) from error


def discard_after(folder: Path, step: int):
    """Deletes the checkpoints beyond `step`: of a run that is taken up again from an earlier one."""
    for path in checkpoints(folder):
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)


def prune(folder: Path, limit: int | None):
    """Deletes the oldest checkpoints until `limit` are left; None keeps all."""
    if limit is not None:
        for path in checkpoints(folder)[:-limit]:
            shutil.rmtree(path)
