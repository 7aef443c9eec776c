"""Rows of weights in a few bits: symmetric mid-rise codes with one scale per group.

Code `q` of a `b`-bit coding stands for `(q - (2**b - 1) / 2) * scale`: the levels are
±0.5, ±1.5, ... times a nonnegative bfloat16 scale, one per row and group of in-features.
A row of codes is stored as one or two bit planes (the first holds the high bits); in a
plane of width `w`, element `j` is bits `[j * w, (j + 1) * w)` of the row's little-endian
bit stream, and a row is padded with zero bits to a multiple of four bytes.

The scale of a group minimizes its squared error. The search runs on magnitudes rounded to
small integers, so every sum in it is exact in any order: a row codes to the same bytes
whatever its neighbors, tile, thread or device.

Inputs must be finite, which callers check: others code to unspecified values. A group whose
scale would be subnormal (below 2**-126) codes to zero.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}

# J. Max, "Quantizing for minimum distortion", IRE Trans. Inf. Theory 6 (1960); here by integration.
_DISTORTION = {1: 0.363380, 2: 0.118846, 3: 0.0374397, 4: 0.0115429}
_DISTORTION |= {5: 0.00349521, 6: 0.00104005, 8: 0.0000876862, 0: 1.0, 16: 0.0}

# Where the search for a group's scale looks first, as parts of the clip point (outermost level).
# Groups up to _SHORT: of the peak. Longer ones: of `rms_weight * rms + peak_weight * peak`.
# Fitted to the optimum on Gaussian, Laplace, uniform, Student-t, sparse and outlier groups.
_SHORT = 320
_OF_PEAK: dict[int, tuple[float, ...]] = {
    3: (0.86, 0.74, 0.64, 0.54, 0.43),
    4: (0.95, 0.9, 0.84, 0.77, 0.68),
    5: (0.97, 0.94, 1.04, 0.9, 0.85),
    6: (0.985, 0.97, 0.95, 1.03, 1.06),
    8: (1.005, 0.9945, 0.989, 0.975, 1.012),
}
_OF_BLEND: dict[int, tuple[float, float, tuple[float, ...]]] = {
    2: (1.5, 0.0, (0.87, 1.07)),
    3: (1.55, 0.13, (0.85, 0.93, 1.0, 1.1, 1.2)),
    4: (1.2, 0.33, (0.925, 0.98, 1.03, 1.09, 1.16, 1.24, 1.34)),
    5: (0.55, 0.63, (0.82, 0.88, 0.93, 0.98, 1.03, 1.08, 1.14, 1.2)),
    6: (0.3, 0.83, (0.9, 0.94, 0.98, 1.01, 1.04, 1.08, 1.12)),
}
_WORD = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # eight packed codes, by width
_TINY = 2.0**-126  # the smallest normal float32 (and bfloat16)
# Weights worked on at once. On a CPU calls are long: threads wait for the interpreter between.
_CPU_TILE, _CUDA_TILE = 1 << 19, 1 << 25


@dataclass(frozen=True, slots=True)
class Coding:
    """How a row is coded: `bits` per code, one scale per `group` weights (0: the whole row)."""

    bits: int
    group: int

    def __post_init__(self) -> None:
        if self.bits not in _PLANES:
            raise ValueError(f"bits must be one of {sorted(_PLANES)}, not {self.bits!r}")
        if self.group not in (0, 32, 64, 128):
            raise ValueError(f"group must be 32, 64, 128 or 0 for a row, not {self.group!r}")

    @classmethod
    def parse(cls, name: str) -> Coding:
        """The coding called `name`, for example `4bit-g64` or `2bit-row`."""
        match = re.fullmatch(r"([1-9])bit-(?:g([1-9][0-9]{1,2})|row)", name, re.ASCII)
        if match is None:
            raise ValueError(f"not the name of a coding: {name!r}")
        return cls(int(match[1]), int(match[2] or 0))

    @property
    def name(self) -> str:
        """The name that `parse` reads."""
        return f"{self.bits}bit-" + (f"g{self.group}" if self.group else "row")

    @property
    def planes(self) -> tuple[int, ...]:
        """Width in bits of each plane, the one with the high bits first."""
        return _PLANES[self.bits]

    def groups(self, in_features: int) -> int:
        """Scales in a row; the last group may be shorter than the others."""
        return -(-in_features // self.group) if self.group else 1

    @staticmethod
    def row_bytes(width: int, in_features: int) -> int:
        """Bytes of one row of a plane `width` bits wide, 32-bit aligned."""
        return -(-in_features * width // 32) * 4

    def nbytes(self, rows: int, in_features: int) -> int:
        """Bytes of all planes and scales of `rows` rows."""
        planes = sum(self.row_bytes(width, in_features) for width in self.planes)
        return rows * (planes + 2 * self.groups(in_features))


@dataclass(frozen=True, slots=True, eq=False)
class Coded:
    """Coded rows: planes uint8 [R, row_bytes(width, K)], finite scales bfloat16 [R, G]."""

    planes: tuple[Tensor, ...]
    scales: Tensor


def distortion(bits: int) -> float:
    """Squared error of a unit Gaussian in `bits` bits at its best scale: 0 bits 1, 16 bits 0."""
    if bits not in _DISTORTION:
        raise ValueError(f"no distortion known for {bits!r} bits")
    return _DISTORTION[bits]


def encode(x: Tensor, coding: Coding) -> Coded:
    """The planes and scales of float32 [R, K], K >= 1."""
    codes, scales = quantize(x, coding)
    return Coded(pack(codes, coding), scales)


def decode(coded: Coded, coding: Coding, in_features: int) -> Tensor:
    """The float32 [R, K] that `coded` stands for."""
    return dequantize(unpack(coded.planes, coding, in_features), coded.scales, coding)


def quantize(x: Tensor, coding: Coding) -> tuple[Tensor, Tensor]:
    """Codes uint8 [R, K] and scales bfloat16 [R, G] of float32 [R, K], K >= 1."""
    rows, in_features = x.shape
    codes = torch.empty(rows, in_features, dtype=torch.uint8, device=x.device)
    scales = x.new_empty(rows, coding.groups(in_features), dtype=torch.bfloat16)
    tile = max(1, (_CUDA_TILE if x.is_cuda else _CPU_TILE) // in_features)
    work = x.new_empty(3, min(tile, rows) * in_features)
    for start in range(0, rows, tile):
        part = slice(start, start + tile)
        for columns, groups, shape in _sections(coding, in_features):
            values, out = x[part, columns].view(-1, *shape), codes[part, columns].view(-1, *shape)
            scales[part, groups] = _quantize_groups(values, coding.bits, out, work)
    return codes, scales


def dequantize(codes: Tensor, scales: Tensor, coding: Coding) -> Tensor:
    """float32 [R, K] of codes and scales: `(q - zero) * scale`, exact factors, one rounding."""
    values = codes.to(torch.float32).sub_((2**coding.bits - 1) / 2)
    for columns, groups, shape in _sections(coding, codes.shape[1]):
        values[:, columns].view(-1, *shape).mul_(scales[:, groups, None].to(torch.float32))
    return values


def pack(codes: Tensor, coding: Coding) -> tuple[Tensor, ...]:
    """Planes uint8 [R, row_bytes] of codes uint8 [R, K]."""
    *high, low = coding.planes
    planes = [_pack_plane(codes >> low, width) for width in high]
    return (*planes, _pack_plane(codes & (2**low - 1) if high else codes, low))


def unpack(planes: tuple[Tensor, ...], coding: Coding, in_features: int) -> Tensor:
    """Codes uint8 [R, K] of planes uint8 [R, row_bytes]."""
    codes, *low = (
        _unpack_plane(plane, width, in_features)
        for plane, width in zip(planes, coding.planes, strict=True)
    )
    return (codes << coding.planes[1]).bitwise_or_(low[0]) if low else codes


def _sections(coding: Coding, in_features: int) -> Iterator[tuple[slice, slice, tuple[int, int]]]:
    """(columns, groups, shape [G, n]) of the whole groups of a row, then of a shorter last one."""
    size = coding.group or in_features
    whole, rest = divmod(in_features, size)
    if whole:
        yield slice(0, whole * size), slice(0, whole), (whole, size)
    if rest:
        yield slice(whole * size, None), slice(whole, None), (1, rest)


def _quantize_groups(x: Tensor, bits: int, out: Tensor, work: Tensor) -> Tensor:
    """Codes float32 [R, G, n] into uint8 `out`, using `work` [3, ...]; bfloat16 scales [R, G]."""
    magnitude, level, product = (part[: x.numel()].view(x.shape) for part in work)
    depth, chunk = _precision(bits, x.shape[-1])
    peak = torch.abs(x, out=magnitude).amax(-1, keepdim=True)
    # Clearing the mantissa leaves the power of two below the peak: scaling by it is exact.
    unit = (peak.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(min=_TINY)
    inverse_unit = unit.reciprocal()
    whole = 2.0 ** (depth - 1)
    magnitude.mul_(inverse_unit).mul_(whole).round_()
    if bits == 1:  # the mean magnitude, in closed form
        step = _sum(magnitude, chunk).mul_(2 / x.shape[-1])
    else:
        top = (peak * inverse_unit).mul_(whole).round_().clamp_(min=1)
        step = _best_step(magnitude, top, bits, (depth, chunk), (level, product))
    step = step.to(torch.float32).mul_(1 / whole).to(torch.bfloat16).to(torch.float32)
    # The largest scale whose outermost level is a finite float32.
    step = torch.minimum(step, inverse_unit * (255 / 128 * 2.0 ** (128 - bits)))
    torch.mul(x, torch.mul(step.reciprocal(), inverse_unit).clamp_(max=1 / _TINY), out=level)
    level.floor_().add_(2 ** (bits - 1)).clamp_(0, 2**bits - 1)
    out.copy_(product.view(torch.int32).copy_(level))  # faster than straight to uint8
    scale = step.mul_(unit)
    scale.mul_((peak > 0) & (scale >= _TINY))
    return scale.to(torch.bfloat16).squeeze(-1)


def _precision(bits: int, size: int) -> tuple[int, int]:
    """Bits to round a group's peak to, and how many elements then add up exactly in float32.

    The peak gets `bits + 8` or more: groups coded before (bfloat16 scale) are not rounded.
    """
    limit = 1 << max(0, 16 - 2 * bits)
    chunk = size if size <= limit else math.gcd(size, limit)
    return min(16, 24 - bits - (chunk - 1).bit_length()), chunk


def _sum(terms: Tensor, chunk: int) -> Tensor:
    """Exact float64 [R, G, 1] sum of float32 [R, G, n] that add up exactly `chunk` at a time."""
    if chunk >= 8:
        rows, groups, size = terms.shape
        terms = terms.view(rows, groups, size // chunk, chunk).sum(-1)
    return terms.sum(-1, keepdim=True, dtype=torch.float64)


def _best_step(
    magnitude: Tensor, peak: Tensor, bits: int, precision: tuple[int, int], work: tuple[Tensor, ...]
) -> Tensor:
    """The step, a bfloat16 value as float64 [R, G, 1], that codes integers [R, G, n] best.

    Tries steps around a prior, then refines the best by the least-squares step for its codes
    (S. Lloyd, "Least squares quantization in PCM", IEEE Trans. Inf. Theory 28, 1982). Every
    trial counts as rounded to bfloat16.
    """
    (depth, chunk), (level, product) = precision, work
    top = (2**bits - 1) / 2
    # The peak on the outermost level comes first: it recovers a group that was coded before.
    trials = [peak * (1 / top)]
    if bits == 8 or (bits > 2 and magnitude.shape[-1] <= _SHORT):
        trials += [peak * (ratio / top) for ratio in _OF_PEAK[bits]]
    else:
        rms_weight, peak_weight, ratios = _OF_BLEND[bits]
        # Squares rounded to integers that add up exactly in float32: near enough for a prior.
        size = magnitude.shape[-1]
        unit = 2.0 ** (2 * depth + (size - 1).bit_length() - 24)
        torch.mul(magnitude, magnitude, out=product).mul_(1 / unit).round_()
        rms = product.sum(-1, keepdim=True).mul_(unit / size).sqrt_()
        blend = rms * rms_weight + peak * peak_weight
        trials += [blend * (ratio / top) for ratio in ratios]
    best = torch.full_like(peak, math.inf, dtype=torch.float64)
    step: Tensor = trials[0]
    refined = step
    for trial in [*trials, None, None][: None if bits < 8 else -2]:  # None: refine the best
        guess = (refined if trial is None else trial).to(torch.bfloat16).to(torch.float32)
        torch.mul(magnitude, guess.reciprocal(), out=level)
        level.floor_().clamp_(max=top - 0.5).add_(0.5)
        cross = _sum(torch.mul(magnitude, level, out=product), chunk)
        power = _sum(level.mul_(level), chunk)
        error = (power * guess - 2 * cross) * guess
        better = error < best
        best = torch.where(better, error, best)
        step = torch.where(better, guess, step)
        refined = torch.where(better, cross / power, refined)
    return step


def _pack_plane(codes: Tensor, width: int) -> Tensor:
    """uint8 [R, row_bytes] of uint8 [R, K] below 2**width."""
    rows, in_features = codes.shape
    row_bytes = Coding.row_bytes(width, in_features)
    padded = row_bytes * 8 // width
    if padded != in_features or not codes.is_contiguous():
        codes, source = codes.new_zeros(rows, padded), codes
        codes[:, :in_features] = source
    if width == 8:
        return codes
    word = codes.view(-1).view(torch.int64)  # each step closes every second gap between fields
    for slot in (8, 16, 32):
        field = width * slot // 8
        word = (word | (word >> (slot - field))).bitwise_and_(_field_mask(2 * field, 2 * slot))
    return word.to(_WORD[width]).view(torch.uint8).view(rows, row_bytes)


def _unpack_plane(plane: Tensor, width: int, in_features: int) -> Tensor:
    """uint8 [R, K] of uint8 [R, row_bytes]: `_pack_plane` backwards."""
    row_bytes = plane.shape[1]
    if row_bytes != Coding.row_bytes(width, in_features):
        raise ValueError(f"{row_bytes} bytes do not hold {in_features} codes of {width} bits")
    if width == 8:
        return plane[:, :in_features].contiguous()
    plane = plane.contiguous()
    if plane.storage_offset() % 4:
        plane = plane.clone()  # a wider view needs an aligned start
    word = plane.view(-1).view(_WORD[width]).to(torch.int64)
    word.bitwise_and_(_field_mask(8 * width, 64))
    for slot in (32, 16, 8):
        field = width * slot // 8
        word = (word | (word << (slot - field))).bitwise_and_(_field_mask(field, slot))
    return word.view(torch.uint8).view(-1, row_bytes * 8 // width)[:, :in_features].contiguous()


def _field_mask(field: int, slot: int) -> int:
    """The low `field` bits of every `slot` bits of an int64."""
    return sum(((1 << field) - 1) << start for start in range(0, 64, slot))
