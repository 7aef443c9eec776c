"""Attention of one row with its own key and value, which it also turns and stores.

A row on its own leaves most of a GPU idle: what counts is how long its launches wait for each
other. Here norm, rotation, cache and attention are one, and earlier keys and values are loaded
before the row itself is there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moecc.kernels.gpu.attention import _LOG2_E, _LOWEST, _MERGED, _blocks, _merged, _splits
from moecc.kernels.gpu.launch import counters, let_next_begin, overlap, wait
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
    group, half = heads // kv_heads, dim // 2
    splits = _splits(kv_heads)
    out = q.new_empty(1, heads, dim_v)
    padded = triton.next_power_of_2(max(dim, dim_v))
    merged = max(1, _MERGED // (triton.next_power_of_2(group) * triton.next_power_of_2(dim_v)))
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
        q.new_empty(kv_heads, splits, group, dim_v, dtype=torch.float32),
        q.new_empty(kv_heads, splits, group, dtype=torch.float32),
        counters(q.device, max(1024, triton.next_power_of_2(kv_heads))),
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
        GROUP=group,
        DIM=dim,
        DIM_V=dim_v,
        M=max(16, triton.next_power_of_2(group)),
        H=max(16, triton.next_power_of_2(half)),
        DV=max(16, triton.next_power_of_2(dim_v)),
        CHUNK=64 if padded <= 128 else 32 if padded <= 256 else 16,
        SPLITS=splits,
        MERGED_HEADS=triton.next_power_of_2(group),
        MERGED=min(merged, splits),
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
    block = _blocks(table, keys, stop, BLOCK_SIZE)
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

    top = tl.full([M], _LOWEST, tl.float32)
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
        top = tl.sum(q_first * own_first + q_second * own_second, 1) * (SCALING * _LOG2_E)
        total += 1.0
        acc += own_value.to(tl.float32)[None, :]

    top, total, acc = _met(q_first, q_second, k_first, k_second, values, keys < stop, top, total,
                           acc, SCALING, dtype)  # fmt: skip
    for at in tl.range(start + CHUNK, stop, CHUNK, num_stages=2):
        keys = at + tl.arange(0, CHUNK)
        block = _blocks(table, keys, stop, BLOCK_SIZE)
        k_first, k_second, values = _chunk(
            cache_k, cache_v, keys, block, stop, cache_k_slot, cache_v_slot,
            BLOCK_SIZE, HALF, DIM_V, H, DV,
        )  # fmt: skip
        top, total, acc = _met(q_first, q_second, k_first, k_second, values, keys < stop, top,
                               total, acc, SCALING, dtype)  # fmt: skip
    # As in `attention`: the largest score's own weight is 1, unless nothing was seen.
    total = tl.maximum(total, 1.0)
    acc = acc / total[:, None]
    store = live[:, None] & in_v[None, :]
    used = tl.cdiv(earlier - first, span)
    if used <= 1:
        heads = kv_head * GROUP + in_group[:, None]
        tl.store(out + heads * DIM_V + dv[None, :], acc, mask=store)
    else:
        partial += kv_head * (SPLITS * GROUP * DIM_V)
        lses += kv_head * (SPLITS * GROUP)
        inside = split * GROUP + in_group
        tl.store(partial + inside[:, None] * DIM_V + dv[None, :], acc, mask=store)
        tl.store(lses + inside, top + tl.log2(total), mask=live)
        tl.debug_barrier()  # all of the program's stores come before it counts as arrived
        if tl.atomic_add(arrivals + kv_head, 1, sem="acq_rel") == used - 1:
            tl.store(arrivals + kv_head, 0)
            found = _merged(
                partial, lses, None, used, GROUP, DIM_V, MERGED_HEADS, DV, SPLITS, MERGED
            )
            head = tl.arange(0, MERGED_HEADS)
            tl.store(
                out + (kv_head * GROUP + head[:, None]) * DIM_V + dv[None, :],
                found,
                mask=(head < GROUP)[:, None] & in_v[None, :],
            )


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
    scores = tl.dot(q_second.to(dtype), k_second, scores) * (SCALING * _LOG2_E)
    scores = tl.where(seen[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - new_top[:, None])
    decay = tl.exp2(top - new_top)
    total = total * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(dtype), values, acc * decay[:, None])
    return new_top, total, acc


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
