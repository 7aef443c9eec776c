"""From a closed port to a served model, and back again on a signal."""

from __future__ import annotations

import ipaddress
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from types import FrameType

import uvicorn
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from moecc.errors import MoeccError
from moecc.runtime.interface import EngineLike
from moecc.server.app import create_app
from moecc.server.failure import unavailable

# For clients that are slow to read the end of their answers.
GRACE_SECONDS = 5

log = logging.getLogger(__name__)


class _Interrupted(BaseException):
    """A signal came while the model was being loaded."""


class _Gate:
    """Answers in place of the app until there is one."""

    def __init__(self) -> None:
        self.app: FastAPI | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.app or unavailable("Loading model").response()
        await app(scope, receive, send)


class _Signals:
    """SIGTERM and Ctrl-C while it is entered: an exception while loading, then events."""

    def __init__(self) -> None:
        self.loading = False
        self.events: SimpleQueue[str] = SimpleQueue()  # may be put to from a signal handler

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.loading:
            self.loading = False
            raise _Interrupted
        self.events.put("signal")

    @contextmanager
    def caught(self) -> Iterator[None]:
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def serve(
    load_engine: Callable[[], EngineLike],
    *,
    host: str,
    port: int,
    api_key: str | None,
    shutdown_timeout: float = 30.0,
    on_ready: Callable[[str], None] = lambda url: None,
    warn: Callable[[str], None] = log.warning,
) -> None:
    """Serves an engine until SIGTERM or Ctrl-C; call it on the main thread.

    The port is open from the start; until the engine is loaded it answers 503. The first signal
    ends it once running requests are done, or aborts them after `shutdown_timeout` seconds; a
    second one ends it at once.

    Args:
        port: 0 for any free one.
        on_ready: gets the server's address once the engine is there.
        warn: gets what the user should know.

    Raises MoeccError if the port cannot be had, and whatever `load_engine` raises.
    """
    if api_key == "":
        raise MoeccError("the API key is empty", "give one, or none at all")
    listener = _listen(host, port)
    address, port = listener.getsockname()[:2]
    if api_key is None and not ipaddress.ip_address(address).is_loopback:
        warn(f"anyone who can reach {address} port {port} can use this server: it has no API key")
    gate, signals = _Gate(), _Signals()
    with signals.caught(), _running(gate, listener) as server:
        engine: EngineLike | None = None
        try:
            signals.loading = True
            engine = load_engine()
            signals.loading = False
            gate.app = create_app(engine, api_key=api_key)
            on_ready(f"http://{f'[{address}]' if ':' in address else address}:{port}")
            signals.events.get()
            gate.app.state.stopping = True
            _drain(engine, signals.events, shutdown_timeout, server)
        except _Interrupted:
            return
        finally:
            if engine is not None:
                engine.close()


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a host name"
        raise MoeccError(f"cannot listen on `{host}`: {reason}") from None
    try:
        # Connections of a server that has just ended must not block the next one.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()  # only now is the port taken for sure
    except OSError as error:
        listener.close()
        raise MoeccError(
            f"cannot listen on `{host}` port {port}: {error.strerror}",
            "choose another port, or stop the program that has this one",
        ) from None
    return listener


@contextmanager
def _running(gate: _Gate, listener: socket.socket) -> Iterator[uvicorn.Server]:
    """A server on a thread of its own, so that the main thread is free to load and to wait."""
    server = uvicorn.Server(
        uvicorn.Config(
            gate,
            lifespan="off",
            ws="none",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
    )
    thread = threading.Thread(target=server.run, args=([listener],), name="moecc-http")
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise MoeccError("the HTTP server did not start")
            time.sleep(0.01)
        yield server
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def _drain(
    engine: EngineLike, events: SimpleQueue[str], timeout: float, server: uvicorn.Server
) -> None:
    def close() -> None:
        try:
            engine.close(timeout)
        finally:
            events.put("closed")

    closing = threading.Thread(target=close, name="moecc-close")
    closing.start()
    if events.get() == "signal":
        server.config.timeout_graceful_shutdown = 0
        engine.close(0.0)
    closing.join()
