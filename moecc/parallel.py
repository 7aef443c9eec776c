"""Threads that keep order: torch, hashlib and file I/O release the interpreter lock."""

from __future__ import annotations

import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

MAX_WORKERS = 8
LONG_CALLS = 1 << 20  # weights of a matrix whose columns are worth a thread
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


@contextmanager
def worker_pool(most: int = MAX_WORKERS) -> Iterator[ThreadPoolExecutor]:
    """A pool of single-threaded workers, one a core up to `most`; restores torch's setting.

    On an error, tasks that have not started are dropped.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    count = min(most, len(os.sched_getaffinity(0)))
    pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)


def column_workers(params: int, device: str) -> int:
    """How many threads to work on matrices of `params` weights column by column with.

    Short calls, and those that only start work on a GPU, would wait for the interpreter instead.
    """
    return MAX_WORKERS if params >= LONG_CALLS and torch.device(device).type == "cpu" else 1


def ordered(
    pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], ahead: int = 16
) -> Iterator[R]:
    """`map` over a pool in the order of `items`, with at most `ahead` results in memory."""
    waiting: deque[Future[R]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def keep_freed_memory() -> None:
    """Has glibc keep the buffers of freed tiles for the next ones, for the life of the process.

    By default it returns each to the kernel, and mapping and clearing them again took a fifth of
    the time of a consolidation. Does nothing where there is no `mallopt`.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 32 << 20)
        mallopt(M_TRIM_THRESHOLD, 1 << 30)


def in_background(function: Callable[[T], R], argument: T) -> Future[R]:
    """Runs a function in a thread that neither an error nor Ctrl-C has to wait for."""
    future: Future[R] = Future()

    def run() -> None:
        try:
            future.set_result(function(argument))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
