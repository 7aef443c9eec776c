"""Models on the Hugging Face Hub: references, cache, downloads, headers without weights."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

from moecc.errors import SourceError
from moecc.tensorfile import HeaderError, TensorInfo, header_length, parse_header

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(.*))?", re.ASCII)
_REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9_][\w./+-]*", re.ASCII)
_HUB_HOSTS = {"huggingface.co", "hf.co", "www.huggingface.co"}
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")
_HEX_SHA256 = re.compile(r"[0-9a-f]{64}")
_FRONT_MATTER = re.compile(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)
_MAX_CARD_BYTES = 1_000_000
_FIRST_RANGE = 128 << 10  # one request is enough for the header of nearly every shard
_TIMEOUT = 10.0
_HEADER_START = 8


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model on the Hub: `repo` is `org/model`, `revision` a branch, tag or commit."""

    repo: str
    revision: str

    def fingerprint(self, commit: str) -> str:
        """A cache key for the files of one commit."""
        return hashlib.sha256(f"hub\0{self.repo}\0{commit}".encode()).hexdigest()

    def offline_hint(self) -> str:
        """What to do where HF_HUB_OFFLINE is set and the cache does not suffice."""
        pinned = "" if self.revision == "main" else f" --revision {self.revision}"
        command = f"hf download {self.repo}{pinned}"
        return f"unset HF_HUB_OFFLINE, or run `{command}` where there is a network"


def locate(reference: str, recipe_folder: Path) -> Path | HubModel:
    """What `reference` stands for: a model on the Hub, or a path that need not exist.

    `org/model` is a path where that exists below `recipe_folder`, else a model.

    Raises:
        SourceError: an empty reference, an unknown user after `~`, a malformed Hub id,
            a URL that is not a model page, a revision that no repository can have.
    """
    if reference.startswith("hf://"):
        return _hub_model(reference.removeprefix("hf://"))
    if reference.startswith(("https://", "http://")):
        return _hub_model(_id_of_url(reference))
    if not reference:
        raise SourceError("the reference is empty")
    try:
        path = recipe_folder / Path(reference).expanduser()
    except RuntimeError as error:  # no such user
        raise SourceError(str(error)) from None
    if path.exists() or not _HUB_ID.fullmatch(reference):
        return path
    return _hub_model(reference)


def _hub_model(text: str) -> HubModel:
    match = _HUB_ID.fullmatch(text)
    if match is None:
        raise SourceError(f"`{text}` is not a Hub id", "write `org/model` or `org/model@revision`")
    revision = "main" if match[2] is None else match[2]
    if not _REVISION.fullmatch(revision):
        raise SourceError(f"`{revision}` is not a branch, tag or commit")
    return HubModel(match[1], revision)


def _id_of_url(url: str) -> str:
    parts = urlsplit(url)
    pieces = [unquote(piece) for piece in parts.path.split("/") if piece]
    if parts.hostname in _HUB_HOSTS and len(pieces) == 2:
        return "/".join(pieces)
    if parts.hostname in _HUB_HOSTS and len(pieces) == 4 and pieces[2] in ("tree", "commit"):
        return f"{pieces[0]}/{pieces[1]}@{pieces[3]}"
    raise SourceError(
        f"`{url}` is not the page of a Hub model", "write `org/model` or `org/model@revision`"
    )


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids every request."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def cached_snapshot(model: HubModel) -> Path:
    """The folder of `model` in the cache, named by its commit; it may lack files.

    Raises:
        SourceError: the cache does not have that revision.
    """
    from huggingface_hub import snapshot_download

    with _hub_errors(model):
        folder = snapshot_download(
            model.repo,
            revision=model.revision,
            allow_patterns=["config.json"],
            local_files_only=True,
        )
    return Path(folder)


def look_up(model: HubModel) -> tuple[str, set[str]]:
    """The commit that the revision stands for now, and the names of its files.

    Call it before `download`: it has a timeout, where the library's downloads retry for
    long without a network.

    Raises:
        SourceError: no such model or revision, no access to it, or no network.
    """
    from huggingface_hub import HfApi

    with _hub_errors(model):
        info = HfApi().model_info(model.repo, revision=model.revision, timeout=_TIMEOUT)
    return str(info.sha), {str(sibling.rfilename) for sibling in info.siblings or ()}


def download(model: HubModel, commit: str, files: Collection[str]) -> Path:
    """Bring `files` of one commit into the cache; returns the folder of the snapshot.

    Raises:
        SourceError: no access, no network, or the download failed.
    """
    from huggingface_hub import snapshot_download

    patterns = [escape(file) for file in sorted(files)]
    with _hub_errors(model):
        return Path(snapshot_download(model.repo, revision=commit, allow_patterns=patterns))


def remember(snapshot: Path, revision: str, commit: str) -> None:
    """Record in the cache what `revision` stands for; a download by commit does not.

    Without it an offline run finds nothing. A read-only cache is left as it is.
    """
    reference = snapshot.parent.parent / "refs" / revision
    if revision == commit:
        return
    with suppress(OSError):
        reference.parent.mkdir(parents=True, exist_ok=True)
        staged = reference.with_name(f"{reference.name}.{os.getpid()}.tmp")
        staged.write_text(commit)
        staged.replace(reference)


def blob_sha256(path: Path) -> str | None:
    """The SHA-256 by which the cache names the file behind `path`; None for other files."""
    # One link only: the blob of a snapshot is named by its SHA-256, but it may itself be a
    # link into the store that all models share, where names are hashes of another kind.
    if not path.is_symlink():
        return None
    blob = Path(os.readlink(path))
    known = blob.parent.name == "blobs" and _HEX_SHA256.fullmatch(blob.name)
    return blob.name if known else None


def card_license(card: Path) -> str | None:
    """The license in the front matter of a model card; None where there is none to read."""
    try:
        with card.open("rb") as handle:
            text = handle.read(_MAX_CARD_BYTES).decode("utf-8-sig", errors="replace")
    except OSError:
        return None
    match = _FRONT_MATTER.match(text)
    try:
        matter = yaml.safe_load(match[1]) if match else None
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a date such as 2025-02-30
        return None
    if not isinstance(matter, dict):
        return None
    value = matter.get("license")
    if value == "other":
        value = matter.get("license_name") or value
    values = value if isinstance(value, list) else [value]
    return ", ".join(v for v in values if isinstance(v, str)) or None


def remote_headers(
    model: HubModel, commit: str, files: Collection[str]
) -> dict[str, dict[str, TensorInfo]]:
    """The headers of shards on the Hub, by ranged requests: no weights are downloaded.

    Raises:
        SourceError: a header is wrong, no access, no network, or no usable answer.
    """
    from huggingface_hub import hf_hub_url

    def fetch(file: str) -> dict[str, TensorInfo]:
        url = hf_hub_url(model.repo, file, revision=commit)
        data, size = _ranged_get(url, 0, _FIRST_RANGE)
        try:
            end = _HEADER_START + header_length(data, size)
            if end > len(data):
                data += _ranged_get(url, len(data), end)[0]
            return parse_header(data[_HEADER_START:end], file, size)
        except HeaderError as error:
            raise SourceError(f"`{file}`: {error}") from None

    with _hub_errors(model), ThreadPoolExecutor(max_workers=8) as pool:
        tasks = {file: pool.submit(fetch, file) for file in files}
        try:
            return {file: task.result() for file, task in tasks.items()}
        except BaseException:
            pool.shutdown(cancel_futures=True)  # not one timeout after another
            raise


def _ranged_get(url: str, begin: int, end: int) -> tuple[bytes, int]:
    """Bytes `begin` to `end` of a file, or to its end, and the size of the file."""
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    headers = {**build_hf_headers(), "Range": f"bytes={begin}-{end - 1}"}
    headers["Accept-Encoding"] = "identity"
    data = bytearray()
    with http_stream_backoff(
        "GET", url, headers=headers, timeout=_TIMEOUT, max_retries=2
    ) as response:
        hf_raise_for_status(response)
        # A server may ignore the range and send the whole file: take what is needed of it.
        ranged = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        size = ranged[2] if ranged else response.headers.get("Content-Length", "")
        skip = begin - int(ranged[1]) if ranged else begin
        if not size.isdecimal() or skip < 0:
            raise SourceError(f"the server gave no usable range of `{url}`")
        need = skip + min(end, int(size)) - begin
        for chunk in response.iter_bytes():
            data += chunk
            if len(data) >= need:
                break
    return bytes(data[skip:need]), int(size)


@contextmanager
def _hub_errors(model: HubModel) -> Iterator[None]:
    """Turn whatever the library raises into a SourceError with a hint."""
    from huggingface_hub import errors

    repo = model.repo
    try:
        yield
    except SourceError:
        raise
    except errors.GatedRepoError as error:
        hint = f"ask for access on https://huggingface.co/{repo}, then run `hf auth login`"
        raise SourceError(f"`{repo}` is gated", hint) from error
    except errors.RevisionNotFoundError as error:
        hint = f"its branches and commits are listed on https://huggingface.co/{repo}"
        raise SourceError(f"`{repo}` has no revision `{model.revision}`", hint) from error
    except errors.RepositoryNotFoundError as error:
        hint = "check the spelling; for a private model run `hf auth login`"
        raise SourceError(f"the Hub has no model `{repo}`, or it is private", hint) from error
    except errors.HFValidationError as error:
        raise SourceError(f"`{repo}` is not a Hub id") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        hint = "run `hf auth login`" if status in (401, 403) else "try again later"
        raise SourceError(f"the Hub answered {status} for `{repo}`", hint) from error
    except Exception as error:
        # The rest depends on the HTTP library, which changed with every major version.
        lost = not isinstance(error, OSError) or isinstance(error, errors.EntryNotFoundError)
        if is_offline():
            message = f"`{repo}` at `{model.revision}` is not in the Hub cache"
            raise SourceError(
                f"{message}, and HF_HUB_OFFLINE is set", model.offline_hint()
            ) from error
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        if lost:
            hint = "check the network; to use only the Hub cache set HF_HUB_OFFLINE=1 after"
            hint += f" `hf download {repo}`"
            raise SourceError(f"cannot reach the Hub for `{repo}`: {reason}", hint) from error
        hint = "run again: finished files are kept"
        raise SourceError(f"download of `{repo}` failed: {reason}", hint) from error
