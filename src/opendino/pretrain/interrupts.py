# SPDX-License-Identifier: Apache-2.0
"""Asking a training loop to stop by a signal, at a moment when nothing is lost."""

from __future__ import annotations

import logging
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

log = logging.getLogger("opendino")
SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")
"""Ctrl-C; what batch systems send before they kill; what SLURM sends with --signal=USR1@60."""


class TrainingStopped(KeyboardInterrupt):
    """A run was asked to stop and has saved itself.

    Attributes:
        number: of the signal that this or another process of the run got.
    """

    def __init__(self, number: int, step: int, run: Path) -> None:
        self.number = number
        super().__init__(f"Stopped at step {step}; continue with: opendino resume {run}")


class StopRequest:
    """Within it the first SIGINT, SIGTERM or SIGUSR1 only sets `number`; a second SIGINT interrupts as usual.

    Outside the main thread, where Python takes no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
            self._before = {n: signal.signal(n, self._note) for n in numbers}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number
        log.warning("%s: finishing this step and saving a checkpoint …", signal.Signals(number).name)
