"""Finds a variant's experts and neurons again where they are in another order than the base's.

An expert computes the same with its neurons in any order (the rows of gate and up with their
biases, and the columns of down), and a layer with its experts in any order, if the router's rows
go with them. Both are undone in terms of weights alone, as in Git Re-Basin (Ainsworth et al., ICLR
2023, section 3.2), by assignment problems:

1. Experts, by the matrix sum over neurons of down_i (gate_i, up_i)^T, which no order of the neurons
   changes, seen through random projections on both sides.
2. Neurons of matched experts, by squared distance. One that is closer to its counterpart than half
   the way from there to the base's next neuron is at home: by the triangle inequality no other
   neuron of the base is closer. Random projections estimate those ways (Johnson-Lindenstrauss), and
   find candidates; only what they leave open is compared in full.

What stays in place wins ties and near ties: a cycle of a permutation is kept only if it leaves at
most `NEAR` of the squared distance.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from moecc.architecture import Architecture, ExpertLayer, interleaved_layers
from moecc.files import replace_file
from moecc.parallel import ordered, worker_pool
from moecc.variants import NEURON_LINES, Alignment, LayerAlignment, OpenVariant, Order

CACHE_VERSION = 1
NEAR = 0.8  # of a squared distance
TIE = 1e-10  # of a squared norm: what another order of summation makes
SURE = 1 / 8  # of a gap: a quarter by the triangle inequality, half of it for the estimate
SKETCH = 64  # random directions for what a neuron reads, and as many for what it writes
BLOCK = 2048  # neurons compared at once, and those assigned at once
MEMORY = 2 << 30  # bytes of experts held at once, if that is enough for one of a variant
SEED = 20230119

Array = npt.NDArray[np.float64]


def align(
    architecture: Architecture,
    variants: Sequence[OpenVariant],
    base: int,
    *,
    device: str = "cpu",
    cache: Path | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    block: int = BLOCK,
) -> tuple[OpenVariant, ...]:
    """The variants with their experts and neurons in the order of `variants[base]`.

    One that is in that order already has no alignment. Reads every expert once, and again those
    that moved; memory holds about `MEMORY` bytes of them, or one of the base and one of a variant.
    `cache` is a folder; `on_progress` gets bytes done and bytes in all; `block` is in neurons.
    Layers with weights that are NaN or infinite stay as they are. Raises SourceError if a source
    cannot be read.
    """
    plain = [replace(variant, alignment=None) for variant in variants]
    names = interleaved_layers(plain[base].checkpoint)
    interleaved = [layer.name in names for layer in architecture.layers]
    found: dict[int, list[LayerAlignment]] = {}
    paths = [_cache_path(cache, architecture, plain[base], variant) for variant in plain]
    for number, path in enumerate(paths):
        if number != base and (layers := _load(path, architecture, interleaved)) is not None:
            found[number] = layers
    missing = [n for n in range(len(plain)) if n != base and n not in found]
    if missing:
        work = _Work(architecture, plain, base, missing, device, block, interleaved, on_progress)
        for number, layers in work.run().items():
            found[number] = layers
            _save(paths[number], layers)
    return tuple(_aligned(variant, found.get(n)) for n, variant in enumerate(plain))


def to_own_index(
    remap: npt.NDArray[np.int32], variants: Sequence[OpenVariant], layer: int
) -> npt.NDArray[np.int32]:
    """A remap `[variants, experts, projections, 4]` by canonical index, as routers index it."""
    own = np.empty_like(remap)
    for number, variant in enumerate(variants):
        own[number, variant.own_index(layer)] = remap[number]
    return own


def _aligned(variant: OpenVariant, layers: list[LayerAlignment] | None) -> OpenVariant:
    alignment = Alignment(tuple(layers)) if layers else None
    return replace(variant, alignment=None if alignment and alignment.is_identity else alignment)


# Experts


@dataclass(frozen=True, slots=True)
class Expert:
    """An expert by its neurons.

    Attributes:
        weights: `[neurons, read + written]` in the source's dtype: gate, up and their biases, then
            the column of down.
        sketch: float32 `[neurons, directions]`, whose distances are about those of the weights.
        feature: float64, flat; does not depend on the order of the neurons.
    """

    weights: torch.Tensor
    sketch: torch.Tensor
    feature: Array

    @classmethod
    def of(cls, weights: torch.Tensor, written: int) -> Expert:
        """An expert whose neurons write to the last `written` columns."""
        read = _project(weights[:, :-written])
        wrote = _project(weights[:, -written:])
        feature: Array = (read.double().T @ wrote.double()).flatten().cpu().numpy()
        return cls(weights, torch.cat([read, wrote], 1), feature)


def _project(rows: torch.Tensor) -> torch.Tensor:
    """Float32 `[rows, directions]`; of short rows themselves."""
    width = rows.shape[1]
    if width <= SKETCH:
        return rows.float()
    directions = _directions(width, SKETCH, str(rows.device))
    return torch.cat([part.float() @ directions for part in torch.split(rows, BLOCK)])


@lru_cache(maxsize=8)
def _directions(width: int, count: int, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(SEED)
    directions = torch.randn(width, count, generator=generator)
    return directions.to(device).div_(count**0.5)


def read_expert(
    variant: OpenVariant,
    index: int,
    layer: ExpertLayer,
    expert: int,
    interleaved: bool,
    device: str,
) -> Expert:
    """An expert of layer `index`, its neurons in the order of the checkpoint."""
    parts: list[torch.Tensor] = []
    for projection in sorted(layer.projections, key=lambda p: _is_output(p.name)):
        if projection.name not in NEURON_LINES:
            continue
        axis, lines = NEURON_LINES[projection.name]
        whole = range(projection.matrix[0])
        matrix = variant.own_rows(index, projection.name, expert, whole).to(device)
        rows = matrix if axis == 0 else matrix.T
        parts += [rows[i::lines] for i in range(lines)] if interleaved else rows.chunk(lines)
    return Expert.of(torch.cat(parts, 1), parts[-1].shape[1])


def _is_output(name: str) -> bool:
    return name in ("down_proj", "wo")


def can_align(layer: ExpertLayer) -> bool:
    """Whether it is known what a neuron is of every projection of a layer."""
    shapes = {p.name: p.matrix for p in layer.projections}
    outputs = [name for name in shapes if _is_output(name)]
    if len(outputs) != 1 or not shapes.keys() <= {*NEURON_LINES, "down_proj_bias"}:
        return False
    sizes = {
        shape[NEURON_LINES[name][0]] / NEURON_LINES[name][1]
        for name, shape in shapes.items()
        if name in NEURON_LINES
    }
    return len(sizes) == 1 and len(shapes) > 1


def match_experts(base: Array, other: Array) -> Order:
    """Base expert -> the other's, by their features `[experts, n]`, which have to be finite."""
    squares, others = (base**2).sum(1), (other**2).sum(1)
    apart = squares[:, None] + others - 2 * base @ other.T
    here = np.arange(len(base))
    least = np.minimum(apart.min(0), apart.min(1)) + TIE * (squares + others)
    rest = np.flatnonzero(NEAR * np.diagonal(apart) > least)
    order = here.copy()
    left, right = linear_sum_assignment(apart[np.ix_(rest, rest)])
    order[rest[left]] = rest[right]
    return settle(order, np.diagonal(apart), apart[here, order])


def settle(order: Order, before: Array, after: Array) -> Order:
    """A permutation without its cycles that leave more than `NEAR` of the squared distance.

    `before` and `after` are those of every place, with all in place and with the permutation.
    """
    here = np.arange(len(order))
    edges = coo_array((np.ones(len(order)), (here, order)), shape=(len(order), len(order)))
    count, cycle = connected_components(edges, directed=False)
    left, had = np.bincount(cycle, after, count), np.bincount(cycle, before, count)
    settled: Order = np.where((left <= NEAR * had)[cycle], order, here)
    return settled


# Neurons


class Matcher:
    """Finds the neurons of one expert of the base in experts of other variants."""

    def __init__(self, base: Expert, block: int = BLOCK) -> None:
        self.base = base
        self.block = block

    @cached_property
    def _gaps(self) -> torch.Tensor:
        """About the squared distance `[neurons]` of each to the next neuron of the base."""
        sketch = self.base.sketch
        return _nearest(sketch, sketch, self.block, others=True)[0].clamp(min=0)

    def apart(self, other: Expert, order: Order | None = None) -> Array:
        """Squared distances `[neurons]` of the base's neurons to their counterparts."""
        base, weights = self.base.weights, other.weights
        if order is not None:
            found = self._apart(other, torch.arange(len(base)), torch.from_numpy(order))
        else:
            pairs = _pairs(base, weights, self.block)
            found = torch.cat([(a.float() - b).square_().sum(1) for a, b in pairs])
        distances: Array = found.double().cpu().numpy()
        return distances

    def _apart(self, other: Expert, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        parts = [
            (_rows(self.base.weights, i) - _rows(other.weights, j)).square_().sum(1)
            for i, j in _pairs(left, right, self.block)
        ]
        return torch.cat(parts)

    def home(self, apart: Array) -> npt.NDArray[np.bool_]:
        """Which neurons are certainly in place, by their squared distances as they are."""
        if not apart.any() or not np.isfinite(apart.sum()):
            return np.ones(len(apart), dtype=bool)
        found: npt.NDArray[np.bool_] = apart <= SURE * self._gaps.double().cpu().numpy()
        return found

    def match(self, other: Expert) -> Order:
        """Base neuron -> the other's."""
        before = self.apart(other)
        home = self.home(before)
        order = np.arange(len(home))
        left = right = torch.from_numpy(np.flatnonzero(~home))
        left, right = self._by_sketch(other, left, right, order)
        while len(left):
            count = len(left)
            near = _mutual(self.base.weights, other.weights, left, right, self.block)
            left, right = _take(order, left, right, *near)
            if len(left) <= self.block or len(left) > count * 7 // 8:
                break
        for i, j in _pairs(left, right, self.block):
            cost = _apart_all(_rows(self.base.weights, i), _rows(other.weights, j))
            rows, columns = linear_sum_assignment(cost.double().cpu().numpy())
            order[i[rows].numpy()] = j[columns].numpy()
        return settle(order, before, self.apart(other, order))

    def _by_sketch(
        self, other: Expert, left: torch.Tensor, right: torch.Tensor, order: Order
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sets `order` where the sketches agree on a pair that is as close as one at home."""
        if not len(left):
            return left, right
        i, j = _mutual(self.base.sketch, other.sketch, left, right, self.block)
        limit = SURE * self._gaps[left[i].to(self._gaps.device)]
        sure = (self._apart(other, left[i], right[j]) <= limit).cpu()
        return _take(order, left, right, i[sure], j[sure])


def _take(
    order: Order, left: torch.Tensor, right: torch.Tensor, i: torch.Tensor, j: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Matches `left[i]` with `right[j]` in `order`; returns what is left of both."""
    order[left[i].numpy()] = right[j].numpy()
    keep_left, keep_right = torch.ones(2, len(left), dtype=torch.bool)
    keep_left[i], keep_right[j] = False, False
    return left[keep_left], right[keep_right]


def _pairs(
    left: torch.Tensor, right: torch.Tensor, block: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return zip(torch.split(left, block), torch.split(right, block), strict=True)


def _rows(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return table[index.to(table.device)].float()


def _mutual(
    a: torch.Tensor, b: torch.Tensor, left: torch.Tensor, right: torch.Tensor, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Places in `left` and `right` of rows of `a` and `b` that are nearest to each other."""
    _, of_left, of_right = _nearest(a, b, block, left, right)
    i = torch.arange(len(left))
    mutual = of_right[of_left] == i
    return i[mutual], of_left[mutual]


def _nearest(
    a: torch.Tensor,
    b: torch.Tensor,
    block: int,
    left: torch.Tensor | None = None,
    right: torch.Tensor | None = None,
    others: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For rows `left` of `a` among rows `right` of `b`, by blocks of `block` times `block`.

    Returns the squared distance of each of `left` to the nearest, its place in `right`, and the
    place in `left` of the nearest of each of `right`. With `others`, equal places do not count.
    """
    lefts = torch.split(torch.arange(len(a)) if left is None else left, block)
    rights = torch.split(torch.arange(len(b)) if right is None else right, block)
    rows = [_Least(len(part), a.device) for part in lefts]
    columns = [_Least(len(part), a.device) for part in rights]
    for i, here in enumerate(lefts):
        table = _rows(a, here)
        for j, there in enumerate(rights):
            apart = _apart_all(table, _rows(b, there))
            if others and i == j:
                apart.fill_diagonal_(torch.inf)
            rows[i].update(apart, 1, j * block)
            columns[j].update(apart, 0, i * block)
    least, at = torch.cat([r.least for r in rows]), torch.cat([r.at for r in rows])
    return least, at.cpu(), torch.cat([c.at for c in columns]).cpu()


class _Least:
    """The least of each line of a matrix that comes in blocks, and its place; the first wins."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.least = torch.full((count,), torch.inf, device=device)
        self.at = torch.zeros(count, dtype=torch.long, device=device)

    def update(self, block: torch.Tensor, axis: int, start: int) -> None:
        least, at = block.min(axis)
        better = least < self.least
        self.least = torch.where(better, least, self.least)
        self.at = torch.where(better, at + start, self.at)


def _apart_all(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Squared distances `[rows of a, rows of b]`."""
    return torch.addmm(a.square().sum(1)[:, None] + b.square().sum(1), a, b.T, alpha=-2)


# Layers


@dataclass(frozen=True, slots=True)
class _Look:
    """What one variant's expert looks like beside the base's of the same index.

    Attributes:
        apart: their squared distance.
        neurons: base neuron -> the variant's, where most are in place, so that the expert is too.
    """

    feature: Array
    apart: float
    neurons: Order | None

    @classmethod
    def at(cls, matcher: Matcher, other: Expert) -> _Look:
        apart = matcher.apart(other)
        home = matcher.home(apart)
        neurons = None
        if home.all():
            neurons = np.arange(len(home))
        elif home.mean() >= 0.5:
            neurons = matcher.match(other)
        return cls(other.feature, float(apart.sum()), neurons)


@dataclass(frozen=True, slots=True)
class _Work:
    """Aligns some of the variants to the base."""

    architecture: Architecture
    variants: Sequence[OpenVariant]
    base: int
    numbers: Sequence[int]  # of the variants
    device: str
    block: int
    interleaved: Sequence[bool]
    on_progress: Callable[[int, int], None]

    def run(self) -> dict[int, list[LayerAlignment]]:
        found: dict[int, list[LayerAlignment]] = {number: [] for number in self.numbers}
        with worker_pool() as pool:
            for index in range(len(self.architecture.layers)):
                for number, layer in self._layer(index, pool).items():
                    found[number].append(layer)
                self._report(index, self.architecture.layers[index].num_experts)
        return found

    def _layer(self, index: int, pool: ThreadPoolExecutor) -> dict[int, LayerAlignment]:
        layer, flag = self.architecture.layers[index], self.interleaved[index]
        if not can_align(layer):
            same = LayerAlignment(np.arange(layer.num_experts), {}, flag)
            return dict.fromkeys(self.numbers, same)

        def look(expert: int) -> tuple[Array, list[_Look]]:
            matcher = Matcher(self._read(self.base, index, expert), self.block)
            read = (self._read(number, index, expert) for number in self.numbers)
            return matcher.base.feature, [_Look.at(matcher, other) for other in read]

        features: list[Array] = []
        looks: list[list[_Look]] = []
        for feature, seen in ordered(pool, look, range(layer.num_experts), self._ahead(index)):
            self._report(index, len(looks))
            features.append(feature)
            looks.append(seen)
        base = np.stack(features)
        by_variant = zip(self.numbers, zip(*looks, strict=True), strict=True)
        return {number: self._match(index, number, base, of, pool) for number, of in by_variant}

    def _match(
        self,
        index: int,
        number: int,
        base: Array,
        looks: Sequence[_Look],
        pool: ThreadPoolExecutor,
    ) -> LayerAlignment:
        here, flag = np.arange(len(base)), self.interleaved[index]
        features = np.stack([look.feature for look in looks])
        if not np.isfinite(base).all() or not np.isfinite(features).all():
            return LayerAlignment(here, {}, flag)

        def neurons(pair: tuple[int, int]) -> tuple[Order, float]:
            known = looks[pair[0]]
            if pair[0] == pair[1] and known.neurons is not None:
                return known.neurons, known.apart
            return self._neurons(index, number, *pair)

        experts = match_experts(base, features)
        found = list(ordered(pool, neurons, enumerate(experts.tolist()), self._ahead(index)))
        kept = settle(experts, np.array([k.apart for k in looks]), np.array([a for _, a in found]))
        for e in np.flatnonzero(kept != experts).tolist():
            found[e] = neurons((e, e))
        orders = {e: order for e, (order, _) in enumerate(found)}
        moved = {e: order for e, order in orders.items() if (order != np.sort(order)).any()}
        return LayerAlignment(kept, moved, flag)

    def _neurons(self, index: int, number: int, expert: int, own: int) -> tuple[Order, float]:
        """The neurons of an own expert for one of the base, and the squared distance then."""
        matcher = Matcher(self._read(self.base, index, expert), self.block)
        other = self._read(number, index, own)
        order = matcher.match(other)
        return order, float(matcher.apart(other, order).sum())

    def _read(self, number: int, index: int, expert: int) -> Expert:
        layer, flag = self.architecture.layers[index], self.interleaved[index]
        return read_expert(self.variants[number], index, layer, expert, flag, self.device)

    def _ahead(self, index: int) -> int:
        """Experts at once: each is read beside one of the base, and copied once."""
        return int(min(16, max(1, MEMORY // (3 * self.architecture.layers[index].exact_bytes))))

    def _report(self, index: int, experts: int) -> None:
        """The last expert of a layer counts when the layer is done."""
        layers = self.architecture.layers
        done = sum(a.exact_bytes * a.num_experts for a in layers[:index])
        done += layers[index].exact_bytes * experts
        total = sum(a.exact_bytes * a.num_experts for a in layers)
        times = 1 + len(self.numbers)
        self.on_progress(done * times, total * times)


# Cache


def _cache_path(
    cache: Path | None, architecture: Architecture, base: OpenVariant, variant: OpenVariant
) -> Path | None:
    if cache is None:
        return None
    layers = [asdict(layer) for layer in architecture.layers]
    key = [CACHE_VERSION, architecture.class_name, layers, base.fingerprint, variant.fingerprint]
    text = json.dumps(key, sort_keys=True)
    return cache / f"{hashlib.sha256(text.encode()).hexdigest()}.align.npz"


def _save(path: Path | None, layers: Sequence[LayerAlignment]) -> None:
    if path is None:
        return
    arrays: dict[str, Any] = {}
    for i, layer in enumerate(layers):
        arrays[f"experts{i}"] = layer.experts.astype(np.int32)
        arrays[f"moved{i}"] = np.array(list(layer.neurons), dtype=np.int32)
        arrays[f"neurons{i}"] = np.array(list(layer.neurons.values()), dtype=np.int32)
    with suppress(OSError):  # a cache that cannot be written is done without
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as file:
            np.savez(file, **arrays)


def _load(
    path: Path | None, architecture: Architecture, interleaved: Sequence[bool]
) -> list[LayerAlignment] | None:
    """Alignments from the cache; None if there are none that can be used."""
    if path is None:
        return None
    found = []
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for i, (layer, flag) in enumerate(zip(architecture.layers, interleaved, strict=True)):
                experts = _order(arrays[f"experts{i}"], layer.num_experts)
                moved = arrays[f"moved{i}"].tolist()
                orders = [_order(a, _width(layer)) for a in arrays[f"neurons{i}"]]
                neurons = dict(zip(moved, orders, strict=True))
                if not neurons.keys() <= set(range(layer.num_experts)):
                    return None
                found.append(LayerAlignment(experts, neurons, flag))
    except Exception:  # numpy and zipfile raise all kinds for a damaged file
        return None
    return found


def _width(layer: ExpertLayer) -> int:
    return next(p.matrix[1] for p in layer.projections if _is_output(p.name))


def _order(values: Any, count: int) -> Order:
    """A permutation of so many; ValueError for anything else."""
    if values.dtype != np.int32 or (np.sort(values) != np.arange(count)).any():
        raise ValueError("not a permutation")
    order: Order = values.astype(np.int64)
    return order
