"""RMS norm whose weights differ by row (Zhang and Sennrich, NeurIPS 2019)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moecc.kernels.device import on_gpu


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """Weights [variants, H], contiguous but for the first axis, and what keeps the root from 0."""

    weight: Tensor
    eps: float


# Up to so many rows kernels norm what they read, as long as a launch of its own would take.
DEFERRED_ROWS = 1


def deferred(x: Tensor, norm: Norm, variants: Tensor) -> tuple[Tensor, Norm | None]:
    """`x` and the norm that is still to be applied to it, if whoever reads it can."""
    if on_gpu(x) and len(x) <= DEFERRED_ROWS:
        return x, norm
    return rms_norm(x, norm, variants), None


def rms_norm(x: Tensor, norm: Norm, variants: Tensor) -> Tensor:
    """`x` [n, H] by its root mean square, times each row's own weights; `variants` int32 [n].

    Rounds as transformers does: once before the weights, once after. The launch right before this
    one must not be what writes `variants`.
    """
    if on_gpu(x):
        from moecc.kernels.gpu.norm import rms_norm as launch

        return launch(x, norm, variants)
    return normed(x, norm.weight[variants.long()], norm.eps)


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The reference, over the last axis of any `x`, with weights that broadcast to it."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)
