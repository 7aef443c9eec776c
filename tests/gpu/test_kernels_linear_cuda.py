"""The kernels of linear layers and norms against float64.

Runs on a GPU, or with TRITON_INTERPRET=1 on a CPU, slowly.
"""

from __future__ import annotations

import random

import pytest
import torch
from test_kernels_linear import EPS, FORMS, VARIANTS, Case, case, strided

from moecc.kernels.device import INTERPRETED
from moecc.kernels.linear import Rows
from moecc.kernels.norm import Norm, rms_norm

pytest.importorskip("triton")

DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter multiplies no bfloat16 matrices, and cuts digits off where a GPU rounds.
DTYPES = [torch.float16] if INTERPRETED else [torch.bfloat16, torch.float16]
TOLERANCE = {torch.float16: 1.5e-3, torch.bfloat16: 1e-2}
# A router, odd ones, one as large as they come, and attention's three.
SHAPES = (
    [(90, (33, 7, 18)), (64, (300,))]
    if INTERPRETED
    else [
        (2048, (60,)),
        (90, (33, 7, 18)),
        (1001, (257,)),
        (512, (4100,)),
        (4100, (60,)),
        (8192, (300,)),
        (2048, (2048, 512, 512)),
    ]
)
COUNTS = (1, 2, 3, 17, 70) if INTERPRETED else (1, 2, 3, 5, 17, 33, 64, 65, 300, 1500)

pytestmark = [
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("poisoned"),
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    random.seed(0)


def mixed(count: int) -> list[int]:
    """Variants of rows; some are none."""
    return [random.choice([-1, *range(VARIANTS)]) for _ in range(count)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", [FORMS[0], FORMS[2], FORMS[-1]], ids="+".join)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(
    shape: tuple[int, tuple[int, ...]], form: tuple[str, ...], dtype: torch.dtype
) -> None:
    for count in COUNTS:
        for variants in (mixed(count), [2] * count):
            c = case(variants, shape, form, dtype, DEVICE)
            found = c.run()
            assert found.dtype == dtype
            assert c.error(found) < TOLERANCE[dtype], count


@pytest.mark.parametrize("form", [FORMS[1], FORMS[3]], ids="+".join)
def test_other_forms(form: tuple[str, ...]) -> None:
    for count in COUNTS:
        c = case(mixed(count), SHAPES[0], form, DTYPES[0], DEVICE)
        assert c.error(c.run()) < TOLERANCE[DTYPES[0]], count


def test_rows_are_shared_by_layers() -> None:
    variants = mixed(COUNTS[-2])
    cases = [case(variants, shape, (), DTYPES[0], DEVICE) for shape in SHAPES]
    rows = Rows(cases[0].variants, VARIANTS)
    for c in cases:
        assert c.error(c.run(rows)) < TOLERANCE[DTYPES[0]]


@pytest.mark.parametrize("count", [17, 40])
def test_few_rows_of_each(count: int) -> None:
    """Blocks for batches that variants share hold any mix."""
    shape = (72, (4100,)) if INTERPRETED else (512, (4100, 512))
    for variants in (mixed(count), [1] * count):
        c = case(variants, shape, (), DTYPES[0], DEVICE)
        found = c.run(Rows(c.variants, VARIANTS, together=VARIANTS))
        assert c.error(found) < TOLERANCE[DTYPES[0]]


@pytest.mark.parametrize("count", [1, 5, 20])
def test_no_row_is_of_a_variant(count: int) -> None:
    """Nothing is written to rows that are none."""
    c = case([-1] * count, SHAPES[0], FORMS[-1], DTYPES[0], DEVICE)
    assert c.run().isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [7, 300] if INTERPRETED else [7, 300, 2048, 7168])
@pytest.mark.parametrize("count", [1, 40])
def test_norm(count: int, size: int, dtype: torch.dtype) -> None:
    x = torch.randn(count, size + 8) * torch.logspace(-2, 2, count)[:, None]
    x = x.to(dtype).to(DEVICE)[:, :size]
    weight = strided(VARIANTS, size).to(dtype).to(DEVICE)
    variants = torch.randint(-1, VARIANTS, (count,), dtype=torch.int32, device=DEVICE)
    found = rms_norm(x, Norm(weight, EPS), variants)
    wide = x.double()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    wanted = wide * weight.double()[variants.clamp(min=0).long()]
    off = (found.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert float(off[variants >= 0].max(dim=0)[0] if (variants >= 0).any() else 0) < 4e-3


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("count", [1, 8, 40])
def test_graph_sees_new_variants(count: int) -> None:
    """One graph serves every mix."""
    torch.use_deterministic_algorithms(False)  # fills would keep launches apart
    c = case([0] * count, (512, (512, 128, 128)), FORMS[-1], torch.bfloat16, DEVICE)
    c.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = c.run()
    for _ in range(5):
        c.variants.copy_(torch.tensor(mixed(count)))
        found.fill_(torch.nan)
        graph.replay()
        assert c.error(found) < TOLERANCE[torch.bfloat16]
        assert Case(**vars(c)).error(c.run()) < TOLERANCE[torch.bfloat16]
