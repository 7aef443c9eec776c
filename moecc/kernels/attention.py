"""Attention of single query tokens, or of long prompts, over a paged KV cache.

A cache holds `[blocks * block_size, kv_heads, dim]`; a sequence's tokens are in the blocks that its
row of `tables`, int32 [sequences, blocks of the longest], names in order. `lengths` int32 [rows]
say what each query sees: the first so many tokens of its sequence, its own the last of them, or
only the last `window` of these. `softcap` bounds scores, `sinks`, [heads] or [rows, heads], are one
more key of that score and without a value. A query of length 0 is padding: nothing is read for it,
and its result is zero. heads is a multiple of kv_heads, the dim of values may be another one.

The kernels do not wait for the device and their shapes are of the arguments' shapes, so that a CUDA
graph can hold them; the reference looks at the lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moecc.kernels.device import on_gpu

# Up to so many rows of a pass attend each on its own: tiles of prompts would not fill a GPU.
FEW_ROWS = 256
_TILE = 128  # queries of a tile, each of a group's heads counted
_PROGRAMS = 264  # that fill a GPU twice


@dataclass(frozen=True, slots=True, eq=False)
class Tiles:
    """Runs of query rows of one sequence each, at most `rows` rows long.

    `table` is int32 [tiles, 3]: first row, rows, and row of the block tables.
    """

    table: Tensor
    rows: int


def tiles_of(
    spans: Sequence[tuple[int, int, int]], heads: int, kv_heads: int, device: torch.device
) -> Tiles:
    """Tiles of the rows `start..stop` of sequences; a span is (start, stop, row of `tables`)."""
    rows = max(1, _TILE * kv_heads // heads)
    if sum(-(-(stop - start) // rows) for start, stop, _ in spans) * kv_heads < _PROGRAMS:
        rows = max(1, rows // 2)
    tiles = [
        (first, min(rows, stop - first), sequence)
        for start, stop, sequence in spans
        for first in range(start, stop, rows)
    ]
    return Tiles(
        torch.tensor(tiles, dtype=torch.int32).view(-1, 3).to(device, non_blocking=True), rows
    )


def attend(
    q: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    tables: Tensor,
    sequences: Tensor,
    lengths: Tensor,
    *,
    block_size: int,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    splits: int | None = None,
) -> Tensor:
    """Attention of every row of `q` [rows, heads, dim] on its own: [rows, heads, dim_v].

    `sequences` int32 [rows] is the row of `tables` that a query has. A query's keys are shared out
    to at most `splits` programs, a power of two; by default as many as fill the GPU. Calls of one
    device belong on one stream, and one call of a shape before its capture in a graph. The launch
    right before a call must not be what writes `sequences` or `lengths`.
    """
    sinks = _by_row(sinks, q)
    if not on_gpu(q):
        form = _Form(block_size, scaling, window, softcap)
        return _attended(q, cache_k, cache_v, tables, sequences, lengths, sinks, form)
    from moecc.kernels.gpu.attention import attend as launch

    return launch(
        q,
        cache_k,
        cache_v,
        tables,
        sequences,
        lengths,
        block_size=block_size,
        scaling=scaling,
        window=window,
        softcap=softcap,
        sinks=sinks,
        splits=splits,
    )


def prefill(
    q: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    tables: Tensor,
    tiles: Tiles,
    lengths: Tensor,
    *,
    block_size: int,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """As `attend`, for the rows of `tiles`: keys are read once for all queries of a tile.

    What other rows of the result hold is not said.
    """
    sinks = _by_row(sinks, q)
    if not on_gpu(q):
        form = _Form(block_size, scaling, window, softcap)
        out = q.new_zeros(*q.shape[:2], cache_v.shape[2])
        for first, count, sequence in tiles.table.tolist():
            rows = slice(first, first + count)
            out[rows] = _attended(
                q[rows],
                cache_k,
                cache_v,
                tables,
                tiles.table.new_full((count,), sequence),
                lengths[rows],
                None if sinks is None else sinks[rows],
                form,
            )
        return out
    from moecc.kernels.gpu.attention import prefill as launch

    return launch(
        q,
        cache_k,
        cache_v,
        tables,
        tiles.table,
        tiles.rows,
        lengths,
        block_size=block_size,
        scaling=scaling,
        window=window,
        softcap=softcap,
        sinks=sinks,
    )


@dataclass(frozen=True, slots=True)
class _Form:
    """How keys are found and scores become weights."""

    block_size: int
    scaling: float
    window: int | None
    softcap: float | None


def _by_row(sinks: Tensor | None, q: Tensor) -> Tensor | None:
    return sinks if sinks is None else sinks.expand(q.shape[:2])


def _attended(
    q: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    tables: Tensor,
    sequences: Tensor,
    lengths: Tensor,
    sinks: Tensor | None,
    form: _Form,
) -> Tensor:
    """The reference: the queries of a sequence together, in float32."""
    out = q.new_zeros(*q.shape[:2], cache_v.shape[2])
    for sequence in set(sequences.tolist()):
        rows = ((sequences == sequence) & (lengths > 0)).nonzero()[:, 0]
        if not len(rows):
            continue
        seen = lengths[rows, None]
        keys = torch.arange(int(seen.max()), device=q.device)
        slots = (
            tables[sequence, keys // form.block_size].long() * form.block_size
            + keys % form.block_size
        )
        mask = keys < seen
        if form.window is not None:
            mask &= keys >= seen - form.window
        found = _softmax_of(
            q[rows],
            cache_k[slots],
            cache_v[slots],
            mask,
            None if sinks is None else sinks[rows],
            form,
        )
        out[rows] = found.to(q.dtype)
    return out


def _softmax_of(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor | None, form: _Form
) -> Tensor:
    """q [n, heads, dim], k and v [m, kv_heads, dim], mask [n, m], sinks [n, heads]."""
    grouped = q.float().reshape(len(q), k.shape[1], -1, q.shape[2])
    scores = torch.einsum("nhgd,mhd->nhgm", grouped, k.float()) * form.scaling
    if form.softcap is not None:
        scores = torch.tanh(scores / form.softcap) * form.softcap
    scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
    if sinks is not None:
        one_more = sinks.float().reshape(*scores.shape[:-1], 1)
        scores = torch.cat([scores, one_more], dim=-1)
    weights = scores.softmax(dim=-1)[..., : len(k)]
    return torch.einsum("nhgm,mhd->nhgd", weights, v.float()).flatten(1, 2)
