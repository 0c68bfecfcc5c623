# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""The layers of the ADM network (arXiv 2105.05233) by the names of NVIDIA's EDM, of OpenAI's consistency_models, and of
`UNet2DModel`."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch


Tensors = dict[str, torch.Tensor]


class Layout(NamedTuple):
    """How a code base names the layers of the network. Keys are the names of `UNet2DModel`.

    Args:
        ends: layers outside of blocks.
        resnet, attention: layers inside of a residual block, and inside of the attention behind it.
        blocks: (levels, blocks per level, side of the images) -> (our residual block, theirs, their attention or None).
        split_qkv: rows of the joint layer -> rows of queries, keys and values.
    """

    ends: dict[str, str]
    resnet: dict[str, str]
    attention: dict[str, str]
    blocks: Callable[[int, int, int], Iterator[tuple[str, str, str | None]]]
    split_qkv: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]


def _nvidia_blocks(levels: int, blocks: int, side: int) -> Iterator[tuple[str, str, str | None]]:
    names = [f"{side >> i}x{side >> i}" for i in range(levels)]
    pairs = []
    for i, name in enumerate(names):
        pairs += [(f"down_blocks.{i}.resnets.{j}", f"enc.{name}_block{j}") for j in range(blocks)]
        pairs += [(f"down_blocks.{i}.downsamplers.0", f"enc.{below}_down") for below in names[i + 1 : i + 2]]
    pairs += [(f"mid_block.resnets.{j}", f"dec.{names[-1]}_in{j}") for j in range(2)]
    names.reverse()
    for i, name in enumerate(names):
        pairs += [(f"up_blocks.{i}.resnets.{j}", f"dec.{name}_block{j}") for j in range(blocks + 1)]
        pairs += [(f"up_blocks.{i}.upsamplers.0", f"dec.{above}_up") for above in names[i + 1 : i + 2]]
    # Attention is a part of the block that it follows.
    return ((ours, theirs, theirs) for ours, theirs in pairs)


def _openai_blocks(levels: int, blocks: int, side: int) -> Iterator[tuple[str, str, str | None]]:
    for i in range(levels):
        start = 1 + i * (blocks + 1)
        for j in range(blocks):
            yield f"down_blocks.{i}.resnets.{j}", f"input_blocks.{start + j}.0", f"input_blocks.{start + j}.1"
        if i + 1 < levels:
            yield f"down_blocks.{i}.downsamplers.0", f"input_blocks.{start + blocks}.0", None
    yield "mid_block.resnets.0", "middle_block.0", "middle_block.1"
    yield "mid_block.resnets.1", "middle_block.2", None
    for i in range(levels):
        start = i * (blocks + 1)
        for j in range(blocks + 1):
            yield f"up_blocks.{i}.resnets.{j}", f"output_blocks.{start + j}.0", f"output_blocks.{start + j}.1"
        if i + 1 < levels:
            # Behind the attention, where there is one; the name that is not there is not found.
            yield f"up_blocks.{i}.upsamplers.0", f"output_blocks.{start + blocks}.1", None
            yield f"up_blocks.{i}.upsamplers.0", f"output_blocks.{start + blocks}.2", None


NVIDIA = Layout(
    ends={
        "time_embedding.linear_1": "map_layer0",
        "time_embedding.linear_2": "map_layer1",
        "conv_norm_out": "out_norm",
        "conv_out": "out_conv",
    },
    resnet={
        "norm1": "norm0",
        "conv1": "conv0",
        "time_emb_proj": "affine",
        "norm2": "norm1",
        "conv2": "conv1",
        "conv_shortcut": "skip",
    },
    attention={"group_norm": "norm2", "to_qkv": "qkv", "to_out.0": "proj"},
    blocks=_nvidia_blocks,
    # (head, channel, q k v)
    split_qkv=lambda rows: rows.unflatten(0, (-1, 3)).unbind(1),
)
OPENAI = Layout(
    ends={
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    },
    resnet={
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    },
    attention={"group_norm": "norm", "to_qkv": "qkv", "to_out.0": "proj_out"},
    blocks=_openai_blocks,
    # (q k v, head, channel)
    split_qkv=lambda rows: rows.chunk(3),
)


def rename(tensors: Tensors, layout: Layout, levels: int, blocks: int, side: int) -> Tensors:
    """Copies in float32 under the names of `UNet2DModel`; `tensors` is emptied. What is missing is left out.

    Args:
        tensors: by their names in `layout`.
        layout: of the code base that they come from.
        levels, blocks: of resolution, and per level in the encoder.
        side: of the images.

    Raises:
        ValueError: a tensor has no place in a `UNet2DModel`, or shows numbers that another one shows too.
    """
    _check_not_repeated(tensors)
    layers = dict(layout.ends)
    for ours, theirs, attention in layout.blocks(levels, blocks, side):
        pairs = {f"{ours}.{a}": f"{theirs}.{b}" for a, b in layout.resnet.items()}
        layers.update({a: b for a, b in pairs.items() if f"{b}.weight" in tensors})
        if attention is not None and ".resnets." in ours:
            ours = ours.replace(".resnets.", ".attentions.")
            layers.update({f"{ours}.{a}": f"{attention}.{b}" for a, b in layout.attention.items()})
    renamed = {}
    for ours, theirs in layers.items():
        for kind in ("weight", "bias"):
            if f"{theirs}.{kind}" in tensors:
                renamed.update(_parts(f"{ours}.{kind}", tensors.pop(f"{theirs}.{kind}").float(), layout))
    if tensors:
        raise ValueError(f"checkpoint: UNet2DModel has no place for {[name[:80] for name in list(tensors)[:3]]}")
    return renamed


def _parts(name: str, tensor: torch.Tensor, layout: Layout) -> Tensors:
    """A tensor under our name, or its three parts: q, k and v are one layer in both layouts. Always a copy."""
    if ".attentions." in name and tensor.ndim == 4:
        tensor = tensor.flatten(1)  # A convolution of 1 x 1 is a linear layer in diffusers.
    if ".to_qkv." not in name:
        return {name: tensor.clone(memory_format=torch.contiguous_format)}
    if len(tensor) % 3:
        raise ValueError(f"checkpoint: {name} has {len(tensor)} rows, q, k and v need a multiple of 3")
    parts = zip("qkv", layout.split_qkv(tensor), strict=True)
    return {name.replace("to_qkv", f"to_{x}"): part.clone(memory_format=torch.contiguous_format) for x, part in parts}


def _check_not_repeated(tensors: Tensors):
    # A small file could show the same numbers in a thousand layers, each of which will be copied.
    shown: Counter = Counter()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        shown[storage.data_ptr()] += tensor.nbytes
        if shown[storage.data_ptr()] > storage.nbytes():
            raise ValueError(f"checkpoint: {name[:80]} shows numbers of another layer; no EDM network shares them")
