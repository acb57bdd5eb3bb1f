# SPDX-License-Identifier: Apache-2.0
"""Reading ahead with threads: image decoders leave Python's lock, so threads are enough."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_T = TypeVar("_T")
_S = TypeVar("_S")


def map_ahead(
    function: Callable[[_S], _T],
    items: Iterable[_S],
    workers: int,
    window: int,
    setup: Callable[[], object] | None = None,
) -> Generator[_T]:
    """Map in order with threads, never more than `window` results ahead of the consumer; 0 workers read in this one.

    Args:
        function: called in the threads.
        items: iterated by the consumer's thread.
        workers: number of threads.
        window: of results.
        setup: called by every thread when it starts.
    """
    if workers < 1:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="opendino-read", initializer=setup)
    waiting: deque[Future[_T]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > window:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
