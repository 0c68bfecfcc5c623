# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""`MultiStudentPipeline`: order, routing, independence of an image from its batch, and errors before compute."""

import inspect

import accelerate.hooks
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from helpers import edm_scheduler, generators, tiny_pipeline, tiny_unet

from diffusers_msd import ClassRouter, ConditionRouter, MultiStudentPipeline, NoiseSchedule, denoiser_for


LABELS = [3, 0, 2, 0, 1, 3]


class Ran(list):
    """The students that ran, in order, by forward hooks."""

    def __init__(self, pipe: MultiStudentPipeline):
        for k, unet in pipe.students.items():
            unet.register_forward_hook(lambda module, args, output, k=k: self.append(k))


class ModuloRouter(ConditionRouter):
    """Routes neighbouring labels to different students, by rule and not by table."""

    def __init__(self, num_students: int):
        self.register_to_config(num_students=num_students)

    def __call__(self, class_labels=None, embeddings=None):
        return torch.as_tensor(class_labels) % self.num_students


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(3)


# Order and routing


def test_output_is_in_input_order_and_by_the_right_student(pipe):
    noise = torch.randn(len(LABELS), 1, 8, 8, generator=torch.Generator().manual_seed(0))
    output = pipe(class_labels=LABELS, latents=noise, output_type="latent")
    schedule = NoiseSchedule.from_scheduler(edm_scheduler())
    assert output.student_indices == [2, 0, 1, 0, 0, 2] == pipe.route(class_labels=LABELS)
    for i, (label, k) in enumerate(zip(LABELS, output.student_indices)):
        with torch.no_grad():
            expected = denoiser_for(pipe.students[k], schedule).generate(noise[i : i + 1], torch.tensor([label]))
        assert torch.allclose(output.images[i : i + 1], expected, atol=1e-4)


def test_any_router_works_with_the_same_pipeline():
    students = {f"unet_{k}": tiny_unet(seed=k) for k in range(2)}
    pipe = MultiStudentPipeline(edm_scheduler(), ModuloRouter(2), **students)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(class_labels=[0, 1, 2, 3], output_type="np").student_indices == [0, 1, 0, 1]


def test_each_used_student_runs_once_and_an_unused_one_never_and_stays_as_it_was():
    pipe = tiny_pipeline(4)
    ran = Ran(pipe)
    before = {name: (value.clone(), value.data_ptr()) for name, value in pipe.unet_1.state_dict().items()}
    pipe(class_labels=[3, 0, 3, 2, 0], output_type="np")
    assert ran == [0, 2, 3]
    for name, value in pipe.unet_1.state_dict().items():
        assert torch.equal(value, before[name][0]) and value.data_ptr() == before[name][1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_image_of_label_and_seed_is_the_same_alone_and_in_any_batch(pipe, dtype):
    # float64 nets too: there the only difference left is a mix-up.
    pipe = tiny_pipeline(3).to(dtype)
    pipe.set_progress_bar_config(disable=True)
    seeds = range(10, 10 + len(LABELS))
    batch = pipe(class_labels=LABELS, generator=generators(*seeds), output_type="pt").images
    for i, (label, seed) in enumerate(zip(LABELS, seeds)):
        alone = pipe(class_labels=label, generator=generators(seed), output_type="pt").images
        assert (alone[0] - batch[i]).abs().max() < (1e-4 if dtype == torch.float32 else 1e-6)
    order = [4, 1, 5, 0]
    shuffled = pipe(
        class_labels=[LABELS[i] for i in order], generator=generators(*(seeds[i] for i in order)), output_type="pt"
    ).images
    assert (shuffled - batch[order]).abs().max() < 1e-4
    assert (batch[1] - batch[3]).abs().max() > 1e-2  # same label, other seed


def test_one_generator_for_the_call_is_reproducible(pipe):
    a, b = (
        pipe(class_labels=LABELS, generator=torch.Generator().manual_seed(5), output_type="np").images
        for _ in range(2)
    )
    assert np.array_equal(a, b)


def test_images_per_prompt_lie_side_by_side(pipe):
    output = pipe(class_labels=[3, 0], num_images_per_prompt=2, generator=generators(1, 2, 3, 4), output_type="pt")
    assert output.student_indices == [2, 2, 0, 0]
    single = pipe(class_labels=[3, 3, 0, 0], generator=generators(1, 2, 3, 4), output_type="pt")
    assert torch.equal(output.images, single.images)


def test_student_overrides_the_router_for_all(pipe):
    ran = Ran(pipe)
    output = pipe(class_labels=[0, 3], student=1, generator=generators(1, 2), output_type="pt")
    assert output.student_indices == [1, 1] and ran == [1]
    routed = pipe(class_labels=[0, 3], generator=generators(1, 2), output_type="pt")
    assert (output.images - routed.images).abs().max() > 1e-3


# Output


def test_output_types_agree_and_pixels_are_clamped():
    pipe = tiny_pipeline(3)
    for unet in pipe.students.values():
        unet.conv_out.weight.data.mul_(10)
    kwargs = {"class_labels": [0, 2], "latents": torch.ones(2, 1, 8, 8)}
    latent, pt, array, pil = (pipe(**kwargs, output_type=kind).images for kind in ("latent", "pt", "np", "pil"))
    assert latent.dtype == pt.dtype == torch.float32 and array.dtype == np.float32
    assert torch.allclose(pt, (latent / 2 + 0.5).clamp(0, 1))
    assert np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    assert pil[0].mode == "L" and pil[0].size == (8, 8)
    assert np.abs(np.asarray(pil[1]) - 255 * array[1, ..., 0]).max() <= 0.5001
    assert latent.abs().max() > 1 and pt.min() == 0 and pt.max() == 1


def test_colour_images_and_tuple_output():
    pipe = tiny_pipeline(2, channels=3)
    images, student_indices = pipe(class_labels=[3], return_dict=False)
    assert isinstance(images[0], PIL.Image.Image) and images[0].mode == "RGB" and student_indices == [1]


def test_a_vae_decodes_what_the_students_make():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=3,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        )
    students = {f"unet_{k}": tiny_unet(channels=3, seed=k) for k in range(2)}
    pipe = MultiStudentPipeline(edm_scheduler(), ClassRouter.consecutive(4, 2), vae=vae.eval(), **students)
    pipe.set_progress_bar_config(disable=True)
    latent, image = (pipe(class_labels=[1], generator=generators(0), output_type=t).images for t in ("latent", "pt"))
    assert latent.shape == (1, 3, 8, 8) and image.shape == (1, 3, 16, 16)
    with torch.no_grad():
        decoded = vae.decode(latent / vae.config.scaling_factor, return_dict=False)[0]
    assert torch.allclose(image, (decoded / 2 + 0.5).clamp(0, 1), atol=1e-5)


def test_callback_sees_and_may_replace_the_samples(pipe):
    calls = []

    def callback(pipeline, step, timestep, kwargs):
        calls.append((step, int(timestep), tuple(kwargs["latents"].shape)))
        return {"latents": torch.zeros_like(kwargs["latents"])}

    images = pipe(class_labels=[0, 3], callback_on_step_end=callback, output_type="pt").images
    assert calls == [(pipe.num_timesteps - 1, 999, (2, 1, 8, 8))]
    assert (images == 0.5).all()


# Components


def test_signature_names_every_slot_and_only_student_0_is_required():
    parameters = inspect.signature(MultiStudentPipeline.__init__).parameters
    required = {name for name, p in parameters.items() if p.default is inspect.Parameter.empty}
    assert required == {"self", "scheduler", "router", "unet_0"}
    assert "unet_63" in parameters and "students" not in parameters
    with pytest.raises(TypeError, match="unet_64: not a component"):
        MultiStudentPipeline(edm_scheduler(), ClassRouter.consecutive(4, 1), unet_0=tiny_unet(), unet_64=tiny_unet())


def test_pipeline_of_its_components_is_the_same_pipeline(pipe):
    assert list(pipe.components) == ["scheduler", "router", "unet_0", "unet_1", "unet_2"]
    for other in (MultiStudentPipeline(**pipe.components), MultiStudentPipeline.from_pipe(pipe)):
        assert other.students == pipe.students and other.router is pipe.router
    partial = MultiStudentPipeline(edm_scheduler(), pipe.router, unet_0=pipe.unet_0, unet_1=None, unet_2=pipe.unet_2)
    assert MultiStudentPipeline(**partial.components).students == {0: pipe.unet_0, 2: pipe.unet_2}


def test_sixty_four_students_work():
    unet = tiny_unet(num_classes=64)
    router = ClassRouter.consecutive(64, 64)
    pipe = MultiStudentPipeline(edm_scheduler(), router, **{f"unet_{k}": unet for k in range(64)})
    pipe.set_progress_bar_config(disable=True)
    assert pipe(class_labels=[63, 0], output_type="np").student_indices == [63, 0]


def test_added_student_serves_and_is_saved(tmp_path):
    full = tiny_pipeline(2)
    pipe = MultiStudentPipeline(full.scheduler, full.router, unet_0=full.unet_0, unet_1=None)
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="label 3 belongs to student 1, which is absent"):
        pipe(class_labels=3)
    pipe.add_student(1, full.unet_1)
    assert pipe(class_labels=3, output_type="np").student_indices == [1]
    pipe.save_pretrained(tmp_path / "p")
    assert list(MultiStudentPipeline.from_pretrained(tmp_path / "p").students) == [0, 1]


def test_offload_sends_each_finished_student_back_before_the_next_runs(monkeypatch):
    # Students 0 and 2 of 4: diffusers' own chain would leave 0 on the device while 2 runs.
    pipe = tiny_pipeline(4)
    expected = pipe(class_labels=[2, 0], generator=generators(1, 2), output_type="pt").images
    names = {unet: k for k, unet in pipe.students.items()}
    pipe.enable_model_cpu_offload(device="cpu")
    events = []
    for unet, k in names.items():
        unet.register_forward_hook(lambda module, args, output, k=k: events.append(("run", k)))
    init_hook = accelerate.hooks.CpuOffload.init_hook

    def recorded(hook, module):
        events.append(("offload", names[module]))
        return init_hook(hook, module)

    monkeypatch.setattr(accelerate.hooks.CpuOffload, "init_hook", recorded)
    images = pipe(class_labels=[2, 0], generator=generators(1, 2), output_type="pt").images
    assert events[:4] == [("run", 0), ("offload", 0), ("run", 2), ("offload", 2)]
    assert torch.equal(images, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offload_keeps_at_most_one_student_on_the_gpu():
    pipe = tiny_pipeline(4)
    expected = pipe(class_labels=[3, 1, 0], generator=generators(1, 2, 3), output_type="pt").images
    pipe.enable_model_cpu_offload()
    present = []
    for unet in pipe.students.values():
        unet.register_forward_hook(
            lambda module, args, output: present.append(sum(u.device.type == "cuda" for u in pipe.students.values()))
        )
    images = pipe(class_labels=[3, 1, 0], generator=generators(1, 2, 3), output_type="pt").images
    assert present == [1, 1, 1]
    assert {u.device.type for u in pipe.students.values()} == {"cpu"}
    assert torch.allclose(images.cpu(), expected, atol=1e-3)


# Errors, each before a student runs


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "prompt, prompt_embeds, class_labels: give exactly one, got none"),
        ({"class_labels": 0, "prompt": "a cat"}, "give exactly one, got prompt, class_labels"),
        ({"prompt": "a cat"}, "prompt: this pipeline is class-conditional: pass class_labels"),
        ({"prompt_embeds": torch.zeros(1, 2, 3)}, "prompt_embeds: this pipeline is class-conditional"),
        ({"class_labels": [0, 4]}, "class_labels.*4"),
        ({"class_labels": [-1]}, "class_labels.*-1"),
        ({"class_labels": 4, "student": 1}, "class_labels: allowed are 0 ... 3, got .4."),
        ({"class_labels": [0.5]}, "class_labels: an integer.*0.5"),
        ({"class_labels": [True]}, "class_labels: an integer"),
        ({"class_labels": [[0, 1]]}, "class_labels: an integer"),
        ({"class_labels": "cat"}, "class_labels: integers expected, got 'cat'"),
        ({"class_labels": []}, "class_labels: at least one"),
        ({"class_labels": 0, "student": 3}, "student: 3 is not present, allowed are .0, 1, 2."),
        ({"class_labels": 0, "student": -1}, "student: -1"),
        ({"class_labels": 0, "student": True}, "student: True"),
        ({"class_labels": 0, "student": "1"}, "student: '1'"),
        ({"class_labels": [0, 1], "generator": generators(1)}, "generator: a list needs one per image, got 1 for 2"),
        ({"class_labels": 0, "generator": 7}, "generator: a torch.Generator.*7"),
        ({"class_labels": [0, 1], "latents": torch.zeros(1, 1, 8, 8)}, r"latents: .*shape \(2, 1, 8, 8\) expected"),
        ({"class_labels": 0, "latents": [0.0]}, "latents: .*got list"),
        ({"class_labels": 0, "output_type": "jpg"}, "output_type: 'jpg' is not one of pil, np, pt, latent"),
        ({"class_labels": 0, "num_images_per_prompt": 0}, "num_images_per_prompt: an integer >= 1 expected, got 0"),
        ({"class_labels": 0, "num_images_per_prompt": 1.5}, "num_images_per_prompt: .*1.5"),
        (
            {"class_labels": 0, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]},
            "callback_on_step_end_tensor_inputs: .*prompt_embeds",
        ),
    ],
)
def test_bad_input_is_named_before_a_student_runs(kwargs, message):
    pipe = tiny_pipeline(3)
    ran = Ran(pipe)
    with pytest.raises(ValueError, match=message):
        pipe(**kwargs)
    assert ran == []


def test_router_and_students_must_fit_at_construction():
    scheduler, router = edm_scheduler(), ClassRouter.consecutive(4, 2)
    a, b = tiny_unet(seed=0), tiny_unet(seed=1)
    with pytest.raises(ValueError, match="router: it has 2 parts.*unet_1.*is not given"):
        MultiStudentPipeline(scheduler, router, unet_0=a)
    with pytest.raises(ValueError, match="unet_2: the router has 2 parts"):
        MultiStudentPipeline(scheduler, router, unet_0=a, unet_1=b, unet_2=b)
    with pytest.raises(TypeError, match="router: a ConditionRouter is needed, got dict"):
        MultiStudentPipeline(scheduler, {}, unet_0=a)
    with pytest.raises(TypeError, match="unet_1: a UNet2DModel is needed, got UNet2DConditionModel"):
        text = UNet2DConditionModel(
            block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, cross_attention_dim=8,
            attention_head_dim=4, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        )  # fmt: skip
        MultiStudentPipeline(scheduler, router, unet_0=a, unet_1=text)


@pytest.mark.parametrize(
    ("setting", "other"),
    [
        ("sample_size", {"sample_size": 16}),
        ("in_channels", {"channels": 3}),
        ("num_class_embeds", {"num_classes": 5}),
    ],
)
def test_students_that_disagree_are_refused(setting, other):
    with pytest.raises(ValueError, match=f"unet_1: {setting} is .* they must agree"):
        MultiStudentPipeline(
            edm_scheduler(), ClassRouter.consecutive(4, 2), unet_0=tiny_unet(), unet_1=tiny_unet(**other)
        )
    pipe = tiny_pipeline(2)
    with pytest.raises(ValueError, match=f"unet_1: {setting} is"):
        pipe.add_student(1, tiny_unet(**other))
    assert pipe.unet_1.config[setting] == pipe.unet_0.config[setting]


def test_students_of_different_size_are_allowed():
    students = {"unet_0": tiny_unet(), "unet_1": tiny_unet(block_out_channels=(4, 8))}
    pipe = MultiStudentPipeline(edm_scheduler(), ClassRouter.consecutive(4, 2), **students)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(class_labels=[0, 3], output_type="np").images.shape == (2, 8, 8, 1)


def test_student_the_router_never_chooses_is_refused():
    pipe = tiny_pipeline(2)
    with pytest.raises(ValueError, match="unet_2: the router has 2 parts"):
        pipe.add_student(2, tiny_unet())
    with pytest.raises(ValueError, match="k: 64 is not a student"):
        pipe.add_student(64, tiny_unet())
