# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Weights of a teacher UNet for a narrower or shallower one: its most important channels, its outer blocks.

Tensors that meet on a channel axis must keep the same channels. So the networks are walked through side by side once,
and every axis of every weight is given a name: an `Axis`, the same object wherever the same channels are meant.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from diffusers import Transformer2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn


_BLOCKS = {
    *("DownBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
    *("UpBlock2D", "AttnUpBlock2D", "CrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
}


@dataclass(eq=False)
class Axis:
    """Channels of the teacher, of which a student keeps some.

    A normalisation takes its statistics over groups of channels, and attention its scores over heads. So as many
    channels are kept of each group, and they stay in their group.

    Args:
        teacher: how many groups, and channels of each.
        student: the same; fewer groups are the best ones.
        weights: for each of the teacher's channels the squares of the weights that write it, summed, and of those that
            read it [2, channels]. Axes that are tied share the tensor.
    """

    teacher: tuple[int, int]
    student: tuple[int, int]
    weights: torch.Tensor | None = None

    def __post_init__(self):
        if any(kept > channels for kept, channels in zip(self.student, self.teacher)):
            raise ValueError(
                f"channels: {self.student[0] * self.student[1]} where the teacher has {self.width}; "
                "a student that inherits weights is not wider anywhere"
            )
        if self.weights is None:
            self.weights = torch.zeros(2, self.width)

    @property
    def width(self) -> int:
        return self.teacher[0] * self.teacher[1]

    def kept(self) -> torch.Tensor:
        """The teacher's channels that the student has, in their order."""
        # What is not written or not read has no effect, however large the other weights are.
        scores = self.weights.prod(dim=0).reshape(self.teacher)
        groups = _best(scores.sum(1), self.student[0])
        inside = torch.stack([_best(scores[group], self.student[1]) for group in groups])
        return (groups[:, None] * self.teacher[1] + inside).flatten()


def _best(scores: torch.Tensor, count: int) -> torch.Tensor:
    return scores.argsort(descending=True, stable=True)[:count].sort().values


@dataclass
class Layer:
    """A layer of the student, that of the teacher it is cut from, and whose channels its axes are.

    Args:
        student, teacher: linear, convolution, normalisation or embedding.
        rows: axes that lie one after another in the weight's first dimension (and the bias); empty: nothing is cut.
        columns: the same for its second dimension.
        factor: of the weights.
    """

    student: nn.Module
    teacher: nn.Module
    rows: tuple[Axis, ...] = ()
    columns: tuple[Axis, ...] = ()
    factor: float = 1.0

    def tensors(self) -> Iterator[tuple[nn.Parameter, torch.Tensor, list[tuple[Axis, ...]]]]:
        """(the student's parameter, the teacher's tensor on the CPU, the axes of its first dimensions)."""
        student, teacher = dict(self.student.named_parameters()), dict(self.teacher.named_parameters())
        for name, parameter in student.items():
            tensor = teacher[name].detach().float().cpu() * self.factor
            yield parameter, tensor, [self.rows, self.columns][: tensor.ndim]


@torch.no_grad()
def inherit_weights(student, teacher):
    """Fills a smaller student with the teacher's weights.

    Narrower: of each level the most important channels, the same in the encoder, the decoder and the skip connections
    between them; channels inside a block, attention heads and the time embedding's width by the same rule, each for
    itself. Importance is the squared norm of the weights that write a channel times that of those that read it.

    Shallower (as BK-SDM, arXiv 2305.15798): encoder levels keep their first residual blocks, with the attention behind
    them; decoder levels keep the first, which takes the channels of the level below, and the last ones, which take the
    skip connections that are left.

    One thing is lost: where two neighbouring levels are equally wide in the student but not in the teacher, diffusers
    has no projection on the way around a residual block, so the teacher's is dropped.

    Args:
        student (`UNet2DModel` or `UNet2DConditionModel`): Of the teacher's config but for sizes; changed in place.
        teacher (`ModelMixin`): Of the student's class, not changed.

    Raises:
        ValueError: The student is wider or deeper than the teacher, or the teacher has layers of another kind than
            the UNets of EDM and of Stable Diffusion (a Fourier time embedding, an added embedding, ...).
    """
    unknown = {*teacher.config.down_block_types, *teacher.config.up_block_types} - _BLOCKS
    if unknown:
        raise ValueError(f"init: {', '.join(sorted(unknown))} of this teacher cannot be inherited; use init='random'")
    layers = list(_walk(student, teacher))
    for layer in layers:
        for _, tensor, axes in layer.tensors():
            for dim, parts in enumerate(axes):
                # Rows are written; columns are read, but for an embedding's.
                _count(tensor, parts, dim, 0 if isinstance(layer.student, nn.Embedding) else dim)
    filled = set()
    for layer in layers:
        for parameter, tensor, axes in layer.tensors():
            for dim, parts in enumerate(axes):
                tensor = _cut(tensor, parts, dim)
            parameter.copy_(tensor)
            filled.add(id(parameter))
    missing = [name for name, parameter in student.named_parameters() if id(parameter) not in filled]
    if missing:
        raise ValueError(f"init: {', '.join(missing)} of this teacher cannot be inherited; use init='random'")


def _count(tensor: torch.Tensor, parts: tuple[Axis, ...], dim: int, kind: int):
    squares = tensor.transpose(0, dim).reshape(tensor.shape[dim], -1).square().sum(1)
    start = 0
    for axis in parts:
        axis.weights[kind] += squares[start : start + axis.width]
        start += axis.width


def _cut(tensor: torch.Tensor, parts: tuple[Axis, ...], dim: int) -> torch.Tensor:
    if not parts:
        return tensor
    pieces = tensor.split([axis.width for axis in parts], dim)
    return torch.cat([piece.index_select(dim, axis.kept()) for axis, piece in zip(parts, pieces, strict=True)], dim)


def _walk(student: nn.Module, teacher: nn.Module) -> Iterator[Layer]:
    """All layers of two UNets, in no particular order."""
    levels = _levels(student, teacher)
    emb = _axis(student.time_embedding.linear_2, teacher.time_embedding.linear_2)
    yield from _embeddings(student, teacher, emb)
    yield Layer(student.conv_in, teacher.conv_in, (levels[0],))
    flow, skips = levels[0], [levels[0]]
    for level, small, large in zip(levels, student.down_blocks, teacher.down_blocks, strict=True):
        count = len(small.resnets)
        if count > len(large.resnets):
            raise ValueError(
                f"blocks: {count} where the teacher has {len(large.resnets)}; "
                "a student that inherits weights is not deeper anywhere"
            )
        inputs = [(flow,)] + [(level,)] * (count - 1)
        yield from _block(small, large, range(count), inputs, level, emb)
        flow = level
        skips += [level] * (count + len(_children(small, "downsamplers")))
    if teacher.mid_block is not None:
        count = len(student.mid_block.resnets)
        yield from _block(student.mid_block, teacher.mid_block, range(count), [(flow,)] * count, flow, emb)
    for level, small, large in zip(levels[::-1], student.up_blocks, teacher.up_blocks, strict=True):
        count, total = len(small.resnets), len(large.resnets)
        inputs = []
        for _ in range(count):
            inputs.append((flow, skips.pop()))
            flow = level
        yield from _block(small, large, [0, *range(total - count + 1, total)], inputs, level, emb)
    yield Layer(student.conv_norm_out, teacher.conv_norm_out, (levels[0],))
    yield Layer(student.conv_out, teacher.conv_out, (), (levels[0],))


def _levels(student: nn.Module, teacher: nn.Module) -> list[Axis]:
    groups, levels = teacher.config.norm_num_groups, []
    for narrow, wide in zip(student.config.block_out_channels, teacher.config.block_out_channels, strict=True):
        # Between equally wide levels nothing is projected, so they have the same channels.
        weights = levels[-1].weights if levels and levels[-1].width == wide else None
        levels.append(Axis((groups, wide // groups), (groups, narrow // groups), weights))
    return levels


def _axis(student: nn.Module, teacher: nn.Module, groups: int = 1) -> Axis:
    """The outputs of a layer."""
    narrow, wide = student.weight.shape[0], teacher.weight.shape[0]
    return Axis((groups, wide // groups), (groups, narrow // groups))


def _children(block: nn.Module, name: str) -> Iterable[nn.Module]:
    # Blocks of some types have no such list, others have None.
    return dict(block.named_children()).get(name, ())


def _embeddings(student: nn.Module, teacher: nn.Module, emb: Axis) -> Iterator[Layer]:
    small, large = student.time_embedding, teacher.time_embedding
    hidden = _axis(small.linear_1, large.linear_1)
    yield Layer(
        small.linear_1, _merge_frequencies(small.linear_1, large.linear_1, teacher.config.freq_shift), (hidden,)
    )
    yield Layer(small.linear_2, large.linear_2, (emb,), (hidden,))
    if isinstance(teacher.class_embedding, nn.Embedding):
        yield Layer(student.class_embedding, teacher.class_embedding, (), (emb,))


def _merge_frequencies(student: nn.Linear, teacher: nn.Linear, shift: int) -> nn.Linear:
    """The layer after the sinusoidal embedding, which has fewer frequencies in the student, for these frequencies.

    Sines, then cosines, of t * 10000^(-i / (n - shift)), i = 0 ... n-1: each of the teacher's n is replaced by the
    student's nearest one.
    """
    ours, theirs = (torch.arange(n) / (n - shift) for n in (student.in_features // 2, teacher.in_features // 2))
    nearest = (theirs[:, None] - ours).abs().argmin(dim=1)
    merged = nn.utils.skip_init(nn.Linear, student.in_features, teacher.out_features)
    merged.weight.zero_().index_add_(1, torch.cat([nearest, nearest + len(ours)]), teacher.weight.float().cpu())
    merged.bias.copy_(teacher.bias)
    return merged


def _block(
    small: nn.Module, large: nn.Module, kept: Iterable[int], inputs: list, out: Axis, emb: Axis
) -> Iterator[Layer]:
    """A block of the encoder, the decoder or the middle, which has the teacher's residual blocks `kept`.

    Args:
        inputs: the axes that each residual block takes, concatenated.
        out: what all of them give.
    """
    for k, resnet, axes in zip(kept, small.resnets, inputs, strict=True):
        yield from _resnet(resnet, large.resnets[k], axes, out, emb)
    for k, attention in zip(kept, _children(small, "attentions")):
        if isinstance(attention, Transformer2DModel):
            yield from _transformer(attention, large.attentions[k], out)
        elif attention is not None:
            yield from _attention(attention, large.attentions[k], out)
    for name in ("downsamplers", "upsamplers"):
        for sampler, original in zip(_children(small, name), _children(large, name)):
            if isinstance(sampler, ResnetBlock2D):
                yield from _resnet(sampler, original, (out,), out, emb)
            else:
                yield Layer(sampler.conv, original.conv, (out,), (out,))


def _resnet(
    small: ResnetBlock2D, large: ResnetBlock2D, inputs: tuple[Axis, ...], out: Axis, emb: Axis
) -> Iterator[Layer]:
    hidden = _axis(small.conv1, large.conv1, large.norm2.num_groups)
    yield Layer(small.norm1, large.norm1, inputs)
    yield Layer(small.conv1, large.conv1, (hidden,), inputs)
    # Twice as many where it gives scale and shift.
    times = large.time_emb_proj.out_features // hidden.width
    yield Layer(small.time_emb_proj, large.time_emb_proj, (hidden,) * times, (emb,))
    yield Layer(small.norm2, large.norm2, (hidden,))
    yield Layer(small.conv2, large.conv2, (out,), (hidden,))
    if small.conv_shortcut is not None:
        yield Layer(small.conv_shortcut, large.conv_shortcut or _identity(out.width), (out,), inputs)


def _identity(channels: int) -> nn.Conv2d:
    """What a missing projection does."""
    conv = nn.utils.skip_init(nn.Conv2d, channels, channels, kernel_size=1)
    nn.init.dirac_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


def _attention(small: Attention, large: Attention, flow: Axis) -> Iterator[Layer]:
    # Whole heads, or some of each head's channels: one of them is the same in both networks.
    size, full = (a.to_q.out_features // a.heads for a in (small, large))
    inner = Axis((large.heads, full), (small.heads, size))
    # Texts are not narrower.
    source = () if large.is_cross_attention else (flow,)
    if large.group_norm is not None:
        yield Layer(small.group_norm, large.group_norm, (flow,))
    # Scores are divided by the root of a head's size.
    yield Layer(small.to_q, large.to_q, (inner,), (flow,), factor=(size / full) ** 0.5)
    yield Layer(small.to_k, large.to_k, (inner,), source)
    yield Layer(small.to_v, large.to_v, (inner,), source)
    yield Layer(small.to_out[0], large.to_out[0], (flow,), (inner,))


def _transformer(small: Transformer2DModel, large: Transformer2DModel, flow: Axis) -> Iterator[Layer]:
    inner = _axis(small.proj_in, large.proj_in)
    yield Layer(small.norm, large.norm, (flow,))
    yield Layer(small.proj_in, large.proj_in, (inner,), (flow,))
    yield Layer(small.proj_out, large.proj_out, (flow,), (inner,))
    for ours, theirs in zip(small.transformer_blocks, large.transformer_blocks, strict=True):
        for name in ("norm1", "norm2", "norm3"):
            yield Layer(ours.get_submodule(name), theirs.get_submodule(name), (inner,))
        yield from _attention(ours.attn1, theirs.attn1, inner)
        yield from _attention(ours.attn2, theirs.attn2, inner)
        (proj, last), (full_proj, full_last) = ((block.ff.net[0].proj, block.ff.net[2]) for block in (ours, theirs))
        hidden = Axis((1, full_last.in_features), (1, last.in_features))
        # Twice as many where one half gates the other.
        times = full_proj.out_features // hidden.width
        yield Layer(proj, full_proj, (hidden,) * times, (inner,))
        yield Layer(last, full_last, (inner,), (hidden,))
