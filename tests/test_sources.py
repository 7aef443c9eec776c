"""Sources: local folders, and the Hub as huggingface_hub sees the local fake."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fake_hub import FakeHub

from moecc import sources
from moecc.errors import SourceError
from moecc.hub import HubModel, locate
from moecc.sources import Reader, Source, resolve
from moecc.tensorfile import build_header

MODELS = Path(__file__).parent.parent / "examples/models"
CONFIG = b'{"model_type": "mixtral"}'
CARD = b"---\nlicense: apache-2.0\n---\n# Model\n"


def shard(*names: str, fill: int = 0) -> bytes:
    """A safetensors file in which every named tensor is 8 bytes of `fill`."""
    header, infos = build_header([(name, "U8", (8,)) for name in names])
    return header + bytes([fill]) * (8 * len(infos))


def index(**weight_map: object) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": weight_map}).encode()


SHARD_1, SHARD_2 = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
SINGLE: dict[str, bytes] = {"config.json": CONFIG, "model.safetensors": shard("b", "a")}
SHARDED: dict[str, bytes] = {
    "config.json": CONFIG,
    INDEX: index(a=SHARD_1, b=SHARD_2, c=SHARD_2),
    SHARD_1: shard("a", fill=1),
    SHARD_2: shard("b", "c", fill=2),
}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def refusal(folder: Path, files: dict[str, bytes]) -> SourceError:
    write(folder / "m", files)
    with pytest.raises(SourceError) as caught:
        resolve("v", "./m", folder)
    prefix = "source `./m` of variant `v`: "
    assert caught.value.message.startswith(prefix)
    caught.value.message = caught.value.message.removeprefix(prefix)
    return caught.value


# ---- local folders


def test_single_file(tmp_path: Path) -> None:
    source = resolve("v", "m", write(tmp_path / "m", SINGLE).parent)
    assert (source.name, source.reference, source.folder) == ("v", "m", tmp_path / "m")
    assert (source.commit, source.license) == (None, None)
    assert source.config == {"model_type": "mixtral"}
    assert list(source.tensors) == ["a", "b"]
    assert source.side_files == ("config.json",)
    assert source.content_hashes() == {
        "model.safetensors": hashlib.sha256(SINGLE["model.safetensors"]).hexdigest()
    }


def test_shards(tmp_path: Path) -> None:
    source = resolve("v", str(write(tmp_path, SHARDED)), Path("/nowhere"))
    assert {n: t.file for n, t in source.tensors.items()} == {
        "a": SHARD_1,
        "b": SHARD_2,
        "c": SHARD_2,
    }
    assert list(source.content_hashes()) == [SHARD_1, SHARD_2]


@pytest.mark.parametrize("name", ["nano-base", "nano-chat", "nano-math", "nano-python"])
def test_real_checkpoints(name: str) -> None:
    source = resolve("v", f"./{name}", MODELS)
    assert len(source.tensors) == 126
    assert source.config["num_local_experts"] == 8
    assert source.side_files == (
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    )


def test_side_files_are_what_a_variant_keeps(tmp_path: Path) -> None:
    keep = {
        *("LICENSE", "LICENSE.txt", "added_tokens.json", "chat_template.jinja", "merges.txt"),
        *("chat_template.json", "config.json", "generation_config.json", "vocab.json"),
        *("preprocessor_config.json", "special_tokens_map.json", "tokenizer.json"),
        *("tokenizer.model", "tokenizer_config.json", "additional_chat_templates/tools.jinja"),
    }
    drop = {
        *("README.md", "modeling_x.py", "tokenizer_x.py", "pytorch_model.bin", INDEX, "x.gguf"),
        *("tokenizer.safetensors", "onnx/tokenizer.json", ".gitattributes", "trainer_state.json"),
    }
    files = dict.fromkeys(keep | drop, b"x")
    assert resolve("v", "./", write(tmp_path, files | SINGLE)).side_files == tuple(sorted(keep))


BAD_FOLDERS: dict[str, tuple[dict[str, bytes | None], str]] = {
    "no-config": ({"config.json": None}, "`config.json` is missing"),
    "config-text": ({"config.json": b"x"}, "`config.json` is not JSON: Expecting value"),
    "config-list": ({"config.json": b"[]"}, "`config.json` is not a JSON object but a list"),
    "config-twice": ({"config.json": b'{"a":1,"a":2}'}, "`config.json` is ambiguous: key `a`"),
    "config-size": (
        {"config.json": b" " * 10_000_001},
        "`config.json` has 10000001 bytes, over the limit of 10000000",
    ),
    "map": ({INDEX: b"{}"}, f"`{INDEX}` has no `weight_map` of tensors to shards"),
    "map-empty": ({INDEX: index()}, f"`{INDEX}` has no `weight_map` of tensors to shards"),
    "up": (
        {INDEX: index(a="../x.safetensors")},
        f"`{INDEX}` maps tensor `a` to '../x.safetensors', not a bare file name",
    ),
    "absolute": (
        {INDEX: index(a="/x.safetensors")},
        f"`{INDEX}` maps tensor `a` to '/x.safetensors', not a bare file name",
    ),
    "backslash": (
        {INDEX: index(a="c\\x.safetensors")},
        f"`{INDEX}` maps tensor `a` to 'c\\\\x.safetensors', not a bare file name",
    ),
    "number": ({INDEX: index(a=7)}, f"`{INDEX}` maps tensor `a` to 7, not a bare file name"),
    "missing": ({SHARD_2: None}, f"shard `{SHARD_2}` named by the index is missing"),
    "absent": (
        {SHARD_2: shard("b")},
        f"tensor `c` is not in shard `{SHARD_2}`, where the index puts it",
    ),
    "extra": (
        {SHARD_1: shard("a", "b")},
        f"tensor `b` of shard `{SHARD_1}` is not mapped there by the index",
    ),
    "header": (
        {SHARD_1: shard("a")[:-1]},
        f"`{SHARD_1}`: truncated: header says 136 bytes, file has 135",
    ),
    "no-tensors": ({"model.safetensors": shard()}, "`model.safetensors` holds no tensors"),
    "none": ({INDEX: None}, "no safetensors weights"),
}


@pytest.mark.parametrize(("change", "message"), BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_bad_folders(change: dict[str, bytes | None], message: str, tmp_path: Path) -> None:
    changed = {**SHARDED, **change}
    error = refusal(tmp_path, {k: v for k, v in changed.items() if v is not None})
    assert error.message.startswith(message)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_refused_by_name(name: str, tmp_path: Path) -> None:
    error = refusal(tmp_path, {"config.json": CONFIG, name: b"\x80"})
    assert error.message == f"`{name}` is a pickle, which can run code when it is opened"
    assert error.hint is not None
    assert "safetensors" in error.hint


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", INDEX])
def test_lfs_pointers(name: str, tmp_path: Path) -> None:
    files = {**(SHARDED if name == INDEX else SINGLE), name: b"version https://git-lfs.github.com"}
    error = refusal(tmp_path, files)
    assert error.message == f"`{name}` is a Git LFS pointer, not the file itself"
    assert error.hint == "run `git lfs pull` in the folder"


def test_fingerprint_follows_files_and_config(tmp_path: Path) -> None:
    def fingerprint() -> str:
        return resolve("v", "./m", tmp_path).fingerprint

    write(tmp_path / "m", SINGLE)
    first = fingerprint()
    assert first == fingerprint()
    assert len(first) == 64
    write(tmp_path / "m", {"tokenizer.json": b"{}"})
    assert fingerprint() == first
    write(tmp_path / "m", {"config.json": CONFIG + b" "})
    second = fingerprint()
    os.utime(tmp_path / "m/model.safetensors", ns=(1, 1))
    third = fingerprint()
    write(tmp_path / "m", {"model.safetensors": shard("c", "a")})
    os.utime(tmp_path / "m/model.safetensors", ns=(1, 1))
    assert len({first, second, third, fingerprint()}) == 4


@pytest.mark.parametrize(
    ("card", "license_"),
    [
        (CARD, "apache-2.0"),
        (b"---\r\nlicense: mit\r\n---\r\n", "mit"),
        (b"---\nlicense: other\nlicense_name: llama4\n---\n", "llama4"),
        (b"---\nlicense: [mit, apache-2.0]\n---\n", "mit, apache-2.0"),
        (b"---\nlicense: {\n---\n", None),
        (b"---\nd: 2025-02-30\n---\n", None),
        (b"---\n- a\n---\n", None),
        (b"# No front matter\nlicense: mit\n", None),
    ],
)
def test_license(card: bytes, license_: str | None, tmp_path: Path) -> None:
    write(tmp_path, SINGLE | {"README.md": card})
    assert resolve("v", str(tmp_path), tmp_path).license == license_


# ---- references


@pytest.mark.parametrize(
    ("reference", "repo", "revision"),
    [
        ("org/model", "org/model", "main"),
        ("org/model@v1.0", "org/model", "v1.0"),
        ("hf://org/model", "org/model", "main"),
        ("hf://org/model@refs/pr/3", "org/model", "refs/pr/3"),
        ("https://huggingface.co/org/model", "org/model", "main"),
        ("https://huggingface.co/org/model/", "org/model", "main"),
        ("https://huggingface.co/org/model/tree/v1?x=1", "org/model", "v1"),
        ("https://hf.co/org/model/tree/refs%2Fpr%2F3", "org/model", "refs/pr/3"),
    ],
)
def test_hub_references(reference: str, repo: str, revision: str, tmp_path: Path) -> None:
    assert locate(reference, tmp_path) == HubModel(repo, revision)


def test_folder_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "org/model").mkdir(parents=True)
    for reference, path in {
        "org/model": tmp_path / "org/model",
        "./org/other": tmp_path / "org/other",
        "../org/other": tmp_path / "../org/other",
        "~/m": tmp_path / "home/m",
        "/a/b": Path("/a/b"),
        "single": tmp_path / "single",
        "a/b/c": tmp_path / "a/b/c",
    }.items():
        assert locate(reference, tmp_path) == path


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("./gone", "source `./gone` of variant `v` is not a folder"),
        ("gone", "source `gone` of variant `v` is not a folder"),
        ("", "source `` of variant `v`: the reference is empty"),
        ("hf://a/b/c", "source `hf://a/b/c` of variant `v`: `a/b/c` is not a Hub id"),
        ("a/b@", "source `a/b@` of variant `v`: `` is not a branch, tag or commit"),
        ("a/b@../x", "source `a/b@../x` of variant `v`: `../x` is not a branch, tag or commit"),
        (
            "https://example.com/a/b",
            "source `https://example.com/a/b` of variant `v`: `https://example.com/a/b` is not"
            " the page of a Hub model",
        ),
    ],
)
def test_bad_references(reference: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError) as caught:
        resolve("v", reference, tmp_path)
    assert caught.value.message == message


# ---- Reader


def numbered(folder: Path, count: int) -> Source:
    """A source of `count` shards; shard i holds one tensor of 4096 bytes of value i."""
    files = {"config.json": CONFIG}
    for i in range(count):
        header, _ = build_header([(f"t{i}", "U8", (4096,))])
        files[f"s{i}.safetensors"] = header + bytes([i]) * 4096
    files[INDEX] = index(**{f"t{i}": f"s{i}.safetensors" for i in range(count)})
    return resolve("v", str(write(folder, files)), folder)


def test_reader_reads_and_checks_bounds(tmp_path: Path) -> None:
    source = resolve("v", str(write(tmp_path, SHARDED)), tmp_path)
    info = source.tensors["c"]
    with Reader(source) as reader:
        assert reader.read(info, 0, 8) == bytes([2]) * 8
        assert reader.read(info, 7, 1) == b"\x02"
        assert reader.read(info, 8, 0) == b""
        for start, nbytes in [(0, 9), (8, 1), (-1, 2), (0, -1)]:
            with pytest.raises(ValueError, match=r"of tensor `c` of 8 bytes"):
                reader.read(info, start, nbytes)
    with pytest.raises(ValueError, match="closed Reader"):
        reader.read(info, 0, 1)


def test_reader_reports_a_file_that_changed(tmp_path: Path) -> None:
    source = resolve("v", str(write(tmp_path, SINGLE)), tmp_path)
    os.truncate(tmp_path / "model.safetensors", 100)
    info = source.tensors["a"]
    with Reader(source) as reader, pytest.raises(SourceError) as caught:
        reader.read(info, 0, 8)
    assert caught.value.message.startswith(
        "cannot read tensor `a` of variant `v` from `model.safetensors`: file ends at byte"
    )
    (tmp_path / "model.safetensors").unlink()
    with Reader(source) as reader, pytest.raises(SourceError, match="No such file"):
        reader.read(info, 0, 8)


def test_reader_is_thread_safe_and_keeps_few_files_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_MAX_OPEN_FILES", 3)
    source = numbered(tmp_path, 12)
    before = len(os.listdir("/proc/self/fd"))
    barrier = threading.Barrier(4)

    def work(seed: int) -> None:
        barrier.wait()
        for step in range(200):
            i = (seed * 7 + step * 5) % 12
            start = (seed * 131 + step * 17) % 4000
            assert reader.read(source.tensors[f"t{i}"], start, 96) == bytes([i]) * 96

    with Reader(source) as reader:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
        assert len(reader._open) == 3
        assert len(os.listdir("/proc/self/fd")) <= before + 3
    assert len(os.listdir("/proc/self/fd")) == before


# ---- the Hub

Env = dict[str, str]
OFFLINE: Env = {"HF_HUB_OFFLINE": "1"}

RESOLVE = """
import json, sys, time
from pathlib import Path
from moecc.errors import SourceError
from moecc.sources import resolve
begin = time.monotonic()
try:
    s = resolve("v", sys.argv[1], Path("/nowhere"), weights=sys.argv[2] == "weights")
    result = {
        "folder": s.folder and str(s.folder), "commit": s.commit, "license": s.license,
        "config": s.config, "side_files": s.side_files, "fingerprint": s.fingerprint,
        "tensors": {
            n: [t.dtype, t.shape, t.file, t.offset, t.nbytes] for n, t in s.tensors.items()
        },
        "hashes": s.folder and s.content_hashes(),
    }
except SourceError as error:
    result = {"message": error.message, "hint": error.hint}
result["modules"] = [m for m in ("torch", "transformers") if m in sys.modules]
result["seconds"] = time.monotonic() - begin
print(json.dumps(result))
"""

HUB_FILES = {
    **SHARDED,
    "README.md": CARD,
    "LICENSE": b"text",
    "tokenizer.json": b"{}",
    "modeling_x.py": b"raise SystemExit",
    "pytorch_model.bin": b"\x80",
    "original/consolidated.safetensors": shard("z"),
}


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as fake:
        yield fake


def get(
    hub: FakeHub, home: Path, reference: str, *, weights: bool = True, env: Env | None = None
) -> Any:
    hub.requests.clear()
    hub.served.clear()
    result = hub.run(RESOLVE, home, reference, "weights" if weights else "headers", **(env or {}))
    assert result["modules"] == []
    return result


def test_download_then_cache_then_offline(hub: FakeHub, tmp_path: Path) -> None:
    commit = hub.add("org/model", HUB_FILES)
    first = get(hub, tmp_path, "org/model")
    assert first["commit"] == commit
    assert first["license"] == "apache-2.0"
    assert first["config"] == {"model_type": "mixtral"}
    assert first["side_files"] == ["LICENSE", "config.json", "tokenizer.json"]
    assert {n: t[2] for n, t in first["tensors"].items()} == {
        "a": SHARD_1,
        "b": SHARD_2,
        "c": SHARD_2,
    }
    assert first["hashes"] == {
        name: hashlib.sha256(HUB_FILES[name]).hexdigest() for name in (SHARD_1, SHARD_2)
    }
    served = {name for name, count in hub.served.items() if name and count}
    assert served == {
        *("LICENSE", "README.md", "config.json", "tokenizer.json", INDEX, SHARD_1, SHARD_2)
    }
    del first["seconds"]
    for env in ({}, OFFLINE):
        for weights in (True, False):
            again = get(hub, tmp_path, "org/model", weights=weights, env=env)
            del again["seconds"]
            assert again == first
            assert not any("/resolve/" in request.path for request in hub.requests)
    assert hub.requests == []


def test_content_hashes_come_from_the_cache(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("org/model", SINGLE)
    folder = Path(get(hub, tmp_path, "org/model")["folder"])
    link = folder / "model.safetensors"
    assert link.is_symlink()
    os.truncate(link.resolve(), os.stat(link).st_size)
    source = resolve("v", str(folder), tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sources, "sha256_file", lambda _: pytest.fail("read a blob whose hash is known")
        )
        assert source.content_hashes() == {
            "model.safetensors": hashlib.sha256(SINGLE["model.safetensors"]).hexdigest()
        }


def test_a_blob_in_the_shared_store_keeps_its_own_name(tmp_path: Path) -> None:
    """huggingface_hub 2 may link blobs/<sha256> on to a file named by another hash."""
    real = write(tmp_path / "store", {"f" * 64: SINGLE["model.safetensors"]}) / ("f" * 64)
    folder = write(tmp_path / "snapshots/x", {"config.json": CONFIG})
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / ("a" * 64)).symlink_to(real)
    (folder / "model.safetensors").symlink_to(f"../../blobs/{'a' * 64}")
    hashes = resolve("v", str(folder), tmp_path).content_hashes()
    assert hashes == {"model.safetensors": "a" * 64}


def test_dry_run_downloads_no_weights(hub: FakeHub, tmp_path: Path) -> None:
    commit = hub.add_folder("org/nano", MODELS / "nano-base")
    dry = get(hub, tmp_path, "org/nano", weights=False)
    assert dry["folder"] is None
    assert dry["commit"] == commit
    assert hub.served["model.safetensors"] <= 128 * 1024
    assert hub.served["tokenizer.json"] == 0
    full = get(hub, tmp_path, "org/nano")
    assert full["folder"] is not None
    for key in ("commit", "license", "config", "side_files", "fingerprint", "tensors"):
        assert dry[key] == full[key]
    cached = get(hub, tmp_path, "org/nano", weights=False)
    assert cached["folder"] == full["folder"]
    assert hub.served["model.safetensors"] == 0


@pytest.mark.parametrize("ignore_range", [False, True])
def test_dry_run_reads_a_header_longer_than_the_first_range(
    hub: FakeHub, tmp_path: Path, ignore_range: bool
) -> None:
    names = [f"{'x' * 200}{i}" for i in range(1000)]
    data = shard(*names)
    hub.add("org/model", {**SINGLE, "model.safetensors": data})
    hub.ignore_range = ignore_range
    dry = get(hub, tmp_path, "org/model", weights=False)
    assert len(dry["tensors"]) == 1000
    if not ignore_range:
        header = len(data) - 8 * 1000
        assert header > 128 * 1024
        assert hub.served["model.safetensors"] == header


def test_dry_run_checks_remote_headers(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("org/cut", {**SHARDED, SHARD_1: SHARDED[SHARD_1][:-1]})
    assert get(hub, tmp_path, "org/cut", weights=False)["message"] == (
        f"source `org/cut` of variant `v`: `{SHARD_1}`: truncated: header says 136 bytes,"
        " file has 135"
    )
    hub.add("org/extra", {**SHARDED, SHARD_1: shard("a", "b")})
    assert get(hub, tmp_path, "org/extra", weights=False)["message"] == (
        f"source `org/extra` of variant `v`: tensor `b` of shard `{SHARD_1}` is not mapped there"
        " by the index"
    )


def test_weights_are_resumed_after_a_cut_connection(hub: FakeHub, tmp_path: Path) -> None:
    chunk = 10 << 20  # what the library writes at a time
    header, _ = build_header([("a", "U8", (2 * chunk,))])
    data = header + bytes(range(256)) * (2 * chunk // 256)
    hub.add("org/model", {**SINGLE, "model.safetensors": data})
    hub.cut["model.safetensors"] = chunk + 5000
    result = get(hub, tmp_path, "org/model")
    requests, served = list(hub.requests), hub.served["model.safetensors"]
    if "message" in result:  # huggingface_hub 1.0 resumes in the next run only
        assert "peer closed connection" in result["message"]
        result = get(hub, tmp_path, "org/model")
        requests += hub.requests
        served += hub.served["model.safetensors"]
    assert (Path(result["folder"]) / "model.safetensors").read_bytes() == data
    ranges = [r.range for r in requests if r.cdn and r.method == "GET"]
    assert ranges == [None, f"bytes={chunk}-"]
    assert served == len(data) + 5000


def test_revisions(hub: FakeHub, tmp_path: Path) -> None:
    old = hub.add("org/model", {**SINGLE, "config.json": b'{"old": 1}'}, "v1")
    new = hub.add("org/model", SINGLE)
    for reference, commit in [
        ("org/model@v1", old),
        (f"org/model@{old}", old),
        ("https://huggingface.co/org/model/tree/v1", old),
        ("hf://org/model", new),
    ]:
        assert get(hub, tmp_path, reference)["commit"] == commit
    assert get(hub, tmp_path, "org/model@v1", env=OFFLINE)["commit"] == old
    assert get(hub, tmp_path, f"org/model@{old}", env=OFFLINE)["commit"] == old


def test_the_token_stays_with_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("org/model", SINGLE)
    for weights in (False, True):
        get(hub, tmp_path, "org/model", weights=weights, env={"HF_TOKEN": "hf_secret"})
        assert {r.authorization for r in hub.requests if not r.cdn} == {"Bearer hf_secret"}
        assert {r.authorization for r in hub.requests if r.cdn} == {None}


def hub_refusal(
    hub: FakeHub, home: Path, reference: str, env: Env | None = None
) -> tuple[str, str]:
    result = get(hub, home, reference, env=env)
    assert result["seconds"] < 10
    prefix = f"source `{reference}` of variant `v`: "
    assert result["message"].startswith(prefix)
    return result["message"].removeprefix(prefix), result["hint"]


def test_hub_errors_have_a_next_step(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("org/model", SINGLE)
    hub.add("org/gated", SINGLE)
    hub.gated.add("org/gated")
    hub.add("org/pickle", {"config.json": CONFIG, "pytorch_model.bin": b"\x80" * 5000})
    assert hub_refusal(hub, tmp_path, "org/none") == (
        "the Hub has no model `org/none`, or it is private",
        "check the spelling; for a private model run `hf auth login`",
    )
    assert hub_refusal(hub, tmp_path, "org/model@nope")[0] == "`org/model` has no revision `nope`"
    assert hub_refusal(hub, tmp_path, "org/gated") == (
        "`org/gated` is gated",
        "ask for access on https://huggingface.co/org/gated, then run `hf auth login`",
    )
    assert hub_refusal(hub, tmp_path, "org/pickle")[0].startswith("`pytorch_model.bin` is a pickle")
    assert hub.served["pytorch_model.bin"] == 0
    hub.status = 503
    assert hub_refusal(hub, tmp_path, "org/model") == (
        "the Hub answered 503 for `org/model`",
        "try again later",
    )


def test_without_a_network(hub: FakeHub, tmp_path: Path) -> None:
    message, hint = hub_refusal(hub, tmp_path, "org/none", {"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert message.startswith("cannot reach the Hub for `org/none`: ")
    assert "HF_HUB_OFFLINE=1" in hint
    assert "`hf download org/none`" in hint
    assert hub_refusal(hub, tmp_path, "org/none@v1", OFFLINE) == (
        "`org/none` at `v1` is not in the Hub cache, and HF_HUB_OFFLINE is set",
        "unset HF_HUB_OFFLINE, or run `hf download org/none --revision v1` where there is a"
        " network",
    )


def test_offline_with_half_a_snapshot(hub: FakeHub, tmp_path: Path) -> None:
    commit = hub.add("org/model", SHARDED)
    get(hub, tmp_path, "org/model", weights=False)
    message, hint = hub_refusal(hub, tmp_path, f"org/model@{commit}", OFFLINE)
    assert message == (
        f"the copy in the Hub cache cannot be used: shard `{SHARD_1}` named by the index is missing"
    )
    assert f"`hf download org/model --revision {commit}`" in hint


def test_headers_alone_have_no_files(tmp_path: Path) -> None:
    full = resolve("v", str(write(tmp_path, SINGLE)), tmp_path)
    fields = {name: getattr(full, name) for name in Source.__slots__}
    dry = Source(**{**fields, "folder": None})
    for call in (lambda: dry.file("config.json"), dry.content_hashes):
        with pytest.raises(SourceError, match="files of variant `v` were not downloaded"):
            call()
