"""What the page shows: the state of the engine as one JSON document."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any

from moecc import __version__
from moecc.runtime.interface import EngineLike

WINDOW_SECONDS = 3.0
_SLICE_SECONDS = 0.1


class State:
    """Collects what a snapshot of the engine cannot tell: rates and the last reconfiguration."""

    def __init__(self, engine: EngineLike) -> None:
        self._engine = engine
        self._started = time.monotonic()
        self._last: dict[str, Any] | None = None
        self._lock = threading.Lock()
        self._slices: deque[list[float]] = deque()  # [start, tokens]

    def generated(self, tokens: int) -> None:
        """Counts new tokens; called on the engine's thread."""
        now = time.monotonic()
        with self._lock:
            if not self._slices or now - self._slices[-1][0] >= _SLICE_SECONDS:
                self._slices.append([now, 0])
            self._slices[-1][1] += tokens
            self._forget(now)

    def _forget(self, now: float) -> None:
        while self._slices and now - self._slices[0][0] > WINDOW_SECONDS:
            self._slices.popleft()

    def reconfigured(self, before: str, after: str, seconds: float) -> None:
        self._last = {"from": before, "to": after, "seconds": seconds}

    def tokens_per_second(self) -> float:
        with self._lock:
            self._forget(time.monotonic())
            return sum(tokens for _, tokens in self._slices) / WINDOW_SECONDS

    def document(self) -> dict[str, Any]:
        engine, stats = self._engine, self._engine.stats()
        return {
            "version": __version__,
            "artifact": engine.artifact_hash,
            "mode": stats.mode,
            "policy": stats.policy,
            "batching": stats.batching,
            "uptime": time.monotonic() - self._started,
            "variants": [
                {
                    "id": name,
                    "base": name == engine.base,
                    "resident": stats.resident[name],
                    "running": stats.running[name],
                    "waiting": stats.waiting[name],
                    "batch": stats.batch.get(name, 0),
                    "prompt_tokens": stats.prompt_tokens[name],
                    "generation_tokens": stats.generation_tokens[name],
                    "max_model_len": engine.max_model_len(name),
                }
                for name in engine.variants
            ],
            "kv_blocks": {"used": stats.kv_blocks_used, "total": stats.kv_blocks_total},
            "memory": {kind: stats.memory[kind] for kind in ("experts", "non_expert", "kv")},
            "reconfigurations": sum(stats.reconfigurations.values()),
            "last_reconfiguration": self._last,
            "steps": stats.steps,
            "tokens_per_second": self.tokens_per_second(),
            "alive": stats.alive,
        }
