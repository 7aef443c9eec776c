"""Linear layers whose weights differ by row: each row of a batch meets its own variant's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from moecc.kernels.align import Order, align
from moecc.kernels.device import on_gpu
from moecc.kernels.norm import Norm, rms_norm


@dataclass(eq=False)
class Rows:
    """Which variant each row of a batch is of: `variants` int32 [n], each below `count`.

    About `together` of them share a batch: launches are cut for that, whatever the rows say. A
    negative one says that the row is none, and that nothing is computed for it. Kernels read
    them before the launch right before theirs is done: it must not be what writes them. The rows
    sorted into blocks are made once a pass, for all of its layers.
    """

    variants: Tensor
    count: int
    together: int = 1
    _blocks: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def blocks(self, size: int) -> tuple[Tensor, Tensor]:
        """(order, owners) of `align`."""
        if size not in self._blocks:
            same = torch.arange(self.count, dtype=torch.int32, device=self.variants.device)
            (self._blocks[size],) = align(self.variants, [Order(same, size, self.count)])
        return self._blocks[size]


def linear(
    x: Tensor,
    weights: Sequence[Tensor],
    rows: Rows,
    *,
    biases: Sequence[Tensor] | None = None,
    norm: Norm | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`x W^T + b` of several weights side by side, after a norm of `x`, plus a residual.

    `x` [n, K]; each of `weights` [variants, N_i, K], contiguous but for the first axis; `biases`
    [variants, N_i]; `residual` [n, sum N_i]. Returns [n, sum N_i] of the dtype of `x`.
    """
    if on_gpu(x):
        from moecc.kernels.gpu.linear import linear as launch

        return launch(x, weights, rows, biases, norm, residual)
    if norm is not None:
        x = rms_norm(x, norm, rows.variants)
    out = x.new_empty(len(x), sum(w.shape[1] for w in weights))
    for variant in sorted(set(rows.variants.tolist()) - {-1}):
        own = (rows.variants == variant).nonzero()[:, 0]
        parts = [
            F.linear(x[own], w[variant], None if biases is None else biases[i][variant])
            for i, w in enumerate(weights)
        ]
        out[own] = torch.cat(parts, -1)
    return out if residual is None else residual + out
