# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""A replica of one student: it has that student alone, and makes the images of several requests in one call."""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from ray import serve
from ray.serve.metrics import Counter, Histogram

from .image_requests import generators_of
from .pipeline_inputs import SLOTS
from .pipeline_msd import MultiStudentPipeline
from .serve_config import DTYPES, ServeConfig
from .serve_http import png


@dataclass(frozen=True)
class Job:
    """Images of one request.

    Args:
        condition: a class label, or the embedding of a prompt [1, L, D].
        seeds: of each image.
    """

    condition: int | torch.Tensor
    seeds: list[int]


class StudentReplica:
    """One student of a saved pipeline, with what it shares with the others (VAE, or the base of LoRA students).

    Args:
        path: the saved pipeline.
        k: the student.
        others: the students that are left out.
        config: how it is served.
    """

    def __init__(self, path: str, k: int, others: list[int], config: ServeConfig):
        self.pipe, self.k = load_student(path, others, config), k
        self.max_batch_size = config.max_batch_size
        self.answer.set_max_batch_size(config.max_batch_size)
        self.answer.set_batch_wait_timeout_s(config.batch_wait)
        self.images = Counter("diffusers_msd_images", "Images made.")
        self.per_call = Histogram(
            "diffusers_msd_images_per_call", "Images that the network makes at once.", [1, 2, 4, 8, 16, 32, 64]
        )

    @serve.batch
    async def answer(self, jobs: list[Job]) -> list[tuple[list[bytes], float, int]]:
        """Of each job its PNG files, the seconds of the call that made them, and how many images were made in it."""
        # In a thread, so that meanwhile the next requests are taken, and the replica says that it is alive.
        return [answer for group in groups(jobs, self.max_batch_size) for answer in await self._in_thread(group)]

    async def _in_thread(self, jobs: list[Job]) -> list[tuple[list[bytes], float, int]]:
        answers = await asyncio.to_thread(self.make, jobs)
        count = sum(len(pngs) for pngs, _, _ in answers)
        self.images.inc(count)
        self.per_call.observe(count)
        return answers

    def make(self, jobs: list[Job]) -> list[tuple[list[bytes], float, int]]:
        """As `answer`, in one call of the network."""
        start = time.perf_counter()
        images = iter(self.pipe(student=self.k, **arguments(jobs)).images)
        seconds = time.perf_counter() - start
        count = sum(len(job.seeds) for job in jobs)
        return [([png(next(images)) for _ in job.seeds], seconds, count) for job in jobs]


def load_student(path: str, others: list[int], config: ServeConfig) -> MultiStudentPipeline:
    """The pipeline without other students and without what reads prompts; arguments as for `StudentReplica`."""
    left_out = ["text_encoder", "tokenizer", *(SLOTS[j] for j in others)]
    pipe = MultiStudentPipeline.from_pretrained(path, dtype=DTYPES[config.dtype], **dict.fromkeys(left_out))
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda" if config.num_gpus else "cpu")


def groups(jobs: list[Job], most: int) -> Iterator[list[Job]]:
    """Jobs in their order, as many at once as have at most `most` images; one that has more comes alone."""
    group, count = [], 0
    for job in jobs:
        if group and count + len(job.seeds) > most:
            yield group
            group, count = [], 0
        group.append(job)
        count += len(job.seeds)
    yield group


def arguments(jobs: list[Job]) -> dict:
    """What the pipeline is called with, one entry per image: its condition, and a generator of its own."""
    generators = generators_of(seed for job in jobs for seed in job.seeds)
    conditions = [job.condition for job in jobs for _ in job.seeds]
    if isinstance(conditions[0], torch.Tensor):
        return {"prompt_embeds": torch.cat(conditions), "generator": generators}
    return {"class_labels": conditions, "generator": generators}
