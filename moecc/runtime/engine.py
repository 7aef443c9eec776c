"""The loop that turns requests into answers: one thread, one forward pass after the other.

Where a runner runs ahead, the next pass is launched before the tokens of the last are known here:
the device takes them from where it put them. A sequence that has ended by then has run one token
too far.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moecc.errors import RequestError, StoppedError
from moecc.runtime.answer import Answer
from moecc.runtime.fused import FusedRunner
from moecc.runtime.interface import Deliver, OnReconfigure
from moecc.runtime.paged import PagedRunner, Part
from moecc.runtime.request import FinishReason, Request, Stats, TokenLogprob
from moecc.runtime.residency import Residency
from moecc.runtime.sampling import Choice, Picked, check_tokens, pick
from moecc.runtime.scheduler import Batch, Scheduler
from moecc.runtime.sequence import Sequence
from moecc.runtime.static import StaticRunner

QUIET_SECONDS = 1.0
_LOST = ("CUDA error", "illegal memory access")  # what torch and Triton say of a lost device

Runner = PagedRunner | FusedRunner | StaticRunner

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Variant:
    """What the engine knows of a variant besides its weights.

    `tokenizer` is None where the artifact has none; `ends` are the tokens that end its answers.
    """

    name: str
    tokenizer: Any
    ends: frozenset[int]
    vocab: int
    max_model_len: int


@dataclass(frozen=True, slots=True, eq=False)
class _Flight:
    """A pass whose tokens are not known here yet.

    Attributes:
        sampled: the answers that get a token, in the order of the rows of `picked`.
        places: where in its sequence each token goes.
    """

    batch: Batch
    sampled: list[Answer]
    places: list[int]
    picked: Picked | None

    @property
    def sequences(self) -> frozenset[Sequence]:
        return frozenset(piece.sequence for piece in self.batch.pieces)


class Engine:
    """Answers requests of all variants; see `interface.EngineLike` for what callers rely on."""

    def __init__(
        self,
        variants: Iterable[Variant],
        *,
        base: str,
        artifact_hash: str,
        runner: Runner,
        residency: Residency,
        scheduler: Scheduler,
        policy: str,
        memory: Mapping[str, int],
        scope: Callable[[], AbstractContextManager[Any]] = nullcontext,
        on_quiet: Callable[[], None],
        close: Callable[[], None],
        encodes: bool = False,
    ) -> None:
        """
        Args:
            scope: entered by the engine's thread: it makes the device the thread's.
            on_quiet: called on the engine's thread when there was nothing to do for a while.
            close: frees what is not just memory of torch.
            encodes: prompts go to an encoder, and answers have the length to themselves.
        """
        self._variants = {v.name: v for v in variants}
        self.variants = tuple(self._variants)
        self.base = base
        self.artifact_hash = artifact_hash
        self._runner: Runner | None = runner
        self._residency: Residency | None = residency
        self._mode = residency.mode
        self._continuous = not isinstance(runner, StaticRunner)
        self._scheduler = scheduler
        self._policy = policy
        self._memory = dict(memory)
        self._scope = scope
        self._on_quiet = on_quiet
        self._close = close
        self._encodes = encodes
        self._answers: dict[str, Answer] = {}
        self._of: dict[Sequence, Answer] = {}
        self._in_pass: frozenset[Sequence] = frozenset()
        self._flight: _Flight | None = None
        self._orders = itertools.count()
        self._changed = threading.Condition()
        self._stopping = False
        self._deadline = float("inf")
        self._died: str | None = None
        self._listeners: list[OnReconfigure] = []
        self._active = ""
        self._batch: dict[str, int] = {}
        self._steps = 0
        self._prompt_tokens: Counter[str] = Counter()
        self._generated: Counter[str] = Counter()
        self._reconfigurations: Counter[tuple[str, str]] = Counter()
        self._thread = threading.Thread(target=self._loop, name="moecc-engine", daemon=True)
        self._thread.start()

    # Called from any thread

    def submit(self, request: Request, deliver: Deliver) -> None:
        """Queues a request; its outputs go to `deliver`: see `interface`."""
        variant, limit = self._checked(request)
        sequence = Sequence(
            request, self.variants.index(variant.name), next(self._orders), time.monotonic()
        )
        answer = Answer(
            sequence,
            Choice(request.sampling, request.prompt),
            deliver,
            variant.tokenizer if request.detokenize else None,
            variant.ends,
            limit,
        )
        with self._changed:
            if self._died or self._stopping:
                raise StoppedError(self._died or "the server is stopping", "try again later")
            if request.id in self._answers:
                raise RequestError(f"there is a request `{request.id}` already", param="id")
            self._scheduler.add(sequence)
            self._answers[request.id] = self._of[sequence] = answer
            self._prompt_tokens[variant.name] += sequence.prompt_len
            self._changed.notify()

    def cancel(self, request_id: str) -> None:
        """Ends a request with `abort` if it is still there."""
        with self._changed:
            answer = self._answers.get(request_id)
            if answer is None:
                return
            if answer.sequence in self._in_pass:
                answer.cancelled = True  # the pass that computes it ends first
                return
            self._forget(answer)
        answer.finish("abort")

    def max_model_len(self, variant: str) -> int:
        return self._variant(variant).max_model_len

    def tokenizer(self, variant: str) -> Any:
        tokenizer = self._variant(variant).tokenizer
        if tokenizer is None:
            raise RequestError(
                f"variant `{variant}` has no tokenizer",
                "from Python, `moecc.load(...).generate` takes and gives token ids",
                param="model",
            )
        return tokenizer

    def on_reconfigure(self, listener: OnReconfigure) -> None:
        self._listeners.append(listener)

    def stats(self) -> Stats:
        with self._changed:
            scheduler, continuous = self._scheduler, self._continuous
            return Stats(
                mode=self._mode,
                policy=self._policy,
                batching="continuous" if continuous else "static",
                running=self._by_name(scheduler.running()),
                waiting=self._by_name(scheduler.waiting()),
                batch=dict(self._batch),
                resident={name: self._is_resident(v) for v, name in enumerate(self.variants)},
                kv_blocks_used=scheduler.pool.used if continuous else 0,
                kv_blocks_total=scheduler.pool.total if continuous else 0,
                memory=dict(self._memory),
                prompt_tokens=self._by_name(self._prompt_tokens),
                generation_tokens=self._by_name(self._generated),
                reconfigurations=dict(self._reconfigurations),
                steps=self._steps,
                alive=self._died is None and self._thread.is_alive(),
            )

    def close(self, timeout: float = 0.0) -> None:
        """Takes no more requests, lets the rest run for `timeout` seconds, aborts what is left."""
        with self._changed:
            self._stopping = True
            self._deadline = min(self._deadline, time.monotonic() + timeout)
            self._changed.notify()
        self._thread.join()
        with self._changed:
            close, self._close = self._close, lambda: None
            # Whoever keeps the engine keeps no weights.
            self._runner = self._residency = self._flight = None
            self._memory = dict.fromkeys(self._memory, 0)
        close()

    # The engine's own thread

    def _loop(self) -> None:
        with self._scope():
            self._serve()

    def _serve(self) -> None:
        try:
            while self._wait_for_work():
                self._expire()
                with self._changed:
                    batch = self._scheduler.next_batch()
                    if batch is not None:
                        sequences = frozenset(p.sequence for p in batch.pieces)
                        self._in_pass |= sequences
                        now = time.monotonic()
                        for sequence in sequences:
                            sequence.started = sequence.started or now
                if self._runner is None:
                    return
                if not isinstance(self._runner, StaticRunner):
                    self._run_passes(self._runner, batch)
                elif batch is not None:
                    self._run_static(self._runner, batch)
        except Exception as error:
            self._died = f"the engine has died: {_one_line(error)}"
            self._end_all("error", self._died)
            raise
        self._end_all("abort")

    def _wait_for_work(self) -> bool:
        """Sleeps while there is nothing to do; False when it is time to stop."""
        with self._changed:
            if not self._answers:
                self._batch = {}
            quiet = not self._changed.wait_for(self._is_called, QUIET_SECONDS)
        if quiet:
            self._on_quiet()
        with self._changed:
            self._changed.wait_for(self._is_called)
            over = not self._answers or time.monotonic() >= self._deadline
            return not (self._stopping and over)

    def _is_called(self) -> bool:
        return bool(self._answers) or self._stopping

    def _expire(self) -> None:
        """Ends requests whose time is over; those of a static batch that runs end there."""
        with self._changed:
            expired = self._scheduler.expired(time.monotonic())
            late = [self._of[s] for s in expired if self._continuous or s not in self._in_pass]
            for answer in late:
                self._forget(answer)
        for answer in late:
            answer.finish("timeout")

    def _run_passes(self, runner: PagedRunner | FusedRunner, batch: Batch | None) -> None:
        """Launches a pass, then takes in the one before it: or this one too, if it must be."""
        before = self._flight
        self._flight, failure = None, None
        if batch is not None:
            try:
                self._flight = self._launch(runner, batch, before)
            except Exception as error:
                failure = error
        if before is not None:
            self._guarded(before.batch, lambda: self._land(before))
        if batch is not None and failure is not None:
            # Its traceback would keep what the pass has allocated.
            failed, failure = failure.with_traceback(None), None
            self._fail(batch, failed)
        flight = self._flight
        if flight is not None and not self._may_wait(runner, flight):
            self._flight = None
            self._guarded(flight.batch, lambda: self._land(flight))
        with self._changed:
            self._in_pass = frozenset() if self._flight is None else self._flight.sequences

    def _guarded(self, batch: Batch, work: Callable[[], object]) -> None:
        """Does some of a batch's work; what fails there ends its requests, but not the engine."""
        try:
            work()
        except Exception as error:
            self._fail(batch, error)

    def _prepare(self, batch: Batch) -> None:
        self._reconfigure(batch)
        self._batch = self._by_name(Counter())
        for piece in batch.pieces:
            self._batch[self.variants[piece.sequence.variant]] += piece.count

    def _reconfigure(self, batch: Batch) -> None:
        """Activates the batch's variant, tells listeners of a change, and says what comes next."""
        assert self._residency is not None, "the engine runs"
        if self._mode == "mixed":
            return
        first = batch.pieces[0].sequence.variant
        name = self.variants[first]
        if name != self._active:
            begin = time.perf_counter()
            self._residency.activate(first)
            self._residency.wait()
            seconds = time.perf_counter() - begin
            self._reconfigurations[self._active, name] += 1
            for listener in self._listeners:
                try:
                    listener(self._active, name, seconds)
                except Exception:
                    log.exception("a listener failed")
            self._active = name
        upcoming = self._scheduler.upcoming()
        if upcoming is not None:
            self._residency.prefetch(upcoming)

    def _launch(
        self, runner: PagedRunner | FusedRunner, batch: Batch, before: _Flight | None
    ) -> _Flight:
        """Starts a pass and books its tokens: till they are known, -1 and less by their rows.

        `before` is the pass that still runs, if one does.
        """
        self._prepare(batch)
        parts = [
            Part(
                p.sequence.variant,
                p.sequence.tokens[p.start : p.start + p.count],
                p.start,
                p.sequence.blocks,
                p.samples,
            )
            for p in batch.pieces
        ]
        logits = runner.run(parts)
        self._steps += 1
        unknown = set() if before is None else set(before.sampled)
        sampled = [self._of[p.sequence] for p in batch.pieces if p.samples]
        picked = None
        if sampled:
            keys = [a.choice.foresee() if a in unknown else a.choice.key for a in sampled]
            picked = pick(logits, [answer.choice for answer in sampled], keys)
            if isinstance(runner, FusedRunner) and runner.runs_ahead:
                runner.keep(picked.tokens)
        places = [len(answer.sequence.tokens) for answer in sampled]
        with self._changed:
            for piece in batch.pieces:
                piece.sequence.computed += piece.count
            for row, answer in enumerate(sampled):
                answer.sequence.tokens.append(-1 - row)
                if answer.ends_after(2 if answer in unknown else 1):
                    self._scheduler.remove(answer.sequence)
                    answer.scheduled = False
        return _Flight(batch, sampled, places, picked)

    def _may_wait(self, runner: PagedRunner | FusedRunner, flight: _Flight) -> bool:
        """Whether the next pass can be launched before this one's tokens are known."""
        alive = [answer for answer in flight.sampled if answer.sequence in self._of]
        ahead = isinstance(runner, FusedRunner) and runner.runs_ahead
        return ahead and bool(alive) and all(a.choice.is_free for a in alive)

    def _land(self, flight: _Flight) -> None:
        """Takes in the tokens of a pass, and ends who was cancelled in the meantime."""
        found = flight.picked.result() if flight.picked is not None else []
        for answer, place, chosen in zip(flight.sampled, flight.places, found, strict=True):
            if answer.sequence in self._of:
                if chosen is not None:
                    answer.sequence.tokens[place] = chosen[0]
                self._accept(answer, chosen)
        with self._changed:
            alive = [self._of[s] for s in flight.sequences if s in self._of]
            left = [answer for answer in alive if answer.cancelled]
            for answer in left:
                self._forget(answer)
        for answer in left:
            answer.finish("abort")

    def _run_static(self, runner: StaticRunner, batch: Batch) -> None:
        answers = [self._of[p.sequence] for p in batch.pieces]

        def next_(logits: Tensor, rows: list[int]) -> list[tuple[int, bool] | None]:
            self._steps += 1
            self._expire()
            self._end_gone(answers)
            live = [answers[row] for row in rows]
            picked = pick(logits, [a.choice for a in live], [a.choice.key for a in live])
            found: list[tuple[int, bool] | None] = []
            for answer, chosen in zip(live, picked.result(), strict=True):
                if answer.sequence not in self._of:
                    found.append(None)
                    continue
                if chosen is not None:
                    answer.sequence.tokens.append(chosen[0])
                ended = self._accept(answer, chosen)
                found.append(None if chosen is None else (chosen[0], ended))
            return found

        limit = max(a.limit for a in answers)
        prompts = [a.sequence.tokens for a in answers]
        self._prepare(batch)
        self._guarded(batch, lambda: runner.run(answers[0].sequence.variant, prompts, limit, next_))
        self._in_pass = frozenset()

    def _end_gone(self, answers: list[Answer]) -> None:
        """Ends those of a static batch whose client or time is gone, also where they still wait."""
        now = time.monotonic()
        for answer in answers:
            deadline = answer.sequence.deadline
            if answer.sequence not in self._of:
                continue
            if answer.cancelled or now >= self._deadline:
                self._end(answer, "abort")
            elif deadline is not None and now >= deadline:
                self._end(answer, "timeout")

    def _accept(self, answer: Answer, found: tuple[int, TokenLogprob | None] | None) -> bool:
        """Gives an answer its next token, if one could be chosen; True if that ended it."""
        if found is None:
            self._end(answer, "error", "the model's logits are not finite")
            return True
        self._generated[answer.sequence.request.variant] += 1
        output = answer.accept(*found)
        if output.finish is not None:
            with self._changed:
                self._forget(answer)
        answer.deliver(output)
        return output.finish is not None

    def _fail(self, batch: Batch, error: Exception) -> None:
        """Ends the requests of a batch; raises the error if the device is lost."""
        if any(sign in str(error) for sign in _LOST):
            raise error
        for piece in batch.pieces:
            answer = self._of.get(piece.sequence)
            if answer is not None:
                self._end(answer, "error", _one_line(error))

    def _end(self, answer: Answer, reason: FinishReason, error: str | None = None) -> None:
        with self._changed:
            self._forget(answer)
        answer.finish(reason, error=error)

    def _end_all(self, reason: FinishReason, error: str | None = None) -> None:
        with self._changed:
            self._stopping = True
            left = list(self._answers.values())
            for answer in left:
                self._forget(answer)
            self._batch = {}
        for answer in left:
            answer.finish(reason, error=error)

    def _forget(self, answer: Answer) -> None:
        if answer.scheduled:
            self._scheduler.remove(answer.sequence)
        del self._answers[answer.sequence.request.id]
        del self._of[answer.sequence]

    # Checks and names

    def _checked(self, request: Request) -> tuple[Variant, int]:
        """The variant, and how many tokens may be generated; RequestError if it cannot run."""
        variant = self._variant(request.variant)
        sampling, length = request.sampling, len(request.prompt)
        if not length:
            raise RequestError("the prompt has no tokens", param="prompt")
        room = variant.max_model_len - (0 if self._encodes else length)
        if length > variant.max_model_len or room < 1:  # before its tokens are looked at
            raise RequestError(
                f"`{variant.name}` takes at most {variant.max_model_len} tokens of prompt and "
                f"answer; the prompt has {length}",
                "shorten the prompt",
                param="prompt",
                code="context_length_exceeded",
            )
        if not all(0 <= token < variant.vocab for token in request.prompt):
            raise RequestError(
                f"the prompt has a token outside the vocabulary of {variant.vocab}", param="prompt"
            )
        check_tokens(sampling, variant.vocab)
        if request.detokenize:
            self.tokenizer(variant.name)
        elif sampling.stop:
            raise RequestError("`stop` needs text; use `stop_token_ids`", param="stop")
        return variant, min(room, sampling.max_tokens or room)

    def _variant(self, name: str) -> Variant:
        if name not in self._variants:
            raise RequestError(
                f"there is no model `{name}`; there are {', '.join(self.variants)}",
                param="model",
                code="model_not_found",
            )
        return self._variants[name]

    def _is_resident(self, variant: int) -> bool:
        return self._residency is not None and self._residency.is_resident(variant)

    def _by_name(self, counts: Mapping[Any, int]) -> dict[str, int]:
        """By the variants' names, every one a key; `counts` is by name or by index."""
        return {
            name: counts.get(name, 0) or counts.get(v, 0) for v, name in enumerate(self.variants)
        }


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
