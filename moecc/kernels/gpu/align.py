"""Items sorted into blocks by one program a table: ranks by comparing all with all."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_COMPARED = 8192  # pairs held in registers at once


def align(ids: Tensor, tables: Tensor, block: int, blocks: int) -> tuple[Tensor, Tensor]:
    """As `kernels.align.align`, for at most 1024 items."""
    groups, width = tables.shape
    count = len(ids)
    order = torch.empty(groups, blocks * block, dtype=torch.int32, device=ids.device)
    owners = torch.empty(groups, blocks, dtype=torch.int32, device=ids.device)
    ranks = torch.empty(groups, count, dtype=torch.int32, device=ids.device)
    padded = max(16, triton.next_power_of_2(count))
    _align[(groups,)](
        ids,
        tables,
        ranks,
        order,
        owners,
        count,
        width,
        blocks,
        BLOCK=block,
        N=padded,
        CHUNK=max(1, min(padded, _COMPARED // padded)),
        num_warps=4,
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
    ranks,
    order,
    owners,
    count,
    width,
    blocks,
    BLOCK: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    group = tl.program_id(0)
    tables += group * width
    ranks += group * count
    order += group * blocks * BLOCK
    owners += group * blocks
    j = tl.arange(0, N)
    keys = _keys(ids, tables, j, count)
    for start in range(0, blocks * BLOCK, N):
        tl.store(order + start + j, -1, mask=start + j < blocks * BLOCK)
        tl.store(owners + start + j, -1, mask=start + j < blocks)
    for start in range(0, count, CHUNK):
        i = start + tl.arange(0, CHUNK)
        mine = _keys(ids, tables, i, count)
        same = (mine[:, None] == keys[None, :]) & (j[None, :] < i[:, None])
        tl.store(ranks + i, tl.sum(same.to(tl.int32), 1), mask=i < count)
    tl.debug_barrier()
    rank = tl.load(ranks + j, mask=j < count, other=1)
    begins = (rank % BLOCK == 0) & (keys >= 0)
    for start in range(0, count, CHUNK):
        i = start + tl.arange(0, CHUNK)
        mine = _keys(ids, tables, i, count)
        own = tl.load(ranks + i, mask=i < count, other=0)
        before = begins[None, :] & (keys[None, :] < mine[:, None])
        place = tl.sum(before.to(tl.int32), 1) + own // BLOCK
        tl.store(order + place * BLOCK + own % BLOCK, i, mask=mine >= 0)
        tl.store(owners + place, mine, mask=(mine >= 0) & (own % BLOCK == 0))
