"""Time of a reconfiguration: a variant's weights outside the experts, swapped in or resident.

Builds the row of a model of real shape as `moecc.runtime.loading` does, from its transformers
skeleton without experts, fills the rows of a few variants with random bytes, and measures on them,
in turns:

- a plain torch copy of one row from page-locked host memory to the device;
- `Swap.activate` and `wait`: nothing prefetched, and with the row prefetched before;
- `Resident.activate` and `wait`.

No artifact is needed:

    python benchmarks/swap.py --shape mixtral-8x7b --device cuda:0
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from memory import checks_table
from rich.console import Console
from rich.table import Table
from scale import machine
from shapes import SHAPES, expert_layers
from tables import save
from torch import Tensor

from moecc.manifest import StoredLayer
from moecc.recipe import format_size
from moecc.runtime import attention, devices, experts, loading
from moecc.runtime.loading import Skeletons
from moecc.runtime.nonexpert import RowLayout, places
from moecc.runtime.residency import Residency, Resident, Swap

COPY, COLD, PREFETCHED, RESIDENT = (
    "plain pinned copy",
    "swap",
    "swap, prefetched",
    "resident",
)
# Bytes filled at once: random ones are made on the device, which is faster.
BLOCK = 64 << 20
RESIDENT_SECONDS = 0.001  # the bar
GB = 1000**3


@dataclass(frozen=True)
class Timing:
    """Seconds of one way to have another variant: the median of `runs`, and their range."""

    median: float
    least: float
    most: float
    runs: int
    gb_per_second: float | None


def skeletons(config: dict[str, Any], variants: int) -> Skeletons:
    """As `loading.skeletons` makes them of an artifact: models without weights or experts."""
    experts.install()
    attention.install()
    dtype = getattr(torch, config["dtype"])
    models = []
    for variant in range(variants):
        model = loading._skeleton(str(variant), config, dtype)
        for layer in expert_layers(model):
            loading._strip_experts(model, StoredLayer(layer, ()))
        models.append(model)
    tied = dict(getattr(models[0], "all_tied_weights_keys", None) or {})
    tensors = {
        name: (
            loading._planned_dtype(models[0], name, owner[key], dtype),
            tuple(owner[key].shape),
        )
        for name, owner, key in places(models[0])
        if name not in tied
    }
    own = models[0].config._attn_implementation
    return Skeletons(None, tuple(models), dtype, RowLayout(tensors), tied, own)


def fill(rows: Tensor, device: torch.device) -> None:
    """Random bytes, others in every row."""
    generator = torch.Generator(device).manual_seed(0)
    block = torch.empty(min(BLOCK, rows.shape[1]), dtype=torch.uint8, device=device)
    for row in rows:
        for start in range(0, len(row), BLOCK):
            part = row[start : start + BLOCK]
            part.copy_(block.random_(0, 256, generator=generator)[: len(part)])


def check_bytes(built: Skeletons, residency: Residency, host: Tensor) -> None:
    """Every tensor of every activated model is what its row has; SystemExit otherwise."""
    for variant in range(len(host)):
        model = residency.activate(variant)
        residency.wait()
        bound = {name: owner[key] for name, owner, key in places(model)}
        for slot in built.layout.slots.values():
            found = bound[slot.name].detach().reshape(-1).view(torch.uint8)
            wanted = host[variant, slot.offset : slot.offset + slot.nbytes]
            if not torch.equal(found.cpu(), wanted):
                raise SystemExit(f"variant {variant}: `{slot.name}` is not what its row has")


class Bench:
    """The timings, one run of each in turn, so that a slow moment hits all alike."""

    def __init__(self, built: Skeletons, variants: int, device: torch.device) -> None:
        self.device = device
        self.built = built
        self.nbytes = built.layout.nbytes
        self.host = devices.pinned(variants, self.nbytes, device)
        fill(self.host, device)
        self._next = 0

    def run(self, repeats: int) -> dict[str, Timing]:
        """Swap and the plain copy, then resident: the device need not hold the rows of all."""
        swap = Swap(self.built, self.host, self.device)
        target = torch.empty(self.nbytes, dtype=torch.uint8, device=self.device)
        seconds: dict[str, list[float]] = {COPY: [], COLD: [], PREFETCHED: [], RESIDENT: []}
        for number in range(-2, repeats):  # two to warm up
            for name, sample in (
                (COPY, self._copy(target)),
                (COLD, self._activate(swap, prefetched=False)),
                (PREFETCHED, self._activate(swap, prefetched=True)),
            ):
                if number >= 0:
                    seconds[name].append(sample)
        check_bytes(self.built, swap, self.host)
        del swap, target
        resident = Resident(self.built, self.host.to(self.device))
        samples = [self._activate(resident, prefetched=False) for _ in range(2 + 10 * repeats)]
        seconds[RESIDENT] = samples[2:]
        check_bytes(self.built, resident, self.host)
        return {name: self._timing(name, taken) for name, taken in seconds.items()}

    def close(self) -> None:
        if self.device.type == "cuda":
            devices.release(self.device, self.host)

    def _variant(self) -> int:
        """The next one in turn."""
        self._next = (self._next + 1) % len(self.host)
        return self._next

    def _copy(self, target: Tensor) -> float:
        row = self.host[self._variant()]
        return self._timed(lambda: target.copy_(row, non_blocking=True), self._synchronize)

    def _activate(self, residency: Residency, *, prefetched: bool) -> float:
        variant = self._variant()
        while residency.mode == "swap" and residency.is_resident(variant):
            variant = self._variant()
        if prefetched:
            residency.prefetch(variant)
        return self._timed(lambda: residency.activate(variant), residency.wait)

    def _timed(self, work: Callable[[], Any], wait: Callable[[], None]) -> float:
        self._synchronize()
        start = time.perf_counter()
        work()
        wait()
        return time.perf_counter() - start

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _timing(self, name: str, taken: list[float]) -> Timing:
        middle = median(taken)
        rate = self.nbytes / middle / GB if name in (COPY, COLD) else None
        return Timing(middle, min(taken), max(taken), len(taken), rate)


def figures(found: dict[str, Timing], title: str) -> Table:
    """The timings for people."""
    table = Table(title=title)
    table.add_column("")
    for column in ("median ms", "least ms", "most ms", "GB/s", "of the copy's time", "runs"):
        table.add_column(column, justify="right")
    for name, t in found.items():
        times = [f"{1000 * s:.3f}" for s in (t.median, t.least, t.most)]
        rate = "" if t.gb_per_second is None else f"{t.gb_per_second:.1f}"
        ratio = f"{t.median / found[COPY].median:.4f}"
        table.add_row(name, *times, rate, ratio, str(t.runs))
    return table


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="mixtral-8x7b")
    parser.add_argument("--device", default="cuda:0", help="cuda:N, or cpu for a dry run")
    parser.add_argument("--variants", type=int, default=3, help="3 or more; default: 3")
    parser.add_argument("--repeats", type=int, default=30, help="runs of each; default: 30")
    parser.add_argument("--out", type=Path, help="figures as JSON; a .md goes beside it")
    args = parser.parse_args()
    if args.variants < 3:
        parser.error("two variants would both stay on the device")
    return args


def main() -> None:
    """Builds, measures, shows."""
    args = arguments()
    device = torch.device(args.device)
    begin = time.monotonic()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    bench = Bench(skeletons(SHAPES[args.shape], args.variants), args.variants, device)
    try:
        found = bench.run(args.repeats)
    finally:
        bench.close()
    checks = [
        {
            "what": "resident: median activation, ms",
            "value": 1000 * found[RESIDENT].median,
            "wanted": f"< {1000 * RESIDENT_SECONDS:g}",
            "ok": found[RESIDENT].median < RESIDENT_SECONDS,
        }
    ]
    title = f"{args.shape}: {format_size(bench.nbytes)} a variant, {name}"
    shown = [figures(found, title), checks_table(checks)]
    console = Console()
    Console(width=max(console.width, 100)).print(*shown)
    if args.out:
        document = {
            "machine": machine(),
            "device": name,
            "cuda": torch.version.cuda if device.type == "cuda" else None,
            "shape": args.shape,
            "variants": args.variants,
            "row_bytes": bench.nbytes,
            "seconds": {what: asdict(timing) for what, timing in found.items()},
            "swap_of_copy": found[COLD].median / found[COPY].median,
            "run_seconds": time.monotonic() - begin,
            "checks": checks,
        }
        save(document, shown, args.out, title)


if __name__ == "__main__":
    main()
