"""Products with each row's own weights: row by row, or rows of a variant in blocks.

Weights stream through once; what decides is how many bytes are on their way. Up to three weights
lie side by side in one launch, since a launch of a few microseconds is as long as a small weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moecc.kernels.gpu.launch import begin, let_next_begin, overlap, wait
from moecc.kernels.linear import Rows
from moecc.kernels.norm import DEFERRED_ROWS, Norm, rms_norm

_MOST_WEIGHTS = 3
# A router: so few features that a matrix product would leave the GPU idle.
FEW_ROWS, FEW_FEATURES = 64, 256
_APART = 4  # variants that a batch is cut for at most: one alone reads its weights again for each


@dataclass(frozen=True, slots=True)
class Tiles:
    """A launch: rows, out-features and in-features of a program's tile, warps, and stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


def linear(
    x: Tensor,
    weights: Sequence[Tensor],
    rows: Rows,
    biases: Sequence[Tensor] | None,
    norm: Norm | None,
    residual: Tensor | None,
) -> Tensor:
    """As `kernels.linear.linear`, for at most three weights."""
    assert len(weights) <= _MOST_WEIGHTS, "more weights than a launch takes"
    count, width = x.shape
    sizes = [w.shape[1] for w in weights] + [0] * (_MOST_WEIGHTS - len(weights))
    out = torch.empty(count, sum(sizes), dtype=x.dtype, device=x.device)
    three = [*weights] + [weights[0]] * (_MOST_WEIGHTS - len(weights))
    added = list(three if biases is None else biases)
    added += [added[0]] * (_MOST_WEIGHTS - len(added))
    if norm is not None and count > DEFERRED_ROWS:
        x, norm = rms_norm(x, norm, rows.variants), None
    common = {
        "K": width,
        "N0": sizes[0],
        "N1": sizes[1],
        "N2": sizes[2],
        "BIASED": biases is not None,
        "ADDS": residual is not None,
    }
    strides = [t.stride(0) for t in (*three, *added)]
    given = residual if residual is not None else out
    if count <= DEFERRED_ROWS or (count <= FEW_ROWS and sum(sizes) <= FEW_FEATURES):
        tiles = vector_tiles(sum(sizes), width)
        scale = norm.weight if norm is not None else x
        programs = sum(triton.cdiv(size, tiles.n) for size in sizes)
        _vector[(programs, count)](
            x,
            *three,
            *added,
            given,
            scale,
            rows.variants,
            out,
            norm.eps if norm is not None else 0.0,
            x.stride(0),
            *strides,
            scale.stride(0),
            given.stride(0),
            **common,
            NORMED=norm is not None,
            BN=tiles.n,
            BK=tiles.k,
            num_warps=tiles.warps,
            **overlap(x.device),
        )
        return out
    tiles = matrix_tiles(count, sum(sizes), width, rows.together)
    order, owners = rows.blocks(tiles.m)
    programs = sum(triton.cdiv(size, tiles.n) for size in sizes)
    _matrix[(len(owners), programs)](
        x,
        *three,
        *added,
        given,
        order,
        owners,
        out,
        x.stride(0),
        *strides,
        given.stride(0),
        **common,
        BM=tiles.m,
        BN=tiles.n,
        BK=tiles.k,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **overlap(x.device),
    )
    return out


def vector_tiles(features: int, width: int) -> Tiles:
    """For a row at a time: all of a program's weights are on their way at once."""
    k = min(4096, max(16, triton.next_power_of_2(width)))
    return Tiles(1, 1 if features <= FEW_FEATURES else 4, k, 4, 1)


def matrix_tiles(count: int, features: int, width: int, together: int = 1) -> Tiles:
    """For blocks of rows, of so many variants that share a batch."""
    k = min(128, max(16, triton.next_power_of_2(width)))
    if count > 256:
        return Tiles(128, 128, min(k, 64), 8, 3)
    if count <= 16:
        n = 32 if features >= 4096 else 16
        return Tiles(16, n, k, 4, 6)
    if count <= 16 * min(together, _APART) and features >= 4096:  # few rows of each
        return Tiles(16, 64, k, 4, 4)
    n = 64 if features > 4096 else 32 if features > 2048 else 16
    return Tiles(64, n, k, 4, 4 if n == 64 else 6)


@triton.jit
def _side(
    index, w0, w1, w2, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, BN: tl.constexpr
):
    """Which of the weights a program works on: (0, 1 or 2, its first row, first column of out)."""
    first: tl.constexpr = (N0 + BN - 1) // BN
    second: tl.constexpr = (N1 + BN - 1) // BN
    which = 0
    start = 0
    if index >= first:
        which = 1
        start = N0
        index -= first
        if index >= second:
            which = 2
            start = N0 + N1
            index -= second
    return which, index * BN, start


@triton.jit
def row_product(
    x,
    lines,
    held,
    scale,
    eps,
    K: tl.constexpr,
    NORMED: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """float32 [BN]: the row at `x` times the weights at the pointers `lines` [BN], where `held`.

    With NORMED the row is RMS-normed with the weights at `scale`. Waits for the kernels before,
    with the first weights on their way.
    """
    k = tl.arange(0, BK)
    tile = tl.load(lines[:, None] + k[None, :], mask=held[:, None] & (k < K)[None, :], other=0.0)
    if NORMED:
        own = tl.load(scale + k, mask=k < K, other=0.0)
    wait(OVERLAP)
    total = tl.zeros([BN, BK], tl.float32)
    square = tl.zeros([BK], tl.float32)
    for start in tl.static_range(0, K, BK):
        inside = start + k < K
        if start > 0:
            both = held[:, None] & inside[None, :]
            tile = tl.load(lines[:, None] + (start + k)[None, :], mask=both, other=0.0)
            if NORMED:
                own = tl.load(scale + start + k, mask=inside, other=0.0)
        values = tl.load(x + start + k, mask=inside, other=0.0).to(tl.float32)
        if NORMED:
            square += values * values
            values *= own.to(tl.float32)
        total += tile.to(tl.float32) * values[None, :]
    result = tl.sum(total, 1)
    if NORMED:
        result *= 1 / tl.sqrt(tl.sum(square, 0) / K + eps)
    return result


@triton.jit
def _vector(
    x,
    w0,
    w1,
    w2,
    b0,
    b1,
    b2,
    residual,
    scale,
    variants,
    out,
    eps,
    x_stride,
    w0_stride,
    w1_stride,
    w2_stride,
    b0_stride,
    b1_stride,
    b2_stride,
    scale_stride,
    residual_stride,
    K: tl.constexpr,
    N0: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    BIASED: tl.constexpr,
    ADDS: tl.constexpr,
    NORMED: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    let_next_begin(OVERLAP)
    row = tl.program_id(1).to(tl.int64)
    variant = tl.load(variants + row).to(tl.int64)  # settled
    if variant < 0:
        wait(OVERLAP)
        return
    which, first, start = _side(tl.program_id(0), w0, w1, w2, N0, N1, N2, BN)
    w = w0 + variant * w0_stride
    b = b0 + variant * b0_stride
    size = N0
    if which == 1:
        w = w1 + variant * w1_stride
        b = b1 + variant * b1_stride
        size = N1
    if which == 2:
        w = w2 + variant * w2_stride
        b = b2 + variant * b2_stride
        size = N2
    at = first + tl.arange(0, BN)
    held = at < size
    result = row_product(
        x + row * x_stride,
        w + at.to(tl.int64) * K,
        held,
        scale + variant * scale_stride,
        eps,
        K,
        NORMED,
        BN,
        BK,
        OVERLAP,
    )
    if BIASED:
        result += tl.load(b + at, mask=held, other=0.0).to(tl.float32)
    if ADDS:
        rounded = result.to(out.dtype.element_ty).to(tl.float32)
        before = tl.load(residual + row * residual_stride + start + at, mask=held, other=0.0)
        result = before.to(tl.float32) + rounded
    tl.store(out + row * (N0 + N1 + N2) + start + at, result, mask=held)


@triton.jit
def _matrix(
    x,
    w0,
    w1,
    w2,
    b0,
    b1,
    b2,
    residual,
    order,
    owners,
    out,
    x_stride,
    w0_stride,
    w1_stride,
    w2_stride,
    b0_stride,
    b1_stride,
    b2_stride,
    residual_stride,
    K: tl.constexpr,
    N0: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    BIASED: tl.constexpr,
    ADDS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    block = tl.program_id(0)
    variant = tl.load(owners + block).to(tl.int64)
    if variant < 0:
        return
    which, first, start = _side(tl.program_id(1), w0, w1, w2, N0, N1, N2, BN)
    w = w0 + variant * w0_stride
    b = b0 + variant * b0_stride
    size = N0
    if which == 1:
        w = w1 + variant * w1_stride
        b = b1 + variant * b1_stride
        size = N1
    if which == 2:
        w = w2 + variant * w2_stride
        b = b2 + variant * b2_stride
        size = N2
    rows = tl.load(order + block * BM + tl.arange(0, BM)).to(tl.int64)
    taken = rows >= 0
    at = first + tl.arange(0, BN)
    held = at < size
    k = tl.arange(0, BK)
    x_lines = x + tl.where(taken, rows, 0)[:, None] * x_stride + k[None, :]
    w_lines = w + tl.where(held, at, 0).to(tl.int64)[None, :] * K + k[:, None]
    total = tl.zeros([BM, BN], tl.float32)
    for step in range(0, K, BK):
        if K % BK == 0:
            values = tl.load(x_lines + step, mask=taken[:, None], other=0.0)
            tile = tl.load(w_lines + step)
        else:
            inside = step + k < K
            values = tl.load(x_lines + step, mask=taken[:, None] & inside[None, :], other=0.0)
            tile = tl.load(w_lines + step, mask=inside[:, None], other=0.0)
        total = tl.dot(values, tile, total)
    if BIASED:
        total += tl.load(b + at, mask=held, other=0.0).to(tl.float32)[None, :]
    both = taken[:, None] & held[None, :]
    if ADDS:
        rounded = total.to(out.dtype.element_ty).to(tl.float32)
        lines = residual + rows[:, None] * residual_stride + start + at[None, :]
        total = tl.load(lines, mask=both, other=0.0).to(tl.float32) + rounded
    tl.store(out + rows[:, None] * (N0 + N1 + N2) + start + at[None, :], total, mask=both)
