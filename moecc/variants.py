"""The opened variants: one architecture, and per variant the rows of any expert."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from moecc.architecture import Architecture, Layout, Projection, read_layout
from moecc.checkpoint import Checkpoint, tile_rows
from moecc.compatibility import compare
from moecc.sources import Source

TILE_ELEMENTS = 1 << 20  # few and long calls: threads wait for the interpreter lock between them
TRANSPOSED_ROWS = 1024  # a row of a transposed matrix is scattered: read runs of 2 KiB


Order = npt.NDArray[np.int64]  # a permutation: place in the base -> place in the variant

# projection -> the axis of its canonical matrix that has the neurons, and its lines per neuron
NEURON_LINES: dict[str, tuple[int, int]] = {
    "gate_up_proj": (0, 2),
    "gate_up_proj_bias": (1, 2),
    "up_proj": (0, 1),
    "up_proj_bias": (1, 1),
    "down_proj": (1, 1),
    "wi": (0, 1),
    "wo": (1, 1),
}


@dataclass(frozen=True, slots=True, eq=False)
class LayerAlignment:
    """Which of a variant's experts and neurons stand for those of the base.

    Attributes:
        experts: canonical expert index (the base's) -> the variant's own, int64 `[experts]`.
        neurons: canonical expert index -> int64 `[neurons]`, the base's neuron -> the variant's;
            only of experts whose neurons are in another order.
        interleaved: gate and up alternate in `gate_up_proj`, instead of all of gate coming first.
    """

    experts: Order
    neurons: Mapping[int, Order]
    interleaved: bool = False

    @property
    def is_identity(self) -> bool:
        return not self.neurons and bool((self.experts == np.arange(len(self.experts))).all())

    def lines(self, projection: str, expert: int) -> tuple[int, Order] | None:
        """The axis to permute of a canonical expert's matrix, and the own line of each line."""
        order, place = self.neurons.get(expert), NEURON_LINES.get(projection)
        if order is None or place is None:
            return None
        axis, lines = place
        part = np.arange(lines)
        if self.interleaved:
            return axis, (order[:, None] * lines + part).ravel()
        return axis, (order + part[:, None] * len(order)).ravel()


@dataclass(frozen=True, slots=True, eq=False)
class Alignment:
    """The alignment of every layer of experts, see alignment.py."""

    layers: tuple[LayerAlignment, ...]

    @property
    def is_identity(self) -> bool:
        return all(layer.is_identity for layer in self.layers)

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of all permutations."""
        digest = hashlib.sha256()
        for layer in self.layers:
            header = [len(layer.experts), *sorted(layer.neurons), layer.interleaved]
            digest.update(repr(header).encode())
            for order in (layer.experts, *(layer.neurons[e] for e in sorted(layer.neurons))):
                digest.update(order.astype("<i8").tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class OpenVariant:
    """A checkpoint with its layout; `alignment` puts experts and neurons in the base's order."""

    checkpoint: Checkpoint
    layout: Layout
    alignment: Alignment | None = None

    @property
    def name(self) -> str:
        return self.checkpoint.source.name

    @property
    def fingerprint(self) -> str:
        """Changes whenever what `rows` gives may have changed; a cache key."""
        source = self.checkpoint.source.fingerprint
        if self.alignment is None:
            return source
        return hashlib.sha256(f"{source} {self.alignment.fingerprint}".encode()).hexdigest()

    def own_index(self, layer: int) -> Order:
        """Canonical expert index -> the variant's own, int64 `[experts]`."""
        if self.alignment is not None:
            return self.alignment.layers[layer].experts
        counts = (len(experts) for (at, _), experts in self.layout.tiles.items() if at == layer)
        return np.arange(next(counts))

    def rows(self, layer: int, projection: str, expert: int, span: range) -> torch.Tensor:
        """Rows `span` of a canonical expert's matrix `[out, in]`, in the source's dtype.

        With an alignment, the expert that stands for the base's, its neurons in the base's order.
        """
        aligned = self.alignment and self.alignment.layers[layer]
        lines = aligned.lines(projection, expert) if aligned else None
        if lines is None:
            return self.own_rows(layer, projection, expert, span)
        axis, order = lines
        if axis == 1:
            return self.own_rows(layer, projection, expert, span)[:, torch.from_numpy(order)]
        return self._gather(layer, projection, expert, order[span.start : span.stop])

    def own_rows(self, layer: int, projection: str, expert: int, span: range) -> torch.Tensor:
        """As `rows`, with the expert's neurons in the order of the checkpoint: bit for bit."""
        own = int(self.own_index(layer)[expert])
        parts = []
        for tile in self.layout.tiles[layer, projection][own]:
            start, stop = max(span.start, tile.row), min(span.stop, tile.row + tile.rows)
            if start < stop:
                parts.append(self.checkpoint.rows(tile.narrow(start - tile.row, stop - tile.row)))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _gather(self, layer: int, projection: str, expert: int, index: Order) -> torch.Tensor:
        """The own rows `index`, read in the order of the disk."""
        by_row = np.argsort(index)
        found = index[by_row]
        tile = self.layout.tiles[layer, projection][int(self.own_index(layer)[expert])][0]
        if tile.col_stride != 1 and self.checkpoint.tensors[tile.tensor].scales is None:
            # Rows are scattered over the disk one element at a time: read all between them.
            span = range(int(found[0]), int(found[-1]) + 1)
            rows = self.own_rows(layer, projection, expert, span)
            return rows[torch.from_numpy(index - found[0])]
        runs = [self.own_rows(layer, projection, expert, run) for run in _runs(found)]
        return torch.cat(runs)[torch.from_numpy(np.argsort(by_row))]

    @property
    def non_expert_bytes(self) -> int:
        """Bytes of everything outside the experts."""
        tensors = self.checkpoint.tensors
        return sum(tensors[name].nbytes for name in self.layout.non_expert.values())


def open_variants(sources: Sequence[Source]) -> tuple[Architecture, list[OpenVariant]]:
    """Maps every source and checks that they fit together, from headers and configs alone.

    Raises SourceError on the first source that cannot be read or does not fit the others.
    """
    opened = []
    for source in sources:
        checkpoint = Checkpoint(source)
        opened.append((checkpoint, *read_layout(checkpoint)))
    compare(opened)
    return opened[0][1], [OpenVariant(checkpoint, layout) for checkpoint, _, layout in opened]


def _runs(rows: Order) -> Iterator[range]:
    """Ascending rows as ranges without a gap."""
    for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
        yield range(int(run[0]), int(run[-1]) + 1)


def row_spans(
    projection: Projection, variants: Sequence[OpenVariant] = (), elements: int = TILE_ELEMENTS
) -> list[range]:
    """Row ranges of about `elements` weights that cover a projection's matrix.

    Rows that a quantized checkpoint among `variants` has to read together stay together.
    """
    rows, cols = projection.matrix
    step = tile_rows(elements, cols, max((v.checkpoint.row_align for v in variants), default=1))
    if projection.transposed:
        step = max(step, TRANSPOSED_ROWS)
    return [range(start, min(start + step, rows)) for start in range(0, rows, step)]
