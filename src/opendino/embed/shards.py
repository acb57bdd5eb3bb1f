# SPDX-License-Identifier: Apache-2.0
"""Shards of a folder of features: their names say all that a run needs in order to go on.

    part-000000004096-000000008192-3-9f86d081884c7d65.parquet

holds the rows of the places 4096 to 8191 of the input's order, 3 of them without vectors; the rest is the beginning of
its sha256. So what is done is a list of ranges, read from one listing of the folder, whatever the number of images.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from opendino.embed.folder import Folder

NAME = re.compile(r"part-(\d{12})-(\d{12})-(\d+)-([0-9a-f]{16})\.parquet")
OLD_NAME = re.compile(r"part-(\d+)\.parquet")
"""Shards of the first layout: numbered, of any rows."""
Range = tuple[int, int]
"""Places from the first to before the second."""


@dataclass(frozen=True, order=True)
class Shard:
    """What the name of a shard says.

    Attributes:
        first: place of its first row.
        end: place after its last row.
        errors: rows without vectors.
        digest: beginning of the sha256 of the file.
    """

    first: int
    end: int
    errors: int
    digest: str

    @property
    def name(self) -> str:
        """Name of the file."""
        return f"part-{self.first:012d}-{self.end:012d}-{self.errors}-{self.digest}.parquet"

    @classmethod
    def of(cls, name: str) -> Shard | None:
        """Read a name; None when it is no shard's."""
        match = NAME.fullmatch(name)
        return cls(int(match[1]), int(match[2]), int(match[3]), match[4]) if match else None


def list_shards(folder: Folder) -> tuple[list[Shard], list[Shard], list[str]]:
    """List the shards of a folder.

    Returns:
        Shards in order, none of which overlap; the shards that add nothing or overlap an earlier one, as two processes
        leave them that wrote the same range when one was thought dead; names of shards of earlier versions.
    """
    names = folder.names()
    found = sorted((s for s in map(Shard.of, names) if s), key=lambda s: (s.first, -s.end, s.digest))
    kept: list[Shard] = []
    surplus: list[Shard] = []
    for shard in found:
        overlaps = shard.first < (kept[-1].end if kept else 0) or shard.first >= shard.end
        (surplus if overlaps else kept).append(shard)
    return kept, surplus, [n for n in names if OLD_NAME.fullmatch(n)]


def missing_ranges(shards: Sequence[Shard], first: int, end: int) -> list[Range]:
    """Give the places from `first` to before `end` that no shard covers; shards in order."""
    missing, at = [], first
    for shard in shards:
        if shard.end <= at:
            continue
        if shard.first >= end:
            break
        if shard.first > at:
            missing.append((at, shard.first))
        at = max(at, shard.end)
    if at < end:
        missing.append((at, end))
    return missing


def cut(ranges: Iterable[Range], step: int, origin: int = 0) -> Iterator[Range]:
    """Cut ranges at `origin` + multiples of `step`, so that who computes a row does not change its batch."""
    for first, end in ranges:
        while first < end:
            until = min(end, origin + ((first - origin) // step + 1) * step)
            yield first, until
            first = until


def whole_batches(rows: int, batch: int) -> int:
    """Give the least multiple of a batch that has at least so many rows."""
    return -(-max(1, rows) // batch) * batch


def step_for(ranges: Iterable[Range], shard_rows: int, batch: int, processes: int) -> int:
    """Give the rows of a piece of work, so that each process has about four pieces or shards are full."""
    left = sum(end - first for first, end in ranges)
    fair = -(-left // (4 * processes))
    return whole_batches(min(shard_rows, max(fair, 1)), batch)
