"""The safetensors container, header first.

A file is `<header length: u64 little endian><header: JSON><data>`. A header comes from
a stranger, so nothing in it is believed before it is checked; no function here reads
tensor data or keeps more than the header in memory.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

DTYPE_BYTES: dict[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}

MAX_HEADER_BYTES = 100_000_000  # the cap of the safetensors library
ALIGNMENT = 64  # of the first data byte in files written here
_LENGTH_BYTES = 8
_MAX_BYTES = 2**63 - 1
_METADATA = "__metadata__"


class HeaderError(ValueError):
    """A safetensors header that cannot be trusted; the message names tensor and values."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: `nbytes` at the absolute `offset` of the bare file name `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int


def parse_object(raw: bytes) -> dict[str, Any]:
    """Parse `raw` as one JSON object.

    Raises:
        ValueError: not UTF-8, not JSON, not an object, a key that comes twice at any
            depth, or text that UTF-8 cannot hold.
    """
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_int=_integer)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    except RecursionError:
        raise ValueError("not JSON: nested too deep") from None
    if not isinstance(value, dict):
        raise ValueError(f"not a JSON object but {_kind(value)}")
    return value


def header_length(prefix: bytes, file_size: int) -> int:
    """The length of the JSON header, from the first 8 bytes of a file of `file_size` bytes.

    Raises:
        HeaderError: the file is too short, or the length exceeds the cap or the file.
    """
    if len(prefix) < _LENGTH_BYTES:
        raise HeaderError(f"too short for a safetensors file: {len(prefix)} bytes")
    length = int.from_bytes(prefix[:_LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise HeaderError(f"header length {length} is over the limit of {MAX_HEADER_BYTES} bytes")
    if length > file_size - _LENGTH_BYTES:
        raise HeaderError(
            f"truncated: header says {_LENGTH_BYTES + length} bytes, file has {file_size}"
        )
    return length


def parse_header(raw: bytes, file: str, file_size: int) -> dict[str, TensorInfo]:
    """Check the JSON header `raw` of a file of `file_size` bytes; tensors in file order.

    Raises:
        HeaderError: anything that the format forbids: see the checks below.
    """
    if not raw.startswith(b"{"):
        raise HeaderError("header does not start with `{`")
    try:
        header = parse_object(raw)
    except ValueError as error:
        raise HeaderError(f"header is {error}") from None
    _check_metadata(header.pop(_METADATA, {}))
    start = _LENGTH_BYTES + len(raw)
    tensors = [_parse_entry(name, entry, file, start) for name, entry in header.items()]
    tensors.sort(key=lambda t: (t.offset, t.nbytes, t.name))
    _check_layout(tensors, start, file_size)
    return {tensor.name: tensor for tensor in tensors}


def read_header(path: Path) -> tuple[dict[str, TensorInfo], bytes]:
    """The tensors of a file and its raw header bytes, the 8-byte length included.

    Raises:
        HeaderError: not a regular file, or the header is wrong.
        OSError, EOFError: the file cannot be opened or read, or shrinks meanwhile.
    """
    # O_NONBLOCK: opening a named pipe must fail the check below, not wait for a writer.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise HeaderError("not a regular file")
        prefix = bytes(pread_full(fd, min(_LENGTH_BYTES, status.st_size), 0))
        length = header_length(prefix, status.st_size)
        raw = bytes(pread_full(fd, length, _LENGTH_BYTES))
    finally:
        os.close(fd)
    return parse_header(raw, path.name, status.st_size), prefix + raw


def build_header(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], file: str = ""
) -> tuple[bytes, dict[str, TensorInfo]]:
    """The header of a file that holds `tensors` (name, dtype, shape) in the given order.

    Same input, same bytes. Data follows without holes and starts at a multiple of 64;
    give wide dtypes first where every tensor has to be aligned to its element.

    Returns:
        The bytes before the data, and each tensor with its absolute offset.

    Raises:
        HeaderError: a name twice or reserved, an unknown dtype, a bad shape, a header
            over the cap.
    """
    # One key only, and exactly this one: the library writes several in random order, and
    # transformers refuses a file without it.
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    sizes: list[int] = []
    position = 0
    for name, dtype, shape in tensors:
        if name in header:
            raise HeaderError(f"tensor `{name}` comes twice or has a reserved name")
        sizes.append(_nbytes(name, dtype, list(shape)))
        end = position + sizes[-1]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    try:
        raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    except UnicodeEncodeError as error:
        raise HeaderError(f"a tensor name is not Unicode text: {error.object!r:.200}") from None
    raw += b" " * (-(_LENGTH_BYTES + len(raw)) % ALIGNMENT)
    if len(raw) > MAX_HEADER_BYTES:
        raise HeaderError(f"header of {len(raw)} bytes is over the limit of {MAX_HEADER_BYTES}")
    infos: dict[str, TensorInfo] = {}
    offset = _LENGTH_BYTES + len(raw)
    for (name, dtype, shape), nbytes in zip(tensors, sizes, strict=True):
        infos[name] = TensorInfo(name, dtype, tuple(shape), file, offset, nbytes)
        offset += nbytes
    return len(raw).to_bytes(_LENGTH_BYTES, "little") + raw, infos


def pread_into(fd: int, buffer: bytearray | memoryview, offset: int) -> None:
    """Fill `buffer` from `offset`, however many calls that takes (one reads 2 GiB at most).

    Raises:
        EOFError: the file ends first.
    """
    view = memoryview(buffer)
    if view.nbytes == 0:
        return
    view = view.cast("B")
    done = 0
    while done < view.nbytes:
        count = os.preadv(fd, [view[done:]], offset + done)
        if count == 0:
            raise EOFError(f"file ends at byte {offset + done}, {view.nbytes - done} bytes short")
        done += count


def pread_full(fd: int, nbytes: int, offset: int) -> memoryview:
    """Exactly `nbytes` from `offset`, writable; raises EOFError where the file ends first."""
    buffer = np.empty(nbytes, dtype=np.uint8).data  # a bytearray would be cleared first
    pread_into(fd, buffer, offset)
    return buffer


def pwrite_full(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`, however many calls that takes."""
    view = memoryview(data)
    if view.nbytes == 0:
        return
    view = view.cast("B")
    done = 0
    while done < view.nbytes:
        done += os.pwrite(fd, view[done:], offset + done)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"ambiguous: key `{_show(key)}` comes twice")
        for text in (key, value):
            if isinstance(text, str) and not _encodable(text):
                raise ValueError(f"not Unicode text at key `{_show(key)}`")
        result[key] = value
    return result


def _integer(digits: str) -> int | float:
    if len(digits) > 100:
        raise ValueError(f"not usable: an integer of {len(digits)} digits")
    return -0.0 if digits == "-0" else int(digits)  # as the safetensors library reads it


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _show(text: str) -> str:
    """`text` for an error message: one short line, whatever it holds."""
    return text if text.isprintable() and len(text) <= 200 else ascii(text)[:200]


def _kind(value: object) -> str:
    kinds = ((dict, "an object"), (list, "a list"), (str, "a string"), (bool, "a boolean"))
    fallback = "null" if value is None else "a number"
    return next((name for kind, name in kinds if isinstance(value, kind)), fallback)


def _check_metadata(value: object) -> None:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise HeaderError(f"`{_METADATA}` is not an object of strings")


def _parse_entry(name: str, entry: object, file: str, start: int) -> TensorInfo:
    label = _show(name)
    if not isinstance(entry, dict):
        raise HeaderError(f"tensor `{label}` is not an object but {_kind(entry)}")
    if entry.keys() != {"dtype", "shape", "data_offsets"}:
        keys = ", ".join(sorted(_show(key) for key in entry))
        raise HeaderError(f"tensor `{label}` needs dtype, shape, data_offsets; has `{keys:.200}`")
    dtype, shape = entry["dtype"], entry["shape"]
    nbytes = _nbytes(label, dtype, shape)
    begin, end = _parse_offsets(label, entry["data_offsets"])
    if end - begin != nbytes:
        raise HeaderError(
            f"tensor `{label}`: {dtype} {shape} takes {nbytes} bytes, offsets span {end - begin}"
        )
    return TensorInfo(name, dtype, tuple(shape), file, start + begin, nbytes)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0  # a bool is an int to isinstance


def _nbytes(label: str, dtype: object, shape: object) -> int:
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise HeaderError(f"tensor `{label}` has an unknown dtype {_brief(dtype)}")
    if not isinstance(shape, list) or not all(_is_count(size) for size in shape):
        raise HeaderError(f"tensor `{label}` has a bad shape {_brief(shape)}")
    # Sizes first, then the product: a zero must not hide a dimension that no reader can hold,
    # and thousands of long integers must not be multiplied.
    bound = DTYPE_BYTES[dtype]
    for size in shape:
        bound *= max(size, 1)
        if bound > _MAX_BYTES:
            raise HeaderError(f"tensor `{label}` overflows 63 bits: shape {_brief(shape)}")
    return DTYPE_BYTES[dtype] * math.prod(shape)


def _parse_offsets(label: str, value: object) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or not all(_is_count(v) for v in value):
        raise HeaderError(f"tensor `{label}` has bad offsets {_brief(value)}")
    begin, end = int(value[0]), int(value[1])
    if end > _MAX_BYTES:
        raise HeaderError(f"tensor `{label}` overflows 63 bits: offsets {_brief(value)}")
    if begin > end:
        raise HeaderError(f"tensor `{label}` begins at {begin} after its end {end}")
    return begin, end


def _brief(value: object) -> str:
    """A JSON value for an error message: backticked, ASCII, short."""
    try:
        return f"`{ascii(value)[:80]}`"
    except RecursionError:
        return "(nested too deep)"


def _check_layout(tensors: list[TensorInfo], start: int, file_size: int) -> None:
    """Tensors, sorted by offset, must tile the file from `start` to its last byte."""
    total = max((t.offset + t.nbytes for t in tensors), default=start)
    if total > file_size:
        raise HeaderError(f"truncated: header says {total} bytes, file has {file_size}")
    position, before = start, ""
    for tensor in tensors:
        label = _show(tensor.name)
        if tensor.offset < position:
            raise HeaderError(f"tensors `{before}` and `{label}` overlap at byte {tensor.offset}")
        if tensor.offset > position:
            hole = tensor.offset - position
            raise HeaderError(f"hole of {hole} bytes before tensor `{label}` at byte {position}")
        position, before = tensor.offset + tensor.nbytes, label
    if position != file_size:
        raise HeaderError(f"{file_size - position} bytes after the last tensor, at byte {position}")
