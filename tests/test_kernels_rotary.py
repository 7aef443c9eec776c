"""Rotary embedding, norms of heads and the cache write against transformers' own modules."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers.models.glm4_moe.modeling_glm4_moe import apply_rotary_pos_emb as partly_rotated
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm, apply_rotary_pos_emb

from moecc.kernels import rotary
from moecc.kernels.rotary import rotate_and_store

# heads, kv_heads, dim, dim_v, rotated
SHAPES = [
    (32, 8, 128, 128, 128),
    (32, 4, 128, 128, 128),
    (8, 8, 64, 32, 64),
    (6, 3, 80, 80, 80),
    (12, 1, 96, 40, 96),
    (96, 8, 128, 128, 64),
    (5, 5, 80, 80, 20),
]
VARIANTS = 3
EPS = 1e-5


@dataclass(frozen=True)
class Tokens:
    """Queries, keys and values side by side in one buffer, and an empty cache."""

    q: Tensor
    k: Tensor
    v: Tensor
    inv_freq: Tensor
    positions: Tensor
    slots: Tensor
    rows: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    cache_k: Tensor
    cache_v: Tensor
    scaling: float

    def run(self) -> Tensor:
        return rotate_and_store(
            self.q,
            self.k,
            self.v,
            self.inv_freq,
            self.positions,
            self.slots,
            self.cache_k,
            self.cache_v,
            rows=self.rows,
            q_norm=self.q_norm,
            k_norm=self.k_norm,
            eps=EPS,
            attention_scaling=self.scaling,
        )

    def expected(self) -> tuple[Tensor, Tensor]:
        """What transformers makes of `q` and `k`, a token at a time."""
        found = []
        for i, row in enumerate(self.rows.tolist()):
            q, k = (
                self._normed(x[i], None if weights is None else weights[row])
                for x, weights in ((self.q, self.q_norm), (self.k, self.k_norm))
            )
            # As the forward of any family's rotary embedding.
            freqs = self.positions[i, None, None].float() * self.inv_freq[row]
            emb = torch.cat([freqs, freqs], dim=-1)
            cos, sin = ((f(emb) * self.scaling).to(q.dtype) for f in (torch.cos, torch.sin))
            whole = cos.shape[-1] == q.shape[-1]
            turn = apply_rotary_pos_emb if whole else partly_rotated
            q, k = turn(q[None, :, None], k[None, :, None], cos, sin)
            found.append((q[0, :, 0], k[0, :, 0]))
        queries, keys = zip(*found, strict=True)
        return torch.stack(queries), torch.stack(keys)

    def _normed(self, x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return x
        norm = Qwen3MoeRMSNorm(x.shape[-1], EPS).to(x)
        norm.weight.data = weight
        with torch.no_grad():
            out: Tensor = norm(x)
        return out


def tokens(
    shape: tuple[int, int, int, int, int],
    count: int,
    normed: bool,
    dtype: torch.dtype,
    device: str = "cpu",
) -> Tokens:
    heads, kv_heads, dim, dim_v, rotated = shape
    sizes = [heads * dim, kv_heads * dim, kv_heads * dim_v]
    q, k, v = (torch.randn(count, sum(sizes)) * 2).to(dtype).to(device).split(sizes, dim=1)
    exponents = torch.arange(0, rotated, 2).float() / rotated
    bases = torch.tensor([1e4, 5e5, 1e6])[:VARIANTS, None]
    slots = torch.randperm(2 * count)[:count]
    slots[1:2] = -1  # padding
    weights = [torch.rand(VARIANTS, dim).add(0.5).to(dtype).to(device) for _ in range(2)]
    return Tokens(
        q.view(count, heads, dim),
        k.view(count, kv_heads, dim),
        v.view(count, kv_heads, dim_v),
        (1 / bases**exponents).to(device),
        torch.randint(0, 1 << 18, (count,)).to(device),
        slots.to(device),
        torch.randint(0, VARIANTS, (count,), dtype=torch.int32).to(device),
        *(weights if normed else (None, None)),
        torch.full((2 * count, kv_heads, dim), float("nan"), dtype=dtype, device=device),
        torch.full((2 * count, kv_heads, dim_v), float("nan"), dtype=dtype, device=device),
        scaling=1.2 if normed else 1.0,
    )


def check(t: Tokens, different: float) -> None:
    """All but a part `different` of the results are bit for bit those of transformers.

    These are off by one rounding, and what is in the cache is what was to be there.
    """
    found = t.run()
    queries, keys = t.expected()
    kept = t.slots >= 0
    stored = t.slots[kept].long()
    for got, wanted in ((found, queries), (t.cache_k[stored], keys[kept])):
        assert got.dtype == wanted.dtype
        assert (got != wanted).double().mean() <= different
        got, wanted = got.double(), wanted.double()
        assert (got - wanted).norm() <= different * wanted.norm()
    assert torch.equal(t.cache_v[stored], t.v[kept])
    others = torch.ones(len(t.cache_k), dtype=torch.bool, device=t.q.device)
    others[stored] = False
    assert t.cache_k[others].isnan().all()
    assert t.cache_v[others].isnan().all()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference(shape: tuple[int, int, int, int, int], normed: bool, dtype: torch.dtype) -> None:
    check(tokens(shape, 6, normed, dtype), different=0)


def test_first_row_is_for_all() -> None:
    t = tokens(SHAPES[2], 6, True, torch.float32)
    zeros = torch.zeros_like(t.rows)
    without = Tokens(**{**vars(t), "rows": None})
    assert torch.equal(without.run(), Tokens(**{**vars(t), "rows": zeros}).run())


def test_kernels_run_where_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from moecc.kernels.gpu import rotary as gpu

    t = tokens(SHAPES[2], 6, True, torch.float32)
    monkeypatch.setattr(gpu, "rotate_and_store", lambda *args: args)
    monkeypatch.setattr(rotary, "on_gpu", lambda q: True)
    assert t.run()[-2:] == (EPS, t.scaling)
