"""The paper's experiment: requests to several models of one GPU, at several arrival rates.

Poisson arrivals of requests to 2 and to 4 variants, uniformly, of 20 random prompt and 25 output
tokens (Imani et al., ICML 2025). Random weights of a real shape, fully shared: S is the number of
experts. Rates are parts of what half-memory slices can carry (slices.py), and for those that can
carry more, parts of what one model alone can.

Served by the real engine, from a client's thread; when nothing is running, the client's clock jumps
to the next arrival, so that a low rate takes no longer than its requests:

- alone: one model, all requests are to it: the upper bound;
- mixed, resident (grouped and fifo), swap: our ways to serve;
- the paper's orchestrator: one request at a time, first come first served, swap.

Their service times are measured, and the queue is simulated over 5,000 arrivals:

- slices: every model in its part of the GPU, with expert offload; one queue each;
- switching: the whole model is copied in whenever the next request is to another one. Host memory
  would have to hold all models: the copy's time is that of its bytes at the measured bandwidth;
- transformers: `generate` for one request after the other, one model, never switched.

    python benchmarks/qos.py --variants 2 4 --coding 16bit 4bit-g64+2bit-g64 --out qos.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import curves
import torch
from decode import GB, PACKED, PLAIN, copy_bandwidth, engine_of, release, synchronize
from memory import checks_table
from random_artifact import RandomArtifact
from rich.console import Console
from rich.table import Table
from scale import machine
from shapes import PROMPT_TOKENS, SHAPES, prompts
from slices import Generate, Service, Slice, services
from tables import save

from moecc.errors import MoeccError
from moecc.runtime import devices
from moecc.runtime.engine import Engine
from moecc.runtime.options import Options
from moecc.runtime.request import Output, Request, Sampling

OUTPUT_TOKENS = 25
LOADS, OWN_LOADS = (10, 30, 50, 70, 90), (30, 50, 70)  # percent
SIMULATED_ARRIVALS = 5000
MAX_NUM_SEQS, MAX_MODEL_LEN = 64, 256
BURST = 4 * MAX_NUM_SEQS  # requests at once that show what an engine can carry
MARGIN = 4 * GB  # of a cap, for the context and activations
ALONE, MIXED, SLICES, SWITCHING, TRANSFORMERS = (
    "alone",
    "mixed",
    "slices",
    "switching",
    "transformers",
)
# mode, policy, most requests at once
ENGINES: dict[str, tuple[Any, Any, int]] = {
    ALONE: ("resident", "fifo", MAX_NUM_SEQS),
    MIXED: ("mixed", "grouped", MAX_NUM_SEQS),
    "resident, grouped": ("resident", "grouped", MAX_NUM_SEQS),
    "resident, fifo": ("resident", "fifo", MAX_NUM_SEQS),
    "swap, grouped": ("swap", "grouped", MAX_NUM_SEQS),
    "paper: swap, fifo, batch 1": ("swap", "fifo", 1),
}
SIMULATED = (SLICES, SWITCHING, TRANSFORMERS)
CARRY_MORE = (ALONE, MIXED, "resident, grouped")


@dataclass(frozen=True)
class Arrival:
    """A request, `at` seconds after the start."""

    at: float
    variant: int
    prompt: tuple[int, ...]


@dataclass(frozen=True)
class Served:
    """When a request arrived, got its first token and its last, in seconds of the same clock."""

    arrived: float
    first: float
    finished: float


@dataclass(frozen=True)
class Point:
    """A system at one rate, in requests a second; times in seconds."""

    variants: int
    coding: str
    system: str
    basis: str  # what `load` is a part of: what slices carry, or what one model alone does
    load: int  # percent
    rate: float
    requests: int
    ttft: dict[str, float]
    turnaround: dict[str, float]
    requests_per_second: float
    memory: str

    @classmethod
    def of(cls, served: Sequence[Served], **names: Any) -> Point:
        seconds = max(s.finished for s in served) - min(s.arrived for s in served)
        return cls(
            requests=len(served),
            ttft=_spread([s.first - s.arrived for s in served]),
            turnaround=_spread([s.finished - s.arrived for s in served]),
            requests_per_second=len(served) / seconds,
            **names,
        )


def _spread(values: list[float]) -> dict[str, float]:
    values = sorted(values)
    p99 = values[min(len(values) - 1, int(0.99 * len(values)))]
    return {"mean": mean(values), "p50": median(values), "p99": p99}


def arrivals(rate: float, variants: int, vocab: int, seed: int = 0) -> Iterator[Arrival]:
    """Without end; at every rate the same requests, in the same order and proportions of time."""
    rng, at = random.Random(seed), 0.0
    asked = itertools.cycle(prompts(997, vocab, seed))
    while True:
        at += rng.expovariate(rate)
        yield Arrival(at, rng.randrange(variants), next(asked))


class Client:
    """Sends requests to an engine as they arrive, and notes when it answers."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._changed = threading.Condition()
        self._skipped = 0.0
        self._running = 0
        self._numbers = itertools.count()
        self.served: list[Served] = []
        self.failures: list[str] = []

    def run(self, asked: Iterable[Arrival], seconds: float) -> list[Served]:
        """Sends for so many seconds of real time, and waits for all answers."""
        self.served, self._skipped = [], -time.perf_counter()
        stop = time.perf_counter() + seconds
        for arrival in asked:
            self._wait_until(arrival.at)
            if time.perf_counter() > stop and self.served:
                break
            self._send(arrival)
        with self._changed:
            self._changed.wait_for(lambda: not self._running)
        if self.failures:
            raise RuntimeError(f"{len(self.failures)} requests failed: {self.failures[0]}")
        return self.served

    def _now(self) -> float:
        return time.perf_counter() + self._skipped

    def _wait_until(self, at: float) -> None:
        with self._changed:
            while (left := at - self._now()) > 0:
                if not self._running:
                    self._skipped += left
                else:
                    self._changed.wait(left)

    def _send(self, arrival: Arrival) -> None:
        first = 0.0

        def on_output(output: Output) -> None:
            nonlocal first
            first = first or self._now()
            if output.finish is None:
                return
            with self._changed:
                self._running -= 1
                if output.finish.reason != "length":
                    self.failures.append(f"{output.finish.reason}: {output.finish.error}")
                self.served.append(Served(arrival.at, first, self._now()))
                self._changed.notify()

        engine = self._engine
        variant = engine.variants[arrival.variant % len(engine.variants)]
        sampling = Sampling(max_tokens=OUTPUT_TOKENS, temperature=0, ignore_eos=True)
        request = Request(
            f"{next(self._numbers)}", variant, arrival.prompt, sampling, detokenize=False
        )
        with self._changed:
            self._running += 1
        engine.submit(request, on_output)


def simulate(
    asked: Iterable[Arrival],
    service: Callable[[int, Arrival, int | None], Service],
    queue: Callable[[Arrival], int],
) -> list[Served]:
    """Queues of one server each, first come first served.

    `service` gets the request's number, the request and the variant its server answered before.
    """
    free: dict[int, float] = {}
    last: dict[int, int] = {}
    served = []
    for number, arrival in enumerate(asked):
        server = queue(arrival)
        start = max(arrival.at, free.get(server, 0.0))
        first, total = service(number, arrival, last.get(server))
        free[server], last[server] = start + total, arrival.variant
        served.append(Served(arrival.at, start + first, start + total))
    return served


def host_bandwidth(device: torch.device) -> float:
    """Bytes a second from page-locked host memory to the device, the median."""
    size = (1 << 30) if device.type == "cuda" else (16 << 20)
    host = devices.pinned(1, size, device)
    target = torch.empty(size, dtype=torch.uint8, device=device)
    seconds = []
    for _ in range(8):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(host[0], non_blocking=True)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    devices.release(device, host)
    return size / median(seconds[2:])


class Bench:
    """Measures into a document; what later parts need of earlier ones is in it."""

    def __init__(self, args: argparse.Namespace, document: dict[str, Any]) -> None:
        self.args = args
        self.document = document
        self.config = SHAPES[args.shape]
        self.device = torch.device(args.device)
        self.cap = int(args.cap * GB)
        self.console = Console(stderr=True)

    def slices(self, variants: int) -> None:
        """Service times and capacity of half-memory slices, if they are not known."""
        if str(variants) in self.document["slices"]:
            return
        slice_ = Slice(self.config, self.cap // variants, self.device)
        try:
            found = services(
                slice_.answer, self._prompts(self.args.slice_requests + 1), OUTPUT_TOKENS
            )
        finally:
            slice_.close()
        self.document["slices"][str(variants)] = {
            "service": found,
            "experts_per_layer": slice_.slots,
            "hit_rate": slice_.hit_rate,
            "bytes": slice_.nbytes,
            "capacity": variants / mean(total for _, total in found),
        }
        del slice_
        release(self.device)

    def transformers(self) -> None:
        """Service times of `generate`, with the faster of its experts implementations."""
        model, best = Generate(self.config, self.device), None
        for implementation in ("grouped_mm", "batched_mm"):
            model.use(implementation)
            found = services(model.answer, self._prompts(7), OUTPUT_TOKENS, warm=2)
            if best is None or mean(t for _, t in found) < mean(t for _, t in best["service"]):
                best = {"implementation": implementation, "service": found}
        self.document["transformers"] = best
        del model
        release(self.device)

    def engine(self, system: str, variants: int, coding: str) -> None:
        """A system that the engine serves, at every rate."""
        mode, policy, most = ENGINES[system]
        with tempfile.TemporaryDirectory() as folder:
            artifact = RandomArtifact(
                self.config,
                Path(folder),
                variants=1 if system == ALONE else variants,
                coding=coding,
                device=self.device,
            )
            options = Options(
                gpu=self.device.index or 0 if self.device.type == "cuda" else None,
                mode=mode,
                policy=policy,
                max_num_seqs=most,
                max_model_len=MAX_MODEL_LEN,
                max_waiting=1 << 16,
                gpu_memory_utilization=0.95,
            )
            with (
                self._limited(artifact, mode) as memory,
                engine_of(artifact, options, self.console) as (engine, _),
            ):
                client = Client(engine)
                vocab = self.config["vocab_size"]
                client.run(itertools.islice(arrivals(1e9, variants, vocab, 1), 2 * most), 60)
                if system == ALONE:
                    self._alone(client, coding)
                for basis, load, rate in self._rates(system, variants, coding):
                    served = client.run(arrivals(rate, variants, vocab), self.args.seconds)
                    self._add(served, variants, coding, system, basis, load, rate, memory)

    def simulated(self, system: str, variants: int) -> None:
        """A system whose service times are known, at every rate."""
        if system == SLICES:
            times = self.document["slices"][str(variants)]["service"]
        elif system == TRANSFORMERS:
            if "transformers" not in self.document:
                self.transformers()
            times = self.document["transformers"]["service"]
        else:
            times = self.document["alone"][PLAIN]["service"]
        change = 0.0
        if system == SWITCHING:
            change = self.document["model_bytes"] / self.document["host_bytes_per_second"]

        def service(number: int, arrival: Arrival, before: int | None) -> Service:
            first, total = times[number % len(times)]
            copied = 0.0 if before == arrival.variant else change
            return copied + first, copied + total

        def queue(arrival: Arrival) -> int:
            return arrival.variant if system == SLICES else 0

        for basis, load, rate in self._rates(system, variants, PLAIN):
            asked = arrivals(rate, variants, self.config["vocab_size"])
            served = simulate(itertools.islice(asked, SIMULATED_ARRIVALS), service, queue)
            memory = f"{self.args.cap / variants:g} GB each" if system == SLICES else "uncapped"
            self._add(served, variants, PLAIN, system, basis, load, rate, memory)

    def _alone(self, client: Client, coding: str) -> None:
        """What one model can carry, and the times of single requests."""
        vocab = self.config["vocab_size"]
        burst = itertools.islice(arrivals(1e9, 1, vocab, 2), self.args.burst)
        capacity = Point.of(client.run(burst, 120), **_NOWHERE).requests_per_second
        single = client.run(itertools.islice(arrivals(1e-3, 1, vocab, 3), 12), 30)[2:]
        times = [(s.first - s.arrived, s.finished - s.arrived) for s in single]
        self.document["alone"][coding] = {"capacity": capacity, "service": times}

    def _rates(self, system: str, variants: int, coding: str) -> Iterator[tuple[str, int, float]]:
        """(basis, percent, requests a second)"""
        of_slices = self.document["slices"][str(variants)]["capacity"]
        for load in self.args.loads:
            yield SLICES, load, of_slices * load / 100
        alone = self.document["alone"].get(coding)
        if system in CARRY_MORE and alone:
            for load in self.args.own_loads:
                yield ALONE, load, alone["capacity"] * load / 100

    @contextmanager
    def _limited(self, artifact: RandomArtifact, mode: str) -> Iterator[str]:
        """Inside, torch is held to the cap if the artifact fits in it; says what it may use."""
        rows = 2 if mode == "swap" else len(artifact.variants)
        needs = artifact.nbytes + rows * artifact.row_bytes + MARGIN
        if self.device.type != "cuda":
            yield "cpu"
        elif needs > self.cap:
            yield f"uncapped: needs {needs / GB:.0f} GB"
        else:
            _, total = torch.cuda.mem_get_info(self.device)
            torch.cuda.set_per_process_memory_fraction(self.cap / total, self.device)
            try:
                yield f"within {self.args.cap:g} GB"
            finally:
                torch.cuda.set_per_process_memory_fraction(1.0, self.device)

    def _add(
        self,
        served: Sequence[Served],
        variants: int,
        coding: str,
        system: str,
        basis: str,
        load: int,
        rate: float,
        memory: str,
    ) -> None:
        point = Point.of(
            served,
            variants=variants,
            coding=coding,
            system=system,
            basis=basis,
            load=load,
            rate=rate,
            memory=memory,
        )
        self.document["points"].append(asdict(point))
        self.console.print(
            f"{variants} variants, {coding}, {system}, {load}% of what {basis} can: "
            f"TTFT {1000 * point.ttft['mean']:.1f} ms, turnaround "
            f"{1000 * point.turnaround['mean']:.0f} ms, {point.requests} requests",
            soft_wrap=True,
        )

    def _prompts(self, count: int) -> list[tuple[int, ...]]:
        return prompts(count, self.config["vocab_size"])


_NOWHERE = {
    "variants": 1,
    "coding": "",
    "system": "",
    "basis": "",
    "load": 100,
    "rate": 0.0,
    "memory": "",
}


class Figures:
    """What a document's points show."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.points = document["points"]

    def value(
        self, system: str, variants: int, coding: str, basis: str, load: int, key: str
    ) -> float | None:
        wanted = (system, variants, coding, basis, load)
        for p in self.points:
            if (p["system"], p["variants"], p["coding"], p["basis"], p["load"]) == wanted:
                return float(p[key]["mean"])
        return None

    def checks(self) -> list[dict[str, Any]]:
        found = []
        for variants, coding in dict.fromkeys((p["variants"], p["coding"]) for p in self.points):
            found += self._turnaround(variants, coding) + self._ttft(variants, coding)
        return found

    def _turnaround(self, variants: int, coding: str) -> list[dict[str, Any]]:
        parts = []
        for load in LOADS:
            ours = self.value(MIXED, variants, coding, SLICES, load, "turnaround")
            theirs = self.value(SLICES, variants, PLAIN, SLICES, load, "turnaround")
            if ours is not None and theirs is not None:
                parts.append(1 - ours / theirs)
        if len(parts) < len(LOADS):
            return []
        less = mean(parts)
        what = f"{variants} variants, {coding}: mean turnaround below that of slices by"
        return [{"what": what, "value": less, "wanted": ">= 0.95", "ok": less >= 0.95}]

    def _ttft(self, variants: int, coding: str) -> list[dict[str, Any]]:
        found = []
        for basis in (SLICES, ALONE):
            ratios = []
            for load in (load for load in (*LOADS, *OWN_LOADS) if load <= 70):
                ours = self.value(MIXED, variants, coding, basis, load, "ttft")
                alone = self.value(ALONE, variants, coding, basis, load, "ttft")
                if ours is not None and alone is not None:
                    ratios.append(ours / alone - 1)
            if ratios:
                what = (
                    f"{variants} variants, {coding}: TTFT above one model alone, loads up to 70% "
                )
                what += f"of what {basis} can, at most"
                value = max(ratios)
                found.append({"what": what, "value": value, "wanted": "<= 0.1", "ok": value <= 0.1})
        return found

    def table(self) -> Table:
        table = Table()
        for column in ("variants", "artifact", "system", "load", "memory"):
            table.add_column(column)
        numbers = ("requests/s", "TTFT ms", "p50", "p99", "turnaround ms", "p50", "p99", "served/s")
        for column in (*numbers, "requests"):
            table.add_column(column, justify="right")
        for p in self.points:
            times = [p[key][part] for key in ("ttft", "turnaround") for part in _PARTS]
            table.add_row(
                str(p["variants"]),
                p["coding"],
                p["system"] + _remark(p),
                f"{p['load']}% of {p['basis']}",
                p["memory"],
                f"{p['rate']:.3g}",
                *(f"{1000 * value:.1f}" for value in times),
                f"{p['requests_per_second']:.3g}",
                str(p["requests"]),
            )
        return table

    def panels(self, variants: int) -> list[curves.Panel]:
        found = []
        for label, key in (("mean turnaround, ms", "turnaround"), ("mean TTFT, ms", "ttft")):
            lines: dict[str, list[tuple[float, float]]] = {}
            for p in self.points:
                if p["variants"] == variants:
                    name = f"{p['system']} ({p['coding']})"
                    lines.setdefault(name, []).append((p["rate"], 1000 * p[key]["mean"]))
            found.append((label, lines))
        return found


_PARTS = ("mean", "p50", "p99")
OVERLOADED = 0.97  # of the arrivals served in their time: the queue grows without end


def _remark(point: Mapping[str, Any]) -> str:
    if point["system"] not in SIMULATED:
        return ""
    overloaded = point["requests_per_second"] < OVERLOADED * point["rate"]
    return " (simulated, overloaded)" if overloaded else " (simulated)"


def show(document: dict[str, Any], out: Path | None) -> None:
    """Tables on the screen; as Markdown and with plots beside the JSON."""
    figures = Figures(document)
    document["checks"] = figures.checks()
    shown = [figures.table(), checks_table(document["checks"])]
    console = Console()
    Console(width=max(console.width, 190)).print(*shown)
    if out is None:
        return
    title = (
        f"{document['shape']}, {document['device']}: Poisson arrivals, {PROMPT_TOKENS} prompt and "
        f"{OUTPUT_TOKENS} output tokens"
    )
    save(document, shown, out, title)
    for variants in sorted({p["variants"] for p in document["points"]}):
        path = out.with_name(f"{out.stem}-{variants}.png")
        subtitle = f"{title}, {variants} variants"
        curves.plot(figures.panels(variants), path, subtitle, x="requests a second")


def arguments() -> argparse.Namespace:
    """The command line."""
    systems = [*SIMULATED, *ENGINES]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="mixtral-8x7b")
    parser.add_argument("--variants", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--coding", nargs="+", default=[PLAIN, PACKED], help="of our artifacts")
    parser.add_argument("--systems", nargs="+", choices=systems, default=systems)
    parser.add_argument("--loads", type=int, nargs="+", default=LOADS, help="%% of slices' most")
    parser.add_argument("--own-loads", type=int, nargs="*", default=OWN_LOADS, help="%% of alone's")
    parser.add_argument("--seconds", type=float, default=10, help="of each engine and rate")
    parser.add_argument("--slice-requests", type=int, default=4, help="timed of each slice")
    parser.add_argument("--burst", type=int, default=BURST, help="requests that show capacity")
    parser.add_argument("--cap", type=float, default=80, help="GB of GPU memory; default: 80")
    parser.add_argument("--device", default="cuda:0", help="cuda:N, or cpu for a dry run")
    parser.add_argument("--out", type=Path, help="figures as JSON, added to those that are there")
    parser.add_argument("--draw", action="store_true", help="measure nothing, show --out again")
    return parser.parse_args()


def started(args: argparse.Namespace) -> dict[str, Any]:
    """The document that is there, or a new one, with what is measured first."""
    if args.out and args.out.is_file():
        document: dict[str, Any] = json.loads(args.out.read_text(encoding="utf-8"))
        if document["shape"] != args.shape:
            raise SystemExit(f"`{args.out}` is of {document['shape']}")
        return document
    device, config = torch.device(args.device), SHAPES[args.shape]
    with tempfile.TemporaryDirectory() as folder:
        artifact = RandomArtifact(config, Path(folder), variants=1)
        row = artifact.row_bytes
        model = artifact.original_bytes + row
    return {
        "machine": machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "shape": args.shape,
        "cap_bytes": int(args.cap * GB),
        "copy_bytes_per_second": copy_bandwidth(device),
        "host_bytes_per_second": host_bandwidth(device),
        "row_bytes": row,
        "model_bytes": model,
        "slices": {},
        "alone": {},
        "points": [],
    }


def main() -> None:
    """Measures system after system; what is measured is kept if a later one fails."""
    args = arguments()
    if args.draw:
        show(json.loads(args.out.read_text(encoding="utf-8")), args.out)
        return
    document = started(args)
    bench = Bench(args, document)
    for variants in args.variants:
        bench.slices(variants)
        jobs: list[tuple[str, str]] = []
        engines = [system for system in ENGINES if system in args.systems]
        jobs += [(system, coding) for coding in args.coding for system in engines]
        jobs += [(system, PLAIN) for system in SIMULATED if system in args.systems]
        for system, coding in jobs:
            key = (variants, coding, system)
            kept = document["points"]
            document["points"] = [
                p for p in kept if (p["variants"], p["coding"], p["system"]) != key
            ]
            errors = document.setdefault("errors", {})
            errors.pop(f"{key}", None)
            start = time.monotonic()
            try:
                if system in ENGINES:
                    bench.engine(system, variants, coding)
                else:
                    bench.simulated(system, variants)
            except (MoeccError, KeyError, RuntimeError) as error:
                bench.console.print(f"{key}: {type(error).__name__}: {error}", soft_wrap=True)
                errors[f"{key}"] = f"{type(error).__name__}: {error}"
            bench.console.print(f"{system}: {time.monotonic() - start:.0f} s")
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    show(document, args.out)


if __name__ == "__main__":
    main()
