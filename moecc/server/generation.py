"""The way from the engine's thread to the event loop and back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from starlette.types import Receive

from moecc.runtime.interface import EngineLike
from moecc.runtime.request import Output, Request

PING_SECONDS = 15.0

Meter = Callable[[Output], None]
_T = TypeVar("_T")


class Generation:
    """Requests that were asked for together, from their start to their end.

    Args:
        meter: makes what is told every output of a request, on the engine's thread.
    """

    def __init__(
        self,
        engine: EngineLike,
        requests: Sequence[Request],
        meter: Callable[[Request], Meter],
    ) -> None:
        self._engine = engine
        self._requests = requests
        self._meters = [meter(request) for request in requests]
        self._left = set(range(len(requests)))
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Output] | None] = asyncio.Queue()

    def submit(self) -> None:
        """Submits all requests, or raises what the engine raises and leaves none behind."""
        for index, request in enumerate(self._requests):
            try:
                self._engine.submit(request, partial(self._deliver, index))
            except BaseException:
                self._left.intersection_update(range(index))
                self.cancel()
                raise

    def _deliver(self, index: int, output: Output) -> None:
        self._meters[index](output)
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, output))

    async def outputs(self) -> AsyncIterator[tuple[int, Output] | None]:
        """Outputs with the index of their request, until all have finished.

        None whenever nothing came for PING_SECONDS.
        """
        while self._left:
            ping = self._loop.call_later(PING_SECONDS, self._queue.put_nowait, None)
            try:
                item = await self._queue.get()
            finally:
                ping.cancel()
            if item is not None and item[1].finish is not None:
                self._left.discard(item[0])
            yield item

    def cancel(self) -> None:
        """Ends what has not finished yet."""
        for index in self._left:
            self._engine.cancel(self._requests[index].id)
        self._left.clear()


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T | None:
    """What `work` returns; None, with `work` canceled, if the client goes away before."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
