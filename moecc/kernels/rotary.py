"""Queries and keys made ready for attention: normed, rotated, and keys and values in the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from moecc.kernels.device import on_gpu
from moecc.kernels.norm import normed


def rotate_and_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inv_freq: Tensor,
    positions: Tensor,
    slots: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    *,
    rows: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    attention_scaling: float = 1.0,
) -> Tensor:
    """Rotates `q` and `k`, and writes `k` and `v` to the cache; returns the rotated `q`.

    `q` [tokens, heads, dim], `k` [tokens, kv_heads, dim] and `v` [tokens, kv_heads, dim_v] may be
    views of one buffer whose last axis is contiguous. Token `i` is at `positions[i]` of its
    sequence and goes to `slots[i]` of `cache_k` and `cache_v` [slots, kv_heads, any], or nowhere if
    that is negative; both are int32 or int64. `inv_freq` is float32 [R, rotated / 2], where the
    first `rotated` of dim are turned. With `q_norm` and `k_norm` [R, dim] heads are RMS-normed
    first. `rows` int32 or int64 [tokens] says which of the R rows is a token's; without it, the
    first. Everything is rounded where transformers rounds it. The launch right before this one
    must not be what writes `positions` or `rows`.
    """
    launch = _rotate_and_store
    if on_gpu(q):
        from moecc.kernels.gpu.rotary import rotate_and_store as launch
    return launch(
        q,
        k,
        v,
        inv_freq,
        positions,
        slots,
        cache_k,
        cache_v,
        rows,
        q_norm,
        k_norm,
        eps,
        attention_scaling,
    )


def _rotate_and_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inv_freq: Tensor,
    positions: Tensor,
    slots: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    rows: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    attention_scaling: float,
) -> Tensor:
    index = torch.zeros_like(positions) if rows is None else rows
    if q_norm is not None:
        q = normed(q, q_norm[index.long(), None], eps)
    if k_norm is not None:
        k = normed(k, k_norm[index.long(), None], eps)
    freqs = positions[:, None].float() * inv_freq[index.long()]
    angles = torch.cat([freqs, freqs], dim=-1)[:, None]
    cos = (angles.cos() * attention_scaling).to(q.dtype)
    sin = (angles.sin() * attention_scaling).to(q.dtype)
    kept = slots >= 0
    cache_k[slots[kept]] = _rotated(k, cos, sin)[kept]
    cache_v[slots[kept]] = v[kept]
    return _rotated(q, cos, sin)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotated = cos.shape[-1]
    turned, rest = x[..., :rotated], x[..., rotated:]
    first, second = turned.chunk(2, dim=-1)
    half_turned = torch.cat([-second, first], dim=-1)
    return torch.cat([turned * cos + half_turned * sin, rest], dim=-1)
