"""Serving held against transformers: artifacts, requests through an engine, what `generate` says.

The reference is the variant as `export.load_model` gives it, one prompt at a time through
`generate`, with transformers' own attention, experts and cache. Our arithmetic is the same but for
the order of sums, so a greedy token must be the same unless the two best logits are nearer to each
other than rounding moves them. How far that is, is measured for every token of every answer: the
reference reads the finished answer again in one pass, SHAKEN times, with the output of every module
off by up to half a unit in the last place, so that now and then another expert is chosen, too. The
noise of a token is the most by which its lead over the next best one is then another than the one
by which `generate` chose it. A token that leads by more than SAFETY times the noise is certain and
must be the same. One that is not may be another; then the rest of that answer is not compared.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import compile_recipe, write_recipe
from torch import Tensor

from moecc.artifact import Artifact
from moecc.export import load_model
from moecc.runtime import loading, step
from moecc.runtime.attention import KVCache
from moecc.runtime.engine import Engine
from moecc.runtime.fused import FusedRunner
from moecc.runtime.opening import PATIENCE, open_engine
from moecc.runtime.options import Options
from moecc.runtime.paged import PagedRunner, Part
from moecc.runtime.request import Output, Request, Sampling
from moecc.runtime.residency import Mixed, Resident, Swap
from moecc.runtime.static import StaticRunner

VARIANTS = ("a", "b", "c")
MODES = ("mixed", "resident", "swap")
DTYPES = ("float32", "bfloat16")
SHAKEN = 16
SAFETY = 2.0
VOCAB = 96  # of the tiny models
_TIMEOUT = 120.0  # seconds after which an answer is taken for lost


@dataclass(frozen=True)
class Case:
    """Three variants of a tiny model.

    `changes` go to the config of all of them, `each` to those of one after the other.
    """

    family: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    each: tuple[Mapping[str, Any], ...] = ({}, {}, {})
    lossless: bool = False


STATIC = ("jamba", "nemotron-h", "switch")
DECODERS = tuple(family for family in tiny.FAMILIES if family not in STATIC)
_WINDOW = {"sliding_window": 6}
# What a family can be besides what tiny.py makes of it.
SPECIAL = {
    "mixtral-window": Case("mixtral", _WINDOW),
    "phimoe-window": Case("phimoe", _WINDOW),
    "gpt-oss-window": Case("gpt-oss", _WINDOW),  # sliding and full attention by turns
    "qwen2-moe-window": Case(
        "qwen2-moe", _WINDOW | {"use_sliding_window": True, "max_window_layers": 1}
    ),
    "mixtral-lossless": Case("mixtral", lossless=True),
    "gpt-oss-lossless": Case("gpt-oss", lossless=True),
    "mixtral-ropes": Case(
        "mixtral",
        each=tuple(
            {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
            for theta in (1e6, 1e2, 1e4)
        ),
    ),
}
CASES = {family: Case(family) for family in tiny.FAMILIES} | SPECIAL


def build(folder: Path, name: str) -> Path:
    """The artifact of a case: some experts coded, some private."""
    case = CASES[name]
    sources = {
        variant: tiny.checkpoint(folder / variant, case.family, seed, **case.changes, **each)
        for seed, (variant, each) in enumerate(zip(VARIANTS, case.each, strict=True))
    }
    coded = {"merge": {"center": "4bit", "residual": "2bit", "group": 32}, "budget": "1.5x"}
    exact = {"merge": {"center": "16bit", "residual": "none"}, "budget": "3.0x"}
    recipe = write_recipe(folder / "r.yaml", sources, **(exact if case.lossless else coded))
    return compile_recipe(recipe, folder / "artifact")


class Built:
    """Artifacts and references, each made when it is first asked for."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self._factory = factory
        self._artifacts: dict[str, Path] = {}
        self._references: dict[tuple[Path, str, str], Reference] = {}

    def artifact(self, name: str) -> Path:
        if name not in self._artifacts:
            self._artifacts[name] = build(self._factory.mktemp(name), name)
        return self._artifacts[name]

    def reference(self, artifact: Path, dtype: str, device: str = "cpu") -> Reference:
        key = (artifact, dtype, device)
        if key not in self._references:
            self._references[key] = Reference(artifact, dtype, device)
        return self._references[key]


@dataclass(frozen=True)
class Expected:
    """What `generate` answers, and which of its tokens rounding cannot change."""

    tokens: tuple[int, ...]
    certain: tuple[bool, ...]


class Reference:
    """The variants of an artifact as transformers runs them."""

    def __init__(self, artifact: Path, dtype: str, device: str) -> None:
        self._artifact = artifact
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._device = device
        self._models: dict[str, Any] = {}
        self._answers: dict[tuple[str, tuple[int, ...], int], Expected] = {}

    def model(self, variant: str) -> Any:
        if variant not in self._models:
            with Artifact(self._artifact) as artifact:
                model = load_model(artifact, variant, dtype=self._dtype)
            self._models[variant] = model.to(self._device)
        return self._models[variant]

    def expected(self, request: Request) -> Expected:
        """The answer to a greedy request."""
        assert request.sampling.max_tokens is not None
        key = (request.variant, request.prompt, request.sampling.max_tokens)
        if key not in self._answers:
            self._answers[key] = self._answer(*key)
        return self._answers[key]

    @torch.inference_mode()
    def _answer(self, variant: str, prompt: tuple[int, ...], count: int) -> Expected:
        model = self.model(variant)
        ids = torch.tensor([prompt], device=self._device)
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        logits = torch.cat(made.logits).float()
        if model.config.is_encoder_decoder:
            tokens = made.sequences[0, 1:]
            inputs = {"input_ids": ids, "decoder_input_ids": made.sequences[:, :-1]}
        else:
            tokens = made.sequences[0, len(prompt) :]
            inputs = {"input_ids": made.sequences[:, :-1]}
        lead = _lead(logits, tokens)
        noise = (_lead(self.shaken(model, inputs)[:, -len(tokens) :], tokens) - lead).abs()
        certain = lead > SAFETY * noise.amax(dim=0)
        return Expected(tuple(tokens.tolist()), tuple(certain.tolist()))

    @torch.inference_mode()
    def logits(self, variant: str, prompt: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Of all positions, [n, vocab] in float32, and how far rounding moves them, [n]."""
        model = self.model(variant)
        inputs = {"input_ids": torch.tensor([prompt], device=self._device)}
        logits: Tensor = model(**inputs).logits[0].float()
        return logits, (self.shaken(model, inputs) - logits).abs().amax(dim=(0, 2))

    def shaken(self, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """Logits of SHAKEN passes with rounding errors, [SHAKEN, positions, vocab] in float32."""
        generator = torch.Generator(self._device).manual_seed(0)
        half = torch.finfo(self._dtype).eps / 2

        def shake(module: Any, args: Any, output: Any) -> Any:
            if not isinstance(output, Tensor) or not output.is_floating_point():
                return output
            noise = torch.rand(output.shape, generator=generator, device=output.device)
            return (output * (1 + (2 * noise - 1) * half)).to(output.dtype)

        with contextlib.ExitStack() as stack:
            for module in model.modules():
                stack.callback(module.register_forward_hook(shake).remove)
            repeated = {key: ids.repeat(SHAKEN, 1) for key, ids in inputs.items()}
            logits: Tensor = model(**repeated).logits.float()
        return logits


def _lead(logits: Tensor, tokens: Tensor) -> Tensor:
    """By how much each token's logit is above that of the best other one, [..., n]."""
    chosen = tokens.expand(logits.shape[:-1])[..., None]
    others = logits.scatter(-1, chosen, float("-inf")).amax(dim=-1)
    return logits.gather(-1, chosen)[..., 0] - others


@dataclass(frozen=True)
class Answer:
    tokens: tuple[int, ...]
    text: str
    reason: str
    error: str | None


def request(
    id: str, variant: str, prompt: Iterable[int], count: int, detokenize: bool = False
) -> Request:
    """A greedy one."""
    sampling = Sampling(max_tokens=count, temperature=0.0)
    return Request(id, variant, tuple(prompt), sampling, detokenize=detokenize)


def prompt(length: int, seed: int, vocab: int = VOCAB) -> tuple[int, ...]:
    """Random tokens that are none of the special ones."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return tuple(torch.randint(4, vocab, (length,), generator=generator).tolist())


def ask(engine: Engine, *waves: Sequence[Request]) -> dict[str, Answer]:
    """Answers by request; a wave arrives when all of the one before have their first token."""
    return _Asking(engine, waves).answers()


class _Asking:
    def __init__(self, engine: Engine, waves: Sequence[Sequence[Request]]) -> None:
        self._engine = engine
        self._waves = iter(waves)
        self._silent: set[str] = set()  # requests of the last wave without a token
        self._parts: dict[str, list[Output]] = {r.id: [] for wave in waves for r in wave}
        self._ended = 0
        self._error: Exception | None = None
        self._changed = threading.Condition()

    def answers(self) -> dict[str, Answer]:
        self._next_wave()
        with self._changed:
            over = self._changed.wait_for(
                lambda: self._error is not None or self._ended == len(self._parts), _TIMEOUT
            )
        if self._error is not None:
            raise self._error
        assert over, "some requests were not answered"
        return {id: self._answer(outputs) for id, outputs in self._parts.items()}

    def _next_wave(self) -> None:
        wave = next(self._waves, ())
        self._silent = {r.id for r in wave}
        for request in wave:
            self._engine.submit(request, partial(self._deliver, request.id))

    def _deliver(self, id: str, output: Output) -> None:
        """On the engine's thread, so that a wave arrives at the same step every time."""
        self._parts[id].append(output)
        waiting = bool(self._silent)
        self._silent.discard(id)
        try:
            if waiting and not self._silent:
                self._next_wave()
        except Exception as error:
            self._error = error
        with self._changed:
            self._ended += output.finish is not None
            self._changed.notify()

    def _answer(self, outputs: list[Output]) -> Answer:
        finish = outputs[-1].finish
        assert finish is not None
        tokens = tuple(token for output in outputs for token in output.tokens)
        return Answer(tokens, "".join(o.text for o in outputs), finish.reason, finish.error)


def assert_same(
    requests: Iterable[Request], found: Mapping[str, Answer], reference: Reference, share: float
) -> None:
    """Every answer is what `generate` gives, as far as rounding lets it be known.

    At least `share` of all tokens must have been certain, and compared.
    """
    compared = total = 0
    for asked in requests:
        expected, answer = reference.expected(asked), found[asked.id]
        assert answer.error is None, (asked.id, answer.error)
        total += len(expected.tokens)
        for i, (token, certain) in enumerate(zip(expected.tokens, expected.certain, strict=True)):
            same = answer.tokens[i : i + 1] == (token,)
            assert same or not certain, (asked.id, i, expected, answer)
            if not same:
                break
            compared += certain
        else:
            assert answer.tokens == expected.tokens, asked.id
            assert answer.reason == "stop" or len(answer.tokens) == asked.sampling.max_tokens
    assert compared >= share * total, f"only {compared} of {total} tokens were compared"


def traffic(variants: Sequence[str], lengths: Sequence[int], count: int) -> list[list[Request]]:
    """Waves of requests, each of every variant with prompts of other lengths."""
    return [
        [
            request(f"{wave} {i} {v}", v, prompt(length + 2 * i, i), count)
            for i, v in enumerate(variants)
        ]
        for wave, length in enumerate(lengths)
    ]


class Passes:
    """What the runners were given, pass by pass; an engine's first ones only try the family."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.parts: list[list[Part]] = []
        self.static: list[list[int]] = []  # lengths of the prompts of a batch
        paged, fused, static = PagedRunner.run, FusedRunner.run, StaticRunner.run
        self.fused = 0  # passes on rows that are data

        def run_paged(runner: Any, parts: Sequence[Part]) -> Any:
            self.parts.append(list(parts))
            return paged(runner, parts)

        def run_fused(runner: Any, parts: Sequence[Part]) -> Any:
            self.parts.append(list(parts))
            self.fused += 1
            return fused(runner, parts)

        def run_static(runner: Any, variant: int, prompts: Any, *others: Any) -> Any:
            self.static.append([len(p) for p in prompts])
            return static(runner, variant, prompts, *others)

        patch.setattr(PagedRunner, "run", run_paged)
        patch.setattr(FusedRunner, "run", run_fused)
        patch.setattr(StaticRunner, "run", run_static)

    def clear(self) -> None:
        self.parts.clear()
        self.static.clear()
        self.fused = 0

    @property
    def most_variants(self) -> int:
        """In one pass."""
        return max(len({p.variant for p in parts}) for parts in self.parts)

    @property
    def most_sequences(self) -> int:
        return max(map(len, self.parts))

    @property
    def most_tokens(self) -> int:
        return max(sum(len(p.tokens) for p in parts) for parts in self.parts)

    @property
    def chunks(self) -> int:
        """How many parts went on with a prompt that was begun in another pass."""
        return sum(p.context > 0 and len(p.tokens) > 1 for parts in self.parts for p in parts)

    @property
    def beginnings(self) -> int:
        """How many times a sequence was begun: more than there are if some were preempted."""
        return sum(p.context == 0 for parts in self.parts for p in parts)

    @property
    def turns(self) -> int:
        """How many times the variant of the pass changed."""
        variants = [parts[0].variant for parts in self.parts]
        return sum(a != b for a, b in itertools.pairwise(variants))


@contextlib.contextmanager
def serving(artifact: Path, device: str = "cpu", **options: Any) -> Iterator[Engine]:
    """An engine of the artifact on a device, closed at the end."""
    gpu = None if device == "cpu" else torch.device(device).index or 0
    engine = open_engine(artifact, Options(gpu=gpu, **options))
    try:
        yield engine
    finally:
        engine.close()


class Chunked:
    """The logits of prompts read in chunks, side by side, by a runner over scattered blocks."""

    BLOCK = 4

    def __init__(self, artifact: Path, mode: str, dtype: str, device: str = "cpu") -> None:
        place = torch.device(device)
        with Artifact(artifact) as opened:
            made = loading.skeletons(opened, dtype)
            layers = loading.load_experts(made, place, lambda *_: None)
            where = "cpu" if mode == "swap" else place
            rows = torch.empty(
                len(opened.variants), made.layout.nbytes, dtype=torch.uint8, device=where
            )
            loading.load_rows(made, layers, rows, lambda *_: None)
        self.variants = opened.variants
        self._mixed = mode == "mixed"
        residency: Any
        if mode == "swap":
            residency = Swap(made, rows, place)
        else:
            residency = (Mixed if self._mixed else Resident)(made, rows)
        self._runner = PagedRunner(residency, KVCache(256, self.BLOCK), place)

    def read(self, prompts: Sequence[tuple[int, ...]], chunks: Sequence[int]) -> list[Tensor]:
        """For every variant and prompt the float32 logits of the last token of each chunk.

        All variants read all prompts at the same time. The first of them begins a pass before the
        second and so on. `chunks` are the sizes of a prompt's chunks, over and over.
        """
        free = torch.randperm(256, generator=torch.Generator().manual_seed(0)).tolist()
        sequences = [(v, p) for v in range(len(self.variants)) for p in prompts]
        blocks = [[free.pop() for _ in range(0, len(p), self.BLOCK)] for _, p in sequences]
        done = [0] * len(sequences)
        found: list[list[Tensor]] = [[] for _ in sequences]
        for number in range(len(prompts) + max(map(len, prompts))):
            parts: dict[int, Part] = {}
            for i, (variant, tokens) in enumerate(sequences):
                age = number - i % len(prompts)
                if age >= 0 and done[i] < len(tokens):
                    size = chunks[age % len(chunks)]
                    part = tokens[done[i] : done[i] + size]
                    parts[i] = Part(variant, part, done[i], blocks[i], True)
                    done[i] += len(part)
            for group in self._groups(parts):
                logits = self._runner.run([parts[i] for i in group]).float()
                for i, row in zip(group, logits, strict=True):
                    found[i].append(row)
        assert done == [len(p) for _, p in sequences]
        return [torch.stack(rows) for rows in found]

    def _groups(self, parts: Mapping[int, Part]) -> list[list[int]]:
        """Which parts share a pass: all of them, or those of a variant."""
        if self._mixed:
            return [list(parts)] if parts else []
        variants = dict.fromkeys(p.variant for p in parts.values())
        return [[i for i, p in parts.items() if p.variant == v] for v in variants]


def ends(length: int, chunks: Sequence[int]) -> list[int]:
    """Positions of the last token of every chunk of a prompt."""
    found, done = [], 0
    while done < length:
        done = min(length, done + chunks[len(found) % len(chunks)])
        found.append(done - 1)
    return found


def allocated(device: str) -> int:
    """Bytes of tensors on a device: as torch counts them on a GPU, of Python's tensors else."""
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize(device)
        torch._C._cuda_clearCublasWorkspaces()
        return torch.cuda.memory_allocated(device)
    plain = (Tensor, torch.nn.Parameter)  # a Stacked has no storage
    tensors = [t for t in gc.get_objects() if type(t) in plain and t.device.type == "cpu"]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


# What the tests of a CPU and of a GPU have in common

# Of the tokens that must be certain, and the same; an uncertain one that differs ends an answer.
_SHARE = {"float32": 0.98, "bfloat16": 0.5}
_LENGTHS = (21, 3, 34)
_COUNT = 6


def check_tokens(
    built: Built, passes: Passes, name: str, mode: str, dtype: str, device: str = "cpu"
) -> None:
    """Three variants at once, prompts in chunks, more requests while others run."""
    artifact = built.artifact(name)
    waves = traffic(VARIANTS, _LENGTHS if dtype == "float32" else _LENGTHS[:2], _COUNT)
    options = {"mode": mode, "dtype": dtype, "max_num_seqs": 8, "max_batch_tokens": 16}
    with serving(artifact, device, **options) as engine:
        passes.clear()
        found = ask(engine, *waves)
        stats = engine.stats()
    requests = [r for wave in waves for r in wave]
    assert_same(requests, found, built.reference(artifact, dtype, device), _SHARE[dtype])
    assert (stats.mode, stats.batching, stats.alive) == (mode, "continuous", True)
    assert (stats.kv_blocks_used, stats.steps) == (0, len(passes.parts))
    assert stats.generation_tokens == {
        v: sum(len(found[r.id].tokens) for r in requests if r.variant == v) for v in VARIANTS
    }
    assert passes.chunks >= 3
    assert passes.most_tokens == 16
    assert passes.most_variants == (3 if mode == "mixed" else 1)
    assert passes.most_sequences > (3 if mode == "mixed" else 1)  # of two waves


def check_refused(built: Built, passes: Passes, name: str, mode: Any) -> str:
    """Passes on rows that are data are tried and then not used; what the engine notes of it."""
    artifact, notes = built.artifact(name), []
    engine = open_engine(artifact, Options(mode=mode, dtype="float32"), note=notes.append)
    try:
        assert passes.fused > 0  # they were tried
        assert step.current() is None
        assert isinstance(engine._runner, PagedRunner)
        passes.clear()
        requests = [request(v, v, prompt(9, i), 6) for i, v in enumerate(VARIANTS)]
        found = ask(engine, requests)
        assert engine.stats().mode == mode
    finally:
        engine.close()
    assert (passes.fused, len(passes.parts) > 0) == (0, True)
    assert_same(requests, found, built.reference(artifact, "float32"), _SHARE["float32"])
    (note,) = notes
    return note


def check_static(
    built: Built, passes: Passes, family: str, mode: str, dtype: str, device: str = "cpu"
) -> None:
    """Batches of one variant with prompts of unequal lengths, one after the other."""
    artifact = built.artifact(family)
    first, *others = traffic(VARIANTS, (9, 21, 3, 34), 6)
    waves = [first, [request for wave in others for request in wave]]
    with serving(artifact, device, mode=mode, dtype=dtype) as engine:
        passes.clear()
        found = ask(engine, *waves)
        stats = engine.stats()
    requests = [r for wave in waves for r in wave]
    assert_same(requests, found, built.reference(artifact, dtype, device), _SHARE[dtype])
    assert (stats.mode, stats.batching) == (mode, "static")
    assert sorted(map(sorted, passes.static[-3:])) == [[3, 21, 34], [5, 23, 36], [7, 25, 38]]


def check_logits(built: Built, name: str, dtype: str, device: str = "cpu") -> None:
    """Prompts in chunks, side by side over scattered blocks, against one pass of transformers.

    In float32 no logit differs by more than a 1e-5th of the largest. In bfloat16, where a router
    may choose another expert, none differs by more than SAFETY times what rounding does to the
    reference at that token, and at nine of ten tokens by no more than a 50th of the largest.
    The same holds between the modes.
    """
    artifact = built.artifact(name)
    reference = built.reference(artifact, dtype, device)
    prompts = [prompt(length, seed) for seed, length in enumerate((19, 1, 12))]
    chunks = (7, 1, 1, 5, 1)
    wanted, noise = [], []
    for variant in VARIANTS:
        for tokens in prompts:
            logits, moved = reference.logits(variant, tokens)
            at = ends(len(tokens), chunks)
            wanted.append(logits[at])
            noise.append(moved[at])
    scale = float(torch.cat(wanted).abs().max())
    allowed = torch.cat(noise) * SAFETY if dtype == "bfloat16" else torch.tensor(1e-5 * scale)
    seen = {"reference": torch.cat(wanted)}
    for mode in MODES:
        found = Chunked(artifact, mode, dtype, device).read(prompts, chunks)
        assert [len(f) for f in found] == [len(w) for w in wanted]
        seen[mode] = torch.cat(found)
    for one, other in itertools.combinations(seen, 2):
        off = (seen[one] - seen[other]).abs().amax(dim=-1)
        assert bool((off <= allowed).all()), (one, other, float((off / allowed).max()))
        assert float(off.quantile(0.9)) <= scale / 50, (one, other)


def check_preemption(
    built: Built, passes: Passes, name: str, mode: str, device: str = "cpu", dtype: str = "float32"
) -> None:
    """Four blocks of cache: who is preempted is computed again, and answers the same."""
    artifact = built.artifact(name)
    options = {"mode": mode, "dtype": dtype, "max_model_len": 64}
    with serving(artifact, device, **options) as engine:
        stats = engine.stats()
        block = stats.memory["kv"] // stats.kv_blocks_total
    waves = traffic(VARIANTS, (10, 13), 30)
    with serving(artifact, device, kv_cache_bytes=4 * block, **options) as engine:
        assert engine.stats().kv_blocks_total == 4
        passes.clear()
        found = ask(engine, *waves)
        assert engine.stats().kv_blocks_used == 0
    requests = [r for wave in waves for r in wave]
    assert_same(requests, found, built.reference(artifact, dtype, device), _SHARE[dtype])
    assert passes.beginnings > len(requests)


def check_alternating(
    built: Built,
    passes: Passes,
    name: str,
    mode: str,
    policy: str,
    device: str = "cpu",
    dtype: str = "float32",
) -> None:
    """Sequences of three variants whose turns pass at every chance, in the middle of answers."""
    artifact = built.artifact(name)
    waves = traffic(VARIANTS, (20, 5), 12)
    options = {"policy": policy, "dtype": dtype, "max_num_seqs": 16, "max_batch_tokens": 16}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PATIENCE, mode, 0.0)
        with serving(artifact, device, mode=mode, **options) as engine:
            passes.clear()
            found = ask(engine, *waves)
            stats = engine.stats()
    requests = [r for wave in waves for r in wave]
    assert_same(requests, found, built.reference(artifact, dtype, device), _SHARE[dtype])
    assert sum(stats.reconfigurations.values()) == 1 + passes.turns
    assert passes.turns >= (20 if policy == "grouped" else 5)


def check_prefetches(
    built: Built, passes: Passes, name: str, device: str = "cpu", dtype: str = "float32"
) -> None:
    """Most rows are there, or coming, before they are wanted."""
    wanted: list[bool] = []
    activate = Swap.activate

    def spied(swap: Swap, variant: int) -> object:
        wanted.append(swap.is_resident(variant))
        return activate(swap, variant)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Swap, "activate", spied)
        check_alternating(built, passes, name, "swap", "grouped", device, dtype)
    assert wanted.count(False) <= 3


def check_examples(
    built: Built, artifact: Path, mode: str, dtype: str, device: str = "cpu"
) -> None:
    """Trained models: their text, and prompts of words."""
    texts = ("def f(x):\n    return", "12 + 30 = " * 12)
    options = {"mode": mode, "dtype": dtype, "max_num_seqs": 8, "max_batch_tokens": 16}
    with serving(artifact, device, max_model_len=128, **options) as engine:
        tokenizers = {v: engine.tokenizer(v) for v in engine.variants}
        requests = [
            request(f"{v} {i}", v, tokenizers[v](text)["input_ids"], 16, detokenize=True)
            for i, text in enumerate(texts)
            for v in engine.variants
        ]
        found = ask(engine, requests[:3], requests[3:])
    assert max(len(r.prompt) for r in requests) > 32
    assert_same(requests, found, built.reference(artifact, dtype, device), _SHARE[dtype])
    for asked in requests:
        answer = found[asked.id]
        text = tokenizers[asked.variant].decode(answer.tokens, skip_special_tokens=True)
        assert answer.text == text
