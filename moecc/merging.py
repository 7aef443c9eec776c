"""What a layer's groups are merged from: the members' rows, and what is known of their inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moecc.architecture import ExpertLayer, Projection
from moecc.bank import Job, ProjectionBank
from moecc.blocks import damped
from moecc.coding import Coding
from moecc.measured import Measured, weights
from moecc.merge import (
    CodedTile,
    Residual,
    any_low_rank,
    code_tile,
    code_tile_jointly,
    mean,
    regression_mean,
    task_arithmetic,
    ties,
)
from moecc.recipe import Merge, Params
from moecc.similarity import Array
from moecc.variants import TILE_ELEMENTS, OpenVariant, row_spans

# Weights coded at once, column by column: few and long calls.
JOINT_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 25}
SCALES = {"task-arithmetic": 0.4, "ties": 1.0}  # as the papers have them where nothing is tuned


@dataclass(frozen=True, slots=True)
class Merging:
    """One layer of the variants, and how its groups are merged.

    Attributes:
        base: the variant that deltas are taken to.
        importance: `[E, V, P]`, see rates.py; None without a calibration.
    """

    variants: Sequence[OpenVariant]
    base: int
    merge: Merge
    index: int
    layer: ExpertLayer
    device: str
    measured: Measured | None
    importance: Array | None

    def spans(self, bank: ProjectionBank, job: Job) -> list[range]:
        """The rows that are coded at once."""
        method, elements = self.merge.method, TILE_ELEMENTS
        if job.coded and (method == "ties" or any_low_rank(bank.residuals(job))):
            elements = bank.projection.params
        elif job.coded and method == "joint":
            elements = JOINT_ELEMENTS[torch.device(self.device).type]
        return row_spans(bank.projection, self.variants, elements)

    def exact_rows(self, projection: Projection, job: Job, span: range) -> Tensor:
        """Rows of an expert as its source has them."""
        variant = self.variants[job.members[0][0]]
        read = variant.own_rows if job.own_order else variant.rows
        return read(self.index, projection.name, job.expert, span)

    def code(
        self,
        projection: Projection,
        job: Job,
        span: range,
        *,
        center: Coding | torch.dtype,
        residuals: Sequence[Residual],
    ) -> CodedTile:
        """Some rows of a group, coded."""
        tiles = [self._rows(projection, job, span, variant) for variant, _ in job.members]
        times = [times for _, times in job.members]
        if self.merge.method == "joint":
            importance, moments = self._inputs(projection, job)
            return code_tile_jointly(
                tiles,
                times,
                importance=importance,
                moments=moments,
                center=center,
                residuals=residuals,
            )
        moments = self._inputs(projection, job)[1] if any_low_rank(residuals) else None
        return code_tile(
            tiles,
            times,
            wanted=self._wanted(projection, job, span, tiles),
            center=center,
            residuals=residuals,
            moments=moments,
        )

    def _rows(self, projection: Projection, job: Job, span: range, variant: int) -> Tensor:
        rows = self.variants[variant].rows(self.index, projection.name, job.expert, span)
        return rows.to(self.device, torch.float32)

    def _wanted(
        self, projection: Projection, job: Job, span: range, tiles: Sequence[Tensor]
    ) -> Tensor:
        """The center by the recipe's method, before it is coded."""
        method, params = self.merge.method, self.merge.params or Params()
        times = [times for _, times in job.members]
        if method == "mean":
            return mean(tiles, times)
        if method == "representative":
            return tiles[job.representative]
        if method == "weighted":
            assert self.measured is not None
            routed = self.measured.frequency[self.index][job.expert]
            counts = [float(sum(routed[v] for v in same)) for same in job.same]
            return mean(tiles, counts if sum(counts) > 0 else times)
        if method == "regmean":
            importance, moments = self._inputs(projection, job)
            assert moments is not None
            return regression_mean(tiles, importance, moments)
        base = self._rows(projection, job, span, self.base)
        scale = params.scale or SCALES[method]
        every = [tile for tile, count in zip(tiles, times, strict=True) for _ in range(count)]
        if method == "ties":
            return ties(every, base, scale, params.density)
        return task_arithmetic(every, base, scale)

    def _inputs(self, projection: Projection, job: Job) -> tuple[Tensor, Tensor | None]:
        """Importance [kinds], and second moments [kinds, blocks, B, B] of the members' inputs."""
        if self.measured is None or self.importance is None:
            times = [float(times) for _, times in job.members]
            return torch.tensor(times, device=self.device), None
        p = weights(self.layer).index(projection)
        importance, moments = [], []
        for same in job.same:
            counts = self.importance[job.expert, list(same), p]
            read = [self.measured.moments(self.index, projection.name, job.expert, v) for v in same]
            scaled = damped(torch.stack(read))
            parts = torch.from_numpy(counts / counts.sum()).float()
            importance.append(float(counts.sum()))
            moments.append(torch.tensordot(parts, scaled, dims=1))
        top = max(importance)
        counted = torch.tensor([i / top for i in importance], device=self.device)
        return counted, torch.stack(moments).to(self.device)
