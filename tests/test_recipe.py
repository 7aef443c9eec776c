"""Recipes: exact messages for bad ones, exact values for good ones, and the shipped files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from moecc.errors import RecipeError
from moecc.recipe import (
    Budget,
    Match,
    Merge,
    Output,
    Params,
    Recipe,
    Similarity,
    Variant,
    format_size,
    load_recipe,
    parse_recipe,
    parse_size,
)

RECIPES = Path(__file__).parents[1] / "recipes"
SHIPPED = sorted(RECIPES.rglob("*.yaml"))
SCHEMA = jsonschema.Draft202012Validator(json.loads((RECIPES / "schema.json").read_text()))
HERE = Path("here")

GOOD = """\
version: 1
variants:
  base: {source: x/base}
  chat: {source: x/chat}
budget: 1.35x
"""
KEYS = (
    "`version`, `base`, `variants`, `calibration`, `similarity`, `match`, `merge`, `budget`, "
    "`output`"
)
RULE = "use up to 64 letters, digits, `.`, `_` and `-`, a letter or digit first"
NO_BASE = (
    "6:22: similarity -> metric: `delta-cosine` compares deltas to the base variant, "
    "and the recipe has no `base`"
)


def message(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, HERE, "r.yaml")
    assert caught.value.exit_code == 1
    return caught.value.message


def frame(text: str, line: int, column: int) -> str:
    gutter = " " * len(str(line))
    source = text.split("\n")[line - 1]
    return f"  {line} | {source}\n  {gutter} | {' ' * (column - 1)}^"


# What is appended to GOOD, and each mistake as "line:column: path: what".
APPENDED = [
    ("centre: 4bit\n", [f"6:1: centre: unknown key, the keys here are {KEYS}"]),
    ("center: 4bit\n", ["6:1: center: unknown key, it belongs under `merge`"]),
    ("Merge: {}\n", ["6:1: Merge: unknown key, did you mean `merge`?"]),
    ("on: push\n", [f"6:1: on: unknown key, the keys here are {KEYS}"]),
    ("yes: 1\n", [f"6:1: yes: unknown key, the keys here are {KEYS}"]),
    ("merge:\n  centre: 4bit\n", ["7:3: merge -> centre: unknown key, did you mean `center`?"]),
    (
        "merge: {shards: 1}\n",
        [
            "6:9: merge -> shards: unknown key, the keys here are "
            "`method`, `center`, `residual`, `group`, `params`"
        ],
    ),
    (
        "merge: 4bit\n",
        ["6:8: merge: expected a mapping such as `{center: 4bit, residual: 2bit}`, not text"],
    ),
    (
        "merge:\n",
        [
            "6:7: merge: expected a mapping such as `{center: 4bit, residual: 2bit}`, "
            "not an empty value"
        ],
    ),
    (
        "similarity: [l2]\n",
        ["6:13: similarity: expected a mapping such as `{metric: l2}`, not a list"],
    ),
    (
        "similarity: {metric: cosin}\n",
        [
            "6:22: similarity -> metric: `cosin` is not one of "
            "`l2`, `cosine`, `delta-cosine`, `cka`, `output`, did you mean `cosine`?"
        ],
    ),
    (
        "similarity: {metric: output}\n",
        [
            "6:22: similarity -> metric: `output` compares what experts do to a text, "
            "and the recipe has no `calibration`"
        ],
    ),
    (
        "calibration: {samples: 4}\n",
        ["6:14: calibration -> text: missing, write for example `text: {base: [base.txt], ...}`"],
    ),
    (
        "calibration: {text: [a.txt]}\n",
        [
            "6:21: calibration -> text: expected a mapping such as `{base: [base.txt], ...}`, "
            "not a list"
        ],
    ),
    (
        "calibration: {text: {base: [a.txt]}}\n",
        ["6:21: calibration -> text: no text for `chat`; every variant needs some"],
    ),
    (
        "calibration: {text: {base: [a.txt], chat: [b.txt], caht: [b.txt]}}\n",
        [
            "6:52: calibration -> text -> caht: `caht` is not a variant, did you mean `chat`?",
        ],
    ),
    (
        "calibration: {text: {base: a.txt, chat: []}}\n",
        [
            "6:28: calibration -> text -> base: expected a list of files such as `[a.txt]`, "
            "not text",
            "6:41: calibration -> text -> chat: expected a list of files such as `[a.txt]`, "
            "not an empty list",
        ],
    ),
    (
        "calibration: {text: {base: [1.5], chat: [' ', {}]}}\n",
        [
            "6:29: calibration -> text -> base: YAML reads `1.5` as a number, quote it",
            "6:42: calibration -> text -> chat: ` ` is not the name of a file",
            "6:47: calibration -> text -> chat: expected the name of a file, not a mapping",
        ],
    ),
    (
        "calibration:\n  text: {base: [a], chat: [b]}\n  samples: 0\n  length: 1\n",
        [
            "8:12: calibration -> samples: `0` is not a whole number from 1 to 100000",
            "9:11: calibration -> length: `1` is not a whole number from 2 to 131072",
        ],
    ),
    (
        "calibration:\n  text: {base: [a], chat: [b]}\n  samples: '8'\n  length: 1e3\n",
        [
            "8:12: calibration -> samples: `8` is not a whole number from 1 to 100000",
            "9:11: calibration -> length: `1e3` is not a whole number from 2 to 131072",
        ],
    ),
    ("samples: 4\n", ["6:1: samples: unknown key, it belongs under `calibration`"]),
    (
        "similarity: {metric: {}}\n",
        [
            "6:22: similarity -> metric: expected one of "
            "`l2`, `cosine`, `delta-cosine`, `cka`, `output`, not a mapping"
        ],
    ),
    ("similarity: {metric: delta-cosine}\n", [NO_BASE]),
    (
        "similarity: {metric: delta-cosine}\nbase: caht\n",
        ["7:7: base: `caht` is not a variant, did you mean `chat`?"],
    ),
    (
        "similarity: {metric: delta-cosine}\nbase:\n",
        ["7:6: base: expected the name of a variant, not an empty value"],
    ),
    (
        "similarity: {metric: delta-cosine}\nBase: chat\n",
        [NO_BASE, "7:1: Base: unknown key, did you mean `base`?"],
    ),
    (
        "match: {algorithm: kmeans}\n",
        ["6:20: match -> algorithm: `kmeans` is not one of `greedy`, `hierarchical`"],
    ),
    (
        "match: {linkage: ~}\n",
        [
            "6:18: match -> linkage: expected one of `average`, `complete`, `single`, "
            "not an empty value"
        ],
    ),
    (
        "match: {scope: all}\n",
        ["6:16: match -> scope: `all` is not one of `same-index`, `any-index`"],
    ),
    (
        "merge: {center: 4}\n",
        [
            "6:17: merge -> center: `4` is not one of "
            "`auto`, `16bit`, `8bit`, `6bit`, `5bit`, `4bit`"
        ],
    ),
    (
        "merge: {residual: no}\n",
        [
            "6:19: merge -> residual: `no` is not one of `auto`, `none`, `1bit`, `2bit`, `3bit`, "
            "`rank4`, `rank16`, `rank64`, did you mean `none`?"
        ],
    ),
    (
        "merge: {group: '64'}\n",
        ["6:16: merge -> group: `64` is text here, write the number without quotes"],
    ),
    (
        "merge: {group: 0x40}\n",
        ["6:16: merge -> group: `0x40` is not one of `32`, `64`, `128`, `row`, `auto`"],
    ),
    (
        "merge: {group: 64.0}\n",
        [
            "6:16: merge -> group: `64.0` is not one of `32`, `64`, `128`, `row`, `auto`, "
            "did you mean `64`?"
        ],
    ),
    (
        "merge: {method: weighted}\n",
        [
            "6:17: merge -> method: `weighted` weighs by statistics of a text, "
            "and the recipe has no `calibration`"
        ],
    ),
    (
        "merge: {method: regmean}\n",
        [
            "6:17: merge -> method: `regmean` weighs by statistics of a text, "
            "and the recipe has no `calibration`"
        ],
    ),
    (
        "merge: {method: ties}\n",
        [
            "6:17: merge -> method: `ties` adds up deltas to the base variant, "
            "and the recipe has no `base`"
        ],
    ),
    (
        "merge: {params: {scale: 0, density: 1.1}}\n",
        [
            "6:25: merge -> params -> scale: `0` is not a number above 0, up to 4",
            "6:37: merge -> params -> density: `1.1` is not a number above 0, up to 1",
        ],
    ),
    (
        "output: {dtype: float32}\n",
        [
            "6:17: output -> dtype: `float32` is not one of `auto`, `bfloat16`, `float16`, "
            "did you mean `float16`?"
        ],
    ),
    (
        "output: {shard_size: 4}\n",
        ["6:22: output -> shard_size: `4` has no unit, write for example `4GiB`"],
    ),
    (
        "output: {shard_size: 4gib}\n",
        ["6:22: output -> shard_size: `4gib` has an unknown unit, did you mean `GiB`?"],
    ),
    (
        "output: {shard_size: 2x}\n",
        [
            "6:22: output -> shard_size: `2x` has an unknown unit, the units are "
            "`B`, `KB`, `MB`, `GB`, `TB`, `KiB`, `MiB`, `GiB`, `TiB`"
        ],
    ),
    ("base: Chat\n", ["6:7: base: `Chat` is not a variant, did you mean `chat`?"]),
    ("base: none\n", ["6:7: base: `none` is not a variant, the variants are `base`, `chat`"]),
    ("base:\n", ["6:6: base: expected the name of a variant, not an empty value"]),
    ("budget: 2x\n", ["6:1: budget: given twice, in lines 5 and 6"]),
    ("? [a]\n: b\n", ["6:3: expected a key, not a list"]),
    ("merge: &m {}\n", ["6:8: anchors (`&m`) are not supported, remove it"]),
    ("merge: *m\n", ["6:8: aliases (`*m`) are not supported, repeat the value"]),
    (
        "<<: {merge: {}}\n",
        ["6:1: merge keys (`<<`) are not supported, write the keys out"],
    ),
    ("base: !!str chat\n", ["6:7: tags (`!!str`) are not supported, remove it"]),
    ("merge: !x {}\n", ["6:8: tags (`!x`) are not supported, remove it"]),
    ("---\na: b\n", ["6:1: a recipe is one document, a second one starts here"]),
    (
        "merge: {center: 4bit\n",
        ["7:1: not valid YAML: expected ',' or '}', but got '<stream end>'"],
    ),
    ("a: b: c\n", ["6:5: not valid YAML: mapping values are not allowed here"]),
    ("a: \x01\n", ["6:4: not valid YAML: the character U+0001 is not allowed"]),
    (
        'output: {dtype: "\\e[31m"}\n',
        ["6:17: output -> dtype: `\\x1b[31m` is not one of `auto`, `bfloat16`, `float16`"],
    ),
]

# What is replaced in GOOD, by what, and the mistakes.
REPLACED = [
    (
        "1.35x",
        "1.35",
        ["5:9: budget: `1.35` has no unit, write for example `1.35x` or `1.35GiB`"],
    ),
    ("1.35x", "80", ["5:9: budget: `80` has no unit, write for example `80x` or `80GiB`"]),
    ("1.35x", "80G", ["5:9: budget: `80G` has an unknown unit, did you mean `GB`?"]),
    ("1.35x", "2X", ["5:9: budget: `2X` has an unknown unit, did you mean `x`?"]),
    (
        "1.35x",
        ".nan",
        ["5:9: budget: `.nan` is not a budget, write for example `1.35x` or `80GiB`"],
    ),
    (
        "1.35x",
        "infx",
        ["5:9: budget: `infx` is not a budget, write for example `1.35x` or `80GiB`"],
    ),
    ("1.35x", "0x", ["5:9: budget: `0x` is not above zero, write for example `1.35x` or `80GiB`"]),
    (
        "1.35x",
        "-80 GiB",
        ["5:9: budget: `-80 GiB` is not above zero, write for example `1.35x` or `80GiB`"],
    ),
    ("1.35x", "0.5B", ["5:9: budget: `0.5B` is less than one byte"]),
    (
        "1.35x",
        "[1x]",
        ["5:9: budget: expected a ratio such as `1.35x` or bytes such as `80GiB`, not a list"],
    ),
    ("version: 1", "version: 2", ["1:10: version: `2` is not `1`"]),
    (
        "version: 1",
        "version: '1'",
        ["1:10: version: `1` is text here, write the number without quotes"],
    ),
    ("version: 1\n", "", ["1:1: version: missing, write for example `version: 1`"]),
    ("budget: 1.35x\n", "", ["1:1: budget: missing, write for example `budget: 1.35x`"]),
    (
        "x/chat",
        "1.10",
        ["4:18: variants -> chat -> source: YAML reads `1.10` as a number, quote it"],
    ),
    (
        "x/chat",
        "on",
        ["4:18: variants -> chat -> source: YAML reads `on` as a boolean, quote it"],
    ),
    (
        "x/chat",
        "2026-01-01",
        ["4:18: variants -> chat -> source: YAML reads `2026-01-01` as a date, quote it"],
    ),
    (
        "x/chat",
        "' '",
        ["4:18: variants -> chat -> source: the source is empty, write a folder or `org/model`"],
    ),
    (
        "x/chat",
        '"a\\0"',
        ["4:18: variants -> chat -> source: `a\\x00` has a control character"],
    ),
    (
        "{source: x/chat}",
        "x/chat",
        ["4:9: variants -> chat: expected a mapping such as `{source: org/model}`, not text"],
    ),
    (
        "{source: x/chat}",
        "{path: x/chat}",
        [
            "4:9: variants -> chat -> source: missing, write for example `source: org/model`",
            "4:10: variants -> chat -> path: unknown key, the keys here are `source`",
        ],
    ),
    ("  chat:", "  base:", ["4:3: variants -> base: given twice, in lines 3 and 4"]),
    (
        "  chat:",
        "  Base:",
        ["4:3: variants -> Base: differs from `base` in line 3 only in letter case"],
    ),
    ("  chat:", "  -chat:", [f"4:3: variants: `-chat` is not a variant name, {RULE}"]),
    ("  chat:", "  a b:", [f"4:3: variants: `a b` is not a variant name, {RULE}"]),
    (
        "  chat: {source: x/chat}\n",
        "",
        ["3:3: variants: expected 2 to 64 variants, not 1"],
    ),
    (
        "  chat: {source: x/chat}\n",
        "".join(f"  v{i}: {{source: x}}\n" for i in range(64)),
        ["3:3: variants: expected 2 to 64 variants, not 65"],
    ),
]
BAD = [(GOOD + extra, mistakes) for extra, mistakes in APPENDED]
BAD += [(GOOD.replace(old, new), mistakes) for old, new, mistakes in REPLACED]


@pytest.mark.parametrize(("text", "mistakes"), BAD)
def test_message(text: str, mistakes: list[str]) -> None:
    count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
    blocks = [f"{count} in `r.yaml`"]
    for mistake in mistakes:
        line, column, _ = mistake.split(":", 2)
        code = frame(text.replace("\x01", " "), int(line), int(column))
        blocks.append("r.yaml:" + mistake + "\n" + re.sub(r" +\n", "\n", code))
    assert message(text) == "\n\n".join(blocks)


def test_all_mistakes_at_once_in_file_order() -> None:
    text = """\
version: 3
base: caht
variants:
  chat: {source: 7}
  Chat: {sorce: x}
merge:
  centre: 4bit
  group: 65
"""
    assert (
        message(text)
        == """\
9 mistakes in `r.yaml`

r.yaml:1:1: budget: missing, write for example `budget: 1.35x`
  1 | version: 3
    | ^

r.yaml:1:10: version: `3` is not `1`
  1 | version: 3
    |          ^

r.yaml:2:7: base: `caht` is not a variant, did you mean `chat`?
  2 | base: caht
    |       ^

r.yaml:4:18: variants -> chat -> source: YAML reads `7` as a number, quote it
  4 |   chat: {source: 7}
    |                  ^

r.yaml:5:3: variants -> Chat: differs from `chat` in line 4 only in letter case
  5 |   Chat: {sorce: x}
    |   ^

r.yaml:5:9: variants -> Chat -> source: missing, write for example `source: org/model`
  5 |   Chat: {sorce: x}
    |         ^

r.yaml:5:10: variants -> Chat -> sorce: unknown key, did you mean `source`?
  5 |   Chat: {sorce: x}
    |          ^

r.yaml:7:3: merge -> centre: unknown key, did you mean `center`?
  7 |   centre: 4bit
    |   ^

r.yaml:8:10: merge -> group: `65` is not one of `32`, `64`, `128`, `row`, `auto`
  8 |   group: 65
    |          ^"""
    )


def test_long_lines_and_values_are_cut() -> None:
    text = GOOD + "similarity: {" + " " * 100 + "metric: " + "l" * 500 + "}\n"
    head, code, caret = message(text).split("\n")[2:]
    assert head.startswith("r.yaml:6:122: similarity -> metric: `" + "l" * 59 + "…` is not")
    assert code == "  6 | " + " " * 52 + "metric: " + "l" * 30
    assert caret == "    | " + " " * 60 + "^"


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "~\n", "\ufeff"])
def test_empty(text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, HERE, "r.yaml")
    assert caught.value.message == "the recipe is empty: `r.yaml`"
    assert caught.value.hint is not None
    minimal = caught.value.hint.removeprefix("a minimal recipe is\n\n")
    assert [v.name for v in parse_recipe(minimal, HERE).variants] == ["one", "two"]


@pytest.mark.parametrize(
    ("text", "kind"), [("- a\n", "a list"), ("a\n", "text"), ("1", "a number")]
)
def test_top_level_is_a_mapping(text: str, kind: str) -> None:
    head = message(text).split("\n")[2]
    assert head == f"r.yaml:1:1: expected a mapping such as `version: 1`, not {kind}"


def test_hostile_yaml_ends_quickly() -> None:
    bomb = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{f'*a{i - 1},' * 9}]\n" for i in range(1, 40))
    start = time.monotonic()
    assert "anchors (`&a39`)" in message(GOOD + bomb)
    for deep in ("[" * 500_000, "{a: " * 100_000, "- " * 100_000):
        assert "not valid YAML: nested deeper than 16 levels" in message(deep)
    assert time.monotonic() - start < 20


def test_line_numbers_count_as_yaml_does() -> None:
    text = "\ufeff" + GOOD.replace("\n", "\r\n") + "a: 1\r\n"
    assert message(text).split("\n")[2].startswith("r.yaml:6:1: a: unknown key")


def test_defaults() -> None:
    recipe = parse_recipe(GOOD, HERE)
    assert recipe == Recipe(
        variants=(Variant("base", "x/base"), Variant("chat", "x/chat")),
        budget=Budget(1.35, None, "1.35x"),
    )
    assert recipe.base is None
    assert recipe.similarity == Similarity("l2")
    assert recipe.match == Match("greedy", "average", "same-index")
    assert recipe.merge == Merge("mean", 16, 0, 64)
    assert recipe.output == Output("auto", 4 * 2**30)
    assert recipe.folder == HERE
    assert recipe.to_dict() == {
        "version": 1,
        "variants": {"base": {"source": "x/base"}, "chat": {"source": "x/chat"}},
        "similarity": {"metric": "l2"},
        "match": {"algorithm": "greedy", "linkage": "average", "scope": "same-index"},
        "merge": {"method": "mean", "center": "16bit", "residual": "none", "group": 64},
        "budget": "1.35x",
        "output": {"dtype": "auto", "shard_size": "4GiB"},
    }


def test_everything_said() -> None:
    text = """\
version: 1
base: "1.10"
variants:
  1.10: {source: "1.10"}
  on: {source: x}
  A: {source: x}
similarity: {metric: cka}
match: {algorithm: hierarchical, linkage: single, scope: same-index}
merge: {method: representative, center: 5bit, residual: 3bit, group: row}
budget: 1.5 GB
output: {dtype: float16, shard_size: 500MB}
"""
    assert parse_recipe(text, HERE) == Recipe(
        variants=(Variant("1.10", "1.10"), Variant("on", "x"), Variant("A", "x")),
        budget=Budget(None, 1_500_000_000, "1.5 GB"),
        base="1.10",
        similarity=Similarity("cka"),
        match=Match("hierarchical", "single", "same-index"),
        merge=Merge("representative", 5, 3, 0),
        output=Output("float16", 500_000_000),
    )


def test_delta_cosine_with_a_base() -> None:
    recipe = parse_recipe(GOOD + "base: base\nsimilarity: {metric: delta-cosine}\n", HERE)
    assert (recipe.base, recipe.similarity) == ("base", Similarity("delta-cosine"))
    full = recipe.to_dict()
    SCHEMA.validate(full)
    assert parse_recipe(yaml.safe_dump(full, sort_keys=False), HERE) == recipe


BITS = {"16bit": 16, "8bit": 8, "6bit": 6, "5bit": 5, "4bit": 4}
RESIDUALS = {"none": 0, "1bit": 1, "2bit": 2, "3bit": 3}
GROUPS = {32: 32, 64: 64, 128: 128, "row": 0}
names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)
sources = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1).filter(str.strip)
numbers = st.from_regex(r"[1-9][0-9]{0,5}(\.[0-9]{1,3})?", fullmatch=True)
budgets = st.builds("{}{}{}".format, numbers, st.sampled_from(["", " "]), st.sampled_from(
    ["x", "B", "KB", "GB", "KiB", "GiB", "TiB"]
))  # fmt: skip


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    chosen = draw(st.lists(names, min_size=2, max_size=6, unique_by=str.lower))
    plain: dict[str, Any] = {
        "version": 1,
        "variants": {name: {"source": draw(sources)} for name in chosen},
        "budget": draw(budgets),
    }
    section = {
        "center": st.sampled_from(list(BITS)),
        "residual": st.sampled_from(list(RESIDUALS)),
        "group": st.sampled_from(list(GROUPS)),
    }
    merge = draw(st.none() | st.fixed_dictionaries({}, optional=section))
    base = draw(st.none() | st.sampled_from(chosen))
    size = draw(st.none() | st.integers(1, 2**50).map("{}B".format))
    extra = {"merge": merge, "base": base, "output": size and {"shard_size": size}}
    return plain | {key: value for key, value in extra.items() if value is not None}


@given(recipes())
@settings(max_examples=60, deadline=None)
def test_round_trip(plain: dict[str, Any]) -> None:
    recipe = parse_recipe(yaml.safe_dump(plain, sort_keys=False), HERE)
    assert [v.name for v in recipe.variants] == list(plain["variants"])
    assert recipe.base == plain.get("base")
    merge = plain.get("merge", {})
    assert recipe.merge.center == BITS[merge.get("center", "16bit")]
    assert recipe.merge.residual == RESIDUALS[merge.get("residual", "none")]
    assert recipe.merge.group == GROUPS[merge.get("group", 64)]
    assert (recipe.budget.ratio is None) != (recipe.budget.nbytes is None)
    full = recipe.to_dict()
    SCHEMA.validate(full)
    assert parse_recipe(yaml.safe_dump(full, sort_keys=False), Path("there")) == recipe
    assert parse_recipe(json.dumps(full, ensure_ascii=False), HERE).to_dict() == full


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=60))
@settings(max_examples=100, deadline=None)
def test_any_text_is_a_recipe_error(text: str) -> None:
    for whole in (text, GOOD + text + "!"):
        try:
            outcome = parse_recipe(whole, HERE).to_dict()["budget"]
        except RecipeError as error:
            outcome = error.message.split("\n")[0]
        assert re.fullmatch(
            r"1\.35x|the recipe is empty.*|[1-9].* mistakes? in `<recipe>`", outcome
        )


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("1B", 1), ("4GiB", 4 * 2**30), ("80 GiB", 80 * 2**30), ("1.5KiB", 1536), ("2KB", 2000),
        ("3MB", 3 * 10**6), ("4GB", 4 * 10**9), ("0.5TB", 5 * 10**11), ("1MiB", 2**20),
        ("1TiB", 2**40), ("+1B", 1), ("1.0001KB", 1000),
    ],
)  # fmt: skip
def test_parse_size(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text", ["", "4", "GiB", "4 gb", "4Gb", "1e3B", "0B", "-1B", "4  GiB", "4GiB\n", "٤GiB", "1x"]
)
def test_parse_size_refuses(text: str) -> None:
    with pytest.raises(ValueError, match=r"^`.*` (is|has) "):
        parse_size(text)


@given(st.integers(1, 10**15), st.sampled_from(["B", "KB", "MB", "GB", "KiB", "MiB", "TiB"]))
def test_parse_size_is_exact(n: int, unit: str) -> None:
    power = " KMGT".index(unit[0]) if unit != "B" else 0
    assert parse_size(f"{n}{unit}") == n * (1024 if "i" in unit else 1000) ** power


@given(st.integers(1, 2**60))
def test_format_size_is_close(n: int) -> None:
    text = format_size(n)
    assert re.fullmatch(r"[0-9]{1,4} B|[0-9]+\.[0-9] [KMGT]iB", text)
    # A size is rounded down to a byte: 1280 B are 1.25 KiB, the `1.2 KiB` of them 1228 B.
    assert abs(parse_size(text) - n) <= 0.0501 * parse_size("1" + text.split(" ")[1]) + 1


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (2**20 - 1, "1.0 MiB"),
        (89335138304, "83.2 GiB"), (2**40, "1.0 TiB"), (5000 * 2**40, "5000.0 TiB"),
    ],
)  # fmt: skip
def test_format_size(n: int, text: str) -> None:
    assert format_size(n) == text


def need(recipe: Recipe) -> float:
    """The ratio of a fully shared artifact; scales cost 16 bits a group."""
    scale = 16 / recipe.merge.group
    center = recipe.merge.center + scale if recipe.merge.center < 16 else 16
    residual = recipe.merge.residual + scale if recipe.merge.residual else 0
    return (center + len(recipe.variants) * residual) / 16


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_recipe(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# yaml-language-server: $schema=schema.json\n")
    SCHEMA.validate(yaml.safe_load(text))
    recipe = load_recipe(path)
    assert recipe.folder == RECIPES
    assert recipe.base == "base"
    for variant in recipe.variants:
        if variant.source.startswith("."):
            assert (recipe.folder / variant.source / "config.json").is_file()
    if recipe.budget.ratio is not None and not recipe.merge.planned:
        assert recipe.budget.ratio >= need(recipe)


def test_shipped_values() -> None:
    loaded = {path.stem: load_recipe(path) for path in SHIPPED}
    assert {
        name: (r.merge.center, r.merge.residual, r.budget.text) for name, r in loaded.items()
    } == {
        "auto": ("auto", "auto", "0.6x"),
        "lossless": (16, 0, "4.0x"),
        "mixtral-8x7b": (4, 2, "60GiB"),
        "paper": (16, 0, "1.0x"),
        "quickstart": (4, 2, "0.95x"),
        "qwen3-30b-a3b": (4, 2, "0.84x"),
    }
    assert loaded["paper"].merge.method == "representative"
    assert [v.name for v in loaded["quickstart"].variants] == ["base", "chat", "math", "python"]


FULL = parse_recipe(GOOD + "base: base\n", HERE).to_dict()
REFUSED: list[tuple[tuple[str, ...], Any]] = [
    (("version",), 2), (("version",), "1"), (("base",), "a b"), (("extra",), 1),
    (("variants",), []), (("variants",), {"a": {"source": "x"}}),
    (("variants",), {f"v{i}": {"source": "x"} for i in range(65)}),
    (("variants", "chat"), "x"), (("variants", "chat"), {}), (("variants", "a b"), {"source": "x"}),
    (("variants", "chat", "source"), ""), (("variants", "chat", "source"), 1.1),
    (("variants", "chat", "revision"), "main"), (("similarity", "metric"), "l3"),
    (("match", "algorithm"), "kmeans"), (("match", "linkage"), "ward"),
    (("match", "scope"), "all"), (("match", "extra"), 1), (("similarity", "extra"), 1),
    (("merge", "method"), "slerp"), (("merge", "center"), "3bit"), (("merge", "center"), 4),
    (("merge", "residual"), "4bit"), (("merge", "residual"), False), (("merge", "group"), "64"),
    (("merge", "group"), 16), (("merge", "centre"), "4bit"), (("merge",), None),
    (("budget",), 80), (("budget",), "80"), (("budget",), "0x"), (("budget",), "-1x"),
    (("budget",), "0.0 GiB"), (("budget",), "80gib"), (("output", "dtype"), "float32"),
    (("output", "shard_size"), "2x"), (("output", "shard_size"), "0B"), (("output", "extra"), 1),
]  # fmt: skip


@pytest.mark.parametrize(("place", "value"), REFUSED)
def test_schema_and_parser_refuse_the_same(place: tuple[str, ...], value: object) -> None:
    plain: Any = json.loads(json.dumps(FULL))
    SCHEMA.validate(plain)
    inner = plain
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        SCHEMA.validate(plain)
    assert place[0] in message(yaml.safe_dump(plain, sort_keys=False))


@pytest.mark.parametrize("key", ["version", "variants", "budget"])
def test_schema_and_parser_require_the_same(key: str) -> None:
    plain = {name: value for name, value in FULL.items() if name != key}
    with pytest.raises(jsonschema.ValidationError):
        SCHEMA.validate(plain)
    assert f": {key}: missing" in message(yaml.safe_dump(plain))


CALIBRATION = {"text": {"base": ["base.txt"], "chat": ["/c.txt", "d.txt"]}}
CALIBRATED = FULL | {"calibration": CALIBRATION}


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("text",), []),
        (("text",), {"base": ["a"]}),
        (("text", "chat"), []),
        (("text", "chat"), "a"),
        (("text", "chat"), [1]),
        (("text", "chat"), [" "]),
        (("samples",), 0),
        (("samples",), 100_001),
        (("samples",), "8"),
        (("length",), 1),
        (("length",), 131_073),
        (("extra",), 1),
    ],
)
def test_schema_and_parser_refuse_the_same_calibration(
    place: tuple[str, ...], value: object
) -> None:
    plain: Any = json.loads(json.dumps(CALIBRATED))
    SCHEMA.validate(plain)
    inner = plain["calibration"]
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        SCHEMA.validate(plain)
    assert "calibration -> " in message(yaml.safe_dump(plain, sort_keys=False))


def test_calibration() -> None:
    recipe = parse_recipe(yaml.safe_dump(CALIBRATED, sort_keys=False), HERE)
    assert recipe.calibration is not None
    assert (recipe.calibration.samples, recipe.calibration.length) == (128, 512)
    assert recipe.calibration.files(HERE) == {
        "base": (HERE / "base.txt",),
        "chat": (Path("/c.txt"), HERE / "d.txt"),
    }
    plain = recipe.to_dict()
    assert plain["calibration"] == {**CALIBRATION, "samples": 128, "length": 512}
    assert parse_recipe(yaml.safe_dump(plain, sort_keys=False), HERE) == recipe


def test_schema_and_parser_require_a_calibration_for_output() -> None:
    plain = {**CALIBRATED, "similarity": {"metric": "output"}}
    SCHEMA.validate(plain)
    assert parse_recipe(yaml.safe_dump(plain), HERE).similarity.metric == "output"
    del plain["calibration"]
    with pytest.raises(jsonschema.ValidationError, match="'calibration' is a required property"):
        SCHEMA.validate(plain)
    assert "the recipe has no `calibration`" in message(yaml.safe_dump(plain))


def test_schema_and_parser_require_a_base_for_delta_cosine() -> None:
    plain = {**FULL, "similarity": {"metric": "delta-cosine"}}
    SCHEMA.validate(plain)
    del plain["base"]
    with pytest.raises(jsonschema.ValidationError, match="'base' is a required property"):
        SCHEMA.validate(plain)
    assert "the recipe has no `base`" in message(yaml.safe_dump(plain))


@pytest.mark.parametrize(
    ("method", "needed"),
    [
        ("weighted", "calibration"),
        ("regmean", "calibration"),
        ("ties", "base"),
        ("task-arithmetic", "base"),
    ],
)
def test_schema_and_parser_require_what_a_method_needs(method: str, needed: str) -> None:
    plain = {**CALIBRATED, "merge": {"method": method}}
    SCHEMA.validate(plain)
    assert parse_recipe(yaml.safe_dump(plain), HERE).merge.method == method
    del plain[needed]
    with pytest.raises(jsonschema.ValidationError, match=f"'{needed}' is a required property"):
        SCHEMA.validate(plain)
    assert f"the recipe has no `{needed}`" in message(yaml.safe_dump(plain))


@pytest.mark.parametrize(
    ("params", "valid"),
    [
        ({}, True),
        ({"scale": 0.3}, True),
        ({"scale": 4, "density": 1}, True),
        ({"density": 0.05}, True),
        ({"scale": 0}, False),
        ({"scale": -1}, False),
        ({"scale": 4.5}, False),
        ({"scale": "1"}, False),
        ({"density": 0.0}, False),
        ({"density": 1.5}, False),
        ({"more": 1}, False),
        ([], False),
    ],
)
def test_schema_and_parser_take_the_same_params(params: Any, valid: bool) -> None:
    plain = {**FULL, "merge": {"method": "ties", "params": params}}
    text = yaml.safe_dump(plain, sort_keys=False)
    if not valid:
        with pytest.raises(jsonschema.ValidationError):
            SCHEMA.validate(plain)
        assert "merge -> params" in message(text)
        return
    SCHEMA.validate(plain)
    recipe = parse_recipe(text, HERE)
    assert recipe.merge.params == Params(**params)
    assert parse_recipe(yaml.safe_dump(recipe.to_dict()), HERE) == recipe


@pytest.mark.parametrize(
    ("merge", "calibrated", "method"),
    [
        ({}, False, "mean"),
        ({"center": "4bit"}, False, "mean"),
        ({}, True, "joint"),
        ({"center": "auto"}, False, "joint"),
        ({"residual": "auto"}, False, "joint"),
        ({"group": "auto"}, False, "joint"),
        ({"method": "mean"}, True, "mean"),
        ({"method": "mean", "center": "auto"}, False, "mean"),
    ],
)
def test_the_default_method(merge: dict[str, Any], calibrated: bool, method: str) -> None:
    plain = {**(CALIBRATED if calibrated else FULL), "merge": merge}
    SCHEMA.validate(plain)
    recipe = parse_recipe(yaml.safe_dump(plain, sort_keys=False), HERE)
    assert recipe.merge.method == method
    assert recipe.merge.planned == ("auto" in merge.values())
    assert parse_recipe(yaml.safe_dump(recipe.to_dict()), HERE) == recipe


@pytest.mark.parametrize("section", ["similarity", "match", "merge", "output"])
def test_parser_takes_every_value_of_the_schema(section: str) -> None:
    schema: Any = SCHEMA.schema
    for key, value in schema["properties"][section]["properties"].items():
        for spelling in value.get("enum", ()):
            full = {**FULL, section: {**FULL[section], key: spelling}}
            if spelling in ("output", "weighted", "regmean"):
                text = {"text": CALIBRATION["text"], "samples": 128, "length": 512}
                full["calibration"] = text
            assert parse_recipe(yaml.safe_dump(full, sort_keys=False), HERE).to_dict() == full


def test_schema_knows_every_default_and_describes_every_key() -> None:
    schema: Any = SCHEMA.schema
    for section in ("similarity", "match", "merge", "output"):
        properties = schema["properties"][section]["properties"]
        plain = {key: p["default"] for key, p in properties.items() if key != "params"}
        assert plain == FULL[section]
        assert all(p["description"] for p in properties.values())
    assert list(schema["properties"]) == [*list(FULL)[:3], "calibration", *list(FULL)[3:]]
    text = schema["properties"]["calibration"]["properties"]
    assert (text["samples"]["default"], text["length"]["default"]) == (128, 512)
    assert all(p["description"] for p in text.values())
    params = schema["properties"]["merge"]["properties"]["params"]["properties"]
    assert params["density"]["default"] == Params().density
    assert "default" not in params["scale"]
    assert all(p["description"] for p in (*params.values(), *schema["properties"].values()))


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text(GOOD)
    (tmp_path / "latin.yaml").write_bytes(b"version: 1\n# caf\xe9\n")
    (tmp_path / "large.yaml").write_bytes(b"#" * (2**20 + 1))
    expected = {
        "god.yaml": ("cannot read the recipe `{}`: no such file or directory", "good.yaml"),
        ".": ("cannot read the recipe `{}`: is a directory", "pass a YAML file"),
        "a\0": ("cannot read the recipe `{}`: embedded null byte", "pass a YAML file"),
        "latin.yaml": (
            "the recipe `{}` is not UTF-8 text: byte 0xe9 in line 2",
            "save it as UTF-8",
        ),
        "large.yaml": ("the recipe `{}` is larger than 1 MiB", "pass a YAML file"),
    }
    for name, (what, hint) in expected.items():
        with pytest.raises(RecipeError) as caught:
            load_recipe(tmp_path / name)
        assert caught.value.message == what.format(tmp_path / name)
        assert hint in (caught.value.hint or "")
    assert load_recipe(tmp_path / "good.yaml").folder == tmp_path


def test_import_is_light() -> None:
    code = "import sys, moecc.recipe; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
