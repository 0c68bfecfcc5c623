# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""What a stage will need, before anything is loaded: memory, disk, time. Its own turns run, on tensors without data."""

import weakref

import torch
from diffusers import ModelMixin
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .adapters import trainable_parameters
from .denoiser import sample_shape
from .draws import Draws
from .flops import FlopCounter
from .stages import Turn
from .training_config import TrainingConfig


# Of tensors that claim to be on the CPU, with shape and dtype and without data; they mix with real ones.
_FAKE = FakeTensorMode(allow_non_fake_inputs=True)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, storages once, while it is active.

    Args:
        known: tensors that exist already and are counted elsewhere.

    Attributes:
        now: bytes alive at this moment.
        peak: the most that were.
    """

    def __init__(self, known=()):
        super().__init__()
        self.now = self.peak = 0
        self.known = {id(tensor.untyped_storage()) for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage):
        # Views and in-place results have the storage of their source. Its Python object lives as long as itself.
        if id(storage) not in self.known:
            self.known.add(id(storage))
            weakref.finalize(storage, self._freed, id(storage), storage.nbytes())
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def _freed(self, key: int, size: int):
        self.known.discard(key)
        self.now -= size


def without_data(model: ModelMixin) -> ModelMixin:
    """Turns a network on the meta device into one that can be run, of tensors that still take no memory.

    Networks on the meta device themselves cannot: autocast does not know it, and noise levels are real numbers.

    Args:
        model: made inside `with torch.device("meta"):`, for example by `from_config` or `create_student`, in the dtype
            it will have; or one of those with an adapter made there (`lora_network`). It is changed in place.

    Raises:
        ValueError: the model is on another device.
    """
    if not any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(f"model: got a {type(model).__name__} on {model.device}; one on the meta device is needed")
    for module in model.modules():
        if not any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            continue
        with _FAKE:
            module.to_empty(device="cpu", recurse=False)
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            module.register_forward_pre_hook(float32_under_autocast)
    return model


def float32_under_autocast(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """A hook for norms: under autocast a GPU computes them in float32 and keeps that for the backward pass, a CPU not."""
    return tuple(x.float() for x in args) if torch.is_autocast_enabled("cpu") else args


def estimate_memory(turns: list[Turn], config: TrainingConfig, cond: torch.Tensor) -> dict:
    """What the trainer will hold on one GPU for a stage, in bytes, found without memory for a single weight.

        peak = weights + optimizer states + EMA + max over the turns of max(pass, update)

    * weights: of each network in its own dtype, of an adapter's network the adapter alone; optimizer: two moments like
      each trained parameter, 8 bytes in float32 (8-bit: 2 bytes); EMA: a copy of what is trained of the first turn's
      first network.
    * pass: the most that is alive beside these during a turn. The turn's own forward and backward run, without data,
      and every storage is counted from its creation to its end. So it holds whatever the method, checkpointing and
      autocast keep: activations saved for the backward pass, what passes without gradient need meanwhile, casts of
      weights, growing gradients.
    * update: the gradients, and where the average follows, the difference it is moved by.

    Of the passes the largest is the student's in DM (twice the batch through the student because of the pairs, with
    teacher and fake score on top), and the critic's in ADM (denoising on one batch, the encoder on two more). At small
    batches the student's update is larger still: gradient and difference are as large as the network.

    Not counted: what CUDA itself takes (about half a GB), its allocator's gaps, scratch memory of kernels, DDP's copy of
    the gradients, validation. Attention counts as a fused kernel, which keeps no attention matrix. Autocast counts as
    CUDA's.

    Args:
        turns: from `build_stage`, of networks from `without_data`; conditions are real tensors on the CPU.
        config: of the training; its batch size is that of one device.
        cond: conditions [n, ...] as the networks take them, on the CPU; only shape and dtype matter.

    Returns:
        {"batch_size", "parameters": {network: count}, "weights": {network: bytes}, "optimizer": {turn: bytes},
        "ema": bytes, "resident": their sum, "turns": {turn: {"gradients", "activations" (alive between forward and
        backward), "pass", "update", "flops" of an update}}, "flops": of an iteration on average (multiplications and
        additions of matrix products, convolutions and attention), "peak": bytes, "trained": {turn: its networks}}.

    Raises:
        ValueError: a network of `turns` has data.
    """
    networks = {name: network for turn in turns for name, network in {**turn.frozen, **turn.models()}.items()}
    if "discriminator" in networks:
        # `build_stage` made it, with weights.
        with _FAKE:
            networks["discriminator"].to_empty(device="cpu")
    for name, network in networks.items():
        if not all(isinstance(parameter, FakeTensor) for parameter in network.parameters()):
            raise ValueError(f"turns: the {name} has weights; a network from memory.without_data expected")
    for turn in turns:
        for model in turn.models().values():
            if config.gradient_checkpointing and model._supports_gradient_checkpointing:
                model.enable_gradient_checkpointing()
    own = _own_parameters(networks)
    trained = {
        turn.name: [p for model in turn.models().values() for p in trainable_parameters(model)] for turn in turns
    }
    result = {
        "batch_size": config.train_batch_size,
        "parameters": {name: sum(p.numel() for p in parameters) for name, parameters in own.items()},
        "weights": {name: _bytes(parameters) for name, parameters in own.items()},
        "trained": {turn.name: list(turn.models()) for turn in turns},
        "optimizer": {
            name: 2 * (sum(p.numel() for p in parameters) if config.use_8bit_adam else _bytes(parameters))
            for name, parameters in trained.items()
        },
        "ema": _bytes(trainable_parameters(next(iter(turns[0].models().values())))) if config.ema_decay > 0 else 0,
    }
    result["resident"] = sum(result["weights"].values()) + sum(result["optimizer"].values()) + result["ema"]
    known = [tensor for network in networks.values() for tensor in [*network.parameters(), *network.buffers()]]
    result["turns"] = {
        turn.name: {
            **_run(turn, config, cond, known),
            **dict.fromkeys(("gradients", "update"), _bytes(trained[turn.name])),
        }
        for turn in turns
    }
    # The average moves by a difference as large as itself.
    result["turns"][turns[0].name]["update"] += result["ema"]
    result["flops"] = sum(result["turns"][turn.name]["flops"] / turn.interval for turn in turns)
    result["peak"] = result["resident"] + max(max(t["pass"], t["update"]) for t in result["turns"].values())
    return result


def _run(turn: Turn, config: TrainingConfig, cond: torch.Tensor, known: list[torch.Tensor]) -> dict[str, int]:
    """Runs a turn on fake tensors; bytes of its phases, and its arithmetic."""
    turn.claim()
    # With accumulation the gradients of one pass are there during the next.
    passes = min(2, config.gradient_accumulation_steps)
    with LiveBytes(known) as live, FlopCounter() as counter:
        for _ in range(passes):
            loss = _loss(turn, config.train_batch_size, cond)
            activations = live.now
            loss.backward()
            del loss
    turn.zero_grad(set_to_none=True)
    return {
        "activations": activations,
        "pass": live.peak,
        "flops": counter.flops // passes * config.gradient_accumulation_steps,
    }


def _loss(turn: Turn, size: int, cond: torch.Tensor) -> torch.Tensor:
    shape = sample_shape(next(iter(turn.models().values())))
    data = {"images": torch.zeros(size, *shape), "noise": torch.zeros(size, *shape)}
    data["cond"] = cond[:1].expand(size, *cond.shape[1:]).clone()
    return turn(dict.fromkeys(turn.needs, data), Draws((0,), size, slice(None)))["loss"].mean()


def _own_parameters(networks: dict[str, nn.Module]) -> dict[str, list[nn.Parameter]]:
    # An adapter's network shares the rest with its base, which is counted there.
    seen: set[int] = set()
    own = {}
    for name, network in networks.items():
        own[name] = [p for p in network.parameters() if id(p) not in seen]
        seen |= {id(p) for p in own[name]}
    return own


def _bytes(parameters: list[nn.Parameter]) -> int:
    return sum(parameter.nbytes for parameter in parameters)


def cache_bytes(sample_shape: tuple[int, ...], cond: torch.Tensor, num_samples: int) -> dict[str, int]:
    """Disk for the cached latents and embeddings of a text-conditional run, float16, in bytes.

    Args:
        sample_shape: of a latent, (C, H, W).
        cond: prompt embeddings [n, L, D]; only the shape matters.
        num_samples: captioned images.
    """
    channels, height, width = sample_shape
    length, depth = cond.shape[1:]
    latent = channels * height * width
    # Beside all tokens, the two pooled vectors that routing may go by.
    return {"latents": 2 * latent * num_samples, "embeddings": 2 * (length + 2) * depth * num_samples}


def format_estimate(estimate: dict, max_train_steps: int | None = None, tflops: float | None = None) -> str:
    """`estimate_memory` as a table; given iterations and the TFLOP/s of a device, also the hours.

    In GB of 10^9 bytes, or, where the peak is below one, in MB of 10^6.
    """
    unit, scale = ("GB", 1e9) if estimate["peak"] >= 1e9 else ("MB", 1e6)

    def show(size: int) -> str:
        return f"{size / scale:>10.2f} {unit}"

    trainer = {network: turn for turn, networks in estimate["trained"].items() for network in networks}
    lines = [f"{'network':<32}{'parameters':>12}{'weights':>13}"]
    for name, count in estimate["parameters"].items():
        role = f"{name}, trained by the {trainer[name]}" if name in trainer else f"{name}, frozen"
        lines.append(f"{role:<32}{count / 1e6:>10.1f} M{show(estimate['weights'][name])}")
    sums = {f"optimizer of the {name}": size for name, size in estimate["optimizer"].items()}
    sums |= {"averaged weights (EMA)": estimate["ema"], "always there": estimate["resident"]}
    lines += [f"{name:<44}{show(size)}" for name, size in sums.items()]
    columns = ("activations", "gradients", "pass", "update")
    head = f"on top, batch {estimate['batch_size']}"
    lines += ["", f"{head:<18}" + "".join(f"{column:>13}" for column in columns)]
    for name, turn in estimate["turns"].items():
        lines.append(f"{name:<18}" + "".join(show(turn[column]) for column in columns))
    lines += ["", f"{'peak, without what CUDA itself takes':<44}{show(estimate['peak'])}"]
    if max_train_steps is not None and tflops is not None:
        work = estimate["flops"] / 1e12
        hours = max_train_steps * work / tflops / 3600
        lines.append(
            f"{max_train_steps:,} iterations of {work:.4g} TFLOP on average, at {tflops:g} TFLOP/s: {hours:.3g} hours"
        )
    return "\n".join(lines)
