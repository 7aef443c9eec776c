"""moecc.alignment: experts and neurons that were moved on purpose are found again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moecc import alignment
from moecc.alignment import (
    Expert,
    Matcher,
    align,
    can_align,
    match_experts,
    read_expert,
    settle,
    to_own_index,
)
from moecc.architecture import Architecture, ExpertLayer, Projection, interleaved_layers
from moecc.similarity import measure
from moecc.sources import resolve
from moecc.variants import (
    NEURON_LINES,
    Alignment,
    LayerAlignment,
    OpenVariant,
    Order,
    open_variants,
)

MODELS = Path(__file__).parent.parent / "examples/models"
FAMILIES = ("mixtral", "gpt-oss", "switch", "qwen3-moe", "nemotron-h")

Orders = dict[tuple[str, int], Order]  # (module of a layer, own expert) -> its neurons


# Variants that were moved: by transformers' in-memory layout, and its own loader for the check


def order_of(seed: int, count: int) -> Order:
    """Without a place that stays, if there are two."""
    order = np.random.default_rng(seed).permutation(count)
    moved = np.empty_like(order)
    moved[order] = np.roll(order, 1)
    return moved


def move(model: torch.nn.Module, experts: bool = True, neurons: bool = True) -> None:
    """Permutes the experts of every layer, and the neurons of every expert."""
    for number, module in enumerate(found_experts(model)):
        count = len(module) if isinstance(module, torch.nn.ModuleDict) else module.num_experts
        order = order_of(number, count) if experts else np.arange(count)
        state = {k: v.clone() for k, v in module.state_dict().items()}
        for own, canonical in enumerate(order):
            seed = 100 * number + own if neurons else None
            if isinstance(module, torch.nn.ModuleDict):
                _move_switch(module, state, own, int(canonical), seed)
            else:
                _move_fused(module, state, own, int(canonical), seed)


def found_experts(model: torch.nn.Module) -> list[torch.nn.Module]:
    kinds = [m for m in model.modules() if type(m).__name__.endswith("Experts")]
    return [m for m in kinds if hasattr(m, "num_experts") or isinstance(m, torch.nn.ModuleDict)]


def _move_switch(
    module: torch.nn.ModuleDict,
    state: dict[str, torch.Tensor],
    own: int,
    canonical: int,
    seed: int | None,
) -> None:
    wi, wo = (state[f"expert_{canonical}.{name}.weight"] for name in ("wi", "wo"))
    p = order_of(seed, len(wi)) if seed is not None else np.arange(len(wi))
    expert = module[f"expert_{own}"]
    with torch.no_grad():
        expert.wi.weight.copy_(wi[p])
        expert.wo.weight.copy_(wo[:, p])


def _move_fused(
    module: torch.nn.Module,
    state: dict[str, torch.Tensor],
    own: int,
    canonical: int,
    seed: int | None,
) -> None:
    down = state["down_proj"][canonical]
    width = down.shape[0] if module.is_transposed else down.shape[1]
    p = order_of(seed, width) if seed is not None else np.arange(width)
    both = np.concatenate([p, p + width])
    if not module.is_concatenated:
        both = np.stack([2 * p, 2 * p + 1], 1).ravel()
    last = {"gate_up_proj_bias": both}
    if module.is_transposed:
        last |= {"gate_up_proj": both}
        first = {"down_proj": p}
    else:
        last |= {"down_proj": p}
        first = {"gate_up_proj": both, "up_proj": p}
    for name, value in state.items():
        moved = value[canonical]
        moved = moved[..., last[name]] if name in last else moved
        moved = moved[first[name]] if name in first else moved
        with torch.no_grad():
            getattr(module, name)[own].copy_(moved)


def add_noise(model: torch.nn.Module, part: float, seed: int = 7) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * parameter.float().std()
            parameter.add_((part * noise).to(parameter.dtype))


def save(folder: Path, family: str, *changes: Callable[[torch.nn.Module], None]) -> Path:
    found = tiny.model(family)
    for change in changes:
        change(found)
    found.save_pretrained(folder, max_shard_size="40KB")
    return folder


def opened(*folders: Path) -> tuple[Architecture, list[OpenVariant]]:
    return open_variants([resolve(f.name, str(f), Path()) for f in folders])


def matrices(variant: OpenVariant, architecture: Architecture) -> Iterator[torch.Tensor]:
    for index, layer in enumerate(architecture.layers):
        for projection in layer.projections:
            for expert in range(layer.num_experts):
                rows = range(projection.matrix[0])
                yield variant.rows(index, projection.name, expert, rows)


def same_rows(a: OpenVariant, b: OpenVariant, architecture: Architecture) -> bool:
    pairs = zip(matrices(a, architecture), matrices(b, architecture), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in a worker: on a busy machine, torch's threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Path]]:
    """Of a family: the base, it with 10 % noise, both moved."""
    made: dict[str, list[Path]] = {}

    def make(family: str) -> list[Path]:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)

            def noise(model: torch.nn.Module) -> None:
                add_noise(model, 0.1)

            made[family] = [
                save(folder / "base", family),
                save(folder / "tuned", family, noise),
                save(folder / "moved", family, move),
                save(folder / "both", family, noise, move),
            ]
        return made[family]

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_moved_experts_and_neurons_are_found(
    family: str, moved: Callable[[str], list[Path]]
) -> None:
    architecture, variants = opened(*moved(family))
    base, tuned, plain, both = align(architecture, variants, 0)
    assert base.alignment is None
    assert tuned.alignment is None
    assert same_rows(plain, variants[0], architecture)
    assert same_rows(both, variants[1], architecture)
    for index, layer in enumerate(architecture.layers):
        order = order_of(index, layer.num_experts)
        for variant in (plain, both):  # own expert i is the base's order[i]
            assert variant.own_index(index)[order].tolist() == list(range(layer.num_experts))
        assert base.own_index(index).tolist() == list(range(layer.num_experts))


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss", "switch"])
def test_rows_of_any_span(family: str, moved: Callable[[str], list[Path]]) -> None:
    """A tile is the same as those rows of the whole matrix; `own_rows` are those of the disk."""
    architecture, variants = opened(*moved(family))
    plain = align(architecture, variants, 0)[2]
    for index, layer in enumerate(architecture.layers):
        for projection in layer.projections:
            rows = projection.matrix[0]
            for expert in (0, layer.num_experts - 1):
                own = int(plain.own_index(index)[expert])
                whole = plain.rows(index, projection.name, expert, range(rows))
                disk = variants[2].rows(index, projection.name, own, range(rows))
                for span in (range(1), range(rows // 3, rows), range(rows - 1, rows)):
                    tile = plain.rows(index, projection.name, expert, span)
                    assert tile.equal(whole[span.start : span.stop])
                    tile = plain.own_rows(index, projection.name, expert, span)
                    assert tile.equal(disk[span.start : span.stop])


@pytest.mark.parametrize(
    "quantize",
    [lambda f: tiny.to_fp8(f, block=(8, 16)), lambda f: tiny.to_fp8(f, block=(0, 0))],
    ids=["blocks", "one scale"],
)
def test_rows_of_quantized_checkpoints(quantize: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = quantize(tiny.checkpoint(tmp_path / "fp8", "qwen3-moe"))
    check_gathered_rows(folder)


def test_rows_of_mxfp4(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "oss", "gpt-oss", hidden_size=64, intermediate_size=64)
    check_gathered_rows(tiny.to_mxfp4(folder))


def check_gathered_rows(folder: Path) -> None:
    architecture, (variant,) = opened(folder)
    names = interleaved_layers(variant.checkpoint)
    layers = []
    for layer in architecture.layers:
        width = next(p.matrix[1] for p in layer.projections if p.name == "down_proj")
        neurons = {e: order_of(e, width) for e in range(layer.num_experts)}
        experts = order_of(5, layer.num_experts)
        layers.append(LayerAlignment(experts, neurons, layer.name in names))
    found = replace(variant, alignment=Alignment(tuple(layers)))
    for index, layer in enumerate(architecture.layers):
        for projection in layer.projections:
            rows = projection.matrix[0]
            for expert in range(layer.num_experts):
                own = int(layers[index].experts[expert])
                expected = variant.rows(index, projection.name, own, range(rows))
                lines = layers[index].lines(projection.name, expert)
                if lines is not None:
                    expected = expected.index_select(lines[0], torch.from_numpy(lines[1]))
                span = range(rows // 4, rows - rows // 4)
                tile = found.rows(index, projection.name, expert, span)
                assert tile.equal(expected[span.start : span.stop])


def test_moving_does_not_change_what_a_model_computes() -> None:
    """The permutations of these tests are those a model does not notice."""
    for family in ("mixtral", "gpt-oss", "nemotron-h"):
        model = tiny.model(family, dtype=torch.float32)
        inputs = torch.arange(1, 9)[None]
        before = model(inputs).logits
        move(model, experts=False)
        torch.testing.assert_close(model(inputs).logits, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("experts", "neurons"), [(True, False), (False, True)])
def test_only_experts_or_only_neurons(experts: bool, neurons: bool, tmp_path: Path) -> None:
    folder = save(tmp_path / "moved", "mixtral", lambda m: move(m, experts, neurons))
    architecture, variants = opened(save(tmp_path / "base", "mixtral"), folder)
    found = align(architecture, variants, 0)[1]
    assert same_rows(found, variants[0], architecture)
    assert found.alignment is not None
    for layer in found.alignment.layers:
        assert bool(layer.neurons) == neurons
        assert (layer.experts == np.arange(4)).all() == (not experts)


def test_siblings_stay_in_place() -> None:
    names = ("nano-base", "nano-chat", "nano-math", "nano-python")
    architecture, variants = opened(*(MODELS / name for name in names))
    for base in (0, 3):
        found = align(architecture, variants, base)
        assert [v.alignment for v in found] == [None] * 4
        assert [v.fingerprint for v in found] == [v.fingerprint for v in variants]


@pytest.mark.parametrize("part", [0.1, 1.0])
def test_experts_matched_wrongly_go_back(
    part: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the features say, the weights decide; also where most neurons have to be matched."""
    folders = [
        save(tmp_path / "a", "mixtral"),
        save(tmp_path / "b", "mixtral", lambda m: add_noise(m, part)),
    ]
    architecture, variants = opened(*folders)
    monkeypatch.setattr(alignment, "match_experts", lambda *_: np.array([1, 0, 2, 3]))
    found = align(architecture, variants, 0)[1]
    assert found.own_index(0).tolist() == found.own_index(1).tolist() == [0, 1, 2, 3]
    assert found.alignment is None or part == 1.0


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_unrelated_variants_get_bijections(family: str, tmp_path: Path) -> None:
    folders = [tiny.checkpoint(tmp_path / str(seed), family, seed) for seed in range(2)]
    architecture, variants = opened(*folders)
    found = align(architecture, variants, 0)
    before = measure(architecture, variants).distances("l2")
    after = measure(architecture, found).distances("l2")
    for index, (had, has) in enumerate(zip(before, after, strict=True)):
        assert has[:, 0, 1].sum() <= had[:, 0, 1].sum() * (1 + 1e-6)
        check_bijections(found[1], index)


def check_bijections(variant: OpenVariant, index: int) -> None:
    experts = variant.own_index(index)
    assert sorted(experts.tolist()) == list(range(len(experts)))
    if variant.alignment is not None:
        for order in variant.alignment.layers[index].neurons.values():
            assert sorted(order.tolist()) == list(range(len(order)))


def test_similarity_sees_aligned_experts(
    moved: Callable[[str], list[Path]], tmp_path: Path
) -> None:
    """And does not take the measurement of those as they are for it."""
    architecture, variants = opened(*moved("qwen3-moe"))
    before = measure(architecture, variants, cache=tmp_path)
    after = measure(architecture, align(architecture, variants, 0), cache=tmp_path)
    for labels in after.distinct:
        assert labels.tolist() == [[0, 1, 0, 1]] * len(labels)
    pairs = zip(before.distinct, after.distinct, strict=True)
    assert any((labels != found).any() for labels, found in pairs)


@pytest.mark.parametrize("device", ["cpu"])
def test_determinism(device: str, moved: Callable[[str], list[Path]]) -> None:
    architecture, variants = opened(*moved("gpt-oss"))
    prints = [[v.fingerprint for v in align(architecture, variants, 0, device=device)]]
    prints.append([v.fingerprint for v in align(architecture, variants[::-1], 3)][::-1])
    assert prints[0] == prints[1]
    assert len(set(prints[0])) == 4
    again = align(architecture, align(architecture, variants, 0), 0)  # of the sources, not on top
    assert [v.fingerprint for v in again] == prints[0]


def test_small_blocks_find_the_same(moved: Callable[[str], list[Path]]) -> None:
    architecture, variants = opened(*moved("mixtral"))
    whole = [v.fingerprint for v in align(architecture, variants, 0)]
    for block in (7, 16, 47, 48):
        assert [v.fingerprint for v in align(architecture, variants, 0, block=block)] == whole


def test_progress_ends_where_it_says(moved: Callable[[str], list[Path]]) -> None:
    architecture, variants = opened(*moved("switch"))
    seen: list[tuple[int, int]] = []
    align(architecture, variants, 0, on_progress=lambda *now: seen.append(now))
    total = sum(4 * a.exact_bytes * a.num_experts for a in architecture.layers)
    assert [t for _, t in seen] == [total] * len(seen)
    assert [d for d, _ in seen] == sorted(d for d, _ in seen)
    assert seen[-1][0] == total


def test_to_own_index(moved: Callable[[str], list[Path]]) -> None:
    architecture, variants = opened(*moved("mixtral"))
    found = align(architecture, variants, 0)
    remap = np.arange(4 * 4 * 2 * 4, dtype=np.int32).reshape(4, 4, 2, 4)
    own = to_own_index(remap, found, 1)
    for v, variant in enumerate(found):
        for canonical, index in enumerate(variant.own_index(1)):
            assert (own[v, index] == remap[v, canonical]).all()
    assert (to_own_index(remap, variants, 1) == remap).all()


# Weights that are not as they should be


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("broken", [0, 1])
def test_weights_that_are_not_finite_stay(value: float, broken: int, tmp_path: Path) -> None:
    folders = [save(tmp_path / "a", "mixtral"), save(tmp_path / "b", "mixtral", move)]

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        name = next(n for n in sorted(tensors) if "experts" in n and "layers.0" in n)
        tensors[name].view(-1)[0] = value

    tiny.edit(folders[broken], spoil)
    architecture, variants = opened(*folders)
    found = align(architecture, variants, 0)[1].alignment
    assert found is not None
    assert found.layers[0].is_identity
    assert not found.layers[1].is_identity


def test_experts_of_zeros_and_copies_stay(tmp_path: Path) -> None:
    def clone(model: torch.nn.Module) -> None:
        for module in found_experts(model):
            with torch.no_grad():
                module.gate_up_proj.copy_(module.gate_up_proj[:1].expand(4, -1, -1))
                module.down_proj.copy_(module.down_proj[:1].expand(4, -1, -1))
                module.down_proj[3] = 0
                module.gate_up_proj[3] = 0

    folders = [save(tmp_path / "a", "mixtral", clone), save(tmp_path / "b", "mixtral", clone)]
    architecture, variants = opened(*folders)
    assert align(architecture, variants, 0)[1].alignment is None


# The cache


def test_the_cache_saves_reading(
    moved: Callable[[str], list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture, variants = opened(*moved("gpt-oss"))
    first = align(architecture, variants[:3], 0, cache=tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(files) == 2
    align(architecture, variants, 0, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3  # only the new one was aligned

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(alignment, "read_expert", fail)
    again = align(architecture, variants[:3], 0, cache=tmp_path)
    assert [v.fingerprint for v in again] == [v.fingerprint for v in first]
    assert same_rows(again[2], variants[0], architecture)
    with pytest.raises(AssertionError):
        align(architecture, variants[:3], 1, cache=tmp_path)


def test_a_damaged_cache_is_ignored(moved: Callable[[str], list[Path]], tmp_path: Path) -> None:
    architecture, variants = opened(*moved("mixtral")[::2])
    first = [v.fingerprint for v in align(architecture, variants, 0, cache=tmp_path)]
    (path,) = tmp_path.iterdir()
    data, arrays = path.read_bytes(), dict(np.load(path))
    for change in (
        {"experts0": np.zeros(4, np.int32)},
        {"experts1": np.arange(3, dtype=np.int32)},
        {"moved0": arrays["moved0"] + 1},
        {"neurons0": arrays["neurons0"][:, :-1]},
        {"neurons1": arrays["neurons1"][:1]},
        {"neurons1": arrays["neurons1"].astype(np.float32)},
    ):
        np.savez(path, **(arrays | change))
        assert [v.fingerprint for v in align(architecture, variants, 0, cache=tmp_path)] == first
        assert dict(np.load(path)).keys() == arrays.keys()
    for junk in (b"", data[:100], data[:-30]):
        path.write_bytes(junk)
        assert [v.fingerprint for v in align(architecture, variants, 0, cache=tmp_path)] == first
    (tmp_path / "file").write_bytes(b"")
    align(architecture, variants, 0, cache=tmp_path / "file" / "cache")


# The parts


def expert(neurons: int, seed: int, read: int = 160, wrote: int = 80) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(neurons, read + wrote, generator=generator)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 90),
    st.integers(0, 2**31),
    st.sampled_from([0.0, 0.1, 0.3, 0.7, 3.0]),
    st.sampled_from([5, 32, 64]),
)
def test_any_permutation_of_neurons(neurons: int, seed: int, noise: float, block: int) -> None:
    """A bijection that never makes it worse, and up to noise of 70 % the right one."""
    weights, order = expert(neurons, 1), order_of(seed, neurons)
    tuned = weights + noise * expert(neurons, 2)
    moved = torch.empty_like(tuned)
    moved[torch.from_numpy(order)] = tuned
    matcher, other = Matcher(Expert.of(weights, 80), block), Expert.of(moved, 80)
    found = matcher.match(other)
    assert sorted(found.tolist()) == list(range(neurons))
    assert matcher.apart(other, found).sum() <= matcher.apart(other).sum()
    if noise <= 0.3 or (noise <= 0.7 and block >= neurons):
        assert found.tolist() == order.tolist()


def test_a_few_neurons_that_changed_places() -> None:
    weights = expert(300, 1)
    tuned = weights + 0.2 * expert(300, 2)
    order = np.arange(300)
    order[[3, 77, 250]] = [77, 250, 3]
    found = Matcher(Expert.of(weights, 80)).match(Expert.of(tuned[torch.from_numpy(order)], 80))
    assert found.tolist() == np.argsort(order).tolist()


def test_dead_neurons_that_were_tuned_stay() -> None:
    """Noise is as far from any dead neuron as from its own."""
    weights = expert(200, 1)
    weights[::3] *= 1e-4
    other = Expert.of(weights + 0.05 * expert(200, 2), 80)
    assert Matcher(Expert.of(weights, 80)).match(other).tolist() == list(range(200))


def test_equal_neurons() -> None:
    weights = expert(64, 1)
    weights[32:] = weights[:32]
    order = torch.from_numpy(order_of(3, 64))
    other = Expert.of(weights[order], 80)
    matcher = Matcher(Expert.of(weights, 80), 16)
    assert not matcher.apart(other, matcher.match(other)).any()


def test_settle() -> None:
    order = np.array([1, 0, 3, 4, 2, 5])
    before = np.array([1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    after = np.array([0.1, 0.1, 0.9, 0.9, 0.7, 1.0])
    assert settle(order, before, after).tolist() == [1, 0, 2, 3, 4, 5]
    assert settle(order, before, before).tolist() == list(range(6))
    assert settle(order, before, np.full(6, np.nan)).tolist() == list(range(6))
    assert settle(np.arange(0), np.zeros(0), np.zeros(0)).tolist() == []


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 12), st.integers(0, 2**31), st.sampled_from([0.0, 0.2, 10.0]))
def test_any_permutation_of_experts(experts: int, seed: int, noise: float) -> None:
    rng = np.random.default_rng(seed)
    base, order = rng.standard_normal((experts, 256)), rng.permutation(experts)
    other = np.empty_like(base)
    other[order] = base + noise * rng.standard_normal(base.shape)
    found = match_experts(base, other)
    assert sorted(found.tolist()) == list(range(experts))
    if noise < 1:
        assert found.tolist() == order.tolist()


def test_near_ties_of_experts_stay() -> None:
    """Experts made of one by copying, tuned by more than they differ by."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal(256) + 0.01 * rng.standard_normal((8, 256))
    other = base[rng.permutation(8)] + 0.1 * rng.standard_normal((8, 256))
    assert match_experts(base, other).tolist() == list(range(8))
    assert match_experts(base, base).tolist() == list(range(8))
    assert match_experts(np.zeros((8, 3)), np.zeros((8, 3))).tolist() == list(range(8))


def test_a_feature_does_not_depend_on_the_order() -> None:
    weights = expert(100, 1)
    feature = Expert.of(weights, 80).feature
    assert feature.shape == (64 * 64,)
    shuffled = Expert.of(weights[torch.from_numpy(order_of(1, 100))], 80).feature
    np.testing.assert_allclose(shuffled, feature, rtol=1e-4, atol=1e-3)
    assert Expert.of(weights[:, :50], 20).feature.shape == (30 * 20,)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_can_be_aligned(family: str, tmp_path: Path) -> None:
    architecture, (variant,) = opened(tiny.checkpoint(tmp_path / "m", family))
    names = interleaved_layers(variant.checkpoint)
    assert names == ({a.name for a in architecture.layers} if family == "gpt-oss" else set())
    for layer in architecture.layers:
        assert can_align(layer)
    found = read_expert(variant, 0, architecture.layers[0], 0, False, "cpu")
    kinds = [p for p in architecture.layers[0].projections if p.name in NEURON_LINES]
    assert found.weights.numel() == sum(p.params for p in kinds)


def test_layers_that_cannot_be_aligned() -> None:
    up, down = Projection("up_proj", (8, 4), "F32"), Projection("down_proj", (4, 8), "F32")
    for projections in (
        (up,),
        (down,),
        (up, down, Projection("scale", (8,), "F32")),
        (Projection("up_proj", (9, 4), "F32"), down),
        (up, down, Projection("wo", (4, 8), "F32")),
    ):
        assert not can_align(ExpertLayer("layer", 2, projections))
    bias = Projection("down_proj_bias", (4,), "F32")
    assert can_align(ExpertLayer("layer", 2, (up, down, bias)))
