"""Where kernels run."""

from __future__ import annotations

from collections.abc import Iterator

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
        self.programs = {"gcc"}
        patch.setattr(device, "INTERPRETED", False)
        patch.setattr(device, "find_spec", lambda name: object() if self.triton else None)
        patch.setattr(device, "which", lambda name: name if name in self.programs else None)
        patch.setattr(torch.cuda, "get_device_capability", lambda index: self.capability)
        patch.delenv("CC", raising=False)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    device._is_capable.cache_clear()
    yield Machine(monkeypatch)
    device._is_capable.cache_clear()


def test_a_gpu_has_kernels(machine: Machine) -> None:
    assert has_kernels(CUDA)
    assert not has_kernels(CPU)


@pytest.mark.parametrize(("capability", "capable"), [((7, 5), False), ((8, 0), True)])
def test_capability(machine: Machine, capability: tuple[int, int], capable: bool) -> None:
    machine.capability = capability
    assert has_kernels(CUDA) == capable


def test_without_triton(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.triton = False
    assert not has_kernels(CUDA)
    monkeypatch.setattr(device, "INTERPRETED", True)
    assert not has_kernels(CPU)


@pytest.mark.parametrize(
    ("programs", "named", "has"),
    [
        ({"gcc"}, None, True),
        ({"clang"}, None, True),
        (set(), None, False),
        ({"cc"}, None, False),  # Triton does not look for it
        ({"mycc"}, None, False),
        ({"mycc"}, "mycc", True),
        ({"gcc"}, "mycc", False),
    ],
)
def test_compiler(
    machine: Machine,
    programs: set[str],
    named: str | None,
    has: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Triton builds its launchers with `CC`, or with what it finds."""
    machine.programs = programs
    if named is not None:
        monkeypatch.setenv("CC", named)
    assert has_kernels(CUDA) == has


def test_interpreter(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "INTERPRETED", True)
    machine.programs = set()
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
