"""Experts in 16 bits: one token at a time, or blocks of tokens that share an expert.

Either way gate, up and activation are one launch; for single tokens so are the down projection, the
routing weights and the sum over a token's experts. Weights are read once and do not stay.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moecc.kernels.gpu.launch import begin, let_next_begin, overlap, wait
from moecc.kernels.gpu.linear import Tiles
from moecc.kernels.norm import Norm

# Up to so many tokens each reads its experts by itself: few of them share one.
VECTOR_TOKENS = 2
_DOWN = 8192  # weights that a program of the down projection loads at once
_COMBINED = 2048  # values that a program adds up


def gated_vector(
    x: Tensor,
    physical: Tensor,
    weights: Tensor,
    slots: Tensor,
    bias: Tensor | None,
    activation: str,
    norm: Norm | None,
    variants: Tensor,
) -> Tensor:
    """act(gate) * up of every route, [T * k, I], from `weights` [slots, 2 I, H]."""
    tokens, fan = physical.shape
    inner, width = weights.shape[1] // 2, weights.shape[2]
    out = torch.empty(tokens * fan, inner, dtype=x.dtype, device=x.device)
    tiles = vector_tiles(width)
    scale = x if norm is None else norm.weight
    _gated_vector[(triton.cdiv(inner, tiles.n), tokens * fan)](
        x,
        weights,
        physical,
        slots,
        x if bias is None else bias,
        scale,
        variants,
        out,
        0.0 if norm is None else norm.eps,
        x.stride(0),
        scale.stride(0),
        K=width,
        I=inner,
        FAN=fan,
        ACTIVATION=activation,
        BIASED=bias is not None,
        NORMED=norm is not None,
        BN=tiles.n,
        BK=tiles.k,
        num_warps=tiles.warps,
        **overlap(x.device),
    )
    return out


def down_vector(
    inner: Tensor,
    physical: Tensor,
    routing: Tensor,
    weights: Tensor,
    slots: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """[T, H]: the routes of a token through `weights` [slots, H, I], weighted and summed.

    Belongs right after the `gated_vector` of the same routes, which lets it read them early.
    """
    tokens, fan = physical.shape
    features, width = weights.shape[1:]
    out = torch.empty(tokens, features, dtype=inner.dtype, device=inner.device)
    tiles = down_tiles(width, fan)
    _down_vector[(triton.cdiv(features, tiles.n), tokens)](
        inner,
        weights,
        physical,
        slots,
        routing,
        inner if bias is None else bias,
        out if residual is None else residual,
        out,
        K=width,
        N=features,
        FAN=fan,
        PLACES=triton.next_power_of_2(fan),
        BIASED=bias is not None,
        ADDS=residual is not None,
        BN=tiles.n,
        BK=tiles.k,
        num_warps=tiles.warps,
        **overlap(inner.device),
    )
    return out


def gated_matrix(
    x: Tensor,
    fan: int,
    weights: Tensor,
    blocks: tuple[Tensor, Tensor],
    physical: Tensor,
    bias: Tensor | None,
    activation: str,
    tiles: Tiles,
) -> Tensor:
    """As `gated_vector`; `blocks` (order, owners) of the routes by slot, `tiles.m` in a block."""
    order, owners = blocks
    inner, width = weights.shape[1] // 2, weights.shape[2]
    out = torch.empty(physical.numel(), inner, dtype=x.dtype, device=x.device)
    _gated_matrix[(len(owners), triton.cdiv(inner, tiles.n))](
        x,
        weights,
        order,
        owners,
        physical,
        x if bias is None else bias,
        out,
        x.stride(0),
        K=width,
        I=inner,
        FAN=fan,
        ACTIVATION=activation,
        BIASED=bias is not None,
        BM=tiles.m,
        BN=tiles.n,
        BK=tiles.k,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **overlap(x.device),
    )
    return out


def routed_matrix(
    x: Tensor,
    fan: int,
    weights: Tensor,
    blocks: tuple[Tensor, Tensor],
    out: Tensor,
    tiles: Tiles,
) -> None:
    """Writes row `r // fan` of `x` through the matrix of route `r`'s block to row `r` of `out`."""
    order, owners = blocks
    features, width = weights.shape[1:]
    _routed_matrix[(len(owners), triton.cdiv(features, tiles.n))](
        x,
        weights,
        order,
        owners,
        out,
        x.stride(0),
        out.stride(0),
        K=width,
        N=features,
        FAN=fan,
        BM=tiles.m,
        BN=tiles.n,
        BK=tiles.k,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **overlap(x.device),
    )


def combined(
    routes: Tensor,
    physical: Tensor,
    routing: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """[T, H]: rows [T * k, H] of a token, plus biases, weighted and summed in their order."""
    tokens, fan = physical.shape
    features = routes.shape[1]
    out = torch.empty(tokens, features, dtype=routes.dtype, device=routes.device)
    places = triton.next_power_of_2(fan)
    block = min(max(64, _COMBINED // places), triton.next_power_of_2(features))
    _combined[(tokens, triton.cdiv(features, block))](
        routes,
        physical,
        routing,
        routes if bias is None else bias,
        out if residual is None else residual,
        out,
        N=features,
        FAN=fan,
        PLACES=places,
        BIASED=bias is not None,
        ADDS=residual is not None,
        BLOCK=block,
        num_warps=4,
        **overlap(routes.device),
    )
    return out


def vector_tiles(width: int) -> Tiles:
    """For gate and up of a route: all of a program's weights are on their way at once."""
    k = min(2048, max(16, triton.next_power_of_2(width)))
    return Tiles(1, 2 if width > k else 4, k, 4, 1)


def down_tiles(width: int, fan: int) -> Tiles:
    """For the routes of a token together."""
    k = min(2048, max(16, triton.next_power_of_2(width)))
    if width > k:
        return Tiles(1, 2, k, 8, 1)
    return Tiles(1, max(1, min(16, _DOWN // (k * triton.next_power_of_2(fan)))), k, 4, 1)


def matrix_tiles(routes: int, slots: int, width: int) -> Tiles:
    """For blocks of routes."""
    k = min(256, max(16, triton.next_power_of_2(width)))
    shared = routes / max(1, min(slots, routes))
    if shared > 32:
        return Tiles(128, 64, min(k, 64), 8, 3)
    if shared > 6:
        return Tiles(32, 64, min(k, 128), 4, 3)
    return Tiles(16, 32, k, 4, 3)


@triton.jit
def _activated(gate, up, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr):
    """float32 act(gate) * up, rounded where transformers rounds."""
    gate = gate.to(DTYPE).to(tl.float32)
    up = up.to(DTYPE).to(tl.float32)
    if ACTIVATION == "silu":
        acted = gate / (1 + tl.exp(-gate))
    elif ACTIVATION == "relu":
        acted = tl.maximum(gate, 0.0)
    elif ACTIVATION == "gelu":
        acted = 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476))
    else:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        acted = gate / (1 + tl.exp(-2 * inner))
    return acted.to(DTYPE).to(tl.float32) * up


@triton.jit
def _gated_vector(
    x,
    weights,
    physical,
    slots,
    bias,
    scale,
    variants,
    out,
    eps,
    x_stride,
    scale_stride,
    K: tl.constexpr,
    I: tl.constexpr,
    FAN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BIASED: tl.constexpr,
    NORMED: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    let_next_begin(OVERLAP)  # only now: the next reads `physical` before it waits
    route = tl.program_id(1).to(tl.int64)
    expert = tl.load(physical + route)
    if expert < 0:
        return
    slot = tl.load(slots + expert).to(tl.int64)
    row = route // FAN
    variant = tl.load(variants + row).to(tl.int64)
    at = tl.program_id(0) * BN + tl.arange(0, BN)
    held = at < I
    k = tl.arange(0, BK)
    lines = weights + slot * (2 * I * K) + at.to(tl.int64)[:, None] * K
    gate = tl.zeros([BN, BK], tl.float32)
    up = tl.zeros([BN, BK], tl.float32)
    square = tl.zeros([BK], tl.float32)
    for start in tl.static_range(0, K, BK):
        inside = start + k < K
        both = held[:, None] & inside[None, :]
        first = tl.load(lines + (start + k)[None, :], mask=both, other=0.0)
        second = tl.load(lines + I * K + (start + k)[None, :], mask=both, other=0.0)
        values = tl.load(x + row * x_stride + start + k, mask=inside, other=0.0).to(tl.float32)
        if NORMED:
            square += values * values
            own = tl.load(scale + variant * scale_stride + start + k, mask=inside, other=0.0)
            values *= own.to(tl.float32)
        gate += first.to(tl.float32) * values[None, :]
        up += second.to(tl.float32) * values[None, :]
    gates = tl.sum(gate, 1)
    ups = tl.sum(up, 1)
    if NORMED:
        root = 1 / tl.sqrt(tl.sum(square, 0) / K + eps)
        gates *= root
        ups *= root
    if BIASED:
        added = bias + expert.to(tl.int64) * (2 * I) + at
        gates += tl.load(added, mask=held, other=0.0).to(tl.float32)
        ups += tl.load(added + I, mask=held, other=0.0).to(tl.float32)
    tl.store(
        out + route * I + at, _activated(gates, ups, ACTIVATION, out.dtype.element_ty), mask=held
    )


@triton.jit
def _down_vector(
    inner,
    weights,
    physical,
    slots,
    routing,
    bias,
    residual,
    out,
    K: tl.constexpr,
    N: tl.constexpr,
    FAN: tl.constexpr,
    PLACES: tl.constexpr,
    BIASED: tl.constexpr,
    ADDS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    let_next_begin(OVERLAP)
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BN + tl.arange(0, BN)
    held = at < N
    place = tl.arange(0, PLACES)
    real = place < FAN
    k = tl.arange(0, BK)
    # Past the first cache, which may hold what was there before.
    expert = tl.load(physical + row * FAN + place, mask=real, other=-1, cache_modifier=".cg")
    taken = expert >= 0
    slot = tl.load(slots + expert, mask=taken, other=0).to(tl.int64)
    route = row * FAN + place
    lines = weights + slot[None, :] * (N * K) + at.to(tl.int64)[:, None] * K
    kept = held[:, None] & taken[None, :]
    both = kept[:, :, None] & (k < K)[None, None, :]
    tile = tl.load(lines[:, :, None] + k[None, None, :], mask=both, other=0.0)
    wait(OVERLAP)
    sums = tl.zeros([BN, PLACES, BK], tl.float32)
    for start in tl.static_range(0, K, BK):
        inside = start + k < K
        if start > 0:
            both = kept[:, :, None] & inside[None, None, :]
            tile = tl.load(lines[:, :, None] + (start + k)[None, None, :], mask=both, other=0.0)
        values = tl.load(
            inner + route[:, None] * K + (start + k)[None, :],
            mask=taken[:, None] & inside[None, :],
            other=0.0,
        )
        sums += tile.to(tl.float32) * values.to(tl.float32)[None, :, :]
    found = tl.sum(sums, 2)
    if BIASED:
        added = bias + expert.to(tl.int64)[None, :] * N + at[:, None]
        found += tl.load(added, mask=kept, other=0.0).to(tl.float32)
    weight = tl.load(routing + route, mask=taken, other=0.0).to(tl.float32)
    found = found.to(out.dtype.element_ty).to(tl.float32)
    total = tl.sum(found * weight[None, :], 1)
    if ADDS:
        total = total.to(out.dtype.element_ty).to(tl.float32)
        total += tl.load(residual + row * N + at, mask=held, other=0.0).to(tl.float32)
    tl.store(out + row * N + at, total, mask=held)


@triton.jit
def _gated_matrix(
    x,
    weights,
    order,
    owners,
    physical,
    bias,
    out,
    x_stride,
    K: tl.constexpr,
    I: tl.constexpr,
    FAN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BIASED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    block = tl.program_id(0)
    slot = tl.load(owners + block).to(tl.int64)
    if slot < 0:
        return
    routes = tl.load(order + block * BM + tl.arange(0, BM)).to(tl.int64)
    taken = routes >= 0
    at = tl.program_id(1) * BN + tl.arange(0, BN)
    held = at < I
    k = tl.arange(0, BK)
    x_lines = x + (tl.where(taken, routes, 0) // FAN)[:, None] * x_stride + k[None, :]
    lines = weights + slot * (2 * I * K) + tl.where(held, at, 0).to(tl.int64)[None, :] * K
    lines += k[:, None]
    gate = tl.zeros([BM, BN], tl.float32)
    up = tl.zeros([BM, BN], tl.float32)
    for step in range(0, K, BK):
        if K % BK == 0:
            values = tl.load(x_lines + step, mask=taken[:, None], other=0.0)
            first = tl.load(lines + step)
            second = tl.load(lines + I * K + step)
        else:
            inside = step + k < K
            values = tl.load(x_lines + step, mask=taken[:, None] & inside[None, :], other=0.0)
            first = tl.load(lines + step, mask=inside[:, None], other=0.0)
            second = tl.load(lines + I * K + step, mask=inside[:, None], other=0.0)
        gate = tl.dot(values, first, gate)
        up = tl.dot(values, second, up)
    both = taken[:, None] & held[None, :]
    if BIASED:
        experts = tl.load(physical + routes, mask=taken, other=0).to(tl.int64)
        added = bias + experts[:, None] * (2 * I) + at[None, :]
        gate += tl.load(added, mask=both, other=0.0).to(tl.float32)
        up += tl.load(added + I, mask=both, other=0.0).to(tl.float32)
    acted = _activated(gate, up, ACTIVATION, out.dtype.element_ty)
    tl.store(out + routes[:, None] * I + at[None, :], acted, mask=both)


@triton.jit
def _routed_matrix(
    x,
    weights,
    order,
    owners,
    out,
    x_stride,
    out_stride,
    K: tl.constexpr,
    N: tl.constexpr,
    FAN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    block = tl.program_id(0)
    slot = tl.load(owners + block).to(tl.int64)
    if slot < 0:
        return
    routes = tl.load(order + block * BM + tl.arange(0, BM)).to(tl.int64)
    taken = routes >= 0
    at = tl.program_id(1) * BN + tl.arange(0, BN)
    held = at < N
    k = tl.arange(0, BK)
    x_lines = x + (tl.where(taken, routes, 0) // FAN)[:, None] * x_stride + k[None, :]
    lines = weights + slot * (N * K) + tl.where(held, at, 0).to(tl.int64)[None, :] * K + k[:, None]
    total = tl.zeros([BM, BN], tl.float32)
    for step in range(0, K, BK):
        if K % BK == 0:
            values = tl.load(x_lines + step, mask=taken[:, None], other=0.0)
            tile = tl.load(lines + step)
        else:
            inside = step + k < K
            values = tl.load(x_lines + step, mask=taken[:, None] & inside[None, :], other=0.0)
            tile = tl.load(lines + step, mask=inside[:, None], other=0.0)
        total = tl.dot(values, tile, total)
    both = taken[:, None] & held[None, :]
    tl.store(out + routes[:, None] * out_stride + at[None, :], total, mask=both)


@triton.jit
def _combined(
    routes,
    physical,
    routing,
    bias,
    residual,
    out,
    N: tl.constexpr,
    FAN: tl.constexpr,
    PLACES: tl.constexpr,
    BIASED: tl.constexpr,
    ADDS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    held = at < N
    place = tl.arange(0, PLACES)
    real = place < FAN
    route = row * FAN + place
    expert = tl.load(physical + route, mask=real, other=-1).to(tl.int64)
    weight = tl.load(routing + route, mask=real, other=0.0).to(tl.float32)
    found = tl.load(
        routes + route[:, None] * N + at[None, :], mask=real[:, None] & held[None, :], other=0.0
    ).to(tl.float32)
    taken = (expert >= 0)[:, None]
    if BIASED:
        added = bias + expert[:, None] * N + at[None, :]
        found += tl.load(added, mask=taken & held[None, :], other=0.0).to(tl.float32)
        found = found.to(out.dtype.element_ty).to(tl.float32)
    # What rows of routes that are none hold is not said, nor are their weights.
    total = tl.sum(tl.where(taken, found * weight[:, None], 0.0), 0)
    if ADDS:
        total = total.to(out.dtype.element_ty).to(tl.float32)
        total += tl.load(residual + row * N + at, mask=held, other=0.0).to(tl.float32)
    tl.store(out + row * N + at, total, mask=held)
