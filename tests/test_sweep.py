"""moecc.sweep and `consolidate --sweep`: the plans of every budget, and nothing written."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import Cli, compile_recipe, manifest_of, write_recipe
from test_alignment import add_noise

from moecc.consolidate import open_recipe, plan_studied, study
from moecc.errors import MoeccError, PlanError, RecipeError
from moecc.recipe import load_recipe, parse_budget
from moecc.sweep import Point, parse_budgets, plot, sweep

FIXED = {"center": "4bit", "residual": "2bit", "group": 32}
AUTO = {"center": "auto", "residual": "auto", "group": 64}
BUDGETS = "1.6x, 0.8x,1.2x,2.0x"
HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model and a fine-tune of it."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("base", "tuned"):
        model = tiny.model("mixtral")
        if name == "tuned":
            add_noise(model, 0.2)
        model.save_pretrained(folder / name)
    return {name: folder / name for name in ("base", "tuned")}


@pytest.fixture(scope="module")
def recipes(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("recipes")
    return {
        name: write_recipe(folder / f"{name}.yaml", sources, merge=merge, budget="1.2x")
        for name, merge in (("fixed", FIXED), ("auto", AUTO))
    }


def points_of(recipe: Path, budgets: str) -> list[Point]:
    studied = study(open_recipe(load_recipe(recipe)))
    try:
        return sweep(studied, parse_budgets(budgets))
    finally:
        studied.close()


@pytest.mark.parametrize("kind", ["fixed", "auto"])
def test_points_are_the_plans_of_their_budgets(kind: str, recipes: dict[str, Path]) -> None:
    points = points_of(recipes[kind], BUDGETS)
    assert [point.budget for point in points] == ["0.8x", "1.2x", "1.6x", "2.0x"]
    studied = study(open_recipe(load_recipe(recipes[kind])))
    for point in points:
        plan = plan_studied(studied, budget=parse_budget(point.budget)).plan
        assert point.nbytes == plan.expert_bytes
        assert point.ratio == pytest.approx(plan.ratio, abs=1e-6)
        assert point.ratio <= float(point.budget[:-1])
        squares = [layer.expected_error**2 for layer in plan.layers]
        assert point.expected_error == pytest.approx((sum(squares) / len(squares)) ** 0.5, rel=1e-5)
        assert point.expected_kl is None
    studied.close()
    errors = [point.expected_error for point in points]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > errors[-1] == 0


def test_a_point_is_what_the_artifact_has(recipes: dict[str, Path], tmp_path: Path) -> None:
    (point,) = points_of(recipes["auto"], "1.2x")
    manifest = manifest_of(compile_recipe(recipes["auto"], tmp_path / "artifact"))
    assert manifest["experts"]["bytes"] == point.nbytes
    assert manifest["experts"]["ratio"] == point.ratio


def test_budgets_in_bytes(recipes: dict[str, Path]) -> None:
    small, large = points_of(recipes["fixed"], "10MB,160 KB")
    assert (small.budget, large.budget) == ("160 KB", "10MB")
    assert small.nbytes < large.nbytes
    assert small.expected_error > large.expected_error == 0


@pytest.mark.parametrize("text", ["", "abc", "0.5x,,1x", "0.5x,1", "0.5x;1x", "-1x", "0.5x,nanx"])
def test_wrong_budgets(text: str) -> None:
    with pytest.raises(RecipeError, match="`--sweep`"):
        parse_budgets(text)


def test_a_budget_that_cannot_be_met(recipes: dict[str, Path]) -> None:
    with pytest.raises(PlanError, match="the smallest possible one is"):
        points_of(recipes["fixed"], "1.2x,0.01x")


# The command line


def test_json(cli: Cli, recipes: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = cli("consolidate", recipes["auto"], "--sweep", BUDGETS, "--json", "--out", out)
    assert done.code == 0, done
    found: dict[str, Any] = json.loads(done.out)
    assert found["sweep"] == [p.to_json() for p in points_of(recipes["auto"], BUDGETS)]
    assert not list(tmp_path.iterdir())


def test_table(cli: Cli, recipes: dict[str, Path]) -> None:
    done = cli("consolidate", recipes["fixed"], "--sweep", "1.6x,0.8x", "--no-color")
    assert done.code == 0, done
    text = done.out + done.err
    assert "Size and quality to expect" in text
    assert 0 < text.index("0.8x") < text.index("1.6x")


@pytest.mark.parametrize("text", ["", "abc", "0.5x,,1x", "0.5x,1"])
def test_wrong_budgets_on_the_command_line(text: str, cli: Cli, recipes: dict[str, Path]) -> None:
    cli("consolidate", recipes["fixed"], "--sweep", text).failed(1, "`--sweep`", "0.5x,0.8x,1.2x")


def test_a_small_budget_on_the_command_line(cli: Cli, recipes: dict[str, Path]) -> None:
    done = cli("consolidate", recipes["fixed"], "--sweep", "1.2x,0.01x")
    done.failed(1, "`0.01x` cannot be met", "the smallest possible one is")


# The drawing


@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="matplotlib is not installed")
def test_a_png_is_drawn(cli: Cli, recipes: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "curve.png"
    done = cli("consolidate", recipes["fixed"], "--sweep", BUDGETS, "--plot", path)
    assert done.code == 0, done
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    calibrated = [Point("0.5x", 0.5, 100, 0.1, 0.02), Point("2x", 2.0, 400, 0.0, 0.0)]
    plot(calibrated, tmp_path / "calibrated.png")
    assert (tmp_path / "calibrated.png").read_bytes() != path.read_bytes()


@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="matplotlib is not installed")
def test_a_png_that_cannot_be_written(cli: Cli, recipes: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "none" / "curve.png"
    done = cli("consolidate", recipes["fixed"], "--sweep", "1.2x", "--plot", path)
    done.failed(1, "cannot write", "No such file or directory")


def test_without_matplotlib(
    cli: Cli, recipes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [m for m in sys.modules if m.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = tmp_path / "curve.png"
    with pytest.raises(MoeccError, match="matplotlib"):
        plot([Point("1x", 1.0, 100, 0.1, None)], path)
    done = cli("consolidate", recipes["fixed"], "--sweep", "1.2x", "--plot", path)
    done.failed(1, "`--plot` needs matplotlib", "moecc[plot]")
    assert not path.exists()
