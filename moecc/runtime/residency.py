"""Where the variants' rows live, and how a model gets the one it computes with.

resident: all rows on the device; a reconfiguration is the choice of another model's views.
swap: rows in page-locked host memory, two of them on the device: one at work, one arriving.
mixed: all rows on the device, and one model that computes with all of them at once.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from moecc.runtime.experts import REMAP
from moecc.runtime.linear import parameter
from moecc.runtime.loading import Skeletons
from moecc.runtime.nonexpert import Binding, shared
from moecc.runtime.stacked import Stacked

SWAP_ROWS = 2  # on the device: one at work, one arriving


class Residency(Protocol):
    """`activate` before every pass; all calls come from one thread."""

    mode: str

    @property
    def nbytes(self) -> int:
        """Bytes of rows on the device."""

    @property
    def rows(self) -> Tensor:
        """The rows on the device, uint8 [rows, bytes]."""

    def row(self, variant: int) -> int:
        """Which of them an active variant has."""

    def activate(self, variant: int) -> Any:
        """The model to run for a variant; its work may be queued on the current stream."""

    def prefetch(self, variant: int) -> None:
        """Says which variant will come next."""

    def wait(self) -> None:
        """Until what `activate` queued is done."""

    def is_resident(self, variant: int) -> bool:
        """Whether a variant could run now, without a copy."""


class Resident:
    """Every variant's model looks at its own row, uint8 `[variants, bytes]` on the device."""

    mode = "resident"

    def __init__(self, skeletons: Skeletons, rows: Tensor) -> None:
        self.rows = rows
        self._models = skeletons.models
        for model, row in zip(self._models, rows, strict=True):
            binding = Binding(model, skeletons.layout, skeletons.tied)
            binding.bind(_parameters(skeletons.layout.views(row)))

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes

    def row(self, variant: int) -> int:
        return variant

    def activate(self, variant: int) -> Any:
        return self._models[variant]

    def prefetch(self, variant: int) -> None:
        pass

    def wait(self) -> None:
        pass

    def is_resident(self, variant: int) -> bool:
        return True


class Swap:
    """Rows in host memory `[variants, bytes]`; `activate` copies one in unless it is there.

    On a GPU copies have a stream of their own, so that a prefetch runs beside the passes of the
    variant at work.
    """

    mode = "swap"

    def __init__(self, skeletons: Skeletons, host: Tensor, device: torch.device) -> None:
        self._host = host
        self._models = skeletons.models
        self._bindings = [Binding(m, skeletons.layout, skeletons.tied) for m in self._models]
        self.rows = torch.empty(SWAP_ROWS, host.shape[1], dtype=torch.uint8, device=device)
        self._views = [_parameters(skeletons.layout.views(row)) for row in self.rows]
        self._held: list[int | None] = [None] * SWAP_ROWS
        self._active = 0
        self._bound: list[int | None] = [None] * len(self._models)
        self._arrived: list[Any] = [None] * SWAP_ROWS  # events: a row's copy is done
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes

    def row(self, variant: int) -> int:
        return self._held.index(variant)

    def activate(self, variant: int) -> Any:
        self.prefetch(variant)
        self._active = self._held.index(variant)
        if self._stream is not None:  # not for the whole stream: the next variant may be on its way
            event = self._arrived[self._active]
            torch.cuda.current_stream(self.rows.device).wait_event(event)
        if self._bound[variant] != self._active:
            self._bindings[variant].bind(self._views[self._active])
            self._bound[variant] = self._active
        return self._models[variant]

    def prefetch(self, variant: int) -> None:
        if variant in self._held:
            return
        spare = 1 - self._active
        self._held[spare] = variant
        if self._stream is None:
            self.rows[spare].copy_(self._host[variant])
            return
        # What the spare row last served may still be running.
        self._stream.wait_stream(torch.cuda.current_stream(self.rows.device))
        with torch.cuda.stream(self._stream):
            self.rows[spare].copy_(self._host[variant], non_blocking=True)
            self._arrived[spare] = self._stream.record_event()

    def wait(self) -> None:
        if self._stream is not None:
            self._arrived[self._active].synchronize()

    def is_resident(self, variant: int) -> bool:
        return variant in self._held


class Mixed:
    """One model whose weights are those of all variants; equal ones are there as they are."""

    mode = "mixed"

    def __init__(self, skeletons: Skeletons, rows: Tensor) -> None:
        self.rows = rows
        self._model = skeletons.models[0]
        layout = skeletons.layout
        same = shared(rows, layout)
        plain = _parameters(layout.views(rows[0]))
        tensors = {
            name: plain[name] if name in same else _weight(name, stack)
            for name, stack in layout.stacked(rows).items()
        }
        Binding(self._model, layout, skeletons.tied).bind(tensors)

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes

    def row(self, variant: int) -> int:
        return variant

    def activate(self, variant: int) -> Any:
        return self._model

    def prefetch(self, variant: int) -> None:
        pass

    def wait(self) -> None:
        pass

    def is_resident(self, variant: int) -> bool:
        return True


def _weight(name: str, stack: Tensor) -> Tensor:
    """A remap is our own and is read by us; everything else by modeling code."""
    return stack if name.endswith(REMAP) else Stacked.of(stack)


def _parameters(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Made once: a binding then only stores references."""
    return {name: parameter(t) if t.is_floating_point() else t for name, t in tensors.items()}
