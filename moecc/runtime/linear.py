"""Products with 16-bit weights on a CPU, in few shapes.

oneDNN compiles code for every shape it multiplies and keeps it: half a megabyte and a millisecond
each. The rows of a batch come in any number, so they are padded to one of a few.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, with the rows of `x` padded where that helps."""
    rows = x.numel() // x.shape[-1]
    padded = _padded(rows)
    if not _is_compiled(x) or padded == rows:
        return F.linear(x, weight, bias)
    wide = x.new_zeros(padded, x.shape[-1])
    wide[:rows] = x.reshape(rows, -1)
    return F.linear(wide, weight, bias)[:rows].view(*x.shape[:-1], -1)


class PaddedWeight(nn.Parameter):
    """A weight whose `F.linear` is ours; everything else is done as with any parameter."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return (linear if func is F.linear else func)(*args, **(kwargs or {}))


def parameter(tensor: Tensor) -> nn.Parameter:
    """A parameter of a model that only computes; of a kind that pads where that helps."""
    kind = PaddedWeight if tensor.dim() == 2 and _is_compiled(tensor) else nn.Parameter
    return kind(tensor, requires_grad=False)


def _is_compiled(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype in (torch.bfloat16, torch.float16)


def _padded(rows: int) -> int:
    """The next power of two, from 16 on the next multiple of 16, from 128 on that of 64."""
    if rows <= 16:
        return 1 << max(0, rows - 1).bit_length()
    step = 16 if rows <= 128 else 64
    return -(-rows // step) * step
