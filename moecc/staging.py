"""An output folder that appears whole or not at all, and can be resumed after a kill.

Everything is written to `OUT.partial-JOB`, next to the output; finished steps go to its journal
with the hashes of their files. The folder takes the output's name by one rename at the end. An
error or Ctrl-C removes it; only a killed process leaves it behind, and the same job then goes on
from it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from glob import escape
from pathlib import Path
from types import TracebackType
from typing import Any

from moecc.errors import ArtifactError
from moecc.files import sha256_file, sync_folder, to_json, write_file

JOURNAL = "journal.jsonl"


class Staging:
    """The staged output folder of one job; a context manager.

    `job` identifies what is made: only the same job resumes. `replaceable` is a file that marks
    an existing output as ours, so that `force` may replace it. Raises ArtifactError if the output
    exists, or another job's partial folder does.
    """

    def __init__(self, out: Path, job: str, *, force: bool, replaceable: str) -> None:
        # A link is kept: what it points to is replaced.
        self.out = out = out.resolve() if out.is_symlink() and out.exists() else out
        # The name says whose it is, so that no file has to, which a kill could cut short.
        digest = hashlib.sha256(job.encode()).hexdigest()[:12]
        self.folder = out.with_name(f"{out.name}.partial-{digest}")
        self._replaced = out.with_name(f"{out.name}.replaced-{digest}")
        self._journal: dict[str, dict[str, Any]] = {}
        self._force = force
        self._fd = -1
        self._made: list[Path] = []  # folders above the output that were not there
        check_output(out, force=force, replaceable=replaceable)

    def __enter__(self) -> Staging:
        try:
            self._open()
        except OSError as error:
            raise ArtifactError(
                f"cannot write next to `{self.out}`: {error.strerror}",
                "choose another output folder",
            ) from None
        return self

    def _open(self) -> None:
        if self.folder.exists():
            self._lock()
            self._journal = _read_journal(self.folder / JOURNAL)
            lines = [to_json(entry, indent=None) for entry in self._journal.values()]
            write_file(self.folder / JOURNAL, b"".join(lines))  # without a line cut short
            return
        for other in self.out.parent.glob(f"{escape(self.out.name)}.partial-{'[0-9a-f]' * 12}"):
            if not self._force:
                raise ArtifactError(
                    f"`{other}` is left over from another run",
                    "remove it, or use `--force`",
                )
            shutil.rmtree(other)
        self._made = [p for p in self.out.absolute().parents if not p.exists()]
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.folder.mkdir()
        self._lock()

    def _lock(self) -> None:
        """Keeps a second run of the same job out, until this process ends or is done."""
        self._fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._unlock()
            raise ArtifactError(
                f"another run is writing `{self.out}`", "wait for it, or stop it"
            ) from None

    def _unlock(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._unlock()
        if kind is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            with suppress(OSError):
                for made in self._made:
                    made.rmdir()
        if isinstance(error, OSError):
            raise ArtifactError(
                f"cannot write `{self.out}`: {error.strerror}",
                "free some space or choose another output folder; nothing was left behind",
            ) from None

    def finished(self, step: str) -> dict[str, Any] | None:
        """What `record` was given for a step, if its files are still what they were."""
        entry = self._journal.get(step)
        if entry is None:
            return None
        for name, known in entry["files"].items():
            path = self.folder / name
            if not path.is_file() or describe(path) != known:
                return None
        return entry

    def record(self, step: str, files: Sequence[str], data: Any = None) -> dict[str, Any]:
        """Notes a finished step; its files are synced and hashed."""
        described = {}
        for name in files:
            _sync(self.folder / name)
            described[name] = describe(self.folder / name)
        entry = {"step": step, "files": described, "data": data}
        with (self.folder / JOURNAL).open("ab") as file:
            file.write(to_json(entry, indent=None))
            file.flush()
            os.fsync(file.fileno())
        return entry

    def publish(self) -> None:
        """Gives the finished folder the output's name."""
        for folder in sorted(p for p in self.folder.rglob("*") if p.is_dir()):
            sync_folder(folder)
        sync_folder(self.folder)
        # Last, for until then a killed job can go on from it.
        (self.folder / JOURNAL).unlink(missing_ok=True)
        replaces = self.out.exists()
        if replaces:
            shutil.rmtree(self._replaced, ignore_errors=True)
            self.out.rename(self._replaced)
        try:
            self.folder.rename(self.out)
        except BaseException:
            if replaces:
                self._replaced.rename(self.out)
            raise
        sync_folder(self.out.parent)
        shutil.rmtree(self._replaced, ignore_errors=True)  # after a kill, that of the run before


def check_output(out: Path, *, force: bool, replaceable: str) -> None:
    """Raises ArtifactError if `out` exists and may not be replaced."""
    if not out.exists() and not out.is_symlink():
        return
    if out.is_dir() and not any(out.iterdir()):
        return
    if not force:
        raise ArtifactError(f"the output `{out}` exists", "use `--force` to replace it")
    if not (out / replaceable).is_file():
        raise ArtifactError(
            f"`{out}` was not made by moecc (it has no `{replaceable}`) and is left alone",
            "choose another output folder",
        )


def describe(path: Path) -> dict[str, Any]:
    """Size and hash of a file, as manifests hold them."""
    return {"size": path.stat().st_size, "sha256": sha256_file(path)}


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _read_journal(path: Path) -> dict[str, dict[str, Any]]:
    """The entries of a journal; a last line cut short by a kill is not one."""
    entries: dict[str, dict[str, Any]] = {}
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return entries
    for line in lines[:-1]:
        try:
            entry = json.loads(line)
            entries[entry["step"]] = entry
        except (ValueError, KeyError, TypeError):
            break
    return entries
