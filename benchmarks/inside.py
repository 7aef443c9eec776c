"""A look inside an idle engine: which experts its passes hit, and its bare passes on the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from shapes import prompts
from torch import Tensor

from moecc.runtime import experts, step
from moecc.runtime.engine import Engine
from moecc.runtime.experts import KernelExperts
from moecc.runtime.fused import FusedRunner
from moecc.runtime.opening import BLOCK_TOKENS
from moecc.runtime.paged import Part

REPLAYS = 30
SETTLED = 0.1  # seconds after its last answer in which an engine's thread becomes idle


@contextmanager
def counting(
    engine: Engine, batch: int, variants: int, found: list[tuple[int, int]]
) -> Iterator[None]:
    """Inside, passes of `batch` rows add each layer's distinct experts and (variant, expert) pairs.

    `variants` is how many physical experts a logical one has. Passes are run without graphs.
    """
    time.sleep(SETTLED)
    if isinstance(engine._runner, FusedRunner):
        with _counting_chosen(engine._runner, batch, variants, found):
            yield
    else:
        with _counting_called(batch, found):
            yield


@contextmanager
def _counting_chosen(
    runner: FusedRunner, batch: int, variants: int, found: list[tuple[int, int]]
) -> Iterator[None]:
    def apply(layer: KernelExperts, x: Tensor, physical: Tensor, *args: Any, **options: Any) -> Any:
        if len(physical) == batch:
            pairs = physical[physical >= 0].unique()
            found.append(((pairs // variants).unique().numel(), pairs.numel()))
        return applied(layer, x, physical, *args, **options)

    kernels: Any = KernelExperts
    applied, graphs = kernels.apply, runner._graphs
    kernels.apply, runner._graphs = apply, {}
    try:
        yield
    finally:
        kernels.apply, runner._graphs = applied, graphs


@contextmanager
def _counting_called(batch: int, found: list[tuple[int, int]]) -> Iterator[None]:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    def call(module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Any:
        if len(top_k_index) == batch:
            running = step.current()
            rows: Any = 0 if running is None else running.tokens.variants[:, None]
            pairs = top_k_index + rows * module.num_experts
            found.append((top_k_index.unique().numel(), pairs.unique().numel()))
        return called(module, hidden, top_k_index, top_k_weights)

    called: Callable[..., Any] = ALL_EXPERTS_FUNCTIONS[experts.NAME]
    ALL_EXPERTS_FUNCTIONS.register(experts.NAME, call)
    try:
        yield
    finally:
        ALL_EXPERTS_FUNCTIONS.register(experts.NAME, called)


def bare_step(engine: Engine, assigned: Sequence[int], vocab: int, context: int) -> float | None:
    """Seconds of a decode pass without its host, by replays of its graph; None without graphs.

    `assigned` is the variant of each sequence; each has `context` tokens in the cache.
    """
    runner = engine._runner
    if not isinstance(runner, FusedRunner) or not runner._graphs:
        return None
    time.sleep(SETTLED)
    blocks = context // BLOCK_TOKENS + 1
    asked = prompts(len(assigned), vocab, tokens=context + 1)
    parts = []
    for number, (variant, prompt) in enumerate(zip(assigned, asked, strict=True)):
        own = range(number * blocks, (number + 1) * blocks)
        runner.run([Part(variant, prompt[:-1], 0, own, True)])
        parts.append(Part(variant, prompt[-1:], context, own, True))
    runner.run(parts)  # what the graph then reads again and again
    replay = runner._graphs[min(size for size in runner._graphs if size >= len(parts))].replay
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
    for event in events:
        event.record()
        replay()
    torch.cuda.synchronize()
    return median(a.elapsed_time(b) for a, b in pairwise(events)) / 1000
