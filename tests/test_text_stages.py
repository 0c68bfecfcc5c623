# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""The stages on Stable Diffusion nets against DMD2's formulas, written down here once more and apart from our code."""

import pytest
import torch
from helpers import sd_scheduler, tiny_text_unet, tiny_vae

from diffusers_msd import NoiseSchedule, denoiser_for
from diffusers_msd.draws import Draws
from diffusers_msd.objectives import DISTANCES, l2_distance
from diffusers_msd.stage_config import StageConfig
from diffusers_msd.stages import DenoisingTurn, StudentTurn, build_stage


KEYS, BATCH, GUIDANCE = (0, "text"), 6, 1.75
EMBEDDINGS = torch.randn(5, 16, 16, generator=torch.Generator().manual_seed(1))
NULL = torch.randn(16, 16, generator=torch.Generator().manual_seed(2))


def networks(prediction_type="epsilon"):
    schedule = NoiseSchedule.from_scheduler(sd_scheduler(prediction_type))
    nets = {name: tiny_text_unet(seed) for seed, name in enumerate(("student", "teacher", "fake_score"))}
    return {name: denoiser_for(net, schedule, null_cond=NULL) for name, net in nets.items()}


def draws() -> Draws:
    return Draws(KEYS, BATCH, slice(None))


def alpha_bar() -> torch.Tensor:
    """Scaled-linear betas, float64."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)


def reference_x0(output, x_t, t, prediction_type):
    ab = alpha_bar()[t].reshape(-1, 1, 1, 1)
    a, s = ab.sqrt(), (1 - ab).sqrt()
    x_t, output = x_t.double(), output.double()
    return (x_t - s * output) / a if prediction_type == "epsilon" else a * x_t - s * output


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_one_generator_turn_equals_the_formulas_of_dmd2(prediction_type):
    nets = networks(prediction_type)
    student, teacher, fake = (nets[name].model for name in ("student", "teacher", "fake_score"))
    turn = build_stage("dm", **nets, conditions=EMBEDDINGS, config=StageConfig(
        regression_weight=0, guidance_scale=GUIDANCE, student_update_interval=[1]
    ))[0]  # fmt: skip
    turn.claim()
    losses = turn({}, draws())
    losses["loss"].mean().backward()
    got = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()

    draw = draws()
    cond = EMBEDDINGS[draw.index(0, 4)]
    z = draw.normal(4, 8, 8)
    last = torch.full((BATCH,), 999)
    x = reference_x0(student(z, last, cond).sample, z, last, prediction_type)
    t, eps = draw.index(20, 980), draw.normal(4, 8, 8).double()
    with torch.no_grad():
        ab = alpha_bar()[t].reshape(-1, 1, 1, 1)
        x_t = (ab.sqrt() * x.float() + (1 - ab).sqrt() * eps).float()
        uncond, conditional = teacher(x_t, t, NULL.expand(BATCH, -1, -1)).sample, teacher(x_t, t, cond).sample
        real = reference_x0(uncond + GUIDANCE * (conditional - uncond), x_t, t, prediction_type)
        guess = reference_x0(fake(x_t, t, cond).sample, x_t, t, prediction_type)
        g = (guess - real) / (x - real).abs().mean(dim=(1, 2, 3), keepdim=True)
        target = x - g
    loss = 0.5 * ((x - target) ** 2).mean(dim=(1, 2, 3))
    loss.mean().backward()
    assert torch.allclose(losses["dm"].double(), loss.detach(), rtol=1e-4)
    for name, parameter in student.named_parameters():
        assert torch.allclose(got[name], parameter.grad, rtol=1e-3, atol=1e-4 * parameter.grad.abs().max()), name


def test_the_fake_scores_loss_is_the_plain_error_of_epsilon_without_guidance():
    nets = networks()
    turn = build_stage(
        "dm", **nets, conditions=EMBEDDINGS, config=StageConfig(regression_weight=0, guidance_scale=9.0)
    )
    losses = turn[1]({}, draws())
    draw = draws()
    cond, z = EMBEDDINGS[draw.index(0, 4)], draw.normal(4, 8, 8)
    last = torch.full((BATCH,), 999)
    with torch.no_grad():
        x = reference_x0(nets["student"].model(z, last, cond).sample, z, last, "epsilon")
        t, eps = draw.index(0, 999), draw.normal(4, 8, 8)
        ab = alpha_bar()[t].reshape(-1, 1, 1, 1)
        x_t = (ab.sqrt() * x + (1 - ab).sqrt() * eps).float()
        expected = ((nets["fake_score"].model(x_t, t, cond).sample - eps) ** 2).mean(dim=(1, 2, 3))
    assert torch.allclose(losses["fake_score"], expected, rtol=2e-3)


def test_gan_features_of_clean_and_noised_latents_are_the_mid_blocks_output():
    net = networks()["fake_score"]
    seen = []
    handle = net.model.mid_block.register_forward_hook(lambda module, args, output: seen.append(output))
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    net.model(x, torch.tensor([3, 800]), EMBEDDINGS[:2])
    handle.remove()
    assert torch.allclose(net.features(x, torch.tensor([3, 800]), EMBEDDINGS[:2]), seen[0], atol=1e-5)


def test_a_distance_between_images_is_taken_after_decoding_with_gradient_to_the_student_alone(monkeypatch):
    # LPIPS needs a package that is not here; what is checked is where it would be applied.
    monkeypatch.setitem(DISTANCES, "lpips", lambda: l2_distance)
    nets, vae = networks(), tiny_vae().requires_grad_(False)
    pairs = {
        "noise": torch.randn(BATCH, 4, 8, 8),
        "images": torch.randn(BATCH, 4, 8, 8),
        "cond": EMBEDDINGS[:1].expand(BATCH, -1, -1),
    }
    config = StageConfig(regression_distance="lpips", regression_weight=1.0)
    turn = StudentTurn(**nets, conditions=EMBEDDINGS, config=config, decode=lambda latents: vae.decode(latents).sample)
    turn.claim()
    losses = turn({"pairs": pairs}, draws())
    losses["regression"].mean().backward()
    with torch.no_grad():
        made = nets["student"].generate(pairs["noise"], pairs["cond"])
        expected = l2_distance(vae.decode(made).sample, vae.decode(pairs["images"]).sample)
    assert torch.allclose(losses["regression"], expected, rtol=1e-4)
    assert all(p.grad is not None for p in nets["student"].model.parameters())
    assert all(p.grad is None for p in vae.parameters())


def test_a_teacher_learns_the_empty_prompt_on_its_share_of_the_samples():
    teacher = networks()["teacher"]
    seen = []
    teacher.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"].clone()), with_kwargs=True
    )
    batch = {"images": {"images": torch.randn(2000, 4, 8, 8), "cond": EMBEDDINGS[:1].repeat(2000, 1, 1)}}
    turn = DenoisingTurn(teacher, log_sigma=None, cond_dropout=0.2)
    with torch.no_grad():
        turn(batch, Draws(KEYS, 2000, slice(None)))
    dropped = (seen[0] == NULL).flatten(1).all(dim=1)
    assert 0.17 < dropped.float().mean() < 0.23
    assert (seen[0][~dropped] == EMBEDDINGS[0]).all()
