"""Tables of results as files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.table import Table


def save(document: dict[str, Any], shown: Iterable[Table], out: Path, heading: str = "") -> None:
    """The figures as JSON in `out`, and their tables as Markdown beside it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    text = "\n".join(map(markdown, shown))
    text = f"{heading}:\n\n{text}" if heading else text
    out.with_suffix(".md").write_text(text, encoding="utf-8")


def markdown(table: Table) -> str:
    """A table of plain cells in Markdown, aligned as it is shown."""
    header = [str(column.header) for column in table.columns]
    rule = ["---:" if column.justify == "right" else "---" for column in table.columns]
    rows = zip(*(column.cells for column in table.columns), strict=True)
    lines = [header, rule, *([str(cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
