"""Groups under one fixed form: a pure function of recipe, similarity and headers.

The variants' experts of one layer and index start as one group for each distinct expert. Groups
are merged until the artifact fits the budget. If every group is merged and the budget is still
exceeded, experts that are identical in several variants are coded too, as a last resort.

- `greedy`: one merge at a time, over all layers, the one with the least distance per byte saved.
- `hierarchical`: SciPy's linkage per expert, all trees cut at one height, the least that fits.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from moecc.forms import fixed_form
from moecc.plan import (
    Group,
    Groups,
    Inputs,
    Plan,
    assemble,
    expert_target,
    group_bytes,
    impossible,
    parse_plan,
    same_form,
)
from moecc.recipe import Budget, Match
from moecc.similarity import Array, Labels


def make_plan(inputs: Inputs, budget: Budget, match: Match) -> Plan:
    """Groups that fit the budget.

    Raises PlanError, with the smallest budget that can be met, if this one cannot.
    """
    planner = _Planner(inputs)
    target = expert_target(budget, inputs)
    planner.merge_until(target, match)
    planner.code_identical_until(target)
    if planner.nbytes > target:
        raise impossible(budget, inputs, planner.nbytes)
    return assemble(inputs, _with_form(inputs, planner.groups), budget.text)


def restore_plan(value: Any, inputs: Inputs) -> Plan:
    """A plan from its JSON; sizes and errors are computed anew, but for an expected loss.

    Raises PlanError if it is not a plan, or was made for other variants, shapes or codings, or
    would store experts once that differ.
    """
    groups, budget, loss = parse_plan(value, inputs)
    if not inputs.merge.planned:
        groups = _with_form(inputs, groups)
    return assemble(inputs, groups, budget, loss)


def _with_form(inputs: Inputs, groups: Groups) -> Groups:
    """The groups in the one form of the recipe."""
    form, layers = fixed_form(inputs.merge), inputs.architecture.layers
    return {at: [same_form(layers[at[0]], g, form) for g in own] for at, own in groups.items()}


class _Planner:
    """The groups of every (layer, expert) and their bytes, while they are merged."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.layers = inputs.architecture.layers
        self.distances = inputs.distances
        self.form = fixed_form(inputs.merge)
        self.groups: Groups = {
            (layer, expert): _identical_groups(inputs.distinct[layer][expert])
            for layer, found in enumerate(self.layers)
            for expert in range(found.num_experts)
        }
        self.nbytes = self._total()

    def _total(self) -> int:
        return sum(self.bytes_of(*at, g) for at, groups in self.groups.items() for g in groups)

    def bytes_of(self, layer: int, expert: int, group: Group) -> int:
        found, labels = self.layers[layer], self.inputs.distinct[layer][expert]
        return group_bytes(found, labels, same_form(found, group, self.form))

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
