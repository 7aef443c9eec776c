"""moecc.lowrank: factors against the SVD in float64, and residuals of low rank all the way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import served
import tiny
import torch
from conftest import compile_recipe, manifest_of, write_recipe
from torch import Tensor

import moecc
from moecc.artifact import Artifact
from moecc.blocks import damped
from moecc.export import export
from moecc.forms import Form
from moecc.lowrank import LowRank, expand, factorize, leading, unwhiten, whiten

SHAPES = [(64, 96), (96, 64), (80, 72)]
ROUNDING = 2.0**-8  # of a bfloat16


def matrix(rows: int, columns: int, decay: float, seed: int = 0) -> Tensor:
    """Singular values 1, decay, decay^2, ... between random directions."""
    generator = torch.Generator().manual_seed(seed)
    count = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, count, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, count, generator=generator)).Q
    return left @ torch.diag(decay ** torch.arange(count)) @ right.T


def inputs(columns: int, block: int, seed: int = 1) -> Tensor:
    """Moments in blocks, with a few strong directions; the last block is padded with zeros."""
    generator = torch.Generator().manual_seed(seed)
    count = -(-columns // block)
    mix = torch.randn(count, block, block, generator=generator)
    mix[:, : block // 8] *= 5
    found = mix.mT @ mix
    rest = count * block - columns
    if rest:
        found[-1, -rest:], found[-1, :, -rest:] = 0.0, 0.0
    return damped(found[None])[0]


def whole(moments: Tensor | None, columns: int) -> Tensor:
    """The float64 matrix that blocks of moments stand for."""
    if moments is None:
        return torch.eye(columns, dtype=torch.float64)
    return torch.block_diag(*moments.double())[:columns, :columns]


def missed(wanted: Tensor, found: Tensor, moments: Tensor | None) -> float:
    """Norm of the difference, as it acts on inputs with these moments."""
    apart = wanted.double() - found.double()
    return float((apart @ whole(moments, wanted.shape[1]) @ apart.T).trace().sqrt())


def least(wanted: Tensor, rank: int, moments: Tensor | None) -> float:
    """What no matrix of this rank can help missing."""
    factor = torch.linalg.cholesky(whole(moments, wanted.shape[1]))
    return float(torch.linalg.svdvals(wanted.double() @ factor)[rank:].square().sum().sqrt())


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Small tensors: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Factors


@pytest.mark.parametrize("block", [None, 96, 32, 28])
@pytest.mark.parametrize("decay", [0.97, 0.8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_factors_are_nearly_the_best(
    shape: tuple[int, int], decay: float, block: int | None
) -> None:
    wanted = matrix(*shape, decay)
    moments = None if block is None else inputs(shape[1], block)
    for rank in (4, 16):
        left, right = factorize(wanted, rank, moments)
        best = least(wanted, rank, moments)
        rounding = 2 * ROUNDING * missed(wanted, torch.zeros_like(wanted), moments)
        found = missed(wanted, expand(left, right), moments)
        assert (1 - 1e-4) * best < found < 1.01 * best + rounding
        if decay > 0.9:
            assert found < 1.01 * best


def test_moments_matter() -> None:
    """The factors for some inputs are better for them, and worse for others."""
    wanted, moments = matrix(64, 96, 0.97), inputs(96, 32)
    own, plain = expand(*factorize(wanted, 8, moments)), expand(*factorize(wanted, 8, None))
    assert missed(wanted, own, moments) < 0.95 * missed(wanted, plain, moments)
    assert missed(wanted, plain, None) < missed(wanted, own, None)


@pytest.mark.parametrize("block", [None, 32, 28])
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_a_matrix_of_low_rank_is_recovered(rank: int, block: int | None) -> None:
    generator = torch.Generator().manual_seed(rank)
    left, right = (torch.randn(n, rank, generator=generator) for n in (48, 96))
    wanted = left @ right.T
    moments = None if block is None else inputs(96, block)
    found = expand(*factorize(wanted, rank, moments))
    assert float((found - wanted).norm() / wanted.norm()) < ROUNDING


@pytest.mark.parametrize("block", [None, 16, 28])
@pytest.mark.parametrize("shape", [(8, 40), (40, 8), (1, 40), (1, 1)], ids=str)
def test_a_rank_beyond_the_matrix_is_filled_with_zeros(
    shape: tuple[int, int], block: int | None
) -> None:
    wanted = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    moments = None if block is None else inputs(shape[1], block)
    left, right = factorize(wanted, 64, moments)
    assert left.shape == (shape[0], 64)
    assert right.shape == (64, shape[1])
    padded = shape[1] if moments is None else moments.shape[0] * moments.shape[1]
    assert not left[:, min(shape[0], padded) :].any()
    assert not right[min(shape[0], padded) :].any()
    assert float((expand(left, right) - wanted).norm() / wanted.norm()) < 4 * ROUNDING


def test_nothing_to_code() -> None:
    left, right = factorize(torch.zeros(16, 24), 4, inputs(24, 16))
    assert left.isfinite().all()
    assert right.isfinite().all()
    assert not expand(left, right).any()


def test_the_same_factors_every_time() -> None:
    """Whatever state the random numbers of the process are in, which stays as it is."""
    wanted, moments = matrix(64, 96, 0.9), inputs(96, 32)
    first = factorize(wanted, 8, moments)
    torch.manual_seed(12345)
    state = torch.get_rng_state()
    again = factorize(wanted.clone(), 8, moments.clone())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_leading_directions() -> None:
    wanted = matrix(64, 96, 0.8)
    found = leading(wanted, 5)
    torch.testing.assert_close(found.T @ found, torch.eye(5), rtol=0, atol=1e-5)
    exact = torch.linalg.svd(wanted.double(), full_matrices=False).Vh[:5]
    turned = (exact @ found.double()).abs()  # in order, but for their signs
    torch.testing.assert_close(turned, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-3)


@pytest.mark.parametrize("block", [None, 32, 28])
def test_whitening(block: int | None) -> None:
    rows = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    moments = None if block is None else inputs(96, block)
    white = whiten(rows, moments)
    square = rows.double() @ whole(moments, 96) @ rows.double().T
    torch.testing.assert_close(white.double() @ white.double().T, square, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(unwhiten(white, moments)[:, :96], rows, rtol=1e-3, atol=1e-4)


# Names and bytes


@pytest.mark.parametrize("rank", [1, 4, 64, 9999])
def test_names(rank: int) -> None:
    assert LowRank.parse(f"rank{rank}") == LowRank(rank)
    assert LowRank(rank).name == f"rank{rank}"
    assert Form.parse(f"8bit-g64+rank{rank}").residual_coding == LowRank(rank)


@pytest.mark.parametrize(
    "name", ["rank", "rank0", "rank04", "rank10000", "rank-4", "Rank4", "rank4 ", "rank4.0", "4"]
)
def test_no_names(name: str) -> None:
    with pytest.raises(ValueError, match="not the name of a coding"):
        LowRank.parse(name)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes(shape: tuple[int, int]) -> None:
    left, right = factorize(matrix(*shape, 0.9), 7, None)
    assert LowRank(7).nbytes(*shape) == left.nbytes + right.nbytes == 14 * sum(shape)


# All the way


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], Path]:
    """Two models whose experts differ by matrices of rank 4, and their artifact."""
    folder = tmp_path_factory.mktemp("adapted")
    generator = torch.Generator().manual_seed(0)
    sources = {}
    for name in ("base", "tuned"):
        model = tiny.model("mixtral")
        if name == "tuned":
            for key, value in model.state_dict().items():
                if ".experts." in key:
                    left = torch.randn(*value.shape[:-1], 4, generator=generator)
                    right = torch.randn(len(value), 4, value.shape[-1], generator=generator)
                    value.add_((0.02 * left @ right).to(value.dtype))
        model.save_pretrained(folder / name)
        sources[name] = folder / name
    merge = {"center": "8bit", "residual": "rank4", "group": 32}
    recipe = write_recipe(folder / "r.yaml", sources, merge=merge, budget="1.0x")
    return sources, compile_recipe(recipe, folder / "artifact")


def test_an_artifact_with_factors(adapted: tuple[dict[str, Path], Path], tmp_path: Path) -> None:
    sources, artifact = adapted
    manifest = manifest_of(artifact)
    pools = [p for a in manifest["layers"] for b in a["projections"] for p in b["pools"]]
    assert {(p["role"], p["coding"]) for p in pools} == {
        ("center", "8bit-g32"),
        ("residual", "rank4"),
    }
    assert all(0 < layer["measured_error"] < 0.015 for layer in manifest["layers"])
    for name, source in sources.items():
        with Artifact(artifact) as opened:
            export(opened, name, tmp_path / name)
        ours, theirs = tiny.tensors(tmp_path / name), tiny.tensors(source)
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            if ".experts." in key:
                apart = (ours[key].float() - value.float()).norm() / value.float().norm()
                assert 0 < apart < 0.015, key
            else:
                assert torch.equal(ours[key], value), key
    tuned, base = (tiny.tensors(sources[name]) for name in ("tuned", "base"))
    key = next(key for key in base if ".experts." in key)
    assert (tuned[key].float() - base[key].float()).norm() / base[key].float().norm() > 0.2


@pytest.mark.parametrize("mode", served.MODES)
def test_factors_are_served(mode: str, adapted: tuple[dict[str, Path], Path]) -> None:
    """The logits of the exported variants."""
    sources, artifact = adapted
    prompts, chunks = [served.prompt(n, n) for n in (11, 4)], (5, 1, 3)
    reference = served.Reference(artifact, "float32", "cpu")
    found = served.Chunked(artifact, mode, "float32").read(prompts, chunks)
    asked = [(name, prompt) for name in sources for prompt in prompts]
    scale = max(float(f.abs().max()) for f in found)
    for (name, prompt), logits in zip(asked, found, strict=True):
        wanted = reference.logits(name, prompt)[0][served.ends(len(prompt), chunks)]
        assert float((wanted - logits).abs().max()) < 1e-5 * scale


def test_factors_are_loaded(adapted: tuple[dict[str, Path], Path]) -> None:
    sources, artifact = adapted
    reference = served.Reference(artifact, "float32", "cpu")
    requests = [served.request(name, name, served.prompt(9, 3), 12) for name in sources]
    with served.serving(artifact, dtype="float32") as engine:
        served.assert_same(requests, served.ask(engine, requests), reference, 0.9)
    model: Any = moecc.load(artifact, dtype="float32")
    try:
        assert set(model.variants) == set(sources)
    finally:
        model.close()
