"""Experts in every form they are stored in, against float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from served import VARIANTS as NAMES
from served import Built
from test_kernels_linear import EPS, strided
from torch import Tensor

from moecc.artifact import Artifact
from moecc.coding import Coding, decode, encode
from moecc.kernels import packed
from moecc.kernels.experts import Projection, Term, experts, project
from moecc.kernels.norm import Norm
from moecc.kernels.packed import ACTIVATIONS
from moecc.runtime import loading
from moecc.runtime.experts import KernelExperts, LayerExperts, fused_experts
from moecc.runtime.residency import Resident

PHYSICAL = 9
SLOTS = 5
VARIANTS = 3
# What a projection is a sum of: codings, "16" for plain matrices, "rank" for two factors. Those of
# a list are pools of which an expert has one.
FORMS: dict[str, list[list[str]]] = {
    "plain": [["16"]],
    "coded": [["4bit"]],
    "coded twice": [["4bit"], ["2bit"]],
    "two pools": [["3bit", "6bit"], ["1bit"]],
    "plain and coded": [["16"], ["2bit"]],
    "plain or coded": [["16", "5bit"]],
    "low rank": [["16"], ["rank"]],
    "coded and low rank": [["4bit"], ["rank"]],
    "everything": [["16", "4bit"], ["2bit", "rank"]],
}
GROUPS = {"4bit": 32, "2bit": 0, "3bit": 64, "6bit": 128, "1bit": 0, "5bit": 32}
# How much more than a whole result a row of it may be off, and an element. Values are rounded to
# bfloat16 about nine times on their way (normed, scaled, gate, up, activation, product, down, sum,
# residual), each time by 2^-9.2 of themselves in root mean square and by 2^-8 at most. Of a whole
# result that is sqrt(9) * 2^-9.2 = 0.005. Where few inner values are most of an expert's output
# their roundings do not average out: of some 1500 rows the worst is off by up to 0.017 in
# simulations of the cases here, the worst element by 0.04: nine times 2^-8, and what activations
# make of it. Half as much again is allowed, where a whole result may be off by 0.01.
ROW, ELEMENT = 2.5, 6.0
pytestmark = pytest.mark.usefixtures("one_thread")


def _stored(form: str, out: int, size: int, dtype: torch.dtype, device: str) -> tuple[Any, Tensor]:
    """Random slots, and the float64 [slots, out, size] that they stand for."""
    scale = size**-0.5 * (1.0 if form in ("16", "4bit", "3bit", "6bit", "5bit") else 0.5)
    if form == "rank":
        left = (torch.randn(SLOTS, out, 6) * 0.5).to(dtype).to(device)
        right = (torch.randn(SLOTS, 6, size) * scale).to(dtype).to(device)
        return (left, right), left.double() @ right.double()
    values = torch.randn(SLOTS, out, size) * scale
    if form == "16":
        values = values.to(dtype).to(device)
        return values, values.double()
    coding = Coding(int(form[0]), GROUPS[form])
    coded = encode(values.flatten(0, 1).to(device), coding)
    planes = [plane.view(SLOTS, out, -1) for plane in coded.planes]
    slots = packed.arranged(planes, coded.scales.view(SLOTS, out, -1), coding, size)
    return slots, decode(coded, coding, size).view(SLOTS, out, size).double()


def projection(
    form: str,
    shape: tuple[int, int],
    biased: bool,
    dtype: torch.dtype,
    device: str = "cpu",
) -> tuple[Projection, Tensor]:
    """PHYSICAL experts whose slots many share, and their float64 matrices [physical, out, in]."""
    out, size = shape
    values = torch.zeros(PHYSICAL, out, size, dtype=torch.float64, device=device)
    terms = []
    for number, pools in enumerate(FORMS[form]):
        which = torch.randint(0, len(pools), (PHYSICAL,))
        chosen = torch.randint(0 if number == 0 else -1, SLOTS, (PHYSICAL,))
        chosen[0] = 0  # two experts have the same slot
        chosen[1], which[1] = 0, which[0]
        for index, pool in enumerate(pools):
            stored, slots = _stored(pool, out, size, dtype, device)
            own = chosen.where(which == index, -1).to(device)
            terms.append(Term(own.int(), stored, complete=bool((own >= 0).all())))
            values += slots[own.clamp(min=0)] * (own >= 0)[:, None, None]
    bias = torch.randn(PHYSICAL, out).to(dtype).to(device) if biased else None
    return Projection(tuple(terms), out, bias), values


def deviation(found: Tensor, parts: Tensor) -> float:
    """How far `found` [T, H] is from the sums of float64 [T, k, H], relative.

    That of all rows together, of the worst row over ROW or of the worst element over ELEMENT,
    whichever is most. A row may cancel, so that it is held against the norms of its parts, and so
    is an element that is small.
    """
    if not len(found):
        return 0.0
    wanted = parts.sum(1)
    off = found.double() - wanted
    norms = parts.norm(dim=-1).sum(1, keepdim=True)
    rows = off.norm(dim=-1, keepdim=True) / norms
    elements = off.abs() / torch.maximum(wanted.abs(), norms / parts.shape[-1] ** 0.5)
    whole = off.norm() / wanted.norm()
    return float(torch.stack([whole, rows.max() / ROW, elements.max() / ELEMENT]).max())


@dataclass(frozen=True)
class Case:
    """Experts of a layer, and what they make of fresh tokens."""

    first: Projection
    down: Projection
    matrices: tuple[Tensor, Tensor]
    activation: str
    norm: Norm | None
    added: bool
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def error(self, tokens: int, fan: int, one: bool = False) -> float:
        """`deviation` of fresh tokens' results. Of one expert, or any of them."""
        size = self.matrices[0].shape[2]
        x = torch.randn(tokens, size + 8)[:, :size]
        variants = torch.randint(0, VARIANTS, (tokens,)).int()
        physical = torch.randint(-1, PHYSICAL, (tokens, fan)).int()
        if one:
            physical[:] = PHYSICAL - 1
        none = tokens // 2 if tokens > 1 else tokens  # a row that is none
        variants[none:][:1] = -1
        physical[none:][:1] = -1
        x, residual = (self._put(t) for t in (x, torch.randn(tokens, self.down.out_features)))
        physical, variants = physical.to(self.device), variants.to(self.device)
        x[none:][:1] = torch.nan
        routing = torch.rand(tokens, fan, device=self.device)
        found = experts(
            x,
            physical,
            routing,
            self.first,
            self.down,
            self.activation,
            norm=self.norm,
            variants=variants,
            residual=residual if self.added else None,
        )
        assert found.dtype == self.dtype
        parts = self.parts(x, physical, routing, variants)
        if self.added:
            parts = torch.cat([parts, residual.double()[:, None]], 1)
        kept = (physical >= 0).any(1)
        idle = ~kept
        idle[none:][:1] = False  # what it holds is not said
        assert torch.equal(found[idle], (residual if self.added else residual * 0)[idle])
        return deviation(found[kept], parts[kept])

    def parts(self, x: Tensor, physical: Tensor, routing: Tensor, variants: Tensor) -> Tensor:
        """float64 [T, k, H], what each route adds to the result."""
        wide = x.double().nan_to_num()
        if self.norm is not None:
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.norm.eps)
            wide = wide * self.norm.weight.double()[variants.clamp(min=0).long()]
        hidden = applied(wide, physical, self.first, self.matrices[0])
        gate, up = hidden.chunk(2, -1)
        inner = ACTIVATIONS[self.activation](gate) * up
        out = applied(inner, physical.view(-1, 1), self.down, self.matrices[1])
        return out.view(*physical.shape, -1) * routing.double()[..., None]

    def _put(self, x: Tensor) -> Tensor:
        wide = torch.empty_strided(x.shape, x.stride(), dtype=self.dtype, device=self.device)
        return wide.copy_(x)


def applied(x: Tensor, physical: Tensor, projection: Projection, matrices: Tensor) -> Tensor:
    """float64 [T * k, out] of [T, in]; zeros where a route is none."""
    routes = physical.reshape(-1)
    out = x.new_zeros(len(routes), projection.out_features)
    for expert in range(PHYSICAL):
        own = (routes == expert).nonzero()[:, 0]
        out[own] = x[own // physical.shape[1]] @ matrices[expert].T
        if projection.bias is not None:
            out[own] += projection.bias[expert].double()
    return out


def case(
    form: str,
    down: str | None = None,
    *,
    size: int = 50,
    inner: int = 36,
    biased: bool = False,
    activation: str = "silu",
    normed: bool = True,
    added: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Case:
    first, wide = projection(form, (2 * inner, size), biased, dtype, device)
    second, narrow = projection(down or form, (size, inner), biased, dtype, device)
    scale = (strided(VARIANTS, size).abs() + 0.5).to(dtype).to(device)
    norm = Norm(scale, EPS) if normed else None
    return Case(first, second, (wide, narrow), activation, norm, added, dtype, device)


def tolerance(form: str) -> float:
    """The reference rounds a sum of terms to bfloat16."""
    return 1e-5 if sum(map(len, FORMS[form])) == 1 else 1e-2


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class TestExperts:
    @pytest.mark.parametrize("biased", [False, True])
    @pytest.mark.parametrize("form", FORMS)
    def test_reference(self, form: str, biased: bool) -> None:
        c = case(form, biased=biased)
        for tokens, fan in ((1, 1), (2, 3), (17, 2)):
            assert c.error(tokens, fan) < tolerance(form)

    @pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
    def test_activations(self, activation: str) -> None:
        assert case("plain", activation=activation).error(9, 2) < 1e-5

    @pytest.mark.parametrize("normed", [False, True])
    @pytest.mark.parametrize("added", [False, True])
    def test_without_norm_or_residual(self, normed: bool, added: bool) -> None:
        assert case("coded", normed=normed, added=added).error(9, 2) < 1e-5

    def test_all_to_one_expert(self) -> None:
        assert case("coded", "plain").error(9, 2, one=True) < 1e-5

    @pytest.mark.parametrize("form", FORMS)
    def test_project(self, form: str) -> None:
        own, matrices = projection(form, (30, 50), True, torch.float32)
        for tokens, fan in ((1, 4), (13, 2)):
            x = torch.randn(tokens, 50)
            physical = torch.randint(-1, PHYSICAL, (tokens, fan)).int()
            found = project(x, physical, own)
            wanted = applied(x.double(), physical, own, matrices)
            kept = physical.view(-1) >= 0
            assert deviation(found[kept], wanted[kept, None]) < tolerance(form)


class TestProjection:
    def test_plain(self) -> None:
        own, _ = projection("plain", (4, 8), False, torch.float32)
        assert own.plain is own.terms[0].stored
        for form in ("coded", "low rank", "plain and coded"):
            assert projection(form, (4, 8), False, torch.float32)[0].plain is None

    @pytest.mark.parametrize("form", FORMS)
    def test_packed(self, form: str) -> None:
        own, _ = projection(form, (4, 8), False, torch.float32)
        assert own.packed == (form in ("coded", "coded twice", "two pools"))

    @pytest.mark.parametrize("form", ["plain", "coded", "low rank"])
    def test_sizes(self, form: str) -> None:
        own, _ = projection(form, (16, 64), False, torch.bfloat16)
        assert [term.count for term in own.terms] == [SLOTS] * len(own.terms)
        plain, factors = 2 * 16 * 64, 2 * 6 * (16 + 64)
        coded = Coding(4, 32).nbytes(16, 64)
        sizes = {"plain": [plain], "coded": [coded], "low rank": [plain, factors]}[form]
        assert [term.nbytes for term in own.terms] == [SLOTS * size for size in sizes]


class Layers:
    """The layers of an artifact as its models have them, before and after kernels take them."""

    def __init__(self, artifact: Artifact, dtype: str) -> None:
        self.skeletons = loading.skeletons(artifact, dtype)
        self.layers = loading.load_experts(self.skeletons, torch.device("cpu"), lambda *_: None)
        count, nbytes = len(artifact.variants), self.skeletons.layout.nbytes
        rows = torch.empty(count, nbytes, dtype=torch.uint8)
        loading.load_rows(self.skeletons, self.layers, rows, lambda *_: None)
        Resident(self.skeletons, rows)
        self.names = [stored.layer.name for stored in artifact.layers]

    def modules(self) -> Iterator[Any]:
        """The experts of every layer and variant."""
        for model in self.skeletons.models:
            for name in self.names:
                yield model.get_submodule(name)

    def outputs(self, inputs: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
        return [
            fused_experts(module, *given)
            for module, given in zip(self.modules(), inputs, strict=True)
        ]


@pytest.fixture
def _kernels_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "on_gpu", lambda _: True)


@torch.inference_mode()
def compare(artifact: Path, dtype: str) -> float:
    """The relative difference of what kernels and the bank's own arithmetic give."""
    with Artifact(artifact) as opened:
        found = Layers(opened, dtype)
        config = found.skeletons.models[0].config
        inputs = []
        for module in found.modules():
            count = module.moecc.remap.shape[1]
            x = torch.randn(11, config.hidden_size).to(found.skeletons.dtype)
            weights, chosen = torch.rand(11, count).topk(2, -1)
            inputs.append((x, chosen, weights))
        expected = found.outputs(inputs)
        before = sum(layer.nbytes for layer in found.layers)
        kernels = loading.use_kernels(found.skeletons, found.layers, torch.device("cpu"))
        assert kernels is not None
        assert all(isinstance(module.moecc, KernelExperts) for module in found.modules())
        assert sum(layer.nbytes for layer in kernels) >= 0.9 * before
        outputs = found.outputs(inputs)
    assert len(outputs) == len(NAMES) * len(kernels)
    assert all(f.dtype == e.dtype for f, e in zip(outputs, expected, strict=True))
    return max(
        float((f.double() - e.double()).norm() / e.double().norm())
        for f, e in zip(outputs, expected, strict=True)
    )


@pytest.mark.usefixtures("_kernels_everywhere")
class TestKernelExperts:
    """Experts of real artifacts, as transformers' modules call them."""

    @pytest.mark.parametrize("family", sorted(set(tiny.FAMILIES) - {"switch"}))
    def test_families(self, family: str, built: Built) -> None:
        assert compare(built.artifact(family), "float32") < 1e-5

    @pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "nemotron-h"])
    def test_bfloat16(self, name: str, built: Built) -> None:
        assert compare(built.artifact(name), "bfloat16") < 1e-2

    @pytest.mark.parametrize("name", ["mixtral-lossless", "gpt-oss-lossless"])
    def test_lossless(self, name: str, built: Built) -> None:
        assert compare(built.artifact(name), "float32") < 1e-5

    def test_equal_tables_are_one(self, built: Built) -> None:
        with Artifact(built.artifact("mixtral-lossless")) as opened:
            layers = Layers(opened, "bfloat16").layers
        for layer in layers:
            first, last = KernelExperts(layer, torch.bfloat16).projections.values()
            assert first.terms[0].slots is last.terms[0].slots

    def test_says_which_terms_are_complete(self, built: Built) -> None:
        found = set()
        for name in ("mixtral", "mixtral-lossless"):
            with Artifact(built.artifact(name)) as opened:
                layers = Layers(opened, "bfloat16").layers
            for layer in layers:
                for p in KernelExperts(layer, torch.bfloat16).projections.values():
                    for term in p.terms:
                        assert term.complete == bool((term.slots >= 0).all())
                        found.add(term.complete)
        assert found == {False, True}

    def test_the_bank_is_freed(self, built: Built) -> None:
        with Artifact(built.artifact("gpt-oss")) as opened:
            found = Layers(opened, "bfloat16")
            loading.use_kernels(found.skeletons, found.layers, torch.device("cpu"))
        assert all(isinstance(layer, LayerExperts) for layer in found.layers)
        kept = {name for layer in found.layers for name in layer.projections}
        assert all(name.endswith("_bias") for name in kept)

    def test_switch_has_none(self, built: Built) -> None:
        """Its experts are called in another way."""
        with Artifact(built.artifact("switch")) as opened:
            made = loading.skeletons(opened, "bfloat16")
            layers = loading.load_experts(made, torch.device("cpu"), lambda *_: None)
            assert loading.use_kernels(made, layers, torch.device("cpu")) is None
            assert all(layer.projections for layer in layers)
