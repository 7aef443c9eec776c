"""Items sorted into blocks: a program places some items, and looks at the keys of all."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from moecc.kernels.align import Order, most_blocks
from moecc.kernels.gpu.launch import begin, overlap

_COMPARED = 16384  # pairs of a program
_MOST_PLACED = 32  # items of a program


def align(ids: Tensor, orders: Sequence[Order]) -> list[tuple[Tensor, Tensor]]:
    """As `kernels.align.align`, for some thousand items and keys."""
    count = len(ids)
    padded = max(16, triton.next_power_of_2(count))
    part = min(_MOST_PLACED, padded, max(1, _COMPARED // padded))
    found = []
    for index in range(0, len(orders), 2):  # a launch for two, which mostly are all
        pair = orders[index : index + 2]
        new = [_blocks(ids, most_blocks(count, o.block, o.keys), o.block) for o in pair]
        _align[(triton.cdiv(count, part), len(pair))](
            ids,
            pair[0].table,
            *new[0],
            len(new[0][1]),
            pair[-1].table,
            *new[-1],
            len(new[-1][1]),
            count,
            BLOCK=pair[0].block,
            SECOND_BLOCK=pair[-1].block,
            KEYS=_keys_of(pair[0]),
            SECOND_KEYS=_keys_of(pair[-1]),
            ORDERS=len(pair),
            N=padded,
            PART=part,
            num_warps=4,
            **overlap(ids.device),
        )
        found += new
    return found


def _blocks(like: Tensor, blocks: int, block: int) -> tuple[Tensor, Tensor]:
    return like.new_empty(blocks * block), like.new_empty(blocks)


def _keys_of(order: Order) -> int:
    """How many there are room for."""
    return max(16, 1 << (order.keys - 1).bit_length())


@triton.jit
def _keys(ids, table, items, count):
    known = tl.load(ids + items, mask=items < count, other=-1)
    return tl.load(table + known, mask=known >= 0, other=-1)


@triton.jit
def _align(
    ids,
    table,
    order,
    owners,
    blocks,
    second_table,
    second_order,
    second_owners,
    second_blocks,
    count,
    BLOCK: tl.constexpr,
    SECOND_BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    SECOND_KEYS: tl.constexpr,
    ORDERS: tl.constexpr,
    N: tl.constexpr,
    PART: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    if ORDERS == 1 or tl.program_id(1) == 0:
        _place(ids, table, order, owners, blocks, count, BLOCK, KEYS, N, PART)
    else:
        _place(
            ids, second_table, second_order, second_owners, second_blocks, count,
            SECOND_BLOCK, SECOND_KEYS, N, PART,
        )  # fmt: skip


@triton.jit
def _place(
    ids,
    table,
    order,
    owners,
    blocks,
    count,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    N: tl.constexpr,
    PART: tl.constexpr,
):
    j = tl.arange(0, N)
    keys = _keys(ids, table, j, count)
    i = tl.program_id(0) * PART + tl.arange(0, PART)
    mine = _keys(ids, table, i, count)
    kept = mine >= 0
    # Every program counts all items: that is quicker than to wait for each other.
    counts = tl.histogram(tl.maximum(keys, 0), KEYS, mask=keys >= 0)
    filled = (counts + BLOCK - 1) // BLOCK
    first = tl.gather(tl.cumsum(filled, 0) - filled, tl.maximum(mine, 0), 0)
    of_key = tl.gather(counts, tl.maximum(mine, 0), 0)
    same = (mine[None, :] == keys[:, None]) & (j[:, None] < i[None, :])
    rank = tl.sum(same.to(tl.int32), 0)
    block = first + rank // BLOCK
    column = rank % BLOCK
    tl.store(owners + block, mine, mask=kept & (column == 0))
    tl.store(order + block * BLOCK + column, i, mask=kept)
    # The last of a key pads its block; blocks of no key are shared out.
    columns = tl.arange(0, BLOCK)[None, :]
    last = kept & (rank == of_key - 1)
    places = order + block[:, None] * BLOCK + columns
    tl.store(places, -1, mask=last[:, None] & (columns > column[:, None]))
    used = tl.sum(filled, 0)
    for start in range(used + tl.program_id(0) * PART, blocks, tl.num_programs(0) * PART):
        unused = start + tl.arange(0, PART)
        tl.store(owners + unused, -1, mask=unused < blocks)
        places = order + unused[:, None] * BLOCK + columns
        tl.store(places, tl.full([PART, BLOCK], -1, tl.int32), mask=(unused < blocks)[:, None])
