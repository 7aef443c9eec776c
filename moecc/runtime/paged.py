"""Runs a batch of sequences through the model in one pass, over the paged KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moecc.runtime import step
from moecc.runtime.attention import KVCache, Piece, Plan
from moecc.runtime.residency import Residency


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Tokens of one sequence to run: the first is its token number `context`.

    `logits` says whether those of the last token are wanted.
    """

    variant: int
    tokens: Sequence[int]
    context: int
    blocks: Sequence[int]
    logits: bool


class PagedRunner:
    """Passes over parts; `cache` may be replaced while nothing runs."""

    def __init__(self, residency: Residency, cache: KVCache, device: torch.device) -> None:
        self.cache = cache
        self._residency = residency
        self._device = device

    @torch.inference_mode()
    def run(self, parts: Sequence[Part]) -> Tensor:
        """Logits of the parts that want them, [n, vocab] in their order.

        `parts` are grouped by variant; of one variant only unless the residency is mixed.
        """
        model = self._residency.activate(parts[0].variant)
        running = self._step(parts)
        ids = [token for part in parts for token in part.tokens]
        positions = [part.context + i for part in parts for i in range(len(part.tokens))]
        with step.running(running):
            output = model(
                input_ids=torch.tensor(ids, device=self._device)[:, None],
                position_ids=torch.tensor(positions, device=self._device)[:, None],
                use_cache=False,
            )
        logits: Tensor = output.logits
        return logits[:, 0]

    def _step(self, parts: Sequence[Part]) -> step.Step:
        pieces, wanted, start = [], [], 0
        for part in parts:
            stop = start + len(part.tokens)
            pieces.append(Piece(start, stop, part.context, part.blocks))
            if part.logits:
                wanted.append((part.variant, stop - 1))
            start = stop
        counts = [len(part.tokens) for part in parts]
        # A pass without outputs still runs its head: on one row, whose logits nobody reads.
        ends = wanted or [(parts[-1].variant, start - 1)]
        return step.Step(
            tokens=step.Rows(step.spans([p.variant for p in parts], counts), self._device),
            outputs=step.Rows(step.spans([v for v, _ in ends], [1] * len(ends)), self._device),
            output_rows=torch.tensor([row for _, row in ends], device=self._device),
            plan=Plan(pieces, self.cache, self._device),
        )
