"""Routes and answers, field by field, over an engine whose answers are known."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from fake_engine import MAX_MODEL_LEN, FakeEngine, answer, chat_text, logprob, natural_length
from fastapi.testclient import TestClient

from moecc import __version__
from moecc.errors import StoppedError
from moecc.server import generation
from moecc.server.app import create_app
from moecc.server.vocabulary import Vocabulary

HELLO = [{"role": "user", "content": "hello"}]
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    engine = FakeEngine()
    yield engine
    engine.open.set()
    engine.close()


@pytest.fixture
def client(engine: FakeEngine) -> Iterator[TestClient]:
    with TestClient(create_app(engine), raise_server_exceptions=False) as client:
        yield client


def error_of(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    document = response.json()
    assert list(document) == ["error"]
    assert set(document["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = document["error"]
    return error


def events(response: Any) -> list[Any]:
    """The chunks of a stream, without its end mark."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    return [json.loads(b.removeprefix("data: ")) for b in blocks[:-2] if b != ": ping"]


def test_models(client: TestClient) -> None:
    document = client.get("/v1/models").json()
    assert document["object"] == "list"
    assert [m["id"] for m in document["data"]] == ["base", "chat", "math"]
    assert [m["parent"] for m in document["data"]] == [None, "base", "base"]
    chat = document["data"][1]
    assert chat == client.get("/v1/models/chat").json()
    assert chat == {
        "id": "chat",
        "object": "model",
        "created": pytest.approx(time.time(), abs=60),
        "owned_by": "moecc",
        "root": "chat",
        "parent": "base",
        "max_model_len": MAX_MODEL_LEN,
    }


def test_unknown_models(client: TestClient) -> None:
    body = {"model": "gpt-4", "messages": HELLO}
    for response in (client.get("/v1/models/gpt-4"), client.post(CHAT, json=body)):
        assert error_of(response, 404) == {
            "message": "the model `gpt-4` does not exist (it is one of: base, chat, math)",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/nowhere", 404, "GET /nowhere: Not Found"),
        ("GET", "/v1/models/", 404, "GET /v1/models/: Not Found"),
        ("GET", "/docs", 404, "GET /docs: Not Found"),
        ("GET", "/openapi.json", 404, "GET /openapi.json: Not Found"),
        ("GET", CHAT, 405, f"GET {CHAT}: Method Not Allowed"),
        ("POST", "/health", 405, "POST /health: Method Not Allowed"),
    ],
)
def test_unknown_routes(
    client: TestClient, method: str, path: str, status: int, message: str
) -> None:
    response = client.request(method, path)
    assert error_of(response, status)["message"] == message
    assert ("allow" in response.headers) == (status == 405)


def test_chat(client: TestClient, engine: FakeEngine) -> None:
    response = client.post(CHAT, json={"model": "math", "messages": HELLO, "seed": 7})
    prompt = chat_text(HELLO)
    text = answer("math", prompt, 7)
    document = response.json()
    assert document.pop("id").startswith("chatcmpl-")
    assert document.pop("created") == pytest.approx(time.time(), abs=60)
    message = {"role": "assistant", "content": text, "refusal": None}
    assert document == {
        "object": "chat.completion",
        "model": "math",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
        "system_fingerprint": f"fp_{engine.artifact_hash[:12]}",
        "usage": {
            "prompt_tokens": len(prompt),
            "completion_tokens": len(text),
            "total_tokens": len(prompt) + len(text),
        },
    }


def test_completions_of_several_prompts(client: TestClient) -> None:
    body = {"model": "chat", "prompt": ["a", "bcd"], "n": 2, "seed": 3, "max_tokens": 4}
    document = client.post(TEXT, json=body).json()
    assert document["object"] == "text_completion"
    assert [c["index"] for c in document["choices"]] == [0, 1, 2, 3]
    assert [c["finish_reason"] for c in document["choices"]] == ["length"] * 4
    texts = [c["text"] for c in document["choices"]]
    assert texts[::2] == [answer("chat", "a", 3, 4), answer("chat", "bcd", 3, 4)]
    assert len(set(texts)) == 4
    usage = {"prompt_tokens": 4, "completion_tokens": 16, "total_tokens": 20}
    assert document["usage"] == usage


def test_stop_strings_reach_the_engine(client: TestClient) -> None:
    text = answer("chat", "a", 1)
    body = {"model": "chat", "prompt": "a", "seed": 1, "stop": text[3:5]}
    choice = client.post(TEXT, json=body).json()["choices"][0]
    assert choice["text"] == text[: text.index(text[3:5])]
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("usage", [False, True])
def test_chat_stream(client: TestClient, usage: bool) -> None:
    body = {"model": "chat", "messages": HELLO, "seed": 7, "max_tokens": 3, "stream": True}
    if usage:
        body["stream_options"] = {"include_usage": True}
    chunks = events(client.post(CHAT, json=body))
    text = answer("chat", chat_text(HELLO), 7, 3)
    counts = {"prompt_tokens": len(chat_text(HELLO)), "completion_tokens": 3}
    if usage:
        last = chunks.pop()
        assert last["choices"] == []
        assert last["usage"] == {**counts, "total_tokens": sum(counts.values())}
        assert {c.pop("usage") for c in chunks} == {None}
    keys = ["id", "object", "created", "model", "choices", "system_fingerprint"]
    assert all(list(c) == keys for c in chunks)
    assert len({c["id"] for c in chunks}) == 1
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    choices = [choice for c in chunks for choice in c["choices"]]
    assert [c["delta"] for c in choices] == [
        {"role": "assistant", "content": ""},
        *({"content": letter} for letter in text),
        {},
    ]
    assert [c["finish_reason"] for c in choices] == [None] * 4 + ["length"]


def test_completions_stream_of_two_choices(client: TestClient) -> None:
    body = {"model": "chat", "prompt": ["a", "b"], "seed": 7, "max_tokens": 5, "stream": True}
    chunks = events(client.post(TEXT, json=body))
    assert {c["object"] for c in chunks} == {"text_completion"}
    for index, prompt in enumerate("ab"):
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert "".join(c["text"] for c in mine) == answer("chat", prompt, 7, 5)
        assert [c["finish_reason"] for c in mine] == [None] * 5 + ["length"]


def expected_chat_logprobs(text: str, top: int) -> list[Any]:
    def entry(letter: str) -> dict[str, Any]:
        value = max(logprob(ord(letter)), -9999.0)
        return {"token": letter, "logprob": value, "bytes": [ord(letter)]}

    tops = [entry(letter) for letter in "abc"[:top]]
    return [{**entry(letter), "top_logprobs": tops} for letter in text]


@pytest.mark.parametrize("top", [None, 2])
@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs(client: TestClient, top: int | None, stream: bool) -> None:
    body = {"model": "chat", "messages": HELLO, "seed": 1, "logprobs": True, "stream": stream}
    body |= {"max_tokens": 60, "ignore_eos": True, "top_logprobs": top}  # 60 letters, a z too
    response = client.post(CHAT, json=body)
    text = answer("chat", chat_text(HELLO), 1, 60)
    assert "z" in text
    choices = (
        [choice for chunk in events(response) for choice in chunk["choices"]]
        if stream
        else response.json()["choices"]
    )
    content = [e for c in choices if c["logprobs"] for e in c["logprobs"]["content"]]
    assert content == expected_chat_logprobs(text, top or 0)


@pytest.mark.parametrize("stream", [False, True])
def test_completions_logprobs(client: TestClient, stream: bool) -> None:
    body = {"model": "chat", "prompt": "a", "seed": 1, "logprobs": 2, "stream": stream}
    response = client.post(TEXT, json={**body, "max_tokens": 6, "ignore_eos": True})
    text = answer("chat", "a", 1, 6)
    choices = (
        [choice for chunk in events(response) for choice in chunk["choices"]]
        if stream
        else response.json()["choices"]
    )
    found: dict[str, list[Any]] = {}
    for choice in choices:
        for key, values in (choice["logprobs"] or {}).items():
            found.setdefault(key, []).extend(values)
    likeliest = {"a": logprob(97), "b": logprob(98)}
    assert found == {
        "tokens": list(text),
        "token_logprobs": [logprob(ord(c)) for c in text],
        "top_logprobs": [{**likeliest, c: logprob(ord(c))} for c in text],
        "text_offset": list(range(6)),
    }


def test_no_logprob_breaks_json() -> None:
    from moecc.server.answers import _finite

    assert [_finite(x) for x in (-1.0, -math.inf, math.nan)] == [-1.0, -9999.0, -9999.0]


class Pieces:
    """A tokenizer of these pieces; decodes as it is told."""

    def __init__(self, *pieces: tuple[str, str]) -> None:
        self.pieces = pieces

    def decode(self, tokens: list[int]) -> str:
        return "".join(self.pieces[t][1] for t in tokens)

    def convert_ids_to_tokens(self, token: int) -> str:
        return self.pieces[token][0]


@pytest.mark.parametrize(
    ("piece", "decoded", "text", "data"),
    [
        ("Ġthe", " the", " the", b" the"),  # byte-level BPE
        ("▁the", "the", " the", b" the"),  # SentencePiece
        ("▁", "", " ", b" "),
        ("é", "é", "é", "é".encode()),
        ("<0xE2>", "\ufffd", "\ufffd", b"\xe2"),
        ("ĠâĤ", " \ufffd", " \ufffd", b" \xe2\x82"),
        ("日?", "\ufffd", "\ufffd", None),
    ],
)
def test_tokens_as_text_and_bytes(piece: str, decoded: str, text: str, data: bytes) -> None:
    vocabulary = Vocabulary(Pieces((piece, decoded)))
    assert vocabulary.text(0) == text
    assert vocabulary.data(0) == data


def test_timeout(client: TestClient, engine: FakeEngine) -> None:
    engine.open.clear()
    body = {"model": "chat", "messages": HELLO, "timeout": 0.02}
    response = client.post(CHAT, json=body)
    error = error_of(response, 408)
    assert (error["code"], error["param"]) == ("timeout", "timeout")
    assert response.headers["x-should-retry"] == "false"
    (chunk,) = events(client.post(CHAT, json={**body, "stream": True}))
    assert chunk == {"error": error}


def test_engine_error(client: TestClient, engine: FakeEngine) -> None:
    engine.error = "out of memory"
    body = {"model": "chat", "messages": HELLO}
    error = error_of(client.post(CHAT, json=body), 500)
    assert error["message"] == "out of memory"
    assert error["type"] == "server_error"
    (chunk,) = events(client.post(CHAT, json={**body, "stream": True}))
    assert chunk == {"error": error}


def test_one_failed_choice_ends_the_others(client: TestClient, engine: FakeEngine) -> None:
    engine.token_seconds = 0.01
    threading.Timer(0.1, setattr, (engine, "error", "broken")).start()
    body = {"model": "chat", "prompt": ["a", "b"], "ignore_eos": True, "max_tokens": 3000}
    assert error_of(client.post(TEXT, json=body), 500)["message"] == "broken"
    assert engine.idle()


@pytest.mark.parametrize("stream", [False, True])
def test_a_stopping_engine_aborts(client: TestClient, engine: FakeEngine, stream: bool) -> None:
    engine.token_seconds = 0.01
    threading.Timer(0.1, engine.close).start()
    body = {"model": "chat", "prompt": "a", "ignore_eos": True, "max_tokens": 3000}
    response = client.post(TEXT, json={**body, "stream": stream})
    document = events(response)[-1] if stream else response.json()
    assert document["choices"][0]["finish_reason"] == "abort"
    refused = client.post(TEXT, json=body)
    assert error_of(refused, 503)["message"] == "the engine is stopping"
    assert refused.headers["retry-after"] == "5"


def test_a_full_queue() -> None:
    engine = FakeEngine(queue=2)
    engine.open.clear()
    with TestClient(create_app(engine)) as client:
        response = client.post(TEXT, json={"model": "chat", "prompt": ["a", "b", "c"]})
        assert error_of(response, 429)["code"] == "rate_limit_exceeded"
        assert response.headers["retry-after"] == "1"
        assert engine.idle(), "prompts submitted before the refused one must go, too"
        engine.open.set()
        assert client.post(TEXT, json={"model": "chat", "prompt": ["a", "b"]}).status_code == 200
    engine.close()


def test_bugs_stay_inside(client: TestClient, engine: FakeEngine) -> None:
    def broken(*args: Any) -> None:
        raise AssertionError("secret")

    engine.submit = broken  # type: ignore[method-assign]
    error = error_of(client.post(TEXT, json={"model": "chat", "prompt": "a"}), 500)
    assert error["message"] == "internal error"
    assert error["type"] == "server_error"


def test_bugs_in_a_stream(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any) -> None:
        raise AssertionError("secret")

    monkeypatch.setattr("moecc.server.answers.TextForm.delta", broken)
    body = {"model": "chat", "prompt": "a", "stream": True}
    (chunk,) = events(client.post(TEXT, json=body))
    assert chunk["error"]["message"] == "internal error"
    assert "AssertionError: secret" in caplog.text


def test_pings(client: TestClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "PING_SECONDS", 0.02)
    engine.open.clear()
    threading.Timer(0.2, engine.open.set).start()
    body = {"model": "chat", "prompt": "a", "seed": 1, "max_tokens": 3}
    response = client.post(TEXT, json={**body, "stream": True})
    assert response.text.startswith(": ping\n\n: ping\n\n")
    text = "".join(c["choices"][0]["text"] for c in events(response))
    assert text == answer("chat", "a", 1, 3)


def test_large_bodies(engine: FakeEngine) -> None:
    with TestClient(create_app(engine, max_body_bytes=100)) as client:
        response = client.post(TEXT, json={"model": "chat", "prompt": "a" * 100})
        assert error_of(response, 413)["message"] == "the body has more than 100 bytes"
        assert client.post(TEXT, json={"model": "chat", "prompt": "a"}).status_code == 200


def test_bodies_of_another_type(client: TestClient) -> None:
    body = json.dumps({"model": "chat", "prompt": "a"})
    for headers in ({}, {"Content-Type": "text/plain"}):
        response = client.post(TEXT, content=body, headers=headers)
        assert "Content-Type: application/json" in error_of(response, 415)["message"]
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert client.post(TEXT, content=body, headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        ("", 401),
        ("Bearer", 401),
        ("Bearer wrong", 401),
        ("Basic kéy", 401),
        ("Bearer kéy", 200),
        ("bearer kéy ", 200),
    ],
)
def test_api_key(engine: FakeEngine, header: str | None, status: int) -> None:
    headers = {} if header is None else {"Authorization": header.encode()}
    with TestClient(create_app(engine, api_key="kéy")) as client:
        for path in ("/health", "/metrics", "/version"):
            assert client.get(path).status_code == 200
        for method, path, body in (
            ("GET", "/v1/models", None),
            ("GET", "/api/state", None),
            ("POST", "/v1/completions", {"model": "chat", "prompt": "a"}),
            ("POST", "/tokenize", {"model": "chat", "prompt": "a"}),
            ("POST", "/detokenize", {"model": "chat", "tokens": [97]}),
        ):
            response = client.request(method, path, json=body, headers=headers)
            assert response.status_code == status, path
            if status == 401:
                assert error_of(response, 401)["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer"
        assert client.get("/api/events").status_code == 401
        assert client.get("/v1/nowhere", headers=headers).status_code == (
            401 if status == 401 else 404
        )


def test_health(engine: FakeEngine) -> None:
    app = create_app(engine, api_key="key")
    with TestClient(app) as client:
        assert client.get("/health").json() == {"status": "ok"}
        app.state.stopping = True
        assert error_of(client.get("/health"), 503)["message"] == "the server is stopping"
        app.state.stopping = False
        engine.alive = False
        error = error_of(client.get("/health"), 503)
        assert (error["message"], error["type"]) == ("the engine is dead", "unavailable_error")


def test_version(client: TestClient) -> None:
    assert client.get("/version").json() == {"version": __version__}


def test_page(client: TestClient) -> None:
    response = client.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = response.headers["content-security-policy"].split("; ")
    assert policy[:4] == [
        "default-src 'none'",
        "script-src 'unsafe-inline'",
        "style-src 'unsafe-inline'",
        "connect-src 'self'",
    ]


def test_state(client: TestClient, engine: FakeEngine) -> None:
    idle = client.get("/api/state").json()
    assert idle["last_reconfiguration"] is None
    assert (idle["reconfigurations"], idle["tokens_per_second"]) == (0, 0.0)
    for model in ("chat", "math", "chat"):
        body = {"model": model, "prompt": "abc", "max_tokens": 3, "ignore_eos": True}
        assert client.post(TEXT, json=body).status_code == 200
    state = client.get("/api/state").json()
    assert state.pop("uptime") > 0
    assert state == {
        "version": __version__,
        "artifact": engine.artifact_hash,
        "mode": "swap",
        "policy": "fifo",
        "batching": "continuous",
        "variants": [
            {
                "id": name,
                "base": name == "base",
                "resident": name == "chat",
                "running": 0,
                "waiting": 0,
                "batch": 0,
                "prompt_tokens": 3 * requests,
                "generation_tokens": 3 * requests,
                "max_model_len": MAX_MODEL_LEN,
            }
            for name, requests in (("base", 0), ("chat", 2), ("math", 1))
        ],
        "kv_blocks": {"used": 0, "total": 8},
        "memory": {"experts": 1000, "non_expert": 200, "kv": 30},
        "reconfigurations": 3,
        "last_reconfiguration": {"from": "math", "to": "chat", "seconds": 0.25},
        "steps": 9,
        "tokens_per_second": 3.0,
        "alive": True,
    }


def test_rates_forget(monkeypatch: pytest.MonkeyPatch, engine: FakeEngine) -> None:
    from moecc.server.state import State

    now = [100.0]
    monkeypatch.setattr("moecc.server.state.time.monotonic", lambda: now[0])
    state = State(engine)
    for _ in range(30):
        state.generated(2)
        now[0] += 0.05
    assert state.tokens_per_second() == pytest.approx(20.0)
    now[0] += 2.0
    assert 0.0 < state.tokens_per_second() < 20.0
    now[0] += 2.0
    assert state.tokens_per_second() == 0.0


def test_state_events(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moecc.server.app.STATE_SECONDS", 0.02)
    app = create_app(engine)
    threading.Timer(0.2, setattr, (app.state, "stopping", True)).start()
    with TestClient(app) as client:
        blocks = client.get("/api/events").text.split("\n\n")
    states = [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]
    assert 2 <= len(states) <= 11
    assert all(set(s) == set(client_state(engine)) for s in states)


def client_state(engine: FakeEngine) -> dict[str, Any]:
    from moecc.server.state import State

    return State(engine).document()


def samples(client: TestClient) -> dict[str, float]:
    """Values by series, as Prometheus would read them."""
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = [line for line in response.text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_metrics(client: TestClient) -> None:
    sizes = []
    for model, seed in (("chat", 1), ("math", 2), ("chat", 3)):
        body = {"model": model, "prompt": "abc", "seed": seed, "max_tokens": 100}
        assert client.post(TEXT, json=body).status_code == 200
        sizes.append(natural_length(model, (97, 98, 99), seed))
    found = samples(client)
    chat = sizes[0] + sizes[2]
    for prefix in ("moecc_", "vllm:"):
        for name, value in {
            'num_requests_running{model_name="chat"}': 0,
            'num_requests_waiting{model_name="chat"}': 0,
            'kv_cache_usage_perc{model_name="chat"}': 0,
            'prompt_tokens_total{model_name="chat"}': 6,
            'prompt_tokens_total{model_name="base"}': 0,
            'generation_tokens_total{model_name="chat"}': chat,
            'generation_tokens_total{model_name="math"}': sizes[1],
            'request_success_total{finished_reason="stop",model_name="chat"}': 2,
            'request_success_total{finished_reason="abort",model_name="chat"}': 0,
            'time_to_first_token_seconds_count{model_name="chat"}': 2,
            'inter_token_latency_seconds_count{model_name="chat"}': chat - 2,
            'e2e_request_latency_seconds_count{model_name="chat"}': 2,
            'e2e_request_latency_seconds_bucket{le="+Inf",model_name="math"}': 1,
            'request_queue_time_seconds_count{model_name="chat"}': 2,
            'request_prefill_time_seconds_count{model_name="chat"}': 2,
            'request_decode_time_seconds_count{model_name="base"}': 0,
            'request_prompt_tokens_sum{model_name="chat"}': 6,
            'request_generation_tokens_sum{model_name="chat"}': chat,
            'request_generation_tokens_bucket{le="2000.0",model_name="chat"}': 2,
        }.items():
            assert found[prefix + name] == value, name
    for name, value in {
        'moecc_variant_swaps_total{from_variant="",to_variant="chat"}': 1,
        'moecc_variant_swaps_total{from_variant="math",to_variant="chat"}': 1,
        "moecc_variant_swap_seconds_count": 3,
        "moecc_variant_swap_seconds_sum": 0.75,
        'moecc_variant_resident{model_name="chat"}': 1,
        'moecc_variant_resident{model_name="math"}': 0,
        'moecc_gpu_memory_bytes{kind="experts"}': 1000,
        'moecc_gpu_memory_bytes{kind="kv"}': 30,
    }.items():
        assert found[name] == value, name
    assert not [name for name in found if "_created" in name or name.startswith("vllm:variant")]


def test_metrics_parse(client: TestClient) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    families = list(text_string_to_metric_families(client.get("/metrics").text))
    assert len({f.name for f in families}) == len(families) == 2 * 14 + 4


def test_engines_that_refuse(client: TestClient, engine: FakeEngine) -> None:
    def stopped(*args: Any) -> None:
        raise StoppedError("stopping", "try another server")

    engine.submit = stopped  # type: ignore[method-assign]
    body = {"model": "chat", "messages": HELLO, "stream": True}
    error = error_of(client.post(CHAT, json=body), 503)
    assert error["message"] == "stopping (try another server)"
    assert error["type"] == "unavailable_error"
