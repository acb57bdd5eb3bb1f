# SPDX-License-Identifier: Apache-2.0
"""Parquet files with image bytes as a source, as Hugging Face data sets have them.

A row group is the least that Parquet can read, so a process keeps the last ones decoded, and an epoch's order keeps to
windows that fit into what is kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import numpy as np

from opendino.errors import DataError
from opendino.images import locations
from opendino.images.sources import ImageSource, Labels, number_classes

log = logging.getLogger("opendino")

IMAGE_COLUMNS = ("image", "bytes", "jpg", "jpeg", "png", "webp", "img")
LABEL_COLUMNS = ("label", "labels", "cls")
KEPT_BYTES = 512 << 20
"""Decoded row groups that a process keeps."""
BIG_GROUP = 2 << 30
"""Bytes of a row group from which a user is told that it is too big."""
THREADS = 8


class ParquetSource(ImageSource):
    """Rows of Parquet files whose image column holds the bytes of image files, or structs with a field `bytes`.

    Args:
        root: what was opened.
        paths: of the files, paths or URLs.

    Raises:
        DataError: for a file that is missing, no Parquet, or without such a column, and when there are no rows.
    """

    def __init__(self, root: str, paths: list[str]) -> None:
        self.root, self.paths = root, paths
        self.remote = any(locations.is_url(p) for p in paths)
        with ThreadPoolExecutor(THREADS) as pool:
            files = list(pool.map(_describe, paths))
        self.column = files[0]["image"]
        for path, file in zip(paths, files, strict=True):
            if file["image"] != self.column:
                raise DataError(
                    f"{path} has the images in {file['image']!r}, {paths[0]} in {self.column!r}. Name one kind."
                )
        groups = [(i, g, rows) for i, f in enumerate(files) for g, rows in enumerate(f["rows"])]
        self.groups = np.array([rows for _, _, rows in groups], np.int64)
        self._where = np.array([(i, g) for i, g, _ in groups], np.int64).reshape(-1, 2)
        self._firsts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.groups)])
        self._file_firsts = np.cumsum([0, *(sum(f["rows"]) for f in files)])
        _readers.clear()  # a file may have been written anew
        if not len(self):
            raise DataError(f"{root} holds no images: its {len(paths)} Parquet files have no rows.")
        self._label = next((n for n in LABEL_COLUMNS if all(n in f["names"] for f in files)), None)
        self._class_names: list[str] = files[0]["classes"]
        self.max_window = self._window([size for f in files for size in f["bytes"]])

    def _window(self, sizes: list[int]) -> int:
        """Give how many images fit into what a process keeps, at least one row group."""
        assert self.groups is not None
        largest = int(np.argmax(sizes))
        if sizes[largest] > BIG_GROUP:
            path, rows = self.paths[int(self._where[largest][0])], int(self.groups[largest])
            log.warning(
                "A row group of %s holds %.1f GB of images, and every worker keeps at least one in memory. Write the "
                "files anew with a row_group_size of about %d.",
                path, sizes[largest] / 1e9, max(1, rows * (64 << 20) // sizes[largest]),
            )  # fmt: skip
        # A window cuts a row group at either end, and both are kept whole.
        room = KEPT_BYTES - 2 * sizes[largest]
        return max(int(room * len(self) / max(1, sum(sizes))), int(self.groups.max()))

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def _place(self, index: int) -> tuple[str, int, int]:
        """Give the file, the row group in it, and the row in that."""
        group = int(np.searchsorted(self._firsts, index, side="right")) - 1
        file, number = (int(x) for x in self._where[group])
        return self.paths[file], number, index - int(self._firsts[group])

    def name(self, index: int) -> str:
        """Give the path of the file, "#" and the number of the row in it."""
        file = int(np.searchsorted(self._file_firsts, index, side="right")) - 1
        return f"{self.paths[file]}#{index - int(self._file_firsts[file])}"

    def read(self, index: int) -> bytes:
        """Give the bytes of an image file.

        Raises:
            DataError, OSError: when the file is gone or damaged, or the row empty.
        """
        path, group, row = self._place(index)
        value = _reader(os.getpid()).row_group(path, group, self.column)[row].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if data is None:
            raise DataError(f"{self.name(index)} holds no image bytes.")
        return bytes(data)

    def label_ids(self) -> Labels:
        """Give (n,) int32, the index in `classes` of each image, -1 without label."""
        return self._labels[1]

    @property
    def classes(self) -> list[str]:
        """Sorted class names; empty without labels."""
        return self._labels[0]

    def short_name(self, index: int) -> str:
        """Give the name of the file, "#" and the number of the row in it."""
        return self.name(index).rsplit("/", 1)[-1]

    def names_hash(self) -> str:
        """Give a hash of the files' names and the rows in their row groups."""
        digest = hashlib.sha256(json.dumps([os.path.basename(p) for p in self.paths]).encode())
        digest.update(np.ascontiguousarray(self._firsts, dtype="<i8").data)
        return digest.hexdigest()

    @cached_property
    def _labels(self) -> tuple[list[str], Labels]:
        """Read the label column when it is asked for; numbers get the names that Hugging Face keeps with it."""
        import pyarrow as pa

        none: tuple[list[str], Labels] = ([], np.full(len(self), -1, np.int32))
        if self._label is None:
            return none
        columns = [_parquet_file(p).read(columns=[self._label], use_threads=False).column(0) for p in self.paths]
        try:
            text = pa.chunked_array([chunk for c in columns for chunk in c.cast(pa.string()).chunks], pa.string())
        except pa.ArrowException:  # a list of labels, or something else that is no class
            return none
        coded = text.combine_chunks().dictionary_encode()
        names = [self._class_name(value) for value in coded.dictionary.to_pylist()]
        classes, ids = number_classes([*names, None])
        return classes, ids[coded.indices.fill_null(len(names)).to_numpy(zero_copy_only=False)]

    def _class_name(self, value: str) -> str | None:
        if not self._class_names or not value.lstrip("-").isdigit():
            return value
        return self._class_names[int(value)] if 0 <= int(value) < len(self._class_names) else None


def _parquet_file(path: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if locations.is_url(path):
            return pq.ParquetFile(locations.open_binary(path))
        return pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}. It may be cut off; copy it again.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be opened: {error}. Mend the path, the pattern or the list.") from error


def _describe(path: str) -> dict[str, Any]:
    """Give the columns, and rows and image bytes of each row group, from the footer alone."""
    import pyarrow as pa

    file = _parquet_file(path)
    schema, meta = file.schema_arrow, file.metadata

    def holds_bytes(name: str) -> bool:
        kind = schema.field(name).type
        if pa.types.is_struct(kind):
            inside = kind.get_field_index("bytes")
            return inside >= 0 and _is_binary(kind.field(inside).type)
        return _is_binary(kind)

    image = next((n for n in IMAGE_COLUMNS if n in schema.names and holds_bytes(n)), None)
    if image is None:
        raise DataError(
            f"{path} has the columns {schema.names}; it needs one called `image` (or `bytes`, `jpg`) with the bytes of "
            "image files, or structs with a field `bytes`."
        )
    columns = [i for i in range(meta.num_columns) if meta.schema.column(i).path.split(".")[0] == image]
    groups = [meta.row_group(g) for g in range(meta.num_row_groups)]
    return {
        "image": image, "names": schema.names, "rows": [g.num_rows for g in groups], "classes": _hf_classes(schema),
        "bytes": [sum(g.column(c).total_uncompressed_size for c in columns) for g in groups],
    }  # fmt: skip


def _is_binary(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def _hf_classes(schema: Any) -> list[str]:
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        names: list[Any] = next((features[n]["names"] for n in LABEL_COLUMNS if n in features), [])
    except (ValueError, KeyError, TypeError):
        return []
    return [str(n) for n in names]


class _Reader:
    """The last decoded row groups of one process; threads share them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: OrderedDict[str, Any] = OrderedDict()
        self._groups: OrderedDict[tuple[str, int, str], Any] = OrderedDict()

    def row_group(self, path: str, group: int, column: str) -> Any:
        """Give the image column of a row group."""
        import pyarrow as pa

        key = (path, group, column)
        with self._lock:
            if key in self._groups:
                self._groups.move_to_end(key)
                return self._groups[key]
            try:
                table = self._file(path).read_row_group(group, columns=[column], use_threads=False)
            except (pa.ArrowException, OSError) as error:
                self._files.pop(path, None)
                raise DataError(f"Row group {group} of {path} cannot be read: {error}") from error
            found = self._groups[key] = table.column(0)
            while len(self._groups) > 1 and sum(g.nbytes for g in self._groups.values()) > KEPT_BYTES:
                self._groups.popitem(last=False)
            return found

    def _file(self, path: str) -> Any:
        if path not in self._files:
            self._files[path] = _parquet_file(path)
            if len(self._files) > locations.OPEN_FILES:
                self._files.popitem(last=False)
        self._files.move_to_end(path)
        return self._files[path]


_readers: dict[int, _Reader] = {}


def _reader(pid: int) -> _Reader:
    """Give this process's reader; a forked child must use neither files nor locks of its parent."""
    if pid not in _readers:
        _readers.clear()
        _readers[pid] = _Reader()
    return _readers[pid]
