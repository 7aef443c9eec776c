"""Attention of rows whose own keys and values are not in the cache yet."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moecc.kernels import attention, rotary
from moecc.kernels.device import on_gpu


def attend_newest(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inv_freq: Tensor,
    positions: Tensor,
    slots: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    tables: Tensor,
    sequences: Tensor,
    lengths: Tensor,
    *,
    rows: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    attention_scaling: float,
    block_size: int,
    scaling: float,
    window: int | None = None,
) -> Tensor:
    """`rotary.rotate_and_store`, then `attention.attend`: [rows, heads, dim_v].

    Arguments are theirs. A row on its own takes one launch, which has the keys and values of its
    earlier tokens on their way before it waits for its own: they must be older than the last kernel
    that is not of ours.
    """
    own = q, k, v, inv_freq, positions, slots, cache_k, cache_v
    turning: dict[str, Any] = {
        "rows": rows,
        "q_norm": q_norm,
        "k_norm": k_norm,
        "eps": eps,
        "attention_scaling": attention_scaling,
    }
    seen: dict[str, Any] = {"block_size": block_size, "scaling": scaling, "window": window}
    if on_gpu(q) and len(q) == 1 and 2 * inv_freq.shape[1] == q.shape[2]:
        from moecc.kernels.gpu.newest import attend_newest as launch

        return launch(*own, tables, sequences, lengths, **turning | seen)
    q = rotary.rotate_and_store(*own, **turning)
    return attention.attend(q, cache_k, cache_v, tables, sequences, lengths, **seen)
