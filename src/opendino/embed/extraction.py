# SPDX-License-Identifier: Apache-2.0
"""What leads an extraction, however many processes compute it: what is done, what is missing, when it is finished."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import IO, Any

import pyarrow.parquet as pq

from opendino.embed.folder import Folder
from opendino.embed.order import InputState, Order, count_rows, opened, plan_order
from opendino.embed.resume import check_same, read_manifest, write_manifest
from opendino.embed.shards import Range, Shard, list_shards, missing_ranges
from opendino.errors import DataError
from opendino.images.sources import ImageSource

log = logging.getLogger("opendino")

ERRORS = "errors.csv"
EXAMPLES = 5
"""Unreadable images that are named when a run ends; the file names all."""


@dataclass
class Progress:
    """How far an extraction is.

    Attributes:
        count: rows, errors included.
        errors: rows without vectors.
        total: rows when it is finished.
        before: rows of earlier runs.
        examples: path and reason of some images that could not be read; filled at the end.
    """

    count: int = 0
    errors: int = 0
    total: int = 0
    before: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)


class Extraction:
    """One run over a folder of features. Within it no other process of this machine writes there.

    Args:
        folder: of features; made if missing.
        source: the input.
        max_errors: how many unreadable images are accepted, earlier ones included; None: any number.

    Attributes:
        settings: the manifest's fixed part; empty before `begin`.
        order: which image is at which place.
        progress: how far it is.
        lock: file descriptors that keep the folder locked while a process has them.

    Raises:
        ConfigError: on entering, when the folder is in use.
    """

    order: Order
    lock: tuple[int, ...] = ()

    def __init__(self, folder: Folder, source: ImageSource, max_errors: int | None = None) -> None:
        self.folder, self.source, self.max_errors = folder, source, max_errors
        self.settings: dict[str, Any] = {}
        self.progress = Progress()
        self._states: list[InputState] = []
        self._stack = ExitStack()

    def __enter__(self) -> Extraction:
        self.folder.make()
        self.lock = self._stack.enter_context(self.folder.locked())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def begin(self, settings: dict[str, Any]) -> None:
        """Find out what is done and what is missing.

        Raises:
            ConfigError: when the folder was made with other settings.
            DataError: when more images than `max_errors` could not be read before.
        """
        self.settings = settings
        found = read_manifest(self.folder)
        check_same(self.folder, found, self.settings)
        self.folder.tidy()
        shards, old = self._shards()
        known = [InputState(**state) for state in (found or {}).get("inputs", [])]
        self.order, self._states = plan_order(self.folder, self.source, known, shards, old)
        if known and self._states != known:
            new = self._states[-1]
            log.warning(
                "%s has changed since %s was begun: it has %d images, %d of them without a row here.",
                self.settings["input"], self.folder.place, new.images, new.count,
            )  # fmt: skip
        self._count(shards, old)
        self.progress.before = self.progress.count
        self.note()
        if self.too_many_errors:
            self.list_errors()
        self.check_errors(None)

    def _shards(self) -> tuple[list[Shard], list[str]]:
        """List the shards and remove those that repeat rows of others."""
        shards, surplus, old = list_shards(self.folder)
        for shard in surplus:
            self.folder.remove(shard.name)
        return shards, old

    def _count(self, shards: list[Shard], old: list[str]) -> None:
        """Bring the figures up to date with what is on the disk."""
        done = self.progress
        done.count = sum(s.end - s.first for s in shards) + sum(count_rows(self.folder, name) for name in old)
        done.errors = sum(s.errors for s in shards) + sum(_old_errors(self.folder, name) for name in old)
        done.total = done.count + sum(end - first for first, end in self._missing(shards))

    def _missing(self, shards: list[Shard]) -> list[Range]:
        return missing_ranges(shards, self.order.state.first, self.order.state.end)

    def missing(self) -> list[Range]:
        """Give the places that have no row on the disk, after removing shards that repeat rows, and count anew."""
        shards, old = self._shards()
        self._count(shards, old)
        return self._missing(shards)

    def note(self, **more: Any) -> None:
        """Write the manifest."""
        about = {"inputs": [s.json() for s in self._states], "count": self.progress.count}
        content = self.settings | about | {"errors": self.progress.errors, "done": False} | more
        write_manifest(self.folder, content)

    @property
    def too_many_errors(self) -> bool:
        """Whether more images than `max_errors` cannot be read."""
        return self.max_errors is not None and self.progress.errors > self.max_errors

    def check_errors(self, last: str | None) -> None:
        """Stop when too many images cannot be read.

        Args:
            last: of them, with its reason.

        Raises:
            DataError: when there are more than `max_errors`.
        """
        if not self.too_many_errors:
            return
        raise DataError(
            f"{self.progress.errors} images cannot be read, more than --max-errors {self.max_errors}. "
            + (f"The last is {last}. " if last else "")
            + f"{self.folder.path(ERRORS)} names all so far. Mend or remove them, or raise --max-errors to go on."
        )

    def list_errors(self) -> None:
        """Write which images could not be read and why, as far as the shards know."""
        shards, old = self._shards()
        names = [*old, *(s.name for s in shards if s.errors)]
        rows = (row for name in names for row in read_errors(self.folder, name))
        if not self.progress.errors:
            self.folder.remove(ERRORS)
            return

        def write(file: IO[bytes]) -> None:
            text = io.StringIO()
            lines = csv.writer(text, lineterminator="\n")
            lines.writerow(["path", "error"])
            self.progress.examples = []
            for row in rows:
                lines.writerow(row)
                if len(self.progress.examples) < EXAMPLES:
                    self.progress.examples.append(row)
                file.write(text.getvalue().encode("utf-8", "backslashreplace"))
                text.seek(0)
                text.truncate()

        self.folder.put(write, ERRORS)

    def finish(self) -> None:
        """Write the list of errors, and the manifest with the list of shards.

        Raises:
            DataError: when rows are missing that were reported as written.
        """
        left = self.missing()
        if left:
            raise DataError(
                f"{sum(b - a for a, b in left)} rows that were written are not in {self.folder.place} any more, from "
                f"place {left[0][0]} on: somebody has removed shards. Run the same command again to redo them."
            )
        self.folder.tidy()
        self.list_errors()
        shards, old = self._shards()
        table = [
            {"file": name, "rows": count_rows(self.folder, name), "sha256": self.folder.digest(name)} for name in old
        ]
        table += [{"file": s.name, "rows": s.end - s.first, "sha256": s.digest} for s in shards]
        self.note(done=True, shards=table)


def _old_errors(folder: Folder, name: str) -> int:
    return sum(1 for _ in read_errors(folder, name))


def read_errors(folder: Folder, name: str) -> Iterator[tuple[str, str]]:
    """Give path and reason of each row of a shard that has no vectors."""
    with opened(folder, name) as file:
        file_: pq.ParquetFile = file
        for batch in file_.iter_batches(columns=["path", "error"], batch_size=4096):
            for path, error in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                if error is not None:
                    yield path, error
