"""The size-quality curve: what plans for several budgets would take and lose, nothing written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moecc.consolidate import plan_studied
from moecc.errors import MoeccError, RecipeError
from moecc.opened import Studied
from moecc.plan import significant
from moecc.recipe import Budget, parse_budget


@dataclass(frozen=True, slots=True)
class Point:
    """A plan for one budget.

    Attributes:
        ratio: expert bytes over two bytes for each expert parameter of one variant.
        expected_error: root mean squared error of the expert weights, relative to theirs.
        expected_kl: nats a token, mean over the variants; None unless planned by a calibration.
    """

    budget: str
    ratio: float
    nbytes: int
    expected_error: float
    expected_kl: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def parse_budgets(text: str) -> list[Budget]:
    """Budgets separated by commas; RecipeError names one that is none."""
    try:
        return [parse_budget(part.strip()) for part in text.split(",")]
    except ValueError as error:
        raise RecipeError(f"`--sweep`: {error}", "write for example 0.5x,0.8x,1.2x") from None


def sweep(studied: Studied, budgets: Sequence[Budget]) -> list[Point]:
    """A point for every budget, by size; PlanError for one that cannot be met."""
    points = []
    for budget in budgets:
        plan = plan_studied(studied, budget=budget).plan
        squares = [layer.expected_error**2 for layer in plan.layers]
        points.append(
            Point(
                budget=budget.text,
                ratio=round(plan.ratio, 6),
                nbytes=plan.expert_bytes,
                expected_error=significant(float(np.mean(squares)) ** 0.5),
                expected_kl=plan.loss,
            )
        )
    return sorted(points, key=lambda point: point.ratio)


def plot(points: Sequence[Point], path: Path) -> None:
    """Draws the curve as a PNG.

    Raises MoeccError if matplotlib is not installed or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        hint = "install it with: pip install 'moecc[plot]'"
        raise MoeccError("`--plot` needs matplotlib, which is not installed", hint) from None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    calibrated = points[0].expected_kl is not None
    curve = [(p, p.expected_kl if p.expected_kl is not None else p.expected_error) for p in points]
    curve = [(point, loss) for point, loss in curve if loss > 0]  # a log scale has no zero
    axes.plot([p.ratio for p, _ in curve], [loss for _, loss in curve], "o-", color="#1d4ed8")
    for point, loss in curve:
        axes.annotate(point.budget, (point.ratio, loss), xytext=(6, 5), textcoords="offset points")
    axes.set_yscale("log")
    axes.set_xlabel("expert memory of all variants, relative to one variant in 16 bits")
    axes.set_ylabel("expected KL divergence, nats a token" if calibrated else "expected error")
    axes.grid(alpha=0.3)
    try:
        figure.savefig(path, format="png", dpi=150)
    except OSError as error:
        raise MoeccError(f"cannot write `{path}`: {error.strerror}", None) from None
