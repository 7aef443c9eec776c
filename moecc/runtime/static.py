"""Static batches through transformers' `generate`, for families whose state is not paged.

A batch is of one variant and runs to its end; tokens are chosen, delivered and stopped one by one
as in continuous batches, by hooks into `generate`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moecc.runtime.residency import Residency

# Logits [rows, vocab] of the rows that go on, and their numbers -> the tokens chosen for them, and
# which of them ended; None ends a row without a token.
Next = Callable[[Tensor, list[int]], list[tuple[int, bool] | None]]

_PADDED_LAYERS = {
    *("full_attention", "sliding_attention", "attention"),
    *("linear_attention", "mamba", "conv", "moe"),
}


class StaticRunner:
    """Generates for batches of prompts.

    `pads` says whether prompts of several lengths may be in one; else each length has its own.
    """

    def __init__(self, residency: Residency, device: torch.device, pads: bool) -> None:
        self._residency = residency
        self._device = device
        self._pads = pads

    def run(self, variant: int, prompts: Sequence[Sequence[int]], limit: int, next_: Next) -> None:
        """Calls `next_` for every step until all rows have ended, at most `limit` times a batch."""
        groups: dict[int, list[int]] = {}  # by length now: prompts grow as tokens are accepted
        for row, prompt in enumerate(prompts):
            groups.setdefault(0 if self._pads else len(prompt), []).append(row)
        for rows in groups.values():
            of_group = partial(_renumbered, next_, rows)
            self._run(variant, [prompts[row] for row in rows], limit, of_group)

    @torch.inference_mode()
    def _run(self, variant: int, prompts: Sequence[Sequence[int]], limit: int, next_: Next) -> None:
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        model = self._residency.activate(variant)
        length = max(map(len, prompts))
        left = not model.config.is_encoder_decoder
        padded = [_pad(prompt, length, 0, left) for prompt in prompts]
        mask = [_pad([1] * len(prompt), length, 0, left) for prompt in prompts]
        rows = _Rows(len(prompts), next_)
        # Neutral but for where a decoder starts: what ends a row is decided here.
        model.generation_config = GenerationConfig(
            decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
            bos_token_id=model.config.get_text_config().bos_token_id,
            pad_token_id=0,
        )
        model.generate(
            torch.tensor(padded, device=self._device),
            attention_mask=torch.tensor(mask, device=self._device),
            max_new_tokens=limit,
            do_sample=False,
            logits_processor=LogitsProcessorList([rows.process]),
            stopping_criteria=StoppingCriteriaList([rows.ended]),
        )


def pads(model: Any) -> bool:
    """Whether a prompt gives the same answer when it is padded to the length of another.

    Sparse attention, compressed blocks and lightning attention see the padding.
    """
    if model.config.is_encoder_decoder:
        return True
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ["unknown"])
    return bool(getattr(model, "_is_stateful", False)) and kinds <= _PADDED_LAYERS


def _renumbered(next_: Next, rows: list[int], logits: Tensor, live: list[int]) -> Any:
    return next_(logits, [rows[row] for row in live])


def _pad(values: Sequence[int], length: int, pad: int, left: bool) -> list[int]:
    padding = [pad] * (length - len(values))
    return [*padding, *values] if left else [*values, *padding]


class _Rows:
    """What `generate` asks at every step."""

    def __init__(self, count: int, next_: Next) -> None:
        self._done = [False] * count
        self._next = next_

    def process(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores that leave `generate` only the token that was chosen here."""
        live = [row for row, done in enumerate(self._done) if not done]
        chosen = torch.full_like(scores, float("-inf"))
        chosen[:, 0] = 0.0  # padding, for rows that have ended
        for row, found in zip(live, self._next(scores[live], live), strict=True):
            self._done[row] = found is None or found[1]
            if found is not None:
                chosen[row, 0] = float("-inf")
                chosen[row, found[0]] = 0.0
        return chosen

    def ended(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.tensor(self._done, device=input_ids.device)
