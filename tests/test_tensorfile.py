"""The safetensors container: every refusal by name, round trips, fuzz, exact bytes."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moecc import tensorfile
from moecc.tensorfile import (
    DTYPE_BYTES,
    HeaderError,
    TensorInfo,
    build_header,
    header_length,
    parse_header,
    pread_full,
    pread_into,
    pwrite_full,
    read_header,
)

NANO = Path(__file__).parent.parent / "examples/models/nano-base/model.safetensors"
FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    shape = list(shape) if isinstance(shape, tuple) else shape
    offsets = list(offsets) if isinstance(offsets, tuple) else offsets
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def parse(header: object, data: int = 8) -> dict[str, TensorInfo]:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return parse_header(raw, "f.safetensors", 8 + len(raw) + data)


def test_parse_gives_absolute_offsets_in_file_order() -> None:
    raw = json.dumps({"b": entry("BF16", (2, 1), (4, 8)), "a": entry("U8", (4,), (0, 4))}).encode()
    start = 8 + len(raw)
    tensors = parse_header(raw, "f.safetensors", start + 8)
    assert list(tensors.values()) == [
        TensorInfo("a", "U8", (4,), "f.safetensors", start, 4),
        TensorInfo("b", "BF16", (2, 1), "f.safetensors", start + 4, 4),
    ]


def test_scalars_and_empty_tensors_are_fine() -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "none": entry("F32", (0, 7), (0, 0)),
        "one": entry("F32", (), (0, 4)),
        "two": entry("F32", (1,), (4, 8)),
        "tail": entry("F32", (0,), (8, 8)),
    }
    assert [t.nbytes for t in parse(header).values()] == [0, 4, 4, 0]
    assert parse({}, data=0) == {}


BAD = {
    "not-json": (b"{oops}", "header is not JSON: Expecting property name"),
    "start": (b" {}", "header does not start with `{`"),
    "list": (b"[]", "header does not start with `{`"),
    "utf8": (b'{"\xff": 1}', "header is not UTF-8 at byte 2"),
    "surrogate": (b'{"\\ud800": 1}', "header is not Unicode text at key `'\\ud800'`"),
    "duplicate": (b'{"a": 1, "a": 2}', "header is ambiguous: key `a` comes twice"),
    "deep": (b'{"a": ' + b"[" * 100_000, "header is not JSON: nested too deep"),
    "digits": (
        b'{"a": ' + b"9" * 5000 + b"}",
        "header is not usable: an integer of 5000 digits",
    ),
    "metadata": ({"__metadata__": {"n": 1}}, "`__metadata__` is not an object of strings"),
    "entry": ({"a": 3}, "tensor `a` is not an object but a number"),
    "entry-null": ({"a": None}, "tensor `a` is not an object but null"),
    "keys": ({"a": {"dtype": "F32"}}, "tensor `a` needs dtype, shape, data_offsets; has `dtype`"),
    "dtype": ({"a": entry("F4")}, "tensor `a` has an unknown dtype `'F4'`"),
    "dtype-type": ({"a": entry(["F32"])}, "tensor `a` has an unknown dtype `['F32']`"),
    "shape": ({"a": entry(shape=2)}, "tensor `a` has a bad shape `2`"),
    "shape-negative": ({"a": entry(shape=[-2])}, "tensor `a` has a bad shape `[-2]`"),
    "shape-bool": ({"a": entry(shape=[True, 2])}, "tensor `a` has a bad shape `[True, 2]`"),
    "shape-float": ({"a": entry(shape=[2.0])}, "tensor `a` has a bad shape `[2.0]`"),
    "overflow": (
        {"a": entry(shape=[2**31, 2**31])},
        "tensor `a` overflows 63 bits: shape `[2147483648, 2147483648]`",
    ),
    "offsets": ({"a": entry(offsets=[0])}, "tensor `a` has bad offsets `[0]`"),
    "offsets-bool": ({"a": entry(offsets=[False, 8])}, "tensor `a` has bad offsets `[False, 8]`"),
    "offsets-negative": ({"a": entry(offsets=[-8, 0])}, "tensor `a` has bad offsets `[-8, 0]`"),
    "offsets-huge": (
        {"a": entry(offsets=[0, 2**63])},
        "tensor `a` overflows 63 bits: offsets `[0, 9223372036854775808]`",
    ),
    "reversed": ({"a": entry(offsets=[8, 0])}, "tensor `a` begins at 8 after its end 0"),
    "size": (
        {"a": entry(offsets=[0, 4])},
        "tensor `a`: F32 [2] takes 8 bytes, offsets span 4",
    ),
    "overlap": (
        {"a": entry("U8", (5,), (0, 5)), "b": entry("U8", (4,), (4, 8))},
        "tensors `a` and `b` overlap at byte ",
    ),
    "hole": ({"a": entry("U8", (6,), (2, 8))}, "hole of 2 bytes before tensor `a` at byte "),
    "trailing": ({"a": entry("U8", (5,), (0, 5))}, "3 bytes after the last tensor, at byte "),
}


@pytest.mark.parametrize(("header", "message"), BAD.values(), ids=BAD)
def test_refusals(header: object, message: str) -> None:
    with pytest.raises(HeaderError) as caught:
        parse(header)
    assert str(caught.value).startswith(message)


def test_truncated_data_says_both_sizes() -> None:
    raw = json.dumps({"a": entry()}).encode()
    size = 8 + len(raw) + 8
    with pytest.raises(HeaderError) as caught:
        parse_header(raw, "f", size - 1)
    assert str(caught.value) == f"truncated: header says {size} bytes, file has {size - 1}"


def test_header_length_is_bounded_by_cap_and_file() -> None:
    assert header_length((5).to_bytes(8, "little"), 13) == 5
    for prefix, size, message in [
        (b"123", 3, "too short for a safetensors file: 3 bytes"),
        ((6).to_bytes(8, "little"), 13, "truncated: header says 14 bytes, file has 13"),
        (
            (100_000_001).to_bytes(8, "little"),
            10**9,
            "header length 100000001 is over the limit of 100000000 bytes",
        ),
    ]:
        with pytest.raises(HeaderError) as caught:
            header_length(prefix, size)
        assert str(caught.value) == message


def test_error_text_stays_one_short_line() -> None:
    with pytest.raises(HeaderError) as caught:
        parse({"evil\n\x1b[31m" + "x" * 10_000: entry("?" * 10_000)})
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 400


def test_read_header_of_a_real_checkpoint() -> None:
    from safetensors import safe_open

    tensors, raw = read_header(NANO)
    assert len(tensors) == 126
    assert NANO.read_bytes().startswith(raw)
    first = tensors["model.embed_tokens.weight"]
    assert first == TensorInfo(
        "model.embed_tokens.weight", "BF16", (3072, 96), "model.safetensors", len(raw), 589824
    )
    with safe_open(NANO, "pt") as theirs:
        for name, info in tensors.items():
            piece = theirs.get_slice(name)
            assert (piece.get_dtype(), tuple(piece.get_shape())) == (info.dtype, info.shape)


def test_read_header_refuses_what_is_not_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(HeaderError, match="not a regular file"):
        read_header(tmp_path / "pipe.safetensors")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    with pytest.raises(HeaderError, match="too short for a safetensors file: 0 bytes"):
        read_header(tmp_path / "empty.safetensors")
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "missing.safetensors")


def test_build_header_exact_bytes() -> None:
    header, infos = build_header([("b", "F32", (2,)), ("a", "U8", ())], "out.safetensors")
    text = (
        b'{"__metadata__":{"format":"pt"},'
        b'"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"a":{"dtype":"U8","shape":[],"data_offsets":[8,9]}}'
    )
    assert header == (184).to_bytes(8, "little") + text.ljust(184)
    assert infos == {
        "b": TensorInfo("b", "F32", (2,), "out.safetensors", 192, 8),
        "a": TensorInfo("a", "U8", (), "out.safetensors", 200, 1),
    }


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("a", "F32", (1,)), ("a", "F32", (1,))], "tensor `a` comes twice"),
        ([("__metadata__", "F32", (1,))], "tensor `__metadata__` comes twice or has a reserved"),
        ([("a", "F4", (1,))], "tensor `a` has an unknown dtype `'F4'`"),
        ([("a", "F32", (-1,))], r"tensor `a` has a bad shape `\[-1\]`"),
        ([("\ud800", "F32", (1,))], "a tensor name is not Unicode text"),
    ],
)
def test_build_header_refusals(
    tensors: list[tuple[str, str, tuple[int, ...]]], message: str
) -> None:
    with pytest.raises(HeaderError, match=message):
        build_header(tensors)


def test_build_header_over_the_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorfile, "MAX_HEADER_BYTES", 100)
    with pytest.raises(HeaderError, match="over the limit of 100"):
        build_header([("a" * 100, "F32", (1,))])


names = st.text(min_size=1, max_size=12).filter(
    lambda n: n.isprintable() and n != "__metadata__" and n.encode("utf-8", "replace") != b"?"
)
tensor_lists = st.lists(
    st.tuples(
        names,
        st.sampled_from(sorted(DTYPE_BYTES)),
        st.lists(st.integers(0, 4), max_size=3).map(tuple),
    ),
    max_size=6,
    unique_by=lambda t: t[0],
)


@FUZZ
@given(tensors=tensor_lists)
def test_build_then_read_gives_the_same(
    tensors: list[tuple[str, str, tuple[int, ...]]], tmp_path: Path
) -> None:
    from safetensors import safe_open

    path = tmp_path / "x.safetensors"
    header, built = build_header(tensors, path.name)
    assert len(header) % 64 == 0
    assert build_header(tensors, path.name) == (header, built)
    path.write_bytes(header + bytes(sum(info.nbytes for info in built.values())))
    read, raw = read_header(path)
    assert raw == header
    assert read == built
    with safe_open(path, "pt") as theirs:
        assert sorted(theirs.keys()) == sorted(built)
        assert theirs.metadata() == {"format": "pt"}


def test_files_written_here_load_in_torch(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    wanted = {
        "w": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
        "s": torch.tensor(2.5),
        "f8": torch.tensor([1.0, 2.0, 3.0]).to(torch.float8_e4m3fn),
        "i": torch.arange(3),  # at an odd offset, behind three single bytes
        "e": torch.empty(0, 4),
    }
    codes = {"w": "BF16", "s": "F32", "f8": "F8_E4M3", "i": "I64", "e": "F32"}
    header, infos = build_header([(n, codes[n], tuple(t.shape)) for n, t in wanted.items()])
    path = tmp_path / "x.safetensors"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    pwrite_full(fd, header, 0)
    for name, tensor in wanted.items():
        raw = tensor.reshape(-1).view(torch.uint8) if tensor.numel() else tensor
        pwrite_full(fd, raw.numpy().tobytes(), infos[name].offset)
    os.close(fd)
    loaded = load_file(path)
    assert loaded.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name].float(), tensor.float())
    save_file(wanted, tmp_path / "theirs.safetensors")
    theirs, _ = read_header(tmp_path / "theirs.safetensors")
    assert {n: (t.dtype, t.shape) for n, t in theirs.items()} == {
        n: (t.dtype, t.shape) for n, t in infos.items()
    }


@FUZZ
@given(data=st.data())
def test_mutated_headers_are_refused_or_right(data: st.DataObject, tmp_path: Path) -> None:
    """Whatever bytes: HeaderError, or a file that the safetensors library reads the same."""
    from safetensors import safe_open

    header = {"a": entry("U8", (4,), (0, 4)), "b": entry("BF16", (1, 2), (4, 8))}
    raw = bytearray(json.dumps(header).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        piece = data.draw(
            st.sampled_from([b"", b"0", b"-", b"1", b"9", b'"', b",", b"]", b"{", b" ", b"\\"])
            | st.binary(min_size=1, max_size=2)
        )
        raw[at : at + data.draw(st.integers(0, 2))] = piece
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(8))
    try:
        tensors, _ = read_header(path)
    except HeaderError:
        return
    with safe_open(path, "pt") as theirs:
        assert sorted(theirs.keys()) == sorted(tensors)


@FUZZ
@given(
    header=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["a", "dtype", "shape", "data_offsets", "__metadata__"]), inner
            )
        ),
        max_leaves=12,
    )
)
def test_any_json_is_refused_or_parsed(header: Any) -> None:
    for value in (header, {"a": header}, {"a": entry(header)}, {"a": entry(shape=header)}):
        with contextlib.suppress(HeaderError):
            parse(value)


def test_pread_and_pwrite_are_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, b, o: read(fd, [b[0][:3]], o))
    monkeypatch.setattr(os, "pwrite", lambda fd, d, o: write(fd, d[:3], o))
    fd = os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT)
    pwrite_full(fd, bytes(range(20)), 5)
    assert pread_full(fd, 10, 10) == bytes(range(5, 15))
    buffer = bytearray(8)
    pread_into(fd, memoryview(buffer)[2:6], 5)
    assert buffer == bytes([0, 0, 0, 1, 2, 3, 0, 0])
    assert pread_full(fd, 0, 999) == b""
    with pytest.raises(EOFError, match="file ends at byte 25, 3 bytes short"):
        pread_full(fd, 5, 23)
    os.close(fd)
