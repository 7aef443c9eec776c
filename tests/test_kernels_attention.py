"""Attention over paged keys and values against a computation in float64, a row at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from moecc.kernels import attention
from moecc.kernels.attention import Tiles, attend, prefill, tiles_of

# heads, kv_heads, dim, dim_v
SHAPES = [
    (32, 8, 128, 128),
    (4, 4, 64, 64),
    (8, 2, 80, 80),
    (16, 1, 96, 96),
    (6, 2, 24, 40),
    (4, 4, 192, 128),
]
# Without options, with each alone, with all.
FORMS: list[dict[str, Any]] = [
    {},
    {"window": 20},
    {"softcap": 5.0},
    {"sinks": True},
    {"window": 40, "softcap": 5.0, "sinks": True},
]
LENGTHS = [0, 1, 15, 16, 17, 45, 300, 0]
pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Case:
    """A cache of sequences in shuffled blocks; what nobody may read in it is NaN."""

    q: Tensor
    cache_k: Tensor
    cache_v: Tensor
    tables: Tensor
    sequences: Tensor
    lengths: Tensor
    sinks: Tensor | None
    block_size: int

    def run(self, splits: int | None = None, **form: Any) -> Tensor:
        return attend(
            self.q,
            self.cache_k,
            self.cache_v,
            self.tables,
            self.sequences,
            self.lengths,
            block_size=self.block_size,
            scaling=self.q.shape[2] ** -0.5,
            sinks=self.sinks,
            splits=splits,
            **form,
        )

    def run_tiles(self, tiles: Tiles, **form: Any) -> Tensor:
        return prefill(
            self.q,
            self.cache_k,
            self.cache_v,
            self.tables,
            tiles,
            self.lengths,
            block_size=self.block_size,
            scaling=self.q.shape[2] ** -0.5,
            sinks=self.sinks,
            **form,
        )


def case(
    shape: tuple[int, int, int, int],
    sequences: Sequence[int],
    lengths: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    block_size: int = 16,
    sinks: bool = False,
) -> Case:
    """Row `i` is a query of sequence `sequences[i]` that sees `lengths[i]` keys."""
    heads, kv_heads, dim, dim_v = shape
    count = max(sequences) + 1
    longest = [
        max((n for s, n in zip(sequences, lengths, strict=True) if s == i), default=0)
        for i in range(count)
    ]
    used = [-(-n // block_size) for n in longest]
    width = max(used) + 2
    order = torch.randperm(sum(used) + 1).tolist()
    nowhere = order.pop()
    tables = torch.full((count, width), nowhere, dtype=torch.int32)
    size = (sum(used) + 1) * block_size
    cache_k = torch.full((size, kv_heads, dim), float("nan"), dtype=dtype)
    cache_v = torch.full((size, kv_heads, dim_v), float("nan"), dtype=dtype)
    for sequence, (n, blocks) in enumerate(zip(longest, used, strict=True)):
        for i in range(blocks):
            tables[sequence, i] = order.pop()
        slots = places(tables[sequence], n, block_size)
        cache_k[slots] = torch.randn(n, kv_heads, dim).to(dtype)
        cache_v[slots] = torch.randn(n, kv_heads, dim_v).to(dtype)
    # A row of a wider buffer: its stride is not that of a tensor of its own.
    q = torch.randn(len(lengths), heads * dim + 32).to(dtype)[:, : heads * dim]
    q[torch.tensor(lengths) == 0] = float("nan")
    return Case(
        q.to(device).view(-1, heads, dim),
        cache_k.to(device),
        cache_v.to(device),
        tables.to(device),
        torch.tensor(sequences, dtype=torch.int32, device=device),
        torch.tensor(lengths, dtype=torch.int32, device=device),
        (torch.randn(len(lengths), heads) * 3).to(dtype).to(device) if sinks else None,
        block_size,
    )


def places(table: Tensor, length: int, block_size: int) -> Tensor:
    keys = torch.arange(length)
    return table.cpu()[keys // block_size].long() * block_size + keys % block_size


def expected(
    c: Case, window: int | None = None, softcap: float | None = None, **_: object
) -> Tensor:
    """In float64, one row at a time."""
    q, cache_k, cache_v = (t.cpu().double() for t in (c.q, c.cache_k, c.cache_v))
    out = torch.zeros(*q.shape[:2], cache_v.shape[2], dtype=torch.float64)
    group = q.shape[1] // cache_k.shape[1]
    for row, (sequence, length) in enumerate(
        zip(c.sequences.tolist(), c.lengths.tolist(), strict=True)
    ):
        if not length:
            continue
        first = 0 if window is None else max(0, length - window)
        slots = places(c.tables[sequence], length, c.block_size)[first:]
        keys, values = (t[slots].repeat_interleave(group, 1) for t in (cache_k, cache_v))
        scores = torch.einsum("hd,nhd->hn", q[row], keys) * q.shape[2] ** -0.5
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if c.sinks is not None:
            scores = torch.cat([scores, c.sinks[row, :, None].cpu().double()], 1)
        weights = scores.softmax(1)[:, : len(slots)]
        out[row] = torch.einsum("hn,nhd->hd", weights, values)
    return out


def error(found: Tensor, wanted: Tensor) -> float:
    """Of all rows together, relative."""
    return float((found.cpu().double() - wanted).norm() / wanted.norm())


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference(shape: tuple[int, int, int, int], form: dict[str, Any]) -> None:
    form = dict(form)
    c = case(shape, [0, 0, 1, 1, 2, 3, 3, 4], LENGTHS, sinks=form.pop("sinks", False))
    wanted = expected(c, **form)
    found = c.run(**form)
    assert found.shape == wanted.shape
    assert error(found, wanted) < 1e-5
    assert (found[c.lengths == 0] == 0).all()


def test_reference_of_tiles_is_that_of_rows() -> None:
    spans = [(0, 40, 0), (40, 47, 1), (47, 90, 2)]
    contexts = [0, 33, 5]
    sequences = [s for start, stop, s in spans for _ in range(start, stop)]
    lengths = [contexts[s] + 1 + i for start, stop, s in spans for i in range(stop - start)]
    c = case((4, 2, 32, 16), sequences, lengths, sinks=True)
    tiles = tiles_of(spans, 4, 2, torch.device("cpu"))
    torch.testing.assert_close(c.run_tiles(tiles, window=30), c.run(window=30))


def test_sinks_by_head() -> None:
    c = case((4, 2, 32, 16), [0, 1], [5, 20], sinks=True)
    assert c.sinks is not None
    by_head = c.sinks[0]
    by_row = by_head.expand(2, 4).contiguous()
    same = [Case(**{**vars(c), "sinks": sinks}).run() for sinks in (by_head, by_row)]
    assert torch.equal(*same)


def test_half_precision_is_kept() -> None:
    c = case((4, 2, 32, 16), [0, 1], [5, 20], dtype=torch.bfloat16)
    assert c.run().dtype == torch.bfloat16
    assert error(c.run(), expected(c)) < 1e-2


class TestTiles:
    CPU = torch.device("cpu")

    @pytest.mark.parametrize(("heads", "kv_heads"), [(32, 8), (4, 4), (28, 4), (256, 1)])
    def test_every_row_is_in_one_tile(self, heads: int, kv_heads: int) -> None:
        spans = [(0, 1, 3), (1, 130, 0), (140, 145, 2)]
        tiles = tiles_of(spans, heads, kv_heads, self.CPU)
        rows = [
            (row, sequence)
            for first, count, sequence in tiles.table.tolist()
            for row in range(first, first + count)
        ]
        assert rows == [(row, s) for start, stop, s in spans for row in range(start, stop)]
        assert tiles.table.dtype == torch.int32
        assert max(tiles.table[:, 1].tolist()) <= tiles.rows
        assert tiles.rows == 1 or tiles.rows * heads // kv_heads <= 128

    def test_little_work_is_in_smaller_tiles(self) -> None:
        assert tiles_of([(0, 100, 0)], 32, 8, self.CPU).rows == 16
        assert tiles_of([(0, 4000, 0)], 32, 8, self.CPU).rows == 32

    def test_of_nothing(self) -> None:
        assert tiles_of([], 4, 4, self.CPU).table.shape == (0, 3)


def test_kernels_run_where_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from moecc.kernels.gpu import attention as gpu

    calls = []

    def launched(q: Tensor, *args: object, **options: object) -> Tensor:
        calls.append(options)
        return q

    monkeypatch.setattr(gpu, "attend", launched)
    monkeypatch.setattr(gpu, "prefill", launched)
    monkeypatch.setattr(attention, "on_gpu", lambda q: True)
    c = case((4, 2, 32, 16), [0, 1], [5, 20])
    c.run(window=7)
    c.run_tiles(tiles_of([(0, 1, 0), (1, 2, 1)], 4, 2, torch.device("cpu")), softcap=2.0)
    assert [(o["window"], o["softcap"]) for o in calls] == [(7, None), (None, 2.0)]
