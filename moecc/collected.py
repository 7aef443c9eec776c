"""What a calibration keeps of one variant's run: sums over its tokens, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moecc.architecture import Architecture, ExpertLayer
from moecc.measured import Array, MomentFiles, block_shape, weights
from moecc.routed import Seen

SAMPLED_TOKENS = 512  # a variant, for the distances between its experts and others'


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """The tokens of a batch that count: all, or those that are no padding.

    Attributes:
        keep: bool [batch, length], or None for all.
        count: how many there are.
    """

    batch: int
    length: int
    keep: Tensor | None

    @property
    def count(self) -> int:
        return self.batch * self.length if self.keep is None else int(self.keep.sum())

    def places(self, rows: range) -> Tensor:
        """Int64: places of the tokens in the flattened sequences `rows`."""
        if self.keep is None:
            return torch.arange(len(rows) * self.length)
        return self.keep[rows.start : rows.stop].flatten().nonzero().squeeze(-1)

    def before(self, rows: range) -> int:
        """How many tokens there are in the sequences before `rows`."""
        if self.keep is None:
            return rows.start * self.length
        return int(self.keep[: rows.start].sum())


@dataclass(slots=True, eq=False)
class _Layer:
    """Sums of a layer while its block runs; all float64 `[E]` but the moments."""

    count: Tensor
    norm: Tensor
    moments: dict[str, Tensor]  # float32 [E, blocks, B, B]
    curvature: dict[str, Tensor]
    weight: dict[str, Tensor]
    sample: list[tuple[Tensor, Tensor, Tensor]]


class Statistics:
    """Watches one variant's model; layers are finished in the order in which they are run.

    Attributes:
        frequency, output_norm: float64 `[E]` a layer, once it has been run forward.
        sensitivity: float64 `[E, P]` a layer, once it has been run backward.
    """

    def __init__(
        self,
        architecture: Architecture,
        tokens: Sequence[Tokens],
        labels: int,
        keep: Callable[[int, str, Tensor], None],
        samples: Path,
        block: int,
        device: torch.device,
        on_loaded: Callable[[int], None],
    ) -> None:
        """`tokens` is of each layer; `keep` is given moments, and `samples` is a folder.

        `labels` is how many tokens the model predicts; moments are kept in blocks of `block`.
        """
        self._layers, self._tokens, self._labels = architecture.layers, tokens, labels
        self._keep, self._samples, self._block, self._device = keep, samples, block, device
        self._on_loaded = on_loaded
        self._open: dict[int, _Layer] = {}
        self._rows, self._learning = range(0), False
        self._counted: Tensor | None = None
        self.frequency: dict[int, Array] = {}
        self.output_norm: dict[int, Array] = {}
        self.sensitivity: dict[int, Array] = {}

    def loaded(self, nbytes: int) -> None:
        """Bytes of experts have been read."""
        self._on_loaded(nbytes)

    def enter(self, layers: Sequence[int], rows: range, learning: bool) -> None:
        """Sequences `rows` come next, through a block with these layers of experts."""
        self._rows, self._learning = rows, learning
        for number in layers:
            if number not in self._open:
                self._open[number] = self._start(self._layers[number])
            tokens = self._tokens[number]
            self._counted = None
            if tokens.keep is not None:
                kept = tokens.keep[rows.start : rows.stop].flatten()
                self._counted = kept.to(self._device)

    def _start(self, layer: ExpertLayer) -> _Layer:
        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(layer.num_experts, *shape, dtype=dtype, device=self._device)

        names = [p.name for p in weights(layer)]
        moments = {}
        if not self._learning:
            moments = {
                p.name: zeros(*block_shape(p, self._block), dtype=torch.float32)
                for p in weights(layer)
            }
        curvature, weight = {n: zeros() for n in names}, {n: zeros() for n in names}
        return _Layer(zeros(), zeros(), moments, curvature, weight, [])

    def tokens(self, layer: int, hidden: Tensor, index: Tensor, gates: Tensor) -> None:
        """Samples tokens of a micro-batch: float32 [T, H], int64 [T, k], float32 [T, k]."""
        if self._learning:
            return
        tokens, found = self._tokens[layer], self._open[layer]
        places, before = tokens.places(self._rows), tokens.before(self._rows)
        total = tokens.count
        count = min(total, SAMPLED_TOKENS)
        wanted = torch.arange(count) * total // count - before
        here = places[wanted[(wanted >= 0) & (wanted < len(places))]].to(hidden.device)
        found.sample.append((hidden[here].cpu(), index[here].cpu(), gates[here].cpu()))

    def routed(self, layer: int, expert: int, tokens: Tensor, seen: Seen) -> None:
        """Adds what went through an expert; `tokens`, int64 [n], are places in the micro-batch."""
        found = self._open[layer]
        rows = slice(None) if self._counted is None else self._counted[tokens]
        squares = seen.gate[rows].double().square()
        if self._learning:
            self._learn(found, expert, rows, squares, seen)
            return
        found.count[expert] += len(squares)
        found.norm[expert] += squares @ _squared_norms(seen.output[rows])
        for name, inputs in seen.inputs.items():
            moments = found.moments[name]
            add_moments(moments[expert], inputs[rows] * seen.gate[rows, None])

    def _learn(
        self, found: _Layer, expert: int, rows: slice | Tensor, squares: Tensor, seen: Seen
    ) -> None:
        for name, product in seen.products.items():
            norms = _squared_norms(seen.inputs[name][rows])
            found.weight[name][expert] += squares @ norms

            def add(gradient: Tensor, name: str = name, norms: Tensor = norms) -> None:
                slope = _squared_norms(gradient[rows]) / gradient.shape[1]
                found.curvature[name][expert] += slope @ norms

            product.register_hook(add)  # type: ignore[no-untyped-call]

    def leave(self, layers: Sequence[int], learning: bool) -> None:
        """The whole batch has been through the block: its sums are final."""
        for number in layers:
            found = self._open.pop(number)
            total = self._tokens[number].count
            if learning:
                self.sensitivity[number] = np.stack(
                    [
                        _sensitivity(found.curvature[p.name], found.weight[p.name])
                        * (total / self._labels)
                        for p in weights(self._layers[number])
                    ],
                    axis=-1,
                )
                continue
            self.frequency[number] = (found.count / total).cpu().numpy()
            self.output_norm[number] = (found.norm / total).cpu().numpy()
            for name, moments in found.moments.items():
                self._keep(number, name, moments.div_(total))
            sample = [torch.cat(parts) for parts in zip(*found.sample, strict=True)]
            torch.save(sample, self._samples / f"{number}.pt")


def add_moments(total: Tensor, inputs: Tensor) -> None:
    """Adds x^T x of float32 [n, in] to the blocks `[blocks, B, B]` along its diagonal."""
    blocks, size, _ = total.shape
    short = blocks * size - inputs.shape[1]
    padded = F.pad(inputs, (0, short)) if short else inputs
    parts = padded.view(len(inputs), blocks, size).transpose(0, 1)
    total.baddbmm_(parts.transpose(1, 2), parts)


def _squared_norms(rows: Tensor) -> Tensor:
    """Float64 [n] of float32 [n, width]; in one pass, without copies of them in float64."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=-1)
    return norms.double().square()


def _sensitivity(curvature: Tensor, weight: Tensor) -> Array:
    """Half the mean squared slope over the routed tokens; 0 where there are none.

    `curvature` is the sum of mean_r (d loss / d z_r)^2 |x|^2, `weight` that of g^2 |x|^2.
    """
    ratio = torch.where(weight > 0, curvature / weight.clamp(min=1e-300), 0.0)
    found: Array = (0.5 * ratio).cpu().numpy()
    return found


def moment_writer(files: MomentFiles, variant: int) -> Callable[[int, str, Tensor], None]:
    """Keeps the moments of one variant in `files`."""
    return lambda layer, name, moments: files.write(layer, name, variant, moments)
