# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""`MultiStudentPipeline` with prompts: routing by the one encoder pass, few steps, sizes, the Hub, and errors."""

import contextlib
import inspect
import json
import logging
import re
import shutil
from pathlib import Path

import accelerate.hooks
import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from helpers import (
    edm_scheduler,
    generators,
    random_prompts,
    sd_scheduler,
    tiny_pipeline,
    tiny_stable_diffusion,
    tiny_text_encoder,
    tiny_text_pipeline,
    tiny_text_router,
    tiny_text_unet,
    tiny_unet,
    tiny_vae,
)
from hub_server import HubServer
from huggingface_hub import ModelCard
from test_hub import run_python
from transformers import CLIPConfig, CLIPImageProcessor

from diffusers_msd import ClassRouter, EmbeddingRouter, MultiStudentPipeline, NoiseSchedule, denoiser_for
from diffusers_msd.prompts import embed_prompts, pool_embeddings


PROMPTS = random_prompts()
FEW = {"timesteps": [999, 749, 499, 249]}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return tiny_text_pipeline(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def fresh(tmp_path):
    """A pipeline of its own for tests that put hooks on it or change it."""
    (tmp_path / "tokenizer_files").mkdir()
    return tiny_text_pipeline(tmp_path / "tokenizer_files")


def variant_of(pipe: MultiStudentPipeline, **parts) -> MultiStudentPipeline:
    other = MultiStudentPipeline(**{**pipe.components, **parts})
    other.set_progress_bar_config(disable=True)
    return other


def one_of_each(pipe: MultiStudentPipeline) -> list[str]:
    """One prompt per student, of falling student number."""
    students = pipe.route(PROMPTS)
    return [PROMPTS[students.index(k)] for k in reversed(range(pipe.router.num_students))]


class Ran(list):
    """The networks that ran, in order, by forward hooks."""

    def __init__(self, pipe: MultiStudentPipeline):
        networks = {"text_encoder": pipe.text_encoder, "vae": pipe.vae and pipe.vae.decoder, **pipe.students}
        for name, network in networks.items():
            if network is not None:
                network.register_forward_hook(lambda module, args, output, name=name: self.append(name))


def assert_same_weights(a: MultiStudentPipeline, b: MultiStudentPipeline) -> bool:
    names = [name for name, part in a.components.items() if isinstance(part, torch.nn.Module)]
    assert {"vae", "text_encoder"} < set(names)
    for name in names:
        state = b.components[name].state_dict()
        assert all(torch.equal(value, state[key]) for key, value in a.components[name].state_dict().items())


# Order and routing


def test_mixed_batch_equals_single_calls_and_keeps_the_order(pipe):
    prompts = one_of_each(pipe) + PROMPTS[:2]
    seeds = range(len(prompts))
    batch = pipe(prompts, generator=generators(*seeds), output_type="pt")
    assert batch.student_indices[:4] == [3, 2, 1, 0] and batch.student_indices == pipe.route(prompts)
    assert batch.images.shape == (6, 3, 16, 16) and batch.nsfw_content_detected is None
    for i, (prompt, seed) in enumerate(zip(prompts, seeds)):
        alone = pipe(prompt, generator=generators(seed), output_type="pt")
        assert alone.student_indices == [batch.student_indices[i]]
        assert (alone.images[0] - batch.images[i]).abs().max() < 1e-4


def test_each_image_is_the_one_step_of_its_student(pipe):
    prompts = one_of_each(pipe)
    noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    made = pipe(prompts, latents=noise, output_type="latent").images
    embeds, _ = embed_prompts(pipe.tokenizer, pipe.text_encoder, prompts)
    schedule = NoiseSchedule.from_scheduler(sd_scheduler())
    others = []
    for i, k in enumerate([3, 2, 1, 0]):
        with torch.no_grad():
            own = denoiser_for(pipe.students[k], schedule).generate(noise[i : i + 1], embeds[i : i + 1])
            others.append(denoiser_for(pipe.students[i], schedule).generate(noise[i : i + 1], embeds[i : i + 1]))
        assert torch.allclose(made[i : i + 1], own, atol=1e-4)
        assert (made[i : i + 1] - others[-1]).abs().max() > 1e-2


def test_unused_students_never_run_and_the_encoder_runs_once(fresh):
    prompts = one_of_each(fresh)
    ran = Ran(fresh)
    fresh([prompts[0], prompts[2], prompts[0]], output_type="np")
    assert ran == ["text_encoder", 1, 3, "vae"]
    ran.clear()
    fresh(prompts[0], student=2, output_type="latent")
    assert ran == ["text_encoder", 2]


def test_routing_is_that_of_the_pooled_embedding_of_the_router(pipe):
    embeds, mask = embed_prompts(pipe.tokenizer, pipe.text_encoder, PROMPTS)
    assert pipe.route(PROMPTS) == pipe.router(embeddings=pool_embeddings(embeds, mask, "eos")).tolist()
    mean = tiny_text_router(pipe.tokenizer, pipe.text_encoder, 4, pooling="mean")
    by_mean = variant_of(pipe, router=mean).route(PROMPTS)
    assert by_mean == mean(embeddings=pool_embeddings(embeds, mask, "mean")).tolist() != pipe.route(PROMPTS)


def test_given_embeddings_are_the_prompt(pipe):
    prompts = one_of_each(pipe)
    embeds, mask = pipe.encode_prompt(prompts)
    by_text, by_embeds = (
        pipe(**condition, generator=generators(1, 2, 3, 4), output_type="pt")
        for condition in ({"prompt": prompts}, {"prompt_embeds": embeds, "prompt_mask": mask})
    )
    assert by_text.student_indices == by_embeds.student_indices == pipe.route(prompt_embeds=embeds, prompt_mask=mask)
    assert torch.equal(by_text.images, by_embeds.images)
    repeated, repeated_mask = pipe.encode_prompt(prompts, num_images_per_prompt=2)
    assert torch.equal(repeated[::2], embeds) and torch.equal(repeated[1::2], embeds)
    assert torch.equal(repeated_mask[1::2], mask)


def test_missing_mask_is_said_once_where_it_matters(pipe, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("diffusers_msd"), "propagate", True)
    embeds, mask = pipe.encode_prompt(PROMPTS[:2])

    def warnings(pipe, **kwargs):
        caplog.clear()
        pipe(prompt_embeds=embeds, output_type="latent", **kwargs)
        return [record for record in caplog.records if "prompt_mask: not given" in record.getMessage()]

    assert len(warnings(pipe)) == 1
    assert warnings(pipe, prompt_mask=mask) == warnings(pipe, prompt_mask=mask.bool()) == []
    assert warnings(pipe, student=1) == []
    router = tiny_text_router(pipe.tokenizer, pipe.text_encoder, 1)
    single = MultiStudentPipeline(
        pipe.scheduler, router, pipe.vae, pipe.text_encoder, pipe.tokenizer, unet_0=pipe.unet_0
    )
    single.set_progress_bar_config(disable=True)
    assert warnings(single) == []


def test_images_per_prompt_lie_side_by_side(pipe):
    a, b = one_of_each(pipe)[:2]
    output = pipe([a, b], num_images_per_prompt=2, generator=generators(1, 2, 3, 4), output_type="pt")
    assert output.student_indices == [3, 3, 2, 2]
    single = pipe([a, a, b, b], generator=generators(1, 2, 3, 4), output_type="pt")
    assert torch.allclose(output.images, single.images, atol=1e-5)


# Output


def test_output_types_agree_and_go_through_the_vae(pipe):
    kwargs = {"prompt": PROMPTS[:2], "latents": torch.ones(2, 4, 8, 8)}
    latent, pt, array, pil = (pipe(**kwargs, output_type=kind).images for kind in ("latent", "pt", "np", "pil"))
    with torch.no_grad():
        decoded = pipe.vae.decode(latent / pipe.vae.config.scaling_factor, return_dict=False)[0]
    assert torch.allclose(pt, (decoded / 2 + 0.5).clamp(0, 1), atol=1e-5)
    assert latent.dtype == pt.dtype == torch.float32 and array.dtype == np.float32
    assert np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    assert pil[0].mode == "RGB" and pil[0].size == (16, 16)
    images, students = pipe(**kwargs, output_type="pt", return_dict=False)
    assert torch.equal(images, pt) and students == pipe.route(PROMPTS[:2])


def test_shift_of_the_vae_is_added(pipe):
    latent = pipe(PROMPTS[0], latents=torch.ones(1, 4, 8, 8), output_type="latent").images
    vae = tiny_vae()
    vae.register_to_config(shift_factor=0.5)
    with torch.no_grad():
        expected = vae.decode(latent / vae.config.scaling_factor + 0.5, return_dict=False)[0]
        assert torch.allclose(variant_of(pipe, vae=vae).decode_latents(latent), expected, atol=1e-5)


def test_any_multiple_of_the_vae_factor_is_a_size(pipe):
    # 7 latents: an odd side, which the UNet halves and doubles.
    images = pipe(PROMPTS[0], height=14, width=24, output_type="pt").images
    assert images.shape == (1, 3, 14, 24)
    assert pipe(PROMPTS[0], width=24, latents=torch.zeros(1, 4, 8, 12), output_type="pt").images.shape[-2:] == (16, 24)


def test_slicing_and_tiling_reach_the_vae(fresh):
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = fresh(PROMPTS[:2], latents=latents, output_type="pt").images
    ran = Ran(fresh)
    fresh.enable_vae_slicing()
    sliced = fresh(PROMPTS[:2], latents=latents, output_type="pt").images
    assert ran.count("vae") == 2 and torch.allclose(sliced, whole, atol=1e-4)
    fresh.disable_vae_slicing()
    fresh.enable_vae_tiling()
    assert fresh.vae.use_tiling and not fresh.vae.use_slicing
    fresh.disable_vae_tiling()
    assert not fresh.vae.use_tiling


@pytest.mark.parametrize("threshold", [1.0, -1.0])
def test_safety_checker_blackens_what_it_objects_to(pipe, threshold):
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision |= {"image_size": 16, "patch_size": 8}
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=8)).eval()
    # A cosine is never above 1 and never below -1.
    checker.concept_embeds_weights.data.fill_(threshold)
    checker.special_care_embeds_weights.data.fill_(1.0)
    extractor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    checked = variant_of(pipe, safety_checker=checker, feature_extractor=extractor)
    kwargs = {"prompt": PROMPTS[:2], "latents": torch.ones(2, 4, 8, 8)}
    for kind in ("pt", "np"):
        output = checked(**kwargs, output_type=kind)
        assert output.nsfw_content_detected == [threshold < 0] * 2
        assert bool((output.images == 0).all()) == (threshold < 0)
    assert (np.asarray(checked(**kwargs).images[0]).max() == 0) == (threshold < 0)
    latent = checked(**kwargs, output_type="latent")
    assert latent.nsfw_content_detected is None and latent.images.abs().max() > 0
    assert len(checked(**kwargs, return_dict=False)) == 2


# Few steps


def test_few_steps_equal_a_loop_by_hand(pipe):
    few = variant_of(pipe, student_timesteps=FEW)
    prompts, seeds = one_of_each(few), [5, 6, 7, 8]
    for steps in (None, 1, 3):
        made = few(prompts, generator=generators(*seeds), num_inference_steps=steps, output_type="latent").images
        embeds, _ = embed_prompts(few.tokenizer, few.text_encoder, prompts)
        alphas = few.scheduler.alphas_cumprod.double()
        for i, k in enumerate([3, 2, 1, 0]):
            generator = torch.Generator().manual_seed(seeds[i])
            x, x0 = torch.randn(1, 4, 8, 8, generator=generator), None
            for step, t in enumerate(FEW["timesteps"][:steps]):
                if step:
                    x = alphas[t] ** 0.5 * x0 + (1 - alphas[t]) ** 0.5 * torch.randn(1, 4, 8, 8, generator=generator)
                with torch.no_grad():
                    epsilon = few.students[k](x.float(), t, embeds[i : i + 1], return_dict=False)[0]
                x0 = (x - (1 - alphas[t]) ** 0.5 * epsilon) / alphas[t] ** 0.5
            assert torch.allclose(made[i : i + 1], x0.float(), atol=1e-3)
    assert few(prompts[0], num_inference_steps=2, output_type="latent") and few.num_timesteps == 2


def test_few_step_image_does_not_depend_on_its_batch(pipe):
    few = variant_of(pipe, student_timesteps=FEW)
    prompts = one_of_each(few)
    batch = few(prompts, generator=generators(1, 2, 3, 4), output_type="pt").images
    alone = few(prompts[2], generator=generators(3), output_type="pt").images
    assert (alone[0] - batch[2]).abs().max() < 1e-4


def test_class_conditional_students_may_take_few_steps_too():
    pipe = tiny_pipeline(2)
    few = variant_of(pipe, student_timesteps={"timesteps": [999, 500]})
    calls = []

    def callback(pipeline, step, timestep, kwargs):
        calls.append((step, timestep, kwargs["latents"].std() > 2))
        return {}

    few(class_labels=[0, 3], callback_on_step_end=callback, output_type="np")
    sigma = NoiseSchedule.from_scheduler(edm_scheduler()).sigma(500)
    assert sigma > 2
    # What the second step starts from is noisy; what it ends with is not.
    assert [call[:2] for call in calls] == [(0, 999), (1, 500)] and calls[0][2] and not calls[1][2]


def test_callbacks_see_every_step_and_may_replace_the_latents(pipe):
    few = variant_of(pipe, student_timesteps=FEW)
    seen = []

    def watch(pipeline, step, timestep, kwargs):
        seen.append((step, timestep, tuple(kwargs["latents"].shape), pipeline.num_timesteps))
        return {}

    def zero(pipeline, step, timestep, kwargs):
        return {"latents": torch.zeros_like(kwargs["latents"])} if step == zero.at else kwargs

    run = {"prompt": PROMPTS[0], "output_type": "latent"}
    plain = few(**run, generator=generators(1)).images
    watched = few(**run, generator=generators(1), callback_on_step_end=watch).images
    assert seen == [(i, t, (1, 4, 8, 8), 4) for i, t in enumerate(FEW["timesteps"])]
    assert torch.equal(plain, watched)
    zero.at = 1
    assert not torch.allclose(few(**run, generator=generators(1), callback_on_step_end=zero).images, plain, atol=1e-3)
    zero.at = 3
    assert (few(**run, callback_on_step_end=zero).images == 0).all()


def test_progress_bar_counts_students_and_steps(fresh, capsys):
    few = MultiStudentPipeline(**fresh.components, student_timesteps=FEW)
    few.set_progress_bar_config(disable=False)
    few(one_of_each(few)[:3], output_type="latent")
    assert "12/12" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        ([999, 499], TypeError),
        ({"timesteps": 999}, TypeError),
        ({"timesteps": [999.0]}, TypeError),
        ({"timesteps": [999, True]}, TypeError),
        ({"timesteps": [999], "other": 1}, TypeError),
        ({}, TypeError),
        ({"timesteps": []}, ValueError),
        ({"timesteps": [998, 499]}, ValueError),
        ({"timesteps": [999, 499, 499]}, ValueError),
        ({"timesteps": [999, 499, 749]}, ValueError),
        ({"timesteps": [999, -1]}, ValueError),
        ({"timesteps": [1000, 999]}, ValueError),
    ],
)
def test_bad_timesteps_are_refused_at_construction(pipe, setting, error):
    with pytest.raises(error, match="^student_timesteps: "):
        variant_of(pipe, student_timesteps=setting)


# Errors, each before a network runs


EMBEDS = torch.zeros(1, 16, 16)
# Few at random may leave a part of a router empty: these do not.
POINTS = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "prompt, prompt_embeds, class_labels: give exactly one, got none"),
        ({"prompt": "a", "class_labels": 0}, "give exactly one, got prompt, class_labels"),
        ({"prompt": "a", "prompt_embeds": EMBEDS}, "give exactly one, got prompt, prompt_embeds"),
        ({"class_labels": 0}, "class_labels: the students of this pipeline take prompts"),
        ({"prompt": ["a", ""]}, "prompt: number 1 is empty"),
        ({"prompt": []}, "prompt: at least one"),
        ({"prompt": 3}, "prompt: a string or a list of strings expected, got 3"),
        ({"prompt": "a", "negative_prompt": "b"}, "negative_prompt: students run without guidance"),
        ({"prompt": "a", "negative_prompt": ""}, "negative_prompt: "),
        ({"prompt": "a", "prompt_mask": torch.ones(1, 16)}, "prompt_mask: it goes with prompt_embeds alone"),
        ({"prompt_embeds": torch.zeros(16, 16)}, r"prompt_embeds: .*\[B, L, 16\] expected, got \(16, 16\)"),
        ({"prompt_embeds": torch.zeros(1, 16, 8)}, r"prompt_embeds: .*\[B, L, 16\] expected, got \(1, 16, 8\)"),
        ({"prompt_embeds": torch.zeros(0, 16, 16)}, "prompt_embeds: "),
        ({"prompt_embeds": torch.zeros(1, 16, 16).long()}, "prompt_embeds: a tensor of floats"),
        ({"prompt_embeds": [0.0]}, "prompt_embeds: .*got list"),
        ({"prompt_embeds": EMBEDS + torch.nan}, "prompt_embeds: a value is not finite"),
        ({"prompt_embeds": EMBEDS, "prompt_mask": torch.ones(1, 15)}, r"prompt_mask: .*\(1, 16\) expected"),
        ({"prompt_embeds": EMBEDS, "prompt_mask": [1] * 16}, "prompt_mask: .*got list"),
        ({"prompt_embeds": EMBEDS, "prompt_mask": torch.zeros(1, 16)}, "prompt_mask: 1 on real tokens"),
        ({"prompt_embeds": EMBEDS, "prompt_mask": torch.full((1, 16), 2)}, "prompt_mask: 1 on real tokens"),
        ({"prompt": "a", "height": 15}, "height: a positive multiple of 2 pixels expected, got 15"),
        ({"prompt": "a", "height": 0}, "height: a positive multiple of 2"),
        ({"prompt": "a", "width": -2}, "width: a positive multiple of 2"),
        ({"prompt": "a", "width": 16.5}, "width: a positive multiple of 2"),
        ({"prompt": "a", "height": True}, "height: a positive multiple of 2"),
        ({"prompt": "a", "num_inference_steps": 2}, "num_inference_steps: an integer in 1 ... 1 expected, got 2"),
        ({"prompt": "a", "num_inference_steps": 0}, "num_inference_steps: "),
        ({"prompt": "a", "num_inference_steps": 1.0}, "num_inference_steps: "),
        ({"prompt": "a", "student": 4}, "student: 4 is not present, allowed are .0, 1, 2, 3."),
        ({"prompt": "a", "output_type": "jpg"}, "output_type: 'jpg' is not one of"),
        ({"prompt": "a", "num_images_per_prompt": 0}, "num_images_per_prompt: "),
        ({"prompt": ["a", "b"], "generator": generators(1)}, "generator: a list needs one per image, got 1 for 2"),
        ({"prompt": "a", "latents": torch.zeros(1, 4, 8, 9)}, r"latents: .*shape \(1, 4, 8, 8\) expected"),
        (
            {"prompt": "a", "callback_on_step_end_tensor_inputs": ["prompt_embeds"]},
            "callback_on_step_end_tensor_inputs: .*prompt_embeds",
        ),
    ],
)
def test_bad_input_is_named_before_anything_runs(pipe, kwargs, message):
    ran = Ran(pipe)
    with pytest.raises((ValueError, TypeError), match=message):
        pipe(**kwargs)
    assert ran == []


def test_class_conditional_students_make_their_own_size_only():
    pipe = tiny_pipeline(2)
    assert pipe(class_labels=0, height=8, width=8, output_type="np").images.shape == (1, 8, 8, 1)
    with pytest.raises(ValueError, match="^width: class-conditional students make images of 8, got 16"):
        pipe(class_labels=0, width=16)
    with pytest.raises(ValueError, match="^negative_prompt"):
        pipe(class_labels=0, negative_prompt="a")


def test_missing_components_are_named_at_the_call(pipe):
    bare = variant_of(pipe, text_encoder=None, tokenizer=None, vae=None)
    ran = Ran(bare)
    with pytest.raises(ValueError, match="^prompt: without text_encoder and tokenizer"):
        bare("a")
    embeds, mask = pipe.encode_prompt(PROMPTS[:1])
    with pytest.raises(ValueError, match="^vae: this pipeline has none to make 'pil'"):
        bare(prompt_embeds=embeds, prompt_mask=mask)
    assert ran == []
    latents = torch.ones(1, 4, 8, 8)
    made = bare(prompt_embeds=embeds, prompt_mask=mask, latents=latents, output_type="latent").images
    assert torch.equal(made, pipe(PROMPTS[0], latents=latents, output_type="latent").images)


def test_a_pipeline_without_router_or_scheduler_says_so_before_anything_runs(pipe):
    for name, message in (("router", "router: this pipeline has none, pass student="), ("scheduler", "scheduler: ")):
        bare = variant_of(pipe, **{name: None})
        ran = Ran(bare)
        with pytest.raises(ValueError, match=f"^{message}"):
            bare(PROMPTS[0])
        assert ran == []
    unrouted = variant_of(pipe, router=None)
    with pytest.raises(ValueError, match="^router: this pipeline has none"):
        unrouted.route(PROMPTS[0])
    assert unrouted(PROMPTS[0], student=2, output_type="latent").student_indices == [2]


def test_encode_prompt_needs_the_text_parts_alone(pipe):
    parts = inspect.signature(MultiStudentPipeline.__init__).parameters.keys() - {"self"}
    text = MultiStudentPipeline(
        **{**dict.fromkeys(parts), "text_encoder": pipe.text_encoder, "tokenizer": pipe.tokenizer}
    )
    for got, expected in zip(text.encode_prompt(PROMPTS[:2]), pipe.encode_prompt(PROMPTS[:2])):
        assert torch.equal(got, expected)
    with pytest.raises(ValueError, match="^unet_0: this pipeline has no students"):
        text(PROMPTS[0])


def test_prompt_of_an_absent_student_is_named(pipe):
    partial = variant_of(pipe, unet_1=None)
    prompts = one_of_each(pipe)
    with pytest.raises(
        ValueError, match=rf"^prompt: number 1 \('{prompts[2]}'\) belongs to student 1, which is absent"
    ):
        partial([prompts[0], prompts[2]])
    embeds, mask = pipe.encode_prompt(prompts)
    with pytest.raises(ValueError, match="^prompt_embeds: number 2 belongs to student 1"):
        partial(prompt_embeds=embeds, prompt_mask=mask)
    assert partial(prompts[2], student=0, output_type="latent").student_indices == [0]


# Parts that do not fit


def test_router_of_another_encoder_is_refused_and_of_another_precision_accepted(pipe):
    with pytest.raises(ValueError, match="^router, text_encoder: .*another text encoder"):
        variant_of(pipe, text_encoder=tiny_text_encoder(seed=1))
    for dtype in (torch.bfloat16, torch.float16):
        half = tiny_text_encoder().to(dtype)
        assert variant_of(pipe, text_encoder=half).route(PROMPTS[0]) == pipe.route(PROMPTS[0])
    unsigned = tiny_text_router(pipe.tokenizer, pipe.text_encoder, 4, text_encoder_fingerprint=None)
    assert variant_of(pipe, router=unsigned, text_encoder=tiny_text_encoder(seed=1)).route(PROMPTS[0])


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ({"unet_1": tiny_unet()}, TypeError, "unet_1: a UNet2DConditionModel is needed, got UNet2DModel"),
        (
            {"unet_1": tiny_text_unet(sample_size=16)},
            ValueError,
            "unet_1: sample_size is 16, the other students have 8",
        ),
        ({"unet_1": tiny_text_unet(cross_attention_dim=8)}, ValueError, "unet_1: cross_attention_dim is 8, the other"),
        ({"unet_1": tiny_text_unet(in_channels=3)}, ValueError, "unet_1: in_channels is 3, the other"),
        ({"unet_1": tiny_text_unet(out_channels=3)}, ValueError, "unet_1: out_channels is 3, the other"),
        ({"unet_0": tiny_text_unet(num_class_embeds=3)}, ValueError, "unet_0: num_class_embeds is 3; students are"),
        (
            {"text_encoder": tiny_text_encoder(hidden_size=8)},
            ValueError,
            "unet_0: cross_attention_dim is 16, .* have 8",
        ),
        ({"router": ClassRouter.consecutive(4, 4)}, ValueError, "router: .*prompts cannot be routed by ClassRouter"),
        (
            {"router": EmbeddingRouter.fit_random(POINTS[:, :8], 4)},
            ValueError,
            "router: it cuts embeddings of 8 numbers, .* have 16",
        ),
        (
            {"router": EmbeddingRouter.fit_random(POINTS, 4, pooling="first")},
            ValueError,
            "router: its pooling is 'first'",
        ),
        ({"safety_checker": tiny_unet()}, ValueError, "feature_extractor: "),
    ],
)
def test_parts_that_do_not_fit_are_refused(pipe, parts, error, message):
    with pytest.raises(error, match=f"^{message}"):
        variant_of(pipe, **parts)


def test_other_misfits_are_refused(pipe):
    with pytest.raises(ValueError, match="^router: .*labels cannot be routed by EmbeddingRouter"):
        MultiStudentPipeline(edm_scheduler(), pipe.router, unet_0=tiny_unet(), unet_1=None, unet_2=None, unet_3=None)
    threes = {f"unet_{k}": tiny_text_unet(in_channels=3, out_channels=3) for k in range(4)}
    with pytest.raises(ValueError, match="^unet_0: in_channels is 3, latents of the vae have 4"):
        variant_of(pipe, **threes)
    with pytest.raises(TypeError, match="^unet_0: a UNet2DModel or UNet2DConditionModel is needed, got AutoencoderKL"):
        variant_of(pipe, unet_0=tiny_vae())
    with pytest.raises(ValueError, match="^unet_2: cross_attention_dim is 8"):
        variant_of(pipe).add_student(2, tiny_text_unet(cross_attention_dim=8))


# Precision and offload


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loads_and_runs_as_saved(pipe, tmp_path, dtype):
    pipe.save_pretrained(tmp_path / "p")
    half = MultiStudentPipeline.from_pretrained(tmp_path / "p", dtype=dtype)
    half.set_progress_bar_config(disable=True)
    assert {half.vae.dtype, half.text_encoder.dtype, *(unet.dtype for unet in half.students.values())} == {dtype}
    assert half.router.directions.dtype == torch.float32
    prompts = one_of_each(pipe)
    images = half(prompts, generator=generators(1, 2, 3, 4), student=0, output_type="pt").images
    reference = pipe(prompts, generator=generators(1, 2, 3, 4), student=0, output_type="pt").images
    assert images.dtype == torch.float32 and (images - reference).abs().mean() < 0.05
    mixed = MultiStudentPipeline.from_pretrained(tmp_path / "p", dtype={"unet_1": dtype, "default": torch.float32})
    mixed.set_progress_bar_config(disable=True)
    assert (mixed.unet_0.dtype, mixed.unet_1.dtype, mixed.vae.dtype) == (torch.float32, dtype, torch.float32)
    assert mixed(prompts, output_type="pt").student_indices == [3, 2, 1, 0]


def test_offload_sends_the_encoder_and_each_student_back_before_the_next_runs(fresh, monkeypatch):
    # Students 1 and 3: diffusers' own chain would leave the encoder on the device, and student 1 while 3 runs.
    prompts = [prompt for prompt, k in zip(one_of_each(fresh), [3, 2, 1, 0]) if k in (1, 3)]
    expected = fresh(prompts, generator=generators(1, 2), output_type="pt").images
    names = {fresh.text_encoder: "text_encoder", fresh.vae: "vae", **{unet: k for k, unet in fresh.students.items()}}
    fresh.enable_model_cpu_offload(device="cpu")
    events = []
    for network, name in names.items():
        network = network.decoder if name == "vae" else network
        network.register_forward_hook(lambda module, args, output, name=name: events.append(("run", name)))
    init_hook = accelerate.hooks.CpuOffload.init_hook

    def recorded(hook, module):
        events.append(("offload", names[module]))
        return init_hook(hook, module)

    monkeypatch.setattr(accelerate.hooks.CpuOffload, "init_hook", recorded)
    images = fresh(prompts, generator=generators(1, 2), output_type="pt").images
    assert [event for event in events if event[0] == "run"] == [("run", n) for n in ("text_encoder", 1, 3, "vae")]
    for name, following in (("text_encoder", 1), (1, 3), (3, "vae")):
        assert events.index(("run", name)) < events.index(("offload", name)) < events.index(("run", following))
    assert torch.equal(images, expected)


def test_tokens_go_where_the_encoder_runs_not_where_its_weights_rest(fresh):
    fresh.enable_sequential_cpu_offload(device="cpu")
    assert fresh.text_encoder.device.type == "meta"
    seen = []
    fresh.text_encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].device.type))
    # What follows fails on a CPU, in accelerate 1.15 and for stock pipelines too: it takes "cpu:0" for another device.
    with contextlib.suppress(TypeError):
        fresh.encode_prompt(PROMPTS[0])
    assert seen == ["cpu"]


def test_group_offload_changes_nothing(fresh):
    prompts, run = one_of_each(fresh), {"output_type": "pt"}
    expected = fresh(prompts, generator=generators(1, 2, 3, 4), **run).images
    cpu = torch.device("cpu")
    fresh.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    assert torch.allclose(fresh(prompts, generator=generators(1, 2, 3, 4), **run).images, expected, atol=1e-5)


# Saving and loading


def test_save_and_load_are_bit_exact(pipe, tmp_path):
    few = variant_of(pipe, student_timesteps=FEW)
    few.save_pretrained(tmp_path / "p")
    index = json.loads((tmp_path / "p/model_index.json").read_text())
    assert index["student_timesteps"] == FEW and index["unet_3"] == ["diffusers", "UNet2DConditionModel"]
    assert "safety_checker" not in index
    for cls in (MultiStudentPipeline, DiffusionPipeline):
        loaded = cls.from_pretrained(tmp_path / "p")
        assert type(loaded) is MultiStudentPipeline and loaded.timesteps == FEW["timesteps"]
        assert_same_weights(few, loaded)
        assert torch.equal(loaded.router.directions, few.router.directions)
        assert torch.equal(loaded.router.offsets, few.router.offsets)
        assert loaded.route(PROMPTS) == few.route(PROMPTS)
    run = {"prompt": PROMPTS[:3], "output_type": "pt"}
    images = [p(**run, generator=generators(1, 2, 3)).images for p in (few, loaded)]
    assert torch.allclose(*images, atol=1e-5)
    again = MultiStudentPipeline.from_pipe(loaded)
    assert again.timesteps == FEW["timesteps"] and again.students == loaded.students


def test_left_out_student_is_not_loaded(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "p")
    (tmp_path / "p/unet_1" / WEIGHTS).unlink()
    partial = MultiStudentPipeline.from_pretrained(tmp_path / "p", unet_1=None)
    assert list(partial.students) == [0, 2, 3]
    prompts = one_of_each(pipe)
    with pytest.raises(ValueError, match="belongs to student 1, which is absent"):
        partial(prompts)
    assert partial([prompts[0], prompts[1]], output_type="latent").student_indices == [3, 2]


def test_pipeline_saved_without_a_student_loads_without_it(pipe, tmp_path):
    variant_of(pipe, unet_1=None, unet_3=None).save_pretrained(tmp_path / "p")
    index = json.loads((tmp_path / "p/model_index.json").read_text())
    assert index["unet_1"] == index["unet_3"] == [None, None] and "unet_4" not in index
    loaded = MultiStudentPipeline.from_pretrained(tmp_path / "p")
    # diffusers' generic loader gives nothing for an empty entry, so it has to be told.
    generic = DiffusionPipeline.from_pretrained(tmp_path / "p", unet_1=None, unet_3=None)
    assert list(loaded.students) == list(generic.students) == [0, 2]
    loaded.add_student(1, pipe.unet_1)
    loaded.save_pretrained(tmp_path / "q")
    assert list(MultiStudentPipeline.from_pretrained(tmp_path / "q").students) == [0, 1, 2]
    # Not in the index at all: an incomplete copy.
    (tmp_path / "p/model_index.json").write_text(json.dumps({k: v for k, v in index.items() if k != "unet_1"}))
    with pytest.raises(ValueError, match="router: it has 4 parts, but .* has no unet_1; pass None"):
        MultiStudentPipeline.from_pretrained(tmp_path / "p")


def test_student_alone_in_stock_diffusers_makes_the_same_image(pipe, tmp_path):
    ours, base = tmp_path / "ours", tmp_path / "base"
    pipe.save_pretrained(ours)
    (tmp_path / "files").mkdir()
    tiny_stable_diffusion(tmp_path / "files").save_pretrained(base)
    prompt = one_of_each(pipe)[1]  # student 2
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    unet = UNet2DConditionModel.from_pretrained(ours, subfolder="unet_2")
    stock = StableDiffusionPipeline.from_pretrained(base, unet=unet, safety_checker=None)
    stock.scheduler = LCMScheduler.from_config(stock.scheduler.config)
    image = stock(prompt, num_inference_steps=1, guidance_scale=1.0, latents=latents, output_type="pt").images

    assert stock.scheduler.timesteps.tolist() == [999]
    output = pipe(prompt, latents=latents, output_type="pt")
    assert output.student_indices == [2]
    assert (image - output.images).abs().max() < 1e-4
    assert (image - pipe(prompt, latents=latents, student=1, output_type="pt").images).abs().max() > 1e-3


# The card and the Hub


def test_card_speaks_of_prompts(pipe, tmp_path):
    few = variant_of(pipe, student_timesteps=FEW)
    for name, one in (("one", pipe), ("few", few)):
        one.save_pretrained(tmp_path / name)
        card = ModelCard.load(tmp_path / name / "README.md")
        assert card.data.pipeline_tag == "text-to-image"
        assert {"text-to-image", f"{name}-step"} < set(card.data.tags) and "class-conditional" not in card.data.tags
        assert f"4 {name}-step students" in card.text and "serves a prompt" in card.text
        assert "class label" not in card.text and "imbalance (largest part over mean part) 1.000" in card.text
        assert "student 3: 4 prompts" in card.text and "UNet2DConditionModel.from_pretrained" in card.text
    assert "at most 4 network calls" in card.text


PUSH = """
from pathlib import Path
from helpers import tiny_text_pipeline
Path("files").mkdir()
pipe = tiny_text_pipeline(Path("files"))
pipe.push_to_hub("text")
pipe.to(dtype=__import__("torch").float16)
pipe.push_to_hub("text", variant="fp16")
pipe.unet_2.push_to_hub("student")
"""

LOAD = """
import torch
from pathlib import Path
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers_msd import MultiStudentPipeline
from helpers import random_prompts, tiny_text_pipeline
Path("other_files").mkdir()
original = tiny_text_pipeline(Path("other_files"))
pipe = {load}
for k, unet in pipe.students.items():
    state = original.students[k].to(unet.dtype).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in unet.state_dict().items())
print(list(pipe.students), pipe.unet_0.dtype, pipe.route(random_prompts()) == original.route(random_prompts()))
"""


def test_hub_round_trip_downloads_what_is_needed_alone(tmp_path):
    common = {"model_index.json", "scheduler/scheduler_config.json", "router/config.json", f"router/{WEIGHTS}"}
    common |= {f"{name}/config.json" for name in ("vae", "text_encoder", "unet_0")}
    # The cache of the client keeps equal files once: of the students' configs it asks for the one it comes to first.
    weights = {f"{name}/{WEIGHTS}" for name in ("vae", "unet_0", "unet_2", "unet_3")}
    half = {name.replace(".safe", ".fp16.safe") for name in weights}
    loads = {
        "MultiStudentPipeline.from_pretrained('tester/text', unet_1=None)": (
            "[0, 2, 3] torch.float32 True",
            common | weights | {"text_encoder/model.safetensors"},
        ),
        "MultiStudentPipeline.from_pretrained('tester/text', unet_1=None, variant='fp16', dtype=torch.float16)": (
            "[0, 2, 3] torch.float16 ",
            common | half | {"text_encoder/model.fp16.safetensors"},
        ),
        "DiffusionPipeline.from_pretrained('tester/text')": ("[0, 1, 2, 3] torch.float32 True", None),
    }
    with HubServer() as hub:
        run_python(PUSH, tmp_path, **hub.environment(tmp_path / "push"))
        assert 'pipe("a red apple"' in hub.repos["tester/text"]["README.md"].decode()
        assert f"unet_1/{WEIGHTS.replace('.', '.fp16.')}" in hub.repos["tester/text"]
        for i, (load, (printed, files)) in enumerate(loads.items()):
            (tmp_path / f"run{i}").mkdir()
            hub.downloads.clear()
            output = run_python(LOAD.format(load=load), tmp_path / f"run{i}", **hub.environment(tmp_path / f"home{i}"))
            assert output.splitlines()[-1].startswith(printed)
            got = {name for _, name in hub.downloads if not name.startswith("tokenizer/")}
            got = {"unet_0/config.json" if re.fullmatch(r"unet_\d/config.json", name) else name for name in got}
            assert files is None or got == files
        code = (
            "from diffusers import UNet2DConditionModel as U\n"
            "U.from_pretrained('tester/student'); U.from_pretrained('tester/text', subfolder='unet_2')\n"
        )
        hub.downloads.clear()
        run_python(code, tmp_path, **hub.environment(tmp_path / "home"))
        assert len(hub.downloads) == 4


def test_usage_snippet_of_the_card_runs_as_printed(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "text-k4")
    snippet = (tmp_path / "text-k4/README.md").read_text().split("```python\n")[1].split("```")[0]
    printed = run_python(snippet + "print(len(images), images[0].size)", tmp_path)
    assert printed.splitlines()[-1] == "4 (16, 16)"


# Students from several places


@pytest.fixture(scope="module")
def places(pipe, tmp_path_factory) -> Path:
    """base/ (a stock pipeline), multi/ (ours), net/ (a single net), router/."""
    folder = tmp_path_factory.mktemp("places")
    (folder / "files").mkdir()
    tiny_stable_diffusion(folder / "files").save_pretrained(folder / "base")
    pipe.save_pretrained(folder / "multi")
    tiny_text_unet(seed=7).save_pretrained(folder / "net")
    pipe.router.save_pretrained(folder / "router")
    return folder


def test_students_of_mixed_sources(pipe, places):
    model = tiny_text_unet(seed=9)
    sources = [str(places / "base"), places / "multi", f"{places / 'multi'}::unet_3", model]
    made = MultiStudentPipeline.from_students(places / "base", sources, places / "router", student_timesteps=FEW)
    made.set_progress_bar_config(disable=True)
    assert made.unet_3 is model and made.timesteps == FEW["timesteps"]
    for k, expected in enumerate([tiny_text_unet(seed=0), pipe.unet_1, pipe.unet_3, model]):
        weight = made.students[k].state_dict()["conv_in.weight"]
        assert torch.equal(weight, expected.state_dict()["conv_in.weight"])
    assert made.route(PROMPTS) == pipe.route(PROMPTS)
    assert made(PROMPTS[:2], output_type="np").images.shape == (2, 16, 16, 3)
    half = MultiStudentPipeline.from_students(
        places / "multi", [None, places / "net", None, None], f"{places / 'multi'}::router", dtype=torch.bfloat16
    )
    assert list(half.students) == [1]
    assert {half.unet_1.dtype, half.vae.dtype, half.text_encoder.dtype} == {torch.bfloat16}
    of_loaded = MultiStudentPipeline.from_students(pipe, [model] * 4, pipe.router)
    assert of_loaded.vae is pipe.vae and of_loaded.tokenizer is pipe.tokenizer


def test_class_conditional_students_need_the_scheduler_alone(tmp_path):
    pipe = tiny_pipeline(2)
    pipe.scheduler.save_pretrained(tmp_path / "base/scheduler")
    pipe.unet_1.save_pretrained(tmp_path / "net")
    made = MultiStudentPipeline.from_students(tmp_path / "base", [pipe.unet_0, tmp_path / "net"], pipe.router)
    made.set_progress_bar_config(disable=True)
    run = {"class_labels": [0, 3], "latents": torch.ones(2, 1, 8, 8), "output_type": "latent"}
    assert torch.allclose(made(**run).images, pipe(**run).images, atol=1e-5)


@pytest.mark.parametrize(
    ("sources", "error", "message"),
    [
        (
            ["net", "nowhere", None, None],
            FileNotFoundError,
            r"students\[1\]: .*nowhere is neither a net nor a pipeline",
        ),
        (["net", None, None, "multi::unet_9"], FileNotFoundError, r"students\[3\]: .*unet_9 is neither a net"),
        (["base::vae", None, None, None], ValueError, r"students\[0\]: .* holds a AutoencoderKL"),
        ([None, 3, None, None], TypeError, r"students\[1\]: .*got int"),
        (["net", tiny_unet(), None, None], TypeError, r"students\[1\]: a UNet2DConditionModel is needed"),
        ([None, tiny_text_unet(cross_attention_dim=8), None, None], ValueError, r"students\[1\]: cross_attention_dim"),
        (["net", tiny_text_unet(sample_size=4), None, None], ValueError, r"students\[1\]: sample_size is 4"),
        (
            [tiny_text_unet(in_channels=3), None, None, None],
            ValueError,
            r"students\[0\]: in_channels is 3, latents of",
        ),
        ([tiny_unet(), None, None, None], ValueError, "router: students that take labels"),
        ([None] * 4, ValueError, "students: at least one"),
        (["net"], ValueError, "students: the router has 4 parts, got 1"),
        ([], ValueError, "students: 1 ... 64 expected, got 0"),
        (["pickled", None, None, None], FileNotFoundError, r"students\[0\]: .*safetensors"),
    ],
)
def test_bad_sources_are_named(places, sources, error, message):
    if sources[:1] == ["pickled"]:
        tiny_text_unet().save_pretrained(places / "pickled", safe_serialization=False)
    sources = [f"{places}/{source}" if isinstance(source, str) else source for source in sources]
    with pytest.raises(error, match=f"^{message}"):
        MultiStudentPipeline.from_students(places / "base", sources, places / "router")


def test_bad_base_and_router_are_named(pipe, places):
    nets = [places / "net"] * 4
    with pytest.raises(FileNotFoundError, match="^base: .*net has no readable scheduler/"):
        MultiStudentPipeline.from_students(places / "net", nets, pipe.router)
    with pytest.raises(ValueError, match="^base: this MultiStudentPipeline has no vae, text_encoder, tokenizer"):
        MultiStudentPipeline.from_students(tiny_pipeline(1), nets, pipe.router)
    for part, damage in (("vae", "gone"), ("text_encoder", "gone"), ("tokenizer", "gone"), ("text_encoder", "cut")):
        base = shutil.copytree(places / "base", places / f"{damage}_{part}")
        if damage == "gone":
            shutil.rmtree(base / part)
        else:
            weights = base / part / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-50])
        with pytest.raises(FileNotFoundError if damage == "gone" else ValueError, match=f"^base: .*{part}"):
            MultiStudentPipeline.from_students(base, nets, pipe.router)
    with pytest.raises(FileNotFoundError, match="^router: "):
        MultiStudentPipeline.from_students(places / "base", nets, places / "files")
    with pytest.raises(TypeError, match="^router: .*got dict"):
        MultiStudentPipeline.from_students(places / "base", nets, {})


def test_prompts_too_long_are_cut_off_and_still_made(pipe):
    assert pipe("a" * 40, output_type="pt").images.shape == (1, 3, 16, 16)
