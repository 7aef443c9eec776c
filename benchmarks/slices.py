"""Baselines of qos.py that answer one request at a time, timed alone on the whole GPU.

A slice is what MIG leaves each of several models on one GPU: its weights outside the experts, and
as many experts as fit beside them. The others are in page-locked host memory and are copied when a
token needs them, over the least recently used of their layer. It is the baseline of Imani et al.
(ICML 2025), not the best a user can do. Everything is in its favor: it has the memory of a slice
but the compute and the host link of the whole GPU to itself, and of the experts that a layer
needs those that are there come first.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peers import random_model
from random_artifact import SPREAD
from shapes import expert_layers
from torch import Tensor, nn
from torch.nn import functional

from moecc.runtime import devices
from moecc.runtime.nonexpert import places
from moecc.skeleton import load_config, model_class

NAME = "slice"  # of the experts function in transformers
# Host copies of different experts: the others alias them, for all of them would not fit.
HOST_EXPERTS = 8
RESERVED = {"cuda": 512 << 20, "cpu": 0}  # bytes of a slice for keys, values and activations

Service = tuple[float, float]  # seconds to the first token, and to the last


class Cache:
    """The experts of one layer that are on the device, `[slots, elements]`, and which they are."""

    def __init__(self, slots: int, host: Tensor, first: int, device: torch.device) -> None:
        """`host` `[HOST_EXPERTS, elements]`; `first` is the number of the layer's expert 0."""
        self._host = host
        self._first = first
        self._slots = torch.empty(slots, host.shape[1], dtype=host.dtype, device=device)
        self._held: OrderedDict[int, int] = OrderedDict()  # expert -> slot, the last used last
        self.hits = self.misses = 0

    def __contains__(self, expert: int) -> bool:
        return expert in self._held

    def weights(self, expert: int) -> Tensor:
        """An expert's weights, flat; copied in if they are not there."""
        if expert in self._held:
            self.hits += 1
        else:
            self.misses += 1
            full = len(self._held) == len(self._slots)
            slot = self._held.popitem(last=False)[1] if full else len(self._held)
            source = self._host[(self._first + expert) % len(self._host)]
            self._slots[slot].copy_(source, non_blocking=True)
            self._held[expert] = slot
        self._held.move_to_end(expert)
        return self._slots[self._held[expert]]


class Slice:
    """A model in a part of the device's memory; answers one request at a time."""

    def __init__(self, config: Mapping[str, Any], nbytes: int, device: torch.device) -> None:
        """`nbytes` is the memory of the slice; SystemExit if not one expert a layer fits."""
        from accelerate import init_empty_weights
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        ALL_EXPERTS_FUNCTIONS.register(NAME, sliced_experts)
        self.device = device
        dtype = getattr(torch, config["dtype"])
        with init_empty_weights(include_buffers=False):
            self.model = model_class(NAME, dict(config))._from_config(
                load_config(NAME, dict(config)), dtype=dtype, experts_implementation=NAME
            )
        layers = expert_layers(self.model)
        for layer in layers:
            for projection in layer.projections:
                del self.model.get_submodule(layer.name)._parameters[projection.name]
        own = self._place(dtype)
        room = nbytes - own - RESERVED[device.type]
        slots, more = divmod(room // layers[0].exact_bytes, len(layers))
        if slots < 1:
            raise SystemExit(f"a slice of {nbytes} bytes does not hold an expert of every layer")
        self._host = devices.pinned(HOST_EXPERTS, layers[0].exact_bytes, device)
        host = self._host.view(dtype)
        for weights in host:  # made on the device, which is faster
            weights.copy_(torch.empty_like(weights, device=device).normal_(0, SPREAD))
        self.caches = []
        for number, layer in enumerate(layers):
            count = min(slots + (number < more), layer.num_experts)
            cache = Cache(count, host, number * layer.num_experts, device)
            self.model.get_submodule(layer.name).sliced = cache
            self.caches.append(cache)
        self.slots = slots
        self.nbytes = own + sum(cache._slots.nbytes for cache in self.caches)
        self.model.eval()

    def close(self) -> None:
        devices.release(self.device, self._host)

    @property
    def hit_rate(self) -> float:
        hits = sum(cache.hits for cache in self.caches)
        return hits / max(1, hits + sum(cache.misses for cache in self.caches))

    @torch.inference_mode()
    def answer(self, prompt: tuple[int, ...], tokens: int) -> Service:
        """Greedily, as `generate` does."""
        start = time.perf_counter()
        ids, cache, first = torch.tensor([prompt], device=self.device), None, 0.0
        for number in range(tokens):
            output = self.model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            ids = output.logits[:, -1:].argmax(-1)
            int(ids)  # when it is there
            first = first if number else time.perf_counter() - start
        return first, time.perf_counter() - start

    def _place(self, dtype: torch.dtype) -> int:
        """Random weights outside the experts; their bytes."""
        total = 0
        for _, owner, key in places(self.model):
            tensor = owner[key]
            if tensor.is_meta:
                made = torch.ones(tensor.shape, dtype=dtype, device=self.device)
                made = made.normal_(0, SPREAD) if made.dim() > 1 else made
                owner[key] = nn.Parameter(made, requires_grad=False)
            else:
                owner[key] = tensor.to(self.device)
            total += owner[key].nbytes
        return total


def sliced_experts(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """An expert after the other, as transformers' own loop: `[T, H]` in and out."""
    cache: Cache = module.sliced
    result = torch.zeros_like(hidden_states)
    hidden = hidden_states.shape[1]
    needed = top_k_index.unique().tolist()
    for expert in sorted(needed, key=lambda e: e not in cache):
        tokens, choices = (top_k_index == expert).nonzero(as_tuple=True)
        flat = cache.weights(expert)
        inner_size = flat.numel() // (3 * hidden)
        gate_up, down = flat.split((2 * inner_size * hidden, inner_size * hidden))
        inner = functional.linear(hidden_states[tokens], gate_up.view(2 * inner_size, hidden))
        inner = module._apply_gate(inner)
        out = functional.linear(inner, down.view(hidden, inner_size))
        out = out * top_k_weights[tokens, choices, None]
        result.index_add_(0, tokens, out.to(result.dtype))
    return result


class Generate:
    """transformers' `generate`, a request at a time, with one of its experts implementations."""

    def __init__(self, config: Mapping[str, Any], device: torch.device) -> None:
        self.device = device
        self.model = random_model(dict(config), device)

    def use(self, implementation: str) -> None:
        self.model.set_experts_implementation(implementation)

    @torch.inference_mode()
    def answer(self, prompt: tuple[int, ...], tokens: int) -> Service:
        ids = torch.tensor([prompt], device=self.device)
        stamps = _Stamps()
        start = time.perf_counter()
        self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=stamps,
        )
        return stamps.at[1] - start, stamps.at[-1] - start


class _Stamps:
    """A streamer: when the prompt, and then every token, was put."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, value: Tensor) -> None:
        self.at.append(time.perf_counter())

    def end(self) -> None:
        pass


def services(
    answer: Callable[[tuple[int, ...], int], Service],
    asked: list[tuple[int, ...]],
    tokens: int,
    warm: int = 1,
) -> list[Service]:
    """The seconds of each request, after `warm` that do not count."""
    return [answer(prompt, tokens) for prompt in asked][warm:]
