"""A kernel to see whether kernels run at all."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def run(device: torch.device) -> None:
    """Raises whatever goes wrong: Triton needs a C compiler and Python's headers, and a driver."""
    with torch.cuda.device(device):
        out = torch.zeros(1, dtype=torch.int32, device=device)
        _run[(1,)](out)
        torch.cuda.synchronize(device)


@triton.jit
def _run(out):
    tl.store(out, 1)
