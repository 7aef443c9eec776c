"""Size against quality: what a recipe's bits cost in perplexity.

Consolidates the variants of one family by several recipes and measures every variant of every
artifact on its own validation text, against the source it was made from:

    python benchmarks/size_quality.py --models MODELS --text TEXT --family small \\
        --variants base,python,chat,math

MODELS holds one checkpoint `FAMILY-VARIANT` per variant, TEXT one file `VARIANT.valid.txt`. A row
of the table is a recipe: `[METHOD:]CENTER[+RESIDUAL][@BUDGET]`, bits for both parts. Without a
budget a row gets the smallest that can be met, where every expert is shared by all variants.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from tables import save

from moecc.artifact import Artifact
from moecc.consolidate import open_recipe, run
from moecc.export import load_model
from moecc.recipe import Recipe, format_size, parse_recipe

WINDOW = 256
BATCH = 8
ROWS = "representative:16@1.0x,mean:16@1.0x,mean:16@1.32x,4+1,4+2@0.84x,4+3,8+1,16+1@1.32x,8+3,16+3"
# (row, largest size ratio, largest mean perplexity ratio) that the design has to hold
BARS = (("16+1", 1.32, 1.03), ("4+2", 0.84, 1.01))


@dataclass(frozen=True)
class Row:
    """A recipe of the table: how groups are stored, and the budget they must fit."""

    name: str
    method: str
    center: int
    residual: int
    budget: str | None


@dataclass(frozen=True)
class Result:
    """What a row costs and gives: sizes in bytes, perplexities relative to the sources'."""

    row: str
    method: str
    center: int
    residual: int
    budget: str
    ratio: float
    bank_bytes: int
    artifact_bytes: int
    perplexity: dict[str, float]
    relative: dict[str, float]
    mean: float
    worst: float
    seconds: float


def parse_row(text: str) -> Row:
    """The row in `[METHOD:]CENTER[+RESIDUAL][@BUDGET]`; SystemExit for anything else."""
    found = re.fullmatch(r"(?:(\w+):)?(\d+)(?:\+(\d+))?(?:@(\S+))?", text)
    if found is None:
        raise SystemExit(f"`{text}` is not a row such as 4+2@0.84x or representative:16@1.0x")
    method, center, residual, budget = found.groups()
    return Row(text, method or "mean", int(center), int(residual or 0), budget)


class Corpus:
    """The validation windows of each variant: its whole text in its own tokens."""

    def __init__(self, models: dict[str, Path], text: Path, limit: int | None) -> None:
        from transformers import AutoTokenizer

        self.windows: dict[str, torch.Tensor] = {}
        for name, folder in models.items():
            tokenizer = AutoTokenizer.from_pretrained(folder)
            # One long sequence by design, so the tokenizer's warning about its length is noise.
            tokenizer.model_max_length = 10**12
            raw = (text / f"{name}.valid.txt").read_text(encoding="utf-8")
            tokens = torch.tensor(tokenizer(raw, add_special_tokens=False)["input_ids"])
            whole = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
            self.windows[name] = whole[:limit]

    def perplexity(self, model: Any, name: str) -> float:
        """Of a model on the windows of a variant, every token but a window's first predicted."""
        total, count = 0.0, 0
        with torch.inference_mode():
            for batch in self.windows[name].split(BATCH):
                logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
                loss = torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
                )
                total += float(loss)
                count += batch[:, 1:].numel()
        return math.exp(total / count)


def untouched(models: dict[str, Path], corpus: Corpus) -> Result:
    """The sources as they are: the reference of every other row, at one bank a variant."""
    from transformers import AutoModelForCausalLM

    start, perplexity = time.monotonic(), {}
    for name, folder in models.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        perplexity[name] = corpus.perplexity(model, name)
    files = [f for folder in models.values() for f in folder.iterdir() if f.is_file()]
    weights = sum(f.stat().st_size for f in files if f.suffix == ".safetensors")
    return Result(
        row="untouched",
        method="",
        center=16,
        residual=0,
        budget="",
        ratio=float(len(models)),
        bank_bytes=weights,
        artifact_bytes=sum(f.stat().st_size for f in files),
        perplexity=perplexity,
        relative=dict.fromkeys(models, 1.0),
        mean=1.0,
        worst=1.0,
        seconds=time.monotonic() - start,
    )


def recipe_of(row: Row, models: dict[str, Path], base: str, group: int, folder: Path) -> Recipe:
    """The recipe of a row; without a budget, the smallest that two decimals can say."""
    document = {
        "version": 1,
        "base": base,
        "variants": {name: {"source": str(source)} for name, source in models.items()},
        "merge": {
            "method": row.method,
            "center": f"{row.center}bit",
            "residual": f"{row.residual}bit" if row.residual else "none",
            "group": group,
        },
        "budget": row.budget or "1.0x",
    }
    recipe = parse_recipe(yaml.safe_dump(document, sort_keys=False), folder)
    if row.budget is not None:
        return recipe
    opened = open_recipe(recipe)
    opened.close()
    smallest = float(opened.smallest_budget.removesuffix("x"))
    document["budget"] = f"{math.ceil(smallest * 100) / 100:.2f}x"
    return parse_recipe(yaml.safe_dump(document, sort_keys=False), folder)


def measure(row: Row, recipe: Recipe, out: Path, corpus: Corpus, reference: Result) -> Result:
    """Consolidates by a recipe and compares every variant with its source."""
    start = time.monotonic()
    run(recipe, out)
    seconds = time.monotonic() - start
    perplexity = {}
    with Artifact(out) as artifact:
        experts = artifact.manifest["experts"]
        for name in artifact.variants:
            model = load_model(artifact, name, dtype=torch.float32)
            perplexity[name] = corpus.perplexity(model, name)
    relative = {name: value / reference.perplexity[name] for name, value in perplexity.items()}
    return Result(
        row=row.name,
        method=row.method,
        center=row.center,
        residual=row.residual,
        budget=recipe.budget.text,
        ratio=experts["ratio"],
        bank_bytes=sum(f.stat().st_size for f in out.glob("experts-*.safetensors")),
        artifact_bytes=sum(f.stat().st_size for f in out.rglob("*") if f.is_file()),
        perplexity=perplexity,
        relative=relative,
        mean=math.exp(sum(map(math.log, relative.values())) / len(relative)),
        worst=max(relative.values()),
        seconds=seconds,
    )


def bars(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Every bar that a row of the table can be held to, and whether it holds."""
    found = []
    for name, size, loss in BARS:
        for result in results:
            if result.row.partition("@")[0] == name:
                ok = result.ratio <= size and result.mean <= loss
                measured = {"ratio": result.ratio, "mean": result.mean}
                limits = {"max_ratio": size, "max_mean": loss}
                found.append({"row": result.row, **measured, **limits, "ok": ok})
    return found


def table(results: Sequence[Result], title: str) -> Table:
    """The results for people: sizes, then perplexity relative to the untouched variants."""
    shown = Table(title=title, caption="perplexity relative to the untouched variant")
    for column in ("recipe", "budget", "ratio", "bank", "artifact"):
        shown.add_column(column, justify="left" if column == "recipe" else "right")
    for name in (*results[0].relative, "mean", "worst"):
        shown.add_column(name, justify="right")
    for r in results:
        sizes = [f"{r.ratio:.3f}", format_size(r.bank_bytes), format_size(r.artifact_bytes)]
        losses = [f"{value:.4f}" for value in (*r.relative.values(), r.mean, r.worst)]
        shown.add_row(label(r), r.budget or "-", *sizes, *losses)
    return shown


def label(result: Result) -> str:
    """`mean 4bit+2bit` and the like."""
    if not result.method:
        return result.row
    parts = f"{result.center}bit" + (f"+{result.residual}bit" if result.residual else "")
    return f"{result.method} {parts}"


def plot(results: Sequence[Result], path: Path, title: str) -> None:
    """Loss in per cent over size, both on log scales; one point a recipe."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    figure, axes = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
    for r in results:
        if not r.method:
            continue
        # Below a hundredth of a per cent is noise, and a log scale has no zero.
        at = (r.ratio, max(100 * (r.mean - 1), 0.01))
        color, marker = ("#1d4ed8", "o") if r.residual else ("#c2410c", "s")
        axes.scatter(*at, s=42, color=color, marker=marker)
        axes.annotate(label(r), at, xytext=(7, 4), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", yscale="log", title=title)
    axes.set_xlabel("expert memory of all variants, relative to one variant in 16 bits")
    axes.set_ylabel("perplexity above untouched, mean of variants")
    axes.xaxis.set_major_locator(FixedLocator([0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.4, 1.7, 2.0]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}x"))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}%"))
    axes.margins(x=0.18, y=0.1)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", type=Path, required=True, help="folder of FAMILY-VARIANT")
    parser.add_argument("--text", type=Path, required=True, help="folder of VARIANT.valid.txt")
    parser.add_argument("--family", required=True)
    parser.add_argument("--variants", required=True, help="comma-separated")
    parser.add_argument("--base", help="the variant the others were tuned from; default: the first")
    parser.add_argument("--rows", default=ROWS, help=f"comma-separated; default: {ROWS}")
    parser.add_argument("--group", type=int, default=64, help="weights a scale; default: 64")
    parser.add_argument("--windows", type=int, help="at most so many a variant; default: all")
    parser.add_argument("--out", type=Path, help="JSON; .md and .png go beside it")
    return parser.parse_args()


def main() -> None:
    """Measures every row and writes table, JSON and plot."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    args = arguments()
    names = args.variants.split(",")
    models = {name: (args.models / f"{args.family}-{name}").resolve() for name in names}
    rows = [parse_row(text) for text in args.rows.split(",")]
    corpus = Corpus(models, args.text, args.windows)
    console = Console()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["MOECC_CACHE"] = str(folder / "cache")
        results = [untouched(models, corpus)]
        for number, row in enumerate(rows):
            recipe = recipe_of(row, models, args.base or names[0], args.group, folder)
            out = folder / f"artifact-{number}"
            results.append(measure(row, recipe, out, corpus, results[0]))
            console.print(f"{row.name}: {results[-1].ratio:.3f}x {results[-1].mean:.4f}")
    title = f"{args.family}: {', '.join(names)}"
    # Wide enough for every column wherever the output goes.
    shown = table(results, title)
    Console(width=max(console.width, 120)).print(shown)
    held = bars(results)
    for bar in held:
        console.print(
            f"{bar['row']}: {bar['ratio']:.3f}x (at most {bar['max_ratio']:g}x), mean "
            f"{bar['mean']:.4f} (at most {bar['max_mean']:g}): {'ok' if bar['ok'] else 'MISSED'}"
        )
    if args.out:
        document = {
            "family": args.family,
            "variants": names,
            "window": WINDOW,
            "windows": {name: len(found) for name, found in corpus.windows.items()},
            "group": args.group,
            "rows": [asdict(result) for result in results],
            "bars": held,
        }
        save(document, [shown], args.out)
        if importlib.util.find_spec("matplotlib"):
            plot(results, args.out.with_suffix(".png"), title)


if __name__ == "__main__":
    main()
