"""Calibration: against plain models with hooks, by hand on tiny numbers, and as it is cached."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from moecc import calibration, collected, measured, outputs, streaming
from moecc.calibration import calibrate, read_batch, sample_labels, uniforms
from moecc.errors import RecipeError, SourceError
from moecc.measured import Measured, choose_block, weights
from moecc.recipe import Calibration
from moecc.sources import resolve
from moecc.variants import Alignment, LayerAlignment, OpenVariant, open_variants

SAMPLES, LENGTH = 6, 10
ENCODER_DECODER = ("switch",)
Make = Callable[..., Path]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Small tensors: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def save_tokenizer(folder: Path) -> None:
    """Words `w3` to `w95` are tokens 3 to 95; 0, 1 and 2 are special."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 96)}
    found = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=found, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def words(count: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 96, (count,), generator=generator).tolist()
    return " ".join(f"w{i}" for i in ids)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A checkpoint with a tokenizer that tests must not change; each is made once."""

    @cache
    def make(family: str, seed: int = 0, **options: Any) -> Path:
        folder = tmp_path_factory.mktemp(f"{family}-{seed}-")
        tiny.checkpoint(folder, family, seed, **options)
        save_tokenizer(folder)
        return folder

    return make


@dataclass
class Case:
    """Two variants with texts."""

    folders: dict[str, Path]
    texts: dict[str, tuple[Path, ...]]
    settings: Calibration
    variants: list[OpenVariant] = field(default_factory=list)

    def __post_init__(self) -> None:
        sources = [resolve(name, str(path), Path("/")) for name, path in self.folders.items()]
        self.architecture, self.variants = open_variants(sources)

    def run(self, **options: Any) -> Measured:
        return calibrate(self.architecture, self.variants, self.settings, self.texts, **options)


def write_text(path: Path, family: str, seed: int, count: int = 75) -> tuple[Path, ...]:
    if family not in ENCODER_DECODER:
        path.write_text(words(count, seed))
        return (path,)
    lines = [
        {"input": words(3 + i % 7, seed + i), "target": words(2 + i % 5, seed + 50 + i)}
        for i in range(8)
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return (path,)


def case(shared: Make, tmp_path: Path, family: str, seeds: tuple[int, ...] = (0, 1)) -> Case:
    folders = {name: shared(family, seed) for name, seed in zip("abcd", seeds, strict=False)}
    texts = {
        name: write_text(tmp_path / f"{name}.txt", family, 100 * seed + 7)
        for name, seed in zip(folders, seeds, strict=True)
    }
    files = tuple((name, tuple(map(str, paths))) for name, paths in texts.items())
    return Case(folders, texts, Calibration(files, SAMPLES, LENGTH))


@dataclass
class Reference:
    """What plain autograd sees in one layer: per expert, of the tokens that are routed to it."""

    tokens: int = 0
    hidden: list[Tensor] = field(default_factory=list)
    gates: list[Tensor] = field(default_factory=list)
    routed: dict[int, list[tuple[Any, ...]]] = field(default_factory=dict)


def expert(module: Any, number: int) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """x -> (first product, second product's input, second product), from the plain module."""
    if isinstance(module, torch.nn.ModuleDict):
        one = module[f"expert_{number}"]

        def switch(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            z = x @ one.wi.weight.T
            h = one.act(z)
            return z, h, h @ one.wo.weight.T

        return switch
    first = "gate_up_proj" if module.has_gate else "up_proj"

    def apply(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        w1, w2 = (getattr(module, n)[number] for n in (first, "down_proj"))
        if not module.is_transposed:
            w1, w2 = w1.T, w2.T
        z = x @ w1
        if module.has_bias:
            z = z + getattr(module, f"{first}_bias")[number]
        h = module._apply_gate(z) if module.has_gate else module.act_fn(z)
        y = h @ w2
        if module.has_bias:
            y = y + module.down_proj_bias[number]
        return z, h, y

    return apply


def dense_gates(experts: int, index: Tensor, gates: Tensor, one_hot: bool) -> Tensor:
    if one_hot:
        return index.view(-1, experts).float() * gates.view(-1, 1)
    rows = torch.zeros(len(index), experts)
    return rows.scatter(1, index, gates.float())


def reference(found: Case, name: str) -> tuple[list[Reference], Any]:
    """All layers of a plain model in float32, with gradients of labels that are the same."""
    variant = next(v for v in found.variants if v.name == name)
    batch = read_batch(variant, found.texts[name], found.settings)
    model = tiny.load(found.folders[name]).float()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)
    size = len(batch.inputs["input_ids"])
    layers = [Reference() for _ in found.architecture.layers]
    for layer, one in zip(found.architecture.layers, layers, strict=True):
        module = model.get_submodule(layer.name)
        decoder = layer.name.startswith("decoder.")
        mask = batch.inputs.get("decoder_attention_mask" if decoder else "attention_mask")

        def forward(
            hidden: Tensor, index: Tensor, gates: Tensor, m: Any = module, one: Reference = one,
            mask: Any = mask, count: int = layer.num_experts,
        ) -> Tensor:  # fmt: skip
            table = dense_gates(count, index, gates, isinstance(m, torch.nn.ModuleDict))
            keep = torch.ones(len(hidden), dtype=torch.bool)
            keep = keep if mask is None else mask.bool().flatten()
            learned = torch.arange(len(hidden)) < len(hidden) // size * batch.learn
            one.tokens = int(keep.sum())
            one.hidden.append(hidden.detach()[keep])
            one.gates.append(table.detach()[keep])
            total = torch.zeros_like(hidden)
            for e in range(count):
                rows = (table[:, e] != 0).nonzero().squeeze(-1)
                if not len(rows):
                    continue
                x = hidden[rows]
                z, h, y = expert(m, e)(x)
                z.retain_grad()
                y.retain_grad()
                seen = (keep[rows], learned[rows], table[rows, e], x, z, h, y)
                one.routed.setdefault(e, []).append(seen)
                total = total.index_add(0, rows, y * table[rows, e][:, None])
            return total

        module.forward = forward
    logits = model(**batch.inputs, use_cache=False).logits
    mask = batch.inputs.get("decoder_attention_mask", torch.ones(logits.shape[:2])).bool()
    rows = logits[: batch.learn][mask[: batch.learn]].float()
    labels = sample_labels(rows.detach(), uniforms(len(rows)))
    F.cross_entropy(rows, labels, reduction="sum").backward()
    return layers, batch


def naive(one: Reference, e: int, width: dict[str, int], ratio: float) -> dict[str, Any]:
    """Every figure of an expert, one token after the other, in float64."""
    result: dict[str, Any] = {"count": 0, "norm": 0.0}
    for p, k in width.items():
        result[p] = {"H": torch.zeros(k, k, dtype=torch.float64), "num": 0.0, "den": 0.0}
    for keep, learned, g, x, z, h, y in one.routed.get(e, []):
        for t in range(len(x)):
            if not keep[t]:
                continue
            gate = float(g[t].detach())
            result["count"] += 1
            result["norm"] += gate**2 * float(y[t].detach().double().square().sum())
            for p, inputs, out in zip(width, (x, h), (z, y), strict=True):
                v = inputs[t].detach().double()
                result[p]["H"] += gate**2 * torch.outer(v, v)
                if not learned[t]:
                    continue
                slope = float(out.grad[t].double().square().mean())
                result[p]["num"] += slope * float(v @ v)
                result[p]["den"] += gate**2 * float(v @ v)
    for p in width:
        num, den = result[p]["num"], result[p]["den"]
        result[p]["s"] = ratio * 0.5 * num / den if den else 0.0
    return result


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_like_a_plain_model(
    family: str, shared: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "MICRO_TOKENS", 2 * LENGTH)
    monkeypatch.setattr(calibration, "LEARNED_TOKENS", 4 * LENGTH)
    monkeypatch.setattr(calibration, "HEAD_TOKENS", 7)
    found = case(shared, tmp_path, family)
    with found.run() as result:
        for v, name in enumerate(found.folders):
            layers, batch = reference(found, name)
            for i, (layer, one) in enumerate(zip(found.architecture.layers, layers, strict=True)):
                order = [p.name for p in weights(layer)]
                last = "wo" if "wo" in order else "down_proj"
                names = sorted(order, key=lambda n: n == last)
                width = {p.name: p.matrix[1] for p in weights(layer)}
                width = {n: width[n] for n in names}
                for e in range(layer.num_experts):
                    expected = naive(one, e, width, one.tokens / batch.written.count)
                    assert result.frequency[i][e, v] == expected["count"] / one.tokens
                    assert result.output_norm[i][e, v] == pytest.approx(
                        expected["norm"] / one.tokens, rel=1e-4, abs=1e-12
                    )
                    for p in names:
                        moments = expected[p]["H"] / one.tokens
                        read = result.moments(i, p, e, v)
                        assert read.shape == (1, width[p], width[p])
                        torch.testing.assert_close(
                            read[0].double(), moments, rtol=1e-4, atol=1e-6 * float(moments.max())
                        )
                        assert result.sensitivity[i][e, v, order.index(p)] == pytest.approx(
                            expected[p]["s"], rel=1e-3, abs=1e-12
                        )


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", "gpt-oss", "switch"])
def test_distances_of_outputs(
    family: str, shared: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collected, "SAMPLED_TOKENS", 23)
    found = case(shared, tmp_path, family, (0, 1, 0))
    models = [tiny.load(folder).float() for folder in found.folders.values()]
    sampled = []
    for name in found.folders:
        layers, _ = reference(found, name)
        picked = []
        for one in layers:
            count = min(23, one.tokens)
            rows = [i * one.tokens // count for i in range(count)]
            picked.append((torch.cat(one.hidden)[rows], torch.cat(one.gates)[rows]))
        sampled.append(picked)
    with found.run() as result, torch.no_grad():
        for i, layer in enumerate(found.architecture.layers):
            apply = [
                lambda x, e, m=m, n=layer.name: expert(m.get_submodule(n), e)(x)[2].double()
                for m in models
            ]
            for e in range(layer.num_experts):
                assert (np.diagonal(result.output[i][e]) == 0).all()
                assert result.output[i][e, 0, 2] == result.cka[i][e, 0, 2] == 0  # the same weights
                for a, b in ((0, 1), (1, 2)):
                    x = torch.cat([sampled[v][i][0] for v in (a, b)])
                    g = torch.cat([sampled[v][i][1][:, e] for v in (a, b)]).double()
                    if int((g != 0).sum()) < 2:
                        g = torch.ones_like(g)
                    left, right = (apply[v](x[g != 0], e) for v in (a, b))
                    output, cka = by_hand(left, right, g[g != 0])
                    assert result.output[i][e, a, b] == pytest.approx(output, rel=1e-4)
                    assert result.output[i][e, b, a] == result.output[i][e, a, b]
                    assert result.cka[i][e, a, b] == pytest.approx(cka, rel=1e-3, abs=1e-6)


def by_hand(left: Tensor, right: Tensor, gates: Tensor) -> tuple[float, float]:
    """The distances, CKA by its feature-space form."""
    rows = list(zip(gates.tolist(), left, right, strict=True))
    apart = sum(g**2 * float((a - b).square().sum()) for g, a, b in rows)
    size = sum(g**2 * float(a.square().sum() + b.square().sum()) / 2 for g, a, b in rows)
    x, y = left - left.mean(0), right - right.mean(0)
    cka = (y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
    return float(np.sqrt(apart / size)), 1 - float(cka)


class TestPairs:
    """Distances of pairs where tokens are few."""

    def test_rare_experts_are_compared_on_all_tokens(self) -> None:
        left, right = torch.randn(6, 4), torch.randn(6, 4)
        owner, gates = torch.tensor([0, 0, 0, 1, 1, 1]), torch.rand(6).double()
        reached = torch.tensor([False] * 5 + [True])
        output, cka = outputs.pair_distances([left, right], reached, gates * reached, owner)
        expected = by_hand(left.double(), right.double(), torch.ones(6))
        assert (output[0, 1], cka[1, 0]) == pytest.approx(expected)

    def test_only_tokens_of_the_two(self) -> None:
        experts = [torch.randn(6, 4) for _ in range(3)]
        owner, gates = torch.tensor([0, 0, 1, 1, 2, 2]), torch.rand(6).double()
        output, _ = outputs.pair_distances(experts, gates > 0, gates, owner)
        left, right = (experts[v][:4].double() for v in (0, 1))
        assert output[0, 1] == pytest.approx(by_hand(left, right, gates[:4])[0])

    def test_outputs_that_are_zero(self) -> None:
        zero, some = torch.zeros(3, 2), torch.ones(3, 2)
        owner, gates = torch.tensor([0, 1, 1]), torch.ones(3).double()
        assert outputs.pair_distances([zero, zero], gates > 0, gates, owner)[0][0, 1] == 0
        output, cka = outputs.pair_distances([zero, some], gates > 0, gates, owner)
        assert output[0, 1] == pytest.approx(2**0.5)
        assert cka[0, 1] == 0


class TestMoments:
    """Blocks along the diagonal."""

    def test_blocks_and_padding(self) -> None:
        x = torch.randn(9, 10)
        total = torch.zeros(3, 4, 4)
        collected.add_moments(total, x)
        collected.add_moments(total, x)
        full = F.pad(2 * x.T @ x, (0, 2, 0, 2))
        for i in range(3):
            span = slice(4 * i, 4 * i + 4)
            torch.testing.assert_close(total[i], full[span, span])
        assert total[2, 2:].abs().sum() == total[2, :, 2:].abs().sum() == 0

    def test_smaller_blocks_of_the_same_moments(
        self, shared: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = case(shared, tmp_path, "mixtral")
        with found.run() as whole:
            monkeypatch.setattr(measured, "LEAST_BYTES", 30_000)
            with found.run() as result:
                assert (whole.block, result.block) == (512, 4)
                for name, width in (("gate_up_proj", 32), ("down_proj", 48)):
                    full, blocks = (r.moments(1, name, 3, 1) for r in (whole, result))
                    assert blocks.shape == (width // 4, 4, 4)
                    for i, block in enumerate(blocks):
                        span = slice(4 * i, 4 * i + 4)
                        torch.testing.assert_close(block, full[0, span, span])

    def test_block_is_chosen_by_size(
        self, shared: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        architecture = case(shared, tmp_path, "mixtral").architecture
        quarter = 2 * sum(a.exact_bytes * a.num_experts for a in architecture.layers) // 4
        assert choose_block(architecture, 2) == 512
        for least in (0, 1 << 16, 1 << 20):
            monkeypatch.setattr(measured, "LEAST_BYTES", least)
            block = choose_block(architecture, 2)
            allowed = max(least, quarter)
            assert measured.moment_bytes(architecture, 2, block) <= allowed
            assert block == 512 or measured.moment_bytes(architecture, 2, 2 * block) > allowed

    def test_reading_what_is_not_there(self, shared: Make, tmp_path: Path) -> None:
        with case(shared, tmp_path, "mixtral").run() as result:
            with pytest.raises(KeyError):
                result.moments(0, "up_proj", 0, 0)
            for place in ((4, 0), (0, 2), (-1, 0)):
                with pytest.raises(IndexError):
                    result.moments(0, "down_proj", *place)


def same(a: Measured, b: Measured, found: Case) -> bool:
    """Bit for bit."""
    arrays = all(
        np.array_equal(x, y)
        for name in measured.ARRAYS
        for x, y in zip(getattr(a, name), getattr(b, name), strict=True)
    )
    return arrays and all(
        torch.equal(a.moments(i, p.name, e, v), b.moments(i, p.name, e, v))
        for i, layer in enumerate(found.architecture.layers)
        for p in weights(layer)
        for e in range(layer.num_experts)
        for v in range(len(found.variants))
    )


class TestCache:
    """Measured once."""

    @pytest.fixture
    def found(self, shared: Make, tmp_path: Path) -> Case:
        return case(shared, tmp_path, "mixtral")

    @pytest.fixture
    def no_weights(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
        def refuse(*_: object) -> None:
            raise AssertionError("weights are read")

        return lambda: monkeypatch.setattr("moecc.sources.Reader.read", refuse)

    def test_hit_reads_no_weights(
        self, found: Case, tmp_path: Path, no_weights: Callable[[], None]
    ) -> None:
        cache = tmp_path / "cache" / "deep"
        with found.run(cache=cache) as first:
            (kept,) = cache.iterdir()
            assert sorted(p.name for p in kept.iterdir()) == [
                *(f"layer-0000{i}.safetensors" for i in range(2)),
                "measured.npz",
            ]
            no_weights()
            with found.run(cache=cache) as second:
                assert same(first, second, found)
        assert list(cache.iterdir()) == [kept]

    def test_is_what_a_second_run_gives(self, found: Case, tmp_path: Path) -> None:
        with found.run() as first, found.run(cache=tmp_path / "cache") as second:
            assert same(first, second, found)

    @pytest.mark.parametrize("part", ["text", "samples", "length", "seed"])
    def test_miss(self, part: str, found: Case, tmp_path: Path, shared: Make) -> None:
        cache = tmp_path / "cache"
        found.run(cache=cache).close()
        if part == "text":
            write_text(found.texts["b"][0], "mixtral", 5)
        elif part == "seed":
            (tmp_path / "other").mkdir()
            other = case(shared, tmp_path / "other", "mixtral", (0, 2))
            found.variants = [found.variants[0], other.variants[1]]
        else:
            changed = {"samples": (SAMPLES - 1, LENGTH), "length": (SAMPLES, LENGTH - 1)}[part]
            found.settings = Calibration(found.settings.text, *changed)
        found.run(cache=cache).close()
        assert len(list(cache.iterdir())) == 2

    @pytest.mark.parametrize("how", ["flip", "cut", "missing", "arrays"])
    def test_damaged(self, how: str, found: Case, tmp_path: Path) -> None:
        cache = tmp_path / "cache"
        with found.run(cache=cache) as first:
            (kept,) = cache.iterdir()
            path = kept / ("measured.npz" if how == "arrays" else "layer-00001.safetensors")
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            if how == "missing":
                path.unlink()
            else:
                path.write_bytes(data[:-1] if how == "cut" else data)
            with found.run(cache=cache) as second:
                if how == "missing":
                    assert same(first, second, found)
            read: list[int] = []
            found.run(cache=cache, on_progress=lambda done, total: read.append(done)).close()
            assert read == []

    def test_without_a_cache_nothing_stays(
        self, found: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        temporary = tmp_path / "temporary"
        temporary.mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(temporary))
        (tmp_path / "file").touch()
        for folder in (None, tmp_path / "file"):  # a file is no folder to write to
            with found.run(cache=folder) as result:
                assert len(list(temporary.iterdir())) == 1
                result.moments(0, "down_proj", 0, 0)
            result.close()
            assert list(temporary.iterdir()) == []

    def test_what_a_killed_process_left(self, found: Case, tmp_path: Path) -> None:
        cache = tmp_path / "cache"
        left = cache / ".calibration-old"
        left.mkdir(parents=True)
        (left / "lock").touch()
        with found.run(cache=cache):
            assert not left.exists()

    def test_full_disk(self, found: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("", (), {"free": 10}))
        with pytest.raises(SourceError, match="GiB on disk"):
            found.run(cache=tmp_path / "cache")
        assert list((tmp_path / "cache").iterdir()) == []

    def test_progress(self, found: Case) -> None:
        steps: list[tuple[int, int]] = []
        found.run(on_progress=lambda done, total: steps.append((done, total))).close()
        assert steps == sorted(steps)
        assert steps[-1][0] == steps[-1][1]
        assert len({total for _, total in steps}) == 1


@pytest.mark.parametrize("family", ["mixtral", "jamba", "switch"])
def test_one_block_is_loaded_at_a_time(
    family: str, shared: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the backward pass: of all blocks of all variants, one has weights."""
    models: list[streaming.Streamed] = []
    start = streaming.Streamed.__init__
    load = streaming.Streamed._load_experts
    most = []

    def remember(self: Any, *arguments: Any) -> None:
        models.append(self)
        start(self, *arguments)

    def count(self: Any, one: Any) -> None:
        load(self, one)
        loaded = [
            block.name
            for model in models
            for block in model.blocks
            if any(r.values for r in block.experts)
            or any(not where[key].is_meta for _, where, key in block.tensors)
        ]
        most.append(len(loaded))

    monkeypatch.setattr(streaming.Streamed, "__init__", remember)
    monkeypatch.setattr(streaming.Streamed, "_load_experts", count)
    found = case(shared, tmp_path, family)
    found.run().close()
    assert set(most) == {1}
    assert len(most) == 2 * len(found.architecture.layers) * len(found.variants)
    for model in models:
        assert all(p.is_meta for p in model.model.parameters())


class TestTexts:
    """What samples are made of."""

    @pytest.fixture
    def found(self, shared: Make, tmp_path: Path) -> Case:
        return case(shared, tmp_path, "mixtral")

    def batch(self, found: Case) -> calibration.Batch:
        return read_batch(found.variants[0], found.texts["a"], found.settings)

    def test_windows_are_spread_over_all_files(self, found: Case, tmp_path: Path) -> None:
        for i in range(2):
            (tmp_path / f"{i}").write_text("".join(f"w{3 + n} " for n in range(40)))
        found.texts["a"] = (tmp_path / "0", tmp_path / "1")
        found.settings = Calibration(found.settings.text, 3, 10)
        batch = self.batch(found)
        assert batch.inputs["input_ids"][:, 0].tolist() == [3, 23, 13]  # windows 0, 2 and 5
        assert batch.inputs["input_ids"].shape == (3, 10)
        assert batch.learn == 3

    def test_those_to_learn_from_come_first(
        self, found: Case, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(calibration, "LEARNED_TOKENS", 20)
        assert calibration._choose(9, 6, 10) == ([0, 4, 1, 3, 6, 7], 2)
        assert calibration._choose(1, 6, 100) == ([0], 1)

    def test_fewer_windows_than_samples(self, found: Case) -> None:
        found.settings = Calibration(found.settings.text, 100, 10)
        assert len(self.batch(found).inputs["input_ids"]) == 7

    def test_no_window(self, found: Case) -> None:
        found.settings = Calibration(found.settings.text, 100, 76)
        with pytest.raises(RecipeError) as caught:
            self.batch(found)
        assert caught.value.message == (
            "the calibration text of variant `a` has 75 tokens, a sample has 76"
        )
        assert "calibration.length" in str(caught.value.hint)

    def test_missing_file(self, found: Case) -> None:
        found.texts["a"] = (Path("/nowhere/a.txt"),)
        with pytest.raises(RecipeError) as caught:
            self.batch(found)
        assert caught.value.message == (
            "cannot read the calibration text `/nowhere/a.txt` of variant `a`: "
            "no such file or directory"
        )

    def test_not_utf8(self, found: Case) -> None:
        found.texts["a"][0].write_bytes(b"caf\xe9")
        with pytest.raises(RecipeError, match="of variant `a` is not UTF-8 at byte 3"):
            self.batch(found)

    def test_no_tokenizer(self, shared: Make, tmp_path: Path) -> None:
        folder = tiny.checkpoint(tmp_path / "bare", "mixtral", 3)
        found = case(shared, tmp_path, "mixtral")
        source = resolve("bare", str(folder), Path("/"))
        with pytest.raises(SourceError, match="the tokenizer of variant `bare` does not load"):
            read_batch(open_variants([source])[1][0], found.texts["a"], found.settings)

    def test_tokens_without_an_embedding(self, shared: Make, tmp_path: Path) -> None:
        found = case(shared, tmp_path, "mixtral", (0,))
        other = shared("mixtral", 0, vocab_size=50)
        with pytest.raises(SourceError, match="its model has 50 embeddings"):
            Case({"a": other}, found.texts, found.settings).run()

    def test_not_finite(self, shared: Make, tmp_path: Path) -> None:
        def change(values: dict[str, Tensor]) -> None:
            values["model.layers.1.self_attn.o_proj.weight"][0] = float("nan")

        folder = tiny.edit(tiny.checkpoint(tmp_path / "bad", "mixtral", 1), change)
        save_tokenizer(folder)
        found = case(shared, tmp_path, "mixtral")
        with pytest.raises(SourceError) as caught:
            Case(found.folders | {"b": folder}, found.texts, found.settings).run()
        assert caught.value.message == (
            "`model.layers.1` of variant `b` gives NaN or infinite hidden states "
            "on its calibration text"
        )

    @pytest.mark.parametrize(
        "line", ["{", "[]", '{"input": "w3"}', '{"input": "", "target": "w3"}']
    )
    def test_not_a_pair(self, line: str, shared: Make, tmp_path: Path) -> None:
        found = case(shared, tmp_path, "switch")
        found.texts["a"][0].write_text('{"input": "w3", "target": "w4"}\n' + line)
        with pytest.raises(RecipeError, match="is not a pair") as caught:
            self.batch(found)
        assert "encoder-decoder needs lines" in str(caught.value.hint)

    def test_pairs(self, shared: Make, tmp_path: Path) -> None:
        found = case(shared, tmp_path, "switch")
        lines = ['{"input": "w3 w4 w5", "target": "w6 w7"}', "", '{"input": "w8", "target": "w9"}']
        found.texts["a"][0].write_text("\n".join(lines))
        batch = self.batch(found)
        assert batch.inputs["input_ids"].tolist() == [[3, 4, 5], [8, 0, 0]]
        assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
        assert batch.inputs["decoder_input_ids"].tolist() == [[0, 6, 7], [0, 9, 0]]
        assert (batch.read.count, batch.written.count) == (4, 5)
        found.texts["a"][0].write_text("\n")
        with pytest.raises(RecipeError, match="has no pairs"):
            self.batch(found)


def test_labels_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
    drawn = uniforms(4000)
    labels = sample_labels(probabilities.log().expand(4000, 4), drawn)
    torch.testing.assert_close(
        torch.bincount(labels, minlength=4) / 4000, probabilities, atol=0.03, rtol=0
    )
    assert torch.equal(drawn, uniforms(4000))


def test_quantized_sources_are_their_dequantized_weights(shared: Make, tmp_path: Path) -> None:
    folders = {}
    for name in ("a", "b"):
        folder = tiny.to_fp8(tiny.checkpoint(tmp_path / name, "qwen3-moe", 1), block=(16, 16))
        folders[name] = folder if name == "a" else tiny.from_fp8(folder, (16, 16))
        save_tokenizer(folder)
    texts = {name: write_text(tmp_path / "text", "qwen3-moe", 3) for name in folders}
    with Case(folders, texts, Calibration((), SAMPLES, LENGTH)).run() as result:
        for output, *others in zip(
            result.output, result.frequency, result.output_norm, result.sensitivity, strict=True
        ):
            assert (output == 0).all()
            for array in others:
                np.testing.assert_array_equal(array[:, 0], array[:, 1])


def test_an_alignment_only_renames_experts_and_neurons(shared: Make, tmp_path: Path) -> None:
    found = case(shared, tmp_path, "mixtral")
    own, neurons = np.array([2, 0, 3, 1]), np.random.default_rng(0).permutation(48)
    layer = LayerAlignment(own, {1: neurons})
    with found.run(cache=tmp_path / "cache") as plain:
        found.variants[1] = replace(found.variants[1], alignment=Alignment((layer, layer)))
        with found.run(cache=tmp_path / "cache") as result:
            for i in range(2):
                for name in ("frequency", "output_norm", "sensitivity"):
                    before, after = (getattr(r, name)[i] for r in (plain, result))
                    np.testing.assert_allclose(after[:, 0], before[:, 0])
                    np.testing.assert_allclose(after[:, 1], before[own, 1], rtol=1e-4)
                for e, expert in enumerate(own):
                    for name in ("gate_up_proj", "down_proj"):
                        moments = plain.moments(i, name, int(expert), 1)[0]
                        if (name, e) == ("down_proj", 1):
                            moments = moments[neurons][:, neurons]
                        found_moments = result.moments(i, name, e, 1)[0]
                        torch.testing.assert_close(found_moments, moments, rtol=1e-3, atol=1e-7)


def test_computed_buffers_of_a_block_stay(
    shared: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A buffer that no checkpoint holds is there for the second variant and the backward pass."""
    build = streaming._build

    def read(module: Any, _: object) -> None:
        assert module.computed.sum() == 3

    def add(variant: OpenVariant) -> Any:
        model = build(variant)
        for layer in model.model.layers:
            layer.register_buffer("computed", torch.ones(3), persistent=False)
            layer.register_forward_pre_hook(read)
        return model

    found = case(shared, tmp_path, "mixtral")
    with found.run() as plain:
        monkeypatch.setattr(streaming, "_build", add)
        with found.run() as result:
            assert same(plain, result, found)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_on_a_gpu(family: str, shared: Make, tmp_path: Path) -> None:
    found = case(shared, tmp_path, family)
    with found.run() as cpu, found.run(device="cuda") as gpu, found.run(device="cuda") as again:
        assert same(gpu, again, found)
        for name in measured.ARRAYS:
            for a, b in zip(getattr(cpu, name), getattr(gpu, name), strict=True):
                np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5 * float(a.max()))
        for i, layer in enumerate(found.architecture.layers):
            for p in weights(layer):
                a, b = (r.moments(i, p.name, 0, 1) for r in (cpu, gpu))
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(a.max()))
