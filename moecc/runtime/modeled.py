"""transformers' modeling code with whose row is whose as data, so that its passes can be graphs.

What `decoder.py` is for the families whose layers are ours, this is for the others: the model that
has the weights of all variants, run on rows that the host does not look at.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moecc.runtime import step
from moecc.runtime.attention import DrawnPlan, KVCache
from moecc.runtime.decoder import Tokens


class Modeled:
    """The forward of a Mixed residency's model; its layers must have attended before."""

    def __init__(self, model: Any, variants: int) -> None:
        self._model = model
        self._variants = variants

    @torch.inference_mode()
    def __call__(self, tokens: Tokens, cache: KVCache) -> Tensor:
        """Logits [m, vocab] of `tokens.outputs`; keys and values go to the cache."""
        outputs = tokens.variants.index_select(0, tokens.outputs)
        running = step.Step(
            tokens=step.Drawn(tokens.variants, self._variants),
            outputs=step.Drawn(outputs, self._variants),
            output_rows=tokens.outputs,
            plan=DrawnPlan(
                cache,
                tokens.slots,
                tokens.tables,
                tokens.sequences,
                tokens.lengths,
                tokens.spans,
            ),
        )
        with step.running(running):
            output = self._model(
                input_ids=tokens.ids[:, None],
                position_ids=tokens.positions[:, None].long(),
                # One that is made already: making it would look at the positions.
                attention_mask=torch.ones(1, 1, 1, 1, device=tokens.ids.device),
                use_cache=False,
            )
        logits: Tensor = output.logits
        return logits[:, 0]
