"""Experts in every form they are stored in, on kernels, against float64.

Runs on a GPU, or with TRITON_INTERPRET=1 on a CPU, slowly.
"""

from __future__ import annotations

import pytest
import torch
from test_kernels_experts import FORMS, PHYSICAL, applied, case, deviation, projection

from moecc.kernels.device import INTERPRETED
from moecc.kernels.experts import experts, project
from moecc.kernels.packed import ACTIVATIONS

pytest.importorskip("triton")

DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter multiplies no bfloat16 matrices, and cuts digits off where a GPU rounds.
DTYPE = torch.float16 if INTERPRETED else torch.bfloat16
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
TOKENS = (1, 2, 3, 17) if INTERPRETED else (1, 2, 3, 5, 17, 33, 64, 300, 1500)
FEW = (1, 3) if INTERPRETED else (1, 2, 7, 100)
LARGE = {"size": 1000, "inner": 520}

pytestmark = [
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("poisoned", "one_thread"),
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str, biased: bool) -> None:
    c = case(form, biased=biased, dtype=DTYPE, device=DEVICE)
    for tokens in TOKENS:
        assert c.error(tokens, 2) < TOLERANCE[DTYPE], tokens


@pytest.mark.skipif(INTERPRETED, reason="slow")
@pytest.mark.parametrize("form", ["plain", "coded twice", "everything"])
def test_large(form: str) -> None:
    c = case(form, **LARGE, dtype=DTYPE, device=DEVICE)
    for tokens in TOKENS:
        assert c.error(tokens, 2) < TOLERANCE[DTYPE], tokens


def test_split_products() -> None:
    """So many in-features that the down projection is a sum of parts."""
    c = case("coded", "coded twice", size=72, inner=2060, dtype=DTYPE, device=DEVICE)
    for tokens in (1, 3) if INTERPRETED else (1, 3, 9, 100):
        assert c.error(tokens, 2) < TOLERANCE[DTYPE], tokens


@pytest.mark.parametrize("fan", [1, 8])
@pytest.mark.parametrize("form", ["plain", "coded twice"])
def test_fan(form: str, fan: int) -> None:
    c = case(form, dtype=DTYPE, device=DEVICE)
    for tokens in FEW:
        assert c.error(tokens, fan) < TOLERANCE[DTYPE], tokens


@pytest.mark.parametrize(("first", "down"), [("coded", "plain"), ("plain", "coded twice")])
def test_two_forms(first: str, down: str) -> None:
    c = case(first, down, dtype=DTYPE, device=DEVICE)
    for tokens in FEW:
        assert c.error(tokens, 2) < TOLERANCE[DTYPE], tokens


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("form", ["plain", "coded", "plain and coded"])
def test_activations(form: str, activation: str) -> None:
    c = case(form, activation=activation, normed=False, added=False, dtype=DTYPE, device=DEVICE)
    for tokens in FEW:
        assert c.error(tokens, 2) < TOLERANCE[DTYPE], tokens


@pytest.mark.parametrize("form", ["plain", "coded", "everything"])
def test_half(form: str) -> None:
    c = case(form, dtype=torch.float16, device=DEVICE)
    for tokens in FEW:
        assert c.error(tokens, 2) < TOLERANCE[torch.float16], tokens


@pytest.mark.parametrize("form", ["plain", "coded twice", "everything"])
def test_all_to_one_expert(form: str) -> None:
    c = case(form, dtype=DTYPE, device=DEVICE)
    for tokens in FEW:
        assert c.error(tokens, 2, one=True) < TOLERANCE[DTYPE], tokens


@pytest.mark.parametrize("form", FORMS)
def test_project(form: str) -> None:
    own, matrices = projection(form, (72, 50), True, DTYPE, DEVICE)
    for tokens in FEW:
        x = torch.randn(tokens, 50).to(DTYPE).to(DEVICE)
        physical = torch.randint(-1, PHYSICAL, (tokens, 2), dtype=torch.int32, device=DEVICE)
        found = project(x, physical, own)
        wanted = applied(x.double(), physical, own, matrices)
        kept = physical.view(-1) >= 0
        assert found.dtype == DTYPE
        assert deviation(found[kept], wanted[kept, None]) < TOLERANCE[DTYPE], tokens


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("form", ["plain", "coded twice", "everything"])
def test_graph_sees_new_routes(form: str, tokens: int) -> None:
    torch.use_deterministic_algorithms(False)  # fills would keep launches apart
    c = case(form, dtype=DTYPE, device=DEVICE, normed=False, added=False)
    x = torch.randn(tokens, c.matrices[0].shape[2]).to(DTYPE).to(DEVICE)
    physical = torch.zeros(tokens, 2, dtype=torch.int32, device=DEVICE)
    variants = torch.zeros(tokens, dtype=torch.int32, device=DEVICE)
    routing = torch.rand(tokens, 2, device=DEVICE)
    arguments = (x, physical, routing, c.first, c.down, c.activation)
    experts(*arguments, variants=variants)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = experts(*arguments, variants=variants)
    for _ in range(5):
        physical.copy_(torch.randint(-1, PHYSICAL, (tokens, 2)))
        x.copy_(torch.randn(x.shape))
        found.fill_(torch.nan)
        graph.replay()
        parts = c.parts(x, physical, routing, variants)
        kept = (physical >= 0).any(1)
        assert not found[~kept].any()
        assert deviation(found[kept], parts[kept]) < TOLERANCE[DTYPE]
