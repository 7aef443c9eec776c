"""The model card of an artifact."""

from __future__ import annotations

import re
from typing import Any

import yaml

from moecc.recipe import format_size


def model_card(manifest: dict[str, Any]) -> str:
    """README.md of an artifact, from its manifest: sources, licenses, recipe, plan, figures."""
    return "\n".join(
        [
            _front_matter(manifest),
            f"# {len(manifest['variants'])} variants of `{manifest['architecture']}` "
            "in one moecc artifact",
            "",
            "Serve it with `moecc serve .`, look at it with `moecc inspect .`, or get a variant's",
            "checkpoint back with `moecc export . --variant NAME --out DIR`.",
            "",
            *_variants(manifest),
            *_figures(manifest),
            *_quality(manifest),
            *_layers(manifest),
            "## Recipe",
            "",
            "```yaml",
            yaml.safe_dump(manifest["recipe"], sort_keys=False, width=100).rstrip(),
            "```",
            "",
        ]
    )


def _front_matter(manifest: dict[str, Any]) -> str:
    variants = manifest["variants"]
    licenses = sorted({v["license"] for v in variants if v["license"]})
    fields: dict[str, Any] = {
        "library_name": "moecc",
        "tags": ["moecc", "mixture-of-experts", "merge"],
    }
    if models := [_hub_id(v["source"]) for v in variants if v["commit"]]:
        fields["base_model"] = models
    if len(licenses) == 1 and all(v["license"] for v in variants):
        fields["license"] = licenses[0]
    return f"---\n{yaml.safe_dump(fields, sort_keys=True)}---\n"


def _hub_id(source: str) -> str:
    """`org/model` of a source on the Hub: all that the Hub accepts as `base_model`."""
    path = re.sub(r"^(hf://|https?://[^/]*/)", "", source)
    return "/".join(path.split("@")[0].split("/")[:2])


def _variants(manifest: dict[str, Any]) -> list[str]:
    rows = [
        f"| {v['name']} | {v['source']} | {v['commit'] or '-'} | {v['license'] or 'not stated'} |"
        for v in manifest["variants"]
    ]
    return [
        "## Variants",
        "",
        "| variant | source | commit | license |",
        "|---|---|---|---|",
        *rows,
        "",
        "The licenses of all sources apply.",
        "",
    ]


def _figures(manifest: dict[str, Any]) -> list[str]:
    experts, other = manifest["experts"], manifest["non_expert"]
    merge = manifest["recipe"]["merge"]
    coding = f"{merge['method']}, center {merge['center']}, residual {merge['residual']}"
    return [
        "## Figures",
        "",
        "| | |",
        "|---|---|",
        f"| expert memory | {format_size(experts['bytes'])}, {experts['ratio']:.4g}x of one "
        "16-bit variant |",
        f"| non-expert memory | {format_size(other['bytes'])}, exact "
        f"({format_size(other['stored_bytes'])} on disk) |",
        f"| budget | {manifest['budget']} |",
        f"| coding | {coding}, group {merge['group']} |",
        "",
    ]


def _quality(manifest: dict[str, Any]) -> list[str]:
    if "quality" not in manifest:
        return []
    columns, rows = quality_cells(manifest["quality"])
    return [
        "## Quality",
        "",
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        quality_note(manifest["quality"]),
        "",
    ]


def quality_cells(quality: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Names of columns, and a row for each variant that was evaluated."""
    columns = ["variant", "perplexity", "source's", "ratio", "KL", "same top token", "tokens"]
    has_rouge = any("rouge" in found for found in quality["variants"].values())
    columns += ["ROUGE-1", "source's", "difference (95%)"] if has_rouge else []
    rows = []
    for name, found in sorted(quality["variants"].items()):
        error = "" if found["standard_error"] is None else f" ± {found['standard_error']:.4f}"
        cells = [
            name,
            f"{found['perplexity']:.4g}",
            _cell(found["reference_perplexity"], ".4g"),
            "-" if found["ratio"] is None else f"{found['ratio']:.4f}{error}",
            _cell(found["kl"], ".3g"),
            _cell(found["top1"], ".2%"),
            f"{found['tokens']:,}",
        ]
        rows.append(cells + (_rouge_cells(found.get("rouge")) if has_rouge else []))
    return columns, rows


def _rouge_cells(rouge: dict[str, Any] | None) -> list[str]:
    if rouge is None:
        return ["-", "-", "-"]
    interval = ""
    if rouge["interval"]:
        interval = f" ({', '.join(f'{end:+.4f}' for end in rouge['interval'])})"
    return [
        f"{rouge['rouge1']:.4f}",
        _cell(rouge["reference_rouge1"], ".4f"),
        f"{_cell(rouge['difference'], '+.4f')}{interval}",
    ]


def quality_note(quality: dict[str, Any]) -> str:
    """What the figures are of, and over all variants."""
    samples = "pairs" if quality["window"] is None else f"windows of {quality['window']} tokens"
    text = f"Measured by `moecc eval` in {quality['dtype']} on {samples}"
    if quality["mean_ratio"] is None:
        return f"{text}, without the sources."
    return (
        f"{text}. Perplexity over the sources': mean {quality['mean_ratio']:.4f}, "
        f"worst {quality['worst_ratio']:.4f}; mean KL {quality['mean_kl']:.3g} nats a token; "
        "± is one standard error."
    )


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _layers(manifest: dict[str, Any]) -> list[str]:
    count = len(manifest["variants"])
    rows = [
        f"| {layer['name']} | {count * layer['num_experts']} | {layer['slots']} "
        f"| {format_size(layer['bytes'])} | {layer['measured_error']:.3%} |"
        for layer in manifest["layers"]
    ]
    return [
        "## Plan",
        "",
        "| layer | logical experts | physical experts | size | error of the weights |",
        "|---|---|---|---|---|",
        *rows,
        "",
    ]
