# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Model cards: of a pipeline, and of one of its students in a repository of its own."""

import json
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard, ModelCardData

from .adapters import base_of
from .denoiser import sample_shape
from .embedding_routing import EmbeddingRouter
from .routing import ClassRouter, ConditionRouter
from .schedule import NoiseSchedule


# A card with this line is ours to rewrite at the next save; one without it was written by somebody and is kept.
CARD_MARK = "<!-- Written by diffusers_msd at each save. Remove this line to keep your own text. -->"
PICTURE = "samples.png"

PAPER = "[arXiv 2410.23274](https://huggingface.co/papers/2410.23274)"

CARD = """
{mark}
# {title}

{total} {steps}-step students behind one pipeline, distilled from one teacher (multi-student distillation,
{paper}). The router picks the student that serves a {condition},
and that student makes the image in {calls}.
{picture}
## Use

```python
from diffusers_msd import MultiStudentPipeline

pipe = MultiStudentPipeline.from_pretrained("{name}")  # this folder, or its repo id on the Hub
images = pipe({example}, num_images_per_prompt=4).images
```

`MultiStudentPipeline.from_pretrained("{name}", unet_1=None)` leaves student 1 out: it is not even downloaded.
`DiffusionPipeline.from_pretrained` of diffusers loads all of them once `diffusers_msd` is imported.
{alone}

## Students

| student | parameters |
|---|---|
{students}
| total | {parameters:,} |

Parts of the router ({router}):

```
{parts}
```
{details}"""


ALONE = """Each student is also an ordinary model of its own:
`{model_class}.from_pretrained("{name}", subfolder="unet_{first}")`."""

ALONE_LORA = """Students are LoRA adapters on the one network in `unet`. `pipe.fuse_student({first})` gives one as a
network of its own, as does `LoraStudent.from_pretrained("{name}", subfolder="unet_{first}").fuse(unet)`.{stock}"""

STOCK_LORA = """
In a `StableDiffusionPipeline` with this `unet`, an adapter is loaded by
`load_lora_weights("{name}", subfolder="unet_{first}", weight_name="diffusion_pytorch_model.safetensors")`."""

PICTURE_TEXT = """
![Images of each student, a row each]({picture})

A row is a student ({students}), the images in it are of seeds 0, 1, 2, ...
"""

STUDENT_CARD = """
{mark}
# {title}

{kind}: number {k} of {total} {steps}-step students of the teacher {teacher}
(multi-student distillation, {paper}).
It answers its own part of the {conditions}s, which is below, and was not trained for the others.
{picture}
## Use

```python
{snippet}
```
{several}
## Its part

{parameters:,} parameters. Parts of the router ({router}), of which this is number {k}:

```
{parts}
```
{details}"""

# How stock diffusers runs a student, by what it is conditioned on and whether it is an adapter. The one step of a
# pixel network is written out: its numbers follow from the teacher's scheduler.
STEP = """noise = {noise_scale:.9g} * torch.randn(4, {channels}, {height}, {width})
labels = torch.tensor([{label}] * 4)
with torch.no_grad():
    # A tensor: the network would round another number down.
    output = unet({c_in:.9g} * noise, torch.tensor({timestep:.9g}), class_labels=labels).sample
images = {c_skip:.9g} * noise + {c_out:.9g} * output  # [4, {channels}, {height}, {width}], about [-1, 1]"""

PROMPT = """pipe.scheduler = DDIMScheduler.from_config(
    pipe.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
)
images = pipe({prompt}, num_images_per_prompt=4, num_inference_steps=1, guidance_scale=1.0).images"""

SNIPPETS = {
    ("class label", False): """import torch
from diffusers import UNet2DModel

unet = UNet2DModel.from_pretrained("{name}")
{call}""",
    ("class label", True): """import torch
from diffusers import UNet2DModel
from diffusers_msd import LoraStudent

unet = UNet2DModel.from_pretrained("{teacher}", subfolder="unet")
unet = LoraStudent.from_pretrained("{name}").fuse(unet)
{call}""",
    ("prompt", False): """from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

unet = UNet2DConditionModel.from_pretrained("{name}")
pipe = StableDiffusionPipeline.from_pretrained("{teacher}", unet=unet)
{call}""",
    ("prompt", True): """from diffusers import DDIMScheduler, StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("{teacher}")
pipe.load_lora_weights("{name}", weight_name="diffusion_pytorch_model.safetensors")
{call}""",
}


def is_own_card(path: Path) -> bool:
    """Whether the card at `path` may be rewritten: it is absent or has no text, or it was written by us."""
    if not path.exists():
        return True
    text = path.read_text(encoding="utf-8")
    # A repository made on the Hub's pages has a card that holds the licence and no text.
    return CARD_MARK in text or (
        text.startswith("---") and not ModelCard(text, ignore_metadata_errors=True).text.strip()
    )


def model_card(
    pipe: DiffusionPipeline,
    name: str,
    license: str | None = None,
    teacher: str | None = None,
    shown: list[int] | None = None,
    details: str | None = None,
) -> ModelCard:
    """The card of a `MultiStudentPipeline`: how to load it, its students, the parts of its router.

    Args:
        pipe: the pipeline.
        name: what `from_pretrained` shall be given in the usage snippet.
        license: its identifier on the Hub.
        teacher: Hub id of the teacher.
        shown: the students whose images are the rows of the picture `PICTURE` beside the card; None for no picture.
        details: Markdown at the end; by default `pipe.model_card_details`.

    Raises:
        ValueError: the pipeline has no router, scheduler or students.
    """
    counts = pipe.student_parameters
    if pipe.router is None or pipe.scheduler is None or not counts:
        raise ValueError("router, scheduler, unet_0: a pipeline without these cannot be saved")
    first = min(counts)
    model_class = type(pipe.students[first]).__name__
    rows = [f"| `unet_{k}` | {count:,} |" for k, count in counts.items()]
    total, alone = sum(counts.values()), ALONE
    if pipe.unet is not None:
        alone = ALONE_LORA.replace("{stock}", STOCK_LORA if pipe.takes_prompts else "")
        base = base_of(pipe.unet).num_parameters()
        rows, total = [f"| `unet`, for all | {base:,} |", *rows], base + total
    text = CARD.format(
        **_common(pipe, name, shown, pipe.model_card_details if details is None else details),
        calls="a single network call" if _steps(pipe) == "one" else f"at most {len(pipe.timesteps)} network calls",
        example='"a red apple"' if pipe.takes_prompts else f"class_labels=[{example_label(pipe.router, first)}]",
        alone=alone.format(model_class=model_class, name=name, first=first),
        students="\n".join(rows),
        parameters=total,
    )
    return _with_metadata(pipe, text, license=license, base_model=teacher)


def student_card(
    pipe: DiffusionPipeline,
    k: int,
    name: str,
    license: str,
    teacher: str | None,
    teacher_name: str,
    shown: list[int],
    prompt: str | None = None,
    details: str = "",
) -> ModelCard:
    """The card of student k in a repository of its own: whose it is, its part, how stock diffusers runs it.

    Args:
        pipe: its pipeline.
        k: which student.
        name, license, shown, details: as for `model_card`.
        teacher: Hub id of the teacher, which students of prompts and LoRA students are run with; else None is allowed.
        teacher_name: what the teacher is called in the text.
        prompt: one that the student answers, for pipelines that take prompts.
    """
    lora = pipe.unet is not None
    common = _common(pipe, name, shown, details)
    call = PROMPT.format(prompt=json.dumps(prompt, ensure_ascii=False)) if pipe.takes_prompts else _one_step(pipe, k)
    several = f"\nIt was trained for the noise indices {pipe.timesteps}; this is the first of these steps.\n"
    text = STUDENT_CARD.format(
        **common,
        kind="LoRA adapter" if lora else f"`{type(pipe.students[k]).__name__}`",
        k=k,
        conditions=common["condition"],
        teacher=teacher_name,
        snippet=SNIPPETS[common["condition"], lora].format(name=name, teacher=teacher, call=call),
        several="" if _steps(pipe) == "one" else several,
        parameters=pipe.student_parameters[k],
    )
    relation = "adapter" if lora else None
    return _with_metadata(pipe, text, license=license, base_model=teacher, base_model_relation=relation)


def _common(pipe: DiffusionPipeline, name: str, shown: list[int] | None, details: str) -> dict:
    students = ", ".join(map(str, shown or []))
    return {
        "mark": CARD_MARK,
        "title": name.split("/")[-1],
        "name": name,
        "total": pipe.router.num_students,
        "steps": _steps(pipe),
        "paper": PAPER,
        "condition": "prompt" if pipe.takes_prompts else "class label",
        "picture": PICTURE_TEXT.format(picture=PICTURE, students=students) if shown else "",
        "router": type(pipe.router).__name__,
        "parts": describe_parts(pipe.router),
        "details": f"\n{details.strip()}\n" if details else "",
    }


def _with_metadata(pipe: DiffusionPipeline, text: str, **fields) -> ModelCard:
    kind = "text-to-image" if pipe.takes_prompts else "class-conditional"
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image" if pipe.takes_prompts else "unconditional-image-generation",
        tags=["diffusers", "diffusers_msd", "multi-student-distillation", f"{_steps(pipe)}-step", kind],
        **fields,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def _steps(pipe: DiffusionPipeline) -> str:
    return "one" if len(pipe.timesteps) == 1 else "few"


def _one_step(pipe: DiffusionPipeline, k: int) -> str:
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    c_in, c_skip, c_out = (
        c.item() for c in schedule.coefficients(schedule.last, torch.zeros((), dtype=torch.float64))
    )
    channels, height, width = sample_shape(pipe.students[k])
    return STEP.format(
        noise_scale=schedule.noise_scale,
        timestep=schedule.timestep(schedule.last).item(),
        **{"channels": channels, "height": height, "width": width, "label": example_label(pipe.router, k)},
        **{"c_in": c_in, "c_skip": c_skip, "c_out": c_out},
    )


def example_label(router: ConditionRouter, k: int) -> int:
    """A class label that student k answers."""
    return int(router.classes(k)[0]) if isinstance(router, ClassRouter) else 0


def describe_parts(router: ConditionRouter) -> str:
    """The parts of a router in words, a line each."""
    if isinstance(router, ClassRouter):
        return router.report()
    if not isinstance(router, EmbeddingRouter):
        return f"{router.num_students} students"
    sizes = [f"student {k}: {size:,} prompts" for k, size in enumerate(router.part_sizes)]
    kind = f"{router.config.kind}, imbalance (largest part over mean part) {router.imbalance:.3f}"
    return "\n".join([kind, *sizes])
