# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""sample_heun against the exact probability-flow map of a Gaussian, EDM's algorithm, and itself in another view.

Solvers of diffusers against its Stable Diffusion pipeline.
"""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from helpers import edm_scheduler, tiny_stable_diffusion, tiny_unet

from diffusers_msd import Denoiser, NoiseSchedule, denoiser_for, sample_heun
from diffusers_msd.prompts import embed_prompts
from diffusers_msd.sampling import SAMPLERS
from diffusers_msd.schedule import expand


MEAN, STD = 0.4, 0.5


class GaussianDenoiser(Denoiser):
    """The exact denoiser of data N(MEAN, STD^2) per element: E[x0 | x_t]."""

    def __init__(self, schedule: NoiseSchedule):
        super().__init__(None, schedule)
        self.calls = 0

    def forward(self, x_t, t, cond=None, guidance_scale=None):
        self.calls += 1
        alpha, sigma = expand(self.schedule.alpha(t), x_t), expand(self.schedule.sigma(t), x_t)
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        return MEAN + gain * (x_t - alpha * MEAN)


def edm() -> NoiseSchedule:
    return NoiseSchedule.from_scheduler(edm_scheduler())


def ddpm() -> NoiseSchedule:
    return NoiseSchedule.from_scheduler(
        DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    )


def noise(dtype=torch.float64) -> torch.Tensor:
    return torch.randn(64, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=dtype)


def exact_map(schedule: NoiseSchedule, z: torch.Tensor) -> torch.Tensor:
    """The exact flow to the lowest noise level, then the denoiser, which is what the solver's last step amounts to.

    In the view x / alpha the flow shrinks the distance from the mean as sqrt(STD^2 + ratio^2).
    """
    first, last = schedule.ratios[0], schedule.ratios[-1]
    start = z * schedule.noise_scale / schedule.alphas[-1]
    distance = (start - MEAN) * ((STD**2 + first**2) / (STD**2 + last**2)).sqrt()
    return MEAN + distance * STD**2 / (STD**2 + first**2)


@pytest.mark.parametrize("schedule", [edm, ddpm])
def test_heun_solves_the_probability_flow_of_a_gaussian_at_second_order(schedule):
    schedule = schedule()
    errors = {
        n: float(
            (sample_heun(GaussianDenoiser(schedule), noise(), num_steps=n) - exact_map(schedule, noise())).abs().max()
        )
        for n in (18, 64, 128, 256)
    }
    assert errors[18] < 0.1 and errors[256] < 5e-4
    assert 3.6 < errors[64] / errors[128] < 4.4
    assert 3.6 < errors[128] / errors[256] < 4.4


def test_the_variance_preserving_and_exploding_views_give_the_same_sample():
    vp = ddpm()
    # The same levels as ratios, data unscaled, and a start of the same noise x / alpha.
    ve = NoiseSchedule(
        torch.ones_like(vp.alphas), vp.ratios, "edm", vp.network_time, 1 / float(vp.alphas[-1]), sigma_data=0.5
    )
    a, b = (sample_heun(GaussianDenoiser(s), noise(), num_steps=18) for s in (vp, ve))
    assert torch.allclose(a, b, atol=1e-4)


def test_heun_on_a_network_is_edms_algorithm():
    net, scheduler = tiny_unet(), EDMEulerScheduler()
    cond, z = torch.tensor([0, 1, 2, 3]), torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    steps = 5

    def denoise(x, sigma):
        scaled, time = scheduler.precondition_inputs(x, sigma), scheduler.precondition_noise(sigma)
        return scheduler.precondition_outputs(x, net(scaled, time, class_labels=cond).sample, sigma)

    # arXiv 2206.00364, algorithm 1 without churn.
    grid = [(80 ** (1 / 7) + i / (steps - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(steps)] + [0]
    with torch.no_grad():
        x = 80 * z
        for now, after in zip(grid[:-1], grid[1:]):
            d = (x - denoise(x, torch.tensor(now))) / now
            x_next = x + (after - now) * d
            if after > 0:
                x_next = x + (after - now) * (d + (x_next - denoise(x_next, torch.tensor(after))) / after) / 2
            x = x_next
    ours = sample_heun(denoiser_for(net, edm()), z, cond, num_steps=steps)
    assert ours.dtype == torch.float32
    assert torch.allclose(ours, x, atol=2e-4)


def test_guidance_reaches_every_call_of_the_denoiser():
    seen = []

    class Recording(GaussianDenoiser):
        def forward(self, x_t, t, cond=None, guidance_scale=None):
            seen.append((cond, guidance_scale))
            return super().forward(x_t, t, cond, guidance_scale)

    sample_heun(Recording(edm()), noise(), "a condition", num_steps=4, guidance_scale=2.5)
    assert seen == [("a condition", 2.5)] * 7


@pytest.mark.parametrize("num_steps", [1, 2, 18])
def test_the_network_runs_twice_per_step_but_the_last(num_steps):
    denoiser = GaussianDenoiser(edm())
    sample_heun(denoiser, noise(), num_steps=num_steps)
    assert denoiser.calls == 2 * num_steps - 1


def test_one_step_is_the_denoiser_at_pure_noise():
    denoiser = GaussianDenoiser(edm())
    assert torch.allclose(sample_heun(denoiser, noise(), num_steps=1), denoiser.generate(noise()), atol=1e-9)


def test_sampling_leaves_no_graph_and_keeps_the_dtype():
    net = tiny_unet().double()
    z = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    x = sample_heun(denoiser_for(net, edm()), z, torch.tensor([0, 1]), num_steps=2)
    assert not x.requires_grad and x.dtype == torch.float64


def test_bad_step_counts_and_infinite_noise_are_refused_before_the_network_runs():
    denoiser = GaussianDenoiser(edm())
    with pytest.raises(ValueError, match="num_steps: at least 1 expected, got 0"):
        sample_heun(denoiser, noise(), num_steps=0)
    flow = GaussianDenoiser(NoiseSchedule.from_scheduler(FlowMatchEulerDiscreteScheduler()))
    with pytest.raises(ValueError, match="infinite noise"):
        sample_heun(flow, noise())
    assert denoiser.calls == flow.calls == 0


@pytest.mark.parametrize("name, solver", [("ddim", DDIMScheduler), ("dpm", DPMSolverMultistepScheduler)])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_solvers_of_diffusers_make_what_a_stable_diffusion_pipeline_makes(name, solver, prediction_type, tmp_path):
    pipe = tiny_stable_diffusion(tmp_path, prediction_type)
    denoiser = denoiser_for(
        pipe.unet,
        NoiseSchedule.from_scheduler(pipe.scheduler),
        null_cond=embed_prompts(pipe.tokenizer, pipe.text_encoder, [""])[0][0],
    )
    pipe.scheduler = solver.from_config(pipe.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    prompts = ["a cat", "the moon"]
    with torch.no_grad():
        cond, _ = embed_prompts(pipe.tokenizer, pipe.text_encoder, prompts)
    expected = pipe(prompts, num_inference_steps=5, guidance_scale=3.0, latents=z.clone(), output_type="latent").images
    got = SAMPLERS[name](denoiser, z, cond, 5, 3.0)
    assert torch.allclose(got, expected, rtol=1e-3, atol=1e-3 * expected.abs().max())


def test_solvers_of_diffusers_refuse_schedules_that_are_not_variance_preserving():
    with pytest.raises(ValueError, match="denoiser: .*sample_heun"):
        SAMPLERS["ddim"](GaussianDenoiser(edm()), noise())
