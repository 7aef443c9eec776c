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

    A name has one color in all panels; those in `dashed` are bounds, not measurements.
    """
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    width = 1.5 + 6.5 * len(panels)
    figure, found = pyplot.subplots(
        1, len(panels), figsize=(width, 6), layout="constrained", squeeze=False
    )
    names = list(dict.fromkeys(name for _, lines in panels for name in lines))
    colors = {name: f"C{number % 10}" for number, name in enumerate(names)}
    for axes, (label, lines) in zip(found[0], panels, strict=True):
        for name, line in lines.items():
            xs, ys = zip(*sorted(line), strict=True)
            style = "--" if name in dashed else "-"
            axes.plot(xs, ys, style, marker="o", ms=4, color=colors[name], label=name)
        axes.set(xscale="log", yscale="log", xlabel=x, ylabel=label)
        ticks = sorted({px for line in lines.values() for px, _ in line})
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(StrMethodFormatter("{x:.3g}"))
        axes.grid(alpha=0.3, which="both")
    found[0][0].legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True
