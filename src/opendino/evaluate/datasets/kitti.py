# SPDX-License-Identifier: Apache-2.0
"""KITTI depth: sparse depths up to 80 m, metres × 256 in 16 bits, scored inside Garg's crop.

kitti_eigen_train.txt  kitti_eigen_test.txt (or eigen_{train,test}_files_with_gt.txt)   lines: IMAGE DEPTH FOCAL
DATE/DRIVE/image_02/data/*.png                      in the root, input/ or raw/
{train,val}/DRIVE/proj_depth/groundtruth/image_02/*.png     in the root, gt_depth/ or data_depth_annotated/
"""

from __future__ import annotations

import re
from pathlib import Path

from opendino.errors import DataError
from opendino.evaluate.datasets.depth_lists import open_depth_list
from opendino.evaluate.datasets.folders import FolderDepth
from opendino.evaluate.datasets.layout import SHOWN, Layout, Opened, subfolders

LISTS = {
    split: tuple(f"{name}.txt" for name in (
        f"kitti_eigen_{split}", f"eigen_{split}_files_with_gt", f"kitti_eigen_{split}_files_with_gt"
    ))
    for split in ("train", "test")
}  # fmt: skip
IMAGES = ("", "input", "raw", "raw_data", "kitti_raw")
ANNOTATED = ("", "gt_depth", "data_depth_annotated")
SCALE, MIN_DEPTH, MAX_DEPTH = 1 / 256, 1e-3, 80.0
DATE = re.compile(r"\d{4}_\d\d_\d\d")
DEPTHS = "proj_depth/groundtruth"


def open_list(root: Path, split: str) -> Opened:
    """Open a list of the Eigen split."""
    listed = _list(root, split)
    assert listed is not None
    depths = [root / d / part for d in ANNOTATED for part in ("", "train", "val")]
    images = [root / d for d in IMAGES]
    images += [base / date for base in images for date in subfolders(base) if DATE.fullmatch(date)]  # lists without it
    return open_depth_list(
        root, listed, images, depths, scale=SCALE, min_depth=MIN_DEPTH, max_depth=MAX_DEPTH,
        crop="garg",
    )  # fmt: skip


def open_annotated(root: Path, split: str) -> Opened:
    """Open every annotated depth file of train or val with its image of the raw recordings."""
    base = _annotated(root)
    assert base is not None
    depths = sorted((base / split).glob(f"*/{DEPTHS}/image_0[23]/[!.]*.png"))
    images, missing = [], []
    for path in depths:
        drive, camera = path.parents[3].name, path.parent.name
        inner = f"{drive[:10]}/{drive}/{camera}/data/{path.stem}"
        found = next((p for d in IMAGES for s in (".png", ".jpg") if (p := root / d / (inner + s)).is_file()), None)
        if found is None:
            missing.append(inner)
        else:
            images.append(found)
    if missing:
        raise DataError(
            f"{len(missing)} of {len(depths)} depth files in {base / split} have no image below {root}, such as "
            f"{', '.join(missing[:SHOWN])}. Unpack the raw recordings (DATE/DRIVE/image_02/data) into {root / 'raw'}."
        )
    if not depths:
        raise DataError(f"{base / split} has no depth files DRIVE/{DEPTHS}/image_02/*.png.")
    data = FolderDepth(
        str(root), images, depths, scale=SCALE, min_depth=MIN_DEPTH, max_depth=MAX_DEPTH, crop="garg"
    )  # fmt: skip
    note = "These are all annotated frames, not the Eigen split; put kitti_eigen_test.txt there for published figures."
    return Opened(data, (note,))


def _list(root: Path, split: str) -> Path | None:
    return next((p for n in LISTS[split] if (p := root / n).is_file()), None)


def _annotated(root: Path) -> Path | None:
    """Give the folder that has train/DRIVE/proj_depth or val/DRIVE/proj_depth."""
    for place in (root / d for d in ANNOTATED):
        for part in ("train", "val"):
            if any((place / part / drive / DEPTHS).is_dir() for drive in subfolders(place / part)[:3]):
                return place
    return None


def _annotated_splits(root: Path) -> list[str]:
    base = _annotated(root)
    return [s for s in ("train", "val") if base and subfolders(base / s)]


LAYOUTS = (
    Layout(
        "KITTI depth (Eigen split)", "depth", ("|".join(n for names in LISTS.values() for n in names),),
        lambda root: [s for s in LISTS if _list(root, s)], open_list, ("kitti",),
    ),
    Layout(
        "KITTI depth (all annotated)", "depth", ("*",), _annotated_splits, open_annotated, ("kitti",),
        lambda root: _annotated(root) is not None,
    ),
)  # fmt: skip
