# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Denoiser over real tiny networks: x0 by hand, guidance, feature taps, the one step, bfloat16."""

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, EDMEulerScheduler, UNet2DConditionModel
from helpers import edm_scheduler, tiny_unet

from diffusers_msd import Denoiser, NoiseSchedule, denoiser_for
from diffusers_msd.denoiser import ClassDenoiser, TextDenoiser


def text_unet(seed: int = 0) -> UNet2DConditionModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DConditionModel(
            sample_size=8,
            in_channels=2,
            out_channels=2,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            attention_head_dim=4,
            cross_attention_dim=12,
        ).eval()


def sd_schedule() -> NoiseSchedule:
    return NoiseSchedule.from_scheduler(
        DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    )


def edm_schedule() -> NoiseSchedule:
    return NoiseSchedule.from_scheduler(edm_scheduler())


def normal(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def class_case(**kwargs):
    """(denoiser, x_t, t, cond) over an EDM net with class labels; the last label stands for none."""
    denoiser = denoiser_for(tiny_unet(num_classes=4), edm_schedule(), null_cond=torch.tensor(3), **kwargs)
    return denoiser, normal(3, 1, 8, 8), torch.tensor([20, 500, 980]), torch.tensor([0, 2, 1])


def text_case(**kwargs):
    """(denoiser, x_t, t, cond) over an epsilon net with prompt embeddings."""
    denoiser = denoiser_for(text_unet(), sd_schedule(), null_cond=normal(5, 12, seed=9), **kwargs)
    return denoiser, normal(3, 2, 8, 8), torch.tensor([20, 500, 980]), normal(3, 5, 12, seed=1)


CASES = {"class": class_case, "text": text_case}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


class Counter:
    """Counts the calls of a module and remembers the batch size of the last one."""

    def __init__(self, module: torch.nn.Module):
        self.calls = 0
        self.handle = module.register_forward_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs, output):
        self.calls += 1
        self.batch = len(args[0]) if args else len(kwargs["hidden_states"])


def num_hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# ---------------------------------------------------------------------- x0


def test_edm_x0_is_the_preconditioning_formula():
    denoiser, x_t, t, cond = class_case()
    sigma = torch.tensor([float(denoiser.schedule.sigma(i)) for i in t])[:, None, None, None]
    with torch.no_grad():
        scaled = x_t / (sigma**2 + 0.25).sqrt()
        output = denoiser.model(scaled, sigma.flatten().log() / 4, class_labels=cond).sample
        expected = 0.25 / (sigma**2 + 0.25) * x_t + sigma * 0.5 / (sigma**2 + 0.25).sqrt() * output
        assert torch.allclose(denoiser(x_t, t, cond), expected, atol=1e-5)


def test_epsilon_x0_is_the_formula():
    denoiser, x_t, t, cond = text_case()
    bar = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod[t]
    bar = bar[:, None, None, None]
    with torch.no_grad():
        epsilon = denoiser.model(x_t, t, encoder_hidden_states=cond).sample
        expected = (x_t - (1 - bar).sqrt() * epsilon) / bar.sqrt()
        assert torch.allclose(denoiser(x_t, t, cond), expected, rtol=1e-4, atol=1e-4)


def test_an_unconditional_net_ignores_the_condition():
    denoiser = denoiser_for(tiny_unet(num_classes=None), edm_schedule())
    x_t = normal(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(denoiser(x_t, 500), denoiser(x_t, 500, torch.tensor([0, 1])))


def test_one_index_for_all_equals_one_per_sample(case):
    denoiser, x_t, _, cond = case()
    with torch.no_grad():
        assert torch.equal(denoiser(x_t, 500, cond), denoiser(x_t, torch.tensor([500] * 3), cond))


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_x0_is_float32_for_any_weights(case, weights):
    denoiser, x_t, t, cond = case()
    denoiser.to(weights)
    with torch.no_grad():
        for x in (x_t, x_t.bfloat16()):
            assert denoiser(x, t, cond).dtype == torch.float32
            assert denoiser.features(x, t, cond).dtype == torch.float32


def test_the_samples_of_a_batch_do_not_mix(case):
    denoiser, x_t, t, cond = case()
    with torch.no_grad():
        together = denoiser(x_t, t, cond)
        alone = torch.cat([denoiser(x_t[i : i + 1], t[i : i + 1], cond[i : i + 1]) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-4)


def test_the_family_picks_the_denoiser():
    assert type(class_case()[0]) is ClassDenoiser and type(text_case()[0]) is TextDenoiser
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    with pytest.raises(TypeError, match="model: AutoencoderKL.*UNet2DModel, UNet2DConditionModel"):
        denoiser_for(vae, edm_schedule())


# ---------------------------------------------------------------------- guidance


def test_guidance_extrapolates_two_separate_predictions(case):
    denoiser, x_t, t, cond = case()
    null = denoiser.null_cond.expand_as(cond)
    with torch.no_grad():
        u, c = denoiser(x_t, t, null), denoiser(x_t, t, cond)
        guided = denoiser(x_t, t, cond, guidance_scale=1.75)
    assert not torch.allclose(u, c, atol=1e-3)
    assert torch.allclose(guided, u + 1.75 * (c - u), atol=1e-3, rtol=1e-4)


def test_guidance_runs_both_halves_as_one_batch(case):
    denoiser, x_t, t, cond = case()
    counter = Counter(denoiser.model)
    with torch.no_grad():
        for index in (t, 500):
            counter.calls = 0
            denoiser(x_t, index, cond, guidance_scale=2.0)
            assert (counter.calls, counter.batch) == (1, 6)
        for off in (None, 1, 1.0):
            counter.calls = 0
            denoiser(x_t, t, cond, guidance_scale=off)
            assert (counter.calls, counter.batch) == (1, 3)


def test_guidance_without_a_null_condition_is_refused_before_the_net_runs():
    denoiser = denoiser_for(tiny_unet(), edm_schedule())
    counter = Counter(denoiser.model)
    with pytest.raises(ValueError, match="guidance_scale: 2.0.*null condition"):
        denoiser(normal(2, 1, 8, 8), 500, torch.tensor([0, 1]), guidance_scale=2.0)
    assert counter.calls == 0


# ---------------------------------------------------------------------- features


def test_features_are_the_activation_of_a_plain_forward(case):
    denoiser, x_t, t, cond = case()
    seen = {}
    handles = [
        denoiser.model.mid_block.register_forward_pre_hook(lambda m, args: seen.update(into=args[0])),
        denoiser.model.mid_block.register_forward_hook(lambda m, args, output: seen.update(out=output)),
    ]
    with torch.no_grad():
        denoiser(x_t, t, cond)
        for handle in handles:
            handle.remove()
        features = denoiser.features(x_t, t, cond)
    # EDM: what enters the middle; Stable Diffusion: what leaves it (DMD2's two choices).
    assert torch.equal(features, seen["into" if isinstance(denoiser, ClassDenoiser) else "out"])
    assert features.shape == (3, 16, 4, 4)


def test_features_do_not_run_the_decoder(case):
    denoiser, x_t, t, cond = case()
    decoder = [Counter(block) for block in (*denoiser.model.up_blocks, denoiser.model.conv_out)]
    encoder = Counter(denoiser.model.conv_in)
    middle = Counter(denoiser.model.mid_block)
    with torch.no_grad():
        denoiser.features(x_t, t, cond)
    assert encoder.calls == 1 and all(c.calls == 0 for c in decoder)
    assert middle.calls == (0 if isinstance(denoiser, ClassDenoiser) else 1)


def test_features_leave_no_hook_behind(case):
    denoiser, x_t, t, cond = case()
    with torch.no_grad():
        before = denoiser(x_t, t, cond)
        denoiser.features(x_t, t, cond)
        assert num_hooks(denoiser.model) == 0
        with pytest.raises(Exception):
            denoiser.features(x_t[:, :0], t, cond)
        assert num_hooks(denoiser.model) == 0
        assert torch.equal(denoiser(x_t, t, cond), before)


def test_features_carry_gradient_to_the_sample_and_the_encoder_only(case):
    denoiser, x_t, t, cond = case()
    x_t = x_t.requires_grad_()
    denoiser.features(x_t, t, cond).square().sum().backward()
    assert x_t.grad.abs().flatten(1).amax(1).gt(0).all()
    reached = {name.split(".")[0] for name, p in denoiser.model.named_parameters() if p.grad is not None}
    assert {"conv_in", "down_blocks", "time_embedding"} <= reached
    assert reached.isdisjoint({"up_blocks", "conv_norm_out", "conv_out"})


# ---------------------------------------------------------------------- the one step


def test_generate_is_edms_one_step_of_diffusers():
    denoiser, z, _, cond = class_case()
    scheduler = EDMEulerScheduler()
    scheduler.set_timesteps(1)
    t = scheduler.timesteps[0]
    x_t = 80 * z  # not init_noise_sigma, which is sqrt(80^2 + 1)
    with torch.no_grad():
        output = denoiser.model(scheduler.scale_model_input(x_t, t), t, class_labels=cond).sample
        expected = scheduler.step(output, t, x_t).pred_original_sample
        assert torch.allclose(denoiser.generate(z, cond), expected, atol=1e-5)


def test_generate_is_the_epsilon_formula_at_the_last_step_in_float64():
    denoiser, _, _, cond = text_case()
    denoiser.double()
    z, cond = normal(3, 2, 8, 8, dtype=torch.float64), cond.double()
    bar = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod[999].double()
    with torch.no_grad():
        epsilon = denoiser.model(z, 999, encoder_hidden_states=cond).sample
        x = denoiser.generate(z, cond)
    assert x.dtype == torch.float64
    assert torch.allclose(x, (z - (1 - bar).sqrt() * epsilon) / bar.sqrt(), rtol=1e-12, atol=1e-12)


def test_generate_does_not_clamp():
    denoiser, z, _, cond = class_case()
    with torch.no_grad():
        denoiser.model.conv_out.bias.fill_(10.0)
        assert denoiser.generate(z, cond).min() > 1


# ---------------------------------------------------------------------- bfloat16


@pytest.mark.parametrize("outer", [False, True], ids=["alone", "inside_autocast"])
def test_a_no_grad_call_does_not_cut_the_gradient_of_the_next(case, outer):
    # torch's autocast keeps the weights it has cast; before torch 2.13 those cast under no_grad had no gradient.
    denoiser, x_t, t, cond = case(autocast_dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=outer):
        with torch.no_grad():
            denoiser(x_t, t, cond)
            denoiser.features(x_t, t, cond)
        denoiser(x_t, t, cond).square().sum().backward()
    assert [name for name, p in denoiser.model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_autocast_runs_the_net_in_bfloat16_and_keeps_its_weights_and_x0_in_float32(case):
    denoiser, x_t, t, cond = case(autocast_dtype=torch.bfloat16)
    seen = []
    denoiser.model.conv_in.register_forward_hook(lambda m, args, output: seen.append(output.dtype))
    with torch.no_grad():
        x0 = denoiser(x_t, t, cond)
        denoiser.autocast_dtype = None
        exact = denoiser(x_t, t, cond)
    assert seen == [torch.bfloat16, torch.float32]
    assert x0.dtype == torch.float32 and denoiser.model.dtype == torch.float32
    assert not torch.equal(x0, exact)
    assert (x0 - exact).abs().max() < 0.05 * exact.abs().max()


def test_a_new_family_overrides_two_methods():
    class Halving(Denoiser):
        def call_network(self, x, timestep, cond):
            return x / 2

    denoiser = Halving(tiny_unet(), sd_schedule())
    x_t = normal(2, 1, 8, 8)
    alpha, sigma = (float(f(500)) for f in (denoiser.schedule.alpha, denoiser.schedule.sigma))
    assert torch.allclose(denoiser(x_t, 500), (x_t - sigma * x_t / 2) / alpha, atol=1e-6)
    with pytest.raises(NotImplementedError):
        denoiser.features(x_t, 500)
