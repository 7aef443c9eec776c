"""moecc.runtime.engine with a model of a few lines and the real scheduler.

The model's next token is a function of the variant and of all tokens before it, which it reads
back from the cache blocks it was given: wrong blocks, a chunk too few or a stale cache change the
answer. `expected` is that function, without an engine.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from moecc.errors import BusyError, MoeccError, RequestError, StoppedError
from moecc.runtime.engine import Engine, Variant
from moecc.runtime.fused import FusedRunner
from moecc.runtime.paged import Part
from moecc.runtime.request import Finish, Output, Request, Sampling, Stats
from moecc.runtime.sampling import Choice, pick
from moecc.runtime.scheduler import Scheduler
from moecc.runtime.static import StaticRunner

VOCAB = 64
END = 2
BLOCK = 4
LENGTH = 48
NAMES = ("a", "b", "c")
GREEDY = {"temperature": 0.0}
SECONDS = 10.0  # longer than anything here takes


def scores(variant: int, history: Sequence[int]) -> Tensor:
    """The logits after some tokens; a model's own end is never the likeliest."""
    digest = hashlib.sha256(repr((variant, list(history))).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    found = torch.randn(VOCAB, generator=generator)
    found[END] = -9.0
    return found


def expected(variant: str, prompt: Sequence[int], count: int, **sampling: Any) -> list[int]:
    """The first tokens of the answer, one after the other."""
    choice = Choice(Sampling(**(GREEDY | sampling)), prompt)
    tokens = list(prompt)
    for _ in range(count):
        logits = scores(NAMES.index(variant), tokens)[None]
        [chosen] = pick(logits, [choice], [choice.key]).result()
        assert chosen is not None
        token = chosen[0]
        choice.observe(token)
        tokens.append(token)
    return tokens[len(prompt) :]


class Letters:
    """A tokenizer that has a letter for every token, and none for the end."""

    clean_up_tokenization_spaces = False

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(64 + t) for t in tokens if t != END or not skip_special_tokens)


class Model(FusedRunner):
    """`before` runs at the start of a pass, `after` may change its logits."""

    ahead = False  # as on a GPU: tokens of a pass are not known when the next one starts

    def __init__(self) -> None:
        self.runs_ahead = self.ahead
        self.last: list[int] = []
        self.memory: dict[tuple[int, int], int] = {}
        self.passes: list[list[tuple[int, int, int]]] = []  # (variant, context, tokens) of parts
        self.before: Callable[[Sequence[Part]], object] = lambda parts: None
        self.after: Callable[[Sequence[Part], Tensor], Tensor] = lambda parts, logits: logits
        self.forced: dict[int, int] = {}  # length of the history -> the next token

    def run(self, parts: Sequence[Part]) -> Tensor:
        self.passes.append([(p.variant, p.context, len(p.tokens)) for p in parts])
        self.before(parts)
        rows = []
        for part in parts:
            assert part.tokens, "a part without tokens"
            for at, given in enumerate(part.tokens, part.context):
                assert given >= 0 or self.runs_ahead
                token = given if given >= 0 else self.last[-1 - given]
                self.memory[part.blocks[at // BLOCK], at % BLOCK] = token
            if part.logits:
                rows.append(self._next(part))
        return self.after(parts, torch.stack(rows) if rows else torch.full((1, VOCAB), math.nan))

    def keep(self, tokens: Tensor) -> None:
        self.last = tokens.tolist()

    def _next(self, part: Part) -> Tensor:
        length = part.context + len(part.tokens)
        history = [self.memory[part.blocks[at // BLOCK], at % BLOCK] for at in range(length)]
        found = scores(part.variant, history)
        if length in self.forced:
            found[self.forced[length]] = 99.0
        return found


class StaticModel(StaticRunner):
    """The same in static batches."""

    def __init__(self) -> None:
        self.before: Callable[[int], object] = lambda step: None  # the number of the step
        self.nan: set[int] = set()  # first tokens of the prompts whose logits are no numbers
        self.batches: list[tuple[int, int, int]] = []  # (variant, prompts, limit)

    def run(self, variant: int, prompts: Any, limit: int, next_: Any) -> None:
        self.batches.append((variant, len(prompts), limit))
        live = {row: list(prompt) for row, prompt in enumerate(prompts)}
        for step in range(limit):
            if not live:
                return
            self.before(step)
            logits = torch.stack([scores(variant, tokens) for tokens in live.values()])
            for row, tokens in enumerate(live.values()):
                if tokens[0] in self.nan:
                    logits[row, 5] = math.nan
            for row, found in zip(list(live), next_(logits, list(live)), strict=True):
                if found is None or found[1]:
                    del live[row]
                else:
                    live[row].append(found[0])
        assert not live, "a batch whose rows have not all ended at its limit"


class Rows:
    """A residency that only takes notes."""

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.calls: list[tuple[str, int]] = []
        self.held: set[int] = set()
        self.nbytes = 0

    def activate(self, variant: int) -> None:
        self.calls.append(("activate", variant))
        self.held = {variant}

    def prefetch(self, variant: int) -> None:
        self.calls.append(("prefetch", variant))

    def wait(self) -> None:
        pass

    def is_resident(self, variant: int) -> bool:
        return self.mode != "swap" or variant in self.held


class Client:
    """Takes the outputs of one request, and notes what must not be."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.outputs: list[Output] = []
        self.ended = threading.Event()
        self.wrong: list[str] = []
        self.on_output: Callable[[Output], object] = lambda output: None

    def __call__(self, output: Output) -> None:
        if self.ended.is_set():
            self.wrong.append(f"{output} after the end")
        if output.finish is None and not output.tokens:
            self.wrong.append(f"{output} says nothing")
        self.outputs.append(output)
        if output.finish is not None:
            self.ended.set()
        self.on_output(output)

    @property
    def tokens(self) -> list[int]:
        return [t for o in self.outputs for t in o.tokens]

    @property
    def text(self) -> str:
        return "".join(o.text for o in self.outputs)

    @property
    def finish(self) -> Finish:
        assert self.ended.wait(SECONDS), f"`{self.request.id}` does not end: {self.outputs}"
        found = self.outputs[-1].finish
        assert found is not None
        return found

    @property
    def reason(self) -> str:
        return self.finish.reason

    def wait_for(self, count: int) -> None:
        until(lambda: len(self.tokens) >= count)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.001)


class Bench:
    """An engine, its parts, and the clients of all its requests."""

    def __init__(self, runner: Any = None, **options: Any) -> None:
        o = {
            "policy": "grouped",
            "mode": "mixed",
            "seqs": 8,
            "batch_tokens": 32,
            "blocks": 200,
            "max_waiting": 1000,
            "length": LENGTH,
            "patience": 0.0,
            "encodes": False,
            "tokenizer": Letters(),
            "scope": contextlib.nullcontext,
        } | options
        self.model = runner or Model()
        self.rows = Rows(o["mode"])
        static = isinstance(self.model, StaticRunner)
        self.scheduler = Scheduler(
            o["policy"],
            o["mode"] == "mixed",
            o["seqs"],
            1 << 40 if static else o["batch_tokens"],
            1 << 40 if static else BLOCK,
            2 * o["seqs"] if static else o["blocks"],
            o["max_waiting"],
            o["patience"],
        )
        self.closed = 0
        self.engine = Engine(
            [Variant(n, o["tokenizer"], frozenset([END]), VOCAB, o["length"]) for n in NAMES],
            base="a",
            artifact_hash="0" * 64,
            runner=self.model,
            residency=self.rows,
            scheduler=self.scheduler,
            policy=o["policy"],
            memory={"experts": 1, "non_expert": 2, "kv": 3},
            scope=o["scope"],
            on_quiet=lambda: None,
            close=self._on_close,
            encodes=o["encodes"],
        )
        self.clients: list[Client] = []

    def _on_close(self) -> None:
        self.closed += 1

    def ask(
        self,
        prompt: Sequence[int] = (5, 6, 7),
        variant: str = "a",
        *,
        id: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
        detokenize: bool = True,
        on_output: Callable[[Output], object] | None = None,
        **sampling: Any,
    ) -> Client:
        number = f"r{len(self.clients)}" if id is None else id
        request = Request(
            number,
            variant,
            tuple(prompt),
            Sampling(**(GREEDY | sampling)),
            priority,
            timeout,
            detokenize,
        )
        client = Client(request)
        client.on_output = on_output or client.on_output
        self.engine.submit(request, client)
        self.clients.append(client)
        return client

    def stats(self) -> Stats:
        return self.engine.stats()

    def hold(self) -> Hold:
        return Hold(self.model)

    def idle(self) -> Stats:
        """The stats once nothing is left to do."""
        until(lambda: not self.engine._answers and self.stats().batch == {})
        stats = self.stats()
        assert stats.running == stats.waiting == dict.fromkeys(NAMES, 0)
        assert stats.kv_blocks_used == 0
        return stats

    def close(self, timeout: float = 0.0) -> None:
        """Closes the engine, and checks that nothing is left behind."""
        self.engine.close(timeout)
        for client in self.clients:
            assert client.ended.is_set(), client.request.id
            assert client.wrong == []
            assert [o.finish for o in client.outputs[:-1]] == [None] * (len(client.outputs) - 1)
        engine, scheduler = self.engine, self.scheduler
        assert not engine._thread.is_alive()
        assert not engine._answers
        assert not engine._of
        assert (scheduler.running(), scheduler.waiting(), scheduler.pool.used) == ({}, {}, 0)
        assert scheduler.expired(math.inf) == []
        assert self.closed == 1


class Hold:
    """While it is entered the model stands still, in the pass that it is in."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._go = threading.Event()
        self._inside = threading.Event()

    def _before(self, *_: object) -> None:
        self._inside.set()
        assert self._go.wait(SECONDS)

    def __enter__(self) -> Hold:
        self._model.before = self._before
        return self

    def inside(self) -> None:
        """Returns once a pass has begun."""
        assert self._inside.wait(SECONDS)

    def __exit__(self, *_: object) -> None:
        if self._model.before == self._before:
            self._model.before = lambda *_: None
        self._go.set()


@pytest.fixture(autouse=True, params=[False, True], ids=["waits", "ahead"])
def _ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model, "ahead", request.param)


@pytest.fixture
def bench() -> Iterator[Bench]:
    found = Bench()
    yield found
    found.close()


@pytest.fixture
def make() -> Iterator[Callable[..., Bench]]:
    """Makes benches; whatever was not closed is, at the end."""
    made: list[Bench] = []

    def one(runner: Any = None, **options: Any) -> Bench:
        made.append(Bench(runner, **options))
        return made[-1]

    yield one
    for bench in made:
        if not bench.closed:
            bench.close()


class TestAnswers:
    """What comes back, and what ends it."""

    def test_the_expected_model(self) -> None:
        """The tests below need answers that differ."""
        answers = {tuple(expected(v, p, 6)) for v in NAMES for p in ([5], [6], [5, 6])}
        assert len(answers) == 9
        assert END not in expected("a", [5, 6, 7], 40)

    def test_length(self, bench: Bench) -> None:
        client = bench.ask(max_tokens=7)
        assert client.reason == "length"
        assert client.tokens == expected("a", [5, 6, 7], 7)
        assert client.text == Letters().decode(client.tokens)
        assert [len(o.tokens) for o in client.outputs] == [1] * 7
        assert client.finish.stopped_by is None
        assert client.finish.error is None

    def test_one_token(self, bench: Bench) -> None:
        client = bench.ask([9], "b", max_tokens=1)
        assert (client.reason, client.tokens) == ("length", expected("b", [9], 1))
        assert len(client.outputs) == 1

    def test_without_a_limit_it_fills_the_length(self, bench: Bench) -> None:
        client = bench.ask()
        assert client.reason == "length"
        assert client.tokens == expected("a", [5, 6, 7], LENGTH - 3)

    def test_a_prompt_that_leaves_one_token(self, bench: Bench) -> None:
        prompt = [3 + n % 50 for n in range(LENGTH - 1)]
        client = bench.ask(prompt)
        assert (client.reason, client.tokens) == ("length", expected("a", prompt, 1))

    def test_end_of_the_model(self, bench: Bench) -> None:
        bench.model.forced = {5: END}
        client = bench.ask()
        assert (client.reason, client.finish.stopped_by) == ("stop", END)
        assert client.tokens == [*expected("a", [5, 6, 7], 2), END]
        assert client.text == Letters().decode(client.tokens[:2])

    def test_the_end_may_come_first(self, bench: Bench) -> None:
        bench.model.forced = {3: END}
        client = bench.ask()
        assert (client.reason, client.tokens, client.text) == ("stop", [END], "")

    def test_ignored_end(self, bench: Bench) -> None:
        bench.model.forced = {4: END, 5: END}
        client = bench.ask(ignore_eos=True, max_tokens=5)
        assert client.reason == "length"
        assert client.tokens[1:3] == [END, END]
        assert len(client.tokens) == 5

    @pytest.mark.parametrize("ignore", [False, True])
    @pytest.mark.parametrize("token", [END, 33])
    def test_stop_tokens(self, bench: Bench, token: int, ignore: bool) -> None:
        bench.model.forced = {5: token}
        client = bench.ask(stop_token_ids=(33, END), ignore_eos=ignore)
        assert (client.reason, client.finish.stopped_by) == ("stop", token)
        assert client.tokens == [*expected("a", [5, 6, 7], 2), token]
        assert client.text == Letters().decode(client.tokens[:2])

    def test_a_stop_token_in_the_prompt_stops_nothing(self, bench: Bench) -> None:
        assert bench.ask([33, END, 5], stop_token_ids=(33,), max_tokens=3).reason == "length"

    def test_the_last_token_may_be_the_end(self, bench: Bench) -> None:
        bench.model.forced = {5: END}
        assert bench.ask(max_tokens=3).reason == "stop"
        assert bench.ask(max_tokens=2).reason == "length"

    def test_stop_string(self, bench: Bench) -> None:
        answer = expected("a", [5, 6, 7], 10)
        stop = Letters().decode(answer[4:6])
        client = bench.ask(stop=("never", stop), max_tokens=10)
        assert (client.reason, client.finish.stopped_by) == ("stop", stop)
        assert client.tokens == answer[:6]
        assert client.text == Letters().decode(answer[:4])

    def test_start_of_a_stop_string_is_shown_at_the_end(self, bench: Bench) -> None:
        answer = expected("a", [5, 6, 7], 5)
        stop = Letters().decode(answer[3:5]) + "!"
        client = bench.ask(stop=(stop,), max_tokens=5)
        assert client.reason == "length"
        assert client.text == Letters().decode(answer)
        assert [o.text for o in client.outputs][3] == ""

    def test_stop_string_at_the_last_token(self, bench: Bench) -> None:
        answer = expected("a", [5, 6, 7], 5)
        client = bench.ask(stop=(Letters().decode(answer[4:5]),), max_tokens=5)
        assert client.reason == "stop"
        assert client.text == Letters().decode(answer[:4])

    def test_no_text_was_asked_for(self, bench: Bench) -> None:
        client = bench.ask(max_tokens=3, detokenize=False)
        assert client.reason == "length"
        assert client.text == ""
        assert client.tokens == expected("a", [5, 6, 7], 3)

    def test_logprobs(self, bench: Bench) -> None:
        client = bench.ask(max_tokens=4, logprobs=2)
        assert client.reason == "length"
        found = [p for o in client.outputs for p in o.logprobs]
        assert [p.token for p in found] == client.tokens
        tokens = [5, 6, 7]
        for entry in found:
            log = scores(0, tokens).log_softmax(-1)
            assert entry.logprob == pytest.approx(log[entry.token].item(), abs=1e-5)
            assert [t for t, _ in entry.top] == log.topk(2).indices.tolist()
            tokens.append(entry.token)
        assert all(not o.logprobs for o in bench_outputs(bench.ask(max_tokens=2)))

    def test_times(self, bench: Bench) -> None:
        before = time.monotonic()
        timing = bench.ask(max_tokens=3).finish.timing
        assert timing.started is not None
        assert timing.first_token is not None
        assert timing.finished is not None
        times = [before, timing.arrived, timing.started, timing.first_token, timing.finished]
        assert times == sorted(times)
        assert times[-1] <= time.monotonic()

    def test_long_prompts_come_in_chunks(self, make: Callable[..., Bench]) -> None:
        bench = make(batch_tokens=8)
        prompt = [3 + n for n in range(30)]
        with bench.hold() as hold:
            first = bench.ask(prompt, max_tokens=4)
            hold.inside()
            second = bench.ask(prompt[::-1], "b", max_tokens=4)
        assert first.reason == second.reason == "length"
        assert first.tokens == expected("a", prompt, 4)
        assert second.tokens == expected("b", prompt[::-1], 4)
        assert max(sum(count for _, _, count in parts) for parts in bench.model.passes) == 8
        assert len([p for p in bench.model.passes if len(p) == 2]) >= 1

    def test_company_changes_nothing(self, bench: Bench) -> None:
        asked = [
            (v, [3 + (7 * i) % 50, 4 + i], 3 + i % 9, {"temperature": i % 2, "seed": i})
            for i, v in enumerate(NAMES * 6)
        ]
        with bench.hold():
            clients = [bench.ask(p, v, max_tokens=n, **s) for v, p, n, s in asked]
        for client, (v, p, n, s) in zip(clients, asked, strict=True):
            assert client.reason == "length"
            assert client.tokens == expected(v, p, n, **s)
        assert any(len({v for v, _, _ in parts}) == 3 for parts in bench.model.passes)

    def test_seeds(self, bench: Bench) -> None:
        hot = {"temperature": 2.0, "max_tokens": 12}
        alone = bench.ask(seed=7, **hot)
        assert alone.reason == "length"
        with bench.hold():
            clients = [bench.ask(seed=seed, **hot) for seed in (1, 7, 7, 8, None, None)]
        assert [c.reason for c in clients] == ["length"] * 6
        assert alone.tokens == clients[1].tokens == clients[2].tokens
        assert len({tuple(c.tokens) for c in clients}) == 5
        assert alone.tokens == expected("a", [5, 6, 7], 12, temperature=2.0, seed=7)

    def test_penalties_and_bias(self, bench: Bench) -> None:
        more = {"frequency_penalty": 2.0, "repetition_penalty": 3.0, "logit_bias": ((11, 3.0),)}
        client = bench.ask(max_tokens=20, **more)
        assert client.reason == "length"
        assert client.tokens == expected("a", [5, 6, 7], 20, **more)
        assert client.tokens != expected("a", [5, 6, 7], 20)

    def test_the_prompt_of_an_encoder_takes_no_length(self, make: Callable[..., Bench]) -> None:
        bench = make(StaticModel(), mode="resident", encodes=True, length=8)
        client = bench.ask([5] * 8)
        assert client.reason == "length"
        assert len(client.tokens) == 8
        with pytest.raises(RequestError, match="at most 8"):
            bench.ask([5] * 9)


def bench_outputs(client: Client) -> list[Output]:
    assert client.finish
    return client.outputs


class TestRefusals:
    """Requests that cannot be, and what says so."""

    @pytest.mark.parametrize(
        ("arguments", "param", "code"),
        [
            ({"variant": "nobody"}, "model", "model_not_found"),
            ({"prompt": []}, "prompt", None),
            ({"prompt": [5, VOCAB]}, "prompt", None),
            ({"prompt": [-1]}, "prompt", None),
            ({"prompt": [5] * LENGTH}, "prompt", "context_length_exceeded"),
            ({"prompt": [5] * (LENGTH + 1)}, "prompt", "context_length_exceeded"),
            ({"prompt": [5] * 10_000, "max_tokens": 1}, "prompt", "context_length_exceeded"),
            ({"stop": ("x",), "detokenize": False}, "stop", None),
            ({"stop_token_ids": (VOCAB,)}, "stop_token_ids", None),
            ({"logit_bias": ((-1, 1.0),)}, "logit_bias", None),
        ],
    )
    def test_refused(
        self, bench: Bench, arguments: dict[str, Any], param: str, code: str | None
    ) -> None:
        with pytest.raises(RequestError) as caught:
            bench.ask(**arguments)
        assert (caught.value.param, caught.value.code) == (param, code)
        assert "\n" not in caught.value.message
        stats = bench.idle()
        assert stats.prompt_tokens == dict.fromkeys(NAMES, 0)
        assert bench.ask(max_tokens=2).reason == "length"  # the engine is as it was

    def test_a_number_of_tokens_is_whole(self, bench: Bench) -> None:
        """Half a token is never the last one: the answer would outgrow the cache."""
        with pytest.raises(RequestError):
            bench.ask(max_tokens=2.5)

    @pytest.mark.parametrize("tokens", [LENGTH - 3, LENGTH - 2, 10**18])
    def test_more_than_fits_is_cut(self, bench: Bench, tokens: int) -> None:
        client = bench.ask(max_tokens=tokens)
        assert (client.reason, len(client.tokens)) == ("length", LENGTH - 3)

    def test_no_tokenizer(self, make: Callable[..., Bench]) -> None:
        bench = make(tokenizer=None)
        with pytest.raises(RequestError, match="no tokenizer") as caught:
            bench.engine.tokenizer("a")
        assert caught.value.param == "model"
        with pytest.raises(RequestError, match="no tokenizer"):
            bench.ask(max_tokens=2)
        with pytest.raises(RequestError, match="`stop`"):
            bench.ask(stop=("x",), detokenize=False)
        client = bench.ask(max_tokens=2, detokenize=False)
        assert (client.reason, client.text, len(client.tokens)) == ("length", "", 2)

    def test_unknown_names(self, bench: Bench) -> None:
        for call in (bench.engine.tokenizer, bench.engine.max_model_len):
            with pytest.raises(RequestError, match="a, b, c") as caught:
                call("nobody")
            assert caught.value.code == "model_not_found"
        assert bench.engine.max_model_len("b") == LENGTH

    def test_twice_the_same_id(self, bench: Bench) -> None:
        with bench.hold():
            first = bench.ask(id="x", max_tokens=3)
            with pytest.raises(RequestError, match="`x` already") as caught:
                bench.ask([8], "b", id="x")
            assert caught.value.param == "id"
        assert first.reason == "length"
        bench.idle()
        assert bench.stats().prompt_tokens == {"a": 3, "b": 0, "c": 0}
        assert bench.ask(id="x", max_tokens=1).reason == "length"

    def test_an_id_is_free_when_its_request_has_ended(self, bench: Bench) -> None:
        """Its last output is the end: whoever gets it may ask again at once."""
        again: list[Client | Exception] = []

        def ask_again(output: Output) -> None:
            if output.finish is not None:
                try:
                    again.append(bench.ask(id="x", max_tokens=2))
                except MoeccError as error:
                    again.append(error)

        assert bench.ask(id="x", max_tokens=2, on_output=ask_again).reason == "length"
        until(lambda: bool(again))
        assert isinstance(again[0], Client), again
        assert again[0].reason == "length"

    def test_a_full_queue(self, make: Callable[..., Bench]) -> None:
        bench = make(seqs=1, max_waiting=2)
        with bench.hold() as hold:
            first = bench.ask(max_tokens=2)
            hold.inside()
            clients = [bench.ask(max_tokens=2) for _ in range(2)]
            with pytest.raises(BusyError, match="2 requests wait"):
                bench.ask(id="late")
            bench.engine.cancel("late")
            bench.engine.cancel(clients[0].request.id)
            assert clients[0].reason == "abort"
            third = bench.ask(id="late", max_tokens=2)
        assert [c.reason for c in (first, clients[1], third)] == ["length"] * 3


class TestCancel:
    """Requests that are ended from outside."""

    def test_one_that_waits(self, make: Callable[..., Bench]) -> None:
        bench = make(seqs=1)
        with bench.hold() as hold:
            first = bench.ask(max_tokens=4)
            hold.inside()
            second = bench.ask(max_tokens=4)
            assert bench.stats().waiting["a"] == 1
            bench.engine.cancel(second.request.id)
            assert second.reason == "abort"
            assert second.finish.timing.started is None
            assert bench.stats().waiting["a"] == 0
        assert (first.reason, second.tokens) == ("length", [])
        assert first.tokens == expected("a", [5, 6, 7], 4)

    def test_one_in_a_pass(self, bench: Bench) -> None:
        with bench.hold() as hold:
            first, second = bench.ask(), bench.ask([9, 8], "b", max_tokens=9)
            hold.inside()
            for _ in range(3):
                bench.engine.cancel(first.request.id)
            assert not first.ended.is_set()
        assert first.reason == "abort"
        assert len(first.tokens) <= 1
        assert second.reason == "length"
        assert second.tokens == expected("b", [9, 8], 9)

    def test_one_whose_prompt_is_read(self, make: Callable[..., Bench]) -> None:
        bench = make(batch_tokens=8)
        with bench.hold() as hold:
            client = bench.ask([5] * 30)
            hold.inside()
            bench.engine.cancel(client.request.id)
        assert (client.reason, client.tokens) == ("abort", [])
        assert len(bench.model.passes) == 1

    def test_one_that_is_gone(self, bench: Bench) -> None:
        client = bench.ask(max_tokens=2)
        assert client.reason == "length"
        bench.idle()
        bench.engine.cancel(client.request.id)
        bench.engine.cancel("nobody")
        assert len(client.outputs) == 2

    def test_from_its_own_output(self, bench: Bench) -> None:
        client = bench.ask(id="x", on_output=lambda output: bench.engine.cancel("x"))
        assert client.reason == "abort"
        assert 1 <= len(client.tokens) <= 2
        bench.idle()
        assert bench.ask(max_tokens=2).reason == "length"

    def test_the_rest_of_a_batch_from_an_output(self, bench: Bench) -> None:
        """As a server does whose client goes away with several answers under way."""
        names = [f"x{n}" for n in range(4)]

        def cancel_all(output: Output) -> None:
            for name in names:
                bench.engine.cancel(name)

        with bench.hold() as hold:
            bench.ask([3], max_tokens=1)
            hold.inside()  # so that all of these come into the next pass
            clients = [bench.ask([9], "b", id=n, on_output=cancel_all) for n in names]
            other = bench.ask([8], "c", max_tokens=9)
        assert [c.reason for c in clients] == ["abort"] * 4
        assert other.reason == "length"
        assert other.tokens == expected("c", [8], 9)
        assert [c.wrong for c in clients] == [[]] * 4

    def test_between_the_pass_and_the_answer(self, bench: Bench) -> None:
        """Another thread cancels a request while the outputs of its pass are given out."""
        outputs = iter([True])

        def cancel_other(output: Output) -> None:
            if next(outputs, False):
                thread = threading.Thread(target=bench.engine.cancel, args=("second",))
                thread.start()
                thread.join(1.0)

        with bench.hold() as hold:
            bench.ask([3], max_tokens=1)
            hold.inside()
            first = bench.ask(id="first", max_tokens=5, on_output=cancel_other)
            second = bench.ask(id="second", max_tokens=1)
        assert first.reason == "length"
        assert first.tokens == expected("a", [5, 6, 7], 5)
        assert second.reason in ("abort", "length")
        assert second.wrong == []
        assert bench.idle().alive

    def test_text_that_was_held_back(self, bench: Bench) -> None:
        answer = expected("a", [5, 6, 7], 1)
        stop = Letters().decode(answer) + "!"
        client = bench.ask(id="x", stop=(stop,), on_output=lambda output: bench.engine.cancel("x"))
        assert client.reason == "abort"
        assert client.text == Letters().decode(client.tokens)


class TestTimeouts:
    def test_one_that_waits(self, make: Callable[..., Bench]) -> None:
        bench = make(seqs=1)
        bench.model.before = lambda parts: time.sleep(0.002)
        first = bench.ask()
        second = bench.ask([8], timeout=0.02)
        assert second.reason == "timeout"
        assert second.tokens == []
        assert second.finish.timing.started is None
        assert first.reason == "length"

    def test_one_that_runs(self, bench: Bench) -> None:
        bench.model.before = lambda parts: time.sleep(0.005)
        first, second = bench.ask(timeout=0.06), bench.ask([8], "b", max_tokens=30)
        assert first.reason == "timeout"
        assert 1 <= len(first.tokens) < 30
        assert first.tokens == expected("a", [5, 6, 7], len(first.tokens))
        assert first.text == Letters().decode(first.tokens)
        timing = first.finish.timing
        assert timing.finished is not None
        assert timing.finished - timing.arrived >= 0.06
        assert second.reason == "length"

    def test_no_time_at_all(self, bench: Bench) -> None:
        client = bench.ask(timeout=0.0)
        assert (client.reason, client.tokens) == ("timeout", [])

    def test_time_enough(self, bench: Bench) -> None:
        assert bench.ask(timeout=30.0, max_tokens=3).reason == "length"
        assert bench.idle().steps == 3

    def test_many_at_once(self, make: Callable[..., Bench]) -> None:
        bench = make(seqs=2)
        bench.model.before = lambda parts: time.sleep(0.003)
        clients = [bench.ask([3 + n], timeout=0.01 * (n % 5 + 1)) for n in range(20)]
        assert {c.reason for c in clients} == {"timeout"}
        assert bench.idle().alive


class TestOrder:
    def test_priorities(self, make: Callable[..., Bench]) -> None:
        bench = make(seqs=1)
        ended: list[int] = []

        def ends(priority: int) -> Callable[[Output], None]:
            return lambda output: ended.append(priority) if output.finish else None

        with bench.hold() as hold:
            first = bench.ask(max_tokens=1, on_output=ends(-99))
            hold.inside()
            for priority in (0, 5, -1, 3, 0, -1):
                bench.ask(max_tokens=2, priority=priority, on_output=ends(priority))
        assert first.reason == "length"
        assert [c.reason for c in bench.clients] == ["length"] * 7
        assert ended == [-99, -1, -1, 0, 0, 3, 5]

    @pytest.mark.parametrize("policy", ["fifo", "grouped"])
    @pytest.mark.parametrize("mode", ["resident", "swap"])
    def test_one_variant_a_batch(self, make: Callable[..., Bench], mode: str, policy: str) -> None:
        bench = make(mode=mode, policy=policy, patience=60.0)
        changes: list[tuple[str, str]] = []
        bench.engine.on_reconfigure(
            lambda old, new, seconds: changes.append((old, new)) if seconds >= 0 else None
        )
        with bench.hold():
            clients = [bench.ask([5 + n], v, max_tokens=4) for n, v in enumerate("abcabccba")]
        for client in clients:
            assert client.reason == "length"
            request = client.request
            assert client.tokens == expected(request.variant, request.prompt, 4)
        assert all(len({v for v, _, _ in parts}) == 1 for parts in bench.model.passes)
        stats = bench.idle()
        assert stats.mode == mode
        assert stats.policy == policy
        assert stats.batching == "continuous"
        order = [new for _, new in changes]
        assert [old for old, _ in changes] == ["", *order[:-1]]
        # The first may have begun alone; fifo never lets anybody pass.
        assert order == (list("abcabcba") if policy == "fifo" else list("abc"))
        assert stats.reconfigurations == Counter(changes)
        activated = [v for what, v in bench.rows.calls if what == "activate"]
        assert [NAMES[v] for v in activated] == order
        assert ("prefetch", 1) in bench.rows.calls

    def test_mixed_needs_no_reconfiguration(self, bench: Bench) -> None:
        with bench.hold():
            clients = [bench.ask([5], v, max_tokens=3) for v in NAMES]
        assert [c.reason for c in clients] == ["length"] * 3
        assert bench.stats().reconfigurations == {}
        assert bench.stats().resident == dict.fromkeys(NAMES, True)
        assert bench.rows.calls == []

    def test_resident_in_swap_mode(self, make: Callable[..., Bench]) -> None:
        bench = make(mode="swap")
        assert bench.stats().resident == dict.fromkeys(NAMES, False)
        assert bench.ask(variant="b", max_tokens=1).reason == "length"
        assert bench.stats().resident == {"a": False, "b": True, "c": False}


class TestPreemption:
    """A cache that is too small for all: the answers are the same, only later."""

    @pytest.mark.parametrize("blocks", [12, 13, 20])
    @pytest.mark.parametrize("mode", ["mixed", "resident"])
    def test_same_tokens(self, make: Callable[..., Bench], blocks: int, mode: str) -> None:
        bench = make(blocks=blocks, seqs=6, mode=mode)
        asked = [
            (v, [3 + (5 * i + j) % 60 for j in range(1 + 3 * i % 11)], {"seed": i})
            for i, v in enumerate("aabbcaacb")
        ]
        more = {"temperature": 1.0, "frequency_penalty": 1.0, "max_tokens": 30}
        with bench.hold():
            clients = [bench.ask(p, v, **s, **more) for v, p, s in asked]
        for client, (v, p, s) in zip(clients, asked, strict=True):
            assert client.reason == "length"
            assert client.tokens == expected(v, p, 30, **s, **{**more, "max_tokens": None})
        contexts = Counter(
            (v, count) for parts in bench.model.passes for v, at, count in parts if at == 0
        )
        if blocks < 20 and mode == "mixed":
            assert contexts.total() > len(asked), "nobody was preempted: a test of nothing"
        assert bench.idle().generation_tokens == {"a": 120, "b": 90, "c": 60}

    def test_while_others_come_and_go(self, make: Callable[..., Bench]) -> None:
        bench = make(blocks=14, seqs=6)
        for n in range(40):
            client = bench.ask([3 + n, 4, 5], NAMES[n % 3], max_tokens=20 + n % 20)
            if n % 4 == 3:
                bench.engine.cancel(client.request.id)
            if n % 7 == 6:
                bench.clients[n - 3].wait_for(0)
        for client in bench.clients:
            assert client.reason in ("length", "abort")
            request = client.request
            found = expected(request.variant, request.prompt, len(client.tokens))
            assert client.tokens == found


def test_scope(make: Callable[..., Bench]) -> None:
    """What makes a GPU the thread's is entered by the engine's thread, and left by it."""
    entered: list[str] = []

    @contextlib.contextmanager
    def scope() -> Iterator[None]:
        entered.append(threading.current_thread().name)
        yield
        entered.append("left")

    bench = make(scope=scope)
    assert bench.ask(max_tokens=2).reason == "length"
    assert entered == ["moecc-engine"]
    bench.close()
    assert entered == ["moecc-engine", "left"]


class TestFailures:
    """A model that does not do as it should."""

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_logits_that_are_no_numbers(self, bench: Bench, value: float) -> None:
        def spoil(parts: Sequence[Part], logits: Tensor) -> Tensor:
            for row, part in enumerate(p for p in parts if p.logits):
                if part.variant == 1 and part.context >= 3:
                    logits[row, 7] = value
            return logits

        bench.model.after = spoil
        with bench.hold():
            clients = [bench.ask([5, 6, 7], v, max_tokens=6) for v in "abcb"]
        for client in clients[::2]:
            assert client.reason == "length"
            assert client.tokens == expected(client.request.variant, [5, 6, 7], 6)
        for client in clients[1::2]:
            assert client.reason == "error"
            assert "not finite" in str(client.finish.error)
            assert client.tokens == expected("b", [5, 6, 7], 1)
            assert client.text == Letters().decode(client.tokens)
        stats = bench.idle()
        assert stats.alive
        assert stats.generation_tokens == {"a": 6, "b": 2, "c": 6}

    def test_no_token_is_possible(self, bench: Bench) -> None:
        bench.model.after = lambda parts, logits: torch.full_like(logits, -math.inf)
        with bench.hold():
            clients = [bench.ask(variant=v, temperature=t) for v in NAMES for t in (0.0, 1.0)]
        assert [c.reason for c in clients] == ["error"] * 6
        bench.model.after = lambda parts, logits: logits
        assert bench.ask(max_tokens=2).reason == "length"

    def test_a_pass_that_raises(self, bench: Bench) -> None:
        def fail(parts: Sequence[Part]) -> None:
            if parts[0].context == 6:
                raise RuntimeError("CUDA out of memory\nwith many\nlines")

        with bench.hold() as hold:
            starter = bench.ask([9], max_tokens=1)
            hold.inside()
            first, second = bench.ask(max_tokens=20), bench.ask(variant="b", max_tokens=20)
            bench.model.before = fail
        assert starter.reason == "length"
        assert first.reason == second.reason == "error"
        assert first.finish.error == "RuntimeError: CUDA out of memory"
        assert first.tokens == expected("a", [5, 6, 7], 4)
        assert first.text == Letters().decode(first.tokens)
        bench.model.before = lambda parts: None
        again = bench.ask(max_tokens=20)
        assert again.reason == "length"
        assert again.tokens == expected("a", [5, 6, 7], 20)
        assert bench.idle().alive

    def test_only_the_batch_ends(self, make: Callable[..., Bench]) -> None:
        bench = make(seqs=2)

        def fail(parts: Sequence[Part]) -> None:
            bench.model.before = lambda parts: None
            raise ValueError("no")

        with bench.hold() as hold:
            starter = bench.ask(max_tokens=1)
            hold.inside()
            clients = [bench.ask([8 + n], max_tokens=3) for n in range(4)]
            bench.model.before = fail
        assert starter.reason == "length"
        assert sorted(c.reason for c in clients) == ["error", "error", "length", "length"]
        assert [c.reason for c in clients[2:]] == ["length"] * 2

    def test_cancelled_in_a_pass_that_raises(self, bench: Bench) -> None:
        def fail(parts: Sequence[Part]) -> None:
            bench.engine.cancel("x")
            raise ValueError("no")

        bench.model.before = fail
        assert bench.ask(id="x").reason in ("abort", "error")
        bench.model.before = lambda parts: None
        assert bench.ask(id="x", max_tokens=1).reason == "length"

    @pytest.mark.parametrize("of", ["CUDA error", "Triton Error [CUDA]"])
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
    def test_a_lost_device(self, make: Callable[..., Bench], of: str) -> None:
        bench = make(seqs=2)

        def fail(parts: Sequence[Part]) -> None:
            raise RuntimeError(f"{of}: an illegal memory access was encountered")

        with bench.hold() as hold:
            clients = [bench.ask()]
            hold.inside()
            clients += [bench.ask([8 + n], v) for n, v in enumerate("bcab")]
            bench.model.before = fail
            bench.model.after = lambda parts, logits: fail(parts)  # type: ignore[func-returns-value]
        for client in clients:
            assert client.reason == "error"
            assert "illegal memory access" in str(client.finish.error)
        until(lambda: not bench.stats().alive)
        stats = bench.stats()
        assert stats.running == stats.waiting == dict.fromkeys(NAMES, 0)
        assert (stats.batch, stats.kv_blocks_used) == ({}, 0)
        with pytest.raises(StoppedError, match="illegal memory access"):
            bench.ask()
        bench.engine.cancel(clients[0].request.id)
        bench.close(timeout=5.0)  # at once: nothing is left to wait for

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
    def test_a_client_that_raises(self, bench: Bench) -> None:
        """Its own request may end; the others and the engine must not suffer."""

        def fail(output: Output) -> None:
            raise KeyError("a bug of the caller's")

        with bench.hold() as hold:
            bench.ask([3], max_tokens=1)
            hold.inside()
            bad = bench.ask([9], "b", max_tokens=5, on_output=fail)
            good = [bench.ask(variant=v, max_tokens=8) for v in NAMES]
        assert bad.ended.wait(SECONDS)
        assert [c.reason for c in good] == ["length"] * 3
        assert [c.tokens for c in good] == [expected(v, [5, 6, 7], 8) for v in NAMES]
        assert bench.idle().alive

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
    def test_a_listener_that_raises(self, make: Callable[..., Bench]) -> None:
        bench = make(mode="resident")

        def fail(old: str, new: str, seconds: float) -> None:
            raise KeyError("a bug of the caller's")

        bench.engine.on_reconfigure(fail)
        bench.ask(max_tokens=2).ended.wait(SECONDS)
        assert bench.stats().alive


class TestClose:
    def test_nothing_is_taken_any_more(self, make: Callable[..., Bench]) -> None:
        bench = make()
        assert bench.ask(max_tokens=2).reason == "length"
        bench.close()
        with pytest.raises(StoppedError, match="stopping"):
            bench.ask()
        assert not bench.stats().alive
        bench.engine.close()
        bench.engine.cancel("r0")
        assert bench.closed == 1

    def test_what_runs_is_aborted(self, make: Callable[..., Bench]) -> None:
        bench = make(seqs=2)
        bench.model.before = lambda parts: time.sleep(0.002)
        clients = [bench.ask([5 + n]) for n in range(5)]
        clients[0].wait_for(2)
        bench.close()
        assert [c.reason for c in clients] == ["abort"] * 5
        assert clients[0].tokens == expected("a", [5], len(clients[0].tokens))

    def test_it_drains(self, make: Callable[..., Bench]) -> None:
        bench = make(seqs=2)
        with bench.hold():
            clients = [bench.ask([5 + n], max_tokens=6) for n in range(7)]
        bench.close(timeout=SECONDS)
        assert [c.reason for c in clients] == ["length"] * 7
        assert clients[6].tokens == expected("a", [11], 6)

    def test_it_drains_no_longer_than_that(self, make: Callable[..., Bench]) -> None:
        bench = make(seqs=1)
        bench.model.before = lambda parts: time.sleep(0.01)
        clients = [bench.ask([5], max_tokens=4), *(bench.ask([6 + n]) for n in range(3))]
        begin = time.monotonic()
        bench.close(timeout=0.15)
        assert 0.1 < time.monotonic() - begin < 2.0
        assert [c.reason for c in clients] == ["length", "abort", "abort", "abort"]

    def test_a_second_close_is_sooner(self, make: Callable[..., Bench]) -> None:
        bench = make()
        bench.model.before = lambda parts: time.sleep(0.01)
        client = bench.ask()
        thread = threading.Thread(target=bench.engine.close, args=(60.0,))
        thread.start()
        until(lambda: bench.engine._stopping)
        with pytest.raises(StoppedError):
            bench.ask([9])
        bench.close()
        thread.join(SECONDS)
        assert not thread.is_alive()
        assert client.reason == "abort"

    def test_timeouts_go_on_while_it_drains(self, make: Callable[..., Bench]) -> None:
        bench = make(seqs=1)
        bench.model.before = lambda parts: time.sleep(0.003)
        first, second = bench.ask(), bench.ask([8], timeout=0.03)
        bench.close(timeout=SECONDS)
        assert (first.reason, second.reason) == ("length", "timeout")

    def test_an_idle_engine_sleeps(self, bench: Bench) -> None:
        assert bench.ask(max_tokens=2).reason == "length"
        bench.idle()
        steps, begin = bench.stats().steps, time.process_time()
        time.sleep(0.2)
        assert bench.stats().steps == steps == 2
        assert time.process_time() - begin < 0.15


class TestStats:
    def test_at_the_start(self, bench: Bench) -> None:
        stats = bench.stats()
        zeros = dict.fromkeys(NAMES, 0)
        assert stats == Stats(
            mode="mixed",
            policy="grouped",
            batching="continuous",
            running=zeros,
            waiting=zeros,
            batch={},
            resident=dict.fromkeys(NAMES, True),
            kv_blocks_used=0,
            kv_blocks_total=200,
            memory={"experts": 1, "non_expert": 2, "kv": 3},
            prompt_tokens=zeros,
            generation_tokens=zeros,
            reconfigurations={},
            steps=0,
            alive=True,
        )

    def test_during_a_pass(self, make: Callable[..., Bench]) -> None:
        bench = make(seqs=2)
        with bench.hold() as hold:
            bench.ask([5] * 5, "a", max_tokens=1)
            hold.inside()
            bench.ask([5] * 6, "b", max_tokens=1)
            stats = bench.stats()
            assert stats.running == {"a": 1, "b": 0, "c": 0}
            assert stats.waiting == {"a": 0, "b": 1, "c": 0}
            assert stats.batch == {"a": 5, "b": 0, "c": 0}
            assert stats.kv_blocks_used == 2
            assert stats.prompt_tokens == {"a": 5, "b": 6, "c": 0}
            assert stats.steps == 0
        bench.idle()

    def test_sums(self, bench: Bench) -> None:
        asked = [(NAMES[n % 3], 1 + n, 2 + n % 4) for n in range(12)]
        with bench.hold():
            clients = [bench.ask([3 + n] * n, v, max_tokens=m) for v, n, m in asked]
        assert [c.reason for c in clients] == ["length"] * 12
        stats = bench.idle()
        prompts, answers = Counter[str](), Counter[str]()
        for v, n, m in asked:
            prompts[v] += n
            answers[v] += m
        assert stats.prompt_tokens == prompts
        assert stats.generation_tokens == answers
        assert stats.steps == len(bench.model.passes)

    def test_whoever_has_ended_is_not_running(self, bench: Bench) -> None:
        seen: list[Stats] = []

        def look(output: Output) -> None:
            if output.finish is not None:
                seen.append(bench.stats())

        assert bench.ask(max_tokens=3, on_output=look).reason == "length"
        assert bench.ask(id="x", timeout=0.0, on_output=look).reason == "timeout"
        bench.idle()
        assert [s.running["a"] + s.waiting["a"] for s in seen] == [0, 0]
        assert [s.kv_blocks_used for s in seen] == [0, 0]

    def test_from_an_output(self, bench: Bench) -> None:
        """Outputs may ask the engine anything: no lock is held."""
        inside: list[Client] = []

        def ask(output: Output) -> None:
            bench.stats()
            if output.finish is None and not inside:
                inside.append(bench.ask([8], "b", max_tokens=2))

        assert bench.ask(max_tokens=3, on_output=ask).reason == "length"
        assert inside[0].reason == "length"
        assert inside[0].tokens == expected("b", [8], 2)


class TestStatic:
    """Static batches: one variant, to the end."""

    def test_answers(self, make: Callable[..., Bench]) -> None:
        bench = make(StaticModel(), mode="resident")
        asked = [(v, [5 + n] * (n + 1), 2 + n % 5) for n, v in enumerate("aabbccaab")]
        with bench.hold():
            clients = [bench.ask(p, v, max_tokens=m, seed=1) for v, p, m in asked]
        for client, (v, p, m) in zip(clients, asked, strict=True):
            assert client.reason == "length"
            assert client.tokens == expected(v, p, m)
        stats = bench.idle()
        assert stats.batching == "static"
        assert (stats.kv_blocks_used, stats.kv_blocks_total) == (0, 0)
        assert stats.generation_tokens == {
            name: sum(m for v, _, m in asked if v == name) for name in NAMES
        }
        assert sum(count for _, count, _ in bench.model.batches) == 9

    def test_end_and_errors(self, make: Callable[..., Bench]) -> None:
        bench = make(StaticModel(), mode="resident")
        bench.model.nan = {9}
        answer = expected("a", [5], 8)
        with bench.hold() as hold:
            starter = bench.ask([4], max_tokens=1)
            hold.inside()
            bad = bench.ask([9], max_tokens=8)
            stopped = bench.ask([5], max_tokens=8, stop_token_ids=(answer[3],))
            whole = bench.ask([6], max_tokens=8)
        assert starter.reason == "length"
        assert (bad.reason, bad.tokens) == ("error", [])
        assert "not finite" in str(bad.finish.error)
        assert (stopped.reason, whole.reason) == ("stop", "length")
        assert stopped.tokens == answer[: answer.index(answer[3]) + 1]
        assert whole.tokens == expected("a", [6], 8)

    def test_cancel_and_timeout_inside(self, make: Callable[..., Bench]) -> None:
        bench = make(StaticModel(), mode="resident")

        def before(step: int) -> None:
            time.sleep(0.004)
            if step == 2:
                bench.engine.cancel("x")

        bench.model.before = before
        first = bench.ask([5], id="x")
        second, third = bench.ask([6], timeout=0.05), bench.ask([7], max_tokens=20)
        assert first.reason == "abort"
        assert len(first.tokens) <= 3
        assert second.reason == "timeout"
        assert second.tokens == expected("a", [6], len(second.tokens))
        assert third.reason == "length"
        assert third.tokens == expected("a", [7], 20)

    def test_timeout_of_one_that_waits(self, make: Callable[..., Bench]) -> None:
        """It must not take as long as the batch before it."""
        bench = make(StaticModel(), mode="resident", seqs=1)
        bench.model.before = lambda step: time.sleep(0.02)
        first = bench.ask([5], max_tokens=40)
        second = bench.ask([6], timeout=0.05)
        assert second.reason == "timeout"
        timing = second.finish.timing
        assert timing.finished is not None
        assert timing.finished - timing.arrived < 0.4
        assert first.reason == "length"

    def test_a_batch_that_raises(self, make: Callable[..., Bench]) -> None:
        bench = make(StaticModel(), mode="resident")

        def fail(step: int) -> None:
            if step == 3:
                bench.model.before = lambda step: None
                raise ValueError("no")

        bench.model.before = fail
        client = bench.ask([5])
        assert (client.reason, client.finish.error) == ("error", "ValueError: no")
        assert client.tokens == expected("a", [5], 3)
        assert bench.ask([5], max_tokens=5).reason == "length"

    def test_close_aborts_inside(self, make: Callable[..., Bench]) -> None:
        bench = make(StaticModel(), mode="resident", seqs=2)
        bench.model.before = lambda step: time.sleep(0.01)
        clients = [bench.ask([5 + n]) for n in range(4)]
        clients[0].wait_for(2)
        begin = time.monotonic()
        bench.close()
        assert time.monotonic() - begin < 0.3
        assert {c.reason for c in clients} <= {"abort", "timeout"}
        assert [c.reason for c in clients] == ["abort"] * 4


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "mixed", "blocks": 30},
        {"mode": "swap", "policy": "grouped", "blocks": 30, "patience": 0.002},
        {"mode": "resident", "policy": "fifo", "static": True},
    ],
    ids=["mixed", "swap", "static"],
)
def test_a_crowd(make: Callable[..., Bench], options: dict[str, Any]) -> None:
    """Eight threads submit, cancel and look at random; nothing is left, and answers are right."""
    options = dict(options)
    runner = StaticModel() if options.pop("static", False) else Model()
    bench = make(runner, seqs=5, batch_tokens=16, max_waiting=30, **options)
    end = time.monotonic() + 1.2
    wrong: list[str] = []
    lists: list[list[Client]] = [[] for _ in range(8)]

    def work(number: int) -> None:
        try:
            crowd(number)
        except BaseException as error:
            wrong.append(f"{type(error).__name__}: {error}")

    def crowd(number: int) -> None:
        rng = random.Random(number)
        mine = lists[number]
        while time.monotonic() < end:
            prompt = tuple(rng.randrange(3, VOCAB) for _ in range(rng.randint(1, 20)))
            sampling = Sampling(
                max_tokens=rng.randint(1, LENGTH - 20),
                temperature=rng.choice([0.0, 1.0]),
                seed=rng.randrange(100),
            )
            client = Client(
                Request(
                    f"{number}-{len(mine)}",
                    rng.choice(NAMES),
                    prompt,
                    sampling,
                    rng.randint(-1, 1),
                    rng.choice([None, None, 0.0, 0.01, 0.2]),
                )
            )
            try:
                bench.engine.submit(client.request, client)
            except BusyError:
                time.sleep(0.002)
                continue
            mine.append(client)
            if rng.random() < 0.4:
                time.sleep(rng.random() * 0.01)
                bench.engine.cancel(rng.choice(mine).request.id)
            stats = bench.stats()
            used, total = stats.kv_blocks_used, stats.kv_blocks_total
            if not (0 <= used <= total and sum(stats.running.values()) <= 5 and stats.alive):
                wrong.append(str(stats))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert wrong == []
    bench.clients += [c for found in lists for c in found]
    reasons: Counter[str] = Counter()
    generated: Counter[str] = Counter()
    for client in bench.clients:
        request, sampling = client.request, client.request.sampling
        reasons[client.reason] += 1
        generated[request.variant] += len(client.tokens)
        assert client.wrong == []
        if client.reason == "length":
            assert len(client.tokens) == sampling.max_tokens
    for client in bench.clients[::7]:
        request, sampling = client.request, client.request.sampling
        more = {"temperature": sampling.temperature, "seed": sampling.seed}
        count = len(client.tokens)
        assert client.tokens == expected(request.variant, request.prompt, count, **more)
    stats = bench.idle()
    assert stats.generation_tokens == {name: generated[name] for name in NAMES}
    assert reasons.keys() <= {"length", "abort", "timeout"}
    assert reasons["length"] > 5
    assert reasons["abort"] > 5
