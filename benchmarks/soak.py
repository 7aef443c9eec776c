"""A server under hostile load for minutes: does it leak, hang, or forget to clean up?

Starts `moecc serve --cpu` on an artifact and has client threads send, at once and at random:
streamed and whole answers of all variants through the official client, clients that vanish in the
middle of a stream (closed, or reset), canceled ones, ones that run out of patience, requests that
end by their own `timeout`, bodies that are too large (413), malformed JSON, unknown models, prompts
that are too long and fields that do not exist. Each must get what it should.

After the warm-up and at the end the clients pause until the server is idle: what it then has of
threads, open files and memory is compared, and it must give the same answers.

    python benchmarks/soak.py ARTIFACT [--minutes 10]
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import random
import socket
import struct
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import linear_regression
from typing import Any

import httpx
import openai
from memory import MB, Server, checks_table, memory
from rich.console import Console
from rich.table import Table
from scale import machine, read_fields
from tables import save

PROMPTS = (
    "Once upon a time",
    "def fibonacci(n):",
    "What is 12 + 30?",
    "The history of the city begins",
    "How do I bake bread?",
    "import os\n\n\nclass Reader:",
    "Tom has 3 apples and buys 4 more.",
    "The",
)
BODY_BYTES = 9 << 20  # one MiB more than a server takes
CALM_SECONDS, IDLE_SECONDS = 15, 120  # threads and sockets that nobody uses go after ten
CLIENTS = 6  # that behave; as many as all kinds of others
KEPT = 20  # failures that are kept in full


class UnexpectedError(Exception):
    """A client got another answer than it should have."""


@dataclass(frozen=True)
class Sample:
    """The server at one moment, `at` seconds after the load began."""

    at: float
    rss: int
    threads: int
    files: int
    running: float
    waiting: float
    kv_usage: float
    ended: int
    loaded: bool


class Clients:
    """Threads that each do one thing after the other until they are stopped."""

    def __init__(self, server: Server, seed: int) -> None:
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.failed = 0
        self._url = server.url
        self._variants = server.variants
        self._go = threading.Event()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        kinds: Sequence[Callable[[openai.OpenAI, random.Random], str]] = (
            *[self._answer] * CLIENTS,
            *(self._vanish, self._reset, self._cancel, self._impatient, self._late),
            *(self._hostile, self._oversized),
        )
        self._busy = 0
        self._idle = threading.Condition(self._lock)
        self._threads = [
            threading.Thread(target=self._loop, args=(kind, random.Random(seed + number)))
            for number, kind in enumerate(kinds)
        ]
        for thread in self._threads:
            thread.start()

    def resume(self) -> None:
        self._go.set()

    def pause(self) -> None:
        """Returns when every client has finished what it was doing."""
        self._go.clear()
        with self._idle:
            self._idle.wait_for(lambda: not self._busy)

    def stop(self) -> None:
        self._stop.set()
        self._go.set()
        for thread in self._threads:
            thread.join()

    def _loop(
        self, kind: Callable[[openai.OpenAI, random.Random], str], rng: random.Random
    ) -> None:
        client = openai.OpenAI(
            base_url=f"{self._url}/v1", api_key="none", max_retries=0, timeout=120
        )
        while self._go.wait() and not self._stop.is_set():
            with self._lock:
                self._busy += 1
            try:
                done, error = kind(client, rng), None
            except Exception as caught:
                done, error = kind.__name__[1:], f"{type(caught).__name__}: {caught}"
            with self._idle:
                self.counts[done] += 1
                if error is not None:
                    self.failed += 1
                    self.failures = [*self.failures, f"{done}: {error}"][:KEPT]
                self._busy -= 1
                self._idle.notify_all()
            # Those that behave are not to drown among the others.
            time.sleep(rng.uniform(0, 0.2) if kind == self._answer else rng.uniform(0.2, 2))
        client.close()

    def _body(self, rng: random.Random, **others: Any) -> dict[str, Any]:
        body = {"model": rng.choice(self._variants), "prompt": rng.choice(PROMPTS) * 3}
        return body | {"max_tokens": rng.randrange(4, 48), "seed": rng.randrange(1000)} | others

    # What clients do; each returns what it has done

    def _answer(self, client: openai.OpenAI, rng: random.Random) -> str:
        """A whole or streamed answer, in one of the forms the API has."""
        body = self._body(rng, temperature=rng.choice([0.0, 0.7, 1.3]))
        chat, streamed = rng.random() < 0.5, rng.random() < 0.5
        create: Any = client.completions.create
        if chat:
            body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
            create = client.chat.completions.create
        if rng.random() < 0.2:
            body |= {"logprobs": True, "top_logprobs": 3} if chat else {"logprobs": 3}
        if rng.random() < 0.2:
            body["n"] = 3
        if rng.random() < 0.2:
            body["stop"] = ["e", "\n"]
        if streamed:
            chunks = list(create(**body, stream=True, stream_options={"include_usage": True}))
            reasons = [c.finish_reason for chunk in chunks for c in chunk.choices]
            usage = chunks[-1].usage
        else:
            whole = create(**body)
            reasons, usage = [c.finish_reason for c in whole.choices], whole.usage
        found = [reason for reason in reasons if reason is not None]
        if len(found) != body.get("n", 1) or not set(found) <= {"stop", "length"}:
            raise UnexpectedError(f"ended by {found}")
        if not 0 < usage.completion_tokens <= body["max_tokens"] * len(found):
            raise UnexpectedError(f"{usage.completion_tokens} tokens of {body['max_tokens']}")
        return f"{'chat' if chat else 'text'}, {'streamed' if streamed else 'whole'}"

    def _vanish(self, client: openai.OpenAI, rng: random.Random) -> str:
        """Closes the connection after some chunks of a long answer."""
        body = self._body(rng, max_tokens=500, stream=True, ignore_eos=True)
        with httpx.stream("POST", f"{self._url}/v1/completions", json=body, timeout=120) as answer:
            _expect(answer.status_code, 200)
            for number, _ in enumerate(answer.iter_lines()):
                if number >= 2 * rng.randrange(8):
                    break
        return "vanished in a stream"

    def _reset(self, client: openai.OpenAI, rng: random.Random) -> str:
        """Sends a request, or half of one, and resets the connection."""
        body = self._body(rng, max_tokens=500, stream=rng.random() < 0.5, ignore_eos=True)
        data = json.dumps(body).encode()
        url = httpx.URL(self._url)
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {url.host}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        half = rng.random() < 0.3
        with socket.create_connection((url.host, url.port), timeout=120) as connection:
            connection.sendall(head.encode() + (data[: len(data) // 2] if half else data))
            time.sleep(rng.uniform(0, 0.5))
            linger = struct.pack("ii", 1, 0)  # closing sends a reset
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        return "reset in a request" if half else "reset in an answer"

    def _cancel(self, client: openai.OpenAI, rng: random.Random) -> str:
        """Cancels a task of the asynchronous client."""

        async def run() -> None:
            async with openai.AsyncOpenAI(
                base_url=f"{self._url}/v1", api_key="none", max_retries=0, timeout=120
            ) as own:
                body = self._body(rng, max_tokens=500)
                task = asyncio.create_task(
                    own.completions.create(**body, extra_body={"ignore_eos": True})
                )
                await asyncio.sleep(rng.uniform(0, 0.5))
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

        asyncio.run(run())
        return "canceled"

    def _impatient(self, client: openai.OpenAI, rng: random.Random) -> str:
        """Waits for less than the answer takes."""
        body = self._body(rng, max_tokens=500, extra_body={"ignore_eos": True})
        try:
            client.completions.create(**body, timeout=rng.uniform(0.01, 0.5))
        except openai.APITimeoutError:
            return "ran out of patience"
        raise UnexpectedError("500 tokens in half a second")

    def _late(self, client: openai.OpenAI, rng: random.Random) -> str:
        """Gives the request itself a timeout."""
        others = {"timeout": rng.uniform(0.01, 0.5), "ignore_eos": True}
        body = self._body(rng, max_tokens=500, extra_body=others)
        try:
            client.completions.create(**body)
        except openai.APIStatusError as error:
            _expect(error.status_code, 408)
            return "timeout of the request"
        raise UnexpectedError("500 tokens in half a second")

    def _hostile(self, client: openai.OpenAI, rng: random.Random) -> str:
        """Something the server must refuse."""
        good = self._body(rng)
        what, content, status = rng.choice(
            [
                ("malformed JSON", b'{"model": "base", "prompt": ', 400),
                ("not an object", b"[1, 2, 3]", 400),
                ("deep JSON", b"[" * 100_000, 400),
                ("unknown model", _bytes(good | {"model": "nobody"}), 404),
                ("unknown field", _bytes(good | {"no_such_field": 1}), 400),
                ("bad value", _bytes(good | {"temperature": "warm"}), 400),
                ("prompt too long", _bytes(good | {"prompt": [5] * 100_000}), 400),
                ("no such token", _bytes(good | {"prompt": [10**9]}), 400),
            ]
        )
        kind = {"Content-Type": "application/json"}
        url = f"{self._url}/v1/completions"
        _expect(httpx.post(url, content=content, headers=kind, timeout=120).status_code, status)
        return what

    def _oversized(self, client: openai.OpenAI, rng: random.Random) -> str:
        """A body that is too large; the server may close before all of it is sent."""
        kind = {"Content-Type": "application/json"}
        url = f"{self._url}/v1/completions"
        body = bytes(BODY_BYTES)
        try:
            answer = httpx.post(url, content=body, headers=kind, timeout=120)
        except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
            return "oversized body, cut"
        _expect(answer.status_code, 413)
        return "oversized body, 413"


def _bytes(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode()


def _expect(status: int, wanted: int) -> None:
    if status != wanted:
        raise UnexpectedError(f"status {status}, not {wanted}")


class Watch:
    """Looks at the server every few seconds, from a thread of its own."""

    def __init__(self, server: Server, every: float) -> None:
        self.samples: list[Sample] = []
        self.loaded = True
        self._server = server
        self._start = time.monotonic()
        self._stop = threading.Event()
        self._every = every
        self._thread = threading.Thread(target=self._loop)

    def now(self) -> Sample:
        """The server at this moment."""
        sums: Counter[str] = Counter()
        usage = 0.0
        for name, _, value in self._server.metrics():
            sums[name] += value  # type: ignore[assignment]
            if name == "moecc_kv_cache_usage_perc":
                usage = max(usage, value)
        pid = self._server.pid
        status = dict(read_fields(f"/proc/{pid}/status"))
        return Sample(
            at=time.monotonic() - self._start,
            rss=memory(pid).rss,
            threads=int(status["Threads"]),
            files=len(os.listdir(f"/proc/{pid}/fd")),
            running=sums["moecc_num_requests_running"],
            waiting=sums["moecc_num_requests_waiting"],
            kv_usage=usage,
            ended=int(sums["moecc_request_success_total"]),
            loaded=self.loaded,
        )

    def idle(self) -> Sample:
        """The server once nothing has changed for a while; as it is if that does not come."""
        self.loaded = False
        end, calm = time.monotonic() + IDLE_SECONDS, time.monotonic()
        before = self.now()
        while time.monotonic() < end and time.monotonic() - calm < CALM_SECONDS:
            time.sleep(1)
            found = self.now()
            if (found.threads, found.files) != (before.threads, before.files) or found.running:
                calm = time.monotonic()
            before = found
        return before

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _loop(self) -> None:
        while not self._stop.wait(self._every):
            self.samples.append(self.now())


def answers(server: Server) -> dict[str, str]:
    """What every variant says to one prompt, greedily."""
    return {
        variant: server.complete(
            model=variant, prompt=PROMPTS[0], max_tokens=24, temperature=0, ignore_eos=True
        )["choices"][0]["text"]
        for variant in server.variants
    }


def soak(server: Server, minutes: float, warm_up: float, every: float, seed: int) -> dict[str, Any]:
    """The whole of it but the end of the server."""
    clients = Clients(server, seed)
    try:
        with Watch(server, every) as watch:
            clients.resume()
            time.sleep(60 * warm_up)
            clients.pause()
            start, said = watch.idle(), answers(server)
            clients.resume()
            watch.loaded = True
            time.sleep(60 * (minutes - warm_up))
            clients.pause()
            end, says = watch.idle(), answers(server)
    finally:
        clients.stop()
    loaded = [s for s in watch.samples if s.loaded and s.at > start.at]
    slope = 0.0
    if len(loaded) > 1:
        slope = linear_regression([s.at / 60 for s in loaded], [s.rss / MB for s in loaded]).slope
    return {
        "samples": [asdict(s) for s in watch.samples],
        "idle_after_warm_up": asdict(start),
        "idle_at_the_end": asdict(end),
        "requests": dict(sorted(clients.counts.items())),
        "failed": clients.failed,
        "failures": clients.failures,
        "same_answers": said == says,
        "rss_mb_per_minute_under_load": slope,
        "rss_mb_idle_growth": (end.rss - start.rss) / MB,
    }


def checks(found: dict[str, Any], exit_code: int) -> list[dict[str, Any]]:
    """Every bar, and whether it holds."""
    start, end = found["idle_after_warm_up"], found["idle_at_the_end"]
    results = []

    def check(what: str, value: Any, wanted: str, ok: bool) -> None:
        results.append({"what": what, "value": value, "wanted": wanted, "ok": ok})

    for what, key in (
        ("requests running at the end", "running"),
        ("requests waiting at the end", "waiting"),
        ("use of the KV cache at the end", "kv_usage"),
    ):
        check(what, end[key], "0", end[key] == 0)
    for what, key in (("threads", "threads"), ("open files", "files")):
        limit = f"<= {start[key]}, as after the warm-up"
        check(f"{what} at the end", end[key], limit, end[key] <= start[key])
    check("clients that got what they should not", found["failed"], "0", not found["failed"])
    check("answers as after the warm-up", found["same_answers"], "True", found["same_answers"])
    check("exit code after SIGTERM", exit_code, "0", exit_code == 0)
    return results


def tables(found: dict[str, Any], results: list[dict[str, Any]]) -> list[Table]:
    """The bars, memory, and who asked, for people."""
    grown = Table()
    for column in ("resident memory", "MB"):
        grown.add_column(column, justify="right" if column == "MB" else "left")
    start, end = found["idle_after_warm_up"], found["idle_at_the_end"]
    grown.add_row("idle after the warm-up", f"{start['rss'] / MB:.0f}")
    grown.add_row("idle at the end", f"{end['rss'] / MB:.0f}")
    slope = found["rss_mb_per_minute_under_load"]
    grown.add_row("slope under load after the warm-up, a minute", f"{slope:+.2f}")
    asked = Table()
    for column in ("requests", "count"):
        asked.add_column(column, justify="right" if column == "count" else "left")
    for name, count in found["requests"].items():
        asked.add_row(name, str(count))
    return [checks_table(results), grown, asked]


def plot(found: dict[str, Any], path: Path, title: str) -> None:
    """Memory, threads and files, and requests over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    samples = found["samples"]
    minutes = [s["at"] / 60 for s in samples]
    figure, axes = pyplot.subplots(3, 1, figsize=(7.5, 7), sharex=True, layout="constrained")
    for axis, label, lines in (
        (axes[0], "resident memory, MB", {"rss": "resident memory"}),
        (axes[1], "threads, open files", {"threads": "threads", "files": "open files"}),
        (axes[2], "requests", {"running": "running", "waiting": "waiting"}),
    ):
        for (key, name), color in zip(lines.items(), ("#1d4ed8", "#c2410c"), strict=False):
            values = [s[key] / (MB if key == "rss" else 1) for s in samples]
            axis.plot(minutes, values, label=name, color=color, marker=".", markersize=4)
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend(loc="upper right", fontsize=8)
    axes[0].axvline(found["idle_after_warm_up"]["at"] / 60, color="gray", linestyle=":")
    axes[0].set_title(title)
    axes[-1].set_xlabel("minutes; idle before the dotted line and at the end")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--minutes", type=float, default=10, help="with the warm-up; default: 10")
    parser.add_argument("--warm-up", type=float, default=1, help="minutes; default: 1")
    parser.add_argument("--every", type=float, default=10, help="seconds a sample; default: 10")
    parser.add_argument("--mode", default="auto", help="of the server; default: auto")
    parser.add_argument("--kv-cache", default="64MiB", help="of the server; default: 64MiB")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON; .md and .png go beside it")
    args = parser.parse_args()
    if not 0 < args.warm_up < args.minutes:
        parser.error("the warm-up must be a part of the minutes")
    return args


def main() -> None:
    """Soaks, stops the server, shows."""
    args = arguments()
    with tempfile.TemporaryDirectory() as temporary:
        options = ["--mode", args.mode, "--kv-cache", args.kv_cache]
        with Server(args.artifact, Path(temporary), *options) as server:
            found = soak(server, args.minutes, args.warm_up, args.every, args.seed)
            begin = time.monotonic()
            exit_code = server.close()
            stopped = time.monotonic() - begin
            tail = server.tail()
    results = checks(found, exit_code)
    shown = tables(found, results)
    console = Console()
    Console(width=max(console.width, 100)).print(*shown)
    for failure in found["failures"]:
        console.print(failure, markup=False)
    if not all(result["ok"] for result in results):
        console.print(tail, markup=False)
    if args.out:
        document = {
            "machine": machine(),
            "minutes": args.minutes,
            "warm_up": args.warm_up,
            "mode": args.mode,
            "kv_cache": args.kv_cache,
            "seconds_to_stop": stopped,
            **found,
            "checks": results,
        }
        save(document, shown, args.out)
        if importlib.util.find_spec("matplotlib"):
            title = f"{args.minutes:g} minutes of requests, {args.artifact.name}"
            plot(found, args.out.with_suffix(".png"), title)
    if not all(result["ok"] for result in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
