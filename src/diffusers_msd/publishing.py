# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Saved pipelines, and single students of them, to the Hub: with a card of what the run recorded, in one commit."""

import inspect
import io
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import CommitInfo, ModelCard, create_repo, model_info
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from .denoiser import num_classes
from .files import load_tensors
from .grids import image_grid
from .hub import component_files, upload
from .image_requests import condition_arguments, generators_of, whole
from .model_card import PICTURE, model_card, student_card
from .pipeline_info import open_to_look
from .pipeline_msd import SLOTS, MultiStudentPipeline
from .prompts import check_prompts
from .run_report import markdown_table, read_results, results_section, run_sections
from .runs import run_settings


# The longer side of the picture, in pixels, and the most students that are in it.
PICTURE_SIDE, PICTURE_ROWS = 2048, 8


def push(
    path: str | Path,
    repo_id: str,
    license: str | None,
    student: int | None = None,
    private: bool | None = None,
    results: str | Path | None = None,
    prompts: list[str] | None = None,
    teacher: str | None = None,
    token: str | None = None,
    commit_message: str | None = None,
) -> CommitInfo:
    """Publishes a saved pipeline, or one of its students, with its model card and a picture of what it makes.

    All is checked before anything is uploaded, and it is one commit: an upload that is interrupted leaves the
    repository as it was, and when it is run again, weights that have arrived are not sent again. Full students are in
    memory one at a time, to make the picture.

    Args:
        path: folder of a `MultiStudentPipeline`, such as that of a run of train_msd.py.
        repo_id: where to, "owner/name" or "name"; made if it is not there.
        license: its identifier on the Hub, such as "apache-2.0"; no card is written without one.
        student: publish this one alone, as a repository of stock diffusers: the network (of a LoRA student the
            adapter) at the root.
        private: whether a new repository is private; None for the owner's default.
        results: results.json of an evaluation that had this folder among its models; None looks for it in the folder,
            in its results/ and in the results/ beside it.
        prompts: shown in the picture and as examples, for pipelines that take prompts; None for the typical ones that
            the run wrote into partition.txt.
        teacher: Hub id of the teacher; None for that of the run, if it was one.
        token: None for the saved login, or HF_TOKEN.
        commit_message: of the commit.

    Returns:
        The `CommitInfo` of huggingface_hub.

    Raises:
        FileNotFoundError, TypeError, ValueError: an argument is not as described, by its name.
        ConnectionError: the Hub cannot be reached, or refuses; its text says what it said.
    """
    check_address(repo_id, license, teacher, token)
    folder, parts = open_folder(path)
    measured = read_results(results, folder)
    try:
        pipe = open_to_look(folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"path: {error}") from error
    except ValueError as error:
        raise ValueError(f"path: {error}") from error
    if student is not None and whole("student", student, 0) not in pipe.students:
        raise ValueError(f"student: one of {', '.join(map(str, pipe.students))} expected")
    recorded = run_settings(folder).get("about", {}).get("teacher", "")
    # A name without owner is that of a folder.
    teacher = teacher or (recorded if "/" in recorded else None)
    if student is not None and teacher is None and (pipe.takes_prompts or pipe.unet is not None):
        raise ValueError("teacher: its Hub id is needed, this student is run with parts of the teacher")

    shown = conditions_by_student(pipe, folder, prompts, student)
    sections = [examples_section(shown)] if pipe.takes_prompts else []
    sections += [run_sections(folder), results_section(*measured) if measured else ""]
    common = {
        "license": license,
        "teacher": teacher,
        "shown": list(shown),
        "details": "\n\n".join(filter(None, sections)),
    }
    if student is None:
        files = {pipe.config_name: folder / pipe.config_name, **component_files(folder, parts)}
        card = partial(model_card, pipe, **common)
    else:
        files = component_files(folder / SLOTS[student], ["."])
        common["prompt"] = shown[student][0] if pipe.takes_prompts else None
        common["teacher_name"] = teacher or f"`{recorded or 'teacher'}`"
        card = partial(student_card, pipe, student, **common)
    return _send({**files, PICTURE: picture(pipe, shown)}, card, repo_id, private, token, commit_message)


def check_address(repo_id: str, license: str | None, teacher: str | None = None, token: str | None = None):
    """Refuses ids, licences and tokens of the wrong form; the Hub has the last word on them.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    for name, value in {"repo_id": repo_id, **({} if teacher is None else {"teacher": teacher})}.items():
        if not isinstance(value, str):
            raise TypeError(f"{name}: text expected, got {type(value).__name__}")
        try:
            validate_repo_id(value)
        except HFValidationError as error:
            raise ValueError(
                f"{name}: name or owner/name of letters, digits and single - _ . inside expected, got {value[:100]!r}"
            ) from error
    if license is None:
        raise ValueError(
            "license: nothing is published without one; give an identifier of the Hub, such as apache-2.0"
        )
    if not isinstance(license, str):
        raise TypeError(f"license: text expected, got {type(license).__name__}")
    if re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license) is None:
        raise ValueError(
            f"license: an identifier of the Hub such as apache-2.0 or mit expected, got {license[:100]!r}"
        )
    # Without its value, which the HTTP library would print.
    if token is not None and re.fullmatch(r"[!-~]+", token) is None:
        raise ValueError("token: letters, digits and signs without spaces or line ends expected")


def open_folder(path: str | Path) -> tuple[Path, list[str]]:
    """A saved pipeline's folder, and the names of the components that its index says are there.

    Raises:
        FileNotFoundError, ValueError: it is none, or a file of weights is damaged.
    """
    folder = Path(path).resolve()
    index_file = folder / MultiStudentPipeline.config_name
    if not index_file.is_file():
        raise FileNotFoundError(f"path: {path} holds no {index_file.name}; the folder of a saved pipeline is needed")
    try:
        index = json.loads(index_file.read_text(encoding="utf-8"))
        name = index["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"path: {index_file} is no index of a pipeline ({error!r})") from error
    if name != MultiStudentPipeline.__name__:
        raise ValueError(f"path: {path} holds a {name}; a {MultiStudentPipeline.__name__} is needed")
    # Only what we know: a name in the index may lead out of the folder.
    known = inspect.signature(MultiStudentPipeline.__init__).parameters
    parts = [name for name in known if isinstance(index.get(name), list) and index[name][0] is not None]
    for file in component_files(folder, parts).values():
        if file.suffix == ".safetensors":
            load_tensors(file, "path")
    return folder, parts


def conditions_by_student(
    pipe: MultiStudentPipeline, folder: Path, prompts: list[str] | None, student: int | None
) -> dict[int, list]:
    """What is shown of each student: labels or prompts that the router gives it, {k: conditions}, at most a few k.

    Args:
        pipe: the pipeline.
        folder: of the run; its partition.txt has prompts if `prompts` is None.
        prompts: as for `push`.
        student: only this one; None for all.

    Raises:
        TypeError, ValueError: `prompts` are given to students of labels, or none are known, or none is `student`'s.
    """
    if not pipe.takes_prompts:
        if prompts is not None:
            raise ValueError("prompts: this pipeline goes by class labels")
        asked = list(range(num_classes(next(iter(pipe.students.values())))))
    else:
        report = folder / "partition.txt"
        if prompts is None and report.is_file():
            # Lines of `EmbeddingRouter.report`; shortened prompts are left out.
            found = re.findall(r"^  typical +\S+  (.+)$", report.read_text(encoding="utf-8"), re.M)
            prompts = [prompt for prompt in found if not prompt.endswith(" ...")]
        if not prompts:
            raise ValueError(
                "prompts: some to be shown are needed, this folder has no partition.txt with typical ones"
            )
        asked = check_prompts(prompts)
    routed = pipe.route(**condition_arguments(pipe, asked))
    wanted = pipe.students if student is None else [student]
    shown = {k: [c for c, by in zip(asked, routed) if by == k] for k in sorted(set(routed) & set(wanted))}
    if not shown:
        raise ValueError(
            f"prompts: none of them is answered by {'a student' if student is None else f'student {student}'}"
        )
    return {k: shown[k] for k in list(shown)[:: -(-len(shown) // PICTURE_ROWS)]}


def examples_section(prompts: dict[int, list[str]]) -> str:
    """Prompts of each student, {k: prompts}, as a section of a model card."""
    rows = [[k, "; ".join(own)] for k, own in prompts.items()]
    return f"## Examples\n\n{markdown_table(['student', 'prompts that it answers'], rows)}"


def picture(pipe: MultiStudentPipeline, conditions: dict[int, list]) -> bytes:
    """A PNG of images of each student, a row each, the one in column i from seed i.

    Args:
        pipe: the pipeline.
        conditions: of each student; they are spread over the columns.
    """
    columns = 4 if pipe.takes_prompts else 8
    rows = []
    for own in conditions.values():
        chosen = [own[i * len(own) // columns] for i in range(columns)]
        noise = generators_of(range(columns))
        rows.append(pipe(**condition_arguments(pipe, chosen), generator=noise, output_type="pt").images)
    grid = image_grid(2 * torch.cat(rows) - 1, columns, min_side=64)
    grid.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    buffer = io.BytesIO()
    grid.save(buffer, format="PNG")
    return buffer.getvalue()


def _send(
    files: dict[str, Path | bytes],
    card: Callable[..., ModelCard],
    repo_id: str,
    private: bool | None,
    token: str | None,
    commit_message: str | None,
) -> CommitInfo:
    """Uploads files with a card, which is made when the repository's full name is known."""
    draft = card(name=repo_id)
    try:
        try:
            draft.validate()
        except ValueError as error:
            raise ValueError(f"license: the Hub refuses the card's metadata: {_first_line(error)}") from error
        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        if private and not model_info(repo_id, token=token).private:
            raise ValueError(f"private: {repo_id} is there already and public; change that on the Hub first")
        files = {"README.md": str(card(name=repo_id)).encode(), **files}
        return upload(files, repo_id, token=token, commit_message=commit_message)
    # RuntimeError is what the client makes of a file that did not arrive.
    except (HTTPError, OSError, RuntimeError) as error:
        raise ConnectionError(
            f"{repo_id}: the upload did not finish ({_first_line(error)}); it is one commit, so nothing of it shows; "
            "run the same again to go on"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
