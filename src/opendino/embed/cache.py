# SPDX-License-Identifier: Apache-2.0
"""Vectors that are computed once: a store keyed by weights, preprocessing and the content of each file.

    FOLDER/<key>/settings.json        what the vectors are; the key is its hash
    FOLDER/<key>/part-….npy           (rows, width) vectors
    FOLDER/<key>/part-….sha256.npy    (rows, 32) hashes of the files, written last: a part without it does not exist

Several processes may write at once; a killed one loses the rows it had not yet written. Nothing is ever changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from opendino.embed.embedder import Embedder, Features
from opendino.embed.resume import describe
from opendino.errors import DataError, OpendinoError
from opendino.images.ahead import map_ahead
from opendino.images.sources import ImageSource, SourceImage

DEFAULT_CACHE = Path("~/.cache/opendino/features")
POOLED_BLOCKS = 4
"""Blocks whose cls tokens are kept, so that one pass over the images serves k-NN, logistic, linear and retrieval."""
PART_BYTES = 64 << 20
OnImages = Callable[[int, int, int], None]
"""Called with images done, errors, and images in all."""


class FeatureStore:
    """Rows of one width for one way to compute them.

    Args:
        root: folder of all stores; made when the first row is written.
        settings: JSON-able; everything that decides what a row holds.
        width: numbers in a row.
        dtype: of the stored rows.
    """

    def __init__(self, root: str | Path, settings: dict[str, Any], width: int, dtype: Any = np.float32) -> None:
        text = json.dumps(settings | {"width": width, "dtype": np.dtype(dtype).name}, sort_keys=True, indent=1)
        self.folder = Path(root).expanduser() / hashlib.sha256(text.encode()).hexdigest()[:24]
        self.width, self.dtype, self._text = width, np.dtype(dtype), text
        self._where: dict[bytes, tuple[int, int]] = {}
        self._parts: list[npt.NDArray[Any]] = []
        self._seen: set[str] = set()
        self._held: list[tuple[bytes, npt.NDArray[Any]]] = []
        self._scan()

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, sha256: str) -> bool:
        return bytes.fromhex(sha256) in self._where

    def add(self, hashes: Sequence[str], rows: npt.NDArray[Any]) -> None:
        """Take rows (n, width); they are on disk after `flush`, or earlier when they are many."""
        self._held += zip(map(bytes.fromhex, hashes), np.asarray(rows, self.dtype), strict=True)
        if len(self._held) * self.width * self.dtype.itemsize >= PART_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is held as one part."""
        if not self._held:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "settings.json").exists():
            _write(self.folder / "settings.json", lambda file: file.write(self._text.encode()))
        name = f"part-{uuid.uuid4().hex}"
        rows = np.stack([row for _, row in self._held])
        hashes = np.frombuffer(b"".join(sha for sha, _ in self._held), np.uint8).reshape(-1, 32)
        _write(self.folder / f"{name}.npy", lambda file: np.save(file, rows))
        _write(self.folder / f"{name}.sha256.npy", lambda file: np.save(file, hashes))
        self._held = []
        self._scan()

    def rows(self, hashes: Sequence[str]) -> npt.NDArray[Any]:
        """Gather (n, width) rows in the order asked for; all must be there."""
        out = np.empty((len(hashes), self.width), self.dtype)
        for i, sha in enumerate(hashes):
            part, row = self._where[bytes.fromhex(sha)]
            out[i] = self._parts[part][row]
        return out

    def _scan(self) -> None:
        for path in sorted(self.folder.glob("part-*.sha256.npy")):
            if path.name in self._seen:
                continue
            data = path.with_name(path.name.replace(".sha256", ""))
            try:
                hashes, rows = np.load(path), np.load(data, mmap_mode="r")
            except (OSError, ValueError) as error:
                raise DataError(
                    f"{data} cannot be read: {error}. Delete it and {path.name}; it is made again."
                ) from error
            self._seen.add(path.name)
            self._parts.append(rows)
            for row, sha in enumerate(hashes):
                self._where[sha.tobytes()] = (len(self._parts) - 1, row)


def hash_images(items: Iterable[SourceImage], workers: int) -> list[tuple[str | None, str | None]]:
    """Give (sha256, None) of each image's file, or (None, why it cannot be read)."""
    return list(map_ahead(_hash, items, workers, 4 * max(workers, 1)))


def pooled_features(
    embedder: Embedder, source: ImageSource, root: str | Path | None, on_images: OnImages | None = None
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], list[str | None]]:
    """Embed a source, taking from the store what is there; started again after a kill, it goes on.

    Args:
        embedder: with `layers` blocks and what=("cls", "mean").
        source: the images.
        root: folder of the stores; None computes everything and keeps nothing.
        on_images: told about progress.

    Returns:
        cls (n, L, D), the last L = embedder.layers blocks in order; mean (n, D) of the last block's patches; and per
        image None or why it cannot be read. Rows of unreadable images are NaN.
    """
    dim, layers = embedder.config.embed_dim, embedder.layers
    rows, errors = pooled_rows(embedder, list(source.images()), root, on_images)
    return rows[:, : layers * dim].reshape(len(rows), layers, dim), rows[:, layers * dim :], errors


def pooled_rows(
    embedder: Embedder, items: Sequence[SourceImage], root: str | Path | None, on_images: OnImages | None = None
) -> tuple[npt.NDArray[np.float32], list[str | None]]:
    """Give what `pooled_features` gives, as rows (n, (L + 1)·D): the cls tokens, then the mean of the patches."""
    dim = embedder.config.embed_dim

    def to_rows(batch: Features) -> npt.NDArray[np.float32]:
        assert batch.cls is not None
        assert batch.mean is not None
        return np.concatenate([batch.cls, batch.mean[:, -dim:]], axis=1)

    return stored_rows(embedder, items, root, "pooled", (embedder.layers + 1) * dim, to_rows, on_images)


def stored_rows(
    embedder: Embedder, items: Sequence[SourceImage], root: str | Path | None, kind: str, width: int,
    to_rows: Callable[[Features], npt.NDArray[np.float32]], on_images: OnImages | None = None,
) -> tuple[npt.NDArray[np.float32], list[str | None]]:  # fmt: skip
    """Make one row an image, taking from the store what is there; started again after a kill, it goes on.

    Args:
        embedder: what computes.
        items: the images.
        root: folder of the stores; None computes everything and keeps nothing.
        kind: says how `to_rows` makes a row; rows of different kinds are in different stores.
        width: numbers in a row.
        to_rows: makes (n, width) rows of a batch of n images.
        on_images: told about progress.

    Returns:
        (n, width) rows, NaN for unreadable images, and per image None or why it cannot be read.
    """
    report = on_images or (lambda done, errors, total: None)
    store = None if root is None else FeatureStore(root, describe(embedder, "", "") | {"kind": kind}, width)
    found = hash_images(items, embedder.workers) if store is not None else [(None, None)] * len(items)
    todo = [i for i, (sha, why) in enumerate(found) if why is None and (store is None or str(sha) not in store)]
    failed: dict[int, str] = {i: why for i, (_, why) in enumerate(found) if why is not None}
    done = len(items) - len(todo)
    report(done, len(failed), len(items))
    fresh: dict[int, npt.NDArray[np.float32]] = {}
    try:
        place = 0
        for batch in embedder.stream([items[i] for i in todo]):
            for row, why in zip(to_rows(batch), batch.errors, strict=True):
                index, place = todo[place], place + 1
                if why is not None:
                    failed[index] = why
                elif store is None:
                    fresh[index] = row
                else:
                    store.add([str(found[index][0])], row[None])
            done += len(batch)
            report(done, len(failed), len(items))
    finally:
        if store is not None:
            store.flush()
    rows = np.full((len(items), width), np.nan, np.float32)
    good = [i for i in range(len(items)) if i not in failed]
    if good:
        rows[good] = (
            np.stack([fresh[i] for i in good]) if store is None else store.rows([str(found[i][0]) for i in good])
        )
    return rows, [failed.get(i) for i in range(len(items))]


def _hash(item: SourceImage) -> tuple[str | None, str | None]:
    try:
        return item.key(), None
    except (OpendinoError, OSError) as error:
        return None, str(error) or type(error).__name__


def _write(path: Path, put: Callable[[Any], Any]) -> None:
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with open(aside, "wb") as file:
        put(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
