# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""What a run and its evaluation left, as sections of a model card."""

import json
from pathlib import Path

from .runs import run_settings, training_record


STAGES = {"tsm": "teacher score matching", "dm": "distribution matching", "adm": "distribution matching with a GAN"}

# Entries of an evaluation's row that are shown of the whole and of each part; docs/method.md defines them.
METRICS = {
    "fd": "FD",
    "kid": "KID",
    "class_accuracy": "class accuracy",
    "retrieval@5": "retrieval@5",
    "clip_score": "CLIP score",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "diversity": "diversity",
}


def markdown_table(header: list[str], rows: list[list]) -> str:
    """A table in Markdown; cells are anything that can be printed, on one line each."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(value) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def run_sections(run: Path) -> str:
    """How the pipeline in a run's folder was trained and what that cost; empty for a folder that is no run."""
    settings = run_settings(run)
    if not settings:
        return ""
    try:
        record = training_record(run)
    except FileNotFoundError:
        # Somebody took the pipeline along and left the students' own folders, which know the cost, behind.
        record = {}
    return "\n\n".join([_training(settings), *([_compute(record)] if record else [])])


def _training(settings: dict) -> str:
    about = settings.get("about", {})
    stages = ", then ".join(f"{stage.upper()} ({STAGES[stage]})" for stage in settings["stages"])
    lines = {
        "Teacher": f"`{about.get('teacher', 'teacher')}` (fingerprint `{settings['teacher'][:12]}`)",
        "Stages": stages,
        "Students": _students(settings),
        "Data": about.get("data") or "none besides what the teacher made",
        "Partition": about.get("partition", "see the router"),
        "Seed": settings["seed"],
    }
    if not about:
        # A run of an earlier version.
        del lines["Data"], lines["Partition"]
    return "## Training\n\n" + "\n".join(f"- {name}: {value}" for name, value in lines.items())


def _students(settings: dict) -> str:
    if settings.get("student_type") == "lora":
        return f"LoRA adapters of rank {settings['rank']} on the teacher"
    sizes = settings["student_channels"], settings["student_blocks"]
    if sizes == (None, None):
        return "networks of the teacher's size, started as copies of it"
    start = "inherited from the teacher" if settings.get("student_init") == "inherit" else "random"
    return (
        f"networks of another size than the teacher's (channels {sizes[0]}, blocks {sizes[1]}), {start} at the start"
    )


def _compute(record: dict) -> str:
    shown = {
        "steps": ("iterations", lambda account: f"{account['steps']:,}"),
        "images_seen": ("images seen", lambda account: f"{sum(account['images_seen'].values()):,}"),
        "flops": ("TFLOP", lambda account: f"{account['flops'] / 1e12:,.4g}"),
        "seconds": ("seconds", lambda account: f"{account['seconds']:,.0f}"),
    }
    accounts = {name.replace("_", " "): account for name, account in record["students"].items()}
    if record.get("pairs"):
        accounts["pairs of the teacher"] = record["pairs"]
    accounts["all students"] = record
    # Runs of earlier versions know less.
    shown = {key: column for key, column in shown.items() if any(key in account for account in accounts.values())}
    rows = [
        [name, *(cell(account) if key in account else "-" for key, (_, cell) in shown.items())]
        for name, account in accounts.items()
    ]
    lines = ["## Compute", markdown_table(["", *(title for title, _ in shown.values())], rows)]
    if "hardware" in record:
        lines.append(f"Hardware of a process: {', '.join(record['hardware'])}.")
    return "\n\n".join(lines)


def read_results(results: str | Path | None, folder: Path) -> tuple[dict, dict] | None:
    """The row of a pipeline in the results of an evaluation, and all results.

    Args:
        results: the file that an evaluation script wrote; None looks for results.json in the folder, in its results/
            and in the results/ beside it.
        folder: the pipeline's; a row is its own if the evaluation was given a folder of this name.

    Returns:
        None if `results` is None and there is no such row.

    Raises:
        FileNotFoundError, ValueError: `results` is no such file, or has no such row.
    """
    if results is None:
        places = [place / "results.json" for place in (folder, folder / "results", folder.parent / "results")]
        found = [(_own_rows(read, folder), read) for read in map(_read, filter(Path.is_file, places))]
        return next(((own[0], read) for own, read in found if len(own) == 1), None)
    read = _read(Path(results))
    own = _own_rows(read, folder)
    if len(own) != 1:
        raise ValueError(
            f"results: {results} has {len(own)} models in a folder named {folder.name}, one is needed; its models are "
            f"{', '.join(read['config']['models'])}"
        )
    return own[0], read


def _own_rows(results: dict, folder: Path) -> list[dict]:
    folders = dict(entry.rpartition("=")[::2] for entry in results["config"]["models"])
    return [row for row in results["rows"] if Path(folders.get(row["model"], "")).name == folder.name]


def _read(file: Path) -> dict:
    if not file.is_file():
        raise FileNotFoundError(f"results: {file} is missing; the results.json of an evaluation is needed")
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
        models, rows = read["config"]["models"], read["rows"]
        whole = [*models, read["protocol"], *(row["model"] for row in rows)]
        if not all(isinstance(text, str) for text in whole):
            raise TypeError("names are text")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"results: {file} is no results.json of an evaluation ({error!r})") from error
    return read


def results_section(row: dict, results: dict) -> str:
    """The metrics of a pipeline, over all conditions and over each part, and its teacher's if they were measured.

    Args:
        row: its own row.
        results: the file that the row is from.
    """
    labels = {**METRICS, "class_accuracy": "retrieval@1"} if "retrieval@5" in row else METRICS
    rows = {"all": row, **{f"part {k}": part for k, part in row.get("parts", {}).items()}}
    rows |= {"the teacher, all": other for other in results["rows"] if other["model"] == "teacher"}
    shown = [key for key in labels if key in row]
    cells = [[name, *(f"{of[key]:.4g}" if key in of else "-" for key in shown)] for name, of in rows.items()]
    table = markdown_table(["", *(labels[key] for key in shown)], cells)
    return f"## Results\n\n{table}\n\n{' '.join(results['protocol'].split())}"
