"""The command line: help, exit codes, what goes to which stream, and what the figures are.

`UPDATE_SNAPSHOTS=1 pytest tests/test_cli.py` writes the help pages in tests/snapshots anew.
"""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import threading
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MODELS, NAMES, RECIPES, ROOT, Cli, Lab, manifest_of, tree, write_recipe
from typer.testing import CliRunner

import moecc
from moecc.artifact import Artifact
from moecc.cli import app
from moecc.errors import RecipeError
from moecc.export import export

SNAPSHOTS = Path(__file__).parent / "snapshots"
COMMANDS = ("consolidate", "inspect", "export", "generate", "eval", "serve")
PAGES = {"moecc": ["--help"], **{name: [name, "--help"] for name in COMMANDS}}
ESCAPE = "\x1b"
COLOR = re.compile(r"\x1b\[[0-9;]*(3[0-7]|4[0-7]|9[0-7]|10[0-7]|38;|48;)")
UPDATE = os.environ.get("UPDATE_SNAPSHOTS") == "1"


# ---- help


@pytest.mark.parametrize("name", PAGES)
def test_help_is_as_it_was(name: str) -> None:
    env = {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "xterm", "LC_ALL": "C.UTF-8"}
    result = CliRunner().invoke(app, PAGES[name], prog_name="moecc", env=env)
    assert result.exit_code == 0
    text = "\n".join(line.rstrip() for line in result.output.splitlines()) + "\n"
    path = SNAPSHOTS / f"{name}.txt"
    if UPDATE:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text(), "run with UPDATE_SNAPSHOTS=1 if this is meant"


def test_every_command_has_a_snapshot_and_examples() -> None:
    assert {
        command.name or command.callback.__name__
        for command in app.registered_commands
        if command.callback
    } == (set(COMMANDS))
    assert {path.stem for path in SNAPSHOTS.glob("*.txt")} == set(PAGES)
    for name in COMMANDS:
        assert f"moecc {name} " in (SNAPSHOTS / f"{name}.txt").read_text().split("Example")[1]


_BLOCKED = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "scipy", "sklearn", "safetensors"):
            raise AssertionError(f"import of {name}")

sys.meta_path.insert(0, Block())
from moecc.cli import main
for line in sys.stdin:
    sys.argv = ["moecc", *line.split()]
    try:
        main()
    except SystemExit as end:
        print("EXIT", end.code, line.strip(), flush=True)
"""


def test_help_imports_no_torch() -> None:
    lines = ["--help", "-h", "--version", *(f"{name} --help" for name in COMMANDS)]
    lines += [f"{name} -h" for name in COMMANDS]
    done = subprocess.run(
        [sys.executable, "-c", _BLOCKED],
        input="\n".join([*lines, "inspect", "nonsense", "export ."]) + "\n",
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    ends = [line.removeprefix("EXIT ") for line in done.stdout.splitlines() if "EXIT" in line]
    wrong = ["2 inspect", "2 nonsense", "2 export ."]
    assert ends == [*(f"0 {line}" for line in lines), *wrong], done.stderr
    assert f"moecc {moecc.__version__}\n" in done.stdout


def test_blocker_blocks() -> None:
    """The test above would see an import of torch."""
    done = subprocess.run(
        [sys.executable, "-c", _BLOCKED],
        input="inspect .\n",
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "EXIT 70 inspect ." in done.stdout
    assert "import of torch" in done.stderr


# ---- exit codes


def test_exit_codes_are_documented() -> None:
    table = re.findall(r"^\| (\d+) \| (.+) \|$", (ROOT / "docs/cli.md").read_text(), re.MULTILINE)
    assert [int(code) for code, _ in table] == [0, 1, 2, 3, 70, 130]


def test_success(quickstart: Path, cli: Cli) -> None:
    assert cli("inspect", quickstart).code == 0
    assert cli("--version").out == f"moecc {moecc.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["inspect"],
        ["inspect", ".", "--nonsense"],
        ["inspect", ".", "--all-pairs"],
        ["inspect", ".", "--layer", "x"],
        ["export", "."],
        ["export", ".", "--variant", "chat"],
        ["generate", ".", "--variant", "chat", "--prompt", "x", "--max-new-tokens", "0"],
        ["consolidate"],
        ["consolidate", "r.yaml", "s.yaml"],
    ],
    ids=" ".join,
)
def test_usage(arguments: list[str], cli: Cli) -> None:
    outcome = cli(*arguments)
    assert outcome.code == 2, outcome
    assert "Traceback" not in outcome.err
    assert outcome.err if arguments else outcome.out + outcome.err


def test_suggestions(cli: Cli) -> None:
    outcome = cli("consolidat", "r.yaml")
    assert (outcome.code, "Did you mean 'consolidate'" in outcome.err) == (2, True), outcome


def test_failure(cli: Cli, tmp_path: Path) -> None:
    outcome = cli("inspect", tmp_path).failed(1, "is not a moecc artifact")
    assert outcome.out == ""
    assert outcome.err.splitlines()[1] == "hint: give the folder `consolidate` wrote"


def test_internal_error(quickstart: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(manifest: object) -> None:
        raise RuntimeError("[red]boom[/]")

    monkeypatch.setattr("moecc.report.artifact_json", broken)
    outcome = cli("inspect", quickstart)
    assert outcome.code == 70
    assert outcome.err == (
        "error: internal error: RuntimeError: [red]boom[/]\n"
        "hint: this is a bug in moecc; set MOECC_DEBUG=1 to see where\n"
    )
    monkeypatch.setenv("MOECC_DEBUG", "1")
    with pytest.raises(RuntimeError, match="boom"):
        cli("inspect", quickstart)


def test_debug_shows_where(cli: Cli, lab: Lab, tmp_path: Path) -> None:
    missing = tmp_path / "r.yaml"
    command = ("consolidate", missing, "--out", tmp_path / "out")
    plain, debug = lab(*command), lab(*command, MOECC_DEBUG="1")
    assert (plain.code, "Traceback" in plain.err) == (1, False)
    assert (debug.code, debug.err.startswith("Traceback")) == (1, True)
    assert "moecc.errors.RecipeError: cannot read the recipe" in debug.err
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOECC_DEBUG", "1")
        with pytest.raises(RecipeError):
            cli(*command)


def test_closed_pipe() -> None:
    """`moecc inspect ... | head -1` ends quietly."""
    code = "import sys; sys.argv = ['moecc', '--help']; import moecc.cli; moecc.cli.main()"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, cwd=ROOT, check=False
    )
    os.close(write)
    assert done.returncode == 1
    assert done.stderr == b""


# ---- JSON


def check_figures(document: dict[str, Any], manifest: dict[str, Any]) -> None:
    """What every JSON document about an artifact holds."""
    assert document["format_version"] == 1
    assert list(document["variants"]) == list(NAMES)
    assert document["experts"]["ratio"] == manifest["experts"]["ratio"]
    assert document["experts"]["bytes"] == manifest["experts"]["bytes"]
    assert document["experts"]["slots_per_layer"] == manifest["experts"]["slots_per_layer"]
    assert document["non_expert"]["bytes"] == manifest["non_expert"]["bytes"]
    assert document["budget"] == "0.95x"


def test_inspect_json(quickstart: Path, cli: Cli) -> None:
    outcome = cli("inspect", quickstart, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    document, manifest = json.loads(outcome.out), manifest_of(quickstart)
    check_figures(document, manifest)
    assert document["artifact_bytes"] == sum(
        path.stat().st_size
        for path in quickstart.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    )
    assert document["manifest_sha256"] == manifest["manifest_sha256"]
    assert [layer["slots"] for layer in document["layers"]] == manifest["experts"][
        "slots_per_layer"
    ]
    assert document["variants"]["chat"]["source"] == "../examples/models/nano-chat"


def test_consolidate_json(quickstart: Path, cli: Cli, tmp_path: Path) -> None:
    recipe, manifest = RECIPES / "quickstart.yaml", manifest_of(quickstart)
    dry = cli("consolidate", recipe, "--dry-run", "--json")
    done = cli("consolidate", recipe, "--out", tmp_path / "out", "--json")
    assert (dry.code, dry.err, done.code, done.err) == (0, "", 0, "")
    documents = [json.loads(dry.out), json.loads(done.out)]
    assert [document.pop("out") for document in documents] == [None, str(tmp_path / "out")]
    assert documents[0] == documents[1]
    for document in documents:
        assert document["smallest_budget"] == "0.9063x"
        assert document["plan"] == manifest["plan"]
        assert document["experts"]["params"] == manifest["experts"]["params"]
        check_figures(document, manifest)


def test_export_and_generate_json(quickstart: Path, cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome = cli("export", quickstart, "--variant", "chat", "--out", out, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    assert json.loads(outcome.out) == {"variant": "chat", "out": str(out)}


def test_errors_in_json(quickstart: Path, cli: Cli, tmp_path: Path) -> None:
    outcome = cli("inspect", tmp_path, "--json")
    assert (outcome.code, outcome.out) == (1, "")
    assert json.loads(outcome.err) == {
        "error": {
            "message": f"`{tmp_path}` is not a moecc artifact: it has no `manifest.json`",
            "hint": "give the folder `consolidate` wrote",
            "exit_code": 1,
        }
    }
    recipe = tmp_path / "r.yaml"
    recipe.write_text("version: 1\nbudget: lots\n")
    outcome = cli("consolidate", recipe, "--dry-run", "--json")
    message = json.loads(outcome.err)["error"]["message"]
    assert message.startswith(f"2 mistakes in `{recipe}`")
    assert "\n" in message


# ---- streams, colors, widths


def test_stdout_has_data_and_stderr_the_rest(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    recipe = write_recipe(tmp_path / "r.yaml")
    plain = cli("consolidate", recipe, "--out", tmp_path / "a")
    quiet = cli("consolidate", recipe, "--out", tmp_path / "b", "-q")
    verbose = cli("consolidate", recipe, "--out", tmp_path / "c", "-v")
    assert [o.code for o in (plain, quiet, verbose)] == [0, 0, 0]
    assert plain.out == verbose.out
    assert "smallest budget with this merge: 0.9063x" in plain.out
    assert "budget 0.95x" in plain.out
    assert "wrote" not in plain.out
    lines = plain.err.splitlines()
    assert lines[-1] == f"wrote {tmp_path / 'a'}; look at it with: moecc inspect {tmp_path / 'a'}"
    assert all(re.fullmatch(r"(sources|similarity|artifact): \d+%", line) for line in lines[:-1])
    assert verbose.err.startswith(f"moecc {moecc.__version__}, Python 3.")
    assert quiet.err == ""
    assert quiet.out in ("", plain.out)


@pytest.mark.parametrize("switch", ["none", "NO_COLOR", "--no-color"])
def test_no_escape_codes_in_a_pipe(switch: str, quickstart: Path, lab: Lab) -> None:
    options = [switch] if switch.startswith("--") else []
    env = {"NO_COLOR": "1"} if switch == "NO_COLOR" else {}
    for arguments in (
        ["inspect", quickstart],
        ["inspect", quickstart, "--layer", 0],
        ["inspect", "x"],
    ):
        outcome = lab(*arguments, *options, **env)
        assert ESCAPE not in outcome.out + outcome.err


def in_terminal(lab: Lab, *arguments: object, **env: str) -> str:
    """What a terminal would get, both streams."""
    master, slave = pty.openpty()
    chunks: list[bytes] = []

    def read() -> None:
        try:
            while data := os.read(master, 4096):
                chunks.append(data)
        except OSError:
            pass  # the last writer closed it

    reader = threading.Thread(target=read)
    reader.start()
    lab(*arguments, terminal=os.ttyname(slave), TERM="xterm-256color", **env)
    os.close(slave)
    reader.join(10)
    os.close(master)
    return b"".join(chunks).decode()


def test_colors_on_a_terminal(quickstart: Path, lab: Lab, tmp_path: Path) -> None:
    commands = (["inspect", quickstart, "--layer", 0], ["inspect", tmp_path])
    for command in commands:
        assert COLOR.search(in_terminal(lab, *command)), command
        assert not COLOR.search(in_terminal(lab, *command, NO_COLOR="1"))
        assert not COLOR.search(in_terminal(lab, *command, "--no-color"))
    recipe = write_recipe(tmp_path / "r.yaml")
    bars = in_terminal(lab, "consolidate", recipe, "--out", tmp_path / "out")
    assert "100%" in bars
    assert "artifact  " in bars
    quiet = in_terminal(lab, "consolidate", recipe, "--out", tmp_path / "out2", "-q")
    assert "100%" not in quiet


@pytest.mark.parametrize("columns", [60, 20, 1])
def test_narrow_terminal(
    columns: int, quickstart: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for arguments in (
        ["inspect", quickstart],
        ["inspect", quickstart, "--layer", 0],
        ["inspect", quickstart, "--layer", 0, "--all-pairs"],
        ["consolidate", RECIPES / "quickstart.yaml", "--dry-run"],
        ["--help"],
        ["inspect", "--help"],
    ):
        outcome = cli(*arguments)
        assert outcome.code == 0, outcome
        if "--help" not in arguments:
            assert max(map(len, outcome.out.splitlines())) <= columns, arguments
    cli("inspect", quickstart / "nowhere").failed(1, "is not a folder")
    json.loads(cli("inspect", quickstart, "--json").out)  # is never wrapped


def test_names_are_not_markup(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "[bold]models[red]"
    folder.symlink_to(MODELS)
    sources = {name: f"{folder}/nano-{name}" for name in ("base", "chat")}
    recipe = write_recipe(tmp_path / "r.yaml", sources)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "300")
        outcome = cli("consolidate", recipe, "--dry-run")
    assert f"{folder}/nano-chat" in outcome.out
    cli("inspect", tmp_path / "[/x]").failed(1, f"`{tmp_path}/[/x]` is not a folder")


# ---- dry run


def test_dry_run_writes_nothing(quickstart: Path, cli: Cli, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml")
    before = tree(tmp_path)
    models = tree(MODELS)
    outcome = cli("consolidate", recipe, "--dry-run", "--out", tmp_path / "out")
    assert outcome.code == 0
    assert "MixtralForCausalLM: 4 layers of 8 experts" in " ".join(outcome.out.split())
    assert tree(tmp_path) == before
    assert tree(MODELS) == models


# ---- similarity


def test_heat_map(quickstart: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    document = json.loads(cli("inspect", quickstart, "--layer", 2, "--json").out)
    assert document["layer"] == manifest_of(quickstart)["layers"][2]["name"]
    assert (document["metric"], document["variants"]) == ("l2", list(NAMES))
    distances = np.array(document["distances"])
    assert distances.shape == (8, 6)
    measured = json.loads((quickstart / "similarity.json").read_bytes())
    assert distances.tolist() == measured["l2"][2]
    text = cli("inspect", quickstart, "--layer", 2).out
    for (a, b), column in zip(combinations(NAMES, 2), distances.T, strict=True):
        (line,) = (line for line in text.splitlines() if f"{a} - {b} " in line)
        cells = [cell.strip() for cell in line.split("│")[2:5]]
        assert cells == [f"{x:.4f}" for x in (column.min(), column.mean(), column.max())]
        strip = line.split("│")[5][1:9]
        assert len(strip) == 8
        darkest = np.flatnonzero(column == column.max())[0]
        assert " ░▒▓█".index(strip[darkest]) == max(" ░▒▓█".index(c) for c in strip)
    other = json.loads(cli("inspect", quickstart, "--layer", 2, "--metric", "cosine", "--json").out)
    assert other["distances"] == measured["cosine"][2]


@pytest.mark.parametrize("metric", ["l2", "cosine", "cka"])
def test_all_pairs(metric: str, lossless: Path, cli: Cli) -> None:
    command = ("inspect", lossless, "--layer", 1, "--all-pairs", "--metric", metric)
    document = json.loads(cli(*command, "--json").out)
    distances = np.array(document["distances"])
    assert distances.shape == (32, 32)
    assert np.allclose(distances, distances.T, atol=1e-12)
    assert np.allclose(np.diag(distances), 0, atol=1e-6)
    if metric != "cka":  # what is served is exact, so it is what was measured
        measured = np.array(json.loads((lossless / "similarity.json").read_bytes())[metric][1])
        for pair, (a, b) in enumerate(combinations(range(4), 2)):
            served = [distances[a * 8 + e, b * 8 + e] for e in range(8)]
            assert np.allclose(served, measured[:, pair], rtol=1e-5)
        # Another expert is further away than a sibling is.
        assert distances[0, 1] > 2 * distances[0, 8]
    lines = [line for line in cli(*command).out.splitlines() if set(line) <= set(" ░▒▓█") and line]
    assert len(lines) == 32
    assert {len(line) for line in lines} == {64}


# ---- generation


def test_generate_is_what_transformers_generates(
    quickstart: Path, cli: Cli, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    variant = "math"

    with Artifact(quickstart) as artifact:
        export(artifact, variant, tmp_path / "checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "checkpoint")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype="auto").eval()
    inputs = tokenizer("Q: 12 + 7 =", return_tensors="pt")
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0]
    expected = tokenizer.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert expected.strip()
    command = ("generate", quickstart, "--variant", variant, "--prompt", "Q: 12 + 7 =")
    plain = cli(*command, "--max-new-tokens", 16)
    assert (plain.code, plain.out) == (0, f"{expected}\n")
    assert plain.err == ""
    document = json.loads(cli(*command, "--max-new-tokens", 16, "--json").out)
    assert document == {"variant": variant, "prompt": "Q: 12 + 7 =", "text": expected}


def test_generate_wrong(quickstart: Path, cli: Cli) -> None:
    outcome = cli("generate", quickstart, "--variant", "nobody", "--prompt", "x")
    outcome.failed(1, "no variant `nobody`")
    outcome = cli("generate", quickstart, "--variant", "chat", "--prompt", "")
    assert outcome.code in (0, 1)
    assert "internal" not in outcome.err
