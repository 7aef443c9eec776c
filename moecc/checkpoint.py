"""Reads a source checkpoint tile by tile; quantized tensors come out dequantized.

A `Checkpoint` shows the *logical* tensors of a source: what `from_pretrained` would see. A plain
tensor is itself. An FP8 weight and its block scales (`x`, `x_scale_inv`) are one tensor `x`; the
MXFP4 blocks and scales of gpt-oss (`x_blocks`, `x_scales`) are one tensor `x`. Both are
dequantized a few rows at a time, to the bits that transformers gives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from moecc.errors import SourceError
from moecc.sources import Reader, Source
from moecc.tensorfile import TensorInfo

TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
CODES = {dtype: code for code, dtype in TORCH_DTYPES.items()}

STREAM_BYTES = 8 << 20
MXFP4_BLOCK = 32
FP8_BLOCK = (128, 128)  # where the config does not say


@dataclass(frozen=True, slots=True)
class Tile:
    """Where a canonical `[rows, cols]` matrix lies in a logical tensor.

    Element `(r, c)` is element `offset + r * row_stride + c * col_stride` of the tensor; `row` is
    the canonical row that `r = 0` stands for. Covers per-expert, fused, transposed and interleaved
    layouts alike.
    """

    tensor: str
    row: int
    rows: int
    cols: int
    offset: int
    row_stride: int
    col_stride: int

    def narrow(self, start: int, stop: int) -> Tile:
        """The rows `start..stop` of this tile."""
        return replace(
            self,
            row=self.row + start,
            rows=stop - start,
            offset=self.offset + start * self.row_stride,
        )


@dataclass(frozen=True, slots=True)
class LogicalTensor:
    """A tensor as `from_pretrained` would see it.

    Attributes:
        dtype: safetensors code, after dequantization.
        scales: of a tensor that is quantized on disk.
        block: rows and columns that share a scale; the last block of either may be cut off.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    info: TensorInfo
    scales: TensorInfo | None = None
    block: tuple[int, int] = (1, 1)

    @property
    def nbytes(self) -> int:
        size = TORCH_DTYPES[self.dtype].itemsize
        for n in self.shape:
            size *= n
        return size

    @property
    def row_align(self) -> int:
        """Rows that are best read together: of a block, unless one scale is for all rows."""
        return self.block[0] if self.scales and self.block[0] < self.shape[0] else 1


class Checkpoint:
    """The logical tensors of one source, readable by tiles.

    Raises SourceError on a quantization or dtype that moecc does not know.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.tensors = _logical_tensors(source)
        self._reader = Reader(source) if source.folder is not None else None

    @property
    def config(self) -> dict[str, Any]:
        return self.source.config

    @property
    def quantized(self) -> bool:
        return any(t.scales is not None for t in self.tensors.values())

    @cached_property
    def row_align(self) -> int:
        """Rows that are best read together: the height of the blocks with one scale."""
        return max((t.row_align for t in self.tensors.values()), default=1)

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()

    def rows(self, tile: Tile) -> torch.Tensor:
        """The tile as a tensor `[rows, cols]` of the logical tensor's dtype, on the CPU."""
        tensor = self.tensors[tile.tensor]
        if tensor.scales is None:
            return self._plain(tensor, tile)
        if tensor.info.dtype == "U8":
            return self._mxfp4(tensor, tile)
        return self._fp8_rows(tensor, tile.offset // tile.cols, tile.rows)

    def stream(self, name: str) -> Iterator[memoryview]:
        """The bytes of a whole logical tensor, row-major, in blocks of about 8 MiB."""
        tensor = self.tensors[name]
        if tensor.scales is None:
            for start in range(0, tensor.nbytes, STREAM_BYTES):
                yield self._read(tensor.info, start, min(STREAM_BYTES, tensor.nbytes - start))
            return
        if len(tensor.shape) != 2:
            raise SourceError(f"quantized tensor `{name}` outside the experts is not supported")
        row_bytes = tensor.nbytes // tensor.shape[0]
        step = tile_rows(STREAM_BYTES, row_bytes, tensor.row_align)
        for row in range(0, tensor.shape[0], step):
            rows = self._fp8_rows(tensor, row, min(step, tensor.shape[0] - row))
            yield tensor_bytes(rows)

    def _read(self, info: TensorInfo, start: int, nbytes: int) -> memoryview:
        assert self._reader is not None, "headers only: no weights to read"
        return self._reader.read(info, start, nbytes)

    def _plain(self, tensor: LogicalTensor, tile: Tile) -> torch.Tensor:
        dtype = TORCH_DTYPES[tensor.dtype]
        size = dtype.itemsize
        # Elements along the dense axis are read in one go; the other axis is walked.
        dense_rows = tile.col_stride != 1
        outer, inner = (tile.cols, tile.rows) if dense_rows else (tile.rows, tile.cols)
        outer_stride, inner_stride = (
            (tile.col_stride, tile.row_stride) if dense_rows else (tile.row_stride, tile.col_stride)
        )
        span = (inner - 1) * inner_stride + 1
        if outer_stride == span and inner_stride == 1:
            raw = self._read(tensor.info, tile.offset * size, outer * inner * size)
            out = torch.frombuffer(raw, dtype=dtype).view(outer, inner)
        else:
            out = torch.empty(outer, inner, dtype=dtype)
            for i in range(outer):
                start = tile.offset + i * outer_stride
                raw = self._read(tensor.info, start * size, span * size)
                out[i] = torch.frombuffer(raw, dtype=dtype)[::inner_stride]
        return transpose(out) if dense_rows else out

    def _fp8_rows(self, tensor: LogicalTensor, row: int, rows: int) -> torch.Tensor:
        assert tensor.scales is not None
        cols, (height, width) = tensor.shape[1], tensor.block
        raw = self._read(tensor.scales, 0, tensor.scales.nbytes)
        scales = torch.frombuffer(raw, dtype=TORCH_DTYPES[tensor.scales.dtype]).float()
        used = scales.view(-1, -(-cols // width))[row // height : -(-(row + rows) // height)]
        skip = row % height
        used = used.repeat_interleave(height, 0)[skip : skip + rows]
        weight = self._matrix(tensor.info, row, rows).float()
        weight *= used.repeat_interleave(width, 1)[:, :cols]
        return weight.to(TORCH_DTYPES[tensor.dtype])

    def _matrix(self, info: TensorInfo, row: int, rows: int) -> torch.Tensor:
        row_bytes = info.nbytes // info.shape[0]
        raw = self._read(info, row * row_bytes, rows * row_bytes)
        return torch.frombuffer(raw, dtype=TORCH_DTYPES[info.dtype]).view(rows, info.shape[1])

    def _mxfp4(self, tensor: LogicalTensor, tile: Tile) -> torch.Tensor:
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        assert tensor.scales is not None
        _, _, out_features = tensor.shape
        expert, row = divmod(tile.offset, tile.cols * out_features)
        row = expert * out_features + row
        groups = tensor.info.shape[2]
        blocks = self._read(tensor.info, row * groups * 16, tile.rows * groups * 16)
        scales = self._read(tensor.scales, row * groups, tile.rows * groups)
        value: torch.Tensor = convert_moe_packed_tensors(
            torch.frombuffer(blocks, dtype=torch.uint8).view(1, tile.rows, groups, 16),
            torch.frombuffer(scales, dtype=torch.uint8).view(1, tile.rows, groups),
            dtype=TORCH_DTYPES[tensor.dtype],
        )
        # transformers returns the module's layout [expert, in, out]
        return transpose(value[0])


def tile_rows(tile_bytes: int, row_bytes: int, align: int = 1) -> int:
    """Rows of `row_bytes` that fit in `tile_bytes`: at least `align`, and a multiple of it."""
    return max(1, tile_bytes // (row_bytes * align)) * align


def transpose(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.transpose(0, 1).contiguous()


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a CPU tensor, row-major; those of a contiguous one are not copied."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _logical_tensors(source: Source) -> dict[str, LogicalTensor]:
    infos = source.tensors
    method = _quantization(source)
    tensors: dict[str, LogicalTensor] = {}
    for name, info in infos.items():
        if info.dtype not in TORCH_DTYPES:
            raise SourceError(f"tensor `{name}` of variant `{source.name}` is `{info.dtype}`")
        if method == "fp8" and f"{name}_scale_inv" in infos:
            logical = _fp8_tensor(source, info, infos[f"{name}_scale_inv"])
        elif method == "mxfp4" and name.endswith("_blocks"):
            logical = _mxfp4_tensor(source, info, infos.get(f"{name[:-7]}_scales"))
        elif (method == "fp8" and _is_fp8_scale(name, infos)) or (
            method == "mxfp4" and name.endswith("_scales") and f"{name[:-7]}_blocks" in infos
        ):
            continue
        else:
            logical = LogicalTensor(name, info.dtype, info.shape, info)
        tensors[logical.name] = logical
    return dict(sorted(tensors.items()))


def _is_fp8_scale(name: str, infos: Mapping[str, TensorInfo]) -> bool:
    """Scales of weights are read with them; those of activations mean nothing without FP8."""
    module, _, kind = name.rpartition(".")
    if kind in ("activation_scale", "input_scale"):
        return f"{module}.weight_scale_inv" in infos
    return name.endswith("_scale_inv")


def _quantization(source: Source) -> str | None:
    quantization = source.config.get("quantization_config")
    if not quantization:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method not in ("fp8", "mxfp4"):
        raise SourceError(
            f"variant `{source.name}` is quantized with `{method}`, which moecc cannot read",
            "use the 16-bit checkpoint it was made from; FP8 and MXFP4 checkpoints can be read",
        )
    return str(method)


def _model_dtype(source: Source) -> str:
    """The dtype `from_pretrained` dequantizes to: the config's."""
    name = str(source.config.get("dtype") or source.config.get("torch_dtype") or "bfloat16")
    dtype = getattr(torch, name.removeprefix("torch."), None)
    return CODES.get(dtype, "BF16") if isinstance(dtype, torch.dtype) else "BF16"


def _fp8_tensor(source: Source, weight: TensorInfo, scale: TensorInfo) -> LogicalTensor:
    """Scales come one a block, or one for the whole tensor."""
    quantization = source.config["quantization_config"]
    block: Any = FP8_BLOCK
    if isinstance(quantization, dict) and "weight_block_size" in quantization:
        block = quantization["weight_block_size"]
    if math.prod(scale.shape) == 1:
        block = weight.shape
    try:
        height, width = (int(n) for n in block)
        rows, cols = weight.shape
        fits = rows * cols > 0 and block == weight.shape
        fits = fits or scale.shape == (-(-rows // height), -(-cols // width))
    except (TypeError, ValueError, ZeroDivisionError):
        fits = False
    if not fits or scale.dtype not in ("F32", "BF16", "F16") or not weight.dtype.startswith("F8"):
        raise SourceError(
            f"tensor `{weight.name}` of variant `{source.name}` is {weight.dtype} of shape "
            f"{list(weight.shape)} with {scale.dtype} scales of shape {list(scale.shape)}, "
            f"which do not fit blocks of {block}"
        )
    dtype = _model_dtype(source)
    return LogicalTensor(weight.name, dtype, weight.shape, weight, scale, (height, width))


def _mxfp4_tensor(source: Source, blocks: TensorInfo, scales: TensorInfo | None) -> LogicalTensor:
    shape = blocks.shape
    if scales is None or len(shape) != 4 or shape[3] != 16 or scales.shape != shape[:3]:
        raise SourceError(
            f"tensor `{blocks.name}` of variant `{source.name}` is not MXFP4 blocks with scales"
        )
    logical = (shape[0], shape[2] * MXFP4_BLOCK, shape[1])
    return LogicalTensor(blocks.name[:-7], _model_dtype(source), logical, blocks, scales)
