"""Our own decoder layers on a GPU, in CUDA graphs, against transformers and against themselves.

Each process needs about 1 GB of the GPU, so that many may run side by side (`pytest -n 12`).
`MOE_DEVICE=cpu` runs the same tests where there is no GPU, to try the tests themselves: by the
kernels' references, with functions in place of graphs.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import served
import torch
from served import MODES, SAFETY, VARIANTS, Built, Passes
from torch import Tensor

from moecc.artifact import Artifact
from moecc.runtime import fused, loading
from moecc.runtime.attention import KVCache
from moecc.runtime.decoder import Decoder, Tokens
from moecc.runtime.fused import SIZES, FusedRunner
from moecc.runtime.paged import Part
from moecc.runtime.residency import Mixed, Swap

DEVICE = os.environ.get("MOE_DEVICE", "cuda")
PLACE = torch.device(DEVICE)
FAMILIES = ("mixtral", "qwen3-moe", "olmoe")
# phimoe copies its frequencies from the host in every pass: no graph can hold that.
OTHERS = sorted(set(served.DECODERS) - {*FAMILIES, "qwen3-moe-tied", "phimoe"})
ROWS, BLOCK = 64, 16

pytestmark = [
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("one_thread"),
]
every_family = pytest.mark.parametrize("family", FAMILIES)
every_mode = pytest.mark.parametrize("mode", MODES)
_compute = FusedRunner._compute


@pytest.fixture(autouse=True)
def _kernels_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setattr(loading, "on_gpu", lambda _: True)
        monkeypatch.setattr(FusedRunner, "capture", _stand_in)


def _stand_in(runner: FusedRunner, on_progress: object) -> None:
    """Functions that compute from the same memory as graphs would."""
    for size in (size for size in SIZES if size <= runner._max_rows):
        tokens = runner._fill([], size)
        logits = _compute(runner, tokens)

        @torch.inference_mode()
        def replay(tokens: Tokens = tokens, logits: Tensor = logits) -> None:
            logits.copy_(_compute(runner, tokens))

        runner._graphs[size] = fused._Graph(replay, logits)


class Launched:
    """Rows of the passes that a runner launched although it has graphs."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []
        self.captured: set[int] = set()  # runners
        capture, compute = FusedRunner.capture, FusedRunner._compute

        def captured(runner: FusedRunner, *arguments: Any) -> None:
            capture(runner, *arguments)
            self.captured.add(id(runner))

        def computed(runner: FusedRunner, tokens: Tokens) -> Tensor:
            if id(runner) in self.captured:
                self.rows.append(len(tokens.ids))
            return compute(runner, tokens)

        patch.setattr(FusedRunner, "capture", captured)
        patch.setattr(FusedRunner, "_compute", computed)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Launched:
    return Launched(monkeypatch)


class TestAnswers:
    """Through the engine; every pass is one of our own layers."""

    @every_mode
    @every_family
    def test_tokens(
        self, family: str, mode: str, built: Built, passes: Passes, launched: Launched
    ) -> None:
        served.check_tokens(built, passes, family, mode, "bfloat16", DEVICE)
        assert passes.fused == len(passes.parts) > 0
        assert len(launched.captured) == (DEVICE != "cpu")
        assert launched.rows == []

    @pytest.mark.parametrize("name", [*OTHERS, "gpt-oss-window", "qwen2-moe-window"])
    def test_other_families(
        self, name: str, built: Built, passes: Passes, launched: Launched
    ) -> None:
        """Transformers' layers in graphs."""
        served.check_tokens(built, passes, name, "mixed", "bfloat16", DEVICE)
        assert passes.fused == len(passes.parts) > 0
        assert len(launched.captured) == (DEVICE != "cpu")
        assert launched.rows == []

    @every_mode
    @pytest.mark.parametrize("name", ["mixtral-window", "mixtral-lossless"])
    def test_special(self, name: str, mode: str, built: Built, passes: Passes) -> None:
        served.check_tokens(built, passes, name, mode, "bfloat16", DEVICE)
        assert passes.fused == len(passes.parts) > 0

    @every_mode
    @every_family
    def test_long_passes(
        self,
        family: str,
        mode: str,
        built: Built,
        passes: Passes,
        launched: Launched,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Prompts are read in tiles, without a graph."""
        monkeypatch.setattr(fused, "SIZES", (1, 4))
        served.check_tokens(built, passes, family, mode, "bfloat16", DEVICE)
        assert passes.fused == len(passes.parts) > 0
        if DEVICE != "cpu":
            assert launched.rows
            assert min(launched.rows) > 4

    @every_mode
    def test_preemption(self, mode: str, built: Built, passes: Passes) -> None:
        served.check_preemption(built, passes, "mixtral", mode, DEVICE, "bfloat16")
        assert passes.fused == len(passes.parts) > 0

    @pytest.mark.parametrize("policy", ["fifo", "grouped"])
    @pytest.mark.parametrize("mode", ["resident", "swap"])
    @pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
    def test_alternating(
        self, family: str, mode: str, policy: str, built: Built, passes: Passes
    ) -> None:
        """Turns pass at every chance, while the next variant's row is on its way."""
        served.check_alternating(built, passes, family, mode, policy, DEVICE, "bfloat16")
        assert passes.fused == len(passes.parts) > 0

    def test_prefetches(self, built: Built, passes: Passes) -> None:
        served.check_prefetches(built, passes, "olmoe", DEVICE, "bfloat16")
        assert passes.fused == len(passes.parts) > 0


class Made:
    """The decoder of an artifact, and runners of it that share nothing else."""

    def __init__(self, artifact: Path, mode: str, dtype: str) -> None:
        with Artifact(artifact) as opened:
            made = loading.skeletons(opened, dtype)
            layers = loading.load_experts(made, PLACE, lambda *_: None)
            kernels = loading.use_kernels(made, layers, PLACE)
            assert kernels is not None
            where = "cpu" if mode == "swap" else PLACE
            size = len(opened.variants), made.layout.nbytes
            rows = torch.empty(size, dtype=torch.uint8, device=where)
            loading.load_rows(made, layers, rows, lambda *_: None)
        self.residency = Swap(made, rows, PLACE) if mode == "swap" else Mixed(made, rows)
        self.decoder = Decoder(made, kernels, self.residency.rows)

    def runner(self, graphs: bool) -> FusedRunner:
        cache = KVCache(256, BLOCK)
        found = FusedRunner(
            self.decoder,
            self.residency,
            cache,
            PLACE,
            max_seqs=16,
            max_rows=ROWS,
            max_blocks=8,
        )
        if graphs:
            found.capture(lambda done, of: None)
        return found


def row_errors(found: Tensor, wanted: Tensor) -> Tensor:
    found, wanted = found.double(), wanted.double()
    return (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)


class Traffic:
    """Sequences over scattered blocks; each pass goes on with some of them."""

    def __init__(self, count: int, mixed: bool) -> None:
        self._blocks = [random.sample(range(8 * i, 8 * i + 8), 4) for i in range(count)]
        self._variants = [random.randrange(3) for _ in range(count)]
        self._read = [0] * count
        self._mixed = mixed

    def parts(self, rows: int) -> list[Part]:
        """Of at most so many tokens, and of one variant unless they mix."""
        variant = random.randrange(3)
        found = []
        for i in random.sample(range(len(self._blocks)), len(self._blocks)):
            if not self._mixed and self._variants[i] != variant:
                continue
            left = 4 * BLOCK - self._read[i]
            count = min(rows, left, random.choice([1, 1, 1, random.randint(2, 12)]))
            if count > 0:
                tokens = [random.randrange(4, served.VOCAB) for _ in range(count)]
                wanted = random.random() < 0.8
                found.append(
                    Part(self._variants[i], tokens, self._read[i], self._blocks[i], wanted)
                )
                self._read[i] += count
                rows -= count
        return found


class TestGraphs:
    @pytest.mark.parametrize("mode", ["mixed", "swap"])
    @every_family
    @torch.inference_mode()
    def test_are_launches(self, family: str, mode: str, built: Built) -> None:
        """A replayed pass gives what the same pass gives launch by launch."""
        random.seed(0)
        made = Made(built.artifact(family), mode, "bfloat16")
        replayed, launched = made.runner(True), made.runner(False)
        traffic, seen = Traffic(12, mode == "mixed"), set()
        for _ in range(40):
            parts = traffic.parts(random.choice([1, 2, 5, 11, 30, ROWS]))
            if not parts:
                continue
            count = sum(len(part.tokens) for part in parts)
            size = min(size for size in SIZES if size >= count)
            wanted = sum(part.logits for part in parts)
            found = replayed.run(parts)
            made.residency.activate(parts[0].variant)
            expected = launched._compute(launched._fill(parts, size))[:wanted]
            assert found.shape == expected.shape == (wanted, served.VOCAB)
            if wanted:
                assert found.isfinite().all()
                assert float(row_errors(found, expected).max()) < 1e-2
            seen.add(size)
        assert len(seen) >= 4

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    @pytest.mark.parametrize("family", [*FAMILIES, "mixtral-ropes"])
    @torch.inference_mode()
    def test_any_mix_of_variants(self, family: str, dtype: str, built: Built) -> None:
        """One graph, whose rows are of other variants every time."""
        random.seed(0)
        artifact = built.artifact(family)
        reference = built.reference(artifact, dtype, DEVICE)
        prompts = [served.prompt(8, seed) for seed in range(3)]
        wanted, noise = _of_all(reference, prompts)
        runner = Made(artifact, "mixed", dtype).runner(True)
        allowed = (SAFETY * noise).clamp(min=float(wanted.abs().max()) / 50)
        for mix in ((0, 1, 2), (2, 0, 1), (1, 1, 0), (2, 2, 2), (0, 1, 2)):
            parts = [
                Part(variant, prompt, 0, [7 * i + 1], True)
                for i, (variant, prompt) in enumerate(zip(mix, prompts, strict=True))
            ]
            found = runner.run(parts).float()
            for i, variant in enumerate(mix):
                off = (found[i] - wanted[:, i]).abs().amax(-1)  # from every variant
                assert float(off[variant]) <= float(allowed[variant, i])
                assert int(off.argmin()) == variant

    @torch.inference_mode()
    def test_a_mix_does_not_change_a_row(self, built: Built) -> None:
        """Beside other variants, or its own."""
        made = Made(built.artifact("qwen3-moe"), "mixed", "bfloat16")
        runner = made.runner(True)
        prompts = [served.prompt(5, seed) for seed in range(6)]

        def logits(mix: Sequence[int]) -> Tensor:
            parts = [
                Part(v, p, 0, [i], True) for i, (v, p) in enumerate(zip(mix, prompts, strict=True))
            ]
            return runner.run(parts).clone()

        alone = [logits([variant] * 6) for variant in range(3)]
        for mix in ((0, 1, 2, 0, 1, 2), (2, 2, 0, 1, 0, 0)):
            found = logits(mix)
            expected = torch.stack([alone[v][i] for i, v in enumerate(mix)])
            assert float(row_errors(found, expected).max()) < 1e-2


def _of_all(reference: Any, prompts: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """The last logits of every variant and prompt, and how far rounding moves them."""
    logits, noise = [], []
    for variant in VARIANTS:
        found = [reference.logits(variant, prompt) for prompt in prompts]
        logits.append(torch.stack([values[-1] for values, _ in found]))
        noise.append(torch.stack([moved[-1] for _, moved in found]))
    return torch.stack(logits), torch.stack(noise)
