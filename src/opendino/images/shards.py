# SPDX-License-Identifier: Apache-2.0
"""Tar shards in the webdataset layout as a source: indexed once, then any image is one read at a known place.

In that layout the files of a sample have one key, the path up to the first dot of the file name: `a/0001.jpg`,
`a/0001.cls`. The first image of a key is the sample's; `.cls` (a class name or number) or the `label` of a `.json`
beside it is its class.
"""

from __future__ import annotations

import hashlib
import json
import logging
import posixpath
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from opendino.errors import DataError
from opendino.images import locations
from opendino.images.index_cache import load_or_build
from opendino.images.sources import ARRAYS, EXTENSIONS, ImageSource, Labels
from opendino.images.tar_index import TarIndex
from opendino.images.tar_walk import Member, walk_tar

log = logging.getLogger("opendino")

RUN = 256
"""Neighbouring images that an epoch's order keeps near each other."""
MAX_LABEL_BYTES = 1 << 16
"""A .json beside an image is read for its label up to this size."""


class TarSource(ImageSource):
    """Images in uncompressed tar files.

    Args:
        root: what was opened.
        paths: of the tar files, paths or URLs.

    Raises:
        DataError: for a shard that is missing, compressed or no tar, and when there is no image in any.
    """

    def __init__(self, root: str, paths: list[str]) -> None:
        self.root, self.paths = root, paths
        self.remote = any(locations.is_url(p) for p in paths)
        locations.forget_open_files()
        self.index = load_or_build(paths, index_shard)
        for path, note in zip(paths, self.index.notes, strict=True):
            if note:
                log.warning("%s", f"{path} {note}")
        if not len(self.index):
            raise DataError(f"{root} holds no images: no member of its {len(paths)} tar files is one.")
        self.groups = _runs(np.diff(self.index.firsts))

    def __len__(self) -> int:
        return len(self.index)

    def name(self, index: int) -> str:
        """Give the path of the shard, "/" and the name in it."""
        return f"{self.paths[self.index.shard_of(index)]}/{self.index.names[index]}"

    def read(self, index: int) -> bytes:
        """Give the bytes of an image file.

        Raises:
            DataError, OSError: when the shard is gone, or shorter than it was.
        """
        path = self.paths[self.index.shard_of(index)]
        size = int(self.index.sizes[index])
        data = locations.read_range(path, int(self.index.offsets[index]), size)
        if len(data) != size:
            raise DataError(f"{self.name(index)} is cut off: {path} has become shorter since it was indexed.")
        return data

    @property
    def classes(self) -> list[str]:
        """Sorted class names; empty without labels."""
        return self.index.classes

    def label_ids(self) -> Labels:
        """Give (n,) int32, the index in `classes` of each image, -1 without label."""
        return self.index.labels

    def short_name(self, index: int) -> str:
        """Give the name in the shard."""
        return self.index.names[index]

    def names_hash(self) -> str:
        """Give a hash of the names in the shards and of which shard each is in."""
        digest = hashlib.sha256(np.ascontiguousarray(self.index.firsts, dtype="<i8").data)
        self.index.names.add_to(digest)
        return digest.hexdigest()


def _runs(counts: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Cut shards of so many images into runs of at most RUN, none of them across two shards."""
    pieces = -(-counts // RUN)
    sizes = np.full(int(pieces.sum()), RUN, np.int64)
    last = np.cumsum(pieces) - 1
    some = counts > 0
    sizes[last[some]] = (counts - (pieces - 1) * RUN)[some]
    return sizes


@dataclass
class _Shard:
    """What is found in one tar while it is walked."""

    names: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)
    key: str | None = None
    image: Member | None = None
    label: str | None = None
    extra: int = 0
    dotted: int = 0

    def finish(self) -> None:
        """Close the sample of the current key."""
        if self.image is not None:
            self.names.append(self.image.name)
            self.offsets.append(self.image.offset)
            self.sizes.append(self.image.size)
            self.labels.append(self.label)
        self.image = self.label = None


def index_shard(path: str, size: int) -> TarIndex:
    """List the images of one tar file."""
    shard = _Shard()
    with locations.open_binary(path) as file:

        def use(member: Member) -> None:
            folder, base = posixpath.split(member.name)
            if base.startswith(".") or not base:
                return
            stem, _, extension = base.partition(".")
            key = posixpath.join(folder, stem)
            if key != shard.key:
                shard.finish()
                shard.key = key
            extension = extension.lower()
            if f".{extension}" in EXTENSIONS or f".{extension}" in ARRAYS:
                shard.extra += shard.image is not None
                shard.image = shard.image or member
            elif extension in ("cls", "json") and member.size <= MAX_LABEL_BYTES:
                file.seek(member.offset)
                shard.label = _label(extension, bytes(file.read(member.size))) or shard.label
            elif "." in extension and f".{extension.rsplit('.', 1)[1]}" in EXTENSIONS:
                shard.dotted += 1

        damage = walk_tar(file, size, path, use)
    shard.finish()
    return TarIndex.of_shard(shard.names, shard.offsets, shard.sizes, shard.labels, _note(shard, damage))


def _note(shard: _Shard, damage: str | None) -> str:
    notes = []
    if damage:
        notes.append(f"{damage}; the {len(shard.names)} images before are used")
    if shard.extra:
        notes.append(f"has {shard.extra} images under the key of another one, which are left out")
    if shard.dotted:
        notes.append(f"has {shard.dotted} images left out because of a dot in their names: a key ends at the first dot")
    if not shard.names and not damage:
        notes.append("holds no image")
    return "; it ".join(notes) + ("." if notes else "")


def _label(extension: str, data: bytes) -> str | None:
    try:
        if extension == "cls":
            return data.decode().strip() or None
        values = json.loads(data)
    except ValueError:
        return None
    label = values.get("label") if isinstance(values, dict) else None
    return str(label) if isinstance(label, str | int) and str(label) else None
