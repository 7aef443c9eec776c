"""Prometheus metrics: vLLM's, under `moecc_` and under its own `vllm:`, and moecc's."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from moecc.runtime.interface import EngineLike
from moecc.runtime.request import Finish, FinishReason, Output, Request, Stats
from moecc.server.generation import Meter

# vLLM's buckets, with three more below for small models.
_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_BETWEEN = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_SWAP = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

_REASONS: tuple[FinishReason, ...] = get_args(FinishReason)
_ANSWERED = ("stop", "length")


class Metrics(Collector):
    """The metrics of one server; states and token counts are the engine's at scrape time."""

    def __init__(self, engine: EngineLike) -> None:
        self._engine = engine
        self._observed = CollectorRegistry()
        longest = max(map(engine.max_model_len, engine.variants))
        tokens = _token_buckets(longest)
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token", _FIRST_TOKEN
        )
        self._between = self._histogram(
            "inter_token_latency_seconds", "From a token to the next", _BETWEEN
        )
        self._e2e = self._histogram(
            "e2e_request_latency_seconds", "From arrival to the end", _REQUEST
        )
        self._queue = self._histogram(
            "request_queue_time_seconds", "From arrival to the start", _REQUEST
        )
        self._prefill = self._histogram(
            "request_prefill_time_seconds", "From the start to the first token", _REQUEST
        )
        self._decode = self._histogram(
            "request_decode_time_seconds", "From the first token to the end", _REQUEST
        )
        self._prompt = self._histogram("request_prompt_tokens", "Tokens of prompts", tokens)
        self._generation = self._histogram("request_generation_tokens", "Tokens of answers", tokens)
        self._ended = Counter(
            "moecc_request_success",
            "Requests that ended, by why",
            ["model_name", "finished_reason"],
            registry=self._observed,
        )
        for variant in engine.variants:
            for reason in _REASONS:
                self._ended.labels(variant, reason)
        self._swap = Histogram(
            "moecc_variant_swap_seconds",
            "Time a reconfiguration took",
            registry=self._observed,
            buckets=_SWAP,
        )
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(
            f"moecc_{name}", text, ["model_name"], registry=self._observed, buckets=buckets
        )
        for variant in self._engine.variants:
            histogram.labels(variant)  # there from the start, at 0
        return histogram

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)

    def meter(self, request: Request) -> Meter:
        """What observes the outputs of a request; called on the engine's thread."""
        between = self._between.labels(request.variant)
        tokens = 0
        last: float | None = None

        def observe(output: Output) -> None:
            nonlocal tokens, last
            if output.tokens:
                now = time.monotonic()
                if last is not None:
                    between.observe((now - last) / len(output.tokens))
                tokens += len(output.tokens)
                last = now
            if output.finish is not None:
                self._finished(request, tokens, output.finish)

        return observe

    def reconfigured(self, seconds: float) -> None:
        self._swap.observe(seconds)

    def _finished(self, request: Request, tokens: int, finish: Finish) -> None:
        variant = request.variant
        self._ended.labels(variant, finish.reason).inc()
        if finish.reason not in _ANSWERED:
            return
        t = finish.timing
        self._prompt.labels(variant).observe(len(request.prompt))
        self._generation.labels(variant).observe(tokens)
        for histogram, start, end in (
            (self._queue, t.arrived, t.started),
            (self._prefill, t.started, t.first_token),
            (self._first_token, t.arrived, t.first_token),
            (self._decode, t.first_token, t.finished),
            (self._e2e, t.arrived, t.finished),
        ):
            if start is not None and end is not None:
                histogram.labels(variant).observe(end - start)

    def collect(self) -> Iterable[Metric]:
        stats = self._engine.stats()
        for metric in (*_shared(stats), *self._observed.collect()):
            # When a series began says nothing here: all begin with the server.
            metric.samples = [s for s in metric.samples if not s.name.endswith("_created")]
            yield metric
            if metric.name != "moecc_variant_swap_seconds":
                yield _alias(metric)
        yield from _own(stats)


def _token_buckets(longest: int) -> tuple[float, ...]:
    """1, 2, 5, 10, ... up to the longest text."""
    steps = (float(m * 10**e) for e in range(10) for m in (1, 2, 5))
    return tuple(s for s in steps if s <= max(longest, 1))


def _alias(metric: Metric) -> Metric:
    """The same series under the name that vLLM gives it."""

    def renamed(name: str) -> str:
        return name.replace("moecc_", "vllm:", 1)

    alias = Metric(renamed(metric.name), metric.documentation, metric.type)
    alias.samples = [s._replace(name=renamed(s.name)) for s in metric.samples]
    return alias


def _shared(stats: Stats) -> Iterator[Metric]:
    """What vLLM shows of its engine as well."""
    used = stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0
    for name, text, values in (
        ("num_requests_running", "Requests that run", stats.running),
        ("num_requests_waiting", "Requests that wait", stats.waiting),
        (
            "kv_cache_usage_perc",
            "Used part of the KV cache, which all variants share; 1 is full",
            dict.fromkeys(stats.running, used),
        ),
    ):
        gauge = GaugeMetricFamily(f"moecc_{name}", text, labels=["model_name"])
        for variant, value in values.items():
            gauge.add_metric([variant], value)
        yield gauge
    for name, text, counts in (
        ("prompt_tokens", "Tokens of prompts", stats.prompt_tokens),
        ("generation_tokens", "Tokens generated", stats.generation_tokens),
    ):
        counter = CounterMetricFamily(f"moecc_{name}", text, labels=["model_name"])
        for variant, count in counts.items():
            counter.add_metric([variant], count)
        yield counter


def _own(stats: Stats) -> Iterator[Metric]:
    """What only moecc has."""
    swaps = CounterMetricFamily(
        "moecc_variant_swaps", "Reconfigurations", labels=["from_variant", "to_variant"]
    )
    for (before, after), count in stats.reconfigurations.items():
        swaps.add_metric([before, after], count)
    resident = GaugeMetricFamily(
        "moecc_variant_resident",
        "1 if the variant's non-expert weights are on the device",
        labels=["model_name"],
    )
    for variant, there in stats.resident.items():
        resident.add_metric([variant], float(there))
    memory = GaugeMetricFamily("moecc_gpu_memory_bytes", "Bytes on the device", labels=["kind"])
    for kind, size in stats.memory.items():
        memory.add_metric([kind], size)
    yield from (swaps, resident, memory)
