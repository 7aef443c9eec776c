"""moecc.rates: expected losses against what coding then really loses; clusters against SciPy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import pdist, squareform
from torch import Tensor

from moecc import rates
from moecc.allocate import LayerChoices, allocate
from moecc.architecture import Architecture, ExpertLayer, Projection
from moecc.blocks import damped
from moecc.coding import Coding, decode
from moecc.forms import EXACT, Form, candidate_forms
from moecc.joint import code_jointly
from moecc.lowrank import LowRank
from moecc.rates import LEAST_PART, RateSources, importance, measure_rates, splits
from moecc.recipe import AUTO, Merge

Array = npt.NDArray[np.float64]
ROWS, COLUMNS, EXPERTS, VARIANTS = 48, 96, 2, 3
ALL = tuple(
    form
    for form in candidate_forms(Merge(center=AUTO, residual=AUTO, group=AUTO))
    if not isinstance(form.residual_coding, LowRank)
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Small tensors: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Variant:
    """Stands in for an open variant: canonical matrices by projection and expert."""

    matrices: dict[tuple[str, int], Tensor]

    def rows(self, layer: int, projection: str, expert: int, span: range) -> Tensor:
        assert layer == 0
        return self.matrices[projection, expert][span.start : span.stop]


@dataclass
class Measured:
    """Stands in for what a calibration measured."""

    sensitivity: list[Array]
    found: dict[tuple[str, int, int], Tensor] = field(default_factory=dict)

    def moments(self, layer: int, projection: str, expert: int, variant: int) -> Tensor:
        assert layer == 0
        return self.found[projection, expert, variant]


@dataclass
class Case:
    sources: RateSources
    variants: list[Variant]
    measured: Measured | None
    layer: ExpertLayer


def inputs(generator: torch.Generator, mix: Tensor, level: float) -> Tensor:
    """Moments of some inputs with a few strong directions, in blocks."""
    raw = torch.randn(len(mix), 4 * mix.shape[1], mix.shape[1], generator=generator)
    mixed = raw @ mix
    return level * (mixed.mT @ mixed) / raw.shape[1]


def case(
    seed: int = 0,
    *,
    calibrated: bool = True,
    apart: float = 0.15,
    distinct: Sequence[int] = (0, 1, 2),
    bias: bool = False,
    base: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    projections = [Projection("up", (ROWS, COLUMNS), "BF16")]
    projections += [Projection("up_bias", (ROWS,), "BF16")] if bias else []
    projections += [Projection("down", (COLUMNS // 2, COLUMNS), "BF16")]
    layer = ExpertLayer("layers.0", EXPERTS, tuple(projections))
    weights = [p for p in projections if not p.is_bias]
    variants = [Variant({}) for _ in range(VARIANTS)]
    for p in weights:
        for expert in range(EXPERTS):
            middle = torch.randn(p.matrix, generator=generator)
            own = [
                (middle + apart * torch.randn(p.matrix, generator=generator)).bfloat16()
                for _ in range(VARIANTS)
            ]
            for v, variant in enumerate(variants):
                variant.matrices[p.name, expert] = own[distinct[v]]
    labels = np.tile([list(distinct).index(kind) for kind in distinct], (EXPERTS, 1))
    points = torch.randn(EXPERTS, VARIANTS, 3, generator=generator).numpy()
    distances = np.stack([squareform(pdist(p[labels[e]])) for e, p in enumerate(points)])
    measured = None
    if calibrated:
        rng = np.random.default_rng(seed)
        measured = Measured([rng.uniform(0.5, 2, (EXPERTS, VARIANTS, len(weights)))])
        for p in weights:
            for expert in range(EXPERTS):
                mix = 0.2 * torch.randn(2, COLUMNS // 2, COLUMNS // 2, generator=generator)
                mix = mix + torch.eye(COLUMNS // 2)
                mix[:, : COLUMNS // 16] *= 4
                for v in range(VARIANTS):
                    moments = inputs(generator, mix, float(rng.uniform(0.5, 2)))
                    measured.found[p.name, expert, v] = moments
    found: Any = (Architecture("Synthetic", (layer,)), variants, [distances], [labels])
    return Case(RateSources(*found, base, measured), variants, measured, layer)


def measure(found: Case, forms: Sequence[Form] = ALL) -> LayerChoices:
    (choices,) = measure_rates(found.sources, forms)
    return choices


def counts(found: Case, p: Projection, expert: int) -> Array:
    """Nats a unit of squared error, by definition."""
    if found.measured is None:
        square = [v.matrices[p.name, expert].double().square().sum() for v in found.variants]
        return 1 / np.array(square)
    index = [q for q in found.layer.projections if not q.is_bias].index(p)
    traces = [
        float(found.measured.found[p.name, expert, v].diagonal(dim1=-2, dim2=-1).sum())
        for v in range(VARIANTS)
    ]
    sensitivity = found.measured.sensitivity[0][expert, :, index]
    return np.array(traces) / p.matrix[1] * sensitivity


def really_lost(
    found: Case, p: Projection, expert: int, members: Sequence[int], form: Form
) -> float:
    """What joint coding loses, in the norms that the rates are in."""
    targets = torch.stack([found.variants[v].matrices[p.name, expert].float() for v in members])
    counted = counts(found, p, expert)[list(members)]
    moments = None
    if found.measured is not None:
        read = [found.measured.found[p.name, expert, v] for v in members]
        moments = damped(torch.stack(read))
    residual, center = form.residual_coding, form.center_coding or torch.bfloat16
    assert residual is None or isinstance(residual, Coding)
    coded, parts = code_jointly(
        targets,
        torch.from_numpy(counted / counted.max()).float(),
        moments,
        center=center,
        residuals=[residual] * len(members),
    )
    if isinstance(coded, Tensor):
        value = coded.float()
    else:
        assert isinstance(center, Coding)
        value = decode(coded, center, targets.shape[2])
    total = 0.0
    for v, part in enumerate(parts):
        served = value
        if part is not None and isinstance(residual, Coding):
            served = value + decode(part, residual, targets.shape[2])
        off = targets[v] - served
        if moments is None:
            total += counted[v] * float(off.square().sum())
        else:
            size = moments.shape[-1]
            for block, own in enumerate(moments[v]):
                cut = off[:, block * size : (block + 1) * size]
                total += counted[v] * float(((cut @ own) * cut).sum())
    return total


# Losses


@pytest.mark.parametrize(
    "form", [f for f in ALL if f != EXACT and "row" not in f.name], ids=lambda form: form.name
)
@pytest.mark.parametrize("calibrated", [True, False])
def test_the_expected_loss_is_near_the_real_one(form: Form, calibrated: bool) -> None:
    """Summed over both experts, of the whole group and of one variant alone.

    Center and residuals chosen together lose less than the sum of what each of them rounds, the
    more so the finer the center's steps are beside the residuals'.
    """
    found = case(calibrated=calibrated)
    choices = measure(found, tuple(sorted({form, EXACT})))
    f = choices.forms.index(form)
    weights = [p for p in found.layer.projections if not p.is_bias]
    for wanted in (VARIANTS, 1):
        expected = real = 0.0
        for p, projection in enumerate(weights):
            for expert, options in enumerate(choices.options):
                for c in {c for option in options for c in option}:
                    members = choices.clusters[c]
                    if len(members) == wanted:
                        expected += choices.losses[p][c, :, f].sum(-1).min()
                        real += really_lost(found, projection, expert, members, form)
        if form.center == "16bit" and wanted == 1:
            assert max(expected, real) < 1e-5  # exact in bfloat16
        else:
            together = wanted > 1 and form.residual and form.center_bits > 4
            assert real < 1.6 * expected
            assert expected < (2.6 if together else 1.6) * real


def test_rows_are_sampled_and_counted_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows stand for the matrix."""
    found = case()
    whole = measure(found)
    monkeypatch.setattr(rates, "SAMPLE", 4 * COLUMNS)
    monkeypatch.setattr(rates, "LEAST_ROWS", 4)
    monkeypatch.setattr(rates, "RANK_ROWS", 12)
    some = measure(found)
    for a, b in zip(whole.losses, some.losses, strict=True):
        assert a.shape == b.shape
        finite = np.isfinite(a)
        assert (finite == np.isfinite(b)).all()
        assert b[finite].sum() == pytest.approx(a[finite].sum(), rel=0.25)
        assert (a[finite] != b[finite]).any()


def test_more_bits_lose_less() -> None:
    choices = measure(case(apart=0.5))
    for losses in choices.losses:
        whole = [c for c, members in enumerate(choices.clusters) if len(members) == VARIANTS]
        lost = losses[whole].sum(-1).min(1).sum(0)
        at = {form.name: loss for form, loss in zip(choices.forms, lost, strict=True)}
        for name in ("{}bit-g64", "{}bit-row"):
            steps = [at[name.format(bits)] for bits in (2, 3, 4, 5, 6, 8)]
            assert all(b < a for a, b in pairwise(steps))
        for center in ("4bit", "8bit"):
            steps = [at[f"{center}-g64"], *(at[f"{center}-g64+{r}bit-g64"] for r in (1, 2, 3))]
            assert all(b < a for a, b in pairwise(steps))


def test_only_one_kind_can_be_exact_and_members_only_count() -> None:
    choices = measure(case(distinct=(0, 0, 2)))
    exact = choices.forms.index(EXACT)
    for losses in choices.losses:
        for c, members in enumerate(choices.clusters):
            outside = [v for v in range(VARIANTS) if v not in members]
            assert not losses[c][:, :, outside].any()
            if 2 in members and len(members) > 1:
                assert np.isinf(losses[c][:, exact][:, list(members)]).all()
            else:
                assert not losses[c, 0, exact].any()
    assert np.isinf(choices.losses[0]).any()
    assert not np.isnan(choices.losses[0]).any()


def test_identical_variants_share_and_choose_alike() -> None:
    """However differently they are used: there is one residual for them."""
    found = case(distinct=(0, 0, 2), apart=0.4)
    assert found.measured is not None
    found.measured.sensitivity[0][:, 0] *= 100
    choices = measure(found)
    for c, members in enumerate(choices.clusters):
        shares = [0.5, 0.5, 1.0]
        assert choices.shares[c].tolist() == [
            share if v in members else 0 for v, share in enumerate(shares)
        ]
        for losses in choices.losses:
            assert (losses[c, :, :, 0] == losses[c, :, :, 1]).all()
    least = sum(int(size.min()) for size in choices.center_bytes) * EXPERTS
    for budget in range(least, 6 * least, least // 3):
        (experts,) = allocate([choices], budget)
        for one in experts:
            for c, projections in zip(one.clusters, one.forms, strict=True):
                if choices.clusters[c][:2] == (0, 1):
                    assert all(forms[0] == forms[1] for forms in projections)


def test_around_the_base_its_own_loss_is_that_of_coding_it() -> None:
    """The second place of a center is the base, where it is a member, else the first member."""
    found = case(base=1, apart=1.0)
    choices = measure(found)
    plain = choices.forms.index(Form("16bit"))
    for losses in choices.losses:
        for c, members in enumerate(choices.clusters):
            place = 1 if 1 in members else members[0]
            if len(members) == 1:
                assert np.isinf(losses[c, 1, :, place]).all()
                continue
            assert losses[c, 1, plain, place] < 1e-5
            others = [v for v in members if v != place]
            assert (losses[c, 1, plain, others] > 1e-3).all()
            assert (losses[c, 0, plain, list(members)] > 1e-3).all()
            # The mean loses the least together.
            assert losses[c, 0, plain].sum() < losses[c, 1, plain].sum()


def test_without_a_calibration_losses_are_relative() -> None:
    """A factor on all weights changes nothing; a variant of zeros is no division by zero."""
    found = case(calibrated=False)
    choices = measure(found)
    for variant in found.variants:
        for key in variant.matrices:
            variant.matrices[key] = variant.matrices[key] * 64
    for a, b in zip(choices.losses, measure(found).losses, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4)
    for key in found.variants[0].matrices:
        found.variants[0].matrices[key] *= 0
    for losses in measure(found).losses:
        assert not np.isnan(losses).any()


def test_biases_have_no_rates() -> None:
    choices = measure(case(bias=True))
    assert len(choices.losses) == len(choices.center_bytes) == len(choices.residual_bytes) == 2
    four = choices.forms.index(Form("4bit-g64"))
    assert [int(size[four]) for size in choices.center_bytes] == [
        ROWS * (48 + 4),
        COLUMNS // 2 * (48 + 4),
    ]


def test_workers_and_repetition_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    found = case()
    one = measure(found)
    seen: list[tuple[int, int]] = []
    (other,) = measure_rates(found.sources, ALL, on_progress=lambda *at: seen.append(at))
    for a, b in zip(one.losses, other.losses, strict=True):
        assert np.array_equal(a, b)
    size = found.layer.exact_bytes * VARIANTS
    assert seen == [(size, 2 * size), (2 * size, 2 * size)]


# Importance


def test_importance_is_sensitivity_times_the_level_of_the_inputs() -> None:
    found = case()
    assert found.measured is not None
    values = importance(found.measured, 0, found.layer)  # type: ignore[arg-type]
    assert values.shape == (EXPERTS, VARIANTS, 2)
    for p, projection in enumerate(found.layer.projections):
        for expert in range(EXPERTS):
            by_hand = counts(found, projection, expert)
            np.testing.assert_allclose(values[expert, :, p], by_hand, rtol=1e-5)


def test_an_expert_that_the_text_does_not_reach_counts_a_little() -> None:
    """A fiftieth of the mean over experts; and the rates stay finite."""
    found = case()
    assert found.measured is not None
    found.measured.sensitivity[0][0, 1] = 0
    for key in found.measured.found:
        if key[1:] == (0, 1):
            found.measured.found[key] *= 0
    values = importance(found.measured, 0, found.layer)  # type: ignore[arg-type]
    np.testing.assert_allclose(values[0, 1], LEAST_PART * values[1, 1] / EXPERTS, rtol=1e-3)
    for losses in measure(found).losses:
        assert not np.isnan(losses).any()
    found.measured.sensitivity[0][:] = 0
    values = importance(found.measured, 0, found.layer)  # type: ignore[arg-type]
    assert (values > 0).all()
    for losses in measure(found).losses:
        assert not np.isnan(losses).any()


# Clusters


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 2**32), st.integers(1, 7), st.booleans())
def test_splits_are_scipys(seed: int, count: int, identical: bool) -> None:
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, count, count).tolist() if identical else list(range(count))
    labels = np.array([kinds.index(kind) for kind in kinds])
    apart = squareform(pdist(rng.standard_normal((count, 3))[labels]))
    clusters, options = splits(apart, labels)
    first = np.unique(labels)
    expected = [{frozenset(np.flatnonzero(labels == label).tolist()) for label in first}]
    if len(first) > 1:
        tree = linkage(squareform(apart[np.ix_(first, first)]), "average")
        for height in tree[:, 2]:
            cut = fcluster(tree, height, "distance")
            of = dict(zip(first.tolist(), cut.tolist(), strict=True))
            groups: dict[int, set[int]] = {}
            for v, label in enumerate(labels.tolist()):
                groups.setdefault(of[label], set()).add(v)
            expected.append({frozenset(members) for members in groups.values()})
    found = [{frozenset(clusters[c]) for c in option} for option in options]
    assert found == expected[::-1]
    assert all(members == tuple(sorted(members)) for members in clusters)
    assert len(clusters) == 2 * len(first) - 1
    assert options[0] == (len(clusters) - 1,)
