# SPDX-License-Identifier: Apache-2.0
"""Pascal VOC: segmentation (2007 to 2012) and the classification of 2007.

Segmentation has 21 classes with the background; 255, the outlines, does not count. Classification has the 20 others,
and an image may have several: each class has a list of its own that says 1 (there), -1 (not there) or 0 (only instances
marked as difficult: the image does not count for this class). Only 2007's test labels are public, so the classification
of other years is not read.

JPEGImages/*.jpg  SegmentationClass/*.png (palette)  ImageSets/Segmentation/{train,val,trainval}.txt
SegmentationClassAug/*.png  ImageSets/Segmentation/{trainaug,train_aug}.txt     the training set with SBD's masks
ImageSets/Main/CLASS_{train,val,trainval,test}.txt  lines of IMAGE 1|-1|0   classification
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from opendino.errors import DataError
from opendino.evaluate.datasets.folders import FolderMasks
from opendino.evaluate.datasets.layout import Layout, Opened, check_files, read_lines, read_rows
from opendino.evaluate.datasets.multilabel import MultiLabelSource

CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
MULTILABEL = "VOC2007 classification"
MAIN = ("train", "val", "trainval", "test")
"""Splits of the classification."""
AUGMENTED = ("trainaug", "train_aug")


def open_voc(root: Path, split: str) -> Opened:
    """Open a list of ImageSets/Segmentation."""
    listed = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    folder = root / ("SegmentationClassAug" if split in AUGMENTED else "SegmentationClass")
    names = [line.split()[0].rsplit("/", 1)[-1].removesuffix(".jpg") for line in read_lines(listed)]
    if not names:
        raise DataError(f"{listed} names no image.")
    check_files(root / "JPEGImages", [f"{n}.jpg" for n in names], listed)
    check_files(folder, [f"{n}.png" for n in names], listed)
    images, masks = [root / "JPEGImages" / f"{n}.jpg" for n in names], [folder / f"{n}.png" for n in names]
    return Opened(FolderMasks(str(root), images, masks, CLASSES))


def _splits(root: Path) -> list[str]:
    names = [s for s in ("train", "val", "trainval", "test", *AUGMENTED)
             if (root / "ImageSets" / "Segmentation" / f"{s}.txt").is_file()]  # fmt: skip
    there = [s for s in names if s not in AUGMENTED or (root / "SegmentationClassAug").is_dir()]
    return [s for s in there if s != "test" or _has_test_masks(root)]


def _has_test_masks(root: Path) -> bool:
    """Only 2007's are public."""
    names = read_lines(root / "ImageSets" / "Segmentation" / "test.txt")
    return bool(names) and (root / "SegmentationClass" / f"{names[0]}.png").is_file()


def open_main(root: Path, split: str) -> Opened:
    """Open the lists of ImageSets/Main as a `MultiLabelSource` of 20 classes.

    Raises:
        DataError: when a list is missing, holds other signs than 1, -1 and 0, or other images than the first one.
    """
    names: list[str] = []
    targets = []
    for c in CLASSES[1:]:
        listed = _main(root, c, split)
        rows = dict(read_rows(listed, 2))  # image → sign
        wrong = next((name for name, sign in rows.items() if sign not in ("1", "-1", "0")), None)
        if wrong is not None:
            raise DataError(f"{listed} says {rows[wrong]!r} of {wrong}; it must be 1, -1 or 0. Take it anew.")
        names = names or list(rows)
        if set(rows) != set(names):
            lone = sorted(set(rows) ^ set(names))
            raise DataError(
                f"{listed} and {_main(root, CLASSES[1], split).name} do not speak of the same images, such as "
                f"{lone[0]} ({len(lone)} of them). Take both from one download."
            )
        targets.append([int(rows[name]) for name in names])
    if not names:
        raise DataError(f"{_main(root, CLASSES[1], split)} names no image.")
    paths = [f"{name}.jpg" for name in names]
    check_files(root / "JPEGImages", paths, root / "ImageSets" / "Main")
    table = np.array(targets, np.int8).T
    return Opened(MultiLabelSource(str(root), str(root / "JPEGImages"), paths, CLASSES[1:], table))


def _main(root: Path, name: str, split: str) -> Path:
    return root / "ImageSets" / "Main" / f"{name}_{split}.txt"


def _main_splits(root: Path) -> list[str]:
    return [s for s in MAIN if _main(root, CLASSES[1], s).is_file()]


def _is_2007(root: Path) -> bool:
    """Images of 2007 are called by six digits, those of other years YEAR_NUMBER."""
    lines = read_lines(_main(root, CLASSES[1], there[0])) if (there := _main_splits(root)) else []
    return bool(lines) and lines[0].split()[0].isdecimal()


LAYOUTS = (
    Layout(
        "Pascal VOC", "segmentation",
        ("JPEGImages", "ImageSets/Segmentation", "SegmentationClass|SegmentationClassAug"), _splits, open_voc,
        tuple(f"{base}VOC{year}" for base in ("", "VOCdevkit/") for year in ("2012", "2007")),
    ),
    Layout(
        MULTILABEL, "classification",
        ("JPEGImages", "|".join(f"ImageSets/Main/aeroplane_{s}.txt" for s in MAIN)), _main_splits, open_main,
        ("VOC2007", "VOCdevkit/VOC2007"), _is_2007,
    ),
)  # fmt: skip
