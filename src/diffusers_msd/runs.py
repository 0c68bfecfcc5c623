# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: what it was started with, and what it left."""

import json
from pathlib import Path

from filelock import FileLock

from .account import add_accounts
from .files import write_json


RUN_FILE = "run.json"
# The account of the pairs that a run uses, if it uses some.
PAIRS_FILE = "pairs.json"


def claim_run(output_dir: Path, settings: dict, about: dict | None = None):
    """Marks a folder as belonging to a run, or checks that it is this one's.

    Jobs of single students share a folder, so the same settings may claim it again and again; each student's stage
    folder refuses a second start of its own.

    Args:
        output_dir: the folder.
        settings: what all jobs of the run must have in common.
        about: what else is to be known of the run; kept as "about", as the first job had it.

    Raises:
        ValueError: the folder belongs to a run with other settings.
    """
    path = Path(output_dir) / RUN_FILE
    with FileLock(f"{path}.lock"):
        if not path.exists():
            write_json(path, {**settings, "about": about or {}})
            return
        saved = json.loads(path.read_text())
        for name, value in settings.items():
            if saved.get(name) != value:
                raise ValueError(
                    f"output_dir: {output_dir} holds a run with {name} = {saved.get(name)!r}, now it is {value!r}; "
                    "use another folder, or the same settings to continue"
                )


def run_settings(run: Path) -> dict:
    """What `claim_run` recorded of a run; empty for a folder that is no run."""
    return json.loads((run / RUN_FILE).read_text()) if (run / RUN_FILE).is_file() else {}


def _stage_folders(run: Path) -> dict[str, list[Path]]:
    """The finished stages of each student of a run, in the order they ran."""
    settings = run_settings(run)
    if not settings:
        return {}
    return {
        f"student_{k}": [run / f"student_{k}" / stage for stage in settings["stages"]]
        for k in range(settings["num_students"])
    }


def training_record(run: Path) -> dict:
    """What training cost, see `account`; empty for a folder that is no run.

    Returns:
        The account over all stages and students ("steps", "seconds", "flops", ...), and beside it "students": {name:
        account over its stages}, "pairs": account of the pairs they share, if any, and "flops_with_pairs". What is not
        known, since the run is of an earlier version, is left out.
    """
    students = {
        name: add_accounts([json.loads((folder / "final" / "summary.json").read_text()) for folder in folders])
        for name, folders in _stage_folders(run).items()
    }
    if not students:
        return {}
    record = {**add_accounts(list(students.values())), "students": students}
    parts = [record]
    if (run / PAIRS_FILE).is_file():
        record["pairs"] = json.loads((run / PAIRS_FILE).read_text())
        parts.append(record["pairs"])
    if all("flops" in part for part in parts):
        record["flops_with_pairs"] = sum(part["flops"] for part in parts)
    return record


def read_logs(run: Path) -> dict[str, list[dict]]:
    """The log lines of each student, stages one after another, with the running iteration as "position"."""
    logs = {}
    for student, folders in _stage_folders(run).items():
        points, start = [], 0
        for folder in folders:
            lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
            points += [{**line, "position": start + line["step"]} for line in lines]
            start = points[-1]["position"] if points else start
        logs[student] = points
    return logs
