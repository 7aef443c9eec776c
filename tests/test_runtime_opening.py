"""From a folder and options to an engine, or to one clear error; and `moecc.load`."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import MODELS, ROOT, Cli, Outcome, compile_recipe, manifest_of, write_recipe

import moecc
from moecc.artifact import Artifact
from moecc.errors import (
    ArtifactError,
    DamagedArtifactError,
    MoeccError,
    RequestError,
    RuntimeUnfitError,
    StoppedError,
)
from moecc.export import load_model
from moecc.manifest import seal
from moecc.runtime import api, devices, loading, opening
from moecc.runtime.api import Served
from moecc.runtime.opening import BLOCK_TOKENS, open_engine
from moecc.runtime.options import Options
from moecc.runtime.residency import SWAP_ROWS

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
GIB = 1 << 30
KV = 4 << 20  # bytes for keys and values: little, so that opening is quick
GREEDY = {"temperature": 0.0}
SECONDS = 60.0


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two variants of a Mixtral of a few thousand weights, without tokenizers. Read only."""
    folder = tmp_path_factory.mktemp("small")
    sources = {n: tiny.checkpoint(folder / n, "mixtral", s) for s, n in enumerate("ab")}
    return compile_recipe(write_recipe(folder / "r.yaml", sources, budget="1.6x"), folder / "out")


@pytest.fixture(scope="module")
def jamba(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a family that is served in static batches. Read only."""
    folder = tmp_path_factory.mktemp("jamba")
    sources = {n: tiny.checkpoint(folder / n, "jamba", s) for s, n in enumerate("ab")}
    return compile_recipe(write_recipe(folder / "r.yaml", sources, budget="1.6x"), folder / "out")


@pytest.fixture
def own(small: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return shutil.copytree(small, tmp_path / "artifact")


def replace(artifact: Path, name: str, data: bytes | None) -> None:
    """Changes a file, or drops it, and seals the manifest again, as somebody hostile would."""
    manifest = manifest_of(artifact)
    if data is None:
        (artifact / name).unlink()
        del manifest["files"][name]
    else:
        (artifact / name).write_bytes(data)
        manifest["files"][name] = {"size": len(data), "sha256": sha256(data).hexdigest()}
    (artifact / "manifest.json").write_bytes(seal(manifest))


def edit_json(artifact: Path, name: str, **changes: Any) -> None:
    values = json.loads((artifact / name).read_bytes()) | changes
    replace(artifact, name, json.dumps(values).encode())


@contextlib.contextmanager
def served(path: Path, notes: list[str] | None = None, **options: Any) -> Iterator[Served]:
    note = (lambda text: None) if notes is None else notes.append
    with moecc.load(path, note=note, **{"kv_cache_bytes": KV, **options}) as found:
        yield found


def refused(path: Path, kind: type[MoeccError] = RuntimeUnfitError, **options: Any) -> MoeccError:
    """The error of opening; nothing of the attempt may be left."""
    before = threads()
    with pytest.raises(MoeccError) as caught:
        open_engine(path, Options(**{"kv_cache_bytes": KV, **options})).close()
    assert type(caught.value) is kind, caught.value
    assert "\n" not in caught.value.message
    assert threads() == before
    return caught.value


def threads() -> list[str]:
    return sorted(t.name for t in threading.enumerate() if t.name.startswith("moecc"))


def sizes(path: Path) -> tuple[int, int, int]:
    """Bytes of the experts and of one row, and how many variants there are."""
    with Artifact(path) as artifact:
        found = loading.skeletons(artifact, "auto")
        return found.expert_bytes, found.layout.nbytes, len(artifact.variants)


def wait(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.002)


class TestModes:
    """What is chosen, given the memory there is."""

    def chosen(self, path: Path, device: torch.device, mode: str, can_mix: bool = True) -> str:
        with Artifact(path) as artifact:
            options = Options(mode=mode)  # type: ignore[arg-type]
            one = opening._Opening(artifact, options, device, lambda *_: None, self.notes.append)
            found = loading.skeletons(artifact, "auto")
            return one._mode(found, None if can_mix else "`X` cannot")

    @pytest.fixture(autouse=True)
    def _notes(self) -> None:
        self.notes: list[str] = []

    @pytest.fixture
    def free(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
        return lambda nbytes: monkeypatch.setattr(devices, "free_bytes", lambda device: nbytes)

    @pytest.fixture(autouse=True)
    def more(self, tmp_path_factory: pytest.TempPathFactory, small: Path) -> Path:
        """Six variants: two rows of them are less than all."""
        folder = small.parent / "six"
        if not folder.exists():
            sources = {f"v{n}": small.parent / "ab"[n % 2] for n in range(6)}
            compile_recipe(write_recipe(folder / "r.yaml", sources, budget="2x"), folder / "out")
        return folder / "out"

    @pytest.mark.parametrize("can_mix", [True, False])
    def test_auto_falls_to_swap(
        self, more: Path, free: Callable[[int], None], can_mix: bool
    ) -> None:
        experts, row, count = sizes(more)
        assert count == 6
        best = "mixed" if can_mix else "resident"
        for nbytes, want in (
            (experts + count * row, best),
            (experts + count * row - 1, "swap"),
            (experts + SWAP_ROWS * row, "swap"),
            (experts + SWAP_ROWS * row - 1, None),
            (0, None),
        ):
            free(nbytes)
            if want is None:
                with pytest.raises(RuntimeUnfitError, match="not enough memory on `cuda:0`"):
                    self.chosen(more, CUDA, "auto", can_mix)
            else:
                assert self.chosen(more, CUDA, "auto", can_mix) == want
        assert self.notes == []

    @pytest.mark.parametrize("mode", ["mixed", "resident", "swap"])
    def test_forced(self, more: Path, free: Callable[[int], None], mode: str) -> None:
        experts, row, count = sizes(more)
        need = experts + (SWAP_ROWS if mode == "swap" else count) * row
        free(need)
        assert self.chosen(more, CUDA, mode) == mode
        free(need - 1)
        with pytest.raises(RuntimeUnfitError) as caught:
            self.chosen(more, CUDA, mode)
        assert f"needs {need / GIB:.2f} GiB" in caught.value.message
        assert f"{(need - 1) / GIB:.2f} GiB are free" in caught.value.message
        hint = caught.value.hint
        assert hint is not None
        assert "budget" in hint
        if mode == "swap":  # it is no help to say what was asked already
            assert "--mode swap" not in hint

    def test_a_family_that_cannot_mix(self, more: Path, free: Callable[[int], None]) -> None:
        free(GIB)
        assert self.chosen(more, CUDA, "mixed", can_mix=False) == "resident"
        experts, row, _ = sizes(more)
        free(experts + SWAP_ROWS * row)
        assert self.chosen(more, CUDA, "mixed", can_mix=False) == "swap"

    def test_swap_on_the_cpu_saves_nothing(self, more: Path, free: Callable[[int], None]) -> None:
        experts, row, count = sizes(more)
        free(experts + count * row - 1)
        with pytest.raises(RuntimeUnfitError) as caught:
            self.chosen(more, CPU, "auto")
        assert "--mode swap" not in str(caught.value.hint)
        free(experts + (count + SWAP_ROWS) * row)
        assert self.chosen(more, CPU, "swap") == "swap"

    def test_through_the_front_door(self, more: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(devices, "free_bytes", lambda device: 1000)
        error = refused(more)
        assert "not enough memory on `cpu`" in error.message
        assert error.hint

    @pytest.mark.parametrize("mode", ["auto", "mixed", "resident", "swap"])
    def test_they_serve(self, small: Path, mode: str) -> None:
        with served(small, self.notes, mode=mode) as found:
            stats = found.engine.stats()
            assert stats.mode == ("mixed" if mode == "auto" else mode)
            assert stats.batching == "continuous"
            experts, row, count = sizes(small)
            assert stats.memory["experts"] == experts
            assert stats.memory["non_expert"] == row * (SWAP_ROWS if mode == "swap" else count)
            assert 0 < stats.memory["kv"] <= KV
            assert len(found.generate("b", [5, 6, 7], max_tokens=4, **GREEDY)[0].tokens) == 4
        assert self.notes == []


class TestLimits:
    """Memory for keys and values, and the lengths that fit into it."""

    BLOCK = BLOCK_TOKENS * 2 * 2 * 2 * 8 * 2  # tokens, keys and values, layers, heads, dim, bytes

    def test_as_large_as_useful(self, small: Path) -> None:
        with served(small, max_num_seqs=3, kv_cache_bytes=GIB) as found:
            stats = found.engine.stats()
            assert stats.kv_blocks_total == 3 * 64 // BLOCK_TOKENS
            assert stats.memory["kv"] == stats.kv_blocks_total * self.BLOCK
            assert found.engine.max_model_len("a") == 64

    def test_odd_lengths(self, small: Path) -> None:
        with served(small, max_num_seqs=3, max_model_len=17) as found:
            assert found.engine.stats().kv_blocks_total == 6
            assert found.engine.max_model_len("a") == 17
            [answer] = found.generate("a", [5], ignore_eos=True, **GREEDY)
            assert len(answer.tokens) == 16
            with pytest.raises(RequestError) as caught:
                found.generate("a", [5] * 17)
            assert caught.value.code == "context_length_exceeded"

    def test_little_memory_shortens(self, small: Path) -> None:
        notes: list[str] = []
        with served(small, notes, kv_cache_bytes=3 * self.BLOCK + 7) as found:
            assert found.engine.max_model_len("a") == 3 * BLOCK_TOKENS
            assert found.engine.stats().kv_blocks_total == 3
            assert [note for note in notes if "48 tokens" in note] == notes
            assert len(notes) == 1
            answers = found.generate("a", [[5], [6], [7]], ignore_eos=True, **GREEDY)
            assert [len(a.tokens) for a in answers] == [47] * 3

    def test_what_was_asked_for_must_fit(self, small: Path) -> None:
        error = refused(small, kv_cache_bytes=3 * self.BLOCK, max_model_len=49)
        assert "49 tokens" in error.message
        assert "--max-model-len" in str(error.hint)
        with served(small, kv_cache_bytes=3 * self.BLOCK, max_model_len=48) as found:
            assert found.engine.max_model_len("b") == 48

    @pytest.mark.parametrize("nbytes", [0, 100, BLOCK - 1])
    def test_no_memory(self, small: Path, nbytes: int) -> None:
        error = refused(small, kv_cache_bytes=nbytes)
        assert "keys and values" in error.message

    def test_longer_than_the_model(self, small: Path) -> None:
        error = refused(small, max_model_len=65)
        assert "65" in error.message
        assert "64 tokens" in error.message
        with served(small, max_model_len=64) as found:
            assert found.engine.max_model_len("a") == 64

    def test_each_variant_has_its_own(self, own: Path) -> None:
        edit_json(own, "variants/b/config.json", max_position_embeddings=20)
        with served(own) as found:
            assert [found.engine.max_model_len(v) for v in "ab"] == [64, 20]
            with pytest.raises(RequestError):
                found.generate("b", [5] * 20)
            assert len(found.generate("a", [5] * 20, max_tokens=3)[0].tokens) == 3
        assert "variant `b`" in refused(own, max_model_len=21).message

    def test_a_quarter_of_what_is_free(self, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        experts, row, count = sizes(small)
        free = max(experts + count * row, 8 * self.BLOCK)
        monkeypatch.setattr(devices, "free_bytes", lambda device: free)
        with served(small, kv_cache_bytes=None) as found:
            blocks = min(64 * 64 // BLOCK_TOKENS, free // 4 // self.BLOCK)
            assert found.engine.stats().kv_blocks_total == blocks

    @pytest.mark.parametrize("seqs", [1, 5000])
    def test_numbers_of_requests(self, small: Path, seqs: int) -> None:
        with served(small, max_num_seqs=seqs) as found:
            answers = found.generate("a", [[5], [6]], max_tokens=3, **GREEDY)
            assert [len(a.tokens) for a in answers] == [3, 3]

    def test_chunks(self, small: Path) -> None:
        prompt = [3 + n for n in range(50)]
        answers = []
        for tokens in (1, 7, 2048):
            with served(small, max_num_seqs=1, max_batch_tokens=tokens) as found:
                answers.append(found.generate("b", prompt, max_tokens=6, **GREEDY)[0].tokens)
                steps = found.engine.stats().steps
                assert steps == -(-50 // tokens) + 5
        assert answers[0] == answers[1] == answers[2]

    @pytest.mark.parametrize("where", ["load_experts", "load_rows"])
    def test_more_was_free_a_moment_ago(
        self, small: Path, monkeypatch: pytest.MonkeyPatch, where: str
    ) -> None:
        def fail(*_: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0")

        monkeypatch.setattr(loading, where, fail)
        error = refused(small)
        assert "memory" in error.message
        assert error.hint


class TestStatic:
    def test_it_is_said(self, jamba: Path) -> None:
        notes: list[str] = []
        with served(jamba, notes, mode="mixed") as found:
            assert len(notes) == 2
            assert "batches are of one variant" in notes[0]
            assert "static batches" in notes[1]
            stats = found.engine.stats()
            assert (stats.batching, stats.mode) == ("static", "resident")
            assert (stats.kv_blocks_total, stats.memory["kv"]) == (0, 0)
            answers = found.generate(
                ["a", "b", "a"], [[5, 6, 7], [5], [8, 9]], max_tokens=5, **GREEDY
            )
            alone = found.generate("a", [8, 9], max_tokens=5, **GREEDY)[0]
            assert answers[2].tokens == alone.tokens
            assert found.engine.stats().kv_blocks_used == 0

    def test_swap(self, jamba: Path) -> None:
        with served(jamba, mode="swap") as found, served(jamba, mode="resident") as other:
            for v in ("a", "b", "a"):
                tokens = [s.generate(v, [5], max_tokens=4, **GREEDY)[0].tokens
                          for s in (found, other)]  # fmt: skip
                assert tokens[0] == tokens[1]
            assert found.engine.stats().mode == "swap"


class TestDevices:
    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    @pytest.mark.parametrize("gpu", [0, 7, 10**6])
    def test_no_such_gpu(self, small: Path, gpu: int) -> None:
        error = refused(small, gpu=gpu)
        assert error.message == f"there is no GPU {gpu}: torch sees none"
        assert "--cpu" in str(error.hint)

    @pytest.mark.parametrize(("count", "text"), [(1, "there is 1,"), (4, "there are 4,")])
    def test_another_gpu(self, monkeypatch: pytest.MonkeyPatch, count: int, text: str) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        assert devices.resolve(count - 1) == torch.device("cuda", count - 1)
        for gpu in (count, -1):
            with pytest.raises(RuntimeUnfitError, match=text):
                devices.resolve(gpu)
        assert devices.resolve(None) == CPU

    def test_free_memory(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        assert 0 < devices.free_bytes(CPU) < 1 << 50
        monkeypatch.setattr(devices, "_available", lambda: 70)
        monkeypatch.setattr(devices, "_cgroup_free", lambda: 50)
        assert devices.free_bytes(CPU) == 50

    def test_pinned_on_the_cpu(self) -> None:
        memory = devices.pinned(3, 256, CPU)
        assert memory.shape == (3, 256)
        assert memory.dtype == torch.uint8
        devices.release(CPU, memory)  # nothing to unlock
        memory.fill_(1)


class TestDamage:
    """Folders that are not as `consolidate` left them."""

    def test_no_artifact(self, tmp_path: Path) -> None:
        refused(tmp_path, ArtifactError)
        refused(tmp_path / "nowhere", ArtifactError)
        refused(MODELS / "nano-base", ArtifactError)

    def test_a_newer_format(self, own: Path) -> None:
        manifest = manifest_of(own)
        manifest["format_version"] = 2
        (own / "manifest.json").write_bytes(seal(manifest))
        error = refused(own, ArtifactError)
        assert "format version 2" in error.message
        assert "upgrade" in str(error.hint)

    @pytest.mark.parametrize(
        "name",
        [
            "experts-00000.safetensors",
            "remap.safetensors",
            "variants/b/config.json",
            "variants/b/tensors.json",
            "variants/b/non-expert.safetensors",
        ],
    )
    def test_files(self, own: Path, name: str) -> None:
        path = own / name
        data = path.read_bytes()
        path.write_bytes(data[:-3])
        assert f"has {len(data) - 3} bytes" in refused(own, DamagedArtifactError).message
        path.unlink()
        assert "is missing" in refused(own, DamagedArtifactError).message
        path.write_bytes(data)
        changed = bytearray(data)
        changed[len(data) * 2 // 3] ^= 4
        path.write_bytes(changed)
        error = refused(own, DamagedArtifactError, verify=True)
        assert f"`{name}` is damaged: its hash differs" in error.message
        path.write_bytes(data)
        with served(own, verify=True) as found:
            assert found.variants == ("a", "b")

    def test_verify_tells_how_far(self, small: Path) -> None:
        seen: list[tuple[str, int, int]] = []
        options = Options(kv_cache_bytes=KV, verify=True)
        open_engine(small, options, on_progress=lambda *at: seen.append(at)).close()
        total = sum(f["size"] for f in manifest_of(small)["files"].values())
        verified = [(done, of) for stage, done, of in seen if stage == "verify"]
        assert verified[-1] == (total, total)
        assert {stage for stage, _, _ in seen} == {"verify", "experts", "non-expert weights"}

    @pytest.mark.parametrize("variant", ["a", "b"])
    @pytest.mark.parametrize(
        "changes",
        [
            {"num_hidden_layers": 1},
            {"num_hidden_layers": 3},
            {"hidden_size": 64},
            {"vocab_size": 100},
            {"num_local_experts": 8},
            {"num_attention_heads": 8, "head_dim": 8},
            {"num_attention_heads": "four"},
            {"hidden_act": "nonsense"},
            {"num_experts_per_tok": 9},
            {"rope_parameters": {"rope_type": "nonsense"}},
        ],
        ids=lambda c: "-".join(c),
    )
    def test_a_config_that_does_not_fit(
        self, own: Path, variant: str, changes: dict[str, Any]
    ) -> None:
        edit_json(own, f"variants/{variant}/config.json", **changes)
        with pytest.raises(MoeccError) as caught:
            open_engine(own, Options(kv_cache_bytes=KV)).close()
        assert isinstance(caught.value, DamagedArtifactError | RuntimeUnfitError)
        assert threads() == []

    @pytest.mark.parametrize("data", [b"", b"[1]", b"{", b"\xff\xfe", b"[" * 100_000, b"{}"])
    def test_a_config_that_is_none(self, own: Path, data: bytes) -> None:
        replace(own, "variants/b/config.json", data)
        with pytest.raises((DamagedArtifactError, RuntimeUnfitError)):
            open_engine(own, Options(kv_cache_bytes=KV))

    def test_another_class(self, own: Path) -> None:
        edit_json(own, "variants/b/config.json", architectures=["NoSuchForCausalLM"])
        error = refused(own)
        assert "NoSuchForCausalLM" in error.message

    @pytest.mark.parametrize(
        "data", [b"{", b"[]", b"3", b'{"eos_token_id": "x"}', b'{"eos_token_id": [[1]]}']
    )
    def test_generation_config(self, own: Path, data: bytes) -> None:
        replace(own, "variants/a/generation_config.json", data)
        refused(own, DamagedArtifactError)

    def test_ends(self, own: Path) -> None:
        name = "variants/a/generation_config.json"
        found = {}
        for ends in (None, 7, [7, 9], []):
            replace(own, name, json.dumps({"eos_token_id": ends}).encode())
            with served(own) as one:
                found[str(ends)] = one.engine._variants["a"].ends
        assert found == {"None": {2}, "7": {7}, "[7, 9]": {7, 9}, "[]": set()}
        replace(own, name, None)
        with served(own) as one:
            assert one.engine._variants["a"].ends == {2}


class TestTokenizers:
    def test_none(self, small: Path) -> None:
        with served(small) as found:
            with pytest.raises(RequestError, match="no tokenizer"):
                found.tokenizer("a")
            for prompt in ("hello", [{"role": "user", "content": "hello"}]):
                with pytest.raises(RequestError, match="no tokenizer") as caught:
                    found.generate("a", prompt)
                assert "token ids" in str(caught.value.hint)
            [answer] = found.generate("a", [5, 6], max_tokens=3, **GREEDY)
            assert (answer.text, len(answer.tokens)) == ("", 3)

    @pytest.mark.parametrize("data", [b"", b"{", b"{}", b"[]", b'{"model": {"type": "BPE"}}'])
    def test_damaged(self, quickstart: Path, tmp_path: Path, data: bytes) -> None:
        """A tokenizer that cannot be read is an error, or the variant is served without one."""
        path = shutil.copytree(quickstart, tmp_path / "artifact")
        replace(path, "variants/chat/tokenizer.json", data)
        try:
            with served(path) as found:
                with pytest.raises(RequestError, match="no tokenizer"):
                    found.tokenizer("chat")
                assert found.tokenizer("math").decode(found.tokenizer("math")("a b")["input_ids"])
        except MoeccError as error:
            assert isinstance(error, RuntimeUnfitError), error  # noqa: PT017
            assert "tokenizer of variant `chat`" in error.message  # noqa: PT017

    def test_shared(self, quickstart: Path) -> None:
        with served(quickstart) as found:
            assert found.tokenizer("base") is not None
            texts = {found.tokenizer(v).decode(found.tokenizer(v)("one two")["input_ids"])
                     for v in found.variants}  # fmt: skip
            assert texts == {"one two"}


# The Python interface


@pytest.fixture(scope="module")
def nano(quickstart: Path) -> Iterator[Served]:
    with served(quickstart) as found:
        yield found


def reference(path: Path, variant: str, text: str, count: int) -> list[int]:
    """What transformers' own `generate` says."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path / "variants" / variant)
    with Artifact(path) as artifact:
        model = load_model(artifact, variant)
    ids = tokenizer(text, return_tensors="pt")
    with torch.inference_mode():
        out = model.generate(**ids, max_new_tokens=count, do_sample=False)
    found: list[int] = out[0, ids["input_ids"].shape[1] :].tolist()
    return found


class TestLoad:
    def test_prompts_of_every_kind(self, nano: Served) -> None:
        tokenizer = nano.tokenizer("chat")
        ids = tokenizer("Once upon")["input_ids"]
        by_text = nano.generate("chat", "Once upon", max_tokens=8, **GREEDY)
        by_ids = nano.generate("chat", ids, max_tokens=8, **GREEDY)
        assert len(by_text) == len(by_ids) == 1
        assert by_text == by_ids
        [answer] = by_text
        assert answer.variant == "chat"
        assert answer.text == tokenizer.decode(answer.tokens, skip_special_tokens=True)
        messages = [{"role": "user", "content": "What is 2 + 2?"}]
        [said] = nano.generate("chat", messages, max_tokens=8, **GREEDY)
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True
        )
        assert said == nano.generate("chat", encoded["input_ids"], max_tokens=8, **GREEDY)[0]
        many = nano.generate("chat", ["Once upon", ids, messages], max_tokens=8, **GREEDY)
        assert many == [answer, answer, said]

    def test_as_transformers(self, nano: Served, quickstart: Path) -> None:
        for variant in ("math", "python"):
            [answer] = nano.generate(variant, "The sum of", max_tokens=6, **GREEDY)
            assert list(answer.tokens) == reference(quickstart, variant, "The sum of", 6)

    def test_several_variants(self, nano: Served) -> None:
        names = ["math", "chat", "base", "python", "math"]
        prompts = ["a", "Once", "The", "def f(", "1 + 1 ="]
        together = nano.generate(names, prompts, max_tokens=6, **GREEDY)
        assert [c.variant for c in together] == names
        for name, prompt, answer in zip(names, prompts, together, strict=True):
            assert nano.generate(name, prompt, max_tokens=6, **GREEDY) == [answer]
        with pytest.raises(RequestError, match="2 variants for 3 prompts"):
            nano.generate(["math", "chat"], ["a", "b", "c"])

    def test_nothing_to_do(self, nano: Served) -> None:
        assert nano.generate("chat", []) == []
        assert nano.generate([], []) == []

    def test_sampling(self, nano: Served) -> None:
        more = {"temperature": 1.0, "max_tokens": 10, "logprobs": 2}
        one, same, other = (nano.generate("chat", "Once", seed=s, **more)[0] for s in (1, 1, 2))
        assert one == same
        assert one.tokens != other.tokens
        assert len(one.logprobs) == len(one.tokens)
        assert [p.token for p in one.logprobs] == list(one.tokens)
        assert all(len(p.top) == 2 for p in one.logprobs)
        first = nano.generate("chat", "Once", max_tokens=5, **GREEDY)[0].tokens[0]
        [banned] = nano.generate("chat", "Once", logit_bias={first: -100.0}, max_tokens=5, **GREEDY)
        assert first not in banned.tokens
        [stopped] = nano.generate("chat", "Once", stop_token_ids=[first], **GREEDY)
        assert (stopped.finish_reason, stopped.text) == ("stop", "")
        whole = nano.generate("chat", "Once", max_tokens=12, **GREEDY)[0].text
        stop = whole[3:5]
        for value in (stop, [stop], (stop, "@@@")):
            [cut] = nano.generate("chat", "Once", max_tokens=12, stop=value, **GREEDY)
            assert cut.text == whole[: whole.index(stop)]
            assert cut.finish_reason == "stop"

    @pytest.mark.parametrize(
        ("prompt", "sampling"),
        [
            ("a", {"max_new_tokens": 3}),
            ("a", {"temperature": -1.0}),
            ("a", {"temperature": "hot"}),
            ("a", {"top_p": 0.0}),
            ("a", {"max_tokens": 0}),
            ("a", {"max_tokens": "3"}),
            ("a", {"stop": ""}),
            ("a", {"stop": 5}),
            ("a", {"logit_bias": {10**6: 1.0}}),
            ("", {}),
            ([-1], {}),
            ([10**9], {}),
            ([5] * 5000, {}),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_what_cannot_be(self, nano: Served, prompt: Any, sampling: dict[str, Any]) -> None:
        if isinstance(prompt, list) and len(prompt) > 100:
            prompt = [prompt]
        with pytest.raises(RequestError):
            nano.generate("chat", prompt, **({"max_tokens": 3} | sampling))
        wait(lambda: not nano.engine._answers)

    @pytest.mark.parametrize(
        ("prompt", "sampling"),
        [
            ([{"role": "user", "content": "x"}, 5], {}),
            ([5, "x"], {}),
            ([5.0], {}),
            (5, {}),
            (None, {}),
            ("a", {"logit_bias": {"5": 1.0}}),
        ],
        ids=str,
    )
    def test_wrong_types(self, nano: Served, prompt: Any, sampling: dict[str, Any]) -> None:
        with pytest.raises((RequestError, TypeError)):
            nano.generate("chat", prompt, **({"max_tokens": 3} | sampling))
        assert nano.engine.stats().alive

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
    def test_half_a_token(self, small: Path) -> None:
        """It must not run past the end of the cache, and take the engine with it."""
        with served(small, max_num_seqs=1) as found:
            with pytest.raises(RequestError):
                found.generate("a", [5], max_tokens=2.5, ignore_eos=True)
            assert found.engine.stats().alive

    def test_no_such_variant(self, nano: Served) -> None:
        for prompt in ("a", [5], [{"role": "user", "content": "x"}]):
            with pytest.raises(RequestError) as caught:
                nano.generate("nobody", prompt)
            assert caught.value.code == "model_not_found"
        with pytest.raises(RequestError):
            nano.tokenizer("nobody")

    def test_no_chat_template(self, quickstart: Path, tmp_path: Path) -> None:
        path = shutil.copytree(quickstart, tmp_path / "artifact")
        replace(path, "variants/chat/chat_template.jinja", None)
        with served(path) as found:
            if found.tokenizer("chat").chat_template is not None:
                pytest.skip("its template is elsewhere, too")
            with pytest.raises(RequestError):
                found.generate("chat", [{"role": "user", "content": "x"}], max_tokens=2)

    def test_one_bad_prompt_of_many_leaves_none_behind(self, nano: Served) -> None:
        before = nano.engine.stats().generation_tokens["chat"]
        with pytest.raises(RequestError):
            nano.generate("chat", [[5], [6], [10**9]], max_tokens=900, ignore_eos=True)
        wait(lambda: not nano.engine._answers)
        assert nano.engine.stats().generation_tokens["chat"] - before < 100

    def test_interrupted(self, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Ctrl-C ends the requests, too: also the one that is being waited for."""

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        with served(small) as found:
            run = found.engine._runner.run
            slow = lambda parts: (time.sleep(0.005), run(parts))[1]  # noqa: E731
            monkeypatch.setattr(found.engine._runner, "run", slow)
            monkeypatch.setattr(api, "_outputs", interrupt)
            with pytest.raises(KeyboardInterrupt):
                found.generate("a", [[5], [6]], ignore_eos=True)
            wait(lambda: not found.engine._answers)
            assert found.engine.stats().generation_tokens["a"] < 30

    def test_more_than_may_wait(self, small: Path) -> None:
        with served(small, max_waiting=2, max_num_seqs=2) as found:
            prompts = [[5 + n % 60] for n in range(30)]
            answers = found.generate("a", prompts, max_tokens=2, **GREEDY)
            assert [a.tokens for a in answers[:3]] == [
                found.generate("a", p, max_tokens=2, **GREEDY)[0].tokens for p in prompts[:3]
            ]
            assert len(answers) == 30

    def test_stream(self, nano: Served) -> None:
        [whole] = nano.generate("chat", "Once", max_tokens=9, **GREEDY)
        outputs = list(nano.stream("chat", "Once", max_tokens=9, **GREEDY))
        assert "".join(o.text for o in outputs) == whole.text
        assert tuple(t for o in outputs for t in o.tokens) == whole.tokens
        assert [o.finish is not None for o in outputs] == [False] * (len(outputs) - 1) + [True]

    def test_closing_the_iterator(self, nano: Served) -> None:
        stream = nano.stream("chat", "Once", ignore_eos=True, temperature=1.0)
        next(stream)
        assert sum(nano.engine.stats().running.values()) == 1
        stream.close()
        wait(lambda: not nano.engine._answers)
        assert nano.engine.stats().kv_blocks_used == 0
        for output in nano.stream("chat", "Once", ignore_eos=True):
            assert output.tokens
            break  # and the iterator is dropped
        gc.collect()
        wait(lambda: not nano.engine._answers)

    def test_errors_of_a_stream(self, nano: Served) -> None:
        for variant, prompt in (("nobody", "x"), ("chat", ""), ("chat", [10**9])):
            with pytest.raises(RequestError):
                list(nano.stream(variant, prompt))

    def test_from_several_threads(self, nano: Served) -> None:
        prompts = [f"{n} and" for n in range(6)]
        want = [nano.generate("math", p, max_tokens=5, **GREEDY)[0] for p in prompts]
        found: dict[int, Any] = {}

        def work(number: int) -> None:
            found[number] = nano.generate("math", prompts[number], max_tokens=5, **GREEDY)[0]

        workers = [threading.Thread(target=work, args=(n,)) for n in range(6)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(SECONDS)
        assert [found[n] for n in range(6)] == want

    def test_an_engine_that_fails(self, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with served(small) as found:

            def fail(parts: Any) -> None:
                raise ValueError("no")

            monkeypatch.setattr(found.engine._runner, "run", fail)
            with pytest.raises(MoeccError, match="ValueError: no"):
                found.generate("a", [5])
            with pytest.raises(MoeccError, match="ValueError: no"):
                list(found.stream("a", [5]))
            monkeypatch.undo()
            assert len(found.generate("a", [5], max_tokens=2, **GREEDY)[0].tokens) <= 2

    def test_two_at_once(self, small: Path, nano: Served) -> None:
        with served(small) as one, served(small, dtype="float32", mode="swap") as two:
            assert one.variants == two.variants == ("a", "b")
            assert nano.variants == ("base", "chat", "math", "python")
            streams = [s.stream("b", [5, 6], max_tokens=6, **GREEDY) for s in (one, two)]
            streams.append(nano.stream("math", "1 +", max_tokens=6, **GREEDY))
            tokens: list[list[int]] = [[], [], []]
            for _ in range(6):
                for number, stream in enumerate(streams):
                    tokens[number] += next(stream, None).tokens if stream else ()  # type: ignore[union-attr]
            assert tuple(tokens[0]) == one.generate("b", [5, 6], max_tokens=6, **GREEDY)[0].tokens
            assert tuple(tokens[1]) == two.generate("b", [5, 6], max_tokens=6, **GREEDY)[0].tokens
        [alone] = nano.generate("math", "1 +", max_tokens=6, **GREEDY)
        assert tuple(tokens[2]) == alone.tokens

    def test_close(self, small: Path) -> None:
        before = threads()
        with served(small) as found:
            assert len(threads()) == len(before) + 1
            stream = found.stream("a", [5], ignore_eos=True)
            next(stream)
        assert threads() == before
        assert list(stream)[-1].finish.reason == "abort"  # type: ignore[union-attr]
        found.close()
        with pytest.raises(StoppedError):
            found.generate("a", [5])
        assert found.variants == ("a", "b")

    def test_close_frees_the_memory(self, small: Path) -> None:
        """As it says: of the bank, the rows and the cache nothing is held any more."""
        with served(small) as found:
            runner = found.engine._runner
            cache = weakref.ref(runner.cache)  # type: ignore[union-attr]
            rows = weakref.ref(found.engine._residency.rows)  # type: ignore[attr-defined]
            found.generate("a", [5], max_tokens=2)
            del runner
        gc.collect()
        assert cache() is None
        assert rows() is None

    def test_dropping_it_frees_the_memory(self, small: Path) -> None:
        with served(small) as found:
            cache = weakref.ref(found.engine._runner.cache)  # type: ignore[union-attr]
        del found
        gc.collect()
        assert cache() is None

    @pytest.mark.parametrize(
        "options",
        [
            {"mode": "fast"},
            {"policy": "best"},
            {"max_num_seqs": 0},
            {"max_num_seqs": -1},
            {"max_model_len": 0},
            {"max_waiting": 0},
            {"dtype": "int8"},
            {"gpu": "0"},
            {"nonsense": 1},
        ],
        ids=str,
    )
    def test_options_that_cannot_be(self, small: Path, options: dict[str, Any]) -> None:
        """An error that names them, and not whatever comes of them later."""
        [(name, value)] = options.items()
        before = threads()
        with pytest.raises((MoeccError, TypeError, ValueError)) as caught, served(small, **options):
            pass
        said = str(caught.value)
        assert name in said or name.replace("_", "-") in said or str(value) in said
        assert "keys and values" not in said
        assert threads() == before


# The command line


def run(*arguments: object, seconds: float = SECONDS, **env: str) -> Outcome:
    """A real process, as a user starts it."""
    done = subprocess.run(
        [sys.executable, "-m", "moecc", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=seconds,
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""} | env,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def one_line(outcome: Outcome, code: int, *texts: str) -> None:
    """One line of an error and perhaps one of a hint, and nothing else but notes."""
    outcome.failed(code, *texts)
    lines = outcome.err.splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("error: "))
    assert [line[:6] for line in lines[first + 1 :]] in ([], ["hint: "]), outcome
    assert outcome.out == ""


class TestCommandLine:
    def test_no_gpu(self, small: Path) -> None:
        one_line(
            run("serve", small, "--gpu", 7, "--port", 0), 1, "there is no GPU 7: torch sees none"
        )

    def test_a_damaged_artifact(self, own: Path) -> None:
        path = own / "experts-00000.safetensors"
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)
        one_line(run("serve", own, "--cpu", "--port", 0, "--verify"), 3, "its hash differs")

    @pytest.mark.parametrize(
        ("arguments", "code", "text"),
        [
            (["--gpu", 7], 1, "there is no GPU 7"),
            (["--cpu", "--dtype", "int8"], 1, "cannot compute in `int8`"),
            (["--cpu", "--max-model-len", 65], 1, "more than the 64 tokens"),
            (["--cpu", "--kv-cache", "1KiB"], 1, "keys and values"),
            (["--cpu", "--gpu", 0], 2, "not both"),
            (["--gpu", -1], 2, "--gpu"),
            (["--mode", "fast"], 2, "--mode"),
            (["--cpu", "--kv-cache", "much"], 2, "--kv-cache"),
            (["--cpu", "--max-num-seqs", 0], 2, "--max-num-seqs"),
            (["--cpu", "--max-model-len", 0], 2, "--max-model-len"),
            (["--cpu", "--api-key", ""], 1, "API key"),
            (["--cpu", "--host", "256.256.256.256"], 1, "256.256.256.256"),
        ],
        ids=str,
    )
    def test_serve(self, small: Path, cli: Cli, arguments: list[Any], code: int, text: str) -> None:
        before = threads()
        outcome = cli("serve", small, "--port", 0, *arguments)
        assert outcome.code == code, outcome
        assert text in " ".join(outcome.err.split()), outcome
        assert "Traceback" not in outcome.err
        if code != 2:
            one_line(outcome, code)
        assert threads() == before

    def test_artifacts(self, own: Path, cli: Cli, tmp_path: Path) -> None:
        serve = ("--cpu", "--port", 0)
        one_line(cli("serve", tmp_path, *serve), 1, "not a moecc artifact")
        path = own / "remap.safetensors"
        data = path.read_bytes()
        path.write_bytes(data[:-1])
        one_line(cli("serve", own, *serve), 3, "remap.safetensors")
        one_line(cli("generate", own, "--variant", "a", "--prompt", "x", "--cpu"), 3)
        path.unlink()
        one_line(cli("serve", own, *serve), 3, "is missing")
        path.write_bytes(data)
        edit_json(own, "variants/b/config.json", num_hidden_layers=1)
        one_line(cli("serve", own, *serve), 3)
        manifest = manifest_of(own)
        manifest["format_version"] = 2
        (own / "manifest.json").write_bytes(seal(manifest))
        one_line(cli("serve", own, *serve), 1, "format version 2")

    def test_memory(self, small: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(devices, "free_bytes", lambda device: 1000)
        one_line(cli("serve", small, "--cpu", "--port", 0), 1, "not enough memory", "0.00 GiB")

    def test_generate(self, quickstart: Path) -> None:
        arguments = ("--variant", "math", "--prompt", "The sum of", "--max-new-tokens", 6, "--cpu")
        outcome = run("generate", quickstart, *arguments)
        assert outcome.code == 0, outcome
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(quickstart / "variants/math")
        text = tokenizer.decode(
            reference(quickstart, "math", "The sum of", 6), skip_special_tokens=True
        )
        assert outcome.out.rstrip("\n") == text.rstrip("\n")

    def test_generate_json(self, quickstart: Path, cli: Cli) -> None:
        arguments = ("--variant", "chat", "--prompt", "Once", "--max-new-tokens", 5)
        outcome = cli("generate", quickstart, *arguments, "--cpu", "--json")
        assert outcome.code == 0, outcome
        found = json.loads(outcome.out)
        assert found["variant"] == "chat"
        assert found["prompt"] == "Once"
        with served(quickstart) as one:
            assert found["text"] == one.generate("chat", "Once", max_tokens=5, **GREEDY)[0].text
        assert threads() in ([], ["moecc-engine"])

    @pytest.mark.parametrize(
        ("arguments", "code", "text"),
        [
            (["--variant", "nobody", "--prompt", "x"], 1, "nobody"),
            (["--variant", "chat", "--prompt", ""], 1, "no tokens"),
            (["--variant", "chat", "--prompt", "x " * 2000], 1, "takes at most"),
            (["--variant", "chat", "--prompt", "x", "--gpu", "9"], 1, "no GPU 9"),
            (["--variant", "chat"], 2, "--prompt"),
            (["--variant", "chat", "--prompt", "x", "--max-new-tokens", 0], 2, "--max-new-tokens"),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_generate_wrong(
        self, quickstart: Path, cli: Cli, arguments: list[Any], code: int, text: str
    ) -> None:
        cpu = [] if "--gpu" in arguments else ["--cpu"]
        before = threads()
        outcome = cli("generate", quickstart, *arguments, *cpu)
        assert outcome.code == code, outcome
        assert text in outcome.err
        if code == 1:
            one_line(outcome, 1)
        assert threads() == before

    def test_generate_without_a_tokenizer(self, small: Path, cli: Cli) -> None:
        outcome = cli("generate", small, "--variant", "a", "--prompt", "x", "--cpu")
        one_line(outcome, 1, "variant `a` has no tokenizer")
