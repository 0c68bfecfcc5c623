# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel

from diffusers_msd.students import check_student, create_student, is_same_architecture


def make_unet(**kwargs):
    defaults = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "num_class_embeds": 10,
        "block_out_channels": (16, 32),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 8,
    }
    torch.manual_seed(0)
    return UNet2DModel(**{**defaults, **kwargs})


def make_text_unet(**kwargs):
    defaults = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 12,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    torch.manual_seed(0)
    return UNet2DConditionModel(**{**defaults, **kwargs})


def run(model):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, model.config.in_channels, 8, 8, generator=generator)
    t = torch.tensor([3.0, 500.0])
    with torch.no_grad():
        if isinstance(model, UNet2DModel):
            return model(x, t, class_labels=torch.tensor([0, 9])).sample
        return model(x, t, torch.randn(2, 5, 12, generator=generator)).sample


@pytest.mark.parametrize("make", [make_unet, make_text_unet])
def test_a_same_size_student_is_an_exact_independent_trainable_copy(make):
    teacher = make().eval().requires_grad_(False)
    student = create_student(teacher)
    assert type(student) is type(teacher) and is_same_architecture(student, teacher)
    assert student.training and all(parameter.requires_grad for parameter in student.parameters())
    weights = teacher.state_dict()
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, weights[name]) and tensor.data_ptr() != weights[name].data_ptr()
    assert torch.equal(run(student.eval()), run(teacher))
    assert not any(parameter.requires_grad for parameter in teacher.parameters()) and not teacher.training


def test_a_copy_of_a_half_precision_teacher_is_float32():
    teacher = make_unet().to(torch.bfloat16)
    student = create_student(teacher)
    for name, tensor in student.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, teacher.state_dict()[name].float())


def test_a_copy_does_not_take_the_teacher_s_hooks_along():
    teacher = make_unet()
    taps = []
    teacher.mid_block.register_forward_hook(lambda module, inputs, output: taps.append(output))
    run(create_student(teacher).eval())
    assert taps == []


def test_fixed_fourier_frequencies_are_copied_and_stay_fixed():
    teacher = make_unet(time_embedding_type="fourier")
    student = create_student(teacher)
    frozen = [name for name, parameter in student.named_parameters() if not parameter.requires_grad]
    assert frozen == [name for name, parameter in teacher.named_parameters() if not parameter.requires_grad]
    assert len(frozen) > 0 and torch.equal(student.time_proj.weight, teacher.time_proj.weight)


@pytest.mark.parametrize("make", [make_unet, make_text_unet])
def test_a_smaller_student_has_the_size_asked_for_and_the_rest_of_the_teacher_s_config(make):
    teacher = make()
    student = create_student(teacher, channels=[8, 16], blocks=1)
    assert not is_same_architecture(student, teacher)
    assert student.num_parameters() < teacher.num_parameters()
    assert list(student.config.block_out_channels) == [8, 16] and student.config.layers_per_block == 1
    for name in teacher.config:
        if not name.startswith("_") and name not in ("block_out_channels", "layers_per_block"):
            assert student.config[name] == teacher.config[name], name
    check_student(student, teacher)
    assert run(student.eval()).shape == run(teacher.eval()).shape


def test_settings_the_teacher_took_by_default_can_be_changed(tmp_path):
    # diffusers lists them apart in a config and would quietly put the default back.
    torch.manual_seed(0)
    teacher = UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    teacher.save_pretrained(tmp_path)
    for model in (teacher, UNet2DModel.from_pretrained(tmp_path)):
        student = create_student(model, blocks=1)
        assert student.config.layers_per_block == 1 and len(student.down_blocks[0].resnets) == 1
        assert "_name_or_path" not in student.config


def test_a_loaded_student_still_counts_as_the_teacher_s_architecture(tmp_path):
    teacher = make_unet()
    create_student(teacher).save_pretrained(tmp_path)
    assert is_same_architecture(UNet2DModel.from_pretrained(tmp_path), teacher)
    assert not is_same_architecture(make_unet(act_fn="gelu"), teacher)


def test_random_weights_follow_the_seed_and_leave_the_global_generator_alone():
    teacher = make_unet()
    state = torch.get_rng_state()
    student, same, other = (create_student(teacher, blocks=1, seed=seed) for seed in (0, 0, 1))
    create_student(teacher)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), same.parameters(), strict=True))
    assert not torch.equal(student.conv_in.weight, other.conv_in.weight)


def test_a_description_that_changes_nothing_gives_a_copy():
    teacher = make_unet()
    student = create_student(teacher, channels=[16, 32], blocks=2)
    assert torch.equal(run(student.eval()), run(teacher.eval()))
    teacher = make_text_unet(layers_per_block=(1, 1))
    assert torch.equal(run(create_student(teacher, blocks=1).eval()), run(teacher.eval()))


def test_gradients_of_a_student_do_not_reach_the_teacher():
    teacher = make_unet()
    student = create_student(teacher)
    student(torch.randn(1, 1, 8, 8), 3, class_labels=torch.tensor([1])).sample.square().sum().backward()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.sub_(parameter.grad)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert torch.equal(run(teacher.eval()), run(make_unet().eval()))


@pytest.mark.parametrize(
    "kwargs, error, text",
    [
        ({"channels": [16]}, ValueError, r"channels: got \[16\]; the teacher has 2 levels"),
        ({"channels": [8, 16, 16]}, ValueError, r"channels: got .*the teacher has 2 levels"),
        ({"channels": []}, ValueError, r"channels: got \[\]; the teacher has 2 levels"),
        ({"channels": [0, 16]}, ValueError, r"channels: got \[0, 16\]"),
        ({"channels": [12, 16]}, ValueError, r"channels: .*level 0 is 12 wide.*norm_num_groups=8"),
        ({"channels": [8, 24]}, ValueError, r"channels: .*level 1 is 24 wide.*attention_head_dim=16"),
        ({"channels": [8.0, 16]}, TypeError, r"channels: got \[8.0, 16\]"),
        ({"blocks": 0}, ValueError, r"blocks: got 0"),
        ({"blocks": 1.5}, TypeError, r"blocks: got 1.5"),
        ({"blocks": True}, TypeError, r"blocks: got True"),
    ],
)
def test_a_size_that_does_not_fit_the_teacher_is_refused(kwargs, error, text):
    with pytest.raises(error, match=text):
        create_student(make_unet(attention_head_dim=16), **kwargs)


def test_widths_must_fit_the_middle_block_s_norm_and_each_level_s_heads():
    with pytest.raises(ValueError, match="level 1 is 24 wide.*attn_norm_num_groups=16"):
        create_student(make_unet(attn_norm_num_groups=16), channels=[8, 24])
    # The level without attention is free of the heads' rule.
    assert create_student(make_unet(attention_head_dim=16), channels=[8, 16]).config.block_out_channels[0] == 8
    teacher = make_text_unet(attention_head_dim=(4, 16))
    assert create_student(teacher, channels=[8, 16]).config.block_out_channels[1] == 16
    with pytest.raises(ValueError, match="level 1 is 24 wide.*attention_head_dim=16"):
        create_student(teacher, channels=[8, 24])


def test_only_unets_can_be_shrunk_and_only_models_copied():
    vae = AutoencoderKL(block_out_channels=(32,))
    assert is_same_architecture(create_student(vae), vae)
    with pytest.raises(TypeError, match="teacher: got a AutoencoderKL"):
        create_student(vae, blocks=1)
    with pytest.raises(TypeError, match="teacher: got a Linear"):
        create_student(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    "change",
    [
        {"in_channels": 3},
        {"out_channels": 3},
        {"sample_size": 16},
        {"num_class_embeds": 11},
        {"num_class_embeds": None},
    ],
)
def test_a_student_for_other_images_or_classes_is_refused(change):
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=f"student: it has {name}={value}; the teacher's {name}="):
        check_student(make_unet(**change), make_unet())


def test_a_student_of_another_family_or_text_width_is_refused():
    with pytest.raises(TypeError, match="student: got a UNet2DModel.*UNet2DConditionModel is needed"):
        check_student(make_unet(), make_text_unet())
    with pytest.raises(ValueError, match="cross_attention_dim=16; the teacher's cross_attention_dim=12"):
        check_student(make_text_unet(cross_attention_dim=16), make_text_unet())
