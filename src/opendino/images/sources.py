# SPDX-License-Identifier: Apache-2.0
"""Where images are: a folder, class folders, a list, a table, tar shards or Parquet, on a disk or behind a URL.

A source is indexed once when it is opened; then image i can be read at any time, by any process.
"""

from __future__ import annotations

import csv
import hashlib
import io
import logging
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import TextIO, overload

import numpy as np
import numpy.typing as npt

from opendino.errors import DataError, OpendinoError
from opendino.images import locations
from opendino.images.packed import PackedText, Packer

log = logging.getLogger("opendino")

EXTENSIONS = frozenset(
    [".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".jp2", ".avif"]
)  # fmt: skip
ARRAYS = frozenset([".npy"])
"""Taken from a folder that has no other images, because arrays beside images are mostly something else."""
Labels = npt.NDArray[np.int32]


@dataclass(frozen=True)
class ImageItem:
    """One image: its path, and its class name where the source has labels."""

    path: str
    label: str | None = None


class ImageSource(ABC):
    """A fixed, ordered list of images.

    Attributes:
        root: what was opened.
        groups: sizes of the runs of neighbouring images that are cheap to read together, for sources whose order should
            keep to them; None where any order is as good.
        max_window: images that an order may mix at a time, so that what a worker keeps decoded suffices; None: any.
        remote: reading an image waits for a network.
    """

    root: str
    groups: npt.NDArray[np.int64] | None = None
    max_window: int | None = None
    remote: bool = False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """Give the path of an image; inside a shard it is the shard's path, "/" and the name there."""

    @abstractmethod
    def read(self, index: int) -> str | bytes:
        """Give what `read_image` takes: a path, or the bytes of the file.

        Raises:
            DataError, OSError: when it is not there any more.
        """

    @property
    @abstractmethod
    def classes(self) -> list[str]:
        """Sorted class names; empty without labels."""

    @abstractmethod
    def label_ids(self) -> Labels:
        """Give (n,) int32, the index in `classes` of each image, -1 without label."""

    @abstractmethod
    def short_name(self, index: int) -> str:
        """Give the name of an image that does not say where the data lie."""

    @abstractmethod
    def names_hash(self) -> str:
        """Give a hash of the names of all images in their order, the same wherever the data lie."""

    @property
    def items(self) -> Sequence[ImageItem]:
        """The images as (path, label); made when asked for, so that a long list costs nothing."""
        return _Items(self)

    def images(self) -> Iterator[SourceImage]:
        """Go through the images, to be read when they are wanted."""
        return (SourceImage(self, i, self.name(i)) for i in range(len(self)))

    @property
    def labels(self) -> list[int]:
        """Index in `classes` of each image, -1 without label."""
        return [int(i) for i in self.label_ids()]


@dataclass(frozen=True)
class SourceImage:
    """One image of a source, read when it is wanted.

    Attributes:
        source: it belongs to.
        index: in the source.
        path: what it is called.
        box: the part that is meant (left, upper, right, lower), pixels; None is all of it.
    """

    source: ImageSource
    index: int
    path: str
    box: tuple[float, float, float, float] | None = None

    def data(self) -> bytes:
        """Read the bytes of its file."""
        found = self.source.read(self.index)
        return Path(found).read_bytes() if isinstance(found, str) else found

    def key(self) -> str:
        """Give the sha256 of its content: the file's bytes, and the box if there is one."""
        digest = hashlib.sha256(self.data())
        if self.box is not None:
            digest.update(repr(tuple(map(float, self.box))).encode())
        return digest.hexdigest()


class _Items(Sequence[ImageItem]):
    def __init__(self, source: ImageSource) -> None:
        self._source, self._labels = source, source.label_ids()

    def __len__(self) -> int:
        return len(self._source)

    @overload
    def __getitem__(self, index: int) -> ImageItem: ...
    @overload
    def __getitem__(self, index: slice) -> list[ImageItem]: ...
    def __getitem__(self, index: int | slice) -> ImageItem | list[ImageItem]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        label = int(self._labels[index])
        return ImageItem(self._source.name(index), None if label < 0 else self._source.classes[label])


class FileSource(ImageSource):
    """One file per image.

    Args:
        root: what was opened.
        base: folder that relative paths count from, or URL of one.
        paths: of the images.
        labels: class names, one per path.
    """

    def __init__(self, root: str, base: str, paths: Iterable[str], labels: Iterable[str | None]) -> None:
        self.root, self._base = root, base
        self._paths = paths if isinstance(paths, PackedText) else PackedText.of(paths)
        self._classes, self._labels = number_classes(labels)
        assert len(self._labels) == len(self._paths)
        first = self._paths[0] if len(self._paths) else ""
        self.remote = locations.is_url(base) or locations.is_url(first)

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        """Give the path of an image."""
        return locations.beside(self._base, self._paths[index])

    def read(self, index: int) -> str | bytes:
        """Give the path of a local image, the bytes of a remote one."""
        name = self.name(index)
        return locations.read_whole(name) if locations.is_url(name) else name

    @property
    def classes(self) -> list[str]:
        """Sorted class names; empty without labels."""
        return self._classes

    def label_ids(self) -> Labels:
        """Give (n,) int32, the index in `classes` of each image, -1 without label."""
        return self._labels

    def short_name(self, index: int) -> str:
        """Give the path below the folder, or as the list has it."""
        return self._paths[index]

    def names_hash(self) -> str:
        """Give a hash of the paths below the folder, or as the list has them."""
        return self._paths.hash()


def number_classes(labels: Iterable[str | None]) -> tuple[list[str], Labels]:
    """Sort class names and give each image's place among them, -1 for None; takes the labels one at a time."""
    met: dict[str, int] = {}
    ids = array("i", (-1 if label is None else met.setdefault(label, len(met)) for label in labels))
    classes = sorted(met)
    place = np.full(len(met) + 1, -1, np.int32)  # the last one is that of -1
    place[[met[name] for name in classes]] = np.arange(len(classes), dtype=np.int32)
    return classes, place[np.frombuffer(ids, np.int32)]


def open_source(path: str | Path) -> ImageSource:
    """Open a folder, a list, a table, tar shards, Parquet files or one image.

    A folder (recursive) holds images, or tar shards, or Parquet files. It is read as class folders when all its images
    lie in sub-folders; the first folder below it is the class. `.npy` arrays are taken from a folder without other
    images. A .txt list names images or tar shards, a .csv has a `path` column. Shards and Parquet files may be several:
    a pattern with *, ? or {000000..000012}. URLs that fsspec knows (s3://, gs://, https://, …) work everywhere.
    Relative paths in lists count from the list's own folder. Hidden files are skipped.

    Raises:
        DataError: when there is nothing there, or no image in it.
        MissingExtraError: for a URL without fsspec.
    """
    place = locations.as_location(path)
    if not locations.is_url(place):
        return _open(place)
    try:
        return _open(place)
    except OpendinoError:
        raise
    except Exception as error:  # each kind of storage has errors of its own
        raise DataError(
            f"{place} cannot be opened: {type(error).__name__}: {error}. Check the address, the network and your "
            "credentials for that storage."
        ) from error


def _open(place: str) -> ImageSource:
    if locations.is_pattern(place):
        return _shards(place, locations.expand(place))
    if locations.is_folder(place):
        return _folder(place)
    suffix = locations.suffix(place)
    if not locations.is_file(place):
        raise DataError(
            f"{place} does not exist. Give a folder of images, a .txt list, a .csv, .tar or .parquet files, or an "
            "image file."
        )
    if suffix == ".txt":
        lines = PackedText.of(line for line in map(str.strip, _lines(place)) if line)
        base = locations.parent(place)
        if len(lines) and all(locations.is_tar(line) for line in lines):
            return _shards(place, [locations.beside(base, line) for line in lines])
        return _checked(FileSource(place, base, lines, repeat(None, len(lines))))
    if suffix == ".csv":
        return _table(place)
    if locations.is_tar(place) or suffix == ".parquet":
        return _shards(place, [place])
    return FileSource(place, "", [place], [None])


def _checked(source: FileSource) -> FileSource:
    if not len(source):
        raise DataError(f"{source.root} holds no images. Looked for {', '.join(sorted(EXTENSIONS))}.")
    return source


def _shards(root: str, paths: list[str]) -> ImageSource:
    from opendino.images.parquet import ParquetSource
    from opendino.images.shards import TarSource

    if not paths:
        raise DataError(f"{root} matches no file. Give a pattern of .tar or .parquet files, such as shard-*.tar.")
    if all(locations.suffix(p) == ".parquet" for p in paths):
        return ParquetSource(root, paths)
    if all(locations.is_tar(p) for p in paths):
        return TarSource(root, paths)
    if not any(locations.is_tar(p) or locations.suffix(p) == ".parquet" for p in paths):
        images = [p for p in paths if locations.suffix(p) in EXTENSIONS | ARRAYS]
        return _checked(FileSource(root, "", images, [None] * len(images)))
    raise DataError(f"{root} matches files of several kinds, such as {paths[0]} and {paths[-1]}. Name one kind.")


def _folder(root: str) -> ImageSource:
    packers = {kind: Packer() for kind in ("images", "arrays", "tar", "parquet")}
    for name in locations.walk(root):
        kind = _kind_of(name)
        if kind:
            packers[kind].add(name)
    found = {kind: packer.packed() for kind, packer in packers.items()}
    taken = next((kind for kind, names in found.items() if len(names)), "images")
    for kind, names in found.items():
        if len(names) and kind != taken:
            log.warning("%s is read as a folder of %s; its %d .%s files are left out.", root, taken, len(names),
                        kind.replace("arrays", "npy"))  # fmt: skip
    names = found[taken]
    if taken in ("tar", "parquet"):
        return _shards(root, [locations.beside(root, n) for n in names])
    labelled = len(names) > 0 and all("/" in name for name in names)
    return _checked(FileSource(root, root, names, (n.split("/", 1)[0] if labelled else None for n in names)))


def _kind_of(name: str) -> str | None:
    suffix = locations.suffix(name)
    if suffix in EXTENSIONS:
        return "images"
    if suffix in ARRAYS:
        return "arrays"
    return "tar" if locations.is_tar(name) else "parquet" if suffix == ".parquet" else None


def _table(path: str) -> ImageSource:
    with _opened_text(path) as text:
        header = text.readline()
        text.seek(0)
        rows = csv.DictReader(text, delimiter=max(",;\t", key=header.count))
        paths, labels, empty = Packer(), Packer(), []
        for number, row in enumerate(rows, 2):
            if "path" not in row:
                break
            if not row["path"]:
                empty.append(number)
            paths.add(row["path"] or "")
            labels.add(row.get("label") or "")
    found = paths.packed()
    if not len(found):
        columns = list(rows.fieldnames or ())
        raise DataError(f"{path} has the columns {columns}; it needs a header line with `path` (and may have `label`).")
    if empty:
        raise DataError(
            f"{path} has no path in line {empty[0]} ({len(empty)} such lines). Fill them in or remove them."
        )
    return FileSource(path, locations.parent(path), found, (label or None for label in labels.packed()))


def _lines(path: str) -> Iterator[str]:
    with _opened_text(path) as text:
        yield from text


@contextmanager
def _opened_text(path: str) -> Iterator[TextIO]:
    """Open a text file line by line, from a disk without reading all of it."""
    ends = "" if locations.suffix(path) == ".csv" else None
    try:
        if locations.is_url(path):
            yield io.TextIOWrapper(io.BytesIO(locations.read_whole(path)), "utf-8-sig", newline=ends)
        else:
            with open(path, encoding="utf-8-sig", newline=ends) as text:
                yield text
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8.") from error
