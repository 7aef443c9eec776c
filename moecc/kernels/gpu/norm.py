"""One program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moecc.kernels.gpu.launch import let_next_begin, overlap, wait
from moecc.kernels.norm import Norm


def rms_norm(x: Tensor, norm: Norm, variants: Tensor) -> Tensor:
    """As `kernels.norm.rms_norm`."""
    out = torch.empty_like(x)
    width = x.shape[1]
    block = triton.next_power_of_2(width)
    _rms_norm[(len(x),)](
        x,
        norm.weight,
        variants,
        out,
        norm.eps,
        x.stride(0),
        norm.weight.stride(0),
        WIDTH=width,
        BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
        **overlap(x.device),
    )
    return out


@triton.jit
def _rms_norm(
    x,
    weight,
    variants,
    out,
    eps,
    x_stride,
    weight_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    let_next_begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < WIDTH
    variant = tl.maximum(tl.load(variants + row), 0).to(tl.int64)  # settled
    own = tl.load(weight + variant * weight_stride + at, mask=inside, other=0.0)
    wait(OVERLAP)
    values = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(values * values, 0) / WIDTH + eps)
    normed = (values * scale).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * WIDTH + at, normed * own.to(tl.float32), mask=inside)
