# SPDX-License-Identifier: Apache-2.0
"""Several threads on one call of a kernel, which hands its pieces out by a counter."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread

import torch


def run_together(kernel: Callable[[], int], most: int) -> None:
    """Call a kernel on as many threads as torch uses, this one among them, and at most on so many.

    Raises:
        MemoryError: when one of them says by another number than 0 that it got no memory.
    """
    codes: list[int] = []
    helpers = [Thread(target=lambda: codes.append(kernel())) for _ in range(min(torch.get_num_threads(), most) - 1)]
    for helper in helpers:
        helper.start()
    codes.append(kernel())
    for helper in helpers:
        helper.join()
    if any(codes):
        raise MemoryError("There is no memory for what a native kernel keeps while it works.")
