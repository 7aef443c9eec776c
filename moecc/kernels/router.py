"""From a router's logits to physical experts and their weights."""

from __future__ import annotations

import torch
from torch import Tensor

from moecc.kernels.device import on_gpu


def choose_experts(
    logits: Tensor, remap: Tensor, variants: Tensor, count: int, *, renormalize: bool
) -> tuple[Tensor, Tensor]:
    """The `count` likeliest experts of every row, the first of equals, by each row's own remap.

    `logits` [n, E]; `remap` int32 [variants, E], logical to physical; `variants` int32 [n], where a
    negative one is a row that is none. Returns physical experts int32 [n, count], -1 for such
    rows, and their softmax float32 [n, count], made to sum to 1 if `renormalize`.
    """
    if on_gpu(logits):
        from moecc.kernels.gpu.router import choose_experts as launch

        return launch(logits, remap, variants, count, renormalize)
    weights, chosen = logits.float().softmax(-1).sort(stable=True, dim=-1, descending=True)
    weights, chosen = weights[:, :count], chosen[:, :count]
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    physical = remap[variants.clamp(min=0).long()[:, None], chosen]
    return physical.where(variants[:, None] >= 0, -1), weights
