"""A real server: official client, many at once, disconnects, signals."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from fake_engine import FakeEngine, answer, chat_text

from moecc.errors import MoeccError
from moecc.server.app import create_app
from moecc.server.serve import serve

TESTS = Path(__file__).parent
HELLO = [{"role": "user", "content": "hello"}]
ENDLESS: dict[str, Any] = {"prompt": "a", "max_tokens": 3000, "extra_body": {"ignore_eos": True}}


class Server:
    """A server on a thread of the tests, with its engine within reach."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        config = uvicorn.Config(create_app(engine), port=0, lifespan="off", log_level="warning")
        self._server = uvicorn.Server(config)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],))
        self._thread.start()

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join()
        self.engine.close()

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="any", max_retries=0, timeout=20, **options
        )

    def metric(self, name: str) -> float:
        for line in httpx.get(f"{self.url}/metrics").text.splitlines():
            if line.startswith(f"{name} "):
                return float(line.rsplit(" ", 1)[1])
        raise KeyError(name)


@contextlib.contextmanager
def served(engine: FakeEngine) -> Iterator[Server]:
    server = Server(engine)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with served(FakeEngine(token_seconds=0.001)) as server:
        yield server


def test_the_official_client(server: Server) -> None:
    client = server.client()
    assert [m.id for m in client.models.list()] == ["base", "chat", "math"]
    done = client.chat.completions.create(
        model="chat", messages=HELLO, seed=5, logprobs=True, top_logprobs=1, max_tokens=4
    )
    text = answer("chat", chat_text(HELLO), 5, 4)
    choice = done.choices[0]
    assert (choice.message.content, choice.finish_reason) == (text, "length")
    assert choice.logprobs is not None
    assert [p.token for p in choice.logprobs.content or ()] == list(text)
    assert done.usage is not None
    assert done.usage.completion_tokens == 4
    written = client.completions.create(model="math", prompt="1+1=", seed=5, logprobs=0)
    assert written.choices[0].text == answer("math", "1+1=", 5)[:16]
    # What the client got can be sent back as it is.
    again = [*HELLO, choice.message.model_dump(), {"role": "user", "content": "more"}]
    assert client.chat.completions.create(model="chat", messages=again).choices


def test_the_official_client_streams(server: Server) -> None:
    chunks = list(
        server.client().chat.completions.create(
            model="chat",
            messages=HELLO,
            seed=5,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = answer("chat", chat_text(HELLO), 5)
    deltas = [c.choices[0].delta for c in chunks if c.choices]
    assert deltas[0].role == "assistant"
    assert "".join(d.content or "" for d in deltas) == text
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(text)


def test_the_official_client_gets_its_errors(server: Server) -> None:
    client = server.client()
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-4", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="chat", prompt="a", echo=True)
    assert bad.value.param == "echo"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="chat", prompt="a" * 5000)
    assert long.value.code == "context_length_exceeded"
    late = {"timeout": 0.05, "ignore_eos": True}
    with pytest.raises(openai.APIStatusError) as slow:
        server.client().with_options(max_retries=2).completions.create(
            model="chat", prompt="a", max_tokens=3000, extra_body=late
        )
    assert slow.value.status_code == 408
    with pytest.raises(openai.APIError, match="timeout"):
        list(
            client.completions.create(
                model="chat", prompt="a", max_tokens=3000, extra_body=late, stream=True
            )
        )
    assert server.engine.idle()


def test_many_at_once_do_not_mix(server: Server) -> None:
    client = server.client()

    def worker(number: int) -> list[tuple[str, str]]:
        pairs = []
        for turn in range(6):
            model = ("base", "chat", "math")[(number + turn) % 3]
            prompt, seed = f"{number}/{turn}", number * 10 + turn
            if turn % 2:
                stream = client.completions.create(
                    model=model, prompt=prompt, seed=seed, max_tokens=100, stream=True
                )
                found = "".join(chunk.choices[0].text for chunk in stream)
            else:
                done = client.completions.create(
                    model=model, prompt=prompt, seed=seed, max_tokens=100
                )
                found = done.choices[0].text
            pairs.append((found, answer(model, prompt, seed)))
        return pairs

    with ThreadPoolExecutor(8) as pool:
        pairs = [pair for found in pool.map(worker, range(8)) for pair in found]
    assert len(pairs) == 48
    assert [found for found, _ in pairs] == [expected for _, expected in pairs]


def prompt_answer(server: Server) -> None:
    """Checks that a request is answered soon: nothing else holds the slot."""
    start = time.monotonic()
    done = server.client().completions.create(model="base", prompt="q", seed=1, max_tokens=2)
    assert done.choices[0].text == answer("base", "q", 1, 2)
    assert time.monotonic() - start < 2


def test_disconnect_frees_the_slot() -> None:
    with served(FakeEngine(token_seconds=0.002, slots=1)) as server:
        stream = server.client().completions.create(model="chat", stream=True, **ENDLESS)
        next(stream)
        next(stream)
        stream.close()
        prompt_answer(server)
        running = 'moecc_num_requests_running{model_name="chat"}'
        assert server.metric(running) == 0

        body = {"model": "chat", "prompt": "a", "max_tokens": 3000, "ignore_eos": True}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json=body, timeout=0.1)
        prompt_answer(server)

        server.engine.open.clear()  # no output comes that could fail to be sent
        with (
            pytest.raises(httpx.ReadTimeout),
            httpx.stream(
                "POST", f"{server.url}/v1/completions", json={**body, "stream": True}, timeout=0.1
            ) as response,
        ):
            list(response.iter_lines())
        assert server.engine.idle()
        server.engine.open.set()
        prompt_answer(server)
        ended = 'moecc_request_success_total{finished_reason="%s",model_name="%s"}'
        assert server.metric(ended % ("abort", "chat")) == 3
        assert server.metric(ended % ("length", "base")) == 3
        assert server.metric('moecc_e2e_request_latency_seconds_count{model_name="chat"}') == 0


def test_200_canceled_requests() -> None:
    with served(FakeEngine(token_seconds=0.002, slots=4)) as server:
        raw = json.dumps({"model": "chat", "prompt": "a", "max_tokens": 3000, "ignore_eos": True})
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n"
        message = f"{head}Content-Type: application/json\r\n\r\n{raw}".encode()
        for _ in range(4):
            sockets = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(50)]
            for connection in sockets:
                connection.sendall(message)
            wait_for(lambda: sum(server.engine.stats().waiting.values()) == 46)
            for connection in sockets:
                connection.close()
            assert server.engine.idle()
        assert len(server.engine.submitted) == 200
        prompt_answer(server)
        for gauge in ("running", "waiting"):
            assert server.metric(f'moecc_num_requests_{gauge}{{model_name="chat"}}') == 0
        aborted = 'moecc_request_success_total{finished_reason="abort",model_name="chat"}'
        assert server.metric(aborted) == 200


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def test_a_body_without_end_is_cut(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        part = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
        with contextlib.suppress(ConnectionError):
            for _ in range(9):  # 9 MiB of an endless body, the limit is 8
                connection.sendall(part)
        assert connection.recv(12) == b"HTTP/1.1 413"


_CHILD = """
import json, sys, threading, time
from fake_engine import FakeEngine
from moecc.errors import MoeccError
from moecc.server.serve import serve

options = json.loads(sys.argv[1])

def load():
    print("loading", flush=True)
    time.sleep(options["load_seconds"])
    if options["error"]:
        raise MoeccError(options["error"])
    return FakeEngine(token_seconds=0.005)

try:
    serve(load, host="127.0.0.1", port=options["port"], api_key=None,
          shutdown_timeout=options["shutdown_timeout"],
          on_ready=lambda url: print(url, flush=True))
except MoeccError as error:
    sys.exit(error.message)
end = time.monotonic() + 1  # anyio's workers have been told to end, but nobody waits for it
while threading.active_count() > 1 and time.monotonic() < end:
    time.sleep(0.01)
print("threads:", *(thread.name for thread in threading.enumerate()), flush=True)
"""


class Child:
    """`serve` in a process of its own."""

    def __init__(self, **options: Any) -> None:
        defaults = {"port": 0, "load_seconds": 0.0, "error": None, "shutdown_timeout": 20.0}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, json.dumps({**defaults, **options})],
            cwd=TESTS.parent,
            env={"PYTHONPATH": f"{TESTS}:{TESTS.parent}", "PATH": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.line() == "loading"

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ended(self, seconds: float = 10.0) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=seconds)
        return self.process.returncode, out.strip(), err.strip()


@contextlib.contextmanager
def child(**options: Any) -> Iterator[Child]:
    running = Child(**options)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.communicate()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def streaming(url: str, tokens: int) -> Iterator[Iterator[dict[str, Any]]]:
    """Chunks of an answer that is `tokens` long, once it has begun."""
    body = {"model": "chat", "prompt": "a", "seed": 1, "ignore_eos": True, "stream": True}
    with httpx.stream(
        "POST", f"{url}/v1/completions", json={**body, "max_tokens": tokens}, timeout=20
    ) as response:
        lines = (line for line in response.iter_lines() if line.startswith("data: {"))
        first = next(lines)
        assert json.loads(first.removeprefix("data: "))["choices"]
        yield (json.loads(line.removeprefix("data: ")) for line in lines)


QUIET_END = (0, "threads: MainThread", "")


def test_loading_then_sigterm_drains() -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with child(port=port, load_seconds=1.0) as running:
        loading = httpx.get(f"{url}/health")
        assert loading.status_code == 503
        assert loading.json()["error"]["message"] == "Loading model"
        assert running.line() == url
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}
        with (
            httpx.stream("GET", f"{url}/api/events", timeout=20) as watched,
            streaming(url, 200) as chunks,
        ):
            running.process.send_signal(signal.SIGTERM)
            wait_for(lambda: httpx.get(f"{url}/health").status_code == 503)
            body = {"model": "chat", "prompt": "a"}
            refused = httpx.post(f"{url}/v1/completions", json=body)
            assert refused.status_code == 503
            assert refused.headers["retry-after"] == "5"
            rest = list(chunks)
            assert rest[-1]["choices"][0]["finish_reason"] == "length"
            text = "".join(chunk["choices"][0]["text"] for chunk in rest)
            assert text == answer("chat", "a", 1, 200)[1:]
            assert watched.read().startswith(b"data: {")
        assert running.ended() == QUIET_END


def test_sigterm_aborts_after_the_timeout() -> None:
    with child(shutdown_timeout=0.3) as running, streaming(running.line(), 3000) as chunks:
        running.process.send_signal(signal.SIGTERM)
        assert list(chunks)[-1]["choices"][0]["finish_reason"] == "abort"
        assert running.ended() == QUIET_END


def test_the_second_signal_ends_it_at_once() -> None:
    with child(shutdown_timeout=60) as running:
        url = running.line()
        with streaming(url, 3000):
            running.process.send_signal(signal.SIGINT)
            wait_for(lambda: httpx.get(f"{url}/health").status_code == 503)
            start = time.monotonic()
            running.process.send_signal(signal.SIGINT)
            code, out, _ = running.ended()
            assert (code, out) == (0, "threads: MainThread")
            assert time.monotonic() - start < 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_loading(number: signal.Signals) -> None:
    with child(load_seconds=60) as running:
        running.process.send_signal(number)
        assert running.ended() == QUIET_END


def test_a_model_that_does_not_load() -> None:
    with child(error="no such artifact") as running:
        assert running.ended() == (1, "", "no such artifact")


def never() -> FakeEngine:
    raise AssertionError("nothing may be loaded")


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(MoeccError, match=f"`127.0.0.1` port {port}: Address already in") as e:
            serve(never, host="127.0.0.1", port=port, api_key=None)
    assert e.value.hint == "choose another port, or stop the program that has this one"


def test_hosts_and_keys_that_cannot_be() -> None:
    with pytest.raises(MoeccError, match="cannot listen on `no such host`"):
        serve(never, host="no such host", port=0, api_key=None)
    with pytest.raises(MoeccError, match="the API key is empty"):
        serve(never, host="127.0.0.1", port=0, api_key="")


@pytest.mark.parametrize(
    ("host", "key", "warned"),
    [("0.0.0.0", None, 1), ("0.0.0.0", "key", 0), ("127.0.0.1", None, 0), ("localhost", None, 0)],
)
def test_open_doors_are_told_of(host: str, key: str | None, warned: int) -> None:
    told: list[str] = []

    def failing() -> FakeEngine:
        raise MoeccError("enough")

    before = threading.active_count()
    with pytest.raises(MoeccError, match="enough"):
        serve(failing, host=host, port=0, api_key=key, warn=told.append)
    assert len(told) == warned
    assert all("no API key" in text for text in told)
    assert threading.active_count() == before


def test_the_server_imports_no_torch() -> None:
    code = "import sys, moecc.server.serve; print([m for m in ('torch', 'transformers', 'numpy')"
    code += " if m in sys.modules])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n"
