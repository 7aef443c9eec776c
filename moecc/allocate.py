"""Which form every expert gets: the least expected loss within a budget of bytes.

Every expert (of one layer and index) is split into groups of variants; for each projection a group
has a center, and every member a residual or none. A projection of a layer uses at most MOST_FORMS
forms, since a kernel reads few formats.

What is minimized is the loss plus a price per byte: for a given price every expert decides alone,
and for a given set of forms every member alone, so that each minimum is exact. The price is halved
in on until the bytes fit (H. Everett, "Generalized Lagrange multiplier method", 1963). The sets
are all those of the forms that would be chosen most without the limit; where they are too few for a
set, those of lower prices join them. What then remains of the budget goes to single experts, the
most loss saved per byte first.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moecc.forms import EXACT, Form

MOST_FORMS = 3
SHORTLIST = 12  # forms of a projection that sets are made of
ROUNDS = 2  # sets are chosen at the price that the last ones led to
HALVINGS = 48
_CHEAPER = (1.0, 0.7, 0.5, 0.3, 0.1, 0.0)  # parts of the price at which the rest is spent

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LayerChoices:
    """How a layer's experts can be stored. A cluster is a set of variants of one expert.

    Attributes:
        clusters: their members; C of them.
        options: per expert the ways to split it, as indices of clusters.
        forms: F of them, sorted.
        losses: per projection `[C, targets, F, V]`, what a member's loss would be: infinite where
            it cannot be, zero for variants that are no members. A target is a place of the center.
        shares: `[C, V]`, what a member counts in bytes: less than one where several are identical.
        center_bytes, residual_bytes: per projection, `[F]`.
    """

    clusters: tuple[tuple[int, ...], ...]
    options: tuple[tuple[tuple[int, ...], ...], ...]
    forms: tuple[Form, ...]
    losses: tuple[Array, ...]
    shares: Array
    center_bytes: tuple[npt.NDArray[np.int64], ...]
    residual_bytes: tuple[npt.NDArray[np.int64], ...]


@dataclass(frozen=True, slots=True)
class Chosen:
    """One expert: the clusters it is split into, and per cluster and projection each member's form.

    `loss` and `nbytes` are theirs, without biases.
    """

    clusters: tuple[int, ...]
    forms: tuple[tuple[tuple[int, ...], ...], ...]
    loss: float
    nbytes: int


def allocate(layers: Sequence[LayerChoices], nbytes: int) -> list[list[Chosen]]:
    """Per layer and expert what is chosen within `nbytes`; if nothing fits, the smallest choice."""
    solvers = [_Layer(choices) for choices in layers]
    price, found = _price(solvers, nbytes), []
    for _ in range(ROUNDS):
        for solver in solvers:
            solver.choose_sets(price)
        price = _price(solvers, nbytes)
        found.append(_spend_rest(solvers, price, nbytes))
    return min(found, key=lambda chosen: _rank(chosen, nbytes))


def _rank(chosen: Sequence[Sequence[Chosen]], nbytes: int) -> tuple[int, float]:
    """Less is better: bytes that are too many, then the loss."""
    total = sum(one.nbytes for experts in chosen for one in experts)
    return max(0, total - nbytes), sum(one.loss for experts in chosen for one in experts)


def _price(solvers: Sequence[_Layer], nbytes: int) -> float:
    """The least price per byte at which the choices fit; a very high one if none does."""
    low, high = 1e-40, 1e40
    if sum(solver.solve(0.0).nbytes.sum() for solver in solvers) <= nbytes:
        return 0.0
    for _ in range(HALVINGS):
        middle = (low * high) ** 0.5
        if sum(solver.solve(middle).nbytes.sum() for solver in solvers) <= nbytes:
            high = middle
        else:
            low = middle
    return high


def _spend_rest(solvers: Sequence[_Layer], price: float, nbytes: int) -> list[list[Chosen]]:
    """The choices at a price, and at lower ones for as many experts as still fit."""
    chosen = [solver.solve(price) for solver in solvers]
    parts = [np.zeros(len(solution.nbytes), dtype=np.int64) for solution in chosen]
    tried = [[solution] for solution in chosen]
    left = nbytes - sum(int(solution.nbytes.sum()) for solution in chosen)
    for lower in _lower(price):
        steps = []
        for i, solver in enumerate(solvers):
            new = solver.solve(lower)
            tried[i].append(new)
            for e, old in enumerate(parts[i]):
                more = new.nbytes[e] - tried[i][old].nbytes[e]
                saved = tried[i][old].losses[e] - new.losses[e]
                if more > 0 and saved > 0:
                    steps.append((-saved / more, i, e, int(more)))
        for _, i, e, more in sorted(steps):
            if more <= left:
                parts[i][e], left = len(tried[i]) - 1, left - more
    return [
        [tried[i][part].describe(solver, e) for e, part in enumerate(parts[i])]
        for i, solver in enumerate(solvers)
    ]


def _lower(price: float) -> list[float]:
    """Prices at which the rest is spent: first one at which those that tie take more bytes."""
    return [price * part * (1 - 1e-9) for part in _CHEAPER]


@dataclass(frozen=True, slots=True, eq=False)
class _Solution:
    """The best choice of a layer's experts at some price.

    Attributes:
        option: `[E]`.
        forms: per projection `[C, V]`, of every cluster, chosen or not.
        losses, nbytes: `[E]`.
    """

    option: npt.NDArray[np.int64]
    forms: list[npt.NDArray[np.int64]]
    losses: Array
    nbytes: npt.NDArray[np.int64]

    def describe(self, layer: _Layer, expert: int) -> Chosen:
        choices = layer.choices
        options = choices.options[expert]
        clusters = options[min(int(self.option[expert]), len(options) - 1)]
        forms = tuple(
            tuple(tuple(int(f[c, v]) for v in choices.clusters[c]) for f in self.forms)
            for c in clusters
        )
        return Chosen(clusters, forms, float(self.losses[expert]), int(self.nbytes[expert]))


class _Layer:
    """One layer's choices as arrays, and the forms that each projection is limited to."""

    def __init__(self, choices: LayerChoices) -> None:
        self.choices = choices
        self.allowed = [np.ones(len(choices.forms), dtype=bool) for _ in choices.losses]
        centers = [form.center for form in choices.forms]
        firsts = [i for i, c in enumerate(centers) if i == 0 or c != centers[i - 1]]
        spans = itertools.pairwise([*firsts, len(centers)])
        # The exact one first: where nothing is better, experts are kept as they are.
        self.centers = sorted(spans, key=lambda span: choices.forms[span[0]] != EXACT)
        most = max(len(option) for options in choices.options for option in options)
        width = max(map(len, choices.options))
        # Padded with a cluster that costs nothing, and with the last option again.
        self.options = np.full((len(choices.options), width, most), len(choices.clusters))
        for e, options in enumerate(choices.options):
            for o in range(width):
                option = options[min(o, len(options) - 1)]
                self.options[e, o, : len(option)] = option

    def solve(self, price: float) -> _Solution:
        """The best choice for every expert at a price per byte."""
        everyone = slice(None)
        found = [self._best(p, price, a, everyone) for p, a in enumerate(self.allowed)]
        costs = np.append(sum(best.costs for best in found), 0.0)
        option = costs[self.options].sum(-1).argmin(-1)
        chosen = np.take_along_axis(self.options, option[:, None, None], 1)[:, 0]
        losses = np.append(sum(best.losses for best in found), 0.0)
        nbytes = np.append(sum(best.nbytes for best in found), 0)
        forms = [best.forms for best in found]
        return _Solution(option, forms, losses[chosen].sum(-1), nbytes[chosen].sum(-1))

    def choose_sets(self, price: float) -> None:
        """Limits every projection to its best few forms at a price per byte."""
        self.allowed = [np.ones_like(allowed) for allowed in self.allowed]
        uses = [self._uses(each) for each in (price, *_lower(price))]
        clusters, _ = uses[0]
        self.allowed = [
            self._best_set(p, price, clusters, np.stack([counts[p] for _, counts in uses]))
            for p in range(len(self.allowed))
        ]

    def _uses(self, price: float) -> tuple[npt.NDArray[np.int64], list[npt.NDArray[np.int64]]]:
        """The clusters chosen at a price, and per projection how many members have each form."""
        solution = self.solve(price)
        chosen = np.take_along_axis(self.options, solution.option[:, None, None], 1).ravel()
        chosen = np.unique(chosen[chosen < len(self.choices.clusters)])
        members = self.choices.shares[chosen] > 0
        count = len(self.choices.forms)
        return chosen, [np.bincount(f[chosen][members], minlength=count) for f in solution.forms]

    def _best_set(
        self,
        p: int,
        price: float,
        clusters: npt.NDArray[np.int64],
        counts: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.bool_]:
        """The set of forms at which the clusters cost least.

        `counts` [prices, F]: how often a free choice takes each, at this price and at lower ones.
        """
        order = [int(f) for f in np.lexsort(-counts[::-1]) if counts[:, f].any()]
        shortlist = sorted(f for f in order[:SHORTLIST] if counts[0, f])
        if len(shortlist) <= MOST_FORMS:
            return np.isin(np.arange(counts.shape[1]), order[:MOST_FORMS])
        best, least = np.isin(np.arange(counts.shape[1]), shortlist), np.inf
        for forms in itertools.combinations(shortlist, MOST_FORMS):
            allowed = np.isin(np.arange(counts.shape[1]), forms)
            cost = float(self._best(p, price, allowed, clusters).costs.sum())
            if cost < least:
                best, least = allowed, cost
        return best

    def _best(self, p: int, price: float, allowed: npt.NDArray[np.bool_], clusters: Any) -> _Best:
        """The cheapest forms of some clusters in projection p, out of the allowed ones."""
        choices = self.choices
        losses, shares = choices.losses[p][clusters], choices.shares[clusters]
        member = shares[:, None, None] > 0
        cost = losses + choices.residual_bytes[p][:, None] * price * shares[:, None, None]
        cost = np.where(allowed[:, None] | ~member, cost, np.inf)
        costs, forms = [], []
        for start, stop in self.centers:
            part = cost[:, :, start:stop]
            costs.append(part.min(2).sum(-1) + choices.center_bytes[p][start] * price)
            forms.append(part.argmin(2) + start)
        every = np.stack(costs, 2).reshape(len(cost), -1)  # targets x centers
        pick = every.argmin(1)
        each = np.arange(len(cost))
        picked = np.stack(forms, 2).reshape(*every.shape, -1)[each, pick]
        target = pick // len(self.centers)
        loss = np.take_along_axis(losses[each, target], picked[:, None], 1)[:, 0].sum(-1)
        center = picked[each, shares.argmax(1)]  # of any member
        residuals = (choices.residual_bytes[p][picked] * shares).sum(-1)
        nbytes = choices.center_bytes[p][center] + np.rint(residuals).astype(np.int64)
        return _Best(every[each, pick], picked, loss, nbytes)


@dataclass(frozen=True, slots=True, eq=False)
class _Best:
    """Clusters in one projection: costs, losses and bytes `[C]`, forms `[C, V]`."""

    costs: Array
    forms: npt.NDArray[np.int64]
    losses: Array
    nbytes: npt.NDArray[np.int64]
