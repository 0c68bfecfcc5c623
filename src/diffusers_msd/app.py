# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""A Gradio page for any pipeline: images, the student that made them, the map of all parts. Needs the extra `demo`."""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from .image_requests import Accepted, ImageRequest, condition_arguments, make_images
from .many_steps import ManyStepTeacher
from .pipeline_msd import MultiStudentPipeline
from .prompts import check_prompts
from .routing_map import RoutingMap


try:
    import gradio as gr
except ImportError as error:
    raise ImportError("gradio: the demo needs the extra demo: pip install 'diffusers_msd[demo]'") from error


# Where the quickstart leaves its two students.
QUICKSTART = Path("runs/quickstart/K2")
# What the map shows, and the page offers, when no prompts are given.
EXAMPLES = [
    *("a red apple", "a cat", "a sailing boat", "a smiling face", "a mountain at night", "a bowl of soup"),
    *("a bicycle", "a yellow flower", "an old castle", "a robot", "a green tree", "a portrait of a woman"),
    *("a dog on a beach", "a city street in the rain", "a rocket", "a wooden chair", "a glass of water", "a horse"),
    *("a birthday cake", "a red car", "a snowy forest", "a blue bird", "a guitar", "a man with a hat"),
]
MAX_PROMPTS = 1000
# Requests that may wait; who comes later is told so.
MAX_WAITING = 32
# Images up to so many pixels a side are shown enlarged, with sharp pixels.
SMALL = 64
# What the choices of the page are called inside; students are called by their numbers.
ROUTER, NOTHING, TEACHER = "router", "nothing", "teacher"
# Up to four images a row, below the label and as high as they are; their captions are for screen readers and previews.
CSS = """
.pixels img { image-rendering: pixelated; }
.samples .grid-wrap { height: auto; min-height: 0; }
.samples .grid-container { padding-top: 28px; grid-template-columns: repeat(auto-fill, minmax(max(64px, 20%), 1fr)); }
.samples .caption-label { display: none; }
"""


def quickstart_pipeline() -> str:
    """The folder of the quickstart's pipeline of two students.

    Raises:
        FileNotFoundError: it was not made yet.
    """
    if not (QUICKSTART / "model_index.json").is_file():
        raise FileNotFoundError(
            f"pipeline: there is none in {QUICKSTART}; make it with `diffusers-msd quickstart`, or give the folder or "
            "Hub id of one"
        )
    return str(QUICKSTART)


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a text file, one a line; blank lines are left out.

    Raises:
        FileNotFoundError, ValueError: there is no such file, it is no UTF-8, or has less than 2 or more than 1000.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise FileNotFoundError(f"prompts: {path} cannot be read ({error.strerror}); a text file expected") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts: {path} is no text in UTF-8 ({error.reason})") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not 2 <= len(prompts) <= MAX_PROMPTS:
        raise ValueError(f"prompts: 2 to {MAX_PROMPTS} lines expected, {path} has {len(prompts)}")
    return check_prompts(prompts)


@contextmanager
def errors_as_messages():
    """Shows what is wrong with a request on the page."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise gr.Error(" ".join(str(error).split()), print_exception=False) from error


@dataclass(frozen=True)
class Timed:
    """Images, who made them, and how long each took in seconds."""

    maker: str
    images: list
    seconds: float

    @classmethod
    def run(cls, maker: str, make: Callable[[ImageRequest], list], request: ImageRequest) -> "Timed":
        """Makes the images of a request and takes the time."""
        began = time.perf_counter()
        images = make(request)
        return cls(maker, images, (time.perf_counter() - began) / len(images))


class Desk:
    """Answers what is asked on the page.

    Args:
        pipe: the students.
        accepted: the limits of a request.
        routing_map: of the pipeline.
        teacher: what can be compared with, besides students.
    """

    def __init__(
        self,
        pipe: MultiStudentPipeline,
        accepted: Accepted,
        routing_map: RoutingMap,
        teacher: ManyStepTeacher | None = None,
    ):
        self.pipe, self.accepted, self.map, self.teacher = pipe, accepted, routing_map, teacher

    def answer(self, condition, seed, num_images, student, compare) -> Iterator[tuple]:
        """What the page shows: text, images, images to compare with, map; the images to compare with come later.

        Args:
            condition: prompt or class label.
            seed, num_images: as of `ImageRequest`.
            student: number of the student that shall answer, or `ROUTER`.
            compare: number of a student, `TEACHER` or `NOTHING`.

        Raises:
            gr.Error: what is wrong with these, in one line.
        """
        with errors_as_messages():
            name = "prompt" if self.pipe.takes_prompts else "class_label"
            forced = None if student == ROUTER else student
            request = self.accepted.read(**{name: condition}, seed=seed, num_images=num_images, student=forced)
            answered, text = self.describe(request)
            made = [Timed.run(f"student {answered}", self.students_images, request)]
            figure = self.map.draw(request.condition)
            yield f"{text}\n\n{times(made)}", show(made[0], request), gr.Gallery(visible=False), figure
            if compare != NOTHING:
                made.append(self.compared(request, compare))
                yield f"{text}\n\n{times(made)}", gr.skip(), show(made[1], request), gr.skip()

    def describe(self, request: ImageRequest) -> tuple[int, str]:
        """Who answers a request; that, and how close the next one was, in words."""
        asked = condition_arguments(self.pipe, [request.condition])
        (chosen,), (margin,) = self.pipe.route(**asked), self.pipe.margins(**asked)
        if request.student is not None:
            return request.student, f"**Student {request.student}** was asked for. The router takes student {chosen}."
        text = f"**Student {chosen}** answered."
        if math.isinf(margin):
            return chosen, f"{text} A table of classes has no cuts, nor has one student alone: nobody was second."
        median = statistics.median(self.map.margins)
        return chosen, f"{text} The nearest cut to another one is {margin:.3g} away (median on the map: {median:.3g})."

    def students_images(self, request: ImageRequest) -> list:
        """Those of the student that answers, or was asked for."""
        return make_images(self.pipe, request).images

    def compared(self, request: ImageRequest, compare: str | int) -> Timed:
        """The same request to the teacher, or to another student."""
        if compare == TEACHER:
            return Timed.run(f"teacher, {self.teacher.num_inference_steps} steps", self.teacher.make_images, request)
        return Timed.run(f"student {compare}", self.students_images, replace(request, student=compare))


def show(made: Timed, request: ImageRequest) -> gr.Gallery:
    """Images in a gallery that bears their maker's name."""
    named = [(image, f"seed {seed}") for seed, image in zip(request.seeds, made.images)]
    return gr.Gallery(named, label=made.maker, visible=True)


def times(made: list[Timed]) -> str:
    """Seconds per image, as a Markdown table."""
    rows = "\n".join(f"| {m.maker} | {1000 * m.seconds:,.0f} ms |" for m in made)
    return f"| made by | time per image |\n|---|---|\n{rows}"


def choice(choices: list, label: str) -> gr.Component:
    """One of several, the first at the start."""
    # A list that is left with the Tab key stays open over what is below, so it is for many choices only.
    field, value = gr.Radio if len(choices) <= 20 else gr.Dropdown, choices[0]
    return field(choices, value=value[1] if isinstance(value, tuple) else value, label=label)


def condition_input(pipe: MultiStudentPipeline, routing_map: RoutingMap) -> gr.Component:
    """A text field with examples, or the classes to choose from."""
    if not pipe.takes_prompts:
        return choice(routing_map.conditions, "Class")
    field = gr.Textbox(routing_map.conditions[0], label="Prompt", max_lines=1, autofocus=True)
    gr.Examples(routing_map.conditions[:6], field, label="For example")
    return field


def build_demo(
    pipe: MultiStudentPipeline,
    prompts: list[str] | None = None,
    teacher: ManyStepTeacher | None = None,
    max_images: int = 16,
) -> gr.Blocks:
    """The page of a pipeline, with a bounded queue: one request at a time, 32 may wait.

    Args:
        pipe: with a router, on the device where it shall run.
        prompts: two or more for the map, the first of them offered as examples; None: `EXAMPLES`, or all classes.
        teacher: offered for comparison.
        max_images: of a request.

    Returns:
        The Blocks, not launched; `launch` gives them their style.

    Raises:
        TypeError, ValueError: there is no router, or `prompts` are not for this pipeline.
    """
    accepted = Accepted.by(pipe, max_images=max_images)
    routing_map = RoutingMap(pipe, EXAMPLES if prompts is None and pipe.takes_prompts else prompts)
    desk = Desk(pipe, accepted, routing_map, teacher)
    title = Path(pipe.name_or_path or "Students").name
    students = [(f"student {k}", k) for k in accepted.students]
    others = [] if teacher is None else [("teacher", TEACHER)]
    small = max(pipe.latent_shape()[1:]) * pipe.vae_scale_factor <= SMALL
    style = {"elem_classes": ["samples", "pixels"] if small else ["samples"], "object_fit": "contain"}
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
        gr.Markdown(f"# {title}\n{len(students)} one-step students of one teacher; the router picks who answers.")
        with gr.Row():
            with gr.Column(min_width=320):
                condition = condition_input(pipe, routing_map)
                with gr.Row():
                    seed = gr.Number(0, label="Seed of the first image", min_width=120)
                    count = gr.Slider(1, max_images, min(4, max_images), step=1, label="Images", min_width=120)
                student = choice([("automatic", ROUTER), *students], "Student")
                compare = choice([("nothing", NOTHING), *others, *students], "Compare with")
                button = gr.Button("Make images", variant="primary")
                text = gr.Markdown()
            with gr.Column(min_width=320):
                gallery = gr.Gallery(label="Images", elem_id="images", format="png", **style)
                second = gr.Gallery(label="Compared with", elem_id="compared", visible=False, format="png", **style)
                plot = gr.Plot(routing_map.draw(), show_label=False, format="png")
        entered = [seed.submit, *([condition.submit] if pipe.takes_prompts else [])]
        gr.on(
            [button.click, *entered],
            desk.answer,
            inputs=[condition, seed, count, student, compare],
            outputs=[text, gallery, second, plot],
            api_name="generate",
        )
    return demo.queue(api_open=False, max_size=MAX_WAITING, default_concurrency_limit=1)


def launch(
    pipe: MultiStudentPipeline,
    prompts: list[str] | None = None,
    teacher: ManyStepTeacher | None = None,
    max_images: int = 16,
    host: str | None = None,
    port: int | None = None,
    share: bool = False,
    block: bool = True,
) -> gr.Blocks:
    """Shows the page of a pipeline in a browser until it is interrupted.

    Args:
        pipe, prompts, teacher, max_images: as for `build_demo`.
        host: address to listen at; None: GRADIO_SERVER_NAME, else 127.0.0.1, this machine alone.
        port: None: GRADIO_SERVER_PORT, else the first free one from 7860 on.
        share: make a public link, over Gradio's servers.
        block: False comes back at once, the page runs until `close` of what is returned.

    Returns:
        The running Blocks; `local_url` is where.
    """
    demo = build_demo(pipe, prompts, teacher, max_images)
    # The page takes no files, but Gradio's server does.
    demo.launch(
        server_name=host, server_port=port, share=share, css=CSS, prevent_thread_lock=not block, max_file_size=1
    )
    return demo
