# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""NoiseSchedule: published noise levels, diffusers' own conversions for every family, float64, errors."""

import math

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    ScoreSdeVeScheduler,
    UniPCMultistepScheduler,
)

from diffusers_msd import NoiseSchedule
from diffusers_msd.schedule import expand


SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
FAMILIES = {
    "edm": lambda: EDMEulerScheduler(),
    "edm_v": lambda: EDMEulerScheduler(prediction_type="v_prediction", sigma_data=1.0),
    "edm_exponential": lambda: EDMDPMSolverMultistepScheduler(sigma_schedule="exponential"),
    "consistency": lambda: CMStochasticIterativeScheduler(),
    "flow": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "epsilon": lambda: DDPMScheduler(**SD),
    "v": lambda: DDIMScheduler(**SD, prediction_type="v_prediction", rescale_betas_zero_snr=True),
    "sample": lambda: DDPMScheduler(**SD, prediction_type="sample"),
}


@pytest.fixture(params=FAMILIES)
def schedule(request):
    return NoiseSchedule.from_scheduler(FAMILIES[request.param]())


def draw(*seeds, shape=(3, 2, 4, 4)):
    return [torch.randn(shape, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]


# ---------------------------------------------------------------------- noise levels


@pytest.mark.parametrize(
    "t, sigma",
    [(0, 0.002), (100, 0.016751), (250, 0.170312), (500, 2.526508), (750, 17.61726), (980, 72.05387), (999, 80.0)],
)
def test_edm_levels_are_those_of_the_karras_grid(t, sigma):
    schedule = NoiseSchedule.from_scheduler(EDMEulerScheduler())
    assert float(schedule.sigma(t)) == pytest.approx(sigma, rel=3e-5)
    assert float(schedule.alpha(t)) == 1
    assert schedule.noise_scale == 80 and schedule.num_timesteps == 1000 and schedule.last == 999


def test_edm_exponential_levels_are_evenly_spaced_in_log_sigma():
    schedule = NoiseSchedule.from_scheduler(EDMEulerScheduler(sigma_schedule="exponential"))
    steps = schedule.sigma(torch.arange(1000)).log().diff()
    assert torch.allclose(steps, torch.full_like(steps, math.log(80 / 0.002) / 999), atol=1e-12)


def test_stable_diffusion_ends_at_its_published_alpha_bar():
    schedule = NoiseSchedule.from_scheduler(DDPMScheduler(**SD))
    assert float(schedule.alpha(999)) ** 2 == pytest.approx(0.0046601, abs=5e-8)
    assert schedule.noise_scale == 1


def test_ddpm_levels_are_variance_preserving_and_those_of_the_scheduler():
    scheduler = DDPMScheduler(**SD)
    schedule, t = NoiseSchedule.from_scheduler(scheduler), torch.arange(1000)
    assert torch.allclose(schedule.alpha(t) ** 2, scheduler.alphas_cumprod.double(), atol=1e-15)
    assert torch.allclose(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, torch.ones(1000).double(), atol=1e-15)


@pytest.mark.parametrize("cls", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_levels_and_times_are_those_of_the_scheduler(cls, shift):
    scheduler = cls(shift=shift)
    schedule, t = NoiseSchedule.from_scheduler(scheduler), torch.arange(1000)
    assert torch.allclose(schedule.sigma(t), scheduler.sigmas.flip(0)[-1000:].double(), atol=1e-6)
    assert torch.allclose(schedule.timestep(t), scheduler.timesteps.flip(0).double(), atol=1e-3)
    assert torch.allclose(schedule.alpha(t) + schedule.sigma(t), torch.ones(1000).double())


def test_flow_shift_is_left_out_where_the_scheduler_shifts_by_image_size():
    # With dynamic shifting the scheduler's own training levels are unshifted.
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    assert torch.allclose(schedule.sigma(torch.arange(1000)), scheduler.sigmas.flip(0).double(), atol=1e-6)


def test_noise_grows_with_the_index_in_every_family(schedule):
    assert (schedule.ratios.diff() > 0).all()
    assert (schedule.sigmas.diff() > 0).all()


# ---------------------------------------------------------------------- the network's time


def test_edm_network_time_is_a_quarter_of_log_sigma():
    schedule = NoiseSchedule.from_scheduler(EDMEulerScheduler())
    t = torch.tensor([0, 500, 999])
    expected = torch.tensor([math.log(0.002) / 4, math.log(float(schedule.sigma(500))) / 4, math.log(80) / 4])
    assert torch.allclose(schedule.timestep(t), expected.double(), atol=1e-6)


def test_consistency_network_time_is_that_of_the_scheduler():
    scheduler = CMStochasticIterativeScheduler()
    schedule = NoiseSchedule.from_scheduler(scheduler)
    t = torch.tensor([0, 321, 999])
    expected = torch.as_tensor(scheduler.sigma_to_t(schedule.sigma(t).numpy()))
    assert torch.allclose(schedule.timestep(t), expected, atol=1e-9)
    assert float(schedule.timestep(999)) == pytest.approx(250 * math.log(80), abs=1e-9)


def test_ddpm_network_time_is_the_index():
    schedule = NoiseSchedule.from_scheduler(DDPMScheduler(**SD))
    assert schedule.timestep(torch.tensor([0, 7, 999])).tolist() == [0, 7, 999]
    assert schedule.timestep(torch.tensor([7.25])).tolist() == [7.25]


# ---------------------------------------------------------------------- x0 from the network's output


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_edm_x0_is_that_of_diffusers(prediction):
    scheduler = EDMEulerScheduler(prediction_type=prediction, sigma_data=0.7)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    (x_t, output), t = draw(0, 1), torch.tensor([3, 500, 999])
    sigma = schedule.sigma(t)[:, None, None, None]
    expected = scheduler.precondition_outputs(x_t, output, sigma)
    assert torch.allclose(schedule.to_x0(output, x_t, t), expected, rtol=1e-12, atol=1e-12)
    c_in, _, _ = schedule.coefficients(t, x_t)
    assert torch.allclose(c_in * x_t, scheduler.precondition_inputs(x_t, sigma), rtol=1e-12)


@pytest.mark.parametrize("cls", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("t", [0, 400, 999])
def test_ddpm_x0_is_that_of_diffusers(cls, prediction, t):
    scheduler = cls(**SD, prediction_type=prediction)
    scheduler.set_timesteps(1000)
    x_t, output = draw(0, 1)
    expected = scheduler.step(output, t, x_t).pred_original_sample
    x0 = NoiseSchedule.from_scheduler(scheduler).to_x0(output, x_t, t)
    assert torch.allclose(x0, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("t", [0, 500, 999])
def test_consistency_x0_is_that_of_diffusers(t):
    scheduler = CMStochasticIterativeScheduler(clip_denoised=False)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    x_t, output = draw(0, 1)
    c_skip, c_out = scheduler.get_scalings_for_boundary_condition(schedule.sigma(t))
    assert torch.allclose(schedule.to_x0(output, x_t, t), c_skip * x_t + c_out * output, rtol=1e-12, atol=1e-12)
    if t == 0:  # the boundary condition
        assert torch.allclose(schedule.to_x0(output, x_t, t), x_t, atol=1e-12)


def test_consistency_one_step_is_that_of_diffusers():
    scheduler = CMStochasticIterativeScheduler(clip_denoised=False)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    scheduler.set_timesteps(1)
    x_t, output = draw(0, 1)
    scaled = scheduler.scale_model_input(x_t, scheduler.timesteps[0])
    assert torch.allclose(schedule.coefficients(schedule.last, x_t)[0] * x_t, scaled, rtol=1e-6)
    expected = scheduler.step(output, scheduler.timesteps[0], x_t).prev_sample
    assert torch.allclose(schedule.to_x0(output, x_t, schedule.last), expected, atol=1e-5)


def test_flow_one_step_is_that_of_diffusers():
    scheduler = FlowMatchEulerDiscreteScheduler()
    schedule = NoiseSchedule.from_scheduler(scheduler)
    scheduler.set_timesteps(1)
    x_t, output = (x.float() for x in draw(0, 1))
    expected = scheduler.step(output, scheduler.timesteps[0], x_t).prev_sample
    assert torch.allclose(schedule.to_x0(output, x_t, schedule.last), expected, atol=1e-5)


def test_the_true_network_output_gives_the_true_x0(schedule):
    x0, noise = draw(0, 1)
    t = torch.tensor([1, 500, 998])
    x_t = schedule.add_noise(x0, noise, t)
    _, c_skip, c_out = schedule.coefficients(t, x_t)
    truth = {
        "epsilon": noise,
        "v_prediction": expand(schedule.alpha(t), x0) * noise - expand(schedule.sigma(t), x0) * x0,
        "sample": x0,
        "flow": noise - x0,
    }
    # EDM defines its target by the preconditioning itself; the others have one of their own.
    output = truth[schedule.prediction] if schedule.prediction in truth else (x0 - c_skip * x_t) / c_out
    assert torch.allclose(schedule.to_x0(output, x_t, t), x0, atol=1e-9)


def test_add_noise_is_that_of_diffusers():
    x0, noise = draw(0, 1)
    t = torch.tensor([0, 400, 999])
    ddpm = DDPMScheduler(**SD)
    ours = NoiseSchedule.from_scheduler(ddpm).add_noise(x0, noise, t)
    assert torch.allclose(ours, ddpm.add_noise(x0, noise, t), atol=1e-6)
    flow = FlowMatchEulerDiscreteScheduler()
    ours = NoiseSchedule.from_scheduler(flow).add_noise(x0, noise, t)
    assert torch.allclose(ours, flow.scale_noise(x0, flow.timesteps[999 - t], noise), atol=1e-6)
    ours = NoiseSchedule.from_scheduler(EDMEulerScheduler()).add_noise(x0, noise, 999)
    assert torch.allclose(ours, x0 + 80 * noise, atol=1e-9)


# ---------------------------------------------------------------------- arithmetic


def test_arithmetic_is_float64_whatever_the_type_of_t(schedule):
    for t in (5, 5.0, torch.tensor(5), torch.tensor([5, 6]), torch.tensor([5.5, 6.0], dtype=torch.float32)):
        for value in (schedule.alpha(t), schedule.sigma(t), schedule.timestep(t), schedule.loss_weight(t)):
            assert value.dtype == torch.float64
            assert value.shape == torch.as_tensor(t).shape


def test_epsilon_coefficients_at_the_last_step_carry_no_float32_error():
    scheduler = DDPMScheduler(**SD)
    bar = float(scheduler.alphas_cumprod[999])
    _, c_skip, c_out = NoiseSchedule.from_scheduler(scheduler).coefficients(999, torch.zeros(1, dtype=torch.float64))
    assert float(c_skip) == pytest.approx(1 / math.sqrt(bar), rel=1e-15)
    assert float(c_out) == pytest.approx(-math.sqrt(1 - bar) / math.sqrt(bar), rel=1e-15)


def test_coefficients_are_cast_once_to_the_samples_dtype_and_rank(schedule):
    t = torch.tensor([1, 500, 998])
    exact = schedule.coefficients(t, torch.zeros(3, 1, 1, 1, dtype=torch.float64))
    for c, e in zip(schedule.coefficients(t, torch.zeros(3, 1, 1, 1)), exact):
        assert c.shape == (3, 1, 1, 1) and c.dtype == torch.float32
        assert torch.equal(c, e.float())


def test_fractional_indices_are_interpolated(schedule):
    levels = schedule.sigma(torch.tensor([10.0, 10.25, 11.0]))
    assert float(levels[1]) == pytest.approx(float(0.75 * levels[0] + 0.25 * levels[2]), rel=1e-12)


@pytest.mark.parametrize("name", ["edm", "edm_v", "flow", "epsilon", "v", "sample"])
def test_loss_weight_turns_the_x0_error_into_the_error_of_the_output(name):
    schedule = NoiseSchedule.from_scheduler(FAMILIES[name]())
    (x_t, output, target), t = draw(0, 1, 2), torch.tensor([3, 500, 990])
    error = schedule.to_x0(output, x_t, t) - schedule.to_x0(target, x_t, t)
    weight = expand(schedule.loss_weight(t), x_t)
    assert torch.allclose(weight * error**2, (output - target) ** 2, rtol=1e-9)


def test_loss_weight_of_edm_is_its_paper_lambda():
    schedule = NoiseSchedule.from_scheduler(EDMEulerScheduler())
    t = torch.arange(1000)
    assert torch.allclose(schedule.loss_weight(t), schedule.sigma(t) ** -2 + 0.5**-2, rtol=1e-12)


def test_loss_weight_of_a_consistency_model_stays_finite_at_its_boundary():
    # There its own c_out is 0; EDM's lambda is taken instead.
    schedule, t = NoiseSchedule.from_scheduler(CMStochasticIterativeScheduler()), torch.arange(1000)
    assert torch.allclose(schedule.loss_weight(t), schedule.sigma(t) ** -2 + 0.5**-2, rtol=1e-12)


def test_from_ratio_is_the_inverse_of_sigma_for_edm():
    schedule = NoiseSchedule.from_scheduler(EDMEulerScheduler())
    t = torch.linspace(0, 999, 5000, dtype=torch.float64)
    assert torch.allclose(schedule.from_ratio(schedule.sigma(t)), t, atol=1e-9)


def test_from_ratio_inverts_the_noise_to_signal_ratio_of_every_family(schedule):
    t = torch.arange(schedule.num_timesteps - 1)  # the last ratio may be infinite
    assert torch.allclose(schedule.from_ratio(schedule.ratios[:-1]), t.double(), atol=1e-9)


def test_from_ratio_between_two_levels_keeps_the_ratio_to_1e_4_for_ddpm():
    schedule = NoiseSchedule.from_scheduler(DDPMScheduler(**SD))
    ratio = (schedule.ratios[1:] * schedule.ratios[:-1]).sqrt()
    t = schedule.from_ratio(ratio)
    assert torch.allclose(schedule.sigma(t) / schedule.alpha(t), ratio, rtol=1e-4)


# ---------------------------------------------------------------------- drawing t


def test_sample_t_draws_20_to_980_inclusive():
    schedule = NoiseSchedule.from_scheduler(EDMEulerScheduler())
    t = schedule.sample_t(50_000, 0.02, 0.98, torch.Generator().manual_seed(0))
    assert t.dtype == torch.long and t.shape == (50_000,)
    assert t.unique().tolist() == list(range(20, 981))


def test_sample_t_draws_the_whole_schedule_by_default():
    schedule = NoiseSchedule.from_scheduler(EDMEulerScheduler())
    t = schedule.sample_t(50_000, generator=torch.Generator().manual_seed(0))
    assert t.unique().tolist() == list(range(1000))
    assert torch.equal(t, schedule.sample_t(50_000, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("low, high", [(0.5, 0.5), (0.9, 0.1), (-0.1, 0.5), (0.5, 1.1), (math.nan, 1.0)])
def test_a_range_that_is_none_is_refused(low, high):
    with pytest.raises(ValueError, match="low, high.*got"):
        NoiseSchedule.from_scheduler(EDMEulerScheduler()).sample_t(1, low, high)


@pytest.mark.parametrize("low, high", [(0.9999, 1.0), (0.0, 0.0001)])
def test_the_narrowest_ranges_hold_one_index(low, high):
    schedule = NoiseSchedule.from_scheduler(EDMEulerScheduler())
    first, last = schedule.index_range(low, high)
    assert 0 <= first == last <= 999
    assert schedule.sample_t(3, low, high).tolist() == [first] * 3


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize("t", [-1, 1000, 999.5, math.nan, math.inf, [5, 1001]])
def test_an_index_outside_the_schedule_is_refused(t):
    schedule = NoiseSchedule.from_scheduler(EDMEulerScheduler())
    for method in (schedule.alpha, schedule.sigma, schedule.timestep, schedule.loss_weight):
        with pytest.raises(ValueError, match=r"t: .*\[0, 999\]"):
            method(torch.as_tensor(t))


@pytest.mark.parametrize("ratio", [0.001, 81.0, math.nan])
def test_a_ratio_outside_the_schedule_is_refused(ratio):
    schedule = NoiseSchedule.from_scheduler(EDMEulerScheduler())
    with pytest.raises(ValueError, match=r"ratio: .*\[0.002, 80\]"):
        schedule.from_ratio(ratio)
    assert schedule.from_ratio(80 * (1 + 1e-12)) == 999


def test_a_scheduler_of_an_unknown_family_is_refused():
    with pytest.raises(ValueError, match="scheduler: ScoreSdeVeScheduler"):
        NoiseSchedule.from_scheduler(ScoreSdeVeScheduler())


@pytest.mark.parametrize(
    "scheduler",
    [
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        EDMEulerScheduler(prediction_type="sample"),
    ],
    ids=["flow_on_ddpm", "sample_on_edm"],
)
def test_an_unknown_prediction_type_is_refused_by_name(scheduler):
    with pytest.raises(ValueError, match=f"prediction_type '{scheduler.config.prediction_type}'.*allowed"):
        NoiseSchedule.from_scheduler(scheduler)


def test_epsilon_with_zero_terminal_snr_is_refused():
    with pytest.raises(ValueError, match="zero terminal SNR"):
        NoiseSchedule.from_scheduler(DDPMScheduler(**SD, rescale_betas_zero_snr=True))
