# SPDX-License-Identifier: Apache-2.0
"""Features on disk: Parquet shards that appear whole, and the loop that fills a folder and can be killed at any moment.

Columns: path, sha256, cls / mean (fixed_size_list<float or halffloat>, L·D), patches (fixed_size_list, h·w·L·D row by
row) with grid_h and grid_w, error. A row with an error has null vectors.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from opendino.embed.embedder import Embedder, Features
from opendino.embed.extraction import Extraction, Progress
from opendino.embed.folder import Folder, open_folder
from opendino.embed.order import Order
from opendino.embed.resume import describe
from opendino.embed.shards import Range, Shard, whole_batches
from opendino.errors import ConfigError, DataError
from opendino.images import locations
from opendino.images.sources import ImageSource, SourceImage

SHARD_BYTES = 64 << 20
SHARD_SECONDS = 120.0
"""A shard is closed at this age, so that a kill costs at most this much work."""
DTYPES = ("float32", "float16")
NOT_FINITE = "the model's vectors for it are not finite numbers"


def to_table(features: Features, dtype: str = "float32") -> pa.Table:
    """Put a batch in the columns of a shard.

    Raises:
        DataError: when a value is too large for float16.
    """
    errors = _with_not_finite(features)
    bad = np.array([e is not None for e in errors], dtype=bool)
    columns: dict[str, Any] = {
        "path": pa.array(features.paths, pa.string()),
        "sha256": pa.array(features.hashes, pa.string()),
    }
    for name in ("cls", "mean", "patches"):
        values = getattr(features, name)
        if values is not None:
            columns[name] = _vectors(values.reshape(len(features), -1), bad, dtype)
    if features.patches is not None:
        for name, side in zip(("grid_h", "grid_w"), features.grid, strict=True):
            columns[name] = pa.array(np.full(len(features), side, np.int32), mask=bad)
    columns["error"] = pa.array(errors, pa.string())
    return pa.table(columns)


def _with_not_finite(features: Features) -> list[str | None]:
    """Give the errors, and one for each image that was read but has no usable vector."""
    errors = list(features.errors)
    for name in ("cls", "mean", "patches"):
        values = getattr(features, name)
        if values is not None:
            for i in np.flatnonzero(~np.isfinite(values.reshape(len(features), -1)).all(1)):
                errors[i] = errors[i] or NOT_FINITE
    return errors


def _vectors(values: Any, bad: Any, dtype: str) -> pa.Array:
    with np.errstate(over="ignore"):
        stored = np.where(bad[:, None], np.float32(0), values).astype(dtype)
    if not np.isfinite(stored).all():
        raise DataError(f"A vector has the value {np.abs(values).max():.4g}, too large for float16. Use float32.")
    flat = pa.array(stored.reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1], mask=pa.array(bad))


class ShardWriter:
    """Collects rows and writes them as shards; each holds rows of neighbouring places.

    Args:
        folder: where the shards go; it must exist.
        shard_rows: rows after which a shard is closed; also closed at SHARD_BYTES and SHARD_SECONDS.
        dtype: of the vectors, one of DTYPES.
        on_shard: called with every shard that is on the disk.
        guard: called when a shard is written and about to appear; raises when it must not.
    """

    def __init__(
        self,
        folder: Folder,
        shard_rows: int = 4096,
        dtype: str = "float32",
        on_shard: Callable[[Shard], None] | None = None,
        guard: Callable[[], None] | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise ConfigError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}.")
        if shard_rows < 1:
            raise ConfigError(f"shard_rows is {shard_rows}; it must be at least 1.")
        self.folder, self.shard_rows, self.dtype = folder, shard_rows, dtype
        self.on_shard, self.guard = on_shard, guard
        self._tables: list[pa.Table] = []
        self._first = self._end = self._bytes = 0
        self._since = monotonic()

    def add(self, features: Features, first: int) -> int:
        """Take rows of the places from `first` on, and give how many of them have no vectors."""
        if first != self._end:
            self.flush()
        if not self._tables:
            self._first = self._end = first
            self._since = monotonic()
        table = to_table(features, self.dtype)
        self._tables.append(table)
        self._end, self._bytes = self._end + table.num_rows, self._bytes + table.nbytes
        rows = self._end - self._first
        if rows >= self.shard_rows or self._bytes >= SHARD_BYTES or monotonic() - self._since >= SHARD_SECONDS:
            self.flush()
        return int(table.num_rows - table["error"].null_count)

    def flush(self) -> None:
        """Write what is held as one shard, if there is something."""
        if not self._tables:
            return
        table = pa.concat_tables(self._tables)
        errors = table.num_rows - table["error"].null_count

        def name_of(digest: str) -> str:
            if self.guard:
                self.guard()
            return Shard(self._first, self._first + table.num_rows, errors, digest).name

        # Vectors of floats neither repeat nor compress.
        name = self.folder.put(lambda file: pq.write_table(table, file, use_dictionary=False), name_of)
        self._tables, self._bytes = [], 0
        written = Shard.of(name)
        assert written
        if self.on_shard:
            self.on_shard(written)


def write_ranges(
    embedder: Embedder,
    order: Order,
    ranges: Iterable[Range],
    writer: ShardWriter,
    on_batch: Callable[[int, int, str | None], None],
) -> None:
    """Compute the rows of ranges of places and write them; what was computed is kept whatever happens.

    Args:
        embedder: gives the vectors.
        order: the images.
        ranges: taken one by one while images are read ahead.
        writer: of the shards.
        on_batch: called with rows, errors, and the last error with its path.
    """
    waiting: deque[tuple[int, str]] = deque()

    def images() -> Iterator[SourceImage]:
        for first, end in ranges:
            for place in range(first, end):
                image = order.image(place)
                waiting.append((place, image.path))
                yield image

    try:
        for batch in embedder.stream(images()):
            places = [waiting.popleft() for _ in range(len(batch))]
            assert [path for _, path in places] == batch.paths
            errors = 0
            for start, end in _neighbours([place for place, _ in places]):
                errors += writer.add(_rows(batch, start, end), places[start][0])
            found = [f"{p}: {e}" for p, e in zip(batch.paths, batch.errors, strict=True) if e]
            on_batch(len(batch), errors, found[-1] if found else None)
    finally:
        writer.flush()


def _neighbours(places: list[int]) -> Iterator[Range]:
    """Cut a list of places where one does not follow the one before."""
    cuts = [0, *(i for i in range(1, len(places)) if places[i] != places[i - 1] + 1), len(places)]
    return pairwise(cuts)


def _rows(features: Features, start: int, end: int) -> Features:
    if (start, end) == (0, len(features)):
        return features
    names = (f.name for f in fields(features) if f.name != "grid")
    cut = {name: getattr(features, name)[start:end] for name in names if getattr(features, name) is not None}
    return replace(features, **cut)


def settings_of(
    embedder: Embedder, source: ImageSource, model_name: str, weights: str | None, dtype: str
) -> dict[str, Any]:
    """Give the manifest's fixed part: all that decides what a row holds, and how the model was asked for."""
    settings = describe(embedder, model_name, locations.absolute(source.root))
    return settings | {"weights": weights, "dtype": dtype, "decode": embedder.decode}


def embed_to_folder(
    embedder: Embedder,
    source: ImageSource,
    folder: str | Path,
    *,
    model_name: str = "",
    weights: str | None = None,
    max_errors: int | None = None,
    shard_rows: int = 4096,
    dtype: str = "float32",
    on_batch: Callable[[int, int, int], None] | None = None,
) -> Progress:
    """Write one row for every image of a source; started again, it goes on where the shards end.

    Paths are written absolute. Memory is bounded by a shard and three batches, not by the number of images.

    Args:
        embedder: gives the vectors; its `what` decides the columns.
        source: the images.
        folder: path or URL; made if missing; its earlier rows are kept.
        model_name: written in the manifest for people to read, and for `verify` to load.
        weights: the same, where they are given beside the model's name.
        max_errors: how many unreadable images are accepted, earlier ones included; None accepts any number.
        shard_rows: rows in a shard, rounded up to whole batches.
        dtype: of the vectors on the disk, float32 or float16.
        on_batch: called with (rows, errors, images in all) at the start and after every batch.

    Raises:
        ConfigError: when the folder was made with another model, other settings or another input, or is in use.
        DataError: when more than `max_errors` images cannot be read; what was done is kept.
    """
    place = open_folder(folder)
    step = whole_batches(shard_rows, embedder.batch_size)
    writer = ShardWriter(place, step, dtype)
    settings = settings_of(embedder, source, model_name, weights, dtype)
    with Extraction(place, source, max_errors) as run:
        run.begin(settings)
        progress = run.progress

        def report(rows: int, errors: int, last: str | None) -> None:
            progress.count += rows
            progress.errors += errors
            if on_batch:
                on_batch(progress.count, progress.errors, progress.total)
            run.check_errors(last)

        writer.on_shard = lambda shard: run.note()
        report(0, 0, None)
        try:
            write_ranges(embedder, run.order, run.missing(), writer, report)
        except DataError:
            run.list_errors()
            raise
        run.finish()
    return progress
