"""The opened variants: one architecture, and per variant the rows of any expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moecc.architecture import Architecture, Layout, Projection, read_layout
from moecc.checkpoint import Checkpoint, tile_rows
from moecc.compatibility import compare
from moecc.sources import Source

TILE_ELEMENTS = 1 << 20  # few and long calls: threads wait for the interpreter lock between them
TRANSPOSED_ROWS = 1024  # a row of a transposed matrix is scattered: read runs of 2 KiB


@dataclass(frozen=True, slots=True)
class OpenVariant:
    """A checkpoint with its layout."""

    checkpoint: Checkpoint
    layout: Layout

    @property
    def name(self) -> str:
        return self.checkpoint.source.name

    def rows(self, layer: int, projection: str, expert: int, span: range) -> torch.Tensor:
        """Rows `span` of an expert's canonical matrix `[out, in]`, in the source's dtype."""
        parts = []
        for tile in self.layout.tiles[layer, projection][expert]:
            start, stop = max(span.start, tile.row), min(span.stop, tile.row + tile.rows)
            if start < stop:
                parts.append(self.checkpoint.rows(tile.narrow(start - tile.row, stop - tile.row)))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

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
