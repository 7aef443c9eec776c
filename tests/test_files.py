"""moecc.files: whole files or none, whatever happens while they are written."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecc import files
from moecc.files import current_umask, replace_file, sha256_file, sync_folder, to_json, write_file


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Hashes


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 200, 1000])
def test_sha256_file(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BLOCK", 100)
    data = bytes(i % 251 for i in range(size))
    (tmp_path / "f").write_bytes(data)
    assert sha256_file(tmp_path / "f") == hashlib.sha256(data).hexdigest()


def test_sha256_file_of_several_real_blocks(tmp_path: Path) -> None:
    data = os.urandom(files.BLOCK + 12345)
    (tmp_path / "f").write_bytes(data)
    assert sha256_file(tmp_path / "f") == hashlib.sha256(data).hexdigest()


def test_sha256_of_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        sha256_file(tmp_path / "f")


# Whole files


def test_replace_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    for data in (b"first", b"", b"second"):
        with replace_file(path) as file:
            file.write(data)
            assert path.exists() == (data != b"first")
        assert path.read_bytes() == data
        assert names(tmp_path) == ["f"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, OSError])
@pytest.mark.parametrize("before", [None, b"before"])
def test_an_error_leaves_what_was_there(
    error: type[BaseException], before: bytes | None, tmp_path: Path
) -> None:
    path = tmp_path / "f"
    if before is not None:
        path.write_bytes(before)

    def write() -> None:
        with replace_file(path) as file:
            file.write(b"half")
            raise error("stop")

    with pytest.raises(error, match="stop"):
        write()
    assert names(tmp_path) == ([] if before is None else ["f"])
    assert before is None or path.read_bytes() == before


@pytest.mark.parametrize("call", ["fsync", "chmod", "replace"])
def test_an_error_at_the_end_leaves_what_was_there(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f").write_bytes(b"before")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left"):
        write_file(tmp_path / "f", b"after")
    assert names(tmp_path) == ["f"]
    assert (tmp_path / "f").read_bytes() == b"before"


def test_the_data_is_synced_before_the_name_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def traced(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if name == "fsync":
                temporary = Path(os.readlink(f"/proc/self/fd/{arguments[0]}"))
                assert temporary.parent == tmp_path
                assert temporary.read_bytes() == b"data"
            calls.append(name)
            return function(*arguments)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, traced(name, getattr(os, name)))
    write_file(tmp_path / "f", b"data")
    assert calls == ["fsync", "replace"]


def test_a_kill_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"before")
    pid = os.fork()
    if pid == 0:
        try:
            with replace_file(tmp_path / "f") as file:
                file.write(b"half")
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert (tmp_path / "f").read_bytes() == b"before"
    write_file(tmp_path / "f", b"after")
    assert (tmp_path / "f").read_bytes() == b"after"


def test_a_reader_sees_a_whole_file(tmp_path: Path) -> None:
    """Whoever writes at the same time."""
    path, versions = tmp_path / "f", [bytes([i]) * 100_000 for i in range(4)]
    write_file(path, versions[0])
    threads = [
        threading.Thread(target=lambda v=v: [write_file(path, v) for _ in range(20)])
        for v in versions
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert path.read_bytes() in versions
    for thread in threads:
        thread.join()
    assert names(tmp_path) == ["f"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_permissions_follow_the_umask(mask: int, mode: int, tmp_path: Path) -> None:
    with umask(mask):
        assert current_umask() == mask
        assert current_umask() == mask  # and it is still set
        write_file(tmp_path / "f", b"data")
        (tmp_path / "plain").write_bytes(b"data")
    for name in ("f", "plain"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode


def test_a_name_that_cannot_be_taken(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_file(tmp_path / "missing" / "f", b"data")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_file(tmp_path / "folder", b"data")
    assert names(tmp_path) == ["folder"]


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"target")
    (tmp_path / "link").symlink_to("target")
    write_file(tmp_path / "link", b"data")
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"target"


# JSON


def test_json_by_hand() -> None:
    value = {"b": [1, 2.5, None], "a": {"d": True, "c": "é"}}
    assert to_json(value, indent=None) == b'{"a":{"c":"\\u00e9","d":true},"b":[1,2.5,null]}\n'
    assert to_json({"b": 1, "a": [2]}) == b'{\n "a": [\n  2\n ],\n "b": 1\n}\n'


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(values, st.sampled_from([None, 1, 2]), st.randoms(use_true_random=False))
def test_the_same_value_gives_the_same_bytes(value: Any, indent: int | None, random: Any) -> None:
    def shuffled(inner: Any) -> Any:
        if isinstance(inner, list):
            return [shuffled(v) for v in inner]
        if not isinstance(inner, dict):
            return inner
        keys = list(inner)
        random.shuffle(keys)
        return {key: shuffled(inner[key]) for key in keys}

    data = to_json(value, indent)
    assert data == to_json(shuffled(value), indent)
    assert json.loads(data) == value
    assert data.endswith(b"\n")
    assert indent is not None or data.count(b"\n") == 1  # one line of a journal


# Folders


def test_sync_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    before = len(os.listdir("/proc/self/fd"))
    sync_folder(tmp_path)
    assert synced == [str(tmp_path)]
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(FileNotFoundError):
        sync_folder(tmp_path / "missing")
    (tmp_path / "f").write_bytes(b"")
    with pytest.raises(NotADirectoryError):
        sync_folder(tmp_path / "f")
