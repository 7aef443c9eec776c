"""The Python interface: `moecc.load(artifact)`."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from jinja2 import TemplateError

from moecc.errors import BusyError, MoeccError, RequestError
from moecc.runtime.engine import Engine
from moecc.runtime.opening import Note, open_engine
from moecc.runtime.options import Options
from moecc.runtime.request import Output, Request, Sampling, TokenLogprob

BUSY_SECONDS = 0.01  # until the queue, which others have filled, is tried again

# Text, token ids, or the messages of a chat.
Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to one prompt.

    Attributes:
        text: empty where the variant has no tokenizer.
        tokens: all that were generated, the one that ended it included.
        finish_reason: stop | length | abort | timeout.
        logprobs: one entry a token if `Sampling.logprobs` was given.
    """

    variant: str
    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[TokenLogprob, ...]


class Served:
    """A loaded artifact: every variant answers from one bank of experts.

    A context manager; `close` frees the memory. Methods may be called from several threads, whose
    prompts then share batches.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._numbers = itertools.count()

    @property
    def variants(self) -> tuple[str, ...]:
        return self.engine.variants

    def tokenizer(self, variant: str) -> Any:
        """The variant's transformers tokenizer; RequestError if it has none."""
        return self.engine.tokenizer(variant)

    def generate(
        self, variant: str | Sequence[str], prompts: Prompt | Sequence[Prompt], **sampling: Any
    ) -> list[Completion]:
        """Completions of prompts, in their order.

        `variant` is one for all prompts, or one for each. A prompt is a string, token ids, or chat
        messages. `sampling` are the fields of `Sampling`: max_tokens, temperature (0 is greedy),
        top_p, top_k, min_p, seed, stop, logprobs, ..., and `priority` and `timeout`. Raises
        RequestError for a request that cannot be, and MoeccError if the engine fails.
        """
        many = _prompts(prompts)
        names = [variant] * len(many) if isinstance(variant, str) else list(variant)
        if len(names) != len(many):
            raise RequestError(f"{len(names)} variants for {len(many)} prompts", param="variant")
        requests = [
            self._request(name, prompt, sampling) for name, prompt in zip(names, many, strict=True)
        ]
        found: list[Completion] = []
        running: deque[tuple[Request, SimpleQueue[Output]]] = deque()
        try:
            for request in requests:
                while (queue := self._submitted(request)) is None:  # the engine's queue is full
                    if running:
                        found.append(_completion(*running[0]))
                        running.popleft()
                    else:
                        time.sleep(BUSY_SECONDS)
                running.append((request, queue))
            while running:
                found.append(_completion(*running[0]))
                running.popleft()
        finally:
            for request, _ in running:
                self.engine.cancel(request.id)
        return found

    def stream(self, variant: str, prompt: Prompt, **sampling: Any) -> Iterator[Output]:
        """The outputs of one prompt as they come; closing the iterator ends the request."""
        request = self._request(variant, prompt, sampling)
        queue = self._submit(request)
        try:
            yield from _outputs(queue)
        finally:
            self.engine.cancel(request.id)

    def close(self) -> None:
        self.engine.close()

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _request(self, variant: str, prompt: Prompt, sampling: Mapping[str, Any]) -> Request:
        extra = {key: sampling[key] for key in ("priority", "timeout") if key in sampling}
        try:
            chosen = Sampling(**_tuples({k: v for k, v in sampling.items() if k not in extra}))
        except TypeError as error:
            raise RequestError(f"not a field of Sampling: {error}") from None
        tokens, has_tokenizer = self._tokens(variant, prompt)
        number = next(self._numbers)
        return Request(
            f"local-{number}", variant, tokens, chosen, detokenize=has_tokenizer, **extra
        )

    def _tokens(self, variant: str, prompt: Prompt) -> tuple[tuple[int, ...], bool]:
        if not isinstance(prompt, str) and all(isinstance(item, int) for item in prompt):
            try:
                self.engine.tokenizer(variant)
            except RequestError:
                self.engine.max_model_len(variant)  # raises if there is no such variant
                return tuple(prompt), False  # type: ignore[arg-type]
            return tuple(prompt), True  # type: ignore[arg-type]
        tokenizer = self.engine.tokenizer(variant)
        if isinstance(prompt, str):
            return tuple(tokenizer(prompt)["input_ids"]), True
        if not all(isinstance(message, Mapping) for message in prompt):
            raise RequestError("a prompt is text, token ids or messages", param="prompt")
        try:
            encoded = tokenizer.apply_chat_template(
                list(prompt), add_generation_prompt=True, return_dict=True
            )
        except (ValueError, TypeError, KeyError, TemplateError) as error:
            what = str(error).splitlines()[0]
            raise RequestError(f"the chat template refuses: {what}", param="messages") from None
        return tuple(encoded["input_ids"]), True

    def _submit(self, request: Request) -> SimpleQueue[Output]:
        queue: SimpleQueue[Output] = SimpleQueue()
        self.engine.submit(request, queue.put)
        return queue

    def _submitted(self, request: Request) -> SimpleQueue[Output] | None:
        try:
            return self._submit(request)
        except BusyError:
            return None


def load(artifact: str | Path, *, note: Note = lambda text: None, **options: Any) -> Served:
    """Loads an artifact and starts an engine for all of its variants.

    `options` are the fields of `moecc.runtime.options.Options`: gpu, mode, dtype, max_num_seqs,
    max_model_len, ...; `note` gets what a user should know, such as a family that cannot mix.
    Raises ArtifactError, DamagedArtifactError or RuntimeUnfitError.
    """
    return Served(open_engine(Path(artifact), Options(**options), note=note))


def _prompts(prompts: Any) -> list[Any]:
    """One prompt or many: a string, token ids and messages are one."""
    if isinstance(prompts, str):
        return [prompts]
    found = list(prompts)
    return [found] if found and isinstance(found[0], (int, Mapping)) else found


def _tuples(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """`stop` and the like as they may be written: a string, a list, a dict."""
    found: dict[str, Any] = dict(sampling)
    if isinstance(found.get("stop"), str):
        found["stop"] = (found["stop"],)
    if isinstance(found.get("logit_bias"), Mapping):
        found["logit_bias"] = tuple(found["logit_bias"].items())
    return {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}


def _outputs(queue: SimpleQueue[Output]) -> Iterator[Output]:
    while True:
        output = queue.get()
        if output.finish is not None and output.finish.reason == "error":
            raise MoeccError(output.finish.error or "the engine failed")
        yield output
        if output.finish is not None:
            return


def _completion(request: Request, queue: SimpleQueue[Output]) -> Completion:
    outputs = list(_outputs(queue))
    finish = outputs[-1].finish
    assert finish is not None, "the last output ends the answer"
    return Completion(
        request.variant,
        "".join(o.text for o in outputs),
        tuple(t for o in outputs for t in o.tokens),
        finish.reason,
        tuple(p for o in outputs for p in o.logprobs),
    )
