"""The device to serve from, its free memory, and host memory it can copy from at full speed."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moecc.errors import RuntimeUnfitError

STAGING_BYTES = 64 << 20


def resolve(gpu: int | None) -> torch.device:
    """GPU `gpu`, or the CPU for None; raises RuntimeUnfitError if there is no such GPU."""
    if gpu is None:
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if not 0 <= gpu < count:
        have = f"there {'is' if count == 1 else 'are'} {count}, numbered from 0" if count else ""
        raise RuntimeUnfitError(
            f"there is no GPU {gpu}" + (f": {have}" if have else ": torch sees none"),
            "give another `--gpu`, or `--cpu` to serve from the CPU",
        )
    return torch.device("cuda", gpu)


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Inside, a GPU is the one of this thread: kernels, events and graphs go there."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def free_bytes(device: torch.device) -> int:
    """Bytes that may still be allocated on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    return min(_available(), _cgroup_free())


def headroom(device: torch.device, utilization: float) -> int:
    """Bytes of a GPU that are to stay unused, when only a part of its memory is to be used."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 0
    _, total = torch.cuda.mem_get_info(device)
    return int((1 - utilization) * total)


def _available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except OSError:  # not Linux
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cgroup_free() -> int:
    """What a container's limit leaves; without one, more than any machine has."""
    try:
        folder = Path("/sys/fs/cgroup")
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        for line in (folder / "memory.stat").read_text().splitlines():
            key, value = line.split()
            if key in ("inactive_file", "active_file"):  # files kept in memory: given back at need
                used -= int(value)
        return 1 << 62 if limit == "max" else int(limit) - used
    except (OSError, ValueError):
        return 1 << 62


def pinned(rows: int, nbytes: int, device: torch.device) -> Tensor:
    """uint8 `[rows, nbytes]` of host memory, page-locked where `device` is a GPU.

    Registered, not allocated by torch, which would round gigabytes up to a power of two.
    """
    memory = torch.empty(rows, nbytes, dtype=torch.uint8)
    if device.type == "cuda" and memory.numel():
        with torch.cuda.device(device):
            status = _cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
        if int(status):
            raise RuntimeUnfitError(
                f"cannot lock {memory.nbytes >> 20} MiB of host memory for copies to the GPU",
                "free host memory or raise `ulimit -l`, or use `--mode resident`",
            )
    return memory


def trim(device: torch.device) -> None:
    """Gives the system back what malloc holds unused; on a GPU little of it is in use.

    Between the small things that stay, what a pass needed for a moment would stay as well: glibc
    gives back only the end of its heap by itself.
    """
    if device.type == "cpu":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def release(device: torch.device, memory: Tensor | None) -> None:
    """Unlocks what `pinned` locked, and gives back what torch holds of the device unused."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return
    if memory is not None and memory.numel():
        torch.cuda.synchronize(device)  # a row may be on its way
        _cudart().cudaHostUnregister(memory.data_ptr())
    gc.collect()  # modules refer to each other
    torch.cuda.empty_cache()


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
