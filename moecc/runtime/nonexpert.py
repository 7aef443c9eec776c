"""What a variant keeps outside its experts, as one row of a `[variants, bytes]` buffer.

A row holds every parameter and buffer of the model that is not an expert's, and the remap of every
layer; tied weights are there once. All variants have one layout, so that a reconfiguration is the
choice of a row, or one copy of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ALIGN = 256  # bytes; what vector loads and copies like best


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a tensor lies in a row."""

    name: str
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int


class RowLayout:
    """The slots of a row, in order of their names; `nbytes` is the size of a row."""

    def __init__(self, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        self.slots: dict[str, Slot] = {}
        offset = 0
        for name, (dtype, shape) in sorted(tensors.items()):
            nbytes = dtype.itemsize * int(torch.Size(shape).numel())
            self.slots[name] = Slot(name, offset, dtype, shape, nbytes)
            offset += -(-nbytes // ALIGN) * ALIGN
        self.nbytes = offset

    def views(self, row: Tensor) -> dict[str, Tensor]:
        """The tensors of a row, uint8 `[nbytes]`; no copies."""
        return {name: stacked[0] for name, stacked in self.stacked(row[None]).items()}

    def stacked(self, rows: Tensor) -> dict[str, Tensor]:
        """The tensors of all rows, each `[variants, *shape]`; no copies."""
        return {
            s.name: rows[:, s.offset : s.offset + s.nbytes].view(s.dtype).view(len(rows), *s.shape)
            for s in self.slots.values()
        }


class Binding:
    """The places in a model where a row's tensors go.

    `tied` maps names that have no slot of their own to those they share.
    """

    def __init__(self, model: nn.Module, layout: RowLayout, tied: Mapping[str, str]) -> None:
        self._places = [
            (owner, key, tied.get(name, name))
            for name, owner, key in places(model)
            if tied.get(name, name) in layout.slots
        ]

    def bind(self, tensors: Mapping[str, Tensor]) -> None:
        """Makes the model compute with these tensors, by slot name; copies nothing."""
        for owner, key, slot in self._places:
            owner[key] = tensors[slot]


def places(model: nn.Module) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(name, the dict it is in, its key there) of every parameter and buffer."""
    for prefix, module in model.named_modules():
        for owner in (module._parameters, module._buffers):
            for key, tensor in owner.items():
                if tensor is not None:
                    yield f"{prefix}.{key}" if prefix else key, owner, key


def shared(rows: Iterable[Tensor], layout: RowLayout) -> frozenset[str]:
    """Names of the slots whose bytes are the same in all rows."""
    first, *others = rows
    return frozenset(
        s.name
        for s in layout.slots.values()
        if all(
            torch.equal(first[s.offset : s.offset + s.nbytes], o[s.offset : s.offset + s.nbytes])
            for o in others
        )
    )
