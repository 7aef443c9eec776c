"""Items sorted into blocks: a program places some items, and looks at the keys of all."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moecc.kernels.gpu.launch import begin, overlap

_COMPARED = 16384  # pairs of a program
_MOST_PLACED = 32  # items of a program


def align(ids: Tensor, tables: Tensor, block: int, blocks: int, keys: int) -> tuple[Tensor, Tensor]:
    """As `kernels.align.align`, for some thousand items and keys."""
    groups, width = tables.shape
    count = len(ids)
    order = torch.empty(groups, blocks * block, dtype=torch.int32, device=ids.device)
    owners = torch.empty(groups, blocks, dtype=torch.int32, device=ids.device)
    padded = max(16, triton.next_power_of_2(count))
    part = min(_MOST_PLACED, padded, max(1, _COMPARED // padded))
    _align[(triton.cdiv(count, part), groups)](
        ids,
        tables,
        order,
        owners,
        count,
        width,
        blocks,
        BLOCK=block,
        N=padded,
        PART=part,
        KEYS=max(16, triton.next_power_of_2(keys)),
        num_warps=4,
        **overlap(ids.device),
    )
    return order, owners


@triton.jit
def _keys(ids, tables, items, count):
    known = tl.load(ids + items, mask=items < count, other=-1)
    return tl.load(tables + known, mask=known >= 0, other=-1)


@triton.jit
def _align(
    ids,
    tables,
    order,
    owners,
    count,
    width,
    blocks,
    BLOCK: tl.constexpr,
    N: tl.constexpr,
    PART: tl.constexpr,
    KEYS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    group = tl.program_id(1)
    tables += group * width
    order += group * blocks * BLOCK
    owners += group * blocks
    j = tl.arange(0, N)
    keys = _keys(ids, tables, j, count)
    i = tl.program_id(0) * PART + tl.arange(0, PART)
    mine = _keys(ids, tables, i, count)
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
