"""What is asked of the engine and what it answers; plain data, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from moecc.errors import RequestError

MAX_LOGPROBS = 20
MAX_STOP = 16
MAX_STOP_CHARACTERS = 1024

FinishReason = Literal["stop", "length", "abort", "timeout", "error"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen and when to stop; names and meanings as in OpenAI's API and vLLM.

    Attributes:
        max_tokens: at most so many new tokens, and no more than the model's length allows.
        temperature: 0 is greedy.
        top_k: 0 is off.
        logit_bias: (token, added to its logit).
        seed: same seed, same answer, whatever else is in the batch; None: a random one.
        stop: strings that end the text before them.
        stop_token_ids: tokens that end it besides the model's own; they are not part of the text.
        ignore_eos: the model's own end tokens do not end it.
        logprobs: how many alternatives to report a token; 0: only the token's own; None: nothing.

    Raises RequestError, naming the field, for a value out of range.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None and not (
            isinstance(self.max_tokens, int) and self.max_tokens >= 1
        ):
            raise RequestError(
                "`max_tokens` must be a whole number, at least 1", param="max_tokens"
            )
        for name, low, high in (
            ("temperature", 0.0, 100.0),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
        ):
            if not low <= getattr(self, name) <= high:  # NaN is not in any range either
                raise RequestError(f"`{name}` must be between {low:g} and {high:g}", param=name)
        if self.top_p == 0.0:
            raise RequestError("`top_p` must be greater than 0", param="top_p")
        if self.top_k < 0:
            raise RequestError("`top_k` must be 0 (off) or more", param="top_k")
        if not 0.0 < self.repetition_penalty <= 100.0:
            raise RequestError(
                "`repetition_penalty` must be greater than 0 and at most 100",
                param="repetition_penalty",
            )
        if any(not -100.0 <= bias <= 100.0 for _, bias in self.logit_bias):
            raise RequestError("`logit_bias` must be between -100 and 100", param="logit_bias")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise RequestError(f"`logprobs` must be between 0 and {MAX_LOGPROBS}", param="logprobs")
        if len(self.stop) > MAX_STOP or not all(self.stop):
            raise RequestError(
                f"`stop` must be at most {MAX_STOP} strings, none empty", param="stop"
            )
        if sum(map(len, self.stop)) > MAX_STOP_CHARACTERS:
            raise RequestError(
                f"`stop` must have at most {MAX_STOP_CHARACTERS} characters in all", param="stop"
            )


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One prompt to one variant.

    Attributes:
        id: unique among the requests an engine holds.
        prompt: token ids, at least one.
        priority: lower runs sooner, as in vLLM.
        timeout: seconds from its arrival after which it ends with `timeout`.
        detokenize: False where only tokens are wanted.
    """

    id: str
    variant: str
    prompt: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    priority: int = 0
    timeout: float | None = None
    detokenize: bool = True


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log probabilities of a chosen token and of the likeliest ones, likeliest first.

    They are of the model's own distribution: before temperature, penalties and bias.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Timing:
    """When things happened, `time.monotonic()` seconds; None for what did not."""

    arrived: float
    started: float | None = None
    first_token: float | None = None
    finished: float | None = None


@dataclass(frozen=True, slots=True)
class Finish:
    """Why a request ended.

    `stopped_by` is the stop string or token that ended it; `error` says what went wrong.
    """

    reason: FinishReason
    timing: Timing
    stopped_by: str | int | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """What is new of a request since its last output; the last one has `finish`.

    `text` is safe to show: never half a character, nor what may be the start of a stop string.
    `tokens` may run ahead of it. `logprobs` has one entry a token where they were asked for.
    """

    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None


@dataclass(frozen=True, slots=True)
class Stats:
    """What the engine is doing now.

    Attributes:
        mode: resident | swap | mixed.
        policy: fifo | grouped.
        batching: continuous | static.
        running, waiting: requests by variant (every variant is a key).
        batch: tokens by variant in the last step, empty when idle.
        resident: whether a variant's non-expert weights are on the device, by variant.
        kv_blocks_used, kv_blocks_total: blocks of the KV cache; both 0 with static batches.
        memory: bytes on the device by kind: `experts`, `non_expert`, `kv`.
        prompt_tokens, generation_tokens: since the start, by variant.
        reconfigurations: (from, to) -> how many; `from` is "" for the first.
        steps: forward passes since the start.
        alive: False once the engine's thread has died.
    """

    mode: str
    policy: str
    batching: str
    running: dict[str, int]
    waiting: dict[str, int]
    batch: dict[str, int]
    resident: dict[str, bool]
    kv_blocks_used: int
    kv_blocks_total: int
    memory: dict[str, int]
    prompt_tokens: dict[str, int]
    generation_tokens: dict[str, int]
    reconfigurations: dict[tuple[str, str], int]
    steps: int
    alive: bool
