"""What storing an expert in each form would cost it: the tables that `allocate` chooses from.

Losses are expected ones, from a sample of rows of every matrix:

- an error in what a center or residual rounds counts by the diagonal D of H = L D L^T, the moments
  of the inputs: error compensation leaves about that much of it (L. Chee et al., "QuIP", NeurIPS
  2023, theorem 1);
- what a member without a residual differs from the center in counts by H itself;
- times the member's sensitivity, which makes it nats of KL divergence a token.

Without a calibration H is the identity and a loss is relative to the squares of the weights.
Variants can be split wherever average linkage of their distances would split them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from moecc.allocate import LayerChoices
from moecc.architecture import Architecture, ExpertLayer, Projection
from moecc.blocks import Blocks, damped, load_solvers
from moecc.coding import Coding, dequantize, quantize
from moecc.forms import EXACT, Form
from moecc.joint import center_target
from moecc.lowrank import LowRank, leading, whiten
from moecc.measured import Measured, weights
from moecc.parallel import column_workers, ordered, worker_pool
from moecc.similarity import Array, Labels
from moecc.variants import OpenVariant

SAMPLE, LEAST_ROWS = 4096, 16  # weights and rows of a matrix that are coded
RANK_ROWS, LEARNED = 96, 5 / 6  # rows whose rank is looked at, and the part that shows directions
SPANS = 4  # runs that the rows come in
# An expert that the text does not reach counts as one that gets so little of it.
LEAST_PART = 0.02
SAFETY = 1e-12

# An expert's clusters, the ways to split it, and its losses `[C, targets, F, V]` per projection.
_Part = tuple[list[tuple[int, ...]], list[tuple[int, ...]], list[Array]]


def importance(measured: Measured, layer: int, found: ExpertLayer) -> Array:
    """What errors of the experts count, `[E, V, P]`: nats a unit of squared error of a matrix.

    Errors as weighted by moments with a mean diagonal of one.
    """
    variants = measured.sensitivity[layer].shape[1]
    level = np.zeros_like(measured.sensitivity[layer])
    for p, projection in enumerate(weights(found)):
        for expert in range(found.num_experts):
            for v in range(variants):
                moments = measured.moments(layer, projection.name, expert, v)
                trace = float(moments.diagonal(dim1=-2, dim2=-1).double().sum())
                level[expert, v, p] = trace / projection.matrix[1]
    counted = measured.sensitivity[layer] * level
    floored: Array = np.maximum(counted, LEAST_PART * counted.mean(0)) + SAFETY
    return floored


@dataclass(frozen=True, slots=True)
class RateSources:
    """What rates are measured on.

    Attributes:
        distances: relative L2, per layer `[E, V, V]`.
        distinct: per layer `[E, V]`, see similarity.py.
        base: the variant that may be a center as it is.
    """

    architecture: Architecture
    variants: Sequence[OpenVariant]
    distances: Sequence[Array]
    distinct: Sequence[Labels]
    base: int
    measured: Measured | None


def measure_rates(
    sources: RateSources,
    forms: Sequence[Form],
    *,
    device: str = "cpu",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[LayerChoices]:
    """The choices of every layer; `on_progress` gets bytes of experts done and bytes in all."""
    layers, count = sources.architecture.layers, len(sources.variants)
    total = sum(layer.exact_bytes * layer.num_experts * count for layer in layers)
    done, found = 0, []
    load_solvers(device)
    largest = max(p.params for layer in layers for p in layer.projections)
    with worker_pool(column_workers(largest, device)) as pool:
        for index, layer in enumerate(layers):
            measured = sources.measured
            counted = None if measured is None else importance(measured, index, layer)
            look = partial(_expert, sources, forms, index, counted, device)
            parts = []
            for part in ordered(pool, look, range(layer.num_experts)):
                parts.append(part)
                done += layer.exact_bytes * count
                on_progress(done, total)
            found.append(_choices(sources, forms, index, parts))
    return found


def _choices(
    sources: RateSources,
    forms: Sequence[Form],
    index: int,
    parts: Sequence[_Part],
) -> LayerChoices:
    layer, count = sources.architecture.layers[index], len(sources.variants)
    clusters: list[tuple[int, ...]] = []
    options, shares = [], []
    for expert, (own, splits, _) in enumerate(parts):
        options.append(tuple(tuple(len(clusters) + c for c in split) for split in splits))
        clusters += own
        labels = sources.distinct[index][expert]
        for members in own:
            kinds = [labels[m] for m in members]
            share = np.zeros(count)
            share[list(members)] = [1 / kinds.count(kind) for kind in kinds]
            shares.append(share)
    projections = weights(layer)
    return LayerChoices(
        clusters=tuple(clusters),
        options=tuple(options),
        forms=tuple(forms),
        losses=tuple(
            np.concatenate([losses[p] for _, _, losses in parts]) for p in range(len(projections))
        ),
        shares=np.stack(shares),
        center_bytes=tuple(np.array([f.center_bytes(p) for f in forms]) for p in projections),
        residual_bytes=tuple(np.array([f.residual_bytes(p) for f in forms]) for p in projections),
    )


def _expert(
    sources: RateSources,
    forms: Sequence[Form],
    index: int,
    counted: Array | None,
    device: str,
    expert: int,
) -> _Part:
    """The choices of one expert."""
    layer = sources.architecture.layers[index]
    labels = sources.distinct[index][expert]
    clusters, options = splits(sources.distances[index][expert], labels)
    losses = []
    for p, projection in enumerate(weights(layer)):
        rows = _sample(sources.variants, index, projection, expert).to(device)
        moments = None
        if sources.measured is not None:
            read = sources.measured.moments
            moments = torch.stack(
                [read(index, projection.name, expert, v) for v in range(len(rows))]
            )
        if counted is None:
            counts = 1 / rows.square().mean((1, 2)).clamp(min=SAFETY) / projection.params
        else:
            counts = torch.from_numpy(counted[expert, :, p]).float()
        found = _Sampled(rows, moments, counts.to(device), projection)
        losses.append(found.losses(clusters, labels, forms, sources.base))
    return clusters, options, losses


def splits(
    apart: Array, labels: npt.NDArray[np.int64]
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Clusters of variants by average linkage, and all the ways to cut the tree, whole first.

    `apart` `[V, V]`; variants with the same label are never split.
    """
    kinds = [tuple(np.flatnonzero(labels == label).tolist()) for label in np.unique(labels)]
    clusters, current = list(kinds), list(range(len(kinds)))
    options = [tuple(current)]
    if len(kinds) > 1:
        first = [members[0] for members in kinds]
        tree = linkage(squareform(apart[np.ix_(first, first)], checks=False), "average")
        for left, right, *_ in tree:
            clusters.append(tuple(sorted(clusters[int(left)] + clusters[int(right)])))
            current = [c for c in current if c not in (left, right)] + [len(clusters) - 1]
            options.append(tuple(current))
    return clusters, options[::-1]


def _sample(
    variants: Sequence[OpenVariant], layer: int, projection: Projection, expert: int
) -> Tensor:
    """Some rows of every variant's matrix, float32 [V, r, K]: a few runs, evenly spread."""
    rows, columns = projection.matrix
    count = min(rows, max(RANK_ROWS, -(-SAMPLE // columns)))
    runs = min(SPANS, count)
    size = -(-count // runs)
    starts = sorted({i * (rows - size) // max(1, runs - 1) for i in range(runs)})
    return torch.stack(
        [
            torch.cat(
                [v.rows(layer, projection.name, expert, range(s, s + size)).float() for s in starts]
            )
            for v in variants
        ]
    )


class _Sampled:
    """Rows [V, r, K] of one expert's matrix, and what their errors count."""

    def __init__(
        self, rows: Tensor, moments: Tensor | None, counts: Tensor, projection: Projection
    ) -> None:
        wanted = max(LEAST_ROWS, -(-SAMPLE // rows.shape[2]))
        self.every = max(1, rows.shape[1] // wanted)
        self.all_rows, self.rows, self.counts = rows, rows[:, :: self.every], counts
        self.scale = counts * (projection.matrix[0] / self.rows.shape[1])
        # Factors that take more than three bits a weight have better alternatives.
        self.most_rank = 3 * projection.params // (16 * sum(projection.matrix))
        self.moments = None if moments is None else damped(moments.to(rows.device))
        self.weights = _compensated(self.moments, self.rows)

    def losses(
        self,
        clusters: Sequence[tuple[int, ...]],
        labels: Labels,
        forms: Sequence[Form],
        base: int,
    ) -> Array:
        """Expected losses `[C, 2, F, V]`: around the members' mean, and around one of them."""
        found = np.full((len(clusters), 2, len(forms), len(self.rows)), np.inf)
        centers, pairs = self._targets(clusters, base)
        targets = centers[:, :: self.every]
        member = torch.tensor([v for _, _, v in pairs])
        target = torch.tensor([t for _, t, _ in pairs])
        at = tuple(np.array(pairs).T)
        apart = self._apart(self.rows[member] - targets[target], member)
        ranks = {f.residual_coding for f in forms if isinstance(f.residual_coding, LowRank)}
        beyond = self._beyond(centers, pairs, sorted(rank.rank for rank in ranks))
        for center in sorted({form.center for form in forms} - {EXACT.center}):
            coded = _rounded(targets, Form(center).center_coding)
            lost = (coded - targets).square()[target]
            left = self.rows[member] - coded[target]
            for f, form in enumerate(forms):
                if form.center != center:
                    continue
                residual = form.residual_coding
                if isinstance(residual, Coding):
                    missed = (_rounded(left, residual) - left).square_()
                    loss = (missed * self.weights[member]).sum((1, 2))
                else:
                    more = beyond[residual.rank] if residual else apart
                    loss = more + (lost * self.weights[member]).sum((1, 2))
                numbers = (loss * self.scale[member]).double().cpu().numpy()
                found[at[0], at[1] - 2 * at[0], f, at[2]] = numbers
        for c, members in enumerate(clusters):
            outside = [v for v in range(len(self.rows)) if v not in members]
            found[c, :, :, outside] = 0.0
            for label in {int(labels[m]) for m in members}:  # the same expert, so the same form
                same = [m for m in members if labels[m] == label]
                found[c][:, :, same] = found[c][:, :, same].mean(-1, keepdims=True)
            if len({int(labels[m]) for m in members}) == 1:
                found[c, 0, forms.index(EXACT)] = 0.0
        return found

    def _targets(
        self, clusters: Sequence[tuple[int, ...]], base: int
    ) -> tuple[Tensor, list[tuple[int, int, int]]]:
        """Centers [2 C, rows, K] and (cluster, center, member) where a member can have one."""
        targets, pairs = [], []
        for c, members in enumerate(clusters):
            own = list(members)
            middle = center_target(self.all_rows[own], self.counts[own], [None] * len(own))
            targets += [middle, self.all_rows[base if base in members else own[0]]]
            pairs += [(c, 2 * c + t, m) for t in range(2 if len(own) > 1 else 1) for m in own]
        return torch.stack(targets), pairs

    def _beyond(
        self, centers: Tensor, pairs: Sequence[tuple[int, int, int]], ranks: Sequence[int]
    ) -> dict[int, Tensor]:
        """Per rank what the best factors miss of d H d^T, [n]; infinite around means.

        The directions come from some rows and are tried on the others: a sample has little rank.
        """
        learned = int(LEARNED * self.all_rows.shape[1])
        scale = self.rows.shape[1] / max(1, self.all_rows.shape[1] - learned)
        found = {rank: torch.full((len(pairs),), torch.inf) for rank in ranks}
        possible = [rank for rank in ranks if rank <= min(learned, self.most_rank)]
        for i, (_, center, v) in enumerate(pairs):
            if center % 2 == 0 or not possible:
                continue
            own = None if self.moments is None else self.moments[v]
            apart = whiten(self.all_rows[v] - centers[center], own)
            directions = leading(apart[:learned], possible[-1])
            rest = apart[learned:]
            for rank in possible:
                along = directions[:, :rank]
                missed = rest - (rest @ along) @ along.T
                found[rank][i] = scale * float(missed.square().sum())
        return {rank: values.to(self.rows.device) for rank, values in found.items()}

    def _apart(self, apart: Tensor, member: Tensor) -> Tensor:
        """Sums over the rows of d H d^T, [n], for differences [n, r, K] of some members."""
        if self.moments is None:
            return apart.square().sum((1, 2))
        cut = Blocks(apart.shape[-1], self.moments).cut(apart)
        total: Tensor = ((cut @ self.moments[member]) * cut).sum((1, 2, 3))
        return total


def _compensated(moments: Tensor | None, rows: Tensor) -> Tensor:
    """What an error in a column counts after compensation, [V, 1, K]."""
    if moments is None:
        return torch.ones(len(rows), 1, rows.shape[-1], device=rows.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    factor = torch.linalg.cholesky(inverse, upper=True)
    left = factor.diagonal(dim1=-2, dim2=-1).square().reciprocal()
    whole: Tensor = left.flatten(1)[:, None, : rows.shape[-1]]
    return whole


def _rounded(rows: Tensor, coding: Coding | None) -> Tensor:
    """Rows [n, r, K] in the nearest codes, or in 16 bits."""
    if coding is None:
        return rows.bfloat16().float()
    codes, scales = quantize(rows.flatten(0, 1), coding)
    values: Tensor = dequantize(codes, scales, coding)
    return values.reshape(rows.shape)
