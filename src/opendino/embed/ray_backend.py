# SPDX-License-Identifier: Apache-2.0
"""An extraction on a Ray cluster: Ray Data hands ranges of places to actors, which write shards like everybody else.

Ray gives the ranges of a worker that died to another one. That one looks first which of their rows are on the disk. A
worker that was only thought dead may still write: its shards are refused once the run has ended, and those that repeat
a range are removed at the end, so every image has one row.
"""

from __future__ import annotations

import importlib
import logging
import math
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np

from opendino.embed.extraction import Extraction, Progress
from opendino.embed.folder import Folder, open_folder
from opendino.embed.job import Job
from opendino.embed.order import InputState, Order, order_of
from opendino.embed.pool import DEATHS, KINDS, OnBatch
from opendino.embed.shards import Range, cut, list_shards, missing_ranges, step_for
from opendino.embed.writer import ShardWriter, settings_of, write_ranges
from opendino.errors import ConfigError, DataError, MissingExtraError, OpendinoError
from opendino.images.sources import open_source

TOKEN = ".run"
"""File with the name of the run that may write; it goes when the run ends."""
PIECES = 4
"""Ranges that an actor is given at a time; it reads ahead within them."""
ROUNDS = 3
"""How often rows are asked for that are missing when Ray says that all is done."""


def check_token(folder: Folder, token: str) -> None:
    """See that a run still goes on.

    Raises:
        DataError: when it has ended, or its folder is not visible from here.
    """
    try:
        found = folder.read(TOKEN).decode()
    except FileNotFoundError:
        found = None
    if found != token:
        raise DataError(
            f"{folder.place} is not the folder of this run where a worker of the cluster looks. Give an --out that "
            "every machine sees under the same name: a shared folder, or a URL such as s3://bucket/vectors."
        )


class RangeWriter:
    """An actor: loads the model once, then computes and writes the ranges that it is given.

    Args:
        job: as JSON.
        token: of the run.
        plan: state of the order, step and settings of the rows; without it nothing can be written.
    """

    def __init__(self, job: str, token: str, plan: dict[str, Any] | None = None) -> None:
        self.job, self.token, self.plan = Job.of(job), token, plan or {}
        self._ready: tuple[Any, Folder, Order] | None = None

    def describe(self) -> dict[str, Any]:
        """Give the settings of the rows and the batch size, or a problem that a user can mend."""
        try:
            embedder, _, _, settings = self._load()
        except OpendinoError as error:
            return {"problem": f"{type(error).__name__}:{error}"}
        return {"settings": settings, "batch": embedder.batch_size}

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Write ranges `first` to `end`; give rows and errors of each, and a problem or ""."""
        pieces = [(int(a), int(b)) for a, b in zip(batch["first"], batch["end"], strict=True)]
        errors, last, problem = 0, "", ""
        try:
            errors, last = self._write(pieces)
        except OpendinoError as error:
            problem = f"{type(error).__name__}:{error}"
        rows = 0 if problem else sum(b - a for a, b in pieces)
        answer = {"rows": rows, "errors": errors, "last": last, "problem": problem}
        return {name: np.array([value]) for name, value in answer.items()}

    def _load(self) -> tuple[Any, Any, Folder, dict[str, Any]]:
        folder, job = open_folder(self.job.out), self.job
        check_token(folder, self.token)
        embedder, source = job.make_embedder(), open_source(job.input)
        return embedder, source, folder, settings_of(embedder, source, job.model, job.weights, job.dtype)

    def _prepare(self) -> tuple[Any, Folder, Order]:
        """Load what is needed, once, and see that it is what the first worker had."""
        if self._ready is None:
            embedder, source, folder, settings = self._load()
            if settings != self.plan["settings"]:
                raise ConfigError("A worker would write other vectors than the first one: its model or input differs.")
            self._ready = embedder, folder, order_of(folder, source, InputState(**self.plan["state"]))
        return self._ready

    def _write(self, pieces: list[Range]) -> tuple[int, str]:
        """Write the rows that are not on the disk; give the number of errors, and the last one."""
        embedder, folder, order = self._prepare()
        shards = list_shards(folder)[0]
        left = [r for piece in pieces for r in missing_ranges(shards, *piece)]
        errors, last = sum(s.errors for s in shards if any(a <= s.first < b for a, b in pieces)), ""

        def on_batch(rows: int, bad: int, found: str | None) -> None:
            nonlocal errors, last
            errors, last = errors + bad, found or last

        writer = ShardWriter(folder, self.plan["step"], self.job.dtype, guard=lambda: check_token(folder, self.token))
        write_ranges(embedder, order, left, writer, on_batch)
        return errors, last


def _raise(problem: str) -> None:
    kind, _, text = problem.partition(":")
    raise KINDS.get(kind, DataError)(text)


def embed_with_ray(
    job: Job, *, address: str | None = None, actors: int | None = None, on_batch: OnBatch | None = None
) -> Progress:
    """Do a job on a Ray cluster; like `embed_to_folder`, it goes on where the shards end.

    Args:
        job: input, output, model and weights must be visible from every machine under the same names.
        address: of a cluster; None starts Ray on this machine, unless RAY_ADDRESS names a cluster.
        actors: processes that compute; default: one a GPU, or one a CPU.
        on_batch: called with (rows, errors, images in all).

    Raises:
        MissingExtraError: without Ray.
        OpendinoError: see `embed_to_folder`.
    """
    ray = import_ray()
    job = job.absolute()
    with Extraction(open_folder(job.out), open_source(job.input), job.max_errors) as run:
        token = uuid.uuid4().hex
        run.folder.put(lambda file: file.write(token.encode()), TOKEN)
        mine = not ray.is_initialized()
        try:
            if mine:
                _connect(ray, address)
            _compute(ray, run, job, token, actors, on_batch or (lambda rows, errors, total: None))
        except DataError:
            if run.settings:
                run.list_errors()
            raise
        except ray.exceptions.RayError as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise DataError(
                f"Ray did not finish: {reason} What was done is kept; the same command goes on when that is mended."
            ) from error
        finally:
            run.folder.remove(TOKEN)
            if mine:
                ray.shutdown()
        run.finish()
    return run.progress


def import_ray() -> Any:
    """Give Ray.

    Raises:
        MissingExtraError: when it is not installed.
    """
    try:
        ray = importlib.import_module("ray")
        importlib.import_module("ray.data")
    except ImportError as error:
        raise MissingExtraError("ray", "ray", "--engine ray") from error
    return ray


def _connect(ray: Any, address: str | None) -> None:
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"No Ray cluster answers at {address}: {error}. Give the --address of a running one, or none to start Ray "
            "on this machine."
        ) from error


def _compute(ray: Any, run: Extraction, job: Job, token: str, actors: int | None, on_batch: OnBatch) -> None:
    found = ray.cluster_resources()
    gpus = 0 if job.embedder.get("device") == "cpu" else int(found.get("GPU", 0))
    needs = {"num_cpus": 1, "num_gpus": 1 if gpus else 0}
    first = ray.remote(max_restarts=DEATHS, max_task_retries=DEATHS, **needs)(RangeWriter).remote(job.json(), token)
    about = ray.get(first.describe.remote())
    ray.kill(first)
    if "problem" in about:
        _raise(about["problem"])
    run.begin(about["settings"])
    done = run.progress
    on_batch(done.count, done.errors, done.total)
    number = actors or max(1, gpus or int(found.get("CPU", 1)))
    for _ in range(ROUNDS):
        missing = run.missing()
        if not missing:
            return
        step = step_for(missing, job.shard_rows, about["batch"], number)
        plan = {"settings": about["settings"], "state": run.order.state.json(), "step": step}
        for answer in _answers(ray, list(cut(missing, step)), number, needs, (job.json(), token, plan)):
            if answer["problem"]:
                _raise(answer["problem"])
            done.count, done.errors = done.count + int(answer["rows"]), done.errors + int(answer["errors"])
            run.note()
            on_batch(done.count, done.errors, done.total)
            run.check_errors(answer["last"] or None)


def _answers(
    ray: Any, pieces: list[Range], actors: int, needs: dict[str, int], arguments: tuple[Any, ...]
) -> Iterator[dict[str, Any]]:
    """Have ranges computed and give what the actors answer, as it comes."""
    data = ray.data
    context = data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    each = min(PIECES, math.ceil(len(pieces) / actors))
    rows = [{"first": a, "end": b} for a, b in pieces]
    ranges = data.from_items(rows, override_num_blocks=math.ceil(len(rows) / each))
    answers = ranges.map_batches(
        RangeWriter, fn_constructor_args=arguments, batch_size=each, batch_format="numpy",
        compute=data.ActorPoolStrategy(size=min(actors, math.ceil(len(rows) / each))), **needs,
    )  # fmt: skip
    yield from answers.iter_rows()
