# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""The teacher beside its students: the same requests and noise, in many steps."""

import math

import torch
from PIL import Image

from .denoiser import denoiser_for
from .image_requests import ImageRequest, condition_arguments, whole
from .pipeline_inputs import check_student
from .pipeline_msd import MultiStudentPipeline
from .prompts import embed_prompts
from .sampling import SAMPLERS
from .schedule import NoiseSchedule
from .teachers import load_teacher


class ManyStepTeacher:
    """A teacher that is asked as the pipeline of its students is.

    Text encoder, VAE and safety checker are the pipeline's, which has them from the teacher.

    Args:
        path: folder or Hub id of the teacher, with `unet/` and `scheduler/`.
        pipe: its students, on the device that the teacher shall run on too.
        num_inference_steps: of Heun's method for classes (None is 18, which are 35 network calls), of DPM-Solver++ for
            prompts (None is 20).
        guidance_scale: of classifier-free guidance, for prompts alone (None is 2); 1 is off.

    Raises:
        FileNotFoundError, TypeError, ValueError: there is no teacher, it is none of these students,
            `num_inference_steps` is below 1, or `guidance_scale` is no finite number or is given for classes.
    """

    def __init__(
        self,
        path: str,
        pipe: MultiStudentPipeline,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ):
        sampler, steps, null_cond = ("dpm", 20, None) if pipe.takes_prompts else ("heun", 18, None)
        if num_inference_steps is not None:
            steps = whole("num_inference_steps", num_inference_steps, 1)
        if guidance_scale is not None and not pipe.takes_prompts:
            raise ValueError("guidance_scale: it is for prompts, this pipeline goes by class labels")
        if guidance_scale is not None and not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale: a finite number expected, got {guidance_scale}")
        model, scheduler = load_teacher(path, "teacher")
        check_student("teacher", model, next(iter(pipe.students.values())))
        if pipe.takes_prompts:
            null_cond = embed_prompts(pipe.tokenizer, pipe.text_encoder, [""])[0][0]
        self.pipe, self.sampler, self.num_inference_steps = pipe, sampler, steps
        self.guidance_scale = 2.0 if guidance_scale is None and pipe.takes_prompts else guidance_scale
        schedule = NoiseSchedule.from_scheduler(scheduler)
        self.denoiser = denoiser_for(model.to(pipe.device), schedule, null_cond=null_cond)

    @torch.no_grad()
    def make_images(self, request: ImageRequest) -> list[Image.Image]:
        """The images of a request, whose student is not looked at; each from the noise that its student starts from."""
        pipe = self.pipe
        condition, _ = pipe.encode_condition(**condition_arguments(pipe, [request.condition] * request.num_images))
        noise = pipe.prepare_latents((request.num_images, *pipe.latent_shape()), request.generators)
        samples = SAMPLERS[self.sampler](
            self.denoiser, noise, condition.to(noise.device), self.num_inference_steps, self.guidance_scale
        )
        return pipe.to_images(samples, "pil")[0]
