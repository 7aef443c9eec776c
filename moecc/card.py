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
        f"| coding | {coding}, groups of {merge['group']} |",
        "",
    ]


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
