"""Consolidation where the planner chooses, with every method, and in any order of experts."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from conftest import MODELS, Cli, Lab, compile_recipe, manifest_of, tree, write_recipe
from test_alignment import add_noise, move
from test_calibration import save_tokenizer, words
from test_consolidate import PROJECTIONS, find, raw_tensors, source_rows, stored_rows
from torch import Tensor

from moecc.artifact import Artifact
from moecc.errors import PlanError
from moecc.export import export
from moecc.forms import EXACT, Form

AUTO = {"center": "auto", "residual": "auto", "group": 64}
LAYERS, EXPERTS = 2, 4
LINES = {
    "base": "The river ran past the old mill and on to the sea. Nobody had seen the keeper.\n",
    "chat": "How are you today? I am well, thank you. What would you like to talk about?\n",
}


pytestmark = pytest.mark.usefixtures("one_thread")


def cut(source: Path, folder: Path) -> Path:
    """The first layers of a model, with the first experts of each."""
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())

    def change(values: dict[str, Tensor]) -> None:
        for name in list(values):
            found = re.search(r"layers\.(\d+)\.", name)
            expert = re.search(r"experts\.(\d+)\.", name)
            if (
                int(found[1] if found else 0) >= LAYERS
                or int(expert[1] if expert else 0) >= EXPERTS
            ):
                del values[name]
            elif name.endswith("gate.weight"):
                values[name] = values[name][:EXPERTS]

    tiny.edit(folder, change)
    return tiny.edit_config(folder, num_hidden_layers=LAYERS, num_local_experts=EXPERTS)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two fine-tunes of one model. Read only."""
    folder = tmp_path_factory.mktemp("pair")
    return {name: cut(MODELS / f"nano-{name}", folder / name) for name in LINES}


def all_rows(path: Path) -> dict[tuple[str, int, int, str], Tensor]:
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


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A calibration on little text."""
    folder = tmp_path_factory.mktemp("texts")
    for name, line in LINES.items():
        (folder / f"{name}.txt").write_text("".join(f"{i}. {line}" for i in range(40)))
    return {
        "text": {name: [str(folder / f"{name}.txt")] for name in LINES},
        "samples": 6,
        "length": 48,
    }


@pytest.fixture(scope="module")
def planned(
    tmp_path_factory: pytest.TempPathFactory, texts: dict[str, Any], pair: dict[str, Path]
) -> dict[bool, tuple[Path, Path]]:
    """Recipe and artifact, with and without a calibration."""
    found = {}
    for calibrated in (True, False):
        folder = tmp_path_factory.mktemp("planned")
        more = {"calibration": texts} if calibrated else {}
        recipe = write_recipe(folder / "recipe.yaml", pair, merge=AUTO, budget="0.5x", **more)
        found[calibrated] = recipe, compile_recipe(recipe, folder / "artifact")
    return found


both = pytest.mark.parametrize("calibrated", [True, False])


def forms_of(manifest: dict[str, Any]) -> list[list[Counter[str]]]:
    """Per layer and projection how many members have each form."""
    plan = manifest["plan"]
    found = []
    for layer in plan["layers"]:
        used = [Counter[str]() for _ in PROJECTIONS]
        for groups in layer["experts"]:
            for *members, chosen in groups:
                for p, counter in enumerate(used):
                    if chosen is False:
                        counter[EXACT.name] += len(members)
                    else:
                        counter.update(plan["forms"][i] for i in chosen[p])
        found.append(used)
    return found


# The planner's choice


@both
def test_the_planner_keeps_its_budget_and_its_limits(
    calibrated: bool, planned: dict[bool, tuple[Path, Path]], pair: dict[str, Path]
) -> None:
    manifest = manifest_of(planned[calibrated][1])
    experts = manifest["experts"]
    assert 0.49 < experts["ratio"] <= 0.5
    assert experts["bytes"] <= 0.5 * 2 * experts["params"]
    data = [
        sum(t.nbytes for t in raw_tensors(path).values())
        for path in sorted(planned[calibrated][1].glob("experts-*.safetensors"))
    ]
    assert sum(data) == experts["bytes"]
    assert manifest["recipe"]["merge"]["method"] == "joint"
    plan = manifest["plan"]
    assert ("loss" in plan) == calibrated
    assert plan["forms"] == sorted(plan["forms"])
    for layer in forms_of(manifest):
        for counter in layer:
            assert sum(counter.values()) == EXPERTS * len(pair)
            assert 1 <= len(counter) <= 3
            assert all(Form.parse(name) for name in counter)
    for layer in manifest["layers"]:
        assert 0.005 < layer["measured_error"] < 0.4
        for projection in layer["projections"]:
            assert sum(pool["role"] == "residual" for pool in projection["pools"]) <= 3


@both
def test_planned_rows_are_what_the_parts_say(
    calibrated: bool, planned: dict[bool, tuple[Path, Path]], pair: dict[str, Path]
) -> None:
    """The error that was measured while coding is that of the rows that are served."""
    artifact = planned[calibrated][1]
    rows = all_rows(artifact)
    for layer, described in enumerate(manifest_of(artifact)["layers"]):
        error = total = 0.0
        for name, source in pair.items():
            for expert in range(EXPERTS):
                for projection in PROJECTIONS:
                    exact = source_rows(source, layer, expert, projection)
                    served = rows[name, layer, expert, projection]
                    error += float((served.double() - exact.double()).square().sum())
                    total += float(exact.double().square().sum())
        assert described["measured_error"] == pytest.approx((error / total) ** 0.5, rel=1e-4)


def test_planned_twice_is_the_same(
    planned: dict[bool, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte, measured anew."""
    recipe, artifact = planned[True]
    monkeypatch.setenv("MOECC_CACHE", str(tmp_path / "cache"))
    assert tree(compile_recipe(recipe, tmp_path / "artifact")) == tree(artifact)


@both
def test_a_planned_plan_is_replayed(
    calibrated: bool, planned: dict[bool, tuple[Path, Path]], cli: Cli, tmp_path: Path
) -> None:
    recipe, artifact = planned[calibrated]
    plan = tmp_path / "plan.json"
    dry = cli("consolidate", recipe, "--dry-run", "--plan-out", plan)
    assert dry.code == 0, dry
    assert json.loads(plan.read_bytes()) == manifest_of(artifact)["plan"]
    done = cli("consolidate", recipe, "--plan", plan, "--out", tmp_path / "artifact")
    assert done.code == 0, done
    assert tree(tmp_path / "artifact") == tree(artifact)


def test_killed_while_it_writes_a_plan_of_its_own(
    planned: dict[bool, tuple[Path, Path]], lab: Lab, tmp_path: Path
) -> None:
    recipe, artifact = planned[False]
    out = tmp_path / "counted" / "out"
    out.parent.mkdir()
    events = lab.events("consolidate", recipe, "--out", out)
    assert tree(out) == tree(artifact)
    start, end = find(events, "os.mkdir out.partial"), find(events, "os.rename out.partial")
    out = tmp_path / "killed" / "out"
    out.parent.mkdir()
    assert lab("consolidate", recipe, "--out", out, number=(start + end) // 2).code == -9
    assert not out.exists()
    assert lab("consolidate", recipe, "--out", out).code == 0
    assert tree(out) == tree(artifact)


@both
def test_room_for_everything_is_lossless(
    calibrated: bool, texts: dict[str, Any], pair: dict[str, Path], tmp_path: Path
) -> None:
    more = {"calibration": texts} if calibrated else {}
    recipe = write_recipe(tmp_path / "r.yaml", pair, merge=AUTO, budget="2.0x", **more)
    artifact = compile_recipe(recipe, tmp_path / "artifact")
    manifest = manifest_of(artifact)
    assert [layer["measured_error"] for layer in manifest["layers"]] == [0.0] * LAYERS
    assert manifest["plan"]["forms"] == []
    with Artifact(artifact) as opened:
        export(opened, "chat", tmp_path / "chat")
    ours = raw_tensors(tmp_path / "chat/model.safetensors")
    for name, bits in raw_tensors(pair["chat"] / "model.safetensors").items():
        assert ours[name].tobytes() == bits.tobytes(), name


def test_a_smaller_budget_loses_more(
    planned: dict[bool, tuple[Path, Path]],
    texts: dict[str, Any],
    pair: dict[str, Path],
    tmp_path: Path,
) -> None:
    more: dict[str, Any] = {"merge": AUTO, "budget": "0.9x", "calibration": texts}
    recipe = write_recipe(tmp_path / "r.yaml", pair, **more)
    larger = manifest_of(compile_recipe(recipe, tmp_path / "artifact"))
    smaller = manifest_of(planned[True][1])
    assert smaller["experts"]["ratio"] < larger["experts"]["ratio"] <= 0.9
    assert smaller["plan"]["loss"] > larger["plan"]["loss"] > 0


def test_the_smallest_budget_is_named(pair: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", pair, merge=AUTO, budget="0.01x")
    with pytest.raises(PlanError, match="the smallest possible one is") as caught:
        compile_recipe(recipe, tmp_path / "artifact")
    named = caught.value.message.rsplit("`", 2)[1]
    recipe = write_recipe(tmp_path / "r.yaml", pair, merge=AUTO, budget=named)
    artifact = compile_recipe(recipe, tmp_path / "artifact")
    assert {name for layer in forms_of(manifest_of(artifact)) for c in layer for name in c} == {
        "2bit-g64"
    }


@pytest.mark.parametrize(
    ("merge", "budget", "names"),
    [
        ({"center": "auto", "residual": "none", "group": 32}, "0.9x", r"[2-8]bit-g32|16bit|exact"),
        ({"center": "4bit", "residual": "auto", "group": 64}, "0.7x", r"4bit-g64.*|exact"),
        ({"center": "4bit", "residual": "1bit", "group": "auto"}, "0.9x", r"4bit.*1bit.*|exact"),
        ({**AUTO, "method": "mean"}, "0.8x", r".*"),
    ],
)
def test_one_of_them_may_be_auto(
    merge: dict[str, Any], budget: str, names: str, pair: dict[str, Path], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", pair, merge=merge, budget=budget)
    manifest = manifest_of(compile_recipe(recipe, tmp_path / "artifact"))
    assert manifest["experts"]["ratio"] <= float(budget[:-1])
    assert all(re.fullmatch(names, name) for name in manifest["plan"]["forms"])
    assert manifest["recipe"]["merge"]["method"] == merge.get("method", "joint")


def test_an_unrelated_variant_keeps_to_itself(pair: dict[str, Path], tmp_path: Path) -> None:
    """A model of the same shape, from another seed: the related ones share, it does not."""
    generator = torch.Generator().manual_seed(0)
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    for path in pair["base"].iterdir():
        (stranger / path.name).write_bytes(path.read_bytes())

    def scramble(values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            if ".experts." in name:
                noise = torch.randn(value.shape, generator=generator) * value.float().std()
                values[name] = noise.to(value.dtype)

    tiny.edit(stranger, scramble)
    sources = {**pair, "stranger": stranger}
    recipe = write_recipe(tmp_path / "r.yaml", sources, merge=AUTO, budget="0.9x")
    manifest = manifest_of(compile_recipe(recipe, tmp_path / "artifact"))
    together = Counter[bool]()
    for layer in manifest["plan"]["layers"]:
        for groups in layer["experts"]:
            own = next(group[:-1] for group in groups if 2 in group[:-1])
            assert own == [2]
            together[any(group[:-1] == [0, 1] for group in groups)] += 1
    assert together[True] > 0.8 * LAYERS * EXPERTS


# Methods


METHODS = ["joint", "mean", "representative", "weighted", "regmean", "ties", "task-arithmetic"]


@pytest.mark.parametrize(
    ("method", "residual"), [(m, ("none", "2bit")[i % 2]) for i, m in enumerate(METHODS)]
)
def test_every_method(
    method: str, residual: str, texts: dict[str, Any], pair: dict[str, Path], tmp_path: Path
) -> None:
    merge = {"method": method, "center": "4bit", "residual": residual, "group": 32}
    recipe = write_recipe(
        tmp_path / "r.yaml",
        pair,
        merge=merge,
        budget="0.7x" if residual == "2bit" else "0.3x",
        calibration=texts,
    )
    artifact = compile_recipe(recipe, tmp_path / "artifact")
    manifest = manifest_of(artifact)
    assert manifest["experts"]["ratio"] <= (0.7 if residual == "2bit" else 0.3)
    assert manifest["recipe"]["merge"]["method"] == method
    for layer in manifest["layers"]:
        # What is coded jointly may differ more from the weights, to differ less in what it does.
        most = 0.2 if method == "joint" else 0.15 if residual == "none" else 0.1
        assert 0.01 < layer["measured_error"] < most
    assert all(rows.isfinite().all() for rows in all_rows(artifact).values())


def test_methods_are_what_they_say(
    texts: dict[str, Any], pair: dict[str, Path], tmp_path: Path
) -> None:
    """Plain centers of one expert, straight from the checkpoints."""
    base, chat = (source_rows(m, 1, 3, "down_proj").float() for m in pair.values())
    expected = {
        "mean": (base + chat) / 2,
        "task-arithmetic": base + 0.25 * (chat - base),
        "ties": None,
        "weighted": None,
    }
    for method, wanted in expected.items():
        merge = {"method": method, "center": "16bit", "residual": "none"}
        merge |= {"params": {"scale": 0.25}} if method == "task-arithmetic" else {}
        recipe = write_recipe(
            tmp_path / "r.yaml", pair, merge=merge, budget="1.0x", calibration=texts
        )
        artifact = compile_recipe(recipe, tmp_path / method)
        rows = all_rows(artifact)["chat", 1, 3, "down_proj"].float()
        if wanted is not None:
            torch.testing.assert_close(rows, wanted.bfloat16().float(), rtol=2**-7, atol=1e-6)
        elif method == "ties":
            # Two deltas, one of them zero: a fifth of the other's entries is kept as it is.
            changed = rows != base
            assert changed.double().mean() < 0.205  # entries of the same size are kept together
            np.testing.assert_allclose(rows[changed], chat[changed], rtol=2**-7)
            assert (chat - base)[changed].abs().min() >= (chat - base)[~changed].abs().median()
        else:
            part = ((rows - base) * (chat - base)).sum() / (chat - base).square().sum()
            assert 0 <= part <= 1
            torch.testing.assert_close(rows, base + part * (chat - base), rtol=0.02, atol=2e-3)


# In any order


def saved(folder: Path, family: str, *, moved: bool, noise: float, tokens: bool = True) -> Path:
    found = tiny.model(family, 3)
    if noise:
        add_noise(found, noise)
    if moved:
        move(found)
    found.save_pretrained(folder, max_shard_size="40KB")
    if tokens:
        save_tokenizer(folder)
    return folder


def logits(folder: Path) -> Tensor:
    model = tiny.load(folder).float()
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found: Tensor = model(input_ids=ids).logits
    return found


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("gpt-oss", "private"),
        ("qwen3-moe", "private"),
        ("mixtral", "coded"),
        ("gpt-oss", "planned"),
        ("mixtral", "calibrated"),
    ],
)
def test_any_index(family: str, kind: str, tmp_path: Path) -> None:
    """A variant in another order of experts and neurons is served like the same one in order."""
    sources = {
        "base": saved(tmp_path / "base", family, moved=False, noise=0.0),
        "plain": saved(tmp_path / "plain", family, moved=False, noise=0.1),
    }
    moved = {**sources, "plain": saved(tmp_path / "moved", family, moved=True, noise=0.1)}
    budget = {"private": "2.5x", "coded": "0.645x"}.get(kind, "0.4x")
    merge: dict[str, Any] = {"center": "4bit", "residual": "2bit", "group": 32}
    more: dict[str, Any] = {"merge": merge if kind in ("private", "coded") else AUTO}
    if kind == "calibrated":
        (tmp_path / "text.txt").write_text(words(200, 5))
        text = {name: [str(tmp_path / "text.txt")] for name in sources}
        more["calibration"] = {"text": text, "samples": 8, "length": 10}
    outs = {}
    for name, own in (("plain", sources), ("moved", moved)):
        recipe = write_recipe(
            tmp_path / "r.yaml", own, match={"scope": "any-index"}, budget=budget, **more
        )
        artifact = compile_recipe(recipe, tmp_path / f"artifact-{name}")
        with Artifact(artifact) as opened:
            export(opened, "plain", tmp_path / f"out-{name}")
        outs[name] = tmp_path / f"out-{name}"
    if kind == "private":
        for name, source in (("plain", sources["plain"]), ("moved", moved["plain"])):
            ours, theirs = tiny.tensors(outs[name]), tiny.tensors(source)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        return
    # The same parts in another order, to the bit; a calibration sees other experts at work.
    found, expected = tiny.load(outs["moved"]), tiny.load(outs["plain"])
    if kind != "calibrated":
        move(expected, neurons=False)  # merged ones have the order of the base
        state = found.state_dict()
        for name, value in expected.state_dict().items():
            assert torch.equal(state[name], value), name
    assert logits(outs["moved"]).isfinite().all()
    manifests = [manifest_of(tmp_path / f"artifact-{name}") for name in outs]
    assert manifests[0]["experts"]["ratio"] == pytest.approx(manifests[1]["experts"]["ratio"], 0.02)
    remaps = [raw_tensors(tmp_path / f"artifact-{name}/remap.safetensors") for name in outs]
    assert any((a != b).any() for a, b in zip(*(r.values() for r in remaps), strict=True))
