"""The kernel for a row that brings its own key; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from test_kernels_newest import SHAPES, check, row, slot_of

from moecc.kernels.device import INTERPRETED

pytest.importorskip("triton")

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPE = torch.float16 if INTERPRETED else torch.bfloat16
TOLERANCE = 2e-3 if INTERPRETED else 6e-3
# On both sides of a chunk's and a split's ends.
LENGTHS = [0, 1, 2, 64, 65, 66, 130, 300] if INTERPRETED else [0, 1, 2, 64, 65, 66, 130, 2048, 5000]

pytestmark = [
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_row(shape: tuple[int, int, int, int], normed: bool, window: int | None) -> None:
    for length in LENGTHS:
        for _ in range(2):  # the second finds the counters as the first left them
            found = row(shape, length, normed=normed, window=window, dtype=DTYPE, device=DEVICE)
            # A norm's sum has an order of its own: now and then a value rounds the other way.
            check(found, TOLERANCE, different=5e-3 if normed else 1e-3)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_graph_sees_new_rows() -> None:
    found = row(SHAPES[0], 2048, normed=True, dtype=DTYPE, device=DEVICE)
    found.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = found.run()
    for length in (3, 2048, 64, 700):
        found.length.fill_(length)
        found.own[4].fill_(length - 1)
        found.own[5].fill_(slot_of(found.tables, length - 1))
        found.own[0].normal_()
        out.fill_(torch.nan)
        graph.replay()
        expected, *_ = found.expected()
        assert float((out.double() - expected).norm() / expected.norm()) < TOLERANCE
