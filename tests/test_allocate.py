"""moecc.allocate: against every possible choice of small layers, and its own sums."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain, combinations, pairwise, product

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moecc.allocate import MOST_FORMS, Chosen, LayerChoices, allocate
from moecc.coding import distortion
from moecc.forms import EXACT, Form
from moecc.rates import splits

NAMES = [
    "16bit",
    "16bit+1bit-g64",
    "2bit-g64",
    "4bit-g64",
    "4bit-g64+1bit-g64",
    "4bit-g64+2bit-g64",
    "4bit-g64+3bit-g64",
    "8bit-g64",
    "8bit-g64+2bit-g64",
]
Front = list[tuple[int, float]]  # bytes and losses, none of them worse in both than another


def random_layer(
    seed: int, variants: int, experts: int, projections: int, names: Sequence[str]
) -> LayerChoices:
    """Gaussian variants, some of them identical, with losses as high-resolution theory has them.

    For about half of the seeds losses are any numbers instead.
    """
    rng = np.random.default_rng(seed)
    forms = tuple(sorted([*map(Form.parse, names), EXACT]))
    wild = rng.random() < 0.5
    clusters: list[tuple[int, ...]] = []
    options, shares, points = [], [], []
    for _ in range(experts):
        kinds = rng.integers(0, variants, variants) if rng.random() < 0.4 else range(variants)
        labels = np.array([list(kinds).index(kind) for kind in kinds])
        at = rng.standard_normal((variants, 3))[labels]
        apart = np.sqrt(((at[:, None] - at[None]) ** 2).sum(-1))
        own, ways = splits(apart, labels)
        options.append(tuple(tuple(len(clusters) + c for c in way) for way in ways))
        clusters += own
        for members in own:
            same = [sum(labels[m] == labels[v] for m in members) for v in range(variants)]
            shares.append([1 / same[v] if v in members else 0.0 for v in range(variants)])
            points.append((labels, at))
    losses, center_bytes, residual_bytes = [], [], []
    for _ in range(projections):
        params = int(rng.choice([512, 2048]))
        plain = [f.center_coding is None for f in forms]
        center_bytes.append(
            np.array(
                [
                    2 * params if p else params * f.center_bits // 8 + params // 32
                    for f, p in zip(forms, plain, strict=True)
                ]
            )
        )
        residual_bytes.append(
            np.array(
                [params * f.residual_bits // 8 + params // 32 * bool(f.residual) for f in forms]
            )
        )
        table = np.full((len(clusters), 2, len(forms), variants), np.inf)
        for c, (members, (labels, at)) in enumerate(zip(clusters, points, strict=True)):
            weight = rng.random(variants)[labels] + 0.1
            for target, (f, form) in product(range(min(2, len(members))), enumerate(forms)):
                middle = at[list(members)].mean(0) if target == 0 else at[members[0]]
                spread = ((at - middle) ** 2).sum(1) / 10
                kept = distortion(form.residual_bits)
                found = weight * kept * (spread + distortion(form.center_bits) + 1e-6)
                found = rng.random(variants)[labels] if wild else found
                if form != EXACT:
                    table[c, target, f, list(members)] = found[list(members)]
            table[c, :, :, [v for v in range(variants) if v not in members]] = 0
            if len({labels[m] for m in members}) == 1:
                table[c, 0, forms.index(EXACT)] = 0
        losses.append(table)
    return LayerChoices(
        clusters=tuple(clusters),
        options=tuple(options),
        forms=forms,
        losses=tuple(losses),
        shares=np.array(shares),
        center_bytes=tuple(center_bytes),
        residual_bytes=tuple(residual_bytes),
    )


@st.composite
def layers(draw: st.DrawFn, most: int = MOST_FORMS - 1, experts: int = 3) -> list[LayerChoices]:
    """One or two layers of the same variants, with up to `most` forms and the exact one."""
    variants = draw(st.integers(1, 3))
    count = draw(st.integers(1, 2))
    names = st.lists(st.sampled_from(NAMES), min_size=1, max_size=most, unique=True)
    return [
        random_layer(
            draw(st.integers(0, 2**32)),
            variants,
            draw(st.integers(1, experts)) if count == 1 else 1,
            draw(st.integers(1, 2)),
            draw(names),
        )
        for _ in range(count)
    ]


# Every possible choice


def prune(points: Sequence[tuple[int, float]]) -> Front:
    found: Front = []
    for size, loss in sorted(points):
        if not found or loss < found[-1][1]:
            found.append((size, loss))
    return found


def add(one: Front, other: Front) -> Front:
    return prune([(a + c, b + d) for a, b in one for c, d in other])


def cluster_front(layer: LayerChoices, p: int, c: int, forms: Sequence[int]) -> Front:
    """Identical members have one residual, and take the same form."""
    table, shares = layer.losses[p][c], layer.shares[c]
    kinds: dict[tuple[float, ...], list[int]] = {}
    for v in layer.clusters[c]:
        kinds.setdefault((*table[:, :, v].ravel(), shares[v]), []).append(v)
    for key, members in kinds.items():
        assert len(members) == round(1 / key[-1])
    points: list[tuple[int, float]] = []
    centers = {layer.forms[f].center for f in forms}
    for target, center in product(range(len(table)), sorted(centers)):
        own = [f for f in forms if layer.forms[f].center == center]
        found: Front = [(int(layer.center_bytes[p][own[0]]), 0.0)]
        for members in kinds.values():
            costs = [
                (int(layer.residual_bytes[p][f]), float(table[target, f, members].sum()))
                for f in own
            ]
            found = add(found, [cost for cost in costs if np.isfinite(cost[1])])
        points += found
    return prune(points)


def front(layer: LayerChoices, sets: Sequence[Sequence[int]]) -> Front:
    """All that a layer can reach with a set of forms for each projection."""
    cached: dict[tuple[int, int], Front] = {}
    total: Front = [(0, 0.0)]
    for options in layer.options:
        points: list[tuple[int, float]] = []
        for option in options:
            found: Front = [(0, 0.0)]
            for c, (p, forms) in product(option, enumerate(sets)):
                if (p, c) not in cached:
                    cached[p, c] = cluster_front(layer, p, c, forms)
                found = add(found, cached[p, c])
            points += found
        total = add(total, prune(points))
    return total


def best_front(found: Sequence[LayerChoices]) -> Front:
    """All that is possible, over all sets of forms."""
    total: Front = [(0, 0.0)]
    for layer in found:
        count = len(layer.forms)
        sets = combinations(range(count), min(MOST_FORMS, count))
        points = [front(layer, own) for own in product(sets, repeat=len(layer.losses))]
        total = add(total, prune(list(chain.from_iterable(points))))
    return total


def hull(points: Front) -> Front:
    """The points that some price per byte makes the best."""
    found: Front = []
    for size, loss in points:
        while len(found) > 1:
            (a, x), (b, y) = found[-2:]
            if (y - x) * (size - a) < (loss - x) * (b - a):
                break
            found.pop()
        found.append((size, loss))
    return found


# What every result is


def total(chosen: Sequence[Sequence[Chosen]]) -> tuple[int, float]:
    experts = list(chain.from_iterable(chosen))
    return sum(one.nbytes for one in experts), sum(one.loss for one in experts)


def check(found: Sequence[LayerChoices], chosen: Sequence[Sequence[Chosen]]) -> None:
    """Losses and bytes are those of the forms, which fit together and are not too many."""
    for layer, experts in zip(found, chosen, strict=True):
        assert len(experts) == len(layer.options)
        used: list[set[int]] = [set() for _ in layer.losses]
        for options, one in zip(layer.options, experts, strict=True):
            assert one.clusters in options
            loss, size = 0.0, 0.0
            for c, projections in zip(one.clusters, one.forms, strict=True):
                members = layer.clusters[c]
                for p, forms in enumerate(projections):
                    assert len(forms) == len(members)
                    used[p] |= set(forms)
                    assert len({layer.forms[f].center for f in forms}) == 1
                    table = layer.losses[p][c][:, list(forms), list(members)].sum(1)
                    loss += table.min()
                    size += layer.center_bytes[p][forms[0]]
                    shares = layer.shares[c][list(members)]
                    size += (layer.residual_bytes[p][list(forms)] * shares).sum()
                    if EXACT in {layer.forms[f] for f in forms}:
                        assert np.isclose(shares.sum(), 1)  # they are identical
            assert one.nbytes == round(size)
            assert one.loss == pytest.approx(loss, rel=1e-9)
            assert np.isfinite(one.loss)
        assert all(len(forms) <= MOST_FORMS for forms in used)


@settings(deadline=None, max_examples=60)
@given(layers(), st.data())
def test_as_good_as_every_choice_that_is_tried(
    found: list[LayerChoices], data: st.DataObject
) -> None:
    """Where a price leads to a budget, nothing is better; and more bytes are never worse."""
    points = hull(best_front(found))
    losses = []
    for size, loss in points:
        chosen = allocate(found, size)
        check(found, chosen)
        nbytes, lost = total(chosen)
        assert nbytes <= size
        assert lost == pytest.approx(loss, rel=1e-9, abs=1e-12)
        losses.append(lost)
    assert all(b <= a + 1e-12 for a, b in pairwise(losses))
    more = points[-1][0] + data.draw(st.integers(0, 10**6))
    assert total(allocate(found, more))[1] == pytest.approx(points[-1][1], rel=1e-9, abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(layers(most=5), st.floats(0, 1))
def test_any_budget_is_kept(found: list[LayerChoices], part: float) -> None:
    points = best_front(found)
    budget = round(points[0][0] + part * (points[-1][0] - points[0][0]))
    chosen = allocate(found, budget)
    check(found, chosen)
    nbytes, lost = total(chosen)
    assert nbytes <= budget
    assert lost >= [loss for size, loss in points if size <= nbytes][-1] - 1e-9


@settings(deadline=None, max_examples=40)
@given(layers(most=4), st.floats(0, 1))
def test_no_more_than_an_expert_is_lost_to_a_single_form(
    found: list[LayerChoices], part: float
) -> None:
    """A price leaves at most the step of one expert unused."""
    for layer in found:
        (least, *_), (most, *_) = best_front([layer])[0], best_front([layer])[-1]
        budget = round(least + part * (most - least))
        steps = [
            max(hull(front(one, [range(len(layer.forms))] * len(layer.losses)))[0][1], 0.0)
            for one in map(partial(_alone, layer), range(len(layer.options)))
        ]
        _, lost = total(allocate([layer], budget))
        exact = layer.forms.index(EXACT)
        for f in range(len(layer.forms)):
            fits = [q for q in front(layer, [{f, exact}] * len(layer.losses)) if q[0] <= budget]  # type: ignore[list-item]
            if fits:
                assert lost <= fits[-1][1] + max(steps) + 1e-9


def _alone(layer: LayerChoices, expert: int) -> LayerChoices:
    return LayerChoices(
        layer.clusters,
        (layer.options[expert],),
        layer.forms,
        layer.losses,
        layer.shares,
        layer.center_bytes,
        layer.residual_bytes,
    )


def many(seed: int) -> LayerChoices:
    return random_layer(seed, 3, 8, 1, NAMES[2:8])


@pytest.mark.parametrize("seed", range(8))
def test_many_experts_are_never_worse_off_than_with_one_form(seed: int) -> None:
    """One form, and exact ones beside it, as `make_plan` has them."""
    layer = many(seed)
    exact = layer.forms.index(EXACT)
    fronts = [front(layer, [sorted({f, exact})]) for f in range(len(layer.forms))]
    least = max(points[0][0] for points in fronts)
    for budget in np.linspace(least, fronts[exact][-1][0], 12).astype(int):
        nbytes, lost = total(allocate([layer], int(budget)))
        assert nbytes <= budget
        for points in fronts:
            assert lost <= [loss for size, loss in points if size <= budget][-1] + 1e-12


def test_limited_to_three_forms_little_is_lost() -> None:
    """The sets are found by what would be chosen without a limit: near the best of all sets."""
    gaps = []
    for seed in range(16):
        found = [random_layer(seed, 3, 3, 1, NAMES[seed % 3 : seed % 3 + 5])]
        for size, loss in hull(best_front(found)):
            chosen = allocate(found, size)
            check(found, chosen)
            nbytes, lost = total(chosen)
            assert nbytes <= size
            gaps.append(lost / loss - 1 if loss > 0 else lost)
    assert min(gaps) > -1e-9
    assert np.mean(gaps) < 0.02
    assert np.mean(np.array(gaps) < 1e-9) > 0.95


# By hand


def by_hand(
    labels: Sequence[int] = (0, 1), losses: npt.ArrayLike = (0.5, 0.1), experts: int = 1
) -> LayerChoices:
    """4 bits at 100 bytes, a residual at 30 bytes more, and exact at 400; two variants."""
    forms = tuple(map(Form.parse, ("4bit-g64", "4bit-g64+2bit-g64", "exact")))
    identical = labels[0] == labels[1]
    table = np.full((1 if identical else 3, 2, 3, 2), np.inf)
    alone = np.array([*np.ravel(losses), 0.0]) / 10
    if identical:
        clusters: tuple[tuple[int, ...], ...] = ((0, 1),)
        options: tuple[tuple[int, ...], ...] = ((0,),)
        table[0, 0] = alone[:, None]
        shares = np.array([[0.5, 0.5]])
    else:
        clusters, options = ((0,), (1,), (0, 1)), ((2,), (0, 1))
        table[0, 0, :, 0] = table[1, 0, :, 1] = alone
        table[0, :, :, 1] = table[1, :, :, 0] = 0
        table[2, 0, :2] = np.ravel(losses)[:, None]
        table[2, 1, :2, 0], table[2, 1, :2, 1] = alone[:2], 2 * np.ravel(losses)
        shares = np.array([[1.0, 0], [0, 1.0], [1.0, 1.0]])
    count = len(clusters)
    return LayerChoices(
        clusters=clusters * experts,
        options=tuple(
            tuple(tuple(e * count + c for c in o) for o in options) for e in range(experts)
        ),
        forms=forms,
        losses=(np.tile(table, (experts, 1, 1, 1)),),
        shares=np.tile(shares, (experts, 1)),
        center_bytes=(np.array([100, 100, 400]),),
        residual_bytes=(np.array([0, 30, 0]),),
    )


@pytest.mark.parametrize(
    ("budget", "nbytes", "loss"),
    [
        (100, 100, 1.0),  # one center, between them
        (130, 130, 0.25),  # at the place of the first, with a residual for the second
        (199, 130, 0.25),  # no price leads to residuals for both, 0.2 at 160 bytes
        (200, 200, 0.1),  # each a center of its own
        (259, 200, 0.1),
        (260, 260, 0.02),
        (10**9, 800, 0.0),
    ],
)
def test_one_expert_by_hand(budget: int, nbytes: int, loss: float) -> None:
    ((one,),) = allocate([by_hand()], budget)
    assert (one.nbytes, one.loss) == (nbytes, pytest.approx(loss))


def test_identical_variants_count_once() -> None:
    """One center and one residual for both, whose losses add up."""
    layer = by_hand(labels=(0, 0))
    for budget, nbytes, loss in [(100, 100, 0.1), (130, 130, 0.02), (400, 400, 0.0)]:
        ((one,),) = allocate([layer], budget)
        assert (one.nbytes, one.loss) == (nbytes, pytest.approx(loss))
        assert len({f for forms in one.forms[0] for f in forms}) == 1


def test_only_one_kind_is_stored_exactly() -> None:
    """Two variants that differ are never one exact expert, however cheap that would be."""
    ((one,),) = allocate([by_hand()], 799)
    assert one.nbytes < 799
    ((one,),) = allocate([by_hand()], 800)
    assert one.clusters == (0, 1)
    assert one.forms == (((2,),), ((2,),))


@pytest.mark.parametrize("budget", [-(10**9), 0, 99])
def test_what_does_not_fit_gets_the_smallest_choice(budget: int) -> None:
    ((one,),) = allocate([by_hand()], budget)
    assert one.nbytes == 100


@settings(deadline=None, max_examples=30)
@given(layers(most=5))
def test_the_smallest_choice_is_the_smallest(found: list[LayerChoices]) -> None:
    least = best_front(found)[0][0]
    for budget in (0, least - 1, least):
        chosen = allocate(found, budget)
        assert total(chosen)[0] == least
    check(found, chosen)


@pytest.mark.parametrize(("budget", "lost"), [(432, 0.31), (1312, 0.19), (2192, 0.07), (3072, 0)])
def test_forms_that_only_a_lower_price_takes_are_in_the_set(budget: int, lost: float) -> None:
    """Two experts tie at the price that leads here, at which both have two bits: found by chance.

    Then 16 bits had no place among the forms, although they fit one of both.
    """
    forms = tuple(map(Form.parse, ("16bit", "2bit-g64", "exact")))
    ties, other = (1e-6, 0.12, 0.0), (6e-7, 0.07, 0.0)

    def layer(*losses: tuple[float, ...]) -> LayerChoices:
        tables = [np.full((1, 2, 3, 1), np.inf) for _ in losses]
        for table, own in zip(tables, losses, strict=True):
            table[0, 0, :, 0] = own
        return LayerChoices(
            clusters=((0,),),
            options=(((0,),),),
            forms=forms,
            losses=tuple(tables),
            shares=np.ones((1, 1)),
            center_bytes=(np.array([1024, 144, 1024]),) * len(losses),
            residual_bytes=(np.zeros(3, dtype=np.int64),) * len(losses),
        )

    nbytes, found = total(allocate([layer(ties), layer(ties, other)], budget))
    assert (nbytes, found) == (budget, pytest.approx(lost, abs=1e-12))


def test_what_is_left_goes_to_single_experts() -> None:
    """Four equal experts: the price alone would take all of them or none."""
    layer = by_hand(experts=4)
    for budget in range(520, 800, 20):
        nbytes, _ = total(allocate([layer], budget))
        assert budget - 100 < nbytes <= budget


def test_a_budget_that_few_forms_meet_without_a_price() -> None:
    """All bytes fit at the forms of the first sets; the next sets must not go beyond them."""
    layer = by_hand(labels=(0, 0))
    assert total(allocate([layer], 100))[0] == 100
    assert total(allocate([layer] * 3, 330))[0] <= 330


def test_layers_share_the_budget() -> None:
    """Bytes go where they save the most."""
    light, heavy = by_hand(losses=(0.05, 0.01)), by_hand(losses=(5.0, 1.0))
    (first,), (second,) = allocate([light, heavy], 360)
    assert (first.nbytes, second.nbytes) == (100, 260)
    (second,), (first,) = allocate([heavy, light], 360)
    assert (first.nbytes, second.nbytes) == (100, 260)


@pytest.mark.parametrize("seed", range(6))
def test_twice_is_the_same(seed: int) -> None:
    found = [random_layer(seed + i, 3, 4, 2, NAMES) for i in range(2)]
    least = sum(front(layer, [range(len(layer.forms))] * 2)[0][0] for layer in found)
    for budget in (least, 2 * least, 3 * least):
        assert allocate(found, budget) == allocate(found, budget)
        other = total(allocate(found[::-1], budget))
        assert other[0] <= budget
