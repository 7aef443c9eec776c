"""moecc.nonexpert: deltas come back bit for bit, and damage is noticed."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from moecc import nonexpert
from moecc.nonexpert import CHUNK, compress_delta, rechunk, restore_delta, sha256

SMALL = 64
DEFAULT = nonexpert.rechunk.__defaults__
PLENTY = 2**40


@pytest.fixture(scope="module", autouse=True)
def _small_chunks() -> Iterator[None]:
    """Streams of a few hundred bytes take several chunks, as large ones do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nonexpert.rechunk, "__defaults__", (SMALL,))
        yield


def pieces(data: bytes, cuts: list[int]) -> Iterator[bytes]:
    """The bytes in pieces that end at `cuts`; some may be empty."""
    edges = [0, *sorted(c % (len(data) + 1) for c in cuts), len(data)]
    return (data[a:b] for a, b in pairwise(edges))


def compress(mine: bytes, base: bytes, itemsize: int, limit: int = PLENTY) -> bytes | None:
    out = io.BytesIO()
    size = compress_delta([mine], [base], itemsize, out, limit)
    assert size is None or size == len(out.getvalue())
    return None if size is None else out.getvalue()


def restore(frame: bytes, base: bytes, itemsize: int) -> bytes:
    return b"".join(restore_delta(io.BytesIO(frame), [base], itemsize))


def random_bytes(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def changed(base: bytes, every: int) -> bytes:
    """Another low bit in some of the bytes."""
    array = np.frombuffer(base, np.uint8).copy()
    array[::every] ^= 1
    return array.tobytes()


cut_lists = st.lists(st.integers(0, 10**6), max_size=8)


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, bytes, int]:
    """Two equally long streams and their element's size: equal, alike or unrelated."""
    itemsize = draw(st.sampled_from([1, 2, 4, 8]))
    size = draw(st.integers(0, 60)) * itemsize
    base = draw(st.binary(min_size=size, max_size=size))
    kind = draw(st.sampled_from(["equal", "alike", "unrelated"]))
    if kind == "unrelated":
        return draw(st.binary(min_size=size, max_size=size)), base, itemsize
    mine = bytearray(base)
    if kind == "alike" and size:
        for at in draw(st.lists(st.integers(0, size - 1), max_size=5)):
            mine[at] ^= draw(st.integers(1, 255))
    return bytes(mine), base, itemsize


# Chunks


@settings(deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=10), st.integers(1, 50))
def test_rechunk(blocks: list[bytes], size: int) -> None:
    chunks = list(rechunk(blocks, size))
    assert b"".join(chunks) == b"".join(blocks)
    assert all(len(chunk) == size for chunk in chunks[:-1])
    assert all(0 < len(chunk) <= size for chunk in chunks[-1:])


def test_rechunk_takes_any_buffer() -> None:
    blocks = [bytearray(b"ab"), memoryview(b"cde"), b"f"]
    assert list(rechunk(blocks, 4)) == [b"abcd", b"ef"]


def test_rechunk_reads_no_further_than_it_must() -> None:
    taken = []

    def blocks() -> Iterator[bytes]:
        for i in range(10):
            taken.append(i)
            yield bytes(8)

    next(rechunk(blocks(), 16))
    assert taken == [0, 1]


def test_the_real_chunk_fits_every_element() -> None:
    assert DEFAULT == (CHUNK,)
    assert CHUNK % 8 == 0


@given(st.lists(st.binary(max_size=20)))
def test_sha256(blocks: list[bytes]) -> None:
    assert sha256(blocks) == hashlib.sha256(b"".join(blocks)).hexdigest()
    assert sha256(map(bytearray, blocks)) == hashlib.sha256(b"".join(blocks)).hexdigest()


# Round trips


@settings(deadline=None, max_examples=200)
@given(streams(), cut_lists, cut_lists, cut_lists)
def test_a_delta_comes_back(
    case: tuple[bytes, bytes, int], a: list[int], b: list[int], c: list[int]
) -> None:
    """However the streams are cut, and however the base is cut when it is read again."""
    mine, base, itemsize = case
    out = io.BytesIO()
    size = compress_delta(pieces(mine, a), pieces(base, b), itemsize, out, PLENTY)
    frame = out.getvalue()
    assert size == len(frame)
    assert b"".join(restore_delta(io.BytesIO(frame), pieces(base, c), itemsize)) == mine
    assert compress(mine, base, itemsize) == frame  # the cuts leave no trace


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8])
def test_the_format(itemsize: int) -> None:
    """One frame: of every chunk the XOR, all first bytes of the elements, then all second."""
    mine, base = random_bytes(3 * SMALL + 16, 1), random_bytes(3 * SMALL + 16, 2)
    frame = compress(mine, base, itemsize)
    expected = b""
    for start in range(0, len(mine), SMALL):
        x = bytes(a ^ b for a, b in zip(mine[start:][:SMALL], base[start:][:SMALL], strict=True))
        expected += b"".join(x[i::itemsize] for i in range(itemsize))
    reader = zstandard.ZstdDecompressor().decompressobj()
    assert reader.decompress(frame) == expected
    assert reader.eof
    assert reader.unused_data == b""


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8])
def test_large_streams(itemsize: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a real chunk, and not a multiple of one."""
    monkeypatch.setattr(nonexpert.rechunk, "__defaults__", DEFAULT)
    base = random_bytes(CHUNK + 4096 * 8)
    mine = changed(base, 999)
    out = io.BytesIO()
    blocks = [mine[i : i + 1_000_003] for i in range(0, len(mine), 1_000_003)]
    size = compress_delta(blocks, [base], itemsize, out, len(mine))
    assert size is not None
    assert size < len(mine) / 50
    out.seek(0)
    chunks = list(restore_delta(out, [base], itemsize))
    assert [len(c) for c in chunks] == [CHUNK, 4096 * 8]
    assert b"".join(chunks) == mine


def test_a_fine_tune_is_small() -> None:
    """bfloat16 weights that move by a thousandth: only the low byte differs, and not by much."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal(20_000).astype(np.float32)
    tuned = weights * (1 + 0.001 * rng.standard_normal(20_000).astype(np.float32))
    base, mine = ((x.view(np.uint32) >> 16).astype(np.uint16).tobytes() for x in (weights, tuned))
    frame = compress(mine, base, 2, len(mine))
    assert frame is not None
    assert len(frame) < 0.3 * len(mine)
    assert restore(frame, base, 2) == mine


# Limits


def test_none_if_it_is_not_smaller() -> None:
    mine, base = random_bytes(5000, 1), random_bytes(5000, 2)
    assert compress(mine, base, 2, 5000) is None
    frame = compress(mine, base, 2)
    assert frame is not None
    assert len(frame) >= 5000


@settings(deadline=None, max_examples=60)
@given(streams(), st.integers(-2, 2))
def test_the_limit_is_exact(case: tuple[bytes, bytes, int], more: int) -> None:
    mine, base, itemsize = case
    frame = compress(mine, base, itemsize)
    assert frame is not None
    assert compress(mine, base, itemsize, len(frame) + more) == (frame if more > 0 else None)


def test_it_stops_at_the_limit() -> None:
    """Nothing more is read once the result cannot be smaller; a block of Zstandard is 128 KiB."""
    taken = []

    def blocks(seed: int) -> Iterator[bytes]:
        for i in range(40):
            taken.append(i)
            yield random_bytes(1 << 14, seed * 100 + i)

    assert compress_delta(blocks(0), blocks(1), 2, io.BytesIO(), 1000) is None
    assert max(taken) < 30


def test_empty_streams() -> None:
    assert compress(b"", b"", 2, 0) is None
    frame = compress(b"", b"", 2)
    assert frame is not None
    assert restore(frame, b"", 2) == b""


# Damage


def example(itemsize: int = 2) -> tuple[bytes, bytes, bytes]:
    base = random_bytes(1000)
    mine = changed(base, 7)
    frame = compress(mine, base, itemsize)
    assert frame is not None
    return mine, base, frame


def test_every_cut_frame_is_noticed() -> None:
    """Unless the cut is behind the data, in its checksum."""
    mine, base, frame = example()
    harmless = 0
    for size in range(len(frame)):
        try:
            assert restore(frame[:size], base, 2) == mine
            harmless += 1
        except ValueError:
            continue
    assert harmless <= 4


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8])
@pytest.mark.parametrize("more", [8, SMALL, 5 * SMALL])
def test_a_frame_of_another_length_is_noticed(itemsize: int, more: int) -> None:
    _, base, frame = example(itemsize)
    with pytest.raises(ValueError, match="a compressed delta is shorter than its base"):
        restore(frame, base + bytes(more), itemsize)
    with pytest.raises(ValueError, match="a compressed delta is longer than its base"):
        restore(frame, base[:-more], itemsize)


@pytest.mark.parametrize("tail", [b"\0", b"junk", bytes(100)])
def test_bytes_behind_the_frame_are_noticed(tail: bytes) -> None:
    _, base, frame = example()
    with pytest.raises(ValueError, match="a compressed delta is"):
        restore(frame + tail, base, 2)


def test_a_second_frame_is_noticed() -> None:
    _, base, frame = example()
    with pytest.raises(ValueError, match="a compressed delta is longer than its base"):
        restore(frame + frame, base, 2)


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=200))
def test_junk_is_noticed(junk: bytes) -> None:
    with pytest.raises(ValueError, match="a compressed delta is"):
        restore(junk, random_bytes(300), 2)


def flipped() -> Iterator[tuple[bytes, bytes, bytes]]:
    """Every frame with one bit flipped."""
    mine, base, frame = example()
    for at in range(len(frame)):
        for bit in range(8):
            broken = bytearray(frame)
            broken[at] ^= 1 << bit
            yield mine, base, bytes(broken)


def test_a_flipped_bit_raises_nothing_but_value_error() -> None:
    noticed = []
    for mine, base, broken in flipped():
        try:
            assert len(restore(broken, base, 2)) == len(mine)
        except ValueError as error:
            noticed.append(str(error))
    assert len(noticed) > 100
    assert all(text.startswith("a compressed delta is") for text in noticed)


def test_a_flipped_bit_never_gives_other_bytes() -> None:
    wrong = 0
    for mine, base, broken in flipped():
        try:
            wrong += restore(broken, base, 2) != mine
        except ValueError:
            continue
    assert wrong == 0
