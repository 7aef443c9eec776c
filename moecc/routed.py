"""The experts of one layer as a calibration runs them: expert by expert, and observed.

transformers looks its experts function up by name on every call (its `ExpertsInterface`); `install`
registers ours, which is the family's own computation with the weights of one expert after the other
in float32. Nothing is hooked but the experts: routers and the order of operations are the model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moecc.architecture import ExpertLayer
from moecc.measured import weights

NAME = "moecc-calibration"
ATTRIBUTE = "moecc_routed"


class Observer(Protocol):
    """Sees what goes through each expert of a layer, in a forward pass or with gradients."""

    def routed(self, layer: int, expert: int, tokens: Tensor, seen: Seen) -> None:
        """`tokens`, int64 [n], are places in the flattened micro-batch."""

    def tokens(self, layer: int, hidden: Tensor, index: Tensor, gates: Tensor) -> None:
        """All tokens of a micro-batch: float32 [T, H], int64 [T, k] (-1: none), float32 [T, k]."""


class Seen:
    """One expert on the n tokens that are routed to it.

    Attributes:
        gate: float32 [n], the routing weights.
        inputs: projection -> float32 [n, in].
        products: projection -> float32 [n, out] with the bias; part of the graph, if there is one.
        output: float32 [n, H], before it is weighted.
    """

    def __init__(self, gate: Tensor) -> None:
        self.gate = gate
        self.inputs: dict[str, Tensor] = {}
        self.products: dict[str, Tensor] = {}
        self.output = gate


class Routed:
    """What a module of experts computes with.

    Attributes:
        values: projection -> `[experts, out, in]` (a bias `[experts, out]`) in the source's dtype;
            empty while the layer is not loaded.
    """

    def __init__(self, number: int, layer: ExpertLayer, module: Any, canonical: Tensor) -> None:
        """`canonical`, int64 [E], is the expert that stands for each of the router's."""
        self._canonical = canonical
        self.number, self.layer, self.module = number, layer, module
        self.names = _order(layer)
        self.values: dict[str, Tensor] = {}
        self.observer: Observer | None = None
        if isinstance(module, nn.ModuleDict):  # Switch Transformers
            self._activation: Any = next(iter(module.values())).act
            module.forward = partial(_switch_experts, self)
        else:
            self._activation = module._apply_gate if module.has_gate else module.act_fn
            setattr(module, ATTRIBUTE, self)

    def weights(self, expert: int) -> dict[str, Tensor]:
        """Float32 weights of one expert."""
        return {name: values[expert].float() for name, values in self.values.items()}

    def apply(self, x: Tensor, values: Mapping[str, Tensor], seen: Seen) -> Tensor:
        """The expert with weights `values` on float32 [n, H]; fills in `seen`."""
        for name in self.names:
            seen.inputs[name] = x.detach()
            x = F.linear(x, values[name], values.get(f"{name}_bias"))
            if torch.is_grad_enabled() and not x.requires_grad:
                x.requires_grad_()  # the first layer of experts has nothing before it to learn
            seen.products[name] = x
            if name == self.names[0]:
                x = self._activation(x)
        if getattr(self.module, "has_post_expert_norm", False):
            x = self.module.post_expert_norm(x)
        seen.output = x.detach()
        return x

    def run(self, hidden: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        """What all experts add, float32 [T, H], from [T, H], int64 [T, k] (-1: none) and [T, k].

        Deterministic on any device: every (token, choice) has a row of its own to be summed from.
        """
        assert self.observer is not None
        known = (index >= 0) & (index < self.layer.num_experts)
        own = index.clamp(0, self.layer.num_experts - 1)
        index = torch.where(known, self._canonical[own], -1)
        self.observer.tokens(self.number, hidden.detach(), index, gates.detach())
        choices, flat, flat_gates = index.shape[1], index.reshape(-1), gates.reshape(-1)
        parts, rows = [], []
        for expert in range(self.layer.num_experts):
            chosen = (flat == expert).nonzero().squeeze(-1)
            if not len(chosen):
                continue
            tokens, gate = chosen // choices, flat_gates[chosen]
            seen = Seen(gate.detach())
            out = self.apply(hidden[tokens], self.weights(expert), seen)
            self.observer.routed(self.number, expert, tokens, seen)
            parts.append(out * gate[:, None])
            rows.append(chosen)
        if not parts:
            return torch.zeros_like(hidden)
        added = hidden.new_zeros(len(flat), hidden.shape[1])
        added = added.index_copy(0, torch.cat(rows), torch.cat(parts))
        return added.view(*index.shape, -1).sum(dim=1)


def _order(layer: ExpertLayer) -> tuple[str, str]:
    """The weight projections in the order in which an expert applies them."""
    last = {"down_proj", "wo"}
    first, second = sorted((p.name for p in weights(layer)), key=lambda name: name in last)
    return first, second


def install() -> None:
    """Makes our function known to transformers, for this process; harmless twice."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, _experts)


def _experts(module: Any, hidden: Tensor, index: Tensor, gates: Tensor) -> Tensor:
    routed: Routed = getattr(module, ATTRIBUTE)
    return routed.run(hidden, index, gates.to(hidden.dtype))


def _switch_experts(routed: Routed, hidden: Tensor, selected: Tensor, gates: Tensor) -> Tensor:
    """`selected` is one-hot, [T, 1, E]; zero for a token beyond its expert's capacity."""
    chosen = selected.view(-1, selected.shape[-1])
    index = torch.where(chosen.any(dim=-1), chosen.argmax(dim=-1), -1)
    return routed.run(hidden, index[:, None], gates.view(-1, 1))
