"""The experts of a layer, each read once for all tokens of the batch that are routed to it.

A projection is a sum of terms: a center that many experts share, and residuals. A term is a pool of
stored matrices and a table that says which of them, if any, each physical expert has.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from moecc.kernels import packed
from moecc.kernels.align import Order, align
from moecc.kernels.device import on_gpu
from moecc.kernels.norm import Norm, rms_norm
from moecc.kernels.packed import ACTIVATIONS, Digits, PackedSlots
from moecc.lowrank import expand

# Up to so many routes each reads packed weights by itself.
_DIRECT_ROUTES = 8
_LEAST_BLOCK, _MOST_BLOCK = 4, 16
_BLOCKED_PROGRAMS = 5200  # some waves, so that the last one is no large part


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """`slots` int32 [physical], negative where an expert has nothing of `stored`: matrices
    [slots, out, in], packed ones, or two factors [slots, out, rank] and [slots, rank, in].
    `complete` says that every expert is known to have something of it.
    """

    slots: Tensor
    stored: Tensor | PackedSlots | tuple[Tensor, Tensor]
    complete: bool = False

    @property
    def count(self) -> int:
        """How many slots there are."""
        stored = self.stored
        if isinstance(stored, PackedSlots):
            return len(stored.scales)
        return len(stored[0]) if isinstance(stored, tuple) else len(stored)

    @property
    def nbytes(self) -> int:
        if isinstance(self.stored, tuple):
            return sum(factor.nbytes for factor in self.stored)
        return self.stored.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class _Sorted:
    """The routes `physical` int32 [n] of a layer, sorted once for all terms with the same slots."""

    physical: Tensor
    _found: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def blocks(self, *terms: tuple[Term, int]) -> list[tuple[Tensor, Tensor]]:
        """(order, owners) of the routes by their slot of each term, in blocks of that size."""
        keys = [(id(term.slots), block) for term, block in terms]
        new = {
            key: Order(term.slots, block, term.count)
            for key, (term, block) in zip(keys, terms, strict=True)
            if key not in self._found
        }
        if new:
            found = align(self.physical, list(new.values()))
            self._found.update(zip(new, found, strict=True))
        return [self._found[key] for key in keys]


@dataclass(frozen=True, slots=True, eq=False)
class Projection:
    """One linear layer of every physical expert; `bias` [physical, out]."""

    terms: tuple[Term, ...]
    out_features: int
    bias: Tensor | None = None

    @property
    def plain(self) -> Tensor | None:
        """The matrices [slots, out, in], where there is nothing else."""
        stored = self.terms[0].stored
        return stored if len(self.terms) == 1 and isinstance(stored, Tensor) else None

    @property
    def coded(self) -> list[tuple[Term, PackedSlots]]:
        """The terms that are packed."""
        return [(t, t.stored) for t in self.terms if isinstance(t.stored, PackedSlots)]

    @property
    def packed(self) -> bool:
        """Whether all of it is packed."""
        return len(self.coded) == len(self.terms)


def experts(
    x: Tensor,
    physical: Tensor,
    routing: Tensor,
    first: Projection,
    down: Projection,
    activation: str,
    *,
    norm: Norm | None = None,
    variants: Tensor,
    residual: Tensor | None = None,
) -> Tensor:
    """The weighted sum of each token's experts, after a norm of `x`, plus a residual: [T, H].

    `x` [T, H]; `physical` int32 [T, k], negative where a route is none; `routing` [T, k]. `first`
    has rows [gate; up]; `activation` is one of `packed.ACTIVATIONS`. `variants` int32 [T] are the
    norm's rows.
    """
    if not on_gpu(x):
        x = x if norm is None else rms_norm(x, norm, variants)
        hidden = project(x, physical, first)
        gate, up = hidden.chunk(2, -1)
        inner = ACTIVATIONS[activation](gate) * up
        out = project(inner, physical.view(-1, 1), down).view(*physical.shape, -1)
        kept = out.float().masked_fill(physical[..., None] < 0, 0.0)
        summed = (kept * routing[..., None]).sum(1).to(x.dtype)
        return summed if residual is None else residual + summed
    if first.plain is not None and down.plain is not None:
        return _plain(x, physical, routing, first, down, activation, norm, variants, residual)
    sorted_routes = _Sorted(physical.reshape(-1))
    if first.packed:
        digits = packed.digits(x, norm=norm, variants=variants)
        partials = _partials(None, physical.shape[1], sorted_routes, first, digits)
    else:
        x = x if norm is None else rms_norm(x, norm, variants)
        partials = _partials(x, physical.shape[1], sorted_routes, first)
    if down.packed and first.bias is None:
        parts = _splits(down, physical.numel())
        digits = packed.gated_digits(partials, activation, x.dtype, parts)
        partials = _partials(None, 1, sorted_routes, down, digits)
    else:
        gate, up = _summed(partials, first, physical, x.dtype).chunk(2, -1)
        acted = ACTIVATIONS[activation](gate) * up
        partials = _partials(acted, 1, sorted_routes, down)
    if down.bias is None:
        return packed.reduced(partials, physical, routing, residual, x.dtype)
    from moecc.kernels.gpu.experts import combined

    return combined(partials.sum(0).to(x.dtype), physical, routing, down.bias, residual)


def project(x: Tensor, physical: Tensor, projection: Projection) -> Tensor:
    """Each row of `x` [T, in] through its experts `physical` int32 [T, k]: [T * k, out].

    Negative ones are routes that are none; what their rows hold is not said.
    """
    if on_gpu(x):
        sorted_routes = _Sorted(physical.reshape(-1))
        partials = _partials(x, physical.shape[1], sorted_routes, projection)
        return _summed(partials, projection, physical, x.dtype)
    routes = physical.reshape(-1)
    out = x.new_zeros(len(routes), projection.out_features)
    for expert in sorted(set(routes.tolist()) - {-1}):
        own = (routes == expert).nonzero()[:, 0]
        bias = None if projection.bias is None else projection.bias[expert]
        weight = _matrix(projection, expert).to(x.dtype)
        out[own] = F.linear(x[own // physical.shape[1]], weight, bias)
    return out


def _matrix(projection: Projection, expert: int) -> Tensor:
    """A physical expert's weights, the terms added in float32 and rounded to bfloat16."""
    found = []
    for term in projection.terms:
        slot = int(term.slots[expert])
        if slot < 0:
            continue
        if isinstance(term.stored, PackedSlots):
            found.append(packed.decode(term.stored, term.slots[expert].view(1).long())[0])
        elif isinstance(term.stored, tuple):
            found.append(expand(*(t[slot : slot + 1] for t in term.stored))[0])
        else:
            found.append(term.stored[slot])
    return (
        found[0] if len(found) == 1 else torch.stack([f.float() for f in found]).sum(0).bfloat16()
    )


def _plain(
    x: Tensor,
    physical: Tensor,
    routing: Tensor,
    first: Projection,
    down: Projection,
    activation: str,
    norm: Norm | None,
    variants: Tensor,
    residual: Tensor | None,
) -> Tensor:
    from moecc.kernels.gpu import experts as gpu

    wide, narrow = first.plain, down.plain
    assert wide is not None
    assert narrow is not None
    wide_slots, narrow_slots = first.terms[0].slots, down.terms[0].slots
    if len(x) <= gpu.VECTOR_TOKENS:
        inner = gpu.gated_vector(
            x, physical, wide, wide_slots, first.bias, activation, norm, variants
        )
        return gpu.down_vector(inner, physical, routing, narrow, narrow_slots, down.bias, residual)
    if norm is not None:
        x = rms_norm(x, norm, variants)
    sorted_routes, count = _Sorted(physical.reshape(-1)), physical.numel()
    tiles = gpu.matrix_tiles(count, len(wide), wide.shape[2])
    (blocks,) = sorted_routes.blocks((first.terms[0], tiles.m))
    inner = gpu.gated_matrix(
        x, physical.shape[1], wide, blocks, physical, first.bias, activation, tiles
    )
    tiles = gpu.matrix_tiles(count, len(narrow), narrow.shape[2])
    (blocks,) = sorted_routes.blocks((down.terms[0], tiles.m))
    out = torch.empty(count, narrow.shape[1], dtype=x.dtype, device=x.device)
    gpu.routed_matrix(inner, 1, narrow, blocks, out, tiles)
    return gpu.combined(out, physical, routing, down.bias, residual)


def _partials(
    x: Tensor | None,
    fan: int,
    sorted_routes: _Sorted,
    projection: Projection,
    digits: Digits | None = None,
) -> Tensor:
    """Sums float32 [parts, routes, out] that add up to a projection of every route.

    Route `r` takes row `r // fan` of `x`. `digits` are those of `x`, if they are known; then a
    projection that is packed needs no `x`.
    """
    routes = sorted_routes.physical
    coded = projection.coded
    others = [term for term in projection.terms if not isinstance(term.stored, PackedSlots)]
    if digits is None and coded:
        assert x is not None
        digits = packed.digits(x)
    direct = _is_direct(projection, len(routes))
    sums = _splits(projection, len(routes)) * (len(coded) if direct else bool(coded))
    shape = (sums + len(others), len(routes), projection.out_features)
    out = torch.empty(shape, device=routes.device)
    if digits is not None and direct:
        packed.direct(digits, [(c, t.slots) for t, c in coded], routes, fan, out)
        return out
    # A term leaves the rows of experts as they are that have nothing of it. Packed terms share
    # theirs, which the first one fills.
    if digits is not None:
        if not coded[0][0].complete:
            out[:sums].zero_()
        blocks = sorted_routes.blocks(*((t, _block(len(routes), t.count)) for t, _ in coded))
        terms = [(stored, *own) for (_, stored), own in zip(coded, blocks, strict=True)]
        packed.blocked(digits, terms, fan, out[:sums])
    for term, part in zip(others, out[sums:], strict=True):
        assert x is not None
        if not term.complete:
            part.zero_()
        _add_plain(x, fan, term, sorted_routes, part)
    return out


def _add_plain(x: Tensor, fan: int, term: Term, sorted_routes: _Sorted, out: Tensor) -> None:
    """Writes the products of 16-bit matrices, or of two factors, to float32 [n, out]."""
    from moecc.kernels.gpu import experts as gpu

    factors = term.stored[::-1] if isinstance(term.stored, tuple) else (term.stored,)
    tiles = gpu.matrix_tiles(len(out), term.count, x.shape[1])
    (blocks,) = sorted_routes.blocks((term, tiles.m))
    for factor in factors:
        assert isinstance(factor, Tensor)
        last = factor is factors[-1]
        into = out if last else x.new_empty(len(out), factor.shape[1])
        gpu.routed_matrix(x, fan, factor, blocks, into, tiles)
        x, fan = into, 1


def _is_direct(projection: Projection, routes: int) -> bool:
    """Whether every route reads packed weights by itself."""
    return projection.packed and routes <= _DIRECT_ROUTES >= len(projection.terms)


def _splits(projection: Projection, routes: int) -> int:
    """Sums that the products with each packed term are split into."""
    coded = projection.coded
    if not coded:
        return 1
    if _is_direct(projection, routes):
        return packed.splits(coded[0][1], len(coded) * routes)
    # At least: many routes fill more than a block of each slot.
    blocks = sum(max(min(routes, t.count), routes // _block(routes, t.count)) for t, _ in coded)
    return packed.splits(coded[0][1], blocks, _BLOCKED_PROGRAMS)


def _block(routes: int, slots: int) -> int:
    """Routes in a block of packed products: half as many again as share a slot, on average.

    Then few slots need a second block, which unpacks their weights once more.
    """
    shared = -(-3 * routes // (2 * min(routes, slots)))
    return min(_MOST_BLOCK, max(_LEAST_BLOCK, 1 << (shared - 1).bit_length()))


def _summed(
    partials: Tensor, projection: Projection, physical: Tensor, dtype: torch.dtype
) -> Tensor:
    """[T * k, out] of partial sums, with biases."""
    found = partials.sum(0)
    if projection.bias is not None:
        found += projection.bias[physical.reshape(-1).clamp(min=0).long()]
    return found.to(dtype)
