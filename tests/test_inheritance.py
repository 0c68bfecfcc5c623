# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Students that start from a part of the teacher's weights, and the published sizes."""

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

from diffusers_msd.inheritance import _walk, inherit_weights
from diffusers_msd.students import PRESETS, StudentConfig, check_preset, create_student


def pixel_unet(channels=(16, 32), blocks=1, **config):
    """With attention in whole heads of 8 channels, and convolutions between levels."""
    settings = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "num_class_embeds": 10,
        "block_out_channels": channels,
        "layers_per_block": blocks,
        "down_block_types": ("DownBlock2D",) * (len(channels) - 1) + ("AttnDownBlock2D",),
        "up_block_types": ("AttnUpBlock2D",) + ("UpBlock2D",) * (len(channels) - 1),
        "norm_num_groups": 4,
        "attention_head_dim": 8,
    }
    return randomised(UNet2DModel(**{**settings, **config}))


def adm_unet(channels=(16, 32), blocks=1, **config):
    """The layers of EDM's ImageNet-64 network: residual blocks between levels, shift and scale from the time."""
    return pixel_unet(
        channels,
        blocks,
        down_block_types=("ResnetDownsampleBlock2D",) * (len(channels) - 1) + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("ResnetUpsampleBlock2D",) * (len(channels) - 1),
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        attn_norm_num_groups=4,
        **config,
    )


def text_unet(channels=(16, 32), blocks=1, **config):
    """Stable Diffusion's layers: four heads at any width, and gated feed-forward parts."""
    settings = {
        "sample_size": 8,
        "block_out_channels": channels,
        "layers_per_block": blocks,
        "down_block_types": ("CrossAttnDownBlock2D",) * (len(channels) - 1) + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (len(channels) - 1),
        "cross_attention_dim": 12,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return randomised(UNet2DConditionModel(**{**settings, **config}))


def linear_text_unet(channels=(16, 32), blocks=1):
    return text_unet(channels, blocks, use_linear_projection=True)


MAKERS = [pixel_unet, adm_unet, text_unet, linear_text_unet]


def randomised(unet):
    """No parameter is zero or one, so that none is silent or alike by chance."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in unet.parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan**0.5)
    return unet.eval()


@torch.no_grad()
def run(unet):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, unet.config.in_channels, 8, 8, generator=generator)
    t = torch.tensor([3.0, 500.0])
    if isinstance(unet, UNet2DModel):
        return unet(x, t, class_labels=torch.tensor([0, 9])).sample
    return unet(x, t, torch.randn(2, 5, 12, generator=generator)).sample


def copies(axis):
    """For a wide axis that repeats a narrow one: whose copy a channel is, and whether it is the one that is read."""
    (groups, size), (few_groups, small_size) = axis.teacher, axis.student
    times, inside = groups // few_groups, size // small_size
    group, channel = torch.arange(groups)[:, None], torch.arange(size)
    original = (group // times) * small_size + channel // inside
    read = (group % times == times - 1) & (channel % inside == inside - 1)
    return original.flatten(), read.flatten()


@torch.no_grad()
def widen(small, large):
    """Gives `large` the function of `small`: channels are repeated, which no normalisation notices, and read once."""
    layers = list(_walk(small, large))
    norms = [layer for layer in layers if isinstance(layer.student, (nn.GroupNorm, nn.LayerNorm))]
    normalised = {axis for layer in norms for axis in layer.rows}
    for layer in layers:
        # Walking makes a layer of its own for the narrow network's frequencies.
        time = layer.student is small.time_embedding.linear_1
        target = large.time_embedding.linear_1 if time else layer.teacher
        for name, parameter in layer.student.named_parameters():
            tensor, wide = parameter / layer.factor, target.get_parameter(name)
            for dim, parts in enumerate([layer.rows, layer.columns][: tensor.ndim]):
                tensor = repeat(tensor, parts, dim, normalised) if parts else tensor
            if tensor.shape != wide.shape:
                # Of the wide network's frequencies, those that the narrow one has too.
                wide = wide.zero_()[:, :: wide.shape[1] // tensor.shape[1]]
            wide.copy_(tensor)


def repeat(tensor, parts, dim, normalised):
    pieces = []
    for axis, piece in zip(parts, tensor.split([axis.student[0] * axis.student[1] for axis in parts], dim)):
        original, read = copies(axis)
        filled = torch.ones_like(read) if dim == 0 and axis in normalised else read
        pieces.append(piece.index_select(dim, original) * filled.reshape([-1] + [1] * (tensor.ndim - dim - 1)))
    return torch.cat(pieces, dim)


@pytest.mark.parametrize("times", [2, 4])
@pytest.mark.parametrize("make", MAKERS)
def test_a_network_whose_channels_were_repeated_is_found_again(make, times):
    small, large = make((8, 16)), make((8 * times, 16 * times))
    widen(small, large)
    assert torch.allclose(run(large), run(small), atol=1e-5), "the test's own construction"
    student = create_student(large, channels=[8, 16], init="inherit").eval()
    assert torch.allclose(run(student), run(small), atol=1e-5)
    for (name, weight), expected in zip(student.named_parameters(), small.parameters(), strict=True):
        assert torch.allclose(weight, expected, atol=1e-6), name


@torch.no_grad()
def deepen(small, large):
    """Gives `large` the function of `small`: blocks that are not in `small` pass on what comes from the block before."""
    state = large.state_dict()
    for name, tensor in state.items():
        if name.endswith(("conv2.weight", "conv2.bias", "to_out.0.weight", "to_out.0.bias")) or "proj_out" in name:
            tensor.zero_()
    for block in large.up_blocks:
        for resnet in block.resnets:
            nn.init.dirac_(resnet.conv_shortcut.weight)
            resnet.conv_shortcut.bias.zero_()
    extra = large.config.layers_per_block - small.config.layers_per_block
    for name, tensor in small.state_dict().items():
        words = name.split(".")
        if words[0] == "up_blocks" and words[2] in ("resnets", "attentions") and words[3] != "0":
            words[3] = str(int(words[3]) + extra)
        state[".".join(words)].copy_(tensor)


@pytest.mark.parametrize("blocks, kept", [(2, 1), (4, 2)])
@pytest.mark.parametrize("make", MAKERS)
def test_a_network_that_blocks_were_added_to_is_found_again(make, blocks, kept):
    small, large = make(blocks=kept), make(blocks=blocks)
    deepen(small, large)
    assert torch.allclose(run(large), run(small), atol=1e-5), "the test's own construction"
    student = create_student(large, blocks=kept, init="inherit").eval()
    for (name, weight), expected in zip(student.named_parameters(), small.parameters(), strict=True):
        assert torch.equal(weight, expected), name


@pytest.mark.parametrize("make", MAKERS)
def test_the_full_size_inherits_everything(make):
    teacher, student = make(blocks=2), make(blocks=2)
    for parameter in student.parameters():
        nn.init.zeros_(parameter)
    inherit_weights(student, teacher)
    for (name, weight), expected in zip(student.named_parameters(), teacher.parameters(), strict=True):
        assert torch.equal(weight, expected), name


@torch.no_grad()
def test_the_strongest_channels_of_each_group_are_kept_wherever_they_are_read():
    teacher = pixel_unet((16, 32), blocks=2)
    # Groups of 4 and of 8 channels, of which 2 and 4 are kept.
    outer = torch.tensor([1, 3, 4, 5, 8, 11, 13, 14])
    inner = torch.tensor([0, 2, 5, 7, 8, 9, 10, 11, 20, 21, 22, 23, 25, 26, 29, 30])
    teacher.conv_in.weight[outer] += 100
    teacher.down_blocks[1].resnets[1].conv2.weight[inner] += 100
    # Says in the student which of the teacher's channels a place of the concatenation has.
    teacher.up_blocks[0].resnets[2].norm1.weight.copy_(torch.arange(48))
    teacher.up_blocks[1].resnets[0].norm1.weight.copy_(torch.arange(48))
    teacher.up_blocks[1].resnets[1].norm1.weight.copy_(torch.arange(32))
    student = create_student(teacher, channels=[8, 16], init="inherit")
    assert torch.equal(student.conv_in.weight, teacher.conv_in.weight[outer])
    assert torch.equal(student.conv_out.weight, teacher.conv_out.weight[:, outer])
    shortcut = teacher.down_blocks[1].resnets[0].conv_shortcut.weight
    assert torch.equal(student.down_blocks[1].resnets[0].conv_shortcut.weight, shortcut[inner][:, outer])
    # The decoder's own channels first, then those of the skip connection.
    mixed = torch.cat([inner, 32 + outer])
    assert student.up_blocks[0].resnets[2].norm1.weight.tolist() == mixed.tolist()
    assert student.up_blocks[1].resnets[0].norm1.weight.tolist() == mixed.tolist()
    assert student.up_blocks[1].resnets[1].norm1.weight.tolist() == torch.cat([outer, 16 + outer]).tolist()


@torch.no_grad()
def test_what_only_the_class_embedding_writes_is_kept():
    teacher = pixel_unet((16, 32))
    teacher.time_embedding.linear_2.weight[:5], teacher.time_embedding.linear_2.bias[:5] = 0, 0
    teacher.class_embedding.weight[:, :5] = 100
    student = create_student(teacher, channels=[8, 16], init="inherit")
    assert torch.equal(student.class_embedding.weight[:, :5], teacher.class_embedding.weight[:, :5])


@torch.no_grad()
def test_levels_of_equal_width_have_the_same_channels_and_a_new_projection_passes_them_on():
    teacher = text_unet((16, 32, 32), down_block_types=("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
                        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2)  # fmt: skip
    assert teacher.down_blocks[2].resnets[0].conv_shortcut is None
    same = create_student(teacher, channels=[8, 16, 16], init="inherit")
    assert same.down_blocks[2].resnets[0].conv_shortcut is None
    first, second = (
        torch.isin(get(teacher), get(same))
        for get in (lambda u: u.down_blocks[1].resnets[0].conv2.bias, lambda u: u.down_blocks[2].resnets[0].conv2.bias)
    )
    assert torch.equal(first, second) and first.sum() == 16
    student = create_student(teacher, channels=[16, 16, 32], init="inherit")
    # All 32 channels of the last level are kept; what enters is half of them.
    shortcut = student.down_blocks[2].resnets[0].conv_shortcut
    kept = shortcut.weight[:, :, 0, 0].argmax(dim=0)
    assert torch.equal(shortcut.weight[:, :, 0, 0], torch.eye(32)[:, kept]) and not shortcut.bias.any()
    assert torch.equal(
        student.down_blocks[1].downsamplers[0].conv.bias, teacher.down_blocks[1].downsamplers[0].conv.bias[kept]
    )
    assert run(student.eval()).shape == run(teacher).shape


@torch.no_grad()
def test_whole_heads_are_kept_and_their_scale():
    teacher = pixel_unet((16, 32))
    attention = teacher.mid_block.attentions[0]
    attention.to_v.weight[24:] += 100
    attention.to_k.weight[8:16] += 100
    attention.to_out[0].weight.copy_(torch.arange(32.0).expand(32, 32) / 1000)
    student = create_student(teacher, channels=[8, 16], init="inherit")
    # Heads 1 and 3 of four.
    columns = 1000 * student.mid_block.attentions[0].to_out[0].weight[0]
    assert columns.round().int().tolist() == [*range(8, 16), *range(24, 32)]
    # With a fixed number of heads these get smaller, and their scores are divided by a smaller root.
    text = text_unet((16, 32))
    small = create_student(text, channels=[8, 16], init="inherit").down_blocks[0].attentions[0].transformer_blocks[0]
    rows = text.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_q.weight.abs().amax(1)
    ratio = small.attn2.to_q.weight.abs().amax(1)[:, None] / rows
    assert small.attn2.heads == 4 and (ratio <= 0.5**0.5 + 1e-6).any(dim=1).all()


def test_inheriting_leaves_the_teacher_and_the_global_generator_alone():
    teacher = text_unet().to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    state = torch.get_rng_state()
    student, other = (create_student(teacher, channels=[8, 16], init="inherit", seed=seed) for seed in (0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert student.dtype == torch.float32 and student.training
    # Nothing is left of the random weights.
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    "make, size, text",
    [
        (lambda: pixel_unet(), {"channels": [16, 64]}, "channels: 64 where the teacher has 32"),
        (lambda: pixel_unet(), {"blocks": 2}, "blocks: 2 where the teacher has 1"),
        (lambda: pixel_unet(time_embedding_type="fourier"), {"channels": [8, 16]}, "init: time_proj.weight"),
        (
            lambda: pixel_unet((32, 64), down_block_types=("SkipDownBlock2D", "DownBlock2D"), norm_num_groups=32),
            {"channels": [32, 32]},
            "init: SkipDownBlock2D",
        ),
        (
            lambda: text_unet(class_embed_type="projection", projection_class_embeddings_input_dim=6),
            {"channels": [8, 16]},
            "init: class_embedding",
        ),
        (lambda: pixel_unet(), {"channels": [8, 18]}, "channels: .*level 1 is 18 wide.*norm_num_groups=4"),
    ],
)
def test_what_cannot_be_inherited_is_refused(make, size, text):
    with pytest.raises(ValueError, match=f"^{text}"):
        create_student(make(), **size, init="inherit")


def test_an_unknown_start_is_refused():
    with pytest.raises(ValueError, match="^init: one of random, inherit expected, got 'pruned'"):
        create_student(pixel_unet(), init="pruned")


def published_teacher(name):
    """On the meta device."""
    with torch.device("meta"):
        if name.startswith("sd15"):
            return UNet2DConditionModel(block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768)
        return UNet2DModel(
            sample_size=64,
            block_out_channels=(192, 384, 576, 768),
            layers_per_block=3,
            down_block_types=("ResnetDownsampleBlock2D",) + ("AttnDownBlock2D",) * 3,
            up_block_types=("AttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",),
            downsample_type="resnet",
            upsample_type="resnet",
            resnet_time_scale_shift="scale_shift",
            attention_head_dim=64,
            attn_norm_num_groups=32,
            num_class_embeds=1000,
        )


@pytest.mark.parametrize(
    "name, teacher_parameters, parameters",
    [("imagenet64-42", 295.9, 172.8), ("imagenet64-71", 295.9, 85.9), ("sd15-83", 859.5, 142.2)],
)
def test_presets_have_the_published_sizes(name, teacher_parameters, parameters):
    teacher = published_teacher(name)
    check_preset(name, teacher)
    with torch.device("meta"):
        student = create_student(teacher, **PRESETS[name])
    assert round(teacher.num_parameters() / 1e6, 1) == teacher_parameters
    assert round(student.num_parameters() / 1e6, 1) == parameters
    assert round(100 - 100 * parameters / teacher_parameters) == int(name.split("-")[1])
    # Every group and head has as many channels as the next one.
    for module in student.modules():
        if isinstance(module, nn.GroupNorm):
            assert module.num_channels % module.num_groups == 0


def test_a_preset_stands_for_channels_and_blocks():
    config = StudentConfig(student_preset="imagenet64-71")
    assert (config.student_channels, config.student_blocks) == ([128, 256, 256, 512], 2)
    with pytest.raises(ValueError, match="^student_preset: .*student_channels and student_blocks"):
        StudentConfig(student_preset="imagenet64-71", student_blocks=3)


@pytest.mark.parametrize(
    "name, teacher", [("imagenet64-42", pixel_unet), ("sd15-83", pixel_unet), ("sd15-83", text_unet)]
)
def test_a_preset_of_another_teacher_is_refused(name, teacher):
    with pytest.raises(
        ValueError, match=rf"^student_preset: {name} is of a UNet2D.*Model with .*'channels': \[16, 32\]"
    ):
        check_preset(name, teacher())
