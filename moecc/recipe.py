"""Recipes: strict YAML in, a frozen `Recipe` out, every mistake reported at once with its place.

The table `_RECIPE` drives reading, suggestions and writing; defaults live in the dataclasses.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import yaml

from moecc.errors import RecipeError
from moecc.strictyaml import (
    Keys,
    Log,
    Scalar,
    Section,
    choice,
    compose,
    guess,
    is_null,
    kind,
    pairs,
    show,
    words,
)

MAX_BYTES = 2**20
AUTO = "auto"
CALIBRATED = ("weighted", "regmean")  # methods that need statistics of a text
FROM_BASE = ("ties", "task-arithmetic")  # methods on deltas to the base


@dataclass(frozen=True, slots=True)
class Variant:
    """One fine-tuned model; `source` is a folder or a Hub id, as written."""

    name: str
    source: str


@dataclass(frozen=True, slots=True)
class Calibration:
    """Text that experts are measured on: files a variant, in recipe order, as written.

    `samples` windows of `length` tokens are taken from each variant's text.
    """

    text: tuple[tuple[str, tuple[str, ...]], ...]
    samples: int = 128
    length: int = 512

    def files(self, folder: Path) -> dict[str, tuple[Path, ...]]:
        """Variant -> its files, relative ones starting at the recipe's `folder`."""
        return {name: tuple(folder / file for file in files) for name, files in self.text}


@dataclass(frozen=True, slots=True)
class Similarity:
    """How the distance between two experts is measured."""

    metric: str = "l2"


@dataclass(frozen=True, slots=True)
class Match:
    """How experts are grouped until the budget is met."""

    algorithm: str = "greedy"
    linkage: str = "average"
    scope: str = "same-index"


@dataclass(frozen=True, slots=True)
class Params:
    """Of task arithmetic and TIES: what deltas are scaled by (None: as their papers do), and the
    part of their entries that TIES keeps.
    """

    scale: float | None = None
    density: float = 0.2


@dataclass(frozen=True, slots=True)
class Merge:
    """What a group keeps: center and residual in bits (16: as is, 0: none); group 0 is a row.

    A residual of low rank is `rank16` or the like.

    Where one of them is `auto`, the planner chooses for every expert and projection.
    """

    method: str = "mean"
    center: int | str = 16
    residual: int | str = 0
    group: int | str = 64
    params: Params | None = None

    @property
    def planned(self) -> bool:
        """True if the planner chooses forms."""
        return AUTO in (self.center, self.residual, self.group)


@dataclass(frozen=True, slots=True)
class Budget:
    """Memory allowed: a ratio to one variant's experts or bytes for all; the other is None."""

    ratio: float | None
    nbytes: int | None
    text: str


@dataclass(frozen=True, slots=True)
class Output:
    """How the artifact is written; dtype `auto` keeps that of the sources."""

    dtype: str = "auto"
    shard_size: int = 4 * 2**30


@dataclass(frozen=True, slots=True)
class Recipe:
    """A validated recipe; relative sources start at `folder`."""

    version: ClassVar[int] = 1
    variants: tuple[Variant, ...]
    budget: Budget
    base: str | None = None
    calibration: Calibration | None = None
    similarity: Similarity = Similarity()
    match: Match = Match()
    merge: Merge = Merge()
    output: Output = Output()
    folder: Path = field(default=Path(), compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Recipe syntax, defaults filled in; dump it with `sort_keys=False` to keep the order."""
        plain: dict[str, Any] = _RECIPE.write(self)
        return plain


_UNITS = (
    {"B": 1}
    | {f"{prefix}B": 1000**i for i, prefix in enumerate("KMGT", 1)}
    | {f"{prefix}iB": 1024**i for i, prefix in enumerate("KMGT", 1)}
)
# Bounded digits keep the exact arithmetic below cheap whatever the text.
_QUANTITY = re.compile(r"([+-]?[0-9]{1,18}(?:\.[0-9]{1,18})?) ?([A-Za-z]*)")


def _quantity(text: str, what: str, units: Collection[str], example: str) -> tuple[Fraction, str]:
    """The positive number and the unit in `text`; ValueError says what is wrong with them."""
    found = _QUANTITY.fullmatch(text)
    if found is None:
        raise ValueError(f"{show(text)} is not a {what}, write for example {example}")
    number, unit = Fraction(found[1]), found[2]
    if number <= 0:
        raise ValueError(f"{show(text)} is not above zero, write for example {example}")
    if not unit:
        fix = " or ".join(f"`{found[1]}{unit}`" for unit in ("x", "GiB") if unit in units)
        raise ValueError(f"{show(text)} has no unit, write for example {fix}")
    if unit not in units:
        known = guess(unit, units, "the units are")
        raise ValueError(f"{show(text)} has an unknown unit{known}")
    return number, unit


def parse_size(text: str) -> int:
    """Bytes in a size such as `4GiB` or `1.5 GB`, rounded down; ValueError otherwise."""
    number, unit = _quantity(text, "size", _UNITS, "`4GiB`")
    nbytes = int(number * _UNITS[unit])
    if nbytes == 0:
        raise ValueError(f"{show(text)} is less than one byte")
    return nbytes


def format_size(n: int) -> str:
    """A size for people, one decimal: `83.2 GiB`."""
    if abs(n) < 1024:
        return f"{n} B"
    for unit in ("KiB", "MiB", "GiB"):
        if abs(float(text := f"{n / _UNITS[unit]:.1f}")) < 1024:
            return f"{text} {unit}"
    return f"{n / _UNITS['TiB']:.1f} TiB"


def _exact_size(n: int) -> str:
    """A size that `parse_size` reads back unchanged."""
    unit = max((unit for unit in _UNITS if n % _UNITS[unit] == 0), key=_UNITS.__getitem__)
    return f"{n // _UNITS[unit]}{unit}"


def parse_budget(text: str) -> Budget:
    """A ratio such as `1.35x`, or a size; ValueError otherwise."""
    number, unit = _quantity(text, "budget", ("x", *_UNITS), "`1.35x` or `80GiB`")
    if unit == "x":
        return Budget(float(number), None, text)
    return Budget(None, parse_size(text), text)


_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def _parse_source(node: yaml.ScalarNode) -> str:
    """YAML reads a bare 1.10 as the number 1.1, so only what it reads as text is a source."""
    if kind(node) != "text":
        raise ValueError(f"YAML reads {show(node.value)} as {kind(node)}, quote it")
    if not node.value.strip():
        raise ValueError("the source is empty, write a folder or `org/model`")
    if _UNPRINTABLE.search(node.value):
        raise ValueError(f"{show(node.value)} has a control character")
    return str(node.value)


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NAME_RULE = "use up to 64 letters, digits, `.`, `_` and `-`, a letter or digit first"


@dataclass(frozen=True, slots=True)
class _Variants:
    """Names to variants, in order; a name is the text of its key, so that 1.10 stays `1.10`."""

    entry: Section

    def read(self, log: Log, node: yaml.Node, keys: Keys) -> Any:
        """The variants, or None after recording mistakes."""
        entries = log.entries(node, keys, "{base: {source: org/model}, ...}")
        if entries is None:
            return None
        seen: dict[str, yaml.ScalarNode] = {}
        found = []
        for key, child in entries:
            first = seen.setdefault(key.value.lower(), key)
            if not _NAME.fullmatch(key.value):
                log.wrong(key, keys, f"{show(key.value)} is not a variant name, {_NAME_RULE}")
            elif first.value != key.value:
                twin = f"`{first.value}` in line {first.start_mark.line + 1}"
                log.wrong(key, (*keys, key.value), f"differs from {twin} only in letter case")
            fields = self.entry.read(log, child, (*keys, key.value))
            found.append(Variant(key.value, **(fields or {"source": ""})))
        if not 2 <= len(entries) <= 64:
            log.wrong(node, keys, f"expected 2 to 64 variants, not {len(entries)}")
        return tuple(found)

    def write(self, value: Any) -> Any:
        """The plain mapping `read` would read back."""
        return {variant.name: self.entry.write(variant) for variant in value}


@dataclass(frozen=True, slots=True)
class _Texts:
    """Variant names to lists of files, in order; which names there must be is checked later."""

    file: Scalar

    def read(self, log: Log, node: yaml.Node, keys: Keys) -> Any:
        """Pairs of a name and its files, or None after recording mistakes."""
        entries = log.entries(node, keys, "{base: [base.txt], ...}")
        if entries is None:
            return None
        found = []
        for key, child in entries:
            place = (*keys, key.value)
            if not isinstance(child, yaml.SequenceNode) or not child.value:
                what = "an empty list" if isinstance(child, yaml.SequenceNode) else kind(child)
                log.wrong(child, place, f"expected a list of files such as `[a.txt]`, not {what}")
                continue
            found.append((key.value, tuple(self.file.read(log, c, place) for c in child.value)))
        return tuple(found)

    def write(self, value: Any) -> Any:
        """The plain mapping `read` would read back."""
        return {name: list(files) for name, files in value}


def _parse_file(node: yaml.ScalarNode) -> str:
    if kind(node) != "text":
        raise ValueError(f"YAML reads {show(node.value)} as {kind(node)}, quote it")
    if not node.value.strip() or _UNPRINTABLE.search(node.value):
        raise ValueError(f"{show(node.value)} is not the name of a file")
    return str(node.value)


def _count(least: int, most: int) -> Scalar:
    """A whole number within bounds, written in plain digits."""
    expected = f"a whole number from {least} to {most}"

    def parse(node: yaml.ScalarNode) -> int:
        plain = re.fullmatch("[1-9][0-9]{0,17}", node.value) and kind(node) == "a number"
        if not plain or not least <= int(node.value) <= most:
            raise ValueError(f"{show(node.value)} is not {expected}")
        return int(node.value)

    return Scalar(expected, parse, int)


def _fraction(most: float) -> Scalar:
    """A number above zero, up to `most`."""
    expected = f"a number above 0, up to {most:g}"

    def parse(node: yaml.ScalarNode) -> float:
        plain = re.fullmatch(r"[0-9]{1,3}(\.[0-9]{1,12})?", node.value) and kind(node) == "a number"
        if not plain or not 0 < float(node.value) <= most:
            raise ValueError(f"{show(node.value)} is not {expected}")
        return float(node.value)

    return Scalar(expected, parse, float)


_SOURCE = Scalar("a folder or `org/model`", _parse_source)
_VARIANT = Section(
    dict, "{source: org/model}", {"source": _SOURCE}, {"source": "source: org/model"}
)
_SIZE = Scalar("a size such as `4GiB`", lambda node: parse_size(node.value), _exact_size)
_RATIO_OR_SIZE = "a ratio such as `1.35x` or bytes such as `80GiB`"
_RECIPE = Section(
    dict,
    "version: 1",
    {
        "version": choice({1: 1}),
        "base": Scalar("the name of a variant", lambda node: str(node.value)),
        "variants": _Variants(_VARIANT),
        "calibration": Section(
            Calibration,
            "{text: {base: [base.txt], ...}}",
            {
                "text": _Texts(Scalar("the name of a file", _parse_file)),
                "samples": _count(1, 100_000),
                "length": _count(2, 131_072),
            },
            {"text": "text: {base: [base.txt], ...}"},
        ),
        "similarity": Section(
            Similarity,
            "{metric: l2}",
            {"metric": words("l2", "cosine", "delta-cosine", "cka", "output")},
        ),
        "match": Section(
            Match,
            "{algorithm: greedy}",
            {
                "algorithm": words("greedy", "hierarchical"),
                "linkage": words("average", "complete", "single"),
                "scope": words("same-index", "any-index"),
            },
        ),
        "merge": Section(
            Merge,
            "{center: 4bit, residual: 2bit}",
            {
                "method": words("joint", "mean", "representative", *CALIBRATED, *FROM_BASE),
                "center": choice({AUTO: AUTO, **{f"{b}bit": b for b in (16, 8, 6, 5, 4)}}),
                "residual": choice(
                    {
                        AUTO: AUTO,
                        "none": 0,
                        "1bit": 1,
                        "2bit": 2,
                        "3bit": 3,
                        **{rank: rank for rank in ("rank4", "rank16", "rank64")},
                    }
                ),
                "group": choice({32: 32, 64: 64, 128: 128, "row": 0, AUTO: AUTO}),
                "params": Section(
                    Params, "{scale: 0.4}", {"scale": _fraction(4.0), "density": _fraction(1.0)}
                ),
            },
        ),
        "budget": Scalar(
            _RATIO_OR_SIZE, lambda node: parse_budget(node.value), lambda budget: budget.text
        ),
        "output": Section(
            Output,
            "{shard_size: 4GiB}",
            {"dtype": words("auto", "bfloat16", "float16"), "shard_size": _SIZE},
        ),
    },
    {
        "version": "version: 1",
        "variants": "variants: {base: {source: org/model}, ...}",
        "budget": "budget: 1.35x",
    },
)


def _check_base(log: Log, top: Mapping[str, yaml.Node]) -> None:
    """The base must be a variant, whatever else is wrong with either of them."""
    base, names = top.get("base"), [name for name, _ in pairs(top.get("variants"))]
    if not isinstance(base, yaml.ScalarNode) or is_null(base) or not names:
        return
    if base.value not in names:
        known = guess(base.value, names, "the variants are")
        log.wrong(base, ("base",), f"{show(base.value)} is not a variant{known}")


def _check_metric(log: Log, top: Mapping[str, yaml.Node]) -> None:
    """Deltas need a base, outputs need a text; a wrong one of either has a message of its own."""
    metric = dict(pairs(top.get("similarity"))).get("metric")
    if metric is None:
        return
    if metric.value == "delta-cosine" and "base" not in top:
        what = "`delta-cosine` compares deltas to the base variant, and the recipe has no `base`"
        log.wrong(metric, ("similarity", "metric"), what)
    if metric.value == "output" and "calibration" not in top:
        what = "`output` compares what experts do to a text, and the recipe has no `calibration`"
        log.wrong(metric, ("similarity", "metric"), what)


def _check_method(log: Log, top: Mapping[str, yaml.Node]) -> None:
    """Methods that need a text or a base have it."""
    method = dict(pairs(top.get("merge"))).get("method")
    if method is None:
        return
    for names, key, what in (
        (CALIBRATED, "calibration", "weighs by statistics of a text"),
        (FROM_BASE, "base", "adds up deltas to the base variant"),
    ):
        if method.value in names and key not in top:
            log.wrong(
                method,
                ("merge", "method"),
                f"{show(method.value)} {what}, and the recipe has no `{key}`",
            )


def _check_calibration(log: Log, top: Mapping[str, yaml.Node]) -> None:
    """Every variant has text, and only variants do."""
    text = dict(pairs(top.get("calibration"))).get("text")
    names = [name for name, _ in pairs(top.get("variants"))]
    if not isinstance(text, yaml.MappingNode) or not names:
        return
    keys, given = ("calibration", "text"), dict(pairs(text))
    for key, _ in text.value:
        if isinstance(key, yaml.ScalarNode) and key.value not in names:
            known = guess(key.value, names, "the variants are")
            log.wrong(key, (*keys, key.value), f"{show(key.value)} is not a variant{known}")
    missing = [show(name) for name in names if name not in given]
    if missing:
        log.wrong(text, keys, f"no text for {', '.join(missing)}; every variant needs some")


_MINIMAL = """a minimal recipe is

version: 1
variants:
  one: {source: org/model-one}
  two: {source: org/model-two}
budget: 1.35x"""


def parse_recipe(text: str, folder: Path, filename: str = "<recipe>") -> Recipe:
    """The recipe in `text`, or one RecipeError with every mistake in it."""
    log = Log(text.removeprefix("\ufeff"), _RECIPE.homes())
    node = compose(log, "a recipe")
    if not log.found and (node is None or is_null(node)):
        raise RecipeError(f"the recipe is empty: `{filename}`", _MINIMAL)
    values: Any = _RECIPE.read(log, node, ()) if node else None
    top = dict(pairs(node))
    _check_base(log, top)
    _check_metric(log, top)
    _check_calibration(log, top)
    _check_method(log, top)
    if log.found:
        raise RecipeError(log.report(filename), "`recipes/schema.json` lists every key and value")
    del values["version"]
    found = Recipe(**values, folder=folder)
    if "method" not in dict(pairs(top.get("merge"))) and (found.calibration or found.merge.planned):
        return replace(found, merge=replace(found.merge, method="joint"))
    return found


def load_recipe(path: Path) -> Recipe:
    """The recipe in a UTF-8 file of at most 1 MiB; relative sources start at its folder."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise RecipeError(f"the recipe `{path}` is larger than 1 MiB", "pass a YAML file")
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = f"byte {data[error.start]:#04x} in line {line}"
        what = f"the recipe `{path}` is not UTF-8 text: {byte}"
        raise RecipeError(what, "save it as UTF-8") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        missing = isinstance(error, FileNotFoundError)
        near = [file.name for file in path.parent.glob("*.y*ml")] if missing else []
        what = f"cannot read the recipe `{path}`: {reason.lower()}"
        raise RecipeError(what, guess(path.name, near)[2:] or "pass a YAML file") from None
    return parse_recipe(text, path.parent, str(path))
