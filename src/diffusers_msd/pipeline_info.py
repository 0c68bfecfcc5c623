# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""What a saved pipeline is: its students, its router's parts, what its training cost."""

from pathlib import Path

from .account import storage_bytes
from .denoiser import num_classes
from .model_card import describe_parts
from .pipeline_msd import MultiStudentPipeline
from .run_report import METRICS, read_results
from .runs import training_record


def open_to_look(path: str | Path) -> MultiStudentPipeline:
    """Loads a pipeline to look at it: full students when they are asked for, one at a time.

    Raises:
        FileNotFoundError, ValueError: as for `MultiStudentPipeline.from_pretrained`.
    """
    lora = "unet" in MultiStudentPipeline.saved_components(path)
    pipe = MultiStudentPipeline.from_pretrained(path, **({} if lora else {"max_resident_students": 1}))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline_info(path: str, results: str | None = None) -> dict:
    """Says what a pipeline is.

    Args:
        path: its folder, or Hub id.
        results: results.json of an evaluation with this pipeline; None looks for one in its folder and beside it.

    Returns:
        "pipeline", "students" ({name: parameters}), "family" (class of the networks), "conditions" ("prompts", or "N
        classes"), "timesteps", "image_shape" (C, H, W of the samples), "router" (class and parts in words),
        "parameters" (of one call), "parameters_total", "storage_bytes" (None for a Hub id), "training" (see
        `training_record`; empty if the folder is no run), "metrics" (the row of an evaluation, see docs/method.md, with
        its "protocol"; None if there is none).

    Raises:
        FileNotFoundError, ValueError: as for `MultiStudentPipeline.from_pretrained`, or `results` has no such row.
    """
    measured = read_results(results, Path(path))
    pipe = open_to_look(path)
    first = next(iter(pipe.students.values()))
    parameters, total = pipe.count_parameters()
    return {
        "pipeline": path,
        "students": {f"unet_{k}": count for k, count in pipe.student_parameters.items()},
        "family": type(first).__name__,
        "conditions": "prompts" if pipe.takes_prompts else f"{num_classes(first)} classes",
        "timesteps": pipe.timesteps,
        "image_shape": list(pipe.latent_shape()),
        "router": {"class": type(pipe.router).__name__, "parts": describe_parts(pipe.router).splitlines()},
        "parameters": parameters,
        "parameters_total": total,
        "storage_bytes": storage_bytes(path),
        "training": training_record(Path(path)),
        "metrics": {**measured[0], "protocol": measured[1]["protocol"]} if measured else None,
    }


def describe(info: dict) -> str:
    """`pipeline_info` as text for a terminal."""
    disk = f", {info['storage_bytes'] / 1e6:,.1f} MB on disk" if info["storage_bytes"] else ""
    shape = " x ".join(map(str, info["image_shape"]))
    lines = [
        f"{info['pipeline']}: {len(info['students'])} students ({info['family']}) for {info['conditions']}",
        f"  samples     {shape}, in {len(info['timesteps'])} step(s)",
        f"  parameters  {info['parameters']:,} of one call, {info['parameters_total']:,} in all{disk}",
        *(f"    {name}  {count:,}" for name, count in info["students"].items()),
        f"  router      {info['router']['class']}",
        *(f"    {line}" for line in info["router"]["parts"]),
        f"  training    {_describe_training(info['training'])}",
        f"  metrics     {_describe_metrics(info['metrics'])}",
    ]
    return "\n".join(lines)


def _describe_metrics(row: dict | None) -> str:
    if row is None:
        return "no results.json of an evaluation was found; --results names one"
    return (
        ", ".join(f"{title} {row[key]:.4g}" for key, title in METRICS.items() if key in row) + f"; {row['protocol']}"
    )


def _describe_training(record: dict) -> str:
    if not record:
        return "not recorded in this folder"
    parts = [f"{record['steps']:,} iterations, {record['seconds']:,.0f} s over all students"]
    if "flops" in record:
        parts.append(f"{record['flops'] / 1e12:,.1f} TFLOP")
    return ", ".join(parts + record.get("hardware", []))
