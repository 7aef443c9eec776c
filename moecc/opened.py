"""A recipe with its sources opened, and what planning them gave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moecc.allocate import LayerChoices
from moecc.architecture import Architecture
from moecc.measured import Measured
from moecc.plan import Plan, smallest_budget, smallest_bytes
from moecc.recipe import Recipe
from moecc.similarity import Array, Similarity
from moecc.variants import OpenVariant

# (stage, done, total): bytes, except for `sources`, which counts variants
Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """Reports nothing."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A recipe's sources, mapped and checked against each other; headers only."""

    recipe: Recipe
    architecture: Architecture
    variants: tuple[OpenVariant, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(v.name for v in self.variants)

    @property
    def base(self) -> int:
        """The variant that the others' non-expert deltas are taken to."""
        return self.names.index(self.recipe.base) if self.recipe.base else 0

    @property
    def expert_bytes(self) -> int:
        """Bytes of all variants' experts in their sources."""
        layers = self.architecture.layers
        return len(self.variants) * sum(a.exact_bytes * a.num_experts for a in layers)

    @property
    def non_expert_bytes(self) -> int:
        """Bytes outside the experts, of all variants together."""
        return sum(v.non_expert_bytes for v in self.variants)

    @property
    def has_weights(self) -> bool:
        """False after a dry run from the Hub, where only headers were read."""
        return all(v.checkpoint.source.folder is not None for v in self.variants)

    @property
    def smallest_budget(self) -> str:
        """The least budget that can be met whatever the weights are, in the recipe's unit."""
        least = smallest_bytes(self.architecture, len(self.variants), self.recipe.merge)
        budget = self.recipe.budget
        return smallest_budget(budget, self.architecture, self.non_expert_bytes, least)

    def close(self) -> None:
        for variant in self.variants:
            variant.checkpoint.close()


@dataclass(frozen=True, slots=True)
class Studied:
    """What plans are made from.

    Attributes:
        opened: with the variants aligned, if the recipe asks for it.
        measured: on the recipe's calibration text, if it has one.
        choices: how experts can be stored, where the planner chooses.
    """

    opened: Opened
    similarity: Similarity
    measured: Measured | None
    choices: tuple[LayerChoices, ...] | None

    def distances(self, metric: str) -> Sequence[Array]:
        """Per layer the distances `[experts, variants, variants]`."""
        if metric == "output":
            assert self.measured is not None, "the recipe has a calibration"
            return self.measured.output
        if metric == "cka" and self.measured is not None:
            return self.measured.cka
        return self.similarity.distances(metric, self.opened.base)

    def close(self) -> None:
        self.opened.close()
        if self.measured is not None:
            self.measured.close()


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan, and what it was made from."""

    studied: Studied
    plan: Plan

    @property
    def opened(self) -> Opened:
        return self.studied.opened

    @property
    def similarity(self) -> Similarity:
        return self.studied.similarity
