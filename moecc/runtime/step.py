"""The forward pass that is running: which of its rows belong to whom.

Every token is a batch row of its own (`[tokens, 1, ...]`), so axis 0 is the token axis of every
activation, whatever a family does to the others. Where the host knows whose they are, rows are
grouped by variant, and within a variant by sequence; in a graph that is data. Attention, the
experts and per-variant weights find the pass here: transformers' modeling code between them knows
nothing of it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from moecc.kernels import linear


@dataclass(frozen=True, slots=True)
class Span:
    """Rows `start..stop` belong to a variant."""

    variant: int
    start: int
    stop: int


@dataclass(eq=False)
class Rows:
    """Which variant each row of a tensor is of; spans cover the rows in order."""

    spans: tuple[Span, ...]
    device: torch.device

    @property
    def count(self) -> int:
        return self.spans[-1].stop

    def repeated(self, times: int) -> Rows:
        """Every row so many times."""
        spans = [Span(s.variant, s.start * times, s.stop * times) for s in self.spans]
        return Rows(tuple(spans), self.device)

    @cached_property
    def variants(self) -> Tensor:
        """int64 [rows] on the device."""
        found = [span.variant for span in self.spans for _ in range(span.start, span.stop)]
        return torch.tensor(found, device=self.device)


class Drawn:
    """Rows whose variants are data, int32 on the device; negative ones are none."""

    def __init__(self, given: Tensor, variant_count: int) -> None:
        self.given = given
        self.variant_count = variant_count

    @property
    def count(self) -> int:
        return len(self.given)

    @cached_property
    def variants(self) -> Tensor:
        """int64 [rows]; of rows that are none, any."""
        return self.given.clamp(min=0).long()

    @cached_property
    def for_kernels(self) -> linear.Rows:
        return linear.Rows(self.given, self.variant_count, self.variant_count)

    def repeated(self, times: int) -> Drawn:
        return Drawn(self.given.repeat_interleave(times), self.variant_count)


@dataclass(eq=False)
class Step:
    """One forward pass over `tokens` rows, of which `outputs` have their logits computed.

    Attributes:
        plan: what attention needs to know of the sequences (attention.Plan).
        rows: which of the two the running module's input has; None inside the experts, whose
            rows are in an order of their own.
    """

    tokens: Rows | Drawn
    outputs: Rows | Drawn
    output_rows: Tensor
    plan: Any
    rows: Rows | Drawn | None = field(init=False)

    def __post_init__(self) -> None:
        self.rows = self.tokens


_running = threading.local()


def current() -> Step | None:
    """The pass this thread runs, if any."""
    step: Step | None = getattr(_running, "step", None)
    return step


@contextmanager
def running(step: Step) -> Iterator[None]:
    _running.step = step
    try:
        yield
    finally:
        _running.step = None


@contextmanager
def repeated(times: int) -> Iterator[None]:
    """Inside, every row stands `times` times in a row."""
    step = current()
    before = step.rows if step is not None else None
    if step is not None and before is not None:
        step.rows = before.repeated(times)
    yield
    if step is not None:
        step.rows = before


@contextmanager
def own_order() -> Iterator[None]:
    """Inside, rows are in an order of their own: a per-variant weight must not take them."""
    step = current()
    before = step.rows if step is not None else None
    if step is not None:
        step.rows = None
    yield
    if step is not None:
        step.rows = before


def only_outputs(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A hook for a model's head: in a pass it sees only the rows whose logits are wanted."""
    step = current()
    if step is None:
        return args
    step.rows = step.outputs
    return (args[0][step.output_rows], *args[1:])


def spans(variants: Sequence[int], counts: Sequence[int]) -> tuple[Span, ...]:
    """Spans of sequences with `counts` rows each, already grouped by variant."""
    found: list[Span] = []
    stop = 0
    for variant, count in zip(variants, counts, strict=True):
        start, stop = stop, stop + count
        if found and found[-1].variant == variant:
            start = found.pop().start
        found.append(Span(variant, start, stop))
    return tuple(found)
