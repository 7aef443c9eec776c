"""Every family served from one artifact answers as transformers does; served.py has the how.

Three variants of random tiny models with a 4-bit center and 2-bit residuals, some of them
lossless, and the trained examples. The decoders go through continuous batches in every mode, the
others through static ones.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import served
from served import DECODERS, DTYPES, MODES, SPECIAL, STATIC, Built, Passes

from moecc.runtime.opening import open_engine
from moecc.runtime.options import Options

every_mode = pytest.mark.parametrize("mode", MODES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
one_variant_a_pass = pytest.mark.parametrize("mode", ["resident", "swap"])
every_policy = pytest.mark.parametrize("policy", ["fifo", "grouped"])


pytestmark = pytest.mark.usefixtures("one_thread")


class TestTokens:
    """Greedy answers are those of `generate`."""

    @every_mode
    @every_dtype
    @pytest.mark.parametrize("family", DECODERS)
    def test_decoder(
        self, family: str, dtype: str, mode: str, built: Built, passes: Passes
    ) -> None:
        served.check_tokens(built, passes, family, mode, dtype)

    @every_mode
    @pytest.mark.parametrize("name", SPECIAL)
    def test_special(self, name: str, mode: str, built: Built, passes: Passes) -> None:
        served.check_tokens(built, passes, name, mode, "float32")

    @one_variant_a_pass
    @every_dtype
    @pytest.mark.parametrize("family", STATIC)
    def test_static(self, family: str, dtype: str, mode: str, built: Built, passes: Passes) -> None:
        served.check_static(built, passes, family, mode, dtype)

    @every_mode
    @every_dtype
    def test_examples(self, dtype: str, mode: str, built: Built, quickstart: Path) -> None:
        served.check_examples(built, quickstart, mode, dtype)


class TestLogits:
    """Passes over chunks of many sequences give the logits of one pass over each."""

    @every_dtype
    @pytest.mark.parametrize("family", DECODERS)
    def test_decoder(self, family: str, dtype: str, built: Built) -> None:
        served.check_logits(built, family, dtype)

    @pytest.mark.parametrize("name", SPECIAL)
    def test_special(self, name: str, built: Built) -> None:
        served.check_logits(built, name, "float32")


class TestOrder:
    """Whatever order variants run in, and whatever room there is."""

    @every_mode
    @pytest.mark.parametrize("name", ["mixtral", "gpt-oss-window"])
    def test_preemption(self, name: str, mode: str, built: Built, passes: Passes) -> None:
        served.check_preemption(built, passes, name, mode)

    @every_mode
    @every_policy
    def test_few_seats(self, mode: str, policy: str, built: Built, passes: Passes) -> None:
        artifact = built.artifact("qwen3-moe")
        waves = served.traffic("aabbc", (17, 4), 6)
        options = {"mode": mode, "dtype": "float32", "max_num_seqs": 2, "max_batch_tokens": 5}
        with served.serving(artifact, policy=policy, **options) as engine:
            passes.clear()
            found = served.ask(engine, *waves)
        requests = [r for wave in waves for r in wave]
        served.assert_same(requests, found, built.reference(artifact, "float32"), 0.98)
        assert (passes.most_sequences, passes.most_tokens) == (2, 5)

    @every_policy
    @every_mode
    def test_back_and_forth(self, mode: str, policy: str, built: Built) -> None:
        """One request after the other: a variant is as it was when it comes back."""
        artifact = built.artifact("qwen2-moe")
        order = "abacab"
        with served.serving(artifact, mode=mode, policy=policy, dtype="float32") as engine:
            for i, variant in enumerate(order):
                asked = served.request(f"{i}", variant, served.prompt(6 + i, i), 8)
                found = served.ask(engine, [asked])
                served.assert_same([asked], found, built.reference(artifact, "float32"), 0.98)
            counts = engine.stats().reconfigurations
        expected = {
            ("", "a"): 1,
            ("a", "b"): 2,
            ("b", "a"): 1,
            ("a", "c"): 1,
            ("c", "a"): 1,
        }
        assert counts == ({} if mode == "mixed" else expected)

    @one_variant_a_pass
    def test_fifo_keeps_the_order(self, mode: str, built: Built, passes: Passes) -> None:
        artifact = built.artifact("mixtral")
        requests = [
            served.request(f"{i}", v, served.prompt(5 + i, i), 6) for i, v in enumerate("abba")
        ]
        with served.serving(artifact, mode=mode, policy="fifo", dtype="float32") as engine:
            passes.clear()
            found = served.ask(engine, requests)
        served.assert_same(requests, found, built.reference(artifact, "float32"), 0.98)
        assert passes.turns == 2
        assert [parts[0].variant for parts in passes.parts] == [0] * 6 + [1] * 6 + [0] * 6

    @one_variant_a_pass
    @every_policy
    @pytest.mark.parametrize("name", ["mixtral", "deepseek-v3", "gpt-oss"])
    def test_turns_pass_in_the_middle(
        self, name: str, policy: str, mode: str, built: Built, passes: Passes
    ) -> None:
        served.check_alternating(built, passes, name, mode, policy)


class TestMode:
    """What `auto` makes of a family, and what it says."""

    @pytest.mark.parametrize("family", DECODERS)
    def test_decoders_mix(self, family: str, built: Built) -> None:
        notes: list[str] = []
        engine = open_engine(built.artifact(family), Options(), note=notes.append)
        stats = engine.stats()
        engine.close()
        assert (stats.mode, stats.batching) == ("mixed", "continuous")
        assert notes == []

    @pytest.mark.parametrize(
        ("asked", "mode"),
        [
            ("auto", "resident"),
            ("mixed", "resident"),
            ("resident", "resident"),
            ("swap", "swap"),
        ],
    )
    @pytest.mark.parametrize(
        ("family", "reason"),
        [
            ("jamba", "`JambaForCausalLM` keeps a state besides keys and values"),
            ("nemotron-h", "`NemotronHForCausalLM` keeps a state besides keys and values"),
            ("switch", "`SwitchTransformersForConditionalGeneration` has an encoder"),
        ],
    )
    def test_others_are_static(
        self, family: str, reason: str, asked: str, mode: str, built: Built
    ) -> None:
        notes: list[str] = []
        options = Options(mode=asked)  # type: ignore[arg-type]
        engine = open_engine(built.artifact(family), options, note=notes.append)
        stats = engine.stats()
        engine.close()
        assert (stats.mode, stats.batching, stats.kv_blocks_total) == (mode, "static", 0)
        expected = [f"{reason}: served in static batches"]
        if asked == "mixed":
            expected.insert(0, f"{reason}: batches are of one variant")
        assert notes == expected
