"""Request bodies, checked to the last field, as what the engine takes.

A field is either honored or refused, never ignored; those in `_INERT` ask for nothing, or for
nothing at the values given there. All functions raise RequestError naming the field. They tokenize,
which may take long: call them off the event loop.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError

from moecc.errors import RequestError
from moecc.runtime.interface import EngineLike
from moecc.runtime.request import MAX_LOGPROBS, Request, Sampling
from moecc.server.fields import MAX_INT, Fields, is_tokens, parse_object, shown, to_number

MAX_CHOICES = 16
MAX_PROMPTS = 128
MAX_REQUESTS = 256
MAX_LOGIT_BIAS = 1024
MAX_STOP_TOKENS = 1024
COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions; chat has no limit but the model's

_SEED = 2**63 - 1
_ROLES = ("system", "developer", "user", "assistant")
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")
_INERT: dict[str, tuple[Any, ...]] = {
    "user": (),
    "metadata": (),
    "safety_identifier": (),
    "prompt_cache_key": (),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "min_tokens": (0,),
}
_CHAT_INERT: dict[str, tuple[Any, ...]] = {
    **_INERT,
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "verbosity": (None,),
    "web_search_options": (None,),
}
_TEXT_INERT: dict[str, tuple[Any, ...]] = {
    **_INERT,
    "echo": (False,),
    "suffix": (None,),
    "add_special_tokens": (True,),
}
# What the official client puts into the message it answers with, so it can be sent back.
_MESSAGE_INERT: dict[str, tuple[Any, ...]] = {
    "tool_calls": ([],),
    "annotations": ([],),
    "function_call": (None,),
    "refusal": (None,),
    "audio": (None,),
}


@dataclass(frozen=True, slots=True)
class Options:
    """What a body asks for besides its prompts."""

    model: str
    sampling: Sampling
    n: int
    stream: bool
    include_usage: bool
    priority: int
    timeout: float | None


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the API: `n` requests for its first prompt, then for the next, and so on."""

    id: str
    options: Options
    requests: tuple[Request, ...]

    @property
    def prompt_tokens(self) -> int:
        return sum(len(r.prompt) for r in self.requests[:: self.options.n])


def read_chat(engine: EngineLike, raw: bytes) -> Call:
    """A body of /v1/chat/completions."""
    fields = Fields(parse_object(raw))
    model = _model(fields, engine)
    options = _options(fields, model, _chat_max_tokens(fields), _chat_logprobs(fields))
    messages = _messages(fields)
    fields.finish(_CHAT_INERT)
    return _call("chatcmpl", options, [_render(engine.tokenizer(model), messages)])


def read_completion(engine: EngineLike, raw: bytes) -> Call:
    """A body of /v1/completions."""
    fields = Fields(parse_object(raw))
    model = _model(fields, engine)
    max_tokens = fields.integer("max_tokens", 1, MAX_INT)
    max_tokens = COMPLETION_TOKENS if max_tokens is None else max_tokens
    logprobs = fields.integer("logprobs", 0, MAX_LOGPROBS)
    best_of = fields.integer("best_of", 1, MAX_INT)
    options = _options(fields, model, max_tokens, logprobs)
    if best_of not in (None, options.n):
        fields.refuse("best_of", "must be equal to `n`")
    prompts = _prompts(fields)
    fields.finish(_TEXT_INERT)
    if len(prompts) * options.n > MAX_REQUESTS:
        fields.refuse("n", f"times the number of prompts must be at most {MAX_REQUESTS}")
    return _call("cmpl", options, [_encode(engine, model, prompt) for prompt in prompts])


def tokenize(engine: EngineLike, raw: bytes) -> dict[str, Any]:
    """The answer to a body of /tokenize: a prompt or messages as token ids."""
    fields = Fields(parse_object(raw))
    model = _model(fields, engine)
    prompt = fields.text("prompt")
    messages = None if prompt is not None else _messages(fields)
    special = prompt is None or fields.flag("add_special_tokens", True)
    fields.finish({"add_generation_prompt": (True,), "return_token_strs": (False,)})
    tokenizer = engine.tokenizer(model)
    if prompt is not None:
        tokens = tuple(tokenizer.encode(prompt, add_special_tokens=special))
    else:
        tokens = _render(tokenizer, messages or [])
    return {
        "count": len(tokens),
        "max_model_len": engine.max_model_len(model),
        "tokens": list(tokens),
    }


def detokenize(engine: EngineLike, raw: bytes) -> dict[str, Any]:
    """The answer to a body of /detokenize: token ids as text."""
    fields = Fields(parse_object(raw))
    model = _model(fields, engine)
    tokens = fields.integers("tokens", MAX_INT)
    if tokens is None:
        fields.refuse("tokens", "is required")
    fields.finish({})
    try:
        return {"prompt": engine.tokenizer(model).decode(list(tokens))}
    except (LookupError, OverflowError, TypeError, ValueError):
        raise RequestError("`tokens` has ids the model does not know", param="tokens") from None


def _model(fields: Fields, engine: EngineLike) -> str:
    model = fields.required_text("model")
    if model not in engine.variants:
        raise unknown_model(engine, model)
    return model


def unknown_model(engine: EngineLike, model: str) -> RequestError:
    return RequestError(
        f"the model `{shown(model)}` does not exist",
        f"it is one of: {', '.join(engine.variants)}",
        param="model",
        code="model_not_found",
    )


def _chat_max_tokens(fields: Fields) -> int | None:
    old = fields.integer("max_tokens", 1, MAX_INT)
    new = fields.integer("max_completion_tokens", 1, MAX_INT)
    if None not in (old, new) and old != new:
        fields.refuse("max_tokens", "differs from `max_completion_tokens`; give one of them")
    return old if new is None else new


def _chat_logprobs(fields: Fields) -> int | None:
    wanted = fields.flag("logprobs")
    top = fields.integer("top_logprobs", 0, MAX_LOGPROBS)
    if top and not wanted:
        fields.refuse("top_logprobs", "needs `logprobs` to be true")
    return (top or 0) if wanted else None


def _options(fields: Fields, model: str, max_tokens: int | None, logprobs: int | None) -> Options:
    stream = fields.flag("stream")
    return Options(
        model=model,
        sampling=_sampling(fields, max_tokens, logprobs),
        n=fields.integer("n", 1, MAX_CHOICES) or 1,
        stream=stream,
        include_usage=_include_usage(fields, stream),
        priority=fields.integer("priority", -MAX_INT, MAX_INT) or 0,
        timeout=_timeout(fields),
    )


def _sampling(fields: Fields, max_tokens: int | None, logprobs: int | None) -> Sampling:
    top_k = fields.integer("top_k", -1, MAX_INT) or 0
    return Sampling(
        max_tokens=max_tokens,
        temperature=fields.number("temperature", 1.0),
        top_p=fields.number("top_p", 1.0),
        top_k=max(top_k, 0),  # -1 is off as well, as in vLLM
        min_p=fields.number("min_p", 0.0),
        presence_penalty=fields.number("presence_penalty", 0.0),
        frequency_penalty=fields.number("frequency_penalty", 0.0),
        repetition_penalty=fields.number("repetition_penalty", 1.0),
        logit_bias=_logit_bias(fields),
        seed=fields.integer("seed", -_SEED, _SEED),
        stop=_stop(fields),
        stop_token_ids=fields.integers("stop_token_ids", MAX_STOP_TOKENS) or (),
        ignore_eos=fields.flag("ignore_eos"),
        logprobs=logprobs,
    )


def _include_usage(fields: Fields, stream: bool) -> bool:
    given = fields.object("stream_options")
    if given and not stream:
        fields.refuse("stream_options", "needs `stream` to be true")
    options = Fields(given, "stream_options.")
    include = options.flag("include_usage")
    options.finish({"include_obfuscation": (False,), "continuous_usage_stats": (False,)})
    return include


def _timeout(fields: Fields) -> float | None:
    value = fields.take("timeout")
    seconds = to_number(value)
    if value is not None and (seconds is None or seconds <= 0.0):
        fields.refuse("timeout", "must be a number of seconds greater than 0")
    return seconds


def _stop(fields: Fields) -> tuple[str, ...]:
    value = fields.take("stop")
    if value is None:
        return ()
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(s, str) for s in texts):
        fields.refuse("stop", "must be a string or a list of strings")
    return tuple(texts)


def _logit_bias(fields: Fields) -> tuple[tuple[int, float], ...]:
    given = fields.object("logit_bias")
    if len(given) > MAX_LOGIT_BIAS:
        fields.refuse("logit_bias", f"must have at most {MAX_LOGIT_BIAS} entries")
    found = []
    for token, value in given.items():
        bias = to_number(value)
        if bias is None or not _TOKEN_ID.fullmatch(token) or int(token) > MAX_INT:
            fields.refuse("logit_bias", "must map token ids, as strings, to numbers")
        found.append((int(token), bias))
    return tuple(found)


def _messages(fields: Fields) -> list[dict[str, str]]:
    value = fields.take("messages")
    if not isinstance(value, list) or not value:
        fields.refuse("messages", "must be a list of at least one message")
    for index, message in enumerate(value):
        if not isinstance(message, dict):
            fields.refuse(f"messages[{index}]", "must be an object")
    return [_message(Fields(m, f"messages[{i}]."), i) for i, m in enumerate(value)]


def _message(fields: Fields, index: int) -> dict[str, str]:
    role = fields.required_text("role")
    if role not in _ROLES:
        fields.refuse("role", f"must be one of {', '.join(_ROLES)}")
    message = {"role": role, "content": _content(fields, index)}
    name = fields.text("name")
    fields.finish(_MESSAGE_INERT)
    return message if name is None else {**message, "name": name}


def _content(fields: Fields, index: int) -> str:
    value = fields.take("content")
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        fields.refuse("content", "must be a string or a list of text parts")
    texts = []
    for number, part in enumerate(value):
        if not isinstance(part, dict):
            fields.refuse(f"content[{number}]", "must be an object")
        inner = Fields(part, f"messages[{index}].content[{number}].")
        kind = inner.required_text("type")
        if kind != "text":
            inner.refuse("type", f"`{shown(kind)}` is not supported, only `text` is")
        texts.append(inner.required_text("text"))
        inner.finish({})
    return "\n".join(texts)  # as vLLM does


def _prompts(fields: Fields) -> Sequence[str | tuple[int, ...]]:
    value = fields.take("prompt")
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        fields.refuse("prompt", "must be a string, a list of strings, or token ids")
    if is_tokens(value):
        return [tuple(value)]
    if len(value) > MAX_PROMPTS:
        fields.refuse("prompt", f"must be at most {MAX_PROMPTS} prompts")
    if all(isinstance(item, str) for item in value):
        return value
    if not all(map(is_tokens, value)):
        fields.refuse("prompt", f"must be strings, or token ids between 0 and {MAX_INT}")
    return [tuple(item) for item in value]


def _encode(engine: EngineLike, model: str, prompt: str | tuple[int, ...]) -> tuple[int, ...]:
    if isinstance(prompt, str):
        prompt = tuple(engine.tokenizer(model).encode(prompt))
    if not prompt:
        raise RequestError("`prompt` has no tokens", param="prompt")
    return prompt


def _render(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[int, ...]:
    if not getattr(tokenizer, "chat_template", None):
        raise RequestError(
            "the model has no chat template",
            "use /v1/completions, or add a `chat_template.jinja` to its source",
            param="messages",
        )
    try:
        tokens = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    # A template is a program: besides its own errors it can trip over any value.
    except (TemplateError, LookupError, TypeError, ValueError) as error:
        reason = shown(str(error))
        raise RequestError(
            f"the model's chat template refuses the messages: {reason}", param="messages"
        ) from None
    if not tokens:
        raise RequestError("`messages` has no tokens", param="messages")
    return tuple(tokens)


def _call(prefix: str, options: Options, prompts: Sequence[tuple[int, ...]]) -> Call:
    id_ = f"{prefix}-{uuid.uuid4().hex}"
    samplings = [
        replace(options.sampling, seed=_choice_seed(options.sampling.seed, choice))
        for choice in range(options.n)
    ]
    pairs = [(prompt, sampling) for prompt in prompts for sampling in samplings]
    requests = tuple(
        Request(
            id=f"{id_}-{index}",
            variant=options.model,
            prompt=prompt,
            sampling=sampling,
            priority=options.priority,
            timeout=options.timeout,
        )
        for index, (prompt, sampling) in enumerate(pairs)
    )
    return Call(id_, options, requests)


def _choice_seed(seed: int | None, choice: int) -> int | None:
    """A seed of its own for each choice; the first one has the one asked for."""
    if seed is None or choice == 0:
        return seed
    digest = hashlib.sha256(f"{seed}/{choice}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
