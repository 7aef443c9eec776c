"""Which experts a row goes to, against transformers' own routers."""

from __future__ import annotations

import pytest
import torch
from test_kernels_linear import Case, case
from torch import Tensor
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from moecc.kernels import router
from moecc.kernels.linear import Rows
from moecc.kernels.router import choose_experts, route

VARIANTS = 3
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# experts, of which a row goes to so many
SHAPES = [(8, 2), (60, 4), (128, 8), (5, 5), (3, 1)]


def remaps(experts: int) -> Tensor:
    """[variants, experts], a part of wider rows."""
    return torch.stack([torch.randperm(500)[: experts + 4] for _ in range(VARIANTS)]).int()[:, 4:]


def check(
    logits: Tensor, remap: Tensor, variants: Tensor, count: int, renormalize: bool
) -> tuple[Tensor, Tensor]:
    """`choose_experts` against float64, in which no two logits are alike."""
    physical, weights = choose_experts(logits, remap, variants, count, renormalize=renormalize)
    assert (physical.dtype, weights.dtype) == (torch.int32, torch.float32)
    wanted, chosen = logits.double().softmax(-1).topk(count, -1)
    if renormalize:
        wanted = wanted / wanted.sum(-1, keepdim=True)
    kept = variants >= 0
    own = remap[variants.clamp(min=0).long()[:, None], chosen]
    assert torch.equal(physical[kept], own[kept])
    torch.testing.assert_close(weights[kept].double(), wanted[kept], rtol=3e-5, atol=1e-7)
    assert (physical[~kept] == -1).all()
    return physical, weights


def check_route(c: Case, count: int, gap: float, device: str = "cpu") -> int:
    """`route` by the router of `c`, against float64; how many rows were sure of their experts.

    Logits that are nearer to each other than `gap` may change places.
    """
    remap = remaps(c.weights[0].shape[1]).to(device)
    rows = Rows(c.variants, VARIANTS)
    physical, weights = route(c.x, c.weights[0], rows, c.norm, remap, count, renormalize=True)
    assert (physical.dtype, weights.dtype) == (torch.int32, torch.float32)
    assert (physical[c.variants < 0] == -1).all()
    logits, chosen = c.expected().nan_to_num().topk(min(count + 1, remap.shape[1]), -1)
    sure = (-logits.diff(dim=-1) > gap).all(-1) & (c.variants >= 0)
    own = remap[c.variants.clamp(min=0).long()[:, None], chosen[:, :count]]
    assert torch.equal(physical[sure], own[sure])
    wanted = logits[:, :count].softmax(-1)
    torch.testing.assert_close(weights[sure].double(), wanted[sure], rtol=gap + 1e-5, atol=1e-7)
    return int(sure.sum())


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(("experts", "count"), SHAPES)
def test_reference(experts: int, count: int, renormalize: bool) -> None:
    variants = torch.tensor([0, 2, -1, 1, 0, -1, 2], dtype=torch.int32)
    check(torch.randn(7, experts) * 3, remaps(experts), variants, count, renormalize)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("renormalize", [None, False, True])
def test_is_that_of_transformers(renormalize: bool | None, dtype: torch.dtype) -> None:
    """Mixtral's router always makes its weights sum to one; Qwen3-MoE's has a say."""
    hidden, experts, count = 64, 8, 2
    theirs: torch.nn.Module
    if renormalize is None:
        theirs = MixtralTopKRouter(
            MixtralConfig(hidden_size=hidden, num_local_experts=experts, num_experts_per_tok=count)
        )
    else:
        theirs = Qwen3MoeTopKRouter(
            Qwen3MoeConfig(
                hidden_size=hidden,
                num_experts=experts,
                num_experts_per_tok=count,
                norm_topk_prob=renormalize,
            )
        )
    theirs = theirs.to(dtype)
    theirs.weight.data.normal_()
    remap, variants = remaps(experts), torch.randint(0, VARIANTS, (50,), dtype=torch.int32)
    with torch.no_grad():
        logits, scores, chosen = theirs(torch.randn(50, hidden).to(dtype))
    physical, weights = choose_experts(
        logits, remap, variants, count, renormalize=renormalize is not False
    )
    assert torch.equal(weights.to(scores.dtype), scores)
    rows = logits.sort(-1, descending=True)[0][:, : count + 1].diff(dim=-1).ne(0).all(-1)
    assert rows.sum() > 30  # in the others there are equals
    assert torch.equal(physical[rows], remap[variants.long()[:, None], chosen][rows])


@pytest.mark.parametrize("form", [(), ("norm",)], ids=str)
@pytest.mark.parametrize(("experts", "count"), SHAPES)
def test_route(experts: int, count: int, form: tuple[str, ...]) -> None:
    for variants in ([1], [2, 0, -1, 2, 1, -1, 0, 1, 1]):
        c = case(variants, (40, (experts,)), form)
        assert check_route(c, count, 1e-5) == sum(v >= 0 for v in variants)


def test_the_first_of_equals() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0], [0.0] * 5])
    remap = torch.arange(10, 20, dtype=torch.int32).view(2, 5)
    variants = torch.tensor([0, 1], dtype=torch.int32)
    physical, weights = choose_experts(logits, remap, variants, 2, renormalize=True)
    assert physical.tolist() == [[11, 12], [15, 16]]
    assert weights.tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_kernels_run_where_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from moecc.kernels.gpu import router as gpu

    monkeypatch.setattr(gpu, "choose_experts", lambda *arguments: arguments[3:])
    monkeypatch.setattr(router, "on_gpu", lambda _: True)
    row = torch.zeros(1, dtype=torch.int32)
    monkeypatch.setattr(gpu, "route", lambda *arguments: arguments[5:])
    x = torch.zeros(1, 4)
    found = route(x, x[None], Rows(row, 1), None, row[None], 1, renormalize=False)
    assert found == (1, False)
    assert choose_experts(torch.zeros(1, 4), row[None], row, 2, renormalize=True) == (2, True)
