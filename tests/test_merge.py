"""moecc.merge: what a coded tile stores and stands for, by hand and by definition."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moecc.coding import Coded, Coding, decode, encode
from moecc.merge import CodedTile, add_residual, code_tile, mean

CENTERS = [torch.bfloat16, torch.float16, Coding(8, 32), Coding(4, 64), Coding(4, 0)]
RESIDUALS = [None, Coding(1, 64), Coding(2, 32), Coding(3, 0)]


def center_id(center: Coding | torch.dtype) -> str:
    return center.name if isinstance(center, Coding) else str(center).removeprefix("torch.")


every_center = pytest.mark.parametrize("center", CENTERS, ids=center_id)
every_residual = pytest.mark.parametrize(
    "residual", RESIDUALS, ids=lambda r: r.name if r else "none"
)


def siblings(count: int, rows: int, columns: int, seed: int = 0) -> list[Tensor]:
    """Experts in bfloat16, as float32, a tenth apart."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, columns, generator=generator)
    noise = torch.randn(count, rows, columns, generator=generator)
    return list((base + 0.1 * noise).bfloat16().float())


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )


def stored_center(tile: CodedTile, center: Coding | torch.dtype, columns: int) -> Tensor:
    """The float32 center that the stored tensors stand for."""
    if isinstance(center, torch.dtype):
        (value,) = tile.center
        assert value.dtype == center
        return value.float()
    *planes, scales = tile.center
    return decode(Coded(tuple(planes), scales), center, columns)


def stored_delta(parts: tuple[Tensor, ...], residual: Coding, columns: int) -> Tensor:
    *planes, scales = parts
    return decode(Coded(tuple(planes), scales), residual, columns)


def served(
    tile: CodedTile, center: Coding | torch.dtype, residual: Coding | None, columns: int, count: int
) -> list[Tensor]:
    """What every member becomes, by the definition: float32 sum, rounded once to bfloat16.

    A 16-bit center without residuals is served as it is.
    """
    value = stored_center(tile, center, columns)
    if residual is None:
        assert tile.residuals == ((),) * count
        plain = value if isinstance(center, torch.dtype) else to_bfloat16(value.numpy())
        return [plain] * count
    assert len(tile.residuals) == count
    return [
        to_bfloat16(value.numpy() + stored_delta(parts, residual, columns).numpy())
        for parts in tile.residuals
    ]


def to_bfloat16(x: np.ndarray) -> Tensor:
    """Float32 rounded to the nearest bfloat16, ties to even, with integers."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return torch.from_numpy(rounded.astype(np.uint32).view(np.float32))


def coded_tile(
    tiles: list[Tensor],
    weights: list[int],
    *,
    representative: int | None,
    center: Coding | torch.dtype,
    residual: Coding | None,
) -> CodedTile:
    """Around one of the tiles or their mean, with the same residual for everyone."""
    wanted = mean(tiles, weights) if representative is None else tiles[representative]
    residuals = [residual] * len(tiles)
    return code_tile(tiles, weights, wanted=wanted, center=center, residuals=residuals)


# The mean


def test_mean_by_hand() -> None:
    a, b, c = torch.tensor([[1.0, -4.0]]), torch.tensor([[3.0, 0.0]]), torch.tensor([[0.5, 1.0]])
    assert mean([a, b], [1, 1]).tolist() == [[2.0, -2.0]]
    assert mean([a, b], [3, 1]).tolist() == [[1.5, -3.0]]
    assert mean([a, b, c], [1, 1, 2]).tolist() == [[1.25, -0.5]]
    assert mean([c], [7]).tolist() == [[0.5, 1.0]]
    assert a.tolist() == [[1.0, -4.0]]  # the members are as they were


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mean_of_equal_values_is_exact(dtype: torch.dtype) -> None:
    """Every 16-bit pattern for every count of up to 64, up to where 64 of them overflow."""
    pattern = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = pattern.view(dtype).float()
    x = x[x.isfinite() & (x.abs() < 2.0**122)][None]
    for count in range(1, 65):
        assert torch.equal(mean([x] * count, [1] * count), x)
        if count < 64:
            assert torch.equal(mean([x, x], [count, 64 - count]), x)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 8), min_size=1, max_size=6),
    st.integers(0, 2**32),
    st.integers(1, 40),
)
def test_a_weight_is_the_tile_repeated(weights: list[int], seed: int, columns: int) -> None:
    """To the bit for 16-bit members of like size, whose sums are exact."""
    generator = torch.Generator().manual_seed(seed)
    tiles = [(torch.rand(3, columns, generator=generator) + 1).bfloat16().float() for _ in weights]
    repeated = [t for t, weight in zip(tiles, weights, strict=True) for _ in range(weight)]
    found = mean(tiles, weights)
    assert torch.equal(found, mean(repeated, [1] * len(repeated)))
    exact = sum(Fraction(float(t[0, 0])) for t in repeated) / len(repeated)
    assert float(found[0, 0]) == float(np.float32(exact.numerator / exact.denominator))


def test_mean_of_float32_is_that_of_float64() -> None:
    tiles = [torch.randn(5, 33, generator=torch.Generator().manual_seed(i)) for i in range(7)]
    weights = [1, 5, 2, 1, 9, 3, 1]
    expected = sum(t.double() * w for t, w in zip(tiles, weights, strict=True)) / sum(weights)
    torch.testing.assert_close(mean(tiles, weights).double(), expected, rtol=1e-5, atol=1e-6)


# By hand


def test_plain_mean_by_hand() -> None:
    """1 and 1 + 2**-7 are neighbors in bfloat16: their mean is a tie and goes to the even, 1."""
    step = 2.0**-7
    tiles = [torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0 + step, 4.0]])]
    tile = coded_tile(tiles, [1, 1], representative=None, center=torch.bfloat16, residual=None)
    (center,) = tile.center
    assert center.dtype == torch.bfloat16
    assert center.tolist() == [[1.0, 3.0]]
    assert tile.residuals == ((), ())
    assert tile.squared_error == step**2 + 1 + 1
    half = coded_tile(tiles, [1, 1], representative=None, center=torch.float16, residual=None)
    assert half.center[0].tolist() == [[1.0 + step / 2, 3.0]]
    assert half.squared_error == 2 * (step / 2) ** 2 + 1 + 1


def test_one_bit_residuals_by_hand() -> None:
    """The mean of ±1 around 8 is 8; a 1-bit code stands for ± half its scale, here 2."""
    tiles = [torch.full((1, 32), 7.0), torch.full((1, 32), 9.0)]
    coding = Coding(1, 32)
    tile = coded_tile(tiles, [1, 1], representative=None, center=torch.bfloat16, residual=coding)
    assert torch.equal(tile.center[0], torch.full((1, 32), 8.0, dtype=torch.bfloat16))
    for parts, bits in zip(tile.residuals, (0, 255), strict=True):
        plane, scales = parts
        assert plane.dtype == torch.uint8
        assert plane.tolist() == [[bits] * 4]
        assert scales.dtype == torch.bfloat16
        assert scales.tolist() == [[2.0]]
    assert tile.squared_error == 0


def test_weights_move_the_center_and_count_in_the_error() -> None:
    tiles = [torch.tensor([[0.0]]), torch.tensor([[4.0]])]
    tile = coded_tile(tiles, [3, 1], representative=None, center=torch.bfloat16, residual=None)
    assert tile.center[0].tolist() == [[1.0]]
    assert tile.squared_error == 3 * 1 + 9


def test_a_representative_is_stored_as_it_is() -> None:
    tiles = siblings(3, 4, 64)
    for chosen in range(3):
        tile = coded_tile(
            tiles, [1, 5, 1], representative=chosen, center=torch.bfloat16, residual=Coding(2, 64)
        )
        assert torch.equal(tile.center[0].float(), tiles[chosen])
        values = served(tile, torch.bfloat16, Coding(2, 64), 64, 3)
        assert torch.equal(values[chosen], tiles[chosen])
        assert not any(torch.equal(values[i], tiles[i]) for i in range(3) if i != chosen)


def test_a_representative_in_bits_is_coded_like_any_rows() -> None:
    tiles = siblings(2, 4, 100)
    coding = Coding(5, 32)
    tile = coded_tile(tiles, [1, 1], representative=1, center=coding, residual=None)
    expected = encode(tiles[1], coding)
    assert all(map(same, tile.center, (*expected.planes, expected.scales)))


# By definition


@every_center
@every_residual
@pytest.mark.parametrize("representative", [None, 1])
def test_the_definition(
    center: Coding | torch.dtype, residual: Coding | None, representative: int | None
) -> None:
    columns, weights = 100, [2, 1, 3]
    tiles = siblings(3, 6, columns)
    tile = coded_tile(
        tiles, weights, representative=representative, center=center, residual=residual
    )
    value = stored_center(tile, center, columns)
    wanted = mean(tiles, weights) if representative is None else tiles[representative]
    if isinstance(center, torch.dtype):
        assert same(tile.center[0], wanted.to(center))
    else:
        expected = encode(wanted, center)
        assert all(map(same, tile.center, (*expected.planes, expected.scales)))
    if residual is not None:
        for member, parts in zip(tiles, tile.residuals, strict=True):
            expected = encode(member - value, residual)
            assert all(map(same, parts, (*expected.planes, expected.scales)))
    values = served(tile, center, residual, columns, len(tiles))
    error = sum(
        w * float(((v.double() - t.double()) ** 2).sum())
        for v, t, w in zip(values, tiles, weights, strict=True)
    )
    assert tile.squared_error == pytest.approx(error, rel=1e-5)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.floats(width=32), st.floats(width=32)), min_size=1, max_size=50))
def test_the_sum_is_rounded_once(pairs: list[tuple[float, float]]) -> None:
    a, b = (np.array(x, dtype=np.float32) for x in zip(*pairs, strict=True))
    with np.errstate(all="ignore"):
        total = a + b
    finite = np.isfinite(total)
    found = add_residual(torch.from_numpy(a), torch.from_numpy(b))
    assert found.dtype == torch.bfloat16
    expected = to_bfloat16(total[finite])
    assert torch.equal(found[torch.from_numpy(finite)].float(), expected)


def test_the_residual_corrects_the_rounding_of_the_center() -> None:
    """It is coded against the stored center: with a coarse one, more than noise is left to it."""
    tiles = siblings(1, 8, 128) * 2
    for center in (Coding(4, 64), torch.float16):
        without, with_residual = (
            coded_tile(tiles, [1, 1], representative=None, center=center, residual=r)
            for r in (None, Coding(3, 32))
        )
        if isinstance(center, Coding):
            assert with_residual.squared_error < 0.1 * without.squared_error
        else:
            assert without.squared_error == with_residual.squared_error == 0


def test_more_residual_bits_are_better() -> None:
    tiles = siblings(3, 32, 128)
    errors = [
        coded_tile(
            tiles, [1, 1, 1], representative=None, center=Coding(8, 64), residual=residual
        ).squared_error
        for residual in (None, Coding(1, 64), Coding(2, 64), Coding(3, 64))
    ]
    parts = [b / a for a, b in pairwise(errors)]
    assert parts[0] == pytest.approx(0.363, rel=0.15)  # Max's distortion of one bit
    assert all(part < 0.5 for part in parts)


@every_center
@every_residual
def test_identical_members_need_no_spread(
    center: Coding | torch.dtype, residual: Coding | None
) -> None:
    """Weights say how often a tile occurs: the same as one member, and its error so often."""
    (tile,) = siblings(1, 5, 70)
    one = coded_tile([tile], [1], representative=None, center=center, residual=residual)
    five = coded_tile([tile], [5], representative=None, center=center, residual=residual)
    assert all(map(same, one.center, five.center))
    assert five.squared_error == pytest.approx(5 * one.squared_error, rel=1e-12)
    assert [bool(parts) for parts in five.residuals] == [residual is not None]


# Rows


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 12),
    columns=st.integers(1, 140),
    cuts=st.lists(st.integers(1, 11), max_size=4),
    weights=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    bf16=st.booleans(),
    center=st.sampled_from(CENTERS),
    residual=st.sampled_from(RESIDUALS),
    chosen=st.booleans(),
)
def test_rows_in_pieces_are_the_rows_at_once(
    seed: int,
    rows: int,
    columns: int,
    cuts: list[int],
    weights: list[int],
    bf16: bool,
    center: Coding | torch.dtype,
    residual: Coding | None,
    chosen: bool,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tiles = [torch.randn(rows, columns, generator=generator) for _ in weights]
    if bf16:
        tiles = [tile.bfloat16().float() for tile in tiles]
    representative = len(weights) - 1 if chosen else None

    def code(part: list[Tensor]) -> CodedTile:
        return coded_tile(
            part, weights, representative=representative, center=center, residual=residual
        )

    whole = code(tiles)
    edges = sorted({0, rows, *(cut for cut in cuts if cut < rows)})
    pieces = [code([tile[a:b] for tile in tiles]) for a, b in pairwise(edges)]
    for i, part in enumerate(whole.center):
        assert same(part, torch.cat([piece.center[i] for piece in pieces]))
    for member, parts in enumerate(whole.residuals):
        for i, part in enumerate(parts):
            assert same(part, torch.cat([piece.residuals[member][i] for piece in pieces]))
    total = math.fsum(piece.squared_error for piece in pieces)
    assert whole.squared_error == pytest.approx(total, rel=1e-5, abs=1e-12)


def test_zeros_stay_zeros() -> None:
    tiles = [torch.zeros(3, 40)] * 2
    for center in CENTERS:
        for residual in RESIDUALS:
            tile = coded_tile(tiles, [1, 1], representative=None, center=center, residual=residual)
            assert tile.squared_error == 0
            for value in served(tile, center, residual, 40, 2):
                assert not value.any()


def test_the_members_are_left_alone() -> None:
    tiles = siblings(2, 3, 40)
    before = [tile.clone() for tile in tiles]
    for representative in (None, 0):
        coded_tile(
            tiles,
            [1, 2],
            representative=representative,
            center=Coding(4, 32),
            residual=Coding(2, 32),
        )
        assert all(map(torch.equal, tiles, before))
