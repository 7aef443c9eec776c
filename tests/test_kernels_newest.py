"""Attention of rows that bring their own keys: a single one against what many do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from test_kernels_attention import case
from torch import Tensor

from moecc.kernels import attention, rotary
from moecc.kernels.newest import attend_newest

# heads, kv_heads, dim, dim_v
SHAPES = [(32, 8, 128, 128), (8, 2, 64, 32), (6, 2, 40, 24), (16, 1, 96, 96)]
VARIANTS = 3
EPS = 1e-5
pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Row:
    """A query with its key and value, and a cache with the earlier ones of its sequence."""

    own: tuple[Tensor, ...]  # q, k, v, frequencies, position, slot
    cache: tuple[Tensor, Tensor]
    tables: Tensor
    length: Tensor
    turning: dict[str, Any]
    seen: dict[str, Any]

    def run(self) -> Tensor:
        sequence = torch.zeros_like(self.length)
        return attend_newest(
            *self.own, *self.cache, self.tables, sequence, self.length, **self.turning, **self.seen
        )

    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        """What it finds, float64, and the keys and values that are then in the cache."""
        keys, values = (t.clone() for t in self.cache)
        q = rotary._rotate_and_store(*self.own, keys, values, **self.turning)
        found = attention._attended(
            q.double(),
            keys.double(),
            values.double(),
            self.tables,
            torch.zeros_like(self.length),
            self.length,
            None,
            attention._Form(softcap=None, **self.seen),
        )
        return found, keys, values


def row(
    shape: tuple[int, int, int, int],
    length: int,
    *,
    normed: bool = False,
    window: int | None = None,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Row:
    heads, kv_heads, dim, dim_v = shape
    c = case(shape, [0], [length], dtype, device, block_size)
    sizes = [heads * dim, kv_heads * dim, kv_heads * dim_v]
    q, k, v = (torch.randn(1, sum(sizes)) * 2).to(dtype).to(device).split(sizes, dim=1)
    last = max(length - 1, 0)
    slot = slot_of(c.tables, last, block_size)
    if length:  # nobody reads what was there
        c.cache_k[slot] = c.cache_v[slot] = torch.nan
    exponents = torch.arange(0, dim, 2).float() / dim
    bases = torch.tensor([1e4, 5e5, 1e6])[:VARIANTS, None]
    weights = [torch.rand(VARIANTS, dim).add(0.5).to(dtype).to(device) for _ in range(2)]

    def ints(value: int) -> Tensor:
        return torch.tensor([value], dtype=torch.int32, device=device)

    return Row(
        (
            q.view(1, heads, dim),
            k.view(1, kv_heads, dim),
            v.view(1, kv_heads, dim_v),
            (1 / bases**exponents).to(device),
            ints(last),
            ints(slot if length else -1),
        ),
        (c.cache_k, c.cache_v),
        c.tables,
        ints(length),
        {
            "rows": ints(1),
            "q_norm": weights[0] if normed else None,
            "k_norm": weights[1] if normed else None,
            "eps": EPS,
            "attention_scaling": 1.2 if normed else 1.0,
        },
        {"block_size": block_size, "scaling": dim**-0.5, "window": window},
    )


def slot_of(tables: Tensor, position: int, block_size: int = 16) -> int:
    """Where in the cache the first sequence has a position."""
    return int(tables[0, position // block_size]) * block_size + position % block_size


def check(found: Row, tolerance: float, different: float = 0.0) -> None:
    """Also that the cache holds what it should, but for a share of keys that are `different`."""
    expected, keys, values = found.expected()
    got = found.run()
    if int(found.length) == 0:
        assert not got.any()
    else:
        assert float((got.double() - expected).norm() / expected.norm()) < tolerance
    assert torch.equal(found.cache[1].nan_to_num(), values.nan_to_num())
    off = found.cache[0].nan_to_num() != keys.nan_to_num()
    assert int(off.sum()) <= different * found.own[1].numel()


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("length", [0, 1, 2, 40])
def test_is_both_steps(length: int, normed: bool) -> None:
    torch.manual_seed(0)
    check(row(SHAPES[2], length, normed=normed, window=20), 1e-6)
