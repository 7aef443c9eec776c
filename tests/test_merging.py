"""moecc.merging: the center that each method wants, against the papers' formulas in float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from moecc.architecture import ExpertLayer, Projection
from moecc.bank import Job, Pool, ProjectionBank
from moecc.blocks import damped
from moecc.merge import regression_mean, task_arithmetic, ties
from moecc.merging import SCALES, Merging
from moecc.recipe import Merge, Params

Array = npt.NDArray[np.float64]
ROWS, COLUMNS, BLOCK = 24, 40, 16
UP = Projection("up", (ROWS, COLUMNS), "BF16")
LAYER = ExpertLayer("layers.0", 1, (UP,))


@dataclass
class Variant:
    """Stands in for an open variant with one expert of one matrix."""

    matrix: Tensor
    checkpoint: Any = field(default_factory=lambda: SimpleNamespace(row_align=1))

    def rows(self, layer: int, projection: str, expert: int, span: range) -> Tensor:
        assert (layer, projection, expert) == (0, "up", 0)
        return self.matrix[span.start : span.stop]


@dataclass
class Measured:
    """Stands in for what a calibration measured."""

    frequency: list[Array]
    found: list[Tensor] = field(default_factory=list)

    def moments(self, layer: int, projection: str, expert: int, variant: int) -> Tensor:
        assert (layer, projection, expert) == (0, "up", 0)
        return self.found[variant]


def variants(count: int, seed: int = 0) -> list[Variant]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(ROWS, COLUMNS, generator=generator)
    noise = torch.randn(count, ROWS, COLUMNS, generator=generator)
    noise[0] = 0
    return [Variant((base + 0.1 * own).bfloat16()) for own in noise]


def moments_of(count: int, seed: int = 1) -> list[Tensor]:
    """In blocks along the columns, the last padded with zeros."""
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-COLUMNS // BLOCK)
    found = torch.randn(count, blocks, BLOCK, BLOCK, generator=generator)
    found = found.mT @ found
    rest = blocks * BLOCK - COLUMNS
    found[:, -1, -rest:], found[:, -1, :, -rest:] = 0.0, 0.0
    return list(found)


def center(
    merge: Merge,
    found: list[Variant],
    *,
    same: tuple[tuple[int, ...], ...] | None = None,
    representative: int = 0,
    measured: Measured | None = None,
    importance: Array | None = None,
    base: int = 0,
) -> Tensor:
    """The center of all variants in one group, in float32; `same` are identical ones."""
    same = same or tuple((v,) for v in range(len(found)))
    job = Job(
        expert=0,
        members=tuple((own[0], len(own)) for own in same),
        coded=True,
        center=(0, 0),
        residuals=(),
        representative=representative,
        same=same,
        own_order=False,
    )
    merging = Merging(
        variants=cast("Any", found),
        base=base,
        merge=merge,
        index=0,
        layer=LAYER,
        device="cpu",
        measured=cast("Any", measured),
        importance=importance,
    )
    tile = merging.code(
        UP, job, range(ROWS), center=torch.float32, residuals=[None] * len(job.members)
    )
    (rows,) = tile.center
    assert tile.residuals == ((),) * len(same)
    assert rows.dtype == torch.float32
    error = sum(
        (rows - found[v].matrix.float()).double().square().sum() for own in same for v in own
    )
    assert tile.squared_error == pytest.approx(float(error), rel=1e-4)
    return rows


def doubles(found: list[Variant]) -> list[Array]:
    return [v.matrix.double().numpy() for v in found]


def close(found: Tensor, wanted: Array, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(found.double().numpy(), wanted, rtol=tolerance, atol=tolerance)


# Means


def test_mean_counts_every_variant() -> None:
    found = variants(3)
    found.append(found[1])
    same = ((0,), (1, 3), (2,))
    close(center(Merge("mean"), found, same=same), np.mean(doubles(found), 0))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_representative(which: int) -> None:
    found = variants(3)
    close(center(Merge("representative"), found, representative=which), doubles(found)[which], 0)


def test_weighted_by_routing() -> None:
    found = variants(3)
    found.append(found[1])
    frequency = np.array([[0.2, 0.05, 0.4, 0.1]])
    measured = Measured([frequency])
    rows = center(Merge("weighted"), found, same=((0,), (1, 3), (2,)), measured=measured)
    close(rows, np.average(doubles(found), axis=0, weights=frequency[0]))


def test_weighted_where_nothing_is_routed() -> None:
    found = variants(3)
    rows = center(Merge("weighted"), found, measured=Measured([np.zeros((1, 3))]))
    close(rows, np.mean(doubles(found), 0))


# RegMean


def normal_equations(matrices: list[Array], grams: list[Array]) -> Array:
    """The paper's equation 2, for matrices that act on columns."""
    wanted = sum(w @ g for w, g in zip(matrices, grams, strict=True))
    solved: Array = np.linalg.solve(sum(grams).T, wanted.T).T
    return solved


def gram(moments: Tensor) -> Array:
    whole: Array = torch.block_diag(*moments.double())[:COLUMNS, :COLUMNS].numpy()
    return whole


def test_regmean_solves_the_normal_equations() -> None:
    found, moments = variants(3), damped(torch.stack(moments_of(3)))
    importance = torch.tensor([1.0, 0.3, 0.05])
    rows = regression_mean([v.matrix.float() for v in found], importance, moments)
    grams = [float(i) * gram(m) for i, m in zip(importance, moments, strict=True)]
    close(rows, normal_equations(doubles(found), grams), 1e-4)


def test_regmean_of_a_group() -> None:
    """Identical variants count together, by their importance."""
    found = variants(2)
    found.append(found[1])
    measured = Measured([np.ones((1, 3))], moments_of(3))
    importance = np.array([[[2.0], [0.5], [1.0]]])
    rows = center(
        Merge("regmean"), found, same=((0,), (1, 2)), measured=measured, importance=importance
    )
    scaled = damped(torch.stack(measured.found))
    grams = [importance[0, v, 0] * gram(scaled[v]) for v in range(3)]
    close(rows, normal_equations(doubles(found), grams), 1e-4)


def test_regmean_keeps_what_all_agree_on() -> None:
    found = [variants(1)[0]] * 2
    moments = damped(torch.stack(moments_of(2)))
    rows = regression_mean([v.matrix.float() for v in found], torch.ones(2), moments)
    close(rows, doubles(found)[0], 1e-5)


# Deltas


def ties_of_the_paper(matrices: list[Array], base: Array, scale: float, density: float) -> Array:
    """Algorithm 1 of P. Yadav et al. (2023)."""
    trimmed = []
    for matrix in matrices:
        delta = (matrix - base).ravel()
        kept = max(1, round(density * delta.size))
        mask = np.zeros(delta.size, dtype=bool)
        mask[np.argsort(-np.abs(delta), kind="stable")[:kept]] = True
        trimmed.append(np.where(mask, delta, 0.0))
    stacked = np.stack(trimmed)
    elected = np.sign(stacked.sum(0))
    merged = np.zeros(stacked.shape[1])
    for i in range(stacked.shape[1]):
        agreeing = [d for d in stacked[:, i] if d != 0 and np.sign(d) == elected[i]]
        merged[i] = np.mean(agreeing) if agreeing else 0.0
    return base + scale * merged.reshape(base.shape)


@pytest.mark.parametrize("density", [0.01, 0.2, 1.0])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_ties(density: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    base, *tiles = torch.randn(4, ROWS, COLUMNS, generator=generator)
    found = ties(tiles, base, scale, density)
    # In float32, so that no two deltas are taken for equal that are not.
    plain = [base.double().numpy() + (t - base).double().numpy() for t in tiles]
    close(found, ties_of_the_paper(plain, base.double().numpy(), scale, density))


def test_ties_of_a_group() -> None:
    generator = torch.Generator().manual_seed(0)
    middle = torch.randn(ROWS, COLUMNS, generator=generator)
    noise = torch.randn(4, ROWS, COLUMNS, generator=generator)
    found = [Variant(middle + 0.1 * own) for own in noise]
    for base in (0, 2):
        merge = Merge("ties", params=Params(density=0.5))
        rows = center(merge, found, base=base)
        wanted = ties_of_the_paper(doubles(found), doubles(found)[base], SCALES["ties"], 0.5)
        # At the border of what is kept two deltas may be equal in float32, and are both kept.
        differs = ~np.isclose(rows.double().numpy(), wanted, rtol=1e-5, atol=1e-5)
        assert differs.sum() <= 3


def test_a_lone_ties_delta_is_only_trimmed() -> None:
    base = torch.zeros(1, 5)
    tile = torch.tensor([[0.1, -0.5, 0.3, 0.0, -0.2]])
    assert ties([tile], base, 1.0, 0.4).tolist() == [[0.0, -0.5, pytest.approx(0.3), 0.0, 0.0]]
    assert ties([tile, -tile], base, 1.0, 1.0).tolist() == [[0.0] * 5]


def test_task_arithmetic() -> None:
    found = variants(3)
    base, *others = doubles(found)
    for scale in (0.25, None):
        merge = Merge("task-arithmetic", params=Params(scale=scale))
        wanted = base + (scale or SCALES["task-arithmetic"]) * sum(o - base for o in others)
        close(center(merge, found), wanted)
    tiles = [v.matrix.float() for v in found]
    assert torch.equal(task_arithmetic(tiles[:1], tiles[0], 0.4), tiles[0])


def test_whole_matrices_only_where_they_are_needed() -> None:
    """Trimming looks at all of a matrix, and so do factors."""
    wide = Projection("up", (3 * 2**10, 2**11), "BF16")
    layer = ExpertLayer("layers.0", 1, (wide,))
    job = Job(0, ((0, 1), (1, 1)), True, (0, 0), ((1, 0), (1, 1)), 0, ((0,), (1,)), False)
    for method, coding, whole in (
        ("mean", "2bit-g64", False),
        ("ties", "2bit-g64", True),
        ("mean", "rank4", True),
        ("joint", "rank4", True),
    ):
        pools = (Pool("center", "4bit-g64", 1), Pool("residual", coding, 2))
        found: Any = variants(2)
        merging = Merging(found, 0, Merge(method), 0, layer, "cpu", None, None)
        spans = merging.spans(ProjectionBank(wide, pools, (job,)), job)
        assert [i for span in spans for i in span] == list(range(wide.matrix[0]))
        assert (len(spans) == 1) == whole
