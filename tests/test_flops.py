# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""What is counted of a turn, against hand counts and the account of DMD2's iteration; and that counting changes nothing."""

import pytest
import torch
from helpers import edm_scheduler, sd_scheduler, tiny_text_unet, tiny_unet
from torch import nn

from diffusers_msd.adapters import lora_config, lora_network
from diffusers_msd.denoiser import denoiser_for, sample_shape
from diffusers_msd.draws import Draws
from diffusers_msd.flops import FlopCounter, PassCounter, count_work
from diffusers_msd.schedule import NoiseSchedule
from diffusers_msd.stage_config import StageConfig
from diffusers_msd.stages import build_stage


B = 4
FAMILIES = {
    "class": (tiny_unet, edm_scheduler, torch.arange(4)),
    "text": (tiny_text_unet, sd_scheduler, torch.randn(5, 16, 16, generator=torch.Generator().manual_seed(0))),
}
# Of batches: whole networks forward and back, encoders forward and back, by role.
PASSES = {
    ("tsm", "student"): {"student": "F b", "teacher": "F"},
    ("dm", "student"): {"student": "2F 2b", "teacher": "F", "fake_score": "F"},
    ("dm", "critic"): {"student": "F", "fake_score": "F b"},
    ("adm", "student"): {"student": "F b", "teacher": "F", "fake_score": "F E e", "discriminator": "F b"},
    ("adm", "critic"): {"student": "F", "fake_score": "F b 2E 2e", "discriminator": "2F 2b"},
}
# The same in forwards of a UNet F and of its encoder E: a backward pass is 2 of a trained network, 1 of a frozen one
# (arXiv 2405.14867; in DM 3 F more for the pairs).
COST = {
    ("tsm", "student"): (4, 0),
    ("dm", "student"): (8, 0),
    ("dm", "critic"): (4, 0),
    ("adm", "student"): (5, 2),
    ("adm", "critic"): (4, 6),
}
WAYS = {"F": "forward", "b": "backward", "E": "encoder_forward", "e": "encoder_backward"}


def read(passes: str) -> dict[str, int]:
    return {WAYS[entry[-1]]: int(entry[:-1] or 1) * B for entry in passes.split()}


def build(family: str, stage: str, lora: bool = False, **weights):
    make, scheduler, cond = FAMILIES[family]
    schedule = NoiseSchedule.from_scheduler(scheduler())
    teacher = make(seed=0)
    if lora:
        trained = [lora_network(teacher, lora_config(teacher, 2), seed).eval() for seed in (1, 2)]
    else:
        trained = [make(seed=seed) for seed in (1, 2)]
    null = cond[0] if family == "text" else None
    student, fake_score = (denoiser_for(model, schedule) for model in trained)
    torch.manual_seed(0)
    teacher = denoiser_for(teacher, schedule, null_cond=null)
    return build_stage(stage, student, teacher, fake_score, cond, StageConfig(**weights))


def backward(turn, family: str):
    """One run of a turn on random data."""
    turn.claim()
    generator = torch.Generator().manual_seed(3)
    shape = (B, *sample_shape(next(iter(turn.models().values()))))
    data = {name: torch.randn(shape, generator=generator) for name in ("images", "noise")}
    data["cond"] = FAMILIES[family][2][:B]
    turn(dict.fromkeys(turn.needs, data), Draws((0,), B, slice(None)))["loss"].mean().backward()


def gradients(turn) -> list[torch.Tensor]:
    found = [p.grad for p in turn.parameters() if p.grad is not None]
    assert found
    return found


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stage", ["tsm", "dm", "adm"])
def test_passes_by_role_are_those_of_the_method(stage, family, lora):
    for turn in build(family, stage, lora):
        with count_work(turn.networks()) as work:
            backward(turn, family)
        expected = {role: read(passes) for role, passes in PASSES[stage, turn.name].items()}
        assert work["passes"] == expected and work["flops"] > 0
        cost = [0, 0]
        for role, counts in work["passes"].items():
            if role != "discriminator":
                back = 2 if role in turn.models() else 1
                for i, prefix in enumerate(("", "encoder_")):
                    forward, backwards = (counts.get(f"{prefix}{way}", 0) // B for way in ("forward", "backward"))
                    cost[i] += forward + back * backwards
        assert tuple(cost) == COST[stage, turn.name]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stage", ["tsm", "dm", "adm"])
def test_counting_changes_no_gradient_and_leaves_no_hook(stage, family):
    for counted, plain in zip(build(family, stage), build(family, stage)):
        with count_work(counted.networks()):
            backward(counted, family)
        backward(plain, family)
        assert all(torch.equal(a, b) for a, b in zip(gradients(counted), gradients(plain), strict=True))
        modules = [m for network in counted.networks().values() for m in network.modules()]
        assert not any(m._forward_hooks or m._forward_pre_hooks or m._forward_hooks_always_called for m in modules)


def test_gradient_checkpointing_is_more_arithmetic_and_the_same_passes():
    plain, saving = (build("text", "adm")[1] for _ in range(2))
    saving.fake_score.model.enable_gradient_checkpointing()
    work = []
    for turn in (plain, saving):
        with count_work(turn.networks()) as counted:
            backward(turn, "text")
        work.append(counted)
    assert work[0]["passes"] == work[1]["passes"]
    assert 1.1 * work[0]["flops"] < work[1]["flops"] < 1.4 * work[0]["flops"]


def test_guidance_is_two_samples_through_the_teacher():
    turn = build("text", "dm", guidance_scale=3.0)[0]
    with count_work(turn.networks()) as work:
        backward(turn, "text")
    assert work["passes"]["teacher"] == {"forward": 2 * B}


def test_features_of_the_teacher_are_passes_of_the_teacher():
    student, critic = build("class", "adm", gan_features="teacher")
    with count_work(student.networks()) as work:
        backward(student, "class")
    assert work["passes"]["teacher"] == read("F E e") and work["passes"]["fake_score"] == read("F")
    with count_work(critic.networks()) as work:
        backward(critic, "class")
    # Nothing before the head learns from it.
    assert work["passes"]["teacher"] == read("2E") and work["passes"]["fake_score"] == read("F b")


def test_arithmetic_is_that_of_a_hand_count():
    net = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.Flatten(), nn.Linear(6 * 5 * 5, 7))
    x = torch.randn(3, 2, 5, 5)
    forward = 2 * 3 * (5 * 5 * 6 * 2 * 9) + 2 * 3 * (6 * 5 * 5 * 7)
    with FlopCounter() as counter:
        loss = net(x).square().sum()
    assert counter.flops == forward
    with FlopCounter() as counter:
        loss.backward()
    # Both weights get a gradient, and the input of the second layer; nobody asks for that of the images.
    assert counter.flops == forward + 2 * 3 * (6 * 5 * 5 * 7)


def test_attention_on_a_cpu_is_counted():
    """Forward: two products of [L, D] and [D, L] per head. Backward: five, since a fused kernel makes one again."""
    q = torch.zeros(2, 3, 16, 8, requires_grad=True)
    with FlopCounter() as counter:
        torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
    assert counter.flops == (2 + 5) * 2 * (2 * 3) * 16 * 16 * 8


def test_a_pass_belongs_to_its_own_backward():
    """Two passes of one network: the gradient reaches the first, though the second came later."""
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with PassCounter({"net": net}) as counter:
        first = net(torch.randn(3, 2))
        net(torch.randn(5, 2))
        first.sum().backward()
    assert counter.passes() == {"net": {"forward": 8, "backward": 3}}
