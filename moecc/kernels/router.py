"""From a router's logits to physical experts and their weights."""

from __future__ import annotations

from torch import Tensor

from moecc.kernels.device import on_gpu
from moecc.kernels.linear import Rows, linear
from moecc.kernels.norm import Norm


def route(
    x: Tensor,
    weight: Tensor,
    rows: Rows,
    norm: Norm | None,
    remap: Tensor,
    count: int,
    *,
    renormalize: bool,
) -> tuple[Tensor, Tensor]:
    """`choose_experts` by the logits of a router `weight` [variants, E, K], after a norm of `x`.

    `x` [n, K]; logits are rounded to its dtype. Calls of one device belong on one stream, and one
    call of a shape before its capture in a graph.
    """
    if on_gpu(x):
        from moecc.kernels.gpu import router

        if router.routes(len(x), weight.shape[1], norm):
            return router.route(x, weight, rows.variants, norm, remap, count, renormalize)
    logits = linear(x, [weight], rows, norm=norm)
    return choose_experts(logits, remap, rows.variants, count, renormalize=renormalize)


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
