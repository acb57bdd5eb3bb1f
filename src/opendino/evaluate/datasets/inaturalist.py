# SPDX-License-Identifier: Apache-2.0
"""iNaturalist 2018 and 2021: JSON files in the manner of COCO, or the class folders of 2021.

train2018.json  val2018.json  train_val2018/GROUP/CATEGORY/*.jpg
train.json  train_mini.json  val.json  train/00000_Animalia_…/*.jpg  val/…
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opendino.errors import DataError
from opendino.evaluate.datasets.layout import Layout, Opened, class_folders, listed_source, read_json, subfolders
from opendino.images.sources import FileSource

NUMBERED = "[0-9][0-9][0-9][0-9][0-9]_*"


def _json_splits(root: Path) -> list[str]:
    return [s for s in ("train", "train_mini", "val") if _json(root, s) is not None]


def _json(root: Path, split: str) -> Path | None:
    return next((p for n in (f"{split}2018.json", f"{split}.json") if (p := root / n).is_file()), None)


def open_json(root: Path, split: str) -> Opened:
    """Open the images that a JSON file lists; a class is the number of its category and its name."""
    listed = _json(root, split)
    assert listed is not None
    found = read_json(listed)
    images, annotations, categories = (_part(found, key, listed) for key in ("images", "annotations", "categories"))
    width = max(len(str(c["id"])) for c in categories)
    names = {c["id"]: _name(c, width) for c in categories}
    label: dict[Any, str] = {}
    for a in annotations:
        if a["category_id"] not in names:
            raise DataError(f"{listed} uses the category {a['category_id']}, which it does not list.")
        if label.setdefault(a["image_id"], names[a["category_id"]]) != names[a["category_id"]]:
            raise DataError(f"{listed} gives the image {a['image_id']} several classes; one is needed.")
    bare = [i["file_name"] for i in images if i["id"] not in label]
    if bare:
        raise DataError(f"{listed} gives no class to {len(bare)} of {len(images)} images, such as {bare[0]}.")
    paths = [i["file_name"] for i in images]
    return Opened(listed_source(root, root, paths, [label[i["id"]] for i in images], listed))


def _part(found: Any, key: str, listed: Path) -> list[dict[str, Any]]:
    if not isinstance(found, dict) or not found.get(key):
        raise DataError(f"{listed} has no {key!r}; images, annotations and categories are needed.")
    part: list[dict[str, Any]] = found[key]
    return part


def _name(category: dict[str, Any], width: int) -> str:
    number, name = str(category["id"]).zfill(width), str(category.get("name", ""))
    return number if name in ("", str(category["id"])) else f"{number} {name}"


def open_folders(root: Path, split: str) -> Opened:
    """Open the class folders of iNaturalist 2021."""
    names, labels = class_folders(root / split)
    return Opened(FileSource(str(root), str(root / split), names, labels))


def _folder_splits(root: Path) -> list[str]:
    return [s for s in ("train", "train_mini", "val") if subfolders(root / s)]


LAYOUTS = (
    Layout(
        "iNaturalist 2018", "classification", ("train2018.json|val2018.json", "train_val2018"), _json_splits, open_json
    ),
    Layout(
        "iNaturalist 2021", "classification", ("train.json|train_mini.json|val.json", "train|train_mini|val"),
        _json_splits, open_json, (), lambda root: _is_2021(root),
    ),
    Layout(
        "iNaturalist 2021", "classification", (f"train/{NUMBERED}|train_mini/{NUMBERED}|val/{NUMBERED}",),
        _folder_splits, open_folders, (), lambda root: not _json_splits(root),
    ),
)  # fmt: skip


def _is_2021(root: Path) -> bool:
    folders = [f for s in ("train", "train_mini", "val") for f in subfolders(root / s)[:1]]
    return bool(folders) and all(f[:5].isdecimal() and f[5:6] == "_" for f in folders)
