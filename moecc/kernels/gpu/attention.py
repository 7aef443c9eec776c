"""Attention over a paged KV cache: one query token a program row, or tiles of a long prompt."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moecc.kernels.gpu.launch import begin, counters, let_next_begin, overlap, wait

_PROGRAMS = 264  # two waves over an H100 or H200
_MOST_SPLITS = 32
_MERGED = 8192  # float32 values of partial results held in registers at once
LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)  # below every score, and finite: differences of it are no NaN


def attend(
    q: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    tables: Tensor,
    sequences: Tensor,
    lengths: Tensor,
    block_size: int,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    splits: int | None,
) -> Tensor:
    """As `kernels.attention.attend`."""
    rows, heads, dim = q.shape
    kv_heads, dim_v = cache_v.shape[1:]
    splits = splits_of(rows * kv_heads) if splits is None else splits
    out = q.new_empty(rows, heads, dim_v)
    _attend[(kv_heads, rows, splits)](
        q,
        cache_k,
        cache_v,
        tables,
        sequences,
        lengths,
        sinks,
        out,
        *shared(q, cache_v, splits),
        *q.stride()[:2],
        *cache_k.stride()[:2],
        *cache_v.stride()[:2],
        tables.stride(0),
        0 if sinks is None else sinks.stride(0),
        SCALING=scaling,
        WINDOW=window,
        SOFTCAP=softcap,
        BLOCK_SIZE=block_size,
        KV_HEADS=kv_heads,
        D=max(16, triton.next_power_of_2(dim)),
        **sizes(q, cache_v, splits),
        num_warps=4,
        num_stages=2,
        **overlap(q.device),
    )
    return out


def prefill(
    q: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    tables: Tensor,
    tiles: Tensor,
    tile_rows: int,
    lengths: Tensor,
    block_size: int,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """As `kernels.attention.prefill`, for `tiles` int32 [n, 3] of at most `tile_rows` rows."""
    rows, heads, dim = q.shape
    kv_heads, dim_v = cache_v.shape[1:]
    group = heads // kv_heads
    out = q.new_empty(rows, heads, dim_v)
    height = max(16, triton.next_power_of_2(tile_rows * group))
    widest = triton.next_power_of_2(max(dim, dim_v))
    _prefill[(kv_heads, len(tiles))](
        q,
        cache_k,
        cache_v,
        tables,
        tiles,
        lengths,
        sinks,
        out,
        *q.stride()[:2],
        *cache_k.stride()[:2],
        *cache_v.stride()[:2],
        tables.stride(0),
        0 if sinks is None else sinks.stride(0),
        SCALING=scaling,
        WINDOW=window,
        SOFTCAP=softcap,
        BLOCK_SIZE=block_size,
        HEADS=heads,
        GROUP=group,
        DIM=dim,
        DIM_V=dim_v,
        M=height,
        D=max(16, triton.next_power_of_2(dim)),
        DV=max(16, triton.next_power_of_2(dim_v)),
        CHUNK=64 if widest <= 256 else 16,
        num_warps=8 if height >= 128 else 4,
        num_stages=3 if widest <= 128 else 2,
        **overlap(q.device),
    )
    return out


def splits_of(programs: int) -> int:
    """How many programs share a query: a power of two that about fills the GPU."""
    wanted = max(1, min(_MOST_SPLITS, _PROGRAMS // max(1, programs)))
    return 1 << (wanted.bit_length() - 1)


def sizes(q: Tensor, cache_v: Tensor, splits: int) -> dict[str, int]:
    """What is settled of a launch for rows [rows, heads, dim], each shared by so many programs."""
    heads, dim = q.shape[1:]
    kv_heads, dim_v = cache_v.shape[1:]
    group = heads // kv_heads
    merged_heads, padded_v = triton.next_power_of_2(group), triton.next_power_of_2(dim_v)
    padded = max(triton.next_power_of_2(dim), padded_v)
    return {
        "GROUP": group,
        "DIM": dim,
        "DIM_V": dim_v,
        "M": max(16, merged_heads),
        "DV": max(16, padded_v),
        "CHUNK": 64 if padded <= 128 else 32 if padded <= 256 else 16,
        "SPLITS": splits,
        "MERGED_HEADS": merged_heads,
        "MERGED": min(splits, max(1, _MERGED // (merged_heads * padded_v))),
    }


def shared(
    q: Tensor, cache_v: Tensor, splits: int
) -> tuple[Tensor, Tensor, Tensor] | tuple[None, None, None]:
    """What programs that share rows need to find together: partial means, their sums, arrivals."""
    if splits == 1:
        return None, None, None
    rows, heads = q.shape[:2]
    kv_heads, dim_v = cache_v.shape[1:]
    items, group = rows * kv_heads, heads // kv_heads
    partial = q.new_empty(items, splits, group, dim_v, dtype=torch.float32)
    lses = q.new_empty(items, splits, group, dtype=torch.float32)
    return partial, lses, counters(q.device, max(1024, triton.next_power_of_2(items)))


@triton.jit
def _attend(
    q,
    cache_k,
    cache_v,
    tables,
    sequences,
    lengths,
    sinks,
    out,
    partial,
    lses,
    arrivals,
    q_row,
    q_head,
    k_slot,
    k_head,
    v_slot,
    v_head,
    table_row,
    sink_row,
    SCALING: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    MERGED_HEADS: tl.constexpr,
    MERGED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    let_next_begin(OVERLAP)
    kv_head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    length = tl.load(lengths + row)  # settled, as are the tables
    table = tables + tl.load(sequences + row).to(tl.int64) * table_row
    first = 0 if WINDOW is None else tl.maximum(length - WINDOW, 0)
    span = tl.maximum(tl.cdiv(tl.cdiv(length - first, SPLITS), CHUNK), 1) * CHUNK
    start = first + split * span
    stop = tl.minimum(start + span, length)
    block = blocks_of(table, start + tl.arange(0, CHUNK), stop, BLOCK_SIZE)
    wait(OVERLAP)
    if (split > 0) & (start >= length):
        return
    in_group = tl.arange(0, M)
    live = in_group < GROUP
    heads = kv_head * GROUP + in_group
    d = tl.arange(0, D)
    queries = tl.load(
        q + row * q_row + heads[:, None] * q_head + d[None, :],
        mask=live[:, None] & (d < DIM)[None, :],
        other=0.0,
    )
    top = tl.full([M], LOWEST, tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DV], tl.float32)
    top, total, acc = _scan(
        queries,
        top,
        total,
        acc,
        cache_k + kv_head * k_head,
        cache_v + kv_head * v_head,
        table,
        block,
        k_slot,
        v_slot,
        start,
        stop,
        stop,
        SCALING,
        None,
        SOFTCAP,
        BLOCK_SIZE,
        DIM,
        DIM_V,
        D,
        DV,
        CHUNK,
        True,
    )
    if sinks is not None:
        sinks += row * sink_row + kv_head * GROUP
    store_found(
        top, total, acc, sinks, out, partial, lses, arrivals, row * KV_HEADS + kv_head, split,
        tl.cdiv(length - first, span), GROUP, DIM_V, M, DV, SPLITS, MERGED_HEADS, MERGED,
    )  # fmt: skip


@triton.jit
def store_found(
    top,
    total,
    acc,
    sinks,
    out,
    partial,
    lses,
    arrivals,
    item,
    split,
    used,
    GROUP: tl.constexpr,
    DIM_V: tl.constexpr,
    M: tl.constexpr,
    DV: tl.constexpr,
    SPLITS: tl.constexpr,
    MERGED_HEADS: tl.constexpr,
    MERGED: tl.constexpr,
):
    """Writes what GROUP heads of a row find, from the state of the softmax (see `_scan`).

    Where `used` programs share them, what each found goes to `partial`, and the last one of all
    merges it. `item` counts the rows' groups, `split` the programs of one; the pointer `sinks` is
    of the group.
    """
    in_group = tl.arange(0, M)
    live = in_group < GROUP
    dv = tl.arange(0, DV)
    # The largest score's own weight is 1, so that the total is not less, unless nothing was seen.
    total = tl.maximum(total, 1.0)
    acc = acc / total[:, None]
    lse = top + tl.log2(total)
    store = live[:, None] & (dv < DIM_V)[None, :]
    places = (item * GROUP + in_group[:, None]) * DIM_V + dv[None, :]
    if SPLITS == 1:
        if sinks is not None:
            acc *= _beside_sinks(sinks + in_group, live, lse)[:, None]
        tl.store(out + places, acc, mask=store)
    else:
        if used <= 1:
            if sinks is not None:
                acc *= _beside_sinks(sinks + in_group, live, lse)[:, None]
            tl.store(out + places, acc, mask=store)
        else:
            partial += item * (SPLITS * GROUP * DIM_V)
            lses += item * (SPLITS * GROUP)
            inside = split * GROUP + in_group
            tl.store(partial + inside[:, None] * DIM_V + dv[None, :], acc, mask=store)
            tl.store(lses + inside, lse, mask=live)
            tl.debug_barrier()  # all of the program's stores come before it counts as arrived
            if tl.atomic_add(arrivals + item, 1, sem="acq_rel") == used - 1:
                tl.store(arrivals + item, 0)
                found = _merged(
                    partial, lses, sinks, used, GROUP, DIM_V, MERGED_HEADS, DV, SPLITS, MERGED
                )
                head = tl.arange(0, MERGED_HEADS)
                tl.store(
                    out + (item * GROUP + head[:, None]) * DIM_V + dv[None, :],
                    found,
                    mask=(head < GROUP)[:, None] & (dv < DIM_V)[None, :],
                )


@triton.jit
def _merged(
    partial,
    lses,
    sinks,
    used,
    GROUP: tl.constexpr,
    DIM_V: tl.constexpr,
    HEADS: tl.constexpr,
    DV: tl.constexpr,
    SPLITS: tl.constexpr,
    STEP: tl.constexpr,
):
    """What the first `used` splits found, together: float32 [HEADS, DV].

    `partial` [splits, GROUP, DIM_V] are softmax means, `lses` [splits, GROUP] the binary logarithms
    of their sums. Always in the order of the splits, whoever came last.
    """
    heads = tl.arange(0, HEADS)
    dv = tl.arange(0, DV)
    live = heads < GROUP
    every = tl.arange(0, SPLITS)
    every_lse = tl.load(
        lses + every[:, None] * GROUP + heads[None, :],
        mask=(every < used)[:, None] & live[None, :],
        other=LOWEST,
        cache_modifier=".cg",
    )
    top = tl.max(every_lse, 0)
    total = tl.sum(tl.exp2(every_lse - top[None, :]), 0)
    if sinks is not None:
        sink = tl.load(sinks + heads, mask=live, other=0.0).to(tl.float32) * LOG2_E
        total += tl.exp2(sink - top)
    acc = tl.zeros([HEADS, DV], tl.float32)
    for start in range(0, used, STEP):
        split = start + tl.arange(0, STEP)
        seen = (split < used)[:, None] & live[None, :]
        inside = split[:, None] * GROUP + heads[None, :]
        lse = tl.load(lses + inside, mask=seen, other=LOWEST, cache_modifier=".cg")
        found = tl.load(
            partial + inside[:, :, None] * DIM_V + dv[None, None, :],
            mask=seen[:, :, None] & (dv < DIM_V)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        acc += tl.sum(found * tl.exp2(lse - top[None, :])[:, :, None], 0)
    return acc / total[:, None]


@triton.jit
def _prefill(
    q,
    cache_k,
    cache_v,
    tables,
    tiles,
    lengths,
    sinks,
    out,
    q_row,
    q_head,
    k_slot,
    k_head,
    v_slot,
    v_head,
    table_row,
    sink_row,
    SCALING: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    CHUNK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    kv_head = tl.program_id(0)
    # The last tiles of a prompt see the most keys: they begin first.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    first = tl.load(tiles + tile * 3)
    count = tl.load(tiles + tile * 3 + 1)
    sequence = tl.load(tiles + tile * 3 + 2).to(tl.int64)
    # The group's heads stand side by side: every key that is read meets all of them.
    m = tl.arange(0, M)
    live = m // GROUP < count
    row = (first + m // GROUP).to(tl.int64)
    head = kv_head * GROUP + m % GROUP
    length = tl.load(lengths + row, mask=live, other=0)
    longest = tl.max(length, 0)
    shortest = tl.min(tl.where(live, length, longest), 0)
    d = tl.arange(0, D)
    dv = tl.arange(0, DV)
    queries = tl.load(
        q + row[:, None] * q_row + head[:, None] * q_head + d[None, :],
        mask=live[:, None] & (d < DIM)[None, :],
        other=0.0,
    )
    if WINDOW is not None:
        whole = tl.maximum(shortest - WINDOW, 0) // CHUNK * CHUNK
    else:
        whole = shortest // CHUNK * CHUNK
    cache_k += kv_head * k_head
    cache_v += kv_head * v_head
    tables += sequence * table_row
    top = tl.full([M], LOWEST, tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DV], tl.float32)
    if WINDOW is None:  # keys that all rows see
        top, total, acc = _scan(
            queries,
            top,
            total,
            acc,
            cache_k,
            cache_v,
            tables,
            blocks_of(tables, tl.arange(0, CHUNK), whole, BLOCK_SIZE),
            k_slot,
            v_slot,
            0,
            whole,
            whole,
            SCALING,
            None,
            SOFTCAP,
            BLOCK_SIZE,
            DIM,
            DIM_V,
            D,
            DV,
            CHUNK,
            False,
        )
    top, total, acc = _scan(
        queries,
        top,
        total,
        acc,
        cache_k,
        cache_v,
        tables,
        blocks_of(tables, whole + tl.arange(0, CHUNK), longest, BLOCK_SIZE),
        k_slot,
        v_slot,
        whole,
        longest,
        length[:, None],
        SCALING,
        WINDOW,
        SOFTCAP,
        BLOCK_SIZE,
        DIM,
        DIM_V,
        D,
        DV,
        CHUNK,
        True,
    )
    total = tl.maximum(total, 1.0)
    acc = acc / total[:, None]
    if sinks is not None:
        lse = top + tl.log2(total)
        acc *= _beside_sinks(sinks + row * sink_row + head, live, lse)[:, None]
    tl.store(
        out + row[:, None] * (HEADS * DIM_V) + head[:, None] * DIM_V + dv[None, :],
        acc,
        mask=live[:, None] & (dv < DIM_V)[None, :],
    )


@triton.jit
def _beside_sinks(sinks, live, lse):
    """The part of the attention that sinks at these pointers leave to the keys."""
    sink = tl.load(sinks, mask=live, other=0.0).to(tl.float32) * LOG2_E
    return 1 / (1 + tl.exp2(sink - lse))


@triton.jit
def _scan(
    queries,
    top,
    total,
    acc,
    cache_k,
    cache_v,
    table,
    block,
    k_slot,
    v_slot,
    start,
    stop,
    lengths,
    SCALING: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    CHUNK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Online softmax over the keys `start..stop` of a sequence.

    Its state is the largest score `top` in binary logarithms, the `total` of the weights and their
    sum of values `acc`. `block` has the blocks of the first chunk, as each step reads those of the
    next: so keys and values wait for nothing in their turn. Unmasked, the range is of whole chunks
    that every query sees; otherwise a query sees keys below its length (one for all, or
    [queries, 1]), the last WINDOW of them.
    """
    d = tl.arange(0, D)
    dv = tl.arange(0, DV)
    keys = start + tl.arange(0, CHUNK)
    for _ in range(start, stop, CHUNK):
        slot = block.to(tl.int64) * BLOCK_SIZE + keys % BLOCK_SIZE
        k_mask = (d < DIM)[:, None]
        v_mask = (dv < DIM_V)[None, :]
        if MASKED:
            k_mask &= (keys < stop)[None, :]
            v_mask &= (keys < stop)[:, None]
        k = tl.load(cache_k + slot[None, :] * k_slot + d[:, None], mask=k_mask, other=0.0)
        v = tl.load(cache_v + slot[:, None] * v_slot + dv[None, :], mask=v_mask, other=0.0)
        scores = tl.dot(queries, k)
        if SOFTCAP is not None:  # tanh(x) = 1 - 2 / (1 + exp(2 x))
            scores = 1 - 2 / (1 + tl.exp2(scores * (2 * SCALING / SOFTCAP * LOG2_E)))
            scores *= SOFTCAP * LOG2_E
        else:
            scores *= SCALING * LOG2_E
        if MASKED:
            seen = keys[None, :] < lengths
            if WINDOW is not None:
                seen &= keys[None, :] >= lengths - WINDOW
            scores = tl.where(seen, scores, float("-inf"))
        top, total, acc = with_chunk(scores, v, top, total, acc)
        keys += CHUNK
        block = blocks_of(table, keys, stop, BLOCK_SIZE)
    return top, total, acc


@triton.jit
def with_chunk(scores, values, top, total, acc):
    """The state of the softmax (see `_scan`) with another chunk of keys: [M], [M], [M, DV].

    `scores` float32 [M, CHUNK] are binary logarithms, `values` are [CHUNK, DV].
    """
    new_top = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - new_top[:, None])
    decay = tl.exp2(top - new_top)
    total = total * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(values.dtype), values, acc * decay[:, None])
    return new_top, total, acc


@triton.jit
def blocks_of(table, keys, stop, BLOCK_SIZE: tl.constexpr):
    """The blocks of the cache that hold some keys of a sequence."""
    return tl.load(table + keys // BLOCK_SIZE, mask=keys < stop, other=0)
