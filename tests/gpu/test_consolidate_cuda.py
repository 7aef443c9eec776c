"""Consolidation on a GPU gives the artifact that a CPU gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moecc.artifact import Artifact
from moecc.consolidate import open_recipe, run, study
from moecc.recipe import Recipe, parse_recipe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

MODELS = Path(__file__).parents[2] / "examples" / "models"


def _recipe(merge: str, budget: str, metric: str = "l2") -> Recipe:
    variants = "".join(
        f"  {name}: {{source: {MODELS / f'nano-{name}'}}}\n"
        for name in ("base", "chat", "math", "python")
    )
    text = (
        f"version: 1\nbase: base\nvariants:\n{variants}budget: {budget}\n"
        f"merge: {merge}\nsimilarity: {{metric: {metric}}}\n"
    )
    return parse_recipe(text, MODELS)


@pytest.fixture(autouse=True)
def _no_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOECC_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize("metric", ["l2", "cka"])
def test_similarity(metric: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        monkeypatch.setenv("MOECC_CACHE", str(tmp_path / device))
        opened = open_recipe(_recipe("{}", "4.0x", metric))
        found[device] = study(opened, device=device).similarity
    for a, b in zip(found["cpu"].distances(metric), found["cuda"].distances(metric), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
    for a, b in zip(found["cpu"].distinct, found["cuda"].distinct, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("merge", "budget"),
    [
        ("{center: 16bit, residual: 1bit}", "1.5x"),
        ("{center: 4bit, residual: 2bit, group: 32}", "0.95x"),
        ("{center: 5bit, residual: 3bit, group: row}", "1.2x"),
        ("{method: representative}", "1.0x"),
    ],
)
def test_same_files(merge: str, budget: str, tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        run(_recipe(merge, budget), tmp_path / device, device=device)
    with Artifact(tmp_path / "cpu") as cpu, Artifact(tmp_path / "cuda") as cuda:
        bank = [name for name in cpu.files if name.startswith("experts-")]
        assert len(bank) == 4
        for name in bank:
            assert cpu.files[name] == cuda.files[name]
        errors = [[layer["measured_error"] for layer in a.manifest["layers"]] for a in (cpu, cuda)]
        np.testing.assert_allclose(*errors, rtol=1e-4)
