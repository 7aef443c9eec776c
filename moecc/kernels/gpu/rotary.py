"""Rotary embedding, norms of heads and the write to the cache in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moecc.kernels.gpu.launch import let_next_begin, overlap, wait

_ELEMENTS = 1024  # of a program: as many as 128 threads load at once


def rotate_and_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inv_freq: Tensor,
    positions: Tensor,
    slots: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    rows: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    attention_scaling: float,
) -> Tensor:
    """As `kernels.rotary.rotate_and_store`."""
    tokens, heads, dim = q.shape
    kv_heads, dim_v = v.shape[1:]
    half = inv_freq.shape[1]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    side = max(1, min(_ELEMENTS // triton.next_power_of_2(dim), triton.next_power_of_2(heads)))
    q_parts = triton.cdiv(heads, side)
    _rotate_and_store[(tokens, q_parts + triton.cdiv(kv_heads, side))](
        q,
        k,
        v,
        inv_freq,
        positions,
        slots,
        cache_k,
        cache_v,
        rows,
        q_norm,
        k_norm,
        out,
        eps,
        attention_scaling,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *cache_k.stride()[:2],
        *cache_v.stride()[:2],
        inv_freq.stride(0),
        0 if q_norm is None else q_norm.stride(0),
        0 if k_norm is None else k_norm.stride(0),
        HEADS=heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        DIM_V=dim_v,
        HALF=half,
        SIDE=side,
        Q_PARTS=q_parts,
        H=triton.next_power_of_2(half),
        REST=triton.next_power_of_2(dim - 2 * half) if dim > 2 * half else 0,
        DV=triton.next_power_of_2(dim_v),
        num_warps=4,
        enable_fp_fusion=False,  # it would fuse a product with a sum, and not round it
        **overlap(q.device),
    )
    return out


@triton.jit
def _rotate_and_store(
    q,
    k,
    v,
    inv_freq,
    positions,
    slots,
    cache_k,
    cache_v,
    rows,
    q_norm,
    k_norm,
    out,
    eps,
    attention_scaling,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    cache_k_slot,
    cache_k_head,
    cache_v_slot,
    cache_v_head,
    freq_row,
    q_norm_row,
    k_norm_row,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    HALF: tl.constexpr,
    SIDE: tl.constexpr,
    Q_PARTS: tl.constexpr,
    H: tl.constexpr,
    REST: tl.constexpr,
    DV: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    let_next_begin(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    # Settled: positions and rows, and so the angles.
    position = tl.load(positions + token).to(tl.float32)
    row = token * 0
    if rows is not None:
        row = tl.load(rows + token).to(tl.int64)
    half = tl.arange(0, H)
    angles = position * tl.load(inv_freq + row * freq_row + half, mask=half < HALF, other=0.0)
    dtype = q.dtype.element_ty
    cos = (tl.cos(angles) * attention_scaling).to(dtype).to(tl.float32)
    sin = (tl.sin(angles) * attention_scaling).to(dtype).to(tl.float32)
    wait(OVERLAP)
    if part < Q_PARTS:
        heads = part * SIDE + tl.arange(0, SIDE)
        if q_norm is not None:
            q_norm += row * q_norm_row
        _rotated(
            q + token * q_row + heads[:, None] * q_head,
            out + (token * HEADS + heads[:, None]) * DIM,
            heads < HEADS,
            heads < HEADS,
            cos,
            sin,
            q_norm,
            eps,
            DIM,
            HALF,
            H,
            REST,
        )
    else:
        heads = (part - Q_PARTS) * SIDE + tl.arange(0, SIDE)
        if k_norm is not None:
            k_norm += row * k_norm_row
        slot = tl.load(slots + token).to(tl.int64)
        store = (heads < KV_HEADS) & (slot >= 0)
        dv = tl.arange(0, DV)
        in_v = (dv < DIM_V)[None, :]
        values = tl.load(
            v + token * v_row + heads[:, None] * v_head + dv[None, :],
            mask=(heads < KV_HEADS)[:, None] & in_v,
        )
        tl.store(
            cache_v + slot * cache_v_slot + heads[:, None] * cache_v_head + dv[None, :],
            values,
            mask=store[:, None] & in_v,
        )
        _rotated(
            k + token * k_row + heads[:, None] * k_head,
            cache_k + slot * cache_k_slot + heads[:, None] * cache_k_head,
            heads < KV_HEADS,
            store,
            cos,
            sin,
            k_norm,
            eps,
            DIM,
            HALF,
            H,
            REST,
        )


@triton.jit
def _rotated(
    source,
    target,
    load,
    store,
    cos,
    sin,
    norm,
    eps,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    H: tl.constexpr,
    REST: tl.constexpr,
):
    """Heads at the pointers `source` [n, 1], normed and rotated, to the pointers `target`."""
    dtype = source.dtype.element_ty
    half = tl.arange(0, H)
    in_half = (half < HALF)[None, :]
    first = tl.load(source + half[None, :], mask=load[:, None] & in_half, other=0.0)
    second = tl.load(source + HALF + half[None, :], mask=load[:, None] & in_half, other=0.0)
    first = first.to(tl.float32)
    second = second.to(tl.float32)
    if REST:
        tail = 2 * HALF + tl.arange(0, REST)
        in_tail = (tail < DIM)[None, :]
        rest = tl.load(source + tail[None, :], mask=load[:, None] & in_tail, other=0.0)
        rest = rest.to(tl.float32)
    if norm is not None:
        if REST:
            square = tl.sum(first * first + second * second, 1) + tl.sum(rest * rest, 1)
            inverse = tl.rsqrt(square / DIM + eps)[:, None]
            first = _weighted(first * inverse, norm + half, half < HALF, dtype)
            second = _weighted(second * inverse, norm + HALF + half, half < HALF, dtype)
            rest = _weighted(rest * inverse, norm + tail, tail < DIM, dtype)
        else:
            first, second = normed_halves(first, second, norm, half, eps, dtype, DIM, HALF)
    first, second = turned_halves(first, second, cos[None, :], sin[None, :], dtype)
    mask = store[:, None] & in_half
    tl.store(target + half[None, :], first.to(dtype), mask=mask)
    tl.store(target + HALF + half[None, :], second.to(dtype), mask=mask)
    if REST:
        tl.store(target + tail[None, :], rest.to(dtype), mask=store[:, None] & in_tail)


@triton.jit
def normed_halves(
    first, second, norm, half, eps, dtype: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr
):
    """Halves float32 [n, H] of heads, RMS-normed with the weights at `norm`."""
    inverse = tl.rsqrt(tl.sum(first * first + second * second, 1) / DIM + eps)[:, None]
    first = _weighted(first * inverse, norm + half, half < HALF, dtype)
    second = _weighted(second * inverse, norm + HALF + half, half < HALF, dtype)
    return first, second


@triton.jit
def turned_halves(first, second, cos, sin, dtype: tl.constexpr):
    """Halves float32 [n, H] of heads, turned and rounded."""
    turned = _rounded(first * cos, dtype) - _rounded(second * sin, dtype)
    other = _rounded(second * cos, dtype) + _rounded(first * sin, dtype)
    return _rounded(turned, dtype), _rounded(other, dtype)


@triton.jit
def _weighted(x, weights, mask, dtype: tl.constexpr):
    """Rounded before and after the product, as modules in `dtype` do."""
    weight = tl.load(weights, mask=mask, other=0.0).to(tl.float32)
    return _rounded(_rounded(x, dtype) * weight[None, :], dtype)


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    return x.to(dtype).to(tl.float32)
