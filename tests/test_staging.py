"""moecc.staging: an output that is whole or not there, whenever its maker is stopped."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moecc.errors import ArtifactError
from moecc.staging import JOURNAL, Staging, check_output, describe

MARK = "manifest.json"
STEPS: dict[str, dict[str, bytes]] = {
    "first": {"a.bin": b"a" * 1000, "variants/x/b.bin": b"b" * 10},
    "second": {"c.bin": bytes(5000)},
    "third": {"variants/y/d.json": b"{}", "variants/y/empty": b""},
}


def build(
    out: Path,
    *,
    job: str = "job",
    force: bool = False,
    content: str = "new",
    before: Callable[[str], None] = lambda step: None,
) -> list[str]:
    """Makes an output step by step; returns the steps that were not finished before.

    `before` is called before every step, `mark` and `publish`.
    """
    made = []
    with Staging(out, job, force=force, replaceable=MARK) as found:
        for step, named in STEPS.items():
            before(step)
            if (entry := found.finished(step)) is None:
                made.append(step)
                for name, data in named.items():
                    (found.folder / name).parent.mkdir(parents=True, exist_ok=True)
                    (found.folder / name).write_bytes(data)
                entry = found.record(step, list(named), [step, 0.5])
            assert entry["data"] == [step, 0.5]
        before("mark")
        (found.folder / MARK).write_text(content)
        before("publish")
        found.publish()
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def whole(content: str = "new") -> dict[str, bytes]:
    named = {name: data for files in STEPS.values() for name, data in files.items()}
    return named | {MARK: content.encode()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def stop_before(step: str, error: BaseException) -> Callable[[str], None]:
    def before(at: str) -> None:
        if at == step:
            raise error

    return before


def child(work: Callable[[], object], kill_at: int = -1) -> tuple[int, list[str]]:
    """Runs `work` in a forked process; returns its exit code and how it changed the disk.

    Right before change `kill_at` it is killed, and the list of changes is empty.
    """
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        code, changes = 9, []

        def change(name: str, path: object) -> None:
            if len(changes) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            changes.append(f"{name} {os.path.basename(str(path))}")

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "open":
                if isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
                    change("write", arguments[0])
            elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
                change(event[3:], arguments[0])

        fsync = os.fsync

        def traced_fsync(fd: int) -> None:
            change("fsync", os.readlink(f"/proc/self/fd/{fd}"))
            fsync(fd)

        try:
            os.fsync = traced_fsync
            sys.addaudithook(audit)
            work()
            code = 0
        finally:
            os.write(write_end, json.dumps(changes).encode())
            os._exit(code)
    os.close(write_end)
    with os.fdopen(read_end) as file:
        text = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), json.loads(text or "[]")


def killed_before(out: Path, step: str, **options: Any) -> None:
    """Leaves a partial folder behind, as a kill before a step does."""

    def die(at: str) -> None:
        if at == step:
            os.kill(os.getpid(), signal.SIGKILL)

    code, _ = child(lambda: build(out, before=die, **options))
    assert code == -signal.SIGKILL
    assert partial(out, options.get("job", "job")).is_dir()


def partial(out: Path, job: str = "job") -> Path:
    """The partial folder of a job, next to its output."""
    folder = Staging(out.with_name("new"), job, force=False, replaceable=MARK).folder
    return folder.with_name(folder.name.replace("new", out.name, 1))


# Publishing


def test_an_output_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep/er/out"
    seen = []

    def before(step: str) -> None:
        seen.append(step)
        assert not out.exists()
        assert names(out.parent) == [partial(out).name]

    assert build(out, before=before) == list(STEPS)
    assert seen == [*STEPS, "mark", "publish"]
    assert contents(out) == whole()
    assert names(out.parent) == ["out"]


def test_the_name_is_given_by_one_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a folder that holds everything, and nothing more, all of it synced."""
    out, synced, renames = tmp_path / "out", set(), []
    fsync, rename = os.fsync, os.rename

    def traced_fsync(fd: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    def traced_rename(source: Any, target: Any, **options: Any) -> None:
        renames.append((Path(source), Path(target)))
        assert contents(Path(source)) == whole()
        staged = {str(partial(out) / name) for files in STEPS.values() for name in files}
        folders = {str(p) for p in [partial(out), *partial(out).rglob("*")] if p.is_dir()}
        assert staged | folders <= synced
        synced.clear()
        rename(source, target, **options)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(os, "rename", traced_rename)
    build(out)
    assert renames == [(partial(out), out)]
    assert synced == {str(tmp_path)}


def test_what_a_step_was_recorded_with(tmp_path: Path) -> None:
    with Staging(tmp_path / "out", "job", force=False, replaceable=MARK) as found:
        assert found.finished("step") is None
        (found.folder / "f").write_bytes(b"data")
        entry = found.record("step", ["f"], {"x": 1.25})
        digest = hashlib.sha256(b"data").hexdigest()
        assert entry == {
            "step": "step",
            "files": {"f": {"size": 4, "sha256": digest}},
            "data": {"x": 1.25},
        }
        assert describe(found.folder / "f") == entry["files"]["f"]
        with pytest.raises(FileNotFoundError):
            found.record("other", ["missing"])
        lines = (found.folder / JOURNAL).read_bytes().splitlines()
        assert [json.loads(line) for line in lines] == [entry]


def test_a_step_is_noted_after_its_files_are_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the note itself is synced, before the next step begins."""
    synced: list[str] = []

    def traced(fd: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        synced.append(path.name)
        if path.name == JOURNAL:
            assert path.read_bytes().endswith(b"\n")

    monkeypatch.setattr(os, "fsync", traced)
    expected: list[str] = []
    for named in STEPS.values():
        expected += [*(Path(name).name for name in named), JOURNAL]

    def before(step: str) -> None:
        if step == "mark":
            assert synced == expected

    build(tmp_path / "out", before=before)


@pytest.mark.parametrize(("mask", "file", "folder"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750)])
def test_permissions_follow_the_umask(mask: int, file: int, folder: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        build(tmp_path / "above" / "out")
    finally:
        os.umask(before)
    for path in (tmp_path / "above").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (folder if path.is_dir() else file), path
    assert stat.S_IMODE((tmp_path / "above").stat().st_mode) == folder


# Errors and Ctrl-C


@pytest.mark.parametrize("step", [*STEPS, "mark", "publish"])
@pytest.mark.parametrize(
    "error",
    [RuntimeError("x"), KeyboardInterrupt(), SystemExit(3), ArtifactError("broken", "mend it")],
    ids=lambda error: type(error).__name__,
)
def test_an_error_removes_everything(step: str, error: BaseException, tmp_path: Path) -> None:
    (tmp_path / "above").mkdir()
    with pytest.raises(type(error)) as caught:
        build(tmp_path / "above/not/there/out", before=stop_before(step, error))
    assert caught.value is error
    assert names(tmp_path) == ["above"]
    assert names(tmp_path / "above") == []


@pytest.mark.parametrize("step", [*STEPS, "mark", "publish"])
def test_an_error_keeps_the_old_output_and_its_neighbors(step: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(out, content="old")
    (tmp_path / "other").write_bytes(b"other")
    with pytest.raises(KeyboardInterrupt):
        build(out, force=True, before=stop_before(step, KeyboardInterrupt()))
    assert contents(out) == whole("old")
    assert names(tmp_path) == ["other", "out"]


def full_disk(step: str) -> Callable[[str], None]:
    """Writes to a device that has no space, as a real disk then has none."""

    def before(at: str) -> None:
        if at == step:
            Path("/dev/full").write_bytes(b"x")

    return before


@pytest.mark.parametrize("step", ["first", "third", "publish"])
def test_a_full_disk_is_said_and_leaves_nothing(step: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as caught:
        build(tmp_path / "new/out", before=full_disk(step))
    out = tmp_path / "new/out"
    assert caught.value.message == f"cannot write `{out}`: No space left on device"
    assert "nothing was left behind" in str(caught.value.hint)
    assert names(tmp_path) == []


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_failing_disk_leaves_nothing(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    def before(step: str) -> None:
        if step == "publish":
            monkeypatch.setattr(os, call, fail)

    with pytest.raises(ArtifactError, match="Input/output error"):
        build(tmp_path / "out", before=before)
    assert names(tmp_path) == []


def test_a_failed_replacement_keeps_the_old_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    build(out, content="old")
    rename = os.rename

    def fail_to_publish(source: Any, target: Any, **options: Any) -> None:
        if Path(source) == partial(out):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail_to_publish)
        with pytest.raises(ArtifactError, match="Input/output error"):
            build(out, force=True)
    assert contents(out) == whole("old")
    assert names(tmp_path) == ["out"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"data")
    with pytest.raises(ArtifactError) as caught:
        build(tmp_path / "file" / "out")
    out = tmp_path / "file" / "out"
    assert caught.value.message.startswith(f"cannot write next to `{out}`: ")
    assert contents(tmp_path) == {"file": b"data"}


# Kills


@pytest.mark.parametrize(
    ("step", "left"),
    [
        ("first", ["first", "second", "third"]),
        ("second", ["second", "third"]),
        ("third", ["third"]),
        ("mark", []),
        ("publish", []),
    ],
)
def test_the_same_job_goes_on(step: str, left: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed_before(out, step)
    assert not out.exists()
    assert build(out) == left
    assert contents(out) == whole()
    assert names(tmp_path) == ["out"]


def test_finished_steps_are_not_written_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed_before(out, "third")
    before = {path: path.stat() for path in partial(out).rglob("*.bin")}
    build(out)
    for path, known in before.items():
        found = (out / path.relative_to(partial(out))).stat()
        assert (found.st_ino, found.st_mtime_ns) == (known.st_ino, known.st_mtime_ns)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b"a" * 999),
        lambda path: path.write_bytes(b"a" * 999 + b"b"),
        lambda path: path.write_bytes(b"a" * 1001),
        lambda path: (path.unlink(), path.mkdir()),
    ],
    ids=["removed", "cut", "changed", "grown", "a folder"],
)
def test_a_step_whose_file_changed_is_done_again(
    damage: Callable[[Path], object], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    killed_before(out, "publish")
    damage(partial(out) / "a.bin")

    def clear(step: str) -> None:
        if (path := partial(out) / "a.bin").is_dir():
            path.rmdir()

    assert build(out, before=clear) == ["first"]
    assert contents(out) == whole()


def test_a_job_may_be_killed_again_and_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for step in ("second", "first", "third", "mark", "publish", "publish"):
        killed_before(out, step)
    assert build(out) == []
    assert contents(out) == whole()


def test_a_step_done_again_counts_as_done_last(tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed_before(out, "mark")
    (partial(out) / "c.bin").write_bytes(b"broken")
    killed_before(out, "third")
    assert build(out) == []
    assert contents(out) == whole()


@pytest.fixture
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for the disk; what would is still counted."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def changes_of(work: Callable[[], object]) -> list[str]:
    code, changes = child(work)
    assert code == 0
    assert len(changes) > 20
    return changes


@pytest.mark.usefixtures("no_wait")
def test_a_kill_at_any_time_leaves_all_or_nothing(tmp_path: Path) -> None:
    """And with `force` the next run always gets through."""
    changes = changes_of(lambda: build(tmp_path / "count"))
    for number in range(len(changes)):
        folder = tmp_path / str(number)
        out = folder / "out"
        assert child(lambda out=out: build(out), number) == (-signal.SIGKILL, [])
        if out.exists():
            assert contents(out) == whole()
            assert names(folder) == ["out"]
        build(out, force=True)
        assert contents(out) == whole()
        assert names(folder) == ["out"]


@pytest.mark.usefixtures("no_wait")
def test_after_a_kill_at_any_time_the_same_job_goes_on(tmp_path: Path) -> None:
    """Without `force`, and nothing is left of it."""
    changes = changes_of(lambda: build(tmp_path / "count"))
    for number in range(len(changes)):
        folder = tmp_path / str(number)
        out = folder / "out"
        child(lambda out=out: build(out), number)
        if not out.exists():
            build(out)
        assert contents(out) == whole()
        assert names(folder) == ["out"]


@pytest.mark.usefixtures("no_wait")
def test_a_kill_at_any_time_costs_one_step(tmp_path: Path) -> None:
    """A step that was recorded before the kill is not done again, up to the rename."""
    changes = changes_of(lambda: build(tmp_path / "count"))
    recorded = [i for i, change in enumerate(changes) if change == f"fsync {JOURNAL}"]
    rename = changes.index(f"rename {partial(tmp_path / 'count').name}")
    assert len(recorded) == len(STEPS)
    for number in range(rename):
        out = tmp_path / str(number) / "out"
        child(lambda out=out: build(out), number)
        done = sum(at < number for at in recorded)
        assert build(out) in (list(STEPS)[done:], list(STEPS)[done + 1 :])


@pytest.mark.usefixtures("no_wait")
def test_a_replacement_killed_at_any_time_loses_nothing(tmp_path: Path) -> None:
    """The old output or the new one is there, whole; between two renames by another name."""
    build(tmp_path / "count", content="old")
    changes = changes_of(lambda: build(tmp_path / "count", force=True))
    renamed = f"rename {partial(tmp_path / 'count').name}"
    assert renamed in changes
    for number in range(len(changes)):
        folder = tmp_path / str(number)
        out = folder / "out"
        build(out, content="old")
        assert child(lambda out=out: build(out, force=True), number)[0] == -signal.SIGKILL
        if changes[number] == renamed:
            assert not out.exists()
            outputs = [path for path in folder.rglob("*") if (path / MARK).is_file()]
            assert {contents(path)[MARK] for path in outputs} == {b"old", b"new"}
            assert whole("old") in map(contents, outputs)
            build(out)  # goes on without `force`
        else:
            assert contents(out) in (whole("old"), whole("new"))
            build(out, force=True)
        assert contents(out) == whole("new")
        assert names(folder) == ["out"]


# The journal


def test_a_line_cut_short_is_not_a_step(tmp_path: Path) -> None:
    """Wherever it is cut: what is left of the journal are the lines that are whole."""
    out = tmp_path / "out"
    killed_before(out, "mark")
    journal = (partial(out) / JOURNAL).read_bytes()
    ends = [i + 1 for i, byte in enumerate(journal) if byte == ord("\n")]
    assert len(ends) == 3
    sizes = {0, 1, *(end + i for end in ends for i in (-9, -2, -1, 0, 1, 9))}
    for size in sorted(size for size in sizes if size <= len(journal)):
        (partial(out) / JOURNAL).write_bytes(journal[:size])
        found = Staging(out, "job", force=False, replaceable=MARK)
        found.__enter__()
        kept = [step for step in STEPS if found.finished(step)]
        found._unlock()  # as the end of a process does
        assert kept == list(STEPS)[: sum(end <= size for end in ends)]
    (partial(out) / JOURNAL).write_bytes(journal[: ends[0] + 20])
    assert build(out) == ["second", "third"]
    assert contents(out) == whole()


def test_after_a_line_cut_short_the_journal_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed_before(out, "mark")
    journal = partial(out) / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-30])
    killed_before(out, "mark")  # has done the third step again
    assert build(out) == []


@pytest.mark.parametrize("junk", [b"\xff\xfe\n", b"[]\n", b"1\n", b'{"files": {}}\n', b"\n"])
def test_junk_ends_the_journal(junk: bytes, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed_before(out, "mark")
    first, *rest = (partial(out) / JOURNAL).read_bytes().splitlines(keepends=True)
    (partial(out) / JOURNAL).write_bytes(b"".join([first, junk, *rest]))
    assert build(out) == ["second", "third"]
    assert contents(out) == whole()


def test_no_journal_is_no_step(tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed_before(out, "mark")
    (partial(out) / JOURNAL).unlink()
    assert build(out) == list(STEPS)


# What is in the way


def test_another_job_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed_before(out, "third")
    before = contents(tmp_path)
    with pytest.raises(ArtifactError) as caught:
        build(out, job="another")
    assert caught.value.message == f"`{partial(out)}` is left over from another run"
    assert "--force" in str(caught.value.hint)
    assert contents(tmp_path) == before
    assert build(out) == ["third"]


def test_force_starts_another_job_over(tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed_before(out, "third")
    (partial(out) / "stray").write_bytes(b"of the other job")
    assert build(out, job="another", force=True) == list(STEPS)
    assert contents(out) == whole()
    assert names(tmp_path) == ["out"]


def test_an_output_is_replaced_only_by_force(tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(out, content="old")
    (out / "stray").write_bytes(b"x")
    with pytest.raises(ArtifactError) as caught:
        build(out)
    assert caught.value.message == f"the output `{out}` exists"
    assert "--force" in str(caught.value.hint)
    assert contents(out) == whole("old") | {"stray": b"x"}
    build(out, force=True)
    assert contents(out) == whole()
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda out: (out.mkdir(), (out / "thesis.txt").write_text("years of work")),
        lambda out: (out / MARK).mkdir(parents=True),
        lambda out: (out / "deep" / MARK).mkdir(parents=True),
        lambda out: out.write_text("a file"),
        lambda out: out.symlink_to("nowhere"),
    ],
    ids=["folder", "mark is a folder", "mark is deeper", "file", "dangling link"],
)
def test_what_moecc_did_not_make_is_left_alone(
    make: Callable[[Path], object], force: bool, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    make(out)
    before = (sorted(map(str, tmp_path.rglob("*"))), contents(tmp_path))
    with pytest.raises(ArtifactError) as caught:
        build(out, force=force)
    message = "was not made by moecc (it has no `manifest.json`)" if force else "exists"
    assert message in caught.value.message
    assert (sorted(map(str, tmp_path.rglob("*"))), contents(tmp_path)) == before


def test_an_empty_folder_is_not_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    build(tmp_path / "out")
    assert contents(tmp_path / "out") == whole()
    assert names(tmp_path) == ["out"]


def test_the_output_is_checked_before_anything_is_made(tmp_path: Path) -> None:
    build(tmp_path / "out", content="old")
    with pytest.raises(ArtifactError):
        Staging(tmp_path / "out", "job", force=False, replaceable=MARK)
    with pytest.raises(ArtifactError):
        check_output(tmp_path / "out", force=True, replaceable="another.json")
    assert check_output(tmp_path / "out", force=True, replaceable=MARK) is None
    assert check_output(tmp_path / "free", force=False, replaceable=MARK) is None
    assert names(tmp_path) == ["out"]


NEIGHBORS = ("out.old", "out.partial", "out.replaced", "out2", "out.partial-backup")


def test_folders_with_like_names_are_left_alone(tmp_path: Path) -> None:
    for name in NEIGHBORS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("years of work")
    before = contents(tmp_path)
    for options in ({}, {"force": True}, {"force": True, "job": "another"}):
        build(tmp_path / "out", **options)
        assert contents(tmp_path / "out") == whole()
        shutil.rmtree(tmp_path / "out")
        assert contents(tmp_path) == before
        build(tmp_path / "out", content="old", job="yet another")
    assert names(tmp_path) == sorted(["out", *NEIGHBORS])


def test_another_output_next_to_it_is_left_alone(tmp_path: Path) -> None:
    """Whose partial folder has a name that only starts like ours, and one with a pattern in it."""
    for name in ("out", "out2", "[o]ut", "out.partial"):
        killed_before(tmp_path / name, "third")
    assert build(tmp_path / "[o]ut", force=True) == ["third"]
    assert build(tmp_path / "out", job="another", force=True) == list(STEPS)
    assert build(tmp_path / "out2") == ["third"]
    assert build(tmp_path / "out.partial") == ["third"]
    assert names(tmp_path) == ["[o]ut", "out", "out.partial", "out2"]


@pytest.mark.parametrize("target", ["an output", "an empty folder"])
def test_a_link_to_what_may_be_replaced(target: str, tmp_path: Path) -> None:
    if target == "an output":
        build(tmp_path / "target", content="old")
    else:
        (tmp_path / "target").mkdir()
    before = contents(tmp_path / "target")
    (tmp_path / "out").symlink_to("target")
    build(tmp_path / "out", force=True)
    assert contents(tmp_path / "out") == whole()
    assert names(tmp_path) == ["out", "target"]
    assert contents(tmp_path / "target") in (before, whole())


def test_a_second_run_of_the_same_job_is_kept_out(tmp_path: Path) -> None:
    with Staging(tmp_path / "out", "job", force=False, replaceable="mark") as first:
        (first.folder / "a").write_bytes(b"a")
        second = Staging(tmp_path / "out", "job", force=True, replaceable="mark")
        with pytest.raises(ArtifactError, match="another run is writing"), second:
            pass
        assert (first.folder / "a").read_bytes() == b"a"
        first.publish()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
