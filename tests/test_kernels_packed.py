"""Products with packed weights: the layout of kernels, and the reference against float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moecc.coding import Coding, decode, encode
from moecc.kernels import packed

CODINGS = [Coding(bits, group) for bits in (1, 2, 3, 4, 5, 6, 8) for group in (0, 32, 64, 128)]
pytestmark = pytest.mark.usefixtures("one_thread")


def coded(coding: Coding, slots: int, out: int, size: int) -> tuple[packed.PackedSlots, Tensor]:
    """Random slots in the layout of kernels, and the float32 [slots, out, size] they stand for."""
    stored = encode(torch.randn(slots * out, size), coding)
    planes = [plane.view(slots, out, -1) for plane in stored.planes]
    scales = stored.scales.view(slots, out, -1)
    values = decode(stored, coding, size).view(slots, out, size)
    return packed.arranged(planes, scales, coding, size), values


def products(
    x: Tensor, values: Sequence[Tensor], tables: Sequence[list[int]], physical: list[int], k: int
) -> Tensor:
    """float64 [routes, out], one product at a time."""
    out = torch.zeros(len(physical), values[0].shape[1], dtype=torch.float64)
    for route, expert in enumerate(physical):
        for value, table in zip(values, tables, strict=True):
            if expert >= 0 and table[expert] >= 0:
                out[route] += value[table[expert]].double() @ x[route // k].double()
    return out


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


class TestArranged:
    @pytest.mark.parametrize("coding", CODINGS, ids=lambda coding: coding.name)
    def test_stands_for_the_same(self, coding: Coding) -> None:
        slots, values = coded(coding, 3, 18, 290)
        index = torch.tensor([2, 0])
        assert torch.equal(packed.decode(slots, index), values[index])

    @settings(max_examples=60, deadline=None)
    @given(st.sampled_from(CODINGS), st.integers(1, 3), st.integers(1, 40), st.integers(1, 600))
    def test_any_shape(self, coding: Coding, slots: int, out: int, size: int) -> None:
        arranged, values = coded(coding, slots, out, size)
        assert torch.equal(packed.decode(arranged, torch.arange(slots)), values)

    @pytest.mark.parametrize("coding", CODINGS, ids=lambda coding: coding.name)
    def test_is_no_larger(self, coding: Coding) -> None:
        slots, _ = coded(coding, 2, 32, 512)
        assert slots.nbytes == coding.nbytes(2 * 32, 512)

    def test_fields_of_a_byte_are_a_block_apart(self) -> None:
        codes = torch.arange(64) % 16
        row = (codes[0::2] | codes[1::2] << 4).to(torch.uint8).view(1, 1, 32)
        slots = packed.arranged([row], torch.ones(1, 1, 1).bfloat16(), Coding(4, 64), 64)
        assert slots.planes[0].shape == (1, 1, 16, 32)
        assert slots.planes[0][0, 0, 0].tolist() == [(b % 16) * 17 for b in range(32)]


class TestReference:
    """float32 activations, which always take it."""

    @pytest.mark.parametrize("coding", [Coding(4, 64), Coding(3, 0), Coding(8, 32)])
    def test_direct(self, coding: Coding) -> None:
        (first, values), (second, others) = (
            coded(coding, 2, 24, 90),
            coded(Coding(2, 64), 3, 24, 90),
        )
        x, physical = torch.randn(3, 90), [0, 1, 2, 2, -1, 0]
        tables = [[1, 0, 1], [-1, 2, 0]]
        terms = [
            (slots, torch.tensor(table, dtype=torch.int32))
            for slots, table in zip((first, second), tables, strict=True)
        ]
        out = torch.full((4, 6, 24), torch.nan)
        packed.direct(packed.digits(x), terms, torch.tensor(physical, dtype=torch.int32), 2, out)
        assert distance(out.sum(0), products(x, (values, others), tables, physical, 2)) < 1e-6
        assert torch.equal(out[:, 4], torch.zeros(4, 24))

    def test_blocked(self) -> None:
        slots, values = coded(Coding(5, 128), 3, 20, 100)
        x = torch.randn(5, 100)
        order = torch.tensor([3, 0, -1, -1, 1, 2, 5, 7, 9, 4, -1, -1], dtype=torch.int32)
        owners = torch.tensor([2, 0, -1], dtype=torch.int32)
        more, others = coded(Coding(2, 64), 2, 20, 100)
        second = torch.tensor([0, 3, -1, 5], dtype=torch.int32)
        terms = [(slots, order, owners), (more, second, torch.tensor([1], dtype=torch.int32))]
        out = torch.full((2, 10, 20), torch.nan)
        packed.blocked(packed.digits(x), terms, 2, out)
        physical = [2, 0, 0, 2, -1, 0, -1, 0, -1, -1]
        used = [route for route, slot in enumerate(physical) if slot >= 0]
        expected = products(x, [values], [[0, 1, 2]], physical, 2)
        added = [1 if route in (0, 3, 5) else -1 for route in range(10)]
        expected += products(x, [others], [[0, 1]], added, 2)
        assert distance(out.sum(0)[used], expected[used]) < 1e-6
        assert out[:, [4, 6, 8, 9]].isnan().all()

    @pytest.mark.parametrize("activation", sorted(packed.ACTIVATIONS))
    def test_gated_digits(self, activation: str) -> None:
        partials = torch.randn(3, 4, 64)
        found = packed.gated_digits(partials, activation, torch.float32)
        gate, up = partials.sum(0).split(32, dim=1)
        assert torch.equal(found.values, packed.ACTIVATIONS[activation](gate) * up)
        assert found.in_features == 32

    def test_unknown_activation(self) -> None:
        with pytest.raises(ValueError, match="activation must be one of"):
            packed.gated_digits(torch.zeros(1, 1, 2), "swish2", torch.float32)

    @pytest.mark.parametrize("added", [False, True])
    def test_reduced(self, added: bool) -> None:
        partials, weights = torch.randn(2, 6, 8), torch.rand(3, 2)
        partials[:, [1, 4, 5]] = torch.nan  # of routes that are none
        physical = torch.tensor([[3, -1], [0, 0], [-1, -1]], dtype=torch.int32)
        residual = torch.randn(3, 8) if added else None
        routes = partials.double().nan_to_num().sum(0).view(3, 2, 8)
        expected = (routes * weights.double()[..., None]).sum(1)
        if residual is not None:
            expected += residual.double()
        found = packed.reduced(partials, physical, weights, residual, torch.float32)
        assert distance(found, expected) < 1e-6


class TestSplits:
    def test_few_out_features_are_split(self) -> None:
        wide, _ = coded(Coding(4, 64), 1, 4096, 64)
        assert packed.splits(wide, 1) == 1  # there is little to split
        long, _ = coded(Coding(4, 64), 1, 16, 8192)
        assert packed.splits(long, 1) > 1
        assert packed.splits(long, 10_000) == 1
