"""Where Triton kernels run; everywhere else their plain-torch references do."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from shutil import which

import torch
from torch import Tensor

# Triton's interpreter runs kernels on CPU tensors, to try them where there is no GPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_LEAST_CAPABILITY = (8, 0)  # matrix units for bfloat16


def on_gpu(x: Tensor) -> bool:
    """Whether kernels compute with an activation: 16 bits wide, where there are kernels.

    float32 keeps all its digits in the reference.
    """
    return x.dtype in (torch.bfloat16, torch.float16) and has_kernels(x.device)


def has_kernels(device: torch.device) -> bool:
    """Whether kernels run on a device: a GPU that has bfloat16, with Triton."""
    if find_spec("triton") is None:
        return False
    return INTERPRETED or (device.type == "cuda" and _is_capable(device.index))


@cache
def _is_capable(index: int) -> bool:
    return _has_compiler() and torch.cuda.get_device_capability(index) >= _LEAST_CAPABILITY


def _has_compiler() -> bool:
    """Whether Triton finds the C compiler that it builds its launchers with."""
    return any(which(os.environ.get("CC", name)) for name in ("gcc", "clang"))
