# SPDX-License-Identifier: Apache-2.0
"""One of several processes of an extraction on this machine; `pool` starts it and says what to do, a JSON line each.

It is told: the job, the order's state, then ranges, and an end or a stop. It says: ready (the settings of its rows),
rows that are computed, shards that are on the disk, or an error that a user can mend.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from opendino.embed.folder import open_folder
from opendino.embed.job import Job
from opendino.embed.order import InputState, order_of
from opendino.embed.shards import Range
from opendino.errors import OpendinoError


class StopAsked(KeyboardInterrupt):
    """The leading process wants no more rows; those that are there are to be written."""


class Line:
    """The pipes to the leading process."""

    def __init__(self) -> None:
        self.heard: queue.Queue[dict[str, Any]] = queue.Queue()
        self.stop = threading.Event()
        self.waiting: deque[Range] = deque()
        self.ended = False
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # whatever prints goes where messages go

    def say(self, **message: Any) -> None:
        """Tell the leading process something."""
        self._out.write(json.dumps(message) + "\n")

    def listen(self) -> None:
        """Hear the leading process, and end at once when it is gone: another run may begin in its place."""
        for text in sys.stdin:
            message = json.loads(text)
            if "stop" in message:
                self.stop.set()
            self.heard.put(message)
        os._exit(1)

    def hear(self, kind: str) -> Any:
        """Wait for a message of a kind.

        Raises:
            StopAsked: when there is none to come.
        """
        message = self.heard.get()
        if kind not in message:
            raise StopAsked
        return message[kind]

    def wait(self) -> bool:
        """Wait for ranges; False when there are none to come."""
        if not self.ended and not self.waiting:
            self._take(self.heard.get())
        return not self.ended or bool(self.waiting)

    def ranges(self) -> Iterator[Range]:
        """Give the ranges that have been asked for by now.

        It must not wait for more: images that were read ahead would not be computed meanwhile, and the leading process
        sends more only when they are.
        """
        while True:
            with suppress(queue.Empty):
                while not self.ended:
                    self._take(self.heard.get_nowait())
            if not self.waiting:
                return
            yield self.waiting.popleft()

    def _take(self, message: dict[str, Any]) -> None:
        if "range" in message:
            first, end = message["range"]
            self.waiting.append((first, end))
        else:
            self.ended = True


def device_of(asked: str | None, number: int) -> str | None:
    """Give each process its GPU, in turn, where there are any and no other device was asked for."""
    import torch

    if asked in (None, "cuda") and torch.cuda.is_available():
        return f"cuda:{number % torch.cuda.device_count()}"
    return asked


def work(line: Line) -> None:
    """Do what the leading process says."""
    from opendino.embed.writer import ShardWriter, settings_of, write_ranges
    from opendino.images.sources import open_source

    start = line.hear("job")
    job = Job.of(start["what"])
    source, folder = open_source(job.input), open_folder(job.out)
    embedder = job.make_embedder(device=device_of(job.embedder.get("device"), start["number"]))
    line.say(ready=settings_of(embedder, source, job.model, job.weights, job.dtype), batch=embedder.batch_size)
    plan = line.hear("plan")
    order = order_of(folder, source, InputState(**plan["state"]))
    writer = ShardWriter(folder, plan["step"], job.dtype, lambda s: line.say(shard=s.name))

    def on_batch(rows: int, errors: int, last: str | None) -> None:
        line.say(rows=rows, errors=errors, last=last)
        if line.stop.is_set():
            raise StopAsked

    while line.wait():
        write_ranges(embedder, order, line.ranges(), writer, on_batch)


def main() -> int:
    """Work until the end and give an exit code."""
    line = Line()
    threading.Thread(target=line.listen, daemon=True).start()
    try:
        work(line)
    except StopAsked:
        return 0
    except OpendinoError as error:
        line.say(error=str(error), kind=type(error).__name__)
        return 1
    return 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # the thread that listens would keep the interpreter's end waiting
