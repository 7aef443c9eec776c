"""The rotary kernel against transformers; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from test_kernels_rotary import SHAPES, check, tokens

from moecc.kernels.device import INTERPRETED

pytest.importorskip("triton")

DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter cuts digits off where a GPU rounds to bfloat16.
DTYPES = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]

pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU"
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("count", [1, 6])
def test_kernel(
    shape: tuple[int, int, int, int, int], normed: bool, dtype: torch.dtype, count: int
) -> None:
    # A norm's sum has an order of its own: now and then a value rounds the other way.
    check(tokens(shape, count, normed, dtype, DEVICE), different=5e-3 if normed else 1e-3)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_graph_sees_new_positions() -> None:
    t = tokens(SHAPES[0], 6, True, torch.bfloat16, DEVICE)
    t.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = t.run()
    t.positions.add_(1000)
    found.fill_(float("nan"))
    t.cache_k.fill_(float("nan"))
    graph.replay()
    replayed = found.clone()
    stored = t.cache_k.clone()
    assert torch.equal(t.run(), replayed)
    assert torch.equal(t.cache_k.nan_to_num(), stored.nan_to_num())
    check(t, different=5e-3)
