"""Kernels that begin while the one before them ends: programmatic dependent launch.

A kernel launched with `overlap` may begin as soon as all programs of the kernel before it have
called `let_next_begin`, or ended. Every program calls `wait` once, whatever it goes on to do: then
all kernels before are done, and what they wrote is there. Before it only weights are read, and what
is settled: written before the last kernel that waited before it let the next begin, or before the
last that is not of ours. Nothing is written before it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moecc.kernels.device import INTERPRETED

_LEAST_CAPABILITY = (9, 0)


def overlap(device: torch.device) -> dict[str, Any]:
    """Arguments of a launch whose kernel has the parameter OVERLAP."""
    if INTERPRETED:
        return {"OVERLAP": False}
    able = can_overlap(device)
    return {"OVERLAP": able, "launch_pdl": able}


@cache
def can_overlap(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY


@cache
def counters(device: torch.device, count: int) -> Tensor:
    """Counters, int32 [count], that every launch finds and leaves at zero.

    Launches must not overlap between their `wait` and their end: all are of one stream, or of
    graphs replayed on it. What is made while a graph is captured is not zero before its replay:
    call once before.
    """
    return torch.zeros(count, dtype=torch.int32, device=device)


@triton.jit
def let_next_begin(OVERLAP: tl.constexpr):
    if OVERLAP:
        gdc_launch_dependents()


@triton.jit
def wait(OVERLAP: tl.constexpr):
    if OVERLAP:
        gdc_wait()


@triton.jit
def refresh(OVERLAP: tl.constexpr):
    """For kernels that read, before they wait, what kernels have written that are done, since the
    last that is not of ours: none of it is taken from a cache that may hold what was there before.
    """
    if OVERLAP:
        tl.inline_asm_elementwise(
            "fence.acq_rel.gpu; // dummy $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def begin(OVERLAP: tl.constexpr):
    """For kernels that read nothing early."""
    let_next_begin(OVERLAP)
    wait(OVERLAP)
