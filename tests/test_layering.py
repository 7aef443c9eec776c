"""Modules import only what comes before them, and the command line starts without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "moecc"

# Lowest first; a module imports only from those before it. A new one needs a place here.
_ORDER = """
    errors strictyaml recipe tensorfile files hub sources checkpoint skeleton architecture
    compatibility variants parallel coding similarity plan bank merge nonexpert manifest artifact
    card staging writer
    opened build consolidate export generate inspection report console cli
"""
ORDER = _ORDER.split()


def imports(path: Path, names: set[str]) -> set[str]:
    """The modules of the package that a file imports, at any depth of its code."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            parts = [alias.name.split(".") for alias in node.names]
            found |= {p[1] for p in parts if p[0] == "moecc" and len(p) > 1}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            if node.module == "moecc":
                found |= {alias.name for alias in node.names} & names
            elif node.module and node.module.startswith("moecc."):
                found.add(node.module.split(".")[1])
    return found


def violations(package: Path) -> list[str]:
    modules = {p.stem: p for p in package.glob("*.py") if not p.stem.startswith("__")}
    found = [f"{name} has no place in ORDER" for name in sorted(modules.keys() - set(ORDER))]
    found += [f"{name} is in ORDER but gone" for name in sorted(set(ORDER) - modules.keys())]
    rank = {name: i for i, name in enumerate(ORDER)}
    for name, path in sorted(modules.items()):
        for other in sorted(imports(path, set(modules))):
            if rank.get(other, -1) >= rank.get(name, len(ORDER)):
                found.append(f"{name} imports {other}, which is not below it")
    return found


def test_no_upward_import() -> None:
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("plan", "from moecc.build import Build"),
        ("files", "def f():\n    import moecc.sources"),
        ("errors", "from moecc import cli"),
        ("new", "from moecc.errors import MoeccError"),
    ],
)
def test_upward_imports_are_found(name: str, text: str, tmp_path: Path) -> None:
    for path in PACKAGE.glob("*.py"):
        (tmp_path / path.name).write_text(path.read_text())
    with (tmp_path / f"{name}.py").open("a") as file:
        file.write(f"\n{text}\n")
    assert len(violations(tmp_path)) == 1


def test_cli_leaves_torch_out() -> None:
    code = "import sys, moecc.cli; print([m for m in ('torch', 'transformers', 'numpy', 'scipy', "
    code += "'huggingface_hub', 'safetensors') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == "[]\n"
