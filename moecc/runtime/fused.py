"""Passes whose rows are data: what one needs goes over in one copy, and small ones are CUDA graphs.

They are of a Decoder, or of a Modeled. A graph holds a pass of so many rows. Which tokens they are,
of which variants, and where their keys are is data in one buffer, so that one graph serves every
mix of variants and of prompts that are read with answers that are written. Rows left over are none.
Longer passes are launched one kernel after the other, which is no slower for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moecc.kernels.attention import FEW_ROWS
from moecc.runtime.attention import KVCache
from moecc.runtime.decoder import Decoder, Tokens
from moecc.runtime.modeled import Modeled
from moecc.runtime.paged import Part
from moecc.runtime.residency import Residency

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, FEW_ROWS)
_FIELDS = ("ids", "positions", "variants", "slots", "sequences", "lengths")
_NONE = {"variants": -1, "slots": -1}  # of a row that is none; the rest is zero


@dataclass(frozen=True, slots=True, eq=False)
class _Graph:
    replay: Callable[[], None]
    logits: Tensor


class FusedRunner:
    """As PagedRunner, for a forward whose rows the residency keeps.

    A token below zero, `-1 - row`, is the one that `keep` was last given in that row.

    Attributes:
        runs_ahead: passes run while the next one is prepared.
    """

    def __init__(
        self,
        decoder: Decoder | Modeled,
        residency: Residency,
        cache: KVCache,
        device: torch.device,
        *,
        max_seqs: int,
        max_rows: int,
        max_blocks: int,
    ) -> None:
        """At most `max_rows` tokens in a pass, of `max_seqs` sequences of `max_blocks` blocks."""
        self._decoder = decoder
        self._residency = residency
        self._cache = cache
        self._max_seqs = max_seqs
        self._max_rows = max_rows
        self._tables = max_seqs * max_blocks
        size = self._tables + len(_FIELDS) * max_rows + max_seqs
        cuda = device.type == "cuda"
        self._host = torch.zeros(size, dtype=torch.int32, pin_memory=cuda)
        self._array: npt.NDArray[np.int32] = self._host.numpy()
        self._device = torch.zeros(size, dtype=torch.int32, device=device)
        self._copied: Any = torch.cuda.Event() if cuda else None  # type: ignore[no-untyped-call]
        self._last = torch.zeros(max_seqs, dtype=torch.int32, device=device)
        self._graphs: dict[int, _Graph] = {}
        self.runs_ahead = cuda

    def capture(self, on_progress: Callable[[int, int], None]) -> None:
        """Captures the graphs; `on_progress` gets how many of them there are, and how many of all.

        Raises what torch raises where it cannot.
        """
        sizes = [size for size in SIZES if size <= self._max_rows]
        pool = torch.cuda.graph_pool_handle()
        for done, size in enumerate(reversed(sizes)):  # the largest first: it takes the memory
            tokens = self._fill([], size)
            self._compute(tokens)  # compiles
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            before = torch.cuda.current_stream()
            try:
                # Other engines of the process may go on with what they do.
                with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                    logits = self._compute(tokens)
            finally:
                torch.cuda.set_stream(before)  # torch leaves its own if a capture breaks
            self._graphs[size] = _Graph(graph.replay, logits)
            on_progress(done + 1, len(sizes))

    def forget_graphs(self) -> None:
        """From here on passes are launched."""
        self._graphs.clear()
        with suppress(RuntimeError):  # of a torch that still takes a broken capture for running
            torch.cuda.empty_cache()

    def run(self, parts: Sequence[Part]) -> Tensor:
        """As `PagedRunner.run`."""
        self._residency.activate(parts[0].variant)
        count = sum(len(part.tokens) for part in parts)
        wanted = sum(part.logits for part in parts)
        size = min((size for size in self._graphs if size >= count), default=None)
        if size is None:
            logits = self._compute(self._fill(parts, count))
        else:
            self._fill(parts, size)
            self._graphs[size].replay()
            logits = self._graphs[size].logits
        return logits[:wanted]

    def keep(self, tokens: Tensor) -> None:
        """The tokens int64 [n] that were chosen in the last pass."""
        self._last[: len(tokens)].copy_(tokens)

    def _compute(self, tokens: Tokens) -> Tensor:
        ids = tokens.ids
        ids = torch.where(ids < 0, self._last[(-1 - ids).clamp(min=0)], ids)
        return self._decoder(replace(tokens, ids=ids), self._cache)

    def _outputs(self, size: int) -> int:
        return min(size, self._max_seqs)

    def _fill(self, parts: Sequence[Part], size: int) -> Tokens:
        """The tokens of the parts in `size` rows, on their way to the device."""
        if self._copied is not None:
            self._copied.synchronize()  # the last copy reads what is written now
        outputs = self._outputs(size)
        end = self._tables + len(_FIELDS) * size + outputs
        tables = self._array[: self._tables].reshape(self._max_seqs, -1)
        fields = dict(
            zip(
                _FIELDS,
                self._array[self._tables : end - outputs].reshape(len(_FIELDS), size),
                strict=True,
            )
        )
        wanted, start = self._array[end - outputs : end], 0
        wanted[:] = 0
        rows = []
        for number, part in enumerate(parts):
            stop = start + len(part.tokens)
            tables[number, : len(part.blocks)] = part.blocks
            self._fill_part(fields, slice(start, stop), number, part)
            if part.logits:
                rows.append(stop - 1)
            start = stop
        wanted[: len(rows)] = rows
        for name, field in fields.items():
            field[start:] = _NONE.get(name, 0)
        self._device[:end].copy_(self._host[:end], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        return self._tokens(parts, size, end)

    def _fill_part(
        self, fields: dict[str, npt.NDArray[np.int32]], rows: slice, number: int, part: Part
    ) -> None:
        positions = np.arange(part.context, part.context + len(part.tokens))
        blocks = np.asarray(part.blocks)
        size = self._cache.block_size
        fields["ids"][rows] = part.tokens
        fields["positions"][rows] = positions
        fields["variants"][rows] = self._residency.row(part.variant)
        fields["slots"][rows] = blocks[positions // size] * size + positions % size
        fields["sequences"][rows] = number
        fields["lengths"][rows] = positions + 1

    def _tokens(self, parts: Sequence[Part], size: int, end: int) -> Tokens:
        """Views of what is on the device; with spans where there is no graph of this size."""
        outputs = self._outputs(size)
        fields = self._device[self._tables : end - outputs].view(len(_FIELDS), size)
        tokens = Tokens(
            **dict(zip(_FIELDS, fields, strict=True)),
            outputs=self._device[end - outputs : end],
            tables=self._device[: self._tables].view(self._max_seqs, -1),
        )
        if size > SIZES[-1]:
            starts = np.cumsum([0, *(len(part.tokens) for part in parts)]).tolist()
            tokens.spans = list(zip(starts[:-1], starts[1:], range(len(parts)), strict=True))
        return tokens
