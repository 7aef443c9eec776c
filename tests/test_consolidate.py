"""Consolidation of real checkpoints: what comes out, to the bit, and that it always does."""

from __future__ import annotations

import json
import os
import shutil
from hashlib import sha256
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import (
    MODELS,
    NAMES,
    RECIPES,
    Cli,
    Lab,
    compile_recipe,
    manifest_of,
    tree,
    write_recipe,
)
from safetensors.torch import load_file, save_file

from moecc.artifact import Artifact
from moecc.errors import ArtifactError, MoeccError, PlanError, SourceError
from moecc.export import export

PAIR = {name: MODELS / f"nano-{name}" for name in ("base", "chat")}
LAYERS, EXPERTS = 4, 8
PROJECTIONS = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}
EXACT = {"center": "16bit", "residual": "none"}
DTYPES = {"U8": "<u1", "I32": "<i4", "BF16": "<u2", "F16": "<u2", "F32": "<u4"}


def source_rows(model: Path, layer: int, expert: int, projection: str) -> torch.Tensor:
    """An expert's canonical matrix, straight from a checkpoint."""
    tensors = load_file(model / "model.safetensors")
    prefix = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
    return torch.cat([tensors[f"{prefix}.{w}.weight"] for w in PROJECTIONS[projection]])


def stored_rows(artifact: Artifact, variant: str, layer: int, expert: int, projection: str) -> Any:
    _, found = artifact.layers[layer].projection(projection)
    return artifact.rows(variant, layer, projection, expert, range(found.shape[0]))


def all_rows(path: Path) -> dict[tuple[str, int, int, str], torch.Tensor]:
    with Artifact(path) as artifact:
        return {
            (variant, layer, expert, projection): stored_rows(
                artifact, variant, layer, expert, projection
            )
            for variant in artifact.variants
            for layer in range(LAYERS)
            for expert in range(EXPERTS)
            for projection in PROJECTIONS
        }


def raw_tensors(path: Path) -> dict[str, npt.NDArray[Any]]:
    """A safetensors file by the letter of the format: bits, whatever the dtype."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    found = {}
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            begin, end = (8 + length + n for n in entry["data_offsets"])
            array = np.frombuffer(data[begin:end], DTYPES[entry["dtype"]])
            found[name] = array.reshape(entry["shape"])
    return found


# ---- lossless


def test_lossless_exports_every_bit(lossless: Path, tmp_path: Path) -> None:
    manifest = manifest_of(lossless)
    assert manifest["experts"]["ratio"] == 4.0
    assert manifest["experts"]["slots_per_layer"] == [4 * EXPERTS] * LAYERS
    assert [layer["measured_error"] for layer in manifest["layers"]] == [0.0] * LAYERS
    with Artifact(lossless) as artifact:
        for name in NAMES:
            out, source = tmp_path / name, MODELS / f"nano-{name}"
            export(artifact, name, out)
            kept = {file: sha for file, sha in tree(source).items() if file != "README.md"}
            assert sorted(tree(out)) == sorted([*kept, "moecc.json"])
            ours = raw_tensors(out / "model.safetensors")
            theirs = raw_tensors(source / "model.safetensors")
            assert len(theirs) == 126
            assert sorted(ours) == sorted(theirs)
            for tensor, bits in theirs.items():
                assert ours[tensor].shape == bits.shape
                assert ours[tensor].tobytes() == bits.tobytes(), (name, tensor)
            for side, sha in kept.items():
                assert side == "model.safetensors" or tree(out)[side] == sha


def test_identical_variants_are_stored_once(tmp_path: Path) -> None:
    sources = {"one": MODELS / "nano-chat", "two": MODELS / "nano-chat"}
    recipe = write_recipe(tmp_path / "r.yaml", sources, merge=EXACT, budget="1.0x")
    artifact = compile_recipe(recipe, tmp_path / "artifact")
    manifest = manifest_of(artifact)
    assert manifest["experts"]["ratio"] == 1.0
    assert manifest["experts"]["slots_per_layer"] == [EXPERTS] * LAYERS
    assert [layer["measured_error"] for layer in manifest["layers"]] == [0.0] * LAYERS
    assert raw_tensors(artifact / "variants/two/non-expert.safetensors") == {}
    with Artifact(artifact) as opened:
        export(opened, "two", tmp_path / "two")
    ours = raw_tensors(tmp_path / "two/model.safetensors")
    for name, bits in raw_tensors(MODELS / "nano-chat/model.safetensors").items():
        assert ours[name].tobytes() == bits.tobytes(), name


def test_equal_size_and_time_are_not_the_same_model(tmp_path: Path) -> None:
    """As in models unpacked from one archive: the caches must not take one for another."""
    models = {}
    for name in ("base", "chat", "math"):
        models[name] = tmp_path / name
        shutil.copytree(MODELS / f"nano-{name}", models[name])
        for path in models[name].iterdir():
            os.utime(path, (1e9, 1e9))
    for number, pair in enumerate((("chat", "chat"), ("base", "chat"), ("base", "math"))):
        sources = {f"v{i}": models[name] for i, name in enumerate(pair)}
        recipe = write_recipe(tmp_path / "r.yaml", sources, merge=EXACT, budget="2x")
        artifact = compile_recipe(recipe, tmp_path / f"artifact{number}")
        manifest = manifest_of(artifact)
        assert manifest["experts"]["ratio"] == len(set(pair))
        for name, variant in zip(pair, manifest["variants"], strict=True):
            data = (models[name] / "model.safetensors").read_bytes()
            assert variant["weights"] == {"model.safetensors": sha256(data).hexdigest()}
        rows = all_rows(artifact)
        for i, name in enumerate(pair):
            exact = source_rows(models[name], 3, 7, "down_proj")
            assert torch.equal(rows[f"v{i}", 3, 7, "down_proj"], exact)


# ---- coded


def test_quickstart_figures(quickstart: Path) -> None:
    manifest = manifest_of(quickstart)
    experts = manifest["experts"]
    params = LAYERS * EXPERTS * 3 * 96 * 160
    assert experts["params"] == params
    # Fully shared it takes (4.5 + 4 * 2.5) / 16 of one variant; the budget is 0.95.
    assert 0.90625 <= experts["ratio"] <= 0.95
    assert experts["ratio"] == pytest.approx(experts["bytes"] / (2 * params), abs=1e-6)
    banks = sorted(quickstart.glob("experts-*.safetensors"))
    data = [sum(t.nbytes for t in raw_tensors(path).values()) for path in banks]
    assert sum(data) == experts["bytes"]
    assert data == [layer["bytes"] for layer in manifest["layers"]]  # one file a layer
    for path in banks:
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        assert header % 64 == 0
        assert path.stat().st_size == header + data[banks.index(path)]
        assert manifest["files"][path.name]["size"] == path.stat().st_size
    assert sorted(manifest["files"]) == sorted(
        name
        for name, kind in tree(quickstart).items()
        if kind != "folder" and "manifest" not in name
    )
    assert manifest["non_expert"]["bytes"] == sum(
        tensor.nbytes
        for name in NAMES
        for key, tensor in raw_tensors(MODELS / f"nano-{name}/model.safetensors").items()
        if ".experts." not in key
    )
    assert experts["slots_per_layer"] == [layer["slots"] for layer in manifest["layers"]]


def test_measured_error_is_that_of_the_served_weights(quickstart: Path) -> None:
    rows, layers = all_rows(quickstart), manifest_of(quickstart)["layers"]
    for layer in range(LAYERS):
        error = total = 0.0
        for name in NAMES:
            for expert in range(EXPERTS):
                for projection in PROJECTIONS:
                    exact = source_rows(MODELS / f"nano-{name}", layer, expert, projection)
                    served = rows[name, layer, expert, projection]
                    error += float((served.double() - exact.double()).square().sum())
                    total += float(exact.double().square().sum())
        measured = layers[layer]["measured_error"]
        assert measured == pytest.approx((error / total) ** 0.5, rel=1e-4)
        assert 0.01 < measured < 0.06


def unpack(plane: npt.NDArray[Any], width: int, columns: int) -> npt.NDArray[Any]:
    """Codes of a plane `[..., bytes]`: fields of `width` bits of a little-endian stream."""
    assert plane.shape[-1] == -(-columns * width // 32) * 4
    bits = np.unpackbits(plane, axis=-1, bitorder="little")
    fields = bits[..., : columns * width].reshape(*plane.shape[:-1], columns, width)
    return (fields.astype(np.float32) * (1 << np.arange(width))).sum(-1)


def widen(bits: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """float32 of bfloat16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def round_to_bfloat16(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """bfloat16 bits of float32: to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}


def decode_pool(bank: dict[str, Any], prefix: str, coding: str, columns: int) -> Any:
    """float32 `[slots, rows, columns]` of a coded pool."""
    bits, group = int(coding[0]), coding.split("bit-")[1]
    size = columns if group == "row" else int(group[1:])
    codes: Any = 0
    for number, width in enumerate(PLANES[bits]):
        codes = codes * 2**width + unpack(bank[f"{prefix}.plane{number}"], width, columns)
    scales = np.repeat(widen(bank[f"{prefix}.scales"]), size, axis=-1)[..., :columns]
    return ((codes - np.float32((2**bits - 1) / 2)) * scales).astype(np.float32)


def decode_artifact(path: Path) -> dict[tuple[str, int, int, str], npt.NDArray[Any]]:
    """The bfloat16 bits of every expert, from the files alone."""
    manifest, bank = manifest_of(path), {}
    for file in path.glob("experts-*.safetensors"):
        bank |= raw_tensors(file)
    remap = raw_tensors(path / "remap.safetensors")
    found = {}
    for number, layer in enumerate(manifest["layers"]):
        table = remap[f"{layer['name']}.remap"]
        for p, projection in enumerate(layer["projections"]):
            pools = []
            for pool in projection["pools"]:
                prefix = f"{layer['name']}.{projection['name']}.{pool['role']}.{pool['coding']}"
                if "bit" in pool["coding"]:
                    columns = projection["shape"][1]
                    pools.append(decode_pool(bank, prefix, pool["coding"], columns))
                else:
                    assert pool["coding"] == "BF16"
                    pools.append(widen(bank[f"{prefix}.weight"]))
                assert len(pools[-1]) == pool["slots"]
            for v, variant in enumerate(manifest["variants"]):
                for expert in range(layer["num_experts"]):
                    center, slot, residual, residual_slot = table[v, expert, p]
                    value = pools[center][slot]
                    if residual >= 0:
                        value = value + pools[residual][residual_slot]
                    key = (variant["name"], number, expert, projection["name"])
                    found[key] = round_to_bfloat16(value)
    return found


def check_decoding(path: Path) -> None:
    ours = all_rows(path)
    theirs = decode_artifact(path)
    assert ours.keys() == theirs.keys()
    assert len(ours) == len(manifest_of(path)["variants"]) * LAYERS * EXPERTS * 2
    for key, bits in theirs.items():
        rows = ours[key].view(torch.int16).numpy().view(np.uint16)
        assert np.array_equal(rows, bits), key


def test_rows_are_what_the_format_says(quickstart: Path) -> None:
    check_decoding(quickstart)


@pytest.mark.parametrize(
    ("merge", "budget"),
    [
        ({"center": "5bit", "residual": "3bit", "group": 64}, "0.9x"),
        ({"center": "6bit", "residual": "1bit", "group": "row"}, "0.8x"),
        ({"center": "16bit", "residual": "2bit", "group": 128}, "1.4x"),
        ({"center": "8bit", "residual": "none", "group": 128}, "0.9x"),
    ],
)
def test_every_coding_is_what_the_format_says(
    merge: dict[str, Any], budget: str, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", PAIR, merge=merge, budget=budget)
    artifact = compile_recipe(recipe, tmp_path / "artifact")
    experts = manifest_of(artifact)["experts"]
    assert experts["ratio"] <= float(budget[:-1])
    check_decoding(artifact)


def test_representative_takes_variants_in_turn(tmp_path: Path) -> None:
    """recipes/paper.yaml at 1.0x: group i of the model is variant i mod V's expert."""
    artifact = compile_recipe(RECIPES / "paper.yaml", tmp_path / "artifact")
    assert manifest_of(artifact)["experts"]["ratio"] == 1.0
    rows = all_rows(artifact)
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            taken = NAMES[(layer * EXPERTS + expert) % len(NAMES)]
            for projection in PROJECTIONS:
                exact = source_rows(MODELS / f"nano-{taken}", layer, expert, projection)
                for name in NAMES:
                    served = rows[name, layer, expert, projection]
                    assert torch.equal(served, exact), (name, layer, expert)


# ---- similarity and matching


def expert_vector(name: str, layer: int, expert: int) -> npt.NDArray[np.float64]:
    parts = [source_rows(MODELS / f"nano-{name}", layer, expert, p).double() for p in PROJECTIONS]
    found: npt.NDArray[np.float64] = torch.cat([p.reshape(-1) for p in parts]).numpy()
    return found


def cosine_distance(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    return float(1 - a @ b / np.sqrt((a @ a) * (b @ b)))


def centered_gram(name: str, layer: int, expert: int) -> npt.NDArray[np.float64]:
    """The block-diagonal centered Gram matrix of an expert's rows, as a vector."""
    parts = []
    for projection in PROJECTIONS:
        x = source_rows(MODELS / f"nano-{name}", layer, expert, projection).double().numpy()
        x = x - x.mean(0)
        parts.append((x @ x.T).reshape(-1))
    return np.concatenate(parts)


@pytest.mark.parametrize("metric", ["cosine", "delta-cosine", "cka"])
def test_metrics_are_their_definitions(metric: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", base="math", similarity={"metric": metric})
    artifact = compile_recipe(recipe, tmp_path / "artifact")
    assert manifest_of(artifact)["experts"]["ratio"] <= 0.95
    measured = json.loads((artifact / "similarity.json").read_bytes())
    assert {"l2", "cosine", "delta-cosine", metric} == set(measured)
    layer, expert = 2, 5
    vectors = {name: expert_vector(name, layer, expert) for name in NAMES}
    found = measured[metric][layer][expert]
    assert len(found) == 6
    for (a, b), value in zip(combinations(NAMES, 2), found, strict=True):
        x, y = vectors[a], vectors[b]
        if metric == "delta-cosine":
            x, y = x - vectors["math"], y - vectors["math"]
            if "math" in (a, b):
                continue  # the base has no delta
        if metric == "cka":
            x, y = centered_gram(a, layer, expert), centered_gram(b, layer, expert)
        assert value == pytest.approx(cosine_distance(x, y), rel=1e-5, abs=1e-12), (a, b)
    l2 = measured["l2"][layer][expert][0]
    x, y = vectors["base"], vectors["chat"]
    expected = np.linalg.norm(x - y) / np.sqrt((x @ x + y @ y) / 2)
    assert l2 == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("linkage", ["average", "complete", "single"])
def test_hierarchical(linkage: str, tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path / "r.yaml",
        match={"algorithm": "hierarchical", "linkage": linkage},
        budget="2x",
    )
    manifest = manifest_of(compile_recipe(recipe, tmp_path / "artifact"))
    assert 0.91 < manifest["experts"]["ratio"] <= 2.0
    # One cut of all trees: no pair that is nearer than the farthest merged one is left apart.
    if linkage != "single":
        return
    distances = json.loads((tmp_path / "artifact/similarity.json").read_bytes())["l2"]
    joined, apart = [0.0], [np.inf]
    pairs = list(combinations(range(len(NAMES)), 2))
    for layer, plan in enumerate(manifest["plan"]["layers"]):
        for expert, groups in enumerate(plan["experts"]):
            of = {member: i for i, group in enumerate(groups) for member in group[:-1]}
            for (a, b), value in zip(pairs, distances[layer][expert], strict=True):
                if of[a] != of[b]:
                    apart.append(value)
            for group in groups:
                members = group[:-1]
                nearest = [
                    min(
                        distances[layer][expert][pairs.index(tuple(sorted((m, o))))]
                        for o in members
                        if o != m
                    )
                    for m in members
                    if len(members) > 1
                ]
                joined += nearest
    assert max(joined) <= min(apart)


# ---- float32


def float32_copy(name: str, folder: Path) -> Path:
    shutil.copytree(MODELS / f"nano-{name}", folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(len(name))
    wide = {
        key: value.float() + 1e-6 * torch.randn(value.shape, generator=generator)
        for key, value in tensors.items()
    }
    save_file(wide, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def float32_pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("float32")
    return {name: float32_copy(name, folder / name) for name in PAIR}


def test_float32_needs_leave_for_16_bits(float32_pair: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", float32_pair, merge=EXACT, budget="1.5x")
    before = tree(tmp_path)
    with pytest.raises(PlanError) as caught:
        compile_recipe(recipe, tmp_path / "artifact")
    assert caught.value.message == "16-bit centers would lose bits of F32 experts"
    assert "output: {dtype: bfloat16}" in str(caught.value.hint)
    assert tree(tmp_path) == before


def test_float32_merged_in_bfloat16(float32_pair: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path / "r.yaml",
        float32_pair,
        merge=EXACT,
        budget="1x",
        output={"dtype": "bfloat16"},
    )
    artifact = compile_recipe(recipe, tmp_path / "artifact")
    assert manifest_of(artifact)["experts"]["ratio"] == 1.0
    for (_, layer, expert, projection), rows in all_rows(artifact).items():
        sources = [source_rows(p, layer, expert, projection) for p in float32_pair.values()]
        assert torch.equal(rows, (sum(sources) / 2).bfloat16())
        break
    with Artifact(artifact) as opened:
        export(opened, "chat", tmp_path / "chat")
    exported = load_file(tmp_path / "chat/model.safetensors")
    assert {tensor.dtype for tensor in exported.values()} == {torch.float32}


def test_float32_lossless(float32_pair: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", float32_pair, merge=EXACT, budget="4x")
    artifact = compile_recipe(recipe, tmp_path / "artifact")
    assert manifest_of(artifact)["experts"]["ratio"] == 4.0
    with Artifact(artifact) as opened:
        export(opened, "chat", tmp_path / "chat")
    ours = raw_tensors(tmp_path / "chat/model.safetensors")
    for name, bits in raw_tensors(float32_pair["chat"] / "model.safetensors").items():
        assert ours[name].tobytes() == bits.tobytes(), name


# ---- the same recipe gives the same bytes


@pytest.fixture(scope="module")
def absolute(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe with absolute sources, and its artifact."""
    folder = tmp_path_factory.mktemp("absolute")
    recipe = write_recipe(folder / "recipe.yaml")
    return recipe, compile_recipe(recipe, folder / "artifact")


def test_process_and_hash_seed_do_not_matter(
    absolute: tuple[Path, Path], lab: Lab, tmp_path: Path
) -> None:
    recipe, artifact = absolute
    assert lab.hash != hash("moecc")
    cache = str(tmp_path / "cache")
    assert lab("consolidate", recipe, "--out", tmp_path / "out", MOECC_CACHE=cache).code == 0
    assert tree(tmp_path / "out") == tree(artifact)


def test_umask_sets_modes_and_nothing_else(
    absolute: tuple[Path, Path], lab: Lab, tmp_path: Path
) -> None:
    recipe, artifact = absolute
    for umask in (0o022, 0o077):
        out = tmp_path / f"{umask:o}"
        assert lab("consolidate", recipe, "--out", out, umask=umask).code == 0
        assert tree(out) == tree(artifact)
        for path in [out, *out.rglob("*")]:
            full = 0o777 if path.is_dir() else 0o666
            assert path.stat().st_mode & 0o777 == full & ~umask, path


def test_place_and_name_of_the_recipe_do_not_matter(
    absolute: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, artifact = absolute
    moved = tmp_path / "deep/er/another.yml"
    moved.parent.mkdir(parents=True)
    moved.write_text("# a comment\n" + recipe.read_text())
    monkeypatch.setenv("MOECC_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert tree(compile_recipe(moved, Path("relative"))) == tree(artifact)


@pytest.mark.parametrize("workers", [1, 5])
def test_number_of_workers_does_not_matter(
    workers: int,
    absolute: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe, artifact = absolute
    monkeypatch.setenv("MOECC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(workers)))
    assert tree(compile_recipe(recipe, tmp_path / "artifact")) == tree(artifact)


@pytest.mark.parametrize("one_layer", [False, True])
def test_small_shards_hold_the_same_rows(
    one_layer: bool, absolute: tuple[Path, Path], tmp_path: Path
) -> None:
    # The data of one layer, to the byte, do not fit together with a header.
    limit = manifest_of(absolute[1])["layers"][0]["bytes"] if one_layer else 200 * 1024
    recipe = write_recipe(tmp_path / "r.yaml", output={"shard_size": f"{limit} B"})
    sharded = compile_recipe(recipe, tmp_path / "artifact")
    files = sorted(sharded.glob("experts-*.safetensors"))
    assert [path.name for path in files] == [
        f"experts-{i:05d}.safetensors" for i in range(len(files))
    ]
    assert len(files) > LAYERS
    for path in files:
        assert path.stat().st_size <= limit or len(raw_tensors(path)) == 1, path.name
    ours, theirs = all_rows(sharded), all_rows(absolute[1])
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert manifest_of(sharded)["experts"] == manifest_of(absolute[1])["experts"]


# ---- killed and resumed


@pytest.fixture(scope="module")
def pair_recipe(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    recipe = write_recipe(folder / "recipe.yaml", PAIR, budget="0.7x")
    return recipe, compile_recipe(recipe, folder / "artifact")


def journal(partial: Path) -> dict[str, list[str]]:
    """step -> files of the steps that a killed run had finished."""
    path = partial / "journal.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return {entry["step"]: sorted(entry["files"]) for entry in map(json.loads, lines)}


def find(events: list[str], start: str) -> int:
    return next(i for i, event in enumerate(events) if event.startswith(start))


def test_killed_anywhere_it_resumes(
    pair_recipe: tuple[Path, Path], lab: Lab, tmp_path: Path
) -> None:
    recipe, artifact = pair_recipe
    events = lab.events("consolidate", recipe, "--out", tmp_path / "out")
    assert tree(tmp_path / "out") == tree(artifact)
    start, end = find(events, "os.mkdir out.partial"), find(events, "os.rename out.partial")
    # A run is killed before the event of this number, counted from one: at the very beginning,
    # on the way, around everything that is removed at the end, before and after the rename.
    points = {start + 2, start + 3, start + 4, end + 1, end + 2}
    points |= {start + 4 + (end - start) * i // 6 for i in range(1, 6)}
    points |= {i + n for i in range(start, end) if "os.remove" in events[i] for n in (1, 2)}
    kept = 0
    for number in sorted(points):
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        where = f"killed at {number}, before {events[number - 1]}"
        assert lab("consolidate", recipe, "--out", out, number=number).code == -9, where
        if number == end + 2:
            assert tree(out) == tree(artifact), where
            continue
        assert not out.exists(), where
        (partial,) = out.parent.iterdir()
        steps = journal(partial)
        before = {name: (partial / name).stat() for files in steps.values() for name in files}
        resumed = lab("consolidate", recipe, "--out", out)
        assert resumed.code == 0, (where, resumed)
        assert tree(out) == tree(artifact), where
        assert [path.name for path in out.parent.iterdir()] == ["out"], where
        for step, names in steps.items():
            if step.startswith(("layer ", "variant ")):  # it was not written again
                kept += 1
                for name in names:
                    after = (out / name).stat()
                    assert after.st_ino == before[name].st_ino, (where, step)
                    assert after.st_mtime_ns == before[name].st_mtime_ns, (where, step)
    assert kept > 2 * LAYERS


def test_resuming_checks_what_was_finished(
    pair_recipe: tuple[Path, Path], lab: Lab, tmp_path: Path
) -> None:
    """A finished file that changed since is written again."""
    recipe, artifact = pair_recipe
    events = lab.events("consolidate", recipe, "--out", tmp_path / "counted")
    number = find(events, "open README.md") + 1
    assert lab("consolidate", recipe, "--out", tmp_path / "out", number=number).code == -9
    (partial,) = tmp_path.glob("out.partial*")
    assert len(journal(partial)) >= LAYERS + len(PAIR)
    for name in ("experts-00001.safetensors", "variants/chat/non-expert.safetensors"):
        data = bytearray((partial / name).read_bytes())
        data[-1] ^= 1
        (partial / name).write_bytes(data)
    assert lab("consolidate", recipe, "--out", tmp_path / "out").code == 0
    assert tree(tmp_path / "out") == tree(artifact)


def test_killed_while_it_replaces(pair_recipe: tuple[Path, Path], lab: Lab, tmp_path: Path) -> None:
    """At every point of `--force` there is a way on that ends with the whole new artifact."""
    recipe, artifact = pair_recipe
    old = tmp_path / "old"
    shutil.copytree(artifact, old)
    events = lab.events("consolidate", recipe, "--out", old, "--force")
    at = find(events, "os.rename old")
    for number in range(at + 1, at + 4):
        out = tmp_path / str(number) / "old"
        shutil.copytree(artifact, out)
        killed = lab("consolidate", recipe, "--out", out, "--force", number=number)
        assert killed.code == -9
        again = lab("consolidate", recipe, "--out", out, "--force")
        assert again.code == 0, again
        assert tree(out) == tree(artifact)
        assert sorted(p.name for p in out.parent.iterdir()) == ["old"], events[number - 1]


# ---- plans


def test_a_saved_plan_gives_the_same_artifact(
    absolute: tuple[Path, Path], cli: Cli, tmp_path: Path
) -> None:
    recipe, artifact = absolute
    plan = tmp_path / "plan.json"
    dry = cli("consolidate", recipe, "--dry-run", "--plan-out", plan)
    assert dry.code == 0, dry
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    done = cli("consolidate", recipe, "--plan", plan, "--out", tmp_path / "artifact")
    assert done.code == 0, done
    assert tree(tmp_path / "artifact") == tree(artifact)
    assert json.loads(plan.read_bytes()) == manifest_of(artifact)["plan"]


def test_a_plan_is_followed_where_it_differs(absolute: tuple[Path, Path], tmp_path: Path) -> None:
    """Splitting one expert's group by hand gives that expert four exact slots."""
    plan = manifest_of(absolute[1])["plan"]
    at = next(e for e, groups in enumerate(plan["layers"][1]["experts"]) if len(groups) == 1)
    plan["layers"][1]["experts"][at] = [[i, False] for i in range(4)]
    out = compile_recipe(absolute[0], tmp_path / "artifact", saved_plan=plan)
    slots = manifest_of(absolute[1])["experts"]["slots_per_layer"]
    assert manifest_of(out)["experts"]["slots_per_layer"] == [slots[0], slots[1] + 3, *slots[2:]]
    rows = all_rows(out)
    for name in NAMES:
        exact = source_rows(MODELS / f"nano-{name}", 1, at, "down_proj")
        assert torch.equal(rows[name, 1, at, "down_proj"], exact)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"merge": {"center": "8bit", "residual": "2bit", "group": 32}}, "made for other"),
        ({"sources": {n: MODELS / f"nano-{n}" for n in reversed(NAMES)}}, "made for other"),
        ({"sources": PAIR}, "made for other"),
    ],
)
def test_a_plan_for_another_recipe_is_refused(
    changes: dict[str, Any], text: str, absolute: tuple[Path, Path], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", **changes)
    plan = manifest_of(absolute[1])["plan"]
    before = tree(tmp_path)
    with pytest.raises(PlanError, match=text):
        compile_recipe(recipe, tmp_path / "artifact", saved_plan=plan)
    assert tree(tmp_path) == before


def test_a_plan_that_would_lose_experts_is_refused(
    absolute: tuple[Path, Path], tmp_path: Path
) -> None:
    plan = manifest_of(absolute[1])["plan"]
    for groups, text in (
        ([[0, 1, 2, True]], "does not place every variant"),
        ([[0, 1, 2, 3, 3, True]], "does not place every variant"),
        ([[0, 1, 2, 3, False]], "once for variants that differ"),
        ([[0, 1, 2, 7, True]], "does not place every variant"),
    ):
        plan["layers"][0]["experts"][0] = groups
        with pytest.raises(PlanError, match=text):
            compile_recipe(absolute[0], tmp_path / "artifact", saved_plan=plan)
    assert list(tmp_path.iterdir()) == []


# ---- outputs that exist


def test_force(pair_recipe: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, artifact = pair_recipe
    out = tmp_path / "out"
    out.mkdir()
    compile_recipe(recipe, out)  # an empty folder is as good as none
    assert tree(out) == tree(artifact)
    (out / "README.md").write_text("edited")
    edited = tree(out)
    with pytest.raises(ArtifactError, match="exists") as caught:
        compile_recipe(recipe, out)
    assert "--force" in str(caught.value.hint)
    assert tree(out) == edited
    compile_recipe(recipe, out, force=True)
    assert tree(out) == tree(artifact)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_leaves_alone_what_is_not_ours(
    pair_recipe: tuple[Path, Path], tmp_path: Path
) -> None:
    for name in ("file", "folder/inside", "other/manifest.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("precious")
    before = tree(tmp_path)
    for name in ("file", "folder", "other"):
        with pytest.raises(ArtifactError, match="not made by moecc"):
            compile_recipe(pair_recipe[0], tmp_path / name, force=True)
    assert tree(tmp_path) == before


def test_force_keeps_the_old_one_when_it_fails(
    pair_recipe: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(pair_recipe[1], out)
    broken = {"base": MODELS / "nano-base", "chat": tmp_path / "nowhere"}
    with pytest.raises(SourceError):
        compile_recipe(write_recipe(tmp_path / "r.yaml", broken), out, force=True)
    impossible = write_recipe(tmp_path / "r.yaml", PAIR, budget="0.1x")
    with pytest.raises(MoeccError, match="cannot be met"):
        compile_recipe(impossible, out, force=True)
    assert tree(out) == tree(pair_recipe[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "r.yaml"]


def test_a_partial_folder_of_another_job(
    pair_recipe: tuple[Path, Path], lab: Lab, tmp_path: Path
) -> None:
    recipe, artifact = pair_recipe
    another = write_recipe(tmp_path / "r.yaml", PAIR, budget="0.8x")
    out = tmp_path / "out"
    assert lab("consolidate", another, "--out", out, number=100).code == -9
    before = tree(tmp_path)
    assert len(before) > 2
    with pytest.raises(ArtifactError, match="left over from another run") as caught:
        compile_recipe(recipe, out)
    assert "--force" in str(caught.value.hint)
    assert tree(tmp_path) == before
    compile_recipe(recipe, out, force=True)
    assert tree(out) == tree(artifact)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "r.yaml"]


def test_force_keeps_a_neighbor_called_old(pair_recipe: tuple[Path, Path], tmp_path: Path) -> None:
    """Somebody's own `out.old` is not ours to remove."""
    out = tmp_path / "out"
    shutil.copytree(pair_recipe[1], out)
    for suffix in (".old", ".bak", ".orig"):
        (tmp_path / f"out{suffix}").mkdir()
        (tmp_path / f"out{suffix}/notes.txt").write_text("precious")
    before = tree(tmp_path)
    compile_recipe(pair_recipe[0], out, force=True)
    assert tree(tmp_path) == before
