"""Tables of results as files."""

from __future__ import annotations

from rich.table import Table


def markdown(table: Table) -> str:
    """A table of plain cells in Markdown, aligned as it is shown."""
    header = [str(column.header) for column in table.columns]
    rule = ["---:" if column.justify == "right" else "---" for column in table.columns]
    rows = zip(*(column.cells for column in table.columns), strict=True)
    lines = [header, rule, *([str(cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
