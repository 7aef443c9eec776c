"""moecc.joint: against plain quantization, GPTQ in float64, and its own losses, pass by pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moecc.blocks import damped
from moecc.coding import Coded, Coding, decode, encode, quantize, unpack
from moecc.joint import _Codes, _State, center_target, code_jointly

Center = Coding | torch.dtype


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Small tensors: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def siblings(count: int, rows: int, columns: int, seed: int = 0, apart: float = 0.2) -> Tensor:
    """Float32 [V, R, K]: one Gaussian matrix, and what each variant adds to it."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, columns, generator=generator)
    return base + apart * torch.randn(count, rows, columns, generator=generator)


def correlated(count: int, blocks: int, size: int, seed: int = 0, samples: int = 0) -> Tensor:
    """Damped moments [V, blocks, B, B] of inputs with a few strong directions in common."""
    generator = torch.Generator().manual_seed(seed + 1000)
    mix = torch.randn(blocks, size, size, generator=generator) * 0.3
    mix[..., : max(1, size // 8)] *= 8
    raw = torch.randn(count, blocks, samples or 3 * size, size, generator=generator)
    inputs = raw @ mix.mT
    return damped(inputs.mT @ inputs / inputs.shape[2])


def served(
    coded: Coded | Tensor,
    parts: Sequence[Coded | None],
    center: Center,
    residuals: Sequence[Coding | None],
    columns: int,
) -> Tensor:
    """Float32 [V, R, K] of what is stored."""
    if isinstance(coded, Tensor):
        assert coded.dtype == center
        value = coded.float()
    else:
        assert isinstance(center, Coding)
        value = decode(coded, center, columns)
    found = []
    for part, residual in zip(parts, residuals, strict=True):
        assert (part is None) == (residual is None)
        own = value
        if part is not None and residual is not None:
            own = value + decode(part, residual, columns)
        found.append(own)
    return torch.stack(found)


def code(
    targets: Tensor,
    moments: Tensor | None,
    center: Center,
    residuals: Sequence[Coding | None],
    importance: Sequence[float] | None = None,
    **options: int,
) -> Tensor:
    weights = torch.tensor(list(importance or [1.0] * len(targets)))
    coded, parts = code_jointly(
        targets, weights, moments, center=center, residuals=residuals, **options
    )
    return served(coded, parts, center, residuals, targets.shape[-1])


def lost(targets: Tensor, values: Tensor, moments: Tensor | None = None) -> npt.NDArray[np.float64]:
    """Float64 [V], each member's error, by definition: trace of (W - Q) H (W - Q)^T."""
    off = (targets - values).double().numpy()
    if moments is None:
        return (off**2).sum((1, 2))
    found = np.zeros(len(off))
    size = moments.shape[-1]
    for v, block in np.ndindex(*moments.shape[:2]):
        part = off[v, :, block * size : (block + 1) * size]
        own = moments[v, block].double().numpy()[: part.shape[1], : part.shape[1]]
        found[v] += np.einsum("ri,ij,rj", part, own, part)
    return found


def gptq(
    target: Tensor, moments: Tensor, coding: Coding, scales: Tensor
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Values and codes of one matrix, column by column in float64, the inverse updated by hand."""
    left = target.double().numpy().copy()
    inverse = np.linalg.inv(moments.double().numpy())
    steps = scales.float().repeat_interleave(coding.group or left.shape[1], 1).double().numpy()
    values, codes = np.zeros_like(left), np.zeros(left.shape, dtype=np.int64)
    top = (2**coding.bits - 1) / 2
    for i in range(left.shape[1]):
        level = np.clip(np.floor(left[:, i] / steps[:, i]) + 0.5, -top, top)
        values[:, i], codes[:, i] = level * steps[:, i], (level + top).astype(np.int64)
        missed = (left[:, i] - values[:, i]) / inverse[i, i]
        left[:, i:] -= np.outer(missed, inverse[i, i:])
        inverse = inverse - np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return values, codes


# One member


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [0, 32, 64])
@pytest.mark.parametrize("columns", [64, 100])
def test_a_matrix_alone_is_never_coded_worse_than_by_itself(
    bits: int, group: int, columns: int
) -> None:
    targets, coding = siblings(1, 12, columns), Coding(bits, group)
    plain = decode(encode(targets[0], coding), coding, columns)[None]
    error = lost(targets, plain).sum()
    assert lost(targets, code(targets, None, coding, [None])).sum() <= error * (1 + 1e-6)
    assert lost(targets, code(targets, None, coding, [None], passes=0)).sum() <= error * (1 + 1e-6)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    bits=st.sampled_from([1, 2, 3, 4, 5, 6, 8]),
    group=st.sampled_from([0, 32, 64]),
    rows=st.integers(1, 6),
    columns=st.integers(1, 140),
    passes=st.integers(0, 4),
)
def test_any_matrix_alone_is_never_coded_worse_than_by_itself(
    seed: int, bits: int, group: int, rows: int, columns: int, passes: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(rows, columns, generator=generator).exp()
    targets = (torch.randn(rows, columns, generator=generator) * spread)[None]
    coding = Coding(bits, group)
    plain = decode(encode(targets[0], coding), coding, columns)[None]
    found = code(targets, None, coding, [None], passes=passes)
    assert lost(targets, found).sum() <= lost(targets, plain).sum() * (1 + 1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("columns", [64, 80])
def test_one_member_without_a_pass_is_gptq(bits: int, group: int, columns: int) -> None:
    """Column by column as in the paper; more columns than are worked on one by one."""
    targets, coding = siblings(1, 40, columns), Coding(bits, group)
    moments = correlated(1, 1, columns)
    coded, _ = code_jointly(
        targets, torch.ones(1), moments, center=coding, residuals=[None], passes=0
    )
    assert isinstance(coded, Coded)
    scales = quantize(targets[0], coding)[1]
    assert torch.equal(coded.scales, scales)
    values, codes = gptq(targets[0], moments[0, 0], coding, scales)
    found = unpack(coded.planes, coding, columns).numpy()
    assert (found == codes).mean() >= 0.999
    by_hand = lost(targets, torch.from_numpy(values)[None].float(), moments)
    assert lost(targets, decode(coded, coding, columns)[None], moments) == pytest.approx(
        by_hand, rel=1e-3
    )


# The error that counts


FORMS: list[tuple[Center, list[Coding | None]]] = [
    (Coding(4, 32), [None, None, None]),
    (Coding(4, 64), [Coding(2, 64), Coding(2, 64), Coding(2, 64)]),
    (Coding(3, 32), [Coding(1, 32), None, Coding(2, 0)]),
    (Coding(2, 0), [Coding(1, 0), Coding(1, 64), Coding(3, 32)]),
    (torch.bfloat16, [Coding(1, 64), Coding(2, 64), None]),
    (torch.float16, [None, Coding(3, 0), None]),
]


@pytest.mark.parametrize(("center", "residuals"), FORMS)
@pytest.mark.parametrize(("columns", "blocks"), [(96, 1), (120, 3)])
def test_no_pass_makes_the_weighted_error_worse(
    center: Center, residuals: list[Coding | None], columns: int, blocks: int
) -> None:
    targets, importance = siblings(3, 10, columns), [1.0, 0.3, 2.5]
    moments = correlated(3, blocks, -(-columns // blocks))
    passes = [code(targets, moments, center, residuals, importance, passes=n) for n in range(5)]
    errors = [float(lost(targets, values, moments) @ np.array(importance)) for values in passes]
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(errors))
    assert errors[-1] < errors[0]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_weighted_error_is_well_below_that_of_rounding(bits: int) -> None:
    targets, moments, coding = siblings(1, 32, 128), correlated(1, 1, 128), Coding(bits, 64)
    plain = decode(encode(targets[0], coding), coding, 128)[None]
    rounded = lost(targets, plain, moments)[0]
    assert lost(targets, code(targets, moments, coding, [None], passes=0), moments)[0] < (
        0.6 * rounded
    )
    assert lost(targets, code(targets, moments, coding, [None]), moments)[0] < 0.5 * rounded


@pytest.mark.parametrize(("center", "residual"), [(4, 2), (3, 1), (16, 1)])
def test_together_they_are_better_than_one_after_the_other(center: int, residual: int) -> None:
    """Without moments too, though the residuals keep their norm there, which costs something."""
    targets, moments = siblings(3, 32, 128), correlated(3, 1, 128)
    wide: Center = torch.bfloat16 if center == 16 else Coding(center, 64)
    narrow = Coding(residual, 64)
    middle = targets.mean(0)
    if isinstance(wide, Coding):
        value = decode(encode(middle, wide), wide, 128)
    else:
        value = middle.to(wide).float()
    plain = torch.stack([value + decode(encode(t - value, narrow), narrow, 128) for t in targets])
    calibrated = code(targets, moments, wide, [narrow] * 3)
    assert lost(targets, calibrated, moments).sum() < 0.6 * lost(targets, plain, moments).sum()
    free = lost(targets, code(targets, None, wide, [narrow] * 3)).sum()
    assert free < (1.0 if residual > 1 else 1.25) * lost(targets, plain).sum()


def test_importance_decides_who_is_served_best() -> None:
    targets, moments = siblings(2, 16, 64, apart=1.0), correlated(2, 1, 64)
    center = Coding(4, 32)
    errors = [
        lost(targets, code(targets, moments, center, [None, None], [1.0, other]), moments)
        for other in (1e-6, 0.1, 1.0, 10.0, 1e6)
    ]
    first, second = np.array(errors).T
    assert (np.diff(first) > 0).all()
    assert (np.diff(second) < 0).all()
    for number, error in ((0, first[0]), (1, second[-1])):
        alone = code(targets[[number]], moments[[number]], center, [None])
        own = lost(targets[[number]], alone, moments[[number]])[0]
        assert error == pytest.approx(own, rel=0.02)


@pytest.mark.parametrize("importance", [1e-12, 1.0, 1e12])
def test_importance_has_no_unit(importance: float) -> None:
    targets, moments = siblings(2, 8, 64), correlated(2, 1, 64)
    residuals = [Coding(2, 64), None]
    one = code(targets, moments, Coding(4, 64), residuals, [1.0, 0.5])
    other = code(targets, moments, Coding(4, 64), residuals, [importance, importance / 2])
    np.testing.assert_allclose(lost(targets, one, moments), lost(targets, other, moments), 1e-3)


# A member without a residual


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("center", [Coding(4, 64), Coding(3, 32), torch.bfloat16])
def test_the_center_serves_a_member_without_a_residual(center: Center, calibrated: bool) -> None:
    """As if it were alone in it: the base as center, and deltas to it."""
    targets = siblings(3, 24, 128, apart=0.1)
    moments = correlated(3, 1, 128) if calibrated else None
    found = code(targets, moments, center, [None, Coding(3, 64), Coding(3, 64)])
    error = lost(targets, found, moments)
    alone = code(targets[:1], None if moments is None else moments[:1], center, [None])
    own = lost(targets[:1], alone, None if moments is None else moments[:1])[0]
    shared = code(targets, moments, center, [None] * 3)
    without = lost(targets, shared, moments)[0]
    if isinstance(center, Coding):
        assert error[0] < 1.2 * own
    assert error[0] - own < 0.15 * (without - own)


def test_the_center_is_where_the_least_is_left() -> None:
    """A residual leaves its distortion of what it codes: nearly all of the pull is the other's."""
    targets = torch.tensor([[[0.0]], [[1.0]], [[1.0]]])
    ones = torch.ones(3)
    assert center_target(targets, ones, [None] * 3).item() == pytest.approx(2 / 3)
    assert center_target(targets, torch.tensor([2.0, 1, 1]), [None] * 3).item() == 0.5
    three = 0.0374397
    expected = 2 * three / (1 + 2 * three)
    coding = Coding(3, 64)
    found = center_target(targets, ones, [None, coding, coding]).item()
    assert found == pytest.approx(expected, rel=1e-5)
    assert center_target(targets, ones, [coding] * 3).item() == pytest.approx(2 / 3)


# Norms


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("group", [0, 64])
@pytest.mark.parametrize("passes", [1, 2, 4])
def test_deltas_keep_their_norm_without_moments(bits: int, group: int, passes: int) -> None:
    """The first member is the center; what least squares codes of a bit has 0.80 of the norm."""
    targets = siblings(3, 64, 256, apart=0.1)
    targets = torch.cat([targets[:1] - targets[:1] + targets.mean(0), targets])
    coding = Coding(bits, group)
    residuals = [None, coding, coding, coding]
    importance = [1e6, 1.0, 1.0, 1.0]  # so that the center stays where it is
    found = code(targets, None, torch.bfloat16, residuals, importance, passes=passes)
    for v in (1, 2, 3):
        kept = (found[v] - found[0]).norm() / (targets[v] - found[0]).norm()
        assert kept == pytest.approx(1, abs=0.02)
    plain = decode(encode(targets[1] - targets[0], coding), coding, 256)
    least_squares = float(plain.norm() / (targets[1] - targets[0]).norm())
    assert least_squares < {1: 0.82, 2: 0.955, 3: 0.988}[bits]


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("center", [Coding(4, 64), Coding(8, 64), torch.bfloat16])
def test_norms_are_kept_around_any_center(bits: int, center: Center) -> None:
    targets, coding = siblings(3, 64, 256, apart=0.1), Coding(bits, 64)
    coded, parts = code_jointly(targets, torch.ones(3), None, center=center, residuals=[coding] * 3)
    value = served(coded, [None], center, [None], 256)[0]
    for target, part in zip(targets, parts, strict=True):
        assert part is not None
        kept = decode(part, coding, 256).norm() / (target - value).norm()
        assert kept == pytest.approx(1, abs=0.035)


# Blocks


@pytest.mark.parametrize("center", [Coding(4, 32), torch.bfloat16])
@pytest.mark.parametrize("residual", [None, Coding(2, 32)])
def test_blocks_have_nothing_in_common(center: Center, residual: Coding | None) -> None:
    """Where groups do not span them, each is coded as it would be alone."""
    targets, moments = siblings(2, 12, 160), correlated(2, 3, 64)
    moments[:, 2, 32:] = moments[:, 2, :, 32:] = 0  # the last block is padded
    moments[:, 2] += torch.diag((torch.arange(64) >= 32).float())
    whole = code(targets, moments, center, [residual, residual], [1.0, 0.4])
    parts = []
    for i, start in enumerate((0, 64, 128)):
        part = targets[..., start : start + 64]
        own = moments[:, [i], : part.shape[2], : part.shape[2]]
        parts.append(code(part, own, center, [residual, residual], [1.0, 0.4]))
    joined = torch.cat(parts, 2)
    assert (whole == joined).double().mean() > 0.999
    np.testing.assert_allclose(lost(targets, whole, moments), lost(targets, joined, moments), 1e-4)


@pytest.mark.parametrize("columns", [5, 70, 100, 129])
@pytest.mark.parametrize("size", [4, 40, 64])
@pytest.mark.parametrize(("center", "residuals"), FORMS)
def test_any_blocks_and_groups(
    columns: int, size: int, center: Center, residuals: list[Coding | None]
) -> None:
    """Padded blocks, partial groups, groups that span blocks: finite, and better than one pass."""
    targets = siblings(3, 5, columns)
    blocks = -(-columns // size)
    raw = correlated(3, blocks, size)
    inside = (torch.arange(blocks * size) < columns).float().view(blocks, size)
    moments = damped(raw * inside[:, :, None] * inside[:, None, :])
    found = [code(targets, moments, center, residuals, passes=n) for n in (0, 2)]
    assert found[1].isfinite().all()
    before, after = (lost(targets, values, moments).sum() for values in found)
    assert after <= before * (1 + 1e-4)
    zero = lost(targets, torch.zeros_like(targets), moments).sum()
    assert after < 0.35 * zero


# Degenerate inputs


@pytest.mark.parametrize(("center", "residuals"), FORMS)
@pytest.mark.parametrize("calibrated", [False, True])
def test_zero_rows_stay_zero(
    center: Center, residuals: list[Coding | None], calibrated: bool
) -> None:
    targets = siblings(3, 6, 70)
    targets[:, 2] = 0
    targets[1, 4] = 0
    moments = correlated(3, 1, 70) if calibrated else None
    found = code(targets, moments, center, residuals)
    assert found.isfinite().all()
    assert not found[:, 2].any()
    assert not code(torch.zeros(3, 2, 70), moments, center, residuals).any()


@pytest.mark.parametrize(("center", "residuals"), FORMS)
def test_moments_may_be_zero_or_singular(center: Center, residuals: list[Coding | None]) -> None:
    """An expert that no token reaches, and one that a few tokens reach."""
    targets = siblings(3, 6, 96)
    plain = lost(targets, code(targets, None, center, residuals))
    raw = torch.zeros(3, 1, 96, 96)
    raw[1, 0] = torch.outer(torch.ones(96), torch.ones(96))
    found = code(targets, damped(raw), center, residuals)
    assert found.isfinite().all()
    nobody = code(targets, damped(torch.zeros(3, 1, 96, 96)), center, residuals)
    # Nothing but the identity: the same problem as without moments.
    assert lost(targets, nobody).sum() <= 1.1 * plain.sum()


def test_damped_moments_have_a_mean_diagonal_of_one() -> None:
    raw = correlated(2, 3, 16) * torch.tensor([1e-9, 1e9]).view(2, 1, 1, 1)
    found = damped(raw)
    diagonal = found.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(diagonal.mean((1, 2)), torch.full((2,), 1.02))
    nothing = damped(torch.zeros(1, 2, 4, 4))
    assert torch.equal(nothing, (0.02 * torch.eye(4)).expand(1, 2, 4, 4))


@pytest.mark.parametrize("calibrated", [False, True])
def test_identical_members_are_one(calibrated: bool) -> None:
    """To the bit: the same center and residuals, as often as there are members."""
    targets = siblings(1, 8, 96)
    moments = correlated(1, 1, 96) if calibrated else None
    for residual in (None, Coding(2, 32)):
        one = code(targets, moments, Coding(4, 32), [residual])
        times = moments if moments is None else moments.expand(4, -1, -1, -1).contiguous()
        many = code(targets.repeat(4, 1, 1), times, Coding(4, 32), [residual] * 4)
        assert (many == many[0]).all()
        assert (many[0] == one[0]).double().mean() > 0.999


def test_a_plain_center_of_one_member_is_that_member() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        targets = siblings(1, 8, 96).to(dtype).float()
        for residual in (None, Coding(2, 32)):
            for moments in (None, correlated(1, 1, 96)):
                assert torch.equal(code(targets, moments, dtype, [residual]), targets)


# Rows, repetition, and what is returned


@pytest.mark.parametrize(("center", "residuals"), FORMS)
def test_rows_do_not_depend_on_each_other(center: Center, residuals: list[Coding | None]) -> None:
    """To the bit without moments; with them up to how a product of matrices is summed."""
    targets, moments = siblings(3, 24, 96), correlated(3, 1, 96)
    whole = code(targets, None, center, residuals)
    pieces = [code(targets[:, a:b], None, center, residuals) for a, b in ((0, 1), (1, 9), (9, 24))]
    assert torch.equal(whole, torch.cat(pieces, 1))
    whole = code(targets, moments, center, residuals)
    pieces = [
        code(targets[:, a:b], moments, center, residuals) for a, b in ((0, 1), (1, 9), (9, 24))
    ]
    joined = torch.cat(pieces, 1)
    assert (whole == joined).double().mean() > 0.98
    errors = [lost(targets, values, moments) for values in (whole, joined)]
    np.testing.assert_allclose(*errors, rtol=0.01)


@pytest.mark.parametrize("calibrated", [False, True])
def test_twice_is_the_same(calibrated: bool) -> None:
    targets = siblings(3, 16, 100)
    moments = correlated(3, 2, 50) if calibrated else None
    before = targets.clone()
    runs = [
        code(targets, moments, Coding(3, 32), [None, Coding(1, 32), Coding(2, 0)]) for _ in range(2)
    ]
    assert torch.equal(*runs)
    assert torch.equal(targets, before)


@pytest.mark.parametrize(("center", "residuals"), FORMS)
@pytest.mark.parametrize("calibrated", [False, True])
def test_what_is_stored_is_what_was_chosen(
    center: Center, residuals: list[Coding | None], calibrated: bool
) -> None:
    """The packed parts decode to the levels times steps that the passes worked on."""
    targets = siblings(3, 9, 100)
    moments = correlated(3, 2, 64) if calibrated else None
    if moments is not None:
        inside = (torch.arange(128) < 100).float().view(2, 64)
        moments = damped(moments * inside[:, :, None] * inside[:, None, :])
    state = _State(targets, torch.ones(3), moments, center, residuals)
    state.code_columns(first=True)
    state.fit_scales()
    state.code_columns(first=False)
    coded = state.center.plain_values() if state.center.plain else state.center.coded(0)
    assert coded is not None
    parts = [state.residuals.coded(v) for v in range(3)]
    values = served(coded, parts, center, residuals, 100)
    assert torch.equal(values, state.center.blocks.join(state._values(...)))
    assert torch.equal(values, code(targets, moments, center, residuals, passes=1))
    for part, residual in zip(parts, residuals, strict=True):
        if part is not None and residual is not None:
            assert part.scales.dtype == torch.bfloat16
            assert part.scales.shape == (9, residual.groups(100))
            sizes = [residual.row_bytes(width, 100) for width in residual.planes]
            assert [plane.shape for plane in part.planes] == [(9, size) for size in sizes]


def test_scales_of_residuals_are_widened_at_first() -> None:
    targets, coding = siblings(1, 8, 128), Coding(1, 64)
    state = _State(targets, torch.ones(1), None, Coding(4, 64), [coding])
    center = state.center.blocks.join(state.center.values())
    narrow = _Codes(targets - center, [coding], state.center.blocks).steps
    widened = (state.residuals.steps / narrow).numpy()
    np.testing.assert_allclose(widened, (1 - 0.36338) ** -0.5, 1e-2)
