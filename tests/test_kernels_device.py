"""Where kernels run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from moecc.kernels import device
from moecc.kernels.device import has_kernels, on_gpu

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class Machine:
    """What a machine has, as far as the selection asks."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.triton = True
        self.capability = (9, 0)
        self.failure: Exception | None = None
        patch.setattr(device, "INTERPRETED", False)
        patch.setattr(device, "find_spec", lambda name: object() if self.triton else None)
        patch.setattr(torch.version, "cuda", "13.0")
        patch.setattr(torch.cuda, "get_device_capability", lambda index: self.capability)
        # Stands for the module with Triton's kernel, which may not be there to import.
        stand_in = ModuleType("moecc.kernels.gpu.device")
        stand_in.run = self._run  # type: ignore[attr-defined]
        patch.setitem(sys.modules, "moecc.kernels.gpu.device", stand_in)

    def _run(self, place: torch.device) -> None:
        assert place == CUDA
        if self.failure is not None:
            raise self.failure


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    device._is_capable.cache_clear()
    yield Machine(monkeypatch)
    device._is_capable.cache_clear()


def test_a_gpu_has_kernels(machine: Machine) -> None:
    assert has_kernels(CUDA)
    assert not has_kernels(CPU)


@pytest.mark.parametrize(
    ("capability", "capable"), [((7, 5), False), ((8, 0), True), ((8, 9), False), ((9, 0), True)]
)
def test_capability(machine: Machine, capability: tuple[int, int], capable: bool) -> None:
    machine.capability = capability
    assert has_kernels(CUDA) == capable


def test_without_triton(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.triton = False
    assert not has_kernels(CUDA)
    monkeypatch.setattr(device, "INTERPRETED", True)
    assert not has_kernels(CPU)


def test_kernels_that_do_not_run(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    """Without a C compiler, say: then plain torch serves, and the log has the reason."""
    machine.failure = RuntimeError("Failed to find C compiler")
    assert not has_kernels(CUDA)
    assert "Failed to find C compiler" in caplog.text


def test_other_makes(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert not has_kernels(CUDA)


def test_interpreter(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "INTERPRETED", True)
    assert has_kernels(CPU)
    assert on_gpu(torch.empty(0, dtype=torch.float16))


@pytest.mark.parametrize(
    ("dtype", "on"),
    [(torch.bfloat16, True), (torch.float16, True), (torch.float32, False), (torch.int32, False)],
)
def test_wide_activations_take_the_reference(
    dtype: torch.dtype, on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "has_kernels", lambda _: True)
    assert on_gpu(torch.empty(0, dtype=dtype)) == on
