"""The answer to one request as it grows: what is delivered, and when it is over."""

from __future__ import annotations

import logging
import time
from typing import Any

from moecc.runtime.interface import Deliver
from moecc.runtime.request import Finish, FinishReason, Output, Timing, TokenLogprob
from moecc.runtime.sampling import Choice
from moecc.runtime.sequence import Sequence
from moecc.runtime.text import TextStream

log = logging.getLogger(__name__)


class Answer:
    """One sequence and whoever waits for it.

    `ends` are the model's own end tokens; `limit` is the most tokens that may be generated.
    """

    def __init__(
        self,
        sequence: Sequence,
        choice: Choice,
        deliver: Deliver,
        tokenizer: Any,
        ends: frozenset[int],
        limit: int,
    ) -> None:
        sampling = sequence.request.sampling
        self.sequence = sequence
        self.choice = choice
        self.cancelled = False
        self.scheduled = True  # the scheduler knows of it
        self._deliver = deliver
        self._text = TextStream(tokenizer, sampling.stop) if tokenizer is not None else None
        self._ends = frozenset(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            self._ends |= ends
        self.limit = limit
        self._left = limit

    def ends_after(self, tokens: int) -> bool:
        """Whether so many more tokens are all there can be."""
        return self._left <= tokens

    def accept(self, token: int, logprob: TokenLogprob | None) -> Output:
        """Takes the next token, which the sequence has already; what to deliver of it."""
        sequence = self.sequence
        if sequence.first_token is None:
            sequence.first_token = time.monotonic()
        self.choice.observe(token)
        self._left -= 1
        text, stop = "", None
        if token not in self._ends and self._text is not None:
            text, stop = self._text.push([token])
        logprobs = () if logprob is None else (logprob,)
        if token in self._ends or stop is not None:
            by = token if stop is None else stop
            return self._last("stop", text, (token,), logprobs, stopped_by=by)
        if self._left <= 0:
            return self._last("length", text, (token,), logprobs)
        return Output(text, (token,), logprobs)

    def deliver(self, output: Output) -> None:
        """Gives an output to whoever waits; what goes wrong there is not the engine's."""
        try:
            self._deliver(output)
        except Exception:
            log.exception("an output of request `%s` was not taken", self.sequence.request.id)

    def finish(self, reason: FinishReason, error: str | None = None) -> None:
        """Delivers an end without a token."""
        self.deliver(self._last(reason, error=error))

    def _last(
        self,
        reason: FinishReason,
        text: str = "",
        tokens: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
        stopped_by: str | int | None = None,
        error: str | None = None,
    ) -> Output:
        s = self.sequence
        timing = Timing(s.arrived, s.started, s.first_token, time.monotonic())
        if self._text is not None and not isinstance(stopped_by, str):
            text += self._text.finish()
        return Output(text, tokens, logprobs, Finish(reason, timing, stopped_by, error))
