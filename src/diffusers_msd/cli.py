# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""The command `diffusers-msd`: each subcommand reads its arguments and calls a public function.

Exit status: 0 done, 2 bad input or a file that is not there (one line on stderr), 130 interrupted.
"""

import argparse
import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import torch
from transformers import HfArgumentParser

from . import __version__, publishing
from .config import run_script
from .files import check_writable
from .grids import save_grid
from .image_requests import Accepted, condition_arguments, make_images
from .pipeline_info import describe, pipeline_info
from .pipeline_msd import MultiStudentPipeline
from .serve_config import DTYPES, ServeConfig


# Where the scripts lie in a clone that was installed with `pip install -e`.
SCRIPTS = Path(__file__).parents[2] / "training_scripts"


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """Instead of argparse's lines of usage."""
        raise ValueError(f"{message}; `{self.prog} --help` lists the arguments")


def open_pipeline(arguments: argparse.Namespace) -> MultiStudentPipeline:
    """The pipeline that the arguments of `add_pipeline` name, without progress bars."""
    dtype = DTYPES[arguments.dtype]
    pipe = MultiStudentPipeline.from_pretrained(arguments.pipeline, dtype=dtype).to(arguments.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def read_words(pipe: MultiStudentPipeline, texts: list[str]) -> list[dict]:
    """Command-line words as the field `prompt` or `class_label` of requests; `Accepted` checks their values."""
    if pipe.takes_prompts:
        return [{"prompt": text} for text in texts]
    if bad := [text for text in texts if not (text.isascii() and text.isdigit() and len(text) < 20)]:
        raise ValueError(f"conditions: this pipeline goes by class labels, whole numbers, got {bad[0][:40]!r}")
    return [{"class_label": int(text)} for text in texts]


def generate(arguments: argparse.Namespace):
    """Makes images of each condition; --output x.png is one picture with a row for each, a folder gets single files."""
    output = Path(arguments.output)
    as_grid = output.suffix.lower() == ".png"
    folder = check_writable(output.parent if as_grid else output, "output")
    pipe = open_pipeline(arguments)
    accepted = Accepted.by(pipe, max_images=10_000)
    shared = {"seed": arguments.seed, "num_images": arguments.num_images, "student": arguments.student}
    requests = [accepted.read(**words, **shared) for words in read_words(pipe, arguments.conditions)]
    outputs = [make_images(pipe, request, "pt" if as_grid else "pil") for request in requests]
    if as_grid:
        save_grid(torch.cat([made.images for made in outputs]).mul(2).sub(1), arguments.num_images, output)
        print(output)
        return
    for row, (request, made) in enumerate(zip(requests, outputs)):
        for seed, student, image in zip(request.seeds, made.student_indices, made.images):
            # No word of the prompt: it could be a path.
            path = folder / f"{row:03d}_seed_{seed}_student_{student}.png"
            image.save(path)
            print(path)


def route(arguments: argparse.Namespace):
    """Says which student answers each condition, and how far the next one is (the margin)."""
    pipe = open_pipeline(arguments)
    accepted = Accepted.by(pipe)
    conditions = [accepted.condition(**words) for words in read_words(pipe, arguments.conditions)]
    asked = condition_arguments(pipe, conditions)
    rows = list(zip(conditions, pipe.route(**asked), pipe.margins(**asked)))
    if arguments.json:
        # JSON knows no infinity.
        names = ("condition", "student", "margin")
        print(json.dumps([dict(zip(names, (*row[:2], row[2] if math.isfinite(row[2]) else None))) for row in rows]))
        return
    print("student    margin  condition")
    for condition, student, margin in rows:
        print(f"{student:7d}  {margin if math.isfinite(margin) else '-':>8.4}  {condition}")


def info(arguments: argparse.Namespace):
    """Shows students, sizes, the router's parts, what training cost, and metrics."""
    found = pipeline_info(arguments.pipeline, arguments.results)
    print(json.dumps(found, indent=2) if arguments.json else describe(found))


def push(arguments: argparse.Namespace):
    """Publishes a saved pipeline, or one student, on the Hub, with a card of what the run recorded."""
    shared = ("license", "student", "private", "results", "prompts", "teacher")
    given = {name: vars(arguments)[name] for name in shared}
    print(publishing.push(arguments.pipeline, arguments.repo_id, **given).commit_url)


def demo(arguments: argparse.Namespace):
    """Opens a page in the browser: images, who made them, the map of all parts. Needs the extra `demo`."""
    # Gradio is an extra.
    from . import app
    from .many_steps import ManyStepTeacher

    arguments.pipeline = arguments.pipeline or app.quickstart_pipeline()
    prompts = None if arguments.prompts is None else app.read_prompts(arguments.prompts)
    pipe = open_pipeline(arguments)
    teacher = None
    if arguments.teacher is not None:
        teacher = ManyStepTeacher(arguments.teacher, pipe, arguments.num_inference_steps, arguments.guidance_scale)
    app.launch(pipe, prompts, teacher, host=arguments.host, port=arguments.port, share=arguments.share)


def serve(arguments: argparse.Namespace):
    """Serves a pipeline over HTTP with Ray, each student with replicas of its own. Needs the extra `serve`."""
    try:
        from .serve import run
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{error.name}: serving needs the extra serve: pip install 'diffusers_msd[serve]'"
        ) from error
    config = ServeConfig(**{field.name: vars(arguments)[field.name] for field in dataclasses.fields(ServeConfig)})
    run(arguments.pipeline, config, arguments.host, arguments.port, arguments.address, arguments.metrics_port)


def quickstart(arguments: argparse.Namespace):
    """Distils the shipped teacher of digits in minutes; needs a clone of the repository."""
    script = SCRIPTS / "quickstart.py"
    if not script.is_file():
        raise FileNotFoundError(
            "quickstart: the training scripts are not in the installed package; clone the repository, and there "
            "`pip install -e '.[training]'`"
        )
    sys.exit(subprocess.run([sys.executable, str(script), "--output_dir", arguments.output_dir]).returncode)


def add_pipeline(parser: argparse.ArgumentParser, **kwargs):
    """Adds the arguments of a command that opens a pipeline; `kwargs` are those of its name."""
    parser.add_argument("pipeline", help="folder or Hub id of a MultiStudentPipeline", **kwargs)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="of the networks (default: %(default)s)")
    parser.add_argument(
        "--dtype", default="float32", choices=list(DTYPES), help="of the networks (default: %(default)s)"
    )


def build_parser() -> Parser:
    """The parser of all commands; each names its function as `run`."""
    parser = Parser(
        "diffusers-msd", description="One-step students of a diffusion teacher: generate, look, publish, serve."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command", title="commands")

    def add(function, **kwargs) -> argparse.ArgumentParser:
        lines = function.__doc__.splitlines()
        command = commands.add_parser(function.__name__, help=lines[0], description=function.__doc__, **kwargs)
        command.set_defaults(run=function)
        return command

    command = add(quickstart)
    command.add_argument(
        "--output_dir", default="runs/quickstart", help="folder of all it makes (default: %(default)s)"
    )

    command = add(generate)
    add_pipeline(command)
    command.add_argument("conditions", nargs="+", help="prompts, or class labels")
    command.add_argument("--seed", type=int, default=0, help="of the first image of each condition (default: 0)")
    command.add_argument(
        "--num_images", type=int, default=1, help="of each condition, from consecutive seeds (default: 1)"
    )
    command.add_argument("--student", type=int, help="that makes them all, whatever the router says")
    command.add_argument("--output", default="images", help="a folder, or a .png for one grid (default: %(default)s)")

    command = add(route)
    add_pipeline(command)
    command.add_argument("conditions", nargs="+", help="prompts, or class labels")
    command.add_argument("--json", action="store_true", help="print JSON")

    command = add(info)
    command.add_argument("pipeline", help="folder or Hub id of a MultiStudentPipeline")
    found = "default: results.json in the folder, in its results/ or in results/ beside it"
    command.add_argument("--results", help=f"results.json of an evaluation, for the metrics ({found})")
    command.add_argument("--json", action="store_true", help="print JSON")

    command = add(push)
    command.add_argument("pipeline", help="folder of a saved MultiStudentPipeline")
    command.add_argument("repo_id", help="where to: owner/name")
    command.add_argument("--license", help="identifier of the Hub, such as apache-2.0; needed")
    command.add_argument("--student", type=int, help="this one alone, as a model of stock diffusers")
    command.add_argument("--private", action="store_true", default=None, help="if the repository is new")
    command.add_argument("--results", help=f"results.json of an evaluation, for the card ({found})")
    command.add_argument("--prompts", nargs="+", help="shown in the card's picture, for pipelines that take prompts")
    command.add_argument("--teacher", help="its Hub id, for the card")

    command = add(demo)
    add_pipeline(command, nargs="?")
    command.add_argument("--prompts", help="text file with a prompt a line, for the map and as examples")
    command.add_argument("--teacher", help="folder or Hub id of the teacher, to compare with")
    command.add_argument(
        "--num_inference_steps", type=int, help="of the teacher (default: 18 for classes, 20 for prompts)"
    )
    command.add_argument("--guidance_scale", type=float, help="of the teacher, for prompts alone (default: 2)")
    command.add_argument("--host", help="address to listen at (default: 127.0.0.1, this machine alone)")
    command.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    command.add_argument("--share", action="store_true", help="make a public link, over Gradio's servers")

    command = add(serve, parents=[HfArgumentParser(ServeConfig, add_help=False)])
    command.add_argument("pipeline", help="folder or Hub id of a MultiStudentPipeline")
    command.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    command.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    command.add_argument("--address", default="local", help="of a Ray cluster, or auto; local starts Ray here")
    command.add_argument("--metrics_port", type=int, help="of Prometheus metrics, for a Ray that is started here")
    return parser


def main(argv: list[str] | None = None):
    """Runs `diffusers-msd` with the given arguments, `sys.argv[1:]` if None."""

    def run():
        arguments = build_parser().parse_args(argv)
        arguments.run(arguments)

    run_script(run)


if __name__ == "__main__":
    main()
