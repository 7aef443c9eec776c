"""Where every expert goes: pools of slots, and the remap from logical to physical experts.

A pool holds the slots of one layer, projection, role and coding. A *center* is an expert's matrix
as stored (exactly, or the coded center of a group); a *residual* is what one variant adds to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from moecc.architecture import ExpertLayer, Projection
from moecc.coding import Coding
from moecc.forms import EXACT, PLAIN, Form
from moecc.lowrank import LowRank
from moecc.plan import Group, LayerPlan
from moecc.similarity import Labels

# remap columns
CENTER_POOL, CENTER_SLOT, RESIDUAL_POOL, RESIDUAL_SLOT = range(4)
NONE = -1
ABSENT = (NONE, NONE)


@dataclass(frozen=True, slots=True)
class Pool:
    """Slots of one coding: `4bit-g64` and the like, or a safetensors dtype for plain weights."""

    role: str  # center | residual
    coding: str
    slots: int

    @property
    def packed(self) -> Coding | LowRank | None:
        """None where weights are plain; ValueError for an unknown name."""
        if self.coding.startswith("rank"):
            return LowRank.parse(self.coding)
        return Coding.parse(self.coding) if "bit" in self.coding else None

    def tensors(self, layer: str, projection: Projection) -> list[tuple[str, str, tuple[int, ...]]]:
        """(name, dtype, shape) of the pool's tensors, slots first."""
        prefix = f"{layer}.{projection.name}.{self.role}.{self.coding}"
        coding = self.packed
        if coding is None:
            return [(f"{prefix}.weight", self.coding, (self.slots, *projection.shape))]
        rows, cols = projection.matrix
        if isinstance(coding, LowRank):
            left, right = (self.slots, rows, coding.rank), (self.slots, coding.rank, cols)
            return [(f"{prefix}.left", "BF16", left), (f"{prefix}.right", "BF16", right)]
        planes = [
            (f"{prefix}.plane{i}", "U8", (self.slots, rows, coding.row_bytes(width, cols)))
            for i, width in enumerate(coding.planes)
        ]
        return [*planes, (f"{prefix}.scales", "BF16", (self.slots, rows, coding.groups(cols)))]


@dataclass(frozen=True, slots=True)
class Job:
    """One group of one expert's projection, and the slots its parts are written to.

    Attributes:
        members: the variants; each distinct expert among them once, with its multiplicity.
        residuals: (pool, slot) for each of `members`, ABSENT where it has none; empty where nobody
            has one.
        representative: which of `members` is the center, where the method takes one of them.
        same: for each of `members` the variants that have its expert, itself included.
        own_order: the expert is all one variant's and exact, so that its neurons stay as they are.
    """

    expert: int
    members: tuple[tuple[int, int], ...]
    coded: bool
    center: tuple[int, int]
    residuals: tuple[tuple[int, int], ...]
    representative: int
    same: tuple[tuple[int, ...], ...]
    own_order: bool


@dataclass(frozen=True, slots=True)
class ProjectionBank:
    """The pools of one projection and the jobs that fill them."""

    projection: Projection
    pools: tuple[Pool, ...]
    jobs: tuple[Job, ...]

    def residuals(self, job: Job) -> list[Coding | LowRank | None]:
        """How the residual of each of a job's members is coded."""
        if not job.residuals:
            return [None] * len(job.members)
        return [None if at == ABSENT else self.pools[at[0]].packed for at in job.residuals]


@dataclass(frozen=True, slots=True)
class LayerBank:
    """The pools of a layer; `remap` is int32 `[variants, experts, projections, 4]`."""

    layer: ExpertLayer
    projections: tuple[ProjectionBank, ...]
    remap: npt.NDArray[np.int32]

    def tensors(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Every tensor of the layer, in the order of the files."""
        return [
            tensor
            for bank in self.projections
            for pool in bank.pools
            for tensor in pool.tensors(self.layer.name, bank.projection)
        ]


def lay_out(
    layer: ExpertLayer,
    plan: LayerPlan,
    distinct: Labels,
    dtype: str,
    first_group: int,
) -> LayerBank:
    """Gives every group of a layer its slots.

    `dtype` is that of 16-bit centers; `first_group` is the number of coded groups before this
    layer, so that representatives alternate over the whole model.
    """
    variants = distinct.shape[1]
    remap = np.full((variants, layer.num_experts, len(layer.projections), 4), NONE, dtype=np.int32)
    banks = []
    for p, projection in enumerate(layer.projections):
        slots = _Slots()
        number = first_group
        jobs = []
        matrix = sum(not before.is_bias for before in layer.projections[:p])
        for expert, groups in enumerate(plan.experts):
            for group in groups:
                own_order = not group.coded and len(group.members) == 1
                for part in _parts(group, distinct[expert], projection):
                    forms = part.forms[matrix] if part.coded else (EXACT,)
                    job = _place(slots, projection, expert, part, forms, distinct, dtype, number)
                    jobs.append(replace(job, own_order=own_order))
                    _point(remap[:, expert, p], part, distinct[expert], job)
                number += group.coded
        banks.append(ProjectionBank(projection, slots.pools(), tuple(jobs)))
    return LayerBank(layer, tuple(banks), remap)


def coded_groups(plan: LayerPlan) -> int:
    return sum(group.coded for groups in plan.experts for group in groups)


class _Slots:
    """Hands out slots, pool by pool, in the order they are asked for."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str], int] = {}

    def take(self, role: str, coding: str) -> tuple[int, int]:
        slot = self.counts.get((role, coding), 0)
        self.counts[role, coding] = slot + 1
        return list(self.counts).index((role, coding)), slot

    def pools(self) -> tuple[Pool, ...]:
        return tuple(Pool(role, coding, n) for (role, coding), n in self.counts.items())


def _kinds(group: Group, labels: npt.NDArray[np.int64]) -> tuple[tuple[int, ...], ...]:
    """The variants of each distinct expert in a group."""
    found: dict[int, list[int]] = {}
    for member in group.members:
        found.setdefault(int(labels[member]), []).append(member)
    return tuple(map(tuple, found.values()))


def _parts(group: Group, labels: npt.NDArray[np.int64], projection: Projection) -> Sequence[Group]:
    """A bias is never merged: its group falls apart into its distinct experts."""
    if not projection.is_bias:
        return [group]
    return [Group(same, False) for same in _kinds(group, labels)]


def _place(
    slots: _Slots,
    projection: Projection,
    expert: int,
    group: Group,
    forms: tuple[Form, ...],
    distinct: Labels,
    dtype: str,
    number: int,
) -> Job:
    same = _kinds(group, distinct[expert])
    kinds = tuple((variants[0], len(variants)) for variants in same)
    if forms[0] == EXACT:
        return Job(expert, kinds, False, slots.take("center", projection.dtype), (), 0, same, False)
    center = slots.take("center", dtype if forms[0].center == PLAIN else forms[0].center)
    names = [forms[group.members.index(variant)].residual for variant, _ in kinds]
    residuals = tuple(slots.take("residual", name) if name else ABSENT for name in names)
    wanted = number % distinct.shape[1]  # the paper: group i from variant i mod V
    member = wanted if wanted in group.members else group.members[number % len(group.members)]
    representative = [member in variants for variants in same].index(True)
    own = residuals if any(names) else ()
    return Job(expert, kinds, True, center, own, representative, same, False)


def _point(
    remap: npt.NDArray[np.int32], group: Group, labels: npt.NDArray[np.int64], job: Job
) -> None:
    of_label = {int(labels[variant]): i for i, (variant, _) in enumerate(job.members)}
    for member in group.members:
        residual = job.residuals[of_label[int(labels[member])]] if job.residuals else ABSENT
        remap[member] = (*job.center, *residual)
