"""Time of a decode step of the whole engine, against the bytes it must read.

Random weights of a real shape, made on the device (random_artifact.py). For every batch size:

- one variant: all requests are to the same one;
- mixed: they are to all variants in turn, in one batch;
- in turns: 8 requests to each variant, resident, one variant's batch after the other's.

A step is the time between two tokens of a request while all requests generate: kernels, sampling,
scheduling and delivery. The floor is the time a copy on the same device, in the same run, takes to
move as many bytes as the step must read: the experts that are hit, once for all variants, with the
residuals of each variant that hits them; what the batch's variants have outside the experts; keys
and values. Peers' figures are added where peers.py has measured them.

    python benchmarks/decode.py --shape mixtral-8x7b --coding 16bit 4bit-g64+2bit-g64 --out FILE
    python benchmarks/decode.py --draw --out FILE --peers peers.json
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

import curves
import torch
from inside import bare_step, counting
from memory import checks_table
from random_artifact import RandomArtifact, random_weights
from rich.console import Console
from rich.table import Table
from scale import machine
from shapes import PROMPT_TOKENS, SHAPES, prompts
from tables import save

from moecc.runtime.engine import Engine
from moecc.runtime.opening import start_engine
from moecc.runtime.options import Mode, Options, Policy
from moecc.runtime.request import Output, Request, Sampling

GIB, GB = 1 << 30, 1000**3
ONE, MIXED, TURNS = "one variant", "mixed", "in turns"
EACH = 8  # requests to every variant in turns
PLAIN, PACKED = "16bit", "4bit-g64+2bit-g64"
MAX_MODEL_LEN = 2048
WARM_TOKENS, COUNTED_TOKENS = 6, 4
COPY_BYTES = {"cuda": 4 << 30, "cpu": 64 << 20}
QUALITY = Path(__file__).parent / "results" / "quality-small.json"


@dataclass(frozen=True)
class Hits:
    """Per layer, on average: distinct experts of a step, and distinct (variant, expert) pairs."""

    centers: float
    residuals: float
    counted: bool  # else what random routing gives on average


@dataclass(frozen=True)
class Row:
    """One case. Times in ms; `gpu_ms` is the pass alone, where it is a graph."""

    coding: str
    mode: str
    case: str
    batch: int
    variants: int
    step_ms: float
    p10_ms: float
    p90_ms: float
    steps: int
    gpu_ms: float | None
    floor_ms: float
    ratio: float
    tokens_per_second: float
    hits: Hits
    expert_bytes: float
    non_expert_bytes: int
    kv_bytes: int


@dataclass
class Load:
    """Requests that run at once, and when each got its tokens."""

    engine: Engine
    assigned: Sequence[int]  # a variant for each request
    tokens: int
    vocab: int
    stamps: list[list[float]] = field(init=False)

    def run(self, seed: int) -> Load:
        """Returns when all are done; RuntimeError if one is not answered in full."""
        engine, ended, failures = self.engine, threading.Semaphore(0), []
        self.stamps = [[] for _ in self.assigned]

        def deliver(stamps: list[float]) -> Callable[[Output], None]:
            def on_output(output: Output) -> None:
                stamps.append(time.perf_counter())
                if output.finish is not None:
                    if output.finish.reason != "length":
                        failures.append(f"{output.finish.reason}: {output.finish.error}")
                    ended.release()

            return on_output

        sampling = Sampling(max_tokens=self.tokens, temperature=0, ignore_eos=True)
        asked = prompts(len(self.assigned), self.vocab, seed)
        for number, (variant, prompt) in enumerate(zip(self.assigned, asked, strict=True)):
            request = Request(
                f"{number}", engine.variants[variant], prompt, sampling, detokenize=False
            )
            engine.submit(request, deliver(self.stamps[number]))
        for _ in self.assigned:
            ended.acquire()
        if failures:
            raise RuntimeError(f"{len(failures)} requests failed: {failures[0]}")
        return self

    @property
    def window(self) -> tuple[float, float]:
        """Since when all requests generate, and until when."""
        return max(s[0] for s in self.stamps), min(s[-1] for s in self.stamps)

    @property
    def steps(self) -> list[float]:
        """Seconds between the tokens of a request while all generate."""
        start, stop = self.window
        last = max(self.stamps, key=lambda stamps: stamps[0])
        kept = [t for t in last if start <= t <= stop]
        return [b - a for a, b in pairwise(kept)]

    @property
    def tokens_per_second(self) -> float:
        start, stop = self.window
        return sum(start < t <= stop for s in self.stamps for t in s) / (stop - start)


def copy_bandwidth(device: torch.device, runs: int = 15) -> float:
    """Bytes read and written in a second by a copy on the device, the median."""
    size = COPY_BYTES[device.type]
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(runs + 3):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    del source, target
    release(device)
    return 2 * size / median(seconds[3:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def engine_of(
    artifact: RandomArtifact, options: Options, console: Console
) -> Iterator[tuple[Engine, float]]:
    """An engine, and the seconds it took to start; closed after. RuntimeError for another mode."""
    start = time.monotonic()

    def note(text: str) -> None:
        console.print(f"{artifact.coding}, {options.mode}: {text}", soft_wrap=True)

    with random_weights():
        engine = start_engine(artifact, options, on_progress=lambda *_: None, note=note)
    try:
        if engine.stats().mode != options.mode:
            raise RuntimeError(f"asked for {options.mode}, served {engine.stats().mode}")
        note(f"{type(engine._runner).__name__} after {time.monotonic() - start:.0f} s")
        yield engine, time.monotonic() - start
    finally:
        engine.close()
        release(artifact.device)


class Bench:
    """The cases of one artifact, mode after mode."""

    def __init__(self, args: argparse.Namespace, coding: str, bandwidth: float) -> None:
        self.args = args
        self.coding = coding
        self.config = SHAPES[args.shape]
        self.bandwidth = bandwidth
        self.device = torch.device(args.device)
        self.rows: list[Row] = []
        self.memory: dict[str, dict[str, float]] = {}
        self.runners: dict[str, str] = {}
        self.expert_bytes = 0
        self.size = 0.0  # in experts of one variant at 16 bits

    def run(self, console: Console) -> None:
        for mode in self.args.modes:
            with tempfile.TemporaryDirectory() as folder:
                artifact = RandomArtifact(
                    self.config,
                    Path(folder),
                    variants=self.args.variants,
                    coding=self.coding,
                    device=self.device,
                )
                with engine_of(artifact, self._options(mode), console) as (engine, seconds):
                    self._cases(engine, artifact, mode, console)
                    self.memory[mode] |= {"start_seconds": seconds}

    def _options(self, mode: Mode, policy: Policy = "grouped") -> Options:
        most = max(*self.args.batches, EACH * self.args.variants)
        return Options(
            gpu=self.device.index or 0 if self.device.type == "cuda" else None,
            mode=mode,
            policy=policy,
            max_num_seqs=most,
            max_model_len=MAX_MODEL_LEN,
            gpu_memory_utilization=0.95,
        )

    def _cases(self, engine: Engine, artifact: RandomArtifact, mode: str, console: Console) -> None:
        memory = engine.stats().memory
        self.memory[mode] = {f"{kind}_gib": n / GIB for kind, n in memory.items()}
        self.runners[mode] = type(engine._runner).__name__
        self.expert_bytes = memory["experts"]
        self.size = memory["experts"] / artifact.original_bytes
        variants = range(self.args.variants)
        cases = [(ONE, [0] * batch) for batch in self.args.batches]
        if mode == "mixed":
            cases += [
                (MIXED, [i % len(variants) for i in range(batch)])
                for batch in self.args.batches
                if batch > 1
            ]
        else:
            cases.append((TURNS, [v for v in variants for _ in range(EACH)]))
        for case, assigned in cases:
            row = self._measured(engine, artifact, case, assigned, mode)
            self.rows.append(row)
            console.print(
                f"{self.coding}, {mode}, {case}, batch {row.batch}: {row.step_ms:.2f} ms, "
                f"{row.ratio:.2f} of the floor, {row.tokens_per_second:.0f} tokens/s",
                soft_wrap=True,
            )
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            self.memory[mode]["device_used_gib"] = (total - free) / GIB

    def _measured(
        self,
        engine: Engine,
        artifact: RandomArtifact,
        case: str,
        assigned: list[int],
        mode: str,
    ) -> Row:
        tokens = self.args.tokens
        self._load(engine, assigned, WARM_TOKENS)
        loads = [self._load(engine, assigned, tokens, s) for s in range(self.args.repeats)]
        steps = [1000 * s for load in loads for s in load.steps]
        if case == TURNS:  # a request waits for the others' turns
            steps = [1000 * EACH / load.tokens_per_second for load in loads]
        together = assigned[:EACH] if case == TURNS else assigned
        hits = self._hits(engine, artifact, together)
        per_layer = hits.centers * artifact.slot_bytes("center")
        if artifact.has_residuals:
            per_layer += hits.residuals * artifact.slot_bytes("residual")
        expert_bytes = per_layer * len(artifact.layers)
        own_bytes = len(set(together)) * self._read_outside(engine)
        context = PROMPT_TOKENS + tokens // 2  # on average
        kv_bytes = len(together) * context * self._kv_token_bytes(artifact)
        floor = 1000 * (expert_bytes + own_bytes + kv_bytes) / self.bandwidth
        middle = median(steps)
        ends = quantiles(steps, n=10) if len(steps) > 1 else [middle] * 9
        bare = bare_step(engine, together, self.config["vocab_size"], context)
        return Row(
            coding=self.coding,
            mode=mode,
            case=case,
            batch=len(assigned),
            variants=len(set(assigned)),
            step_ms=middle,
            p10_ms=ends[0],
            p90_ms=ends[-1],
            steps=len(steps),
            gpu_ms=None if bare is None else 1000 * bare,
            floor_ms=floor,
            ratio=middle / floor,
            tokens_per_second=median(load.tokens_per_second for load in loads),
            hits=hits,
            expert_bytes=expert_bytes,
            non_expert_bytes=own_bytes,
            kv_bytes=kv_bytes,
        )

    def _load(self, engine: Engine, assigned: list[int], tokens: int, seed: int = 0) -> Load:
        return Load(engine, assigned, tokens, self.config["vocab_size"]).run(seed)

    def _hits(self, engine: Engine, artifact: RandomArtifact, assigned: list[int]) -> Hits:
        found: list[tuple[int, int]] = []
        physical = len(artifact.variants) if artifact.has_residuals else 1
        with counting(engine, len(assigned), physical, found):
            self._load(engine, assigned, COUNTED_TOKENS)
        if found:
            return Hits(mean(c for c, _ in found), mean(r for _, r in found), True)
        config = self.config
        total = config.get("num_local_experts") or config["num_experts"]
        missed = 1 - config["num_experts_per_tok"] / total
        counts = [assigned.count(v) for v in set(assigned)]
        pairs = sum(total * (1 - missed**n) for n in counts)
        return Hits(total * (1 - missed ** len(assigned)), pairs, False)

    def _read_outside(self, engine: Engine) -> int:
        """Bytes of a variant outside the experts that a step reads: of the embedding only rows."""
        config = self.config
        held = engine.stats().memory["non_expert"] // self.args.variants
        return held - 2 * config["vocab_size"] * config["hidden_size"]

    def _kv_token_bytes(self, artifact: RandomArtifact) -> int:
        config = self.config
        dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        return 2 * 2 * len(artifact.layers) * config["num_key_value_heads"] * dim


def quality(coding: str) -> dict[str, Any] | None:
    """What such an artifact keeps of four trained variants, as quality.py measured it."""
    name = "mean, 1x" if coding == PLAIN else ""
    if coding.count("-g64") == 2:
        center, residual = (part.removesuffix("-g64") for part in coding.split("+"))
        name = f"ours, fixed {center} + {residual}"
    if not QUALITY.is_file():
        return None
    rows = json.loads(QUALITY.read_text(encoding="utf-8"))["rows"]
    found = [row for row in rows if row["name"] == name]
    return {"row": name, "mean_ratio": found[0]["mean"], "kl": found[0]["kl"]} if found else None


class Figures:
    """A document's rows by what they are of; missing ones are None."""

    def __init__(self, document: Mapping[str, Any], peers: Mapping[str, Any]) -> None:
        self.artifacts = document["artifacts"]
        self.shape = document["shape"]
        self.peers = peers.get(self.shape, {})

    def row(self, coding: str, case: str, batch: int) -> Any:
        rows = [
            row
            for row in self.artifacts.get(coding, {}).get("rows", [])
            if (row["case"], row["batch"]) == (case, batch)
        ]
        # Mixed is what `auto` takes.
        return min(rows, key=lambda row: row["mode"] != "mixed", default=None)

    def step(self, coding: str, case: str, batch: int) -> float | None:
        row = self.row(coding, case, batch)
        return row and row["step_ms"]

    def peer(self, name: str, batch: int) -> float | None:
        return self.peers.get(name, {}).get("step_ms", {}).get(str(batch))

    def checks(self) -> list[dict[str, Any]]:
        """The bars of a shape, of the rows that are there."""
        found: list[dict[str, Any]] = []

        def check(
            what: str, top: float | None, bottom: float | None, limit: float, least: bool = False
        ) -> None:
            if top is None or bottom is None:
                return
            value = top / bottom
            ok = value >= limit if least else value <= limit
            wanted = f"{'>=' if least else '<='} {limit:g}"
            found.append({"what": what, "value": value, "wanted": wanted, "ok": ok})

        limits = {"mixtral-8x7b": {1: 1.2, 8: 1.15, 32: 1.15, 64: 1.15}}
        limits["qwen3-30b-a3b"] = {1: 1.5, 32: 1.3}
        for batch, limit in limits.get(self.shape, {}).items():
            row = self.row(PLAIN, ONE, batch)
            if row:
                check(f"{PLAIN}, {ONE}, batch {batch}: of the floor", row["ratio"], 1, limit)
        for batch in (1, 8, 32, 64):
            ours = self.step(PLAIN, ONE, batch)
            check(f"{PLAIN}, {ONE}, batch {batch}: of vLLM", ours, self.peer("vllm", batch), 1.0)
        if self.shape != "mixtral-8x7b":
            return found
        one, four = self.row(PLAIN, ONE, 32), self.row(PLAIN, MIXED, 32)
        turns, packed = self.row(PLAIN, TURNS, 32), self.row(PACKED, MIXED, 32)
        if one and four:
            what = f"{PLAIN}, mixed, batch 32: of one variant"
            check(what, four["step_ms"], one["step_ms"], 1.15)
        if four and turns:
            rates = four["tokens_per_second"], turns["tokens_per_second"]
            check(f"{PLAIN}, throughput mixed: of the same in turns", *rates, 3.2, least=True)
        for batch, limit in ((1, 3.0), (8, 4.0)):
            theirs, ours = self.peer("transformers", batch), self.step(PLAIN, ONE, batch)
            what = f"{PLAIN}, {ONE}, batch {batch}: transformers' step, of ours"
            check(what, theirs, ours, limit, least=True)
        steps = self.step(PACKED, ONE, 1), self.step(PLAIN, ONE, 1)
        check(f"{PACKED}, batch 1: of {PLAIN}", *steps, 0.7)
        if packed and one:
            what = f"{PACKED}, mixed, batch 32: of {PLAIN}, {ONE}"
            check(what, packed["step_ms"], one["step_ms"], 1.0)
        if packed and (theirs := self.peer("vllm-int4", EACH)):
            rates = packed["tokens_per_second"], 1000 * EACH / theirs
            what = f"{PACKED}, throughput mixed: of four INT4 models in vLLM in turns"
            check(what, *rates, 1.0, least=True)
        memory = self.artifacts.get(PACKED, {}).get("memory", {}).get("mixed")
        if memory:
            total = sum(memory[f"{kind}_gib"] for kind in ("experts", "non_expert", "kv"))
            check(f"{PACKED}: GiB of weights, keys and values", total, 1, 100)
        return found

    def table(self) -> Table:
        table = Table()
        texts = ("artifact", "mode", "case")
        numbers = ("batch", "step ms", "p10", "p90", "GPU ms", "floor ms", "of floor")
        for column in texts:
            table.add_column(column)
        for column in (*numbers, "tokens/s", "experts hit", "GB read"):
            table.add_column(column, justify="right")
        for coding, artifact in self.artifacts.items():
            for row in artifact["rows"]:
                hits, read = row["hits"], row["expert_bytes"] + row["non_expert_bytes"]
                table.add_row(
                    f"{coding} ({artifact['size']:.2f}x)",
                    row["mode"],
                    row["case"],
                    str(row["batch"]),
                    *(f"{row[key]:.2f}" for key in ("step_ms", "p10_ms", "p90_ms")),
                    "" if row["gpu_ms"] is None else f"{row['gpu_ms']:.2f}",
                    f"{row['floor_ms']:.2f}",
                    f"{row['ratio']:.2f}",
                    f"{row['tokens_per_second']:.0f}",
                    f"{'' if hits['counted'] else '~'}{hits['centers']:.1f}",
                    f"{(read + row['kv_bytes']) / GB:.1f}",
                )
        for peer in self.peers.values():
            for batch, value in peer.get("step_ms", {}).items():
                cells = [peer["what"], "", ONE, batch, f"{value:.2f}", *[""] * 5]
                table.add_row(*cells, f"{1000 * int(batch) / value:.0f}", "", "")
        return table

    def kept(self) -> Table:
        """Every artifact's size, memory and quality."""
        table = Table()
        table.add_column("artifact")
        columns = ("of one variant's experts", "experts GiB", "other weights GiB", "KV cache GiB")
        columns += ("device used GiB", "perplexity ratio (small family)", "a copy's GB/s")
        for column in columns:
            table.add_column(column, justify="right")
        for coding, artifact in self.artifacts.items():
            kept = artifact["quality"]
            for mode, memory in artifact["memory"].items():
                used = memory.get("device_used_gib")
                table.add_row(
                    f"{coding}, {artifact['variants']} variants, {mode}",
                    f"{artifact['size']:.2f}x",
                    *(f"{memory[f'{kind}_gib']:.1f}" for kind in ("experts", "non_expert", "kv")),
                    "" if used is None else f"{used:.1f}",
                    f"{kept['mean_ratio']:.4f}" if kept else "",
                    f"{artifact['copy_bytes_per_second'] / GB:.0f}",
                )
        return table

    def lines(self) -> dict[str, list[tuple[float, float]]]:
        """Step ms over the batch, of every artifact and peer, and the floors of one variant."""
        found: dict[str, list[tuple[float, float]]] = {}
        for coding, artifact in self.artifacts.items():
            for row in artifact["rows"]:
                if row["mode"] == "mixed":
                    at = row["batch"]
                    found.setdefault(f"{coding}, {row['case']}", []).append((at, row["step_ms"]))
                    if row["case"] == ONE:
                        floor = found.setdefault(f"{coding}, {ONE}: floor", [])
                        floor.append((at, row["floor_ms"]))
        for peer in self.peers.values():
            steps = [(float(batch), value) for batch, value in peer.get("step_ms", {}).items()]
            if steps:
                found[peer["what"]] = steps
        return found


def show(document: dict[str, Any], peers: Mapping[str, Any], out: Path | None) -> None:
    """Tables on the screen; as Markdown and with a plot beside the JSON."""
    figures = Figures(document, peers)
    document["checks"] = figures.checks()
    shown = [figures.table(), figures.kept(), checks_table(document["checks"])]
    console = Console()
    Console(width=max(console.width, 160)).print(*shown)
    if out is None:
        return
    title = f"{document['shape']}, {document['device']}"
    save(document, shown, out, f"Decode steps, {title}")
    lines = figures.lines()
    dashed = [name for name in lines if name.endswith("floor")]
    curves.plot([("ms a step", lines)], out.with_suffix(".png"), title, x="batch", dashed=dashed)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="mixtral-8x7b")
    parser.add_argument("--coding", nargs="+", default=[PLAIN], help=f"such as {PLAIN} {PACKED}")
    parser.add_argument("--modes", nargs="+", choices=("mixed", "resident"), default=["mixed"])
    parser.add_argument("--variants", type=int, default=4)
    parser.add_argument("--device", default="cuda:0", help="cuda:N, or cpu for a dry run")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--tokens", type=int, default=48, help="generated by each request")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each case")
    parser.add_argument("--peers", type=Path, help="figures of peers.py")
    parser.add_argument("--out", type=Path, help="figures as JSON, added to those that are there")
    parser.add_argument("--draw", action="store_true", help="measure nothing, show --out again")
    return parser.parse_args()


def main() -> None:
    """Measures artifact after artifact; what is measured is kept if a later one fails."""
    args = arguments()
    peers = json.loads(args.peers.read_text(encoding="utf-8")) if args.peers else {}
    document: dict[str, Any] = {"shape": args.shape, "artifacts": {}}
    if args.out and args.out.is_file():
        document = json.loads(args.out.read_text(encoding="utf-8"))
    if args.draw:
        show(document, peers, args.out)
        return
    if document["shape"] != args.shape:
        raise SystemExit(f"`{args.out}` is of {document['shape']}")
    device = torch.device(args.device)
    bandwidth = copy_bandwidth(device)
    document |= {
        "machine": machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "triton": triton_version(),
        "tokens": args.tokens,
        "max_model_len": MAX_MODEL_LEN,
    }
    for coding in args.coding:
        bench = Bench(args, coding, bandwidth)
        bench.run(Console(stderr=True))
        document["artifacts"][coding] = {
            "variants": args.variants,
            "expert_bytes": bench.expert_bytes,
            "size": bench.size,
            "quality": quality(coding) if args.variants == 4 else None,
            "memory": bench.memory,
            "copy_bytes_per_second": bandwidth,  # of this run: GPUs of a kind differ a little
            "runners": bench.runners,
            "rows": [asdict(row) for row in bench.rows],
        }
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    show(document, peers, args.out)


def triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


if __name__ == "__main__":
    main()
