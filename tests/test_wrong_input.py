"""Wrong input of every kind: one clear error, the right exit code, and nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MODELS, ROOT, Cli, Lab, tree, write_recipe
from safetensors.torch import load_file, save_file

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
EXPERT = "model.layers.1.block_sparse_moe.experts.3.w1.weight"


def copy_model(folder: Path) -> Path:
    shutil.copytree(MODELS / "nano-chat", folder)
    return folder


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def split(folder: Path) -> None:
    """Two shards and an index."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[:60], names[60:]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def split_and_lose_one(folder: Path) -> None:
    split(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def split_and_cut(folder: Path) -> None:
    split(folder)
    path = folder / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def change_header(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = (folder / SINGLE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    raw = json.dumps(header).encode()
    (folder / SINGLE).write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + length :])


def offsets_of_another(header: dict[str, Any]) -> None:
    names = [name for name in header if name.endswith("w1.weight")]
    header[names[0]]["data_offsets"] = header[names[1]]["data_offsets"]


def offsets_past_the_end(header: dict[str, Any]) -> None:
    begin, end = header[EXPERT]["data_offsets"]
    header[EXPERT]["data_offsets"] = [begin + 10**9, end + 10**9]


def offsets_of_another_size(header: dict[str, Any]) -> None:
    header[EXPERT]["data_offsets"][1] -= 2


def wider_embedding(folder: Path) -> None:
    def grow(tensors: dict[str, torch.Tensor]) -> None:
        old = tensors["model.embed_tokens.weight"]
        tensors["model.embed_tokens.weight"] = torch.cat([old, old[:8]])

    edit(folder, grow)


def larger_vocabulary(folder: Path) -> None:
    wider_embedding(folder)
    edit_config(folder, vocab_size=3080)


def set_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[EXPERT][0, 0] = float("nan")


def other_model(folder: Path, family: str, **changes: Any) -> None:
    """A model of another shape or class, as `save_pretrained` writes it."""
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=3072,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        dtype="bfloat16",
        **changes,
    )
    model = getattr(transformers, f"{family}ForCausalLM")._from_config(config)
    shutil.rmtree(folder)
    model.save_pretrained(folder)


def another_architecture(folder: Path) -> None:
    other_model(folder, "Qwen3Moe", num_experts=4, moe_intermediate_size=16, head_dim=16)


def other_shapes(folder: Path) -> None:
    other_model(folder, "Mixtral", num_local_experts=4)


def dense(folder: Path) -> None:
    edit_config(folder, architectures=["LlamaForCausalLM"], model_type="llama")


# name -> (what is done to the second variant, texts of the error)
BROKEN_MODELS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "missing shard": (
        split_and_lose_one,
        ("shard `model-00002-of-00002.safetensors` named by the index is missing",),
    ),
    "truncated shard": (
        split_and_cut,
        ("`model-00001-of-00002.safetensors`: truncated: header says",),
    ),
    "empty weights": (lambda f: (f / SINGLE).write_bytes(b""), ("too short",)),
    "no weights": (lambda f: (f / SINGLE).unlink(), ("no safetensors weights",)),
    "offsets of another tensor": (
        lambda f: change_header(f, offsets_of_another),
        (f"`{SINGLE}`: hole of 30720 bytes before tensor",),
    ),
    "offsets past the end": (
        lambda f: change_header(f, offsets_past_the_end),
        (f"`{SINGLE}`", "truncated"),
    ),
    "offsets of another size": (
        lambda f: change_header(f, offsets_of_another_size),
        (EXPERT, "offsets span"),
    ),
    "one tensor in float32": (
        lambda f: edit(f, lambda t: t.update({EXPERT: t[EXPERT].float()})),
        ("chat", "F32", "BF16"),
    ),
    "all in float16": (
        lambda f: edit(f, lambda t: t.update({k: v.half() for k, v in t.items()})),
        ("is BF16 in `base` but F16 in `chat`", "save all variants with the same dtype"),
    ),
    "integer experts": (
        lambda f: edit(f, lambda t: t.update({k: v.int() for k, v in t.items() if "w1" in k})),
        ("`chat`", "I32"),
    ),
    "missing expert": (lambda f: edit(f, lambda t: t.pop(EXPERT)), ("not one for each of 8",)),
    "missing norm": (
        lambda f: edit(f, lambda t: t.pop("model.norm.weight")),
        ("has no tensor for `model.norm.weight`",),
    ),
    "NaN": (
        lambda f: edit(f, set_nan),
        ("expert 3 of `model.layers.1.mlp.experts` in variant `chat` holds NaN",),
    ),
    "another architecture": (
        another_architecture,
        ("`base` is `MixtralForCausalLM` but `chat` is `Qwen3MoeForCausalLM`",),
    ),
    "other shapes": (other_shapes, ("`base`", "`chat`", "config key")),
    "dense model": (dense, ("chat",)),
    "vocabulary not in the config": (
        wider_embedding,
        ("[3080, 96], but its config says [3072, 96]", "vocab_size"),
    ),
    "another vocabulary": (
        larger_vocabulary,
        ("config key `vocab_size` is `3072` in `base` but `3080` in `chat`", "same vocabulary"),
    ),
    "another activation": (lambda f: edit_config(f, hidden_act="gelu"), ("`hidden_act`",)),
    "unknown architecture": (
        lambda f: edit_config(f, architectures=["NoSuchModel"]),
        ("architecture `NoSuchModel`",),
    ),
    "config is not JSON": (
        lambda f: (f / "config.json").write_text("{"),
        ("`config.json` is not JSON",),
    ),
    "no config": (lambda f: (f / "config.json").unlink(), ("`config.json` is missing",)),
    "is a file": (
        lambda f: (shutil.rmtree(f), f.write_text("x")),
        ("is not a folder",),
    ),
    "is gone": (lambda f: shutil.rmtree(f), ("is not a folder",)),
}


@pytest.mark.parametrize("name", BROKEN_MODELS)
def test_broken_model(name: str, cli: Cli, tmp_path: Path) -> None:
    change, texts = BROKEN_MODELS[name]
    model = copy_model(tmp_path / "model")
    change(model)
    recipe = write_recipe(tmp_path / "r.yaml", {"base": MODELS / "nano-base", "chat": model})
    before = tree(tmp_path)
    outcome = cli("consolidate", recipe, "--out", tmp_path / "out", "-q").failed(1, *texts)
    assert outcome.out == ""
    lines = outcome.err.splitlines()
    assert lines[0].startswith("error: ")
    assert [line[:6] for line in lines[1:]] in ([], ["hint: "]), outcome
    assert tree(tmp_path) == before
    if "NaN" not in texts[0]:  # all but the values is seen in the headers
        cli("consolidate", recipe, "--dry-run", "-q").failed(1, *texts)


# ---- recipes and options

MINIMAL = "version: 1\nbudget: 1x\nvariants:\n  a: {source: ./a}\n  b: {source: ./b}\n"


@pytest.mark.parametrize(
    ("text", "texts"),
    [
        ("", ("the recipe is empty",)),
        ("# nothing\n", ("the recipe is empty",)),
        ("- a\n- b\n", ("r.yaml",)),
        (MINIMAL + "  a: {source: ./c}\n", ("a: given twice, in lines 4 and 6",)),
        (MINIMAL.replace("  b:", "  A:"), ("differs from `a` in line 4 only in letter case",)),
        (MINIMAL.replace("  b: {source: ./b}\n", ""), ("expected 2 to 64 variants, not 1",)),
        (MINIMAL.replace("budget", "buget"), ("buget: unknown key, did you mean `budget`?",)),
        (MINIMAL.replace("1x", "0x"), ("not above zero",)),
        (MINIMAL + "base: c\n", ("`c` is not a variant",)),
        ("version: 1\n\tbudget: 1x\n", ("r.yaml",)),
        ("\x00", ("r.yaml",)),
    ],
)
def test_wrong_recipe(text: str, texts: tuple[str, ...], cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    before = tree(tmp_path)
    cli("consolidate", tmp_path / "r.yaml", "--out", tmp_path / "out").failed(1, *texts)
    assert tree(tmp_path) == before


def test_recipe_that_is_no_file(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    cli("consolidate", tmp_path, "--out", out).failed(1, "is a directory", "pass a YAML file")
    cli("consolidate", tmp_path / "r.yaml", "--out", out).failed(1, "no such file")
    (tmp_path / "recipe.yaml").write_text(MINIMAL)
    outcome = cli("consolidate", tmp_path / "recipy.yaml", "--out", out)
    outcome.failed(1, "hint: did you mean `recipe.yaml`")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_budget_that_cannot_be_met(cli: Cli, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", budget="0.9x")
    before = tree(tmp_path)
    outcome = cli("consolidate", recipe, "--out", tmp_path / "out")
    outcome.failed(1, "a budget of `0.9x` cannot be met; the smallest possible one is `0.9063x`")
    recipe = write_recipe(tmp_path / "r.yaml", budget="1MB")
    outcome = cli("consolidate", recipe, "--out", tmp_path / "out")
    least = outcome.err.split("smallest possible one is `")[1].split("`")[0]
    write_recipe(recipe, budget=least)
    assert cli("consolidate", recipe, "--dry-run").code == 0
    number = int(least.removesuffix(" B")) - 1
    write_recipe(recipe, budget=f"{number} B")
    cli("consolidate", recipe, "--dry-run").failed(1, "cannot be met")
    assert tree(tmp_path).keys() == before.keys()


JUNK_PLANS = {
    "not JSON": "not a plan",
    "[" * 100_000: "not a plan",
    "[]": "not a plan",
    "{}": "not a plan",
    "null": "not a plan",
    "7": "not a plan",
    '"plan"': "not a plan",
    '{"plan_version": 99}': "plan_version is 99, not 1",
    '{"plan_version": 1, "variants": 5}': "not a plan",
}


@pytest.mark.parametrize("text", JUNK_PLANS, ids=lambda text: text[:20])
def test_junk_plan(text: str, cli: Cli, tmp_path: Path) -> None:
    plan, recipe = tmp_path / "plan.json", write_recipe(tmp_path / "r.yaml")
    plan.write_text(text)
    before = tree(tmp_path)
    outcome = cli("consolidate", recipe, "--plan", plan, "--out", tmp_path / "out")
    outcome.failed(1, JUNK_PLANS[text])
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "value",
    [
        5,
        [],
        [[]],
        [["a", True]],
        [[0.5, True]],
        [[True]],
        [[0, 1, 2, None, True]],
        [{"0": 1}],
        None,
    ],
    ids=str,
)
def test_plan_with_junk_groups(value: Any, quickstart: Path, cli: Cli, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml")
    plan = json.loads((quickstart / "manifest.json").read_bytes())["plan"]
    plan["layers"][2]["experts"][3] = value
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    before = tree(tmp_path)
    outcome = cli(
        "consolidate", recipe, "--plan", tmp_path / "plan.json", "--out", tmp_path / "out"
    )
    outcome.failed(1, "plan")
    assert tree(tmp_path) == before


def test_plan_file_that_cannot_be_used(cli: Cli, tmp_path: Path) -> None:
    recipe, out = write_recipe(tmp_path / "r.yaml"), tmp_path / "out"
    before = tree(tmp_path)
    command = ("consolidate", recipe, "--out", out, "--plan")
    cli(*command, tmp_path / "gone.json").failed(1, "cannot read the plan", "No such file")
    cli(*command, tmp_path).failed(1, "cannot read the plan", "directory")
    plan_out = tmp_path / "no/such/plan.json"
    outcome = cli("consolidate", recipe, "--dry-run", "--plan-out", plan_out)
    outcome.failed(1, "cannot write the plan")
    assert tree(tmp_path) == before


def test_unusable_device(cli: Cli, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml")
    for device in ("tpu9", "cuda:99", ""):
        outcome = cli("consolidate", recipe, "--out", tmp_path / "out", "--device", device)
        outcome.failed(1, f"`--device {device}` cannot be used")
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


# ---- outputs


def test_existing_output(cli: Cli, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("precious")
    (tmp_path / "link").symlink_to("nowhere")
    before = tree(tmp_path)
    started = time.monotonic()
    for name in ("out", "out/thesis.txt", "link"):
        cli("consolidate", recipe, "--out", tmp_path / name).failed(1, "exists", "--force")
        cli("consolidate", recipe, "--out", tmp_path / name, "--force").failed(1, "left alone")
    assert time.monotonic() - started < 10  # seen before any work
    assert tree(tmp_path) == before


def test_output_below_a_file(cli: Cli, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml")
    before = tree(tmp_path)
    cli("consolidate", recipe, "--out", recipe / "out").failed(1, "cannot write")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("command", ["consolidate", "export"])
def test_not_enough_disk_is_seen_first(
    command: str,
    quickstart: Path,
    cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml")
    before = tree(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2_000_000))
    monkeypatch.setattr(os, "pwrite", None)  # no weight is written
    arguments = [recipe] if command == "consolidate" else [quickstart, "--variant", "chat"]
    outcome = cli(command, *arguments, "--out", tmp_path / "out")
    outcome.failed(1, "not enough disk for", "are free")
    assert tree(tmp_path) == before


class Full:
    """A disk that is full after so many calls of a function of `os`."""

    def __init__(self, name: str, calls: int) -> None:
        self.function = getattr(os, name)
        self.calls = calls

    def __call__(self, *args: Any) -> Any:
        self.calls -= 1
        if self.calls < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.function(*args)


@pytest.mark.parametrize(
    ("name", "calls"), [("pwrite", 0), ("pwrite", 300), ("fsync", 3), ("fsync", 12), ("rename", 0)]
)
@pytest.mark.parametrize("command", ["consolidate", "export"])
def test_full_disk(
    command: str,
    name: str,
    calls: int,
    quickstart: Path,
    cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml")
    before = tree(tmp_path)
    arguments = [recipe] if command == "consolidate" else [quickstart, "--variant", "chat"]
    if command == "export":
        calls = min(calls, {"pwrite": 100, "fsync": 1}.get(name, 0))
    full = Full(name, calls)
    monkeypatch.setattr(os, name, full)
    outcome = cli(command, *arguments, "--out", tmp_path / "out")
    monkeypatch.undo()
    assert full.calls < 0
    outcome.failed(1, "cannot write", "No space left on device", "nothing was left behind")
    assert tree(tmp_path) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 4 MB, where this user may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_file_system(
    small_disk: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml")
    cli("consolidate", recipe, "--out", small_disk / "out").failed(1, "not enough disk")
    assert list(small_disk.iterdir()) == []
    # Somebody else takes the space after it was checked.
    usage = shutil.disk_usage(small_disk)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**9))
    outcome = cli("consolidate", recipe, "--out", small_disk / "out")
    outcome.failed(1, "cannot write", "No space left on device")
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("number", [8, 150, 420])
def test_interrupted(number: int, lab: Lab, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml")
    before = tree(tmp_path)
    outcome = lab(
        "consolidate", recipe, "--out", tmp_path / "out", number=number, signal=signal.SIGINT
    )
    assert outcome.code == 130, outcome
    assert "Traceback" not in outcome.err
    assert "wrote" not in outcome.err
    assert tree(tmp_path) == before


def test_interrupted_export(quickstart: Path, lab: Lab, tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome = lab(
        *("export", quickstart, "--variant", "chat", "--out", out),
        number=40,
        signal=signal.SIGINT,
    )
    assert outcome.code == 130, outcome
    assert "Traceback" not in outcome.err
    assert list(tmp_path.iterdir()) == []


# ---- the Hub, without a network


def test_hub_without_network(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Within seconds, whether the network is off, gone, or refuses."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        refused = f"http://127.0.0.1:{closed.getsockname()[1]}"
        sources = {"base": MODELS / "nano-base", "chat": "nobody/no-such-model@v1"}
        recipe = write_recipe(tmp_path / "r.yaml", sources)
        before = tree(tmp_path)
        cases: dict[str, dict[str, str]] = {
            "is not in the Hub cache, and HF_HUB_OFFLINE is set": {"HF_HUB_OFFLINE": "1"},
            "cannot reach the Hub for `nobody/no-such-model`": {"HF_ENDPOINT": refused},
        }
        command = [sys.executable, "-m", "moecc", "consolidate", str(recipe), "-q"]
        running = {}
        for text, env in cases.items():
            home = {"HF_HOME": str(tmp_path_factory.mktemp("hub"))}
            running[text] = subprocess.Popen(
                [*command, "--out", str(tmp_path / "out")],
                env=os.environ | home | env | {"NO_PROXY": "127.0.0.1"},
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        for text, process in running.items():
            out, err = process.communicate(timeout=60)
            assert process.returncode == 1, err
            assert (out, "Traceback" in err) == ("", False)
            assert text in " ".join(err.split())
            assert [line[:6] for line in err.splitlines()] == ["error:", "hint: "], err
    assert tree(tmp_path) == before
