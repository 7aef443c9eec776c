"""Linear layers and norms whose weights differ by row, against float64 and transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm

from moecc.kernels import linear as module
from moecc.kernels.linear import Rows, linear
from moecc.kernels.norm import DEFERRED_ROWS, Norm, deferred, rms_norm

VARIANTS = 3
EPS = 1e-5
# in-features, and out-features of the weights side by side
SHAPES = [(48, (40,)), (90, (33, 7, 18)), (129, (1, 70)), (7, (5, 5, 5))]
FORMS: list[tuple[str, ...]] = [
    (),
    ("biases",),
    ("norm",),
    ("residual",),
    ("biases", "norm", "residual"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def strided(*shape: int) -> Tensor:
    """Random weights [variants, ...], parts of wider rows."""
    size = int(torch.Size(shape[1:]).numel())
    return torch.randn(shape[0], size + 16)[:, 8 : size + 8].unflatten(1, shape[1:])


@dataclass(frozen=True)
class Case:
    """Rows of some variants, and rows that are none and hold NaN."""

    x: Tensor
    weights: list[Tensor]
    variants: Tensor
    biases: list[Tensor] | None
    norm: Norm | None
    residual: Tensor | None

    def run(self, rows: Rows | None = None) -> Tensor:
        return linear(
            self.x,
            self.weights,
            rows or Rows(self.variants, VARIANTS),
            biases=self.biases,
            norm=self.norm,
            residual=self.residual,
        )

    def expected(self) -> Tensor:
        """float64, of all rows; what stands in those that are none is of no variant."""
        owners = self.variants.clamp(min=0).long()
        x = self.x.double()
        if self.norm is not None:
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.norm.eps)
            x = x * self.norm.weight.double()[owners]
        out = x.new_zeros(len(x), sum(w.shape[1] for w in self.weights))
        for variant in range(VARIANTS):
            own = owners == variant
            parts = [x[own] @ w[variant].double().T for w in self.weights]
            if self.biases is not None:
                parts = [p + b[variant].double() for p, b in zip(parts, self.biases, strict=True)]
            out[own] = torch.cat(parts, -1)
        return out if self.residual is None else out + self.residual.double()

    def error(self, found: Tensor) -> float:
        """The largest of a row that is one, relative."""
        kept = self.variants >= 0
        wanted = self.expected()[kept]
        off = (found[kept].double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        return float(off.max()) if len(off) else 0.0


def case(
    variants: Sequence[int],
    shape: tuple[int, Sequence[int]],
    form: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Case:
    size, outs = shape
    count = len(variants)
    x = torch.randn(count, size + 24)[:, :size]  # rows of a wider buffer
    residual = torch.randn(count, sum(outs) + 8)[:, : sum(outs)]
    for given in (x, residual):
        given[torch.tensor(variants) < 0] = torch.nan
    weights = [strided(VARIANTS, out, size) / size**0.5 for out in outs]
    biases = [strided(VARIANTS, out) for out in outs]
    scale = strided(VARIANTS, size).abs() + 0.5

    def put(t: Tensor) -> Tensor:
        """Of its dtype and on its device, with its strides."""
        return torch.empty_strided(t.shape, t.stride(), dtype=dtype, device=device).copy_(t)

    return Case(
        put(x),
        [put(w) for w in weights],
        torch.tensor(variants, dtype=torch.int32, device=device),
        [put(b) for b in biases] if "biases" in form else None,
        Norm(put(scale), EPS) if "norm" in form else None,
        put(residual) if "residual" in form else None,
    )


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class TestLinear:
    @pytest.mark.parametrize("form", FORMS, ids="+".join)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_reference(self, shape: tuple[int, Sequence[int]], form: tuple[str, ...]) -> None:
        for variants in ([1], [2, 0, -1, 2, 1, -1, 0], [0] * 5):
            c = case(variants, shape, form)
            found = c.run()
            assert found.shape == c.expected().shape
            assert c.error(found) < 1e-5

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_dtype_is_kept(self, dtype: torch.dtype) -> None:
        c = case([2, 0, 1], SHAPES[1], FORMS[-1], dtype)
        assert c.run().dtype == dtype
        assert c.error(c.run()) < 1e-2

    def test_no_row_is_of_a_variant(self) -> None:
        c = case([-1, -1], SHAPES[1], FORMS[-1])
        assert c.run().shape == (2, 58)

    def test_a_variant_does_not_hang_on_others(self) -> None:
        """Rows are the same, whatever runs beside them."""
        c = case([2, 0, -1, 2, 1], SHAPES[1], FORMS[-1])
        alone = Case(**{**vars(c), "variants": c.variants.where(c.variants == 2, -1)})
        assert torch.equal(c.run()[[0, 3]], alone.run()[[0, 3]])


class TestRows:
    @pytest.mark.parametrize("size", [4, 16])
    def test_blocks(self, size: int) -> None:
        variants = [1, 0, -1, 1, 1, 1, 1, 0]
        rows = Rows(torch.tensor(variants, dtype=torch.int32), 2)
        order, owners = rows.blocks(size)
        found = [
            (owner, row)
            for owner, block in zip(owners.tolist(), order.view(-1, size).tolist(), strict=True)
            for row in block
            if owner >= 0 and row >= 0
        ]
        assert sorted(found) == sorted((v, r) for r, v in enumerate(variants) if v >= 0)

    def test_blocks_are_made_once(self) -> None:
        rows = Rows(torch.zeros(3, dtype=torch.int32), 1)
        first = rows.blocks(4)
        assert all(a is b for a, b in zip(first, rows.blocks(4), strict=True))
        assert rows.blocks(8)[0].shape != first[0].shape


class TestNorm:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("size", [7, 48, 300])
    def test_is_that_of_transformers(self, size: int, dtype: torch.dtype) -> None:
        x = (torch.randn(5, size + 3) * torch.logspace(-3, 3, 5)[:, None]).to(dtype)[:, :size]
        variants = torch.tensor([2, 0, 1, 1, 2], dtype=torch.int32)
        weight = strided(VARIANTS, size).to(dtype)
        found = rms_norm(x, Norm(weight, EPS), variants)
        for row, variant in enumerate(variants.tolist()):
            theirs = MixtralRMSNorm(size, EPS)
            theirs.weight.data = weight[variant]
            with torch.no_grad():
                assert torch.equal(found[row], theirs(x[row]))

    def test_rows_that_are_none(self) -> None:
        found = rms_norm(torch.ones(2, 8), Norm(torch.ones(1, 8), EPS), torch.tensor([-1, 0]).int())
        assert found.shape == (2, 8)

    @pytest.mark.parametrize("kernels", [False, True])
    @pytest.mark.parametrize("count", [1, DEFERRED_ROWS, DEFERRED_ROWS + 1])
    def test_deferred(self, count: int, kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where there are kernels, few rows are left to them."""
        from moecc.kernels import norm as norms

        x, norm = torch.randn(count, 8), Norm(torch.rand(1, 8), EPS)
        variants = torch.zeros(count, dtype=torch.int32)
        normed = rms_norm(x, norm, variants)
        monkeypatch.setattr(norms, "on_gpu", lambda _: kernels)
        monkeypatch.setattr(norms, "rms_norm", lambda *_: normed)
        found = deferred(x, norm, variants)
        waits = kernels and count <= DEFERRED_ROWS
        assert found[0] is (x if waits else normed)
        assert found[1] is (norm if waits else None)


def test_kernels_run_where_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from moecc.kernels import norm as norms
    from moecc.kernels.gpu import linear as gpu
    from moecc.kernels.gpu import norm as gpu_norm

    monkeypatch.setattr(gpu, "linear", lambda x, *others: x + 1)
    monkeypatch.setattr(gpu_norm, "rms_norm", lambda x, *others: x + 2)
    for patched in (module, norms):
        monkeypatch.setattr(patched, "on_gpu", lambda _: True)
    c = case([0, 1], SHAPES[0])
    assert torch.equal(c.run(), c.x + 1)
    assert torch.equal(rms_norm(c.x, Norm(c.x, EPS), c.variants), c.x + 2)
