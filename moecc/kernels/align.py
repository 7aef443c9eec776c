"""Sorts work by the weights it needs, so that each weight is read once for all who share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moecc.kernels.device import has_kernels

# More are sorted by torch: then there is so much work that some launches do not matter.
_MOST_ITEMS, _MOST_KEYS = 4096, 8192


@dataclass(frozen=True, slots=True, eq=False)
class Order:
    """Item `i` has the key `table[ids[i]]`; a negative key, or id, leaves it out.

    `table` is int32 [any], its keys are below `keys`, and `block` items of a key are a block.
    """

    table: Tensor
    block: int
    keys: int


def most_blocks(count: int, block: int, keys: int) -> int:
    """The most blocks that `count` items with one of `keys` keys can fill, or begin."""
    return min(count, count // block + min(count, keys))


def align(ids: Tensor, orders: Sequence[Order]) -> list[tuple[Tensor, Tensor]]:
    """Groups the items `ids` int32 [n] by key, each group padded to whole blocks, in every order.

    Returns for each `order` int32 [blocks * block], the items (-1: padding), and `owners` int32
    [blocks], each block's key (-1: unused, after all that are used); items of a key are in their
    order. Nothing here waits for the device.
    """
    few = len(ids) <= _MOST_ITEMS and all(order.keys <= _MOST_KEYS for order in orders)
    if has_kernels(ids.device) and few:
        from moecc.kernels.gpu.align import align as launch

        return launch(ids, orders)
    known = ids.clamp(min=0).long()
    return [
        _aligned(
            order.table[known].where(ids >= 0, -1),
            order.block,
            most_blocks(len(ids), order.block, order.keys),
        )
        for order in orders
    ]


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
