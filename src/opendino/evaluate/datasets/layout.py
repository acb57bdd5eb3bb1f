# SPDX-License-Identifier: Apache-2.0
"""What a layout of a data set is: signs it is known by, splits, and a function that opens one."""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from opendino.errors import DataError
from opendino.images import locations
from opendino.images.sources import EXTENSIONS, FileSource

Kind = Literal["classification", "segmentation", "depth", "retrieval"]
ALIASES = {
    "train": ("training",), "training": ("train",), "val": ("validation", "valid"), "validation": ("val", "valid"),
    "valid": ("val", "validation"), "test": ("testing",), "testing": ("test",),
}  # fmt: skip
SHOWN = 5
LOOKED_AT = 2000
"""Entries of a folder that a pattern is tried on: where patterns are used, most entries match, or few are there."""


@dataclass(frozen=True)
class Opened:
    """One split, and what a user should know about how it was read.

    Attributes:
        data: an ImageSource with labels, a SegmentationSet, a DepthSet or a RetrievalSet.
        notes: in plain words; empty when the split is read as published.
    """

    data: Any
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """How one data set lies on disk.

    Attributes:
        name: of the set.
        kind: what it can score.
        signs: paths below the root that must be there; * and ? match within one name, "a|b" is either.
        splits: the names of the splits that lie there.
        open: opens one of them.
        folders: names under which the root usually lies one or more levels further down.
        test: anything else that must hold.
    """

    name: str
    kind: Kind
    signs: tuple[str, ...]
    splits: Callable[[Path], list[str]]
    open: Callable[[Path, str], Opened]
    folders: tuple[str, ...] = ()
    test: Callable[[Path], bool] = field(default=lambda root: True)

    def root(self, path: Path) -> Path | None:
        """Give the folder at or below `path` that has all signs, or None."""
        places = (path, *(path / name for name in self.folders))
        return next((p for p in places if p.is_dir() and all(has(p, s) for s in self.signs) and self.test(p)), None)

    def missing(self, path: Path) -> tuple[list[str], list[str]]:
        """Give the signs that are there (the alternative) and those that are not, at the likeliest place at `path`."""
        places = [path, *(path / name for name in self.folders)]
        seen = []
        for place in places:
            there = {s: option for s in self.signs if (option := has(place, s))}
            seen.append((list(there.values()), [s for s in self.signs if s not in there]))
        return max(seen, key=lambda s: len(s[0]))


def has(root: Path, sign: str) -> str:
    """Give the first alternative of a sign that lies below `root`; an empty text without."""
    return next((option for option in sign.split("|") if first(root, option) is not None), "")


def first(root: Path, pattern: str) -> Path | None:
    """Give one path below `root` that matches; of a folder of a million files only the beginning is looked at."""
    head, _, rest = pattern.partition("/")
    if not any(c in head for c in "*?["):
        found = root / head
        if not found.exists():
            return None
        return first(found, rest) if rest else found
    if not root.is_dir() or not os.access(root, os.R_OK | os.X_OK):
        return None
    with os.scandir(root) as entries:
        for entry in islice(entries, LOOKED_AT):
            if fnmatch.fnmatchcase(entry.name, head):
                below = Path(entry.path)
                if not rest:
                    return below
                if entry.is_dir() and (found_below := first(below, rest)):
                    return found_below
    return None


def subfolders(root: Path) -> list[str]:
    """Give the sorted names of the folders in a folder, hidden ones left out."""
    if not root.is_dir() or not os.access(root, os.R_OK | os.X_OK):
        return []
    with os.scandir(root) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def resolve_split(asked: str, there: Sequence[str], where: str) -> str:
    """Give the split under the name that it has in this set.

    Raises:
        DataError: when the set has no such split.
    """
    for name in (asked, *ALIASES.get(asked, ())):
        if name in there:
            return name
    listed = ", ".join(there[:20]) + (", …" if len(there) > 20 else "") if there else "none"
    raise DataError(f"{where} has no split {asked!r}; it has {listed}. Name one of these, or add the missing files.")


def class_folders(base: Path) -> tuple[list[str], list[str]]:
    """List the images below a folder of class folders: paths below it and the folder each lies in, sorted.

    Raises:
        DataError: when there is none, or some lie outside of class folders.
    """
    names = [n for n in locations.walk(str(base)) if locations.suffix(n) in EXTENSIONS]
    names.sort(key=lambda name: name.split("/"))
    stray = [n for n in names if "/" not in n]
    if stray:
        raise DataError(
            f"{len(stray)} of {len(names)} images lie in {base} itself, such as {stray[0]}; each must lie in the "
            "folder of its class. Move them there or away."
        )
    if not names:
        raise DataError(f"{base} has no images in its folders. Unpack the images there.")
    return names, [n.split("/", 1)[0] for n in names]


def listed_source(
    root: Path, base: Path, paths: Sequence[str], labels: Sequence[str], listed_by: Path | str
) -> FileSource:
    """Make a source of images that a list names, after seeing that they are there.

    Args:
        root: what was opened.
        base: the paths count from here.
        paths: as the list has them.
        labels: class names.
        listed_by: the list, for messages.

    Raises:
        DataError: for an empty list, or one that names images that are not there.
    """
    if not paths:
        raise DataError(f"{listed_by} names no image.")
    check_files(base, paths, listed_by)
    return FileSource(str(root), str(base), paths, labels)


def check_files(base: Path, paths: Sequence[str], listed_by: Path | str) -> None:
    """See that listed files exist; each folder is listed once.

    Raises:
        DataError: naming some that do not.
    """
    missing = absent(base, paths)
    if missing:
        raise DataError(
            f"{len(missing)} of {len(paths)} files that {listed_by} names are not below {base}, such as "
            f"{', '.join(missing[:SHOWN])}. Unpack the images again, or put them where the list says."
        )


def absent(base: Path, paths: Sequence[str]) -> list[str]:
    """Give the listed files that do not exist below `base`."""
    there: dict[str, set[str]] = {}
    missing = []
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in there:
            place = base / folder
            there[folder] = set(os.listdir(place)) if place.is_dir() else set()
        if name not in there[folder]:
            missing.append(path)
    return missing


def read_lines(path: Path) -> list[str]:
    """Give the lines of a text file, stripped, empty ones left out.

    Raises:
        DataError: when it is missing or no text.
    """
    return [line for line in map(str.strip, read_text(path).splitlines()) if line]


def read_rows(path: Path, columns: int, separator: str | None = None) -> list[list[str]]:
    """Give the lines of a text file in parts; the last part may hold the separator.

    Raises:
        DataError: naming the first line that has fewer parts.
    """
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        row = line.strip().split(separator, columns - 1)
        if len(row) < columns:
            raise DataError(f"{path} line {number} is {line.strip()!r}; {columns} parts are needed. Mend that line.")
        rows.append(row)
    return rows


def read_text(path: Path) -> str:
    """Give the text of a file.

    Raises:
        DataError: when it is missing or no UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing. It is part of the data set's download: put it there.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text: {error}. Take it anew from the download.") from error


def read_json(path: Path) -> Any:
    """Give the content of a JSON file.

    Raises:
        DataError: when it is missing or damaged.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is no whole JSON file: {error}. Take it anew from the download.") from error


def read_mat(path: Path) -> dict[str, Any]:
    """Give the variables of a MATLAB file (before version 7.3).

    Raises:
        DataError: when it is missing or damaged.
    """
    from scipy.io import loadmat

    if not path.is_file():
        raise DataError(f"{path} is missing. It is part of the data set's download: put it there.")
    try:
        found: dict[str, Any] = loadmat(str(path), squeeze_me=True)
    except Exception as error:  # parsers of damaged files raise all sorts
        raise DataError(f"{path} cannot be read as a MATLAB file: {error}. Take it anew from the download.") from error
    return found


def variable(found: dict[str, Any], name: str, path: Path) -> Any:
    """Give a variable of a MATLAB or pickle file.

    Raises:
        DataError: when it is not there.
    """
    if name not in found:
        names = ", ".join(sorted(k for k in map(str, found) if not k.startswith("__")))
        raise DataError(f"{path} has no {name!r}, only {names}. It is another file than the one that is published.")
    return found[name]
