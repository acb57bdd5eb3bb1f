# SPDX-License-Identifier: Apache-2.0
"""Layouts of one's own: class folders, tables, images with masks or depth, a retrieval list.

ROOT/SPLIT/CLASS/*.jpg, or ROOT/CLASS/*.jpg       ROOT/SPLIT.csv with path,label
ROOT/images/SPLIT  ROOT/masks/SPLIT  classes.txt   ROOT/images/SPLIT  ROOT/depth/SPLIT  depth.json
ROOT/retrieval.json
"""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path

from opendino.evaluate.datasets.folders import open_folder_depth, open_folder_masks
from opendino.evaluate.datasets.layout import Layout, Opened, class_folders, subfolders
from opendino.evaluate.datasets.retrieval_json import read_retrieval_json
from opendino.images.sources import EXTENSIONS, FileSource, open_source

SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")
LOOKED_AT = 64
"""Entries of a folder that are looked at for an image."""


def _class_splits(root: Path) -> list[str]:
    found = [s for s in SPLITS if any(_has_images(root / s / c) for c in subfolders(root / s)[:LOOKED_AT])]
    if found:
        return found
    return ["all"] if sum(_has_images(root / c) for c in subfolders(root)[:LOOKED_AT]) > 1 else []


def _has_images(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(Path(e.name).suffix.lower() in EXTENSIONS for e in islice(entries, LOOKED_AT))


def _open_classes(root: Path, split: str) -> Opened:
    base = root if split == "all" else root / split
    names, labels = class_folders(base)
    return Opened(FileSource(str(root), str(base), names, labels))


def _table_splits(root: Path) -> list[str]:
    return [s for s in SPLITS if (root / f"{s}.csv").is_file()]


def _shared(root: Path, other: str) -> list[str]:
    return sorted(set(subfolders(root / "images")) & set(subfolders(root / other)))


LAYOUTS = (
    Layout(
        "images with masks", "segmentation", ("images/*", "masks/*"), lambda root: _shared(root, "masks"),
        lambda root, split: Opened(open_folder_masks(root, split)), (), lambda root: bool(_shared(root, "masks")),
    ),
    Layout(
        "images with depth", "depth", ("images/*", "depth/*"), lambda root: _shared(root, "depth"),
        lambda root, split: Opened(open_folder_depth(root, split)), (), lambda root: bool(_shared(root, "depth")),
    ),
    Layout(
        "retrieval.json", "retrieval", ("retrieval.json",), lambda root: ["test"],
        lambda root, split: Opened(read_retrieval_json(root / "retrieval.json")),
    ),
    Layout(
        "tables", "classification", ("|".join(f"{s}.csv" for s in SPLITS),), _table_splits,
        lambda root, split: Opened(open_source(root / f"{split}.csv")),
    ),
    Layout(
        "class folders", "classification", ("*",), _class_splits, _open_classes, (),
        lambda root: bool(_class_splits(root)),
    ),
)  # fmt: skip
