"""What the server needs of an engine; `engine.Engine` is the real one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from moecc.runtime.request import Output, Request, Stats

Deliver = Callable[[Output], None]
# (from variant or "", to variant, seconds)
OnReconfigure = Callable[[str, str, float], None]


class EngineLike(Protocol):
    """Methods may be called from any thread."""

    variants: tuple[str, ...]
    base: str
    artifact_hash: str

    def submit(self, request: Request, deliver: Deliver) -> None:
        """Queues a request; `deliver` gets its outputs on the engine's thread and must be quick.

        Only the `abort` of a `cancel` may come on the thread that cancels.

        Every request that was taken ends with an output that has a `finish`. `max_tokens` is cut
        to what the model's length allows.

        Raises RequestError for one that can never run (unknown variant: code `model_not_found`;
        a prompt too long: code `context_length_exceeded`), BusyError when the queue is full and
        StoppedError when nothing is taken any more.
        """

    def cancel(self, request_id: str) -> None:
        """Ends a request with `abort`, if it is still there; frees what it holds."""

    def max_model_len(self, variant: str) -> int:
        """Most tokens of prompt and answer together."""

    def tokenizer(self, variant: str) -> Any:
        """The variant's transformers tokenizer; RequestError if it has none."""

    def stats(self) -> Stats:
        """A snapshot."""

    def on_reconfigure(self, listener: OnReconfigure) -> None:
        """Calls `listener` after each reconfiguration, on the engine's thread."""

    def close(self, timeout: float = 0.0) -> None:
        """Takes no more requests, lets the rest run for `timeout` seconds, aborts what is left.

        May be called again, from another thread: the earlier deadline counts.
        """
