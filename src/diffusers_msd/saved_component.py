# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Components of a pipeline that are no networks: settings as JSON, tensors beside them, whatever the pipeline's dtype."""

import json
from pathlib import Path

from diffusers import ConfigMixin, SchedulerMixin
from diffusers.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError

from .files import atomic_write, check_writable, load_tensors, save_tensors


_DOWNLOAD_KWARGS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
_UPLOAD_KWARGS = ("commit_message", "create_pr", "private", "repo_id", "token")


class SavedComponent(SchedulerMixin, ConfigMixin):
    """A component that diffusers saves and loads like a scheduler, so that no `.to(torch.float16)` reaches its tensors.

    Settings are saved in `config.json`, tensors, if any, in `diffusion_pytorch_model.safetensors`. Under any other
    name diffusers takes the whole repository for one without safetensors and does not load it from the Hub.
    """

    config_name = CONFIG_NAME

    def tensors(self):
        """What goes into the file of tensors: `dict[str, torch.Tensor]`, empty for no file."""
        return {}

    def metadata(self):
        """What goes into the header of that file: `dict[str, str]`."""
        return {}

    @classmethod
    def from_saved(cls, config, load):
        """Makes the component from its config and `load()`, which reads the file of tensors."""
        return cls.from_config(config)

    def save_pretrained(self, save_directory, push_to_hub=False, **kwargs):
        """Saves the component so that `from_pretrained` gives it back.

        Args:
            save_directory (`str` or `Path`): The folder; made when absent, other files in it are left alone.
            push_to_hub (`bool`): Also upload it, to `repo_id` (by default the name of the folder).
            kwargs: `repo_id`, `commit_message`, `private`, `token` and `create_pr` for the upload. Others, such as
                `variant`, are ignored: there is one precision.

        Raises:
            ValueError: The folder cannot be written.
        """
        folder = check_writable(save_directory, "save_directory")
        tensors = self.tensors()
        if tensors:
            # Tensors first: a config without its tensors would not load.
            save_tensors(folder / SAFETENSORS_WEIGHTS_NAME, tensors, self.metadata())
        atomic_write(folder / CONFIG_NAME, self.to_json_string())
        if push_to_hub:
            upload = {name: kwargs[name] for name in _UPLOAD_KWARGS if name in kwargs}
            self.push_to_hub(**{"repo_id": folder.name, **upload})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, subfolder=None, **kwargs):
        """Loads a component of this class or a subclass: the saved `_class_name` decides.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): A folder, or a Hub id.
            subfolder (`str`, *optional*): Where in it the component lies, such as `"router"`.
            kwargs: `cache_dir`, `force_download`, `local_files_only`, `revision` and `token` for a download. Others,
                such as `variant` or `dtype`, are ignored.

        Returns:
            `SavedComponent`: Its tensors as they were saved, on the CPU.

        Raises:
            FileNotFoundError: There is no such component.
            ValueError: A file is damaged or holds another class.
        """
        download = {name: kwargs[name] for name in _DOWNLOAD_KWARGS if name in kwargs}
        path = _fetch(pretrained_model_name_or_path, subfolder, CONFIG_NAME, download)
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            name = config["_class_name"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"pretrained_model_name_or_path: {path} is no config of a {cls.__name__} ({error!r}); a JSON object "
                "with `_class_name` is needed."
            ) from error
        classes = {known.__name__: known for known in _with_subclasses(cls)}
        if name not in classes:
            raise ValueError(
                f"pretrained_model_name_or_path: {path} holds a {name!r}; {cls.__name__}.from_pretrained loads one of "
                f"{sorted(classes)} (a class of your own must be imported first)."
            )

        def load():
            file = _fetch(pretrained_model_name_or_path, subfolder, SAFETENSORS_WEIGHTS_NAME, download)
            tensors, _ = load_tensors(file, "pretrained_model_name_or_path")
            # Clones, because loaded tensors are maps of a file that may be replaced.
            return {name: tensor.clone() for name, tensor in tensors.items()}

        return classes[name].from_saved(config, load)


def _fetch(path, subfolder, filename, download_kwargs):
    # The local path of one file of a folder or of a Hub repository.
    if Path(path).is_dir():
        file = Path(path, subfolder or "", filename)
        if not file.is_file():
            raise FileNotFoundError(
                f"pretrained_model_name_or_path: {file} is missing; a folder saved by save_pretrained is needed."
            )
        return file
    try:
        return Path(hf_hub_download(str(path), filename, subfolder=subfolder, **download_kwargs))
    except (OSError, HFValidationError) as error:
        raise FileNotFoundError(
            f"pretrained_model_name_or_path: {path} is neither a folder nor a Hub repository with "
            f"{Path(subfolder or '', filename)}: {error}"
        ) from error


def _with_subclasses(cls):
    yield cls
    for subclass in cls.__subclasses__():
        yield from _with_subclasses(subclass)
