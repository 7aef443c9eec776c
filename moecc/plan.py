"""Which experts share a slot: a pure function of recipe, similarity and headers.

The variants' experts of one layer and index start as one group for each distinct expert. Groups
are merged until the artifact fits the budget. A group of one distinct expert is stored exactly; a
group of several is *coded*: one center and a residual for each of them (see coding.py). If every
group is merged and the budget is still exceeded, experts that are identical in several variants
are coded too, as a last resort.

- `greedy`: one merge at a time, over all layers, the one with the least distance per byte saved.
- `hierarchical`: SciPy's linkage per expert, all trees cut at one height, the least that fits.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from itertools import combinations
from typing import Any

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from moecc.architecture import Architecture, ExpertLayer, Projection
from moecc.coding import Coding, distortion
from moecc.errors import PlanError
from moecc.recipe import Budget, Match, Merge
from moecc.similarity import Array, Labels

PLAN_VERSION = 1


@dataclass(frozen=True, slots=True, order=True)
class Group:
    """Variants (by index) that share the center of one expert; `coded` says how it is stored."""

    members: tuple[int, ...]
    coded: bool


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """Per expert its groups, sorted by first member; with sizes and the error to expect.

    Attributes:
        expected_error: root mean squared error of the layer's expert weights, relative to their
            root mean square, over all variants.
    """

    experts: tuple[tuple[Group, ...], ...]
    slots: int
    nbytes: int
    expected_error: float


@dataclass(frozen=True, slots=True)
class Plan:
    """Every group of every layer, and what it costs."""

    variants: tuple[str, ...]
    merge: Merge
    layers: tuple[LayerPlan, ...]
    expert_bytes: int
    expert_params: int  # of one variant
    non_expert_bytes: int  # of all variants
    budget: str
    layout: str  # fingerprint of the architecture the plan was made for

    @property
    def ratio(self) -> float:
        """Expert bytes over two bytes for each expert parameter of one variant."""
        return self.expert_bytes / (2 * self.expert_params)

    def to_json(self) -> dict[str, Any]:
        layers = [
            {
                "experts": [[[*g.members, g.coded] for g in groups] for groups in layer.experts],
                "slots": layer.slots,
                "bytes": layer.nbytes,
                "expected_error": layer.expected_error,
            }
            for layer in self.layers
        ]
        return {
            "plan_version": PLAN_VERSION,
            "variants": list(self.variants),
            "merge": asdict(self.merge),
            "layers": layers,
            "expert_bytes": self.expert_bytes,
            "expert_params": self.expert_params,
            "non_expert_bytes": self.non_expert_bytes,
            "budget": self.budget,
            "layout": self.layout,
        }


class Costs:
    """Exact bytes of groups under a recipe's codings."""

    def __init__(self, merge: Merge) -> None:
        self.center = None if merge.center == 16 else Coding(merge.center, merge.group)
        self.residual = Coding(merge.residual, merge.group) if merge.residual else None

    def center_bytes(self, projection: Projection) -> int:
        rows, cols = projection.matrix
        return self.center.nbytes(rows, cols) if self.center else rows * cols * 2

    def residual_bytes(self, projection: Projection) -> int:
        return self.residual.nbytes(*projection.matrix) if self.residual else 0

    def group(self, layer: ExpertLayer, distinct: int, coded: bool) -> int:
        """Bytes of a group with so many distinct experts; biases are kept for each of them."""
        total = 0
        for projection in layer.projections:
            if projection.is_bias:
                total += distinct * projection.exact_bytes
            elif coded:
                total += self.center_bytes(projection)
                total += distinct * self.residual_bytes(projection)
            else:
                total += projection.exact_bytes
        return total


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a plan is made from.

    Attributes:
        distances: by the recipe's metric, per layer `[experts, variants, variants]`.
        errors: the relative L2 distances of the same shape, for the error to expect.
        distinct: per layer `[experts, variants]`, see similarity.py.
        non_expert_bytes: of all variants.
    """

    architecture: Architecture
    variants: tuple[str, ...]
    distances: Sequence[Array]
    errors: Sequence[Array]
    distinct: Sequence[Labels]
    non_expert_bytes: int
    merge: Merge


def make_plan(inputs: Inputs, budget: Budget, match: Match) -> Plan:
    """Groups that fit the budget.

    Raises PlanError, with the smallest budget that can be met, if this one cannot.
    """
    planner = _Planner(inputs)
    target = _expert_target(budget, inputs)
    planner.merge_until(target, match)
    planner.code_identical_until(target)
    if planner.nbytes > target:
        raise _impossible(budget, inputs, planner.nbytes)
    return planner.finish(budget.text)


def restore_plan(value: Any, inputs: Inputs) -> Plan:
    """A plan from its JSON; sizes and errors are computed anew.

    Raises PlanError if it is not a plan, or was made for other variants, shapes or codings, or
    would store experts once that differ.
    """
    try:
        if value["plan_version"] != PLAN_VERSION:
            raise ValueError(f"plan_version is {value['plan_version']}, not {PLAN_VERSION}")
        made_for = (tuple(value["variants"]), value["layout"], Merge(**value["merge"]))
        layers = [
            [[_group(g) for g in groups] for groups in layer["experts"]]
            for layer in value["layers"]
        ]
        budget = str(value["budget"])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise PlanError(f"the file is not a plan: {type(error).__name__}: {error}") from None
    if made_for != (inputs.variants, layout_fingerprint(inputs.architecture), inputs.merge):
        raise PlanError(
            "the plan was made for other variants, shapes or `merge` settings than the recipe's",
            "make a new one with `--dry-run --plan-out`",
        )
    planner = _Planner(inputs)
    planner.adopt(layers)
    return planner.finish(budget)


def _group(value: Any) -> Group:
    """A group from its JSON, `[variant, ..., coded]`."""
    *members, coded = value
    if not members or type(coded) is not bool or any(type(m) is not int for m in members):
        raise ValueError(f"`{value}` is not a group")
    return Group(tuple(sorted(members)), coded)


def smallest_bytes(architecture: Architecture, count: int, merge: Merge) -> int:
    """The least expert bytes any plan can reach if no two variants share an expert's bits."""
    costs = Costs(merge)
    return sum(
        layer.num_experts
        * min(costs.group(layer, count, True), count * costs.group(layer, 1, False))
        for layer in architecture.layers
    )


def layout_fingerprint(architecture: Architecture) -> str:
    """Hex SHA-256 of names, shapes and dtypes: what a saved plan must match."""
    text = json.dumps(asdict(architecture), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class _Planner:
    """The groups of every (layer, expert) and their bytes, while they are merged."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.layers = inputs.architecture.layers
        self.distances = inputs.distances
        self.costs = Costs(inputs.merge)
        self.groups: dict[tuple[int, int], list[Group]] = {
            (layer, expert): _identical_groups(inputs.distinct[layer][expert])
            for layer, found in enumerate(self.layers)
            for expert in range(found.num_experts)
        }
        self.nbytes = self._total()

    def _total(self) -> int:
        return sum(self.bytes_of(*at, g) for at, groups in self.groups.items() for g in groups)

    def kinds(self, layer: int, expert: int, group: Group) -> int:
        """How many distinct experts a group holds."""
        return len({int(self.inputs.distinct[layer][expert][m]) for m in group.members})

    def bytes_of(self, layer: int, expert: int, group: Group) -> int:
        return self.costs.group(self.layers[layer], self.kinds(layer, expert, group), group.coded)

    def saved(self, at: tuple[int, int], a: Group, b: Group) -> int:
        joined = self.bytes_of(*at, _join(a, b))
        return self.bytes_of(*at, a) + self.bytes_of(*at, b) - joined

    def replace(self, at: tuple[int, int], old: Sequence[Group], new: Group) -> None:
        groups = [g for g in self.groups[at] if g not in old]
        self.nbytes += self.bytes_of(*at, new) - sum(self.bytes_of(*at, g) for g in old)
        self.groups[at] = sorted([*groups, new])

    def merge_until(self, target: int, match: Match) -> None:
        if match.algorithm == "hierarchical":
            self._cut(target, match.linkage)
        else:
            self._greedy(target, match.linkage)

    def _greedy(self, target: int, method: str) -> None:
        heap: list[tuple[float, tuple[int, int], Group, Group]] = []

        def push(at: tuple[int, int], a: Group, b: Group) -> None:
            a, b = sorted((a, b))
            if (saved := self.saved(at, a, b)) > 0:
                apart = _linkage(self.distances[at[0]][at[1]], a, b, method)
                heapq.heappush(heap, (apart / saved, at, a, b))

        if self.nbytes > target:
            for at, groups in self.groups.items():
                for a, b in combinations(groups, 2):
                    push(at, a, b)
        while self.nbytes > target and heap:
            _, at, a, b = heapq.heappop(heap)
            if a in self.groups[at] and b in self.groups[at]:
                joined = _join(a, b)
                self.replace(at, (a, b), joined)
                for other in self.groups[at]:
                    if other != joined:
                        push(at, other, joined)

    def _cut(self, target: int, method: str) -> None:
        if self.nbytes <= target:
            return
        trees = {
            at: _tree(self.distances[at[0]][at[1]], g, method) for at, g in self.groups.items()
        }
        heights = np.unique(np.concatenate([t[:, 2] for t in trees.values()]))
        low, high = 0, len(heights) - 1
        while low < high:  # the bytes fall with the height
            middle = (low + high) // 2
            if self._bytes_at(trees, heights[middle]) <= target:
                high = middle
            else:
                low = middle + 1
        if len(heights):
            for at, tree in trees.items():
                self._apply(at, self._clusters(at, tree, heights[low]))

    def _bytes_at(self, trees: dict[tuple[int, int], Array], height: float) -> int:
        return sum(
            self.bytes_of(*at, group)
            for at, tree in trees.items()
            for group in self._clusters(at, tree, height)
        )

    def _clusters(self, at: tuple[int, int], tree: Array, height: float) -> list[Group]:
        groups = self.groups[at]
        if not len(tree):
            return list(groups)
        merged: dict[int, Group] = {}
        for group, label in zip(groups, fcluster(tree, height, "distance"), strict=True):
            merged[label] = _join(merged[label], group) if label in merged else group
        return list(merged.values())

    def _apply(self, at: tuple[int, int], groups: list[Group]) -> None:
        self.nbytes += sum(self.bytes_of(*at, g) for g in groups)
        self.nbytes -= sum(self.bytes_of(*at, g) for g in self.groups[at])
        self.groups[at] = sorted(groups)

    def code_identical_until(self, target: int) -> None:
        """Codes exact groups of several identical variants, in order of layer and expert."""
        for at in sorted(self.groups):
            for group in list(self.groups[at]):
                if self.nbytes <= target:
                    return
                coded = replace(group, coded=True)
                saves = self.bytes_of(*at, group) > self.bytes_of(*at, coded)
                if len(group.members) > 1 and not group.coded and saves:
                    self.replace(at, (group,), coded)

    def adopt(self, layers: list[list[list[Group]]]) -> None:
        """Takes over the groups of a saved plan, if they place every expert and lose nothing."""
        everyone = list(range(len(self.inputs.variants)))
        if len(layers) > len(self.layers):
            raise PlanError(f"the plan has {len(layers)} layers, not {len(self.layers)}")
        for layer, found in enumerate(self.layers):
            experts = layers[layer] if layer < len(layers) else []
            if len(experts) != found.num_experts:
                raise PlanError(f"the plan does not place every expert of `{found.name}`")
            for expert, groups in enumerate(experts):
                name = f"expert {expert} of `{found.name}`"
                if sorted(m for g in groups for m in g.members) != everyone:
                    raise PlanError(f"the plan does not place every variant of {name}")
                if any(not g.coded and self.kinds(layer, expert, g) > 1 for g in groups):
                    raise PlanError(f"the plan stores {name} once for variants that differ")
                self.groups[layer, expert] = sorted(groups)
        self.nbytes = self._total()

    def finish(self, budget: str) -> Plan:
        inputs = self.inputs
        return Plan(
            variants=inputs.variants,
            merge=inputs.merge,
            layers=tuple(self._layer_plan(i) for i in range(len(self.layers))),
            expert_bytes=self.nbytes,
            expert_params=inputs.architecture.expert_params,
            non_expert_bytes=inputs.non_expert_bytes,
            budget=budget,
            layout=layout_fingerprint(inputs.architecture),
        )

    def _layer_plan(self, layer: int) -> LayerPlan:
        found = self.layers[layer]
        experts = tuple(tuple(self.groups[layer, e]) for e in range(found.num_experts))
        placed = [(layer, e, g) for e, groups in enumerate(experts) for g in groups]
        squared = sum(self._squared_error(*at) for at in placed)
        count = found.num_experts * len(self.inputs.variants)
        return LayerPlan(
            experts=experts,
            slots=len(placed),
            nbytes=sum(self.bytes_of(*at) for at in placed),
            expected_error=significant((squared / count) ** 0.5),
        )

    def _squared_error(self, layer: int, expert: int, group: Group) -> float:
        """Summed over members: D_residual * (spread + D_center), Gaussian rounding errors."""
        if not group.coded:
            return 0.0
        merge = self.inputs.merge
        apart = self.inputs.errors[layer][expert][np.ix_(group.members, group.members)]
        n = len(group.members)
        # mean: sum |x_i - mean|^2 = sum_{i<j} |x_i - x_j|^2 / n; one member as center: their mean
        spread = float((apart**2).sum()) / n / (2 if merge.method == "mean" else 1)
        return distortion(merge.residual) * (spread + n * distortion(merge.center))


def _identical_groups(labels: Labels) -> list[Group]:
    members: dict[int, list[int]] = {}
    for variant, label in enumerate(labels):
        members.setdefault(int(label), []).append(variant)
    return [Group(tuple(m), False) for m in sorted(members.values())]


def _join(a: Group, b: Group) -> Group:
    return Group(tuple(sorted(a.members + b.members)), True)


def _linkage(apart: Array, a: Group, b: Group, method: str) -> float:
    between = apart[np.ix_(a.members, b.members)]
    if method == "complete":
        return float(between.max())
    return float(between.min() if method == "single" else between.mean())


def _tree(apart: Array, groups: list[Group], method: str) -> Array:
    """SciPy's linkage over the distinct experts of one index, `[n - 1, 4]`."""
    if len(groups) < 2:
        return np.zeros((0, 4))
    first = [g.members[0] for g in groups]
    condensed = squareform(apart[np.ix_(first, first)], checks=False)
    tree: Array = linkage(condensed, method)
    return tree


def _expert_target(budget: Budget, inputs: Inputs) -> int:
    if budget.ratio is not None:
        # In fractions of the decimal number: 1.35 is not 1.3499999.
        return int(Fraction(str(budget.ratio)) * 2 * inputs.architecture.expert_params)
    assert budget.nbytes is not None
    return budget.nbytes - inputs.non_expert_bytes


def _impossible(budget: Budget, inputs: Inputs, smallest: int) -> PlanError:
    least = smallest_budget(budget, inputs.architecture, inputs.non_expert_bytes, smallest)
    return PlanError(
        f"a budget of `{budget.text}` cannot be met; the smallest possible one is `{least}`",
        "raise `budget`, or choose fewer bits for `merge.center` and `merge.residual`",
    )


def smallest_budget(
    budget: Budget, architecture: Architecture, non_expert_bytes: int, expert_bytes: int
) -> str:
    """The least budget that admits so many expert bytes, in the unit of `budget`."""
    if budget.ratio is not None:
        return f"{-(-expert_bytes * 10000 // (2 * architecture.expert_params)) / 10000:g}x"
    return f"{expert_bytes + non_expert_bytes} B"


def significant(value: float) -> float:
    """Six significant digits: what is written must not depend on the last bits of a sum."""
    return float(f"{value:.6g}")
