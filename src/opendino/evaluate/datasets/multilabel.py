# SPDX-License-Identifier: Apache-2.0
"""Images that may have several classes at once, and the table that one's own come in.

Shapes: n images, C classes.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from opendino.errors import DataError
from opendino.evaluate.datasets.layout import read_text
from opendino.images.sources import FileSource

Targets = npt.NDArray[np.int8]
SEPARATOR = "|"
"""Between the classes of an image in a table."""


class MultiLabelSource(FileSource):
    """One file per image, and for each image and class whether it is there.

    To what asks for one class an image, none has one: `label_ids` gives -1 throughout.

    Args:
        root: what was opened.
        base: folder that relative paths count from.
        paths: of the images.
        classes: C names, in the order of the columns of `targets`.
        targets: (n, C) int8: 1 there, -1 not there, 0 does not count for this class (VOC's difficult ones).
    """

    def __init__(self, root: str, base: str, paths: Iterable[str], classes: Sequence[str], targets: Targets) -> None:
        listed = list(paths)
        super().__init__(root, base, listed, [None] * len(listed))
        assert targets.shape == (len(listed), len(classes))
        assert np.isin(targets, (-1, 0, 1)).all()
        self._names, self.targets = list(classes), targets.astype(np.int8)

    @property
    def classes(self) -> list[str]:
        """Class names, in the order of the columns of `targets`."""
        return self._names

    def targets_for(self, classes: Sequence[str]) -> Targets:
        """Give (n, len(classes)) targets in another order; a class that this source does not have is nowhere."""
        column = {name: i for i, name in enumerate(self._names)}
        missing = np.full(len(self), -1, np.int8)
        return np.stack([self.targets[:, column[c]] if c in column else missing for c in classes], 1)


def open_table(path: Path) -> MultiLabelSource:
    """Open a .csv with the columns `path` and `labels`, the classes of an image separated by |.

    An image without labels has none of the classes. Relative paths count from the table's own folder.

    Raises:
        DataError: when a column, a path or every label is missing.
    """
    text = read_text(path)
    header = text.split("\n", 1)[0]
    rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count)))
    if not rows or not {"path", "labels"} <= set(rows[0]):
        raise DataError(
            f"{path} has the columns {list(rows[0]) if rows else []}; it needs a header line with `path` and `labels`, "
            f"the classes of an image separated by {SEPARATOR}, such as cat{SEPARATOR}sofa."
        )
    empty = [i for i, row in enumerate(rows, 2) if not row["path"]]
    if empty:
        raise DataError(f"{path} has no path in line {empty[0]} ({len(empty)} such lines). Fill in or remove them.")
    labels = [{part.strip() for part in (row["labels"] or "").split(SEPARATOR)} - {""} for row in rows]
    classes = sorted(set().union(*labels))
    if not classes:
        raise DataError(f"{path} gives no image a class: its column `labels` is empty. Fill it in.")
    targets = np.array([[1 if c in own else -1 for c in classes] for own in labels], np.int8)
    return MultiLabelSource(str(path), str(path.parent), [row["path"] for row in rows], classes, targets)
