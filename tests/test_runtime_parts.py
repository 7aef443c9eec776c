"""The parts of the runtime, each against something simpler: dense float64 attention, one variant's
own modules, rows read from the artifact, and what `from_pretrained` makes of the sources."""

from __future__ import annotations

import importlib
import math
import operator
import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers
from conftest import compile_recipe, write_recipe
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moecc.artifact import Artifact
from moecc.bank import CENTER_POOL, RESIDUAL_POOL
from moecc.coding import Coding, decode, encode
from moecc.errors import DamagedArtifactError, RuntimeUnfitError
from moecc.export import load_model
from moecc.runtime import attention, experts, loading, stacked, step
from moecc.runtime.attention import KVCache, Piece, Plan, paged_attention
from moecc.runtime.experts import REMAP, LayerExperts, SlotPool, fused_experts
from moecc.runtime.loading import Skeletons
from moecc.runtime.nonexpert import ALIGN, Binding, RowLayout, places, shared
from moecc.runtime.residency import Mixed, Resident, Swap
from moecc.runtime.stacked import Stacked, gathered

CPU = torch.device("cpu")
ANY = settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))


pytestmark = pytest.mark.usefixtures("one_thread")


def no_progress(stage: str, done: int, total: int) -> None:
    pass


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality that tells -0.0 from 0.0, and one NaN from another."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(
        a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
    )


def a_step(variants: Sequence[int], counts: Sequence[int], plan: Any = None) -> step.Step:
    """A pass over rows of some variants, of which all are outputs."""
    rows = step.Rows(step.spans(variants, counts), CPU)
    return step.Step(rows, rows, torch.arange(rows.count), plan)


# The pass


def test_spans() -> None:
    assert step.spans([], []) == ()
    found = step.spans([2, 2, 0, 1, 1, 1], [3, 1, 2, 1, 1, 5])
    assert [(s.variant, s.start, s.stop) for s in found] == [(2, 0, 4), (0, 4, 6), (1, 6, 13)]
    rows = step.Rows(found, CPU)
    assert rows.count == 13
    assert rows.variants.tolist() == [2] * 4 + [0] * 2 + [1] * 7


def test_a_pass_is_known_to_its_thread_alone() -> None:
    assert step.current() is None
    one = a_step([0], [1])
    seen: list[step.Step | None] = []
    with step.running(one):
        assert step.current() is one
        assert one.rows is one.tokens
        with step.own_order():
            assert one.rows is None
        assert one.rows is one.tokens
        thread = threading.Thread(target=lambda: seen.append(step.current()))
        thread.start()
        thread.join()
    assert step.current() is None
    assert seen == [None]
    with suppress(ZeroDivisionError), step.running(one):
        raise ZeroDivisionError
    assert step.current() is None
    with step.own_order():  # outside of a pass, as the experts of a static batch are
        pass


def test_only_outputs() -> None:
    hidden = torch.arange(6.0)[:, None, None]
    assert step.only_outputs(None, (hidden, 1))[0] is hidden
    tokens, outputs = (step.Rows(step.spans([0, 1], c), CPU) for c in ([4, 2], [1, 1]))
    one = step.Step(tokens, outputs, torch.tensor([3, 5]), None)
    with step.running(one):
        found, more = step.only_outputs(None, (hidden, 7))
        assert (found.flatten().tolist(), more) == ([3.0, 5.0], 7)
        assert one.rows is outputs


# Attention


@dataclass
class Story:
    """Keys, values and queries of one sequence, whole, and how far it has come."""

    variant: int
    q: Tensor
    k: Tensor
    v: Tensor
    blocks: list[int]
    done: int = 0


def dense(story: Story, form: dict[str, Any], sinks: Tensor | None, dim: int) -> Tensor:
    """Every token of a sequence over all before it, in float64 and in so many words."""
    q, k, v = (t.double() for t in (story.q, story.k, story.v))
    groups = q.shape[1] // k.shape[1]
    scaling = form["scaling"] if form["scaling"] is not None else dim**-0.5
    out = torch.zeros(*q.shape[:2], v.shape[-1], dtype=torch.float64)
    for token in range(q.shape[0]):
        first = 0 if form["window"] is None else max(0, token - form["window"] + 1)
        for head in range(q.shape[1]):
            scores = k[first : token + 1, head // groups] @ q[token, head] * scaling
            if form["softcap"] is not None:
                scores = torch.tanh(scores / form["softcap"]) * form["softcap"]
            weights = scores.exp()
            total = weights.sum()
            if sinks is not None:
                total = total + sinks[story.variant, head].double().exp()
            out[token, head] = (weights / total) @ v[first : token + 1, head // groups]
    return out


@ANY
@given(st.data())
def test_attention(data: st.DataObject) -> None:
    draw = data.draw
    rng = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    kv_heads, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    dim, value_dim = draw(st.sampled_from([1, 4, 8])), draw(st.sampled_from([1, 4, 6]))
    heads, block = kv_heads * groups, draw(st.integers(1, 5))
    lengths = draw(st.lists(st.integers(1, 13), min_size=1, max_size=5))
    form = {
        "scaling": draw(st.sampled_from([None, 0.3])),
        "window": draw(st.sampled_from([None, 1, 3, 100])),
        "softcap": draw(st.sampled_from([None, 2.0])),
    }
    sinks = draw(st.sampled_from(["none", "same", "own"]))
    stack = torch.randn(3, heads, generator=rng)
    own: Any = {"none": None, "same": stack[0], "own": Stacked.of(stack)}[sinks]
    wanted = None if sinks == "none" else stack if sinks == "own" else stack[:1].expand(3, -1)
    layers = 2
    total = sum(-(-n // block) for n in lengths) + 2
    free = draw(st.permutations(range(total)))
    stories, at = [], 0
    for n in lengths:
        count = -(-n // block)
        q, k = (torch.randn(n, h, dim, generator=rng) for h in (heads, kv_heads))
        v = torch.randn(n, kv_heads, value_dim, generator=rng)
        stories.append(Story(draw(st.integers(0, 2)), q, k, v, list(free[at : at + count])))
        at += count
    expected = [dense(s, form, wanted, dim) for s in stories]
    cache = KVCache(total, block)
    before = attention._DECODE_TOKENS
    attention._DECODE_TOKENS = draw(st.sampled_from([1, 9, before]))
    try:
        while left := [i for i, s in enumerate(stories) if s.done < len(s.q)]:
            chosen = draw(st.lists(st.sampled_from(left), min_size=1, unique=True))
            chosen.sort(key=lambda i: stories[i].variant)
            counts = [draw(st.integers(1, len(stories[i].q) - stories[i].done)) for i in chosen]
            pieces, start = [], 0
            for i, count in zip(chosen, counts, strict=True):
                s = stories[i]
                pieces.append(Piece(start, start + count, s.done, s.blocks))
                start += count
            running = a_step([stories[i].variant for i in chosen], counts)
            running.plan = Plan(pieces, cache, CPU)
            for layer in range(layers):  # the second has the signs of everything turned
                sign = 1 - 2 * layer
                q, k, v = (
                    torch.cat(
                        [
                            getattr(stories[i], name)[stories[i].done : stories[i].done + count]
                            for i, count in zip(chosen, counts, strict=True)
                        ]
                    )
                    for name in "qkv"
                )
                with step.running(running):
                    out, weights = paged_attention(
                        SimpleNamespace(layer_idx=layer),
                        sign * q[:, :, None],
                        sign * k[:, :, None],
                        sign * v[:, :, None],
                        None if form["window"] is None else torch.tensor(form["window"]),
                        scaling=form["scaling"],
                        sliding_window=3,  # what counts is the mask
                        softcap=form["softcap"],
                        s_aux=own,
                    )
                assert weights is None
                assert out.shape == (start, 1, heads, value_dim)
                want = torch.cat(
                    [
                        expected[i][stories[i].done : stories[i].done + count]
                        for i, count in zip(chosen, counts, strict=True)
                    ]
                )
                torch.testing.assert_close(out[:, 0].double(), sign * want, rtol=1e-4, atol=1e-5)
            for i, count in zip(chosen, counts, strict=True):
                stories[i].done += count
    finally:
        attention._DECODE_TOKENS = before


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_attention_in_bfloat16(softcap: float | None) -> None:
    """The dtype of the values comes out, near the exact answer."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(9, h, 8, generator=rng).bfloat16() for h in (4, 2, 2))
    form = {"scaling": None, "window": None, "softcap": softcap}
    want = dense(Story(0, q, k, v, []), form, None, 8)
    running = a_step([0], [9])
    running.plan = Plan([Piece(0, 9, 0, [1, 0, 2])], KVCache(3, 4), CPU)
    with step.running(running):
        out, _ = paged_attention(
            SimpleNamespace(layer_idx=0), *(t[:, :, None] for t in (q, k, v)), softcap=softcap
        )
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out[:, 0].double(), want, rtol=2e-2, atol=2e-2)


def test_a_block_is_used_again() -> None:
    """What a sequence left behind in its blocks is not seen by the next one."""
    cache, outs = KVCache(2, 4), []
    for filler in (math.nan, 1e30, 0.0):
        first = torch.full((8, 1, 1, 4), filler)
        second = torch.randn(3, 1, 1, 4, generator=torch.Generator().manual_seed(1))
        for tokens in (first, second):
            running = a_step([0], [len(tokens)])
            running.plan = Plan([Piece(0, len(tokens), 0, [1, 0])], cache, CPU)
            with step.running(running):
                out, _ = paged_attention(SimpleNamespace(layer_idx=0), tokens, tokens, tokens)
        outs.append(out)
    assert outs[0].isfinite().all()
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_nobody_sees_anothers_nan(softcap: float | None) -> None:
    """Sequences that decode together: the numbers of one do not reach the others."""
    cache = KVCache(4, 2)
    found = []
    for value in (0.5, math.nan):
        rows = torch.randn(5, 1, 1, 4, generator=torch.Generator().manual_seed(2))
        rows[3:] = value
        running = a_step([0, 0], [3, 2])
        running.plan = Plan([Piece(0, 3, 0, [3, 0]), Piece(3, 5, 0, [1])], cache, CPU)
        with step.running(running):
            paged_attention(SimpleNamespace(layer_idx=0), rows, rows, rows, softcap=softcap)
        decode = rows[[0, 3]]
        running = a_step([0, 0], [1, 1])
        running.plan = Plan([Piece(0, 1, 3, [3, 0]), Piece(1, 2, 2, [1, 2])], cache, CPU)
        with step.running(running):
            out, _ = paged_attention(
                SimpleNamespace(layer_idx=0), decode, decode, decode, softcap=softcap
            )
        found.append(out[0])
    assert found[0].isfinite().all()
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"attention_mask": torch.zeros(1)}, "mask or layout"),
        ({"position_bias": torch.zeros(1)}, "argument `position_bias`"),
        ({"indices": 3}, "argument `indices`"),
        ({"is_causal": True, "cache_position": torch.zeros(1), "other": None}, None),
    ],
)
def test_arguments_that_are_not_known(arguments: dict[str, Any], text: str | None) -> None:
    x = torch.randn(2, 1, 1, 4)
    running = a_step([0], [2])
    running.plan = Plan([Piece(0, 2, 0, [0])], KVCache(1, 4), CPU)
    with step.running(running):
        if text is None:
            assert paged_attention(SimpleNamespace(layer_idx=0), x, x, x, **arguments)[0].shape
            return
        with pytest.raises(RuntimeUnfitError, match=text):
            paged_attention(SimpleNamespace(layer_idx=0), x, x, x, **arguments)


@pytest.mark.parametrize("size", [None, 1, 2, 3, 8, 4096])
def test_masks(size: int | None) -> None:
    """Of the masks that transformers makes, those that a window says all of."""
    from transformers.masking_utils import (
        and_masks,
        bidirectional_mask_function,
        causal_mask_function,
        chunked_causal_mask_function,
        packed_sequence_mask_function,
        sliding_window_causal_mask_function,
    )

    def found(function: Any, **others: Any) -> Tensor | None:
        return attention.window_mask(mask_function=function, local_size=size, **others)

    packed = packed_sequence_mask_function(torch.tensor([[0, 0, 1] + [1] * 20000]))
    others = [bidirectional_mask_function, and_masks(causal_mask_function, packed)]
    if size is None:
        assert found(causal_mask_function, batch_size=3, use_vmap=False) is None
        others.append(sliding_window_causal_mask_function(5))
    else:
        mask = found(sliding_window_causal_mask_function(size))
        assert mask is not None
        assert (mask.dim(), int(mask)) == (0, size)
        others += [sliding_window_causal_mask_function(size + 1), causal_mask_function]
        if size > 1:
            others.append(chunked_causal_mask_function(size, torch.zeros(1, dtype=torch.int64)))
    for function in others:
        with pytest.raises(RuntimeUnfitError, match="neither causal nor a sliding window"):
            found(function)


def test_more_than_one_query_a_row() -> None:
    x = torch.randn(2, 1, 3, 4)
    with step.running(a_step([0], [2])), pytest.raises(RuntimeUnfitError, match="layout"):
        paged_attention(SimpleNamespace(layer_idx=0), x, x, x)


def test_cache_sizes() -> None:
    cache = KVCache(3, 4)
    assert (cache.nbytes, cache.block_bytes) == (0, 0)
    slots = torch.tensor([11, 0])
    cache.write(0, slots, torch.ones(2, 2, 8), torch.ones(2, 2, 6))
    assert cache.nbytes == 12 * 2 * (8 + 6) * 4
    cache.write(7, slots, torch.ones(2, 1, 8).bfloat16(), torch.ones(2, 1, 8).bfloat16())
    assert cache.nbytes == 12 * 2 * (8 + 6) * 4 + 12 * 16 * 2
    assert cache.block_bytes * 3 == cache.nbytes
    keys, values = cache.read(0, torch.tensor([[0, 11], [11, 0]]))
    assert keys.shape == (2, 2, 2, 8)
    assert values.sum() == 4 * 12
    other = cache.resized(10)
    assert (other.blocks, other.block_size) == (10, 4)
    assert other.block_bytes == cache.block_bytes
    assert other.nbytes == 10 * cache.block_bytes
    other.write(0, torch.tensor([39]), torch.ones(1, 2, 8), torch.ones(1, 2, 6))
    assert other.nbytes == 10 * cache.block_bytes
    assert other.read(7, torch.tensor([0]))[0].dtype == torch.bfloat16


# Weights of all variants at once

V, R, H = 3, 7, 8
SPANS = ([0, 2, 1], [3, 1, 3])  # the variants of the rows, not in order
VARIANT = [0, 0, 0, 2, 1, 1, 1]


@pytest.fixture(params=["spans", "drawn", "kernels"])
def known(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether the host knows whose rows are whose; if not, whether kernels multiply."""
    found: str = request.param
    monkeypatch.setattr(stacked, "on_gpu", lambda _: found == "kernels")
    if found != "spans":
        monkeypatch.setattr(sys.modules[__name__], "a_step", drawn_step)
    return found


either_way = pytest.mark.usefixtures("known")


def drawn_step(variants: Sequence[int], counts: Sequence[int]) -> step.Step:
    """As `a_step`, of rows whose variants are data."""
    each = [v for v, count in zip(variants, counts, strict=True) for _ in range(count)]
    rows = step.Drawn(torch.tensor(each, dtype=torch.int32), V)
    return step.Step(rows, rows, torch.arange(rows.count), None)


@contextmanager
def in_a_batch() -> Iterator[None]:
    with step.running(a_step(*SPANS)):
        yield


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def put(module: nn.Module, stacks: dict[str, Tensor], variant: int | None) -> nn.Module:
    """Gives a module one variant's weights, or those of all."""
    for name, owner, key in places(module):
        if name in stacks:
            value = stacks[name]
            owner[key] = Stacked.of(value) if variant is None else value[variant]
    return module


def check_module(module: nn.Module, x: Tensor, exact: bool = True, **others: Any) -> None:
    """A module with the weights of all variants against itself with each one's."""
    stacks = {
        n: randn(V, *o[k].shape, seed=i, dtype=o[k].dtype)
        for i, (n, o, k) in enumerate(places(module))
    }
    with torch.inference_mode():
        with in_a_batch():
            found = put(module, stacks, None)(x, **others)
        each = [put(module, stacks, v)(x, **others) for v in range(V)]
    found, *each = (t[0] if isinstance(t, tuple) else t for t in (found, *each))
    want = torch.stack([each[v][row] for row, v in enumerate(VARIANT)])
    assert found.dtype == want.dtype
    if exact:
        assert torch.equal(found, want)
    else:
        torch.testing.assert_close(found, want)
    assert not torch.equal(each[0], each[1])


SHAPES = [(R, 1, H), (R, 1, 4, H), (R, 4, 1, H), (R, H)]


@either_way
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear(shape: tuple[int, ...], bias: bool) -> None:
    check_module(nn.Linear(H, 5, bias=bias), randn(*shape, seed=9), exact=False)


@either_way
def test_linear_of_which_only_one_differs() -> None:
    """Weights that are equal in all variants are there as they are."""
    module = nn.Linear(H, 5)
    stack, x = randn(V, 5), randn(R, 1, H, seed=1)
    weight = module.weight.detach()
    module._parameters["bias"] = Stacked.of(stack)  # type: ignore[assignment]
    with in_a_batch(), torch.inference_mode():
        found = module(x)
    want = torch.stack([F.linear(x[r], weight, stack[v]) for r, v in enumerate(VARIANT)])
    torch.testing.assert_close(found, want)


@either_way
def test_embedding() -> None:
    check_module(nn.Embedding(11, H), torch.arange(R)[:, None])
    check_module(nn.Embedding(11, H, padding_idx=0), torch.arange(R)[:, None])


def test_layer_norm(known: str) -> None:
    exact = known == "spans"
    for shape in SHAPES:
        check_module(nn.LayerNorm(H), randn(*shape, seed=3), exact)
        check_module(nn.LayerNorm(H, bias=False), randn(*shape, seed=3), exact)


def norms() -> dict[str, Callable[[], nn.Module]]:
    found: dict[str, Callable[[], nn.Module]] = {"nn": lambda: nn.RMSNorm(H, eps=1e-5)}
    families = """mixtral qwen2_moe qwen3_moe olmoe deepseek_v2 deepseek_v3 gpt_oss granitemoe jamba
    ernie4_5_moe minimax_m2 gemma gemma2 gemma3 glm4_moe qwen3_next dots1 hunyuan_v1_moe llama4
    flex_olmo phimoe nemotron_h dbrx afmoe"""
    for family in families.split():
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        for name, cls in vars(module).items():
            own = isinstance(cls, type) and cls.__module__ == module.__name__
            if own and name.endswith("RMSNorm"):
                found[name] = lambda cls=cls: cls(H)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norms(dtype: torch.dtype, known: str) -> None:
    made = norms()
    assert {"Gemma3RMSNorm", "GptOssRMSNorm", "DeepseekV3RMSNorm", "Qwen3NextRMSNorm"} <= set(made)
    assert len(made) > 15
    refused = set()
    for name, make in made.items():
        for shape in SHAPES:
            try:
                exact = known == "spans" or name != "nn"  # the others are made of smaller steps
                check_module(make().to(dtype), randn(*shape, seed=3, dtype=dtype), exact)
            except RuntimeUnfitError:  # such a family is not served in mixed batches
                refused.add(name)
    assert refused <= {"Llama4TextL2Norm"}


def test_functional_rms_norm(known: str) -> None:
    for eps in (None, 1e-3):
        stack, x = randn(V, H), randn(R, 1, H, seed=1)
        with in_a_batch():
            found = F.rms_norm(x, [H], Stacked.of(stack), eps)
            named = F.rms_norm(x, normalized_shape=(H,), weight=Stacked.of(stack), eps=eps)
        want = torch.stack([F.rms_norm(x[r], [H], stack[v], eps) for r, v in enumerate(VARIANT)])
        assert torch.equal(found, named)
        if known == "spans":
            assert torch.equal(found, want)
        torch.testing.assert_close(found, want)


@either_way
def test_layer_scalars() -> None:
    """A weight of one number, and numbers that meet a weight."""
    stack, x = randn(V), randn(R, 1, H, seed=1)
    weight = Stacked.of(stack)
    column = torch.stack([stack[v] for v in VARIANT])[:, None, None]
    with in_a_batch():
        assert torch.equal(x * weight, x * column)
        assert torch.equal((1 - weight) * x, (1 - column) * x)
        assert torch.equal(x / (weight * torch.tensor(2.0)), x / (column * 2.0))
        assert torch.equal(x - -weight.exp().float(), x + column.exp())


@either_way
def test_score_bias() -> None:
    """The routers of DeepSeek, MiniMax and Ernie."""
    scores, stack = randn(R, 4, seed=1), randn(V, 4)
    want = torch.stack([scores[r] + stack[v] for r, v in enumerate(VARIANT)])
    with in_a_batch():
        assert torch.equal(scores + Stacked.of(stack).unsqueeze(0), want)
        assert torch.equal(scores + Stacked.of(stack), want)
        assert torch.equal(scores + Stacked.of(stack[:, None]).squeeze(), want)


@either_way
def test_rotary_frequencies() -> None:
    """A real rotary embedding whose frequencies are the variants' own."""
    from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding

    made = []
    for theta in (1e2, 1e4, 1e6):
        config = transformers.MixtralConfig(
            hidden_size=32,
            num_attention_heads=4,
            rope_parameters={"rope_type": "default", "rope_theta": theta},
        )
        made.append(MixtralRotaryEmbedding(config))
    positions = torch.arange(R)[:, None] * 5
    x = randn(R, 1, 32)
    each = [module(x, positions) for module in made]
    stack = torch.stack([m.inv_freq for m in made])
    mixed = made[0]
    mixed._buffers["inv_freq"] = Stacked.of(stack)
    with in_a_batch():
        found = mixed(x, positions)
    for i in (0, 1):
        want = torch.stack([each[v][i][row] for row, v in enumerate(VARIANT)])
        torch.testing.assert_close(found[i], want)
        assert not torch.equal(each[0][i], each[1][i])


def test_gathered() -> None:
    stack = randn(V, 2, 3)
    with in_a_batch():
        assert torch.equal(gathered(Stacked.of(stack)), stack[VARIANT])
    with pytest.raises(RuntimeUnfitError):
        gathered(Stacked.of(stack))


def test_queries() -> None:
    weight = Stacked.of(randn(V, 5, H, dtype=torch.bfloat16))
    assert weight.shape == (5, H) == weight.size()
    assert (weight.dtype, weight.device, weight.ndim) == (torch.bfloat16, CPU, 2)
    assert (weight.numel(), len(weight), weight.dim()) == (40, 5, 2)
    assert weight.is_floating_point()
    assert not weight.requires_grad
    assert randn(2).to(weight.dtype).dtype == torch.bfloat16
    assert weight.to(torch.float32).stack.dtype == torch.float32
    assert weight.to(torch.float32).shape == (5, H)


W = Stacked.of(randn(V, H, H))
B = Stacked.of(randn(V, H))
S = Stacked.of(randn(V))
X, Y = randn(R, 1, H), randn(R, H)
INDEX = (torch.arange(2 * R) % H).view(R, 2)
# What would compute with one variant's weight, or with all of them at once: none may go through.
UNKNOWN: dict[str, Callable[[], Any]] = {
    "matmul": lambda: torch.matmul(X, W),
    "@": lambda: X @ W,
    "@ from the left": lambda: W @ Y.t(),
    "T": lambda: X @ W.T,
    "mT": lambda: W.mT,
    "t": lambda: W.t(),
    "transpose": lambda: W.transpose(0, 1),
    "permute": lambda: W.permute(1, 0),
    "reshape": lambda: W.reshape(-1),
    "view": lambda: W.view(-1),
    "flatten": lambda: W.flatten(),
    "cat": lambda: torch.cat([W, W]),
    "cat with an activation": lambda: torch.cat([Y, W]),
    "stack": lambda: torch.stack([B, B]),
    "row": lambda: W[0],
    "slice": lambda: W[:2],
    "leading axis": lambda: W[None],
    "ellipsis": lambda: W[...],
    "index": lambda: W[torch.tensor([0])],
    "column": lambda: W[:, 0],
    "select": lambda: B.select(0, 0),
    "index_select": lambda: B.index_select(0, torch.tensor([0])),
    "gather": lambda: B.gather(0, torch.tensor([0])),
    "narrow": lambda: B.narrow(0, 0, 1),
    "chunk": lambda: B.chunk(2),
    "split": lambda: B.split(4),
    "iteration": lambda: list(W),
    "item": lambda: S.item(),
    "float": lambda: float(S),
    "bool": lambda: bool(S),
    "tolist": lambda: B.tolist(),
    "numpy": lambda: B.numpy(),
    "data": lambda: B.data,
    "parameter": lambda: nn.Parameter(B),
    "expand": lambda: B.expand(R, H),
    "repeat": lambda: B.repeat(2),
    "sum": lambda: B.sum(),
    "mean": lambda: B.mean(),
    "norm": lambda: torch.linalg.vector_norm(B),
    "softmax": lambda: B.softmax(-1),
    "to the power": lambda: Y**B,
    "comparison": lambda: Y > B,
    "equality": lambda: B == 1,
    "where": lambda: torch.where(Y > 0, B, Y),
    "clamp": lambda: Y.clamp(max=B),
    "maximum": lambda: torch.maximum(Y, B),
    "einsum": lambda: torch.einsum("rh,oh->ro", Y, W),
    "conv1d": lambda: F.conv1d(randn(R, H, 5), Stacked.of(randn(V, H, 1, 2)), groups=H),
    "bmm": lambda: torch.bmm(X, Stacked.of(randn(V, R, H, H))),
    "addmm": lambda: torch.addmm(B, Y, randn(H, H)),
    "mv": lambda: torch.mv(Y, B),
    "outer": lambda: torch.outer(B, Y[0]),
    "group_norm": lambda: F.group_norm(Y, 2, B),
    "weight as the input": lambda: F.linear(W, randn(H, H)),
    "normalized weight": lambda: F.layer_norm(B, (H,)),
    "in place of the weight": lambda: B.add_(1),
    "copy": lambda: Y.clone().copy_(B),
    "assignment": lambda: Y.clone().__setitem__(0, B),
    "out": lambda: torch.add(Y, 1, out=B),
    "another number of rows": lambda: randn(R + 1, H) * B,
    "one row for all": lambda: randn(1, H) * B,
    "tokens on the second axis": lambda: F.linear(randn(1, R, H), W),
    "embedding of other rows": lambda: F.embedding(torch.zeros(2, dtype=torch.int64), W),
    "norm of other rows": lambda: F.layer_norm(randn(2, H), (H,), B),
    "a larger weight": lambda: torch.randn(R) * B,
    "numpy's way": lambda: __import__("numpy").asarray(B),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_functions_raise(name: str) -> None:
    with in_a_batch(), pytest.raises(RuntimeUnfitError):
        UNKNOWN[name]()


# Whatever these raise, they must not return something else.
ODD: dict[str, tuple[Callable[[], Any], Tensor]] = {
    "linear by name": (
        lambda: F.linear(input=X, weight=W),
        torch.stack([X[r] @ W.stack[v].T for r, v in enumerate(VARIANT)]),
    ),
    "add by name": (
        lambda: torch.add(input=X, other=B),
        torch.stack([X[r] + B.stack[v] for r, v in enumerate(VARIANT)]),
    ),
    "unsqueeze by name": (lambda: B.unsqueeze(dim=0), B.stack[VARIANT]),
    "weights of two ranks": (lambda: W * B, W.stack * B.stack[:, None]),
    "no index": (lambda: W[()], W.stack),
    "clone": (lambda: B.clone(), B.stack),
    "softplus": (lambda: F.softplus(B, beta=2.0), F.softplus(B.stack, beta=2.0)),
    "sigmoid": (lambda: torch.sigmoid(B), torch.sigmoid(B.stack)),
    "square": (lambda: B.square(), B.stack**2),
    "power": (lambda: B**2, B.stack**2),
    "reciprocal": (lambda: 1 / B, 1 / B.stack),
    "inverse root": (lambda: (B * B + 1).rsqrt(), (B.stack**2 + 1).rsqrt()),
    "clamp": (lambda: B.clamp(min=-0.1, max=0.2), B.stack.clamp(-0.1, 0.2)),
    "half": (lambda: B.half(), B.stack.half()),
    "in place": (lambda: Y.clone().add_(B), Y + B.stack[VARIANT]),
    "in place, scaled": (lambda: Y.clone().sub_(B, alpha=2), Y - 2 * B.stack[VARIANT]),
    "product in place": (lambda: operator.imul(X.clone(), B), X * B.stack[VARIANT][:, None]),
    "rows of a table": (lambda: W[INDEX], W.stack[torch.tensor(VARIANT)[:, None], INDEX]),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_calls_are_right_or_raise(name: str) -> None:
    call, want = ODD[name]
    with in_a_batch():
        try:
            found = call()
        except (RuntimeUnfitError, RuntimeError, TypeError, IndexError):
            return
    torch.testing.assert_close(found.stack if isinstance(found, Stacked) else found, want)


def test_weights_of_two_ranks_and_as_many_variants() -> None:
    """Where the axis of the variants fits that of the weight, nothing tells them apart."""
    wide, narrow = randn(V, V, H), randn(V, H, seed=1)
    with in_a_batch():
        try:
            found = Stacked.of(wide) * Stacked.of(narrow)
        except RuntimeUnfitError:
            return
    assert torch.equal(found.stack, wide * narrow[:, None])


def test_squeeze_of_one_axis() -> None:
    weight = Stacked.of(randn(V, 1, H, 1))
    for call in (lambda: weight.squeeze(0), lambda: weight.squeeze(dim=0)):
        with in_a_batch():
            try:
                found = call()
            except RuntimeUnfitError:
                continue
        assert found.shape == (H, 1)


def test_rows_in_an_order_of_their_own() -> None:
    with in_a_batch(), step.own_order():
        for call in (lambda: F.linear(X, W), lambda: Y * B, lambda: F.layer_norm(Y, (H,), B)):
            with pytest.raises(RuntimeUnfitError, match="order of their own"):
                call()
    with pytest.raises(RuntimeUnfitError):
        F.linear(X, W)  # outside of a pass


# Rows


dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64])
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@ANY
@given(
    st.dictionaries(st.text("abc.", min_size=1, max_size=6), st.tuples(dtypes, shapes), max_size=9),
    st.integers(1, 4),
)
def test_row_layout(tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]], variants: int) -> None:
    layout = RowLayout(tensors)
    assert list(layout.slots) == sorted(tensors)
    assume(layout.nbytes)  # a row of nothing at all has no views
    rows = torch.zeros(variants, layout.nbytes, dtype=torch.uint8)
    end = 0
    for name, slot in layout.slots.items():
        dtype, shape = tensors[name]
        assert (slot.dtype, slot.shape) == (dtype, shape)
        assert slot.offset % ALIGN == 0
        assert slot.offset >= end
        assert slot.nbytes == torch.empty(shape, dtype=dtype).nbytes
        end = slot.offset + slot.nbytes
    assert end <= layout.nbytes < end + ALIGN
    values: dict[tuple[int, str], Tensor] = {}
    for v in range(variants):
        for number, (name, view) in enumerate(layout.views(rows[v]).items()):
            value = torch.full(view.shape, v * 10 + number + 1).to(view.dtype)
            view.copy_(value)  # the row is what the view shows
            values[v, name] = value
            assert view.is_contiguous()
    for name, stack in layout.stacked(rows).items():
        assert stack.shape == (variants, *tensors[name][1])
        for v in range(variants):
            assert torch.equal(stack[v], values[v, name])
            if stack[v].numel():
                assert stack[v].data_ptr() == rows[v].data_ptr() + layout.slots[name].offset


def test_shared() -> None:
    layout = RowLayout(
        {"a": (torch.float32, (3,)), "b": (torch.bfloat16, (2,)), "e": (torch.int32, (0,))}
    )
    rows = torch.zeros(3, layout.nbytes, dtype=torch.uint8)
    assert shared(rows, layout) == {"a", "b", "e"}
    rows[:, 100:256] = torch.arange(3, dtype=torch.uint8)[:, None]  # between the slots
    assert shared(rows, layout) == {"a", "b", "e"}
    layout.views(rows[2])["b"][1] = -0.0
    assert shared(rows, layout) == {"a", "e"}
    for row in rows:
        layout.views(row)["a"].fill_(math.nan)  # the same bits
    assert shared(rows, layout) == {"a", "e"}
    assert shared(rows[:1], layout) == {"a", "b", "e"}


def test_binding() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
            self.two.weight = self.one.weight
            self.register_buffer("kept", torch.ones(2), persistent=False)
            self.register_buffer("other", torch.ones(2))
            self.norm = nn.LayerNorm(2)

    model = Model()
    layout = RowLayout(
        {
            "one.weight": (torch.float32, (2, 2)),
            "other": (torch.float32, (2,)),
            "norm.weight": (torch.bfloat16, (2,)),
        }
    )
    rows = torch.zeros(2, layout.nbytes, dtype=torch.uint8)
    binding = Binding(model, layout, {"two.weight": "one.weight"})
    for row in rows:
        views = layout.views(row)
        binding.bind(views)
        views["one.weight"].fill_(5)
        views["other"].fill_(7)
        assert model.one.weight.data_ptr() == model.two.weight.data_ptr() == row.data_ptr() + 256
        assert model.two.weight.sum() == 20
        assert model.other.tolist() == [7, 7]
        assert model.norm.weight.dtype == torch.bfloat16
    assert model.kept.tolist() == [1, 1]  # has no slot
    assert model.norm.bias.tolist() == [0, 0]


# Experts


class Lab:
    """Checkpoints and artifacts of tiny models; each is made once."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self.folder = factory.mktemp("parts")
        self._count = 0
        self.source = cache(self._source)
        self.artifact = cache(self._artifact)

    def new(self) -> Path:
        self._count += 1
        return self.folder / str(self._count)

    def _source(self, family: str, seed: int = 0, **options: Any) -> Path:
        return tiny.checkpoint(self.new(), family, seed, **options)

    def compiled(self, sources: dict[str, Path], **fields: Any) -> Path:
        folder = self.new()
        return compile_recipe(write_recipe(folder / "r.yaml", sources, **fields), folder / "out")

    def _artifact(
        self, family: str, budget: str = "9x", center: str = "4bit", residual: str = "2bit",
        group: Any = 32, copy: bool = False, **options: Any,
    ) -> Path:  # fmt: skip
        sources = {name: self.source(family, seed, **options) for seed, name in enumerate("ab")}
        if copy:
            sources["copy"] = sources["a"]
        merge = {"center": center, "residual": residual, "group": group}
        return self.compiled(sources, merge=merge, budget=budget)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory)


def layers_of(artifact: Artifact) -> tuple[LayerExperts, ...]:
    """The bank on the CPU, without models around it."""
    nobody = Skeletons(artifact, (), torch.bfloat16, RowLayout({}), {}, "")
    done = []
    found = loading.load_experts(nobody, CPU, lambda stage, at, total: done.append((at, total)))
    assert done[-1] == (nobody.expert_bytes, nobody.expert_bytes)
    assert sum(layer.nbytes for layer in found) == nobody.expert_bytes
    return found


def check_bank(path: Path, dtypes: Sequence[torch.dtype], expect: set[str]) -> None:
    """Every weight of every logical expert is, to the bit, what the artifact has."""
    seen = set()
    with Artifact(path) as artifact:
        for index, layer in enumerate(layers_of(artifact)):
            stored = artifact.layers[index]
            for p, projection in enumerate(stored.layer.projections):
                slots = layer.projections[projection.name]
                assert slots.matrix == projection.matrix
                numbers = list(range(len(slots.physical)))
                for dtype in dtypes:
                    decoded = list(slots.weights(numbers, dtype))
                    assert len(decoded) == len(numbers)
                    for v, variant in enumerate(artifact.variants):
                        for e in range(stored.layer.num_experts):
                            rows = artifact.rows(
                                variant, index, projection.name, e, range(projection.matrix[0])
                            )
                            found = decoded[int(layer.remap[v, e])]
                            assert found.dtype == dtype
                            assert same_bits(found.reshape(rows.shape), rows.to(dtype))
                    some = random.Random(index).sample(numbers, len(numbers) // 2)
                    for number, weight in zip(some, slots.weights(some, dtype), strict=True):
                        assert same_bits(weight, decoded[number])
                for entry in artifact.remap[index][:, :, p].reshape(-1, 4):
                    pools = stored.pools[p]
                    residual = (
                        pools[entry[RESIDUAL_POOL]].coding if entry[RESIDUAL_POOL] >= 0 else ""
                    )
                    seen.add(f"{pools[entry[CENTER_POOL]].coding} {residual}".strip())
    assert expect <= seen, seen


def coding(bits: int, group: int) -> str:
    return "BF16" if bits == 16 else f"{bits}bit-" + (f"g{group}" if group else "row")


@pytest.mark.parametrize(
    ("center", "residual", "group"),
    [
        (16, 0, 32),
        (8, 0, 0),
        (6, 0, 32),
        (5, 0, 64),
        (4, 0, 128),
        (16, 1, 32),
        (8, 2, 64),
        (6, 3, 128),
        (5, 1, 0),
        (4, 2, 0),
        (4, 3, 32),
    ],
)
def test_codings(lab: Lab, center: int, residual: int, group: int) -> None:
    path = lab.artifact(
        "mixtral",
        "1.3x" if residual == 0 else "1.7x",
        f"{center}bit",
        f"{residual}bit" if residual else "none",
        group or "row",
    )
    codings = f"{coding(center, group)} {coding(residual, group) if residual else ''}".strip()
    check_bank(path, [torch.bfloat16, torch.float32, torch.float16], {codings})


@pytest.mark.parametrize("center", [16, 8, 6, 5, 4, 3, 2, 1])
@pytest.mark.parametrize("residual", [0, 8, 6, 5, 4, 3, 2, 1])
def test_every_coding_of_the_format(center: int, residual: int) -> None:
    """Recipes allow fewer. Slots of four pools in any order, with shapes that fill no group."""
    group, (rows, cols) = (0, 32, 64, 128)[(center + residual) % 4], (3, 75)
    rng = np.random.default_rng(center * 10 + residual)
    pools: list[SlotPool] = []
    values: list[Tensor] = []  # [slots, rows, cols] in float32

    def pool(bits: int, slots: int, seed: int) -> None:
        matrices = randn(slots, rows, cols, seed=seed)
        if bits == 16:
            pools.append(SlotPool((matrices.bfloat16(),), None))
            values.append(matrices.bfloat16().float())
            return
        how = Coding(bits, group)
        parts = [encode(m, how) for m in matrices]
        planes = [torch.stack([p.planes[i] for p in parts]) for i in range(len(how.planes))]
        pools.append(SlotPool((*planes, torch.stack([p.scales for p in parts])), how))
        values.append(torch.stack([decode(p, how, cols) for p in parts]))

    pool(center, 4, 1)
    if residual:
        pool(residual, 7, 2)
    pool(16, 3, 3)
    table = np.full((2, 6, 1, 4), -1, dtype=np.int32)
    for entry in table.reshape(-1, 4):
        if rng.random() < 0.3:
            entry[:2] = len(pools) - 1, rng.integers(3)
        else:
            entry[:2] = 0, rng.integers(4)
            if residual:
                entry[2:] = 1, rng.integers(7)
    layer = LayerExperts(["w"], [(rows, cols)], [tuple(pools)], table)
    slots = layer.projections["w"]
    assert layer.nbytes == sum(t.nbytes for p in pools for t in p.tensors)
    decoded = list(slots.weights(range(len(slots.physical)), torch.float32))
    for v in range(2):
        for e in range(6):
            first, slot, second, other = (int(n) for n in table[v, e, 0])
            want = values[first][slot]
            if second >= 0:
                want = want + values[second][other]
            want = want.bfloat16().float()
            assert same_bits(decoded[int(layer.remap[v, e])], want)


FAMILIES_OF_EXPERTS = ["mixtral", "gpt-oss", "nemotron-h", "deepseek-v3", "switch"]


def some_private(lab: Lab, family: str, **options: Any) -> Path:
    """Coded and private experts side by side, and a variant that is a copy of another."""
    return lab.artifact(family, "1.4x", copy=True, **options)


@pytest.mark.parametrize("family", FAMILIES_OF_EXPERTS)
@pytest.mark.parametrize("at_once", [1, 1 << 22])
def test_private_experts_and_biases(
    lab: Lab, family: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts, "DECODED_AT_ONCE", at_once)
    path = some_private(lab, family)
    check_bank(path, [torch.bfloat16, torch.float32], {"4bit-g32 2bit-g32", "BF16"})
    with Artifact(path) as artifact:
        names = {p.name for stored in artifact.layers for p in stored.layer.projections}
        transposed = any(p.transposed for s in artifact.layers for p in s.layer.projections)
    assert (family == "gpt-oss") == transposed == ("down_proj_bias" in names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_dtypes_of_sources(lab: Lab, dtype: torch.dtype) -> None:
    path = lab.artifact("mixtral", "3.0x" if dtype == torch.float32 else "1.4x", dtype=dtype)
    name = {torch.float32: "F32", torch.float16: "F16"}[dtype]
    check_bank(path, [torch.float32, torch.bfloat16, torch.float16], {name})


def test_duplicates_share(lab: Lab) -> None:
    """A copy of a variant has the experts of the first, and every physical expert is used."""
    with Artifact(some_private(lab, "mixtral")) as artifact:
        for layer in layers_of(artifact):
            assert layer.remap.dtype == torch.int32
            assert torch.equal(layer.remap[0], layer.remap[2])
            assert not torch.equal(layer.remap[0], layer.remap[1])
            used = sorted(set(layer.remap.flatten().tolist()))
            for slots in layer.projections.values():
                assert len(slots.physical) == len(used)
            assert used == list(range(len(used)))
            assert len(used) <= 2 * layer.remap.shape[1]


def mlp_modules(model: Any, artifact: Artifact) -> list[Any]:
    return [model.get_submodule(stored.layer.name) for stored in artifact.layers]


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss", "nemotron-h", "deepseek-v3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_experts(lab: Lab, family: str, dtype: torch.dtype) -> None:
    """Rows of all variants at once, against each variant's own module in transformers."""
    rng = torch.Generator().manual_seed(3)
    with Artifact(some_private(lab, family)) as artifact, torch.inference_mode():
        models = [load_model(artifact, v, dtype=dtype) for v in artifact.variants]
        ours = loading.skeletons(artifact, str(dtype).removeprefix("torch."))
        layers = loading.load_experts(ours, CPU, no_progress)
        for index, (module, layer) in enumerate(
            zip(mlp_modules(ours.models[0], artifact), layers, strict=True)
        ):
            number = artifact.layers[index].layer.num_experts
            hidden = torch.randn(R, 32, generator=rng).to(dtype)
            top = torch.stack([torch.randperm(number, generator=rng)[:2] for _ in range(R)])
            weights = torch.rand(R, 2, generator=rng).to(dtype)
            module._buffers[REMAP] = layer.remap
            with in_a_batch():
                found = fused_experts(module, hidden, top, weights)
            for v, model in enumerate(models):
                rows = [r for r, variant in enumerate(VARIANT) if variant == v]
                own = mlp_modules(model, artifact)[index]
                model.set_experts_implementation("eager")
                want = own(hidden[rows], top[rows], weights[rows])
                tolerance = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
                torch.testing.assert_close(found[rows], want, **tolerance)
                module._buffers[REMAP] = layer.remap[v]  # as it is outside of mixed batches
                alone = fused_experts(module, hidden[rows], top[rows], weights[rows])
                torch.testing.assert_close(alone, want, **tolerance)
                # Same sums, whoever else is in the batch, where rows meet the same products.
            assert found.dtype == dtype


def test_one_token(lab: Lab) -> None:
    with Artifact(some_private(lab, "mixtral")) as artifact, torch.inference_mode():
        ours = loading.skeletons(artifact, "float32")
        layers = loading.load_experts(ours, CPU, no_progress)
        module = mlp_modules(ours.models[0], artifact)[0]
        module._buffers[REMAP] = layers[0].remap[1]
        x, one = randn(1, 32), torch.ones(1, 2)
        found = fused_experts(module, x, torch.tensor([[3, 3]]), one)
        single = fused_experts(module, x, torch.tensor([[3, 0]]), one * torch.tensor([2.0, 0.0]))
        torch.testing.assert_close(found, single)


# Loading


def prepared(path: Path, dtype: str, how: type = Resident) -> tuple[Artifact, Skeletons, Any]:
    artifact = Artifact(path)
    ours = loading.skeletons(artifact, dtype)
    layers = loading.load_experts(ours, CPU, no_progress)
    rows = torch.full((len(artifact.variants), ours.layout.nbytes), 0xEE, dtype=torch.uint8)
    loading.load_rows(ours, layers, rows, no_progress)
    residency = how(ours, rows, CPU) if how is Swap else how(ours, rows)
    return artifact, ours, residency


def outside(model: Any) -> dict[str, Tensor]:
    """Every parameter and buffer but the experts'."""
    found = {}
    for name, owner, key in places(model):
        parent, _, leaf = name.rpartition(".")
        fused = parent.endswith("experts") and leaf.startswith(("gate_up_proj", "up_proj", "down_"))
        if not (fused or ".expert_" in name or leaf == REMAP):
            found[name] = owner[key].detach()
    return found


def reference(source: Path, dtype: Any) -> Any:
    name = tiny.json.loads((source / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, name).from_pretrained(source, dtype=dtype).eval()
    for module in model.modules():
        if type(module).__name__ == "SwitchTransformersTop1Router":
            module.classifier.to(module.dtype)  # as it does itself when it first runs
    return model


def assert_loaded(model: Any, wanted: Any) -> None:
    found, want = outside(model), outside(wanted)
    assert sorted(found) == sorted(want)
    wrong = [n for n in want if not same_bits(found[n], want[n])]
    assert wrong == [], [(n, found[n].dtype, want[n].dtype) for n in wrong]


def check_loading(path: Path, sources: Sequence[Path], dtypes: Sequence[str]) -> None:
    for dtype in dtypes:
        artifact, ours, residency = prepared(path, dtype)
        with artifact:
            for v, source in enumerate(sources):
                wanted = reference(source, dtype if dtype == "auto" else getattr(torch, dtype))
                assert_loaded(residency.activate(v), wanted)
                tensors = outside(ours.models[v]).values()
                assert not any(t.is_meta for t in tensors)


FP32_KEPT = ["deepseek-v3", "ernie4.5-moe", "minimax-m2", "gpt-oss"]


@pytest.mark.parametrize("family", FP32_KEPT)
def test_dtypes(lab: Lab, family: str) -> None:
    path = lab.artifact(family)
    sources = [lab.source(family, seed) for seed in (0, 1)]
    check_loading(path, sources, ["bfloat16", "float16", "float32"])


@pytest.mark.parametrize("family", ["deepseek-v3", "ernie4.5-moe"])
def test_some_stay_in_float32(lab: Lab, family: str) -> None:
    """The tests above compare with such a model, or they would compare nothing."""
    artifact, ours, _ = prepared(lab.artifact(family), "bfloat16")
    artifact.close()
    kept = [s for s in ours.layout.slots.values() if s.dtype == torch.float32]
    assert any("inv_freq" not in slot.name for slot in kept), family


@pytest.mark.parametrize("family", sorted(set(tiny.FAMILIES) - set(FP32_KEPT)))
def test_every_tensor(lab: Lab, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "CHUNK_BYTES", 1)  # every tensor alone
    path = lab.artifact(family)
    check_loading(path, [lab.source(family, seed) for seed in (0, 1)], ["auto", "float32"])


@pytest.mark.parametrize("how", [Resident, Swap, Mixed])
def test_residencies(lab: Lab, how: type) -> None:
    path = lab.artifact("qwen3-moe", "1.4x", copy=True)
    artifact, ours, residency = prepared(path, "bfloat16", how)
    sources = [lab.source("qwen3-moe", seed) for seed in (0, 1, 0)]
    row = ours.layout.nbytes
    assert residency.nbytes == (2 if how is Swap else 3) * row
    assert residency.mode == how.__name__.lower()
    wanted = [reference(s, torch.bfloat16) for s in sources]
    with artifact:
        if how is not Mixed:
            for v in (0, 1, 2, 1, 0, 0, 2, 1):
                assert_loaded(residency.activate(v), wanted[v])
                residency.wait()
                assert residency.is_resident(v)
                residency.prefetch((v + 1) % 3)
                assert_loaded(ours.models[v], wanted[v])  # still there
                assert residency.is_resident((v + 1) % 3)
            return
        model = residency.activate(1)
        assert model is residency.activate(0)
        found, want = outside(model), [outside(w) for w in wanted]
        for name, tensor in found.items():
            alike = same_bits(want[0][name], want[1][name])
            assert isinstance(tensor, Stacked) != alike, name
            for v in range(3):
                own = tensor.stack[v] if isinstance(tensor, Stacked) else tensor
                assert same_bits(own, want[v][name]), name


def test_swap_says_who_is_there(lab: Lab) -> None:
    artifact, _, residency = prepared(lab.artifact("mixtral", copy=True), "auto", Swap)
    artifact.close()
    there = lambda: [v for v in range(3) if residency.is_resident(v)]  # noqa: E731
    assert there() == []
    residency.activate(0)
    assert there() == [0]
    residency.prefetch(2)
    assert there() == [0, 2]
    residency.prefetch(1)  # takes the place of what was only prefetched
    assert there() == [0, 1]
    residency.activate(1)
    residency.activate(2)
    assert there() == [1, 2]


def test_nothing_differs(lab: Lab) -> None:
    """Copies of one model: every weight is there as it is, and so are the experts' numbers."""
    source = lab.source("mixtral", 4)
    path = lab.compiled({"one": source, "other": source}, budget="9x")
    artifact, _, residency = prepared(path, "auto", Mixed)
    with artifact:
        model = residency.activate(0)
        assert_loaded(model, reference(source, "auto"))
        assert not any(isinstance(t, Stacked) for t in outside(model).values())
        assert model.get_buffer(f"model.layers.0.mlp.experts.{REMAP}").dim() == 1


def test_base_is_not_the_first(lab: Lab) -> None:
    sources = {n: lab.source("mixtral", s) for s, n in enumerate("abc")}
    path = lab.compiled(sources, base="c", budget="9x")
    with Artifact(path) as artifact:
        assert (artifact.base, artifact.variants) == ("c", ("a", "b", "c"))
    check_loading(path, list(sources.values()), ["auto", "float32"])


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", None)])
def test_dtype_is_that_of_the_base(lab: Lab, dtypes: tuple[str | None, ...]) -> None:
    """Configs may name other dtypes than the weights have."""
    sources = {}
    for number, (name, dtype) in enumerate(zip("ab", dtypes, strict=True)):
        folder = tiny.checkpoint(lab.new(), "mixtral", number)
        sources[name] = tiny.edit_config(folder, dtype=dtype, torch_dtype=None)
    path = lab.compiled(sources, base="b", budget="9x")
    with Artifact(path) as artifact:
        found = loading.skeletons(artifact, "auto").dtype
    assert found == getattr(torch, dtypes[1] or "bfloat16")
    assert found == reference(sources["b"], "auto").dtype


def test_other_rotary_bases(lab: Lab) -> None:
    """Computed buffers are the variants' own, and in mixed batches stacked."""
    sources = {name: lab.source("mixtral", seed) for seed, name in enumerate("a")} | {
        "b": tiny.edit_config(
            tiny.checkpoint(lab.new(), "mixtral", 1),
            rope_parameters={"rope_type": "default", "rope_theta": 77.0},
        )
    }
    path = lab.compiled(sources, budget="9x")
    check_loading(path, list(sources.values()), ["auto"])
    artifact, _, residency = prepared(path, "auto", Mixed)
    artifact.close()
    assert isinstance(residency.activate(0).get_buffer("model.rotary_emb.inv_freq"), Stacked)


# Tied weights

HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"


def head(kind: str, folder: Path) -> Path:
    """A tied checkpoint that also has its head: the same, or another."""
    if kind == "absent":
        return folder

    def add(values: dict[str, Tensor]) -> None:
        values[HEAD] = values[EMBED] * (1 if kind == "same" else 3)

    return tiny.edit(folder, add)


@pytest.mark.parametrize(
    "kinds",
    [
        ("absent", "absent"),
        ("same", "absent"),
        ("absent", "same"),
        ("same", "same"),
        ("absent", "other"),
        ("other", "absent"),
        ("other", "other"),
        ("same", "other", "absent"),
    ],
    ids="-".join,
)
def test_tied_heads(lab: Lab, kinds: tuple[str, ...]) -> None:
    sources = {
        name: head(kind, tiny.checkpoint(lab.new(), "qwen3-moe-tied", seed))
        for seed, (name, kind) in enumerate(zip("abc", kinds, strict=False))
    }
    path = lab.compiled(sources, budget="9x")
    wanted = [reference(s, "auto") for s in sources.values()]
    tied = "other" not in kinds
    for how in (Resident, Mixed):
        artifact, ours, residency = prepared(path, "auto", how)
        with artifact:
            assert ours.tied == ({HEAD: EMBED} if tied else {})
            assert (HEAD in ours.layout.slots) == (not tied)
            for v, want in enumerate(wanted):
                model = residency.activate(v)
                if how is Resident:
                    assert_loaded(model, want)
                    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
                else:
                    weight = model.lm_head.weight
                    own = weight.stack[v] if isinstance(weight, Stacked) else weight
                    assert same_bits(own, want.lm_head.weight.detach())
    kinds_loaded = [torch.equal(*(dict(outside(w))[n] for n in (HEAD, EMBED))) for w in wanted]
    assert kinds_loaded == [kind != "other" for kind in kinds]


# Families that transformers converts as it loads them

_KIMI = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 4,
    "num_experts_per_token": 2, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "linear_head_dim": 8, "linear_num_heads": 4, "model_max_length": 64,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONVERTED = {
    "kimi-linear": ("KimiLinearForCausalLM", _KIMI),
    "bailing-hybrid": (
        "BailingHybridForCausalLM",
        _KIMI | {"num_expert_group": 2, "topk_group": 1, "num_nextn_predict_layers": 0},
    ),
}


@pytest.mark.parametrize("chunk", [1, 512 << 20])
@pytest.mark.parametrize("family", CONVERTED)
def test_converted_families(
    lab: Lab, family: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(transformers, CONVERTED[family][0]):
        pytest.skip(f"transformers {transformers.__version__} does not have {family}")
    monkeypatch.setitem(tiny.FAMILIES, family, CONVERTED[family])
    monkeypatch.setattr(loading, "CHUNK_BYTES", chunk)
    sources = [lab.source(family, seed) for seed in (0, 1)]
    assert any("q_conv1d" in name for name in tiny.tensors(sources[0]))
    path = lab.artifact(family)
    check_loading(path, sources, ["bfloat16", "float32"])
    artifact, ours, _ = prepared(path, "auto")
    artifact.close()
    assert any(name.endswith("conv1d.weight") for name in ours.layout.slots)
    assert not any("q_conv1d" in name for name in ours.layout.slots)


# What does not fit


def test_dtypes_that_cannot_be(lab: Lab) -> None:
    with Artifact(lab.artifact("mixtral")) as artifact:
        for name in ("float8_e4m3fn", "int8", "", "bf16", "torch.float64"):
            with pytest.raises(RuntimeUnfitError, match="cannot compute in"):
                loading.skeletons(artifact, name)
        assert loading.skeletons(artifact, "torch.float16").dtype == torch.float16


def test_a_tensor_that_is_missing(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = Artifact(lab.artifact("mixtral"))
    stored = artifact.non_expert

    def without(variant: str) -> Any:
        found = stored(variant)
        return {n: t for n, t in found.items() if variant == "a" or n != "model.norm.weight"}

    monkeypatch.setattr(artifact, "non_expert", without)
    ours = loading.skeletons(artifact, "auto")
    layers = loading.load_experts(ours, CPU, no_progress)
    rows = torch.empty(2, ours.layout.nbytes, dtype=torch.uint8)
    with pytest.raises(DamagedArtifactError, match=r"`model.norm.weight` of variant `b`"):
        loading.load_rows(ours, layers, rows, no_progress)
    artifact.close()


def test_progress(lab: Lab) -> None:
    seen: list[tuple[str, int, int]] = []
    with Artifact(lab.artifact("mixtral")) as artifact:
        ours = loading.skeletons(artifact, "auto")
        layers = loading.load_experts(ours, CPU, lambda *at: seen.append(at))
        rows = torch.empty(2, ours.layout.nbytes, dtype=torch.uint8)
        loading.load_rows(ours, layers, rows, lambda *at: seen.append(at))
    for stage in ("experts", "non-expert weights"):
        done = [at for name, at, _ in seen if name == stage]
        assert done == sorted(done)
        assert {total for name, _, total in seen if name == stage} == {done[-1]}
    assert seen[-1][2] == rows.numel()
