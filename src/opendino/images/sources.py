# SPDX-License-Identifier: Apache-2.0
"""Where images are: a folder, class folders, a file list, a CSV, or one file."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, field
from pathlib import Path

from opendino.errors import DataError

EXTENSIONS = frozenset(
    [".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".jp2", ".avif"]
)  # fmt: skip


@dataclass(frozen=True)
class ImageItem:
    """One image: its path, and its class name where the source has labels."""

    path: str
    label: str | None = None


@dataclass(frozen=True)
class ImageSource:
    """A fixed, sorted list of images.

    Attributes:
        root: what was opened.
        items: the images.
        classes: sorted class names; empty without labels.
    """

    root: str
    items: list[ImageItem]
    classes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def labels(self) -> list[int]:
        """Index in `classes` of each image, -1 without label."""
        number = {name: i for i, name in enumerate(self.classes)}
        return [-1 if item.label is None else number[item.label] for item in self.items]


def open_source(path: str | Path) -> ImageSource:
    """List the images of a folder (recursive), class folders, .txt list, .csv with a `path` column, or one file.

    A folder is read as class folders when all its images lie in sub-folders; the first folder below it is the class.
    Relative paths in lists count from the list's own folder. Hidden files are skipped.

    Raises:
        DataError: when there is nothing there, or no image in it.
    """
    path = Path(path)
    if path.is_dir():
        items = _folder(path)
    elif not path.is_file():
        raise DataError(f"{path} does not exist. Give a folder of images, a .txt list, a .csv or an image file.")
    elif path.suffix.lower() == ".txt":
        lines = (line.strip() for line in _text(path).splitlines())
        items = [ImageItem(_beside(path, line)) for line in lines if line]
    elif path.suffix.lower() == ".csv":
        items = _table(path)
    else:
        items = [ImageItem(str(path))]
    if not items:
        raise DataError(f"{path} holds no images. Looked for {', '.join(sorted(EXTENSIONS))}.")
    return ImageSource(str(path), items, sorted({i.label for i in items if i.label is not None}))


def _folder(root: Path) -> list[ImageItem]:
    found = sorted(p for p in root.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
    inside = [(p, p.relative_to(root).parts) for p in found]
    inside = [(p, parts) for p, parts in inside if not any(x.startswith(".") for x in parts)]
    labelled = bool(inside) and all(len(parts) > 1 for _, parts in inside)
    return [ImageItem(str(p), parts[0] if labelled else None) for p, parts in inside]


def _table(path: Path) -> list[ImageItem]:
    text = _text(path)
    header = text.split("\n", 1)[0]
    separator = max(",;\t", key=header.count)
    rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=separator))
    if not rows or "path" not in rows[0]:
        columns = list(rows[0]) if rows else []
        raise DataError(f"{path} has the columns {columns}; it needs a header line with `path` (and may have `label`).")
    empty = [i for i, row in enumerate(rows, 2) if not row["path"]]
    if empty:
        raise DataError(
            f"{path} has no path in line {empty[0]} ({len(empty)} such lines). Fill them in or remove them."
        )
    return [ImageItem(_beside(path, row["path"]), row.get("label") or None) for row in rows]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8.") from error


def _beside(list_file: Path, entry: str) -> str:
    return str(list_file.parent / entry)
