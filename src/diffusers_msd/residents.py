# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Students that are loaded when they are first needed: at most n of a saved pipeline are in memory at a time."""

import copy
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ModelMixin, UNet2DModel
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME

from .files import load_tensors
from .pipeline_inputs import SLOTS
from .teachers import TEACHERS


# Options of `from_pretrained` that say where files come from.
SOURCE_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
OPTIONS = (*SOURCE_OPTIONS, "dtype", "variant", "use_safetensors")
# Components that may have files of a variant, besides the students.
OTHER_NETS = ("vae", "text_encoder", "safety_checker")


class SavedStudents:
    """The students of a saved pipeline, in a folder or on the Hub, each to be loaded alone.

    Only the index and the students' configs are read, so that a student that is missing or does not fit shows at once.

    Args:
        pipeline_class: its `load_config` and `download` are used.
        path: the folder or repo id.
        options: of `from_pretrained`; slots that are in it are the caller's and are left alone.

    Attributes:
        shapes: {k: the net on torch's meta device, with config and dtype but without weights}.

    Raises:
        FileNotFoundError: the index, a student's config or, in a folder, its weights are missing.
        ValueError: an option is not possible, or a student is no net of a known family.
    """

    def __init__(self, pipeline_class: type[DiffusionPipeline], path: str | os.PathLike, options: dict):
        self.pipeline_class, self.path = pipeline_class, os.fspath(path)
        self.variant, dtype = options.get("variant"), options.get("dtype")
        self.source = {name: value for name, value in options.items() if name in SOURCE_OPTIONS}
        try:
            self.index, commit = pipeline_class.load_config(self.path, return_commit_hash=True, **self.source)
        except OSError as error:
            raise FileNotFoundError(
                f"pretrained_model_name_or_path: {self.path} is no folder and no Hub repository with a pipeline: {error}"
            ) from error
        self._folders: dict[int, Path] = {}
        self.is_local = os.path.isdir(self.path)
        if not self.is_local:
            # What is loaded later shall belong to what is loaded now, also if somebody pushes in between.
            self.source["revision"] = commit
        kinds = {k: self.index.get(slot, (None, None))[1] for k, slot in enumerate(SLOTS) if slot not in options}
        self.shapes = {k: self._read_shape(SLOTS[k]) for k, kind in kinds.items() if kind in TEACHERS}
        if not self.shapes:
            raise ValueError(
                f"max_resident_students: {self.path} has no networks to load later; LoRA students are always there"
            )
        for k, shape in self.shapes.items():
            # The dtypes of diffusers: one for all, or {component: dtype}.
            own = dtype.get(SLOTS[k], dtype.get("default")) if isinstance(dtype, dict) else dtype
            if own is not None and not isinstance(own, torch.dtype):
                raise ValueError(f"dtype: a torch.dtype, or a dict of them by component, expected, got {dtype!r}")
            shape.to(torch.empty(0, dtype=own or torch.float32, device="meta"))
            if self.is_local:
                weights_files(Path(self.path, SLOTS[k]), self.variant, SLOTS[k])

    def _read_shape(self, slot: str) -> ModelMixin:
        try:
            config = UNet2DModel.load_config(self.path, subfolder=slot, **self.source)
        except OSError as error:
            raise FileNotFoundError(f"{slot}: {self.path} has no readable {slot}/config.json: {error}") from error
        if config.get("_class_name") not in TEACHERS:
            raise ValueError(
                f"{slot}: its config is of a {config.get('_class_name')}; one of {', '.join(TEACHERS)} is needed"
            )
        with torch.device("meta"):
            return TEACHERS[config["_class_name"]].from_config(config).eval()

    def options_for_the_rest(self, options: dict) -> dict:
        """`options` with which `from_pretrained` loads everything else, of the same commit."""
        rest = {**options, **self.source, **{SLOTS[k]: None for k in self.shapes}}
        if not self.is_local and not any(self.index.get(name) and name not in options for name in OTHER_NETS):
            # diffusers wants to find a file of the variant, and here none of them is left.
            rest["variant"] = None
        return rest

    def load(self, k: int) -> ModelMixin:
        """Student k on the CPU, from safetensors only. Several threads may load at once.

        Raises:
            FileNotFoundError, ValueError: naming the slot: a file is missing, damaged or does not fit the config.
        """
        # Not by `from_pretrained`: while it runs it changes torch.nn and the default dtype for the whole process,
        # so calls in other threads could go wrong.
        slot, unet = SLOTS[k], copy.deepcopy(self.shapes[k])
        folder = self._folder(k)
        weights = {}
        for file in weights_files(folder, self.variant, slot):
            tensors, _ = load_tensors(file, slot)
            weights.update((name, tensor.to(unet.dtype)) for name, tensor in tensors.items())
        try:
            unet.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            raise ValueError(f"{slot}: the weights in {folder} do not fit its config.json: {error}") from error
        return unet

    def _folder(self, k: int) -> Path:
        if k not in self._folders:
            root = self.path
            if not self.is_local:
                others = {name: None for name in self.index if name != SLOTS[k] and not name.startswith("_")}
                try:
                    root = self.pipeline_class.download(
                        self.path, use_safetensors=True, variant=self.variant, **self.source, **others
                    )
                except OSError as error:
                    raise FileNotFoundError(f"{SLOTS[k]}: it does not come from {self.path}: {error}") from error
            self._folders[k] = Path(root, SLOTS[k])
        return self._folders[k]


def weights_files(folder: Path, variant: str | None, slot: str) -> list[Path]:
    """The safetensors files of a model: those of the variant, or if it has none, as for diffusers, the plain ones.

    Raises:
        FileNotFoundError, ValueError: naming the slot.
    """
    for part in ([f".{variant}"] if variant else []) + [""]:
        index = folder / SAFE_WEIGHTS_INDEX_NAME.replace(".json", f"{part}.json")
        if index.is_file():
            try:
                return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
            except (KeyError, ValueError) as error:
                raise ValueError(f"{slot}: {index} is truncated or corrupt: {error}") from error
        whole = folder / SAFETENSORS_WEIGHTS_NAME.replace(".safetensors", f"{part}.safetensors")
        if whole.is_file():
            return [whole]
    raise FileNotFoundError(f"{slot}: {folder} holds no {SAFETENSORS_WEIGHTS_NAME}; weights are read from safetensors")


@dataclass
class _Place:
    """One of the n places: of a student that is here, or on its way."""

    net: Future = field(default_factory=Future)
    users: int = 0


class ResidentStudents:
    """At most `limit` students in memory; one that is not there is loaded, and the least recently used idle one leaves.

    For any number of threads: a student is handed out whole or not at all, is loaded once however many ask for it, and
    stays while somebody uses it. Who needs a place while all are in use waits. Loading one does not hold up calls of
    the others.

    Args:
        load: makes student k, on the CPU.
        shapes: {k: net without weights}, every student that may be asked for; the dtype is that of the loaded ones.
        limit: n, in [1, number of students].

    Attributes:
        device: where students are put.

    Raises:
        ValueError: `limit` is out of its range; the error calls it `max_resident_students`.
    """

    def __init__(self, load: Callable[[int], ModelMixin], shapes: dict[int, ModelMixin], limit: int):
        if type(limit) is not int or not 1 <= limit <= len(shapes):
            raise ValueError(
                f"max_resident_students: an integer in 1 ... {len(shapes)}, the number of students to load, expected, "
                f"got {limit!r}"
            )
        self.load, self.shapes, self.limit = load, shapes, limit
        self.device = torch.device("cpu")
        # The least recently used one first.
        self._places: OrderedDict[int, _Place] = OrderedDict()
        self._changed = threading.Condition()
        self._turn = threading.Lock()

    @property
    def resident(self) -> list[int]:
        """The students that are in memory now, the least recently used one first."""
        with self._changed:
            return [k for k, place in self._places.items() if place.net.done()]

    def use(self, k: int, function: Callable):
        """`function(student)` of student k, which is in memory at least as long as it runs.

        `function` must not use another student, nor keep this one.

        Raises:
            FileNotFoundError, ValueError: the student cannot be loaded; the next call tries again.
        """
        # A function and no context manager: a variable of a `with` would keep the net alive after it was let go.
        place, is_new = self._pin(k)
        try:
            if is_new:
                self._fill(k, place)
            return function(place.net.result())
        finally:
            with self._changed:
                place.users -= 1
                if not place.users and self._places.get(k) is not place:
                    # It failed. The error knows the place, so the place must not know the error, or both would stay.
                    place.net = None
                self._changed.notify_all()

    def _pin(self, k: int) -> tuple[_Place, bool]:
        # In turn: calls of resident students could otherwise keep one that waits for a place waiting for ever.
        with self._turn, self._changed:
            self._changed.wait_for(lambda: k in self._places or self._has_room())
            is_new = k not in self._places
            place = self._places.setdefault(k, _Place())
            self._places.move_to_end(k)
            place.users += 1
            return place, is_new

    def _has_room(self) -> bool:
        if len(self._places) == self.limit:
            idle = next((k for k, place in self._places.items() if not place.users), None)
            if idle is None:
                return False
            # Not only out of the table: a thread that has just finished may still hold the place.
            self._places.pop(idle).net = None
        return True

    def _fill(self, k: int, place: _Place) -> None:
        try:
            unet = self.load(k)
            # Under the lock, so that a change of device meanwhile is not missed.
            with self._changed:
                place.net.set_result(unet.to(self._like(k)))
        except BaseException as error:
            with self._changed:
                del self._places[k]
            place.net.set_exception(error)
            raise

    def _like(self, k: int) -> torch.Tensor:
        return torch.empty(0, dtype=self.shapes[k].dtype, device=self.device)

    def to(self, *args, **kwargs) -> None:
        """Moves or casts the resident students, and those that are loaded later; arguments as for `Tensor.to`."""
        with self._changed:
            for k, shape in self.shapes.items():
                like = self._like(k).to(*args, **kwargs)
                shape.to(torch.empty_like(like, device="meta"))
            self.device = like.device
            for k, place in self._places.items():
                if place.net.done():
                    place.net.result().to(self._like(k))
