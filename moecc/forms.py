"""The forms in which an expert's matrix can be stored, and what each takes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

from moecc.architecture import Projection
from moecc.coding import Coding
from moecc.lowrank import LowRank
from moecc.recipe import AUTO, Merge

PLAIN, KEPT = "16bit", "exact"
# What `auto` chooses from; adapters need a center that is nearly exact.
CENTER_BITS, RESIDUALS, GROUPS = (2, 3, 4, 5, 6, 8, 16), (0, 1, 2, 3), (64, 0)
RANKS, LEAST_CENTER = ("rank4", "rank16", "rank64"), 4


@dataclass(frozen=True, slots=True, order=True)
class Form:
    """A center and the residual of one member.

    `center` is the name of a coding, `16bit` (plain, rounded to 16 bits) or `exact` (one expert as
    its source has it); `residual` the name of a coding, or empty.
    """

    center: str
    residual: str = ""

    @classmethod
    def parse(cls, name: str) -> Form:
        """The form called `name`, for example `4bit-g64+2bit-g64`, `16bit` or `exact`."""
        center, plus, residual = name.partition("+")
        form = cls(center, residual)
        if center not in (PLAIN, KEPT):
            Coding.parse(center)
        if plus and (center == KEPT or not residual or form.residual_coding is None):
            raise ValueError(f"not the name of a form: {name!r}")
        return form

    @property
    def name(self) -> str:
        """The name that `parse` reads."""
        return f"{self.center}+{self.residual}" if self.residual else self.center

    @property
    def center_coding(self) -> Coding | None:
        """None where the center is plain."""
        return None if self.center in (PLAIN, KEPT) else _coding(self.center)

    @property
    def residual_coding(self) -> Coding | LowRank | None:
        if self.residual.startswith("rank"):
            return LowRank.parse(self.residual)
        return _coding(self.residual) if self.residual else None

    @property
    def center_bits(self) -> int:
        coding = self.center_coding
        return coding.bits if coding else 16

    @property
    def residual_bits(self) -> int:
        """Of a code; 0 where there is none."""
        coding = self.residual_coding
        return coding.bits if isinstance(coding, Coding) else 0

    def center_bytes(self, projection: Projection) -> int:
        """Bytes of a slot of the center."""
        if self.center == KEPT:
            return projection.exact_bytes
        coding = self.center_coding
        return coding.nbytes(*projection.matrix) if coding else 2 * projection.params

    def residual_bytes(self, projection: Projection) -> int:
        """Bytes of a slot of a residual."""
        coding = self.residual_coding
        return coding.nbytes(*projection.matrix) if coding else 0


@lru_cache(maxsize=256)
def _coding(name: str) -> Coding:
    return Coding.parse(name)


EXACT = Form(KEPT)


def fixed_form(merge: Merge) -> Form:
    """The one form of a recipe's `merge` in which nothing is `auto`."""
    assert not merge.planned, "the planner chooses"
    center, group = int(merge.center), int(merge.group)
    residual = merge.residual
    if isinstance(residual, int):
        residual = Coding(residual, group).name if residual else ""
    return Form(PLAIN if center == 16 else Coding(center, group).name, residual)


def candidate_forms(merge: Merge) -> tuple[Form, ...]:
    """All forms a recipe's `merge` leaves to choose from, sorted."""
    groups = GROUPS if merge.group == AUTO else (merge.group,)
    centers = CENTER_BITS if merge.center == AUTO else (merge.center,)
    residuals = (*RESIDUALS, *RANKS) if merge.residual == AUTO else (merge.residual,)
    found = {EXACT}
    for center, group, residual in itertools.product(centers, groups, residuals):
        least = LEAST_CENTER if isinstance(residual, str) else residual + 1
        if int(center) >= least:
            found.add(fixed_form(Merge(center=center, residual=residual, group=group)))
    return tuple(sorted(found))


def smallest_form(merge: Merge) -> Form:
    """The form of a recipe's `merge` that takes the fewest bytes, if it is not exact."""
    row = Projection("", (1, 4096), "BF16")
    coded = [form for form in candidate_forms(merge) if form != EXACT]
    return min(coded, key=lambda form: form.center_bytes(row) + form.residual_bytes(row))
