"""Where Triton kernels run; everywhere else their plain-torch references do."""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

log = logging.getLogger(__name__)

# Triton's interpreter runs kernels on CPU tensors, to try them where there is no GPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_LEAST_CAPABILITY = (8, 0)  # matrix units for bfloat16
# A block has 99 KiB of shared memory there, and the tiles are those of data-center GPUs.
_TOO_SMALL = {(8, 6), (8, 9), (12, 0), (12, 1)}


def on_gpu(x: Tensor) -> bool:
    """Whether kernels compute with an activation: 16 bits wide, where there are kernels.

    float32 keeps all its digits in the reference.
    """
    return x.dtype in (torch.bfloat16, torch.float16) and has_kernels(x.device)


def has_kernels(device: torch.device) -> bool:
    """Whether kernels run on a device: an A100, H100 or the like, with Triton."""
    if find_spec("triton") is None:
        return False
    return INTERPRETED or (device.type == "cuda" and _is_capable(device.index))


@cache
def _is_capable(index: int) -> bool:
    if torch.version.cuda is None:
        return False
    capability = torch.cuda.get_device_capability(index)
    fits = capability >= _LEAST_CAPABILITY and capability not in _TOO_SMALL
    return fits and _launches(index)


def _launches(index: int) -> bool:
    """Whether Triton finds what it needs: a C compiler, Python's headers, a driver it knows."""
    from moecc.kernels.gpu.device import run

    try:
        run(torch.device("cuda", index))
    except Exception as error:
        log.warning("kernels do not run on GPU %d, plain torch does: %s", index, error)
        return False
    return True
