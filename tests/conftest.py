"""Shared fixtures: the example models, compiled once, and the command line in three ways.

`Cli` calls `moecc.cli.main` in this process. `Lab` runs it in a child forked from a process that
has torch imported already, where a test may kill or interrupt it: much cheaper than a new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml

if TYPE_CHECKING:
    from served import Built, Passes

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "examples/models"
RECIPES = ROOT / "recipes"
NAMES = ("base", "chat", "math", "python")

# A run in the background of a script ignores Ctrl-C, and so would what the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Read when rich, typer and huggingface_hub are imported, so they go before anything else.
_LEAKS = ("FORCE_COLOR", "PY_COLORS", "CLICOLOR_FORCE", "GITHUB_ACTIONS", "TERMINAL_WIDTH")
for _name in list(os.environ):
    if _name.startswith(("HF_", "HUGGING", "TRANSFORMERS_", "MOECC_")) or _name in _LEAKS:
        del os.environ[_name]


@pytest.fixture(scope="session", autouse=True)
def moecc_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Measurements of the whole session go to one temporary folder."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("moecc-cache")
        patch.setenv("MOECC_CACHE", str(folder))
        yield folder


def tree(folder: Path) -> dict[str, str]:
    """Relative path -> hash of every file below a folder; folders and links by their kind."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        else:
            is_file = path.is_file()
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if is_file else "folder"
    return found


def write_recipe(path: Path, sources: dict[str, Any] | None = None, **fields: Any) -> Path:
    """A recipe of the quickstart's shape, by default of the four example models."""
    if sources is None:
        sources = {name: MODELS / f"nano-{name}" for name in NAMES}
    recipe = {
        "version": 1,
        "base": next(iter(sources)),
        "variants": {name: {"source": str(source)} for name, source in sources.items()},
        "merge": {"center": "4bit", "residual": "2bit", "group": 32},
        "budget": "0.95x",
        **fields,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def compile_recipe(recipe: Path, out: Path, **options: Any) -> Path:
    """`out`, after `consolidate` in this process."""
    from moecc.consolidate import run
    from moecc.recipe import load_recipe

    run(load_recipe(recipe), out, **options)
    return out


def manifest_of(artifact: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((artifact / "manifest.json").read_bytes())
    return manifest


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of recipes/quickstart.yaml. Read only: copy it to break it."""
    return compile_recipe(RECIPES / "quickstart.yaml", tmp_path_factory.mktemp("q") / "artifact")


@pytest.fixture(scope="session")
def lossless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of recipes/lossless.yaml. Read only."""
    return compile_recipe(RECIPES / "lossless.yaml", tmp_path_factory.mktemp("l") / "artifact")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    from served import Built

    return Built(tmp_path_factory)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    from served import Passes

    return Passes(monkeypatch)


@dataclass(frozen=True)
class Outcome:
    """How a command ended; `code` is negative for a signal, as in subprocess."""

    code: int
    out: str
    err: str

    def failed(self, code: int, *texts: str) -> Outcome:
        """Checks for a clear error: the exit code, one line and a hint at most, no traceback."""
        flat = " ".join(self.err.split())
        assert self.code == code, self
        assert "Traceback" not in self.err, self
        assert "internal error" not in self.err, self
        assert [line[:7] for line in self.err.splitlines()].count("error: ") == 1, self
        for text in texts:
            assert text in flat, (text, self)
        return self


class Cli:
    """Runs a command in this process."""

    def __call__(self, *arguments: object) -> Outcome:
        from moecc.cli import main

        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["moecc", *map(str, arguments)])
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                try:
                    main()
                except SystemExit as end:
                    code = end.code
        assert isinstance(code, int)
        return Outcome(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def cli() -> Cli:
    return Cli()


_LAB = r"""
import json, os, signal, sys, threading
import moecc.cli, moecc.consolidate, moecc.export, moecc.report
from transformers import MixtralForCausalLM

def trap(number, sent):
    # Counts what changes the disk; signals itself before call `number`. 0 only counts.
    events, lock = [], threading.Lock()

    def event(name):
        with lock:
            events.append(name)
            if len(events) == number:
                os.kill(os.getpid(), sent)

    def audit(name, args):
        if name == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR):
            event(f"open {os.path.basename(str(args[0]))}")
        elif name in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"):
            event(f"{name} {os.path.basename(str(args[0]))}")

    def counted(name, function):
        def call(*args):
            event(name)
            return function(*args)
        return call

    os.pwrite, os.fsync = counted("pwrite", os.pwrite), counted("fsync", os.fsync)
    sys.addaudithook(audit)
    return events

print(hash("moecc"), flush=True)
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        for fd, name in enumerate(job["files"], 1):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOCTTY), fd)
        os.environ.update(job["env"])
        os.umask(job["umask"])
        os.setpgid(0, 0)
        signal.alarm(100)
        sys.argv = ["moecc", *job["argv"]]
        events = trap(job["number"], job["signal"]) if job["number"] is not None else []
        code = 99
        try:
            moecc.cli.main()
        except SystemExit as end:
            code = end.code
        except BaseException:
            import traceback
            traceback.print_exc()
            code = 1
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            if job["number"] == 0:
                with open(job["log"], "w") as file:
                    json.dump(list(events), file)
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(json.dumps(status), flush=True)
"""


class Lab:
    """Runs commands in forked children, which a test may signal at a chosen point."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-c", _LAB],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": "4242"},
        )
        assert self._process.stdout
        self.hash = int(self._process.stdout.readline())

    def __call__(
        self,
        *arguments: object,
        number: int | None = None,
        signal: int = 9,
        umask: int = 0o022,
        terminal: str | None = None,
        **env: str,
    ) -> Outcome:
        """`signal` goes to the child before the `number`-th time that it changes the disk."""
        files = [self.folder / "stdout", self.folder / "stderr"]
        for file in files:
            file.write_bytes(b"")
        job = {
            "argv": list(map(str, arguments)),
            "files": [terminal or str(file) for file in files],
            "env": env | {"MOECC_CACHE": env.get("MOECC_CACHE", os.environ["MOECC_CACHE"])},
            "umask": umask,
            "number": number,
            "signal": signal,
            "log": str(self.folder / "events"),
        }
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        code = json.loads(self._process.stdout.readline())
        return Outcome(code, *(file.read_text() for file in files))

    def events(self, *arguments: object) -> list[str]:
        """Every change of the disk that an undisturbed run makes, in order."""
        outcome = self(*arguments, number=0)
        assert outcome.code == 0, outcome
        events: list[str] = json.loads((self.folder / "events").read_text())
        return events

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("lab"))
    yield lab
    lab.close()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For small tensors: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nobody wrote to holds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
