# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""What a person asks of a pipeline, read alike at every door: command line, demo, server.

The pipeline checks what it is called with. A door has less trust: amounts are bounded, text is short, numbers are
whole, and every refusal is one line that begins with the name of the field.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from .denoiser import num_classes
from .pipeline_msd import MultiStudentPipeline
from .prompts import check_prompts


# Whole numbers up to here survive JSON and a browser.
MAX_SEED = 2**53 - 1


def generators_of(seeds: Iterable[int]) -> list[torch.Generator]:
    """One per seed, fresh; on the CPU, so a seed gives the same noise on every device."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@dataclass(frozen=True)
class ImageRequest:
    """Images of one condition; image i is made from seed + i, whatever else is made with it.

    Args:
        condition: a prompt, or a class label.
        seed: of the first image.
        num_images: how many.
        student: that shall make them; None leaves it to the router.
    """

    condition: str | int
    seed: int = 0
    num_images: int = 1
    student: int | None = None

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.num_images)

    @property
    def generators(self) -> list[torch.Generator]:
        """One per image, see `generators_of`."""
        return generators_of(self.seeds)


@dataclass(frozen=True)
class Accepted:
    """What may be asked for.

    Args:
        num_classes: labels are in [0, num_classes); None for a pipeline that takes prompts.
        students: that can be named.
        max_images: of one request.
        max_prompt_length: in characters.
    """

    num_classes: int | None
    students: tuple[int, ...]
    max_images: int = 16
    max_prompt_length: int = 1000

    @classmethod
    def by(cls, pipe: MultiStudentPipeline, **limits) -> "Accepted":
        """What a pipeline takes, with other limits than the usual if given."""
        labels = None if pipe.takes_prompts else num_classes(next(iter(pipe.students.values())))
        return cls(labels, tuple(pipe.students), **limits)

    def read(self, prompt=None, class_label=None, seed=0, num_images=1, student=None) -> ImageRequest:
        """Checks the fields of a request; their types are anybody's, as JSON or a form gives them.

        Raises:
            TypeError, ValueError: a field has another type than expected, or is out of its range.
        """
        condition = self.condition(prompt, class_label)
        num_images = whole("num_images", num_images, 1, self.max_images)
        # The last image's seed, too.
        seed = whole("seed", seed, 0, MAX_SEED + 1 - num_images)
        if student is not None and whole("student", student, 0) not in self.students:
            raise ValueError(f"student: one of {', '.join(map(str, self.students))} expected, got {student}")
        return ImageRequest(condition, seed, num_images, student)

    def condition(self, prompt=None, class_label=None) -> str | int:
        """The one of both that the pipeline takes; errors as for `read`."""
        wanted, other = ("class_label", "prompt") if self.num_classes is not None else ("prompt", "class_label")
        fields = {"prompt": prompt, "class_label": class_label}
        if fields[other] is not None:
            raise ValueError(f"{other}: this pipeline goes by {wanted}")
        if fields[wanted] is None:
            raise ValueError(f"{wanted}: it is missing")
        if self.num_classes is not None:
            return whole("class_label", class_label, 0, self.num_classes - 1)
        if not isinstance(prompt, str):
            raise TypeError(f"prompt: text expected, got {type(prompt).__name__}")
        if len(prompt) > self.max_prompt_length:
            raise ValueError(f"prompt: at most {self.max_prompt_length} characters expected, got {len(prompt)}")
        return check_prompts(prompt)[0]


def whole(name: str, value, least: int, most: int | None = None) -> int:
    """`value` if it is a whole number in [least, most].

    Raises:
        TypeError, ValueError: beginning with `name`.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: a whole number expected, got {type(value).__name__}")
    if value < least or (most is not None and value > most):
        # Not the number itself: it may have a million digits.
        raise ValueError(f"{name}: a whole number " + (f">= {least}" if most is None else f"in [{least}, {most}]"))
    return value


def condition_arguments(pipe: MultiStudentPipeline, conditions: list) -> dict[str, list]:
    """Conditions as `pipe`, `pipe.route` and `pipe.margins` take them."""
    return {"prompt" if pipe.takes_prompts else "class_labels": conditions}


def make_images(pipe: MultiStudentPipeline, request: ImageRequest, output_type: str = "pil"):
    """Makes the images of a request.

    Returns:
        The `MultiStudentPipelineOutput` of `request.num_images` images.

    Raises:
        ValueError: the condition's student was left out of the pipeline.
    """
    return pipe(
        **condition_arguments(pipe, [request.condition]),
        num_images_per_prompt=request.num_images,
        generator=request.generators,
        student=request.student,
        output_type=output_type,
    )
