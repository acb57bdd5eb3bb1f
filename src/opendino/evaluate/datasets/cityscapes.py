# SPDX-License-Identifier: Apache-2.0
"""Cityscapes: ids 0 to 33, of which 19 are classes that count.

leftImg8bit/SPLIT/CITY/*_leftImg8bit.png  gtFine/SPLIT/CITY/*_gtFine_labelIds.png (or *_gtFine_labelTrainIds.png)
"""

from __future__ import annotations

from pathlib import Path

from opendino.errors import DataError
from opendino.evaluate.datasets.folders import FolderMasks, make_lookup
from opendino.evaluate.datasets.layout import Layout, Opened, check_files, subfolders
from opendino.evaluate.datasets.types import IGNORE

CLASSES = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
    20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car", 27: "truck",
    28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip
"""Published id → name, in the order of the train ids 0 to 18."""
LAST_ID = 33
IMAGE, LABELS, TRAIN_LABELS = "_leftImg8bit.png", "_gtFine_labelIds.png", "_gtFine_labelTrainIds.png"


def open_cityscapes(root: Path, split: str) -> Opened:
    """Open train or val."""
    base, masks_base = root / "leftImg8bit" / split, root / "gtFine" / split
    found = sorted(f"{p.parent.name}/{p.name.removesuffix(IMAGE)}" for p in base.glob(f"*/[!.]*{IMAGE}"))
    if not found:
        raise DataError(f"{base} has no images CITY/*{IMAGE}. Unpack leftImg8bit_trainvaltest.zip there.")
    by_train_id = not any(masks_base.glob(f"*/*{LABELS}")) and any(masks_base.glob(f"*/*{TRAIN_LABELS}"))
    ending = TRAIN_LABELS if by_train_id else LABELS
    check_files(masks_base, [stem + ending for stem in found], f"{base}, one mask for each of its images,")
    if by_train_id:
        known = {IGNORE: IGNORE} | {i: i for i in range(len(CLASSES))}
    else:  # the licence plate has the id -1, which is 255 in 8 bits
        known = dict.fromkeys([*range(LAST_ID + 1), 255], IGNORE) | {i: c for c, i in enumerate(CLASSES)}
    images, masks = [base / f"{s}{IMAGE}" for s in found], [masks_base / f"{s}{ending}" for s in found]
    return Opened(FolderMasks(str(root), images, masks, list(CLASSES.values()), make_lookup(known)))


def _splits(root: Path) -> list[str]:
    """The masks of test are not public (they are empty), so it is no split."""
    there = subfolders(root / "leftImg8bit")
    return [s for s in ("train", "val") if s in there and s in subfolders(root / "gtFine")]


LAYOUTS = (Layout("Cityscapes", "segmentation", ("leftImg8bit", "gtFine"), _splits, open_cityscapes, ("cityscapes",)),)
