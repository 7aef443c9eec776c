"""The routes: OpenAI's API, vLLM's additions to it, and what operators and the page need."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from importlib import resources
from typing import Any

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from moecc import __version__
from moecc.errors import MoeccError, StoppedError
from moecc.runtime import request as engine_request
from moecc.runtime.interface import EngineLike
from moecc.runtime.request import Output
from moecc.server import failure, protocol
from moecc.server.answers import ChatForm, Form, TextForm, stream, whole
from moecc.server.auth import ApiKey
from moecc.server.events import EventStream, event
from moecc.server.failure import Failure, FailureError, json_response
from moecc.server.fields import shown
from moecc.server.generation import Generation, Meter, unless_gone
from moecc.server.metrics import Metrics
from moecc.server.protocol import Call
from moecc.server.state import State

MAX_BODY_BYTES = 8 << 20
STATE_SECONDS = 0.5

_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Reader = Callable[[EngineLike, bytes], Call]


def create_app(
    engine: EngineLike, *, api_key: str | None = None, max_body_bytes: int = MAX_BODY_BYTES
) -> FastAPI:
    """The server of an engine that is ready; `app.state.stopping = True` when it is to end."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.stopping = False
    if api_key is not None:
        app.add_middleware(ApiKey, key=api_key)
    _add_errors(app)
    service = _Service(engine, max_body_bytes)
    _add_generation(app, service)
    _add_models(app, engine)
    _add_operation(app, engine, service)
    return app


class _Service:
    """Answers the calls that need the engine."""

    def __init__(self, engine: EngineLike, max_body_bytes: int) -> None:
        self.metrics = Metrics(engine)
        self.state = State(engine)
        self._engine = engine
        self._max_body_bytes = max_body_bytes
        engine.on_reconfigure(self._reconfigured)

    def _reconfigured(self, before: str, after: str, seconds: float) -> None:
        self.metrics.reconfigured(seconds)
        self.state.reconfigured(before, after, seconds)

    def _meter(self, request: engine_request.Request) -> Meter:
        observe = self.metrics.meter(request)

        def meter(output: Output) -> None:
            observe(output)
            self.state.generated(len(output.tokens))

        return meter

    async def generate(self, request: Request, read: Reader, form_type: type[Form]) -> Response:
        """The answer to a call; its requests end when the client goes away."""
        if request.app.state.stopping:  # the engine may not know yet
            raise StoppedError("the server is stopping", "try again later")
        raw = await self._body(request)
        form = await run_in_threadpool(lambda: form_type(read(self._engine, raw), self._engine))
        generation = Generation(self._engine, form.call.requests, self._meter)
        try:
            await run_in_threadpool(generation.submit)  # every token is looked at
        except BaseException:
            generation.cancel()
            raise
        if form.call.options.stream:
            return EventStream(stream(form, generation), on_close=generation.cancel)
        try:
            answer = await unless_gone(request.receive, whole(form, generation))
        finally:
            generation.cancel()
        return _nobody() if answer is None else json_response(answer)

    async def tokens(
        self, request: Request, convert: Callable[[EngineLike, bytes], dict[str, Any]]
    ) -> Response:
        """Text as tokens or back."""
        raw = await self._body(request)
        return json_response(await run_in_threadpool(convert, self._engine, raw))

    async def _body(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        # A page of another origin may post anything but JSON without asking first.
        if kind != "application/json":
            message = "the body must come with `Content-Type: application/json`"
            raise FailureError(Failure(415, message))
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self._max_body_bytes:
                message = f"the body has more than {self._max_body_bytes} bytes"
                raise FailureError(Failure(413, message))
        return bytes(body)


def _add_generation(app: FastAPI, service: _Service) -> None:
    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await service.generate(request, protocol.read_chat, ChatForm)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await service.generate(request, protocol.read_completion, TextForm)

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        return await service.tokens(request, protocol.tokenize)

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        return await service.tokens(request, protocol.detokenize)


def _add_models(app: FastAPI, engine: EngineLike) -> None:
    created = int(time.time())

    def describe(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "moecc",
            "root": name,
            "parent": None if name == engine.base else engine.base,
            "max_model_len": engine.max_model_len(name),
        }

    @app.get("/v1/models")
    async def models() -> Response:
        data = [describe(name) for name in engine.variants]
        return json_response({"object": "list", "data": data})

    @app.get("/v1/models/{name}")
    async def model(name: str) -> Response:
        if name not in engine.variants:
            raise protocol.unknown_model(engine, name)
        return json_response(describe(name))


def _add_operation(app: FastAPI, engine: EngineLike, service: _Service) -> None:
    @app.get("/health")
    async def health() -> Response:
        if app.state.stopping:
            return failure.unavailable("the server is stopping").response()
        if not engine.stats().alive:
            return failure.unavailable("the engine is dead").response()
        return json_response({"status": "ok"})

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(service.metrics.text(), media_type=_METRICS_TYPE)

    @app.get("/version")
    async def version() -> Response:
        return json_response({"version": __version__})

    @app.get("/")
    def page() -> Response:
        text = (resources.files("moecc.server") / "page.html").read_bytes()
        return Response(text, headers=_PAGE_HEADERS, media_type="text/html")

    @app.get("/api/state")
    async def state() -> Response:
        return json_response(service.state.document())

    @app.get("/api/events")
    async def events() -> Response:
        async def states() -> AsyncIterator[bytes]:
            while not app.state.stopping:
                yield event(service.state.document())
                await asyncio.sleep(STATE_SECONDS)

        return EventStream(states(), on_close=lambda: None)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(MoeccError)
    async def known(_: Request, error: MoeccError) -> Response:
        return failure.of_error(error).response()

    @app.exception_handler(FailureError)
    async def failed(_: Request, error: FailureError) -> Response:
        return error.failure.response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {shown(request.scope['path'])}: {error.detail}"
        headers = tuple((error.headers or {}).items())
        return Failure(error.status_code, message, headers=headers).response()

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, error: ClientDisconnect) -> Response:
        return _nobody()

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> Response:
        return failure.internal().response()


def _nobody() -> Response:
    """For a client that has gone away; nginx logs it with this status, too."""
    return Response(status_code=499)
