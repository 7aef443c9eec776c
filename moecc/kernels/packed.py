"""Products with packed weights, which stay packed in memory and are unpacked in registers.

Kernels multiply integers: a row of activations is `scale * (256 * high + low)` with two int8
digits, a code is an int8 level, and int32 sums are exact; only scales are floating point.
Digits keep 1/65278 of a row's largest magnitude, for any row closer than rounding to bfloat16.

In the layout of kernels a block is 32 bytes of a row: bits `[j * w, (j + 1) * w)` of byte `b`
hold in-feature `32 * j + b` of the block. A field `j` of a block is then 32 neighbors, and four
codes unpack with one or two 32-bit operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moecc.coding import Coding, dequantize, unpack
from moecc.kernels.device import on_gpu
from moecc.kernels.norm import Norm, rms_norm

BLOCK = 32  # bytes of a row that are stored together
PADDING = 256  # digits of a row are padded with zeros to a multiple: the most a block holds
_ALIGNED = 16  # out-features are padded to a multiple
_PROGRAMS = 600  # enough to keep the memory of a large GPU busy
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_pytorch_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
}


@dataclass(frozen=True, slots=True, eq=False)
class PackedSlots:
    """Coded matrices `[out, in]` in the layout of kernels.

    Attributes:
        planes: per plane of the coding uint8 [S, blocks, padded out, 32].
        scales: bfloat16 [S, groups, padded out].
    """

    planes: tuple[Tensor, ...]
    scales: Tensor
    coding: Coding
    in_features: int
    out_features: int

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.planes, self.scales))


@dataclass(frozen=True, slots=True, eq=False)
class Digits:
    """Rows of activations as products take them.

    Attributes:
        values: int8 [rows, 2, padded in], high digit first; in the reference float32 [rows, in].
        scale: float32 [rows, parts], for as many parts of a row as a product is split into, or
            one; None in the reference, which keeps the rows as they are.
    """

    values: Tensor
    scale: Tensor | None
    in_features: int


# Stored matrices, and int32 [physical] of their slots (negative: zeros) per physical expert.
Term = tuple[PackedSlots, Tensor]
# Stored matrices, and routes in blocks that share one: int32 [blocks * block] the routes of each
# block, or -1 (block 4, 8 or 16), and int32 [blocks] its slot, or -1 (unused).
Blocks = tuple[PackedSlots, Tensor, Tensor]


def arranged(
    planes: Sequence[Tensor], scales: Tensor, coding: Coding, in_features: int
) -> PackedSlots:
    """Slots as an artifact has them: planes uint8 [S, out, bytes], scales bfloat16 [S, out, G].

    Goes slot by slot: needs memory for the codes of one slot besides the result.
    """
    count, out_features, groups = scales.shape
    padded = -(-out_features // _ALIGNED) * _ALIGNED
    new_scales = scales.new_zeros(count, groups, padded)
    new_scales[:, :, :out_features] = scales.transpose(1, 2)
    new_planes = tuple(
        planes[0].new_zeros(count, _blocks(width, in_features), padded, BLOCK)
        for width in coding.planes
    )
    for slot in range(count):
        codes = unpack(tuple(plane[slot] for plane in planes), coding, in_features)
        for plane, part, width in zip(
            new_planes, _parts(codes, coding), coding.planes, strict=True
        ):
            plane[slot, :, :out_features] = _to_blocks(part, width)
    return PackedSlots(new_planes, new_scales, coding, in_features, out_features)


def decode(slots: PackedSlots, index: Tensor) -> Tensor:
    """float32 [n, out, in] of the slots int64 [n]: bit for bit what `coding.decode` gives."""
    rows = slice(0, slots.out_features)
    parts = [
        _from_blocks(plane[index][:, :, rows], width)[..., : slots.in_features].flatten(0, 1)
        for plane, width in zip(slots.planes, slots.coding.planes, strict=True)
    ]
    codes = (parts[0] << slots.coding.planes[1]) | parts[1] if len(parts) == 2 else parts[0]
    scales = slots.scales[index][:, :, rows].transpose(1, 2).flatten(0, 1)
    values = dequantize(codes, scales, slots.coding)
    return values.view(len(index), slots.out_features, slots.in_features)


def digits(
    x: Tensor, parts: int = 1, *, norm: Norm | None = None, variants: Tensor | None = None
) -> Digits:
    """Digits of [rows, in], after a norm with its rows `variants` int32 [rows].

    A row that is not finite makes NaN. Several parts are quicker for few long rows; then products
    must be split into as many, and there is no norm.
    """
    assert norm is None or (parts == 1 and variants is not None), "a norm is of whole rows"
    if on_gpu(x):
        from moecc.kernels.gpu import packed

        return packed.digits(x, parts, norm, variants)
    if norm is not None and variants is not None:
        x = rms_norm(x, norm, variants)
    return Digits(x.float(), None, x.shape[1])


def gated_digits(partials: Tensor, activation: str, dtype: torch.dtype, parts: int = 1) -> Digits:
    """Digits of `activation(gate) * up`, of float32 [parts, rows, 2 * in] whose sum is both.

    A row of the sum is its gate, then its up. Rounds to `dtype` where a model in `dtype` does:
    gate, up, activation and their product. Activations: silu, gelu, gelu_pytorch_tanh, relu.
    Parts are those of `digits`.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, not {activation!r}")
    if on_gpu(partials.new_empty(0, dtype=dtype)):
        from moecc.kernels.gpu import packed

        return packed.gated_digits(partials, activation, dtype, parts)
    gate, up = partials.sum(0).to(dtype).chunk(2, dim=-1)
    return digits(ACTIVATIONS[activation](gate) * up, parts)


def splits(slots: PackedSlots, blocks: int, programs: int = _PROGRAMS) -> int:
    """Into how many sums to split each of a product for `blocks` routes or blocks at once.

    More of them keep more of the GPU busy where there are few out-features: about `programs`.
    """
    longest = max(1, slots.in_features // 1024)
    return min(8, longest, max(1, programs // (blocks * -(-slots.out_features // 128))))


def direct(x: Digits, terms: Sequence[Term], physical: Tensor, k: int, out: Tensor) -> None:
    """Products of few routes: every route reads the matrices of its own expert.

    Args:
        x: rows; route `r` takes row `r // k`.
        terms: those whose products are to be added, of one shape.
        physical: int32 [n], the physical expert of each route; negative: zeros.
        out: float32 [parts, n, out_features], overwritten: for each term in turn `parts /
            len(terms)` sums over a part of the in-features each. Their sum is the result.
    """
    if x.scale is not None:
        from moecc.kernels.gpu import packed

        packed.direct(x, terms, physical, k, out)
        return
    out.zero_()
    rows = torch.arange(len(physical), device=physical.device) // k
    for part, (slots, table) in zip(out.chunk(len(terms)), terms, strict=True):
        index = table[physical.clamp(min=0).long()].masked_fill(physical < 0, -1)
        _add_products(x.values[rows], slots, index, part[0])


def blocked(x: Digits, terms: Sequence[Blocks], k: int, out: Tensor) -> None:
    """Products of routes in blocks that share a slot.

    Args:
        x: rows; route `r` takes row `r // k`.
        terms: those whose products are to be added, of one shape.
        out: float32 [parts, n, out_features]: sums over a part of the in-features each, and their
            sum is the result. The first term overwrites rows, later ones add to what is there;
            rows of routes that are in no block of a term stay as they are.
    """
    if x.scale is not None:
        from moecc.kernels.gpu import packed

        packed.blocked(x, terms, k, out)
        return
    for index, (slots, order, owners) in enumerate(terms):
        owner = owners.repeat_interleave(len(order) // len(owners))
        used = (order >= 0) & (owner >= 0)
        routes = order[used].long()
        products = out.new_zeros(len(routes), slots.out_features)
        _add_products(x.values[routes // k], slots, owner[used], products)
        if index == 0:
            out[:, routes] = 0
        out[0, routes] += products


def reduced(
    partials: Tensor,
    physical: Tensor,
    weights: Tensor,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The experts' output `[T, H]` in `dtype`, plus the residual stream `[T, H]` if given.

    partials are float32 [parts, T * k, H]: their sum is the routes' outputs, which the routing
    weights `[T, k]` combine in float32; whatever they hold of routes whose `physical` int32 [T, k]
    is negative. Rounds before and after the residual is added.
    """
    if on_gpu(partials.new_empty(0, dtype=dtype)):
        from moecc.kernels.gpu import packed

        return packed.reduced(partials, physical, weights, residual, dtype)
    routes = partials.sum(0).view(*weights.shape, -1) * weights.float().unsqueeze(-1)
    out = routes.masked_fill(physical[..., None] < 0, 0.0).sum(1).to(dtype)
    return out if residual is None else out + residual


def _blocks(width: int, in_features: int) -> int:
    """Blocks of a row of a plane."""
    return -(-in_features * width // (8 * BLOCK))


def _parts(codes: Tensor, coding: Coding) -> tuple[Tensor, ...]:
    """What each plane holds of codes uint8 [out, in]."""
    *high, low = coding.planes
    return (codes >> low, codes & (2**low - 1)) if high else (codes,)


def _to_blocks(codes: Tensor, width: int) -> Tensor:
    """uint8 [blocks, out, 32] of codes uint8 [out, in] below 2**width."""
    out_features, in_features = codes.shape
    blocks, fields = _blocks(width, in_features), 8 // width
    codes = torch.nn.functional.pad(codes, (0, blocks * fields * BLOCK - in_features))
    codes = codes.view(out_features, blocks, fields, BLOCK)
    packed = codes[:, :, 0].clone()
    for field in range(1, fields):
        packed |= codes[:, :, field] << (field * width)
    return packed.transpose(0, 1)


def _from_blocks(plane: Tensor, width: int) -> Tensor:
    """Codes uint8 [n, out, padded in] of uint8 [n, blocks, out, 32]."""
    fields = [(plane >> shift) & (2**width - 1) for shift in range(0, 8, width)]
    return torch.stack(fields, dim=-2).transpose(1, 2).flatten(2)


def _add_products(rows: Tensor, slots: PackedSlots, index: Tensor, out: Tensor) -> None:
    """Adds the products of float32 [n, in] with slots int32 [n] (negative: none) to [n, out]."""
    for slot in sorted(set(index[index >= 0].tolist())):
        routes = (index == slot).nonzero().squeeze(-1)
        weight = decode(slots, torch.tensor([slot], device=index.device))[0]
        out[routes] += rows[routes] @ weight.T
