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
    compatibility variants parallel texts measured routed streaming collected outputs calibration
    coding blocks lowrank alignment similarity forms allocate joint rates plan grouping planning
    bank merge merging nonexpert manifest artifact card staging writer evaluation
    opened build consolidate sweep export inspection report console

    kernels.device kernels.launch kernels.norm kernels.align kernels.linear kernels.packed
    kernels.experts kernels.router kernels.attention kernels.rotary kernels.newest

    runtime.request runtime.options runtime.interface runtime.sequence runtime.scheduler
    runtime.sampling runtime.text runtime.answer
    runtime.step runtime.linear runtime.stacked runtime.experts runtime.attention runtime.devices
    runtime.nonexpert runtime.loading runtime.residency runtime.paged runtime.static
    runtime.decoder runtime.modeled runtime.fused
    runtime.engine runtime.opening runtime.api runtime.scoring

    server.failure server.fields server.protocol server.generation server.events server.vocabulary
    server.answers server.auth server.metrics server.state server.app server.serve
    cli
"""
ORDER = _ORDER.split()


def imports(path: Path, names: set[str]) -> set[str]:
    """The modules of the package that a file imports, at any depth of its code."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("moecc.") for alias in node.names} & names
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            module = f"{node.module}."
            found |= {
                f"{module}{alias.name}".removeprefix("moecc.") for alias in node.names
            } & names
            found |= {module.removeprefix("moecc.").removesuffix(".")} & names
    return found


def violations(package: Path) -> list[str]:
    paths = [p for p in package.rglob("*.py") if not p.stem.startswith("__")]
    modules = {".".join(p.relative_to(package).with_suffix("").parts): p for p in paths}
    units = {unit(name) for name in modules}
    found = [f"{name} has no place in ORDER" for name in sorted(units - set(ORDER))]
    found += [f"{name} is in ORDER but gone" for name in sorted(set(ORDER) - units)]
    rank = {name: i for i, name in enumerate(ORDER)}
    for name, path in sorted(modules.items()):
        own = unit(name)
        for other in sorted({unit(found) for found in imports(path, set(modules))} - {own}):
            if rank.get(other, -1) >= rank.get(own, len(ORDER)):
                found.append(f"{name} imports {other}, which is not below it")
    return found


def unit(name: str) -> str:
    """A kernel and its reference are one module in two files, since Triton may not be there."""
    return name.replace("kernels.gpu.", "kernels.")


def test_no_upward_import() -> None:
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("plan", "from moecc.build import Build"),
        ("files", "def f():\n    import moecc.sources"),
        ("errors", "from moecc import cli"),
        ("new", "from moecc.errors import MoeccError"),
        ("runtime/step", "from moecc.runtime import engine"),
        ("export", "import moecc.runtime.engine"),
        ("runtime/engine", "from moecc.server.app import create_app"),
        ("kernels/gpu/norm", "from moecc.kernels.gpu.linear import linear"),
        ("kernels/norm", "from moecc.kernels.gpu import experts"),
        ("kernels/gpu/norm", "from moecc.runtime.experts import KernelExperts"),
    ],
)
def test_upward_imports_are_found(name: str, text: str, tmp_path: Path) -> None:
    for path in PACKAGE.rglob("*.py"):
        copy = tmp_path / path.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    with (tmp_path / f"{name}.py").open("a") as file:
        file.write(f"\n{text}\n")
    assert len(violations(tmp_path)) == 1


def test_only_kernels_that_run_need_triton() -> None:
    """Whoever has no GPU may have no Triton."""
    for path in PACKAGE.rglob("*.py"):
        if "gpu" not in path.parts:
            names = {name for node in ast.parse(path.read_text()).body for name in _modules(node)}
            assert not [n for n in names if n.startswith(("triton", "moecc.kernels.gpu"))], path


def _modules(node: ast.stmt) -> list[str]:
    """What a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def test_cli_leaves_torch_out() -> None:
    code = "import sys, moecc.cli; print([m for m in ('torch', 'transformers', 'numpy', 'scipy', "
    code += "'huggingface_hub', 'safetensors', 'triton') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == "[]\n"
