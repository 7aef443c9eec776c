"""The page in a real browser: headless Chromium, driven by playwright, on an app's own server."""

from __future__ import annotations

import json
import shlex
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count

import pytest
import uvicorn
from fake_engine import NO_TEMPLATE, FakeEngine, answer, chat_text

from moecc.runtime.interface import Deliver
from moecc.runtime.request import Finish, Output, Request, Timing
from moecc.server.app import create_app

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
Browser, Locator, Page = sync_api.Browser, sync_api.Locator, sync_api.Page
expect = sync_api.expect

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, _NAMES)), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on the PATH (Debian: apt-get install chromium)"
)

VARIANTS = ("base", "chat", "math", NO_TEMPLATE)
WAIT_MS = 20_000
KEY = "s3cret-key"
PAUSE = 2
MARKUP = "<img src=x onerror=\"document.title='owned'\"><b>bold</b> &amp; <script>1</script>"
HTTP_ERROR = "Failed to load resource: the server responded with a status of"


class Pausing(FakeEngine):
    """Stands still in the middle of answers if `pausing`, until `open` is set."""

    pausing = False

    def submit(self, request: Request, deliver: Deliver) -> None:
        delivered = count(1)

        def deliver_and_pause(output: Output) -> None:
            deliver(output)
            if next(delivered) == PAUSE and self.pausing:
                self.open.clear()

        super().submit(request, deliver_and_pause)


class OneAnswer(FakeEngine):
    """Says the same whatever it is asked."""

    def __init__(self, text: str) -> None:
        super().__init__(VARIANTS)
        self.text = text

    def submit(self, request: Request, deliver: Deliver) -> None:
        now = time.monotonic()
        deliver(Output(self.text, (1, 2, 3)))
        deliver(Output(finish=Finish("stop", Timing(now, now, now, now))))


@contextmanager
def served(engine: FakeEngine, api_key: str | None = None, port: int = 0) -> Iterator[int]:
    """An engine's app on a server of this process; its port."""
    app = create_app(engine, api_key=api_key)
    with socket.create_server(("127.0.0.1", port)) as listener:
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            app.state.stopping = True
            server.should_exit = True
            thread.join()


@dataclass
class Tab:
    """The page as its user knows it: controls by their labels."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("request", lambda request: self.urls.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda message: self.complaints.append(message.text))

    def control(self, label: str) -> Locator:
        return self.page.get_by_label(label, exact=True)

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    def pick(self, variant: str, label: str = "Variant") -> None:
        self.control(label).select_option(variant)

    def send(self, prompt: str) -> None:
        self.control("Prompt").fill(prompt)
        self.control("Prompt").press("Enter")

    def card(self, variant: str) -> Locator:
        """The newest answer of a variant."""
        return self.page.get_by_role("article", name=f"Answer of {variant}").last

    def text(self, variant: str) -> Locator:
        return self.card(variant).locator(".text")

    def expect_answer(self, variant: str, text: str) -> None:
        expect(self.card(variant)).to_have_attribute("aria-busy", "false")
        assert self.text(variant).text_content() == text

    def expect_error(self, variant: str, text: str) -> None:
        expect(self.card(variant).get_by_role("alert")).to_contain_text(text)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    # Of this module only: while it is open this thread counts as one that runs an event loop.
    with sync_api.sync_playwright() as playwright:
        expect.set_options(timeout=WAIT_MS)
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


Open = Callable[..., Tab]


@pytest.fixture
def open_tab(browser: Browser) -> Iterator[Open]:
    """Opens the page of a port. In the end: no complaints, nothing asked of another origin."""
    tabs: list[tuple[Tab, str, tuple[str, ...]]] = []

    def opened(port: int, *, complaints: tuple[str, ...] = (), **options: object) -> Tab:
        """`complaints`: how those begin that are to be expected."""
        context = browser.new_context(permissions=["clipboard-read", "clipboard-write"], **options)
        context.set_default_timeout(WAIT_MS)
        tab = Tab(context.new_page())
        origin = f"http://127.0.0.1:{port}/"
        tabs.append((tab, origin, complaints))
        tab.page.goto(origin)
        return tab

    yield opened
    for tab, origin, complaints in tabs:
        tab.page.context.close()
        assert [c for c in tab.complaints if not c.startswith(complaints)] == []
        assert [url for url in tab.urls if not url.startswith((origin, "data:"))] == []


@pytest.fixture
def engine() -> Iterator[Pausing]:
    engine = Pausing(VARIANTS)
    yield engine
    engine.open.set()
    engine.close()


@pytest.fixture
def port(engine: Pausing) -> Iterator[int]:
    with served(engine) as port:
        yield port


@pytest.fixture
def tab(open_tab: Open, port: int) -> Tab:
    tab = open_tab(port)
    expect(tab.control("Variant").locator("option")).to_have_text(list(VARIANTS))
    return tab


def chat_answer(variant: str, *said: str, seed: int | None = None, size: int | None = None) -> str:
    """What the engine answers to a conversation, user first."""
    roles = ("user", "assistant") * len(said)
    messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]
    return answer(variant, chat_text(messages), seed, size)


def test_an_answer_streams(tab: Tab, engine: Pausing) -> None:
    whole = chat_answer("chat", "Hello")
    engine.pausing = True
    tab.pick("chat")
    tab.send("Hello")
    expect(tab.text("chat")).to_have_text(whole[:PAUSE])
    expect(tab.card("chat")).to_have_attribute("aria-busy", "true")
    expect(tab.button("Send")).to_be_hidden()
    engine.open.set()
    tab.expect_answer("chat", whole)
    stats = tab.card("chat").locator(".stats").text_content() or ""
    tokens, rate, first = stats.split(" · ")
    assert tokens == f"{len(whole)} tokens"
    assert float(rate.removesuffix(" tokens/s")) > 0.0
    assert first.startswith("first token ")


def test_a_conversation_goes_on_until_cleared(tab: Tab) -> None:
    first = chat_answer("base", "one")
    second = chat_answer("base", "one", first, "two")
    tab.send("one")
    tab.expect_answer("base", first)
    tab.send("two")
    tab.expect_answer("base", second)
    tab.button("Clear").click()
    expect(tab.page.get_by_role("article")).to_have_count(0)
    tab.send("two")
    tab.expect_answer("base", chat_answer("base", "two"))


def test_side_by_side(tab: Tab) -> None:
    tab.control("Side by side").check()
    tab.pick("math")
    tab.pick("chat", "Second variant")
    tab.send("Which?")
    answers = {name: chat_answer(name, "Which?") for name in ("math", "chat")}
    assert answers["math"] != answers["chat"]
    for name, text in answers.items():
        tab.expect_answer(name, text)
    left, right = tab.card("math").bounding_box(), tab.card("chat").bounding_box()
    assert left is not None
    assert right is not None
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] < right["x"]
    # Each goes on with what it said itself.
    tab.send("And now?")
    for name, text in answers.items():
        tab.expect_answer(name, chat_answer(name, "Which?", text, "And now?"))


def test_settings_are_sent(tab: Tab, engine: Pausing) -> None:
    tab.control("Temperature").fill("0.25")
    tab.control("Max tokens").fill("4")
    tab.control("Seed").fill("11")
    tab.send("Hi")
    tab.expect_answer("base", chat_answer("base", "Hi", seed=11, size=4))
    expect(tab.card("base").locator(".stats")).to_contain_text("4 tokens")
    expect(tab.card("base").locator(".stats")).to_contain_text("cut at the token limit")
    sampling = engine.submitted[-1].sampling
    assert (sampling.temperature, sampling.max_tokens, sampling.seed) == (0.25, 4, 11)
    for label in ("Temperature", "Max tokens", "Seed"):
        tab.control(label).fill("")
    tab.button("Clear").click()
    tab.send("Hi")
    tab.expect_answer("base", chat_answer("base", "Hi"))
    sampling = engine.submitted[-1].sampling
    assert (sampling.temperature, sampling.max_tokens, sampling.seed) == (1.0, None, None)


def test_a_wrong_setting_is_not_sent(tab: Tab, engine: Pausing) -> None:
    tab.control("Max tokens").fill("0")
    tab.send("Hi")
    expect(tab.control("Max tokens")).to_be_focused()
    expect(tab.control("Prompt")).to_have_value("Hi")
    assert engine.submitted == []


def test_keyboard(tab: Tab) -> None:
    prompt = tab.control("Prompt")
    expect(prompt).to_be_focused()
    prompt.press("Enter")  # nothing to send
    tab.page.keyboard.type("a")
    prompt.press("Shift+Enter")
    tab.page.keyboard.type("b")
    expect(prompt).to_have_value("a\nb")
    prompt.press("Enter")
    expect(prompt).to_have_value("")
    expect(prompt).to_be_focused()
    tab.expect_answer("base", chat_answer("base", "a\nb"))
    expect(tab.page.get_by_role("article")).to_have_count(1)


@pytest.mark.parametrize("way", ["button", "escape"])
def test_stop(tab: Tab, engine: Pausing, way: str) -> None:
    engine.pausing = True
    tab.send("Hi")
    expect(tab.text("base")).to_have_text(chat_answer("base", "Hi")[:PAUSE])
    if way == "button":
        tab.button("Stop").click()
    else:
        tab.page.keyboard.press("Escape")
    expect(tab.card("base")).to_have_attribute("aria-busy", "false")
    expect(tab.card("base").locator(".stats")).to_contain_text("stopped")
    expect(tab.button("Stop")).to_be_hidden()
    expect(tab.card("base").get_by_role("alert")).to_have_count(0)
    assert engine.idle()


def test_plain_completion(tab: Tab) -> None:
    tab.control("Completion").check()
    tab.send("Once upon")
    tab.expect_answer("base", answer("base", "Once upon"))
    expect(tab.card("base").locator("header")).to_contain_text("completion")


def test_a_variant_without_a_chat_template(open_tab: Open, port: int) -> None:
    tab = open_tab(port, complaints=(f"{HTTP_ERROR} 400",))
    tab.pick(NO_TEMPLATE)
    tab.send("Once")
    tab.expect_error(NO_TEMPLATE, "HTTP 400: the model has no chat template")
    tab.button("Send as a plain completion").click()
    tab.expect_answer(NO_TEMPLATE, answer(NO_TEMPLATE, "Once"))
    tab.send("Twice")  # it is known by now
    tab.expect_answer(NO_TEMPLATE, answer(NO_TEMPLATE, "Twice"))
    expect(tab.page.locator("main").get_by_role("alert")).to_have_count(0)


def test_what_a_model_writes_is_text(open_tab: Open) -> None:
    with served(OneAnswer(MARKUP)) as port:
        tab = open_tab(port)
        tab.pick("chat")
        tab.send(MARKUP)
        tab.expect_answer("chat", MARKUP)
        expect(tab.page.locator(".prompt")).to_have_text(MARKUP)
        assert tab.page.locator("main :is(img, b, script)").all_text_contents() == ["chat"]
        assert tab.page.title() == "moecc"


def test_a_refused_request(open_tab: Open, port: int) -> None:
    tab = open_tab(port, complaints=(f"{HTTP_ERROR} 400",))
    tab.send("x" * 5000)
    tab.expect_error("base", "HTTP 400: the prompt has 5017 tokens, the model takes 4096")
    tab.send("short")  # what failed is no part of the conversation
    tab.expect_answer("base", chat_answer("base", "short"))


def test_an_error_in_the_stream(tab: Tab, engine: Pausing) -> None:
    whole = chat_answer("base", "Hi")
    engine.pausing = True
    tab.send("Hi")
    expect(tab.text("base")).to_have_text(whole[:PAUSE])
    engine.error = "out of <b>memory</b>"
    tab.expect_error("base", "out of <b>memory</b>")
    tab.expect_answer("base", whole[:PAUSE])
    engine.error, engine.pausing = None, False
    engine.open.set()
    tab.button("Try again").click()
    tab.expect_answer("base", whole)
    expect(tab.card("base").get_by_role("alert")).to_have_count(0)


def test_the_strip(tab: Tab, engine: Pausing) -> None:
    strip = tab.page.get_by_role("region", name="Engine, live")
    expect(tab.page.locator("#connection")).to_have_text("live")
    expect(tab.page.locator("#facts")).to_have_text("swap mode, fifo policy, continuous batching")
    expect(tab.page.locator("#identity")).to_contain_text(engine.artifact_hash[:12])
    variants = tab.page.locator("#variants li")
    expect(variants).to_have_text([f"{name} 0 (not loaded)" for name in VARIANTS])
    kinds = tab.page.locator("#kinds li")
    expect(kinds).to_have_text(["experts 1.0 KiB", "non-expert 0.2 KiB", "KV 0.0 KiB"])
    tab.control("Side by side").check()
    tab.pick("chat", "Second variant")
    engine.pausing = True
    engine.open.clear()
    tab.send("Hi")
    expect(tab.page.locator("#waiting")).to_have_text("2")
    engine.open.set()  # both at once
    before, after = (request.variant for request in engine.submitted)
    expect(variants.nth(VARIANTS.index(before))).to_have_text(f"{before} 1 (not loaded)")
    expect(variants.nth(VARIANTS.index(after))).to_have_text(f"{after} 1")
    expect(strip).to_contain_text("Running batch: 2 requests, 2 tokens in the last step")
    expect(tab.page.locator("#batch span")).to_have_text(["base", "chat"])
    expect(tab.page.locator("#blocks")).to_have_text("2 / 8")
    expect(tab.page.locator("#reconfigurations")).to_have_text("2")
    expect(tab.page.locator("#last")).to_have_text(f"last: {before} → {after}, 250 ms")
    engine.open.set()
    expect(strip).to_contain_text("Running batch: idle")


def test_the_strip_shows_the_queue_and_a_dead_engine(tab: Tab, engine: Pausing) -> None:
    expect(tab.page.locator("#waiting")).to_have_text("0")
    engine.open.clear()
    tab.send("Hi")
    expect(tab.page.locator("#waiting")).to_have_text("1")
    expect(tab.page.locator("#variants li").first).to_contain_text("base 0 +1 waiting")
    engine.open.set()
    expect(tab.page.locator("#waiting")).to_have_text("0")
    engine.alive = False
    expect(tab.page.get_by_text("The engine has stopped")).to_be_visible()


def test_the_strip_comes_back_with_the_server(open_tab: Open) -> None:
    expected = ("Failed to load resource: net::", f"{HTTP_ERROR} 503")
    with served(FakeEngine(VARIANTS)) as port:
        tab = open_tab(port, complaints=expected)
        expect(tab.page.locator("#connection")).to_have_text("live")
    expect(tab.page.locator("#connection")).to_have_text("reconnecting")
    tab.send("Hi")
    tab.expect_error("base", "The server cannot be reached.")
    with served(FakeEngine(("one", "two")), port=port):
        expect(tab.page.locator("#connection")).to_have_text("live")
        expect(tab.page.locator("#variants li")).to_have_count(2)
        expect(tab.control("Variant").locator("option")).to_have_text(["one", "two"])


def test_api_key(open_tab: Open) -> None:
    with served(FakeEngine(VARIANTS), api_key=KEY) as port:
        tab = open_tab(port, complaints=(f"{HTTP_ERROR} 401",))
        expect(tab.control("API key")).to_be_visible()
        expect(tab.page.locator("#connection")).to_have_text("needs an API key")
        tab.control("API key").fill("wrong")
        tab.control("API key").press("Enter")
        expect(tab.page.get_by_text("The server did not accept this key.")).to_be_visible()
        tab.control("API key").fill(KEY)
        tab.button("Use key").click()
        expect(tab.page.locator("#connection")).to_have_text("live")
        expect(tab.control("API key")).to_be_hidden()
        tab.send("Hi")
        tab.expect_answer("base", chat_answer("base", "Hi"))
        tab.button("Copy as curl").click()
        assert KEY not in clipboard(tab)
        assert "Authorization: Bearer $API_KEY" in clipboard(tab)
        tab.page.reload()  # the key stays as long as the tab
        expect(tab.page.locator("#connection")).to_have_text("live")
        expect(tab.control("API key")).to_be_hidden()


def clipboard(tab: Tab) -> str:
    expect(tab.button("Copied")).to_be_visible()
    return str(tab.page.evaluate("navigator.clipboard.readText()"))


def test_copy_as_curl(tab: Tab) -> None:
    prompt = """It's "$HOME" \\ `x`\n!"""
    tab.control("Seed").fill("3")
    tab.send(prompt)
    tab.expect_answer("base", chat_answer("base", prompt, seed=3))
    tab.button("Copy as curl").click()
    *command, body = shlex.split(clipboard(tab).replace("\\\n", ""))
    url = f"{tab.page.url}v1/chat/completions"
    assert command == ["curl", "-N", url, "-H", "Content-Type: application/json", "-d"]
    assert json.loads(body) == {
        "model": "base",
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0.7,
        "max_tokens": 256,
        "seed": 3,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


_PARSE = """async (chunks) => {
  const pull = (stream) => {
    if (chunks.length) stream.enqueue(new Uint8Array(chunks.shift()));
    else stream.close();
  };
  const found = [];
  for await (const data of events(new Response(new ReadableStream({ pull })))) found.push(data);
  return found;
}"""
_STREAM = (
    "data: one\n\n: ping\n\ndata:two\r\ndata: lines\r\n\r\n"
    "data: naïve 🙂\ndata:  second\revent: x\r\r"
    'id: 3\n\ndata\u2028: no\n\ndata: {"a": "\u2028"}\n\ndata: cut off'
)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_are_read_whatever_the_chunks(tab: Tab, size: int) -> None:
    data = _STREAM.encode()
    chunks = [list(data[start : start + size]) for start in range(0, len(data), size)]
    found = tab.page.evaluate(_PARSE, chunks)
    assert found == ["one", "two\nlines", "naïve 🙂\n second", '{"a": "\u2028"}']


def test_narrow(open_tab: Open, port: int) -> None:
    tab = open_tab(port, viewport={"width": 400, "height": 800})
    tab.control("Side by side").check()
    tab.pick("chat", "Second variant")
    tab.send("long" * 100)
    tab.expect_answer("chat", chat_answer("chat", "long" * 100))
    expect(tab.page.locator("#connection")).to_have_text("live")
    assert tab.page.evaluate("document.documentElement.scrollWidth") == 400
    expect(tab.control("Prompt")).to_be_in_viewport(ratio=1.0)
    expect(tab.button("Send")).to_be_in_viewport(ratio=1.0)


def brightness(tab: Tab, selector: str, style: str) -> float:
    script = f"(element) => getComputedStyle(element).{style}"
    color = str(tab.page.locator(selector).evaluate(script))
    red, green, blue = (int(v) for v in color.removeprefix("rgb(").removesuffix(")").split(","))
    return (0.3 * red + 0.6 * green + 0.1 * blue) / 255


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_color_scheme(open_tab: Open, port: int, scheme: str) -> None:
    tab = open_tab(port, color_scheme=scheme)
    text, back = brightness(tab, "body", "color"), brightness(tab, "body", "backgroundColor")
    dark, light = sorted((text, back))
    assert dark < 0.2
    assert light > 0.8
    assert (back > text) == (scheme == "light")
