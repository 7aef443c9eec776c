"""How good variants are: perplexity, divergence from the models they came from, and ROUGE.

Texts become samples, a model's logits over a sample become sums, sums become figures. Where logits
come from is `runtime/scoring.py`'s; docs/evaluation.md says what the figures mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moecc.card import model_card
from moecc.errors import ArtifactError, MoeccError, RecipeError
from moecc.files import sync_folder, to_json, write_file
from moecc.manifest import CARD, MANIFEST, read_manifest, seal
from moecc.plan import significant
from moecc.recipe import parse_recipe
from moecc.staging import describe
from moecc.texts import PAIR_HINT, encode_pair, read_pairs

COMPARED_AT_ONCE = 1 << 22  # logits in float64
NOISE_DIGITS = 9  # decimals below are float32's rounding, which depends on the machine
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """A window of text, or what an encoder reads and its decoder is to write.

    Attributes:
        tokens: int64 [n]; of a pair the target, with the token that ends it.
        source: int64 [m], what the encoder reads; None for a window.
        target: the target as text; empty for a window.
        nbytes: its share of the text's bytes, for progress.
    """

    tokens: Tensor
    nbytes: int
    source: Tensor | None = None
    target: str = ""

    @property
    def labels(self) -> Tensor:
        """The tokens that are predicted; a window's first has nothing before it."""
        return self.tokens if self.source is not None else self.tokens[1:]


@dataclass(frozen=True, slots=True)
class Sums:
    """Over the predicted tokens of a sample, in nats; without a reference its parts are None."""

    tokens: int
    nll: float
    reference_nll: float | None = None
    kl: float | None = None
    agreeing: int | None = None


def parse_texts(texts: Sequence[str]) -> dict[str, list[Path]]:
    """Variant -> files of `VARIANT=FILE`, in their order; ValueError for anything else."""
    found: dict[str, list[Path]] = {}
    for text in texts:
        variant, equals, file = text.partition("=")
        if not (variant and equals and file):
            raise ValueError(f"`{text}` is not `VARIANT=FILE`")
        found.setdefault(variant, []).append(Path(file))
    return found


def windows(
    variant: str, tokenizer: Any, files: Sequence[Path], window: int, limit: int | None
) -> list[Sample]:
    """Non-overlapping windows of a variant's files, read as one text; what is left over is dropped.

    Raises MoeccError for a file that cannot be read and a text shorter than a window.
    """
    text = "".join(_read(file) for file in files)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    count = len(ids) // window
    if not count:
        raise MoeccError(
            f"the text of variant `{variant}` has {len(ids)} tokens, a window has {window}",
            "give more text, or a smaller `--window`",
        )
    tokens = torch.tensor(ids[: count * window]).view(count, window)
    nbytes = len(text.encode()) * window // len(ids)
    return [Sample(row, nbytes) for row in tokens[:limit]]


def pairs(variant: str, tokenizer: Any, files: Sequence[Path], limit: int | None) -> list[Sample]:
    """The pairs of a variant's JSONL files, each line an object with `input` and `target`.

    Raises MoeccError for a file that cannot be read or holds anything else.
    """
    lines = [line for file in files for line in _pair_lines(file)][:limit]
    if not lines:
        raise MoeccError(f"the text of variant `{variant}` has no pairs", PAIR_HINT)
    samples = []
    for source, target in lines:
        read, tokens = encode_pair(tokenizer, source, target)
        nbytes = len((source + target).encode())
        samples.append(Sample(torch.tensor(tokens), nbytes, torch.tensor(read), target))
    return samples


def _pair_lines(file: Path) -> list[tuple[str, str]]:
    try:
        return list(read_pairs(_read(file)))
    except ValueError as error:
        raise MoeccError(f"{error} in `{file}`", PAIR_HINT) from None


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise MoeccError(
            f"cannot read the text `{file}`: {error.strerror}", "`--text` is `VARIANT=FILE`"
        ) from None
    except UnicodeDecodeError:
        raise MoeccError(f"the text `{file}` is not UTF-8", "convert it to UTF-8") from None


def compare(labels: Tensor, logits: Tensor, reference: Tensor | None = None) -> Sums:
    """Sums over the tokens `labels`, int64 [n], given logits of both models, [n, vocab] each.

    In float64: the divergence of near models is a difference of nearly equal numbers.
    """
    step = max(1, COMPARED_AT_ONCE // logits.shape[-1])
    labels = labels.to(logits.device)
    nll = reference_nll = kl = 0.0
    agreeing = 0
    for start in range(0, len(labels), step):
        part = slice(start, start + step)
        found = logits[part].double().log_softmax(dim=-1)
        nll += float(F.nll_loss(found, labels[part], reduction="sum"))
        if reference is not None:
            wanted = reference[part].double().log_softmax(dim=-1)
            reference_nll += float(F.nll_loss(wanted, labels[part], reduction="sum"))
            # A token without any probability would give -inf - -inf.
            apart = (wanted - found).masked_fill(wanted.isneginf(), 0.0)
            kl += float((wanted.exp() * apart).sum())
            agreeing += int((logits[part].argmax(dim=-1) == reference[part].argmax(dim=-1)).sum())
    if reference is None:
        return Sums(len(labels), nll)
    return Sums(len(labels), nll, reference_nll, kl, agreeing)


def figures(variant: str, sums: Sequence[Sums]) -> dict[str, Any]:
    """The figures of a variant from its samples' sums, not rounded; MoeccError if not finite."""
    tokens = sum(s.tokens for s in sums)
    loss = sum(s.nll for s in sums) / tokens
    if not loss < math.log(torch.finfo(torch.float64).max):
        raise MoeccError(
            f"the logits of variant `{variant}` are not finite", "try `--dtype float32`"
        )
    found: dict[str, Any] = {
        "perplexity": math.exp(loss),
        "reference_perplexity": None,
        "ratio": None,
        "kl": None,
        "top1": None,
        "standard_error": _standard_error([s.nll for s in sums], [s.tokens for s in sums]),
        "tokens": tokens,
        "windows": len(sums),
    }
    if sums[0].reference_nll is None:
        return found
    gained = [s.nll - (s.reference_nll or 0.0) for s in sums]
    error = _standard_error(gained, [s.tokens for s in sums])
    ratio = math.exp(sum(gained) / tokens)
    return found | {
        "reference_perplexity": math.exp(sum(s.reference_nll or 0.0 for s in sums) / tokens),
        "ratio": ratio,
        "kl": sum(s.kl or 0.0 for s in sums) / tokens,
        "top1": sum(s.agreeing or 0 for s in sums) / tokens,
        # The logarithm's error, carried over to the ratio to first order.
        "standard_error": None if error is None else ratio * error,
    }


def _standard_error(values: Sequence[float], tokens: Sequence[int]) -> float | None:
    """Of sum(values) / sum(tokens), with samples as the independent units; None for one sample.

    Linearized; with windows of one size it is the deviation of their means over sqrt(n).
    """
    count, total = len(values), sum(tokens)
    if count < 2:
        return None
    mean = sum(values) / total
    squares = sum((v - mean * n) ** 2 for v, n in zip(values, tokens, strict=True))
    return math.sqrt(squares * count / (count - 1)) / total


def rouge1(answers: Sequence[str], targets: Sequence[str]) -> list[float]:
    """ROUGE-1 F of each answer against its target, 0 to 1; MoeccError without `rouge-score`."""
    scorer = _rouge_scorer()
    return [
        float(scorer.score(target, answer)["rouge1"].fmeasure)
        for answer, target in zip(answers, targets, strict=True)
    ]


def check_rouge() -> None:
    """Raises MoeccError if the package that `rouge1` needs is not installed."""
    _rouge_scorer()


def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise MoeccError(
            "`--rouge` needs the package `rouge-score`", 'run `pip install "moecc[eval]"`'
        ) from None
    return RougeScorer(["rouge1"])


def rouge_figures(scores: Sequence[float], reference: Sequence[float] | None) -> dict[str, Any]:
    """Mean ROUGE-1 F, and how it differs from the reference's, pair by pair, with its interval."""
    found: dict[str, Any] = {
        "rouge1": sum(scores) / len(scores),
        "reference_rouge1": None,
        "difference": None,
        "interval": None,
    }
    if reference is None:
        return found
    gained = [a - b for a, b in zip(scores, reference, strict=True)]
    difference = sum(gained) / len(gained)
    error = _standard_error(gained, [1] * len(gained))
    interval = None
    if error is not None:
        from scipy.stats import t

        half = float(t.ppf((1 + CONFIDENCE) / 2, len(gained) - 1)) * error
        interval = [difference - half, difference + half]
    return found | {
        "reference_rouge1": sum(reference) / len(reference),
        "difference": difference,
        "interval": interval,
    }


def quality(
    variants: Mapping[str, Mapping[str, Any]], window: int | None, dtype: str
) -> dict[str, Any]:
    """What `--json` prints and `--save` keeps: rounded, so that the same run gives the same bytes.

    `variants` has the `figures` of each, not rounded; `window` is None for pairs.
    """
    ratios = [v["ratio"] for v in variants.values() if v["ratio"] is not None]
    divergences = [v["kl"] for v in variants.values() if v["kl"] is not None]
    found = {
        "variants": dict(variants),
        "mean_ratio": _geometric_mean(ratios) if ratios else None,
        "mean_kl": sum(divergences) / len(divergences) if divergences else None,
        "worst_ratio": max(ratios, default=None),
        "window": window,
        "dtype": dtype,
    }
    rounded: dict[str, Any] = _rounded(found)
    return rounded


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    # + 0.0: a negative zero is zero
    return significant(round(value, NOISE_DIGITS)) + 0.0 if isinstance(value, float) else value


def save(path: Path, found: Mapping[str, Any]) -> None:
    """Puts figures into the manifest and the card of the artifact in a folder, for all to read.

    Every step leaves a whole artifact: the manifest first lets go of the card, so that the new
    card fits it as well as the old one. Raises ArtifactError.
    """
    manifest = {**read_manifest(path), "quality": dict(found)}
    files = {name: known for name, known in manifest["files"].items() if name != CARD}
    card = model_card({**manifest, "recipe": _in_order(manifest)})
    try:
        _write(path / MANIFEST, seal({**manifest, "files": files}))
        _write(path / CARD, card.encode())
        files[CARD] = describe(path / CARD)
        _write(path / MANIFEST, seal({**manifest, "files": files}))
    except OSError as error:
        raise ArtifactError(
            f"cannot write `{path}`: {error.strerror}", "the artifact can be used as it is"
        ) from None


def _write(path: Path, data: bytes) -> None:
    write_file(path, data)
    sync_folder(path.parent)


def _in_order(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest's recipe as a recipe is written; the manifest has its keys sorted."""
    recipe: dict[str, Any] = manifest["recipe"]
    try:
        order = parse_recipe(to_json(recipe).decode(), Path()).to_dict()  # JSON is YAML
        return {
            **order,
            "variants": {v["name"]: recipe["variants"][v["name"]] for v in manifest["variants"]},
        }
    except (RecipeError, KeyError, TypeError):  # of another moecc: sorted, then
        return recipe
