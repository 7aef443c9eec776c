"""Speed and memory of `consolidate` on experts of real size.

Writes a synthetic pair of variants with the layout and shapes of Mixtral 8x7B (one layer each by
default, 5.9 GB in all), then measures on it, each from a cold page cache:

- a plain copy: one thread reads, hashes (SHA-256), writes and syncs all source bytes;
- `moecc consolidate` to a 16-bit mean, and to 4-bit centers with 2-bit residuals;
- mergekit's linear merge of the same pair, where its interpreter is given.

    python benchmarks/scale.py --out WORKDIR [--mergekit PYTHON]
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import math
import mmap
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tables import save

from moecc.recipe import format_size
from moecc.tensorfile import build_header

HIDDEN, INTERMEDIATE, EXPERTS, VOCAB = 4096, 14336, 8, 512
SPREAD, NOISE = 0.02, 0.0006  # of the weights, and of what fine-tuning changed in them
BLOCK = 8 << 20
VARIANTS = ("base", "tuned")
INDEX = "model.safetensors.index.json"
RECIPES = {
    "moecc mean 16bit": {"merge": {"center": "16bit", "residual": "none"}, "budget": "1.0x"},
    "moecc 4bit+2bit": {"merge": {"center": "4bit", "residual": "2bit"}, "budget": "0.55x"},
}
MEAN, CODED = RECIPES
COPY, INTERPRETER, MERGEKIT = "copy + SHA-256", "import torch", "mergekit linear"
GNU_TIME = Path("/usr/bin/time")
# What GNU time does, for systems without it: a small process between us and the measured one,
# because a child's peak starts at the memory of the process it was forked from.
TIME = """
import os, sys, time
start = time.monotonic()
pid = os.posix_spawn(sys.argv[2], sys.argv[2:], os.environ)
_, status, usage = os.wait4(pid, 0)
with open(sys.argv[1], "w") as file:
    print(time.monotonic() - start, usage.ru_maxrss, file=file)
sys.exit(os.waitstatus_to_exitcode(status))
"""
GB = 1000**3


@dataclass(frozen=True)
class Sample:
    """One run of one process: wall time, and bytes of memory at their peak.

    Attributes:
        flush: seconds it then took to bring to the disk what the process had not synced.
        rss: resident, pages of mapped files included.
        anonymous: what cannot be dropped and read again, sampled every 50 ms.
        cold: whether no page of the sources was cached when it started.
        load: the machine's load average over a minute at that time.
    """

    seconds: float
    flush: float
    rss: int
    anonymous: int
    cold: bool
    load: float


def tensor_shapes(layer: int | None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one layer, or of what is outside the layers."""
    if layer is None:
        ends = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN)}
        return {**ends, "model.norm.weight": (HIDDEN,)}
    prefix = f"model.layers.{layer}"
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}.input_layernorm.weight": (HIDDEN,),
        f"{prefix}.post_attention_layernorm.weight": (HIDDEN,),
        f"{prefix}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        f"{prefix}.self_attn.k_proj.weight": (HIDDEN // 4, HIDDEN),
        f"{prefix}.self_attn.v_proj.weight": (HIDDEN // 4, HIDDEN),
        f"{prefix}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        f"{prefix}.block_sparse_moe.gate.weight": (EXPERTS, HIDDEN),
    }
    for expert in range(EXPERTS):
        name = f"{prefix}.block_sparse_moe.experts.{expert}"
        shapes[f"{name}.w1.weight"] = shapes[f"{name}.w3.weight"] = (INTERMEDIATE, HIDDEN)
        shapes[f"{name}.w2.weight"] = (HIDDEN, INTERMEDIATE)
    return shapes


def config(layers: int) -> dict[str, Any]:
    """The config.json of both variants."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "num_local_experts": EXPERTS,
        "tie_word_embeddings": False,
        "vocab_size": VOCAB,
    }


def write_pair(folder: Path, layers: int) -> list[Path]:
    """Writes both variants tensor by tensor, one layer a shard; a finished pair is kept."""
    folders = [folder / name for name in VARIANTS]
    if all((variant / INDEX).is_file() for variant in folders):
        return folders
    parts = [tensor_shapes(layer) for layer in (*range(layers), None)]
    weight_map: dict[str, str] = {}
    for variant in folders:
        variant.mkdir(parents=True, exist_ok=True)
        (variant / "config.json").write_text(json.dumps(config(layers), indent=1))
    for number, shapes in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        write_shards([variant / file for variant in folders], shapes)
        weight_map |= dict.fromkeys(shapes, file)
    total = 2 * sum(math.prod(shape) for shapes in parts for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    for variant in folders:
        (variant / INDEX).write_text(json.dumps(index, indent=1))
    return folders


def write_shards(paths: Sequence[Path], shapes: dict[str, tuple[int, ...]]) -> None:
    """One shard of each variant: normal weights seeded by their name, then a little noise."""
    header, infos = build_header([(name, "BF16", shape) for name, shape in shapes.items()])
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("wb")) for path in paths]
        for file in files:
            file.write(header)
        for name in sorted(infos, key=lambda name: infos[name].offset):
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            weight = torch.randn(shapes[name], generator=generator).mul_(SPREAD)
            noise = torch.randn(shapes[name], generator=generator).mul_(NOISE)
            for file, values in zip(files, (weight, weight + noise), strict=True):
                file.write(values.bfloat16().view(torch.uint8).numpy())


def evict(files: Sequence[Path]) -> bool:
    """Drops the files' pages from the page cache; whether none is left.

    The whole cache is dropped only where advice did not help: others may be using it.
    """
    os.sync()
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if any(map(cached_pages, files)):
        with suppress(OSError):
            Path("/proc/sys/vm/drop_caches").write_text("3\n")
    return not any(map(cached_pages, files))


def cached_pages(path: Path) -> int:
    """How many of a file's pages are in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        start = ctypes.c_char.from_buffer(mapped)
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        size = ctypes.c_size_t(len(mapped))
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), size, pages)
        del start  # a mapping with a pointer into it cannot be closed
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return sum(page & 1 for page in pages)


def copy(sources: Sequence[Path], target: Path) -> None:
    """The baseline: reads, hashes, writes and syncs every byte in one thread."""
    target.mkdir()
    buffer = memoryview(bytearray(BLOCK))
    digest = hashlib.sha256()
    for number, source in enumerate(sources):
        with source.open("rb", buffering=0) as old, (target / f"{number}").open("wb", 0) as new:
            while size := old.readinto(buffer):
                digest.update(buffer[:size])
                new.write(buffer[:size])
            os.fsync(new.fileno())


def flush(folder: Path) -> float:
    """Syncs every file in a folder; seconds taken."""
    start = time.monotonic()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    return time.monotonic() - start


def measure_process(
    command: Sequence[str], folder: Path, environment: dict[str, str]
) -> tuple[float, int, int]:
    """Wall seconds, peak resident and peak anonymous bytes of a process; raises if it fails."""
    report, log = folder / "time.txt", folder / "log.txt"
    if GNU_TIME.is_file():
        wrapper = [str(GNU_TIME), "--format", "%e %M", "--output", str(report), "--"]
    else:
        wrapper = [sys.executable, "-S", "-c", TIME, str(report)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*wrapper, *command], stdout=output, stderr=output, env={**os.environ, **environment}
        )
        anonymous = 0
        while process.poll() is None:
            anonymous = max(anonymous, anonymous_bytes(process.pid))
            time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text()}")
    seconds, kilobytes = report.read_text().split()
    return float(seconds), int(kilobytes) * 1024, anonymous


def anonymous_bytes(wrapper: int) -> int:
    """Memory of a wrapper's child that no file backs, now; 0 when it has gone."""
    with suppress(OSError, LookupError):
        child = Path(f"/proc/{wrapper}/task/{wrapper}/children").read_text().split()[0]
        return int(dict(read_fields(f"/proc/{child}/status"))["RssAnon"].split()[0]) * 1024
    return 0


class Bench:
    """The measurements, each of a fresh process on cold sources."""

    def __init__(self, work: Path, variants: Sequence[Path]) -> None:
        self.work = work
        self.variants = variants
        self.shards = sorted(f for v in variants for f in v.glob("*.safetensors"))
        self.source_bytes = sum(f.stat().st_size for f in self.shards)

    def copy(self) -> Sample:
        """The plain copy, in this process; its memory is not measured."""

        def run(folder: Path) -> tuple[float, int, int]:
            start = time.monotonic()
            copy(self.shards, folder / "copy")
            return time.monotonic() - start, 0, 0

        return self._sample(run)

    def interpreter(self) -> Sample:
        """What Python and torch take before anything is done."""
        command = [sys.executable, "-c", "import torch"]
        return self._sample(lambda folder: measure_process(command, folder, {}))

    def moecc(self, recipe: dict[str, Any]) -> Sample:
        """`moecc consolidate`, with nothing measured before."""

        def run(folder: Path) -> tuple[float, int, int]:
            sources = {v.name: {"source": str(v)} for v in self.variants}
            document = {"version": 1, "base": VARIANTS[0], "variants": sources, **recipe}
            path = folder / "recipe.yaml"
            path.write_text(json.dumps(document))  # JSON is YAML
            command = [sys.executable, "-m", "moecc", "consolidate", str(path), "--quiet"]
            command += ["--out", str(folder / "artifact")]
            return measure_process(command, folder, {"MOECC_CACHE": str(folder / "cache")})

        return self._sample(run)

    def mergekit(self, python: Path) -> Sample:
        """mergekit's linear merge with its default options."""

        def run(folder: Path) -> tuple[float, int, int]:
            models = [{"model": str(v), "parameters": {"weight": 0.5}} for v in self.variants]
            path = folder / "merge.yaml"
            document = {"merge_method": "linear", "dtype": "bfloat16", "models": models}
            path.write_text(json.dumps(document))
            command = [str(python.with_name("mergekit-yaml")), str(path), str(folder / "merged")]
            command += ["--no-copy-tokenizer", "--quiet"]
            return measure_process(command, folder, {"HF_HUB_OFFLINE": "1"})

        return self._sample(run)

    def _sample(self, run: Callable[[Path], tuple[float, int, int]]) -> Sample:
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            cold = evict(self.shards)
            load = os.getloadavg()[0]
            seconds, rss, anonymous = run(Path(folder))
            return Sample(seconds, flush(Path(folder)), rss, anonymous, cold, load)


def checks(found: dict[str, Sample]) -> list[dict[str, Any]]:
    """Every bar: what was measured, and the floor or ceiling it is held to."""
    results: list[dict[str, Any]] = []

    def check(what: str, value: float, *, floor: float = 0.0, ceiling: float = math.inf) -> None:
        limit = {"floor": floor} if ceiling == math.inf else {"ceiling": ceiling}
        results.append({"what": what, "value": value, **limit, "ok": floor <= value < ceiling})

    for name, floor in ((MEAN, 0.5), (CODED, 0.2)):
        above = (found[name].rss - found[INTERPRETER].rss) / GB
        check(f"{name}: memory above the interpreter, GB", above, ceiling=1.0)
        speed = found[COPY].seconds / found[name].seconds
        check(f"{name}: speed relative to the copy", speed, floor=floor)
    if MERGEKIT in found:
        mergekit, mean = found[MERGEKIT], found[MEAN]
        check("speed relative to mergekit", mergekit.seconds / mean.seconds, floor=2.0)
        check("memory relative to mergekit", mean.rss / mergekit.rss, ceiling=0.5)
        anonymous = mean.anonymous / mergekit.anonymous
        check("memory relative to mergekit, without mapped files", anonymous, ceiling=0.5)
    return results


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = [f for f in read_fields("/proc/cpuinfo") if f[0] == "model name"]
    memory = dict(read_fields("/proc/meminfo"))["MemTotal"]
    return {
        "cpu": cpu[0][1] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": int(memory.split()[0]) * 1024,
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def read_fields(path: str) -> Iterator[tuple[str, str]]:
    """`name : value` of each line of a file in /proc."""
    for line in Path(path).read_text().splitlines():
        name, colon, value = line.partition(":")
        if colon:
            yield name.strip(), value.strip()


def figures(found: dict[str, Sample], nbytes: int) -> Table:
    """Time and memory of every contender."""
    table = Table(title=f"{format_size(nbytes)} of sources, cold")
    table.add_column("")
    for column in ("seconds", "to disk", "GB/s", "of the copy", "peak memory", "without files"):
        table.add_column(column, justify="right")
    for name, s in found.items():
        row = [f"{s.seconds:.1f}", "", "", "", *map(format_size, (s.rss, s.anonymous))]
        if name != INTERPRETER:
            speed = nbytes / s.seconds / GB
            row[1:4] = f"+{s.flush:.1f}", f"{speed:.2f}", f"{found[COPY].seconds / s.seconds:.2f}"
        if name == COPY:
            row[4:] = "", ""
        table.add_row(name, *row)
    return table


def bars(results: Sequence[dict[str, Any]]) -> Table:
    """What was measured against what is wanted."""
    table = Table()
    for column in ("bar", "measured", "wanted", ""):
        table.add_column(column, justify="left" if column == "bar" else "right")
    for r in results:
        wanted = f">= {r['floor']:g}" if "floor" in r else f"< {r['ceiling']:g}"
        table.add_row(r["what"], f"{r['value']:.2f}", wanted, "ok" if r["ok"] else "MISSED")
    return table


def middle(samples: Sequence[Sample]) -> Sample:
    """The median of each figure; cold only if every run was."""
    return Sample(
        seconds=median(s.seconds for s in samples),
        flush=median(s.flush for s in samples),
        rss=int(median(s.rss for s in samples)),
        anonymous=int(median(s.anonymous for s in samples)),
        cold=all(s.cold for s in samples),
        load=median(s.load for s in samples),
    )


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to work in: 20 GB free")
    parser.add_argument("--json", type=Path, help="figures as JSON; a .md goes beside it")
    parser.add_argument("--layers", type=int, default=1, help="2.9 GB a variant each; default: 1")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each; medians are shown")
    parser.add_argument("--mergekit", type=Path, help="the interpreter mergekit is installed for")
    parser.add_argument("--keep", action="store_true", help="keep the pair for another run")
    return parser.parse_args()


def main() -> None:
    """Writes the pair, measures, shows, cleans up."""
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    pair = args.out.resolve() / f"pair-{args.layers}"
    try:
        bench = Bench(args.out.resolve(), write_pair(pair, args.layers))
        runs: dict[str, Callable[[], Sample]] = {COPY: bench.copy, INTERPRETER: bench.interpreter}
        for name, recipe in RECIPES.items():
            runs[name] = lambda recipe=recipe: bench.moecc(recipe)
        if args.mergekit:
            runs[MERGEKIT] = lambda: bench.mergekit(args.mergekit)
        samples: dict[str, list[Sample]] = {name: [] for name in runs}
        # In turns, so that a slow minute of the machine hits every contender alike.
        for _ in range(args.repeat):
            for name, run in runs.items():
                samples[name].append(run())
    finally:
        if not args.keep:
            shutil.rmtree(pair, ignore_errors=True)
    found = {name: middle(taken) for name, taken in samples.items()}
    results = checks(found)
    shown = [figures(found, bench.source_bytes), bars(results)]
    console = Console()
    Console(width=max(console.width, 100)).print(*shown)
    if args.json:
        document = {
            "machine": machine(),
            "source_bytes": bench.source_bytes,
            "layers": args.layers,
            "median": {name: asdict(sample) for name, sample in found.items()},
            "samples": {name: [asdict(s) for s in taken] for name, taken in samples.items()},
            "checks": results,
        }
        save(document, shown, args.json)


if __name__ == "__main__":
    main()
