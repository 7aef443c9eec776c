"""Plots of size against loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

TICKS = (0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0)


@dataclass(frozen=True)
class Style:
    """How the points of a kind look; those on a line (of this width) have no labels."""

    color: str
    marker: str
    size: int
    line: float = 0


Points = Sequence[tuple[str, float, float]]  # label, x, y


def plot(
    kinds: Mapping[Style, tuple[str, Points]], path: Path, title: str, *, x: str, y: str
) -> None:
    """Every kind's points, both axes on log scales; x in multiples."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    figure, axes = pyplot.subplots(figsize=(11, 7), layout="constrained")
    labels: list[tuple[str, tuple[float, float], str]] = []
    spots: list[tuple[float, float]] = []
    for style, (kind, points) in kinds.items():
        if not points:
            continue
        at = sorted((px, py) for _, px, py in points)
        xs, ys = zip(*at, strict=True)
        axes.scatter(
            xs, ys, s=style.size, color=style.color, marker=style.marker, zorder=3, label=kind
        )
        spots += at
        if style.line:
            axes.plot(xs, ys, color=style.color, lw=style.line, alpha=0.7)
            spots += _along(at)
        else:
            labels += [(text, (px, py), style.color) for text, px, py in points]
    axes.set(xscale="log", yscale="log", title=title, xlabel=x, ylabel=y)
    axes.xaxis.set_major_locator(FixedLocator(TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}x"))
    axes.margins(x=0.1, y=0.08)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    _place(figure, axes, spots, labels)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _along(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Places on the lines between points, on log scales, which labels shall not cover."""
    found = []
    for (ax, ay), (bx, by) in pairwise(points):
        for part in range(1, 12):
            t = part / 12
            found.append((ax ** (1 - t) * bx**t, ay ** (1 - t) * by**t))
    return found


def _place(
    figure: Any,
    axes: Any,
    spots: Sequence[tuple[float, float]],
    labels: Sequence[tuple[str, tuple[float, float], str]],
) -> None:
    """Writes labels by their points, each at the first place that covers nothing else."""
    figure.canvas.draw()
    figure.set_layout_engine("none")  # what was measured must stay where it is
    renderer, points = figure.canvas.get_renderer(), axes.transData.transform(spots)
    taken = [axes.get_legend().get_window_extent(renderer)]
    for text, at, color in labels:
        note = axes.annotate(
            text, at, xytext=(0, 0), textcoords="offset points", fontsize=7.5, color=color
        )
        note.set_va("center")
        for dx, dy in _offsets():
            note.set_position((dx, dy))
            note.set_ha("left" if dx >= 0 else "right")
            box = note.get_window_extent(renderer).padded(1)
            inside = axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1)
            if inside and not box.count_contains(points) and not box.count_overlaps(taken):
                break
        if abs(dy) > 12:
            line = {"arrowstyle": "-", "lw": 0.5, "color": color, "alpha": 0.6}
            axes.annotate(
                "", at, xytext=(dx, dy), textcoords="offset points", arrowprops=line, zorder=1
            )
        taken.append(box)


def _offsets() -> Iterator[tuple[float, float]]:
    """Places of a label from its point, nearest first, in points of type."""
    for dy in (0, 8, -8, 16, -16, 26, -26, 36, -36, 48, -48, 62, -62, 80, -80):
        dx = max(7 - abs(dy) / 4, 3) + abs(dy) / 4
        yield dx, dy
        yield -dx, dy
