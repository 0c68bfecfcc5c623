# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""K students behind one diffusers pipeline, for class labels or prompts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import PIL.Image
import torch
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel, UNet2DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from diffusers.utils import BaseOutput, logging
from diffusers.utils.torch_utils import randn_tensor
from transformers import CLIPTextModel

from . import pipeline_inputs as inputs
from .adapters import adapter_of_each_row, attach
from .denoiser import denoiser_for, num_classes, sample_shape
from .prompts import check_prompts, embed_prompts, pool_embeddings
from .routing import ConditionRouter
from .schedule import NoiseSchedule
from .student_slots import SLOTS, Student, StudentSlots, with_student_slots
from .teachers import decode_latents


logger = logging.get_logger(__name__)


@dataclass
class MultiStudentPipelineOutput(BaseOutput):
    """What `MultiStudentPipeline` returns.

    Args:
        images: by `output_type`: list of B PIL images ("pil"); float32 array [B, H, W, C] in [0, 1] ("np"); float32
            tensor [B, C, H, W] in [0, 1] ("pt"); float32 tensor as the students made it, not clamped ("latent").
        student_indices: which student made each image, B integers.
        nsfw_content_detected: whether the safety checker objected to each image, B booleans; None without one.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    student_indices: list[int]
    nsfw_content_detected: list[bool] | None = None


class MultiStudentPipeline(StudentSlots):
    r"""Image generation in one network call, or a few, by the student that knows the condition.

    Multi-student distillation (arXiv 2410.23274): the router splits the conditions into K parts, and student k serves
    part k. A batch is grouped by student: each used student runs once per step, an unused one never. The students
    decide what a condition is: a class label for `UNet2DModel`, a prompt for `UNet2DConditionModel`.

    Students are ordinary diffusers models in folders `unet_0 ... unet_{K-1}`: `from_pretrained(path, unet_1=None)`
    leaves one out, `UNet2DModel.from_pretrained(path, subfolder="unet_1")` loads one alone, `add_student` puts one in.
    Text set as `model_card_details` becomes part of the model card at the next save.

    Args:
        scheduler: the teacher's scheduler; it says how the students are preconditioned and what noise they start from.
        router: says which student serves a condition; `router.num_students` is K. Prompts are routed by an
            `EmbeddingRouter`, or a router of your own that takes `embeddings` (pooled by its setting `pooling`, or "mean").
        vae: decodes latents to images; None for students that work on pixels.
        text_encoder, tokenizer: the teacher's, for prompts. Not needed for labels, nor for `prompt_embeds`.
        safety_checker, feature_extractor: those of Stable Diffusion; images it objects to come out black.
        student_timesteps: {"timesteps": [...]}, the noise indices at which students trained for several steps run,
            from pure noise down, such as [999, 749, 499, 249] (DMD2, arXiv 2405.14867); None for one step. (A dict,
            because diffusers takes a list in `model_index.json` for a component.)
        unet: the one network of LoRA students, the teacher as it was when they were trained; None for full students.
        unet_0 ... unet_63: the students: networks, or with a `unet` each a `LoraStudent`, and a batch for several of
            them then runs in one forward. Those below K are to be given; give None for one that is left out.

    Raises:
        TypeError: an argument is not one of the above, or the students are not of one family.
        ValueError: the router has more parts than there are students or fewer, goes by another kind of condition or
            was fitted with another text encoder; two students differ in channels, size, number of classes or width of
            the prompt embeddings, or do not fit the VAE or text encoder; or the timesteps do not fall from pure noise.
    """

    model_cpu_offload_seq = "->".join(["text_encoder", "unet", *SLOTS, "vae"])
    _exclude_from_cpu_offload = ["safety_checker"]
    _optional_components = [
        *("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor", "unet"),
        *SLOTS[1:],
    ]
    _callback_tensor_inputs = ["latents"]

    @with_student_slots
    def __init__(
        self,
        scheduler: SchedulerMixin,
        router: ConditionRouter,
        vae: AutoencoderKL | None = None,
        text_encoder: CLIPTextModel | None = None,
        tokenizer=None,
        safety_checker: StableDiffusionSafetyChecker | None = None,
        feature_extractor=None,
        student_timesteps: dict | None = None,
        unet: UNet2DModel | UNet2DConditionModel | None = None,
        **students: Student | None,
    ):
        super().__init__()
        unknown = sorted(set(students) - set(SLOTS))
        if unknown:
            raise TypeError(f"{unknown[0]}: not a component; students are named unet_0 ... {SLOTS[-1]}")
        given = {k: students[slot] for k, slot in enumerate(SLOTS) if students.get(slot) is not None}
        networks = inputs.networks_of(given, unet)
        inputs.check_students(networks, router, vae, text_encoder)
        if router is not None:
            missing = [f"unet_{k}" for k in range(router.num_students) if f"unet_{k}" not in students]
            if missing:
                raise ValueError(
                    f"router: it has {router.num_students} parts, but {', '.join(missing)} is not given; give one "
                    f"student per part (at most {len(SLOTS)}), or None to leave it out"
                )
        if safety_checker is not None and feature_extractor is None:
            raise ValueError("feature_extractor: the safety_checker sees images through it; give both or neither")
        if student_timesteps is not None:
            inputs.check_timesteps(student_timesteps, NoiseSchedule.from_scheduler(scheduler))
        if unet is not None:
            attach(unet, {SLOTS[k]: student for k, student in given.items()})
        self.register_modules(
            scheduler=scheduler,
            router=router,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            unet=unet,
            **{slot: students.get(slot) for slot in SLOTS},
        )
        self.register_to_config(student_timesteps=student_timesteps)
        # Pixels per latent; without a VAE, sizes are those of the samples themselves.
        self.vae_scale_factor = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        # Markdown that `save_pretrained` adds to the model card, such as the record of a training run.
        self.model_card_details = ""
        # Filled by `enable_model_cpu_offload`.
        self._all_hooks = []
        self._num_timesteps = 1

    @property
    def takes_prompts(self) -> bool:
        """Whether the students go by prompts; else by class labels."""
        first = next(iter(self.students.values()), None)
        return self.text_encoder is not None if first is None else isinstance(first, UNet2DConditionModel)

    @property
    def timesteps(self) -> list[int]:
        """The noise indices at which the students may run, the first one pure noise; [999] for one step."""
        if self.config.student_timesteps is not None:
            return list(self.config.student_timesteps["timesteps"])
        return [NoiseSchedule.from_scheduler(self.scheduler).last]

    @property
    def num_timesteps(self) -> int:
        """Steps of the latest call, for callbacks."""
        return self._num_timesteps

    def route(self, prompt=None, class_labels=None, prompt_embeds=None, prompt_mask=None) -> list[int]:
        """Which student serves each condition, B indices in [0, K). Arguments and errors as for a call."""
        self._check_routed()
        self.check_condition(prompt, class_labels, prompt_embeds, prompt_mask)
        return self._route(*self.encode_condition(prompt, class_labels, prompt_embeds, prompt_mask))

    def margins(self, prompt=None, class_labels=None, prompt_embeds=None, prompt_mask=None) -> list[float]:
        """How far each condition is from being served by another student, B distances; arguments as for `route`.

        In the units of the embeddings the router goes by; infinite where it has no cuts, as in a table of classes.
        """
        self._check_routed()
        self.check_condition(prompt, class_labels, prompt_embeds, prompt_mask)
        condition = self.routed_by(*self.encode_condition(prompt, class_labels, prompt_embeds, prompt_mask))
        return self.router.margins(**condition).tolist()

    def _check_routed(self) -> None:
        if self.router is None:
            raise ValueError("router: this pipeline has none, pass student= to say which student shall run")

    def _route(self, condition: torch.Tensor, mask: torch.Tensor | None) -> list[int]:
        return self.router(**self.routed_by(condition, mask)).tolist()

    def routed_by(self, condition: torch.Tensor, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """What the router takes of B conditions, by the name of its argument: labels [B], or pooled embeddings [B, D].

        Args:
            condition, mask: from `encode_condition`.
        """
        if not self.takes_prompts:
            return {"class_labels": condition}
        if mask is None:
            if self.router.num_students > 1:
                logger.warning("prompt_mask: not given, so padding counts as text when prompt_embeds are routed.")
            mask = torch.ones(condition.shape[:2], dtype=torch.long)
        pooling = self.router.config.get("pooling") or "mean"
        return {"embeddings": pool_embeddings(condition, mask.long(), pooling)}

    def check_condition(self, prompt=None, class_labels=None, prompt_embeds=None, prompt_mask=None) -> int:
        """Refuses what is not exactly one good condition for these students, before compute.

        Returns:
            B, the number of conditions.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        name = inputs.check_one_condition(
            self.takes_prompts, prompt=prompt, prompt_embeds=prompt_embeds, class_labels=class_labels
        )
        if prompt_mask is not None and name != "prompt_embeds":
            raise ValueError(f"prompt_mask: it goes with prompt_embeds alone, got {name}")
        first = next(iter(self.students.values()), None)
        if name == "class_labels":
            return len(inputs.read_labels(class_labels, None if first is None else num_classes(first)))
        if name == "prompt_embeds":
            width = None if first is None else first.config.cross_attention_dim
            inputs.check_embeddings(prompt_embeds, prompt_mask, width)
            return len(prompt_embeds)
        return len(self._read_prompts(prompt))

    def _read_prompts(self, prompt) -> list[str]:
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError(
                "prompt: without text_encoder and tokenizer nothing can read it; load both, or pass prompt_embeds"
            )
        return check_prompts(prompt)

    def encode_condition(
        self, prompt=None, class_labels=None, prompt_embeds=None, prompt_mask=None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the students take: class labels, LongTensor [B], or embeddings [B, L, D] with their mask [B, L]."""
        if class_labels is not None:
            return inputs.read_labels(class_labels, None), None
        return self.encode_prompt(prompt, prompt_embeds=prompt_embeds, prompt_mask=prompt_mask)

    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: torch.Tensor | None = None,
        prompt_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Prompts as a call takes them under the names of the results, to be computed once and used often.

        Args:
            prompt: a prompt or a list of B; what the tokenizer has no room for is cut off with a warning.
            num_images_per_prompt: how often each row is repeated.
            prompt_embeds, prompt_mask: instead of `prompt`: [B, L, D] and [B, L], repeated only.

        Returns:
            `prompt_embeds` [B * num_images_per_prompt, L, D] in the encoder's dtype where the encoder runs, and
            `prompt_mask` [B * num_images_per_prompt, L]: 1 on real tokens, 0 on padding; None if it was not given.

        Raises:
            TypeError, ValueError: as for a call.
        """
        if prompt_embeds is None:
            prompts, device = self._read_prompts(prompt), self._device_of(self.text_encoder)
            prompt_embeds, prompt_mask = embed_prompts(self.tokenizer, self.text_encoder, prompts, device)
            self._offload(self.text_encoder)
        prompt_embeds = prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0)
        if prompt_mask is not None:
            prompt_mask = prompt_mask.repeat_interleave(num_images_per_prompt, dim=0)
        return prompt_embeds, prompt_mask

    def check_inputs(
        self,
        output_type,
        num_images_per_prompt,
        student,
        callback_tensor_inputs,
        negative_prompt=None,
        num_inference_steps=None,
    ) -> None:
        """Refuses bad arguments of a call, other than the condition and the noise, before anything is computed."""
        if negative_prompt is not None:
            raise ValueError(
                f"negative_prompt: students run without guidance, nothing would look at it; got {negative_prompt!r}"
            )
        inputs.check_choices(output_type, num_images_per_prompt, student, list(self.students))
        if student is None:
            self._check_routed()
        if self.scheduler is None:
            raise ValueError("scheduler: this pipeline has none; it says what noise the students start from")
        if self.takes_prompts and self.vae is None and output_type != "latent":
            raise ValueError(
                f'vae: this pipeline has none to make {output_type!r}; load it, or pass output_type="latent"'
            )
        unknown = sorted(set(callback_tensor_inputs) - set(self._callback_tensor_inputs))
        if unknown:
            raise ValueError(f"callback_on_step_end_tensor_inputs: {unknown}: not in {self._callback_tensor_inputs}")
        inputs.check_steps(num_inference_steps, self.timesteps)

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """(C, h, w) of the samples for images of `height` x `width` pixels, by default the students' own size."""
        channels, *native = sample_shape(next(iter(self.students.values())))
        sides = zip(("height", "width"), (height, width), native)
        return channels, *(inputs.check_side(*side, self.vae_scale_factor, self.takes_prompts) for side in sides)

    def choose_students(self, condition, mask, student: int | None, names: Callable[[int], str]) -> list[int]:
        """The student of each of B conditions: the given one, else the router's; ValueError if that was left out.

        Args:
            condition, mask: from `encode_condition`.
            student: the same for all, or None.
            names: describes condition number i in the error.
        """
        if student is not None:
            return [student] * len(condition)
        chosen, present = self._route(condition, mask), list(self.students)
        for i, k in enumerate(chosen):
            if k not in present:
                raise ValueError(
                    f"{names(i)} belongs to student {k}, which is absent (present are {present}); "
                    "load it too, or choose another with student="
                )
        return chosen

    def prepare_latents(self, shape: tuple[int, ...], generator, latents: torch.Tensor | None = None) -> torch.Tensor:
        """Unit-variance noise, float32 [B, C, h, w] on the execution device: `latents` if given, else new."""
        device = self._device_of(next(iter(self.students.values())))
        if latents is not None:
            return latents.to(device, torch.float32)
        # In float32 whatever the students' dtype: the same seed means the same noise in fp16 as in fp32.
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)

    def generate(self, latents: torch.Tensor, condition: torch.Tensor, student_indices: list[int], t: int, bar=None):
        """Predicts clean samples: one call of each student in use.

        Args:
            latents: what the students start from [B, C, h, w]: unit-variance noise if t is pure noise, else x_t.
            condition: labels [B] or embeddings [B, L, D].
            student_indices: whose each row is.
            t: noise index.
            bar: progress bar to move on by one per student.

        Returns:
            float32 [B, C, h, w].
        """
        schedule = NoiseSchedule.from_scheduler(self.scheduler)
        samples = torch.empty_like(latents)
        if self.unet is not None:
            with adapter_of_each_row(self.unet, [SLOTS[k] for k in student_indices]):
                made = self._predict(self.unet, latents, condition.to(latents.device), t, schedule)
            if bar is not None:
                bar.update()
            return made.to(samples)
        for k in self.in_running_order(student_indices):
            rows = [i for i, chosen in enumerate(student_indices) if chosen == k]
            x, cond = latents[rows], condition[rows].to(latents.device)
            made = self.use_student(k, partial(self._predict, x=x, cond=cond, t=t, schedule=schedule))
            samples[rows] = made.to(samples)
            if bar is not None:
                bar.update()
        return samples

    def _predict(self, unet: Student, x: torch.Tensor, cond: torch.Tensor, t: int, schedule: NoiseSchedule):
        denoiser = denoiser_for(unet, schedule)
        made = denoiser.generate(x, cond) if t == schedule.last else denoiser(x, t, cond)
        self._offload(unet)
        return made

    def _device_of(self, model: torch.nn.Module) -> torch.device:
        # `_execution_device` alone would do, but it asks each module of all K students: 5 ms for four tiny ones.
        device = model.device
        return self._execution_device if self._all_hooks or device.type == "meta" else device

    def _offload(self, model: torch.nn.Module) -> None:
        # A hook sends only its neighbour in the offload order back: models with a gap after them would stay.
        for hook in self._all_hooks:
            if hook.model is model:
                hook.offload()

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Samples to images, about [-1, 1]; the identity without a VAE."""
        if self.vae is None:
            return latents
        return decode_latents(self.vae, latents)

    def run_safety_checker(self, images: torch.Tensor) -> tuple[torch.Tensor, list[bool] | None]:
        """Images [B, C, H, W] in about [-1, 1], those that the checker objects to zeroed, and which ones they are."""
        if self.safety_checker is None:
            return images, None
        seen = self.feature_extractor(self.image_processor.postprocess(images, output_type="pil"), return_tensors="pt")
        pixels = seen.pixel_values.to(self.safety_checker.device, self.safety_checker.dtype)
        return self.safety_checker(images=images, clip_input=pixels)

    @torch.no_grad()
    def to_images(self, latents: torch.Tensor, output_type: str) -> tuple:
        """Samples [B, C, h, w], these students' or their teacher's, decoded, checked and in the form asked for.

        Returns:
            (images, nsfw_content_detected) as in `MultiStudentPipelineOutput`.
        """
        images, nsfw = self.run_safety_checker(self.decode_latents(latents))
        shown = None if nsfw is None else [not objection for objection in nsfw]
        return self.image_processor.postprocess(images, output_type=output_type, do_denormalize=shown), nsfw

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        class_labels: int | Sequence[int] | torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_mask: torch.Tensor | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        student: int | None = None,
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
    ) -> MultiStudentPipelineOutput | tuple:
        r"""Makes one image (or more) per condition, in the order of the conditions. Exactly one condition is given.

        Args:
            prompt: a text or a list of B, for students that take prompts.
            class_labels: integers in [0, num_classes), B of them or a single one, for class-conditional students.
            prompt_embeds: the text encoder's last hidden state [B, L, D] instead of `prompt`, see `encode_prompt`.
            prompt_mask: [B, L], 1 on the real tokens of `prompt_embeds`; routing goes by them alone. None: all are.
            negative_prompt: refused: students are trained with guidance built in and run without.
            num_images_per_prompt: images per condition, side by side in the output.
            height, width: pixels, multiples of the VAE's factor; None is the students' own size, the only one that
                class-conditional students make.
            num_inference_steps: how many of the `timesteps` to run, in [1, len(timesteps)]; None is all.
            generator: a list of one per image makes an image depend on its own (condition, seed) alone, whoever else
                is in the batch; a single one draws the noise of the whole batch; None uses the global one.
            latents: noise of variance 1 to start from, [B * num_images_per_prompt, C, h, w], instead of `generator`.
            output_type: "pil", "np" [B, H, W, C] and "pt" [B, C, H, W] in [0, 1], or "latent", unclamped.
            student: use this student for all, whatever the router says.
            return_dict: False returns the tuple (images, student_indices).
            callback_on_step_end: called after each step as `f(pipe, step, timestep, {"latents": ...})` with what the
                next step starts from, after the last one the samples [B, C, h, w]; the "latents" in the dict it
                returns replace them.
            callback_on_step_end_tensor_inputs: what the callback gets, of `_callback_tensor_inputs`.

        Raises:
            TypeError, ValueError: an argument is out of its range, or a condition's student was left out.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        callback_inputs = callback_on_step_end_tensor_inputs
        conditions = {
            "prompt": prompt,
            "class_labels": class_labels,
            "prompt_embeds": prompt_embeds,
            "prompt_mask": prompt_mask,
        }
        num_conditions = self.check_condition(**conditions)
        self.check_inputs(
            output_type, num_images_per_prompt, student, callback_inputs, negative_prompt, num_inference_steps
        )
        shape = (num_conditions * num_images_per_prompt, *self.latent_shape(height, width))
        inputs.check_noise(generator, latents, shape)

        condition, mask = self.encode_condition(**conditions)
        chosen = self.choose_students(condition, mask, student, lambda i: _name_of(i, **conditions))
        student_indices = [k for k in chosen for _ in range(num_images_per_prompt)]
        condition = condition.repeat_interleave(num_images_per_prompt, dim=0)

        schedule, timesteps = NoiseSchedule.from_scheduler(self.scheduler), self.timesteps[:num_inference_steps]
        self._num_timesteps = len(timesteps)
        latents = self.prepare_latents(shape, generator, latents)
        with self.progress_bar(
            total=len(timesteps) * (1 if self.unet is not None else len(set(student_indices)))
        ) as bar:
            for step, t in enumerate(timesteps):
                latents = self.generate(latents, condition, student_indices, t, bar)
                if step + 1 < len(timesteps):
                    noise = self.prepare_latents(shape, generator)
                    latents = schedule.add_noise(latents, noise, timesteps[step + 1])
                if callback_on_step_end is not None:
                    callback_kwargs = {"latents": latents} if "latents" in callback_inputs else {}
                    latents = callback_on_step_end(self, step, t, callback_kwargs).pop("latents", latents)

        images, nsfw = (latents, None) if output_type == "latent" else self.to_images(latents, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, student_indices
        return MultiStudentPipelineOutput(images, student_indices, nsfw)


def _name_of(i: int, prompt, class_labels, prompt_embeds, prompt_mask) -> str:
    if class_labels is not None:
        return f"class_labels: label {inputs.read_labels(class_labels, None)[i]}"
    return f"prompt_embeds: number {i}" if prompt is None else f"prompt: number {i} ({check_prompts(prompt)[i]!r})"
