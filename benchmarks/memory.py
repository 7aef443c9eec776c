"""Memory of serving: `moecc serve` beside an idle interpreter and beside one model a variant.

Every process is a fresh one, and all are measured in the same run:

- idle: an interpreter that has imported every module a server of this artifact imports (the list
  is taken from one with `-X importtime`) and has answered a request through uvicorn and FastAPI;
- `moecc serve --cpu` in every mode: when it is ready, and after requests to every variant;
- one process with the source checkpoints loaded by transformers, in bfloat16.

    python benchmarks/memory.py ARTIFACT SOURCE SOURCE ... [--synthetic]

`--synthetic` also makes a family of Mixtrals with random weights and larger experts in a temporary
folder (about 3 GB), compiles it to 4bit + 2bit, and measures that.

RSS is resident memory, PSS counts shared pages by part, USS is what no other process has, anonymous
is what no file backs; peak is the highest RSS so far. Memory for keys and values is reserved, and
resident only where it has been written.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from scale import machine, read_fields
from tables import markdown

from moecc.recipe import format_size
from moecc.runtime.loading import CHUNK_BYTES

MODES = "mixed,resident,swap"
MB = 1000**2
# Above an idle interpreter and the artifact's files; loading may have a chunk in flight besides.
ALLOWED = 300 * MB
ALLOWED_LOADING = ALLOWED + CHUNK_BYTES
START_SECONDS, STOP_SECONDS = 600, 60
QUIET_SECONDS = 5  # before a measurement: a server gives memory back when it has nothing to do
MAX_TOKENS, THREADS = 16, 8

# (size of four variants' experts in bfloat16: 4 * 8 layers * 8 experts * 3 * 512 * 2048 * 2 bytes)
SYNTHETIC = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "max_position_embeddings": 1024,
    "num_attention_heads": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 8,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "vocab_size": 4096,
}
SYNTHETIC_VARIANTS = ("base", "chat", "code", "math")
NOISE = 0.002  # of weights that spread by 0.02

IDLE = """
import contextlib, importlib, pathlib, sys, threading, time, urllib.request
imported = 0
for name in pathlib.Path(sys.argv[1]).read_text().split():
    with contextlib.suppress(Exception):  # optional ones that the server did not find either
        importlib.import_module(name)
        imported += 1
import fastapi, uvicorn
app = fastapi.FastAPI()
@app.get("/")
def root():
    return {}
config = uvicorn.Config(app, port=0, lifespan="off", ws="none", log_config=None, access_log=False)
server = uvicorn.Server(config)
threading.Thread(target=server.run, daemon=True).start()
while not server.started:
    time.sleep(0.01)
port = server.servers[0].sockets[0].getsockname()[1]
urllib.request.urlopen(f"http://127.0.0.1:{port}/").read()
print(imported, flush=True)
sys.stdin.readline()
"""
MODELS = """
import json, pathlib, sys, torch, transformers
transformers.utils.logging.disable_progress_bar()
models = []
for path in sys.argv[1:]:
    name = json.loads((pathlib.Path(path) / "config.json").read_text())["architectures"][0]
    cls = getattr(transformers, name)
    models.append(cls.from_pretrained(path, dtype=torch.bfloat16).eval())
print(flush=True)
sys.stdin.readline()
with torch.inference_mode():
    for model in models:
        prompt = torch.arange(1, 65)[None]
        model.generate(prompt, max_new_tokens=16, min_new_tokens=16, do_sample=False)
print(flush=True)
sys.stdin.readline()
"""


@dataclass(frozen=True)
class Memory:
    """Bytes of a process; `peak` is the highest `rss` so far."""

    rss: int
    pss: int
    uss: int
    anonymous: int
    peak: int


def memory(pid: int) -> Memory:
    """What a process has now."""
    rollup = dict(read_fields(f"/proc/{pid}/smaps_rollup"))
    rollup |= dict(read_fields(f"/proc/{pid}/status"))

    def size(*names: str) -> int:
        return sum(int(rollup[name].split()[0]) for name in names) * 1024

    own = size("Private_Clean", "Private_Dirty")
    return Memory(size("Rss"), size("Pss"), own, size("Anonymous"), size("VmHWM"))


class Server:
    """`moecc serve --cpu` in a process of its own, on a free port of 127.0.0.1; SystemExit if it
    does not start.

    Attributes:
        url: without a slash at its end.
        pid: of the process.
        variants: the models it serves.
    """

    def __init__(
        self, artifact: Path, folder: Path, *options: str, python: Sequence[str] = ()
    ) -> None:
        """`folder` gets its log; `python` are options of the interpreter."""
        self.log = folder / f"serve-{len(list(folder.glob('serve-*')))}.log"
        command = [sys.executable, *python, "-m", "moecc", "serve", str(artifact), "--cpu"]
        command += ["--host", "127.0.0.1", "--port", "0", *options]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        self.pid = self._process.pid
        try:
            self.url = self._ready()
        except BaseException:
            self.close()
            raise
        self.variants = [str(model["id"]) for model in self.get("/v1/models")["data"]]

    def _ready(self) -> str:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            found = re.search(r"ready at (http://\S+)", self.log.read_text(errors="replace"))
            if found:
                return found[1]
            if self._process.poll() is not None:
                break
            time.sleep(0.1)
        raise SystemExit(f"moecc serve did not start:\n{self.tail()}")

    def tail(self) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])

    def get(self, path: str) -> Any:
        """The JSON at a path."""
        with urllib.request.urlopen(self.url + path, timeout=60) as response:
            return json.loads(response.read())

    def complete(self, **body: Any) -> Any:
        """The answer of /v1/completions."""
        request = urllib.request.Request(
            f"{self.url}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=600) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            raise SystemExit(f"status {error.code}: {error.read().decode()}") from None

    def metrics(self) -> list[tuple[str, dict[str, str], float]]:
        """(name, labels, value) of every sample of /metrics under moecc's own name."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as response:
            lines = response.read().decode().splitlines()
        found = []
        for line in lines:
            match = re.fullmatch(r"(moecc_\w+)(?:\{(.*)\})? (\S+)", line)
            if match:
                labels = dict(re.findall(r'(\w+)="([^"]*)"', match[2] or ""))
                found.append((match[1], labels, float(match[3])))
        return found

    def close(self) -> int:
        """Sends SIGTERM, and SIGKILL to one that does not end; its exit code."""
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def checks_table(results: Sequence[dict[str, Any]]) -> Table:
    """What was measured against what is wanted."""
    table = Table()
    for column in ("bar", "measured", "wanted", ""):
        table.add_column(column, justify="left" if column == "bar" else "right")
    for r in results:
        value = f"{r['value']:.4g}" if isinstance(r["value"], float) else str(r["value"])
        table.add_row(r["what"], value, r["wanted"], "ok" if r["ok"] else "MISSED")
    return table


@contextmanager
def child(script: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process that prints a line when it can be measured and reads one to go on."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", script, *arguments]
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
    try:
        yield process
    finally:
        assert process.stdin is not None, "it is a pipe"
        with suppress(OSError):
            process.stdin.close()
        process.wait(STOP_SECONDS)


def at_line(process: subprocess.Popen[str]) -> tuple[Memory, str]:
    """Memory at the process's next line, and the line; SystemExit if it ended."""
    assert process.stdout is not None, "it is a pipe"
    line = process.stdout.readline()
    if not line:
        raise SystemExit("a measured process failed")
    time.sleep(QUIET_SECONDS)
    return memory(process.pid), line.strip()


class Bench:
    """The measurements of one family."""

    def __init__(
        self, artifact: Path, sources: Sequence[Path], kv_cache: str, requests: int, folder: Path
    ) -> None:
        self.artifact = artifact
        self.sources = sources
        self.requests = requests
        self.folder = folder
        self.options = ["--kv-cache", kv_cache]
        config = json.loads((sources[0] / "config.json").read_text())
        self.vocab = int(config.get("vocab_size") or config["text_config"]["vocab_size"])

    def idle(self) -> tuple[Memory, int]:
        """An interpreter with all that a server imports, and how many modules that is."""
        server = Server(self.artifact, self.folder, *self.options, python=["-X", "importtime"])
        with server:
            self.use(server, 1)
        lines = server.log.read_text(errors="replace").splitlines()
        names = [line.split("|")[2].strip() for line in lines if line.startswith("import time:")]
        names = [n for n in names if n.isascii() and " " not in n and not n.endswith("__main__")]
        path = self.folder / "modules.txt"
        path.write_text("\n".join(dict.fromkeys(names)))
        with child(IDLE, str(path)) as process:
            found, imported = at_line(process)
        return found, int(imported)

    def serve(self, mode: str) -> tuple[dict[str, Memory], dict[str, int]]:
        """A server when it is ready and after requests; what it says it has on the device."""
        with Server(self.artifact, self.folder, *self.options, "--mode", mode) as server:
            served = server.get("/api/state").get("mode", mode)
            if served != mode:
                raise SystemExit(f"asked for {mode}, got {served}:\n{server.tail()}")
            time.sleep(QUIET_SECONDS)
            ready = memory(server.pid)
            self.use(server, self.requests)
            time.sleep(QUIET_SECONDS)
            used = memory(server.pid)
            says = {
                labels["kind"]: int(value)
                for name, labels, value in server.metrics()
                if name == "moecc_gpu_memory_bytes"
            }
        return {"ready": ready, "after requests": used}, says

    def use(self, server: Server, count: int) -> None:
        """`count` requests of random tokens to every variant, all mixed."""
        rng = random.Random(0)
        bodies = [
            {
                "model": variant,
                "prompt": [rng.randrange(self.vocab) for _ in range(rng.randrange(16, 128))],
                "max_tokens": MAX_TOKENS,
                "ignore_eos": True,
            }
            for _ in range(count)
            for variant in server.variants
        ]
        with ThreadPoolExecutor(THREADS) as pool:
            answers = list(pool.map(lambda body: server.complete(**body), bodies))
        assert all(a["usage"]["completion_tokens"] == MAX_TOKENS for a in answers)

    def models(self) -> dict[str, Memory]:
        """One process with every source loaded by transformers."""
        with child(MODELS, *map(str, self.sources)) as process:
            ready, _ = at_line(process)
            assert process.stdin is not None, "it is a pipe"
            process.stdin.write("\n")
            process.stdin.flush()
            used, _ = at_line(process)
        return {"ready": ready, "after a request each": used}


def stored(artifact: Path, sources: Sequence[Path]) -> dict[str, int]:
    """Bytes on disk: of the artifact, of its expert and other tensors, of the sources' weights."""

    def tensors(path: Path) -> int:
        with path.open("rb") as file:
            return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")

    shards = [f for source in sources for f in source.glob("*.safetensors")]
    return {
        "artifact": sum(f.stat().st_size for f in artifact.rglob("*") if f.is_file()),
        "experts": sum(map(tensors, artifact.glob("experts-*.safetensors"))),
        "non_expert": sum(map(tensors, artifact.glob("variants/*/non-expert.safetensors"))),
        "sources": sum(map(tensors, shards)),
    }


def measure(bench: Bench, modes: Sequence[str]) -> dict[str, Any]:
    """One family: bytes on disk, memory of every process, the bars."""
    disk = stored(bench.artifact, bench.sources)
    idle, modules = bench.idle()
    found = {"idle": idle}
    says: dict[str, dict[str, int]] = {}
    for mode in modes:
        samples, says[mode] = bench.serve(mode)
        found |= {f"moecc serve, {mode}, {when}": m for when, m in samples.items()}
    count = len(bench.sources)
    found |= {f"{count} models, transformers, {w}": m for w, m in bench.models().items()}
    return {
        "imported_modules": modules,
        "bytes_on_disk": disk,
        "bytes_in_memory": says,
        "processes": {name: asdict(m) for name, m in found.items()},
        "checks": checks(found, disk, says),
    }


def checks(
    found: dict[str, Memory], disk: dict[str, int], says: dict[str, dict[str, int]]
) -> list[dict[str, Any]]:
    """Every bar: the memory of a server, its peak while loading, and the size of the bank in it."""
    results = []
    idle = found["idle"]
    for mode, kinds in says.items():
        ready = found[f"moecc serve, {mode}, ready"]
        used = found[f"moecc serve, {mode}, after requests"]
        above = idle.rss + disk["artifact"]
        for what, extra, allowed in (
            ("RSS after requests", used.rss - above, ALLOWED),
            ("peak RSS while loading", ready.peak - above, ALLOWED_LOADING),
        ):
            name, wanted = f"{mode}: {what}, above idle and artifact, MB", f"<= {allowed / MB:.0f}"
            results.append(
                {"what": name, "value": extra / MB, "wanted": wanted, "ok": extra <= allowed}
            )
        name, same = f"{mode}: experts in memory, bytes", kinds["experts"] == disk["experts"]
        value, packed = kinds["experts"], f"{disk['experts']}, as on disk"
        results.append({"what": name, "value": value, "wanted": packed, "ok": same})
    return results


def tables(family: str, result: dict[str, Any]) -> list[Table]:
    """The results of one family for people."""
    sizes = Table(title=f"{family}: bytes")
    for column in ("", "files", *result["bytes_in_memory"]):
        sizes.add_column(column, justify="right" if column else "left")
    disk, says = result["bytes_on_disk"], result["bytes_in_memory"].values()
    for name, kind, file in (
        ("experts, packed", "experts", disk["experts"]),
        ("outside the experts", "non_expert", disk["non_expert"]),
        ("keys and values, reserved", "kv", None),
        ("the whole artifact", None, disk["artifact"]),
        ("the sources", None, disk["sources"]),
    ):
        cells = ["" if kind is None else format_size(kinds[kind]) for kinds in says]
        sizes.add_row(name, "" if file is None else format_size(file), *cells)
    shown = Table(title=f"{family}: memory")
    for column in ("", "RSS", "PSS", "USS", "anonymous", "peak RSS", "RSS above idle"):
        shown.add_column(column, justify="right" if column else "left")
    idle = result["processes"]["idle"]["rss"]
    for name, m in result["processes"].items():
        cells = [format_size(m[k]) for k in ("rss", "pss", "uss", "anonymous", "peak")]
        shown.add_row(name, *cells, "" if name == "idle" else format_size(max(0, m["rss"] - idle)))
    return [sizes, shown, checks_table(result["checks"])]


def synthesize(folder: Path) -> tuple[Path, list[Path]]:
    """A family of Mixtrals with random weights, and its artifact."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    words = {f"<{number}>": number for number in range(SYNTHETIC["vocab_size"])}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "<0>")))
    torch.manual_seed(0)
    config = MixtralConfig(**SYNTHETIC, bos_token_id=0, eos_token_id=1, dtype="bfloat16")
    model = MixtralForCausalLM(config).to(torch.bfloat16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for variant in SYNTHETIC_VARIANTS:
        if variant != SYNTHETIC_VARIANTS[0]:
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape) * NOISE
                parameter.data = (before[name].float() + noise).to(torch.bfloat16)
        model.save_pretrained(folder / variant)
        tokenizer.save_pretrained(folder / variant)
    sources = {name: {"source": str(folder / name)} for name in SYNTHETIC_VARIANTS}
    recipe = {
        "version": 1,
        "base": SYNTHETIC_VARIANTS[0],
        "variants": sources,
        "merge": {"center": "4bit", "residual": "2bit", "group": 64},
        "budget": "0.84x",
    }
    path, out = folder / "recipe.yaml", folder / "artifact"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    command = [sys.executable, "-m", "moecc", "consolidate", str(path), "--out", str(out)]
    subprocess.run([*command, "--quiet"], check=True, stdout=subprocess.DEVNULL)
    return out, [folder / name for name in SYNTHETIC_VARIANTS]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("artifact", type=Path, nargs="?")
    parser.add_argument("sources", type=Path, nargs="*", help="the checkpoints it was made of")
    parser.add_argument("--synthetic", action="store_true", help="measure a larger family, too")
    parser.add_argument("--modes", default=MODES, help=f"comma-separated; default: {MODES}")
    parser.add_argument("--kv-cache", default="64MiB", help="of every server; default: 64MiB")
    parser.add_argument("--requests", type=int, default=8, help="to every variant; default: 8")
    parser.add_argument("--out", type=Path, help="figures as JSON; a .md goes beside it")
    args = parser.parse_args()
    if args.artifact is None and not args.synthetic:
        parser.error("give ARTIFACT and its sources, or --synthetic")
    if args.artifact is not None and not args.sources:
        parser.error("give the sources of ARTIFACT")
    return args


def main() -> None:
    """Measures every family and writes tables and JSON."""
    args = arguments()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["MOECC_CACHE"] = str(folder / "cache")
        os.environ["HF_HUB_OFFLINE"] = "1"

        def run(family: str, artifact: Path, sources: Sequence[Path]) -> None:
            bench = Bench(artifact, sources, args.kv_cache, args.requests, folder)
            found[family] = measure(bench, args.modes.split(","))

        if args.artifact is not None:
            run(args.artifact.name, args.artifact.resolve(), [s.resolve() for s in args.sources])
        if args.synthetic:
            run("synthetic", *synthesize(folder))
    shown = {family: tables(family, result) for family, result in found.items()}
    console = Console()
    for parts in shown.values():
        Console(width=max(console.width, 120)).print(*parts)
    if args.out:
        document = {
            "machine": machine(),
            "requests_to_each_variant": args.requests,
            "kv_cache": args.kv_cache,
            "families": found,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        texts = [
            f"{family}, {len(result['bytes_in_memory'])} modes:\n\n"
            + "\n".join(map(markdown, shown[family]))
            for family, result in found.items()
        ]
        args.out.with_suffix(".md").write_text("\n".join(texts), encoding="utf-8")
    if not all(check["ok"] for result in found.values() for check in result["checks"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
