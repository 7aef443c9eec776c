"""Plots of figures over a load: a line a contender."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

Line = Sequence[tuple[float, float]]  # x, y
Panel = tuple[str, Mapping[str, Line]]  # label of the y axis, lines by name


def plot(
    panels: Sequence[Panel], path: Path, title: str, *, x: str, dashed: Sequence[str] = ()
) -> bool:
    """One panel beside the other, both axes on log scales; False where matplotlib is not there.

    A name has one color in all panels, and its bound has it, too: `NAME: floor`. Those in `dashed`
    are bounds, not measurements.
    """
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    figure, found = pyplot.subplots(
        1, len(panels), figsize=(4 + 6 * len(panels), 6), layout="constrained", squeeze=False
    )
    palette = pyplot.get_cmap("tab10").colors
    names = list(dict.fromkeys(_owner(name) for _, lines in panels for name in lines))
    drawn = {}
    for axes, (label, lines) in zip(found[0], panels, strict=True):
        for name, line in lines.items():
            xs, ys = zip(*sorted(line), strict=True)
            style = "--" if name in dashed else "-"
            color = palette[names.index(_owner(name)) % len(palette)]
            (drawn[name],) = axes.plot(xs, ys, style, marker="o", ms=4, color=color)
        axes.set(xscale="log", yscale="log", xlabel=x, ylabel=label)
        axes.xaxis.set_major_locator(FixedLocator(_apart(lines)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.3g}"))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
        axes.grid(alpha=0.3, which="both")
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True


def _owner(name: str) -> str:
    return name.partition(": ")[0]


def _apart(lines: Mapping[str, Line]) -> list[float]:
    """The xs of all lines, without those whose labels would touch."""
    kept: list[float] = []
    for px in sorted({px for line in lines.values() for px, _ in line}):
        if not kept or px >= 1.6 * kept[-1]:
            kept.append(px)
    return kept
