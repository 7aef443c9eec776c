"""What people look at: tables of plans and artifacts, heat maps of similarity."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from moecc.card import quality_cells, quality_note
from moecc.manifest import FORMAT_VERSION
from moecc.opened import Opened, Planned
from moecc.recipe import format_size
from moecc.sweep import Point

SHADES = " ░▒▓█"
COLORS = ("grey35", "blue", "cyan", "yellow", "red")
MAX_MATRIX = 64


def header_tables(opened: Opened) -> list[RenderableType]:
    """What is known from headers alone: layout, sizes and the smallest budget."""
    table = Table(title="Variants", title_justify="left")
    for column in ("variant", "source", "experts", "non-expert"):
        table.add_column(column, justify="right" if "expert" in column else "left")
    per_variant = opened.expert_bytes // len(opened.variants)
    for variant in opened.variants:
        source = variant.checkpoint.source
        commit = f" ({source.commit[:12]})" if source.commit else ""
        table.add_row(
            escape(variant.name),
            escape(source.reference + commit),
            format_size(per_variant),
            format_size(variant.non_expert_bytes),
        )
    layers = opened.architecture.layers
    experts = sorted({layer.num_experts for layer in layers})
    facts = (
        f"{opened.architecture.class_name}: {len(layers)} layers of "
        f"{' or '.join(map(str, experts))} experts; "
        f"smallest budget with this merge: [bold]{opened.smallest_budget}[/]"
    )
    return [table, facts]


def plan_tables(planned: Planned) -> list[RenderableType]:
    """The plan by layer, and its total against the budget."""
    plan, opened = planned.plan, planned.opened
    table = Table(title="Plan", title_justify="left")
    for column in ("layer", "logical", "physical", "before", "after", "expected error"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    names = short_names([layer.name for layer in opened.architecture.layers])
    layers = zip(names, opened.architecture.layers, plan.layers, strict=True)
    for name, layer, found in layers:
        logical = layer.num_experts * len(opened.variants)
        table.add_row(
            name,
            str(logical),
            str(found.slots),
            format_size(layer.exact_bytes * logical),
            format_size(found.nbytes),
            f"{found.expected_error:.2%}",
        )
    total = (
        f"experts {format_size(opened.expert_bytes)} -> "
        f"[bold]{format_size(plan.expert_bytes)}[/] = [bold]{plan.ratio:.4g}x[/] of one 16-bit "
        f"variant; non-expert {format_size(plan.non_expert_bytes)}; budget {plan.budget}"
    )
    if plan.loss is not None:
        total += f"; expected KL divergence [bold]{plan.loss:.2g}[/] nats a token"
    return [table, total]


def sweep_table(points: Sequence[Point]) -> Table:
    """What every budget would take and lose."""
    table = Table(title="Size and quality to expect", title_justify="left")
    for column in ("budget", "ratio", "experts", "expected error", "expected KL"):
        table.add_column(column, justify="right")
    for point in points:
        kl = "-" if point.expected_kl is None else f"{point.expected_kl:.2g}"
        table.add_row(
            point.budget,
            f"{point.ratio:.4g}x",
            format_size(point.nbytes),
            f"{point.expected_error:.2%}",
            kl,
        )
    return table


def plan_json(planned: Planned) -> dict[str, Any]:
    """The plan for `--json`, with what the headers say."""
    plan, document = planned.plan, header_json(planned.opened)
    document["experts"] |= {
        "bytes": plan.expert_bytes,
        "ratio": round(plan.ratio, 6),
        "slots_per_layer": [layer.slots for layer in plan.layers],
    }
    return {**document, "budget": plan.budget, "plan": plan.to_json()}


def header_json(opened: Opened) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "architecture": opened.architecture.class_name,
        "variants": {
            v.name: {
                "source": v.checkpoint.source.reference,
                "commit": v.checkpoint.source.commit,
                "non_expert_bytes": v.non_expert_bytes,
            }
            for v in opened.variants
        },
        "experts": {
            "layers": len(opened.architecture.layers),
            "params": opened.architecture.expert_params,
            "source_bytes": opened.expert_bytes,
        },
        "non_expert": {"bytes": opened.non_expert_bytes},
        "smallest_budget": opened.smallest_budget,
    }


def artifact_json(manifest: dict[str, Any]) -> dict[str, Any]:
    """What `inspect --json` prints; the manifest has everything else."""
    keys = ("format_version", "moecc_version", "architecture", "base", "recipe", "experts")
    variants = {
        v["name"]: {k: value for k, value in v.items() if k != "name"} for v in manifest["variants"]
    }
    layers = [
        {k: layer[k] for k in ("name", "num_experts", "slots", "bytes", "measured_error")}
        for layer in manifest["layers"]
    ]
    return {
        **{key: manifest[key] for key in keys},
        "variants": variants,
        "layers": layers,
        "non_expert": manifest["non_expert"],
        "budget": manifest["budget"],
        "quality": manifest.get("quality"),
        "artifact_bytes": sum(file["size"] for file in manifest["files"].values()),
        "manifest_sha256": manifest["manifest_sha256"],
    }


def artifact_tables(manifest: dict[str, Any]) -> list[RenderableType]:
    """Summary and per-layer tables of an artifact, and its quality if that was measured."""
    tables: list[RenderableType] = [_summary(manifest), _variants(manifest), _layers(manifest)]
    return tables + (quality_tables(manifest["quality"]) if "quality" in manifest else [])


def quality_tables(quality: dict[str, Any]) -> list[RenderableType]:
    """What `eval` found, and what it is of."""
    table = Table(title="Quality", title_justify="left")
    columns, rows = quality_cells(quality)
    for column in columns:
        table.add_column(column, justify="left" if column == "variant" else "right")
    for row in rows:
        table.add_row(*map(escape, row))
    return [table, escape(quality_note(quality).replace("`", ""))]


def _summary(manifest: dict[str, Any]) -> Table:
    merge, experts, other = (
        manifest["recipe"]["merge"],
        manifest["experts"],
        manifest["non_expert"],
    )
    count = len(manifest["variants"])
    full = 2 * experts["params"] * count
    table = Table(title="Artifact", title_justify="left", show_header=False)
    rows = {
        "architecture": f"{manifest['architecture']}, {len(manifest['layers'])} expert layers",
        "experts": f"{format_size(experts['bytes'])} = {experts['ratio']:.4g}x of one 16-bit "
        f"variant ({count} variants apart: {format_size(full)})",
        "non-expert": f"{format_size(other['bytes'])} for all variants, exact "
        f"({format_size(other['stored_bytes'])} on disk)",
        "on the GPU": format_size(experts["bytes"] + other["bytes"]),
        "on disk": format_size(sum(file["size"] for file in manifest["files"].values())),
        "budget": manifest["budget"],
        "merge": f"{merge['method']}, center {merge['center']}, residual {merge['residual']}, "
        f"group {merge['group']}",
    }
    for name, value in rows.items():
        table.add_row(name, escape(value))
    return table


def _variants(manifest: dict[str, Any]) -> Table:
    table = Table(title="Variants", title_justify="left")
    for column in ("variant", "source", "commit", "license", "non-expert"):
        table.add_column(column, justify="right" if column == "non-expert" else "left")
    for v in manifest["variants"]:
        name = f"{v['name']} (base)" if v["name"] == manifest["base"] else v["name"]
        table.add_row(
            escape(name),
            escape(v["source"]),
            (v["commit"] or "-")[:12],
            escape(v["license"] or "not stated"),
            format_size(v["non_expert_bytes"]),
        )
    return table


def _layers(manifest: dict[str, Any]) -> Table:
    count = len(manifest["variants"])
    table = Table(title="Layers", title_justify="left")
    for column in ("layer", "logical", "physical", "size", "error", "codings"):
        table.add_column(column, justify="left" if column in ("layer", "codings") else "right")
    names = short_names([layer["name"] for layer in manifest["layers"]])
    for name, layer in zip(names, manifest["layers"], strict=True):
        pools = {
            f"{'+ ' if pool['role'] == 'residual' else ''}{pool['coding']}"
            for projection in layer["projections"]
            for pool in projection["pools"]
        }
        table.add_row(
            name,
            str(count * layer["num_experts"]),
            str(layer["slots"]),
            format_size(layer["bytes"]),
            f"{layer['measured_error']:.2%}",
            ", ".join(sorted(pools, reverse=True)),
        )
    return table


def short_names(names: Sequence[str]) -> list[str]:
    """Dotted names without the parts that all of them start or end with."""
    parts = [name.split(".") for name in names]
    start = _common(parts)
    end = _common([p[start:][::-1] for p in parts])
    return [".".join(p[start : len(p) - end]) or name for p, name in zip(parts, names, strict=True)]


def _common(parts: Sequence[Sequence[str]]) -> int:
    """How many leading parts are the same in all."""
    count = 0
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        count += 1
    return count


def heat_map(
    layer: str, variants: Sequence[str], metric: str, distances: Sequence[Sequence[float]]
) -> list[RenderableType]:
    """Distances of same-index experts: a row for each pair of variants, a cell for each expert.

    `distances` is `[experts][pairs]`.
    """
    values = np.array(distances).T
    low, high = float(values.min(initial=0.0)), float(values.max(initial=0.0))
    table = Table(title=f"{metric} distance in {layer}", title_justify="left")
    for column in ("variants", "least", "mean", "most", "experts 0 .. "):
        table.add_column(column, justify="right" if column in ("least", "mean", "most") else "left")
    for (a, b), row in zip(combinations(variants, 2), values, strict=True):
        numbers = (f"{x:.4f}" for x in (row.min(), row.mean(), row.max()))
        table.add_row(escape(f"{a} - {b}"), *numbers, _strip(row, low, high))
    return [table, _legend(low, high)]


def matrix_map(
    layer: str, variants: Sequence[str], metric: str, distances: np.ndarray[Any, Any]
) -> list[RenderableType]:
    """The distances of all experts of a layer, `[n, n]`, variant by variant, as cells."""
    size = -(-len(distances) // MAX_MATRIX)
    cells = [
        [float(block.mean()) for block in np.array_split(rows, -(-len(distances) // size), axis=1)]
        for rows in np.array_split(distances, -(-len(distances) // size), axis=0)
    ]
    low, high = float(np.min(cells)), float(np.max(cells))
    title = f"{metric} distance of all experts in {layer}, as served: {', '.join(variants)}"
    lines = [_strip(np.repeat(row, 2), low, high) for row in cells]
    return [escape(title), *lines, _legend(low, high)]


def _strip(values: Any, low: float, high: float) -> Text:
    text = Text()
    for value in values:
        level = int((len(SHADES) - 1) * (value - low) / (high - low) + 0.5) if high > low else 0
        text.append(SHADES[level], style=COLORS[level])
    return text


def _legend(low: float, high: float) -> Text:
    text = Text(f"{low:.4f} ")
    for shade, color in zip(SHADES, COLORS, strict=True):
        text.append(shade * 2, style=color)
    return text.append(f" {high:.4f}", style="none")
