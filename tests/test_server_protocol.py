"""Bodies: what is taken, what is refused and how, and that nothing can break the server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fake_engine import MAX_MODEL_LEN, NO_TEMPLATE, FakeEngine, answer, chat_text
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moecc.errors import RequestError
from moecc.runtime.request import Sampling
from moecc.server import fields, protocol
from moecc.server.app import create_app

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def engine() -> Iterator[FakeEngine]:
    engine = FakeEngine(("base", "chat", NO_TEMPLATE))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def client(engine: FakeEngine) -> Iterator[TestClient]:
    with TestClient(create_app(engine), raise_server_exceptions=False) as client:
        yield client


def chat(engine: FakeEngine, **more: Any) -> protocol.Call:
    body = {"model": "chat", "messages": HELLO, **more}
    return protocol.read_chat(engine, json.dumps(body).encode())


def text(engine: FakeEngine, **more: Any) -> protocol.Call:
    body = {"model": "chat", "prompt": "hello", **more}
    return protocol.read_completion(engine, json.dumps(body).encode())


def test_a_plain_chat(engine: FakeEngine) -> None:
    call = chat(engine)
    (request,) = call.requests
    assert request.variant == "chat"
    assert bytes(request.prompt).decode() == "user: hello\nassistant:"
    assert request.sampling == Sampling()
    assert (request.priority, request.timeout) == (0, None)
    assert call.id.startswith("chatcmpl-")
    assert call.prompt_tokens == len(request.prompt)
    assert not call.options.stream


def test_every_field_arrives(engine: FakeEngine) -> None:
    shared = {
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 7,
        "min_p": 0.25,
        "presence_penalty": 1,
        "frequency_penalty": -1.5,
        "repetition_penalty": 1.25,
        "logit_bias": {"5": -100, "6": 2.5},
        "seed": -3,
        "stop": ["a", "b"],
        "stop_token_ids": [1, 2],
        "ignore_eos": True,
        "priority": -4,
        "timeout": 1.5,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    expected = Sampling(
        max_tokens=9,
        temperature=0.0,
        top_p=0.5,
        top_k=7,
        min_p=0.25,
        presence_penalty=1.0,
        frequency_penalty=-1.5,
        repetition_penalty=1.25,
        logit_bias=((5, -100.0), (6, 2.5)),
        seed=-3,
        stop=("a", "b"),
        stop_token_ids=(1, 2),
        ignore_eos=True,
        logprobs=4,
    )
    for call in (
        chat(engine, max_completion_tokens=9, logprobs=True, top_logprobs=4, **shared),
        text(engine, max_tokens=9, logprobs=4, best_of=1, **shared),
    ):
        (request,) = call.requests
        assert request.sampling == expected
        assert (request.priority, request.timeout) == (-4, 1.5)
        assert call.options.stream
        assert call.options.include_usage


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        ({"max_tokens": 3}, {"max_tokens": 3}),
        ({"max_tokens": 3, "max_completion_tokens": 3}, {"max_tokens": 3}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"stop": "x"}, {"stop": ("x",)}),
        ({"stop": None, "seed": None, "n": None}, {}),
        ({"logprobs": True}, {"logprobs": 0}),
        ({"logprobs": False, "top_logprobs": 0}, {"logprobs": None}),
    ],
)
def test_spellings(engine: FakeEngine, given_: Any, expected: Any) -> None:
    assert chat(engine, **given_).requests[0].sampling == Sampling(**expected)


def test_completions_stop_after_16_tokens_by_default(engine: FakeEngine) -> None:
    assert text(engine).requests[0].sampling.max_tokens == 16


@pytest.mark.parametrize(
    "inert",
    [
        {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"},
        {"response_format": {"type": "text"}, "tools": [], "tool_choice": "none"},
        {"tools": None, "functions": None, "audio": None, "parallel_tool_calls": True},
    ],
)
def test_fields_that_ask_for_nothing(engine: FakeEngine, inert: Any) -> None:
    assert chat(engine, **inert).requests[0].sampling == Sampling()


def test_prompts_of_all_kinds(engine: FakeEngine) -> None:
    def prompts(value: Any) -> list[tuple[int, ...]]:
        return [request.prompt for request in text(engine, prompt=value).requests]

    assert prompts("ab") == [(97, 98)]
    assert prompts(["a", "b"]) == [(97,), (98,)]
    assert prompts([1, 2, 3]) == [(1, 2, 3)]
    assert prompts([[1], [2, 3]]) == [(1,), (2, 3)]


def test_choices_have_seeds_of_their_own(engine: FakeEngine) -> None:
    call = text(engine, prompt=["a", "b"], n=3, seed=5)
    seeds = [r.sampling.seed for r in call.requests]
    assert [r.prompt for r in call.requests] == [(97,)] * 3 + [(98,)] * 3
    assert seeds[:3] == seeds[3:]
    assert seeds[0] == 5
    assert len(set(seeds)) == 3
    assert len({r.id for r in call.requests}) == 6
    assert call.prompt_tokens == 2
    assert {r.sampling.seed for r in text(engine, n=2).requests} == {None}


def test_messages_become_text(engine: FakeEngine) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    answered = {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None}
    named = {"role": "user", "content": "d", "name": "ann"}
    call = chat(engine, messages=[{"role": "system", "content": parts}, answered, named])
    rendered = "system: a\nb\nassistant: c\nann: d\nassistant:"
    assert bytes(call.requests[0].prompt).decode() == rendered


BAD_CHAT = [
    ({"nonsense": 1}, "nonsense", "is not supported"),
    ({"model": None}, "model", "is required"),
    ({"model": 3}, "model", "must be a string"),
    ({"tools": [{"type": "function"}]}, "tools", "is supported only as []"),
    ({"response_format": {"type": "json_object"}}, "response_format", 'only as {"type": "text"}'),
    ({"store": True}, "store", "only as false"),
    ({"store": 0}, "store", "only as false"),
    ({"audio": {}}, "audio", "only as null"),
    ({"temperature": True}, "temperature", "must be a finite number"),
    ({"temperature": "1"}, "temperature", "must be a finite number"),
    ({"temperature": 10**400}, "temperature", "must be a finite number"),
    ({"temperature": -0.1}, "temperature", "must be between 0 and 100"),
    ({"top_p": 0}, "top_p", "must be greater than 0"),
    ({"top_k": -2}, "top_k", "between -1 and"),
    ({"top_k": 1.0}, "top_k", "must be an integer"),
    ({"min_p": 2}, "min_p", "must be between 0 and 1"),
    ({"presence_penalty": 3}, "presence_penalty", "must be between -2 and 2"),
    ({"repetition_penalty": 0}, "repetition_penalty", "must be greater than 0"),
    ({"max_tokens": 0}, "max_tokens", "between 1 and"),
    ({"max_tokens": True}, "max_tokens", "must be an integer"),
    ({"max_completion_tokens": 2**31}, "max_completion_tokens", "between 1 and"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "differs"),
    ({"n": 0}, "n", "between 1 and 16"),
    ({"n": 17}, "n", "between 1 and 16"),
    ({"seed": 2**63}, "seed", "must be an integer"),
    ({"stop": 1}, "stop", "must be a string or a list"),
    ({"stop": ["a", 1]}, "stop", "must be a string or a list"),
    ({"stop": ""}, "stop", "none empty"),
    ({"stop_token_ids": [-1]}, "stop_token_ids", "must be a list of integers"),
    ({"stop_token_ids": [1] * 1025}, "stop_token_ids", "at most 1024"),
    ({"logit_bias": []}, "logit_bias", "must be an object"),
    ({"logit_bias": {"a": 1}}, "logit_bias", "must map token ids"),
    ({"logit_bias": {"01": 1}}, "logit_bias", "must map token ids"),
    ({"logit_bias": {"1": True}}, "logit_bias", "must map token ids"),
    ({"logit_bias": {"1": 101}}, "logit_bias", "between -100 and 100"),
    ({"logit_bias": {str(i): 0 for i in range(1025)}}, "logit_bias", "at most 1024"),
    ({"logprobs": 1}, "logprobs", "must be true or false"),
    ({"top_logprobs": 1}, "top_logprobs", "needs `logprobs`"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "between 0 and 20"),
    ({"stream": "yes"}, "stream", "must be true or false"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "needs `stream`"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "is not supported"),
    ({"timeout": 0}, "timeout", "greater than 0"),
    ({"priority": 0.5}, "priority", "must be an integer"),
    ({"best_of": 1}, "best_of", "is not supported"),
    ({"messages": []}, "messages", "at least one message"),
    ({"messages": "hi"}, "messages", "must be a list"),
    ({"messages": ["hi"]}, "messages[0]", "must be an object"),
    ({"messages": [{"content": "x"}]}, "messages[0].role", "is required"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "must be one of"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "must be a string"),
    ({"messages": [*HELLO, {"role": "user", "content": []}]}, "messages[1].content", "string"),
    ({"messages": [{**HELLO[0], "x": 1}]}, "messages[0].x", "is not supported"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content[0].type",
        "`image_url` is not supported",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
        "messages[0].content[0].text",
        "must be a string",
    ),
    ({"messages": [*HELLO, {"role": "system", "content": ""}]}, "messages", "system goes first"),
    ({"model": NO_TEMPLATE}, "messages", "no chat template (use /v1/completions"),
    ({"messages": [{"role": "user", "content": "x" * MAX_MODEL_LEN}]}, "prompt", "tokens"),
]
BAD_TEXT = [
    ({"prompt": None}, "prompt", "must be a string"),
    ({"prompt": ""}, "prompt", "has no tokens"),
    ({"prompt": []}, "prompt", "must be a string"),
    ({"prompt": [[]]}, "prompt", "has no tokens"),
    ({"prompt": [1, "a"]}, "prompt", "must be strings, or token ids"),
    ({"prompt": [True]}, "prompt", "must be strings, or token ids"),
    ({"prompt": [2**31]}, "prompt", "must be strings, or token ids"),
    ({"prompt": ["a"] * 129}, "prompt", "at most 128"),
    ({"prompt": ["a"] * 100, "n": 3}, "n", "at most 256"),
    ({"best_of": 2}, "best_of", "must be equal to `n`"),
    ({"echo": True}, "echo", "only as false"),
    ({"suffix": "x"}, "suffix", "only as null"),
    ({"logprobs": True}, "logprobs", "must be an integer"),
    ({"messages": HELLO}, "messages", "is not supported"),
]


@pytest.mark.parametrize(
    ("path", "more", "param", "message"),
    [("/v1/chat/completions", *case) for case in BAD_CHAT]
    + [("/v1/completions", *case) for case in BAD_TEXT],
)
def test_bad_fields(client: TestClient, path: str, more: Any, param: str, message: str) -> None:
    start = {"messages": HELLO} if "chat" in path else {"prompt": "hello"}
    answer = client.post(path, json={"model": "chat", **start, **more})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"[]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b"\xff\xfe{}", "not valid Unicode"),
        (b'{"a": NaN}', "`NaN` is not a JSON number"),
        (b'{"a": -Infinity}', "is not a JSON number"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "is not JSON"),
        (b'{"\\ud800": 1}', "not valid Unicode"),
        (b'{"model": "chat", "prompt": "\\uDFFF"}', "not valid Unicode"),
    ],
)
def test_bodies_that_are_not_objects(client: TestClient, raw: bytes, message: str) -> None:
    headers = {"Content-Type": "application/json"}
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
        answer = client.post(path, content=raw, headers=headers)
        assert answer.status_code == 400
        assert message in answer.json()["error"]["message"]


def test_odd_but_valid_json() -> None:
    assert fields.parse_object(b'{"a": 1, "a": 2}') == {"a": 2}
    assert fields.parse_object(b'{"a": "\\ud83d\\ude00"}') == {"a": "\U0001f600"}
    with pytest.raises(RequestError, match="must be a finite number"):
        fields.Fields(fields.parse_object(b'{"a": 1e999}')).number("a", 0.0)


def test_long_names_are_cut(client: TestClient) -> None:
    answer = client.post("/v1/completions", json={"model": "chat", "prompt": "a", "x" * 9999: 1})
    assert len(answer.json()["error"]["param"]) == 80


def test_tokenize_and_back(client: TestClient) -> None:
    answer = client.post("/tokenize", json={"model": "chat", "prompt": "hé"})
    tokens = [0x68, 0xC3, 0xA9]
    assert answer.json() == {"count": 3, "max_model_len": MAX_MODEL_LEN, "tokens": tokens}
    answer = client.post("/detokenize", json={"model": "chat", "tokens": tokens})
    assert answer.json() == {"prompt": "hé"}
    answer = client.post("/tokenize", json={"model": "chat", "messages": HELLO})
    assert bytes(answer.json()["tokens"]).decode() == chat_text(HELLO)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/tokenize", {}, "messages"),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, "messages"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": 1}, "add_special_tokens"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens"),
        ("/detokenize", {"tokens": [257]}, "tokens"),
    ],
)
def test_bad_tokenize(client: TestClient, path: str, body: Any, param: str) -> None:
    answer = client.post(path, json={"model": "chat", **body})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


KNOWN = sorted(
    {"model", "messages", "prompt", "max_tokens", "max_completion_tokens", "temperature", "top_p"}
    | {"top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "n"}
    | {"logit_bias", "seed", "stop", "stop_token_ids", "ignore_eos", "logprobs", "top_logprobs"}
    | {"stream", "stream_options", "priority", "timeout", "best_of", "echo", "suffix", "tools"}
    | {"response_format", "user", "tokens", "add_special_tokens"}
)
NUMBERS = st.one_of(
    st.integers(), st.integers(0, 20), st.floats(), st.sampled_from([10**400, -0.0, 1e308])
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(), st.text("\ud800a\x00", max_size=3)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=8,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "system", "tool"]), "content": st.text() | JSON},
    optional={"name": JSON, "tool_calls": JSON},
)
BODY = st.fixed_dictionaries(
    {"model": st.just("chat") | JSON},
    optional={
        "messages": st.lists(MESSAGE, min_size=1, max_size=3) | JSON,
        "prompt": st.text() | st.lists(st.integers(0, 300), max_size=4) | JSON,
        "temperature": st.floats(0, 2) | JSON,
        "n": st.integers(1, 3) | JSON,
        "logit_bias": st.dictionaries(st.integers(0, 9).map(str), NUMBERS) | JSON,
        "stop": st.lists(st.text("ab", max_size=2), max_size=3) | JSON,
        "logprobs": st.booleans() | st.integers(0, 3) | JSON,
        "stream": st.booleans() | JSON,
    },
)
MORE = st.dictionaries(st.sampled_from(KNOWN), JSON, max_size=3)
ANY_BODY = JSON | BODY | st.builds(lambda body, more: {**body, **more}, BODY, MORE)
PATHS = st.sampled_from(["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"])


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(path=PATHS, body=ANY_BODY)
def test_no_body_breaks_the_server(client: TestClient, path: str, body: Any) -> None:
    raw = json.dumps(body).encode()
    response = client.post(path, content=raw, headers={"Content-Type": "application/json"})
    assert response.status_code in (200, 400, 404, 408), response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        kind = "timeout_error" if response.status_code == 408 else "invalid_request_error"
        assert error["type"] == kind
        assert isinstance(error["message"], str)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(path=PATHS, raw=st.binary())
def test_no_bytes_break_the_server(client: TestClient, path: str, raw: bytes) -> None:
    response = client.post(path, content=raw, headers={"Content-Type": "application/json"})
    assert response.status_code == 400


def test_the_server_still_answers(client: TestClient) -> None:
    response = client.post("/v1/completions", json={"model": "chat", "prompt": "hi", "seed": 1})
    assert response.json()["choices"][0]["text"] == answer("chat", "hi", 1)[:16]
