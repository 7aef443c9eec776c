"""Where a variant's checkpoint comes from: a local folder, or a model on the Hub."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from moecc import hub
from moecc.errors import SourceError
from moecc.files import sha256_file
from moecc.tensorfile import HeaderError, TensorInfo, parse_object, pread_full, read_header

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth")
_SIDE_FILES = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "chat_template.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("*.model", "*.jinja", "LICENSE*", "LICENCE*", "NOTICE*"),
)
_NOT_SIDE_FILES = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.pkl", "*.index.json"),
    *("*.py", "*.pyc", "README*", "*.incomplete", "*.lock"),
)
_TEMPLATES = "additional_chat_templates"
_LFS_POINTER = b"version https://git-lfs"
_SHARD_NAME = re.compile(r"[^/\\\0]+\.safetensors")
_MAX_CONFIG_BYTES = 10_000_000
_MAX_INDEX_BYTES = 100_000_000
_MAX_OPEN_FILES = 64


@dataclass(frozen=True, slots=True)
class Source:
    """One variant's checkpoint, checked as far as headers go.

    Attributes:
        name: the variant.
        reference: as the recipe writes it.
        folder: the folder with the weights; None where only headers were read.
        commit: the resolved commit of a Hub model.
        license: from the front matter of the model card.
        config: the parsed config.json.
        tensors: every tensor, sorted by name.
        side_files: what a variant keeps besides weights, relative to the folder, sorted.
        fingerprint: changes whenever the checkpoint may have changed; a cache key.
    """

    name: str
    reference: str
    folder: Path | None
    commit: str | None
    license: str | None
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    side_files: tuple[str, ...]
    fingerprint: str

    def file(self, name: str) -> Path:
        """The path of a weight or side file; SourceError where nothing was downloaded."""
        if self.folder is None:
            raise SourceError(
                f"the files of variant `{self.name}` were not downloaded: only headers were read"
            )
        return self.folder / name

    def content_hashes(self) -> dict[str, str]:
        """The SHA-256 of every weight file; from the Hub cache where it knows them.

        Raises:
            SourceError: nothing was downloaded, or a file cannot be read.
        """
        files = sorted({tensor.file for tensor in self.tensors.values()})
        return {file: _content_hash(self.file(file)) for file in files}


class Reader:
    """Reads tensors of one source; any number of threads may share it.

    Opens files when they are first read and keeps up to 64 of them open: a recipe has
    several readers, a checkpoint has hundreds of shards, and the usual limit is 1024.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._open: dict[str, tuple[int, int]] = {}  # file -> (fd, users), oldest use first
        self._closed = False

    def read(self, info: TensorInfo, start: int, nbytes: int) -> memoryview:
        """`nbytes` of the tensor `info` from byte `start` of it.

        Raises:
            ValueError: the range leaves the tensor, or the reader is closed.
            SourceError: the file cannot be read, or has become shorter.
        """
        if start < 0 or nbytes < 0 or start + nbytes > info.nbytes:
            raise ValueError(
                f"bytes {start} to {start + nbytes} of tensor `{info.name}` of {info.nbytes} bytes"
            )
        try:
            with self._descriptor(info.file) as fd:
                return pread_full(fd, nbytes, info.offset + start)
        except EOFError as error:
            raise self._failed(info, f"{error}; it changed after its header was read") from None
        except OSError as error:
            raise self._failed(info, str(error.strerror)) from error

    def close(self) -> None:
        """Close the files; a read that is still running closes its own when it ends."""
        with self._lock:
            self._closed = True
            self._evict(0)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _failed(self, info: TensorInfo, reason: str) -> SourceError:
        where = f"tensor `{info.name}` of variant `{self._source.name}`"
        return SourceError(f"cannot read {where} from `{info.file}`: {reason}")

    @contextmanager
    def _descriptor(self, file: str) -> Iterator[int]:
        with self._lock:
            if self._closed:
                raise ValueError("read from a closed Reader")
            fd, users = self._open.pop(file, (-1, 0))
            if fd < 0:
                self._evict(_MAX_OPEN_FILES - 1)
                fd = os.open(self._source.file(file), os.O_RDONLY | os.O_CLOEXEC)
            self._open[file] = (fd, users + 1)
        try:
            yield fd
        finally:
            with self._lock:
                self._open[file] = (fd, self._open[file][1] - 1)
                self._evict(0 if self._closed else _MAX_OPEN_FILES)

    def _evict(self, keep: int) -> None:
        idle = [file for file, (_, users) in self._open.items() if users == 0]
        for file in idle[: max(len(self._open) - keep, 0)]:
            os.close(self._open.pop(file)[0])


def resolve(name: str, reference: str, recipe_folder: Path, *, weights: bool = True) -> Source:
    """Find and check the checkpoint of variant `name`; download it if it is on the Hub.

    Args:
        reference: `hf://org/model[@rev]`, `org/model[@rev]`, a pasted URL of a model page,
            or a folder, relative to `recipe_folder`.
        weights: False reads only the headers of a Hub model that is not in the cache.

    Raises:
        SourceError: it cannot be found, downloaded, read or trusted.
    """
    label = f"source `{reference}` of variant `{name}`"
    with _naming(label):
        place = hub.locate(reference, recipe_folder)
        if isinstance(place, hub.HubModel):
            return _from_hub(name, reference, place, weights)
    if not place.is_dir():
        hint = f"looked for `{place}`; a model on the Hub is written `org/model`"
        raise SourceError(f"{label} is not a folder", hint)
    with _naming(label):
        return _from_folder(name, reference, place)


@contextmanager
def _naming(label: str) -> Iterator[None]:
    """Put the source in front of every error; name the file that the system refused."""
    try:
        yield
    except SourceError as error:
        raise SourceError(f"{label}: {error.message}", error.hint) from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise SourceError(f"{label}: cannot read `{error.filename}`: {reason}") from error


def _from_hub(name: str, reference: str, model: hub.HubModel, weights: bool) -> Source:
    if hub.is_offline():
        return _from_cache(name, reference, model)
    commit, names = hub.look_up(model)
    small = {"config.json", "README.md", *(() if _SINGLE in names else (_INDEX,))}
    # Side files before weights: a snapshot that has its weights then has everything.
    wanted = {*small, *_side_files(names)} if weights else small
    folder = hub.download(model, commit, wanted & names)
    _, config = _read_config(folder, names)
    shards = _shards(folder, names)
    if weights:
        hub.download(model, commit, shards)
    if weights or all((folder / file).is_file() for file in (*_side_files(names), *shards)):
        hub.remember(folder, model.revision, commit)
        return _from_folder(name, reference, folder, model)
    return Source(
        name=name,
        reference=reference,
        folder=None,
        commit=commit,
        license=hub.card_license(folder / "README.md"),
        config=config,
        tensors=_merge(shards, hub.remote_headers(model, commit, shards)),
        side_files=_side_files(names),
        fingerprint=model.fingerprint(commit),
    )


def _from_cache(name: str, reference: str, model: hub.HubModel) -> Source:
    folder = hub.cached_snapshot(model)
    try:
        return _from_folder(name, reference, folder, model)
    except SourceError as error:
        message = f"the copy in the Hub cache cannot be used: {error.message}"
        raise SourceError(message, model.offline_hint()) from error


def _from_folder(
    name: str, reference: str, folder: Path, model: hub.HubModel | None = None
) -> Source:
    """The source in `folder`; `model` where that is a snapshot in the Hub cache."""
    names = {entry.name for entry in folder.iterdir() if entry.is_file()}
    names |= {f"{_TEMPLATES}/{path.name}" for path in (folder / _TEMPLATES).glob("*.jinja")}
    raw_config, config = _read_config(folder, names)
    digest = hashlib.sha256(b"folder\0" + hashlib.sha256(raw_config).digest())
    # Models unpacked from one archive have equal sizes, times and headers: the place and the time
    # of the last change of the inode, which nobody can set, tell them apart.
    digest.update(os.fsencode(folder.resolve()) + b"\0")
    shards = _shards(folder, names)
    headers: dict[str, dict[str, TensorInfo]] = {}
    for file in shards:
        path = folder / file
        status = path.stat()
        headers[file], raw = _header(path)
        header_hash = hashlib.sha256(raw).hexdigest()
        times = f"{status.st_mtime_ns}\0{status.st_ctime_ns}\0{status.st_ino}"
        digest.update(f"{file}\0{status.st_size}\0{times}\0{header_hash}\0".encode())
    return Source(
        name=name,
        reference=reference,
        folder=folder,
        commit=folder.name if model else None,
        license=hub.card_license(folder / "README.md"),
        config=config,
        tensors=_merge(shards, headers),
        side_files=_side_files(names),
        fingerprint=model.fingerprint(folder.name) if model else digest.hexdigest(),
    )


def _read_config(folder: Path, names: Collection[str]) -> tuple[bytes, dict[str, Any]]:
    if "config.json" not in names:
        raise SourceError(
            "`config.json` is missing",
            "a source is what `save_pretrained` writes: config and weights",
        )
    return _read_object(folder / "config.json", _MAX_CONFIG_BYTES)


def _read_object(path: Path, limit: int) -> tuple[bytes, dict[str, Any]]:
    size = path.stat().st_size
    if size > limit:
        raise SourceError(f"`{path.name}` has {size} bytes, over the limit of {limit}")
    raw = path.read_bytes()
    _refuse_lfs_pointer(path.name, raw)
    try:
        return raw, parse_object(raw)
    except ValueError as error:
        raise SourceError(f"`{path.name}` is {error}") from None


def _refuse_lfs_pointer(file: str, start: bytes) -> None:
    if start.startswith(_LFS_POINTER):
        raise SourceError(
            f"`{file}` is a Git LFS pointer, not the file itself",
            "run `git lfs pull` in the folder",
        )


def _header(path: Path) -> tuple[dict[str, TensorInfo], bytes]:
    """What `read_header` gives; its errors become a SourceError that names the file."""
    try:
        return read_header(path)
    except (HeaderError, EOFError) as error:  # EOFError: it was cut while its header was read
        if path.is_file():
            with path.open("rb") as handle:
                _refuse_lfs_pointer(path.name, handle.read(len(_LFS_POINTER)))
        raise SourceError(f"`{path.name}`: {error}") from None


def _shards(folder: Path, names: Collection[str]) -> Mapping[str, set[str] | None]:
    """The weight files among `names`, each with the tensors that the index puts there.

    None stands for "all": a single file has no index.
    """
    if _SINGLE in names:
        return {_SINGLE: None}
    if _INDEX not in names:
        raise _no_weights(names)
    weight_map = _read_object(folder / _INDEX, _MAX_INDEX_BYTES)[1].get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"`{_INDEX}` has no `weight_map` of tensors to shards")
    mapped: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not _SHARD_NAME.fullmatch(file):
            raise SourceError(
                f"`{_INDEX}` maps tensor `{tensor}` to {file!r:.100}, not a bare file name"
            )
        mapped.setdefault(file, set()).add(tensor)
    for file in sorted(mapped.keys() - names):
        raise SourceError(
            f"shard `{file}` named by the index is missing",
            "finish the download or copy, then run again",
        )
    return dict(sorted(mapped.items()))


def _no_weights(names: Collection[str]) -> SourceError:
    pickles = sorted(n for n in names if "/" not in n and _matches(n, _PICKLES))
    if not pickles:
        return SourceError(
            "no safetensors weights", f"expected `{_SINGLE}`, or `{_INDEX}` and the shards it names"
        )
    return SourceError(
        f"`{pickles[0]}` is a pickle, which can run code when it is opened",
        "convert it: load it with transformers where you trust it, then `save_pretrained`"
        " writes safetensors",
    )


def _merge(
    shards: Mapping[str, set[str] | None], headers: Mapping[str, dict[str, TensorInfo]]
) -> dict[str, TensorInfo]:
    """All tensors, sorted by name, where index and shards agree."""
    tensors: dict[str, TensorInfo] = {}
    for file, mapped in shards.items():
        found = headers[file]
        for tensor in sorted((mapped or set()) - found.keys()):
            raise SourceError(
                f"tensor `{tensor}` is not in shard `{file}`, where the index puts it"
            )
        for tensor in sorted(found.keys() - mapped) if mapped is not None else ():
            raise SourceError(
                f"tensor `{tensor}` of shard `{file}` is not mapped there by the index"
            )
        tensors.update(found)
    if not tensors:
        raise SourceError(f"`{_SINGLE}` holds no tensors")
    return dict(sorted(tensors.items()))


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _side_files(names: Collection[str]) -> tuple[str, ...]:
    return tuple(sorted(name for name in names if _is_side_file(name)))


def _is_side_file(name: str) -> bool:
    folder, _, bare = name.rpartition("/")
    if folder:
        return folder == _TEMPLATES and bare.endswith(".jinja")
    return _matches(name, _SIDE_FILES) and not _matches(name, _NOT_SIDE_FILES)


def _content_hash(path: Path) -> str:
    try:
        return hub.blob_sha256(path) or sha256_file(path)
    except OSError as error:
        raise SourceError(f"cannot read `{path}`: {error.strerror}") from error
