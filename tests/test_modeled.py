"""Passes of transformers' layers on rows that are data: what they give, and when they are not used.

What a row that is none does to others is the same of our own layers, and is held here for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import served
import tiny
import torch
from served import VARIANTS, Built, Passes
from torch import Tensor

from moecc.artifact import Artifact
from moecc.kernels import attention
from moecc.kernels.attention import FEW_ROWS
from moecc.runtime import experts, loading, opening, step
from moecc.runtime.attention import KVCache
from moecc.runtime.decoder import Decoder, Tokens, recognized
from moecc.runtime.fused import FusedRunner
from moecc.runtime.modeled import Modeled
from moecc.runtime.opening import open_engine
from moecc.runtime.options import Options
from moecc.runtime.paged import PagedRunner, Part
from moecc.runtime.residency import Mixed

BLOCK, BLOCKS = 4, 256
CPU = torch.device("cpu")
OURS = ("mixtral", "qwen3-moe", "olmoe")
OTHERS = sorted(set(served.DECODERS) - {*OURS, "qwen3-moe-tied"})
WINDOWS = ("gpt-oss-window", "phimoe-window", "qwen2-moe-window")
_LAYERS = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ROPES = {
    kind: {"rope_type": "default", "rope_theta": theta}
    for kind, theta in (("full_attention", 1e4), ("sliding_attention", 1e3))
}
# In windows and ropes; in that the first have no experts.
DIFFERENT: dict[str, tuple[str, dict[str, Any]]] = {
    "mellum": (
        "MellumForCausalLM",
        _LAYERS
        | {"num_experts": 4, "sliding_window": 6, "rope_parameters": _ROPES}
        | {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
    ),
    "glm4-moe": (
        "Glm4MoeForCausalLM",
        _LAYERS
        | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 3}
        | {"n_group": 2, "topk_group": 1},
    ),
}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _kernels_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "on_gpu", lambda _: True)


class Made:
    """The forward of an artifact that graphs would hold, in float32, and runners of it."""

    def __init__(self, artifact: Path) -> None:
        with Artifact(artifact) as opened:
            made = loading.skeletons(opened, "float32")
            layers = loading.load_experts(made, CPU, lambda *_: None)
            kernels = loading.use_kernels(made, layers, CPU)
            assert kernels is not None
            rows = torch.empty(len(opened.variants), made.layout.nbytes, dtype=torch.uint8)
            loading.load_rows(made, layers, rows, lambda *_: None)
        self._residency = Mixed(made, rows)
        self.embeddings = made.layout.stacked(rows)["model.embed_tokens.weight"]
        self._seen = KVCache(1, BLOCK)
        PagedRunner(self._residency, self._seen, CPU).run([Part(0, [4], 0, [0], False)])
        self.forward: Decoder | Modeled
        if recognized(made.models[0]):
            self.forward = Decoder(made, kernels, rows, len(rows))
        else:
            self.forward = Modeled(made.models[0], len(rows))

    def runner(self, held: float = 0.0) -> tuple[FusedRunner, KVCache]:
        """`held` is all that the cache has at first."""
        cache = self._seen.resized(BLOCKS)
        for layer in cache.windows:
            for pool in cache.tensors(layer):
                pool.fill_(held)
        runner = FusedRunner(
            self.forward,
            self._residency,
            cache,
            CPU,
            max_seqs=8,
            max_rows=2 * FEW_ROWS,
            max_blocks=BLOCKS,
        )
        return runner, cache


def assert_near(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Every value, as a share of the largest."""
    scale = float(wanted.abs().max())
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("family", [*OTHERS, *WINDOWS])
@torch.inference_mode()
def test_long_passes(family: str, built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more rows than graphs have: all variants read on in tiles, one of them a single token."""
    artifact = built.artifact(family)
    tiled: list[int] = []
    prefill = attention.prefill

    def spied(q: Tensor, *arguments: Any, **options: Any) -> Tensor:
        tiled.append(len(q))
        return prefill(q, *arguments, **options)

    monkeypatch.setattr(attention, "prefill", spied)
    reads = ((150, 120), (90, 1), (50, 170))
    prompts = [served.prompt(sum(counts), seed) for seed, counts in enumerate(reads)]
    blocks = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(0)).view(4, -1).tolist()
    blocks[0] += blocks.pop()  # the longest has 68
    runner, _ = Made(artifact).runner(torch.nan)
    found = []
    for number in range(2):
        parts = []
        for v, counts in enumerate(reads):
            start = sum(counts[:number])
            tokens = prompts[v][start : start + counts[number]]
            parts.append(Part(v, tokens, start, blocks[v], True))
        found.append(runner.run(parts).clone())
    assert set(tiled) == {290, 291}
    reference = built.reference(artifact, "float32")
    for v, counts in enumerate(reads):
        wanted = reference.model(VARIANTS[v])(torch.tensor([prompts[v]])).logits[0]
        wanted = wanted[[counts[0] - 1, sum(counts) - 1]]
        assert_near(torch.stack([logits[v] for logits in found]), wanted, 1e-5)


def test_long_prompts(built: Built, passes: Passes) -> None:
    """Through the engine."""
    artifact = built.artifact("gpt-oss-window")
    first = [served.request("first", "b", served.prompt(3, 0), 8)]
    second = [
        served.request(f"{v} {i}", v, served.prompt(57 + i, i), 4) for v in VARIANTS for i in (0, 1)
    ]
    options: dict[str, Any] = {"max_num_seqs": 8, "max_batch_tokens": 2 * FEW_ROWS}
    with served.serving(artifact, mode="mixed", dtype="float32", **options) as engine:
        passes.clear()
        found = served.ask(engine, first, second)
    assert passes.fused == len(passes.parts) > 0
    assert passes.most_tokens > FEW_ROWS
    reference = built.reference(artifact, "float32")
    served.assert_same([*first, *second], found, reference, 0.98)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("held", [torch.nan, 7.0])
@pytest.mark.parametrize("family", [*OURS, *OTHERS, *WINDOWS])
@torch.inference_mode()
def test_rows_that_are_none(family: str, held: float, built: Built) -> None:
    """They compute with NaN, which reaches nobody, and leave the cache as it is."""
    made = Made(built.artifact(family))
    made.embeddings[0, 0] = torch.nan  # their token, and the variant that stands in for theirs
    (plain, wanted_cache), (padded, cache) = made.runner(), made.runner(held)
    prompts = [served.prompt(9, v) for v in range(3)]
    blocks = [[9 + v, 2 + v, 20 + v] for v in range(3)]  # neither the first nor the last
    for start, stop, size in ((0, 7, 32), (7, 8, 16), (8, 9, 4)):
        parts = [Part(v, prompts[v][start:stop], start, blocks[v], True) for v in range(3)]
        filled = padded._fill(parts, size)
        assert int((filled.variants < 0).sum()) == size - 3 * (stop - start) > 0
        found, wanted = padded._compute(filled)[:3], plain.run(parts)
        assert_near(found[:, 1:], wanted[:, 1:], 1e-6)  # a tied head has their token, too
    slots = torch.tensor([BLOCK * own[i // BLOCK] + i % BLOCK for own in blocks for i in range(9)])
    others = torch.ones(BLOCK * BLOCKS, dtype=torch.bool)
    others[slots] = False
    for layer in cache.windows:
        for pool, expected in zip(cache.tensors(layer), wanted_cache.tensors(layer), strict=True):
            left = pool[others]
            torch.testing.assert_close(left, torch.full_like(left, held), equal_nan=True)
            assert_near(pool[slots], expected[slots], 1e-6)


@pytest.mark.parametrize("family", [*OTHERS, *WINDOWS])
@torch.inference_mode()
def test_a_mix_does_not_change_a_row(family: str, built: Built) -> None:
    """Beside other variants, in no order, or on its own."""
    made = Made(built.artifact(family))
    prompts = [served.prompt(9, seed) for seed in range(2)]
    mix = [(2, 0), (0, 1), (1, 0), (0, 0), (2, 1), (1, 1)]  # variants, and which they read

    def logits(sequences: Sequence[tuple[int, int]]) -> Tensor:
        """After a prompt, and after one more token, [n, 2, vocab]."""
        runner, _ = made.runner()
        found = []
        for start, stop in ((0, 8), (8, 9)):
            parts = [
                Part(variant, prompts[p][start:stop], start, [3 * i + 1, 3 * i, 3 * i + 2], True)
                for i, (variant, p) in enumerate(sequences)
            ]
            found.append(runner.run(parts).clone())
        return torch.stack(found, 1)

    together = logits(mix)
    assert_near(together, torch.cat([logits([one]) for one in mix]), 1e-6)
    apart = [
        float((together[i] - together[j]).abs().amax(-1).min())
        for i, j in ((0, 2), (0, 3), (2, 3), (1, 4), (1, 5), (4, 5))
    ]
    assert min(apart) > 0.1  # of variants that read the same


class Larger(Modeled):
    def __call__(self, tokens: Tokens, cache: KVCache) -> Tensor:
        return super().__call__(tokens, cache) * 1.2


class OneLarger(Modeled):
    """The last variant's logits."""

    def __call__(self, tokens: Tokens, cache: KVCache) -> Tensor:
        last = tokens.variants[tokens.outputs] == len(VARIANTS) - 1
        return super().__call__(tokens, cache) * torch.where(last, 1.2, 1.0)[:, None]


class NotFinite(Modeled):
    def __call__(self, tokens: Tokens, cache: KVCache) -> Tensor:
        return super().__call__(tokens, cache) * torch.nan


class Raises(Modeled):
    def __call__(self, tokens: Tokens, cache: KVCache) -> Tensor:
        raise RuntimeError("no such layer\nin many lines")


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (Larger, "differ from transformers' by 0.2, and are not used"),
        (OneLarger, "differ from transformers' by 0.2, and are not used"),
        (NotFinite, "differ from transformers' by nan, and are not used"),
        (Raises, "do not run here, and are not used: no such layer"),
    ],
)
@pytest.mark.parametrize("family", ["gpt-oss", "qwen2-moe"])
def test_graphs_that_are_not_used(
    family: str,
    other: type[Modeled],
    why: str,
    built: Built,
    passes: Passes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(opening, "Modeled", other)
    assert served.check_refused(built, passes, family, "mixed") == f"graphs of its layers {why}"


@pytest.mark.parametrize("family", DIFFERENT)
def test_layers_that_differ(
    family: str, built: Built, passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tiny.FAMILIES, family, DIFFERENT[family])
    monkeypatch.setitem(served.CASES, family, served.Case(family))
    served.check_tokens(built, passes, family, "mixed", "float32")
    assert passes.fused == len(passes.parts)


def test_experts_of_later_layers_are_tried(
    built: Built, passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that are data read other experts than theirs, in the only layer that has any."""
    monkeypatch.setitem(tiny.FAMILIES, "glm4-moe", DIFFERENT["glm4-moe"])
    monkeypatch.setitem(served.CASES, "glm4-moe", served.Case("glm4-moe"))
    physical = experts._physical

    def wrong(module: Any, logical: Tensor) -> Tensor:
        found, running = physical(module, logical), step.current()
        if running is not None and isinstance(running.tokens, step.Drawn):
            found = torch.where(found < 0, found, (found + 1) % 4)
        return found

    monkeypatch.setattr(experts, "_physical", wrong)
    notes: list[str] = []
    options = Options(mode="mixed", dtype="float32")
    engine = open_engine(built.artifact("glm4-moe"), options, note=notes.append)
    try:
        assert isinstance(engine._runner, PagedRunner)
    finally:
        engine.close()
    assert len(notes) == 1
    assert notes[0].startswith("graphs of its layers differ from transformers' by 0.")


def test_a_kernel_that_breaks(
    built: Built, passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a pass, of a model that is tried without its last layer."""

    def fail(*arguments: Any, **options: Any) -> Tensor:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(attention, "attend", fail)
    note = "graphs of its layers do not run here, and are not used: no such kernel"
    assert served.check_refused(built, passes, "ernie4.5-moe", "mixed") == note


def test_rows_that_stand_more_than_once() -> None:
    rows = step.Drawn(torch.tensor([2, -1, 0], dtype=torch.int32), 3).repeated(2)
    assert (rows.count, rows.variant_count) == (6, 3)
    assert rows.given.tolist() == rows.for_kernels.variants.tolist() == [2, 2, -1, -1, 0, 0]
    assert rows.variants.tolist() == [2, 2, 0, 0, 0, 0]
