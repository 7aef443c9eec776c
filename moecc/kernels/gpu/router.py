"""One program a row; the experts are found one after the other."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def choose_experts(
    logits: Tensor, remap: Tensor, variants: Tensor, count: int, renormalize: bool
) -> tuple[Tensor, Tensor]:
    """As `kernels.router.choose_experts`."""
    rows, experts = logits.shape
    physical = torch.empty(rows, count, dtype=torch.int32, device=logits.device)
    weights = torch.empty(rows, count, dtype=torch.float32, device=logits.device)
    _choose[(rows,)](
        logits,
        remap,
        variants,
        physical,
        weights,
        logits.stride(0),
        remap.stride(0),
        E=experts,
        COUNT=count,
        RENORMALIZE=renormalize,
        BLOCK=max(2, triton.next_power_of_2(experts)),
        PLACES=max(2, triton.next_power_of_2(count)),
        num_warps=1,
    )
    return physical, weights


@triton.jit
def _choose(
    logits,
    remap,
    variants,
    physical,
    weights,
    logits_stride,
    remap_stride,
    E: tl.constexpr,
    COUNT: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PLACES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    variant = tl.load(variants + row).to(tl.int64)
    at = tl.arange(0, BLOCK)
    place = tl.arange(0, PLACES)
    left = tl.load(logits + row * logits_stride + at, mask=at < E, other=float("-inf"))
    left = left.to(tl.float32)
    top = tl.max(left, 0)
    mass = tl.sum(tl.exp(left - top), 0)
    found = tl.zeros([PLACES], tl.float32)
    chosen = tl.zeros([PLACES], tl.int32)
    for j in tl.static_range(COUNT):
        best = tl.minimum(tl.argmax(left, 0, tie_break_left=True), E - 1)  # also of NaN
        value = tl.max(left, 0)
        found = tl.where(place == j, tl.exp(value - top) / mass, found)
        chosen = tl.where(place == j, best.to(tl.int32), chosen)
        left = tl.where(at == best, float("-inf"), left)
    if RENORMALIZE:
        found /= tl.sum(found, 0)
    kept = place < COUNT
    known = tl.load(remap + tl.maximum(variant, 0) * remap_stride + chosen, mask=kept, other=0)
    tl.store(physical + row * COUNT + place, tl.where(variant >= 0, known, -1), mask=kept)
    tl.store(weights + row * COUNT + place, found, mask=kept)
