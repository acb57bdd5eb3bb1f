# SPDX-License-Identifier: Apache-2.0
"""Several threads on one call of a kernel, which hands its pieces out by a counter."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import torch

_lock = Lock()
_helpers: ThreadPoolExecutor | None = None


def run_together(kernel: Callable[[], int], most: int) -> None:
    """Call a kernel on as many threads as torch uses, this one among them, and at most on so many.

    The others are kept for the next call: starting one takes a tenth of a millisecond, as long as much of the work.

    Raises:
        MemoryError: when one of them says by another number than 0 that it got no memory.
    """
    count = min(torch.get_num_threads(), most) - 1
    calls = [_executor().submit(kernel) for _ in range(count)]
    codes = [kernel()]
    codes += [call.result() for call in calls if not call.cancel()]  # one that has not begun finds nothing left to do
    if any(codes):
        raise MemoryError("There is no memory for what a native kernel keeps while it works.")


def _executor() -> ThreadPoolExecutor:
    global _helpers
    with _lock:
        if _helpers is None:
            _helpers = ThreadPoolExecutor(max(8, os.cpu_count() or 1), "opendino-kernel")  # made on demand
        return _helpers


def _forget() -> None:
    """A forked process has none of its parent's threads, and perhaps their lock."""
    global _helpers, _lock
    _helpers, _lock = None, Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
