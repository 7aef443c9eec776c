"""Quality where it is hard: variants that hardly differ, differ oddly, or are not related at all.

Makes families out of one by changing its checkpoints, consolidates each and measures it against
its own originals, as `quality.py` does; then how often answers and routing change:

    python benchmarks/quality_hard.py --models MODELS --text TEXT --family small

- deltas of all weights scaled down, or only a part of the experts' weights changed;
- one variant with its experts shuffled over all layers, so that it has no siblings: the others
  must not be worse off than without it, when the budget grows by its experts;
- outliers: 1% of the experts' input channels 16 times as large, and the norm before them smaller;
- one variant with permuted experts and neurons, which changes nothing that it computes;
- two variants, and eight: the four, and means of their deltas.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import baselines
import torch
from family import WINDOW, Family, Figures, Models, Texts, decoder_texts, greedy, tokenizer_of
from quality import OURS, RESULTS, Form, add_arguments, consolidated, machine, make_row, members
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from tables import save
from torch import Tensor

from moecc.errors import MoeccError

State = dict[str, Tensor]
States = dict[str, State]
EXPERT = re.compile(
    r"(?P<layer>.*\.)experts\.(?P<expert>\d+)\.(?P<part>w[123]|(?:gate|up|down)_proj)\.weight"
)
DOWN = ("w2", "down_proj")
OUTLIER = 16.0  # a power of two: exact in bfloat16
SCALES, SPARSITIES = (0.05, 0.2), (0.05, 0.3)
ROUTED, PROMPT, NEW, ANSWER, CONTEXT = 16, 64, 64, 16, 48


@dataclass(frozen=True)
class Plan:
    """What is done to a family: a budget, how, and the variants that count."""

    label: str
    form: Form
    budget: str
    counted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """A family that is hard: its checkpoints, the variant whose text each one has, and plans."""

    name: str
    states: Callable[[], States]
    plans: tuple[Plan, ...]
    texts: dict[str, str]


@dataclass(frozen=True)
class Result:
    """Figures as in `quality.Row`, over the variants that count."""

    case: str
    setting: str
    budget: str
    ratio: float | None
    mean: float | None
    worst: float | None
    kl: float | None
    note: str = ""


def load_state(folder: Path) -> State:
    """Every tensor of a checkpoint, in float32."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: value.float() for file in files for name, value in load_file(file).items()}


def write_checkpoint(state: State, source: Path, out: Path) -> None:
    """A checkpoint in bfloat16, with everything beside the weights as the source has it."""
    out.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file() and ".safetensors" not in file.name:
            shutil.copyfile(file, out / file.name)
    plain = {name: value.bfloat16().contiguous() for name, value in state.items()}
    save_file(plain, out / "model.safetensors", metadata={"format": "pt"})


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scaled(states: States, base: str, by: float) -> States:
    """Every delta to the base, in all weights, `by` times as large."""
    first = states[base]
    return {
        name: {key: first[key] + by * (value - first[key]) for key, value in state.items()}
        for name, state in states.items()
    }


def sparse(states: States, base: str, part: float) -> States:
    """Experts that differ from the base's in a random part of their weights only."""
    random, first = generator(), states[base]
    return {
        name: {
            key: torch.where(torch.rand(value.shape, generator=random) < part, value, first[key])
            if EXPERT.fullmatch(key)
            else value
            for key, value in state.items()
        }
        for name, state in states.items()
    }


def shuffled(state: State) -> State:
    """A variant whose experts have changed places over all layers: related to nobody's."""
    found = [m for key in state if (m := EXPERT.fullmatch(key))]
    places = sorted({(m["layer"], int(m["expert"])) for m in found})
    order = torch.randperm(len(places), generator=generator()).tolist()
    source = {place: places[i] for place, i in zip(places, order, strict=True)}
    moved = dict(state)
    for m in found:
        layer, expert = source[m["layer"], int(m["expert"])]
        moved[m.string] = state[f"{layer}experts.{expert}.{m['part']}.weight"]
    return moved


def with_outliers(states: States) -> States:
    """The same channels of every variant's experts and routers raised, the norm before lowered."""
    random, raised = generator(), {name: dict(state) for name, state in states.items()}
    one = next(iter(states.values()))
    norms = sorted(key for key in one if key.endswith("post_attention_layernorm.weight"))
    for norm in norms:
        prefix, width = norm.removesuffix("post_attention_layernorm.weight"), len(one[norm])
        channels = torch.randperm(width, generator=random)[: max(1, round(width / 100))]
        factor = torch.ones(width)
        factor[channels] = OUTLIER
        for state in raised.values():
            state[norm] = state[norm] / factor
            for key in state:
                m = EXPERT.fullmatch(key)
                reads = m["part"] not in DOWN if m else key.endswith(".gate.weight")
                if key.startswith(prefix) and reads:
                    state[key] = state[key] * factor
    return raised


def permuted(state: State) -> State:
    """The same function: experts in another order, with the router's rows, and their neurons."""
    random, moved = generator(), dict(state)
    for gate in sorted(key for key in state if key.endswith(".gate.weight")):
        layer, count = gate.removesuffix("gate.weight"), len(state[gate])
        order = torch.randperm(count, generator=random)
        moved[gate] = state[gate][order]
        for new, old in enumerate(order.tolist()):
            neurons: Tensor | None = None
            for key in sorted(state):
                m = EXPERT.fullmatch(key)
                if not m or m["layer"] != layer or int(m["expert"]) != old:
                    continue
                axis = 1 if m["part"] in DOWN else 0
                if neurons is None:
                    neurons = torch.randperm(state[key].shape[axis], generator=random)
                place = f"{layer}experts.{new}.{m['part']}.weight"
                moved[place] = state[key].index_select(axis, neurons)
    return moved


def blended(states: States, base: str, names: Sequence[str]) -> State:
    """The base and the mean of some variants' deltas."""
    first = states[base]
    return {
        key: value + sum(states[n][key] - value for n in names) / len(names)
        for key, value in first.items()
    }


def cases(models: Models, base: str, form: Form, budgets: Sequence[str]) -> Iterator[Case]:
    """Every hard family."""
    originals = {name: load_state(folder) for name, folder in models.items()}
    own = {name: name for name in models}
    others = [name for name in models if name != base]
    plain = tuple(Plan("", form, budget) for budget in budgets)
    yield Case("as they are", lambda: originals, plain, own)
    for by in SCALES:
        yield Case(f"deltas x {by:g}", lambda by=by: scaled(originals, base, by), plain, own)
    for part in SPARSITIES:
        name = f"{part:.0%} of the experts' weights changed"
        yield Case(name, lambda part=part: sparse(originals, base, part), plain, own)
    yield Case("outlier channels", lambda: with_outliers(originals), plain, own)

    last, first = others[-1], others[0]
    related = tuple(name for name in models if name != last)
    without = [budget_for(budget, len(models), len(related)) for budget in budgets]
    if len(related) > 1:
        yield Case(
            f"without `{last}`",
            lambda: {name: originals[name] for name in related},
            tuple(Plan("", form, f"{b:g}x") for b in without),
            {name: name for name in related},
        )
        yield Case(
            f"`{last}` unrelated",
            lambda: {**originals, last: shuffled(originals[last])},
            tuple(Plan("the others", form, f"{b + 1:g}x", related) for b in without),
            own,
        )
    across = replace(form, match="any-index")
    scopes = [("same index", form), ("any index", across)]
    yield Case(
        f"`{first}` permuted",
        lambda: {**originals, first: permuted(originals[first])},
        tuple(Plan(label, how, budget) for budget in budgets for label, how in scopes),
        own,
    )
    if len(models) > 2:
        two = tuple(Plan("", form, f"{budget_for(b, len(models), 2):g}x") for b in budgets)
        pair = {name: name for name in (base, first)}
        yield Case("two variants", lambda: {n: originals[n] for n in pair}, two, pair)
    if len(others) > 2:
        mixes = [others[:2], others[1:3], [others[0], others[2]], others[:3]]
        texts = own | {"-".join(mix): mix[0] for mix in mixes}
        eight = tuple(
            Plan("", form, f"{budget_for(b, len(models), len(texts)):g}x") for b in budgets
        )
        yield Case(
            f"{len(texts)} variants",
            lambda: originals | {"-".join(m): blended(originals, base, m) for m in mixes},
            eight,
            texts,
        )


def budget_for(budget: str, given: int, count: int) -> float:
    """The budget that has a center of 4.25 bits and then as much a variant as the given one."""
    residual = (float(budget.removesuffix("x")) - 4.25 / 16) / given
    return round(4.25 / 16 + count * residual + 0.0049, 2)


def run_case(
    case: Case, models: Models, texts: dict[str, Texts], args: argparse.Namespace, work: Path
) -> Iterator[Result]:
    """Writes the checkpoints of a case, and measures its plans and GPTQ at 3 bits beside them."""
    folders: dict[str, Path] = {}
    for name, state in case.states().items():
        folders[name] = work / name
        write_checkpoint(state, models[case.texts[name]], folders[name])
    chosen = {name: texts[text] for name, text in case.texts.items()}
    base = args.base or next(iter(models))
    family = Family(folders, chosen, base, windows=args.windows, device=args.device)
    for plan in case.plans:
        counted = plan.counted or family.variants
        try:
            row = consolidated(family, plan.form, plan.budget, OURS)
        except MoeccError as error:
            note = " ".join(str(error).split())[:160]
            yield Result(case.name, plan.label, plan.budget, None, None, None, None, note)
            continue
        kept = {name: row.variants[name] for name in counted}
        yield _result(case.name, plan.label, plan.budget, row.ratio, kept)
    alone = baselines.gptq(family.experts, family.statistics().hessian, 3)
    figures = family.evaluate(alone.experts)
    counted = case.plans[0].counted or family.variants
    kept = {name: figures[name].to_json() for name in counted}
    yield _result(case.name, "alone, 3 bits, GPTQ", "", alone.nbytes / family.one, kept)


def _result(case: str, label: str, budget: str, ratio: float, kept: dict[str, Any]) -> Result:
    fields = ("tokens", "loss", "reference_loss", "kl")
    figures = {name: Figures(**{f: v[f] for f in fields}) for name, v in kept.items()}
    row = make_row("", OURS, "", ratio, 0.0, figures)
    return Result(case, label, budget, ratio, row.mean, row.worst, row.kl)


class Behavior:
    """What the originals answer and where they route, for others to be compared with."""

    def __init__(self, family: Family, limit: int) -> None:
        self.family, self.device = family, family.device
        self.arithmetic, self.truth = (
            self._arithmetic(limit) if "math" in family.variants else 2 * (None,)
        )
        self.prompts = {
            v: torch.cat([b.inputs["input_ids"] for b in family.test[v]])[:limit, :PROMPT]
            for v in family.variants
        }
        originals = family.models
        self.answers = self._answers(originals)
        self.made = {v: self._generate(m, self.prompts[v], NEW) for v, m in originals.items()}
        self.routed = {v: self._routes(v, m) for v, m in originals.items()}

    def _arithmetic(self, limit: int) -> tuple[Tensor, list[str]]:
        """The tokens before each answer of the math text, so many for all, and the answers."""
        if "math" not in self.family.variants:
            return torch.empty(0), []
        (file,) = self.family.texts["math"].test
        text = file.read_text(encoding="utf-8")
        tokenizer, prompts, answers = tokenizer_of(self.family.members["math"]), [], []
        for m in re.finditer(r"(?m)^([0-9(][0-9 ()+*/-]* =)( [0-9 =()+*/-]+)$", text):
            before = text[max(0, m.start() - 400) : m.end(1)]
            tokens = tokenizer(before, add_special_tokens=False)["input_ids"]
            if len(tokens) >= CONTEXT and len(prompts) < limit:
                prompts.append(tokens[-CONTEXT:])
                answers.append(m[2].strip())
        return torch.tensor(prompts), answers

    def _generate(self, model: Any, prompts: Tensor, new: int) -> Tensor:
        made = [
            torch.stack(list(greedy(model, part.to(self.device), new))).cpu()
            for part in prompts.split(64)
        ]
        return torch.cat(made)

    def _answers(self, models: dict[str, Any]) -> list[str]:
        if not self.truth:
            return []
        tokenizer = tokenizer_of(self.family.members["math"])
        made = self._generate(models["math"], self.arithmetic, ANSWER)
        return [tokenizer.decode(tokens).partition("\n")[0].strip() for tokens in made]

    @torch.inference_mode()
    def _routes(self, variant: str, model: Any) -> Tensor:
        """[layers, tokens, k] experts of every token, sorted."""
        found: list[Tensor] = []
        hooks = [
            model.get_submodule(layer.name).register_forward_pre_hook(
                lambda module, args: found.append(args[1].sort(-1).values.cpu())
            )
            for layer in self.family.layers
        ]
        tokens = torch.cat([b.inputs["input_ids"] for b in self.family.test[variant]])[:ROUTED]
        model(input_ids=tokens.to(self.device), use_cache=False)
        for hook in hooks:
            hook.remove()
        return torch.stack(found)

    def compare(self, models: dict[str, Any]) -> dict[str, float | None]:
        """Shares of answers and routes, and how far generations agree, all variants together."""
        answers = self._answers(models)
        points, same, changed, routes = [], 0, 0, 0
        for name, model in models.items():
            made = self._generate(model, self.prompts[name], NEW)
            differs = made != self.made[name]
            first = torch.where(differs.any(-1), differs.int().argmax(-1), NEW)
            points += first.tolist()
            same += int((first == NEW).sum())
            moved = (self._routes(name, model) != self.routed[name]).any(-1)
            changed, routes = changed + int(moved.sum()), routes + moved.numel()
        return {
            "same_answers": _share(answers, self.answers),
            "right_answers": _share(answers, self.truth),
            "right_originally": _share(self.answers, self.truth),
            "agreeing_tokens": sum(points) / len(points),
            "same_generations": same / len(points),
            "changed_routes": changed / routes,
        }


def _share(found: Sequence[str], wanted: Sequence[str]) -> float | None:
    if not wanted:
        return None
    return sum(a == b for a, b in zip(found, wanted, strict=True)) / len(wanted)


def behavior(
    family: Family, form: Form, budgets: Sequence[str], limit: int
) -> Iterator[dict[str, Any]]:
    """How ours, quantization alone and the mean behave beside the originals."""
    reference = Behavior(family, limit)
    for budget in budgets:
        found: dict[str, Any] = {}
        try:
            row = consolidated(
                family,
                form,
                budget,
                OURS,
                use=lambda models, found=found: found.update(reference.compare(models)),
            )
        except MoeccError as error:
            yield {"name": f"ours {budget}", "note": " ".join(str(error).split())[:160]}
            continue
        yield {"name": f"ours {budget}", "ratio": row.ratio, **found}
    statistics = family.statistics()
    rows = {
        "alone, 4 bits, GPTQ": baselines.gptq(family.experts, statistics.hessian, 4),
        "alone, 3 bits, GPTQ": baselines.gptq(family.experts, statistics.hessian, 3),
        "paper, 1x": baselines.alternate(family.experts, family.layers, 1.0),
    }
    for name, made in rows.items():
        with family.installed(made.experts) as models:
            found = reference.compare(models)
        yield {"name": name, "ratio": made.nbytes / family.one, **found}


def results_table(results: Sequence[Result], title: str) -> Table:
    """The cases for people."""
    shown = Table(title=title, caption="perplexity and KL against each variant's own original")
    shown.add_column("case")
    shown.add_column("setting")
    for column in ("memory", "mean", "worst", "KL x 1000"):
        shown.add_column(column, justify="right")
    for r in results:
        if r.ratio is None or r.mean is None or r.worst is None or r.kl is None:
            shown.add_row(r.case, f"{r.setting or 'ours'} {r.budget}: {r.note}", *[""] * 4)
            continue
        setting = " ".join(part for part in (r.setting or "ours", r.budget) if part)
        figures = [f"{r.ratio:.3f}x", f"{r.mean:.4f}", f"{r.worst:.4f}", f"{1000 * r.kl:.2f}"]
        shown.add_row(r.case, setting, *figures)
    return shown


def behavior_table(found: Sequence[dict[str, Any]]) -> Table:
    """Answers and routes for people."""
    columns = {
        "same_answers": "same answers",
        "right_answers": "right answers",
        "right_originally": "right originally",
        "agreeing_tokens": f"agreeing tokens of {NEW}",
        "same_generations": "same generations",
        "changed_routes": "routes changed",
    }
    shown = Table(title="greedy answers and routing beside the originals'")
    shown.add_column("experts of all variants")
    for column in ("memory", *columns.values()):
        shown.add_column(column, justify="right")
    for row in found:
        if "ratio" not in row:
            shown.add_row(f"{row['name']}: {row['note']}", *[""] * (1 + len(columns)))
            continue
        cells = [f"{row['ratio']:.3f}x"]
        for key in columns:
            value, plain = row[key], key == "agreeing_tokens"
            cells.append("-" if value is None else f"{value:.1f}" if plain else f"{value:.1%}")
        shown.add_row(row["name"], *cells)
    return shown


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_arguments(parser)
    parser.add_argument("--budgets", default="0.58x,0.83x", help="of the family as it is")
    parser.add_argument("--form", default="auto", help="`auto`, or bits such as 4+1")
    parser.add_argument("--prompts", type=int, default=128, help="generations a variant")
    parser.add_argument("--cases", help="only those with this in their names; `behavior` too")
    args = parser.parse_args()
    args.out = args.out or RESULTS / "quality-hard.json"
    return args


def main() -> None:
    """Measures every case and writes tables and JSON."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    args, console = arguments(), Console()
    wide = Console(width=max(console.width, 150))
    models, form, budgets = members(args), Form.parse(args.form), args.budgets.split(",")
    base, texts = args.base or next(iter(models)), decoder_texts(args.text, list(models))
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        os.environ["MOECC_CACHE"] = str(work / "cache")
        for number, case in enumerate(cases(models, base, form, budgets)):
            if args.cases and args.cases not in case.name:
                continue
            for result in run_case(case, models, texts, args, work / str(number)):
                results.append(result)
                measured = result.note or f"mean {result.mean:.4f}, KL {result.kl:.5f}"
                setting = f"{result.setting or 'ours'} {result.budget}".strip()
                console.print(f"{case.name}, {setting}: {measured}", markup=False)
            shutil.rmtree(work / str(number))
        behaving = []
        if not args.cases or args.cases in "behavior":
            family = Family(models, texts, base, windows=args.windows, device=args.device)
            behaving = list(behavior(family, form, budgets, args.prompts))
    title = f"{args.family}: {', '.join(models)}"
    shown = [results_table(results, title), behavior_table(behaving)]
    for part in shown:
        wide.print(part)
    document = {
        "family": args.family,
        "variants": list(models),
        "window": WINDOW,
        "windows": args.windows,
        "form": asdict(form),
        "machine": machine(args.device),
        "cases": [asdict(result) for result in results],
        "behavior": behaving,
    }
    save(document, [part for part in shown if part.row_count], args.out)


if __name__ == "__main__":
    main()
