"""A request on its way through the engine: its tokens, and where their keys and values are."""

from __future__ import annotations

from dataclasses import dataclass, field

from moecc.runtime.request import Request


@dataclass(eq=False, slots=True)
class Sequence:
    """The engine appends tokens, advances `computed` and notes the times; the scheduler does the
    rest.

    Attributes:
        variant: index of the request's variant.
        order: arrival number, unique among the sequences an engine holds.
        arrived, started, first_token: `time.monotonic()` seconds; None for what did not happen.
        deadline: when it ends with `timeout`, on the same clock; None: never.
        tokens: the prompt, then what was generated; below zero those that are not known here yet.
        computed: how many of them have their keys and values in the cache, from the first.
        blocks: of the cache, in the order of the tokens; empty unless it is admitted.
    """

    request: Request
    variant: int
    order: int
    arrived: float
    deadline: float | None = field(init=False)
    tokens: list[int] = field(init=False)
    computed: int = field(default=0, init=False)
    blocks: list[int] = field(default_factory=list, init=False)
    started: float | None = field(default=None, init=False)
    first_token: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        timeout = self.request.timeout
        self.deadline = None if timeout is None else self.arrived + timeout
        self.tokens = list(self.request.prompt)

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt)

    @property
    def pending(self) -> int:
        """Tokens still to be computed: 1 while it generates, more while its prompt is read."""
        return len(self.tokens) - self.computed

    @property
    def urgency(self) -> tuple[int, int]:
        """Sorts the most urgent first: by priority, then by arrival."""
        return self.request.priority, self.order
