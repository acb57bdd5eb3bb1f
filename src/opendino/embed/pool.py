# SPDX-License-Identifier: Apache-2.0
"""An extraction by several processes of this machine: this one deals out ranges of places, the others compute them.

Pieces are cut from the missing ranges at whole batches and dealt in order, two to each process, so that it reads ahead
while it computes. A row's batch does not depend on who computes it. When a process dies, its pieces that are not on
the disk are dealt again.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

from opendino.embed.extraction import Extraction, Progress
from opendino.embed.folder import open_folder
from opendino.embed.job import Job
from opendino.embed.shards import Range, Shard, cut, list_shards, missing_ranges, step_for
from opendino.errors import ConfigError, DataError, OpendinoError, WeightsError
from opendino.images.sources import open_source

AHEAD = 2
"""Pieces that a process has at a time: the one it computes, and the one it begins to read."""
DEATHS = 3
"""Deaths without a shard in between after which it is given up."""
GRACE_S = 120.0
"""How long processes may take to finish a batch and write it when they are asked to stop."""
KINDS: dict[str, type[OpendinoError]] = {k.__name__: k for k in (ConfigError, DataError, WeightsError)}
OnBatch = Callable[[int, int, int], None]
_Event = tuple["_Worker", dict[str, Any] | None]


class _Worker:
    """A process, what it was given, and what it has said."""

    def __init__(self, number: int, job: Job, environment: dict[str, str], lock: tuple[int, ...]) -> None:
        self.number = number
        self.given: deque[Range] = deque()
        self.ended = False
        self.rows = self.errors = 0  # computed and not yet on the disk
        self.process = subprocess.Popen(
            [sys.executable, "-m", "opendino.embed.pool_worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
            start_new_session=True,  # a Ctrl-C reaches it through this process alone, once
            pass_fds=lock,
        )  # fmt: skip
        self.say(job={"what": job.json(), "number": number})

    def say(self, **message: Any) -> None:
        assert self.process.stdin
        with suppress(BrokenPipeError):  # its death is heard elsewhere
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()

    def listen(self, events: queue.Queue[_Event]) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            if not line.endswith("\n"):  # killed while it spoke
                break
            events.put((self, json.loads(line)))
        self.process.wait()
        events.put((self, None))

    def wrote(self, shard: Shard) -> None:
        """Take a shard off what it has to do."""
        left = [r for piece in self.given for r in missing_ranges([shard], *piece)]
        self.given = deque(left)


class Pool:
    """The processes of a run.

    Args:
        run: entered, not begun.
        job: what they compute.
        nproc: how many there are.
        on_batch: called with (rows, errors, images in all).
    """

    def __init__(self, run: Extraction, job: Job, nproc: int, on_batch: OnBatch | None = None) -> None:
        self.run, self.job, self.nproc = run, job, nproc
        self.on_batch = on_batch or (lambda rows, errors, total: None)
        self.events: queue.Queue[_Event] = queue.Queue()
        self.workers: list[_Worker] = []
        self.redo: deque[Range] = deque()
        self.pieces: Iterator[Range] = iter(())
        self.step = self.deaths = 0

    def work(self) -> None:
        """Compute until nothing is missing.

        Raises:
            OpendinoError: what a process said, or that they die again and again.
        """
        try:
            for number in range(self.nproc):
                self._start(number)
            while self.workers:
                worker, message = self.events.get()
                if message is None:
                    self._gone(worker)
                else:
                    self._heard(worker, message)
        finally:
            self._stop()

    def _start(self, number: int) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        environment = {"OMP_NUM_THREADS": str(max(1, cores // self.nproc)), **os.environ}
        worker = _Worker(number, self.job, environment, self.run.lock)
        self.workers.append(worker)
        threading.Thread(target=worker.listen, args=(self.events,), daemon=True).start()

    def _heard(self, worker: _Worker, message: dict[str, Any]) -> None:
        done = self.run.progress
        if "ready" in message:
            self._ready(worker, message["ready"], message["batch"])
        elif "rows" in message:
            worker.rows, worker.errors = worker.rows + message["rows"], worker.errors + message["errors"]
            done.count, done.errors = done.count + message["rows"], done.errors + message["errors"]
            self.on_batch(done.count, done.errors, done.total)
            self.run.check_errors(message["last"])
        elif "shard" in message:
            shard = Shard.of(message["shard"])
            assert shard
            worker.rows, worker.errors = worker.rows - (shard.end - shard.first), worker.errors - shard.errors
            worker.wrote(shard)
            self.deaths = 0
            self.run.note()
            self._feed(worker)
        elif "error" in message:
            raise KINDS.get(message["kind"], DataError)(message["error"])

    def _ready(self, worker: _Worker, settings: dict[str, Any], batch: int) -> None:
        if not self.run.settings:
            self.run.begin(settings)
            missing = self.run.missing()
            self.step = step_for(missing, self.job.shard_rows, batch, self.nproc)
            self.pieces = cut(missing, self.step)
            done = self.run.progress
            self.on_batch(done.count, done.errors, done.total)
        elif settings != self.run.settings:
            differing = [k for k in settings if settings[k] != self.run.settings.get(k)]
            raise ConfigError(
                f"Two processes would write different vectors: they differ in {', '.join(differing)}. The model's "
                "file must stay as it is while it is used; name the settings that are chosen by machine."
            )
        worker.say(plan={"state": self.run.order.state.json(), "step": self.step})
        self._feed(worker)

    def _feed(self, worker: _Worker) -> None:
        while len(worker.given) < AHEAD and not worker.ended:
            piece = self.redo.popleft() if self.redo else next(self.pieces, None)
            if piece is None:
                worker.ended = True
                worker.say(end=True)
            else:
                worker.given.append(piece)
                worker.say(range=piece)

    def _gone(self, worker: _Worker) -> None:
        """Deal again what a process that died had not finished."""
        self.workers.remove(worker)
        code = worker.process.returncode
        if worker.ended and not worker.given:
            return
        self.deaths += 1
        shards = list_shards(self.run.folder)[0]
        left = [r for piece in worker.given for r in missing_ranges(shards, *piece)]
        self._uncount(worker, left, shards)
        if self.deaths >= DEATHS:
            where = f", last in the images from {self.run.order.image(left[0][0]).path} on" if left else ""
            raise DataError(
                f"Worker processes died {self.deaths} times without a shard in between{where}; the last one "
                f"{_fate(code)}. What was done is kept. Give fewer --nproc or a smaller --batch, and run it again."
            )
        self.redo.extend(left)
        self._start(worker.number)

    def _uncount(self, worker: _Worker, left: list[Range], shards: list[Shard]) -> None:
        """Count what is on the disk instead of what the process said it had computed."""
        done = self.run.progress
        written = sum(b - a for a, b in worker.given) - sum(b - a for a, b in left)
        bad = sum(s.errors for s in shards if any(a <= s.first < b for a, b in worker.given))
        done.count, done.errors = done.count + written - worker.rows, done.errors + bad - worker.errors

    def _stop(self) -> None:
        """End what still runs: politely first, so that rows that are computed are written."""
        for worker in self.workers:
            worker.say(stop=True)
        for worker in self.workers:
            try:
                worker.process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()


def _fate(code: int) -> str:
    if code < 0:
        hint = ", as the system does when memory runs out" if code == -9 else ""
        return f"was ended by signal {-code}{hint}"
    return f"ended with code {code}"


def embed_with_processes(job: Job, nproc: int, on_batch: OnBatch | None = None) -> Progress:
    """Do a job with several processes; like `embed_to_folder`, it goes on where the shards end.

    Raises:
        OpendinoError: see `embed_to_folder`.
    """
    job = job.absolute()
    if job.embedder.get("workers") is None:
        threads = max(1, min(os.cpu_count() or 1, 8) // nproc)
        job = replace(job, embedder=job.embedder | {"workers": threads})
    with Extraction(open_folder(job.out), open_source(job.input), job.max_errors) as run:
        try:
            Pool(run, job, nproc, on_batch).work()
        except DataError:
            if run.settings:
                run.list_errors()
            raise
        run.finish()
    return run.progress
