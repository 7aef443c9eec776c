"""Sorts work by the weights it needs, so that each weight is read once for all who share it."""

from __future__ import annotations

import torch
from torch import Tensor

from moecc.kernels.device import has_kernels

# More are sorted by torch: then there is so much work that some launches do not matter.
_MOST_ITEMS, _MOST_KEYS = 4096, 8192


def most_blocks(count: int, block: int, keys: int) -> int:
    """The most blocks that `count` items with one of `keys` keys can fill, or begin."""
    return min(count, count // block + min(count, keys))


def align(ids: Tensor, tables: Tensor, block: int, keys: int) -> tuple[Tensor, Tensor]:
    """Groups items by key, each group padded to blocks of `block`; once for every table.

    Item `i` has the key `tables[g, ids[i]]`; a negative key, or id, leaves it out. `ids` is int32
    [n] and `tables` int32 [G, any], whose keys are below `keys`. Returns `order` int32
    [G, blocks * block], the items (-1: padding), and `owners` int32 [G, blocks], each block's key
    (-1: unused, after all that are used); items of a key are in their order. Nothing here waits
    for the device.
    """
    blocks = most_blocks(len(ids), block, keys)
    if has_kernels(ids.device) and len(ids) <= _MOST_ITEMS and keys <= _MOST_KEYS:
        from moecc.kernels.gpu.align import align as launch

        return launch(ids, tables, block, blocks, keys)
    known = ids.clamp(min=0).long()
    found = [_aligned(table[known].where(ids >= 0, -1), block, blocks) for table in tables]
    return torch.stack([order for order, _ in found]), torch.stack([own for _, own in found])


def _aligned(keys: Tensor, block: int, blocks: int) -> tuple[Tensor, Tensor]:
    out = len(keys)  # what is left out goes behind the end, and is cut off
    ordered, items = torch.where(keys < 0, torch.iinfo(torch.int32).max, keys).sort(stable=True)
    kept = ordered != torch.iinfo(torch.int32).max
    rank = torch.arange(out, device=keys.device) - torch.searchsorted(ordered, ordered)
    begins = (rank % block == 0) & kept
    place = begins.cumsum(0) - 1
    order = keys.new_full((blocks * block + 1,), -1)
    owners = keys.new_full((blocks + 1,), -1)
    ends = torch.full_like(place, blocks)
    order.scatter_(
        0, torch.where(kept, place * block + rank % block, blocks * block), items.to(torch.int32)
    )
    owners.scatter_(0, torch.where(begins, place, ends), ordered)
    return order[:-1], owners[:-1]
