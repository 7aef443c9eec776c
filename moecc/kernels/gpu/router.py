"""Logits of all experts, and the likeliest of them: an expert's place is how many are before it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moecc.kernels.gpu.launch import begin, counters, let_next_begin, overlap
from moecc.kernels.gpu.linear import FEW_FEATURES, FEW_ROWS, row_product, vector_tiles
from moecc.kernels.norm import DEFERRED_ROWS, Norm

_COMPARED = 32768  # pairs held in registers at once


def routes(count: int, experts: int, norm: Norm | None) -> bool:
    """Whether `route` is for so many rows."""
    few = count <= FEW_ROWS and experts <= FEW_FEATURES
    return few and (norm is None or count <= DEFERRED_ROWS)


def route(
    x: Tensor,
    weight: Tensor,
    variants: Tensor,
    norm: Norm | None,
    remap: Tensor,
    count: int,
    renormalize: bool,
) -> tuple[Tensor, Tensor]:
    """As `kernels.router.route`, in one launch: a row's last program chooses."""
    rows, width = x.shape
    experts = weight.shape[1]
    physical, weights = _chosen(x.device, rows, count)
    tiles = vector_tiles(experts, width)
    scale = x if norm is None else norm.weight
    _route[(triton.cdiv(experts, tiles.n), rows)](
        x,
        weight,
        scale,
        variants,
        remap,
        torch.empty(rows, experts, dtype=torch.float32, device=x.device),
        counters(x.device, FEW_ROWS),
        physical,
        weights,
        0.0 if norm is None else norm.eps,
        x.stride(0),
        weight.stride(0),
        scale.stride(0),
        remap.stride(0),
        K=width,
        NORMED=norm is not None,
        BN=tiles.n,
        BK=tiles.k,
        **_choice(experts, count, renormalize),
        num_warps=tiles.warps,
        **overlap(x.device),
    )
    return physical, weights


def choose_experts(
    logits: Tensor, remap: Tensor, variants: Tensor, count: int, renormalize: bool
) -> tuple[Tensor, Tensor]:
    """As `kernels.router.choose_experts`."""
    rows, experts = logits.shape
    physical, weights = _chosen(logits.device, rows, count)
    _choose[(rows,)](
        logits,
        remap,
        variants,
        physical,
        weights,
        logits.stride(0),
        remap.stride(0),
        **_choice(experts, count, renormalize),
        num_warps=4,
        **overlap(logits.device),
    )
    return physical, weights


def _chosen(device: torch.device, rows: int, count: int) -> tuple[Tensor, Tensor]:
    """Physical experts and weights to fill."""
    physical = torch.empty(rows, count, dtype=torch.int32, device=device)
    return physical, torch.empty(rows, count, dtype=torch.float32, device=device)


def _choice(experts: int, count: int, renormalize: bool) -> dict[str, int]:
    block = max(2, triton.next_power_of_2(experts))
    return {
        "E": experts,
        "COUNT": count,
        "RENORMALIZE": renormalize,
        "BLOCK": block,
        "CHUNK": max(1, min(block, _COMPARED // block)),
    }


@triton.jit
def _route(
    x,
    weight,
    scale,
    variants,
    remap,
    logits,
    arrivals,
    physical,
    weights,
    eps,
    x_stride,
    weight_stride,
    scale_stride,
    remap_stride,
    K: tl.constexpr,
    NORMED: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    E: tl.constexpr,
    COUNT: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    let_next_begin(OVERLAP)
    row = tl.program_id(1).to(tl.int64)
    variant = tl.load(variants + row).to(tl.int64)  # settled
    known = tl.maximum(variant, 0)  # a row that is none is routed too, and then left out
    at = tl.program_id(0) * BN + tl.arange(0, BN)
    found = row_product(
        x + row * x_stride,
        weight + known * weight_stride + at.to(tl.int64) * K,
        at < E,
        scale + known * scale_stride,
        eps,
        K,
        NORMED,
        BN,
        BK,
        OVERLAP,
    )
    logits += row * E
    tl.store(logits + at, found.to(x.dtype.element_ty).to(tl.float32), mask=at < E)
    tl.debug_barrier()  # all of the program's stores come before it counts as arrived
    if tl.atomic_add(arrivals + row, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(arrivals + row, 0)
        remap += known * remap_stride
        _store_chosen(
            logits, remap, physical + row * COUNT, weights + row * COUNT, variant,
            E, COUNT, RENORMALIZE, BLOCK, CHUNK,
        )  # fmt: skip


@triton.jit
def _choose(
    logits,
    remap,
    variants,
    physical,
    weights,
    logits_stride,
    remap_stride,
    E: tl.constexpr,
    COUNT: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    variant = tl.load(variants + row).to(tl.int64)
    logits += row * logits_stride
    remap += tl.maximum(variant, 0) * remap_stride
    _store_chosen(
        logits, remap, physical + row * COUNT, weights + row * COUNT, variant,
        E, COUNT, RENORMALIZE, BLOCK, CHUNK,
    )  # fmt: skip


@triton.jit
def _store_chosen(
    logits,
    remap,
    physical,
    weights,
    variant,
    E: tl.constexpr,
    COUNT: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Chooses by the E logits of a row; the pointers are of that row."""
    at = tl.arange(0, BLOCK)
    values = _logits(logits, at, E)
    experts = tl.load(remap + at, mask=at < E, other=0)
    mine = _ordered(values)
    place = tl.zeros([BLOCK], tl.int32)
    for start in tl.static_range(0, BLOCK, CHUNK):
        other = start + tl.arange(0, CHUNK)
        theirs = _ordered(_logits(logits, other, E))
        equal = (theirs[:, None] == mine[None, :]) & (other[:, None] < at[None, :])
        before = (theirs[:, None] > mine[None, :]) | equal
        place += tl.sum(before.to(tl.int32), 0)  # over what each thread has for itself
    kept = place < COUNT
    mass = tl.exp(values - tl.max(values, 0))
    found = mass / tl.sum(mass, 0)
    if RENORMALIZE:
        found /= tl.sum(tl.where(kept, found, 0.0), 0)
    tl.store(physical + place, tl.where(variant >= 0, experts, -1), mask=kept)
    tl.store(weights + place, found, mask=kept)


@triton.jit
def _logits(logits, at, E: tl.constexpr):
    found = tl.load(logits + at, mask=at < E, other=float("-inf"), cache_modifier=".cg")
    return found.to(tl.float32)


@triton.jit
def _ordered(values):
    """NaN comes last, so that every place is somebody's."""
    return tl.where(values == values, values, float("-inf"))
