"""The experts of one layer, served from the bank: packed slots are decoded where they are used.

transformers looks its experts function up by name on every call (its `ExpertsInterface`); `install`
registers ours. The router gives logical experts; a per-variant remap turns them into *physical*
ones, each a combination of slots, and every physical expert is applied once to all its tokens, of
whatever variant. A LayerExperts does it in plain torch, a KernelExperts by kernels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moecc.bank import CENTER_POOL, CENTER_SLOT, NONE, RESIDUAL_POOL, RESIDUAL_SLOT
from moecc.coding import Coded, Coding, decode
from moecc.kernels import experts as kernels
from moecc.kernels.experts import Projection, Term
from moecc.kernels.norm import Norm
from moecc.kernels.packed import arranged
from moecc.lowrank import LowRank, expand
from moecc.merge import add_residual
from moecc.runtime import step
from moecc.runtime.linear import linear

NAME = "moecc"
_LAST = ("down_proj", "wo")
REMAP = "moecc_remap"  # name of the module's buffer: logical -> physical expert
# Weights decoded at once: large ones go one by one, small ones share the cost of each call.
DECODED_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class SlotPool:
    """The slots of a pool on the device: planes and scales, or one tensor of plain weights.

    Plain: `[slots, out, in]` (a bias `[slots, out]`). Packed: planes `[slots, out, bytes]` and
    scales `[slots, out, groups]`, as docs/format.md has them. Low rank: left `[slots, out, rank]`
    and right `[slots, rank, in]`.
    """

    tensors: tuple[Tensor, ...]
    coding: Coding | LowRank | None

    def values(self, slots: Sequence[int], matrix: tuple[int, int]) -> list[Tensor]:
        """The matrices of some slots: float32 where packed, else as they are stored."""
        if self.coding is None:
            return [self.tensors[0][slot] for slot in slots]
        index = torch.tensor(slots, device=self.tensors[0].device)
        if isinstance(self.coding, LowRank):
            return list(expand(*(t[index] for t in self.tensors)).unbind())
        *planes, scales = (t[index].flatten(0, 1) for t in self.tensors)
        rows = decode(Coded(tuple(planes), scales), self.coding, matrix[1])
        return list(rows.view(len(slots), *matrix).unbind())


@dataclass(frozen=True, slots=True, eq=False)
class ProjectionSlots:
    """One projection: its `[out, in]`, its pools, and per physical expert a row of the remap."""

    matrix: tuple[int, int]
    pools: tuple[SlotPool, ...]
    physical: Sequence[Sequence[int]]

    def weights(self, experts: Sequence[int], dtype: torch.dtype) -> Iterator[Tensor]:
        """The weights of some physical experts, a few decoded at a time."""
        at_once = max(1, DECODED_AT_ONCE // (self.matrix[0] * self.matrix[1]))
        for first in range(0, len(experts), at_once):
            entries = [self.physical[e] for e in experts[first : first + at_once]]
            centers = self._values({(e[CENTER_POOL], e[CENTER_SLOT]) for e in entries})
            residuals = self._values(
                {(e[RESIDUAL_POOL], e[RESIDUAL_SLOT]) for e in entries if e[RESIDUAL_POOL] != NONE}
            )
            for entry in entries:
                center = centers[entry[CENTER_POOL], entry[CENTER_SLOT]]
                if entry[RESIDUAL_POOL] != NONE:
                    residual = residuals[entry[RESIDUAL_POOL], entry[RESIDUAL_SLOT]]
                    yield add_residual(center.float(), residual).to(dtype)
                elif self.pools[entry[CENTER_POOL]].coding is not None:
                    yield center.bfloat16().to(dtype)
                else:
                    yield center.to(dtype)

    def _values(self, wanted: set[tuple[int, int]]) -> dict[tuple[int, int], Tensor]:
        found: dict[tuple[int, int], Tensor] = {}
        for pool, group in itertools.groupby(sorted(wanted), key=lambda key: key[0]):
            slots = [slot for _, slot in group]
            values = self.pools[pool].values(slots, self.matrix)
            found.update({(pool, s): v for s, v in zip(slots, values, strict=True)})
        return found


class LayerExperts:
    """A layer's part of the bank.

    Attributes:
        projections: name -> slots, under the names of the module's parameters.
        remap: int32 [variants, experts], logical -> physical expert.
    """

    def __init__(
        self,
        names: Sequence[str],
        matrices: Sequence[tuple[int, int]],
        pools: Sequence[tuple[SlotPool, ...]],
        table: npt.NDArray[np.int32],
    ) -> None:
        """`table` is the artifact's remap, int32 `[variants, experts, projections, 4]`."""
        variants, experts = table.shape[:2]
        # Sorted by slots: experts that share a center are neighbors, and are decoded together.
        rows, inverse = np.unique(
            table.reshape(variants * experts, -1), axis=0, return_inverse=True
        )
        physical = rows.reshape(len(rows), len(names), 4).tolist()
        self.remap = torch.from_numpy(inverse.reshape(variants, experts).astype(np.int32))
        self.projections = {
            name: ProjectionSlots(matrices[p], pools[p], [e[p] for e in physical])
            for p, name in enumerate(names)
        }

    @property
    def nbytes(self) -> int:
        pools = [pool for p in self.projections.values() for pool in p.pools]
        return sum(t.nbytes for pool in pools for t in pool.tensors)


class KernelExperts:
    """A layer's part of the bank, laid out for the kernels that run it on a GPU in `dtype`.

    Takes the place of a LayerExperts, whose pools it frees one by one as it goes.
    """

    def __init__(self, layer: LayerExperts, dtype: torch.dtype) -> None:
        self.remap = layer.remap
        self.projections: dict[str, Projection] = {}
        tables: dict[bytes, Tensor] = {}
        for name, slots in list(layer.projections.items()):
            if not name.endswith("_bias"):
                bias = layer.projections.get(f"{name}_bias")
                self.projections[name] = _projection(slots, bias, dtype, tables)
                del layer.projections[name]
        self.first = next(name for name in self.projections if name not in _LAST)
        self.last = next(name for name in self.projections if name in _LAST)

    @property
    def nbytes(self) -> int:
        found = 0
        for projection in self.projections.values():
            found += 0 if projection.bias is None else projection.bias.nbytes
            found += sum(term.nbytes for term in projection.terms)
        return found

    def apply(
        self,
        x: Tensor,
        physical: Tensor,
        routing: Tensor,
        activation: str,
        *,
        norm: Norm | None = None,
        variants: Tensor,
        residual: Tensor | None = None,
    ) -> Tensor:
        """All of the layer's work on its experts: see `kernels.experts.experts`."""
        return kernels.experts(
            x,
            physical,
            routing,
            self.projections[self.first],
            self.projections[self.last],
            activation,
            norm=norm,
            variants=variants,
            residual=residual,
        )

    def project(self, name: str, x: Tensor, physical: Tensor) -> Tensor:
        """See `kernels.experts.project`."""
        return kernels.project(x, physical, self.projections[name])


def _projection(
    slots: ProjectionSlots,
    bias: ProjectionSlots | None,
    dtype: torch.dtype,
    tables: dict[bytes, Tensor],
) -> Projection:
    """`tables` has those made before: equal ones are one tensor, whose blocks are made once."""
    physical = np.array(slots.physical, dtype=np.int32)
    terms = []
    for index, pool in enumerate(slots.pools):
        own = np.where(
            physical[:, CENTER_POOL] == index,
            physical[:, CENTER_SLOT],
            np.where(physical[:, RESIDUAL_POOL] == index, physical[:, RESIDUAL_SLOT], NONE),
        ).astype(np.int32)
        device = pool.tensors[0].device
        table = tables.setdefault(own.tobytes(), torch.from_numpy(own).to(device))
        stored = _arranged(pool, slots.matrix[1], dtype)
        terms.append(Term(table, stored, complete=bool((own >= 0).all())))
    values = None
    if bias is not None:
        values = torch.stack(list(bias.weights(range(len(physical)), dtype)))
    return Projection(tuple(terms), slots.matrix[0], values)


def _arranged(pool: SlotPool, in_features: int, dtype: torch.dtype) -> Any:
    if isinstance(pool.coding, Coding):
        *planes, scales = pool.tensors
        return arranged(tuple(planes), scales, pool.coding, in_features)
    plain = tuple(t.to(dtype) for t in pool.tensors)
    return plain if isinstance(pool.coding, LowRank) else plain[0]


def install() -> None:
    """Makes our function known to transformers, for this process; harmless twice."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, fused_experts)


def fused_experts(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Experts of any class behind transformers' experts interface: `[T, H]` in and out.

    `top_k_index` int64 and `top_k_weights`, both `[T, k]`, are the router's. Computes what
    transformers' `grouped_mm` does, in its order of operations.
    """
    if isinstance(module.moecc, KernelExperts):
        return _with_kernels(module, hidden_states, top_k_index, top_k_weights)
    first = "gate_up_proj" if module.has_gate else "up_proj"
    runs = _Runs(_physical(module, top_k_index))
    rows = hidden_states[runs.order // top_k_index.shape[1]]
    with step.own_order():
        inner = runs.project(module.moecc, first, rows)
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        out = runs.project(module.moecc, "down_proj", inner)
    restored = torch.empty_like(out)
    restored[runs.order] = out
    if getattr(module, "has_post_expert_norm", False):
        with step.repeated(top_k_index.shape[1]):
            restored = module.post_expert_norm(restored)
    restored = restored * top_k_weights.reshape(-1, 1)
    summed = restored.view(*top_k_index.shape, -1).sum(dim=1)
    return summed.to(hidden_states.dtype)


def _with_kernels(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """As `fused_experts`, in the order of the routes: those of a token are neighbors."""
    layer: KernelExperts = module.moecc
    physical = _physical(module, top_k_index).to(torch.int32)
    fan = physical.shape[1]
    rows = layer.project(layer.first, hidden_states, physical)
    with step.repeated(fan):
        inner = module._apply_gate(rows) if module.has_gate else module.act_fn(rows)
        out = layer.project(layer.last, inner, physical.view(-1, 1))
        if getattr(module, "has_post_expert_norm", False):
            out = module.post_expert_norm(out)
    out = (out * top_k_weights.reshape(-1, 1)).view(*physical.shape, -1).sum(dim=1)
    return out.to(hidden_states.dtype)


def switch_experts(
    module: Any, hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor
) -> Tensor:
    """As `fused_experts` for Switch Transformers: `selected_experts` is one-hot, `[T, 1, E]`.

    A token beyond its expert's capacity has no expert selected and comes out as zero.
    """
    chosen = selected_experts.view(-1, selected_experts.shape[-1])
    kept = chosen.any(dim=-1).nonzero().squeeze(-1)
    runs = _Runs(_physical(module, chosen[kept].argmax(dim=-1, keepdim=True)))
    rows = kept[runs.order]
    inner = module.moecc_activation(runs.project(module.moecc, "wi", hidden_states[rows]))
    out = runs.project(module.moecc, "wo", inner) * routing_weights.view(-1, 1)[rows]
    result = torch.zeros_like(hidden_states)
    result[rows] = out.to(hidden_states.dtype)
    return result


class _Runs:
    """Rows sorted by physical expert, and where each expert's begin and end."""

    def __init__(self, physical: Tensor) -> None:
        flat = physical.reshape(-1)
        self.order = flat.argsort(stable=True)
        ids, counts = torch.unique_consecutive(flat[self.order], return_counts=True)
        self.experts: list[int] = ids.tolist()
        self.stops: list[int] = counts.cumsum(0).tolist()

    def project(self, layer: LayerExperts, name: str, rows: Tensor) -> Tensor:
        """`[n, in]` sorted rows through a projection, `[n, out]` of the same dtype."""
        slots = layer.projections[name]
        out = rows.new_empty(rows.shape[0], slots.matrix[0])
        start = 0
        weights = slots.weights(self.experts, rows.dtype)
        for weight, stop in zip(weights, self.stops, strict=True):
            out[start:stop] = linear(rows[start:stop], weight)
            start = stop
        bias = layer.projections.get(f"{name}_bias")
        if bias is not None:
            start = 0
            for values, stop in zip(
                bias.weights(self.experts, rows.dtype), self.stops, strict=True
            ):
                out[start:stop] += values
                start = stop
        return out


def _physical(module: Any, logical: Tensor) -> Tensor:
    """Physical experts of `[T, k]` logical ones: this variant's, or each row's own."""
    remap: Tensor = getattr(module, REMAP)
    rows = step.current()
    if remap.dim() == 1:
        return remap[logical]
    assert rows is not None, "a batch of several variants runs in a step"
    found = remap[rows.tokens.variants.unsqueeze(1), logical]
    if isinstance(rows.tokens, step.Drawn):  # rows that are none read no weights
        found = found.masked_fill(rows.tokens.given.unsqueeze(1) < 0, -1)
    return found
