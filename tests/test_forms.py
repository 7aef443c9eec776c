"""moecc.forms: names, what `auto` may choose from, and bytes against what is really coded."""

from __future__ import annotations

from functools import cache
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moecc.architecture import Projection
from moecc.coding import Coding, encode
from moecc.forms import EXACT, Form, candidate_forms, fixed_form, smallest_form
from moecc.lowrank import LowRank, factorize
from moecc.recipe import AUTO, Merge

SHAPES = [(1, 1), (3, 31), (8, 64), (5, 65), (16, 130), (7, 320), (96, 160)]
ALL = candidate_forms(Merge(center=AUTO, residual=AUTO, group=AUTO))
WIDER = candidate_forms(Merge(center=AUTO, residual=AUTO, group=32))
EVERY = [(c, r, g) for c in (AUTO, 16, 8, 6, 5, 4) for r in (AUTO, 0, 1, 3) for g in (AUTO, 0, 128)]


@cache
def coded_bytes(rows: int, columns: int, coding: Coding | LowRank | None) -> int:
    """Bytes that really come out of the coder."""
    matrix = torch.ones(rows, columns)
    if coding is None:
        return 0
    if isinstance(coding, LowRank):
        return sum(factor.nbytes for factor in factorize(matrix, coding.rank, None))
    coded = encode(matrix, coding)
    return sum(plane.nbytes for plane in coded.planes) + coded.scales.nbytes


@pytest.mark.parametrize("form", [*ALL, *WIDER], ids=lambda form: form.name)
def test_names_are_read_back(form: Form) -> None:
    assert Form.parse(form.name) == form
    assert form.name == form.center + ("+" if form.residual else "") + form.residual


@pytest.mark.parametrize(
    "name",
    [
        "",
        "+",
        "4bit",
        "4bit-g64+",
        "+2bit-g64",
        "4bit-g64+16bit",
        "4bit-g64+exact",
        "exact+2bit-g64",
        "16bit+2bit",
        "16bit+2bit-g64+2bit-g64",
        "7bit-g64",
        "4bit-g63",
        "4bit-g0",
        "BF16",
        " 16bit",
        "16bit ",
        "16BIT",
        "rank16",
        "16bit+rank0",
        "16bit+rank",
        "exact+rank4",
    ],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"not the name|must be"):
        Form.parse(name)


@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_are_those_of_the_coder(shape: tuple[int, int]) -> None:
    projection = Projection("w", shape, "F32")
    rows, columns = shape
    for form in {*ALL, *WIDER}:
        if form == EXACT:
            assert form.center_bytes(projection) == 4 * rows * columns
        elif form.center == "16bit":
            assert form.center_bytes(projection) == 2 * rows * columns
        else:
            coding = Coding.parse(form.center)
            assert form.center_bytes(projection) == coded_bytes(rows, columns, coding)
        found = coded_bytes(rows, columns, form.residual_coding)
        assert form.residual_bytes(projection) == found


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 300),
    form=st.sampled_from(ALL),
    dtype=st.sampled_from(["BF16", "F16", "F32"]),
    transposed=st.booleans(),
)
def test_bytes_of_any_shape(
    rows: int, columns: int, form: Form, dtype: str, transposed: bool
) -> None:
    projection = Projection("w", (rows, columns), dtype, transposed)
    rows, columns = projection.matrix
    if form.center_coding is not None:
        assert form.center_bytes(projection) == coded_bytes(rows, columns, form.center_coding)
    assert form.residual_bytes(projection) == coded_bytes(rows, columns, form.residual_coding)


def test_exact_experts_are_as_in_their_source() -> None:
    for dtype, size in (("BF16", 2), ("F16", 2), ("F32", 4)):
        assert EXACT.center_bytes(Projection("w", (3, 5), dtype)) == 15 * size
        assert EXACT.residual_bytes(Projection("w", (3, 5), dtype)) == 0
    assert (EXACT.center_coding, EXACT.residual_coding) == (None, None)


@pytest.mark.parametrize("center", [16, 8, 6, 5, 4])
@pytest.mark.parametrize("residual", [0, 1, 2, 3])
@pytest.mark.parametrize("group", [0, 32, 64, 128])
def test_a_fixed_form_is_what_the_recipe_says(center: int, residual: int, group: int) -> None:
    form = fixed_form(Merge(center=center, residual=residual, group=group))
    assert form.center_coding == (None if center == 16 else Coding(center, group))
    assert form.residual_coding == (Coding(residual, group) if residual else None)
    assert (form.center_bits, form.residual_bits) == (center, residual)
    merge = Merge(center=center, residual=residual, group=group)
    assert candidate_forms(merge) == tuple(sorted({EXACT, form}))
    assert smallest_form(merge) == form


@pytest.mark.parametrize(("center", "residual", "group"), EVERY)
def test_what_auto_chooses_from(center: int | str, residual: int | str, group: int | str) -> None:
    merge = Merge(center=center, residual=residual, group=group)
    found = candidate_forms(merge)
    assert list(found) == sorted(set(found))
    assert EXACT in found
    wanted = {
        (c, r, g if c != 16 or r else None)
        for c, r, g in product(
            (2, 3, 4, 5, 6, 8, 16) if center == AUTO else (center,),
            (0, 1, 2, 3) if residual == AUTO else (residual,),
            (64, 0) if group == AUTO else (group,),
        )
        if int(r) < int(c)
    }
    bits = []
    for form in found:
        codings = [c for c in (form.center_coding, form.residual_coding) if c is not None]
        if form == EXACT or any(isinstance(coding, LowRank) for coding in codings):
            continue
        (size,) = {c.group for c in codings if isinstance(c, Coding)} or {None}
        bits.append((form.center_bits, form.residual_bits, size))
    assert len(bits) == len(set(bits))
    assert set(bits) == wanted


@pytest.mark.parametrize(("center", "residual", "group"), EVERY)
def test_the_smallest_form_takes_the_fewest_bytes(
    center: int | str, residual: int | str, group: int | str
) -> None:
    merge = Merge(center=center, residual=residual, group=group)
    smallest = smallest_form(merge)
    assert smallest in candidate_forms(merge)
    for shape in SHAPES[3:]:
        projection = Projection("w", shape, "BF16")
        for count in (1, 4):
            sizes = {
                form: form.center_bytes(projection) + count * form.residual_bytes(projection)
                for form in candidate_forms(merge)
                if form != EXACT
            }
            assert sizes[smallest] == min(sizes.values())
