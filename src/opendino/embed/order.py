# SPDX-License-Identifier: Apache-2.0
"""The order of an extraction: every row has a place, and every place an image of the input.

The first run numbers the images as the input lists them, so nothing need be kept of them. When the input has changed
since, the images without a row get the places that follow; which ones they are is found by comparing hashes of the
paths in the rows with those of the input, a pass that takes 16 bytes a row and an image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from opendino.embed.folder import Folder
from opendino.embed.shards import Shard, list_shards
from opendino.errors import DataError
from opendino.images import locations
from opendino.images.sources import ImageSource, SourceImage

Places = npt.NDArray[np.int64]


@dataclass(frozen=True)
class InputState:
    """An input as a run met it.

    Attributes:
        first: place of the first image that had no row yet.
        count: images that had none.
        images: images in all.
        names_sha256: hash of their names in order; None for rows of the first layout.
    """

    first: int
    count: int
    images: int
    names_sha256: str | None

    @property
    def end(self) -> int:
        """Place after the last one."""
        return self.first + self.count

    def json(self) -> dict[str, Any]:
        """Give it for the manifest."""
        return asdict(self)


class Order:
    """Which image is at which place.

    Args:
        source: the input.
        state: its places.
        indices: of the images at these places; None: all images in order.
    """

    def __init__(self, source: ImageSource, state: InputState, indices: Places | None = None) -> None:
        self.source, self.state, self.indices = source, state, indices

    def image(self, place: int) -> SourceImage:
        """Give the image at a place, named as its row will be."""
        at = place - self.state.first
        index = at if self.indices is None else int(self.indices[at])
        return SourceImage(self.source, index, row_name(self.source, index))


def row_name(source: ImageSource, index: int) -> str:
    """Give the path of an image as a row has it: absolute, and UTF-8 even where the file system's is not."""
    name = locations.absolute(source.name(index))
    try:
        name.encode()
    except UnicodeEncodeError:
        name = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return name


def plan_order(
    folder: Folder, source: ImageSource, known: Sequence[InputState], shards: Sequence[Shard], old: Sequence[str]
) -> tuple[Order, list[InputState]]:
    """Say which places are to be filled now.

    Args:
        folder: of features.
        source: the input.
        known: what the manifest says of it, in order.
        shards: in order, without overlaps.
        old: names of shards of the first layout.

    Returns:
        The order, and what the manifest is to say from now on.
    """
    states, names, images = list(known), source.names_hash(), len(source)
    if not states and not old:
        states = [InputState(0, images, images, names)]
    last = states[-1] if states else None
    if last and (last.images, last.names_sha256) == (images, names):
        if last.first == 0:
            return Order(source, last), states
        earlier = [s for s in shards if s.first < last.first]
        indices = absent(folder, source, [*old, *(s.name for s in earlier)])
        if len(indices) == last.count:
            return Order(source, last, indices), states
    # The input has changed, or shards of an earlier state of it are gone: whatever has no row comes last.
    indices = absent(folder, source, [*old, *(s.name for s in shards)])
    if last is None:
        rows = sum(count_rows(folder, name) for name in old)
        states, first = [InputState(0, rows, rows, None)], rows
    else:
        first = max([last.end, *(s.end for s in shards)])
    states.append(InputState(first, len(indices), images, names))
    return Order(source, states[-1], indices), states


def order_of(folder: Folder, source: ImageSource, state: InputState) -> Order:
    """Give the order that another process has planned.

    Raises:
        DataError: when the input is another one here.
    """
    indices = None
    if state.first > 0:
        shards, _, old = list_shards(folder)
        indices = absent(folder, source, [*old, *(s.name for s in shards if s.first < state.first)])
    count = len(source) if indices is None else len(indices)
    if (count, len(source), source.names_hash()) != (state.count, state.images, state.names_sha256):
        raise DataError(
            f"{source.root} has {len(source)} images for one process and {state.images} for another. It must look the "
            "same from everywhere and stay as it is while it is read; start the command again when it does."
        )
    return Order(source, state, indices)


def absent(folder: Folder, source: ImageSource, shards: Iterable[str]) -> Places:
    """Give the images that have no row, in order; a path that is listed twice needs two rows."""
    have = _packed(hash_of(path) for shard in shards for path in read_paths(folder, shard))
    want = _packed(hash_of(row_name(source, i)) for i in range(len(source)))
    return unmatched(have, want)


def surplus(folder: Folder, source: ImageSource, shards: Sequence[str]) -> list[str]:
    """Give the paths of rows that no image is left for."""
    have = _packed(hash_of(row_name(source, i)) for i in range(len(source)))
    want = _packed(hash_of(path) for shard in shards for path in read_paths(folder, shard))
    found = set(unmatched(have, want).tolist())
    paths = (path for shard in shards for path in read_paths(folder, shard))
    return [path for i, path in enumerate(paths) if i in found] if found else []


def unmatched(have: npt.NDArray[np.uint64], want: npt.NDArray[np.uint64]) -> Places:
    """Give the places of (n, 2) `want` that are left when each row of (m, 2) `have` has taken one that equals it."""
    both = np.concatenate([have, want])
    if not len(want):
        return np.zeros(0, np.int64)
    order = np.lexsort((both[:, 1], both[:, 0]))  # stable: of equal ones, those of `have` come first
    ordered = both[order]
    new = np.ones(len(order), bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(1)
    group = np.cumsum(new) - 1
    starts = np.flatnonzero(new)
    is_have = order < len(have)
    haves = np.bincount(group, weights=is_have, minlength=len(starts)).astype(np.int64)
    rank = np.arange(len(order)) - starts[group] - haves[group]  # among the wants of a group
    left = order[~is_have & (rank >= haves[group])] - len(have)
    return np.sort(left).astype(np.int64)


def hash_of(path: str) -> bytes:
    """Give 16 bytes that stand for a path; two of 10^8 paths share them with a chance of 10^-23."""
    return hashlib.blake2b(path.encode("utf-8", "surrogateescape"), digest_size=16).digest()


def _packed(hashes: Iterable[bytes]) -> npt.NDArray[np.uint64]:
    held = bytearray()
    for found in hashes:
        held += found
    return np.frombuffer(bytes(held), np.uint64).reshape(-1, 2)


def read_paths(folder: Folder, shard: str) -> Iterator[str]:
    """Give the paths of a shard's rows."""
    with opened(folder, shard) as file:
        for batch in file.iter_batches(columns=["path"], batch_size=4096):
            yield from batch.column(0).to_pylist()


def count_rows(folder: Folder, shard: str) -> int:
    """Give a shard's number of rows from its footer."""
    with opened(folder, shard) as file:
        return int(file.metadata.num_rows)


def opened(folder: Folder, shard: str) -> Any:
    """Open a shard.

    Raises:
        DataError: when it cannot be read.
    """
    try:
        return pq.ParquetFile(folder.open(shard))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder.path(shard)} is no readable shard: {error}. Delete it and start again to redo its rows."
        ) from error
