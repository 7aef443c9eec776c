"""The command line with sources on the Hub, against the local fake."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import MODELS, compile_recipe, manifest_of, write_recipe
from fake_hub import FakeHub

PAIR = ("base", "chat")

_RUN = """
import contextlib, io, json, os, sys
from moecc.cli import main
done = []
for argv in json.loads(sys.argv[1]):
    sys.argv = ["moecc", *argv]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            done.append([end.code, out.getvalue(), err.getvalue()])
print(json.dumps(done))
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        for name in PAIR:
            folder = MODELS / f"nano-{name}"
            files = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
            files["README.md"] = b"---\nlicense: apache-2.0\n---\n# Model\n"
            hub.add(f"org/nano-{name}", files, revision="v1")
            wrong = {**files, "config.json": b"{}"}
            hub.add(f"org/nano-{name}", wrong)  # main is something else
        yield hub


def run(hub: FakeHub, home: Path, *commands: list[str], **env: str) -> Any:
    hub.served.clear()
    extra = {"COLUMNS": "120", "MOECC_CACHE": str(home / "moecc"), **env}
    return hub.run(_RUN, home, json.dumps(commands), **extra)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sources = {name: f"org/nano-{name}@v1" for name in PAIR}
    return write_recipe(tmp_path_factory.mktemp("recipe") / "r.yaml", sources)


def test_dry_run_reads_headers_only(hub: FakeHub, recipe: Path, tmp_path: Path) -> None:
    command = ["consolidate", str(recipe), "--dry-run"]
    plan_out = tmp_path / "plan.json"
    plain, document, planned, *wrong = run(
        hub,
        tmp_path / "home",
        command,
        [*command, "--json"],
        [*command, "--plan-out", str(plan_out)],
        *wrong_commands(tmp_path),
    )
    code, out, err = plain
    assert code == 0, err
    flat = " ".join(out.split())
    assert "MixtralForCausalLM: 4 layers of 8 experts" in flat
    assert "smallest budget with this merge: 0.5938x" in flat  # (4.5 + 2 * 2.5) / 16
    for name in PAIR:
        commit = hub.commit_of(f"org/nano-{name}", "v1")
        assert commit
        assert f"org/nano-{name}@v1 ({commit[:12]})" in flat
    assert "2.8 MiB" in flat
    assert "799.7 KiB" in flat
    assert "no plan: the weights are not on this machine" in err
    code, out, err = document
    assert (code, err) == (0, "")
    figures = json.loads(out)
    assert figures["smallest_budget"] == "0.5938x"
    assert figures["experts"]["source_bytes"] == 2 * 4 * 8 * 3 * 96 * 160 * 2
    assert figures["out"] is None
    code, _, err = planned
    assert code == 1
    assert "a plan needs the weights" in err
    assert not plan_out.exists()
    ranges = 3 * 2 + 4  # one of 128 KiB for each file of each command
    assert 0 < hub.served["model.safetensors"] <= ranges * (128 << 10)
    assert hub.served["tokenizer.json"] == 0
    assert not any(p.suffix == ".safetensors" for p in (tmp_path / "home").rglob("*"))
    for (code, out, err), text in zip(wrong, WRONG.values(), strict=True):
        assert (code, out) == (1, ""), err
        assert text in " ".join(err.split())
        assert "Traceback" not in err


WRONG = {
    "org/nano-chat@v9": "has no revision `v9`",
    "org/nothing": "the Hub has no model `org/nothing`, or it is private",
    "org/nano-chat": "variant `chat`",  # its main branch has an empty config
}


def wrong_commands(folder: Path) -> Iterator[list[str]]:
    for number, source in enumerate(WRONG):
        sources = {"base": "org/nano-base@v1", "chat": source}
        recipe = write_recipe(folder / f"{number}.yaml", sources)
        yield ["consolidate", str(recipe), "--dry-run", "-q"]


def test_consolidate_from_the_hub(hub: FakeHub, recipe: Path, tmp_path: Path) -> None:
    out, again = tmp_path / "artifact", tmp_path / "again"
    command = ["consolidate", str(recipe), "--json", "--out"]
    online = run(hub, tmp_path / "home", [*command, str(out)], ["inspect", str(out), "--verify"])
    assert [code for code, _, _ in online] == [0, 0], online
    size = (MODELS / "nano-base/model.safetensors").stat().st_size
    assert size <= hub.served["model.safetensors"] <= 2 * size + 2 * (128 << 10)
    manifest = manifest_of(out)
    commits = {name: hub.commit_of(f"org/nano-{name}", "v1") for name in PAIR}
    assert {v["name"]: v["commit"] for v in manifest["variants"]} == commits
    assert {v["license"] for v in manifest["variants"]} == {"apache-2.0"}
    assert [v["source"] for v in manifest["variants"]] == [f"org/nano-{n}@v1" for n in PAIR]
    card = (out / "README.md").read_text()
    matter = yaml.safe_load(card.split("---\n")[1])
    # The Hub links models by their bare ids.
    assert matter["base_model"] == ["org/nano-base", "org/nano-chat"]
    assert matter["license"] == "apache-2.0"
    assert f"| chat | org/nano-chat@v1 | {commits['chat']} | apache-2.0 |" in card
    # The same bytes as from folders, but for what names the sources.
    local = write_recipe(tmp_path / "l.yaml", {n: MODELS / f"nano-{n}" for n in PAIR})
    folders = compile_recipe(local, tmp_path / "local")
    ours, theirs = manifest["files"], manifest_of(folders)["files"]
    assert {k: v for k, v in ours.items() if k != "README.md"} == {
        k: v for k, v in theirs.items() if k != "README.md"
    }
    # Without a network the cache is enough, and nothing changes.
    (offline,) = run(hub, tmp_path / "home", [*command, str(again)], HF_HUB_OFFLINE="1")
    assert offline[0] == 0, offline
    assert sum(hub.served.values()) == 0
    assert (again / "manifest.json").read_bytes() == (out / "manifest.json").read_bytes()
