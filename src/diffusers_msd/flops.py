# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Arithmetic and passes of networks, counted while they run. Counting changes no number of theirs."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


aten = torch.ops.aten
# torch counts the arithmetic of every attention kernel but the one that CPUs have.
_FLOPS = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}


class FlopCounter(TorchDispatchMode):
    """Counts arithmetic while it is active, forward and backward, as `FlopCounterMode` does, and attention on a CPU too.

    Attributes:
        flops: multiplications and additions of matrix products, convolutions and attention. What goes over single
            elements (norms, activations, losses, optimizers) is not among them.
    """

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in _FLOPS:
            self.flops += _FLOPS[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


@dataclass
class _Pass:
    """A batch on its way through a network."""

    role: str
    samples: int
    whole: bool = False
    backward: bool = False


class PassCounter:
    """Counts the samples that go through networks while it is active. Its hooks are gone afterwards.

    Args:
        networks: by role; each is called with the batch as its first argument.
    """

    def __init__(self, networks: dict[str, nn.Module]):
        self.networks = networks
        self._passes: list[_Pass] = []
        self._open: dict[str, _Pass] = {}

    def __enter__(self):
        self._handles = []
        for role, network in self.networks.items():
            self._handles += [
                network.register_forward_pre_hook(partial(self._begin, role)),
                # Always: a pass that stops at the features leaves by an exception, and has no output.
                network.register_forward_hook(partial(self._end, role), always_call=True),
            ]
            layers = [module for module in network.modules() if not list(module.children())]
            self._handles += [layer.register_forward_hook(partial(self._watch, role)) for layer in layers]
        return self

    def __exit__(self, *exception):
        for handle in self._handles:
            handle.remove()

    def _begin(self, role: str, network: nn.Module, args: tuple):
        self._open[role] = _Pass(role, len(args[0]))
        self._passes.append(self._open[role])

    def _end(self, role: str, network: nn.Module, args: tuple, output):
        # Layers that gradient checkpointing runs again, later, belong to no pass.
        self._open.pop(role).whole = output is not None

    def _watch(self, role: str, layer: nn.Module, args: tuple, output):
        if role in self._open and isinstance(output, torch.Tensor) and output.requires_grad:
            output.register_hook(partial(self._reached, self._open[role]))

    @staticmethod
    def _reached(entry: _Pass, gradient: torch.Tensor):
        entry.backward = True

    def passes(self) -> dict[str, dict[str, int]]:
        """{role: {way: samples}}; ways are "forward" and "backward" of the whole network, and "encoder_forward" and
        "encoder_backward" of passes that stop at the features. What did not happen is left out."""
        counts: dict[str, Counter] = {}
        for entry in self._passes:
            prefix = "" if entry.whole else "encoder_"
            ways = [f"{prefix}forward"] + [f"{prefix}backward"] * entry.backward
            counts.setdefault(entry.role, Counter()).update(dict.fromkeys(ways, entry.samples))
        return {role: dict(counter) for role, counter in counts.items()}


@contextmanager
def count_work(networks: dict[str, nn.Module]) -> Iterator[dict]:
    """Counts what is done inside the block, in this process.

    Args:
        networks: by role, as for `PassCounter`.

    Yields:
        A dict that holds, after the block, "flops" (of everything, not of `networks` alone) and "passes".
    """
    work = {}
    with PassCounter(networks) as passes, FlopCounter() as flops:
        yield work
    work.update(flops=flops.flops, passes=passes.passes())
