"""A small fake of the Hub's HTTP API on 127.0.0.1, enough for huggingface_hub 1.x and 2.x.

Like the real one it redirects weights to another origin ("the CDN", here a second port),
sends the SHA-256 of weights as their ETag, and answers ranges. It counts what it serves.

`python tests/fake_hub.py FOLDER` serves FOLDER/org/model/... until interrupted.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

_REPO = r"(?P<repo>[^/]+/[^/]+)"
_ROUTES = (
    ("info", re.compile(rf"/api/models/{_REPO}(?:/revision/(?P<rev>[^/]+))?")),
    ("tree", re.compile(rf"/api/models/{_REPO}/tree/(?P<rev>[^/]+)")),
    ("resolve", re.compile(rf"/{_REPO}/resolve/(?P<rev>[^/]+)/(?P<file>.+)")),
    ("blob", re.compile(r"/cdn/(?P<sha>[0-9a-f]{64})")),
)


@dataclass(frozen=True)
class Request:
    """One request as it arrived."""

    method: str
    path: str
    range: str | None
    authorization: str | None
    cdn: bool


@dataclass
class FakeHub:
    """Models in memory, two local servers, and knobs to make things fail.

    Attributes:
        gated: repo ids whose files need a permission that nobody has.
        cut: file name -> how many bytes to send before the connection drops, once.
        ignore_range: answer every range with the whole file.
        status: if set, every request is answered with this status.
        served: bytes of bodies sent, by file name.
    """

    models: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    refs: dict[str, dict[str, str]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    cut: dict[str, int] = field(default_factory=dict)
    ignore_range: bool = False
    status: int | None = None
    served: Counter[str] = field(default_factory=Counter)
    requests: list[Request] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, repo: str, files: dict[str, bytes], revision: str = "main") -> str:
        """Commit `files` as the whole content of `repo` at a branch; the commit's id."""
        digest = hashlib.sha1(repo.encode())
        for name, data in sorted(files.items()):
            digest.update(name.encode() + b"\0" + data)
        commit = digest.hexdigest()
        self.models.setdefault(repo, {})[commit] = dict(files)
        self.refs.setdefault(repo, {})[revision] = commit
        return commit

    def add_folder(self, repo: str, folder: Path) -> str:
        """Commit every file below `folder`."""
        paths = (path for path in folder.rglob("*") if path.is_file())
        return self.add(repo, {str(p.relative_to(folder)): p.read_bytes() for p in paths})

    def commit_of(self, repo: str, revision: str) -> str | None:
        """The commit that a branch or a commit id stands for."""
        if revision in self.models[repo]:
            return revision
        return self.refs[repo].get(revision)

    def blob(self, sha256: str) -> tuple[str, bytes] | None:
        """A file of any model by its content hash."""
        for commits in self.models.values():
            for files in commits.values():
                for name, data in files.items():
                    if hashlib.sha256(data).hexdigest() == sha256:
                        return name, data
        return None

    @property
    def url(self) -> str:
        """The endpoint, for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self._api.server_port}"

    @property
    def cdn_url(self) -> str:
        """Where weights are redirected to."""
        return f"http://127.0.0.1:{self._cdn.server_port}"

    def __enter__(self) -> FakeHub:
        self._api = _Server(self, cdn=False)
        self._cdn = _Server(self, cdn=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        for server in (self._api, self._cdn):
            server.shutdown()
            server.server_close()

    def environment(self, home: Path, **extra: str) -> dict[str, str]:
        """The environment of a process that knows only this Hub; it reads it at import."""
        return {
            **{k: v for k, v in os.environ.items() if not k.startswith("HF_")},
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "NO_PROXY": "127.0.0.1",
            **extra,
        }

    def run(self, code: str, home: Path, *arguments: str, **extra: str) -> Any:
        """Run Python `code` against this Hub; the JSON of its last line of output."""
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env=self.environment(home, **extra),
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if done.returncode:
            raise AssertionError(f"exit {done.returncode}\n{done.stdout}\n{done.stderr}")
        return json.loads(done.stdout.splitlines()[-1])


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: FakeHub, *, cdn: bool) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub
        self.cdn = cdn
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up early is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: requests are recorded instead."""

    def _answer(self) -> None:
        hub, path = self.server.hub, urlsplit(self.path).path
        request = Request(
            method=self.command,
            path=path,
            range=self.headers.get("Range"),
            authorization=self.headers.get("Authorization"),
            cdn=self.server.cdn,
        )
        with hub.lock:
            hub.requests.append(request)
        if hub.status is not None:
            return self._fail(hub.status, None)
        for kind, pattern in _ROUTES:
            if (match := pattern.fullmatch(path)) and (kind == "blob") == self.server.cdn:
                parts = {key: unquote(value) for key, value in match.groupdict("main").items()}
                return self._blob(parts["sha"]) if kind == "blob" else self._repo(kind, parts)
        return self._fail(404, None)

    def _repo(self, kind: str, parts: dict[str, str]) -> None:
        hub, repo = self.server.hub, parts["repo"]
        if repo not in hub.models:
            # What the real Hub tells an anonymous client about a model that is not there.
            return self._fail(401, "RepoNotFound")
        commit = hub.commit_of(repo, parts["rev"])
        if commit is None:
            return self._fail(404, "RevisionNotFound")
        files = hub.models[repo][commit]
        if kind == "info":
            return self._json(
                {
                    "id": repo,
                    "modelId": repo,
                    "sha": commit,
                    "private": False,
                    "tags": [],
                    "downloads": 0,
                    "likes": 0,
                    "siblings": [{"rfilename": name} for name in sorted(files)],
                }
            )
        if kind == "tree":
            return self._json([_tree_entry(name, data) for name, data in sorted(files.items())])
        if repo in hub.gated:
            return self._fail(403, "GatedRepo")
        if parts["file"] not in files:
            return self._fail(404, "EntryNotFound", {"X-Repo-Commit": commit})
        return self._file(parts["file"], files[parts["file"]], commit)

    def _file(self, name: str, data: bytes, commit: str) -> None:
        headers = {"X-Repo-Commit": commit}
        if not name.endswith(".safetensors"):
            return self._body(
                name, data, {**headers, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
            )
        sha256 = hashlib.sha256(data).hexdigest()
        headers["X-Linked-Etag"] = f'"{sha256}"'
        headers["X-Linked-Size"] = str(len(data))
        headers["Location"] = f"{self.server.hub.cdn_url}/cdn/{sha256}"
        return self._send(302, b"", headers)

    def _blob(self, sha256: str) -> None:
        found = self.server.hub.blob(sha256)
        if found is None:
            return self._fail(404, None)
        return self._body(*found, {"ETag": f'"{sha256}"'})

    def _body(self, name: str, data: bytes, headers: dict[str, str]) -> None:
        hub = self.server.hub
        status, begin, end = 200, 0, len(data)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted and not hub.ignore_range:
            begin = int(wanted[1])
            end = min(int(wanted[2]) + 1, end) if wanted[2] else end
            if begin >= len(data):
                return self._fail(416, None, {"Content-Range": f"bytes */{len(data)}"})
            status = 206
            headers = {**headers, "Content-Range": f"bytes {begin}-{end - 1}/{len(data)}"}
        return self._send(status, data[begin:end], {"Accept-Ranges": "bytes", **headers}, name)

    def _send(self, status: int, body: bytes, headers: dict[str, str], name: str = "") -> None:
        hub = self.server.hub
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        with hub.lock:
            stop = hub.cut.pop(name, None)
            part = body[:stop]
            hub.served[name] += len(part)
        self.wfile.write(part)
        if stop is not None:
            self.close_connection = True

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: int, code: str | None, extra: dict[str, str] | None = None) -> None:
        headers = {**(extra or {}), **({"X-Error-Code": code} if code else {})}
        self._send(status, b"{}", {**headers, "X-Error-Message": code or f"status {status}"})


def _tree_entry(name: str, data: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": name, "size": len(data)}
    entry["oid"] = hashlib.sha1(data).hexdigest()
    if name.endswith(".safetensors"):
        oid = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 134}
    return entry


def main() -> None:
    """Serve the models below a folder until interrupted."""
    root = Path(sys.argv[1])
    with FakeHub() as hub:
        for folder in sorted(root.glob("*/*")):
            if folder.is_dir():
                repo = str(folder.relative_to(root))
                print(f"{repo} {hub.add_folder(repo, folder)}")
        print(f"HF_ENDPOINT={hub.url}", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
