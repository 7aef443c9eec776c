"""Serving on a GPU: answers as transformers gives them there, copies under load, memory.

Each process needs about 1 GB of the GPU, so that many may run side by side (`pytest -n 12`).
`MOE_DEVICE=cpu` runs the same tests where there is no GPU, to try the tests themselves.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import served
import torch
from served import DECODERS, DTYPES, MODES, SPECIAL, STATIC, Built, Passes

from moecc.runtime.fused import FusedRunner
from moecc.runtime.residency import Swap

DEVICE = os.environ.get("MOE_DEVICE", "cuda")
KV_BYTES = 8 << 20

pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU"
)
every_mode = pytest.mark.parametrize("mode", MODES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture(autouse=True, scope="module")
def _plain_arithmetic() -> Iterator[None]:
    """One thread, and float32 that is not TF32."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    yield
    for backend, value in zip(backends, before, strict=True):
        backend.allow_tf32 = value
    torch.set_num_threads(threads)


class TestAnswers:
    @every_mode
    @every_dtype
    @pytest.mark.parametrize("family", DECODERS)
    def test_decoder(
        self, family: str, dtype: str, mode: str, built: Built, passes: Passes
    ) -> None:
        served.check_tokens(built, passes, family, mode, dtype, DEVICE)

    @every_mode
    @pytest.mark.parametrize("name", SPECIAL)
    def test_special(self, name: str, mode: str, built: Built, passes: Passes) -> None:
        served.check_tokens(built, passes, name, mode, "float32", DEVICE)

    @pytest.mark.parametrize("mode", ["resident", "swap"])
    @every_dtype
    @pytest.mark.parametrize("family", STATIC)
    def test_static(self, family: str, dtype: str, mode: str, built: Built, passes: Passes) -> None:
        served.check_static(built, passes, family, mode, dtype, DEVICE)

    @every_mode
    @every_dtype
    def test_examples(self, dtype: str, mode: str, built: Built, quickstart: Path) -> None:
        served.check_examples(built, quickstart, mode, dtype, DEVICE)

    @every_dtype
    @pytest.mark.parametrize("family", DECODERS)
    def test_logits(self, family: str, dtype: str, built: Built) -> None:
        served.check_logits(built, family, dtype, DEVICE)

    @every_mode
    @pytest.mark.parametrize("name", ["mixtral", "gpt-oss-window"])
    def test_preemption(self, name: str, mode: str, built: Built, passes: Passes) -> None:
        served.check_preemption(built, passes, name, mode, DEVICE)


class TestAlternating:
    """Turns that pass at every chance, while the next variant's row is on its way."""

    @pytest.mark.parametrize("policy", ["fifo", "grouped"])
    @pytest.mark.parametrize("mode", ["resident", "swap"])
    @pytest.mark.parametrize("name", ["mixtral", "deepseek-v3", "gpt-oss"])
    def test_answers(self, name: str, mode: str, policy: str, built: Built, passes: Passes) -> None:
        served.check_alternating(built, passes, name, mode, policy, DEVICE)

    def test_prefetches(self, built: Built, passes: Passes) -> None:
        served.check_prefetches(built, passes, "mixtral", DEVICE)

    @pytest.mark.skipif(DEVICE == "cpu", reason="no page-locked memory on a CPU")
    def test_rows_are_page_locked_while_it_serves(
        self, quickstart: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hosts: list[torch.Tensor] = []
        make = Swap.__init__

        def spied(swap: Swap, skeletons: object, host: torch.Tensor, device: object) -> None:
            hosts.append(host)
            make(swap, skeletons, host, device)  # type: ignore[arg-type]

        monkeypatch.setattr(Swap, "__init__", spied)
        with served.serving(quickstart, DEVICE, mode="swap"):
            assert [host.is_pinned() for host in hosts] == [True]
        assert not hosts[0].is_pinned()


class TestMemory:
    """What `stats` and `close` say of memory is so."""

    @pytest.fixture
    def before(self) -> int:
        """Bytes on the device when nothing is served."""
        return served.allocated(DEVICE)

    @every_mode
    @every_dtype
    def test_by_kind(self, dtype: str, mode: str, quickstart: Path, before: int) -> None:
        options = {"mode": mode, "dtype": dtype, "kv_cache_bytes": KV_BYTES}
        with served.serving(quickstart, DEVICE, **options) as engine:
            memory = engine.stats().memory
            if isinstance(engine._runner, FusedRunner):
                # A graph keeps its logits, which of a model as small as this one are 3 MB in all.
                engine._runner.forget_graphs()
            host = engine._residency._host.nbytes if mode == "swap" else 0
            found = served.allocated(DEVICE) - before - (host if DEVICE == "cpu" else 0)
        assert set(memory) == {"experts", "non_expert", "kv"}
        assert min(memory.values()) > 0
        assert 0.9 * KV_BYTES <= memory["kv"] <= KV_BYTES
        assert found == pytest.approx(sum(memory.values()), rel=0.1)

    @every_mode
    def test_close_frees(self, mode: str, quickstart: Path, before: int) -> None:
        """Even while the engine itself is still referred to."""
        options = {"mode": mode, "dtype": "bfloat16", "kv_cache_bytes": KV_BYTES}
        with served.serving(quickstart, DEVICE, **options) as engine:
            requests = [served.request(v, v, served.prompt(20, 0), 8) for v in engine.variants]
            served.ask(engine, requests)
            total = sum(engine.stats().memory.values())
        assert served.allocated(DEVICE) - before < 0.02 * total
        assert engine.variants
