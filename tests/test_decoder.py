"""Our own decoder layers against transformers: on the CPU, by the references of the kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import served
import torch
from served import DTYPES, MODES, Built, Passes

from moecc.runtime import fused, loading

FAMILIES = ("mixtral", "qwen3-moe", "olmoe")
every_mode = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(autouse=True)
def _kernels_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "on_gpu", lambda _: True)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@every_mode
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens(family: str, dtype: str, mode: str, built: Built, passes: Passes) -> None:
    served.check_tokens(built, passes, family, mode, dtype, "cpu")
    assert passes.fused == len(passes.parts) > 0


@every_mode
@pytest.mark.parametrize(
    "name", ["mixtral-window", "mixtral-lossless", "mixtral-ropes", "qwen3-moe-tied"]
)
def test_special(name: str, mode: str, built: Built, passes: Passes) -> None:
    served.check_tokens(built, passes, name, mode, "float32", "cpu")
    assert passes.fused == len(passes.parts) > 0


@pytest.mark.parametrize("policy", ["fifo", "grouped"])
@pytest.mark.parametrize("mode", ["resident", "swap"])
def test_alternating(policy: str, mode: str, built: Built, passes: Passes) -> None:
    served.check_alternating(built, passes, "qwen3-moe", mode, policy, "cpu")


@every_mode
def test_preemption(mode: str, built: Built, passes: Passes) -> None:
    served.check_preemption(built, passes, "mixtral", mode, "cpu")


@every_mode
def test_long_passes(
    mode: str, built: Built, passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts are read in tiles."""
    monkeypatch.setattr(fused, "SIZES", (4,))
    served.check_tokens(built, passes, "mixtral", mode, "float32", "cpu")


OTHERS = sorted(set(served.DECODERS) - {*FAMILIES, "qwen3-moe-tied"})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", [*OTHERS, "gpt-oss-window", "phimoe-window", "qwen2-moe-window"])
def test_other_families(family: str, dtype: str, built: Built, passes: Passes) -> None:
    """Their layers are transformers', run on rows that are data."""
    served.check_tokens(built, passes, family, "mixed", dtype, "cpu")
    assert passes.fused == len(passes.parts) > 0


@pytest.mark.parametrize("mode", ["resident", "swap"])
def test_other_families_alone(mode: str, built: Built, passes: Passes) -> None:
    """One variant's model runs as transformers has it, with our experts."""
    served.check_tokens(built, passes, "gpt-oss", mode, "float32", "cpu")
    assert passes.fused == 0


@pytest.mark.parametrize("family", ["jamba", "nemotron-h"])
def test_static(family: str, built: Built, passes: Passes) -> None:
    served.check_static(built, passes, family, "resident", "float32", "cpu")
