# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""The one place that knows how a model family is called. Teacher, fake score and student are all `Denoiser`s."""

import torch
from diffusers import ModelMixin, UNet2DConditionModel, UNet2DModel
from torch import nn

from .schedule import NoiseSchedule


# Of the config of a class-conditional net: the label that stands for "no class", the last row of its embedding. The net
# was trained with it for guidance; it is no class to be made. diffusers keeps such private fields and ignores them.
NULL_CLASS = "_null_class"


class _Tapped(Exception):
    """Leaves a forward pass once the tapped features are known, so the decoder never runs."""

    def __init__(self, features: torch.Tensor):
        self.features = features


class Denoiser(nn.Module):
    """A network seen as D(x_t, t, cond), its prediction of the clean sample.

    A model family is a subclass that overrides `call_network` (how the network takes its condition) and, if its
    GAN features are taken elsewhere, `tap`.

    Args:
        model: the network, a diffusers model with a `mid_block`.
        schedule: its noise schedule.
        null_cond: the condition that stands for "none" in classifier-free guidance, one sample without batch axis;
            None if the model has none, then guidance is refused.
        autocast_dtype: run the network under autocast in this dtype (weights stay as they are); None runs it in the
            dtype of its weights.
    """

    def __init__(
        self,
        model: ModelMixin,
        schedule: NoiseSchedule,
        null_cond: torch.Tensor | None = None,
        autocast_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.model = model
        self.schedule = schedule
        self.null_cond = null_cond
        self.autocast_dtype = autocast_dtype

    def call_network(self, x: torch.Tensor, timestep: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        """Raw network output for the already scaled input x [B, C, H, W]."""
        raise NotImplementedError

    def tap(self, store) -> torch.utils.hooks.RemovableHandle:
        """Hooks `store(features)` onto the layer whose activation the discriminator sees."""
        raise NotImplementedError

    def _call(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        c_in, _, _ = self.schedule.coefficients(t, x_t)
        timestep = self.schedule.timestep(t).to(x_t.device, torch.float32).expand(len(x_t))
        # No weight cache: a cast made by a no_grad call would be re-used, without gradient, by a later call.
        with torch.autocast(
            x_t.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None, cache_enabled=False
        ):
            return self.call_network((c_in * x_t).to(self.model.dtype), timestep, cond)

    def forward(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor | int,
        cond: torch.Tensor | None = None,
        guidance_scale: float | None = None,
    ) -> torch.Tensor:
        """Predicts x0.

        Args:
            x_t: noisy samples [B, C, H, W].
            t: noise indices [B] or one for all, see `NoiseSchedule`; kept on the CPU they cost no synchronisation.
            cond: class labels LongTensor [B], or prompt embeddings [B, L, D], by family.
            guidance_scale: classifier-free guidance u + s (c - u) on the network output (arXiv 2207.12598);
                both halves run as one batch. None or 1 is off.

        Returns:
            x0 [B, C, H, W], float32 (float64 for float64 input).

        Raises:
            ValueError: guidance asked of a model without a null condition, or without `cond`.
        """
        x_t = x_t if x_t.dtype == torch.float64 else x_t.float()
        t = torch.as_tensor(t)
        if guidance_scale is None or guidance_scale == 1:
            output = self._call(x_t, t, cond)
        else:
            if self.null_cond is None or cond is None:
                raise ValueError(
                    f"guidance_scale: {guidance_scale} needs cond, and a model with a null condition; leave it out here"
                )
            null = self.null_cond.to(cond.device).expand_as(cond)
            both = self._call(torch.cat([x_t, x_t]), t if t.ndim == 0 else torch.cat([t, t]), torch.cat([null, cond]))
            uncond_output, cond_output = both.to(x_t.dtype).chunk(2)
            output = uncond_output + guidance_scale * (cond_output - uncond_output)
        return self.schedule.to_x0(output, x_t, t)

    def features(self, x_t: torch.Tensor, t: torch.Tensor | int, cond: torch.Tensor | None = None) -> torch.Tensor:
        """The encoder activation the discriminator looks at, float32; the decoder does not run.

        Args and raises as `forward`.
        """
        x_t = x_t if x_t.dtype == torch.float64 else x_t.float()

        def store(features: torch.Tensor):
            raise _Tapped(features)

        handle = self.tap(store)
        try:
            self._call(x_t, torch.as_tensor(t), cond)
        except _Tapped as tapped:
            return tapped.features.to(x_t.dtype)
        finally:
            handle.remove()
        raise RuntimeError(f"{type(self.model).__name__} ran to its end without passing the tapped layer")

    def generate(self, z: torch.Tensor, cond: torch.Tensor | None = None) -> torch.Tensor:
        """The one step: unit-variance noise z [B, C, H, W] to samples, x = D(noise_scale z, t = N-1). No clamp."""
        return self(self.schedule.noise_scale * z, self.schedule.last, cond)


class ClassDenoiser(Denoiser):
    """`UNet2DModel`, class-conditional (cond: LongTensor [B]) or unconditional (cond ignored).

    Features are the last encoder activation, the input of the mid block (DMD2 on EDM, arXiv 2405.14867).
    """

    def call_network(self, x, timestep, cond):
        labels = None if self.model.class_embedding is None else cond
        return self.model(x, timestep, class_labels=labels, return_dict=False)[0]

    def tap(self, store):
        return self.model.mid_block.register_forward_pre_hook(lambda module, args: store(args[0]))


class TextDenoiser(Denoiser):
    """`UNet2DConditionModel` over prompt embeddings (cond: [B, L, D]). Features are the mid block's output."""

    def call_network(self, x, timestep, cond):
        return self.model(x, timestep, encoder_hidden_states=cond.to(x.dtype), return_dict=False)[0]

    def tap(self, store):
        return self.model.mid_block.register_forward_hook(lambda module, args, output: store(output))


DENOISERS: dict[type, type[Denoiser]] = {UNet2DModel: ClassDenoiser, UNet2DConditionModel: TextDenoiser}


def denoiser_for(model: ModelMixin, schedule: NoiseSchedule, **kwargs) -> Denoiser:
    """The `Denoiser` for a diffusers model; kwargs as `Denoiser`.

    Raises:
        TypeError: if the family of `model` is not one of `DENOISERS`.
    """
    for model_class, denoiser_class in DENOISERS.items():
        if isinstance(model, model_class):
            return denoiser_class(model, schedule, **kwargs)
    allowed = ", ".join(c.__name__ for c in DENOISERS)
    raise TypeError(f"model: {type(model).__name__} is not supported, expected one of {allowed}")


def sample_shape(model: ModelMixin) -> tuple[int, int, int]:
    """(C, H, W) of a model's samples; `sample_size` may be one number or (H, W)."""
    size = model.config.sample_size
    return (model.config.in_channels, *((size, size) if isinstance(size, int) else size))


def num_classes(model: UNet2DModel) -> int | None:
    """How many classes a model makes, the null class not counted; None if it is not class-conditional."""
    return model.config[NULL_CLASS] if NULL_CLASS in model.config else model.config.num_class_embeds


def null_class(model: UNet2DModel) -> torch.Tensor | None:
    """The label that stands for "no class", LongTensor []; None if the model has none."""
    return torch.tensor(model.config[NULL_CLASS]) if NULL_CLASS in model.config else None
