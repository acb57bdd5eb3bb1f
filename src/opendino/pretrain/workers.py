# SPDX-License-Identifier: Apache-2.0
"""What a user is told when a process that reads images dies."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from opendino.errors import DataError

TERM_GRACE_S = 10
"""How long a worker lives after SIGTERM, so that the trainer can finish its step and save."""
DEATH_NOTICE_S = 2.0
"""How long the news of a worker's death may take."""


@contextmanager
def worker_deaths_explained() -> Iterator[None]:
    """Turn torch's error about a worker process that died into a DataError.

    torch may raise it anywhere in the main thread, not only where a batch is asked for; wrap the whole loop.
    """
    try:
        try:
            yield
        except (ConnectionError, EOFError, FileNotFoundError):
            # A worker that dies cuts its connection first; torch hears of its death a moment later, and raises.
            time.sleep(DEATH_NOTICE_S)
            raise
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise DataError(explain_death(str(error))) from None


def explain_death(message: str) -> str:
    """Say what torch's message about a dead worker means, and what to do."""
    number = next((word.strip("().,") for word in message.split() if word.strip("().,").isdigit()), "?")
    if "Bus error" in message:
        return (
            f"A process that reads images (pid {number}) was ended because the shared memory in /dev/shm is full. Give "
            "the machine or container more of it (docker run --shm-size 8g), or lower --num-workers or --batch-size."
        )
    how = message.split("killed by signal: ", 1)[1].split(".")[0] if "killed by signal: " in message else "exited"
    return (
        f"A process that reads images (pid {number}) died ({how}). Mostly this is the system ending the largest "
        "process when memory runs out: lower --num-workers, do without --cache-images, or take more memory; the "
        "system's log (dmesg) tells. The run can be resumed."
    )


def leave_signals_to_parent(worker: int) -> None:
    """Keep a loader's worker alive when a stop signal reaches every process: the trainer still needs its batches then.

    torch itself ends workers that hang by SIGTERM, so this one is only put off.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends the process, whatever the parent does at it
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(TERM_GRACE_S))
