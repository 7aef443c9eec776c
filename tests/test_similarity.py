"""moecc.similarity: every metric against numpy on whole matrices, and the cache."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy.linalg import block_diag
from scipy.spatial.distance import cdist, pdist, squareform

from moecc import similarity
from moecc.architecture import Architecture, ExpertLayer, Projection
from moecc.errors import SourceError
from moecc.similarity import (
    METRICS,
    Array,
    Similarity,
    cache_folder,
    distance,
    gram_matrix,
    measure,
)
from moecc.sources import resolve
from moecc.variants import OpenVariant, open_variants, row_spans

MODELS = Path(__file__).parent.parent / "examples/models"
NAMES = ("base", "chat", "math", "python")

Matrices = list[np.ndarray]  # of one expert, one for each projection


# Independent references: whole matrices in float64


def centered_gram(matrices: Matrices) -> np.ndarray:
    """H X X' H with a block for each projection that is a matrix."""
    blocks = []
    for x in matrices:
        if x.ndim == 2:
            h = np.eye(len(x)) - 1 / len(x)
            blocks.append(h @ x @ x.T @ h)
    return block_diag(*blocks)


def pairwise(metric: str, experts: list[Matrices], base: int) -> Array:
    """The distances of experts, `[n, n]`; 1 where a delta to the base is zero."""
    if metric == "cka":
        flat = np.stack([centered_gram(expert).ravel() for expert in experts])
    else:
        flat = np.stack([np.concatenate([m.ravel() for m in expert]) for expert in experts])
    if metric == "l2":
        squares = (flat**2).sum(1)
        return squareform(pdist(flat)) / np.sqrt((squares[:, None] + squares) / 2)
    if metric == "delta-cosine":
        out = np.ones((len(experts), len(experts)))
        others = [i for i in range(len(experts)) if i != base]
        out[np.ix_(others, others)] = squareform(pdist(flat[others] - flat[base], "cosine"))
        out[base, base] = 0
        return out
    return squareform(pdist(flat, "cosine"))


# Variants in memory


@dataclass
class Memory:
    """What `measure` needs of a variant: (layer, expert) -> projection -> matrix."""

    name: str
    experts: dict[tuple[int, int], dict[str, torch.Tensor]]
    fingerprint: str = ""
    reads: int = 0

    checkpoint = SimpleNamespace(row_align=1)

    def __post_init__(self) -> None:
        self.fingerprint = self.fingerprint or self.name

    def rows(self, layer: int, projection: str, expert: int, span: range) -> torch.Tensor:
        self.reads += 1
        return self.experts[layer, expert][projection][span.start : span.stop]

    def matrices(self, layer: int, expert: int) -> Matrices:
        found = self.experts[layer, expert].values()
        return [m.double().numpy()[0] if len(m) == 1 else m.double().numpy() for m in found]


def shape_of(*sizes: tuple[int, ...], experts: int = 1, layers: int = 1) -> Architecture:
    found = tuple(Projection(f"p{i}", size, "F32") for i, size in enumerate(sizes))
    named = [ExpertLayer(f"layers.{i}", experts, found) for i in range(layers)]
    return Architecture("Synthetic", tuple(named))


def random_variant(
    shape: Architecture, seed: int, base: Memory | None = None, noise: float = 0.1
) -> Memory:
    """Gaussian experts, or those of `base` with some noise; a bias is a matrix of one row."""
    generator = torch.Generator().manual_seed(seed)
    experts: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
    for i, layer in enumerate(shape.layers):
        for expert in range(layer.num_experts):
            experts[i, expert] = {}
            for projection in layer.projections:
                value = torch.randn(projection.matrix, generator=generator)
                if base is not None:
                    value = base.experts[i, expert][projection.name] + noise * value
                experts[i, expert][projection.name] = value
    return Memory(f"v{seed}", experts)


def opened(*folders: Path) -> tuple[Architecture, list[OpenVariant]]:
    return open_variants([resolve(f.name, str(f), Path()) for f in folders])


@pytest.fixture(scope="module")
def nano() -> Iterator[tuple[Architecture, list[OpenVariant]]]:
    architecture, variants = opened(*(MODELS / f"nano-{name}" for name in NAMES))
    yield architecture, variants
    for variant in variants:
        variant.checkpoint.close()


@pytest.fixture(scope="module")
def nano_experts() -> list[list[list[Matrices]]]:
    """Per variant, layer and expert its matrices, read with safetensors."""
    found = []
    for name in NAMES:
        tensors = load_file(MODELS / f"nano-{name}/model.safetensors")
        layers = []
        for layer in range(4):
            prefix = f"model.layers.{layer}.block_sparse_moe.experts"
            experts = []
            for e in range(8):
                w1, w2, w3 = (tensors[f"{prefix}.{e}.w{i}.weight"].double() for i in (1, 2, 3))
                experts.append([w2.numpy(), torch.cat([w1, w3]).numpy()])
            layers.append(experts)
        found.append(layers)
    return found


@pytest.fixture(scope="module")
def measured(nano: tuple[Architecture, list[OpenVariant]]) -> Similarity:
    return measure(*nano, cka=True)


# The metrics


matrices = st.tuples(st.integers(0, 2**32), st.integers(2, 6), st.integers(1, 20))


@settings(deadline=None, max_examples=60)
@given(matrices, st.floats(1e-3, 1e3))
def test_distances_of_points(case: tuple[int, int, int], scale: float) -> None:
    seed, count, size = case
    points = np.random.default_rng(seed).standard_normal((count, size)) * scale
    gram = points @ points.T
    norms = np.linalg.norm(points, axis=1)
    mean_square = np.sqrt((norms[:, None] ** 2 + norms**2) / 2)
    l2 = distance(gram, "l2")
    np.testing.assert_allclose(l2, squareform(pdist(points)) / mean_square, atol=1e-6)
    expected = cdist(points, points, "cosine")
    np.testing.assert_allclose(distance(gram, "cosine"), expected, atol=1e-9)
    np.testing.assert_allclose(distance(gram, "cka"), expected, atol=1e-9)
    for base in range(count):
        deltas = points - points[base]
        others = [i for i in range(count) if i != base]
        found = distance(gram, "delta-cosine", base)
        expected = cdist(deltas[others], deltas[others], "cosine")
        np.testing.assert_allclose(found[np.ix_(others, others)], expected, atol=1e-6)
        assert (found[base, others] == 1).all()  # the base has no delta
        assert (found[others, base] == 1).all()


def test_distances_by_hand() -> None:
    """Of (1, 0), (0, 1) and (-2, 0)."""
    gram = np.array([[1.0, 0.0, -2.0], [0.0, 1.0, 0.0], [-2.0, 0.0, 4.0]])
    np.testing.assert_allclose(distance(gram, "l2")[0], [0, np.sqrt(2), 3 / np.sqrt(2.5)])
    np.testing.assert_allclose(distance(gram, "cosine")[0], [0, 1, 2])
    # deltas to the first: (-1, 1) and (-3, 0)
    found = distance(gram, "delta-cosine", 0)
    np.testing.assert_allclose(found[1, 2], 1 - 1 / np.sqrt(2))


def test_distances_of_a_stack_are_those_of_each() -> None:
    points = np.random.default_rng(0).standard_normal((2, 3, 4, 7))
    grams = points @ points.swapaxes(-1, -2)
    for metric in METRICS:
        stack = distance(grams, metric, 1)
        assert stack.shape == (2, 3, 4, 4)
        for at in np.ndindex(2, 3):
            np.testing.assert_array_equal(stack[at], distance(grams[at], metric, 1))


def test_experts_of_zeros() -> None:
    """Two are alike and nothing else is like them; none of it is NaN."""
    points = np.array([[0.0, 0.0], [0.0, 0.0], [3.0, 4.0]])
    gram = points @ points.T
    np.testing.assert_allclose(
        distance(gram, "l2"), [[0, 0, np.sqrt(2)], [0, 0, np.sqrt(2)], [np.sqrt(2)] * 2 + [0]]
    )
    for metric in ("cosine", "cka"):
        assert (distance(gram, metric)[:2, 2] == 1).all()
    assert np.isfinite(distance(gram, "delta-cosine", 0)).all()


def test_rounding_never_leaves_the_range() -> None:
    points = np.random.default_rng(1).standard_normal((5, 40))
    points = np.concatenate([points, points * 3, -points])
    gram = points @ points.T
    gram[0, 5] = gram[5, 0] = gram[0, 5] * (1 + 1e-15)
    for metric in METRICS:
        found = distance(gram, metric, 2)
        assert (found >= 0).all()
        assert (found <= 2 + 1e-12).all()
    assert distance(gram, "cosine")[0, 5] <= 1e-15
    assert distance(gram, "cosine")[0, 10] == pytest.approx(2)


# Measuring


@pytest.mark.parametrize("metric", METRICS)
def test_the_example_models(
    metric: str, measured: Similarity, nano_experts: list[list[list[Matrices]]]
) -> None:
    for base in (0, 2) if metric == "delta-cosine" else (None,):
        found = measured.distances(metric, base)
        assert [d.shape for d in found] == [(8, 4, 4)] * 4
        for layer, expert in [(0, 0), (1, 3), (3, 7)] if metric == "cka" else np.ndindex(4, 8):
            experts = [nano_experts[variant][layer][expert] for variant in range(4)]
            expected = pairwise(metric, experts, base or 0)
            np.testing.assert_allclose(found[layer][expert], expected, rtol=1e-6, atol=1e-9)


def test_the_example_models_are_four_of_a_kind(measured: Similarity) -> None:
    for labels in measured.distinct:
        np.testing.assert_array_equal(labels, np.tile(np.arange(4), (8, 1)))
    assert all((d[:, 0, 1:] > 0.02).all() for d in measured.distances("l2"))


@pytest.mark.parametrize("metric", METRICS)
def test_every_expert_of_every_variant_in_one_matrix(
    metric: str,
    nano: tuple[Architecture, list[OpenVariant]],
    nano_experts: list[list[list[Matrices]]],
) -> None:
    layer, (architecture, variants) = 2, nano

    def reader(variant: OpenVariant, expert: int) -> Callable[[Projection, range], torch.Tensor]:
        return lambda projection, span: variant.rows(layer, projection.name, expert, span)

    chosen = [(v, e) for v in range(4) for e in (range(8) if metric != "cka" else (1, 6))]
    readers = [reader(variants[v], e) for v, e in chosen]
    gram = gram_matrix(architecture.layers[layer], readers, metric)
    experts = [nano_experts[v][layer][e] for v, e in chosen]
    expected = pairwise(metric, experts, 3)
    found = distance(gram, metric, 3)
    off = ~np.eye(len(chosen), dtype=bool)
    np.testing.assert_allclose(found[off], expected[off], rtol=1e-6, atol=1e-9)
    if metric == "cka":
        grams = [centered_gram(e).ravel() for e in experts]
    else:
        grams = [np.concatenate([m.ravel() for m in e]) for e in experts]
    np.testing.assert_allclose(gram, np.stack(grams) @ np.stack(grams).T, rtol=1e-9)


def test_cka_by_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than a block holds, a bias, and projections of different heights."""
    monkeypatch.setattr(similarity, "CKA_ROWS", 16)
    shape = shape_of((39, 12), (24,), (16, 20), (5, 9), experts=2)
    first = random_variant(shape, 0)
    variants = [first, random_variant(shape, 1, first, 0.4), random_variant(shape, 2)]
    found = measure(shape, variants, cka=True).distances("cka")[0]
    for expert in range(2):
        experts = [v.matrices(0, expert) for v in variants]
        np.testing.assert_allclose(found[expert], pairwise("cka", experts, 0), rtol=1e-9)


def test_cka_ignores_scale_shift_and_rotation_of_the_inputs() -> None:
    """Kornblith et al., section 2: invariant to isotropic scaling and orthogonal maps."""
    shape = shape_of((60, 16))
    first = random_variant(shape, 0)
    x = first.experts[0, 0]["p0"].double()
    turn = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(1)).double())
    moved = Memory("moved", {(0, 0): {"p0": x @ turn[0] * 3 + torch.ones(16)}})
    found = measure(shape, [first, moved], cka=True)
    assert found.distances("cka")[0][0, 0, 1] == pytest.approx(0, abs=1e-6)
    assert found.distances("l2")[0][0, 0, 1] > 0.5


def small_tiles(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    monkeypatch.setattr(
        similarity, "row_spans", lambda p, *_, **__: row_spans(p, elements=elements)
    )


def test_weights_and_biases_of_many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch, 70)
    monkeypatch.setattr(similarity, "CHUNK", 50)
    shape = shape_of((43, 17), (300,), (7, 33), layers=2)
    first = random_variant(shape, 0)
    variants = [first, random_variant(shape, 1, first)]
    found = measure(shape, variants)
    assert found.cka_gram is None
    for layer in range(2):
        experts = [v.matrices(layer, 0) for v in variants]
        flat = np.stack([np.concatenate([m.ravel() for m in e]) for e in experts])
        np.testing.assert_allclose(found.gram[layer][0], flat @ flat.T, rtol=1e-12)
    variants[1].experts[0, 0]["p1"] += 100  # a bias counts like the rest
    assert measure(shape, variants).distances("l2")[0][0, 0, 1] > 1


def test_measuring_does_not_depend_on_the_number_of_workers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shape = shape_of((30, 17), (64, 30), experts=9, layers=2)
    variants = [random_variant(shape, seed) for seed in range(3)]
    several = measure(shape, variants, cka=True)
    monkeypatch.setattr("moecc.parallel.MAX_WORKERS", 1)
    one = measure(shape, variants, cka=True)
    for a, b in zip(
        [*several.gram, *several.cka_gram, *several.distinct],
        [*one.gram, *one.cka_gram, *one.distinct],
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("apart", "accuracy"), [(1e-3, 1e-6), (1e-5, 1e-3), (1e-6, 2e-2)])
@pytest.mark.parametrize("count", [2, 5])
def test_near_siblings(apart: float, accuracy: float, count: int) -> None:
    """|a|^2 + |b|^2 - 2 <a, b> loses twelve of sixteen digits at a millionth."""
    shape = shape_of((512, 256), (700, 512))
    first = random_variant(shape, 0)
    variants = [first, *(random_variant(shape, s, first, apart) for s in range(1, count))]
    found = measure(shape, variants).distances("l2")[0][0]
    expected = pairwise("l2", [v.matrices(0, 0) for v in variants], 0)
    assert expected[0, 1] == pytest.approx(apart, rel=0.05)
    np.testing.assert_allclose(found, expected, rtol=accuracy)


def test_progress_is_in_bytes_of_all_experts(
    nano: tuple[Architecture, list[OpenVariant]],
) -> None:
    calls: list[tuple[int, int]] = []
    measure(*nano, on_progress=lambda done, total: calls.append((done, total)))
    total = 4 * 4 * 8 * (96 * 160 + 320 * 96) * 2
    assert calls[-1] == (total, total)
    assert {t for _, t in calls} == {total}
    assert [d for d, _ in calls] == sorted({d for d, _ in calls})
    assert len(calls) == 4 * 8


# Identical experts


def edited(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(source, target)
    return tiny.edit(target, change)


W1 = "model.layers.{}.block_sparse_moe.experts.{}.w1.weight"


def test_identical_experts_get_one_label(tmp_path: Path) -> None:
    def one_bit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[W1.format(1, 4)].view(torch.int16)[-1, -1] ^= 1

    def one_zero(tensors: dict[str, torch.Tensor]) -> None:
        tensors[W1.format(2, 0)].zero_()
        tensors[W1.format(2, 0)][5, 6] = -0.0

    def zeros(tensors: dict[str, torch.Tensor]) -> None:
        tensors[W1.format(2, 0)].zero_()

    base = MODELS / "nano-base"
    folders = [
        base,
        edited(base, tmp_path / "bit", one_bit),
        MODELS / "nano-chat",
        shutil.copytree(base, tmp_path / "copy"),
        edited(base, tmp_path / "minus", one_zero),
        edited(base, tmp_path / "zeros", zeros),
    ]
    architecture, variants = opened(*map(Path, folders))
    found = measure(architecture, variants, cka=True)
    expected = np.tile(np.array([0, 0, 2, 0, 0, 0]), (4, 8, 1))
    expected[1, 4, 1] = 1
    expected[2, 0, 4:] = [4, 5]  # -0.0 is not 0.0
    np.testing.assert_array_equal(np.stack(found.distinct), expected)
    for metric in METRICS:
        for labels, apart in zip(found.distinct, found.distances(metric, 0), strict=True):
            assert (apart[labels[:, :, None] == labels[:, None, :]] == 0).all()
    assert found.distances("l2")[1][4, 0, 1] > 0  # one bit of 46080 weights


def test_identical_experts_have_the_same_distances_to_all_others() -> None:
    """Also as deltas, where rounding would be all there is of a copy of the base."""
    shape = shape_of((33, 35), experts=3)
    first = random_variant(shape, 0)
    others = [random_variant(shape, s, first) for s in (1, 2)]
    copies = [Memory(f"copy{i}", v.experts) for i, v in enumerate([first, others[0]])]
    found = measure(shape, [first, *others, *copies], cka=True)
    for metric in METRICS:
        for apart in found.distances(metric, 0)[0]:
            np.testing.assert_array_equal(apart[0, [1, 2, 4]], apart[3, [1, 2, 4]])
            np.testing.assert_array_equal(apart[1, [0, 2, 3]], apart[4, [0, 2, 3]])


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=4, max_size=4), min_size=2, max_size=5),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_labels_are_those_of_whole_experts(tiles: list[list[int]], dtype: torch.dtype) -> None:
    """Each variant's expert is made of four tiles, of three kinds each."""
    kinds = torch.ones(3, 1, 9, dtype=dtype)
    kinds[1, 0, -1], kinds[2, 0, 0] = 2, 2
    variants = []
    for number, chosen in enumerate(tiles):
        rows = torch.cat([kinds[kind] for kind in chosen])
        variants.append(Memory(f"v{number}", {(0, 0): {"p0": rows[:3], "p1": rows[3:]}}))
    with pytest.MonkeyPatch.context() as patch:
        small_tiles(patch, 9)
        found = measure(shape_of((3, 9), (1, 9)), variants).distinct[0][0]
    assert found.tolist() == [tiles.index(chosen) for chosen in tiles]


# Broken weights


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(tmp_path: Path, value: float) -> None:
    def break_one(tensors: dict[str, torch.Tensor]) -> None:
        tensors[W1.format(2, 5)][9, 9] = value

    folder = edited(MODELS / "nano-math", tmp_path / "broken-math", break_one)
    architecture, variants = opened(MODELS / "nano-base", folder, MODELS / "nano-chat")
    with pytest.raises(SourceError) as caught:
        measure(architecture, variants, cka=True, cache=tmp_path / "cache")
    assert "expert 5 of `model.layers.2.mlp.experts`" in caught.value.message
    assert "variant `broken-math` holds NaN or infinite weights" in caught.value.message
    assert not (tmp_path / "cache").exists()


def test_a_bias_that_is_not_finite() -> None:
    shape = shape_of((8, 16), (8,))
    variants = [random_variant(shape, s) for s in (0, 1)]
    variants[1].experts[0, 0]["p1"][0, 3] = float("nan")
    with pytest.raises(SourceError, match=r"expert 0 of `layers\.0` in variant `v1` holds NaN"):
        measure(shape, variants)


def test_the_largest_weights_are_finite() -> None:
    shape = shape_of((8, 16))
    top = torch.finfo(torch.float32).max
    variants = [
        Memory(f"v{i}", {(0, 0): {"p0": torch.full((8, 16), top * s)}})
        for i, s in enumerate([1, -1])
    ]
    assert measure(shape, variants).distances("l2")[0][0, 0, 1] == pytest.approx(2)


# The cache


SHAPE = shape_of((6, 16), (6,), experts=2, layers=2)


def pair() -> list[Memory]:
    first = random_variant(SHAPE, 0)
    return [first, random_variant(SHAPE, 1, first)]


def same(a: Similarity, b: Similarity) -> bool:
    left, right = ([*s.gram, *s.distinct, *(s.cka_gram or [])] for s in (a, b))
    return len(left) == len(right) and all(
        x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("cka", [False, True])
def test_a_second_call_reads_nothing(
    nano: tuple[Architecture, list[OpenVariant]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cka: bool,
) -> None:
    first = measure(*nano, cka=cka, cache=tmp_path / "deep/cache")

    def fail(*_: object) -> Any:
        raise AssertionError("weights were read")

    monkeypatch.setattr(OpenVariant, "rows", fail)
    # Opened anew, as another process would.
    again = opened(*(MODELS / f"nano-{name}" for name in NAMES))
    assert same(measure(*again, cka=cka, cache=tmp_path / "deep/cache"), first)
    assert (first.cka_gram is not None) == cka
    with pytest.raises(AssertionError, match="weights were read"):
        measure(*again, cka=cka, cache=tmp_path / "elsewhere")
    with pytest.raises(AssertionError, match="weights were read"):
        measure(*again, cka=cka)


def test_a_changed_checkpoint_is_read(tmp_path: Path) -> None:
    """The change keeps the size of every file and every header."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[W1.format(0, 0)][0, 0] += 1

    base, chat = (
        MODELS / "nano-base",
        Path(shutil.copytree(MODELS / "nano-chat", tmp_path / "chat")),
    )
    first = measure(*opened(base, chat), cache=tmp_path / "cache")
    tiny.edit(chat, change)
    second = measure(*opened(base, chat), cache=tmp_path / "cache")
    assert not same(first, second)
    assert same(second, measure(*opened(base, chat)))


def test_what_makes_another_measurement(tmp_path: Path) -> None:
    variants = pair()
    measure(SHAPE, variants, cache=tmp_path)
    taller = shape_of((6, 16), (6,), experts=2, layers=1)
    other = Memory("v1", variants[1].experts, fingerprint="changed")
    for shape, found, cka in [
        (SHAPE, [variants[0], other], False),
        (SHAPE, variants[::-1], False),
        (SHAPE, [*variants, variants[0]], False),
        (SHAPE, variants, True),
        (taller, variants, False),
    ]:
        for variant in found:
            variant.reads = 0
        result = measure(shape, found, cka=cka, cache=tmp_path)
        assert all(variant.reads for variant in found)
        assert same(result, measure(shape, found, cka=cka))


def test_names_do_not_matter(tmp_path: Path) -> None:
    """A recipe that calls the same checkpoint otherwise finds its measurement."""
    variants = pair()
    first = measure(SHAPE, variants, cache=tmp_path)
    renamed = [Memory(f"new {v.name}", v.experts, fingerprint=v.name) for v in variants]
    assert same(measure(SHAPE, renamed, cache=tmp_path), first)
    assert not any(v.reads for v in renamed)


@dataclass
class Cached:
    """A measurement in the cache, to be damaged."""

    folder: Path
    variants: list[Memory]
    expected: Similarity

    @property
    def path(self) -> Path:
        (path,) = self.folder.iterdir()
        return path

    def check(self, data: bytes) -> None:
        """Whatever the file holds, the result is right; and it is repaired."""
        self.path.write_bytes(data)
        assert same(measure(SHAPE, self.variants, cka=True, cache=self.folder), self.expected)
        for variant in self.variants:
            variant.reads = 0
        assert same(measure(SHAPE, self.variants, cka=True, cache=self.folder), self.expected)
        assert not any(variant.reads for variant in self.variants)


@pytest.fixture
def cached(tmp_path: Path) -> Cached:
    variants = pair()
    return Cached(tmp_path, variants, measure(SHAPE, variants, cka=True, cache=tmp_path))


@pytest.mark.parametrize("part", [0, 1, 100, 0.3, 0.6, 0.95, -22, -1])
def test_a_cut_cache_file_is_ignored(cached: Cached, part: float) -> None:
    data = cached.path.read_bytes()
    size = round(part * len(data)) if isinstance(part, float) else part
    cached.check(data[:size])


def test_other_files_in_the_cache_are_ignored(cached: Cached, tmp_path: Path) -> None:
    arrays = dict(np.load(cached.path))
    for junk in (b"junk", b"PK\x05\x06" + bytes(18), bytes(1000), b"\x80\x04N."):
        cached.check(junk)
    for change in (
        {"gram1": None},
        {"cka0": None},
        {"distinct0": None},
        {"gram0": arrays["gram0"][:1]},
        {"gram0": arrays["gram0"][:, :1]},
        {"distinct1": arrays["distinct1"][:, :1]},
        {"gram0": np.array([object()])},
    ):
        kept = {k: v for k, v in (arrays | change).items() if v is not None}
        np.savez(tmp_path / "other.npz", **kept)
        data = (tmp_path / "other.npz").read_bytes()
        (tmp_path / "other.npz").unlink()
        cached.check(data)


@pytest.fixture(scope="module")
def cache_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flipped")
    measure(SHAPE, pair(), cache=folder)
    return next(folder.iterdir())


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 10**9), st.integers(1, 255))
def test_a_flipped_byte_in_the_data_is_noticed(cache_file: Path, at: int, mask: int) -> None:
    """Up to the central directory of the archive."""
    data = bytearray(cache_file.read_bytes())
    data[at % data.index(b"PK\x01\x02")] ^= mask
    flipped = cache_file.with_name("flipped.npz")
    flipped.write_bytes(data)
    found = similarity._load(flipped, SHAPE, 2, False)
    assert found is None or same(found, measure(SHAPE, pair()))


@pytest.mark.parametrize(
    ("field", "mask"),
    [(6, 64), (8, 1), (8, 32), (10, 1)],
    ids=["version needed", "encrypted", "patched", "method"],
)
def test_a_flipped_bit_in_the_directory_is_noticed(cached: Cached, field: int, mask: int) -> None:
    data = bytearray(cached.path.read_bytes())
    data[data.index(b"PK\x01\x02") + field] ^= mask
    cached.check(bytes(data))


def test_an_array_instead_of_an_archive_is_ignored(cached: Cached, tmp_path: Path) -> None:
    np.save(tmp_path / "other.npy", np.zeros(3))
    data = (tmp_path / "other.npy").read_bytes()
    (tmp_path / "other.npy").unlink()
    cached.check(data)


def test_cached_cka_of_another_shape_is_ignored(cached: Cached, tmp_path: Path) -> None:
    arrays = dict(np.load(cached.path))
    np.savez(tmp_path / "other.npz", **(arrays | {"cka0": arrays["cka0"][:, :1]}))
    data = (tmp_path / "other.npz").read_bytes()
    (tmp_path / "other.npz").unlink()
    cached.check(data)


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    found = measure(SHAPE, pair(), cache=tmp_path / "file" / "cache")
    assert same(found, measure(SHAPE, pair()))


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MOECC_CACHE", "~/mine")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.setenv("MOECC_CACHE", "")
    assert cache_folder() == Path("/x/moecc")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / ".cache/moecc"
