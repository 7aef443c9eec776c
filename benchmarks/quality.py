"""Quality against size: moecc beside the paper's choice, merging and quantization.

Measures perplexity and KL divergence of every variant against its own original, on text that
nothing was fitted to, for artifacts of several budgets and for what others do in as many bytes:

    python benchmarks/quality.py --models MODELS --text TEXT --family small

MODELS holds a checkpoint `FAMILY-VARIANT` per variant, TEXT `VARIANT.valid.txt` to calibrate with
and `VARIANT.test.txt` to measure on; for encoder-decoders `switch.VARIANT.jsonl`, whose pairs
calibrate and are measured in turns. Families and variants that are known need no `--variants`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import baselines
import torch
import yaml
from baselines import Baseline
from family import (
    SAMPLES,
    WINDOW,
    Family,
    Figures,
    Models,
    Statistics,
    decoder_texts,
    greedy,
    pair_batch,
    pair_lines,
    pair_samples,
    pair_texts,
    quiet,
    tokenizer_of,
)
from plots import Style, plot
from rich.console import Console
from rich.table import Table
from tables import markdown

from moecc.artifact import Artifact
from moecc.consolidate import open_recipe, run
from moecc.errors import MoeccError
from moecc.export import load_model
from moecc.recipe import Recipe, parse_recipe

RESULTS = Path(__file__).parent / "results"
BUDGETS = "0.43x,0.5x,0.58x,0.7x,0.83x,1.08x,1.3x,1.75x,2.5x"
OURS, UNCALIBRATED, FIXED, BASELINE = "ours", "ours, uncalibrated", "ours, fixed", "baseline"
FORMS = ("4+1", "4+2", "4+3")  # bits of center and residual

# family -> variant -> folder under `--models`; the first variant is the base
FAMILIES: dict[str, dict[str, str]] = {
    "small": {name: f"small-{name}" for name in ("base", "python", "chat", "math")},
    "near": {"base": "small-base", **{n: f"near-{n}" for n in ("python", "chat", "math")}},
    "qwen3": {name: f"qwen3-{name}" for name in ("base", "python", "chat")},
    "switch": {name: f"switch-{name}" for name in ("base", "dialogsum", "gsm8k", "dolly")},
    "pair": {"base": "small-base", "python": "small-python"},
}
# family -> (budget, figure, the most it may be)
TARGETS: dict[str, tuple[tuple[str, str, float], ...]] = {
    "small": (
        ("0.58x", "mean", 1.016),
        ("0.83x", "mean", 1.0035),
        ("0.83x", "kl", 0.008),
        ("0.83x", "worst", 1.008),
        ("1.08x", "mean", 1.0015),
    ),
    "near": (
        ("0.58x", "mean", 1.012),
        ("0.70x", "mean", 1.006),
        ("0.83x", "mean", 1.003),
        ("0.83x", "kl", 0.002),
    ),
    "qwen3": (("0.51x", "mean", 1.010), ("0.70x", "mean", 1.0025)),
    "switch": (("0.83x", "loss", 1.003),),
    "pair": (("0.43x", "mean", 1.012), ("0.56x", "mean", 1.004)),
}


@dataclass(frozen=True)
class Row:
    """What a way to keep the experts costs and gives; ratios are to the originals.

    Attributes:
        kind: OURS, UNCALIBRATED, FIXED or BASELINE.
        ratio: bytes of all experts over those of one variant's in 16 bits.
        mean: geometric mean over the variants of the perplexity's ratio; `worst` the largest.
        loss: geometric mean of the ratio of the losses.
        kl: mean over the variants of KL(original || variant) a token, in nats.
        seconds: to make it, not to measure it.
        rouge1: of the summaries, where there are; else None.
    """

    name: str
    kind: str
    method: str
    budget: str
    ratio: float
    mean: float
    worst: float
    loss: float
    kl: float
    seconds: float
    rouge1: float | None
    variants: dict[str, dict[str, Any]]


def make_row(
    name: str,
    kind: str,
    method: str,
    ratio: float,
    seconds: float,
    figures: dict[str, Figures],
    *,
    budget: str = "",
    rouge1: float | None = None,
) -> Row:
    """A row of the figures of its variants."""
    found = {variant: f.to_json() for variant, f in figures.items()}
    ratios = [f["ratio"] for f in found.values()]
    return Row(
        name=name,
        kind=kind,
        method=method,
        budget=budget,
        ratio=ratio,
        mean=geometric_mean(ratios),
        worst=max(ratios),
        loss=geometric_mean([f["loss_ratio"] for f in found.values()]),
        kl=sum(f["kl"] for f in found.values()) / len(found),
        seconds=seconds,
        rouge1=rouge1,
        variants=found,
    )


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


@dataclass(frozen=True)
class Form:
    """How a recipe merges; `center` and `residual` as a recipe writes them."""

    center: str
    residual: str
    group: str | int
    calibrated: bool = False
    match: str | None = None

    @classmethod
    def parse(cls, text: str) -> Form:
        """Of `auto`, or bits of center and residual such as `4+2`; SystemExit otherwise."""
        if text == "auto":
            return AUTO
        center, plus, residual = text.partition("+")
        if not (plus and center.isdigit() and residual.isdigit()):
            raise SystemExit(f"`{text}` is not a form such as `auto` or `4+2`")
        return cls(f"{center}bit", f"{residual}bit", 64)


AUTO = Form("auto", "auto", "auto", calibrated=True)
AUTO_UNCALIBRATED = Form("auto", "auto", "auto")


def recipe_of(family: Family, form: Form, budget: str | None, folder: Path) -> Recipe:
    """The recipe of an artifact; without a budget, the smallest that two decimals can say.

    Raises RecipeError for what this moecc cannot do.
    """
    merge = {"center": form.center, "residual": form.residual, "group": form.group}
    document: dict[str, Any] = {
        "version": 1,
        "base": family.base,
        "variants": {n: {"source": str(f.resolve())} for n, f in family.members.items()},
        "merge": merge,
        "budget": budget or f"{len(family.variants)}.0x",
    }
    if form.match:
        document["match"] = {"scope": form.match}
    if form.calibrated:
        texts = {n: [str(f.resolve()) for f in t.calibration] for n, t in family.texts.items()}
        document["calibration"] = {"text": texts, "samples": SAMPLES, "length": WINDOW}
    recipe = parse_recipe(yaml.safe_dump(document, sort_keys=False), folder)
    if budget is not None:
        return recipe
    opened = open_recipe(recipe)
    opened.close()
    smallest = float(opened.smallest_budget.removesuffix("x"))
    document["budget"] = f"{math.ceil(smallest * 100) / 100:.2f}x"
    return parse_recipe(yaml.safe_dump(document, sort_keys=False), folder)


Use = Callable[[dict[str, Any]], None]


def consolidated(
    family: Family,
    form: Form,
    budget: str | None,
    kind: str,
    *,
    method: str = "auto",
    use: Use | None = None,
) -> Row:
    """The row of an artifact: made from a recipe, loaded and measured, then thrown away.

    `use` gets every variant's model. Raises MoeccError.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        recipe = recipe_of(family, form, budget, folder)
        start = time.monotonic()
        run(recipe, folder / "artifact")
        seconds = time.monotonic() - start
        with Artifact(folder / "artifact") as artifact:
            ratio = float(artifact.manifest["experts"]["ratio"])
            models = {
                v: quiet(load_model(artifact, v, dtype=torch.float32)).to(family.device)
                for v in family.variants
            }
    figures = {v: family.figures(v, model) for v, model in models.items()}
    rouge1 = rouge(family, models["dialogsum"]) if summarizes(family) else None
    if use is not None:
        use(models)
    shown = form.center if form.center == "auto" else f"{form.center} + {form.residual}"
    name = f"{kind} {shown}" if kind == FIXED else f"{kind} {recipe.budget.text}"
    return make_row(
        name, kind, method, ratio, seconds, figures, budget=recipe.budget.text, rouge1=rouge1
    )


def summarizes(family: Family) -> bool:
    """Whether there are summaries to score, and the package to score them."""
    return "dialogsum" in family.variants and bool(importlib.util.find_spec("rouge_score"))


def rouge(family: Family, model: Any, tokens: int = 64) -> float:
    """Mean ROUGE-1 F of a model's greedy summaries of the dialogues held back."""
    from rouge_score.rouge_scorer import RougeScorer

    folder, files = family.members["dialogsum"], family.texts["dialogsum"].test
    tokenizer, scorer = tokenizer_of(folder), RougeScorer(["rouge1"])
    pairs = pair_samples(folder, files, model.config)[: family.windows]
    targets = pair_lines(files)[: family.windows]
    scores = []
    for start in range(0, len(pairs), 64):
        batch = pair_batch(pairs[start : start + 64], model.config).to(family.device).inputs
        made = greedy(model, batch["input_ids"], tokens, attention_mask=batch["attention_mask"])
        for answer, line in zip(made, targets[start : start + 64], strict=True):
            text = tokenizer.decode(answer, skip_special_tokens=True)
            scores.append(scorer.score(line["target"], text)["rouge1"].fmeasure)
    return sum(scores) / len(scores)


class Baselines:
    """The rows of the methods of others, made one after the other."""

    def __init__(self, family: Family, args: argparse.Namespace) -> None:
        self.family, self.args = family, args
        self.experts, self.layers = family.experts, family.layers
        self.base = family.variants.index(family.base)
        self.left_out: dict[str, str] = {}
        self._statistics: Statistics | None = None

    @property
    def statistics(self) -> Statistics:
        if self._statistics is None:
            self._statistics = self.family.statistics()
        return self._statistics

    @property
    def ratios(self) -> list[float]:
        """At which experts can be shared: from one variant's to less than all variants'."""
        given = [float(text.removesuffix("x")) for text in self.args.budgets.split(",")]
        return [1.0, *(r for r in given if 1.2 < r < len(self.family.variants))]

    def rows(self, method: str) -> Iterator[Row]:
        """Those of one method, by its name in METHODS."""
        for name, make in getattr(self, method.replace("-", "_"))():
            start = time.monotonic()
            made: Baseline = make()
            seconds = time.monotonic() - start
            figures = self.family.evaluate(made.experts)
            ratio = made.nbytes / self.family.one
            yield make_row(name, BASELINE, method, ratio, seconds, figures)

    def rtn(self) -> Iterable[tuple[str, Callable[[], Baseline]]]:
        for bits in (2, 3, 4):
            yield (
                f"alone, {bits} bits, nearest",
                lambda bits=bits: baselines.round_to_nearest(self.experts, bits),
            )

    def gptq(self) -> Iterable[tuple[str, Callable[[], Baseline]]]:
        for bits in (2, 3, 4):
            yield (
                f"alone, {bits} bits, GPTQ",
                lambda bits=bits: baselines.gptq(self.experts, self.statistics.hessian, bits),
            )

    def llm_compressor(self) -> Iterable[tuple[str, Callable[[], Baseline]]]:
        python = self.args.llm_compressor_python
        if not (python and baselines.available(python, "llmcompressor")):
            self.left_out["llm-compressor"] = "no `--llm-compressor-python` that has it"
            return
        if self.family.encodes or any(v.shape[-1] % 64 for v in self.experts.values()):
            self.left_out["llm-compressor"] = "not for this architecture"
            return
        samples = [
            torch.cat([batch.inputs["input_ids"] for batch in self.family.valid[v]])
            for v in self.family.variants
        ]
        members = [self.family.members[v].resolve() for v in self.family.variants]
        for bits in (2, 3, 4):
            yield (
                f"alone, {bits} bits, llm-compressor",
                lambda bits=bits: baselines.llm_compressor(
                    self.experts, members, samples, bits, python
                ),
            )

    def alternate(self) -> Iterable[tuple[str, Callable[[], Baseline]]]:
        for ratio in self.ratios:
            yield (
                f"paper, {ratio:g}x",
                lambda ratio=ratio: baselines.alternate(self.experts, self.layers, ratio),
            )

    def mean(self) -> Iterable[tuple[str, Callable[[], Baseline]]]:
        for ratio in self.ratios:
            yield (
                f"mean, {ratio:g}x",
                lambda ratio=ratio: baselines.mean(self.experts, self.layers, ratio),
            )

    def task_arithmetic(self) -> Iterable[tuple[str, Callable[[], Baseline]]]:
        def scaled(scale: float) -> Baseline:
            return baselines.task_arithmetic(self.experts, self.base, scale)

        yield "task arithmetic, 0.5", lambda: scaled(0.5)
        yield "task arithmetic, best", lambda: self._best(scaled(s / 10) for s in range(3, 8))

    def ties(self) -> Iterable[tuple[str, Callable[[], Baseline]]]:
        python = self.args.mergekit_python or sys.executable
        if not baselines.available(python, "mergekit"):
            self.left_out["ties"] = "no mergekit; give `--mergekit-python`"
            return

        def candidates() -> Iterator[Baseline]:
            for density in (0.2, 0.5):
                deltas = baselines.ties_deltas(self.experts, self.base, density, python)
                for scale in (0.7, 1.0, 1.5):
                    yield baselines.ties(self.experts, self.base, deltas, scale)

        yield "TIES (mergekit), best", lambda: self._best(candidates())

    def emr(self) -> Iterable[tuple[str, Callable[[], Baseline]]]:
        yield "EMR-Merging", lambda: baselines.emr(self.experts, self.base)

    def bitdelta(self) -> Iterable[tuple[str, Callable[[], Baseline]]]:
        yield "BitDelta", lambda: baselines.bitdelta(self.experts, self.base)
        yield "BitDelta, base 4 bits", lambda: baselines.bitdelta(self.experts, self.base, 4)

    def hc_smoe(self) -> Iterable[tuple[str, Callable[[], Baseline]]]:
        for ratio in self.ratios:
            yield (
                f"HC-SMoE, {ratio:g}x",
                lambda ratio=ratio: baselines.hc_smoe(
                    self.experts, self.layers, self.statistics, ratio
                ),
            )

    def _best(self, candidates: Iterable[Baseline]) -> Baseline:
        """The one with the least divergence on a part of the calibration text."""

        def divergence(made: Baseline) -> float:
            return sum(f.kl for f in self.family.evaluate(made.experts, select=True).values())

        return min(candidates, key=divergence)


OTHERS = (
    "rtn",
    "gptq",
    "llm-compressor",
    "alternate",
    "mean",
    "task-arithmetic",
    "ties",
    "emr",
    "hc-smoe",
    "bitdelta",
)
METHODS = ("auto", "auto-uncalibrated", "fixed", *OTHERS)


def our_rows(family: Family, method: str, budgets: Sequence[str]) -> Iterator[Row | str]:
    """The artifacts of a method; instead of one that cannot be made, the reason."""
    kind, plans = {
        "auto": (OURS, [(AUTO, budget) for budget in budgets]),
        "auto-uncalibrated": (UNCALIBRATED, [(AUTO_UNCALIBRATED, b) for b in budgets]),
        "fixed": (FIXED, [(Form.parse(form), None) for form in FORMS]),
    }[method]
    for form, budget in plans:
        try:
            yield consolidated(family, form, budget, kind, method=method)
        except MoeccError as error:
            yield f"{budget or form.residual}: {' '.join(str(error).split())[:200]}"


def untouched(family: Family) -> Row:
    """The originals, which everything is compared with."""
    figures = {v: family.figures(v, family.models[v]) for v in family.variants}
    rouge1 = rouge(family, family.models["dialogsum"]) if summarizes(family) else None
    count = float(len(family.variants))
    return make_row("untouched", "untouched", "", count, 0.0, figures, rouge1=rouge1)


def bars(rows: Sequence[Row], family: str) -> list[dict[str, Any]]:
    """Everything that ours has to hold, and whether it does."""
    ours = sorted((row for row in rows if row.kind == OURS), key=lambda row: row.ratio)
    found: list[dict[str, Any]] = []
    whole = next(row.ratio for row in rows if row.name == "untouched")  # which loses nothing
    for row in rows if ours else ():
        if row.kind == BASELINE and row.ratio < whole:
            smaller = [o for o in ours if o.ratio <= row.ratio + 1e-9]
            if smaller:  # budgets say how small ours gets; below that nothing is claimed
                measured, what = smaller[-1].kl, f"`{row.name}` at {row.ratio:.3f}x"
                found.append(_bar(f"KL below {what}", measured, row.kl, measured < row.kl))
    for small, large in pairwise(ours):
        what = f"KL at {large.ratio:.3f}x below that at {small.ratio:.3f}x"
        found.append(_bar(what, large.kl, small.kl, large.kl < small.kl))
    for budget, figure, most in TARGETS.get(family, ()) if ours else ():
        limit = float(budget.removesuffix("x"))
        fitting = [o for o in ours if o.ratio <= limit + 1e-9]
        measured = getattr(fitting[-1], figure) if fitting else math.inf
        found.append(_bar(f"{figure} at {budget}", measured, most, measured <= most))
    return found


def _bar(what: str, measured: float, limit: float, ok: bool) -> dict[str, Any]:
    value = measured if math.isfinite(measured) else None
    return {"bar": what, "measured": value, "limit": limit, "ok": ok}


def table(rows: Sequence[Row], title: str) -> Table:
    """The rows for people, in the order of their sizes."""
    shown = Table(title=title, caption="perplexity and KL against each variant's own original")
    shown.add_column("experts of all variants")
    names = list(rows[0].variants)
    scored = any(row.rouge1 is not None for row in rows)
    for column in ("memory", "mean", "worst", "KL x 1000", *names, "seconds"):
        shown.add_column(column, justify="right")
    if scored:
        shown.add_column("ROUGE-1", justify="right")
    for row in sorted(rows, key=lambda row: (row.ratio, row.kl)):
        cells = [row.name, f"{row.ratio:.3f}x", f"{row.mean:.4f}", f"{row.worst:.4f}"]
        cells += [f"{1000 * row.kl:.2f}"]
        cells += [f"{row.variants[name]['ratio']:.4f}" for name in names]
        cells += [f"{row.seconds:.1f}"]
        if scored:
            cells += ["" if row.rouge1 is None else f"{row.rouge1:.4f}"]
        shown.add_row(*cells)
    return shown


def bars_table(held: Sequence[dict[str, Any]]) -> Table:
    """What ours has to hold, for people."""
    shown = Table(title="bars")
    for column in ("bar", "measured", "limit", ""):
        shown.add_column(column, justify="left" if column in ("bar", "") else "right")
    for bar in held:
        measured = "none" if bar["measured"] is None else f"{bar['measured']:.5f}"
        shown.add_row(bar["bar"], measured, f"{bar['limit']:.5f}", "ok" if bar["ok"] else "MISSED")
    return shown


_STYLE = {OURS: Style("#1d4ed8", "o", 40, line=2), UNCALIBRATED: Style("#0891b2", "o", 22, line=1)}
_STYLE |= {FIXED: Style("#7c3aed", "D", 20), BASELINE: Style("#c2410c", "s", 26)}


def plot_rows(rows: Sequence[Row], path: Path, title: str) -> None:
    """KL over size, both on log scales: ours as lines, the others as labeled points."""
    plot(
        {
            # Below a millionth is noise, and a log scale has no zero.
            style: (kind, [(r.name, r.ratio, max(r.kl, 1e-6)) for r in rows if r.kind == kind])
            for kind, style in _STYLE.items()
        },
        path,
        title,
        x="expert memory of all variants, relative to one variant in 16 bits",
        y="KL(original || variant), nats a token, mean of variants",
    )


def family_of(args: argparse.Namespace, work: Path) -> Family:
    """The family that the command line names; SystemExit if a folder or file is missing."""
    models, given = members(args), args.base
    base = given or next(iter(models))
    missing = [str(folder) for folder in models.values() if not folder.is_dir()]
    if missing or base not in models:
        raise SystemExit(f"there is no {', '.join(missing) or f'variant `{base}`'}")
    encodes = json.loads((models[base] / "config.json").read_text()).get("is_encoder_decoder")
    names = list(models)
    texts = pair_texts(args.text, names, work) if encodes else decoder_texts(args.text, names)
    return Family(models, texts, base, windows=args.windows, device=args.device)


def members(args: argparse.Namespace) -> Models:
    """Variant -> folder: known ones, or `FAMILY-VARIANT`, unless `--member` says another."""
    known = FAMILIES.get(args.family, {})
    names = args.variants.split(",") if args.variants else list(known)
    given = dict(text.split("=", 1) for text in args.member)
    if not names and not given:
        raise SystemExit(f"`--variants` of family `{args.family}`?")
    folders = {n: args.models / known.get(n, f"{args.family}-{n}") for n in names}
    return folders | {name: Path(folder) for name, folder in given.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those that say what is measured, and on what."""
    parser.add_argument("--models", type=Path, required=True, help="folder of checkpoints")
    parser.add_argument("--text", type=Path, required=True, help="folder of texts")
    parser.add_argument("--family", required=True, help=", ".join(FAMILIES) + ", or another")
    parser.add_argument("--variants", help="comma-separated; default: those known")
    parser.add_argument("--base", help="what the others were tuned from; default: the first")
    parser.add_argument(
        "--member", action="append", default=[], metavar="NAME=FOLDER", help="a variant elsewhere"
    )
    parser.add_argument("--windows", type=int, help="at most so many a variant; default: all")
    parser.add_argument("--device", default="cpu", help="where everything is computed")
    parser.add_argument("--out", type=Path, help="JSON; the rest goes beside it")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_arguments(parser)
    parser.add_argument("--budgets", default=BUDGETS, help=f"default: {BUDGETS}")
    parser.add_argument("--methods", default=",".join(METHODS), help="default: all")
    parser.add_argument("--mergekit-python", help="interpreter that has mergekit, for TIES")
    parser.add_argument("--llm-compressor-python", help="interpreter that has llmcompressor")
    parser.add_argument(
        "--keep", action="store_true", help="keep the rows in `--out` of methods not run now"
    )
    args = parser.parse_args()
    unknown = set(args.methods.split(",")) - set(METHODS)
    if unknown:
        parser.error(f"unknown methods: {', '.join(sorted(unknown))}; there are {METHODS}")
    args.out = args.out or RESULTS / f"quality-{args.family}.json"
    return args


def kept_rows(path: Path, setting: dict[str, Any], methods: Sequence[str]) -> list[Row]:
    """The rows of other methods that an earlier run measured on the very same text."""
    if not path.exists():
        return []
    document = json.loads(path.read_text(encoding="utf-8"))
    changed = [key for key, value in setting.items() if document.get(key) != value]
    if changed:
        raise SystemExit(f"`{path}` is of another {', '.join(changed)}; run without `--keep`")
    return [Row(**row) for row in document["rows"] if row["method"] not in ("", *methods)]


def machine(device: str) -> str:
    """What the seconds were measured on."""
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(device)}, {os.cpu_count()} CPU cores"
    return f"{platform.machine()}, {os.cpu_count()} CPU cores"


def save(
    path: Path, setting: dict[str, Any], rows: Sequence[Row], left_out: dict[str, str]
) -> None:
    """Writes what has been measured so far."""
    found = {"rows": [asdict(row) for row in rows], "bars": bars(rows, setting["family"])}
    document = {**setting, **found, "left_out": left_out}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Measures every row and writes tables, JSON and plot."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    args, console = arguments(), Console()
    wide = Console(width=max(console.width, 150))
    methods = args.methods.split(",")
    budgets = set(args.budgets.split(","))
    budgets |= {budget for budget, _, _ in TARGETS.get(args.family, ())}
    ordered = {float(b.removesuffix("x")): b for b in sorted(budgets)}
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["MOECC_CACHE"] = str(Path(temporary) / "cache")
        family = family_of(args, Path(temporary))
        fitting = [ordered[r] for r in sorted(ordered) if r < len(family.variants)]
        setting = {
            "family": args.family,
            "variants": list(family.variants),
            "base": family.base,
            "window": WINDOW,
            "test": {v: sum(len(b.labels) for b in f) for v, f in family.test.items()},
        }
        kept = kept_rows(args.out, setting, methods) if args.keep else []
        setting |= {"machine": machine(args.device), "torch": torch.__version__}
        rows, others = [untouched(family), *kept], Baselines(family, args)
        for method in methods:
            ours = method not in OTHERS
            found = our_rows(family, method, fitting) if ours else others.rows(method)
            for row in found:
                if isinstance(row, str):
                    others.left_out[f"{method} {row.partition(':')[0]}"] = row
                    console.print(f"{method}, left out: {row}", markup=False)
                    continue
                rows.append(row)
                save(args.out, setting, rows, others.left_out)  # an interrupted run is of use
                console.print(
                    f"{row.name}: {row.ratio:.3f}x, mean {row.mean:.4f}, worst {row.worst:.4f}, "
                    f"KL {row.kl:.5f}, {row.seconds:.0f} s"
                )
    save(args.out, setting, rows, others.left_out)
    title = f"{args.family}: {', '.join(setting['variants'])}"
    shown = [table(rows, title), bars_table(bars(rows, args.family))]
    for part in shown:
        wide.print(part)
    text = "\n".join(markdown(part) for part in shown if part.row_count)
    args.out.with_suffix(".md").write_text(text, encoding="utf-8")
    if importlib.util.find_spec("matplotlib"):
        plot_rows(rows, args.out.with_suffix(".png"), title)


if __name__ == "__main__":
    main()
