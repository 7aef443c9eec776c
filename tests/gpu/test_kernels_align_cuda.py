"""The kernel that sorts items into blocks; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from test_kernels_align import check, ints

from moecc.kernels.align import align
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
        for groups in (1, 2):
            ids = torch.randint(-1, width, (count,), dtype=torch.int32, device=DEVICE)
            tables = torch.randint(-1, keys, (groups, width), dtype=torch.int32, device=DEVICE)
            check(ids, tables, block, keys)


@pytest.mark.parametrize("id", [-1, 0, 1])
def test_all_alike(id: int) -> None:
    for count in COUNTS:
        ids = torch.full((count,), id, dtype=torch.int32, device=DEVICE)
        check(ids, ints([[2, -1], [-1, 0]], DEVICE), 16, 3)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("count", [60, 2000])
def test_graph_sees_new_ids(count: int) -> None:
    torch.use_deterministic_algorithms(False)  # fills would keep launches apart
    ids = torch.zeros(count, dtype=torch.int32, device=DEVICE)
    table = torch.randint(-1, 9, (1, 20), dtype=torch.int32, device=DEVICE)
    align(ids, table, 16, 9)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        order, owners = align(ids, table, 16, 9)
    for _ in range(5):
        ids.copy_(torch.randint(-1, 20, (count,)))
        graph.replay()
        owner = owners[0].repeat_interleave(16)
        kept = (order[0] >= 0) & (owner >= 0)
        items = order[0][kept].long()
        keys = table[0][ids.clamp(min=0).long()].where(ids >= 0, -1)
        assert torch.equal(items.sort()[0], (keys >= 0).nonzero()[:, 0])
        assert torch.equal(owner[kept], keys[items])
