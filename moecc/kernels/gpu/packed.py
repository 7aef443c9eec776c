"""Kernels of `moecc.kernels.packed`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from moecc.kernels.device import INTERPRETED
from moecc.kernels.gpu.launch import begin, let_next_begin, overlap, refresh, wait
from moecc.kernels.norm import Norm
from moecc.kernels.packed import PADDING, Digits

if TYPE_CHECKING:
    from moecc.kernels.packed import Blocks, PackedSlots, Term

_PLAIN = tl.constexpr(INTERPRETED)  # the interpreter knows no assembly
_PADDING = tl.constexpr(PADDING)
_LARGEST = tl.constexpr(32639.0)  # of two balanced int8 digits: 127 * 256 + 127


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a product is cut up.

    `rows` are out-features of a program: 64 for each warp, or scales are loaded late (a thread
    then has two at least, as a copy that does not wait takes). `stages` are steps in flight and
    `step` in-features of a step, at least; a power of two up to PADDING. Steps of just so many
    do with at most `registers` a thread, if it is given: then more programs run side by side.
    """

    rows: int
    warps: int
    stages: int
    step: int
    registers: int | None = None


_SINGLE = Tiling(128, 2, 4, 128)  # a route at a time
_NARROW = Tiling(128, 2, 3, 128)  # blocks of 4 routes
_WIDE = Tiling(256, 4, 3, 128, 168)  # larger ones: the matrix units then take weights as they are


def digits(x: Tensor, parts: int, norm: Norm | None, variants: Tensor | None) -> Digits:
    """See `moecc.kernels.packed.digits`."""
    rows, in_features = x.shape
    result, scale, size = _new_digits(x, rows, in_features, parts)
    weight = x if norm is None else norm.weight
    _digits[(rows, parts)](
        x,
        weight,
        scale if variants is None else variants,
        result.values,
        scale,
        0.0 if norm is None else norm.eps,
        x.stride(0),
        weight.stride(0),
        in_features,
        result.values.shape[-1],
        NORMED=norm is not None,
        SIZE=size,
        num_warps=_warps(size),
        **overlap(x.device),
    )
    return result


def gated_digits(partials: Tensor, activation: str, dtype: torch.dtype, parts: int = 1) -> Digits:
    """See `moecc.kernels.packed.gated_digits`."""
    terms, rows, both = partials.shape
    result, scale, size = _new_digits(partials, rows, both // 2, parts)
    _gated_digits[(rows, parts)](
        partials,
        result.values,
        scale,
        rows,
        both // 2,
        result.values.shape[-1],
        TERMS=terms,
        ACTIVATION=activation,
        DTYPE=_DTYPES[dtype],
        SIZE=size,
        num_warps=_warps(size),
        **overlap(partials.device),
    )
    return result


def direct(x: Digits, terms: Sequence[Term], physical: Tensor, k: int, out: Tensor) -> None:
    """See `moecc.kernels.packed.direct`."""
    splits, scales = _splits(x, out, len(terms))
    tiling = _SINGLE
    for index in range(0, len(terms), 2):  # a launch for two, which often are all
        pair = terms[index : index + 2]
        (first, table), (second, second_table) = pair[0], pair[-1]
        rows = _rows(first, tiling)
        tiles = triton.cdiv(first.out_features, rows)
        _direct[(len(physical) * tiles, splits, len(pair))](
            x.values,
            scales,
            physical,
            out[index * splits :],
            table,
            *_tensors(first),
            second_table,
            *_tensors(second),
            len(physical),
            k,
            *_sizes(x, scales, first),
            CODING=_coding(first, tiling),
            SECOND=_coding(second, tiling),
            TERMS=len(pair),
            ROWS=rows,
            STAGES=tiling.stages,
            num_warps=tiling.warps,
            **overlap(out.device),
        )


def blocked(x: Digits, terms: Sequence[Blocks], k: int, out: Tensor) -> None:
    """See `moecc.kernels.packed.blocked`."""
    splits, scales = _splits(x, out, 1)
    for index, (slots, order, owners) in enumerate(terms):
        blocks = len(owners)
        block = len(order) // blocks
        tiling = _NARROW if block < 8 else _WIDE
        rows = _rows(slots, tiling)
        _blocked[(blocks * triton.cdiv(slots.out_features, rows), splits)](
            x.values,
            scales,
            order,
            owners,
            out,
            *_tensors(slots),
            blocks,
            out.shape[1],
            k,
            *_sizes(x, scales, slots),
            CODING=_coding(slots, tiling),
            BLOCK=block,
            ROWS=rows,
            STAGES=tiling.stages,
            FIRST=index == 0,
            num_warps=tiling.warps,
            maxnreg=_registers(slots, tiling),
            **overlap(out.device),
        )


def reduced(
    partials: Tensor,
    physical: Tensor,
    weights: Tensor,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """See `moecc.kernels.packed.reduced`."""
    parts, _, hidden = partials.shape
    tokens, k = weights.shape
    out = partials.new_empty(tokens, hidden, dtype=dtype)
    size = min(512, triton.next_power_of_2(hidden))
    _reduced[(tokens, triton.cdiv(hidden, size))](
        partials,
        physical,
        weights,
        out if residual is None else residual,
        out,
        tokens,
        hidden,
        PARTS=parts,
        K=k,
        RESIDUAL=residual is not None,
        SIZE=size,
        num_warps=4,
        **overlap(partials.device),
    )
    return out


_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _new_digits(
    like: Tensor, rows: int, in_features: int, parts: int
) -> tuple[Digits, Tensor, int]:
    """Digits to fill, their scales, and a power of two that holds a part."""
    padded = triton.cdiv(in_features, PADDING) * PADDING
    values = like.new_empty(rows, 2, padded, dtype=torch.int8)
    scale = like.new_empty(rows, parts, dtype=torch.float32)
    part = triton.cdiv(padded // PADDING, parts) * PADDING
    return Digits(values, scale, in_features), scale, triton.next_power_of_2(part)


def _warps(size: int) -> int:
    """Warps of a program with `size` elements: 16 for each thread."""
    return max(1, min(32, size // 512))


def _splits(x: Digits, out: Tensor, terms: int) -> tuple[int, Tensor]:
    """The parts of each term in `out`, and the scales of the digits, which must suit them."""
    splits, rest = divmod(out.shape[0], terms)
    if rest or not splits or not out.is_contiguous():
        raise ValueError(f"out must be contiguous, with parts for {terms} terms: {out.shape}")
    assert x.scale is not None
    if x.scale.shape[1] not in (1, splits):
        raise ValueError(f"digits in {x.scale.shape[1]} parts, for a product in {splits}")
    return splits, x.scale


def _rows(slots: PackedSlots, tiling: Tiling) -> int:
    """Out-features of a program: no more than there are."""
    padded = slots.scales.shape[-1]
    return min(tiling.rows, 1 << (padded.bit_length() - 1))


def _registers(slots: PackedSlots, tiling: Tiling) -> int | None:
    """Those that `tiling` allows; 8 bits have twice the sums, and longer steps more of all."""
    step = _coding(slots, tiling)[-1]
    return tiling.registers if slots.coding.bits < 8 and step == tiling.step else None


def _sizes(x: Digits, scales: Tensor, slots: PackedSlots) -> tuple[int, int, int, int, int]:
    """Parts of a row's scale, its padded and its own in-features, padded and own out-features."""
    padded = scales.shape[1], x.values.shape[-1]
    return *padded, slots.in_features, slots.scales.shape[-1], slots.out_features


def _tensors(slots: PackedSlots) -> tuple[Tensor, Tensor, Tensor]:
    """First plane, last plane, scales."""
    return slots.planes[0], slots.planes[-1], slots.scales


def _coding(slots: PackedSlots, tiling: Tiling) -> tuple[int, int, int, int]:
    """Widths of both planes (the second 0 if there is one), group, and in-features of a step."""
    high, low = (*slots.coding.planes, 0)[:2]
    block = PADDING // min(high, low or high)  # in-features of the longest block
    return high, low, slots.coding.group, max(block, slots.coding.group, tiling.step)


@triton.constexpr_function
def _shift(field: int, width: int, below: int) -> int:
    """Bits to the left that bring a field of a byte right below its `below` highest bits."""
    return 8 - below - (field + 1) * width


@triton.constexpr_function
def _mask(bits: int) -> int:
    """The `bits` highest bits of a byte."""
    return 256 - (1 << (8 - bits))


@triton.constexpr_function
def _middle(bits: int) -> int:
    """What turns a code at the top of a byte into its level, if xor-ed to it.

    The level, as a signed byte, is `(code - (2**bits - 1) / 2) * 2**(8 - bits)`.
    """
    return 128 | (128 >> bits)


@triton.constexpr_function
def _assembly(high: int, low: int, high_field: int, low_field: int) -> str:
    """PTX for the levels of four codes; the masks keep out what shifts bring from neighbors."""

    def moved(register: str, source: str, shift: int) -> str:
        return f"sh{'l' if shift >= 0 else 'r'}.b32 {register}, {source}, {abs(shift)};"

    def four(byte: int) -> str:
        return f"0x{byte:02X}{byte:02X}{byte:02X}{byte:02X}"

    lines = ["{ .reg .b32 a, b;", moved("a", "$1", _shift(high_field, high, 0))]
    if low:
        lines.append(moved("b", "$2", _shift(low_field, low, high)))
        lines.append(f"lop3.b32 a, a, b, {four(_mask(high))}, 0xE4;")  # a where masked, else b
    keep, middle = four(_mask(high + low)), four(_middle(high + low))
    lines.append(f"lop3.b32 $0, a, {keep}, {middle}, 0x6A; }}")  # (a & keep) ^ middle
    return "\n".join(lines)


@triton.jit
def _shifted(tile, SHIFT: tl.constexpr):
    if SHIFT >= 0:
        return tile << SHIFT
    else:
        return tile >> (-SHIFT)


@triton.jit
def _levels(
    high,
    low,
    HIGH: tl.constexpr,
    LOW: tl.constexpr,
    HIGH_FIELD: tl.constexpr,
    LOW_FIELD: tl.constexpr,
):
    """int8 levels (see `_middle`) of the codes in a field of the bytes of each plane."""
    if _PLAIN:
        codes = _shifted(high, _shift(HIGH_FIELD, HIGH, 0)) & _mask(HIGH)
        if LOW:
            codes |= _shifted(low, _shift(LOW_FIELD, LOW, HIGH)) & (_mask(HIGH + LOW) - _mask(HIGH))
        return (codes ^ _middle(HIGH + LOW)).to(tl.int8, bitcast=True)
    elif LOW:
        return tl.inline_asm_elementwise(
            _assembly(HIGH, LOW, HIGH_FIELD, LOW_FIELD),
            "=r,r,r",
            [high, low],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    else:
        return tl.inline_asm_elementwise(
            _assembly(HIGH, 0, HIGH_FIELD, 0),
            "=r,r",
            [high],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )


@triton.jit
def _sum(sums, IN_INTEGERS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr):
    """float32 [ROWS, TOKENS] of the sums of both digits, int32 [ROWS, 2 * TOKENS].

    Adding them up as integers is quicker, and safe in a group: 126 * 128 * 32639 fits.
    """
    high, low = tl.split(tl.reshape(sums, [ROWS, TOKENS, 2]))
    if IN_INTEGERS:
        return (high * 256 + low).to(tl.float32)
    else:
        return high.to(tl.float32) * 256 + low.to(tl.float32)


@triton.jit
def _product(
    x,  # int8
    columns,  # int32 [2 * TOKENS]: where the digits of each token begin
    high_plane,
    low_plane,
    scales,
    slot,
    start,  # first out-feature
    in_features,
    padded_out,
    CODING: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """float32 [ROWS, TOKENS]: products with a part of the in-features, in units of row scales."""
    HIGH: tl.constexpr = CODING[0]
    LOW: tl.constexpr = CODING[1]
    GROUP: tl.constexpr = CODING[2]
    STEP: tl.constexpr = CODING[3]
    HIGH_FIELDS: tl.constexpr = 8 // HIGH
    LOW_FIELDS: tl.constexpr = 8 // (LOW or HIGH)
    bytes_ = tl.arange(0, 32)
    tile = tl.arange(0, ROWS)[:, None] * 32 + bytes_[None, :]
    rows = tl.arange(0, ROWS)
    column = columns[None, :] + bytes_[:, None]
    slot_ = tl.maximum(slot, 0).to(tl.int64)
    high_blocks = tl.cdiv(in_features, 32 * HIGH_FIELDS)
    high_plane += (slot_ * high_blocks * padded_out + start) * 32
    low_blocks = tl.cdiv(in_features, 32 * LOW_FIELDS)
    low_plane += (slot_ * low_blocks * padded_out + start) * 32
    groups = tl.cdiv(in_features, GROUP or 1) if GROUP else 1
    scales += slot_ * groups * padded_out + start
    first = tl.program_id(1) * _part(in_features) // STEP
    last = tl.minimum(first + _part(in_features) // STEP, tl.cdiv(in_features, STEP))
    last = tl.where(slot < 0, first, last)

    result = tl.zeros([ROWS, TOKENS], tl.float32)
    sums = tl.zeros([ROWS, 2 * TOKENS], tl.int32)
    low_sums = tl.zeros([ROWS, 2 * TOKENS], tl.int32)
    for step in tl.range(first, last, num_stages=STAGES):
        for field in tl.static_range(STEP // 32):
            # Past the end of a row digits are zero: any block and scale will do.
            if field % HIGH_FIELDS == 0:
                block = step * (STEP // 32 // HIGH_FIELDS) + field // HIGH_FIELDS
                block = tl.minimum(block, high_blocks - 1)
                high = tl.load(high_plane + block * padded_out * 32 + tile)
            if LOW and field % LOW_FIELDS == 0:
                block = step * (STEP // 32 // LOW_FIELDS) + field // LOW_FIELDS
                block = tl.minimum(block, low_blocks - 1)
                low = tl.load(low_plane + block * padded_out * 32 + tile)
            xs = tl.load(x + (step * STEP + field * 32) + column)
            if GROUP and field * 32 % GROUP == 0:
                sums = tl.zeros([ROWS, 2 * TOKENS], tl.int32)
                low_sums = tl.zeros([ROWS, 2 * TOKENS], tl.int32)
            if HIGH == 8:  # as two codes of four bits: 16 times the high one's level, and the low's
                sums = tl.dot(_levels(high, high, 4, 0, 1, 0), xs, sums, out_dtype=tl.int32)
                low_sums = tl.dot(_levels(high, high, 4, 0, 0, 0), xs, low_sums, out_dtype=tl.int32)
            else:
                levels = _levels(
                    high, low if LOW else high, HIGH, LOW, field % HIGH_FIELDS, field % LOW_FIELDS
                )
                sums = tl.dot(levels, xs, sums, out_dtype=tl.int32)
            if GROUP and (field + 1) * 32 % GROUP == 0:
                group = step * (STEP // (GROUP or 1)) + field * 32 // (GROUP or 1)
                group = tl.minimum(group, groups - 1)
                scale = tl.load(scales + group * padded_out + rows).to(tl.float32)
                if HIGH == 8:
                    sums = sums * 16 + low_sums
                result += _sum(sums, HIGH < 8, ROWS, TOKENS) * scale[:, None]
    if not GROUP:
        scale = tl.load(scales + rows).to(tl.float32)
        result = _sum(sums, False, ROWS, TOKENS)
        if HIGH == 8:
            result = result * 16 + _sum(low_sums, False, ROWS, TOKENS)
        result *= scale[:, None]
    if HIGH == 8:
        return result * (1 / 16)
    else:
        return result * (1 / (1 << (8 - HIGH - LOW)))


@triton.jit(do_not_specialize=["routes", "k", "scale_parts"])  # not compiled for each batch
def _direct(
    x,
    x_scale,
    physical,
    out,
    table,
    high,
    low,
    scales,
    second_table,
    second_high,
    second_low,
    second_scales,
    routes,
    k,
    scale_parts,
    padded_in,
    in_features,
    padded_out,
    out_features,
    CODING: tl.constexpr,
    SECOND: tl.constexpr,
    TERMS: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    route = tl.program_id(0) % routes  # neighbors may share a slot
    start = _start(tl.program_id(0) // routes, padded_out, ROWS)
    expert = tl.load(physical + route)
    known = tl.maximum(expert, 0)
    row = route // k
    # The least the matrix units take is four tokens: the same one four times.
    columns = row.to(tl.int64) * 2 * padded_in + tl.arange(0, 8) % 2 * padded_in
    if TERMS == 1 or tl.program_id(2) == 0:
        slot = tl.where(expert < 0, -1, tl.load(table + known))
        result = _product(
            x, columns, high, low, scales, slot, start, in_features, padded_out,
            CODING, ROWS, 4, STAGES,
        )  # fmt: skip
    else:
        slot = tl.where(expert < 0, -1, tl.load(second_table + known))
        result = _product(
            x, columns, second_high, second_low, second_scales, slot, start, in_features,
            padded_out, SECOND, ROWS, 4, STAGES,
        )  # fmt: skip
    result *= tl.load(x_scale + row * scale_parts + tl.program_id(1) % scale_parts)
    part = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    out += (part * routes + route).to(tl.int64) * out_features
    index = start + tl.arange(0, ROWS)
    token = tl.arange(0, 4)
    kept = (index < out_features)[:, None] & (token == 0)[None, :]
    tl.store(out + index[:, None] + token[None, :] * 0, result, mask=kept)


@triton.jit(
    do_not_specialize=["blocks", "routes", "k", "scale_parts"]
)  # not compiled for each batch
def _blocked(
    x,
    x_scale,
    order,
    owners,
    out,
    high,
    low,
    scales,
    blocks,
    routes,
    k,
    scale_parts,
    padded_in,
    in_features,
    padded_out,
    out_features,
    CODING: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    FIRST: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    # The next term reads what this one waits for: it begins while the last programs of this one
    # end, and waits for their sums before it adds its own to them.
    if FIRST:
        wait(OVERLAP)
    else:
        refresh(OVERLAP)
    let_next_begin(OVERLAP)
    block = tl.program_id(0) % blocks  # neighbors may share a slot
    slot = tl.load(owners + block)
    if slot < 0:
        if not FIRST:
            wait(OVERLAP)
        return
    tile = tl.program_id(0) // blocks
    start = _start(tile, padded_out, ROWS)
    column = tl.arange(0, 2 * BLOCK)
    route = tl.load(order + block * BLOCK + column // 2)
    row = tl.maximum(route, 0) // k
    columns = row.to(tl.int64) * 2 * padded_in + column % 2 * padded_in
    result = _product(
        x, columns, high, low, scales, slot, start, in_features, padded_out,
        CODING, ROWS, BLOCK, STAGES,
    )  # fmt: skip
    route = tl.load(order + block * BLOCK + tl.arange(0, BLOCK))
    row = tl.maximum(route, 0) // k
    part = tl.program_id(1) % scale_parts
    scale = tl.load(x_scale + row * scale_parts + part)
    result *= scale[None, :]
    index = start + tl.arange(0, ROWS)
    out += tl.program_id(1).to(tl.int64) * routes * out_features
    own = (index >= tile * ROWS) & (index < out_features)  # what tiles share is added once
    kept = own[:, None] & (route >= 0)[None, :]
    places = out + index[:, None] + (tl.maximum(route, 0).to(tl.int64) * out_features)[None, :]
    if not FIRST:
        wait(OVERLAP)
        result += tl.load(places, mask=kept, other=0.0)
    tl.store(places, result, mask=kept)


@triton.jit
def _start(tile, padded_out, ROWS: tl.constexpr):
    """The first row of a tile; the last tile overlaps its neighbor where rows do not divide."""
    return tl.multiple_of(tl.minimum(tile * ROWS, padded_out - ROWS), 16)


@triton.jit
def _part(in_features):
    """In-features of each of the programs that share a row."""
    return tl.cdiv(tl.cdiv(in_features, _PADDING), tl.num_programs(1)) * _PADDING


@triton.jit
def _digits(
    x,
    weight,
    variants,
    values,
    scales,
    eps,
    stride,
    weight_stride,
    in_features,
    padded_in,
    NORMED: tl.constexpr,
    SIZE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, SIZE)
    index = tl.program_id(1) * _part(in_features) + place
    inside = (place < _part(in_features)) & (index < in_features)
    found = tl.load(x + row * stride + index, mask=inside, other=0).to(tl.float32)
    if NORMED:  # then the part is the row
        variant = tl.maximum(tl.load(variants + row), 0).to(tl.int64)
        own = tl.load(weight + variant * weight_stride + index, mask=inside, other=0.0)
        found *= 1 / tl.sqrt(tl.sum(found * found, 0) / in_features + eps)
        found = found.to(x.dtype.element_ty).to(tl.float32) * own.to(tl.float32)
        found = found.to(x.dtype.element_ty).to(tl.float32)
    _store_digits(found, values, scales, row, in_features, padded_in, SIZE)


@triton.jit(do_not_specialize=["rows"])  # not compiled for each batch
def _gated_digits(
    partials,
    values,
    scales,
    rows,
    in_features,
    padded_in,
    TERMS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DTYPE: tl.constexpr,
    SIZE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, SIZE)
    index = tl.program_id(1) * _part(in_features) + place
    inside = (place < _part(in_features)) & (index < in_features)
    gate = tl.zeros([SIZE], tl.float32)
    up = tl.zeros([SIZE], tl.float32)
    for term in tl.static_range(TERMS):
        start = partials + (term * rows + row) * 2 * in_features
        gate += tl.load(start + index, mask=inside, other=0)
        up += tl.load(start + in_features + index, mask=inside, other=0)
    gate = gate.to(DTYPE).to(tl.float32)
    up = up.to(DTYPE).to(tl.float32)
    active = _activated(gate, ACTIVATION).to(DTYPE).to(tl.float32)
    inner = (active * up).to(DTYPE).to(tl.float32)
    _store_digits(inner, values, scales, row, in_features, padded_in, SIZE)


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_pytorch_tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x * tl.sigmoid(2 * inner)  # 0.5 * (1 + tanh(inner))
    else:
        tl.static_assert(ACTIVATION == "relu")
        return tl.maximum(x, 0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _store_digits(x, values, scales, row, in_features, padded_in, SIZE: tl.constexpr):
    """Both digits and the scale of a part of a row float32 [SIZE], zero past its end."""
    largest = tl.max(tl.abs(x), axis=0)
    scale = tl.div_rn(largest, _LARGEST)
    scale = tl.where(scale > 0, scale, 1.0)
    whole = tl.floor(x * (1 / scale) + 0.5).to(tl.int32)
    high = (whole + 128) >> 8
    low = whole - high * 256
    place = tl.arange(0, SIZE)
    index = tl.program_id(1) * _part(in_features) + place
    kept = (place < _part(in_features)) & (index < padded_in)
    values += row * 2 * padded_in
    tl.store(values + index, high.to(tl.int8), mask=kept)
    tl.store(values + padded_in + index, low.to(tl.int8), mask=kept)
    # A sum of zeros, or NaN where the row is not finite.
    scale += tl.sum(x * 0, axis=0)
    tl.store(scales + row * tl.num_programs(1) + tl.program_id(1), scale)


@triton.jit(do_not_specialize=["tokens"])  # not compiled for each batch
def _reduced(
    partials,
    physical,
    weights,
    residual,
    out,
    tokens,
    hidden,
    PARTS: tl.constexpr,
    K: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SIZE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = index < hidden
    total = tl.zeros([SIZE], tl.float32)
    for choice in tl.static_range(K):
        route = tl.zeros([SIZE], tl.float32)
        for part in tl.static_range(PARTS):
            start = ((part * tokens + token) * K + choice) * hidden
            route += tl.load(partials + start + index, mask=inside, other=0)
        route *= tl.load(weights + token * K + choice).to(tl.float32)
        # What routes that are none hold is not said.
        total += tl.where(tl.load(physical + token * K + choice) < 0, 0.0, route)
    result = total.to(out.dtype.element_ty)
    if RESIDUAL:
        added = tl.load(residual + token * hidden + index, mask=inside, other=0)
        result = (result.to(tl.float32) + added.to(tl.float32)).to(out.dtype.element_ty)
    tl.store(out + token * hidden + index, result, mask=inside)
