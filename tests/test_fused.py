"""Passes of our own layers: what is laid out for them, which graph runs, and who gets them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import served
import tiny
import torch
from served import VARIANTS, Built, Passes
from torch import Tensor

from moecc.artifact import Artifact
from moecc.kernels.norm import Norm
from moecc.runtime import fused, loading, opening
from moecc.runtime.decoder import Decoder, Tokens, recognized
from moecc.runtime.engine import Variant
from moecc.runtime.fused import FusedRunner
from moecc.runtime.opening import open_engine
from moecc.runtime.options import Options
from moecc.runtime.paged import PagedRunner, Part

BLOCK = 4
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


class FakeDecoder:
    """Keeps what it is given; the logits of a row are ten times its number."""

    def __init__(self) -> None:
        self.passes: list[Tokens] = []

    def __call__(self, tokens: Tokens, cache: object) -> Tensor:
        copies = {f.name: getattr(tokens, f.name) for f in fields(Tokens)}
        copies |= {k: v.clone() for k, v in copies.items() if isinstance(v, Tensor)}
        self.passes.append(Tokens(**copies))
        return tokens.outputs[:, None] * 10.0


class FakeResidency:
    """Variant `v` is in row `v + 5`."""

    def __init__(self) -> None:
        self.active: list[int] = []

    def row(self, variant: int) -> int:
        return variant + 5

    def activate(self, variant: int) -> None:
        self.active.append(variant)


class Fakes:
    """A runner of at most 5 sequences of 6 blocks, and 40 rows."""

    def __init__(self, graphs: Sequence[int] = ()) -> None:
        self.decoder = FakeDecoder()
        self.residency = FakeResidency()
        self.replayed: list[int] = []
        cache: Any = SimpleNamespace(block_size=BLOCK)
        decoder: Any = self.decoder
        residency: Any = self.residency
        self.runner = FusedRunner(
            decoder, residency, cache, CPU, max_seqs=5, max_rows=40, max_blocks=6
        )
        for size in graphs:
            logits = torch.full((min(size, 5), 1), float(size))
            graph = fused._Graph(lambda size=size: self.replayed.append(size), logits)
            self.runner._graphs[size] = graph

    def filled(self, parts: Sequence[Part], size: int) -> Tokens:
        return self.runner._fill(parts, size)


def part(variant: int, count: int, context: int = 0, logits: bool = True) -> Part:
    """Of a sequence whose blocks are 3, 0, 7 and so on; its tokens are those from 20 on."""
    return Part(variant, range(20, 20 + count), context, [3, 0, 7, 1, 9, 2], logits)


class TestFill:
    def test_values(self) -> None:
        tokens = Fakes().filled([part(1, 1, 6), part(0, 3, 2, logits=False), part(2, 2)], 8)
        assert tokens.ids.tolist() == [20, 20, 21, 22, 20, 21, 0, 0]
        assert tokens.positions.tolist() == [6, 2, 3, 4, 0, 1, 0, 0]
        assert tokens.variants.tolist() == [6, 5, 5, 5, 7, 7, -1, -1]
        # Position 6 is the third of the second block, which is block 0.
        assert tokens.slots.tolist() == [2, 14, 15, 0, 12, 13, -1, -1]
        assert tokens.sequences.tolist() == [0, 1, 1, 1, 2, 2, 0, 0]
        assert tokens.lengths.tolist() == [7, 3, 4, 5, 1, 2, 0, 0]
        assert tokens.outputs.tolist() == [0, 5, 0, 0, 0]
        assert tokens.tables.shape == (5, 6)
        assert tokens.tables[:3].tolist() == [[3, 0, 7, 1, 9, 2]] * 3

    @pytest.mark.parametrize("size", [1, 3, 8, 40])
    def test_shapes(self, size: int) -> None:
        tokens = Fakes().filled([part(0, 1)], size)
        for name in ("ids", "positions", "variants", "slots", "sequences", "lengths"):
            field = getattr(tokens, name)
            assert (field.shape, field.dtype) == ((size,), torch.int32)
        assert tokens.outputs.shape == (min(size, 5),)
        assert tokens.tables.shape == (5, 6)

    def test_rows_of_no_token(self) -> None:
        """Whatever the last pass left there."""
        fakes = Fakes()
        fakes.filled([part(2, 20), part(1, 20)], 40)
        tokens = fakes.filled([], 40)
        assert (tokens.variants == -1).all()
        assert (tokens.slots == -1).all()
        for name in ("ids", "positions", "sequences", "lengths", "outputs"):
            assert not getattr(tokens, name).any()

    def test_a_shorter_table_hides_a_longer_one(self) -> None:
        fakes = Fakes()
        fakes.filled([part(0, 1, 20)], 2)
        short = Part(0, [1], 0, [5], True)
        tokens = fakes.filled([short], 2)
        assert (int(tokens.tables[0, 0]), tokens.lengths.tolist()) == (5, [1, 0])

    def test_sizes_have_places_of_their_own(self) -> None:
        """A graph's tokens are where they were when it was captured."""
        fakes = Fakes()
        first = fakes.filled([], 8)
        fakes.filled([part(1, 3)], 4)
        again = fakes.filled([part(1, 8)], 8)
        for field in fields(Tokens):
            if field.name != "spans":
                one, other = getattr(first, field.name), getattr(again, field.name)
                assert one.data_ptr() == other.data_ptr()
                assert torch.equal(one, other)

    def test_long_passes_have_spans(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fused, "SIZES", (1, 2, 4))
        fakes = Fakes()
        assert fakes.filled([part(0, 3)], 4).spans is None
        assert fakes.filled([part(0, 1, 3), part(1, 7)], 8).spans == [(0, 1, 0), (1, 8, 1)]


class TestRun:
    def test_launches(self) -> None:
        fakes = Fakes()
        logits = fakes.runner.run([part(3, 2), part(3, 4, logits=False), part(3, 1)])
        assert logits.tolist() == [[10.0], [60.0]]
        assert fakes.residency.active == [3]
        assert [len(tokens.ids) for tokens in fakes.decoder.passes] == [7]

    def test_no_logits_are_wanted(self) -> None:
        assert Fakes().runner.run([part(0, 3, logits=False)]).shape == (0, 1)

    def test_logits_of_as_many_sequences_as_there_may_be(self) -> None:
        logits = Fakes().runner.run([part(v, 2) for v in range(5)])
        assert logits[:, 0].tolist() == [10.0, 30.0, 50.0, 70.0, 90.0]

    @pytest.mark.parametrize(("count", "size"), [(1, 1), (2, 4), (3, 4), (4, 4), (5, 16), (16, 16)])
    def test_the_smallest_graph_that_fits(self, count: int, size: int) -> None:
        fakes = Fakes(graphs=(16, 4, 1))
        logits = fakes.runner.run([part(1, count)])
        assert (fakes.replayed, fakes.decoder.passes) == ([size], [])
        assert logits.tolist() == [[float(size)]]
        assert fakes.residency.active == [1]

    def test_longer_passes_are_launched(self) -> None:
        fakes = Fakes(graphs=(16, 4, 1))
        assert fakes.runner.run([part(1, 17)]).tolist() == [[160.0]]
        assert fakes.replayed == []
        assert len(fakes.decoder.passes[0].ids) == 17

    def test_kept_tokens(self) -> None:
        """A token below zero is one that the last pass chose."""
        fakes = Fakes()
        fakes.runner.keep(torch.tensor([30, 31, 32]))
        parts = [Part(0, [-3], 4, [0, 1], True), Part(0, [7, -1], 0, [2], True)]
        fakes.runner.run(parts)
        assert fakes.decoder.passes[0].ids.tolist() == [32, 7, 30]


class FakeCuda:
    """Stands in for what `capture` uses of torch.cuda.

    The capture number `breaks` breaks where it ends; like any that does, it leaves its own stream.
    """

    def __init__(self, patch: pytest.MonkeyPatch, breaks: int | None = None) -> None:
        self.stream = "before"
        self.captures = self.replays = 0
        self._breaks = breaks
        for name in ("current_stream", "set_stream", "graph", "empty_cache"):
            patch.setattr(torch.cuda, name, getattr(self, name))
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
        patch.setattr(torch.cuda, "synchronize", lambda: None)
        patch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=self.replay))

    def current_stream(self) -> str:
        return self.stream

    def set_stream(self, stream: str) -> None:
        self.stream = stream

    @contextmanager
    def graph(self, graph: object, *, pool: object, capture_error_mode: str) -> Iterator[None]:
        self.stream = "of the capture"
        self.captures += 1
        yield
        if self.captures == self._breaks:
            raise RuntimeError("operation failed due to a previous error\nin many lines")
        self.stream = "before"

    def empty_cache(self) -> None:
        if self._breaks is not None:
            raise RuntimeError("a capture is still running")

    def replay(self) -> None:
        self.replays += 1


class TestCapture:
    def test_graphs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The largest first; each is computed before it is captured, on rows that are none."""
        cuda, fakes = FakeCuda(monkeypatch), Fakes()
        progress: list[tuple[int, int]] = []
        fakes.runner.capture(lambda done, of: progress.append((done, of)))
        assert progress == [(done, 7) for done in range(1, 8)]
        sizes = [len(tokens.ids) for tokens in fakes.decoder.passes]
        assert sizes == [n for n in (32, 24, 16, 8, 4, 2, 1) for _ in range(2)]
        assert all((tokens.variants == -1).all() for tokens in fakes.decoder.passes)
        assert cuda.stream == "before"
        fakes.decoder.passes.clear()
        assert fakes.runner.run([part(0, 20)]).shape == (1, 1)
        assert (cuda.replays, fakes.decoder.passes) == (1, [])

    @pytest.mark.parametrize("within", [True, False])
    def test_one_that_breaks(self, within: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """In the pass, or where it ends: then the largest graphs are there already."""
        cuda, fakes = FakeCuda(monkeypatch, breaks=3), Fakes()
        forward = FakeDecoder.__call__

        def broken(decoder: FakeDecoder, tokens: Tokens, cache: object) -> Tensor:
            if within and cuda.captures == 3:
                raise RuntimeError("operation not permitted")
            return forward(decoder, tokens, cache)

        with monkeypatch.context() as patch:
            patch.setattr(FakeDecoder, "__call__", broken)
            with pytest.raises(RuntimeError, match="operation"):
                fakes.runner.capture(lambda done, of: None)
        assert cuda.stream == "before"
        assert list(fakes.runner._graphs) == [32, 24]
        fakes.runner.forget_graphs()
        fakes.decoder.passes.clear()
        for parts in ([part(3, 20)], [part(1, 1, 6), part(0, 3, 2, logits=False), part(2, 2)]):
            wanted = Fakes()
            assert torch.equal(fakes.runner.run(parts), wanted.runner.run(parts))
            found, (expected,) = fakes.decoder.passes.pop(), wanted.decoder.passes
            for name in ("ids", "positions", "variants", "slots", "sequences", "lengths"):
                assert torch.equal(getattr(found, name), getattr(expected, name))
        assert cuda.replays == 0


_DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}


class TestRecognized:
    @pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", "qwen3-moe-tied", "olmoe"])
    def test_families(self, family: str) -> None:
        assert recognized(tiny.model(family))

    @pytest.mark.parametrize(
        "family", sorted(set(tiny.FAMILIES) - {"mixtral", "qwen3-moe", "qwen3-moe-tied", "olmoe"})
    )
    def test_others(self, family: str) -> None:
        assert not recognized(tiny.model(family))

    @pytest.mark.parametrize(
        ("family", "changes"),
        [
            ("mixtral", {"hidden_act": "gelu"}),
            ("mixtral", {"sliding_window": 6}),
            ("qwen3-moe", {"norm_topk_prob": False}),
            ("qwen3-moe", {"attention_bias": True}),
            ("olmoe", {"norm_topk_prob": True}),
        ],
    )
    def test_changes_that_are_known(self, family: str, changes: dict[str, Any]) -> None:
        assert recognized(tiny.model(family, **changes))

    @pytest.mark.parametrize(
        ("family", "changes"),
        [
            ("mixtral", {"hidden_act": "tanh"}),
            ("olmoe", {"clip_qkv": 1.0}),
            ("qwen3-moe", {"rope_parameters": _DYNAMIC}),
            ("qwen3-moe", {"mlp_only_layers": [1]}),
        ],
    )
    def test_changes_that_are_not(self, family: str, changes: dict[str, Any]) -> None:
        assert not recognized(tiny.model(family, **changes))


class OtherNorm(Decoder):
    """Has an epsilon of its own."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._norm = Norm(self._norm.weight, 1.0)


class OtherWeights(Decoder):
    """Reads weights that are larger."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._head = self._head * 1.2


class OneOther(Decoder):
    """Reads larger weights of the last row: a variant's, where rows are."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._head = self._head.clone()
        self._head[-1] *= 1.2


class Raises(Decoder):
    def __call__(self, *arguments: Any) -> Tensor:
        raise RuntimeError("no such kernel\nin many lines")


class NotFinite(Decoder):
    def __call__(self, *arguments: Any) -> Tensor:
        return super().__call__(*arguments) * torch.nan


class SometimesNotFinite(Decoder):
    def __call__(self, tokens: Tokens, cache: Any) -> Tensor:
        found = super().__call__(tokens, cache)
        return found * torch.nan if len(tokens.ids) % 2 else found


@pytest.mark.parametrize("mode", served.MODES)
@pytest.mark.parametrize("other", [OtherNorm, OtherWeights, NotFinite, SometimesNotFinite])
def test_layers_that_differ_are_not_used(
    other: type[Decoder], mode: Any, built: Built, passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A note says so, and answers are right."""
    monkeypatch.setattr(loading, "on_gpu", lambda _: True)
    monkeypatch.setattr(opening, "Decoder", other)
    note = served.check_refused(built, passes, "mixtral", mode)
    assert note.startswith("our layers differ from transformers' by ")
    assert note.endswith(", and are not used")


@pytest.mark.parametrize(
    ("other", "note"),
    [
        (OneOther, "our layers differ from transformers' by 0.2, and are not used"),
        (Raises, "our layers do not run here, and are not used: no such kernel"),
    ],
)
def test_other_reasons(
    other: type[Decoder], note: str, built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "on_gpu", lambda _: True)
    monkeypatch.setattr(opening, "Decoder", other)
    notes: list[str] = []
    options = Options(mode="mixed", dtype="float32")
    engine = open_engine(built.artifact("mixtral"), options, note=notes.append)
    try:
        assert isinstance(engine._runner, PagedRunner)
    finally:
        engine.close()
    assert notes == [note]


def test_without_graphs(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they cannot be captured the server starts without, and says so."""

    def fail(runner: FusedRunner, on_progress: object) -> None:
        runner._graphs[1] = fused._Graph(lambda: None, torch.zeros(1, 1))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(FusedRunner, "capture", fail)
    notes: list[str] = []
    made = opening._Opening(
        Artifact(built.artifact("mixtral")),
        Options(),
        torch.device("cuda", 0),
        lambda *_: None,
        notes.append,
    )
    runner = FusedRunner.__new__(FusedRunner)
    runner._graphs = {}
    monkeypatch.setattr(opening, "FusedRunner", lambda *_, **__: runner)
    variant = Variant("a", None, frozenset(), served.VOCAB, 64)
    assert made._runner(object(), None, None, [variant]) is runner  # type: ignore[arg-type]
    assert runner._graphs == {}
    assert notes == ["no CUDA graphs, which is slower: CUDA out of memory"]


@pytest.mark.parametrize(("name", "launched"), [("mixtral", True), ("qwen2-moe", False)])
def test_a_capture_that_breaks(
    name: str, launched: bool, built: Built, passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our own layers are launched after; transformers' are run as they were before."""
    monkeypatch.setattr(loading, "on_gpu", lambda _: True)
    cuda = FakeCuda(monkeypatch, breaks=3)
    made = opening._Opening._runner

    def on_a_gpu(self: Any, *arguments: Any) -> Any:
        """But for where the runner's tensors are."""
        with monkeypatch.context() as patch:
            patch.setattr(self, "device", torch.device("cuda", 0))
            patch.setattr(opening, "PagedRunner", lambda r, c, _: PagedRunner(r, c, CPU))
            patch.setattr(
                opening,
                "FusedRunner",
                lambda d, r, c, _, **sizes: FusedRunner(d, r, c, CPU, **sizes),
            )
            return made(self, *arguments)

    monkeypatch.setattr(opening._Opening, "_runner", on_a_gpu)
    artifact = built.artifact(name)
    notes: list[str] = []
    options = Options(mode="mixed", dtype="float32", max_num_seqs=8, max_batch_tokens=16)
    engine = open_engine(artifact, options, note=notes.append)
    try:
        assert (cuda.captures, cuda.stream) == (3, "before")
        passes.clear()
        requests = [served.request(v, v, served.prompt(9, i), 6) for i, v in enumerate(VARIANTS)]
        found = served.ask(engine, requests)
    finally:
        engine.close()
    why = "operation failed due to a previous error"
    assert notes == [f"no CUDA graphs, which is slower: {why}"]
    assert passes.fused == (len(passes.parts) if launched else 0)
    assert cuda.replays == 0
    served.assert_same(requests, found, built.reference(artifact, "float32"), 0.98)


def test_layers_are_used_without_a_note(
    built: Built, passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "on_gpu", lambda _: True)
    notes: list[str] = []
    open_engine(built.artifact("mixtral"), Options(), note=notes.append).close()
    assert notes == []
    assert passes.fused > 0
