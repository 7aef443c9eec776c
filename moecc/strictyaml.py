"""Strict YAML: text to nodes, nodes to values by a table, every mistake kept with its place.

A table is built from readers: `Scalar` (or `choice`, `words`) for leaves, `Section` for mappings,
or anything else with the two methods of `Reader`. To read a text:

    log = Log(text, table.homes())
    node = compose(log, "a letter")
    value = table.read(log, node, ()) if node else None

and, when `log.found` is not empty, `log.report(filename)` is the message for the user.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import yaml

Keys = tuple[str, ...]  # that lead from the top of the document to a node
_REFUSED = " refused"  # the tag of a scalar already reported; no YAML can spell it
_KINDS = {"int": "a number", "float": "a number", "bool": "a boolean", "timestamp": "a date"}
_KINDS |= {"null": "an empty value", "seq": "a list", "map": "a mapping"}
_LINE_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")  # as YAML counts lines


def show(text: str) -> str:
    """`text` in backticks, cut and escaped so that no file can flood or drive a terminal."""
    cut = text if len(text) <= 60 else text[:59] + "…"
    return "`" + "".join(c if c.isprintable() else repr(c)[1:-1] for c in cut) + "`"


def _listed(options: Iterable[object]) -> str:
    """The options in backticks with commas between."""
    return ", ".join(f"`{option}`" for option in options)


def guess(word: str, options: Collection[str], lead: str = "") -> str:
    """A did-you-mean if one option is close up to letter case, else `lead` and all, if given."""
    lower = {option.lower(): option for option in reversed(list(options))}
    close = difflib.get_close_matches(word.lower(), lower, 1)
    if close:
        return f", did you mean `{lower[close[0]]}`?"
    return f", {lead} {_listed(options)}" if lead else ""


def _tag(node: yaml.Node) -> str:
    return str(node.tag).removeprefix("tag:yaml.org,2002:")


def kind(node: yaml.Node) -> str:
    """What YAML reads in a node, for messages: `a number`, `text`, ..."""
    return _KINDS.get(_tag(node), "text")


def is_null(node: yaml.Node) -> bool:
    """Whether a node is null, spelled out or not."""
    return _tag(node) == "null"


def pairs(node: yaml.Node | None) -> list[tuple[str, yaml.Node]]:
    """What a mapping has under scalar keys, however wrong; nothing for any other node."""
    found = node.value if isinstance(node, yaml.MappingNode) else []
    return [(key.value, value) for key, value in found if isinstance(key, yaml.ScalarNode)]


@dataclass(slots=True)
class Log:
    """Collects mistakes in `text`, so that one run shows them all.

    Attributes:
        homes: the sections where keys belong, to say so when one is found elsewhere.
        found: line and column from zero, keys and message of each mistake.
    """

    text: str
    homes: Mapping[str, str] = field(default_factory=dict)
    found: list[tuple[int, int, Keys, str]] = field(default_factory=list)

    def add(self, line: int, column: int, keys: Keys, what: str) -> None:
        """Record a mistake at a line and column counted from zero."""
        self.found.append((line, column, keys, what))

    def wrong(self, at: Any, keys: Keys, what: str) -> None:
        """Record a mistake at a YAML node or event."""
        if getattr(at, "tag", None) != _REFUSED:
            self.add(at.start_mark.line, at.start_mark.column, keys, what)

    def entries(
        self, node: yaml.Node, keys: Keys, like: str
    ) -> list[tuple[yaml.ScalarNode, yaml.Node]] | None:
        """The pairs of a mapping, after recording keys that are odd or given twice."""
        if not isinstance(node, yaml.MappingNode):
            self.wrong(node, keys, f"expected a mapping such as `{like}`, not {kind(node)}")
            return None
        kept: list[tuple[yaml.ScalarNode, yaml.Node]] = []
        first: dict[str, yaml.ScalarNode] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self.wrong(key, keys, f"expected a key, not {kind(key)}")
            elif _tag(key) == "merge":
                self.wrong(key, keys, "merge keys (`<<`) are not supported, write the keys out")
            elif key.tag != _REFUSED:
                line = key.start_mark.line + 1
                if first.setdefault(key.value, key) is not key:
                    lines = f"lines {first[key.value].start_mark.line + 1} and {line}"
                    self.wrong(key, (*keys, key.value), f"given twice, in {lines}")
                kept.append((key, value))
        return kept

    def report(self, filename: str) -> str:
        """One message: a header and, in file order, a block with a code frame per mistake."""
        lines = _LINE_BREAK.split(self.text)
        plural = "" if len(self.found) == 1 else "s"
        blocks = [f"{len(self.found)} mistake{plural} in `{filename}`"]
        for line, column, keys, what in sorted(self.found, key=lambda mistake: mistake[:2]):
            where = " -> ".join(show(part)[1:-1] for part in keys) + ": " if keys else ""
            head = f"{filename}:{line + 1}:{column + 1}: {where}{what}"
            blocks.append(f"{head}\n{_frame(line, column, lines[line])}")
        return "\n\n".join(blocks)


def _frame(line: int, column: int, source: str) -> str:
    """The source line with a caret below, cut to a window when it is long."""
    start = max(0, column - 60)
    code = "".join(c if c.isprintable() else " " for c in source[start : start + 90])
    number = str(line + 1)
    return f"  {number} | {code}".rstrip() + f"\n  {' ' * len(number)} | {' ' * (column - start)}^"


class Reader(Protocol):
    """One part of a table, both ways: node to value and value to plain data."""

    def read(self, log: Log, node: yaml.Node, keys: Keys) -> Any:
        """The value, or None after recording mistakes; `keys` lead to the node."""

    def write(self, value: Any, /) -> Any:
        """The plain data that `read` would read back."""


@dataclass(frozen=True, slots=True)
class Scalar:
    """A leaf of the table; `parse` raises ValueError with what to tell the user."""

    expected: str
    parse: Callable[[yaml.ScalarNode], Any]
    write: Callable[[Any], Any] = str

    def read(self, log: Log, node: yaml.Node, keys: Keys) -> Any:
        """The value, or None after recording a mistake."""
        if not isinstance(node, yaml.ScalarNode) or node.tag == _REFUSED or is_null(node):
            log.wrong(node, keys, f"expected {self.expected}, not {kind(node)}")
            return None
        try:
            return self.parse(node)
        except ValueError as error:
            log.wrong(node, keys, str(error))
            return None


def choice(options: Mapping[str | int, Any], later: str | None = None) -> Scalar:
    """One of a few spellings, each with its meaning; `later` is known but not there yet."""
    expected = ("one of " if len(options) > 1 else "") + _listed(options)
    spellings = {str(spelling): spelling for spelling in options}

    def parse(node: yaml.ScalarNode) -> Any:
        spelling = spellings.get(node.value)
        if node.value == later:
            raise ValueError(f"`{later}` comes in a later release, use {expected}")
        if spelling is None:
            raise ValueError(f"{show(node.value)} is not {expected}{guess(node.value, spellings)}")
        if isinstance(spelling, int) and _tag(node) != "int":
            raise ValueError(f"`{spelling}` is text here, write the number without quotes")
        return options[spelling]

    return Scalar(
        expected, parse, {value: spelling for spelling, value in options.items()}.__getitem__
    )


def words(*options: str, later: str | None = None) -> Scalar:
    """A `choice` whose spellings are their own meanings."""
    return choice({option: option for option in options}, later)


@dataclass(frozen=True, slots=True)
class Section:
    """A mapping of known keys; `required` has an example for each key without a default."""

    make: Callable[..., Any]
    like: str
    fields: Mapping[str, Reader]
    required: Mapping[str, str] = field(default_factory=dict)

    def read(self, log: Log, node: yaml.Node, keys: Keys) -> Any:
        """The made value, or None after recording mistakes."""
        entries = log.entries(node, keys, self.like)
        if entries is None:
            return None
        values: dict[str, Any] = {}
        for key, child in entries:
            name, place = key.value, (*keys, key.value)
            if name in self.fields:
                values.setdefault(name, self.fields[name].read(log, child, place))
            else:
                log.wrong(key, place, "unknown key" + self._suggest(log, name))
        missing = [name for name in self.required if name not in values]
        for name in missing:
            log.wrong(node, (*keys, name), f"missing, write for example `{self.required[name]}`")
        return None if missing else self.make(**values)

    def _suggest(self, log: Log, name: str) -> str:
        if name in log.homes:
            return f", it belongs under `{log.homes[name]}`"
        return guess(name, self.fields, "the keys here are")

    def write(self, value: Any) -> Any:
        """The plain mapping `read` would read back."""
        parts = ((name, reader, getattr(value, name)) for name, reader in self.fields.items())
        return {name: reader.write(part) for name, reader, part in parts if part is not None}

    def homes(self) -> dict[str, str]:
        """The section here of every key one level down, for a `Log`."""
        sections = ((name, part) for name, part in self.fields.items() if isinstance(part, Section))
        return {key: name for name, section in sections for key in section.fields}


class _Composer(yaml.SafeLoader):
    """Builds nodes, never objects, and refuses what hides, repeats or buries content."""

    def __init__(self, log: Log) -> None:
        self.log, self.depth = log, 0
        super().__init__(log.text)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            what = f"aliases ({show('*' + str(event.anchor))}) are not supported, repeat the value"
            self.log.wrong(self.get_event(), (), what)  # type: ignore[no-untyped-call]
            return yaml.ScalarNode(_REFUSED, "", event.start_mark, event.end_mark)  # type: ignore[arg-type]
        if self.depth == 16:
            raise yaml.MarkedYAMLError(None, None, "nested deeper than 16 levels", event.start_mark)
        if event.anchor is not None:
            what = f"anchors ({show('&' + event.anchor)}) are not supported, remove it"
            self.log.wrong(event, (), what)
            event.anchor = None
        if event.tag is not None:
            short = event.tag.replace("tag:yaml.org,2002:", "!!")
            self.log.wrong(event, (), f"tags ({show(short)}) are not supported, remove it")
            event.tag = _REFUSED if isinstance(event, yaml.ScalarEvent) else None
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def compose(log: Log, document: str) -> yaml.Node | None:
    """The first document as a node, or None; what is not YAML goes to the log.

    Args:
        document: what the text is, with its article, for messages.
    """
    try:
        composer = _Composer(log)
        node = composer.get_node() if composer.check_node() else None
        if composer.check_node():
            event = composer.peek_event()  # type: ignore[no-untyped-call]
            log.wrong(event, (), f"{document} is one document, a second one starts here")
        return node
    except yaml.MarkedYAMLError as error:
        mark: Any = error.problem_mark or error.context_mark
        log.add(mark.line, mark.column, (), f"not valid YAML: {error.problem}")
    except yaml.reader.ReaderError as error:
        before = _LINE_BREAK.split(log.text[: error.position])
        what = f"not valid YAML: the character U+{error.character:04X} is not allowed"
        log.add(len(before) - 1, len(before[-1]), (), what)
    return None
