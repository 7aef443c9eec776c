"""Every family end to end on tiny random models; transformers' own loader is the reference."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import FineGrainedFP8Config, Mxfp4Config

from moecc import consolidate
from moecc.architecture import Architecture, map_tensors, read_layout, skeleton
from moecc.artifact import Artifact
from moecc.checkpoint import TORCH_DTYPES, Checkpoint, LogicalTensor
from moecc.errors import SourceError
from moecc.export import MARK, export, load_model
from moecc.recipe import Recipe, parse_recipe
from moecc.sources import resolve
from moecc.tensorfile import TensorInfo
from moecc.variants import OpenVariant, open_variants, row_spans

Make = Callable[..., Path]

EXPERT = re.compile(
    r"(?P<module>.*experts)\.(expert_\d+\.w[io]\.weight|(gate_up|up|down)_proj(_bias)?)"
)
LOSSLESS = "9x"
CODED = {"merge": {"center": "4bit", "residual": "2bit", "group": 32}}
every_family = pytest.mark.parametrize("family", tiny.FAMILIES)


pytestmark = pytest.mark.usefixtures("one_thread")


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
    sources = [resolve(name, str(f), Path("/")) for name, f in zip("abc", folders, strict=False)]
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
        value = torch.frombuffer(raw, dtype=TORCH_DTYPES[disk[key].dtype]).view(disk[key].shape)
        assert same_bits(value.to(state[name].dtype), state[name]), name


def assert_exported(found: Path, source: Path) -> None:
    """The same tensors in the same files, and the same side files."""
    assert tiny.shards(found) == tiny.shards(source)
    assert_same_tensors(tiny.tensors(found), tiny.tensors(source))
    names = {path.name for path in source.iterdir()}
    assert {path.name for path in found.iterdir()} == names | {MARK}
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


class TestMapping:
    """Rows and tensors read from disk against `from_pretrained`."""

    @every_family
    def test_family(self, family: str, shared: Make) -> None:
        folder = shared(family)
        assert len(tiny.shards(folder)) > 1
        assert_reads(tiny.load(folder), *opened(folder))

    @pytest.mark.parametrize(
        ("family", "dtype"),
        [
            ("mixtral", torch.float32),
            ("gpt-oss", torch.float32),
            ("switch", torch.float32),
            ("olmoe", torch.float16),
        ],
    )
    def test_other_dtype(self, family: str, dtype: torch.dtype, shared: Make) -> None:
        folder = shared(family, dtype=dtype)
        architecture, variant = opened(folder)
        assert {p.dtype for layer in architecture.layers for p in layer.projections} == {
            {torch.float32: "F32", torch.float16: "F16"}[dtype]
        }
        assert_reads(tiny.load(folder), architecture, variant)

    def test_dense_layers_have_no_experts(self, shared: Make) -> None:
        names = [layer.name for layer in opened(shared("deepseek-v3"))[0].layers]
        assert names == ["model.layers.1.mlp.experts", "model.layers.2.mlp.experts"]
        names = [layer.name for layer in opened(shared("jamba"))[0].layers]
        assert names == [
            "model.layers.1.feed_forward.experts",
            "model.layers.3.feed_forward.experts",
        ]

    def test_encoder_and_decoder(self, shared: Make) -> None:
        architecture, _ = opened(shared("switch"))
        assert [layer.name for layer in architecture.layers] == [
            "encoder.block.1.layer.1.mlp.experts",
            "encoder.block.3.layer.1.mlp.experts",
            "decoder.block.1.layer.2.mlp.experts",
        ]

    def test_biases_and_orientation(self, shared: Make) -> None:
        architecture, _ = opened(shared("gpt-oss"))
        assert [(p.name, p.shape, p.transposed) for p in architecture.layers[0].projections] == [
            ("down_proj", (32, 48), True),
            ("down_proj_bias", (32,), False),
            ("gate_up_proj", (96, 32), True),
            ("gate_up_proj_bias", (96,), False),
        ]

    def test_tied_head_is_not_on_disk(self, shared: Make) -> None:
        _, variant = opened(shared("qwen3-moe-tied"))
        assert "lm_head.weight" not in variant.layout.non_expert

    def test_large_model(self) -> None:
        """Qwen3-235B-A22B: 36 945 tensors, from names and shapes alone."""
        config = {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "head_dim": 128,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "num_attention_heads": 64,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 94,
            "num_key_value_heads": 4,
            "tie_word_embeddings": False,
            "vocab_size": 151936,
        }
        state = skeleton("a", config).state_dict()
        shapes = {n: tuple(t.shape) for n, t in state.items() if not EXPERT.fullmatch(n)}
        others = len(shapes)
        for layer in range(94):
            for expert in range(128):
                prefix = f"model.layers.{layer}.mlp.experts.{expert}"
                shapes[f"{prefix}.gate_proj.weight"] = (1536, 4096)
                shapes[f"{prefix}.up_proj.weight"] = (1536, 4096)
                shapes[f"{prefix}.down_proj.weight"] = (4096, 1536)
        table = {
            name: LogicalTensor(name, "BF16", shape, TensorInfo(name, "BF16", shape, "f", 0, 0))
            for name, shape in shapes.items()
        }
        architecture, layout = map_tensors("a", config, table)
        assert len(architecture.layers) == 94
        assert architecture.expert_params == 94 * 128 * 3 * 1536 * 4096
        assert len(layout.non_expert) == others
        gate, up = layout.tiles[93, "gate_up_proj"][127]
        assert (gate.tensor, gate.row) == ("model.layers.93.mlp.experts.127.gate_proj.weight", 0)
        assert (up.tensor, up.row) == ("model.layers.93.mlp.experts.127.up_proj.weight", 1536)


def fused(folder: Path) -> Path:
    """The same Mixtral as transformers has it in memory: one tensor for all experts."""
    state = tiny.load(folder).state_dict()
    return tiny.write(folder, state)


class TestFusedOnDisk:
    """A family that is per expert on disk can also come fused."""

    def test_rows(self, shared: Make, own: Make) -> None:
        folder = fused(own("mixtral"))
        assert "model.layers.0.mlp.experts.gate_up_proj" in tiny.tensors(folder)
        assert_reads(tiny.load(shared("mixtral")), *opened(folder))

    def test_layouts_mix(self, shared: Make, own: Make, tmp_path: Path) -> None:
        folders = {"split": shared("mixtral"), "fused": fused(own("mixtral", 1))}
        consolidate.run(recipe(folders, budget=LOSSLESS), tmp_path / "out")
        with Artifact(tmp_path / "out") as artifact:
            for name, folder in folders.items():
                export(artifact, name, tmp_path / name)
                assert_exported(tmp_path / name, folder)

    def test_layouts_share(self, shared: Make, own: Make, tmp_path: Path) -> None:
        folders = {"split": shared("mixtral"), "fused": fused(own("mixtral"))}
        planned = consolidate.run(recipe(folders, budget=LOSSLESS), tmp_path / "out")
        assert planned.plan.ratio == 1
        assert [layer.slots for layer in planned.plan.layers] == [4, 4]


def nudge(values: dict[str, Tensor]) -> None:
    """Changes some tensors a little; of fused experts, half of them."""
    for name in Random(0).sample(sorted(values), len(values) // 6):
        value = values[name]
        part = value[: len(value) // 2] if value.dim() == 3 else value
        part.copy_(part.float() * 1.02)


def both(a: Path, b: Path, tmp_path: Path) -> Artifact:
    """A lossless artifact of two variants, both of which come back as they were."""
    consolidate.run(recipe({"a": a, "b": b}, budget=LOSSLESS), tmp_path / "out")
    artifact = Artifact(tmp_path / "out")
    for name, folder in (("a", a), ("b", b)):
        export(artifact, name, tmp_path / f"back-{name}")
        assert_exported(tmp_path / f"back-{name}", folder)
    return artifact


class TestRoundTrip:
    """Recipe to artifact and back to checkpoints."""

    @every_family
    def test_lossless(self, family: str, shared: Make, own: Make, tmp_path: Path) -> None:
        near = tiny.edit(own(family), nudge)
        folders = {"a": shared(family), "b": shared(family, 1), "near": near}
        made = recipe(folders, budget=LOSSLESS, base="a")
        planned = consolidate.run(made, tmp_path / "out")
        assert all(layer.expected_error == 0 for layer in planned.plan.layers)
        assert planned.plan.ratio < 3  # what `near` left alone is stored once
        with Artifact(tmp_path / "out") as artifact:
            assert artifact.verify() == []
            for name, folder in folders.items():
                export(artifact, name, tmp_path / name)
                assert_exported(tmp_path / name, folder)
                state = load_model(artifact, name).state_dict()
                assert_same_tensors(state, tiny.load(folder).state_dict())

    @every_family
    def test_coded(self, family: str, shared: Make, tmp_path: Path) -> None:
        folders = {"a": shared(family), "b": shared(family, 1)}
        planned = consolidate.run(smallest(folders, **CODED), tmp_path / "out")
        groups = [g for layer in planned.plan.layers for e in layer.experts for g in e]
        assert {(g.members, g.coded) for g in groups} == {((0, 1), True)}
        with Artifact(tmp_path / "out") as artifact:
            for name, folder in folders.items():
                export(artifact, name, tmp_path / name)
                assert tiny.shards(tmp_path / name) == tiny.shards(folder)
                self.assert_decoded(artifact, name, tmp_path / name, folder)
                model = load_model(artifact, name)
                logits = forward(model)
                assert torch.isfinite(logits).all()
                assert torch.equal(logits, forward(tiny.load(tmp_path / name)))

    def assert_decoded(self, artifact: Artifact, name: str, found: Path, source: Path) -> None:
        """Experts are what the artifact stands for, near the source; all else is the source's."""
        (architecture, variant), (_, original) = opened(found), opened(source)
        for index, layer in enumerate(architecture.layers):
            for projection in layer.projections:
                for expert in range(layer.num_experts):
                    at = (index, projection.name, expert, range(projection.matrix[0]))
                    rows, expected = variant.rows(*at), original.rows(*at)
                    assert same_bits(rows, artifact.rows(name, *at).to(expected.dtype))
                    if projection.is_bias:
                        assert same_bits(rows, expected)
                        continue
                    error = (rows.float() - expected.float()).norm() / expected.float().norm()
                    assert 0.05 < error < 0.3
        before, after = tiny.tensors(source), tiny.tensors(found)
        for disk in original.layout.non_expert.values():
            assert same_bits(after[disk], before[disk])

    @pytest.mark.parametrize(
        ("family", "dtype"),
        [("gpt-oss", torch.bfloat16), ("olmoe", torch.float16), ("switch", torch.bfloat16)],
    )
    def test_shared_mean(
        self, family: str, dtype: torch.dtype, shared: Make, tmp_path: Path
    ) -> None:
        folders = {s: shared(family, i, dtype=dtype) for i, s in enumerate("ab")}
        consolidate.run(smallest(folders), tmp_path / "out")
        a, b = (opened(folder)[1] for folder in folders.values())
        with Artifact(tmp_path / "out") as artifact:
            export(artifact, "b", tmp_path / "b")
        architecture, found = opened(tmp_path / "b")
        for index, layer in enumerate(architecture.layers):
            for projection in layer.projections:
                at = (index, projection.name, layer.num_experts - 1, range(projection.matrix[0]))
                mean = (a.rows(*at).float() + b.rows(*at).float()) / 2
                expected = b.rows(*at) if projection.is_bias else mean.to(dtype)
                assert same_bits(found.rows(*at), expected)

    @pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
    def test_in_small_pieces(
        self, family: str, shared: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Tensors larger than a tile or a block; how they are cut does not show in the bank."""
        folders = {"a": shared(family), "b": shared(family, 1)}
        consolidate.run(smallest(folders, **CODED), tmp_path / "whole")
        for module in ("export", "checkpoint", "artifact"):
            name = "TILE_ELEMENTS" if module == "export" else "STREAM_BYTES"
            monkeypatch.setattr(f"moecc.{module}.{name}", 250)
        monkeypatch.setattr("moecc.merging.row_spans", lambda p, v, elements: row_spans(p, v, 150))
        consolidate.run(smallest(folders, **CODED), tmp_path / "pieces")
        for file in ("experts-00000.safetensors", "experts-00001.safetensors"):
            whole, pieces = (tmp_path / made / file for made in ("whole", "pieces"))
            assert whole.read_bytes() == pieces.read_bytes()
        both(*folders.values(), tmp_path).close()

    @pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
    def test_float32(self, family: str, shared: Make, tmp_path: Path) -> None:
        folders = {s: shared(family, i, dtype=torch.float32) for i, s in enumerate("ab")}
        consolidate.run(recipe(folders, budget=LOSSLESS), tmp_path / "exact")
        consolidate.run(smallest(folders, **CODED), tmp_path / "coded")
        for name, folder in folders.items():
            with Artifact(tmp_path / "exact") as artifact:
                export(artifact, name, tmp_path / f"exact-{name}")
                assert_exported(tmp_path / f"exact-{name}", folder)
            with Artifact(tmp_path / "coded") as artifact:
                export(artifact, name, tmp_path / f"coded-{name}")
                self.assert_decoded(artifact, name, tmp_path / f"coded-{name}", folder)


QUANTIZED: dict[str, tuple[str, dict[str, Any], Callable[..., Path], Any]] = {
    "fp8": (
        "qwen3-moe-tied",
        {"hidden_size": 128, "moe_intermediate_size": 256, "head_dim": 64},
        tiny.to_fp8,
        FineGrainedFP8Config,
    ),
    "mxfp4": (
        "gpt-oss",
        {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16},
        tiny.to_mxfp4,
        Mxfp4Config,
    ),
}
every_method = pytest.mark.parametrize("method", QUANTIZED)


def quantized(own: Make, method: str, seed: int = 0, **options: Any) -> tuple[Path, Any]:
    """A quantized checkpoint, and the model that transformers makes of it, dequantized."""
    family, sizes, quantize, config = QUANTIZED[method]
    folder = quantize(own(family, seed, **sizes), **options)
    return folder, tiny.load(folder, quantization_config=config(dequantize=True))


class TestQuantized:
    """FP8 and MXFP4 sources are read as 16-bit ones."""

    @every_method
    def test_rows(self, method: str, own: Make) -> None:
        folder, reference = quantized(own, method)
        architecture, variant = opened(folder)
        assert variant.checkpoint.quantized
        assert {p.dtype for layer in architecture.layers for p in layer.projections} == {"BF16"}
        assert_reads(reference, architecture, variant)

    def test_bf16_scales(self, own: Make) -> None:
        folder, reference = quantized(own, "fp8", scale_dtype=torch.bfloat16)
        assert_reads(reference, *opened(folder))

    @pytest.mark.parametrize(
        ("sizes", "block"),
        [
            # Rows and columns cut off: of DeepSeek-V3's `kv_a_proj_with_mqa`, 576 rows need five.
            ({"hidden_size": 160, "moe_intermediate_size": 192, "head_dim": 72}, (128, 128)),
            ({"hidden_size": 160, "moe_intermediate_size": 192, "head_dim": 72}, (64, 32)),
            ({"hidden_size": 32, "moe_intermediate_size": 48}, (128, 128)),
            ({"hidden_size": 32, "moe_intermediate_size": 48}, (0, 0)),
        ],
    )
    def test_fp8_blocks(
        self,
        sizes: dict[str, int],
        block: tuple[int, int],
        own: Make,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """transformers itself does not dequantize blocks that are cut off."""
        monkeypatch.setattr("moecc.checkpoint.STREAM_BYTES", 1)  # a block at a time
        folder = tiny.to_fp8(own("qwen3-moe-tied", **sizes), block=block)
        plain = tiny.from_fp8(shutil.copytree(folder, tmp_path / "plain"), block)
        assert_reads(tiny.load(plain), *opened(folder))

    def test_fp8_activation_scales_are_left_out(self, own: Make, tmp_path: Path) -> None:
        def change(values: dict[str, Tensor]) -> None:
            for name in [n for n in values if n.endswith("weight_scale_inv")]:
                values[name.replace("weight_scale_inv", "activation_scale")] = torch.tensor(0.5)

        folders = {}
        for seed, name in enumerate("ab"):
            folder, reference = quantized(own, "fp8", seed)
            folders[name] = tiny.edit(folder, change)
        consolidate.run(recipe(folders, budget=LOSSLESS), tmp_path / "out")
        with Artifact(tmp_path / "out") as artifact:
            export(artifact, "b", tmp_path / "b")
        assert not [name for name in tiny.tensors(tmp_path / "b") if "scale" in name]
        assert_same_tensors(tiny.load(tmp_path / "b").state_dict(), reference.state_dict())

    @pytest.mark.parametrize(
        "scale",
        [torch.ones(2, 2), torch.ones(1, 2, 1), torch.ones(0, 1), torch.ones(2, 1).byte()],
        ids=["grid", "dimensions", "empty", "dtype"],
    )
    def test_fp8_scales_that_do_not_fit(self, scale: Tensor, own: Make) -> None:
        name = "model.layers.0.mlp.experts.0.gate_proj.weight"  # [256, 128]
        folder, _ = quantized(own, "fp8")
        tiny.edit(folder, lambda values: values.update({f"{name}_scale_inv": scale}))
        with pytest.raises(SourceError) as caught:
            opened(folder)
        assert f"tensor `{name}` of variant `a`" in caught.value.message
        assert f"scales of shape {list(scale.shape)}" in caught.value.message

    def test_fp8_without_scales(self, own: Make) -> None:
        name = "model.layers.0.self_attn.q_proj.weight"
        folder, _ = quantized(own, "fp8")
        error = refusal(tiny.edit(folder, lambda values: values.pop(f"{name}_scale_inv")))
        assert f"tensor `{name}` of variant `a` is F8_E4M3 without scales" in error.message

    def test_mxfp4_without_scales(self, own: Make) -> None:
        name = "model.layers.0.mlp.experts.down_proj"
        folder, _ = quantized(own, "mxfp4")
        tiny.edit(folder, lambda values: values.pop(f"{name}_scales"))
        with pytest.raises(SourceError) as caught:
            opened(folder)
        assert caught.value.message == (
            f"tensor `{name}_blocks` of variant `a` is not MXFP4 blocks with scales"
        )

    @every_method
    def test_lossless(self, method: str, own: Make, tmp_path: Path) -> None:
        made = {name: quantized(own, method, seed) for seed, name in enumerate("ab")}
        folders = {name: folder for name, (folder, _) in made.items()}
        consolidate.run(recipe(folders, budget=LOSSLESS), tmp_path / "out")
        with Artifact(tmp_path / "out") as artifact:
            for name, (_, reference) in made.items():
                expected = reference.state_dict()
                export(artifact, name, tmp_path / name)
                config = json.loads((tmp_path / name / "config.json").read_text())
                assert "quantization_config" not in config
                found = tiny.tensors(tmp_path / name)
                assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
                assert not [n for n in found if n.endswith(("_scale_inv", "_blocks", "_scales"))]
                assert_same_tensors(tiny.load(tmp_path / name).state_dict(), expected)
                assert_same_tensors(load_model(artifact, name).state_dict(), expected)

    @every_method
    def test_goes_with_a_16_bit_variant(self, method: str, own: Make, tmp_path: Path) -> None:
        folder, reference = quantized(own, method)
        family, sizes, _, _ = QUANTIZED[method]
        plain = tiny.write(own(family, **sizes), reference.state_dict())
        folders = {"quantized": folder, "plain": plain}
        planned = consolidate.run(recipe(folders, budget=LOSSLESS), tmp_path / "out")
        assert planned.plan.ratio == 1

    def test_other_methods_are_refused(self, own: Make) -> None:
        for method in ("gptq", "awq", "bitsandbytes", "compressed-tensors"):
            folder = tiny.edit_config(own("mixtral"), quantization_config={"quant_method": method})
            with pytest.raises(SourceError, match=f"quantized with `{method}`") as caught:
                opened(folder)
            assert "16-bit checkpoint" in str(caught.value.hint)

    def test_fp8_without_its_config(self, own: Make) -> None:
        folder, _ = quantized(own, "fp8")
        tiny.edit_config(folder, quantization_config=None)
        error = refusal(folder)
        assert "has the dtype `F8_E4M3`" in error.message
        assert "quantization_config" in str(error.hint)


def llama(folder: Path) -> Path:
    import transformers

    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


EXPERT_0 = "model.layers.0.block_sparse_moe.experts.0"


class TestRefusals:
    """What cannot be consolidated is said before anything is read."""

    def test_not_a_moe(self, tmp_path: Path) -> None:
        error = refusal(llama(tmp_path / "llama"))
        assert error.message == (
            "variant `a` is `LlamaForCausalLM`, which has no experts moecc knows"
        )
        assert "docs/architectures.md" in str(error.hint)

    def test_unknown_model_type(self, own: Make) -> None:
        error = refusal(tiny.edit_config(own("mixtral"), model_type="nosuch"))
        assert "variant `a` has the model type `nosuch`" in error.message
        assert "upgrade transformers" in str(error.hint)

    @pytest.mark.parametrize(
        "names", [["NoSuchForCausalLM"], ["MixtralConfig"], [], "x", None, [1]]
    )
    def test_unknown_architecture(self, names: Any, own: Make) -> None:
        error = refusal(tiny.edit_config(own("mixtral"), architectures=names))
        shown = names[0] if isinstance(names, list) and names else None
        assert f"variant `a` has the architecture `{shown}`" in error.message
        assert "upgrade transformers" in str(error.hint)

    def test_architecture_of_another_model_type(self, own: Make) -> None:
        error = refusal(tiny.edit_config(own("mixtral"), model_type="llama"))
        assert error.message == (
            "variant `a` has the architecture `MixtralForCausalLM`, "
            "which is not one of model type `llama`"
        )

    def test_invalid_config(self, own: Make) -> None:
        error = refusal(tiny.edit_config(own("mixtral"), hidden_size="many"))
        assert "the config of variant `a` is not valid" in error.message

    def test_missing_expert(self, own: Make) -> None:
        folder = tiny.edit(own("mixtral"), lambda values: values.pop(f"{EXPERT_0}.w3.weight"))
        error = refusal(folder)
        assert "variant `a` has 3 tensors" in error.message
        assert "w3" in error.message
        assert "`model.layers.0.mlp.experts.gate_up_proj`" in error.message
        assert "not one for each of 4 experts" in error.message

    def test_experts_of_two_dtypes(self, own: Make) -> None:
        def change(values: dict[str, Tensor]) -> None:
            values[f"{EXPERT_0}.w3.weight"] = values[f"{EXPERT_0}.w3.weight"].float()

        error = refusal(tiny.edit(own("mixtral"), change))
        assert error.message == (
            "`model.layers.0.mlp.experts.gate_up_proj` of variant `a` "
            f"mixes dtypes: `{EXPERT_0}.w1.weight` is BF16, `{EXPERT_0}.w3.weight` is F32"
        )

    def test_experts_both_split_and_fused(self, own: Make) -> None:
        name = "model.layers.0.mlp.experts.gate_up_proj"
        fused = torch.zeros(4, 96, 32, dtype=torch.bfloat16)
        error = refusal(tiny.edit(own("mixtral"), lambda values: values.update({name: fused})))
        assert f"variant `a` has `{name}` besides" in error.message

    def test_missing_layer_of_experts(self, own: Make) -> None:
        def change(values: dict[str, Tensor]) -> None:
            for name in [n for n in values if n.startswith("model.layers.1.block_sparse_moe.exp")]:
                del values[name]

        error = refusal(tiny.edit(own("mixtral"), change))
        assert "has no tensor for `model.layers.1.mlp.experts." in error.message
        assert "shard" in str(error.hint)

    def test_missing_switch_expert(self, own: Make) -> None:
        name = "encoder.block.1.layer.1.mlp.experts.expert_10.wo.weight"
        error = refusal(tiny.edit(own("switch"), lambda values: values.pop(name)))
        assert f"variant `a` has no tensor for `{name}`" in error.message

    def test_missing_other_tensor(self, own: Make) -> None:
        name = "model.layers.1.self_attn.q_proj.weight"
        error = refusal(tiny.edit(own("mixtral"), lambda values: values.pop(name)))
        assert f"variant `a` has no tensor for `{name}`" in error.message

    def test_expert_shape(self, own: Make) -> None:
        error = refusal(tiny.edit_config(own("mixtral"), intermediate_size=64))
        assert re.search(
            r"tensor `model\.layers\.0\.block_sparse_moe\.experts\.0\.w\d\.weight` of variant `a` "
            r"has shape \[.*48.*\], but its config says \[.*64.*\]",
            error.message,
        )

    def test_fused_shape(self, own: Make) -> None:
        error = refusal(tiny.edit_config(own("gpt-oss"), num_local_experts=5))
        assert "has shape [4, 48, 32], but its config says [5, 48, 32]" in error.message

    def test_vocabulary_the_config_does_not_know(self, own: Make) -> None:
        error = refusal(tiny.edit_config(own("mixtral"), vocab_size=98))
        assert "has shape [96, 32], but its config says [98, 32]" in error.message
        assert "added tokens" in str(error.hint)

    def test_architectures_differ(self, shared: Make) -> None:
        error = refusal(shared("mixtral"), shared("olmoe"))
        assert error.message == "`a` is `MixtralForCausalLM` but `b` is `OlmoeForCausalLM`"
        assert "one base model" in str(error.hint)

    def test_vocabularies_differ(self, shared: Make) -> None:
        error = refusal(shared("mixtral"), shared("mixtral", vocab_size=98))
        assert error.message == "config key `vocab_size` is `96` in `a` but `98` in `b`"
        assert "added tokens" in str(error.hint)

    def test_third_variant_is_checked(self, shared: Make) -> None:
        third = shared("mixtral", vocab_size=98)
        error = refusal(shared("mixtral"), shared("mixtral", 1), third)
        assert error.message == "config key `vocab_size` is `96` in `a` but `98` in `c`"

    def test_dtypes_differ(self, shared: Make) -> None:
        error = refusal(shared("mixtral"), shared("mixtral", dtype=torch.float32))
        assert "is BF16 in `a` but F32 in `b`" in error.message
        assert "same dtype" in str(error.hint)

    def test_one_other_tensor_of_another_dtype(self, shared: Make, own: Make) -> None:
        def change(values: dict[str, Tensor]) -> None:
            values["model.norm.weight"] = values["model.norm.weight"].float()

        error = refusal(shared("mixtral"), tiny.edit(own("mixtral"), change))
        assert error.message == "tensor `model.norm.weight` is BF16 in `a` but F32 in `b`"

    @pytest.mark.parametrize(
        ("family", "key", "value"),
        [
            ("mixtral", "num_experts_per_tok", 1),
            ("mixtral", "rms_norm_eps", 1e-3),
            ("mixtral", "hidden_act", "gelu"),
            ("mixtral", "sliding_window", 16),
            ("qwen3-moe", "norm_topk_prob", True),
            ("deepseek-v3", "routed_scaling_factor", 1.5),
            ("granitemoe", "attention_multiplier", 0.5),
            ("switch", "relative_attention_max_distance", 64),
            ("phimoe", "router_jitter_noise", 0.1),  # a threshold of its router
        ],
    )
    def test_config_key(self, family: str, key: str, value: Any, shared: Make, own: Make) -> None:
        ours = json.loads((shared(family) / "config.json").read_text())[key]
        error = refusal(shared(family), tiny.edit_config(own(family), **{key: value}))
        assert error.message == f"config key `{key}` is `{ours}` in `a` but `{value}` in `b`"
        assert "same function" in str(error.hint)

    def test_rope_type(self, shared: Make, own: Make) -> None:
        rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}
        error = refusal(shared("mixtral"), tiny.edit_config(own("mixtral"), rope_parameters=rope))
        assert "config key `rope_parameters.factor` is `None` in `a` but `2.0`" in error.message

    @pytest.mark.parametrize("rope_type", ["longrope", "dynamic"])
    def test_length_that_the_rope_depends_on(self, rope_type: str, own: Make) -> None:
        rope = {"rope_type": rope_type, "factor": 2.0, "rope_theta": 1e6}
        if rope_type == "longrope":
            rope |= {"long_factor": [1.5] * 4, "short_factor": [1.0] * 4}
            rope |= {"original_max_position_embeddings": 64}
        folders = [
            tiny.edit_config(own("qwen3-moe"), rope_parameters=rope, max_position_embeddings=length)
            for length in (128, 256)
        ]
        error = refusal(*folders)
        assert error.message == (
            "config key `max_position_embeddings` is `128` in `a` but `256` in `b`"
        )

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_weights_that_are_not_finite(
        self, value: float, shared: Make, own: Make, tmp_path: Path
    ) -> None:
        def change(values: dict[str, Tensor]) -> None:
            values["model.layers.1.block_sparse_moe.experts.2.w2.weight"][5, 7] = value

        folders = {"a": shared("mixtral"), "bad": tiny.edit(own("mixtral", 1), change)}
        with pytest.raises(SourceError) as caught:
            consolidate.run(recipe(folders, budget=LOSSLESS), tmp_path / "out")
        assert caught.value.message == (
            "expert 2 of `model.layers.1.mlp.experts` in variant `bad` "
            "holds NaN or infinite weights"
        )
        assert not (tmp_path / "out").exists()


class TestVariantsMayDiffer:
    """Differences that a variant keeps, and gets back on export."""

    def test_how_it_is_run(self, shared: Make, own: Make, tmp_path: Path) -> None:
        b = tiny.edit_config(
            own("mixtral", 1),
            rope_parameters={"rope_type": "default", "rope_theta": 5e6},
            max_position_embeddings=4096,
            eos_token_id=[2, 7],
            bos_token_id=None,
            use_cache=False,
            head_dim=8,  # what it is without saying so
            router_jitter_noise=0.01,
            id2label={"0": "no", "1": "yes"},
            label2id={"no": 0, "yes": 1},
            _attn_implementation="flash_attention_2",
            attention_dropout=0.1,
            router_aux_loss_coef=0.5,
            output_router_logits=True,
            transformers_version="4.36.0",
            auto_map={"AutoModelForCausalLM": "modeling.Other"},
            unsloth_version="2026.1",
        )
        (b / "generation_config.json").write_text('{"temperature": 0.3}')
        (b / "tokenizer_config.json").write_text('{"model_max_length": 4096}')
        (b / "chat_template.jinja").write_text("{{ messages }}")
        with both(shared("mixtral"), b, tmp_path) as artifact:
            loaded = load_model(artifact, "b").config
            assert loaded.rope_parameters["rope_theta"] == 5e6
            assert loaded.max_position_embeddings == 4096
            assert loaded.eos_token_id == [2, 7]

    def test_config_of_an_older_transformers(self, shared: Make, own: Make, tmp_path: Path) -> None:
        b = tiny.edit_config(
            own("mixtral", 1),
            rope_parameters=None,
            rope_theta=1e4,
            dtype=None,
            torch_dtype="bfloat16",
            head_dim=None,
        )
        both(shared("mixtral"), b, tmp_path).close()

    def test_architecture_as_its_authors_spelt_it(
        self, shared: Make, own: Make, tmp_path: Path
    ) -> None:
        b = tiny.edit_config(own("phimoe", 1), architectures=["PhiMoEForCausalLM"])
        with both(shared("phimoe"), b, tmp_path) as artifact:
            assert type(load_model(artifact, "b")).__name__ == "PhimoeForCausalLM"

    def test_tensor_that_transformers_does_not_know(
        self, shared: Make, own: Make, tmp_path: Path
    ) -> None:
        added = {
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.arange(4.0),
            "score.weight": torch.ones(2, 32, dtype=torch.bfloat16),
            "steps": torch.tensor(7),
            "nothing": torch.empty(0, 3),
        }
        b = tiny.edit(own("mixtral", 1), lambda values: values.update(added))
        with both(shared("mixtral"), b, tmp_path) as artifact:
            assert set(added) <= set(artifact.non_expert("b"))
            load_model(artifact, "b")

    def test_tied_head_saved_all_the_same(self, shared: Make, own: Make, tmp_path: Path) -> None:
        def change(values: dict[str, Tensor]) -> None:
            values["lm_head.weight"] = values["model.embed_tokens.weight"].clone()

        b = tiny.edit(own("qwen3-moe-tied", 1), change)
        with both(shared("qwen3-moe-tied"), b, tmp_path) as artifact:
            assert "lm_head.weight" not in artifact.non_expert("a")
            assert "lm_head.weight" in artifact.non_expert("b")
            loaded = load_model(artifact, "b")
            assert loaded.lm_head.weight is loaded.model.embed_tokens.weight

    def test_switch_with_every_tied_copy(self, shared: Make, own: Make, tmp_path: Path) -> None:
        def change(values: dict[str, Tensor]) -> None:
            for name in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head"):
                values[f"{name}.weight"] = values["shared.weight"].clone()

        both(shared("switch"), tiny.edit(own("switch", 1), change), tmp_path).close()

    def test_tensor_that_the_model_drops(self, shared: Make, own: Make, tmp_path: Path) -> None:
        name = "model.layers.61.mlp.experts.0.up_proj.weight"  # multi-token prediction

        def change(values: dict[str, Tensor]) -> None:
            values[name] = torch.ones(16, 32, dtype=torch.bfloat16)

        b = tiny.edit(own("deepseek-v3", 1), change)
        assert opened(b)[1].layout.dropped == (name,)
        consolidate.run(recipe({"a": shared("deepseek-v3"), "b": b}, budget="9x"), tmp_path / "out")
        with Artifact(tmp_path / "out") as artifact:
            assert [v["dropped"] for v in artifact.manifest["variants"]] == [[], [name]]
            export(artifact, "b", tmp_path / "b")
        expected = tiny.tensors(b)
        del expected[name]
        assert_same_tensors(tiny.tensors(tmp_path / "b"), expected)
