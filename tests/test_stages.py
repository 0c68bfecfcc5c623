# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Stages: whom a gradient reaches, what a turn owns, random numbers that do not depend on the split, and optima.

The optima are those of a 1-D Gaussian teacher N(MEAN, STD^2), whose denoiser is known in closed form.
"""

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from helpers import edm_scheduler, tiny_unet
from torch import nn

from diffusers_msd import Denoiser, NoiseSchedule, create_student, denoiser_for
from diffusers_msd.denoiser import sample_shape
from diffusers_msd.discriminator import DiscriminatorHead
from diffusers_msd.draws import Draws, derive_seed
from diffusers_msd.schedule import expand
from diffusers_msd.stage_config import StageConfig
from diffusers_msd.stages import (
    CriticTurn,
    DenoisingTurn,
    StudentTurn,
    TSMTurn,
    build_stage,
    create_discriminator,
    draw_inputs,
)


SCHEDULE = NoiseSchedule.from_scheduler(edm_scheduler())
BATCH = 4


def denoiser(seed: int) -> Denoiser:
    return denoiser_for(tiny_unet(seed=seed), SCHEDULE)


def networks() -> dict[str, Denoiser]:
    """Student, teacher and fake score of different weights."""
    return {"student": denoiser(0), "teacher": denoiser(1), "fake_score": denoiser(2)}


def stage(name: str, nets: dict[str, Denoiser], **config):
    # Part {1, 2} of four classes.
    torch.manual_seed(0)  # the head's first weights
    return build_stage(name, **nets, conditions=torch.tensor([1, 2]), config=StageConfig(**config))


def draws(total: int = BATCH, rows: slice = slice(None), *keys) -> Draws:
    return Draws(keys or (0, "test"), total, rows)


def data(total: int = BATCH, rows: slice = slice(None)) -> dict[str, dict[str, torch.Tensor]]:
    """Real images of the part and teacher pairs of all classes."""
    generator = torch.Generator().manual_seed(3)
    real, noise, images = (torch.randn(total, 1, 8, 8, generator=generator) for _ in range(3))
    return {
        "images": {"images": real[rows] / 2, "cond": (torch.arange(total) % 2 + 1)[rows]},
        "pairs": {"noise": noise[rows], "images": images[rows] / 2, "cond": (torch.arange(total) % 4)[rows]},
    }


def take_turn(turn, batch=None, draw=None) -> dict[str, torch.Tensor]:
    turn.claim()
    losses = turn(batch or data(), draw or draws())
    losses["loss"].mean().backward()
    return losses


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def nonzero(module: nn.Module) -> set[str]:
    return {name for name, gradient in gradients(module).items() if gradient.any()}


def clear(*modules: nn.Module):
    for module in modules:
        module.zero_grad(set_to_none=True)


# ---------------------------------------------------------------------- gradient routing


@pytest.mark.parametrize("name", ["tsm", "dm", "adm"])
def test_the_students_turn_leaves_no_gradient_on_the_other_networks(name):
    nets = networks()
    turns = stage(name, nets)
    take_turn(turns[0])
    assert nonzero(nets["student"].model) == {n for n, _ in nets["student"].model.named_parameters()}
    assert gradients(nets["teacher"]) == {} and gradients(nets["fake_score"]) == {}
    if name == "adm":
        assert gradients(turns[1].discriminator) == {}


@pytest.mark.parametrize("name", ["dm", "adm"])
def test_the_critics_turn_leaves_no_gradient_on_student_and_teacher(name):
    nets = networks()
    turns = stage(name, nets)
    take_turn(turns[0])  # the order of a real iteration: the student's turn left the critic frozen
    clear(*nets.values())
    take_turn(turns[1])
    assert gradients(nets["student"]) == {} and gradients(nets["teacher"]) == {}
    assert nonzero(nets["fake_score"].model) == {n for n, _ in nets["fake_score"].model.named_parameters()}


def test_the_critics_gan_gradient_reaches_head_and_encoder_and_never_the_decoder():
    nets = networks()
    with_gan = stage("adm", nets, gan_critic_weight=1.0)[1]
    take_turn(with_gan)
    both, head = gradients(nets["fake_score"].model), nonzero(with_gan.discriminator)
    clear(*nets.values())
    take_turn(stage("adm", nets, gan_critic_weight=0.0)[1])
    alone = gradients(nets["fake_score"].model)
    assert head == {name for name, _ in with_gan.discriminator.named_parameters()}
    changed = {name for name in both if not torch.equal(both[name], alone[name])}
    encoder = {n for n in both if n.split(".")[0] in ("conv_in", "time_embedding", "class_embedding", "down_blocks")}
    assert changed == encoder
    assert {n.split(".")[0] for n in set(both) - encoder} == {"mid_block", "up_blocks", "conv_norm_out", "conv_out"}


def test_the_gan_loss_alone_reaches_head_and_encoder_only():
    nets = networks()
    turn = stage("adm", nets)[1]
    turn.claim()
    turn(data(), draws())["gan"].mean().backward()
    assert set(gradients(turn.discriminator)) == {name for name, _ in turn.discriminator.named_parameters()}
    touched = {name.split(".")[0] for name in gradients(nets["fake_score"].model)}
    assert touched == {"conv_in", "time_embedding", "class_embedding", "down_blocks"}


def test_on_the_teachers_features_the_critics_gan_gradient_reaches_the_head_alone():
    nets = networks()
    turn = stage("adm", nets, gan_features="teacher")[1]
    turn.claim()
    turn(data(), draws())["gan"].mean().backward()
    assert nonzero(turn.discriminator) == {name for name, _ in turn.discriminator.named_parameters()}
    assert gradients(nets["fake_score"]) == {} and gradients(nets["teacher"]) == {}


def test_the_head_sees_the_features_of_the_network_that_is_named():
    """It does not change if the other network does."""
    for name, other in (("teacher", "fake_score"), ("fake_score", "teacher")):
        losses = []
        for seeds in ({}, {other: 5}, {name: 5}):
            nets = {**networks(), **{role: denoiser(seed) for role, seed in seeds.items()}}
            turns = stage("adm", nets, gan_features=name)
            losses.append([turn(data(), draws())["gan"] for turn in turns])
        for unchanged, same, changed in zip(*losses):
            assert torch.equal(unchanged, same) and not torch.equal(unchanged, changed)


@pytest.mark.parametrize("features", ["fake_score", "teacher"])
def test_the_students_gan_gradient_reaches_the_student_through_head_and_encoder(features):
    nets = networks()
    turn = stage("adm", nets, gan_features=features)[0]
    turn.claim()
    turn(data(), draws())["gan"].mean().backward()
    assert nonzero(nets["student"].model) == {n for n, _ in nets["student"].model.named_parameters()}
    assert gradients(nets["fake_score"]) == {} and gradients(turn.frozen["discriminator"]) == {}
    assert gradients(nets["teacher"]) == {}


def test_the_teacher_never_becomes_trainable():
    nets = networks()
    nets["teacher"].requires_grad_(False)
    for name in ("tsm", "dm", "adm"):
        turns = stage(name, nets)
        for turn in [*turns, *reversed(turns), *turns]:
            take_turn(turn)
            assert not any(p.requires_grad for p in nets["teacher"].parameters())
    # A teacher that arrives trainable is frozen by the first turn.
    nets["teacher"].requires_grad_(True)
    take_turn(stage("dm", nets)[0])
    assert not any(p.requires_grad for p in nets["teacher"].parameters())


def test_a_turn_owns_and_claims_exactly_the_networks_it_trains():
    nets = networks()
    for name, owned in {
        "tsm": [{"student"}],
        "dm": [{"student"}, {"fake_score"}],
        "adm": [{"student"}, {"fake_score", "discriminator"}],
    }.items():
        turns = stage(name, nets)
        assert [set(turn.models()) for turn in turns] == owned
        everything = {**nets, **({"discriminator": turns[1].discriminator} if name == "adm" else {})}
        for turn, own in zip(turns, owned):
            expected = {id(p) for n in own for p in everything[n].parameters()}
            assert {id(p) for p in turn.parameters()} == expected
            assert {id(p) for model in turn.models().values() for p in model.parameters()} == expected
            turn.claim()
            for n, net in everything.items():
                if n in own or n in turn.frozen:
                    assert {p.requires_grad for p in net.parameters()} == {n in own}


def test_the_regression_gradient_comes_from_the_pairs_of_all_classes():
    nets = networks()
    turn = stage("dm", nets)[0]
    assert turn.needs == ("pairs",)
    turn.claim()
    turn(data(), draws())["regression"].mean().backward()
    # Row y of the class embedding has gradient only if label y went through the student: all four, not the part's two.
    assert nets["student"].model.class_embedding.weight.grad.abs().amax(1).gt(0).all()
    clear(nets["student"])
    turn(data(64), draws(64))["dm"].mean().backward()
    assert nets["student"].model.class_embedding.weight.grad.abs().amax(1).gt(0).tolist() == [False, True, True, False]


# ---------------------------------------------------------------------- losses


@pytest.mark.parametrize(
    "name, turn, names",
    [
        ("tsm", 0, ["loss"]),
        ("dm", 0, ["loss", "dm", "regression"]),
        ("dm", 1, ["loss", "fake_score"]),
        ("adm", 0, ["loss", "dm", "gan"]),
        ("adm", 1, ["loss", "fake_score", "gan", "gan_accuracy"]),
    ],
)
def test_losses_are_per_sample(name, turn, names):
    losses = take_turn(stage(name, networks())[turn])
    assert list(losses) == names
    for value in losses.values():
        assert value.shape == (BATCH,) and value.isfinite().all()
    assert losses["loss"].requires_grad


def test_a_stage_weighs_its_losses_as_configured():
    nets = networks()
    losses = stage("dm", nets, regression_weight=0.7)[0](data(), draws())
    assert torch.allclose(losses["loss"], losses["dm"] + 0.7 * losses["regression"])
    student, critic = stage("adm", nets, gan_generator_weight=37.0, gan_critic_weight=0.3)
    losses = student(data(), draws())
    assert torch.allclose(losses["loss"], losses["dm"] + 37 / 64 * losses["gan"])  # per element of a sample
    losses = critic(data(), draws())
    assert torch.allclose(losses["loss"], losses["fake_score"] + 0.3 * losses["gan"])


def test_the_dm_gradient_is_zero_at_iteration_0_where_the_fake_score_is_the_teacher():
    nets = networks()
    nets["fake_score"] = denoiser_for(create_student(nets["teacher"].model), SCHEDULE).eval()
    losses = take_turn(stage("dm", nets, regression_weight=0.0)[0])
    assert torch.equal(losses["dm"], torch.zeros(BATCH))
    assert set(gradients(nets["student"].model)) and nonzero(nets["student"].model) == set()


def test_the_dm_stage_without_regression_needs_no_pairs():
    turn = stage("dm", networks(), regression_weight=0.0)[0]
    assert turn.needs == () and set(take_turn(turn, batch={"unused": {}})) == {"loss", "dm"}


def test_the_data_a_stage_needs():
    assert [t.needs for t in stage("tsm", networks())] == [("images",)]
    assert [t.needs for t in stage("dm", networks())] == [("pairs",), ()]
    assert [t.needs for t in stage("adm", networks())] == [(), ("images",)]


def test_the_student_waits_for_the_discriminator_in_the_adm_stage_only():
    for name, start in (("dm", 0), ("adm", 7)):
        student, critic = stage(name, networks(), student_update_interval=[3], gan_warmup_steps=7)
        assert (student.start, critic.start) == (start, 0)
        for step in range(30):
            expected = len([i for i in range(step) if i >= start and (i - start) % 3 == 0])
            assert student.runs_before(step) == expected
            assert critic.runs_before(step) == step


def test_the_student_rests_between_its_updates_and_the_critic_does_not():
    for name in ("dm", "adm"):
        student, critic = stage(name, networks(), student_update_interval=[3])
        assert (student.interval, critic.interval) == (3, 1)


class Echo(nn.Module):
    """A denoiser that predicts its input and remembers what it was asked."""

    def __init__(self):
        super().__init__()
        self.schedule, self.model = SCHEDULE, Affine()
        self.asked = []

    def forward(self, x_t, t, cond=None, guidance_scale=None):
        self.asked.append((x_t.detach(), t))
        return x_t

    def features(self, x_t, t, cond=None):
        return self(x_t, t)


class Sum(nn.Module):
    """The noised sample as its own logit."""

    def forward(self, features):
        return features.flatten(1).sum(1)


def echoing_stage(name: str, **config):
    """(student's turn, critic's turn, teacher, fake score) with `Echo`s; the student's samples are all about -1e4."""
    student, teacher, fake = AffineDenoiser(SCHEDULE), Echo(), Echo()
    with torch.no_grad():
        student.model.gain.fill_(0.0), student.model.bias.fill_(-2e4)
    conditions, config = torch.zeros(1).long(), no_regression(**config)
    head = Sum() if name == "adm" else None
    turns = (
        StudentTurn(student, teacher, fake, conditions, config, head),
        CriticTurn(student, fake, conditions, config, head),
    )
    return *turns, teacher, fake


def test_dm_draws_its_levels_from_20_to_980_and_the_critic_from_all():
    student, critic, teacher, fake = echoing_stage("dm")
    student({}, draws(50_000))
    (x_t, t), (fake_x_t, fake_t) = teacher.asked[0], fake.asked[0]
    assert torch.equal(x_t, fake_x_t) and torch.equal(t, fake_t)
    assert t.unique().tolist() == list(range(20, 981))
    critic({}, draws(50_000))
    assert fake.asked[1][1].unique().tolist() == list(range(1000))


@pytest.mark.parametrize("gan_t_max, last", [(1.0, 999), (0.5, 500)])
def test_the_gan_draws_its_levels_up_to_gan_t_max_in_both_turns(gan_t_max, last):
    student, critic, _, fake = echoing_stage("adm", gan_t_max=gan_t_max)
    real = {"images": {"images": torch.zeros(50_000, 1, 1, 1), "cond": torch.zeros(50_000).long()}}
    student({}, draws(50_000))
    critic(real, draws(50_000))
    dm, gan, denoising, both = (t for _, t in fake.asked)
    assert gan.unique().tolist() == both.unique().tolist() == list(range(last + 1))
    assert dm.max() == 980 and denoising.max() == 999


def test_every_denoising_loss_is_weighed_by_lambda_at_its_own_level():
    def weighed(error, t):
        return SCHEDULE.loss_weight(t).float() * error.flatten() ** 2

    student, fake, cond = AffineDenoiser(SCHEDULE), Echo(), torch.zeros(1).long()
    loss = CriticTurn(student, fake, cond, no_regression())({}, draws(100))["fake_score"]
    x_t, t = fake.asked[0]
    x = student.generate(*draw_inputs(student, cond, draws(100))).detach()
    assert torch.allclose(loss, weighed(x_t - x, t), rtol=1e-3)

    batch, student = real_data(draws(100)), Echo()
    loss = TSMTurn(student, GaussianDenoiser(SCHEDULE, teacher_distribution))(batch, draws(100))["loss"]
    x_t, t = student.asked[0]
    assert t.unique().numel() > 50
    error = x_t - gaussian_x0(x_t, expand(SCHEDULE.sigma(t), x_t), MEAN, STD)
    assert torch.allclose(loss, weighed(error, t), rtol=1e-3, atol=1e-3)

    teacher = Echo()
    loss = DenoisingTurn(teacher)(batch, draws(100))["loss"]
    x_t, t = teacher.asked[0]
    assert torch.allclose(loss, weighed(x_t - batch["images"]["images"], t), rtol=1e-3)


def test_the_critic_sees_real_and_fake_at_independent_noise_each_under_its_own_name():
    _, critic, _, fake = echoing_stage("adm")
    real = {"images": {"images": torch.full((5000, 1, 1, 1), 1e4), "cond": torch.zeros(5000).long()}}
    losses = critic(real, draws(5000))
    # Samples lie near -1e4 and real images at 1e4, far beyond the noise: told apart by their signs.
    assert losses["gan"].max() == 0 and losses["gan_accuracy"].min() == 1
    x_t, t = fake.asked[1]
    assert (t[:5000] == t[5000:]).double().mean() < 0.01
    sigma = SCHEDULE.sigma(t)
    heard = (sigma.chunk(2)[0] > 1) & (sigma.chunk(2)[1] > 1)  # below, float32 near 1e4 hides the noise
    (x,) = critic.frozen["student"].generate(torch.zeros(1, 1, 1, 1)).detach().flatten()
    of_fake, of_real = ((x_t.flatten() - torch.cat([x.expand(5000), torch.full((5000,), 1e4)])) / sigma).chunk(2)
    assert abs(torch.corrcoef(torch.stack([of_fake[heard], of_real[heard]]))[0, 1]) < 0.1
    assert abs(of_fake[heard].std() - 1) < 0.1 and abs(of_real[heard].std() - 1) < 0.1


def test_guidance_is_on_the_teacher_alone():
    nets = networks()
    for net in (nets["teacher"], nets["fake_score"], nets["student"]):
        net.null_cond = torch.tensor(0)
    sizes = {name: [] for name in nets}
    for name, net in nets.items():
        net.model.register_forward_hook(lambda m, args, output, name=name: sizes[name].append(len(args[0])))
    stage("dm", nets, guidance_scale=1.75, regression_weight=0.0)[0](data(), draws())
    assert sizes == {"student": [BATCH], "teacher": [2 * BATCH], "fake_score": [BATCH]}


def test_passes_per_turn_are_those_of_the_cost_model():
    # method.md section 5, adm: the student once, teacher and fake score once, one encoder pass; the critic's turn:
    # the student once, the fake score once, real and fake in one encoder pass of 2 B.
    nets = networks()
    turns = stage("adm", nets)
    calls = {name: [] for name in (*nets, "encoder")}

    def count(module, name):
        # The samples of each pass, and whether it keeps what a backward needs.
        module.register_forward_hook(lambda m, args, out: calls[name].append((len(args[0]), torch.is_grad_enabled())))

    for name, net in nets.items():
        count(net.model, name)
    count(nets["fake_score"].model.conv_in, "encoder")
    turns[0](data(), draws())
    assert calls["student"] == [(4, True)] and calls["teacher"] == calls["fake_score"] == [(4, False)]
    assert calls["encoder"] == [(4, False), (4, True)]
    for seen in calls.values():
        seen.clear()
    turns[1](data(), draws())
    assert calls["student"] == [(4, False)] and calls["teacher"] == [] and calls["fake_score"] == [(4, True)]
    assert calls["encoder"] == [(4, True), (8, True)]


# ---------------------------------------------------------------------- random numbers


def test_micro_rows_of_a_draw_are_slices_of_the_global_draw():
    whole = draws(6)
    expected = whole.normal(2, 3), whole.index(0, 9), whole.normal()
    assert [tuple(v.shape) for v in expected] == [(6, 2, 3), (6,), (6,)]
    for rows in (slice(0, 2), slice(2, 4), slice(4, 6)):
        part = draws(6, rows)
        for value, all_rows in zip((part.normal(2, 3), part.index(0, 9), part.normal()), expected):
            assert torch.equal(value, all_rows[rows])


def test_draws_are_a_function_of_their_keys_alone():
    torch.manual_seed(1)
    first = draws(4, slice(None), 0, "student", 7).normal(3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(draws(4, slice(None), 0, "student", 7).normal(3), first)
    assert torch.equal(torch.get_rng_state(), state)
    for other in ((1, "student", 7), (0, "critic", 7), (0, "student", 8)):
        assert not torch.equal(draws(4, slice(None), *other).normal(3), first)


def test_draws_have_the_distributions_they_name():
    many = draws(100_000)
    z, index = many.normal(), many.index(2, 5)
    assert abs(z.mean()) < 0.02 and abs(z.std() - 1) < 0.02
    assert index.dtype == torch.long and index.unique().tolist() == [2, 3, 4, 5]
    assert (index.bincount(minlength=6)[2:] / 100_000 - 0.25).abs().max() < 0.01


def test_seeds_of_different_keys_differ():
    keys = [(s, name, step) for s in range(5) for name in ("student", "critic") for step in range(50)]
    seeds = {derive_seed(*k) for k in keys}
    assert len(seeds) == len(keys) and all(0 <= s < 2**63 for s in seeds)
    assert derive_seed(1, 23) != derive_seed(12, 3) and derive_seed(1) != derive_seed("1")


@pytest.mark.parametrize("name, turn", [("tsm", 0), ("dm", 0), ("dm", 1), ("adm", 0), ("adm", 1)])
def test_a_turn_in_micro_batches_equals_one_big_batch(name, turn):
    nets = networks()
    for net in nets.values():
        net.double()
    turn = stage(name, nets)[turn].double()
    turn.claim()

    def run(*slices):
        clear(turn)
        parts = []
        for rows in slices:
            batch = {k: {n: v.double() if v.is_floating_point() else v for n, v in d.items()} for k, d in data(rows=rows).items()}  # fmt: skip
            parts.append(turn(batch, draws(rows=rows)))
            (parts[-1]["loss"].mean() / len(slices)).backward()
        return {k: torch.cat([p[k].detach() for p in parts]) for k in parts[0]}, gradients(turn)

    (whole, gradient), (parts, summed) = run(slice(0, 4)), run(slice(0, 2), slice(2, 4))
    for key in whole:
        assert torch.allclose(whole[key], parts[key], rtol=1e-5, atol=1e-7), key
    scale = max(float(g.abs().max()) for g in gradient.values())
    assert scale > 0 and max(float((gradient[n] - summed[n]).abs().max()) for n in gradient) < 1e-5 * scale


# ---------------------------------------------------------------------- the head, and errors


def test_the_head_for_size_8_has_dmd2s_layers():
    with torch.device("meta"):  # shapes only
        head = DiscriminatorHead(768, 8)
    kinds = [type(layer).__name__ for layer in head.layers]
    assert kinds == ["Conv2d", "GroupNorm", "SiLU", "Conv2d", "GroupNorm", "SiLU", "Conv2d"]
    assert [tuple(c.weight.shape) for c in head.layers[::3]] == [(768, 768, 4, 4), (768, 768, 4, 4), (1, 768, 1, 1)]
    assert head.layers[0].stride == (2, 2)
    assert [norm.num_groups for norm in head.layers[1::3]] == [32, 32]
    x = torch.zeros(2, 768, 8, 8, device="meta")
    sizes = []
    for layer in head.layers:
        x = layer(x)
        sizes.append(x.shape[-1])
    assert sizes == [4, 4, 4, 1, 1, 1, 1]


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_the_head_gives_one_logit_per_sample_that_depends_on_it_alone(size):
    torch.manual_seed(0)
    head = DiscriminatorHead(16, size)
    features = torch.randn(3, 16, size, size)
    logits = head(features)
    assert logits.shape == (3,) and logits.std() > 0
    assert torch.allclose(head(features[1:2]), logits[1:2], atol=1e-5)


@pytest.mark.parametrize("size", [0, 3, 6, -4])
def test_a_head_for_features_that_are_no_power_of_two_wide_is_refused(size):
    with pytest.raises(ValueError, match=f"size: .*power of two.*got {size}"):
        DiscriminatorHead(16, size)


def test_the_head_fits_the_features_and_saves_as_a_diffusers_model(tmp_path):
    head = create_discriminator(denoiser(0), torch.tensor([1]))
    assert (head.config.channels, head.config.size) == (16, 4)
    head.save_pretrained(tmp_path)
    features = torch.randn(2, 16, 4, 4)
    assert torch.equal(DiscriminatorHead.from_pretrained(tmp_path)(features), head(features))


def test_sample_shape_takes_one_size_or_two():
    assert sample_shape(tiny_unet()) == (1, 8, 8)
    assert sample_shape(tiny_unet(sample_size=(8, 16), channels=3)) == (3, 8, 16)


@pytest.mark.parametrize(
    "config, named",
    [
        ({"dm_t_min": 0.9, "dm_t_max": 0.1}, "dm_t_min"),
        ({"dm_t_max": 1.5}, "dm_t_max"),
        ({"regression_weight": -1.0}, "regression_weight"),
        ({"gan_generator_weight": -1.0}, "gan_generator_weight"),
        ({"gan_critic_weight": -1.0}, "gan_critic_weight"),
        ({"gan_t_max": 0.0}, "gan_t_max"),
        ({"gan_warmup_steps": -1}, "gan_warmup_steps"),
        ({"regression_distance": "l3"}, "regression_distance"),
        ({"gan_features": "student"}, "gan_features"),
        ({"student_update_interval": [0]}, "student_update_interval"),
        ({"student_update_interval": [5, -1]}, "student_update_interval"),
        ({"regression_weight": float("nan")}, "regression_weight"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(config, named):
    with pytest.raises(ValueError, match=f"{named}.*got"):
        StageConfig(**config)


def test_an_unknown_stage_is_refused():
    with pytest.raises(ValueError, match="stages: 'gan' is none of tsm, dm, adm"):
        stage("gan", networks())


# ---------------------------------------------------------------------- optima on a 1-D Gaussian


MEAN, STD = 0.3, 0.6


class Affine(ModelMixin, ConfigMixin):
    """F(u) = gain u + bias, one pair for each of `levels` noise levels; the smallest network there is."""

    @register_to_config
    def __init__(self, levels: int = 1, in_channels: int = 1, sample_size: int = 1):
        super().__init__()
        self.gain = nn.Parameter(torch.full((levels,), 0.2))
        self.bias = nn.Parameter(torch.full((levels,), -1.0))


class AffineDenoiser(Denoiser):
    """An `Affine` network behind EDM's preconditioning, on samples [B, 1, 1, 1]."""

    def __init__(self, schedule: NoiseSchedule, levels: int = 1):
        super().__init__(Affine(levels), schedule)
        times = schedule.timestep(torch.arange(schedule.num_timesteps)).float()
        self.between = (times[1:] + times[:-1]) / 2

    def call_network(self, x, timestep, cond):
        level = torch.bucketize(timestep.contiguous(), self.between).clamp(max=len(self.model.gain) - 1)[
            :, None, None, None
        ]
        return self.model.gain[level] * x + self.model.bias[level]

    def distribution(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(b, a) of the one step's x = a z + b ~ N(b, a^2)."""
        with torch.no_grad():
            b, ab = self.generate(torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1)).flatten()
        return b, ab - b


def gaussian_x0(x_t, sigma, mean, std):
    """E[x0 | x_t] for x0 ~ N(mean, std^2)."""
    return mean + std**2 / (std**2 + sigma**2) * (x_t - mean)


class GaussianDenoiser(Denoiser):
    """The exact denoiser of N(mean, std^2), where (mean, std) may follow another network."""

    def __init__(self, schedule: NoiseSchedule, distribution):
        super().__init__(Affine(), schedule)
        self.distribution = distribution

    def forward(self, x_t, t, cond=None, guidance_scale=None):
        return gaussian_x0(x_t, expand(self.schedule.sigma(t), x_t), *self.distribution())

    def features(self, x_t, t, cond=None):
        return torch.cat([x_t, expand(self.schedule.sigma(t), x_t)], dim=1)


class OptimalDiscriminator(nn.Module):
    """log p_real(x_t) / p_fake(x_t), the optimum of the discriminator's loss at every noise level."""

    def __init__(self, real, fake):
        super().__init__()
        self.real, self.fake = real, fake

    def forward(self, features):
        x_t, sigma = features.flatten(1).unbind(1)
        log_real, log_fake = (
            torch.distributions.Normal(mean, (std**2 + sigma**2).sqrt()).log_prob(x_t)
            for mean, std in (self.real(), self.fake())
        )
        return log_real - log_fake


def teacher_distribution():
    return torch.tensor(MEAN), torch.tensor(STD)


def no_regression(**config) -> StageConfig:
    return StageConfig(regression_weight=0.0, **config)


def train(turn, steps: int, lr: float, total: int = 256, batch=lambda draw: {}):
    """Adam with the learning rate falling to zero along a cosine."""
    turn.claim()
    optimizer = torch.optim.Adam(turn.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        optimizer.zero_grad()
        turn(batch(draws(total, slice(None), "data", step)), draws(total, slice(None), step))["loss"].mean().backward()
        optimizer.step()
        schedule.step()


def real_data(draw: Draws):
    return {"images": {"images": MEAN + STD * draw.normal(1, 1, 1), "cond": torch.zeros(draw.total).long()}}


def coarse_schedule(levels: int = 8) -> NoiseSchedule:
    """EDM's preconditioning over a few noise levels, so that a table of affine maps can be the exact optimum."""
    sigmas = torch.logspace(-1, 1, levels, dtype=torch.float64)
    return NoiseSchedule(torch.ones_like(sigmas), sigmas, "edm", SCHEDULE.network_time, float(sigmas[-1]), 0.5)


def closed_form_table(schedule: NoiseSchedule, mean: float, std: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(gain, bias) of F with which c_skip x + c_out F(c_in x) is the exact denoiser of N(mean, std^2)."""
    c_in, c_skip, c_out = schedule.coefficients(torch.arange(schedule.num_timesteps), torch.zeros(1).double())
    slope = std**2 / (std**2 + schedule.sigmas**2)
    return ((slope - c_skip) / (c_out * c_in)).float(), (mean * (1 - slope) / c_out).float()


@pytest.mark.parametrize("start", [(0.2, -1.0), (3.0, 1.5)], ids=["narrow", "wide"])
def test_dm_reaches_a_gaussian_teacher(start):
    student = AffineDenoiser(SCHEDULE)
    with torch.no_grad():
        student.model.gain.fill_(start[0]), student.model.bias.fill_(start[1])
    teacher = GaussianDenoiser(SCHEDULE, teacher_distribution)
    fake = GaussianDenoiser(SCHEDULE, student.distribution)
    turn = build_stage("dm", student, teacher, fake, torch.zeros(1).long(), no_regression())[0]
    train(turn, steps=400, lr=0.05)
    mean, std = student.distribution()
    assert abs(mean - MEAN) < 0.01 and abs(abs(std) - STD) < 0.01


def test_dm_with_regression_reaches_the_teachers_own_map():
    # Pairs (z, MEAN - STD z): the KL term does not know the sign of the map, the regression does.
    student = AffineDenoiser(SCHEDULE)
    teacher = GaussianDenoiser(SCHEDULE, teacher_distribution)
    fake = GaussianDenoiser(SCHEDULE, student.distribution)
    turn = build_stage("dm", student, teacher, fake, torch.zeros(1).long(), StageConfig(regression_weight=1.0))[0]

    def pairs(draw):
        z = draw.normal(1, 1, 1)
        return {"pairs": {"noise": z, "images": MEAN - STD * z, "cond": torch.zeros(len(z)).long()}}

    train(turn, steps=400, lr=0.05, batch=pairs)
    mean, std = student.distribution()
    assert abs(mean - MEAN) < 0.01 and abs(std + STD) < 0.01


@pytest.mark.parametrize("weight", [1.0, 37.0])
def test_adm_reaches_a_gaussian_teacher(weight):
    student = AffineDenoiser(SCHEDULE)
    teacher = GaussianDenoiser(SCHEDULE, teacher_distribution)
    fake = GaussianDenoiser(SCHEDULE, student.distribution)
    head = OptimalDiscriminator(teacher_distribution, student.distribution)
    config = no_regression(gan_generator_weight=weight)
    train(StudentTurn(student, teacher, fake, torch.zeros(1).long(), config, head), steps=400, lr=0.05)
    mean, std = student.distribution()
    assert abs(mean - MEAN) < 0.01 and abs(abs(std) - STD) < 0.01


def test_the_gan_term_alone_reaches_a_gaussian_teacher():
    # With the fake score equal to the teacher the DM gradient is exactly zero, so that only the GAN term drives.
    student = AffineDenoiser(SCHEDULE)
    teacher = GaussianDenoiser(SCHEDULE, teacher_distribution)
    head = OptimalDiscriminator(teacher_distribution, student.distribution)
    turn = StudentTurn(student, teacher, teacher, torch.zeros(1).long(), no_regression(), head)
    train(turn, steps=400, lr=0.05)
    mean, std = student.distribution()
    assert abs(mean - MEAN) < 0.01 and abs(abs(std) - STD) < 0.01


def test_tsm_reaches_a_gaussian_teachers_denoiser_at_every_level():
    schedule = coarse_schedule()
    student = AffineDenoiser(schedule, levels=8)
    train(TSMTurn(student, GaussianDenoiser(schedule, teacher_distribution)), steps=500, lr=0.05, batch=real_data)
    gain, bias = closed_form_table(schedule, MEAN, STD)
    assert torch.allclose(student.model.gain, gain, atol=1e-3)
    assert torch.allclose(student.model.bias, bias, atol=1e-3)


def test_the_fake_score_reaches_the_denoiser_of_the_students_distribution():
    schedule = coarse_schedule()
    student, fake = AffineDenoiser(schedule, levels=8), AffineDenoiser(schedule, levels=8)
    with torch.no_grad():
        student.model.gain.fill_(0.9), student.model.bias.fill_(-0.5)
    turn = CriticTurn(student, fake, torch.zeros(1).long(), no_regression())
    train(turn, steps=600, lr=0.05, total=4096)
    mean, std = (float(v) for v in student.distribution())
    gain, bias = closed_form_table(schedule, mean, std)
    assert torch.allclose(fake.model.gain, gain, atol=0.02)
    assert torch.allclose(fake.model.bias, bias, atol=0.02)


def test_teacher_training_reaches_the_denoiser_of_the_data():
    class EveryLevel(AffineDenoiser):
        """The exact gain at every noise level up to a factor and an offset to be learned, right at (1, 0)."""

        def call_network(self, x, timestep, cond):
            sigma = (4 * timestep).exp()[:, None, None, None]
            c_in, c_skip = (sigma**2 + 0.25).rsqrt(), 0.25 / (sigma**2 + 0.25)
            c_out = sigma / 2 * c_in
            exact = (gaussian_x0(x / c_in, sigma, MEAN, STD) - c_skip * x / c_in) / c_out
            return self.model.gain * exact + self.model.bias

    teacher = EveryLevel(SCHEDULE)
    train(DenoisingTurn(teacher), steps=300, lr=0.05, total=4096, batch=real_data)
    assert abs(teacher.model.gain - 1) < 0.02 and abs(teacher.model.bias) < 0.02


def test_teacher_training_draws_edms_log_normal_levels():
    seen = []

    class Recording(AffineDenoiser):
        def forward(self, x_t, t, cond=None, guidance_scale=None):
            seen.append(self.schedule.sigma(t).log())
            return super().forward(x_t, t, cond, guidance_scale)

    draw = draws(50_000)
    DenoisingTurn(Recording(SCHEDULE), log_sigma=(-1.0, 0.8))(real_data(draws(50_000)), draw)
    assert abs(seen[0].mean() + 1.0) < 0.02 and abs(seen[0].std() - 0.8) < 0.02
    seen.clear()
    DenoisingTurn(Recording(SCHEDULE), log_sigma=(0.0, 5.0))(real_data(draws(50_000)), draws(50_000))
    assert float(seen[0].exp().min()) >= 0.002 - 1e-12 and float(seen[0].exp().max()) <= 80 + 1e-9
