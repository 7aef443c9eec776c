"""What the engine puts out, in OpenAI's forms: whole answers and streams of chunks."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from typing import Any

from moecc.runtime.interface import EngineLike
from moecc.runtime.request import FinishReason, Output, TokenLogprob
from moecc.server.events import DONE, PING, event
from moecc.server.failure import FailureError, internal, of_finish
from moecc.server.generation import Generation
from moecc.server.protocol import Call
from moecc.server.vocabulary import Vocabulary

LEAST_LOGPROB = -9999.0  # JSON has no infinity; vLLM uses the same

log = logging.getLogger(__name__)


def fingerprint(engine: EngineLike) -> str:
    """The `system_fingerprint`: which artifact answers."""
    return f"fp_{engine.artifact_hash[:12]}"


def _finite(logprob: float) -> float:
    return max(LEAST_LOGPROB, logprob)  # in this order NaN becomes the least, too


class Form(ABC):
    """The form of the answers to one call; `read_*` of the protocol made it."""

    whole_object: str
    chunk_object: str

    def __init__(self, call: Call, engine: EngineLike) -> None:
        self.call = call
        self._fingerprint = fingerprint(engine)
        self._created = int(time.time())
        self._tokens = 0
        self._vocabulary: Vocabulary | None = None
        if call.options.sampling.logprobs is not None:
            self._vocabulary = Vocabulary(engine.tokenizer(call.options.model))

    @abstractmethod
    def choice(
        self, index: int, text: str, logprobs: Any, reason: FinishReason | None
    ) -> dict[str, Any]:
        """A choice of a whole answer."""

    @abstractmethod
    def delta(
        self, index: int, text: str, logprobs: Any, reason: FinishReason | None
    ) -> dict[str, Any]:
        """A choice of a chunk."""

    def opening(self, index: int) -> list[dict[str, Any]]:
        """The choices that come before the first delta of a choice."""
        return []

    @abstractmethod
    def logprobs(
        self, vocabulary: Vocabulary, index: int, logprobs: Sequence[TokenLogprob]
    ) -> dict[str, Any]:
        """Log probabilities of the next tokens of a choice."""

    def count(self, output: Output) -> None:
        self._tokens += len(output.tokens)

    def described(self, index: int, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        """Log probabilities as the call wants them: None if it does not."""
        if self._vocabulary is None:
            return None
        return self.logprobs(self._vocabulary, index, logprobs)

    def usage(self) -> dict[str, int]:
        prompt = self.call.prompt_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._tokens,
            "total_tokens": prompt + self._tokens,
        }

    def whole(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._envelope(self.whole_object, choices), "usage": self.usage()}

    def chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        envelope = self._envelope(self.chunk_object, [choice])
        return {**envelope, "usage": None} if self.call.options.include_usage else envelope

    def usage_chunk(self) -> dict[str, Any]:
        return {**self._envelope(self.chunk_object, []), "usage": self.usage()}

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.call.id,
            "object": kind,
            "created": self._created,
            "model": self.call.options.model,
            "choices": choices,
            "system_fingerprint": self._fingerprint,
        }


class ChatForm(Form):
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def choice(
        self, index: int, text: str, logprobs: Any, reason: FinishReason | None
    ) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def delta(
        self, index: int, text: str, logprobs: Any, reason: FinishReason | None
    ) -> dict[str, Any]:
        delta = {"content": text} if reason is None else {}
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def opening(self, index: int) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def logprobs(
        self, vocabulary: Vocabulary, index: int, logprobs: Sequence[TokenLogprob]
    ) -> dict[str, Any]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            data = vocabulary.data(token)
            return {
                "token": vocabulary.text(token),
                "logprob": _finite(logprob),
                "bytes": None if data is None else list(data),
            }

        content = [
            {**entry(p.token, p.logprob), "top_logprobs": [entry(*top) for top in p.top]}
            for p in logprobs
        ]
        return {"content": content, "refusal": None}


class TextForm(Form):
    whole_object = chunk_object = "text_completion"

    def __init__(self, call: Call, engine: EngineLike) -> None:
        super().__init__(call, engine)
        self._offsets: dict[int, int] = defaultdict(int)

    def choice(
        self, index: int, text: str, logprobs: Any, reason: FinishReason | None
    ) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    delta = choice

    def logprobs(
        self, vocabulary: Vocabulary, index: int, logprobs: Sequence[TokenLogprob]
    ) -> dict[str, Any]:
        offsets, tops = [], []
        for p in logprobs:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(vocabulary.text(p.token))
            top: dict[str, float] = {}
            for token, logprob in (*p.top, (p.token, p.logprob)):
                # Two tokens may read the same; the likelier one stands for both.
                top.setdefault(vocabulary.text(token), _finite(logprob))
            tops.append(top)
        return {
            "tokens": [vocabulary.text(p.token) for p in logprobs],
            "token_logprobs": [_finite(p.logprob) for p in logprobs],
            "top_logprobs": tops,
            "text_offset": offsets,
        }


async def whole(form: Form, generation: Generation) -> dict[str, Any]:
    """The answer once all of it is there; FailureError if a request failed."""
    size = len(form.call.requests)
    texts: list[list[str]] = [[] for _ in range(size)]
    logprobs: list[list[TokenLogprob]] = [[] for _ in range(size)]
    reasons: list[FinishReason | None] = [None] * size
    async for item in generation.outputs():
        if item is None:
            continue
        index, output = item
        form.count(output)
        texts[index].append(output.text)
        logprobs[index] += output.logprobs
        if output.finish is not None:
            failure = of_finish(output.finish)
            if failure is not None:
                raise FailureError(failure)
            reasons[index] = output.finish.reason
    return form.whole(
        [
            form.choice(i, "".join(texts[i]), form.described(i, logprobs[i]), reasons[i])
            for i in range(size)
        ]
    )


async def stream(form: Form, generation: Generation) -> AsyncIterator[bytes]:
    """The answer as events; an error is one too, as the status has been sent by then."""
    try:
        async for data in _chunks(form, generation):
            yield data
    except FailureError as error:
        yield event(error.failure.document())
    except Exception:
        log.exception("cannot go on with %s", form.call.id)
        yield event(internal().document())
    yield DONE


async def _chunks(form: Form, generation: Generation) -> AsyncIterator[bytes]:
    opened: set[int] = set()
    async for item in generation.outputs():
        if item is None:
            yield PING
            continue
        index, output = item
        failure = None if output.finish is None else of_finish(output.finish)
        if failure is not None:
            raise FailureError(failure)
        form.count(output)
        if index not in opened:
            opened.add(index)
            for choice in form.opening(index):
                yield event(form.chunk(choice))
        if output.text or output.logprobs:
            logprobs = form.described(index, output.logprobs)
            yield event(form.chunk(form.delta(index, output.text, logprobs, None)))
        if output.finish is not None:
            yield event(form.chunk(form.delta(index, "", None, output.finish.reason)))
    if form.call.options.include_usage:
        yield event(form.usage_chunk())
