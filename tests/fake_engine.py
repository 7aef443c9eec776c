"""An engine without a model: its answers are functions of (variant, prompt, seed)."""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from moecc.errors import BusyError, RequestError, StoppedError
from moecc.runtime.interface import Deliver, OnReconfigure
from moecc.runtime.request import Finish, FinishReason, Output, Request, Stats, Timing, TokenLogprob

NO_TEMPLATE = "bare"  # this variant's tokenizer has no chat template
END = 256
MAX_MODEL_LEN = 4096


class ByteTokenizer:
    """A token for each byte, with the methods of transformers' tokenizers that are used."""

    def __init__(self, chat_template: str | None = "bytes") -> None:
        self.chat_template = chat_template

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        if max(tokens, default=0) > END:
            raise IndexError("no such token")
        return bytes(t for t in tokens if t < END).decode(errors="replace")

    def convert_ids_to_tokens(self, token: int) -> str:
        return f"<0x{token:02X}>"

    def apply_chat_template(
        self,
        messages: list[dict[str, str]],
        add_generation_prompt: bool,
        tokenize: bool,
        return_dict: bool,
    ) -> list[int]:
        assert (add_generation_prompt, tokenize, return_dict) == (True, True, False)
        if any(m["role"] == "system" for m in messages[1:]):
            from jinja2 import TemplateError

            raise TemplateError("system goes first")
        return self.encode(chat_text(messages))


def chat_text(messages: list[dict[str, str]]) -> str:
    lines = [f"{m.get('name', m['role'])}: {m['content']}\n" for m in messages]
    return "".join([*lines, "assistant:"])


def answer_tokens(variant: str, prompt: tuple[int, ...], seed: int | None) -> Iterator[int]:
    """Letters without end."""
    for block in count():
        key = f"{variant}|{prompt}|{seed}|{block}".encode()
        yield from (97 + byte % 26 for byte in hashlib.sha256(key).digest())


def natural_length(variant: str, prompt: tuple[int, ...], seed: int | None) -> int:
    """After how many tokens an answer ends by itself."""
    return 5 + hashlib.sha256(f"{variant}|{prompt}|{seed}".encode()).digest()[0] % 20


def answer(variant: str, prompt: str, seed: int | None = None, size: int | None = None) -> str:
    """The text of an answer, cut at `size` tokens or at its natural end."""
    tokens = tuple(prompt.encode())
    length = natural_length(variant, tokens, seed)
    letters = answer_tokens(variant, tokens, seed)
    return "".join(chr(next(letters)) for _ in range(length if size is None else size))


def logprob(token: int) -> float:
    return -math.inf if token == ord("z") else -(token - 96) / 8


@dataclass
class Job:
    request: Request
    deliver: Deliver
    arrived: float
    letters: Iterator[int]
    started: float | None = None
    first_token: float | None = None
    cancelled: bool = False
    done: int = 0
    text: str = ""
    held: list[str] = field(default_factory=list)


class FakeEngine:
    """Runs a few requests at a time, a token each a step.

    Attributes:
        token_seconds: how long a step takes.
        open: cleared, no step is made.
        error: set, requests end with it.
        alive: as in the stats.
    """

    def __init__(
        self,
        variants: tuple[str, ...] = ("base", "chat", "math"),
        *,
        token_seconds: float = 0.0,
        slots: int = 8,
        queue: int = 1000,
    ) -> None:
        self.variants = variants
        self.base = variants[0]
        self.artifact_hash = hashlib.sha256(b"artifact").hexdigest()
        self.token_seconds = token_seconds
        self.open = threading.Event()
        self.open.set()
        self.error: str | None = None
        self.alive = True
        self.submitted: list[Request] = []
        self._slots, self._queue = slots, queue
        self._changed = threading.Condition()
        self._waiting: list[Job] = []
        self._running: list[Job] = []
        self._stopping = False
        self._prompts: Counter[str] = Counter()
        self._generated: Counter[str] = Counter()
        self._swaps: Counter[tuple[str, str]] = Counter()
        self._listeners: list[OnReconfigure] = []
        self._current = ""
        self._steps = 0
        self._thread = threading.Thread(target=self._run, name="fake-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, deliver: Deliver) -> None:
        if request.variant not in self.variants:
            raise RequestError("unknown", param="model", code="model_not_found")
        if len(request.prompt) >= MAX_MODEL_LEN:
            raise RequestError(
                f"the prompt has {len(request.prompt)} tokens, the model takes {MAX_MODEL_LEN}",
                param="prompt",
                code="context_length_exceeded",
            )
        with self._changed:
            if self._stopping or not self.alive:
                raise StoppedError("the engine is stopping")
            if len(self._waiting) >= self._queue:
                raise BusyError("the queue is full")
            self.submitted.append(request)
            letters = answer_tokens(request.variant, request.prompt, request.sampling.seed)
            self._waiting.append(Job(request, deliver, time.monotonic(), letters))
            self._changed.notify_all()

    def cancel(self, request_id: str) -> None:
        with self._changed:
            for job in (*self._waiting, *self._running):
                job.cancelled |= job.request.id == request_id
            self._changed.notify_all()

    def max_model_len(self, variant: str) -> int:
        return MAX_MODEL_LEN

    def tokenizer(self, variant: str) -> Any:
        return ByteTokenizer(None if variant == NO_TEMPLATE else "bytes")

    def stats(self) -> Stats:
        with self._changed:
            running = Counter(job.request.variant for job in self._running)
            waiting = Counter(job.request.variant for job in self._waiting)
            return Stats(
                mode="swap",
                policy="fifo",
                batching="continuous",
                running={v: running[v] for v in self.variants},
                waiting={v: waiting[v] for v in self.variants},
                batch=dict(running),
                resident={v: v == self._current for v in self.variants},
                kv_blocks_used=running.total(),
                kv_blocks_total=self._slots,
                memory={"experts": 1000, "non_expert": 200, "kv": 30},
                prompt_tokens={v: self._prompts[v] for v in self.variants},
                generation_tokens={v: self._generated[v] for v in self.variants},
                reconfigurations=dict(self._swaps),
                steps=self._steps,
                alive=self.alive,
            )

    def on_reconfigure(self, listener: OnReconfigure) -> None:
        self._listeners.append(listener)

    def close(self, timeout: float = 0.0) -> None:
        with self._changed:
            self._stopping = True
            end = time.monotonic() + timeout
            while (self._waiting or self._running) and time.monotonic() < end:
                self._changed.wait(0.01)
            for job in (*self._waiting, *self._running):
                job.cancelled = True
            self._changed.notify_all()
        self._thread.join()

    def idle(self, seconds: float = 5.0) -> bool:
        """Waits until nothing runs; whether that came to be."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with self._changed:
                if not self._running and not self._waiting:
                    return True
            time.sleep(0.002)
        return False

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._running:
                    if self._stopping:
                        return
                    self._changed.wait()
                self._sweep()
                if self.open.is_set():
                    self._start()
                jobs = list(self._running) if self.open.is_set() else []
            for job in jobs:
                self._step(job)
            time.sleep(self.token_seconds if jobs else 0.001)

    def _start(self) -> None:
        while self._waiting and len(self._running) < self._slots:
            job = self._waiting.pop(0)
            job.started = time.monotonic()
            variant = job.request.variant
            self._prompts[variant] += len(job.request.prompt)
            self._running.append(job)
            if variant != self._current:
                before, self._current = self._current, variant
                self._swaps[before, variant] += 1
                for listener in self._listeners:
                    listener(before, variant, 0.25)

    def _sweep(self) -> None:
        now = time.monotonic()
        for job in (*self._waiting, *self._running):
            timeout = job.request.timeout
            if job.cancelled:
                self._finish(job, "abort")
            elif timeout is not None and now - job.arrived > timeout:
                self._finish(job, "timeout")
            elif self.error is not None:
                self._finish(job, "error", self.error)

    def _step(self, job: Job) -> None:
        request, sampling = job.request, job.request.sampling
        token = next(job.letters)
        now = time.monotonic()
        job.first_token = job.first_token or now
        job.done += 1
        job.text += chr(token)
        with self._changed:
            self._steps += 1
            self._generated[request.variant] += 1
        top = sorted(((t, logprob(t)) for t in range(97, 123)), key=lambda p: -p[1])
        logprobs: tuple[TokenLogprob, ...] = ()
        if sampling.logprobs is not None:
            logprobs = (TokenLogprob(token, logprob(token), tuple(top[: sampling.logprobs])),)
        stop = next((s for s in sampling.stop if s in job.text), None)
        visible = "" if sampling.stop else chr(token)
        natural = natural_length(request.variant, request.prompt, sampling.seed)
        end: FinishReason | None = None
        if stop is not None or (job.done == natural and not sampling.ignore_eos):
            end = "stop"
        elif job.done == sampling.max_tokens or job.done + len(request.prompt) >= MAX_MODEL_LEN:
            end = "length"
        if end is None:
            job.deliver(Output(visible, (token,), logprobs))
        else:
            if sampling.stop:
                visible = job.text if stop is None else job.text[: job.text.index(stop)]
            with self._changed:
                self._finish(job, end, None, Output(visible, (token,), logprobs))

    def _finish(
        self,
        job: Job,
        reason: FinishReason,
        error: str | None = None,
        last: Output | None = None,
    ) -> None:
        for jobs in (self._waiting, self._running):
            if job in jobs:
                jobs.remove(job)
        timing = Timing(job.arrived, job.started, job.first_token, time.monotonic())
        last = last or Output()
        finish = Finish(reason, timing, error=error)
        self._changed.notify_all()
        job.deliver(Output(last.text, last.tokens, last.logprobs, finish))
