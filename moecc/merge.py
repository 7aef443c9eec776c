"""Merging and coding of some rows of a group: pure tensor functions, float32 accumulation.

A coded weight is, by definition, `bf16(center + residual)` with both in float32: the center as
stored (rounded to its 16-bit dtype, or decoded from its bits), the residual decoded from its bits
and coded against exactly that stored center, so that it also corrects the center's rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moecc.blocks import Blocks
from moecc.coding import Coded, Coding, decode, encode
from moecc.joint import code_jointly
from moecc.lowrank import LowRank, expand, factorize

Residual = Coding | LowRank | None
_Part = Coded | tuple[Tensor, Tensor] | None


@dataclass(frozen=True, slots=True)
class CodedTile:
    """The stored parts of a tile of rows.

    Attributes:
        center: the tensors of the center's slot, planes before scales.
        residuals: the same for each member; empty for one without.
        squared_error: of the coded weights against the members', summed over all members.
    """

    center: tuple[Tensor, ...]
    residuals: tuple[tuple[Tensor, ...], ...]
    squared_error: float


def any_low_rank(residuals: Sequence[Residual]) -> bool:
    """True if whole matrices are needed to code the residuals."""
    return any(isinstance(residual, LowRank) for residual in residuals)


def mean(tiles: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted mean, exact where all are equal 16-bit values and weights are integers."""
    total = tiles[0] * weights[0]
    for tile, weight in zip(tiles[1:], weights[1:], strict=True):
        total.add_(tile, alpha=weight)
    return total.div_(sum(weights))


def regression_mean(tiles: Sequence[Tensor], importance: Tensor, moments: Tensor) -> Tensor:
    """The rows W that minimize the sum of |(W - W_v) x|^2 over every member's inputs x.

    `importance` [V] and `moments` [V, blocks, B, B] as in `code_jointly`. X. Jin et al., "Dataless
    Knowledge Fusion by Merging Weights of Language Models" (RegMean), ICLR 2023, eq. 2.
    """
    blocks = Blocks(tiles[0].shape[1], moments)
    counted = moments * importance.view(-1, 1, 1, 1)
    wanted = (blocks.cut(torch.stack(list(tiles))) @ counted).sum(0)
    return blocks.join(torch.linalg.solve(counted.sum(0), wanted, left=False)).contiguous()


def task_arithmetic(tiles: Sequence[Tensor], base: Tensor, scale: float) -> Tensor:
    """The base plus scaled deltas (G. Ilharco et al., "Editing Models with Task Arithmetic")."""
    return base + scale * sum(tile - base for tile in tiles)


def ties(tiles: Sequence[Tensor], base: Tensor, scale: float, density: float) -> Tensor:
    """P. Yadav et al., "TIES-Merging" (NeurIPS 2023): trim every matrix, elect signs, mean.

    Rows must be those of whole matrices: trimming keeps the largest part `density` of each.
    """
    deltas = torch.stack([tile - base for tile in tiles])
    flat = deltas.abs().flatten(1)
    kept = max(1, round(density * flat.shape[1]))
    least = flat.kthvalue(flat.shape[1] - kept + 1, dim=1).values
    deltas = torch.where(deltas.abs() >= least[:, None, None], deltas, 0.0)
    agree = torch.where(deltas.sign() == deltas.sum(0).sign(), deltas, 0.0)
    return base + scale * agree.sum(0) / (agree != 0).sum(0).clamp(min=1)


def code_tile(
    tiles: Sequence[Tensor],
    weights: Sequence[int],
    *,
    wanted: Tensor,
    center: Coding | torch.dtype,
    residuals: Sequence[Residual],
    moments: Tensor | None = None,
) -> CodedTile:
    """Codes the rows `[rows, in]` of a group's members around the center `wanted`.

    `tiles` are the distinct members' rows in float32 and `weights` how often each occurs;
    residuals of low rank need those of whole matrices, and are the best for `moments`.
    """
    coded = wanted.to(center) if isinstance(center, torch.dtype) else encode(wanted, center)
    value = _value(coded, center, wanted.shape[1])
    parts: list[_Part] = []
    for v, (tile, residual) in enumerate(zip(tiles, residuals, strict=True)):
        if isinstance(residual, LowRank):
            own = None if moments is None else moments[v]
            parts.append(factorize(tile - value, residual.rank, own))
        else:
            parts.append(None if residual is None else encode(tile - value, residual))
    return _coded_tile(tiles, weights, coded, value, parts, residuals)


def code_tile_jointly(
    tiles: Sequence[Tensor],
    weights: Sequence[int],
    *,
    importance: Tensor,
    moments: Tensor | None,
    center: Coding | torch.dtype,
    residuals: Sequence[Residual],
) -> CodedTile:
    """As `code_tile`, with center and residuals chosen together (joint.py).

    Members with a residual of low rank have no say in the center, unless all have one.
    """
    factored = [v for v, r in enumerate(residuals) if isinstance(r, LowRank)]
    joint = [v for v in range(len(tiles)) if v not in factored] or factored
    coded, found = code_jointly(
        torch.stack([tiles[v] for v in joint]),
        importance[joint],
        None if moments is None else moments[joint],
        center=center,
        residuals=[r if isinstance(r := residuals[v], Coding) else None for v in joint],
    )
    value = _value(coded, center, tiles[0].shape[1])
    parts: list[_Part] = [None] * len(tiles)
    for v, part in zip(joint, found, strict=True):
        parts[v] = part
    for v in factored:
        residual, own = residuals[v], None if moments is None else moments[v]
        assert isinstance(residual, LowRank)
        parts[v] = factorize(tiles[v] - value, residual.rank, own)
    return _coded_tile(tiles, weights, coded, value, parts, residuals)


def _value(coded: Coded | Tensor, coding: Coding | torch.dtype, columns: int) -> Tensor:
    """The float32 values of a stored center."""
    if isinstance(coded, Coded) and isinstance(coding, Coding):
        return decode(coded, coding, columns)
    assert isinstance(coded, Tensor)
    return coded.float()


def _coded_tile(
    tiles: Sequence[Tensor],
    weights: Sequence[int],
    center: Coded | Tensor,
    value: Tensor,
    parts: Sequence[_Part],
    residuals: Sequence[Residual],
) -> CodedTile:
    shared = value if isinstance(center, Tensor) else value.bfloat16().float()
    stored, error = [], 0.0
    for tile, weight, part, residual in zip(tiles, weights, parts, residuals, strict=True):
        served = shared
        if part is not None:
            served = add_residual(value, _delta(part, residual, tile.shape[1])).float()
        stored.append(_tensors(part))
        off = (served - tile).reshape(-1)
        error += weight * float(off.dot(off))
    tensors = (center,) if isinstance(center, Tensor) else _tensors(center)
    return CodedTile(tensors, tuple(stored), error)


def _delta(part: Coded | tuple[Tensor, Tensor], residual: Residual, columns: int) -> Tensor:
    """The float32 values of a stored residual."""
    if isinstance(part, Coded):
        assert isinstance(residual, Coding)
        return decode(part, residual, columns)
    return expand(*part)


def _tensors(part: _Part) -> tuple[Tensor, ...]:
    if isinstance(part, Coded):
        return (*part.planes, part.scales)
    return part or ()


def add_residual(center: Tensor, residual: Tensor) -> Tensor:
    """The weight a float32 center and residual stand for: their sum, rounded once to bf16."""
    return (center + residual).bfloat16()
