"""Merging and coding of one tile of a group: pure tensor functions, float32 accumulation.

A coded weight is, by definition, `bf16(center + residual)` with both in float32: the center as
stored (rounded to its 16-bit dtype, or decoded from its bits), the residual decoded from its bits
and coded against exactly that stored center, so that it also corrects the center's rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moecc.coding import Coding, dequantize, pack, quantize


@dataclass(frozen=True, slots=True)
class CodedTile:
    """The stored parts of a tile of rows.

    Attributes:
        center: the tensors of the center's slot, planes before scales.
        residuals: the same for each member; empty without residuals.
        squared_error: of the coded weights against the members', summed over all members.
    """

    center: tuple[torch.Tensor, ...]
    residuals: tuple[tuple[torch.Tensor, ...], ...]
    squared_error: float


def mean(tiles: Sequence[torch.Tensor], weights: Sequence[int]) -> torch.Tensor:
    """The weighted mean of float32 tiles, exact where all are equal 16-bit values."""
    total = tiles[0] * weights[0]
    for tile, weight in zip(tiles[1:], weights[1:], strict=True):
        total.add_(tile, alpha=weight)
    return total.div_(sum(weights))


def code_tile(
    tiles: Sequence[torch.Tensor],
    weights: Sequence[int],
    *,
    representative: int | None,
    center: Coding | torch.dtype,
    residual: Coding | None,
) -> CodedTile:
    """Codes the rows `[rows, in]` of a group's members.

    `tiles` are the distinct members' rows in float32 and `weights` how often each occurs; the
    center is tile `representative`, or the mean.
    """
    wanted = mean(tiles, weights) if representative is None else tiles[representative]
    stored: tuple[torch.Tensor, ...]
    if isinstance(center, torch.dtype):
        rounded = wanted.to(center)
        stored, value = (rounded,), rounded.float()
    else:
        stored, value = _code(wanted, center)
    shared = value if isinstance(center, torch.dtype) else value.bfloat16().float()
    residuals, error = [], 0.0
    for tile, weight in zip(tiles, weights, strict=True):
        served = shared
        if residual is not None:
            part, delta = _code(tile - value, residual)
            residuals.append(part)
            served = add_residual(value, delta).float()
        off = (served - tile).reshape(-1)
        error += weight * float(off.dot(off))
    return CodedTile(stored, tuple(residuals), error)


def _code(x: torch.Tensor, coding: Coding) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """The stored tensors of `x` and the float32 values they stand for."""
    codes, scales = quantize(x, coding)
    return (*pack(codes, coding), scales), dequantize(codes, scales, coding)


def add_residual(center: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """The weight a float32 center and residual stand for: their sum, rounded once to bf16."""
    return (center + residual).bfloat16()
