# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Many-step sampling of a teacher, always deterministic: the same noise gives the same sample."""

from collections.abc import Callable
from functools import partial

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from .denoiser import Denoiser


@torch.no_grad()
def sample_heun(
    denoiser: Denoiser,
    z: torch.Tensor,
    cond: torch.Tensor | None = None,
    num_steps: int = 18,
    guidance_scale: float | None = None,
    rho: float = 7.0,
) -> torch.Tensor:
    """Solves the probability-flow ODE with Heun's method (arXiv 2206.00364, algorithm 1 with S_churn = 0).

    It runs in the variance-exploding view x / alpha, so any teacher can be sampled whose noise-to-signal ratio is
    finite at the start (every one but zero-terminal-SNR and flow-matching schedules).

    Args:
        denoiser: the teacher.
        z: unit-variance noise [B, C, H, W].
        cond: condition as the denoiser takes it.
        num_steps: number of steps; the network runs 2 * num_steps - 1 times.
        guidance_scale: as in `Denoiser.forward`.
        rho: spacing of the Karras grid.

    Returns:
        Samples [B, C, H, W] in float32 (float64 for float64 `z`).

    Raises:
        ValueError: if `num_steps` < 1 or the schedule starts at infinite noise.
    """
    schedule = denoiser.schedule
    _check_steps(num_steps)
    if float(schedule.alphas[-1]) == 0:
        raise ValueError("denoiser: its schedule starts at infinite noise-to-signal ratio, which sample_heun cannot")
    ratios = schedule.ratios ** (1 / rho)
    grid = (
        torch.linspace(float(ratios[-1]), float(ratios[0]), max(num_steps, 2), dtype=torch.float64)[:num_steps] ** rho
    )

    def slope(x: torch.Tensor, ratio: float) -> torch.Tensor:
        t = schedule.from_ratio(ratio)
        x0 = denoiser(x * float(schedule.alpha(t)), t, cond, guidance_scale)
        return (x - x0) / ratio

    x = z * (schedule.noise_scale / float(schedule.alphas[-1]))
    levels = [*grid.tolist(), 0.0]
    for now, after in zip(levels[:-1], levels[1:]):
        d = slope(x, now)
        x_euler = x + (after - now) * d
        x = x_euler if after == 0 else x + (after - now) * (d + slope(x_euler, after)) / 2
    return x


@torch.no_grad()
def sample_with_scheduler(
    scheduler_class: type,
    denoiser: Denoiser,
    z: torch.Tensor,
    cond: torch.Tensor | None = None,
    num_steps: int = 50,
    guidance_scale: float | None = None,
) -> torch.Tensor:
    """Samples with a solver of diffusers, from the schedule's last timestep, where the one-step student starts too.

    The solver is given x0 predictions, so teachers of any prediction type take the same way.

    Args:
        scheduler_class: a diffusers scheduler with `trained_betas`, "sample" prediction and trailing timesteps.
        denoiser: a teacher with a variance-preserving (DDPM-like) schedule.
        z, cond, guidance_scale: as in `sample_heun`.
        num_steps: network calls, at most the schedule's N.

    Returns:
        As `sample_heun`.

    Raises:
        ValueError: `num_steps` is out of range, or the schedule is not variance-preserving.
    """
    schedule = denoiser.schedule
    _check_steps(num_steps)
    alpha_bar = schedule.alphas**2
    if not torch.allclose(alpha_bar + schedule.sigmas**2, torch.ones_like(alpha_bar)):
        raise ValueError("denoiser: this sampler needs a DDPM-like schedule (alpha^2 + sigma^2 = 1); use sample_heun")
    betas = 1 - alpha_bar / torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    scheduler = scheduler_class(
        num_train_timesteps=len(betas),
        trained_betas=betas.numpy(),
        prediction_type="sample",
        timestep_spacing="trailing",
        **SOLVER_SETTINGS[scheduler_class],
    )
    scheduler.set_timesteps(num_steps)
    x = z
    for t in scheduler.timesteps:
        x0 = denoiser(x, t, cond, guidance_scale)
        x = scheduler.step(x0, t, x, return_dict=False)[0]
    return x


# DDIM: arXiv 2010.02502, eq. 12 with eta = 0. DPM-Solver++(2M): arXiv 2211.01095, algorithm 2.
SOLVER_SETTINGS = {DDIMScheduler: {"clip_sample": False}, DPMSolverMultistepScheduler: {}}

# denoiser, z, cond, num_steps, guidance_scale -> samples
SAMPLERS: dict[str, Callable] = {
    "heun": sample_heun,
    "ddim": partial(sample_with_scheduler, DDIMScheduler),
    "dpm": partial(sample_with_scheduler, DPMSolverMultistepScheduler),
}


def _check_steps(num_steps: int):
    if num_steps < 1:
        raise ValueError(f"num_steps: at least 1 expected, got {num_steps}")
