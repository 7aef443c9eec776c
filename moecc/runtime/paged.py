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
    """Passes over parts; `cache` may be replaced while nothing runs.

    Attributes:
        runs_ahead: passes run while the next one is prepared.
    """

    def __init__(self, residency: Residency, cache: KVCache, device: torch.device) -> None:
        self.cache = cache
        # Modeling code takes the host longer than the device: tokens would come later, not sooner.
        self.runs_ahead = False
        self._residency = residency
        self._device = device
        self._last: Tensor = torch.zeros(1, dtype=torch.int64, device=device)

    @torch.inference_mode()
    def run(self, parts: Sequence[Part]) -> Tensor:
        """Logits of the parts that want them, [n, vocab] in their order.

        `parts` are grouped by variant; of one variant only unless the residency is mixed. A token
        below zero, `-1 - row`, is the one that `keep` was last given in that row.
        """
        model = self._residency.activate(parts[0].variant)
        running = self._step(parts)
        ids = [token for part in parts for token in part.tokens]
        positions = [part.context + i for part in parts for i in range(len(part.tokens))]
        with step.running(running):
            output = model(
                input_ids=known(torch.tensor(ids, device=self._device), self._last)[:, None],
                position_ids=torch.tensor(positions, device=self._device)[:, None],
                use_cache=False,
            )
        logits: Tensor = output.logits
        return logits[:, 0]

    def keep(self, tokens: Tensor) -> None:
        """The tokens int64 [n] that were chosen in the last pass."""
        self._last = tokens

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


def known(ids: Tensor, last: Tensor) -> Tensor:
    """Token ids [n], of which those below zero are rows of `last`."""
    return torch.where(ids < 0, last[(-1 - ids).clamp(min=0)], ids)
