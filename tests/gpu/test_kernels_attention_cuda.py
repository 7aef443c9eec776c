"""The attention kernels against float64; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_kernels_attention import FORMS, LENGTHS, SHAPES, case, error, expected

from moecc.kernels import attention
from moecc.kernels.attention import tiles_of
from moecc.kernels.device import INTERPRETED

pytest.importorskip("triton")

DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter multiplies no bfloat16 matrices.
DTYPE = torch.float16 if INTERPRETED else torch.bfloat16
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 6e-3}

pytestmark = [
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU"),
    # References are small, and workers side by side would wait for each other's threads.
    pytest.mark.usefixtures("one_thread"),
]


def _cases() -> Iterator[tuple[tuple[int, int, int, int], dict[str, Any], bool]]:
    """Shapes, options, and which of two ways to compute them: few, as each is compiled.

    Every shape either way, without options and with all; each option alone with a shape whose sizes
    are no powers of two, both ways.
    """
    none, *single, every = FORMS
    for number, shape in enumerate(SHAPES):
        yield shape, none, number % 2 == 0
        yield shape, every, number % 2 == 1
    for shape, form in zip(SHAPES[2:], single, strict=False):
        yield shape, form, False
        yield shape, form, True


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("shape", "form", "split"), _cases(), ids=str)
def test_rows(shape: tuple[int, int, int, int], form: dict[str, Any], split: bool) -> None:
    form = dict(form)
    sinks = form.pop("sinks", False)
    c = case(shape, [0, 0, 1, 1, 2, 3, 3, 4], LENGTHS, DTYPE, DEVICE, sinks=sinks)
    found = c.run(splits=None if split else 1, **form)
    assert error(found, expected(c, **form)) < TOLERANCE[DTYPE]
    assert (found[c.lengths == 0] == 0).all()


@pytest.mark.parametrize("dtype", sorted({torch.float16, DTYPE}, key=str), ids=str)
@pytest.mark.parametrize(("splits", "block_size"), [(2, 64), (8, 1), (32, 16)])
def test_long_rows(splits: int, block_size: int, dtype: torch.dtype) -> None:
    c = case((8, 2, 64, 64), [0, 1, 2], [2048, 77, 1000], dtype, DEVICE, block_size, sinks=True)
    first = c.run(splits=splits)
    assert error(first, expected(c)) < TOLERANCE[dtype]
    assert torch.equal(c.run(splits=splits), first)


@pytest.mark.parametrize(("shape", "form", "whole"), _cases(), ids=str)
def test_tiles(
    shape: tuple[int, int, int, int],
    form: dict[str, Any],
    whole: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if whole:  # as if there were so many tiles that none is halved
        monkeypatch.setattr(attention, "_PROGRAMS", 0)
    form = dict(form)
    spans = [(0, 70, 1), (70, 73, 0), (75, 130, 2)]
    contexts = [40, 0, 130]
    sequences, lengths = [0] * 130, [0] * 130
    for start, stop, sequence in spans:
        for row in range(start, stop):
            sequences[row] = sequence
            lengths[row] = contexts[sequence] + 1 + row - start
    c = case(shape, sequences, lengths, DTYPE, DEVICE, sinks=form.pop("sinks", False))
    tiles = tiles_of(spans, shape[0], shape[1], torch.device(DEVICE))
    found, wanted = c.run_tiles(tiles, **form), expected(c, **form)
    for part in (slice(0, 73), slice(75, 130)):
        assert error(found[part], wanted[part]) < TOLERANCE[DTYPE]


def test_padding_within_a_tile() -> None:
    c = case((4, 2, 32, 32), [0] * 20, [*range(1, 18), 0, 0, 0], torch.float16, DEVICE)
    tiles = tiles_of([(0, 20, 0)], 4, 2, torch.device(DEVICE))
    found = c.run_tiles(tiles)
    assert error(found, expected(c)) < 1e-3
    assert (found[17:] == 0).all()


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("splits", [1, 16])
def test_graph_sees_new_lengths(splits: int) -> None:
    lengths = [2000, 45, 0, 300]
    c = case((32, 8, 128, 128), [0, 1, 2, 3], [2048] * 4, torch.bfloat16, DEVICE)
    c.run(splits=splits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = c.run(splits=splits)
    for shown in (lengths, lengths[::-1], [2048] * 4):
        c.lengths.copy_(torch.tensor(shown))
        found.fill_(float("nan"))
        graph.replay()
        assert error(found, expected(c)) < TOLERANCE[torch.bfloat16]
