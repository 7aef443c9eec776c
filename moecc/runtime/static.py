"""Static batches through transformers' `generate`, for families whose state is not paged.

A batch is of one variant and runs to its end; tokens are chosen, delivered and stopped one by one
as in continuous batches, by hooks into `generate`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moecc.runtime.residency import Residency

# Logits [rows, vocab] of the rows that go on, and their numbers -> the tokens chosen for them, and
# which of them ended; None ends a row without a token.
Next = Callable[[Tensor, list[int]], list[tuple[int, bool] | None]]


class StaticRunner:
    """Generates for batches of prompts."""

    def __init__(self, residency: Residency, device: torch.device) -> None:
        self._residency = residency
        self._device = device

    @torch.inference_mode()
    def run(self, variant: int, prompts: Sequence[Sequence[int]], limit: int, next_: Next) -> None:
        """Calls `next_` for every step until all rows have ended, at most `limit` times."""
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
