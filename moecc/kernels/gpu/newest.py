"""Attention of one row with its own key and value, which it also turns and stores.

A row on its own leaves most of a GPU idle: what counts is how long its launches wait for each
other. Here norm, rotation, cache and attention are one, and earlier keys and values are loaded
before the row itself is there.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moecc.kernels.gpu.attention import (
    LOG2_E,
    LOWEST,
    blocks_of,
    shared,
    sizes,
    splits_of,
    store_found,
    with_chunk,
)
from moecc.kernels.gpu.launch import let_next_begin, overlap, wait
from moecc.kernels.gpu.rotary import normed_halves, turned_halves


def attend_newest(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inv_freq: Tensor,
    positions: Tensor,
    slots: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    tables: Tensor,
    sequences: Tensor,
    lengths: Tensor,
    *,
    rows: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    attention_scaling: float,
    block_size: int,
    scaling: float,
    window: int | None,
) -> Tensor:
    """As `kernels.newest.attend_newest`, for one row whose heads are turned as a whole."""
    heads, dim = q.shape[1:]
    kv_heads, dim_v = v.shape[1:]
    splits = splits_of(kv_heads)
    out = q.new_empty(1, heads, dim_v)
    _attend_newest[(kv_heads, splits)](
        q,
        k,
        v,
        inv_freq,
        positions,
        slots,
        cache_k,
        cache_v,
        tables,
        sequences,
        lengths,
        rows,
        q_norm,
        k_norm,
        out,
        *shared(q, cache_v, splits),
        eps,
        attention_scaling,
        q.stride(1),
        k.stride(1),
        v.stride(1),
        *cache_k.stride()[:2],
        *cache_v.stride()[:2],
        tables.stride(0),
        inv_freq.stride(0),
        0 if q_norm is None else q_norm.stride(0),
        0 if k_norm is None else k_norm.stride(0),
        SCALING=scaling,
        WINDOW=window,
        BLOCK_SIZE=block_size,
        H=max(16, triton.next_power_of_2(dim // 2)),
        **sizes(q, cache_v, splits),
        num_warps=4,
        enable_fp_fusion=False,  # it would fuse a product with a sum of the rotation
        **overlap(q.device),
    )
    return out


@triton.jit
def _attend_newest(
    q,
    k,
    v,
    inv_freq,
    positions,
    slots,
    cache_k,
    cache_v,
    tables,
    sequences,
    lengths,
    rows,
    q_norm,
    k_norm,
    out,
    partial,
    lses,
    arrivals,
    eps,
    attention_scaling,
    q_head,
    k_head,
    v_head,
    cache_k_slot,
    cache_k_head,
    cache_v_slot,
    cache_v_head,
    table_row,
    freq_row,
    q_norm_row,
    k_norm_row,
    SCALING: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    M: tl.constexpr,
    H: tl.constexpr,
    DV: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    MERGED_HEADS: tl.constexpr,
    MERGED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    let_next_begin(OVERLAP)
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    HALF: tl.constexpr = DIM // 2
    dtype = q.dtype.element_ty
    half = tl.arange(0, H)
    in_half = half < HALF
    dv = tl.arange(0, DV)
    in_v = dv < DIM_V
    # Settled: all but the row's own queries, keys and values.
    row = tl.load(rows).to(tl.int64)
    length = tl.load(lengths)
    table = tables + tl.load(sequences).to(tl.int64) * table_row
    angles = tl.load(positions).to(tl.float32) * tl.load(
        inv_freq + row * freq_row + half, mask=in_half, other=0.0
    )
    cos = (tl.cos(angles) * attention_scaling).to(dtype).to(tl.float32)
    sin = (tl.sin(angles) * attention_scaling).to(dtype).to(tl.float32)
    earlier = length - 1  # keys before its own
    first = 0 if WINDOW is None else tl.maximum(length - WINDOW, 0)
    span = tl.maximum(tl.cdiv(tl.cdiv(earlier - first, SPLITS), CHUNK), 1) * CHUNK
    start = first + split * span
    stop = tl.minimum(start + span, earlier)
    cache_k += kv_head * cache_k_head
    cache_v += kv_head * cache_v_head
    keys = start + tl.arange(0, CHUNK)
    block = blocks_of(table, keys, stop, BLOCK_SIZE)
    k_first, k_second, values = _chunk(
        cache_k, cache_v, keys, block, stop, cache_k_slot, cache_v_slot,
        BLOCK_SIZE, HALF, DIM_V, H, DV,
    )  # fmt: skip
    wait(OVERLAP)
    if (split > 0) & (start >= earlier):
        return

    in_group = tl.arange(0, M)
    live = in_group < GROUP
    lines = q + (kv_head * GROUP + in_group[:, None]) * q_head + half[None, :]
    mask = live[:, None] & in_half[None, :]
    q_first = tl.load(lines, mask=mask, other=0.0).to(tl.float32)
    q_second = tl.load(lines + HALF, mask=mask, other=0.0).to(tl.float32)
    if q_norm is not None:
        q_norm += row * q_norm_row
        q_first, q_second = normed_halves(q_first, q_second, q_norm, half, eps, dtype, DIM, HALF)
    q_first, q_second = turned_halves(q_first, q_second, cos[None, :], sin[None, :], dtype)

    top = tl.full([M], LOWEST, tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DV], tl.float32)
    if (split == 0) & (length > 0):
        line = k + kv_head * k_head + half
        own_first = tl.load(line, mask=in_half, other=0.0).to(tl.float32)[None, :]
        own_second = tl.load(line + HALF, mask=in_half, other=0.0).to(tl.float32)[None, :]
        if k_norm is not None:
            k_norm += row * k_norm_row
            own_first, own_second = normed_halves(
                own_first, own_second, k_norm, half, eps, dtype, DIM, HALF
            )
        own_first, own_second = turned_halves(
            own_first, own_second, cos[None, :], sin[None, :], dtype
        )
        own_value = tl.load(v + kv_head * v_head + dv, mask=in_v, other=0.0)
        slot = tl.load(slots).to(tl.int64)
        if slot >= 0:
            place = cache_k + slot * cache_k_slot + half[None, :]
            tl.store(place, own_first.to(dtype), mask=in_half[None, :])
            tl.store(place + HALF, own_second.to(dtype), mask=in_half[None, :])
            tl.store(cache_v + slot * cache_v_slot + dv, own_value, mask=in_v)
        top = tl.sum(q_first * own_first + q_second * own_second, 1) * (SCALING * LOG2_E)
        total += 1.0
        acc += own_value.to(tl.float32)[None, :]

    top, total, acc = _met(q_first, q_second, k_first, k_second, values, keys < stop, top, total,
                           acc, SCALING, dtype)  # fmt: skip
    for at in tl.range(start + CHUNK, stop, CHUNK, num_stages=2):
        keys = at + tl.arange(0, CHUNK)
        block = blocks_of(table, keys, stop, BLOCK_SIZE)
        k_first, k_second, values = _chunk(
            cache_k, cache_v, keys, block, stop, cache_k_slot, cache_v_slot,
            BLOCK_SIZE, HALF, DIM_V, H, DV,
        )  # fmt: skip
        top, total, acc = _met(q_first, q_second, k_first, k_second, values, keys < stop, top,
                               total, acc, SCALING, dtype)  # fmt: skip
    store_found(
        top, total, acc, None, out, partial, lses, arrivals, kv_head, split,
        tl.cdiv(earlier - first, span), GROUP, DIM_V, M, DV, SPLITS, MERGED_HEADS, MERGED,
    )  # fmt: skip


@triton.jit
def _met(
    q_first,
    q_second,
    k_first,
    k_second,
    values,
    seen,
    top,
    total,
    acc,
    SCALING: tl.constexpr,
    dtype: tl.constexpr,
):
    """The state of the softmax (see `attention._scan`) with the keys of a chunk that are seen."""
    scores = tl.dot(q_first.to(dtype), k_first)
    scores = tl.dot(q_second.to(dtype), k_second, scores) * (SCALING * LOG2_E)
    scores = tl.where(seen[None, :], scores, float("-inf"))
    return with_chunk(scores, values, top, total, acc)


@triton.jit
def _chunk(
    cache_k,
    cache_v,
    keys,
    block,
    stop,
    k_slot,
    v_slot,
    BLOCK_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    DIM_V: tl.constexpr,
    H: tl.constexpr,
    DV: tl.constexpr,
):
    """Both halves of keys [H, keys], and values [keys, DV], of those before `stop`."""
    half = tl.arange(0, H)
    dv = tl.arange(0, DV)
    slot = block.to(tl.int64) * BLOCK_SIZE + keys % BLOCK_SIZE
    seen = keys < stop
    lines = cache_k + slot[None, :] * k_slot + half[:, None]
    mask = (half < HALF)[:, None] & seen[None, :]
    first = tl.load(lines, mask=mask, other=0.0)
    second = tl.load(lines + HALF, mask=mask, other=0.0)
    lines = cache_v + slot[:, None] * v_slot + dv[None, :]
    values = tl.load(lines, mask=seen[:, None] & (dv < DIM_V)[None, :], other=0.0)
    return first, second, values
