# SPDX-License-Identifier: Apache-2.0
"""Starting several local processes of one command (`--nproc N`)."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType

POLL_S = 0.1
LAUNCHED = "OPENDINO_LAUNCHED"
"""Set in the processes that `launch_local` starts."""
GRACE_S = 120.0
"""How long processes may take to save and leave before they are killed."""


def launch_local(module: str, arguments: Sequence[str], nproc: int) -> int:
    """Run `python -m MODULE ARGUMENTS` in `nproc` processes of one group on this machine and give an exit code.

    SIGINT and SIGTERM are passed on. When a process dies, the others cannot go on without it and are ended too. Each
    process gets its share of the cores unless OMP_NUM_THREADS says otherwise.

    Returns:
        0, or the exit code of the first process that failed; 128 + n when signal n ended it.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shared = {
        "OMP_NUM_THREADS": str(max(1, cores // nproc)),
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(nproc),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env=shared | {"RANK": str(i), "LOCAL_RANK": str(i), LAUNCHED: "1"},
            stdin=subprocess.PIPE,  # its end tells them that this process is gone (`end_with_launcher`)
            start_new_session=True,  # a Ctrl-C reaches them through this process alone, once
        )
        for i in range(nproc)
    ]

    def pass_on(number: int, frame: FrameType | None) -> None:
        _signal_all(processes, number)

    before = {n: signal.signal(n, pass_on) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        return _wait(processes)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _end(processes)


def end_with_launcher() -> None:
    """In a process that `launch_local` started: end at once when the launcher dies, however it dies.

    Left alone it would go on writing to the run folder that somebody has begun to continue.
    """
    if os.environ.get(LAUNCHED) == "1":
        threading.Thread(target=_wait_for_end_of_input, name="launcher", daemon=True).start()


def _wait_for_end_of_input() -> None:
    while os.read(0, 1024):
        pass
    os._exit(128 + signal.SIGTERM)


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    while True:
        codes = [p.poll() for p in processes]
        failed = next((c for c in codes if c), None)
        if failed is not None:
            return 128 - failed if failed < 0 else failed
        if all(c == 0 for c in codes):
            return 0
        time.sleep(POLL_S)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End what still runs: politely first, so that it can say why it stops."""
    running = [p for p in processes if p.poll() is None]
    _signal_all(running, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    for process in running:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _signal_all(processes: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
