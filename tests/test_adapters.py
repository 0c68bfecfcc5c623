# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""LoRA students: one base, small adapters, one forward for a mixed batch, stock files."""

import copy
import json
import threading

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel, UNet2DModel
from helpers import (
    edm_scheduler,
    generators,
    tiny_pipeline,
    tiny_stable_diffusion,
    tiny_text_pipeline,
    tiny_text_unet,
    tiny_unet,
)
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors import safe_open

from diffusers_msd import ClassRouter, LoraStudent, MultiStudentPipeline
from diffusers_msd.adapters import (
    AdapterConfig,
    adapter_of_each_row,
    adapter_parameters,
    attach,
    base_fingerprint,
    base_of,
    lora_config,
    lora_layers,
    lora_network,
    trainable_parameters,
)


WEIGHTS = "diffusion_pytorch_model.safetensors"
UNETS = [tiny_unet, tiny_text_unet]


def call(unet, seed=0, n=6):
    """The network's output for a fixed batch of n."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, unet.config.in_channels, 8, 8, generator=generator)
    if isinstance(unet, UNet2DModel):
        condition = {"class_labels": torch.arange(n) % 4}
    else:
        condition = {"encoder_hidden_states": torch.randn(n, 5, 16, generator=generator)}
    with torch.no_grad():
        return unet(x, torch.full((n,), 3.0), **condition).sample


def adapter(base, seed, rank=3, **settings):
    """A `LoraStudent` with random matrices, and the network it comes from."""
    network = lora_network(base, lora_config(base, rank, **settings)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(network):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return LoraStudent.of(network), network


def lora_pipeline(k=4, base=None, **parts):
    base = base or tiny_unet()
    students = {f"unet_{i}": adapter(base_of(base), i)[0] for i in range(k)}
    router = ClassRouter.consecutive(4, k)
    pipe = MultiStudentPipeline(edm_scheduler(), router, unet=base, **{**students, **parts})
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ------------------------------------------------------------------ one network on another's weights


@pytest.mark.parametrize("make", UNETS)
def test_new_adapter_shares_the_weights_and_changes_nothing(make):
    base = make()
    network = lora_network(base, lora_config(base, 3))
    shared = {id(parameter) for parameter in base.parameters()}
    own = [parameter for parameter in network.parameters() if id(parameter) not in shared]
    assert len(own) + len(shared) == len(list(network.parameters()))
    assert {id(p) for p in own} == {id(p) for p in adapter_parameters(network)} and not lora_layers(base)
    assert torch.equal(call(network.eval()), call(base))


def test_only_the_adapter_learns():
    base = tiny_unet()
    before = copy.deepcopy(base.state_dict())
    network = lora_network(base, lora_config(base, 3))
    assert trainable_parameters(base) == list(base.parameters())
    trained = trainable_parameters(network)
    assert all(p.requires_grad for p in trained) and not any(p.requires_grad for p in base.parameters())
    x, t = torch.randn(2, 1, 8, 8), torch.full((2,), 3.0)
    network(x, t, class_labels=torch.tensor([0, 1])).sample.square().mean().backward()
    torch.optim.SGD(trained, lr=1.0).step()
    assert (call(network.eval()) - call(base)).abs().max() > 1e-3
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_same_seed_same_adapter_and_the_global_generator_is_left_alone():
    base = tiny_unet()
    state = torch.get_rng_state()
    first, second, other = (lora_network(base, lora_config(base, 3), seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    pairs = list(zip(adapter_parameters(first), adapter_parameters(second), adapter_parameters(other)))
    assert all(torch.equal(a, b) for a, b, _ in pairs) and not all(torch.equal(a, c) for a, _, c in pairs)


def test_adapter_weights_are_float32_on_a_base_in_half_precision():
    network = lora_network(tiny_unet().to(torch.bfloat16), lora_config(tiny_unet(), 3))
    assert {p.dtype for p in adapter_parameters(network)} == {torch.float32}


# ------------------------------------------------------------------ files


@pytest.mark.parametrize("make", UNETS)
@pytest.mark.parametrize("settings", [{}, {"alpha": 6.0, "conv_rank": 1}, {"target_modules": ["to_q", "conv1"]}])
def test_saved_adapter_comes_back_bit_for_bit(make, settings, tmp_path):
    student, network = adapter(make(), 1, **settings)
    student.save_pretrained(tmp_path)
    loaded = LoraStudent.from_pretrained(tmp_path)
    assert dict(loaded.config.lora) == dict(student.config.lora)
    assert loaded.config.base_fingerprint == base_fingerprint(make())
    assert loaded.weights.keys() == student.weights.keys()
    assert all(torch.equal(loaded.weights[name], tensor) for name, tensor in student.weights.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", WEIGHTS]


@pytest.mark.parametrize("settings", [{}, {"alpha": 6.0, "conv_rank": 1}])
def test_stock_diffusers_loads_an_adapter_with_its_scale(settings, tmp_path):
    student, network = adapter(tiny_text_unet(), 1, **settings)
    student.save_pretrained(tmp_path / "adapter")
    expected = call(network)
    unet = tiny_text_unet()
    unet.load_lora_adapter(tmp_path / "adapter", prefix="unet", weight_name=WEIGHTS)
    torch.testing.assert_close(call(unet), expected, atol=1e-5, rtol=0)
    (tmp_path / "tokenizer").mkdir()
    pipe: StableDiffusionPipeline = tiny_stable_diffusion(tmp_path / "tokenizer")
    pipe.load_lora_weights(tmp_path / "adapter", weight_name=WEIGHTS)
    torch.testing.assert_close(call(pipe.unet), expected, atol=1e-5, rtol=0)
    assert (call(tiny_text_unet()) - expected).abs().max() > 0.01


def test_stock_peft_loads_an_adapter_of_a_class_conditional_network(tmp_path):
    """diffusers has no `load_lora_adapter` for `UNet2DModel`; PEFT reads the same file."""
    student, network = adapter(tiny_unet(), 1, alpha=6.0, conv_rank=1)
    student.save_pretrained(tmp_path)
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
        weights = {name.removeprefix("unet."): file.get_tensor(name) for name in file.keys()}
    unet = tiny_unet()
    config = LoraConfig(**{name.removeprefix("unet."): value for name, value in settings.items()})
    inject_adapter_in_model(config, unet)
    set_peft_model_state_dict(unet, weights)
    torch.testing.assert_close(call(unet), call(network), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fingerprint_survives_precision_and_adapters_but_no_training(dtype):
    base = tiny_unet()
    fingerprint = base_fingerprint(base)
    assert base_fingerprint(tiny_unet().to(dtype)) == fingerprint
    assert base_fingerprint(lora_network(tiny_unet(), lora_config(base, 2))) == fingerprint
    with torch.no_grad():
        parameter = base.conv_in.weight
        parameter.view(-1)[0] *= -1
    assert base_fingerprint(base) != fingerprint


@pytest.mark.parametrize("make", UNETS)
def test_fused_student_is_an_ordinary_network(make, tmp_path):
    base = make()
    student, network = adapter(base, 1)
    fused = student.fuse(base)
    assert type(fused) is type(base) and not lora_layers(fused) and not lora_layers(base)
    torch.testing.assert_close(call(fused), call(network), atol=1e-5, rtol=0)
    fused.save_pretrained(tmp_path)
    assert torch.equal(call(type(base).from_pretrained(tmp_path)), call(fused))


# ------------------------------------------------------------------ one forward for several adapters


@pytest.mark.parametrize("make", UNETS)
def test_mixed_batch_in_one_forward_gives_what_each_adapter_gives(make):
    base = make()
    students, networks = zip(*(adapter(make(), seed) for seed in range(3)))
    attach(base, {f"a{i}": student for i, student in enumerate(students)})
    calls = []
    base.register_forward_hook(lambda *_: calls.append(1))
    rows = [0, 2, 1, 1, 0, 2]
    with adapter_of_each_row(base, [f"a{i}" for i in rows]):
        mixed = call(base)
    assert len(calls) == 1
    for i, network in enumerate(networks):
        mine = [row for row, chosen in enumerate(rows) if chosen == i]
        torch.testing.assert_close(mixed[mine], call(network)[mine], atol=1e-5, rtol=0)
    assert torch.equal(call(base), call(make())), "outside the block the network is the base"


def test_threads_do_not_see_each_others_rows():
    base = tiny_unet()
    attach(base, {f"a{i}": adapter(tiny_unet(), i)[0] for i in range(4)})

    def run(name):
        with adapter_of_each_row(base, [name] * 6):
            return call(base)

    alone = [run(f"a{i}") for i in range(4)]
    results = {}

    def hammer(i):
        results[i] = all(torch.equal(run(f"a{i}"), alone[i]) for _ in range(10))

    threads = [threading.Thread(target=hammer, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(4), True)


# ------------------------------------------------------------------ the pipeline


def test_images_are_those_of_full_students_in_any_mix():
    pipe = lora_pipeline(k=4)
    full = pipe.fuse_students()
    assert full.unet is None and len(full.students) == 4
    labels = [3, 0, 2, 2, 1, 0]
    made = pipe(class_labels=labels, generator=generators(*range(6)), output_type="latent")
    expected = full(class_labels=labels, generator=generators(*range(6)), output_type="latent")
    assert made.student_indices == expected.student_indices == labels
    torch.testing.assert_close(made.images, expected.images, atol=1e-5 * expected.images.abs().max().item(), rtol=0)
    for i, label in enumerate(labels):
        alone = pipe(class_labels=label, generator=generators(i), output_type="latent").images
        torch.testing.assert_close(made.images[[i]], alone, atol=1e-4, rtol=1e-4)
    bare = full.components | {"unet_0": base_of(pipe.unet)}
    other = MultiStudentPipeline(**bare)(class_labels=0, generator=generators(1), output_type="latent", student=0)
    assert (other.images - made.images[1]).abs().max() > 0.01


def test_mixed_batch_runs_the_base_once():
    pipe, calls = lora_pipeline(k=4), []
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    pipe(class_labels=[0, 1, 2, 3, 1], output_type="latent")
    assert len(calls) == 1


def test_saved_pipeline_holds_one_base_and_small_adapters(tmp_path):
    pipe = lora_pipeline(k=4)
    made = pipe(class_labels=[0, 1, 2, 3], generator=generators(0, 1, 2, 3), output_type="latent").images
    pipe.save_pretrained(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert names == ["router", "scheduler", "unet", "unet_0", "unet_1", "unet_2", "unet_3"]
    loaded = MultiStudentPipeline.from_pretrained(tmp_path)
    again = loaded(class_labels=[0, 1, 2, 3], generator=generators(0, 1, 2, 3), output_type="latent").images
    torch.testing.assert_close(again, made, atol=1e-5, rtol=1e-5)
    # The base is saved as it was before the adapters, and saving does not take them away.
    unet = UNet2DModel.from_pretrained(tmp_path, subfolder="unet")
    assert all(torch.equal(tensor, tiny_unet().state_dict()[name]) for name, tensor in unet.state_dict().items())
    assert torch.equal(
        pipe(class_labels=[0, 1, 2, 3], generator=generators(0, 1, 2, 3), output_type="latent").images, made
    )
    card = (tmp_path / "README.md").read_text()
    assert f"| `unet`, for all | {tiny_unet().num_parameters():,} |" in card and "load_lora_weights" in card


def test_parameters_count_the_base_once():
    pipe, base = lora_pipeline(k=4), tiny_unet().num_parameters()
    one = pipe.unet_0.num_parameters()
    assert pipe.count_parameters() == (base + one, base + 4 * one)
    assert pipe.fuse_students().count_parameters() == (base, 4 * base)


def test_adapter_can_be_left_out_and_put_in(tmp_path):
    pipe = lora_pipeline(k=4)
    pipe.save_pretrained(tmp_path)
    loaded = MultiStudentPipeline.from_pretrained(tmp_path, unet_1=None)
    assert list(loaded.students) == [0, 2, 3]
    with pytest.raises(ValueError, match="belongs to student 1, which is absent"):
        loaded(class_labels=1)
    loaded.add_student(1, LoraStudent.from_pretrained(tmp_path, subfolder="unet_1"))
    one = {"class_labels": 1, "output_type": "latent"}
    expected = pipe(**one, generator=generators(0)).images
    torch.testing.assert_close(loaded(**one, generator=generators(0)).images, expected, atol=1e-5, rtol=1e-5)
    # In the place of another one.
    loaded.add_student(1, LoraStudent.from_pretrained(tmp_path, subfolder="unet_2"))
    assert (loaded(**one, generator=generators(0)).images - expected).abs().max() > 1e-3


def test_pipelines_of_one_base_share_it():
    pipe = lora_pipeline(k=2)
    other = MultiStudentPipeline.from_pipe(pipe)
    assert other.unet is pipe.unet
    images = [p(class_labels=[0, 3], generator=generators(0, 1), output_type="latent").images for p in (pipe, other)]
    assert torch.equal(*images)


def test_adapters_from_several_places_make_a_pipeline(tmp_path):
    pipe = lora_pipeline(k=2)
    pipe.save_pretrained(tmp_path / "whole")
    pipe.unet_1.save_pretrained(tmp_path / "one")
    base = {"base": tmp_path / "whole", "router": pipe.router}
    made = MultiStudentPipeline.from_students(students=[tmp_path / "whole", tmp_path / "one"], **base)
    arguments = {"class_labels": [0, 3], "output_type": "latent"}
    torch.testing.assert_close(
        made(**arguments, generator=generators(0, 1)).images,
        pipe(**arguments, generator=generators(0, 1)).images,
        atol=1e-5,
        rtol=1e-5,
    )


def test_text_pipeline_of_adapters(tmp_path):
    base = tiny_text_unet()
    students = {f"unet_{i}": adapter(tiny_text_unet(), i)[0] for i in range(4)}
    pipe = tiny_text_pipeline(tmp_path, 4, unet=base, **students)
    full = pipe.fuse_students()
    prompts = ["red", "blue car", "a", "zebra", "xyz", "qq"]
    made = pipe(prompts, generator=generators(*range(6)), output_type="latent")
    expected = full(prompts, generator=generators(*range(6)), output_type="latent")
    assert made.student_indices == expected.student_indices
    torch.testing.assert_close(made.images, expected.images, atol=1e-5 * expected.images.abs().max().item(), rtol=0)


def test_half_precision_and_offload_hooks_reach_the_adapters(tmp_path):
    pipe = lora_pipeline(k=2).to(torch.bfloat16)
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.bfloat16}
    pipe.save_pretrained(tmp_path)
    saved = LoraStudent.from_pretrained(tmp_path, subfolder="unet_0")
    assert all(torch.equal(saved.weights[name], tensor) for name, tensor in lora_pipeline(2).unet_0.weights.items())
    loaded = MultiStudentPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded(class_labels=[0, 3], output_type="pt").images.shape == (2, 1, 8, 8)


# ------------------------------------------------------------------ sizes


def test_four_students_of_rank_64_take_at_most_a_quarter_more_than_one_network():
    """SD 1.5 and EDM's ImageNet-64 net, float32, counted on the meta device."""
    with torch.device("meta"):
        sd = UNet2DConditionModel(cross_attention_dim=768)
        edm = UNet2DModel(
            sample_size=64,
            block_out_channels=(192, 384, 576, 768),
            layers_per_block=3,
            down_block_types=("ResnetDownsampleBlock2D", *("AttnDownBlock2D",) * 3),
            up_block_types=(*("AttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
            attention_head_dim=64,
            attn_norm_num_groups=32,
            resnet_time_scale_shift="scale_shift",
            downsample_type="resnet",
            upsample_type="resnet",
            num_class_embeds=1000,
        )
        for base, millions in ((sd, 859.5), (edm, 295.9)):
            full = base.num_parameters()
            assert full / 1e6 == pytest.approx(millions, abs=0.05)
            one = sum(p.numel() for p in adapter_parameters(lora_network(base, lora_config(base, 64))))
            assert 1.1 < (full + 4 * one) / full <= 1.25


# ------------------------------------------------------------------ wrong use


@pytest.mark.parametrize("settings, error, text", [
    ({"rank": 0}, ValueError, "rank: got 0"),
    ({"rank": -1}, ValueError, "rank: got -1"),
    ({"rank": 2.5}, TypeError, "rank: got 2.5"),
    ({"rank": 2, "conv_rank": 0}, ValueError, "conv_rank: got 0"),
    ({"rank": 2, "alpha": 0}, ValueError, "lora_alpha: got 0"),
    ({"rank": 2, "target_modules": ["to_q", "to_x"]}, ValueError, "lora_target_modules: .*'to_x'"),
    ({"rank": 2, "target_modules": ["norm1"]}, ValueError, "lora_target_modules: .*'norm1'"),
])  # fmt: skip
def test_bad_adapters_are_refused(settings, error, text):
    with pytest.raises(error, match=f"^{text}"):
        lora_config(tiny_unet(), **settings)


def test_defaults_of_the_settings_are_those_of_the_function():
    unet = tiny_unet()
    assert AdapterConfig(rank=4).lora(unet) == lora_config(unet, 4)


def test_unknown_names_are_refused():
    base = tiny_unet()
    attach(base, {"a": adapter(tiny_unet(), 0)[0]})
    with pytest.raises(ValueError, match="^names: 'b' is no adapter of this network, it has .'a'."):
        with adapter_of_each_row(base, ["a", "b"]):
            pass


def test_name_of_another_adapter_is_refused():
    base = tiny_unet()
    first, second = (adapter(tiny_unet(), seed)[0] for seed in (0, 1))
    attach(base, {"a": first})
    attach(base, {"a": first})
    with pytest.raises(ValueError, match="^a: this is already the name of another adapter"):
        attach(base, {"a": second})


def test_adapter_of_another_base_is_refused():
    student, _ = adapter(tiny_unet(seed=0), 0)
    with pytest.raises(ValueError, match="^unet_0: this adapter was trained on a network with other weights"):
        MultiStudentPipeline(edm_scheduler(), ClassRouter(1, [0] * 4), unet=tiny_unet(seed=1), unet_0=student)


def test_weights_of_another_rank_are_refused():
    student, _ = adapter(tiny_unet(), 0, rank=3)
    with pytest.raises(ValueError, match="^weights: .* rank 3, .* rank 2"):
        student.load_into(lora_network(tiny_unet(), lora_config(tiny_unet(), 2)))


def test_adapters_and_full_students_do_not_mix():
    student, _ = adapter(tiny_unet(), 0)
    router = ClassRouter.consecutive(4, 2)
    with pytest.raises(ValueError, match="^unet_1: got a UNet2DModel; with a base"):
        MultiStudentPipeline(edm_scheduler(), router, unet=tiny_unet(), unet_0=student, unet_1=tiny_unet())
    with pytest.raises(ValueError, match="^unet: unet_0 is a LoRA student, give the network"):
        MultiStudentPipeline(edm_scheduler(), router, unet_0=student, unet_1=student)
    with pytest.raises(ValueError, match="^unet: unet_0 is a LoRA student"):
        tiny_pipeline(k=2).add_student(0, student)
