"""Items sorted into blocks of one key: every item that has a key is in one, once."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moecc.kernels import align as module
from moecc.kernels.align import Order, align, most_blocks

Drawn = tuple[list[int], list[tuple[list[int], int, int]]]


def check(ids: Tensor, orders: list[Order]) -> None:
    """What `align` says it gives, but for the order within a key."""
    for wished, (items, owners) in zip(orders, align(ids, orders), strict=True):
        table, block = wished.table.tolist(), wished.block
        blocks = most_blocks(len(ids), block, wished.keys)
        assert (items.dtype, owners.dtype) == (torch.int32, torch.int32)
        assert (items.shape, owners.shape) == ((blocks * block,), (blocks,))
        order, owner = items.view(blocks, block).tolist(), owners.tolist()
        wanted = defaultdict(list)
        for item, id in enumerate(ids.tolist()):
            if id >= 0 and table[id] >= 0:
                wanted[table[id]].append(item)
        used = sum(key >= 0 for key in owner)
        assert owner[used:] == [-1] * (blocks - used)
        assert Counter(owner[:used]) == {key: -(-len(i) // block) for key, i in wanted.items()}
        found = defaultdict(list)
        for key, items in zip(owner[:used], order, strict=False):
            found[key] += [item for item in items if item >= 0]
        assert {key: sorted(items) for key, items in found.items()} == wanted


def ints(values: list[int], device: str = "cpu") -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


@st.composite
def drawn(draw: st.DrawFn, most: int = 200) -> Drawn:
    """Ids; tables, sizes of a block, and how many keys there are."""
    width = draw(st.integers(1, 50))
    ids, orders = draw(st.lists(st.integers(-1, width - 1), min_size=1, max_size=most)), []
    for keys in draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)):
        table = draw(st.lists(st.integers(-1, keys - 1), min_size=width, max_size=width))
        orders.append((table, draw(st.sampled_from([1, 4, 16, 128])), keys))
    return ids, orders


@settings(max_examples=150, deadline=None)
@given(drawn())
def test_any(drawn: Drawn) -> None:
    ids, orders = drawn
    check(ints(ids), [Order(ints(table), block, keys) for table, block, keys in orders])


def test_values() -> None:
    ((order, owners),) = align(ints([3, 0, -1, 3, 1, 3, 2]), [Order(ints([5, -1, 1, 5]), 4, 6)])
    found = {
        key: sorted(items)
        for key, items in zip(owners.tolist(), order.view(-1, 4).tolist(), strict=True)
    }
    assert found == {1: [-1, -1, -1, 6], 5: [0, 1, 3, 5], -1: [-1] * 4}


@pytest.mark.parametrize("ids", [[-1, -1, -1], [1, 1, 1]])
def test_nothing_is_kept(ids: list[int]) -> None:
    ((order, owners),) = align(ints(ids), [Order(ints([0, -1]), 2, 1)])
    assert (order == -1).all()
    assert (owners == -1).all()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.integers(1, 32))
def test_most_blocks(sizes: list[int], block: int) -> None:
    """However many items each key has."""
    used = sum(-(-size // block) for size in sizes)
    assert used <= most_blocks(sum(sizes), block, len(sizes))


def test_kernels_run_where_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from moecc.kernels.gpu import align as gpu

    monkeypatch.setattr(gpu, "align", lambda *arguments: arguments)
    monkeypatch.setattr(module, "has_kernels", lambda device: True)
    orders = [Order(ints([0, 0]), 2, 1)]
    assert align(ints([0, 1]), orders)[1] is orders
