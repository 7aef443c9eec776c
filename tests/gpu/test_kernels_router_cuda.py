"""The router's kernel against float64; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from test_kernels_linear import case
from test_kernels_router import SHAPES, VARIANTS, check, check_route, remaps

from moecc.kernels.device import INTERPRETED
from moecc.kernels.router import choose_experts

pytest.importorskip("triton")

DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter cuts digits off where a GPU rounds to bfloat16.
GAPS = {torch.float16: 6e-3}
GAPS |= {} if INTERPRETED else {torch.bfloat16: 5e-2}
COUNTS = (1, 9) if INTERPRETED else (1, 2, 17, 300, 1500)

pytestmark = [
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("poisoned"),
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(("experts", "count"), SHAPES)
def test_kernel(experts: int, count: int, renormalize: bool, dtype: torch.dtype) -> None:
    for rows in COUNTS:
        # Whole numbers apart: no two are alike, in any precision.
        logits = torch.stack([torch.randperm(experts) for _ in range(rows)]) / 8
        wide = torch.full((rows, experts + 5), torch.nan, dtype=dtype, device=DEVICE)
        wide[:, :experts] = logits
        variants = torch.randint(-1, VARIANTS, (rows,), dtype=torch.int32, device=DEVICE)
        check(wide[:, :experts], remaps(experts).to(DEVICE), variants, count, renormalize)


@pytest.mark.parametrize("dtype", GAPS, ids=str)
@pytest.mark.parametrize("form", [(), ("norm",)], ids=str)
@pytest.mark.parametrize(("experts", "count"), SHAPES)
def test_route(experts: int, count: int, form: tuple[str, ...], dtype: torch.dtype) -> None:
    sure = 0
    for size in (90,) if INTERPRETED else (90, 2048, 4100):
        for rows in COUNTS if INTERPRETED else (*COUNTS, 64):
            variants = torch.randint(-1, VARIANTS, (rows,)).tolist()
            c = case(variants, (size, (experts,)), form, dtype, DEVICE)
            for _ in range(1 if INTERPRETED else 3):  # launches leave nothing behind
                sure += check_route(c, count, GAPS[dtype], DEVICE)
    assert sure > 0


def test_the_first_of_equals() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0], [0.0] * 5], device=DEVICE).half()
    remap = torch.arange(10, 20, dtype=torch.int32, device=DEVICE).view(2, 5)
    variants = torch.tensor([0, 1], dtype=torch.int32, device=DEVICE)
    physical, weights = choose_experts(logits, remap, variants, 2, renormalize=True)
    assert physical.tolist() == [[11, 12], [15, 16]]
    assert weights.tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_not_finite() -> None:
    """Such a row has experts that are some; a row beside it is as it was."""
    logits = torch.randn(3, 60, device=DEVICE).half()
    remap = remaps(60).to(DEVICE)
    variants = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    expected = choose_experts(logits, remap, variants, 4, renormalize=True)
    logits[1] = torch.nan
    physical, weights = choose_experts(logits, remap, variants, 4, renormalize=True)
    assert torch.isin(physical, remap[0]).all()
    for found, wanted in ((physical, expected[0]), (weights, expected[1])):
        assert torch.equal(found[[0, 2]], wanted[[0, 2]])
