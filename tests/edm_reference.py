# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""What the converters are compared with: the ADM network (arXiv 2105.05233) written anew from its description, under
the layer names of NVIDIA and of OpenAI, and a model of the form in which NVIDIA pickles networks."""

import math
import pickle
import sys
import types
from collections import OrderedDict
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.nn.functional import conv2d, conv_transpose2d, group_norm, interpolate, scaled_dot_product_attention, silu


# Run by NVIDIA's own loader, with what is put into MODULE_SOURCE.
MODULE_SOURCE = "raise SystemExit('the source of a checkpoint was executed')"


class EasyDict(dict):
    """A class that settings come in."""


EasyDict.__module__, EasyDict.__qualname__ = "dnnlib.util", "EasyDict"


def _reconstruct_persistent_obj(meta):
    raise AssertionError("only its name is ever used")


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


class Persistent(nn.Module):
    """Reduces itself to class name, source and attributes, as classes under NVIDIA's decorator do."""

    def __init__(self):
        super().__init__()
        self._init_args, self._init_kwargs = (), EasyDict(init_weight=np.sqrt(1 / 3), nested=[{"a": (1, 2.5, None)}])

    def __reduce__(self):
        meta = {
            "type": "class",
            "version": 6,
            "module_src": MODULE_SOURCE,
            "class_name": type(self).__name__,
            "state": self.__dict__,
        }
        return _reconstruct_persistent_obj, (meta,), None


def nvidia_pickle(net: nn.Module, **more) -> bytes:
    """What NVIDIA's training loop writes, with `net` for the averaged network."""
    modules = {"torch_utils.persistence": {}, "dnnlib.util": {"EasyDict": EasyDict}}
    modules["torch_utils.persistence"]["_reconstruct_persistent_obj"] = _reconstruct_persistent_obj
    fakes = {}
    for name, members in modules.items():
        fakes[name.split(".")[0]] = types.ModuleType(name.split(".")[0])
        fakes[name] = types.ModuleType(name)
        fakes[name].__dict__.update(members)
    with mock.patch.dict(sys.modules, fakes):
        return pickle.dumps({"ema": net, "dataset_kwargs": {"resolution": 64}, "loss_fn": None, **more})


def randomise(net: nn.Module, seed: int):
    """Draws all parameters at random, those that start at zero too; sizes keep the signal within bounds."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            scale = 0.2 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            # Gains of norms lie around 1.
            parameter.copy_(scale * values + (parameter.ndim == 1 and name.endswith("weight")))
    return net.eval()


# NVIDIA's names. Layers hold their own formulas, because the classes are torch's in name only.


class Linear(Persistent):
    def __init__(self, inputs: int, outputs: int, bias: bool = True):
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


class Conv2d(Persistent):
    """Resamples with the filter [1, 1] (if `up` or `down`), then convolves (if `kernel` is not 0)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, up: bool = False, down: bool = False):
        super().__init__()
        self.up, self.down = up, down
        self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel)) if kernel else None
        self.bias = nn.Parameter(torch.empty(outputs)) if kernel else None
        self.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25) if up or down else None)

    def forward(self, x):
        channels = x.shape[1]
        if self.up:
            x = conv_transpose2d(x, 4 * self.resample_filter.expand(channels, 1, 2, 2), stride=2, groups=channels)
        if self.down:
            x = conv2d(x, self.resample_filter.expand(channels, 1, 2, 2), stride=2, groups=channels)
        return x if self.weight is None else conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2)


class GroupNorm(Persistent):
    def __init__(self, channels: int):
        super().__init__()
        self.num_groups, self.eps = min(32, channels // 4), 1e-5
        self.weight, self.bias = nn.Parameter(torch.empty(channels)), nn.Parameter(torch.empty(channels))

    def forward(self, x):
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class PositionalEmbedding(Persistent):
    def __init__(self, channels: int):
        super().__init__()
        self.num_channels, self.max_positions, self.endpoint = channels, 10000, False

    def forward(self, noise):
        exponents = torch.arange(self.num_channels // 2, dtype=torch.float32) / (self.num_channels // 2)
        angles = noise[:, None] * ((1 / self.max_positions) ** exponents).to(noise.dtype)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class UNetBlock(Persistent):
    def __init__(self, inputs: int, outputs: int, embedding: int, attention=False, up=False, down=False):
        super().__init__()
        self.in_channels, self.out_channels, self.emb_channels = inputs, outputs, embedding
        self.num_heads = outputs // 64 if attention else 0
        self.dropout, self.skip_scale, self.adaptive_scale = 0.1, 1, True
        self.norm0, self.conv0 = GroupNorm(inputs), Conv2d(inputs, outputs, 3, up, down)
        self.affine = Linear(embedding, 2 * outputs)
        self.norm1, self.conv1 = GroupNorm(outputs), Conv2d(outputs, outputs, 3)
        self.skip = None
        if inputs != outputs or up or down:
            self.skip = Conv2d(inputs, outputs, 0 if inputs == outputs else 1, up, down)
        if attention:
            self.norm2, self.qkv = GroupNorm(outputs), Conv2d(outputs, 3 * outputs, 1)
            self.proj = Conv2d(outputs, outputs, 1)

    def forward(self, x, embedding):
        scale, shift = self.affine(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.norm1(self.conv0(silu(self.norm0(x)))) * (1 + scale) + shift
        x = self.conv1(silu(h)) + (x if self.skip is None else self.skip(x))
        if not self.num_heads:
            return x
        qkv = self.qkv(self.norm2(x)).reshape(len(x), self.num_heads, -1, 3, x.shape[2] * x.shape[3])
        return x + self.proj(attend(*qkv.unbind(3)).reshape(x.shape))


def attend(q, k, v):
    """Softmax attention on [B, heads, channels, positions], scaled by the root of the channels."""
    return scaled_dot_product_attention(q.mT, k.mT, v.mT).mT


class DhariwalUNet(Persistent):
    def __init__(self, side, images, labels, augment, channels, multipliers, embedding, blocks, attention):
        super().__init__()
        self.label_dropout = 0
        e = channels * embedding
        self.map_noise = PositionalEmbedding(channels)
        self.map_augment = Linear(augment, channels, bias=False) if augment else None
        self.map_layer0, self.map_layer1 = Linear(channels, e), Linear(e, e)
        self.map_label = Linear(labels, e, bias=False) if labels else None
        widths = [channels * m for m in multipliers]
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        x, skips = widths[0], [widths[0]]
        self.enc[f"{side}x{side}_conv"] = Conv2d(images, x, 3)
        for level, width in enumerate(widths):
            r = side >> level
            if level:
                self.enc[f"{r}x{r}_down"] = UNetBlock(x, x, e, down=True)
                skips.append(x)
            for i in range(blocks):
                self.enc[f"{r}x{r}_block{i}"] = UNetBlock(x, width, e, attention=r in attention)
                x = width
                skips.append(x)
        for level, width in reversed(list(enumerate(widths))):
            r = side >> level
            if level == len(widths) - 1:
                self.dec[f"{r}x{r}_in0"] = UNetBlock(x, x, e, attention=True)
                self.dec[f"{r}x{r}_in1"] = UNetBlock(x, x, e)
            else:
                self.dec[f"{r}x{r}_up"] = UNetBlock(x, x, e, up=True)
            for i in range(blocks + 1):
                self.dec[f"{r}x{r}_block{i}"] = UNetBlock(x + skips.pop(), width, e, attention=r in attention)
                x = width
        self.out_norm, self.out_conv = GroupNorm(x), Conv2d(x, images, 3)

    def forward(self, x, noise, labels):
        embedding = self.map_layer1(silu(self.map_layer0(self.map_noise(noise))))
        if self.map_label is not None:
            embedding = embedding + self.map_label(labels)
        embedding, skips = silu(embedding), []
        for block in self.enc.values():
            x = block(x, embedding) if isinstance(block, UNetBlock) else block(x)
            skips.append(x)
        for name, block in self.dec.items():
            x = block(torch.cat([x, skips.pop()], dim=1) if "block" in name else x, embedding)
        return self.out_conv(silu(self.out_norm(x)))


class EDMPrecond(Persistent):
    """arXiv 2206.00364, table 1."""

    def __init__(
        self,
        side=8,
        images=3,
        labels=5,
        augment=0,
        channels=128,
        multipliers=(1, 2),
        embedding=4,
        blocks=1,
        attention=(4,),
        sigma_data=0.5,
        seed=0,
    ):
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim, self.use_fp16 = side, images, labels, False
        self.sigma_min, self.sigma_max, self.sigma_data = 0, float("inf"), sigma_data
        self.model = DhariwalUNet(side, images, labels, augment, channels, multipliers, embedding, blocks, attention)
        randomise(self, seed)

    def forward(self, x, sigma, labels=None):
        """D(x; sigma); `labels` are rows [B, n] with a single 1, or nothing but 0 for "no class"."""
        sigma, data = sigma.reshape(-1, 1, 1, 1), self.sigma_data
        total = (sigma**2 + data**2).sqrt()
        output = self.model(x / total, sigma.flatten().log() / 4, labels)
        return data**2 / total**2 * x + sigma * data / total * output


# OpenAI's names


class ResBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, embedding: int, factor: float = 1.0):
        super().__init__()
        self.factor = factor
        self.in_layers = nn.Sequential(nn.GroupNorm(32, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * outputs))
        last = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.out_layers = nn.Sequential(nn.GroupNorm(32, outputs), nn.SiLU(), nn.Dropout(), last)
        self.skip_connection = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def resize(self, x):
        if self.factor == 0.5:
            return nn.functional.avg_pool2d(x, 2)
        return x if self.factor == 1 else interpolate(x, scale_factor=2, mode="nearest")

    def forward(self, x, embedding):
        h = self.in_layers[2](self.resize(self.in_layers[:2](x)))
        scale, shift = self.emb_layers(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        return self.skip_connection(self.resize(x)) + h


class AttentionBlock(nn.Module):
    """Rows of `qkv` are (q k v, head, channel)."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm, self.qkv = nn.GroupNorm(32, channels), nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x, embedding):
        q, k, v = self.qkv(self.norm(x)).reshape(len(x), 3, x.shape[1] // 64, 64, -1).unbind(1)
        return x + self.proj_out(attend(q, k, v).reshape(x.shape))


class OpenAINet(nn.Module):
    """F(x, 250 ln(sigma), class)."""

    def __init__(
        self, images=3, classes=5, channels=64, multipliers=(1, 2), blocks=1, attention=(False, True), seed=0
    ):
        super().__init__()
        e, widths = 4 * channels, [channels * m for m in multipliers]
        self.channels = channels
        self.time_embed = nn.Sequential(nn.Linear(channels, e), nn.SiLU(), nn.Linear(e, e))
        if classes:
            self.label_emb = nn.Embedding(classes, e)
        x, skips = widths[0], [widths[0]]
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(images, x, 3, padding=1)])])
        self.output_blocks = nn.ModuleList()
        for width, attends in zip(widths, attention):
            if len(skips) > 1:
                self.input_blocks.append(nn.ModuleList([ResBlock(x, x, e, 0.5)]))
                skips.append(x)
            for _ in range(blocks):
                self.input_blocks.append(nn.ModuleList([ResBlock(x, width, e), *[AttentionBlock(width)] * attends]))
                x = width
                skips.append(x)
        self.middle_block = nn.ModuleList([ResBlock(x, x, e), AttentionBlock(x), ResBlock(x, x, e)])
        for level in reversed(range(len(widths))):
            for i in range(blocks + 1):
                layers = [ResBlock(x + skips.pop(), widths[level], e)]
                x = widths[level]
                layers += [AttentionBlock(x)] * attention[level]
                layers += [ResBlock(x, x, e, 2.0)] * (level > 0 and i == blocks)
                self.output_blocks.append(nn.ModuleList(layers))
        self.out = nn.Sequential(nn.GroupNorm(32, x), nn.SiLU(), nn.Conv2d(x, images, 3, padding=1))
        randomise(self, seed)

    def forward(self, x, time, labels=None):
        frequencies = torch.exp(-math.log(10000) * torch.arange(self.channels // 2) / (self.channels // 2))
        angles = time[:, None].float() * frequencies
        embedding = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1).to(x.dtype))
        if labels is not None:
            embedding = embedding + self.label_emb(labels)
        skips = [x := self.input_blocks[0][0](x)]
        for block in self.input_blocks[1:]:
            for layer in block:
                x = layer(x, embedding)
            skips.append(x)
        for layer in self.middle_block:
            x = layer(x, embedding)
        for block in self.output_blocks:
            x = torch.cat([x, skips.pop()], dim=1)
            for layer in block:
                x = layer(x, embedding)
        return self.out(x)


def openai_state_dict(net: OpenAINet) -> OrderedDict:
    """What OpenAI saves with `torch.save`: all tensors are views of one storage, as it is after training in fp16."""
    state = net.state_dict()
    flat = torch.cat([value.flatten() for value in state.values()])
    pieces = flat.split([value.numel() for value in state.values()])
    return OrderedDict((name, piece.view_as(state[name])) for name, piece in zip(state, pieces))
