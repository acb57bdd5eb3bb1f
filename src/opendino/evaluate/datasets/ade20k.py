# SPDX-License-Identifier: Apache-2.0
"""ADE20k, scene parsing challenge of 2016: 150 classes; 0 in a mask does not count, so class c is the value c + 1.

images/{training,validation}/*.jpg  annotations/{training,validation}/*.png  objectInfo150.txt
"""

from __future__ import annotations

from pathlib import Path

from opendino.errors import DataError
from opendino.evaluate.datasets.folders import FolderMasks, make_lookup, pairs
from opendino.evaluate.datasets.layout import Layout, Opened, read_lines, subfolders
from opendino.evaluate.datasets.types import IGNORE

CLASSES = 150


def open_ade20k(root: Path, split: str) -> Opened:
    """Open training or validation."""
    images, masks = pairs(root / "images" / split, root / "annotations" / split, (".png",))
    names, notes = _names(root)
    lookup = make_lookup({0: IGNORE} | {i + 1: i for i in range(CLASSES)})
    return Opened(FolderMasks(str(root), images, masks, names, lookup), notes)


def _names(root: Path) -> tuple[list[str], tuple[str, ...]]:
    listed = root / "objectInfo150.txt"
    if not listed.is_file():
        note = "objectInfo150.txt is not there, so classes have numbers instead of names."
        return [f"{i + 1:03d}" for i in range(CLASSES)], (note,)
    rows = [line.split("\t") for line in read_lines(listed)[1:]]  # after a header: Idx Ratio Train Val Stuff Name
    if len(rows) != CLASSES:
        raise DataError(f"{listed} names {len(rows)} classes, not {CLASSES}. Take it anew from the download.")
    return [row[-1].split(",")[0].strip() for row in rows], ()


def _splits(root: Path) -> list[str]:
    there = [s for s in ("training", "validation") if s in subfolders(root / "images")]
    return [s for s in there if s in subfolders(root / "annotations")]


LAYOUTS = (
    Layout(
        "ADE20k", "segmentation",
        ("images/training|images/validation", "annotations/training|annotations/validation"),
        _splits, open_ade20k, ("ADEChallengeData2016",),
    ),
)  # fmt: skip
