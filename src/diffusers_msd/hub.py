# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""What a pipeline needs around its weights: to be known to diffusers, saved whole, and uploaded."""

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory, mkdtemp

import diffusers
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    create_commit,
    create_repo,
    hf_hub_download,
    list_repo_files,
)
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from safetensors import SafetensorError

from .files import atomic_directory, check_writable
from .model_card import is_own_card, model_card


logger = logging.get_logger(__name__)

# `owner/name`.
REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")

# `diffusion_pytorch_model.fp16-00001-of-00002.safetensors`, `model.safetensors.index.fp16.json`, ...
WEIGHTS_NAME = re.compile(r"\w+(?:\.(\w+))?(?:-\d{5}-of-\d{5})?\.safetensors(?:\.index(?:\.(\w+))?\.json)?")


def register_classes(pipeline_class: type[DiffusionPipeline]) -> None:
    """Makes diffusers' generic loaders and the Hub route know this package.

    diffusers refuses a repository whose `model_index.json` names a library that is not in its table of loadable
    classes, and its generic `DiffusionPipeline.from_pretrained` looks the pipeline class up on `diffusers` itself.
    The table is private, hence the guard: without it, loading local folders with our own class still works.

    Args:
        pipeline_class: the class named by `_class_name` in `model_index.json`.
    """
    setattr(diffusers, pipeline_class.__name__, pipeline_class)
    try:
        from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
    except ImportError:
        warnings.warn(
            f"diffusers {diffusers.__version__} has no table of loadable classes where diffusers_msd looks for it: "
            "pipelines load from local folders only. diffusers 0.42 is known to work."
        )
        return
    methods = ["save_pretrained", "from_pretrained"]
    LOADABLE_CLASSES["diffusers_msd"] = {"ModelMixin": methods, "SchedulerMixin": methods}


@contextmanager
def whole_save(save_directory: str | Path, variant: str | None, index_name: str) -> Iterator[Path]:
    """Gives a temporary folder to save a pipeline in, and moves it to `save_directory` once it is complete.

    A folder that does not exist yet appears in one rename. An existing one keeps what else it holds (checkpoints,
    logs, weights of another variant, a card somebody wrote): its index goes away first and comes back last, so that a
    folder with an index is a whole pipeline at any moment. A failure inside the block leaves everything as it was.

    Args:
        save_directory: the final place.
        variant: the variant being saved; old weights of this variant that the new save has no use for are removed.
        index_name: file name of the pipeline's index.

    Raises:
        ValueError: `save_directory` is a file or cannot be written.
    """
    target = Path(save_directory)
    if not target.exists():
        check_writable(target.absolute().parent, "save_directory")
        with atomic_directory(target) as staged:
            yield staged
        return
    check_writable(target, "save_directory")
    # Inside, since the target itself may be a mount point that no sibling can be renamed into.
    staged = Path(mkdtemp(prefix=".saving-", dir=target))
    try:
        yield staged
        _move_over(staged, target, variant, index_name)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _move_over(staged: Path, target: Path, variant: str | None, index_name: str) -> None:
    files = [path.relative_to(staged) for path in sorted(staged.rglob("*")) if path.is_file()]
    (target / index_name).unlink(missing_ok=True)
    for file in files:
        if str(file) == index_name or (str(file) == "README.md" and not is_own_card(target / file)):
            continue
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staged / file, target / file)
    # A stale shard index would win over the new single file when the model is loaded.
    for folder in {file.parent for file in files} - {Path(".")}:
        for old in (target / folder).iterdir():
            match = WEIGHTS_NAME.fullmatch(old.name)
            if match and (match[1] or match[2]) == variant and old.relative_to(target) not in files:
                old.unlink()
    os.replace(staged / index_name, target / index_name)


def component_files(folder: str | Path, components: list[str]) -> dict[str, Path]:
    """All files of some components of a saved pipeline, {path in the pipeline: file}; no other ones beside them."""
    folder = Path(folder)
    files = [file for name in components for file in sorted((folder / name).rglob("*")) if file.is_file()]
    return {file.relative_to(folder).as_posix(): file for file in files}


def upload(
    files: dict[str, Path | bytes],
    repo_id: str,
    token: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    subfolder: str | None = None,
) -> CommitInfo:
    """Uploads files in one commit; a card somebody wrote on the Hub stays.

    Weights are stored before the commit that shows them, so an upload that is interrupted leaves the repository as it
    was, and the next one does not send again what has arrived. (`huggingface_hub.upload_folder` may commit in pieces.)
    Old weights that are in the way of the new ones are removed by the same commit.

    Args:
        files: {path in the repository: file, or its content}.
        repo_id: an existing repository.
        token, commit_message, create_pr: as for `huggingface_hub.create_commit`.
        subfolder: where in the repository; its root if None.

    Returns:
        The `CommitInfo` of huggingface_hub.
    """
    try:
        card = Path(hf_hub_download(repo_id, "README.md", subfolder=subfolder, token=token))
        if not is_own_card(card):
            logger.warning(f"README.md of {repo_id} was written by somebody, so it stays as it is.")
            files = {path: content for path, content in files.items() if path != "README.md"}
    except EntryNotFoundError:
        pass
    files = {str(PurePosixPath(subfolder or "", path)): content for path, content in files.items()}
    operations = [CommitOperationAdd(path_in_repo=path, path_or_fileobj=content) for path, content in files.items()]
    operations += [CommitOperationDelete(path) for path in _old_weights(files, repo_id, token)]
    return create_commit(
        repo_id,
        operations,
        token=token,
        commit_message=commit_message or "Upload MultiStudentPipeline",
        create_pr=create_pr,
    )


def _old_weights(files: dict, repo_id: str, token: str | None) -> list[str]:
    # Shards and their index, or a whole file, of an earlier upload: loaders would take them for the new weights.
    new = {_weights_kind(path) for path in files} - {None}
    return [path for path in list_repo_files(repo_id, token=token) if path not in files and _weights_kind(path) in new]


def _weights_kind(path: str) -> tuple | None:
    # What the files of one model have in common: folder, beginning of the name, variant.
    match = WEIGHTS_NAME.fullmatch(PurePosixPath(path).name)
    return match and (PurePosixPath(path).parent, re.match(r"\w+", match[0])[0], match[1] or match[2])


class SafePipeline(DiffusionPipeline):
    """A diffusers pipeline whose saves are whole, whose loads never unpickle and whose card is its own."""

    def to_json_string(self) -> str:
        """The index, less the place where this copy was loaded from and what is empty and no component."""
        index = json.loads(super().to_json_string())
        index.pop("_name_or_path", None)
        named = self.components
        kept = {k: v for k, v in index.items() if v is not None and (v != [None, None] or k in named)}
        return json.dumps(kept, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """Loads a pipeline as diffusers does, from safetensors only.

        Args:
            pretrained_model_name_or_path: a folder, or a repo id on the Hub.
            kwargs: as for `DiffusionPipeline.from_pretrained`: `dtype`, `variant`, `device_map`, `cache_dir`, ... and
                components to use instead of the saved ones, None to leave an optional one out.

        Raises:
            FileNotFoundError: the folder, or a file in it, is missing; weights in another format than safetensors
                count as missing.
            ValueError: a file is damaged, or `use_safetensors` is not True.
        """
        if kwargs.setdefault("use_safetensors", True) is not True:
            raise ValueError(f"use_safetensors: only True is allowed, got {kwargs['use_safetensors']!r}")
        path = os.fspath(pretrained_model_name_or_path)
        if not os.path.isdir(path) and not REPO_ID.fullmatch(path):
            raise FileNotFoundError(
                f"pretrained_model_name_or_path: {path} is no folder, and no id of a Hub repository"
            )
        try:
            return super().from_pretrained(path, **kwargs)
        except (FileNotFoundError, HfHubHTTPError):
            raise
        except SafetensorError as error:
            raise ValueError(f"pretrained_model_name_or_path: {path} has a damaged weights file: {error}") from error
        except OSError as error:
            raise FileNotFoundError(
                f"pretrained_model_name_or_path: {path} is no folder and no Hub repository with a whole pipeline in "
                f"safetensors format: {error}"
            ) from error

    @classmethod
    def saved_components(cls, path: str | os.PathLike) -> set[str]:
        """Names of what a saved pipeline has, by its index alone.

        Raises:
            FileNotFoundError: there is no pipeline at `path`, a folder or a repo id on the Hub.
        """
        try:
            index = cls.load_config(path)
        except OSError as error:
            raise FileNotFoundError(
                f"path: {path} is no folder and no Hub repository with a pipeline: {error}"
            ) from error
        return {name for name, entry in index.items() if isinstance(entry, list) and entry[1] is not None}

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        license: str | None = None,
        **upload_kwargs,
    ) -> CommitInfo | None:
        """Saves the pipeline and its model card, whole or not at all.

        Args:
            save_directory: a folder; what else it holds is left alone, also a README.md that somebody wrote.
            safe_serialization: for diffusers' sake; weights are always written as safetensors.
            variant: part of the names of the weights files, such as "fp16"; other variants in the folder stay.
            max_shard_size: split weights files above this, such as "5GB".
            push_to_hub: also upload what was saved.
            repo_id: where to; by default the name of the folder, in the user's namespace.
            private, token: as for `huggingface_hub.create_repo`.
            license: for the model card, an identifier of the Hub such as "apache-2.0"; an upload without one is warned
                of, since nobody else may use it then.
            upload_kwargs: `commit_message`, `create_pr`, `subfolder`.

        Returns:
            What the Hub says about the upload, or None.

        Raises:
            ValueError: `save_directory` cannot be written, or there is no router or no student to save.
        """
        if not safe_serialization:
            logger.warning("safe_serialization=False is ignored: weights are always written as safetensors.")
        if upload_kwargs and not push_to_hub:
            raise TypeError(f"{sorted(upload_kwargs)[0]}: only used with push_to_hub=True")
        name = Path(save_directory).absolute().name
        card = model_card(self, repo_id or name, license)
        if push_to_hub:
            if license is None:
                logger.warning("license: the model card has none, so nobody else may use the weights.")
            repo_id = create_repo(repo_id or name, private=private, token=token, exist_ok=True).repo_id
            card = model_card(self, repo_id, license)
        with whole_save(save_directory, variant, self.config_name) as staged:
            super().save_pretrained(staged, variant=variant, max_shard_size=max_shard_size)
            card.save(staged / "README.md")
        if push_to_hub:
            saved = [name for name, component in self.components.items() if component is not None]
            files = {name: Path(save_directory, name) for name in (self.config_name, "README.md")}
            files |= component_files(save_directory, saved)
            return upload(files, repo_id, token=token, **upload_kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
        license: str | None = None,
    ) -> CommitInfo:
        """Uploads the pipeline with its model card; diffusers' own method would put a general card in its place.

        `publishing.push` does the same for a saved pipeline, with a picture and results in the card.

        Arguments as for `PushToHubMixin.push_to_hub` of diffusers, and `license` and errors as for `save_pretrained`.

        Returns:
            What the Hub says about the upload.
        """
        with TemporaryDirectory() as folder:
            return self.save_pretrained(
                folder,
                safe_serialization=safe_serialization,
                variant=variant,
                push_to_hub=True,
                repo_id=repo_id,
                private=private,
                token=token,
                commit_message=commit_message,
                create_pr=create_pr,
                subfolder=subfolder,
                license=license,
            )
