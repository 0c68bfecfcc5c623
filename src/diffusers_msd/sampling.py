# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Many-step sampling of a teacher."""

import torch

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
    if num_steps < 1:
        raise ValueError(f"num_steps: at least 1 expected, got {num_steps}")
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
