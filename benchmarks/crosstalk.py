"""Do requests of several variants, served together, disturb each other?

Sends the same requests twice, through the official client. Together: from 8 threads to one server,
all variants interleaved at random, streamed and whole, greedy and sampled with seeds. Alone: one
after the other, variant by variant, to a second server that runs one request at a time
(`--max-num-seqs 1`, resident). Text, tokens and reasons must be equal, in float32: a batch adds up
in another order, and 16 bits would show it.

For a difference it says where it begins and how near the tie was (see `nearness`).

    python benchmarks/crosstalk.py ARTIFACT [--requests 500]

Exits with 1 on any difference.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import openai
import torch
from memory import MODES, Server
from rich.console import Console
from rich.table import Table
from scale import machine
from tables import save
from transformers import AutoTokenizer
from transformers.utils import logging

from moecc.artifact import Artifact
from moecc.export import load_model
from moecc.manifest import variant_folder
from moecc.runtime import sampling
from moecc.runtime.request import Sampling
from moecc.runtime.sampling import Choice

THREADS = 8
WORDS = (
    "the def return apples number city music why class import river because total answer list"
    " night question three for in and of a green value king add money teacher long"
)
SAMPLED: tuple[dict[str, Any], ...] = (
    {"temperature": 0.7},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.3, "extra_body": {"top_k": 40}},
    {"temperature": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    {"temperature": 1.0, "extra_body": {"min_p": 0.05, "repetition_penalty": 1.2}},
)
TOP = 5
TIE = 1e-4  # a gap that rounding alone explains


@dataclass(frozen=True)
class Ask:
    """One request: what is sent, and how."""

    variant: str
    chat: bool
    stream: bool
    logprobs: bool
    body: dict[str, Any]

    @property
    def kind(self) -> str:
        form = "chat" if self.chat else "text"
        how = "sampled" if "seed" in self.body else "greedy"
        return f"{form}, {'streamed' if self.stream else 'whole'}, {how}"


@dataclass(frozen=True)
class Reply:
    """What came back; `tokens` only where log probabilities were asked for.

    Attributes:
        tokens: (text, log probability, the likeliest tokens and theirs).
    """

    text: str
    reason: str
    count: int
    tokens: tuple[tuple[str, float, dict[str, float]], ...]

    @property
    def same(self) -> tuple[Any, ...]:
        """What must be equal."""
        return self.text, self.reason, self.count, [text for text, _, _ in self.tokens]


def asks(variants: Sequence[str], count: int, max_tokens: int, seed: int) -> list[Ask]:
    """Random requests, in a random order."""
    rng = random.Random(seed)
    found = []
    for number in range(count):
        chat, stream = rng.random() < 0.5, rng.random() < 0.5
        logprobs = rng.random() < 0.5
        text = " ".join(rng.choices(WORDS.split(), k=rng.randrange(1, 40)))
        body: dict[str, Any] = {"max_tokens": rng.randrange(4, max_tokens + 1)}
        body |= {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        if rng.random() < 0.5:
            body["temperature"] = 0
        else:
            body |= {**rng.choice(SAMPLED), "seed": rng.randrange(2**31)}
        found.append(Ask(variants[number % len(variants)], chat, stream, logprobs, body))
    rng.shuffle(found)
    return found


def send(client: openai.OpenAI, ask: Ask, *, logprobs: bool = False) -> Reply:
    """The reply to a request; `logprobs` asks for them where the request does not."""
    body = {"model": ask.variant, **ask.body}
    if ask.logprobs or logprobs:
        body |= {"logprobs": True, "top_logprobs": TOP} if ask.chat else {"logprobs": TOP}
    create: Any = client.chat.completions.create if ask.chat else client.completions.create
    if ask.stream:
        chunks = list(create(**body, stream=True, stream_options={"include_usage": True}))
        usage = chunks[-1].usage
    else:
        chunks = [create(**body)]
        usage = chunks[0].usage
    text, reason, tokens = "", "", []
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        if ask.chat:
            text += (choice.delta if ask.stream else choice.message).content or ""
        else:
            text += choice.text
        reason = choice.finish_reason or reason
        tokens += read_logprobs(choice.logprobs, ask.chat)
    return Reply(text, reason, usage.completion_tokens, tuple(tokens))


def read_logprobs(found: Any, chat: bool) -> list[tuple[str, float, dict[str, float]]]:
    """Tokens with log probabilities, in either form."""
    if found is None:
        return []
    if chat:
        return [
            (entry.token, entry.logprob, {top.token: top.logprob for top in entry.top_logprobs})
            for entry in found.content or []
        ]
    return list(zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True))


def client_of(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=600)


def alone(client: openai.OpenAI, wanted: Sequence[Ask]) -> list[Reply]:
    """Every reply of a server that has nothing else to do, variant by variant."""
    order = sorted(range(len(wanted)), key=lambda number: wanted[number].variant)
    found = {number: send(client, wanted[number]) for number in order}
    return [found[number] for number in range(len(wanted))]


def together(client: openai.OpenAI, wanted: Sequence[Ask]) -> list[Reply]:
    """Every reply of a server that is asked from all threads at once."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda ask: send(client, ask), wanted))


def difference(
    artifact: Path, client: openai.OpenAI, mode: str, ask: Ask, expected: Reply, found: Reply
) -> dict[str, Any]:
    """Where two replies part, and how near the tie was; `client` is of the server alone."""
    pairs = zip(expected.text, found.text, strict=False)
    shorter = min(len(expected.text), len(found.text))
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)
    again = send(client, ask, logprobs=True)
    entry: dict[str, Any] = {
        "mode": mode,
        "variant": ask.variant,
        "kind": ask.kind,
        "body": ask.body,
        "expected": asdict(expected),
        "found": asdict(found),
        "character": at,
        "repeats_alone": (again.text, again.reason) == (expected.text, expected.reason),
    }
    end = 0
    for number, (text, logprob, top) in enumerate(again.tokens):
        start, end = end, end + len(text)
        if end > at:
            entry |= {"token": number, "alone": [text, logprob], "likeliest": top}
            texts = [text for text, _, _ in again.tokens[: number + 1]]
            entry |= nearness(artifact, ask, texts, found.text[start:])
            break
    return {**entry, "tie": entry.get("gap", math.inf) < TIE}


def nearness(artifact: Path, ask: Ask, texts: Sequence[str], rest: str) -> dict[str, Any]:
    """How near the last of the tokens `texts` was to what came instead, the text `rest`.

    `gap` is between what the two tokens were chosen by: their logits, or, where they are sampled,
    the sums of logits and noise that `moecc.runtime.sampling` compares. The logits are those that
    transformers computes from the artifact.
    """
    with Artifact(artifact) as opened:
        tokenizer = AutoTokenizer.from_pretrained(artifact / variant_folder(ask.variant))
        model = load_model(opened, ask.variant, dtype=torch.float32)
    known = {tokenizer.decode([token]): token for token in reversed(range(len(tokenizer)))}
    starts = [text for text in known if text and rest.startswith(text)]
    if not starts or not all(text in known for text in texts):
        return {}
    first, other = known[texts[-1]], known[max(starts, key=len)]
    if ask.chat:
        messages = ask.body["messages"]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    else:
        prompt = tokenizer.encode(ask.body["prompt"])
    before = [known[text] for text in texts[:-1]]
    with torch.no_grad():
        values = model(input_ids=torch.tensor([[*prompt, *before]])).logits[:, -1].float()
    logprobs = values.log_softmax(-1)[0]
    if "seed" in ask.body:
        fields = {**ask.body, **ask.body.get("extra_body", {})}
        names = {field.name for field in dataclasses.fields(Sampling)}
        choice = Choice(Sampling(**{k: v for k, v in fields.items() if k in names}), prompt)
        for token in before:
            choice.observe(token)
        sampling._penalize(values, [choice])
        sampling._draw(values, [choice])  # leaves the sums in `values`
    instead = {"instead": [tokenizer.decode([other]), float(logprobs[other])]}
    gap = abs(float(values[0, first] - values[0, other]))
    return {**instead, "gap": gap} if math.isfinite(gap) else instead


def largest_gap(first: Sequence[Reply], second: Sequence[Reply]) -> float:
    """The largest difference of a token's log probability where the tokens are the same."""
    return max(
        (
            abs(a - b)
            for left, right in zip(first, second, strict=True)
            for (s, a, _), (t, b, _) in zip(left.tokens, right.tokens, strict=False)
            if s == t and math.isfinite(a) and math.isfinite(b)
        ),
        default=0.0,
    )


def summary(result: dict[str, Any]) -> Table:
    """Equal and different replies, by kind."""
    table = Table()
    table.add_column("mode, kind")
    for column in ("requests", "equal", "different", "of these ties"):
        table.add_column(column, justify="right")
    for mode, found in result["modes"].items():
        rows = {**found["kinds"], "all": [found["requests"], found["different"], found["ties"]]}
        for kind, (count, different, ties) in rows.items():
            cells = map(str, (count, count - different, different, ties))
            table.add_row(f"{mode}, {kind}", *cells)
    return table


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--requests", type=int, default=500, help="in each mode; default: 500")
    parser.add_argument("--max-tokens", type=int, default=48, help="of an answer; default: 48")
    parser.add_argument("--modes", default=MODES, help=f"comma-separated; default: {MODES}")
    parser.add_argument("--kv-cache", default="64MiB", help="of every server; default: 64MiB")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON; a .md goes beside it")
    return parser.parse_args()


def main() -> None:
    """Asks alone, then together in every mode, and compares."""
    args = arguments()
    logging.disable_progress_bar()
    console = Console()
    options = ["--dtype", "float32", "--kv-cache", args.kv_cache]
    modes: dict[str, Any] = {}
    differences = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        single = ["--mode", "resident", "--max-num-seqs", "1"]
        with Server(args.artifact, folder, *options, *single) as one, client_of(one) as reference:
            wanted = asks(one.variants, args.requests, args.max_tokens, args.seed)
            begin = time.monotonic()
            expected = alone(reference, wanted)
            seconds = time.monotonic() - begin
            console.print(f"alone: {len(wanted)} requests in {seconds:.0f} s")
            for mode in args.modes.split(","):
                with (
                    Server(args.artifact, folder, *options, "--mode", mode) as many,
                    client_of(many) as client,
                ):
                    begin = time.monotonic()
                    found = together(client, wanted)
                    taken = time.monotonic() - begin
                    batches = sum(
                        value for name, _, value in many.metrics() if name.endswith("swaps_total")
                    )
                parted = [
                    difference(args.artifact, reference, mode, ask, before, after)
                    for ask, before, after in zip(wanted, expected, found, strict=True)
                    if before.same != after.same
                ]
                differences += parted
                kinds, bad = Counter(a.kind for a in wanted), Counter(d["kind"] for d in parted)
                ties = Counter(d["kind"] for d in parted if d["tie"])
                modes[mode] = {
                    "requests": len(wanted),
                    "different": len(parted),
                    "ties": ties.total(),
                    "kinds": {k: [n, bad[k], ties[k]] for k, n in sorted(kinds.items())},
                    "tokens": sum(reply.count for reply in found),
                    "seconds": taken,
                    "reconfigurations": int(batches),
                    "largest_logprob_difference": largest_gap(expected, found),
                }
                console.print(
                    f"{mode}: {len(wanted) - len(parted)} equal, {len(parted)} different, "
                    f"{ties.total()} of them ties, in {taken:.0f} s, {int(batches)} "
                    "reconfigurations; log probabilities differ by at most "
                    f"{modes[mode]['largest_logprob_difference']:.2g}"
                )
    for d in differences:
        console.print(
            f"{d['mode']}, {d['variant']}, {d['kind']}: character {d['character']}, token "
            f"{d.get('token')}: {d.get('alone')} alone, {d.get('instead')} together, gap "
            f"{d.get('gap')}; alone again the same: {d['repeats_alone']}",
            markup=False,
        )
    result = {
        "machine": machine(),
        "dtype": "float32",
        "threads": THREADS,
        "seed": args.seed,
        "seconds_alone": seconds,
        "modes": modes,
        "differences": differences,
    }
    shown = summary(result)
    Console(width=max(console.width, 80)).print(shown)
    if args.out:
        save(result, [shown], args.out)
    if differences:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
