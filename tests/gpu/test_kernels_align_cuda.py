"""The kernel that sorts items into blocks; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from test_kernels_align import check, ints
from torch import Tensor

from moecc.kernels.align import Order, align
from moecc.kernels.device import INTERPRETED

pytest.importorskip("triton")

DEVICE = "cpu" if INTERPRETED else "cuda"
COUNTS = (1, 7, 300) if INTERPRETED else (1, 2, 7, 64, 300, 1000, 1024, 1025, 5000)

pytestmark = [
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("poisoned"),
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("block", [4, 16, 128])
@pytest.mark.parametrize("count", COUNTS)
def test_kernel(count: int, block: int) -> None:
    for width, keys in ((1, 1), (8, 8), (128, 100), (700, 30)):
        for orders in (1, 2, 3):  # two in a launch
            ids = torch.randint(-1, width, (count,), dtype=torch.int32, device=DEVICE)
            sizes = [(block, keys), (16, 2 * keys), (4, keys)][:orders]
            check(ids, [Order(table(width, most), size, most) for size, most in sizes])


def table(width: int, keys: int) -> Tensor:
    return torch.randint(-1, keys, (width,), dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("id", [-1, 0, 1])
def test_all_alike(id: int) -> None:
    for count in COUNTS:
        ids = torch.full((count,), id, dtype=torch.int32, device=DEVICE)
        check(ids, [Order(ints(keys, DEVICE), 16, 3) for keys in ([2, -1], [-1, 0])])


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("count", [60, 2000])
def test_graph_sees_new_ids(count: int) -> None:
    torch.use_deterministic_algorithms(False)  # fills would keep launches apart
    ids = torch.zeros(count, dtype=torch.int32, device=DEVICE)
    orders = [Order(table(20, 9), 16, 9), Order(table(20, 5), 4, 5)]
    align(ids, orders)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = align(ids, orders)
    for _ in range(5):
        ids.copy_(torch.randint(-1, 20, (count,)))
        graph.replay()
        for wished, (order, owners) in zip(orders, found, strict=True):
            owner = owners.repeat_interleave(wished.block)
            kept = (order >= 0) & (owner >= 0)
            items = order[kept].long()
            keys = wished.table[ids.clamp(min=0).long()].where(ids >= 0, -1)
            assert torch.equal(items.sort()[0], (keys >= 0).nonzero()[:, 0])
            assert torch.equal(owner[kept], keys[items])
