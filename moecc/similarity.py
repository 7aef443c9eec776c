"""How alike experts are: Gram matrices, streamed tile by tile.

Every metric is a function of the inner products <a, b> of the experts:

- `l2`: |a - b| / sqrt((|a|^2 + |b|^2) / 2), the paper's distance made relative;
- `cosine`: 1 - <a, b> / (|a| |b|);
- `delta-cosine`: the same of the deltas to the base variant;
- `cka`: 1 - linear CKA (Kornblith et al., ICML 2019, eq. 5) with an expert's weight rows as the
  examples. It is the cosine of the centered Gram matrices of the rows, which are built block by
  block; an expert's projections are the blocks of one block-diagonal matrix.

Products are summed in float64, so that |a|^2 + |b|^2 - 2 <a, b> is good to one percent even for
siblings that differ by a millionth. Memory holds a tile of each expert, never an expert.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from moecc.architecture import Architecture, ExpertLayer, Projection
from moecc.errors import SourceError
from moecc.files import replace_file
from moecc.parallel import ordered, worker_pool
from moecc.variants import TILE_ELEMENTS, OpenVariant, row_spans

METRICS = ("l2", "cosine", "delta-cosine", "cka")
CHUNK = 1 << 15  # weights of each expert multiplied at once: float64 that stays in cache
CKA_ROWS = 512
CACHE_VERSION = 1

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
# (projection, rows) -> the float tensor [rows, in] of one expert
RowReader = Callable[[Projection, range], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Similarity:
    """Inner products between the variants' experts of the same layer and index.

    Attributes:
        gram: per layer `[experts, variants, variants]`, of the weights.
        cka_gram: the same of the centered row Gram matrices, or None if not asked for.
        distinct: per layer `[experts, variants]`; bit-identical variants have the same number,
            that of the first of them.
    """

    gram: list[Array]
    cka_gram: list[Array] | None
    distinct: list[Labels]

    def distances(self, metric: str, base: int | None = None) -> list[Array]:
        """Per layer the distances `[experts, variants, variants]`; `base` for delta-cosine."""
        grams = self.cka_gram if metric == "cka" else self.gram
        assert grams is not None, "cka was not measured"
        return [
            np.where(same[:, :, None] == same[:, None, :], 0.0, distance(gram, metric, base))
            for gram, same in zip(grams, self.distinct, strict=True)
        ]


def distance(gram: Array, metric: str, base: int | None = None) -> Array:
    """Distances `[..., n, n]` from inner products `[..., n, n]`."""
    squares = np.diagonal(gram, axis1=-2, axis2=-1)
    if metric == "l2":
        total = squares[..., :, None] + squares[..., None, :]
        apart = np.sqrt(np.maximum(total - 2 * gram, 0.0))
        return _ratio(apart, np.sqrt(total / 2), 0.0)
    if metric == "delta-cosine":
        assert base is not None, "delta-cosine needs a base"
        row = gram[..., base, :]
        gram = gram - row[..., None, :] - row[..., :, None] + gram[..., base, base, None, None]
        squares = np.maximum(np.diagonal(gram, axis1=-2, axis2=-1), 0.0)
    norms = np.sqrt(squares[..., :, None] * squares[..., None, :])
    return np.clip(1.0 - _ratio(gram, norms, 0.0), 0.0, 2.0)


def _ratio(a: Array, b: Array, otherwise: float) -> Array:
    return np.divide(a, b, out=np.full_like(a, otherwise), where=b > 0)


def measure(
    architecture: Architecture,
    variants: Sequence[OpenVariant],
    *,
    cka: bool = False,
    device: str = "cpu",
    cache: Path | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Similarity:
    """Reads every expert of every variant once and compares those of the same index.

    `cache` is a folder; `on_progress` gets bytes done and bytes in all. Raises SourceError if a
    weight is NaN or infinite.
    """
    key = _cache_key(architecture, variants, cka)
    cached = _load(cache / f"{key}.npz", architecture, len(variants), cka) if cache else None
    if cached is not None:
        return cached
    experts = [
        (layer, expert)
        for layer, found in enumerate(architecture.layers)
        for expert in range(found.num_experts)
    ]
    sizes = [architecture.layers[layer].exact_bytes * len(variants) for layer, _ in experts]
    done, results = 0, []
    with worker_pool() as pool:

        def compare(item: tuple[int, int]) -> tuple[Array, Array | None, Labels]:
            return _compare_expert(architecture.layers[item[0]], variants, *item, cka, device)

        for size, result in zip(sizes, ordered(pool, compare, experts), strict=True):
            results.append(result)
            done += size
            on_progress(done, sum(sizes))
    similarity = _by_layer(architecture, results, cka)
    if cache is not None:
        _save(cache / f"{key}.npz", similarity)
    return similarity


def gram_matrix(
    layer: ExpertLayer, readers: Sequence[RowReader], metric: str, device: str = "cpu"
) -> Array:
    """Inner products `[n, n]` of n experts given by their row readers, for any metric."""
    blocks = _cka_blocks if metric == "cka" else _weight_blocks
    total = np.zeros((len(readers), len(readers)))
    for weight, block in blocks(layer, readers, device):
        total += weight * _products(block)
    return total


def _compare_expert(
    layer: ExpertLayer,
    variants: Sequence[OpenVariant],
    index: int,
    expert: int,
    cka: bool,
    device: str,
) -> tuple[Array, Array | None, Labels]:
    count = len(variants)
    gram = np.zeros((count, count))
    labels = np.zeros(count, dtype=np.int64)  # all alike until a tile says otherwise
    for projection in layer.projections:
        for span in row_spans(projection, variants):
            tiles = [v.rows(index, projection.name, expert, span) for v in variants]
            labels = _split(labels, tiles)
            gram += _products(torch.stack(tiles).view(count, -1).to(device))
    if not np.isfinite(gram).all():
        bad = variants[int(np.argmax(~np.isfinite(np.diagonal(gram))))].name
        raise SourceError(
            f"expert {expert} of `{layer.name}` in variant `{bad}` holds NaN or infinite weights",
            "the checkpoint is broken; look at how it was trained or converted",
        )
    if not cka:
        return gram, None, labels

    def reader(variant: OpenVariant) -> RowReader:
        return lambda projection, span: variant.rows(index, projection.name, expert, span)

    return gram, gram_matrix(layer, [reader(v) for v in variants], "cka", device), labels


def _products(block: torch.Tensor) -> Array:
    """Inner products `[n, n]` of the rows of `[n, weights]`, summed in float64."""
    size = CHUNK if block.device.type == "cpu" else block.shape[1]
    total = block.new_zeros(len(block), len(block), dtype=torch.float64)
    for start in range(0, block.shape[1], size):
        part = block[:, start : start + size].double()
        total += part @ part.T
    products: Array = total.cpu().numpy()
    return products


def _split(labels: Labels, tiles: Sequence[torch.Tensor]) -> Labels:
    """Tells variants apart whose tiles differ in a bit; a label is the first of its kind."""
    raw = [tile.contiguous().view(torch.uint8) for tile in tiles]
    out: Labels = labels.copy()
    for i in range(len(raw)):
        out[i] = next(
            (out[j] for j in range(i) if labels[j] == labels[i] and torch.equal(raw[i], raw[j])), i
        )
    return out


def _weight_blocks(
    layer: ExpertLayer, readers: Sequence[RowReader], device: str
) -> Iterator[tuple[int, torch.Tensor]]:
    elements = max(1, TILE_ELEMENTS * 8 // len(readers))
    for projection in layer.projections:
        for span in row_spans(projection, elements=elements):
            rows = [read(projection, span).to(device).view(-1) for read in readers]
            yield 1, torch.stack(rows)


def _cka_blocks(
    layer: ExpertLayer, readers: Sequence[RowReader], device: str
) -> Iterator[tuple[int, torch.Tensor]]:
    """Blocks of the centered Gram matrices of the rows; one off the diagonal counts twice."""
    for projection in layer.projections:
        if projection.is_bias:
            continue
        rows = projection.matrix[0]
        spans = [range(s, min(s + CKA_ROWS, rows)) for s in range(0, rows, CKA_ROWS)]

        def read(reader: RowReader, span: range, p: Projection = projection) -> torch.Tensor:
            return reader(p, span).to(device).double()

        means = [torch.stack([read(r, s).sum(0) for s in spans]).sum(0) / rows for r in readers]
        for i, left in enumerate(spans):
            for right in spans[i:]:
                block = [
                    ((read(r, left) - m) @ (read(r, right) - m).T).view(-1)
                    for r, m in zip(readers, means, strict=True)
                ]
                yield 1 if left == right else 2, torch.stack(block)


def _by_layer(
    architecture: Architecture,
    results: list[tuple[Array, Array | None, Labels]],
    cka: bool,
) -> Similarity:
    gram, cka_gram, distinct, at = [], [], [], 0
    for layer in architecture.layers:
        part = results[at : at + layer.num_experts]
        at += layer.num_experts
        gram.append(np.stack([g for g, _, _ in part]))
        cka_gram.append(np.stack([c for _, c, _ in part if c is not None]) if cka else gram[-1])
        distinct.append(np.stack([d for _, _, d in part]))
    return Similarity(gram, cka_gram if cka else None, distinct)


def cache_folder() -> Path:
    """Where measurements are kept: MOECC_CACHE, else XDG_CACHE_HOME/moecc, else ~/.cache/moecc."""
    if own := os.environ.get("MOECC_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moecc"


def _cache_key(architecture: Architecture, variants: Sequence[OpenVariant], cka: bool) -> str:
    layers = [(a.name, a.num_experts, [p.name for p in a.projections]) for a in architecture.layers]
    prints = [v.fingerprint for v in variants]
    text = json.dumps([CACHE_VERSION, layers, prints, cka])
    return hashlib.sha256(text.encode()).hexdigest()


def _save(path: Path, similarity: Similarity) -> None:
    arrays: dict[str, Any] = {f"gram{i}": a for i, a in enumerate(similarity.gram)}
    arrays |= {f"distinct{i}": a for i, a in enumerate(similarity.distinct)}
    arrays |= {f"cka{i}": a for i, a in enumerate(similarity.cka_gram or [])}
    with suppress(OSError):  # a cache that cannot be written is done without
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as file:
            np.savez(file, **arrays)


def _load(path: Path, architecture: Architecture, count: int, cka: bool) -> Similarity | None:
    """A measurement from the cache; None if there is none that can be used."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            layers = range(len(architecture.layers))
            gram = [arrays[f"gram{i}"] for i in layers]
            distinct = [arrays[f"distinct{i}"] for i in layers]
            cka_gram = [arrays[f"cka{i}"] for i in layers] if cka else None
    except Exception:  # numpy and zipfile raise all kinds for a damaged file
        return None
    for layer, g, c, d in zip(architecture.layers, gram, cka_gram or gram, distinct, strict=True):
        if {g.shape, c.shape} != {(layer.num_experts, count, count)} or d.shape != g.shape[:2]:
            return None
    return Similarity(gram, cka_gram, distinct)
