"""What the commands print: data on stdout, everything else on stderr."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console as Terminal
from rich.console import RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

LOG_SECONDS = 10.0
COUNTED = {"CUDA graphs"}  # stages whose progress is not in bytes
Report = Callable[[str, int, int], None]  # stage, done, total


class Console:
    """Human, quiet or JSON output.

    Args:
        as_json: data as JSON on stdout, errors as JSON on stderr, nothing else.
        quiet: no progress and no notes.
        verbose: notes for debugging as well.
        color: False switches colors off, as NO_COLOR does.
    """

    def __init__(
        self,
        *,
        as_json: bool = False,
        quiet: bool = False,
        verbose: bool = False,
        color: bool = True,
    ) -> None:
        self.as_json = as_json
        self.quiet = quiet or as_json
        self.verbose = verbose and not as_json
        no_color = None if color else True
        self.out = Terminal(no_color=no_color, highlight=False, soft_wrap=False)
        self.err = Terminal(stderr=True, no_color=no_color, highlight=False, soft_wrap=True)

    def show(self, *parts: RenderableType) -> None:
        """Prints tables and text for people."""
        if not self.as_json:
            self.out.print(*parts, sep="\n")

    def text(self, text: str) -> None:
        """Prints data as it is, without markup or wrapping."""
        self.out.print(text, markup=False, soft_wrap=True)

    def data(self, value: Any) -> None:
        """Prints a JSON document, in JSON mode."""
        if self.as_json:
            self.out.out(json.dumps(value, indent=1), highlight=False)

    def note(self, text: str) -> None:
        if not self.quiet:
            self.err.print(escape(text))

    def detail(self, text: str) -> None:
        if self.verbose:
            self.err.print(escape(text), style="dim")

    def error(self, message: str, hint: str | None, exit_code: int) -> None:
        """Prints what went wrong and what to do about it."""
        if self.as_json:
            document = {"error": {"message": message, "hint": hint, "exit_code": exit_code}}
            self.err.out(json.dumps(document), highlight=False)
            return
        self.err.print(f"[bold red]error[/]: {escape(message)}")
        if hint:
            self.err.print(f"[bold cyan]hint[/]: {escape(hint)}")

    @contextmanager
    def progress(self) -> Iterator[Report]:
        """A callback that draws bars on a terminal, or logs a line now and then."""
        if self.quiet:
            yield lambda stage, done, total: None
        elif self.err.is_terminal:
            with _bars(self.err) as bars:
                yield _bar_report(bars)
        else:
            yield _log_report(self.note)


class _Amount(DownloadColumn):
    """How much is done: bytes, or how many of what is counted."""

    def render(self, task: Task) -> Text:
        counted = task.description in COUNTED
        return Text(f"{task.completed:.0f}/{task.total:.0f}") if counted else super().render(task)


class _Speed(TransferSpeedColumn):
    def render(self, task: Task) -> Text:
        return Text("") if task.description in COUNTED else super().render(task)


def _bars(terminal: Terminal) -> Progress:
    return Progress(
        TextColumn("{task.description:<10}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        _Amount(binary_units=True),
        _Speed(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=terminal,
    )


def _bar_report(bars: Progress) -> Report:
    tasks: dict[str, TaskID] = {}

    def report(stage: str, done: int, total: int) -> None:
        if stage == "sources":  # not bytes, and downloads draw bars of their own
            return
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total)
        bars.update(tasks[stage], completed=done, total=total)

    return report


def _log_report(note: Callable[[str], None]) -> Report:
    last: dict[str, float] = {}

    def report(stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done < total and now - last.setdefault(stage, now) < LOG_SECONDS:
            return
        last[stage] = now
        note(f"{stage}: {100 * done // max(total, 1)}%")

    return report
