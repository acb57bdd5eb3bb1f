# SPDX-License-Identifier: Apache-2.0
"""Features on disk: Parquet shards that appear whole, and the loop that fills a folder and can be killed at any moment.

Columns: path, sha256, cls / mean (fixed_size_list<float32>, L·D), patches (fixed_size_list, h·w·L·D row by row) with
grid_h and grid_w, error. A row with an error has null vectors.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from opendino.embed.embedder import Embedder, Features
from opendino.embed.resume import Progress, check_same, describe, scan, write_manifest
from opendino.errors import ConfigError, DataError
from opendino.images import locations
from opendino.images.sources import ImageSource, SourceImage

SHARD_BYTES = 64 << 20
SHARD_SECONDS = 120.0
"""A shard is closed at this age, so that a kill costs at most this much work."""


def to_table(features: Features) -> pa.Table:
    """Put a batch in the columns of a shard."""
    bad = np.array([e is not None for e in features.errors], dtype=bool)
    columns: dict[str, Any] = {
        "path": pa.array(features.paths, pa.string()),
        "sha256": pa.array(features.hashes, pa.string()),
    }
    for name in ("cls", "mean", "patches"):
        values = getattr(features, name)
        if values is not None:
            columns[name] = _vectors(values.reshape(len(features), -1), bad)
    if features.patches is not None:
        for name, side in zip(("grid_h", "grid_w"), features.grid, strict=True):
            columns[name] = pa.array(np.full(len(features), side, np.int32), mask=bad)
    columns["error"] = pa.array(features.errors, pa.string())
    return pa.table(columns)


def _vectors(values: Any, bad: Any) -> pa.Array:
    flat = pa.array(np.where(bad[:, None], np.float32(0), values).reshape(-1), pa.float32())
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1], mask=pa.array(bad))


@dataclass
class ShardWriter:
    """Collects batches and writes them as `part-00000.parquet`, ….

    Args:
        folder: where the shards go; it must exist.
        next_part: number of the first shard.
        shard_rows: rows after which a shard is closed; also closed at SHARD_BYTES and SHARD_SECONDS.
    """

    folder: Path
    next_part: int = 0
    shard_rows: int = 4096
    _tables: list[pa.Table] = field(default_factory=list)
    _since: float = field(default_factory=monotonic)

    def add(self, features: Features) -> bool:
        """Take a batch; True when that closed a shard."""
        self._tables.append(to_table(features))
        rows = sum(t.num_rows for t in self._tables)
        size = sum(t.nbytes for t in self._tables)
        full = rows >= self.shard_rows or size >= SHARD_BYTES or monotonic() - self._since >= SHARD_SECONDS
        return full and self.flush()

    def flush(self) -> bool:
        """Write what is held as one shard, aside and then renamed; True when there was something."""
        if self._tables:
            path = self.folder / f"part-{self.next_part:05d}.parquet"
            aside = path.with_suffix(".parquet.tmp")
            # Vectors of floats neither repeat nor compress.
            with open(aside, "wb") as file:
                pq.write_table(pa.concat_tables(self._tables), file, use_dictionary=False)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
            self.next_part += 1
        written, self._tables, self._since = bool(self._tables), [], monotonic()
        return written


def embed_to_folder(
    embedder: Embedder,
    source: ImageSource,
    folder: str | Path,
    *,
    model_name: str = "",
    max_errors: int | None = None,
    shard_rows: int = 4096,
    on_batch: Callable[[int, int, int], None] | None = None,
) -> Progress:
    """Write one row for every image of a source; started again, it goes on where the shards end.

    Paths are written absolute. Memory is bounded by a shard and three batches, not by the number of images.

    Args:
        embedder: gives the vectors; its `what` decides the columns.
        source: the images.
        folder: made if missing; its earlier rows are kept.
        model_name: written in the manifest for people to read.
        max_errors: how many unreadable images are accepted, earlier ones included; None accepts any number.
        shard_rows: rows in a shard.
        on_batch: called with (rows, errors, images in all) at the start and after every batch.

    Raises:
        ConfigError: when the folder was made with another model, other settings or another input, or is in use.
        DataError: when more than `max_errors` images cannot be read; what was done is kept.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = describe(embedder, model_name, locations.absolute(source.root))
    report = on_batch or (lambda rows, errors, total: None)
    with _only_one(folder):
        check_same(folder, settings)
        progress = scan(folder)
        paths = [locations.absolute(source.name(i)) for i in range(len(source))]
        remaining = [SourceImage(source, i, paths[i]) for i in progress.remaining(paths)]
        total = progress.count + len(remaining)
        writer = ShardWriter(folder, progress.next_part, shard_rows)
        write_manifest(folder, settings, progress, done=False)
        report(progress.count, progress.errors, total)
        _check_errors(progress, None, max_errors)
        try:
            for batch in embedder.stream(remaining):
                progress.count += len(batch)
                progress.errors += sum(e is not None for e in batch.errors)
                if writer.add(batch):
                    write_manifest(folder, settings, progress, done=False)
                report(progress.count, progress.errors, total)
                _check_errors(progress, batch, max_errors)
        finally:
            writer.flush()
        write_manifest(folder, settings, progress, done=True)
    return progress


def _check_errors(progress: Progress, batch: Features | None, max_errors: int | None) -> None:
    if max_errors is None or progress.errors <= max_errors:
        return
    found = zip(batch.paths, batch.errors, strict=True) if batch else ()
    last = [f"{path}: {error}" for path, error in found if error]
    raise DataError(
        f"{progress.errors} images cannot be read, more than --max-errors {max_errors}. "
        + (f"The last is {last[-1]}. " if last else "")
        + "The column 'error' names all so far. Mend or remove them, or raise --max-errors to go on."
    )


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Hold a folder's lock; the system drops it when the process ends, however that happens."""
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        yield
        return
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{folder} is being written by another process. Wait for it, or give another --out."
            ) from None
        except OSError:  # some network file systems have no locks
            pass
        yield
