# SPDX-License-Identifier: Apache-2.0
"""Pascal VOC segmentation (2007 to 2012): 21 classes with the background; 255, the outlines, does not count.

JPEGImages/*.jpg  SegmentationClass/*.png (palette)  ImageSets/Segmentation/{train,val,trainval}.txt
SegmentationClassAug/*.png  ImageSets/Segmentation/{trainaug,train_aug}.txt     the training set with SBD's masks
"""

from __future__ import annotations

from pathlib import Path

from opendino.errors import DataError
from opendino.evaluate.datasets.folders import FolderMasks
from opendino.evaluate.datasets.layout import Layout, Opened, check_files, read_lines

CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
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


LAYOUTS = (
    Layout(
        "Pascal VOC", "segmentation",
        ("JPEGImages", "ImageSets/Segmentation", "SegmentationClass|SegmentationClassAug"), _splits, open_voc,
        tuple(f"{base}VOC{year}" for base in ("", "VOCdevkit/") for year in ("2012", "2007")),
    ),
)  # fmt: skip
