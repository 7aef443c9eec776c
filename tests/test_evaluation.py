"""`moecc eval`: its figures against transformers and by hand, what it refuses, what it saves."""

from __future__ import annotations

import json
import math
import shutil
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from conftest import MODELS, RECIPES, ROOT, Cli, compile_recipe, manifest_of, tree, write_recipe
from served import Built, prompt
from torch import Tensor

from moecc import evaluation
from moecc.artifact import Artifact
from moecc.errors import DamagedArtifactError, MoeccError, SourceError
from moecc.evaluation import Sample, Sums, compare, figures, parse_texts, quality, save
from moecc.export import load_model
from moecc.manifest import read_manifest, seal
from moecc.runtime import scoring
from moecc.runtime.scoring import Served, greedy, load_reference, plain_logits
from moecc.sources import resolve

WINDOW, WINDOWS = 64, 5
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
FIGURES = {
    *("perplexity", "reference_perplexity", "ratio", "kl", "top1", "standard_error"),
    *("tokens", "windows"),
}
SIZES = ("--window", WINDOW, "--windows", WINDOWS)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some English; which, does not matter."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The quick brown fox counts: 12 + 30 = 42.\nUser: what is it?\n" * 40)
    return path


@pytest.fixture
def copied(quickstart: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(quickstart, tmp_path / "artifact"))


def evaluated(cli: Cli, artifact: Path, *arguments: object) -> dict[str, Any]:
    """The document that `eval --json` prints."""
    outcome = cli("eval", artifact, "--json", *SIZES, *arguments)
    assert (outcome.code, outcome.err) == (0, ""), outcome
    found: dict[str, Any] = json.loads(outcome.out)
    return found


def nano(name: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODELS / f"nano-{name}", dtype=torch.float32).eval()


def ids(text: Path, name: str) -> Tensor:
    """The windows by the book."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODELS / f"nano-{name}")
    found = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
    return torch.tensor(found[: WINDOWS * WINDOW]).view(WINDOWS, WINDOW)


@torch.inference_mode()
def losses(model: Any, tokens: Tensor) -> list[float]:
    """Of each window, the mean by transformers' own loss, without that of the routers."""
    own = {"output_router_logits": False}
    return [float(model(input_ids=row[None], labels=row[None], **own).loss) for row in tokens]


# ---- against transformers


def test_lossless_loses_nothing(lossless: Path, text: Path, cli: Cli) -> None:
    texts = [item for name in ("base", "math") for item in ("--text", f"{name}={text}")]
    found = evaluated(cli, lossless, *texts, "--reference", "--sources", RECIPES)
    assert list(found["variants"]) == ["base", "math"]
    for name, variant in found["variants"].items():
        assert variant["ratio"] == 1.0
        assert variant["top1"] == 1.0
        assert variant["kl"] == 0.0
        assert variant["standard_error"] < 1e-6
        assert variant["perplexity"] == variant["reference_perplexity"]
        expected = math.exp(np.mean(losses(nano(name), ids(text, name))))
        assert variant["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert (found["mean_ratio"], found["worst_ratio"], found["mean_kl"]) == (1.0, 1.0, 0.0)


def test_coded_is_what_transformers_computes(quickstart: Path, text: Path, cli: Cli) -> None:
    arguments = ("--text", f"chat={text}", "--reference", "--sources", RECIPES)
    document = evaluated(cli, quickstart, *arguments)
    found, tokens = document["variants"]["chat"], ids(text, "chat")
    with Artifact(quickstart) as artifact:
        coded = load_model(artifact, "chat", dtype=torch.float32)
    ours, theirs = losses(coded, tokens), losses(nano("chat"), tokens)
    gained = np.subtract(ours, theirs)
    ratio = math.exp(gained.mean())
    assert found["perplexity"] == pytest.approx(math.exp(np.mean(ours)), rel=1e-5)
    assert found["reference_perplexity"] == pytest.approx(math.exp(np.mean(theirs)), rel=1e-5)
    assert found["ratio"] == pytest.approx(ratio, rel=1e-5)
    assert abs(found["ratio"] - 1) > 1e-3
    error = ratio * gained.std(ddof=1) / math.sqrt(WINDOWS)
    assert found["standard_error"] == pytest.approx(error, rel=1e-3)
    assert (found["tokens"], found["windows"]) == (WINDOWS * (WINDOW - 1), WINDOWS)
    with torch.inference_mode():
        p, q = (
            model(input_ids=tokens).logits[:, :-1].double().numpy()
            for model in (nano("chat"), coded)
        )
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    divergence = (np.exp(p) * (p - q)).sum(-1).mean()
    assert divergence > 1e-4
    assert found["kl"] == pytest.approx(divergence, rel=1e-4)
    assert found["top1"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean(), abs=1e-6)
    assert document["mean_ratio"] == document["worst_ratio"] == found["ratio"]
    assert document["mean_kl"] == found["kl"]


@every_device
@pytest.mark.parametrize("family", ["mixtral-window", "deepseek-v3", "gpt-oss", "jamba"])
def test_families_on_the_runtime(family: str, device: str, built: Built) -> None:
    """Logits of whole windows, paged and static, coded and private experts."""
    samples = [Sample(torch.tensor(prompt(20, seed)), 0) for seed in range(3)]
    with Artifact(built.artifact(family)) as artifact:
        served = Served(artifact, "float32", torch.device(device))
        assert served.is_paged == (family != "jamba")
        for variant in artifact.variants[:2]:
            model = load_model(artifact, variant, dtype=torch.float32).to(device)
            expected = plain_logits(model, samples)
            assert_near(served.logits(variant, samples), expected)


def assert_near(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())


@GPU
def test_gpu_is_as_the_cpu(quickstart: Path, text: Path, cli: Cli) -> None:
    arguments = ("--text", f"chat={text}", "--reference", "--sources", RECIPES)
    found = [
        evaluated(cli, quickstart, *arguments, "--device", device)["variants"]["chat"]
        for device in ("cpu", "cuda")
    ]
    for key in ("perplexity", "ratio", "kl"):
        assert found[0][key] == pytest.approx(found[1][key], rel=1e-3)


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_quantized_reference(method: str, tmp_path: Path) -> None:
    """It is dequantized to the bits that the artifact was made from."""
    if method == "fp8":
        folder = tiny.to_fp8(tiny.checkpoint(tmp_path / "m", "qwen3-moe"))
    else:
        folder = tiny.checkpoint(tmp_path / "m", "gpt-oss", intermediate_size=64)
        tiny.to_mxfp4(folder)
    source = resolve("m", str(folder), Path())
    if method == "fp8":
        folder = tiny.from_fp8(Path(shutil.copytree(folder, tmp_path / "plain")))
    samples = [Sample(torch.tensor(prompt(12, 0)), 0)]
    reference = load_reference(source, torch.bfloat16, torch.device("cpu"))
    assert_near(plain_logits(reference, samples), plain_logits(tiny.load(folder), samples))


def test_one_reference_at_a_time(
    quickstart: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[Any]] = []

    def load(*arguments: Any) -> Any:
        assert not any(model() for model in loaded)
        found = load_reference(*arguments)
        loaded.append(weakref.ref(found))
        return found

    monkeypatch.setattr(scoring, "load_reference", load)
    texts = {name: [text] for name in ("chat", "math", "python")}
    settings = scoring.Settings(texts, WINDOW, 1, reference=True, sources=RECIPES)
    with Artifact(quickstart) as artifact:
        scoring.evaluate(artifact, settings)
    assert len(loaded) == 3


# ---- without a reference


def test_without_a_reference(quickstart: Path, text: Path, cli: Cli, tmp_path: Path) -> None:
    whole = evaluated(cli, quickstart, "--text", f"math={text}")
    assert set(whole) == {
        *("variants", "mean_ratio", "mean_kl", "worst_ratio", "window", "dtype"),
    }
    assert (whole["window"], whole["dtype"]) == (WINDOW, "float32")
    assert whole["mean_ratio"] is whole["mean_kl"] is whole["worst_ratio"] is None
    found = whole["variants"]["math"]
    assert set(found) == FIGURES
    for key in ("reference_perplexity", "ratio", "kl", "top1"):
        assert found[key] is None
    with Artifact(quickstart) as artifact:
        model = load_model(artifact, "math", dtype=torch.float32)
    means = losses(model, ids(text, "math"))
    error = np.std(means, ddof=1) / math.sqrt(WINDOWS)
    assert found["standard_error"] == pytest.approx(error, rel=1e-4)
    # Files of a variant are one text, wherever it is cut.
    parts = [tmp_path / "1", tmp_path / "2"]
    parts[0].write_text(text.read_text()[:777])
    parts[1].write_text(text.read_text()[777:])
    twice = [item for part in parts for item in ("--text", f"math={part}")]
    assert evaluated(cli, quickstart, *twice) == whole


def test_for_people(quickstart: Path, text: Path, cli: Cli) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "120")
        outcome = cli("eval", quickstart, "--text", f"chat={text}", *SIZES)
    assert outcome.code == 0
    assert "windows of 64 tokens, without the sources" in outcome.out
    assert "│ chat    │" in outcome.out
    assert "evaluate: 100%" in outcome.err


# ---- by hand


def test_compare_by_hand() -> None:
    p = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.9, 0.0]])
    q = torch.tensor([[0.25, 0.5, 0.25], [0.2, 0.7, 0.1]])
    labels = torch.tensor([0, 1])
    for step in (1, 1 << 20):  # row by row, and all at once
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(evaluation, "COMPARED_AT_ONCE", step)
            found = compare(labels, q.log() + 3, p.log() - 5)
    assert found.tokens == 2
    assert found.nll == pytest.approx(-math.log(0.25) - math.log(0.7))
    assert found.reference_nll == pytest.approx(-math.log(0.5) - math.log(0.9))
    first = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    second = 0.1 * math.log(0.1 / 0.2) + 0.9 * math.log(0.9 / 0.7)
    assert found.kl == pytest.approx(first + second)
    assert found.agreeing == 1
    assert compare(labels, q.log()).kl is None


def test_figures_by_hand() -> None:
    sums = [Sums(2, 3.0, 2.0, 0.5, 1), Sums(4, 5.0, 5.5, 1.0, 4)]
    found = figures("v", sums)
    assert found["perplexity"] == pytest.approx(math.exp(8 / 6))
    assert found["ratio"] == pytest.approx(math.exp(0.5 / 6))
    assert (found["kl"], found["top1"], found["windows"]) == (1.5 / 6, 5 / 6, 2)
    off = [1.0 - 0.5 / 6 * 2, -0.5 - 0.5 / 6 * 4]
    error = math.sqrt(2 / 1 * sum(x * x for x in off)) / 6
    assert found["standard_error"] == pytest.approx(math.exp(0.5 / 6) * error)
    assert figures("v", sums[:1])["standard_error"] is None
    for bad in (math.nan, math.inf):
        with pytest.raises(MoeccError, match="not finite"):
            figures("v", [Sums(1, bad)])


def test_quality_by_hand() -> None:
    variants = {
        "a": {"ratio": 1.0, "kl": 0.25, "perplexity": 12.3456789},
        "b": {"ratio": 4.0, "kl": 1e-13, "perplexity": 1e6 / 3},
    }
    found = quality(variants, 8, "float32")
    assert (found["mean_ratio"], found["worst_ratio"], found["mean_kl"]) == (2.0, 4.0, 0.125)
    assert found["variants"]["a"]["perplexity"] == 12.3457
    assert found["variants"]["b"] == {"ratio": 4.0, "kl": 0.0, "perplexity": 333333.0}


# ---- what it refuses


def test_texts() -> None:
    found = parse_texts(["a=x", "b=y=z", "a=w"])
    assert found == {"a": [Path("x"), Path("w")], "b": [Path("y=z")]}
    for wrong in ("a", "a=", "=x"):
        with pytest.raises(ValueError, match="is not `VARIANT=FILE`"):
            parse_texts([wrong])


def test_wrong_input(quickstart: Path, text: Path, cli: Cli, tmp_path: Path) -> None:
    assert cli("eval", quickstart).code == 2
    assert cli("eval", quickstart, "--text", "chat").code == 2
    assert cli("eval", quickstart, "--text", f"chat={text}", "--window", "1").code == 2

    def failed(*arguments: object) -> Any:
        return cli("eval", quickstart, *arguments).failed

    failed("--text", f"nobody={text}")(1, "no variant `nobody`", "it has base, chat, math, python")
    failed("--text", f"chat={tmp_path / 'none'}")(1, "cannot read the text", "No such file")
    short = tmp_path / "short"
    short.write_text("a few words")
    failed("--text", f"chat={short}")(1, "a window has 256", "give more text")
    short.write_bytes(b"\xff\xfe")
    failed("--text", f"chat={short}")(1, "is not UTF-8")
    failed("--text", f"chat={text}", "--window", 2000)(1, "longer than the 1024")
    failed("--text", f"chat={text}", "--rouge")(1, "`--rouge` is for encoder-decoders")
    failed("--text", f"chat={text}", "--dtype", "float8")(1, "cannot compute in `float8`")
    failed("--text", f"chat={text}", "--device", "nonsense")(1, "`--device nonsense`")


def test_missing_and_changed_sources(
    quickstart: Path, text: Path, cli: Cli, tmp_path: Path
) -> None:
    (tmp_path / "recipes").mkdir()
    command = ("eval", quickstart, "--text", f"chat={text}", *SIZES, "--reference", "--sources")
    missing = cli(*command, tmp_path / "recipes")
    missing.failed(1, "of variant `chat` is not a folder", "`--sources` names the folder")
    place = tmp_path / "examples/models/nano-chat"
    shutil.copytree(MODELS / "nano-chat", place)
    assert cli(*command, tmp_path / "recipes").code == 0
    for file in ("model.safetensors", "config.json"):
        whole = (place / file).read_bytes()
        changed = whole[:-1] + (b"\0" if file != "config.json" else b" ")
        assert changed != whole
        (place / file).write_bytes(changed)
        cli(*command, tmp_path / "recipes").failed(1, "is not what the artifact was made from")
        (place / file).write_bytes(whole)


def test_a_hub_source_is_pinned(quickstart: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def refuse(name: str, reference: str, folder: Path) -> None:
        asked.append(reference)
        raise SourceError("no network")

    monkeypatch.setattr(scoring, "resolve", refuse)
    with Artifact(quickstart) as artifact:
        artifact.manifest["variants"][1] |= {"source": "org/chat@main", "commit": "c" * 40}
        with pytest.raises(SourceError, match="no network"):
            scoring._source(artifact, "chat", Path())
    assert asked == [f"hf://org/chat@{'c' * 40}"]


# ---- saving


def test_save(copied: Path, text: Path, cli: Cli) -> None:
    before, card = manifest_of(copied), (copied / "README.md").read_text()
    arguments = ("--text", f"chat={text}", "--reference", "--sources", RECIPES)
    document = evaluated(cli, copied, *arguments, "--save")
    once = tree(copied)
    manifest = manifest_of(copied)
    assert manifest["quality"] == document
    changed = {"quality", "files", "manifest_sha256"}
    assert {k: v for k, v in manifest.items() if k not in changed} == {
        k: v for k, v in before.items() if k not in changed
    }
    verified = cli("inspect", copied, "--verify", "--json")
    assert verified.code == 0
    assert json.loads(verified.out)["quality"] == document
    assert set(tree(copied)) == set(once)  # nothing is left behind
    figures = document["variants"]["chat"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "120")
        shown = cli("inspect", copied).out
    for part in (shown, (copied / "README.md").read_text()):
        assert f"{figures['ratio']:.4f} ± {figures['standard_error']:.4f}" in part
        assert f"{figures['kl']:.3g}" in part
    # The card is the one before, and a section more.
    lines = (copied / "README.md").read_text().splitlines()
    section = slice(lines.index("## Quality"), lines.index("## Plan"))
    assert len(lines[section]) == 8
    del lines[section]
    assert lines == card.splitlines()
    # The same once more gives the same bytes, other figures replace these.
    assert evaluated(cli, copied, *arguments, "--save") == document
    assert tree(copied) == once
    assert cli("eval", copied, "--text", f"math={text}", *SIZES, "--save").code == 0
    assert list(manifest_of(copied)["quality"]["variants"]) == ["math"]


_QUALITY = {
    "variants": {
        "chat": dict.fromkeys(sorted(FIGURES)) | {"perplexity": 2.5, "tokens": 8, "windows": 1}
    },
    **dict.fromkeys(("mean_ratio", "mean_kl", "worst_ratio")),
    "window": 9,
    "dtype": "float32",
}


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_save_cut_short_leaves_a_whole_artifact(
    number: int, copied: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(copied, tmp_path / "other"))
    save(other, _QUALITY)
    written: list[Path] = []
    write = evaluation.write_file

    def cut_short(path: Path, data: bytes) -> None:
        if len(written) == number:
            raise OSError(28, "No space left on device")
        written.append(path)
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "write_file", cut_short)
        with pytest.raises(MoeccError, match="No space left"):
            save(copied, _QUALITY)
    with Artifact(copied) as artifact:
        artifact.check_sizes()
        assert artifact.verify() == []
    save(copied, _QUALITY)
    assert tree(copied) == tree(other)


@pytest.mark.parametrize(
    "change",
    [
        {"variants": {"nobody": _QUALITY["variants"]["chat"]}},  # type: ignore[index]
        {"variants": {"chat": {"perplexity": "low"}}},
        {"window": "wide"},
        {"mean_kl": [0.5]},
    ],
    ids=str,
)
def test_damaged_quality(change: dict[str, Any], copied: Path) -> None:
    manifest = manifest_of(copied) | {"quality": _QUALITY | change}
    (copied / "manifest.json").write_bytes(seal(manifest))
    with pytest.raises(DamagedArtifactError, match="quality"):
        read_manifest(copied)


# ---- encoder-decoders


@pytest.fixture(scope="session")
def switch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two variants of a tiny Switch Transformers with a tokenizer of letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("switch")
    letters = ["<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz", "▁"]
    made = Tokenizer(models.WordLevel({x: i for i, x in enumerate(letters)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Split("", "isolated")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    sources = {}
    for seed, name in enumerate("ab"):
        sources[name] = tiny.checkpoint(folder / name, "switch", seed)
        tokenizer.save_pretrained(sources[name])
    recipe = write_recipe(folder / "r.yaml", sources, budget="1.5x")
    return compile_recipe(recipe, folder / "artifact")


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [("the quick brown fox", "a fox"), ("jumps", "it jumps over"), ("over dogs", "dog")]
    path.write_text("\n".join(json.dumps({"input": a, "target": b}) for a, b in rows) + "\n\n")
    return path


@pytest.fixture
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> int:
    """As many as are generated for ROUGE."""
    monkeypatch.setattr(scoring, "ROUGE_TOKENS", 6)
    return 6


@every_device
def test_switch(switch: Path, pairs: Path, cli: Cli, few_tokens: int, device: str) -> None:
    from transformers import AutoTokenizer

    options = ("--reference", "--rouge", "--json", "--device", device)
    outcome = cli("eval", switch, "--text", f"b={pairs}", *options)
    assert outcome.code == 0, outcome
    document = json.loads(outcome.out)
    found = document["variants"]["b"]
    tokenizer = AutoTokenizer.from_pretrained(switch / "variants/b")
    with Artifact(switch) as artifact:
        coded = load_model(artifact, "b", dtype=torch.float32)
    source = tiny.load(switch.parent / "b").float()
    rows = [json.loads(line) for line in pairs.read_text().split("\n") if line]
    sums, tokens, answers = [0.0, 0.0, 0.0], 0, []
    for row in rows:
        read = tokenizer(row["input"], return_tensors="pt")
        labels = torch.tensor([[*tokenizer(row["target"])["input_ids"], tokenizer.eos_token_id]])
        with torch.inference_mode():
            ours, theirs = (m(**read, labels=labels) for m in (coded, source))
            made = coded.generate(
                **read, max_new_tokens=few_tokens, do_sample=False, eos_token_id=1
            )
        p, q = (x.logits.double().log_softmax(-1) for x in (theirs, ours))
        divergence = float((p.exp() * (p - q)).sum())
        count = labels.numel()
        tokens += count
        for i, x in enumerate((float(ours.loss) * count, float(theirs.loss) * count, divergence)):
            sums[i] += x
        answers.append(made[0, 1:].tolist())
    assert (found["tokens"], found["windows"], document["window"]) == (tokens, 3, None)
    assert found["perplexity"] == pytest.approx(math.exp(sums[0] / tokens), rel=1e-5)
    assert found["reference_perplexity"] == pytest.approx(math.exp(sums[1] / tokens), rel=1e-5)
    assert found["kl"] == pytest.approx(sums[2] / tokens, rel=1e-3)
    assert found["rouge"]["difference"] == pytest.approx(
        found["rouge"]["rouge1"] - found["rouge"]["reference_rouge1"], abs=1e-5
    )
    low, high = found["rouge"]["interval"]
    assert low <= found["rouge"]["difference"] <= high
    # What is generated side by side, padded, is what each alone gives.
    with Artifact(switch) as artifact:
        samples = evaluation.pairs("b", tokenizer, [pairs], None)
        model = Served(artifact, "float32", torch.device("cpu")).model("b")
        together = greedy(model, samples, 1)
    assert together == [scoring._until(answer, 1) for answer in answers]


def test_switch_saves_and_refuses(
    switch: Path,
    pairs: Path,
    cli: Cli,
    few_tokens: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copy = Path(shutil.copytree(switch, tmp_path / "artifact"))
    assert cli("eval", copy, "--text", f"a={pairs}", "--rouge", "--save").code == 0
    assert cli("inspect", copy, "--verify").code == 0
    assert "ROUGE-1" in (copy / "README.md").read_text()
    for line in ("words", '{"input": "x"}', '{"input": "x", "target": 1}', "[1]"):
        wrong = tmp_path / "wrong.jsonl"
        wrong.write_text(pairs.read_text() + line)
        outcome = cli("eval", switch, "--text", f"a={wrong}")
        outcome.failed(1, "line 5 is not a pair", '{"input": "...", "target": "..."}')
    wrong.write_text("\n")
    cli("eval", switch, "--text", f"a={wrong}").failed(1, "has no pairs")
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    missing = cli("eval", switch, "--text", f"a={pairs}", "--rouge")
    missing.failed(1, "needs the package `rouge-score`", 'pip install "moecc[eval]"')


def test_rouge_by_hand() -> None:
    scores = evaluation.rouge1(["the cat sat", ""], ["the cat ran off", "a dog"])
    assert scores == [pytest.approx(2 * (2 / 3 * 2 / 4) / (2 / 3 + 2 / 4)), 0.0]
    found = evaluation.rouge_figures([0.5, 0.25, 0.75], [0.25, 0.25, 0.25])
    assert (found["rouge1"], found["reference_rouge1"], found["difference"]) == (0.5, 0.25, 0.25)
    half = 4.302653 * 0.25 / math.sqrt(3)  # Student's t at 97.5% with 2 degrees of freedom
    assert found["interval"] == pytest.approx([0.25 - half, 0.25 + half], abs=1e-6)
    assert evaluation.rouge_figures([0.5], None)["difference"] is None


def test_the_guide_names_every_figure() -> None:
    guide = (ROOT / "docs/evaluation.md").read_text()
    for name in FIGURES | {"mean_ratio", "mean_kl", "worst_ratio", "rouge1", "interval"}:
        assert f"`{name}`" in guide, name
