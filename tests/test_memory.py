# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""The estimate of a stage against what the same stage really holds, on small networks with weights."""

from functools import cache

import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers import edm_scheduler, sd_scheduler, tiny_text_unet, tiny_unet
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from diffusers_msd.adapters import lora_config, lora_network
from diffusers_msd.denoiser import denoiser_for, sample_shape
from diffusers_msd.draws import Draws
from diffusers_msd.memory import (
    LiveBytes,
    cache_bytes,
    estimate_memory,
    format_estimate,
    without_data,
)
from diffusers_msd.schedule import NoiseSchedule
from diffusers_msd.stage_config import StageConfig
from diffusers_msd.stages import build_stage
from diffusers_msd.training_config import TrainingConfig


FAMILIES = {
    # Wide enough that activations outweigh the handful of random numbers.
    "text": (
        lambda: tiny_text_unet(block_out_channels=(32, 64), sample_size=16),
        sd_scheduler,
        torch.randn(5, 16, 16),
    ),
    "class": (lambda: tiny_unet(sample_size=16, block_out_channels=(32, 64)), edm_scheduler, torch.tensor([0, 2])),
}
TURNS = [("tsm", 0), ("dm", 0), ("dm", 1), ("adm", 0), ("adm", 1)]


def build(family: str, stage: str, real: bool, dtype: torch.dtype | None = None, **weights):
    """The turns of a stage and valid conditions; with weights, or without data."""
    make, scheduler, cond = FAMILIES[family]
    models = [make() for _ in range(3)]
    models[1].to(dtype or torch.float32)  # the teacher, as train_msd.py keeps it
    if not real:
        with torch.device("meta"):
            bare = [type(model).from_config(model.config).to(model.dtype).eval() for model in models]
        models = [without_data(model) for model in bare]
    schedule = NoiseSchedule.from_scheduler(scheduler())
    null = cond[0] if family == "text" else None
    nets = [denoiser_for(model, schedule, null_cond=null, autocast_dtype=dtype) for model in models]
    return build_stage(stage, *nets, cond, StageConfig(**weights)), cond


def training(**settings) -> TrainingConfig:
    return TrainingConfig(**{"train_batch_size": 4, **settings})


@cache
def estimate(family: str, stage: str, dtype: torch.dtype | None = None, weights: tuple = (), **settings) -> dict:
    turns, cond = build(family, stage, False, dtype, **dict(weights))
    return estimate_memory(turns, training(**settings), cond)


def real_turn(family: str, stage: str, number: int, dtype: torch.dtype | None = None, checkpointing: bool = False):
    """A turn with weights, claimed; what is frozen in it; and a function of its loss, averaged over four samples."""
    turns, cond = build(family, stage, True, dtype)
    for turn in turns:
        for model in turn.models().values():
            if checkpointing and model._supports_gradient_checkpointing:
                model.enable_gradient_checkpointing()
    turn = turns[number]
    turn.claim()
    shape = sample_shape(next(iter(turn.models().values())))
    parameters = [p for module in [turn, *turn.frozen.values()] for p in module.parameters()]

    def loss() -> torch.Tensor:
        data = {"images": torch.zeros(4, *shape), "noise": torch.zeros(4, *shape), "cond": cond[torch.zeros(4).long()]}
        return turn(dict.fromkeys(turn.needs, data), Draws((0,), 4, slice(None)))["loss"].mean()

    return turn, parameters, loss


def saved_bytes(loss, parameters: list[torch.Tensor]) -> int:
    """What autograd itself keeps for the backward pass of `loss`, parameters aside."""
    known = {p.untyped_storage().data_ptr() for p in parameters}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss()
    assert value.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def allocated_peak(run) -> int:
    """The most bytes that torch's allocator had given out at a time during `run`, by torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("stage, number", TURNS)
@pytest.mark.parametrize("family", FAMILIES)
def test_without_data_a_turn_holds_what_it_holds_with_weights(family, stage, number):
    turn, parameters, loss = real_turn(family, stage, number)
    with LiveBytes(parameters) as live:
        loss().backward()
    estimated = estimate(family, stage)["turns"][turn.name]
    assert estimated["pass"] == pytest.approx(live.peak, rel=0.01)
    assert estimated["gradients"] == sum(p.grad.nbytes for p in turn.parameters())


@pytest.mark.parametrize("stage, number", TURNS)
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_what_autograd_keeps(family, stage, number):
    turn, parameters, loss = real_turn(family, stage, number)
    activations = estimate(family, stage)["turns"][turn.name]["activations"]
    # Besides, the batch itself and results are alive.
    saved = saved_bytes(loss, parameters)
    assert saved <= activations < 1.05 * saved


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage, number", TURNS)
def test_the_peak_of_a_pass_is_the_allocators(stage, number, checkpointing):
    turn, parameters, loss = real_turn("text", stage, number, checkpointing=checkpointing)
    loss()  # What is made once at the first call is not counted.
    peak = allocated_peak(lambda: loss().backward())
    estimated = estimate("text", stage, gradient_checkpointing=checkpointing)["turns"][turn.name]["pass"]
    # Kernels take some scratch memory.
    assert estimated == pytest.approx(peak, rel=0.1)


def test_norms_are_kept_in_float32_under_autocast_as_on_a_gpu():
    turn, parameters, loss = real_turn("text", "tsm", 0, torch.bfloat16)
    for module in turn.modules():
        if isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
            module.register_forward_pre_hook(lambda module, args: tuple(x.float() for x in args))
    half = estimate("text", "tsm", torch.bfloat16)["turns"]["student"]["activations"]
    saved = saved_bytes(loss, parameters)
    assert saved <= half < 1.1 * saved
    assert half < 0.9 * estimate("text", "tsm")["turns"]["student"]["activations"]
    both = estimate("text", "tsm", torch.bfloat16, gradient_checkpointing=True)
    assert both["turns"]["student"]["activations"] < half


def lora_turn(real: bool):
    """The turn of an adapter on a base stored in bfloat16, with weights or without data, and its conditions."""
    make, scheduler, cond = FAMILIES["text"]
    with torch.device("cpu" if real else "meta"):
        base = make().to(torch.bfloat16)
    base = base if real else without_data(base)
    with torch.device("cpu" if real else "meta"):
        student = lora_network(base, lora_config(base, 4)).eval()
    schedule = NoiseSchedule.from_scheduler(scheduler())
    student = student if real else without_data(student)
    nets = [denoiser_for(model, schedule, autocast_dtype=torch.bfloat16) for model in (student, base)]
    return build_stage("tsm", *nets, None, cond, StageConfig()), cond


def test_norms_of_an_adapters_half_precision_base_are_in_float32_too():
    turns, cond = lora_turn(True)
    turn = turns[0]
    for module in turn.modules():
        if isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
            module.float().register_forward_pre_hook(lambda module, args: tuple(x.float() for x in args))
    turn.claim()
    data = {"images": torch.zeros(4, *sample_shape(turn.student.model)), "cond": cond[torch.zeros(4).long()]}

    def loss() -> torch.Tensor:
        return turn({"images": data}, Draws((0,), 4, slice(None)))["loss"].mean()

    saved = saved_bytes(loss, [p for module in (turn, *turn.frozen.values()) for p in module.parameters()])
    turns, cond = lora_turn(False)
    activations = estimate_memory(turns, training(), cond)["turns"]["student"]["activations"]
    assert saved <= activations < 1.1 * saved


def test_checkpointing_keeps_fewer_activations_and_a_larger_batch_more():
    plain, checkpointed, twice = (
        estimate("text", "dm", **settings)["turns"]["student"]["activations"]
        for settings in ({}, {"gradient_checkpointing": True}, {"train_batch_size": 8})
    )
    assert checkpointed < 0.5 * plain
    assert twice == pytest.approx(2 * plain, rel=0.01)


def test_pairs_and_guidance_are_counted():
    with_pairs, without = (estimate("text", "dm", weights=(("regression_weight", w),)) for w in (0.25, 0.0))
    kept = [e["turns"]["student"]["activations"] for e in (with_pairs, without)]
    assert kept[0] == pytest.approx(2 * kept[1], rel=0.05)
    guided = estimate("text", "dm", weights=(("regression_weight", 0.0), ("guidance_scale", 3.0)))
    # Twice the batch through the teacher, on top of the student's activations.
    assert guided["turns"]["student"]["pass"] > without["turns"]["student"]["pass"]


def test_accumulated_gradients_are_there_during_the_next_pass():
    one, two = (estimate("text", "tsm", gradient_accumulation_steps=n)["turns"]["student"] for n in (1, 2))
    assert two["activations"] - one["activations"] == pytest.approx(one["gradients"], rel=0.05)
    assert two["pass"] > one["pass"]


def test_what_is_always_there_adds_up():
    unet = FAMILIES["text"][0]()
    count = sum(p.numel() for p in unet.parameters())
    e = estimate("text", "adm", torch.bfloat16)
    head = e["parameters"]["discriminator"]
    assert e["parameters"] == {"student": count, "teacher": count, "fake_score": count, "discriminator": head}
    assert e["weights"] == {
        "student": 4 * count,
        "teacher": 2 * count,
        "fake_score": 4 * count,
        "discriminator": 4 * head,
    }
    assert e["optimizer"] == {"student": 8 * count, "critic": 8 * (count + head)} and e["ema"] == 4 * count
    assert e["resident"] == 10 * count + 4 * head + 16 * count + 8 * head + 4 * count
    assert e["turns"]["student"]["update"] == 4 * count + 4 * count  # gradients, and how far the average moves
    assert e["turns"]["critic"]["update"] == 4 * (count + head)
    assert e["peak"] == e["resident"] + max(max(t["pass"], t["update"]) for t in e["turns"].values())
    small = estimate("text", "tsm", use_8bit_adam=True, ema_decay=0.0)
    assert small["optimizer"]["student"] == 2 * count and small["ema"] == 0


def test_a_large_network_is_run_without_memory_for_it():
    with torch.device("meta"):
        model = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280)
        )
    assert sum(p.numel() for p in without_data(model).parameters()) == 859_520_964  # Stable Diffusion 1.5
    real = torch.zeros(1, 4, 64, 64)
    with torch.no_grad():
        assert model(real, 10, torch.zeros(1, 77, 768)).sample.shape == real.shape


def test_networks_with_weights_are_refused():
    turns, cond = build("text", "tsm", True)
    with pytest.raises(ValueError, match="turns: the .* has weights"):
        estimate_memory(turns, training(), cond)
    with pytest.raises(ValueError, match="model: got a UNet2DConditionModel on cpu"):
        without_data(tiny_text_unet())


def test_live_bytes_counts_each_storage_from_its_creation_to_its_end():
    known = torch.zeros(100)
    with LiveBytes([known]) as live:
        a = torch.zeros(10)
        b = a.view(2, 5)[1]
        known.add_(1)
        assert live.now == 40
        c = a + known[:10]
        del a
        assert live.now == 80 and b.numel() == 5  # b keeps the memory of a
        del b
        assert live.now == 40 and live.peak == 80 and c.numel() == 10


def test_the_table_holds_the_numbers():
    e = estimate("text", "dm")
    text = format_estimate({**e, "flops": 2e12}, max_train_steps=1800, tflops=1.0)
    assert "student, trained by the student" in text and "teacher, frozen" in text and "batch 4" in text
    assert text.splitlines()[-1] == "1,800 iterations of 2 TFLOP on average, at 1 TFLOP/s: 1 hours"
    assert "34.38 MB" in format_estimate({**e, "peak": 34_380_000}).splitlines()[-1]
    assert "34.38 GB" in format_estimate({**e, "peak": 34_380_000_000}).splitlines()[-1]


@pytest.mark.parametrize("stage, number", [("tsm", 0), ("dm", 0), ("adm", 1)])
def test_arithmetic_is_that_of_the_real_turn_and_follows_the_interval(stage, number):
    turn, _, loss = real_turn("text", stage, number)
    aten = torch.ops.aten
    attention = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        loss().backward()
    turns, cond = build("text", stage, False, student_update_interval=[4])
    e = estimate_memory(turns, training(), cond)
    assert e["turns"][turn.name]["flops"] == counter.get_total_flops() > 0
    by_turn = {name: values["flops"] for name, values in e["turns"].items()}
    interval = 1 if stage == "tsm" else 4
    assert e["flops"] == by_turn["student"] / interval + by_turn.get("critic", 0)


def test_arithmetic_grows_with_accumulation():
    once, thrice = (estimate("text", "tsm", gradient_accumulation_steps=n) for n in (1, 3))
    assert thrice["flops"] == 3 * once["flops"]


def test_the_disk_for_cached_captions_is_that_of_its_tensors():
    cond, latents = torch.zeros(3, 77, 768).half(), torch.zeros(10, 4, 64, 64).half()
    expected = {"latents": latents.nbytes, "embeddings": 10 * (cond[0].nbytes + 2 * cond[0, 0].nbytes)}
    assert cache_bytes((4, 64, 64), cond, 10) == expected
