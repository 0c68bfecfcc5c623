# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Students that are LoRA adapters (arXiv 2106.09685) on the teacher: many networks, one set of large weights."""

import copy
import hashlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Optional

import torch
from diffusers import ModelMixin
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn

from .saved_component import SavedComponent


# Everything inside the blocks: attention, feed-forward, residual convolutions, and what they hear of the time.
TARGET_MODULES = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("time_emb_proj", "conv_shortcut", "conv1", "conv2", "downsamplers.0.conv", "upsamplers.0.conv"),
)
# Adapters of 3x3 convolutions cost about five times those of a linear layer, so their rank stops here by default.
CONV_RANK = 8
# What of a `LoraConfig` is saved.
_LORA_FIELDS = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern")


@dataclass
class AdapterConfig:
    """LoRA in place of full networks; full ones by default."""

    student_type: str = field(
        default="full",
        metadata={"help": "full, or lora: adapters on the teacher, which is then in memory and on disk once."}
        | {"choices": ["full", "lora"]},
    )
    fake_score_type: str = field(
        default="full",
        metadata={"help": "full, or lora: the fake score is an adapter on the teacher too."}
        | {"choices": ["full", "lora"]},
    )
    rank: int = field(default=64, metadata={"help": "Rank of the adapters."})
    conv_rank: Optional[int] = field(
        default=None,
        metadata={"help": "Rank in convolutions with a kernel larger than 1; default: the smaller of rank and 8."},
    )
    lora_alpha: Optional[float] = field(
        default=None, metadata={"help": "An adapter is scaled by lora_alpha / rank; default: the rank, so by 1."}
    )
    lora_target_modules: Optional[list[str]] = field(
        default=None,
        metadata={"help": "Ends of the names of the layers that get adapters; default: all inside the blocks."},
    )

    def lora(self, model):
        """`lora_config` with these settings."""
        return lora_config(model, self.rank, self.lora_alpha, self.conv_rank, self.lora_target_modules)


# Which adapter each row of the batch gets, in the calls of this thread.
_ROWS: ContextVar[list[str] | None] = ContextVar("adapter_of_each_row", default=None)


def lora_config(model, rank, alpha=None, conv_rank=None, target_modules=None):
    """Describes an adapter: W + (alpha / rank) B A in the layers it goes to.

    Args:
        model (`ModelMixin`): The network it is for.
        rank (`int`): Of A and B, at least 1.
        alpha (`float`, *optional*): Scale; `rank`, so that the factor is 1, if None.
        conv_rank (`int`, *optional*): Rank in convolutions with a kernel larger than 1 (same factor as elsewhere);
            the smaller of `rank` and 8 if None.
        target_modules (sequence of `str`, *optional*): Ends of the names of linear and convolutional layers, such as
            "to_q"; those of `TARGET_MODULES` that the model has if None.

    Returns:
        `peft.LoraConfig`

    Raises:
        TypeError: A rank is no integer.
        ValueError: A rank or `alpha` is not positive, or no layer of the model has a given name.
    """
    for name, value in (("rank", rank), ("conv_rank", 1 if conv_rank is None else conv_rank)):
        if type(value) is not int:
            raise TypeError(f"{name}: got {value!r}; an int >= 1 is needed.")
        if value < 1:
            raise ValueError(f"{name}: got {value}; an int >= 1 is needed.")
    conv_rank = min(rank, CONV_RANK) if conv_rank is None else conv_rank
    alpha = rank if alpha is None else alpha
    if not alpha > 0:
        raise ValueError(f"lora_alpha: got {alpha}; a number > 0 is needed.")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    found = {
        target: [layer for name, layer in layers.items() if f".{name}".endswith(f".{target}")]
        for target in target_modules or TARGET_MODULES
    }
    missing = [target for target, matches in found.items() if not matches]
    if target_modules and missing:
        raise ValueError(
            f"lora_target_modules: no linear or convolutional layer of the {type(model).__name__} is named "
            f"{missing[0]!r}; ends of names such as {', '.join(TARGET_MODULES[:4])} are allowed."
        )
    targets = [target for target in found if target not in missing]
    wide = [t for t in targets if any(isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1) for m in found[t])]
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=targets,
        rank_pattern={} if conv_rank == rank else dict.fromkeys(wide, conv_rank),
        alpha_pattern={} if conv_rank == rank else dict.fromkeys(wide, alpha * conv_rank / rank),
    )


def lora_network(base, config, seed=0):
    """A network of its own that is `base` plus a new adapter, and takes the memory of the adapter alone.

    Its modules are new, its other parameters are those of `base`, the same objects. B is zero, so it computes what
    `base` does until it is trained.

    Args:
        base (`ModelMixin`): The network; it stays as it is, apart from `requires_grad`, which becomes False.
        config (`LoraConfig`): From `lora_config`.
        seed (`int`): Of A; torch's global generators are left alone.

    Returns:
        `ModelMixin`: In training mode, with float32 adapter weights on the device of `base`.
    """
    network = twin(base.requires_grad_(False))
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        inject_adapter_in_model(copy.deepcopy(config), network)
    for parameter in adapter_parameters(network):
        # PEFT gives an adapter the dtype of its base, which may be stored in half precision.
        parameter.data = parameter.data.float()
    return network.train()


def twin(model):
    """A copy of the modules of `model` around the same parameters and buffers."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def lora_layers(model):
    """The layers of a network that have adapters, {name: layer}; empty for an ordinary network."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def adapter_parameters(model):
    """The parameters of all adapters of a network, a list; empty for an ordinary network."""
    return [
        parameter
        for layer in lora_layers(model).values()
        for matrices in (layer.lora_A, layer.lora_B)
        for parameter in matrices.parameters()
    ]


def trainable_parameters(model):
    """What training changes: the adapters of a network that has some, else all its parameters."""
    return adapter_parameters(model) or list(model.parameters())


def base_fingerprint(model):
    """Tells networks apart whatever precision they are loaded in: SHA-256 over the signs of all their weights.

    A cast keeps the sign of a weight, also of one that becomes zero, while training flips some among so many.
    Adapters do not count.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(_base_tensors(model).items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(torch.signbit(tensor.detach()).cpu().numpy().tobytes())
    return digest.hexdigest()


def base_of(network):
    """A network without adapters or hooks around the same weights, to be saved or copied."""
    with torch.device("meta"):
        base = type(network).from_config(network.config)
    base.load_state_dict(_base_tensors(network), assign=True)
    return base.eval()


def _base_tensors(network):
    # The tensors of the state dict by the names they had before PEFT wrapped their layers.
    tensors = network.state_dict(keep_vars=True)
    return {
        k.replace(".base_layer.", "."): t for k, t in tensors.items() if ".lora_A." not in k and ".lora_B." not in k
    }


class LoraStudent(SavedComponent):
    """An adapter by itself: a component of a pipeline, saved in the form that stock diffusers and PEFT load.

    `StableDiffusionPipeline.load_lora_weights(folder, weight_name="diffusion_pytorch_model.safetensors")` takes it, as
    does `unet.load_lora_adapter(folder, prefix="unet", weight_name=...)`. The scale is kept in the file's header.

    Args:
        base_fingerprint (`str`): Of the network it belongs to.
        lora (`dict`): `r`, `lora_alpha`, `target_modules`, `rank_pattern` and `alpha_pattern` of a `LoraConfig`.
        weights (`dict[str, torch.Tensor]`): "<layer>.lora_A.weight" [rank, ...] and "<layer>.lora_B.weight".
    """

    def __init__(self, base_fingerprint, lora, weights):
        self.weights = weights
        self.register_to_config(base_fingerprint=base_fingerprint, lora=lora)

    @classmethod
    def of(cls, network, adapter_name="default"):
        """The adapter of a network that has one, such as `lora_network` makes."""
        config = network.peft_config[adapter_name]
        lora = {name: getattr(config, name) for name in _LORA_FIELDS}
        lora["target_modules"] = sorted(lora["target_modules"])
        weights = {name: tensor.detach().cpu().clone() for name, tensor in _weights(network, adapter_name).items()}
        return cls(base_fingerprint(network), lora, weights)

    def num_parameters(self):
        """`int`: Numbers in A and B of all layers."""
        return sum(tensor.numel() for tensor in self.weights.values())

    def tensors(self):
        # The prefix is the component's name in a stock pipeline.
        return {f"unet.{name}": tensor for name, tensor in self.weights.items()}

    def metadata(self):
        lora = {f"unet.{name}": value for name, value in self.config.lora.items()}
        return {LORA_ADAPTER_METADATA_KEY: json.dumps(lora, sort_keys=True)}

    @classmethod
    def from_saved(cls, config, load):
        return cls.from_config(config, weights={name.removeprefix("unet."): t for name, t in load().items()})

    def load_into(self, network, adapter_name="default"):
        """Copies the weights into an adapter that the network has.

        Raises:
            ValueError: The layers or shapes are others.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in _weights(network, adapter_name).items()}
        if shapes != {name: tuple(tensor.shape) for name, tensor in self.weights.items()}:
            raise ValueError(
                f"weights: the adapter has {len(self.weights)} tensors of rank {self.config.lora['r']}, the network "
                f"asks for {len(shapes)} of rank {network.peft_config[adapter_name].r} or other layers."
            )
        set_peft_model_state_dict(network, self.weights, adapter_name)

    def fuse(self, base):
        """The ordinary network that computes what `base` with this adapter does: W + (alpha / rank) B A.

        Returns:
            `ModelMixin`: A copy, of the dtype of `base`; the sum is rounded to it once.
        """
        network = copy.deepcopy(base_of(base))
        attach(network, {"fused": self})
        layers = lora_layers(network)
        for name, layer in layers.items():
            layer.merge(adapter_names=["fused"])
            network.set_submodule(name, layer.base_layer)
        del network.peft_config
        return network


def _is_attached(student, network, name):
    own = _weights(network, name)
    return own.keys() == student.weights.keys() and all(
        torch.equal(tensor.to(own[key]), own[key]) for key, tensor in student.weights.items()
    )


def _weights(network, adapter_name):
    # Of the layers alone: for embeddings PEFT would look for a config on the Hub.
    return get_peft_model_state_dict(network, adapter_name=adapter_name, save_embedding_layers=False)


def attach(network, students, replace=False):
    """Adds adapters to a network. They act on the rows that `adapter_of_each_row` says, a call outside is the base.

    Args:
        network (`ModelMixin`): The base; changed in place. Adapters get its dtype and device.
        students (`dict[str, LoraStudent]`): By the name they shall have. One that is there already stays.
        replace (`bool`): Whether another adapter of a name makes room.

    Raises:
        ValueError: The network is not the one they were trained on, or has another adapter of a name.
    """
    own_fingerprint = base_fingerprint(network)
    for name, student in students.items():
        if student.config.base_fingerprint != own_fingerprint:
            raise ValueError(
                f"{name}: this adapter was trained on a network with other weights (fingerprint "
                f"{student.config.base_fingerprint[:12]}, here it is {own_fingerprint[:12]})."
            )
        if name in adapter_names(network):
            if _is_attached(student, network, name):
                continue
            if not replace:
                raise ValueError(f"{name}: this is already the name of another adapter of the network.")
            for layer in lora_layers(network).values():
                layer.delete_adapter(name)
            del network.peft_config[name]
        with warnings.catch_warnings():
            # About a second adapter, which is what we want.
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            inject_adapter_in_model(LoraConfig(**student.config.lora), network, name)
        student.load_into(network, name)
    for layer in lora_layers(network).values():
        layer.set_adapter([], inference_mode=True)
        if _pass_rows not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(_pass_rows, with_kwargs=True)


def adapter_names(network):
    """The names of a network's adapters, a set."""
    return {name for layer in lora_layers(network).values() for name in layer.lora_A}


@contextmanager
def adapter_of_each_row(network: ModelMixin, names: list[str]) -> Iterator[None]:
    """Inside the block, row i of a batch that goes through `network` gets adapter `names[i]`, all in one forward.

    Other threads are not concerned.

    Raises:
        ValueError: A name that the network does not have. (PEFT would silently run the base for it.)
    """
    unknown = sorted(set(names) - adapter_names(network))
    if unknown:
        raise ValueError(
            f"names: {unknown[0]!r} is no adapter of this network, it has {sorted(adapter_names(network))}"
        )
    token = _ROWS.set(names)
    try:
        yield
    finally:
        _ROWS.reset(token)


def _pass_rows(layer, args, kwargs):
    names = _ROWS.get()
    return None if names is None else (args, {**kwargs, "adapter_names": names})
