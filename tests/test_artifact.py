"""Damaged, edited and hostile artifacts: what is wrong is named, and nothing else happens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MODELS, NAMES, Cli, Outcome, compile_recipe, manifest_of, tree

from moecc.artifact import Artifact
from moecc.errors import ArtifactError, DamagedArtifactError
from moecc.export import export
from moecc.manifest import seal
from moecc.tensorfile import build_header, read_header

MANIFEST = "manifest.json"


@pytest.fixture(scope="module")
def copied(quickstart: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("broken") / "artifact"
    shutil.copytree(quickstart, folder)
    return folder


@pytest.fixture
def broken(copied: Path, quickstart: Path) -> Iterator[Path]:
    """A copy to break; it is whole again afterwards."""
    yield copied
    shutil.rmtree(copied)
    shutil.copytree(quickstart, copied)


def edit(artifact: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the manifest and seals it again, as somebody hostile would."""
    manifest = manifest_of(artifact)
    change(manifest)
    (artifact / MANIFEST).write_bytes(seal(manifest))


def replace(artifact: Path, name: str, data: bytes) -> None:
    """Changes a file, and its size and hash in the manifest."""
    (artifact / name).write_bytes(data)
    known = {"size": len(data), "sha256": sha256(data).hexdigest()}
    edit(artifact, lambda manifest: manifest["files"].update({name: known}))


def flip(path: Path, at: int, mask: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= mask
    path.write_bytes(data)


def flip_any(path: Path, random: np.random.Generator) -> None:
    flip(path, int(random.integers(path.stat().st_size)), 1 << int(random.integers(8)))


def test_whole(quickstart: Path, cli: Cli) -> None:
    verified = cli("inspect", quickstart, "--verify", "--json")
    assert verified.code == 0, verified
    assert json.loads(verified.out)["verified"] is True
    count = len(manifest_of(quickstart)["files"])
    assert (
        f"all {count} files are as the manifest says" in cli("inspect", quickstart, "--verify").out
    )


def test_every_damaged_file_is_named(broken: Path, cli: Cli) -> None:
    files = sorted(manifest_of(broken)["files"])
    assert len(files) > 30
    random = np.random.default_rng(7)
    for number, name in enumerate(files):
        path = broken / name
        data = path.read_bytes()
        how: dict[str, Callable[[], object]] = {
            "hash differs": lambda p=path: flip_any(p, random),
            "bytes, not": lambda p=path, d=data: p.write_bytes(d[: len(d) // 2]),
            "is missing": lambda p=path: p.unlink(),
        }
        for text, damage in how.items():
            damage()
            outcome = cli("inspect", broken, "--verify").failed(3, text)
            lines = [line for line in outcome.err.splitlines() if line.startswith("  ")]
            assert len(lines) == 1, outcome
            assert lines[0].startswith(f"  `{name}` "), outcome
            assert f"1 of {len(files)} files are damaged" in outcome.err
            assert outcome.out == ""
            path.write_bytes(data)
        if number % 12 == 0:  # a longer file, and an empty one
            path.write_bytes(data + b"\0")
            cli("inspect", broken, "--verify").failed(3, f"`{name}` has {len(data) + 1} bytes")
            path.write_bytes(b"")
            cli("inspect", broken, "--verify").failed(3, f"`{name}` has 0 bytes")
            path.write_bytes(data)
    assert cli("inspect", broken, "--verify").code == 0


def test_swapped_shards(broken: Path, cli: Cli) -> None:
    first, second = (broken / f"experts-0000{i}.safetensors" for i in (0, 1))
    assert first.stat().st_size == second.stat().st_size
    one, other = first.read_bytes(), second.read_bytes()
    assert one != other
    first.write_bytes(other)
    second.write_bytes(one)
    outcome = cli("inspect", broken, "--verify").failed(3, "2 of ", "hash differs")
    assert [line.split("`")[1] for line in outcome.err.splitlines() if line[:2] == "  "] == [
        first.name,
        second.name,
    ]


def test_damaged_manifest(broken: Path, cli: Cli) -> None:
    path = broken / MANIFEST
    data = path.read_bytes()
    random = np.random.default_rng(11)
    for at in random.integers(len(data), size=60):
        flip(path, int(at), 1 << int(random.integers(7)))
        changed = path.read_bytes()
        outcome = cli("inspect", broken, "--verify")
        # A flip in the format's name or version says just that; any other is damage.
        outcome.failed(1 if outcome.code == 1 else 3, MANIFEST if outcome.code == 3 else "format")
        if outcome.code == 1:
            assert b'"format": "moecc"' not in changed or b'"format_version": 1,' not in changed
        path.write_bytes(data)
    path.write_bytes(data[:-100])
    cli("inspect", broken).failed(3, MANIFEST, "not JSON")
    path.write_bytes(data.replace(b'"ratio": 0.9', b'"ratio": 0.8'))
    assert path.read_bytes() != data
    for command in (["inspect"], ["export", "--variant", "chat", "--out", broken / "x"]):
        cli(command[0], broken, *command[1:]).failed(3, MANIFEST, "its hash differs")
    path.write_bytes(b"[" * 100_000)
    cli("inspect", broken).failed(3, MANIFEST)
    path.unlink()
    cli("inspect", broken).failed(1, f"it has no `{MANIFEST}`")
    cli("inspect", broken / "nowhere").failed(1, "is not a folder")
    cli("inspect", broken / "README.md").failed(1, "is not a folder")
    assert not (broken / "x").exists()


@pytest.mark.parametrize("resealed", [False, True])
@pytest.mark.parametrize("version", [2, 1000, "2", None])
def test_newer_format(version: Any, resealed: bool, broken: Path, cli: Cli) -> None:
    manifest = manifest_of(broken) | {"format_version": version}
    (broken / MANIFEST).write_bytes(seal(manifest) if resealed else json.dumps(manifest).encode())
    outcome = cli("inspect", broken).failed(1, f"format version {version}, this moecc reads 1")
    assert "hint: upgrade moecc" in outcome.err


# ---- hostile manifests

Change = Callable[[dict[str, Any]], object]


def set_at(*keys: Any) -> Change:
    """Sets the value at a path: all but the last of `keys`."""

    def change(manifest: dict[str, Any]) -> None:
        value: Any = manifest
        for key in keys[:-2]:
            value = value[key]
        value[keys[-2]] = keys[-1]

    return change


def delete(*keys: Any) -> Change:
    def change(manifest: dict[str, Any]) -> None:
        value: Any = manifest
        for key in keys[:-1]:
            value = value[key]
        del value[keys[-1]]

    return change


POOL = ("layers", 0, "projections", 0, "pools", 0)
HOSTILE: dict[str, Change] = {
    "files leave the folder": set_at("files", "../../etc/passwd", {"size": 1, "sha256": "0"}),
    "absolute file": set_at("files", "/etc/passwd", {"size": 1, "sha256": "0"}),
    "doubled slash": set_at("files", "variants/chat//etc/passwd", {"size": 1, "sha256": "0"}),
    "backslash": set_at("files", "..\\x", {"size": 1, "sha256": "0"}),
    "files is a list": set_at("files", []),
    "file is a number": set_at("files", "README.md", 5),
    "file without a hash": set_at("files", "README.md", {"size": 5}),
    "file size is text": set_at("files", "README.md", "size", "many"),
    "file size is null": set_at("files", "README.md", "size", None),
    "variants is null": set_at("variants", None),
    "variants is a string": set_at("variants", "abc"),
    "a variant is a number": set_at("variants", 1, 3),
    "no variants": set_at("variants", []),
    "variant leaves the folder": set_at("variants", 1, "name", "../../chat"),
    "absolute variant": set_at("variants", 1, "name", "/tmp"),
    "variant twice": set_at("variants", 1, "name", "base"),
    "source is null": set_at("variants", 1, "source", None),
    "size of a variant is text": set_at("variants", 1, "non_expert_bytes", "5"),
    "base is no variant": set_at("base", "nobody"),
    "base is a list": set_at("base", []),
    "layers is an object": set_at("layers", {}),
    "layers is null": set_at("layers", None),
    "no layers": set_at("layers", []),
    "a layer is null": set_at("layers", 0, None),
    "huge layer": set_at("layers", 0, "num_experts", 100_000),
    "negative layer": set_at("layers", 0, "num_experts", -8),
    "layer without slots": delete("layers", 0, "slots"),
    "layer of text slots": set_at("layers", 0, "slots", []),
    "layer without error": delete("layers", 0, "measured_error"),
    "negative shape": set_at("layers", 0, "projections", 0, "shape", [-320, 96]),
    "huge shape": set_at("layers", 0, "projections", 0, "shape", [10**6, 10**6]),
    "deep shape": set_at("layers", 0, "projections", 0, "shape", [[320], 96]),
    "unknown dtype": set_at("layers", 0, "projections", 0, "dtype", "F4"),
    "dtype is a list": set_at("layers", 0, "projections", 0, "dtype", ["BF16"]),
    "huge pool": set_at(*POOL, "slots", 10**18),
    "negative pool": set_at(*POOL, "slots", -1),
    "empty pool": set_at(*POOL, "slots", 0),
    "boolean pool": set_at(*POOL, "slots", [True]),
    "unknown coding": set_at(*POOL, "coding", "9bit-g32"),
    "strange coding": set_at(*POOL, "coding", "bit"),
    "coding is a number": set_at(*POOL, "coding", 4),
    "another coding": set_at(*POOL, "coding", "4bit-g64"),
    "another role": set_at(*POOL, "role", "residual"),
    "no pools": set_at("layers", 0, "projections", 0, "pools", []),
    "no experts": delete("experts"),
    "experts is text": set_at("experts", "many"),
    "expert bytes is text": set_at("experts", "bytes", "many"),
    "ratio is null": set_at("experts", "ratio", None),
    "no non-experts": delete("non_expert"),
    "no merge": delete("recipe", "merge"),
    "recipe is null": set_at("recipe", None),
    "metric is a list": set_at("recipe", "similarity", "metric", []),
    "budget is a number": set_at("budget", 5),
    "architecture is null": set_at("architecture", None),
}
COMMANDS = {
    "inspect": ("inspect",),
    "json": ("inspect", "--json"),
    "verify": ("inspect", "--verify"),
    "heat map": ("inspect", "--layer", "0"),
    "all pairs": ("inspect", "--layer", "0", "--all-pairs"),
    "export": ("export", "--variant", "chat", "--out", "OUT"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_manifest(name: str, broken: Path, cli: Cli, tmp_path: Path) -> None:
    """An error in words or a sane answer, whatever the manifest says; never a crash."""
    edit(broken, HOSTILE[name])
    outcomes: dict[str, Outcome] = {}
    for label, (command, *options) in COMMANDS.items():
        arguments = [str(tmp_path / "out") if option == "OUT" else option for option in options]
        outcome = outcomes[label] = cli(command, broken, *arguments)
        assert outcome.code in (0, 1, 3), (label, outcome)
        if outcome.code and label != "json":
            outcome.failed(outcome.code)
        if label == "export" and outcome.code:
            assert list(tmp_path.iterdir()) == [], outcome
    assert any(outcome.code for outcome in outcomes.values()), outcomes


def test_hostile_paths_write_nothing_outside(broken: Path, cli: Cli, tmp_path: Path) -> None:
    """A side file of an artifact from a stranger lands in the exported folder or nowhere."""
    target = tmp_path / "victim"
    hidden = broken / "variants/chat" / str(target).lstrip("/")
    hidden.parent.mkdir(parents=True)
    hidden.write_bytes(b"evil")
    known = {"size": 4, "sha256": sha256(b"evil").hexdigest()}
    edit(broken, set_at("files", f"variants/chat/{target}", known))
    cli("export", broken, "--variant", "chat", "--out", tmp_path / "out").failed(3, "not a path")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("owner", ["../../../outside", "/outside", "nobody", 5])
def test_hostile_owner_of_a_tensor(owner: Any, broken: Path, cli: Cli, tmp_path: Path) -> None:
    name = "variants/chat/tensors.json"
    document = json.loads((broken / name).read_bytes())
    next(iter(document["non_expert"].values()))[3] = owner
    outside = (broken / "variants/chat" / str(owner)).resolve()
    assert not outside.exists()
    replace(broken, name, json.dumps(document).encode())
    outcome = cli("export", broken, "--variant", "chat", "--out", tmp_path / "out")
    outcome.failed(3, name, "variant")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"source": {}, "non_expert": {}},
        {"source": [], "non_expert": []},
        {"source": {"a": None}, "non_expert": {}},
        {"source": {"a": ["BF16", [1], "../x.safetensors"]}, "non_expert": {}},
        {"source": {"a": ["BF16", [1], "/x.safetensors"]}, "non_expert": {}},
        {"source": {"a": ["F3", [1], "model.safetensors"]}, "non_expert": {}},
        {"source": {"a": ["BF16", "ab", "model.safetensors"]}, "non_expert": {}},
        "non_expert",
        "source",
    ],
)
def test_hostile_table_of_tensors(value: Any, broken: Path, cli: Cli, tmp_path: Path) -> None:
    name = "variants/chat/tensors.json"
    if isinstance(value, str):  # only this half is wrong
        document = json.loads((broken / name).read_bytes())
        value = document | {value: {key: [1, 2] for key in document[value]}}
    replace(broken, name, json.dumps(value).encode())
    cli("export", broken, "--variant", "chat", "--out", tmp_path / "out").failed(3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text", ["[]", "{}", "nonsense", '{"l2": 5}', '{"l2": [[]]}', '{"l2": [[["x"]]]}', '{"l2": {}}']
)
def test_hostile_similarity(text: str, broken: Path, cli: Cli) -> None:
    replace(broken, "similarity.json", text.encode())
    outcome = cli("inspect", broken, "--layer", "0")
    if text == "{}":
        outcome.failed(1, "`l2` was not measured")
    else:
        outcome.failed(3, "similarity.json")


# ---- damage that is met while reading


def remap_with(broken: Path, column: int, value: int) -> None:
    """remap.safetensors whose first entry has `value` in a column."""
    path = broken / "remap.safetensors"
    header, _ = read_header(path)
    data = bytearray(path.read_bytes())
    offset = min(info.offset for info in header.values()) + 4 * column
    data[offset : offset + 4] = value.to_bytes(4, "little", signed=True)
    replace(broken, path.name, bytes(data))


@pytest.mark.parametrize(
    ("column", "value"), [(0, 2), (0, -1), (1, 8), (1, -1), (2, 0), (2, -2), (3, 99), (3, -1)]
)
def test_remap_out_of_range(column: int, value: int, broken: Path, tmp_path: Path) -> None:
    remap_with(broken, column, value)
    with Artifact(broken) as artifact:
        assert artifact.verify() == []  # the hash fits: it is the contents that are wrong
        with pytest.raises(DamagedArtifactError, match="outside its pools"):
            artifact.rows("base", 0, "down_proj", 0, range(1))
        with pytest.raises(DamagedArtifactError, match=r"remap\.safetensors"):
            export(artifact, "chat", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def delta_of(artifact: Path, variant: str) -> tuple[Path, int, int]:
    """File, offset and size of the largest compressed delta of a variant."""
    path = artifact / f"variants/{variant}/non-expert.safetensors"
    info = max(
        (info for info in read_header(path)[0].values() if info.dtype == "U8"),
        key=lambda info: info.nbytes,
    )
    return path, info.offset, info.nbytes


@pytest.mark.parametrize("at", [0.0, 0.3, 0.6, 0.95])
def test_damaged_delta(at: float, broken: Path, cli: Cli, tmp_path: Path) -> None:
    path, offset, size = delta_of(broken, "chat")
    assert size > 10_000
    data = bytearray(path.read_bytes())
    start = offset + int(at * size)
    data[start : start + 400] = bytes(400)
    path.write_bytes(data)
    outcome = cli("export", broken, "--variant", "chat", "--out", tmp_path / "out")
    outcome.failed(3, "variants/chat/non-expert.safetensors", "compressed delta is")
    assert list(tmp_path.iterdir()) == []
    # Other variants do not read that file.
    assert cli("export", broken, "--variant", "math", "--out", tmp_path / "math").code == 0


@pytest.mark.parametrize("kept", [0, 9, -30])
def test_short_delta(kept: int, broken: Path, tmp_path: Path) -> None:
    """A frame cut short, in a file whose header agrees with it."""
    path, offset, size = delta_of(broken, "chat")
    data, tensors = path.read_bytes(), []
    parts = []
    for info in read_header(path)[0].values():
        part = data[info.offset : info.offset + info.nbytes]
        if info.offset == offset:
            part = part[:kept] if kept >= 0 else part[: size + kept]
        shape = (len(part),) if info.dtype == "U8" else info.shape
        tensors.append((info.name, info.dtype, shape))
        parts.append(part)
    path.write_bytes(build_header(tensors)[0] + b"".join(parts))
    with (
        Artifact(broken) as artifact,
        pytest.raises(DamagedArtifactError, match="compressed delta is"),
    ):
        export(artifact, "chat", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    [
        "experts-00002.safetensors",
        "remap.safetensors",
        "variants/base/non-expert.safetensors",
        "variants/chat/non-expert.safetensors",
        "variants/chat/tensors.json",
        "variants/chat/config.json",
        "variants/chat/tokenizer.json",
    ],
)
@pytest.mark.parametrize("how", ["cut", "gone", "folder"])
def test_export_of_a_damaged_artifact(
    name: str, how: str, broken: Path, cli: Cli, tmp_path: Path
) -> None:
    """It names the file and leaves nothing, without `--verify` too."""
    path = broken / name
    data = path.read_bytes()
    path.unlink()
    if how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "folder":
        path.mkdir()
    outcome = cli("export", broken, "--variant", "chat", "--out", tmp_path / "out")
    if how == "cut" and name.endswith("tokenizer.json"):
        assert outcome.code == 0  # side files are copied as they are; --verify finds that
        return
    outcome.failed(3, name)
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments(quickstart: Path, cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome = cli("export", quickstart, "--variant", "nobody", "--out", out)
    outcome.failed(1, "no variant `nobody`", f"it has {', '.join(NAMES)}")
    for layer in (4, -1):
        cli("inspect", quickstart, "--layer", layer).failed(1, "layers 0 to 3")
    cli("inspect", quickstart, "--layer", 0, "--metric", "cka").failed(1, "`cka` was not measured")
    outcome = cli("inspect", quickstart, "--layer", 0, "--all-pairs", "--metric", "delta-cosine")
    outcome.failed(1, "cannot use the metric `delta-cosine`")
    assert list(tmp_path.iterdir()) == []


def test_export_output(quickstart: Path, cli: Cli, tmp_path: Path) -> None:
    """As with consolidate: refused, replaced with --force, and foreign folders left alone."""
    out, mine = tmp_path / "out", tmp_path / "mine"
    command = ("export", quickstart, "--variant", "chat", "--out")
    assert cli(*command, out).code == 0
    exported = tree(out)
    (out / "extra").write_text("x")
    cli(*command, out).failed(1, "exists", "--force")
    assert (out / "extra").exists()
    assert cli(*command, out, "--force").code == 0
    assert tree(out) == exported
    mine.mkdir()
    (mine / "thesis.txt").write_text("precious")
    cli(*command, mine, "--force").failed(1, "not made by moecc")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


def test_force_replaces_no_source(quickstart: Path, cli: Cli, tmp_path: Path) -> None:
    """An original checkpoint has a config.json as well, and moecc did not make it."""
    source = tmp_path / "nano-chat"
    shutil.copytree(MODELS / "nano-chat", source)
    before = tree(tmp_path)
    outcome = cli("export", quickstart, "--variant", "chat", "--out", source, "--force")
    outcome.failed(1, "not made by moecc")
    assert tree(tmp_path) == before


def test_readers_check_names(quickstart: Path) -> None:
    with Artifact(quickstart) as artifact:
        for variant in ("nobody", "../base"):
            with pytest.raises(ArtifactError, match="no variant"):
                artifact.source_tensors(variant)


def test_card(quickstart: Path, tmp_path: Path) -> None:
    text = (quickstart / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: moecc\n")
    assert "base_model" not in text  # local folders are not models on the Hub
    for name in NAMES:
        assert f"| {name} | ../examples/models/nano-{name} | - |" in text
    ratio = manifest_of(quickstart)["experts"]["ratio"]
    assert f"{ratio:.4g}x of one 16-bit variant" in text
    # The recipe in the card makes the same artifact again.
    body = text.split("```yaml\n")[1].split("```")[0]
    recipe = tmp_path / "recipes/again.yaml"
    recipe.parent.mkdir()
    (tmp_path / "examples").symlink_to(MODELS.parent)
    recipe.write_text(body if "version:" in body else f"version: 1\n{body}")
    assert tree(compile_recipe(recipe, tmp_path / "again")) == tree(quickstart)
