"""What variants keep of their own outside the experts, bit for bit.

A tensor equal in several variants is stored once. One that differs from the base variant's is
stored as the XOR of their bits, if that is smaller once compressed: cut into chunks, each chunk's
bytes ordered by their place in the element (all low bytes, then the next), and the whole
compressed as one Zstandard frame. Sign and exponent hardly change in a fine-tune, so their planes
are mostly zeros.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import IO

import numpy as np
import zstandard

Blocks = Iterable[bytes | memoryview]  # a byte stream, cut anywhere

CHUNK = 4 << 20  # a multiple of every element size
LEVEL = 3


def rechunk(blocks: Blocks, size: int = CHUNK) -> Iterator[bytes]:
    """The same bytes in chunks of `size`; the last may be shorter."""
    buffer = bytearray()
    for block in blocks:
        buffer += block
        while len(buffer) >= size:
            yield bytes(buffer[:size])
            del buffer[:size]
    if buffer:
        yield bytes(buffer)


def sha256(blocks: Blocks) -> str:
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def compress_delta(
    mine: Blocks, base: Blocks, itemsize: int, out: IO[bytes], limit: int
) -> int | None:
    """Writes the compressed XOR of two equally long byte streams to `out`.

    Returns its size, or None (and stops writing) as soon as it is not below `limit`.
    """
    compressor = zstandard.ZstdCompressor(level=LEVEL, threads=0, write_checksum=True).compressobj()
    written = 0
    for a, b in zip(rechunk(mine), rechunk(base), strict=True):
        written += out.write(compressor.compress(_planes(_xor(a, b), itemsize)))
        if written >= limit:
            return None
    written += out.write(compressor.flush())
    return written if written < limit else None


def restore_delta(frame: IO[bytes], base: Blocks, itemsize: int) -> Iterator[bytes]:
    """The stream `compress_delta` was given as `mine`, in chunks.

    Raises ValueError if the frame is damaged or does not have the base's length.
    """
    try:
        with zstandard.ZstdDecompressor().stream_reader(frame) as reader:
            for b in rechunk(base):
                planes = _read_full(reader, len(b))
                if len(planes) != len(b):
                    raise ValueError("a compressed delta is shorter than its base")
                yield _xor(_elements(planes, itemsize), b)
            if reader.read(1):
                raise ValueError("a compressed delta is longer than its base")
    except zstandard.ZstdError as error:
        raise ValueError(f"a compressed delta is damaged: {error}") from None


def _read_full(reader: zstandard.ZstdDecompressionReader, size: int) -> bytes:
    parts = []
    while size and (part := reader.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _xor(a: bytes, b: bytes) -> bytes:
    return (np.frombuffer(a, np.uint8) ^ np.frombuffer(b, np.uint8)).tobytes()


def _planes(data: bytes, itemsize: int) -> bytes:
    return bytes(np.frombuffer(data, np.uint8).reshape(-1, itemsize).T.tobytes())


def _elements(planes: bytes, itemsize: int) -> bytes:
    return bytes(np.frombuffer(planes, np.uint8).reshape(itemsize, -1).T.tobytes())
