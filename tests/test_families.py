"""Every family end to end on tiny random models; transformers' own loader is the reference."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import FineGrainedFP8Config, Mxfp4Config

from moecc import consolidate
from moecc.architecture import Architecture, Layout, map_tensors, read_layout, skeleton
from moecc.artifact import Artifact
from moecc.checkpoint import Checkpoint, LogicalTensor
from moecc.errors import SourceError
from moecc.export import export, load_model
from moecc.recipe import Recipe, parse_recipe
from moecc.sources import resolve
from moecc.tensorfile import TensorInfo
from moecc.variants import OpenVariant, open_variants

Make = Callable[..., Path]

EXPERT = re.compile(
    r"(?P<module>.*experts)\.(expert_\d+\.w[io]\.weight|(gate_up|down)_proj(_bias)?)"
)
LOSSLESS = {"budget": "9x"}
CODED = {"merge": {"center": "4bit", "residual": "2bit", "group": 32}}
every_family = pytest.mark.parametrize("family", tiny.FAMILIES)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOECC_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Small tensors: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A checkpoint that tests must not change; each is made once."""

    @cache
    def make(family: str, seed: int = 0, **options: Any) -> Path:
        folder = tmp_path_factory.mktemp(f"{family}-{seed}-")
        return tiny.checkpoint(folder, family, seed, **options)

    return make


@pytest.fixture
def own(shared: Make, tmp_path: Path) -> Make:
    """A copy of a checkpoint for a test to change."""
    count = iter(range(100))

    def make(family: str, seed: int = 0, **options: Any) -> Path:
        return shutil.copytree(shared(family, seed, **options), tmp_path / f"own-{next(count)}")

    return make


def opened(folder: Path, name: str = "a") -> tuple[Architecture, OpenVariant]:
    checkpoint = Checkpoint(resolve(name, str(folder), Path("/")))
    architecture, layout = read_layout(checkpoint)
    return architecture, OpenVariant(checkpoint, layout)


def refusal(*folders: Path) -> SourceError:
    """The error of opening these as variants `a`, `b`, ..."""
    sources = [
        resolve(name, str(f), Path("/")) for name, f in zip("abc", folders, strict=False)
    ]
    with pytest.raises(SourceError) as caught:
        open_variants(sources)
    return caught.value


def recipe(folders: dict[str, Path], **keys: Any) -> Recipe:
    variants = {name: {"source": str(folder)} for name, folder in folders.items()}
    return parse_recipe(json.dumps({"version": 1, "variants": variants, **keys}), Path("/"))


def smallest(folders: dict[str, Path], **keys: Any) -> Recipe:
    """The recipe with the least budget that it can have."""
    found = consolidate.open_recipe(recipe(folders, budget="9x", **keys))
    found.close()
    return recipe(folders, budget=found.smallest_budget, **keys)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality that tells -0.0 from 0.0."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(
        a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
    )


def assert_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if not same_bits(found[name], expected[name])] == []


def matrix(model: Any, layer: str, projection: Any, expert: int) -> Tensor:
    """An expert's canonical matrix in transformers' own model."""
    module = model.get_submodule(layer)
    if projection.name in ("wi", "wo"):
        return getattr(module[f"expert_{expert}"], projection.name).weight.detach()
    value = getattr(module, projection.name)[expert].detach()
    if projection.is_bias:
        return value[None]
    return value.T if projection.transposed else value


def spans(rows: int) -> list[range]:
    """All rows, one row at either end, odd ranges, and one across gate and up."""
    middle = rows // 2
    found = [range(rows), range(1), range(rows - 1, rows), range(rows // 3, rows - 1)]
    return [s for s in [*found, range(middle - 3, middle + 2)] if len(s) and s.start >= 0]


def assert_reads(model: Any, architecture: Architecture, variant: OpenVariant) -> None:
    """Every expert row and every other tensor is what `model` has."""
    state = model.state_dict()
    experts = {name for name in state if EXPERT.fullmatch(name)}
    modules = {found["module"] for name in experts if (found := EXPERT.fullmatch(name))}
    assert {layer.name for layer in architecture.layers} == modules
    assert architecture.expert_params == sum(state[name].numel() for name in experts)
    wrong = []
    for index, layer in enumerate(architecture.layers):
        for projection in layer.projections:
            for expert in range(layer.num_experts):
                expected = matrix(model, layer.name, projection, expert)
                assert projection.matrix == tuple(expected.shape)
                for span in spans(projection.matrix[0]):
                    rows = variant.rows(index, projection.name, expert, span)
                    if not same_bits(rows, expected[span.start : span.stop]):
                        wrong.append((layer.name, projection.name, expert, span))
    assert wrong == []
    tied = set(model.all_tied_weights_keys)
    layout, disk = variant.layout, variant.checkpoint.tensors
    assert set(layout.non_expert) | tied == (set(state) - experts) | tied
    for name, key in layout.non_expert.items():
        raw = bytearray(b"".join(variant.checkpoint.stream(key)))
        assert len(raw) == disk[key].nbytes
        value = torch.frombuffer(raw, dtype=tiny.dtype_of(disk[key].dtype)).view(disk[key].shape)
        assert same_bits(value.to(state[name].dtype), state[name]), name


def assert_exported(found: Path, source: Path) -> None:
    """The same tensors in the same files, and the same side files."""
    assert tiny.shards(found) == tiny.shards(source)
    assert_same_tensors(tiny.tensors(found), tiny.tensors(source))
    names = {path.name for path in source.iterdir()}
    assert {path.name for path in found.iterdir()} == names
    for name in names - {tiny.INDEX}:
        if not name.endswith(".safetensors"):
            assert (found / name).read_bytes() == (source / name).read_bytes()
    if tiny.INDEX in names:
        indexes = [json.loads((folder / tiny.INDEX).read_text()) for folder in (found, source)]
        assert indexes[0]["weight_map"] == indexes[1]["weight_map"]
        assert indexes[0]["metadata"]["total_size"] == indexes[1]["metadata"]["total_size"]


def forward(model: Any) -> Tensor:
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    more = {"decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else {}
    with torch.inference_mode():
        logits: Tensor = model(input_ids=ids, **more).logits
    return logits
