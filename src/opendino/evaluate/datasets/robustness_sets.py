# SPDX-License-Identifier: Apache-2.0
"""Test sets that a classifier trained elsewhere is applied to, with their labels as the classifier numbers its classes.

class folders         DIR/n01440764/*.JPEG            ImageNet-A, -R, -Sketch, own sets: a class is a folder's name
folders by index      DIR/0 … DIR/999                 ImageNet-V2: the i-th of the sorted class names
several labels        [[65], [795, 970], [], …]       ImageNet-ReaL: a list in the order of the validation images
corruptions           DIR/gaussian_noise/1/n01440764  ImageNet-C, also below DIR/noise, blur, weather, digital, extra
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from opendino.errors import DataError
from opendino.images.sources import ImageSource, Labels, open_source

FAMILIES = ("noise", "blur", "weather", "digital", "extra")
VAL_NUMBER = re.compile(r"val_(\d{8})\b")


class Subset(ImageSource):
    """Some images of a source, in the order given."""

    def __init__(self, source: ImageSource, index: Sequence[int]) -> None:
        self.root, self.remote, self._source, self._index = source.root, source.remote, source, [int(i) for i in index]

    def __len__(self) -> int:
        return len(self._index)

    def name(self, index: int) -> str:
        """Give the path of an image."""
        return self._source.name(self._index[index])

    def read(self, index: int) -> str | bytes:
        """Give what `read_image` takes."""
        return self._source.read(self._index[index])

    @property
    def classes(self) -> list[str]:
        """Class names of the whole source."""
        return self._source.classes

    def label_ids(self) -> Labels:
        """Give (n,) int32, the index in `classes` of each image, -1 without label."""
        return self._source.label_ids()[self._index]

    def short_name(self, index: int) -> str:
        """Give the name of an image that does not say where the data lie."""
        return self._source.short_name(self._index[index])

    def names_hash(self) -> str:
        """Give a hash of what was taken of which source."""
        chosen = hashlib.sha256(json.dumps(self._index).encode()).hexdigest()
        return f"{self._source.names_hash()}:{chosen}"


@dataclass(frozen=True)
class LabelledSet:
    """Images with the classes that are right for them.

    Attributes:
        source: the images.
        labels: for each the classifier's classes that are right.
        allowed: classes that may be predicted; None is all.
        left_out: images that are not in `source`, by reason.
    """

    source: ImageSource
    labels: list[tuple[int, ...]]
    allowed: tuple[int, ...] | None = None
    left_out: dict[str, int] = field(default_factory=dict)


def open_named(
    path: str | Path, classes: Sequence[str], *, restricted: bool = False, known_only: bool = False
) -> LabelledSet:
    """Open class folders whose names are classes of the classifier.

    Args:
        path: what `open_source` takes, with labels.
        classes: of the classifier.
        restricted: only classes of this set may be predicted (ImageNet-A and -R).
        known_only: leave out the images of classes that the classifier does not know.

    Raises:
        DataError: without class folders, for an unknown class unless `known_only`, or when no class is known.
    """
    source = open_source(path)
    numbers, ids = {name: i for i, name in enumerate(classes)}, source.label_ids()
    if not source.classes or (ids < 0).any():
        raise DataError(f"{source.root} has images without a class; it needs one folder of images per class.")
    unknown = [name for name in source.classes if name not in numbers]
    if unknown and (not known_only or len(unknown) == len(source.classes)):
        raise DataError(
            f"{len(unknown)} of the {len(source.classes)} classes of {source.root} are not among the classifier's "
            f"{len(classes)}: {', '.join(unknown[:5])}. Its classes are called {', '.join(list(classes)[:3])}, …; name "
            "the folders alike, or leave unknown ones out with --known-only."
        )
    to_given = np.array([numbers.get(name, -1) for name in source.classes])[ids]
    kept = np.flatnonzero(to_given >= 0)
    left = {} if len(kept) == len(ids) else {f"{len(unknown)} unknown classes": len(ids) - len(kept)}
    labels: list[tuple[int, ...]] = [(int(c),) for c in to_given[kept]]
    allowed = tuple(sorted({row[0] for row in labels})) if restricted else None
    return LabelledSet(source if not left else Subset(source, kept.tolist()), labels, allowed, left)


def open_indexed(path: str | Path, classes: Sequence[str]) -> LabelledSet:
    """Open class folders that are named by index, as ImageNet-V2's are; folders named as the classes are read as well.

    Raises:
        DataError: for a folder that is neither, or an index without a class.
    """
    source = open_source(path)
    names, ids = source.classes, source.label_ids()
    if not all(name.isdecimal() for name in names) or set(names) <= set(classes):
        return open_named(path, classes)
    if not names or (ids < 0).any():
        raise DataError(f"{source.root} has images without a class; ImageNet-V2 has folders 0 to 999.")
    order = sorted_places(classes)
    high = [name for name in names if int(name) >= len(order)]
    if high:
        raise DataError(
            f"{source.root} has folders up to {max(map(int, high))}, but the classifier has {len(classes)} classes. "
            "Folders named by index count the sorted class names of the whole data set: give a classifier of all of "
            "them, or rename the folders to class names."
        )
    # The names are sorted as text (0, 1, 10, …), so each is read as the number it is.
    to_given = np.array([order[int(name)] for name in names])[ids]
    return LabelledSet(source, [(int(c),) for c in to_given])


def open_real(val: str | Path, file: str | Path, classes: Sequence[str]) -> LabelledSet:
    """Open validation images with several labels each (ImageNet-ReaL's real.json).

    Image i of the list is the one whose name holds val_ and the number i + 1, or else the i-th by file name.

    Raises:
        DataError: for a file that is no such list, a list of another length than the images, or a label without class.
    """
    source, lists = open_source(val), _read_lists(Path(file))
    files = [PurePosixPath(source.name(i)).name for i in range(len(source))]
    found = [VAL_NUMBER.search(name) for name in files]
    if all(found):
        places = [int(match[1]) - 1 for match in found if match]
    else:
        order = sorted(range(len(files)), key=files.__getitem__)
        places = [0] * len(files)
        for place, image in enumerate(order):
            places[image] = place
    if len(files) != len(lists) or sorted(places) != list(range(len(lists))):
        raise DataError(
            f"{file} lists {len(lists)} images, and {source.root} holds {len(files)} whose numbers run to "
            f"{max(places) + 1}. They must be the same: give the whole validation set that the list is of."
        )
    order = sorted_places(classes)
    highest = max((label for labels in lists for label in labels), default=-1)
    if highest >= len(order):
        raise DataError(
            f"{file} has labels up to {highest}, but the classifier has {len(classes)} classes. Give a classifier of "
            "all classes that the list is of."
        )
    kept = [i for i, place in enumerate(places) if lists[place]]
    if not kept:
        raise DataError(f"{file} has no label for any image.")
    left = {} if len(kept) == len(files) else {"no label": len(files) - len(kept)}
    labels = [tuple(order[c] for c in lists[places[i]]) for i in kept]
    return LabelledSet(source if not left else Subset(source, kept), labels, None, left)


def corruption_folders(root: str | Path) -> dict[str, dict[int, Path]]:
    """Find DIR/CORRUPTION/SEVERITY, where the corruptions may also lie one folder deeper, as their archives unpack.

    Raises:
        DataError: when there is none.
    """
    root, found = Path(root), {}
    folders = [root, *(root / family for family in FAMILIES)]
    for folder in sorted(p for parent in folders if parent.is_dir() for p in parent.iterdir() if p.is_dir()):
        levels = {int(p.name): p for p in sorted(folder.iterdir()) if p.is_dir() and re.fullmatch(r"[1-9]", p.name)}
        if levels:
            found[folder.name] = levels
    if not found:
        raise DataError(
            f"{root} holds no corrupted images. They lie in CORRUPTION/SEVERITY/CLASS, such as "
            "gaussian_noise/1/n01440764, as the archives of ImageNet-C unpack."
        )
    return found


def sorted_places(classes: Sequence[str]) -> list[int]:
    """Give the place in `classes` of the i-th class by name."""
    return sorted(range(len(classes)), key=lambda i: classes[i])


def _read_lists(file: Path) -> list[list[int]]:
    try:
        lists = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}. Give real.json, a list of label lists.") from error
    fine = isinstance(lists, list) and all(
        isinstance(row, list) and all(type(c) is int and c >= 0 for c in row) for row in lists
    )
    if not fine:
        raise DataError(f"{file} is no list of label lists. Give real.json: one list of class indices per image.")
    return lists  # type: ignore[no-any-return]
