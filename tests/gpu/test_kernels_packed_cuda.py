"""Kernels of products with packed weights against float64.

Runs on a GPU, or with TRITON_INTERPRET=1 on a CPU, slowly.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from moecc.coding import Coding, decode, encode
from moecc.kernels import packed
from moecc.kernels.gpu import packed as kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
CODINGS = [Coding(bits, group) for bits in (1, 2, 3, 4, 5, 6, 8) for group in (0, 32, 64, 128)]
SHAPES = [(40, 90), (48, 96), (32, 160), (18, 300)] if INTERPRETED else [(130, 90), (2080, 1408)]
# The interpreter cuts float32 off to bfloat16, where a GPU rounds.
DTYPE = torch.float16 if INTERPRETED else torch.bfloat16
TOLERANCE = 4e-4

pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU"
)


def coded(coding: Coding, slots: int, out: int, size: int) -> tuple[packed.PackedSlots, Tensor]:
    """Random slots in the layout of kernels, and the float64 [slots, out, size] they stand for."""
    stored = encode(torch.randn(slots * out, size, device=DEVICE), coding)
    planes = [plane.view(slots, out, -1) for plane in stored.planes]
    values = decode(stored, coding, size).view(slots, out, size)
    scales = stored.scales.view(slots, out, -1)
    return packed.arranged(planes, scales, coding, size), values.double()


def products(x: Tensor, values: Tensor, slots: Sequence[int], k: int) -> Tensor:
    """float64 [routes, out] of the slot of each route; zeros where it is negative."""
    out = x.new_zeros(len(slots), values.shape[1], dtype=torch.float64)
    for route, slot in enumerate(slots):
        if slot >= 0:
            out[route] = values[slot] @ x[route // k].double()
    return out


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def ints(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def activations(rows: int, size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Rows of very different size, with outliers."""
    x = torch.randn(rows, size, device=DEVICE) * torch.logspace(-2, 2, rows, device=DEVICE)[:, None]
    x[:, :: size // 3] *= 30
    return x.to(dtype)


def decoded(digits: packed.Digits) -> Tensor:
    """float64 [rows, padded in] of digits."""
    assert digits.scale is not None
    padded = digits.values.shape[2]
    parts = digits.scale.shape[1]
    part = -(-padded // packed.PADDING // parts) * packed.PADDING
    high, low = digits.values.double().unbind(1)
    scale = digits.scale.double().repeat_interleave(part, dim=1)[:, :padded]
    return (256 * high + low) * scale


class TestDigits:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(("size", "parts"), [(90, 1), (256, 2), (1408, 1), (1408, 4)])
    def test_close(self, dtype: torch.dtype, size: int, parts: int) -> None:
        x = activations(5, size, dtype)
        x[3] = 0
        values = decoded(packed.digits(x, parts))
        bound = x.abs().amax(1, keepdim=True).double() / 65000
        assert (values[:, :size] - x.double()).abs().le(bound).all()
        assert not values[:, size:].any()
        assert values.shape[1] % packed.PADDING == 0

    def test_not_finite(self) -> None:
        x = activations(3, 100)
        x[0, 7], x[2, 99] = torch.nan, -torch.inf
        scale = packed.digits(x).scale
        assert scale is not None
        assert scale[:, 0].isnan().tolist() == [True, False, True]

    @pytest.mark.parametrize("parts", [1, 3])
    @pytest.mark.parametrize("activation", sorted(packed.ACTIVATIONS))
    def test_gated(self, activation: str, parts: int) -> None:
        partials = torch.randn(3, 4, 2 * 300, device=DEVICE)
        values = decoded(packed.gated_digits(partials, activation, DTYPE, parts))
        gate, up = partials.double().sum(0).split(300, dim=1)
        expected = packed.ACTIVATIONS[activation](gate) * up
        assert distance(values[:, :300], expected) < 5e-3  # of bfloat16


class TestProducts:
    @pytest.mark.parametrize("coding", CODINGS, ids=lambda coding: coding.name)
    @pytest.mark.parametrize("shape", SHAPES)
    def test_direct(self, coding: Coding, shape: tuple[int, int]) -> None:
        (first, values), (second, others) = (
            coded(coding, 2, *shape),
            coded(Coding(2, 64), 3, *shape),
        )
        x, physical = activations(3, shape[1]), [0, 1, 2, 2, -1, 0]
        tables = [[1, 0, -1], [-1, 2, 0]]
        terms = [(first, ints(tables[0])), (second, ints(tables[1]))]
        out = torch.full((4, 6, shape[0]), torch.nan, device=DEVICE)
        packed.direct(packed.digits(x), terms, ints(physical), 2, out)
        for table, term, part in zip(tables, (values, others), out.split(2), strict=True):
            slots = [table[expert] if expert >= 0 else -1 for expert in physical]
            expected = products(x, term, slots, 2)
            for route in range(6):  # each by itself: rows differ in size
                if slots[route] >= 0:
                    assert distance(part.sum(0)[route], expected[route]) < TOLERANCE
                else:
                    assert not part[:, route].any()

    @pytest.mark.parametrize("block", [4, 8, 16])
    @pytest.mark.parametrize("coding", CODINGS[::3], ids=lambda coding: coding.name)
    def test_blocked(self, coding: Coding, block: int) -> None:
        shape = SHAPES[-1]
        slots, values = coded(coding, 3, *shape)
        x = activations(block, shape[1])
        order = ints([-1] * 4 * block).view(4, block)
        routes = torch.randperm(2 * block).int().to(DEVICE)
        order[0], order[1, : block // 2] = routes[:block], routes[block : block + block // 2]
        order[2, 0] = routes[-1]
        owner = [2, 2, 0, -1]
        expected_slots = [-1] * 2 * block
        for index, members in enumerate(order.tolist()):
            for route in members:
                if route >= 0:
                    expected_slots[route] = owner[index]
        out = torch.full((2, 2 * block, shape[0]), torch.nan, device=DEVICE)
        packed.blocked(packed.digits(x), [(slots, order.view(-1), ints(owner))], 2, out)
        expected = products(x, values, expected_slots, 2)
        for route, slot in enumerate(expected_slots):
            if slot >= 0:
                assert distance(out.sum(0)[route], expected[route]) < TOLERANCE
            else:
                assert out[:, route].isnan().all()

    @pytest.mark.parametrize("parts", [1, 2])
    @pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[-1]])
    def test_blocked_terms(self, shape: tuple[int, int], parts: int) -> None:
        """Three, with blocks of their own; tiles of the first shape overlap."""
        x, routes, terms, expected = activations(8, shape[1]), 16, [], []
        for number, (coding, block) in enumerate(
            [("4bit-g64", 16), ("2bit-g64", 4), ("1bit-g32", 8)]
        ):
            slots, values = coded(Coding.parse(coding), 2, *shape)
            order = torch.randperm(routes, device=DEVICE).int()
            owners = [i % 2 for i in range(routes // block)]
            by_route = [0] * routes
            for index, route in enumerate(order.tolist()):
                by_route[route] = owners[index // block]
            # Blocks that are not used come last.
            order = torch.cat([order, ints([-1] * number * block)])
            terms.append((slots, order, ints([*owners, *[-1] * number])))
            expected.append(products(x, values, by_route, 2))
        for count in range(1, 4):
            out = torch.full((parts, routes, shape[0]), torch.nan, device=DEVICE)
            packed.blocked(packed.digits(x, parts), terms[:count], 2, out)
            wanted = torch.stack(expected[:count]).sum(0)
            for route in range(routes):
                assert distance(out.sum(0)[route], wanted[route]) < TOLERANCE

    @pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
    def test_later_terms_see_new_rows(self) -> None:
        """The first term, whose few programs leave most of the GPU idle, waits for the digits."""
        shape = (2080, 1408)
        first, one = coded(Coding(4, 64), 1, *shape)
        second, many = coded(Coding(2, 64), 16, *shape)
        x, order = activations(16, shape[1]), torch.arange(16, device=DEVICE).int()
        padded = torch.full((16, 4), -1, dtype=torch.int32, device=DEVICE)
        padded[:, 0] = order
        terms = [(first, order, ints([0])), (second, padded.view(-1), order)]
        out = torch.empty(1, 16, shape[0], device=DEVICE)
        packed.blocked(packed.digits(x), terms, 1, out)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            packed.blocked(packed.digits(x), terms, 1, out)
        for _ in range(50):
            x.copy_(activations(16, shape[1]).flip(0))
            out.fill_(torch.nan)
            graph.replay()
            expected = x.double() @ one[0].T + torch.einsum("ni,noi->no", x.double(), many)
            assert distance(out[0], expected) < TOLERANCE

    @pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
    def test_the_last_term_ends_after_the_first(self) -> None:
        """It has nothing to do, and what follows reads the sums of the first."""
        shape = (8192, 8192)
        first, values = coded(Coding(4, 64), 2, *shape)
        second, _ = coded(Coding(2, 64), 1, *shape)
        x, order = activations(32, shape[1]), torch.arange(32, device=DEVICE).int()
        owners, none = ints([0, 1]), ints([-1] * 8)
        terms = [(first, order, owners), (second, ints([-1] * 32), none)]
        weights = torch.ones(32, 1, device=DEVICE)
        physical = torch.zeros(32, 1, dtype=torch.int32, device=DEVICE)

        def run() -> Tensor:
            out = torch.zeros(1, 32, shape[0], device=DEVICE)
            packed.blocked(packed.digits(x), terms, 1, out)
            return packed.reduced(out, physical, weights, None, torch.bfloat16)

        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = run()
        for _ in range(20):
            x.copy_(activations(32, shape[1]).flip(0))
            graph.replay()
            expected = torch.cat([x[:16].double() @ values[0].T, x[16:].double() @ values[1].T])
            assert distance(found, expected) < 4e-3

    def test_more_terms_than_a_launch_takes(self) -> None:
        shape = SHAPES[0]
        found = [coded(Coding(bits, 64), 2, *shape) for bits in (4, 2, 1)]
        x, physical = activations(2, shape[1]), [0, 1, 1, 0]
        tables = [[1, 0], [0, -1], [-1, 1]]
        terms = [(slots, ints(table)) for (slots, _), table in zip(found, tables, strict=True)]
        out = torch.full((3, 4, shape[0]), torch.nan, device=DEVICE)
        packed.direct(packed.digits(x), terms, ints(physical), 2, out)
        expected = sum(
            products(x, values, [table[expert] for expert in physical], 2)
            for (_, values), table in zip(found, tables, strict=True)
        )
        assert isinstance(expected, Tensor)
        assert distance(out.sum(0)[2:], expected[2:]) < TOLERANCE

    def test_digits_in_parts(self) -> None:
        slots, values = coded(Coding(4, 64), 2, 16, 700)
        x = activations(2, 700)
        x[:, :256] *= 1000
        out = torch.full((3, 2, 16), torch.nan, device=DEVICE)
        packed.direct(packed.digits(x, 3), [(slots, ints([1, 0]))], ints([0, 1]), 1, out)
        expected = products(x, values, [1, 0], 1)
        assert distance(out.sum(0), expected) < TOLERANCE
        assert (
            distance(out[1:].sum(0), products(x[:, 256:], values[..., 256:], [1, 0], 1)) < TOLERANCE
        )
        with pytest.raises(ValueError, match="digits in 2 parts, for a product in 3"):
            packed.direct(packed.digits(x, 2), [(slots, ints([1, 0]))], ints([0, 1]), 1, out)

    def test_out_must_have_parts_for_all_terms(self) -> None:
        slots, _ = coded(Coding(4, 64), 1, 16, 64)
        out = torch.empty(3, 2, 16, device=DEVICE)
        x, table = packed.digits(activations(2, 64)), ints([0])
        with pytest.raises(ValueError, match="parts for 2 terms"):
            packed.direct(x, [(slots, table)] * 2, ints([0, 0]), 1, out)

    @pytest.mark.parametrize("added", [False, True])
    def test_reduced(self, added: bool) -> None:
        partials = torch.randn(3, 10, 600, device=DEVICE)
        partials[:, [2, 6, 7]] = torch.nan
        weights = torch.rand(5, 2, device=DEVICE)
        physical = ints([0, 1, -1, 4, 0, 0, -1, -1, 2, 2]).view(5, 2)
        residual = torch.randn(5, 600, device=DEVICE).to(DTYPE) if added else None
        found = packed.reduced(partials, physical, weights, residual, DTYPE)
        routes = partials.double().nan_to_num().sum(0).view(5, 2, 600)
        expected = (routes * weights.double()[..., None]).sum(1)
        if residual is not None:
            expected += residual.double()
        assert found.dtype == DTYPE
        assert distance(found, expected) < 4e-3


class TestAssembly:
    """What the interpreter leaves out: each instruction, on bytes that hold every value."""

    @pytest.mark.parametrize("widths", [(1, 0), (2, 0), (4, 0), (2, 1), (4, 1), (4, 2)])
    def test_levels(self, widths: tuple[int, int]) -> None:
        high, low = widths
        generator = torch.Generator().manual_seed(0)
        bytes_ = torch.randint(0, 256, (2, 512), generator=generator, dtype=torch.uint8)
        for field in range(8 // high):
            for low_field in range(8 // (low or 8)):
                text = kernels._assembly(high, low, field, low_field)
                code = (bytes_[0] >> (field * high)) & (2**high - 1)
                if low:
                    code = (code << low) | ((bytes_[1] >> (low_field * low)) & (2**low - 1))
                bits = high + low
                expected = (code.double() - (2**bits - 1) / 2) * 2 ** (8 - bits)
                assert _run(_plain(text), bytes_).double().equal(expected)


def _plain(text: Any) -> str:
    """The string of a constant expression."""
    return str(getattr(text, "value", text))


def _run(text: str, bytes_: Tensor) -> Tensor:
    """int8 [n] that some PTX makes of uint8 [2, n], as four bytes in a register at a time."""
    words = bytes_.view(torch.int32).long() & 0xFFFFFFFF
    registers = {"$1": words[0], "$2": words[1]}

    def value(operand: str) -> Any:
        return int(operand, 0) if operand[0].isdigit() else registers[operand]

    for name, operands in re.findall(r"(\w+)\.b32 ([$0-9a-zA-Z][^;]*);", text):
        target, *sources = operands.split(", ")
        if name == "lop3":
            one, two, three = (value(source) for source in sources[:3])
            table, found = int(sources[3], 0), torch.zeros_like(words[0])
            for case in range(8):
                if table >> case & 1:
                    parts = zip((one, two, three), (case & 4, case & 2, case & 1), strict=True)
                    mask = torch.full_like(words[0], 0xFFFFFFFF)
                    for part, wanted in parts:
                        mask &= part if wanted else ~part & 0xFFFFFFFF
                    found |= mask
            registers[target] = found
        elif name in ("shl", "shr"):
            source, by = value(sources[0]), value(sources[1])
            moved = source << by if name == "shl" else source >> by
            registers[target] = moved & 0xFFFFFFFF
    words = registers["$0"]
    return torch.where(words >= 2**31, words - 2**32, words).int().view(torch.int8)
