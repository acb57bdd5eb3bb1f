# SPDX-License-Identifier: Apache-2.0
"""Places205: {train,val}_places205.csv (lines PATH INDEX, no header), images in images256/a/abbey/*.jpg."""

from __future__ import annotations

from pathlib import Path

from opendino.errors import DataError
from opendino.evaluate.datasets.layout import Layout, Opened, listed_source, read_rows

IMAGES = ("data/vision/torralba/deeplearning/images256", "images256", "images")
LISTS = ("", "trainvalsplit_places205")


def _list(root: Path, split: str) -> Path | None:
    return next((p for d in LISTS if (p := root / d / f"{split}_places205.csv").is_file()), None)


def open_places(root: Path, split: str) -> Opened:
    """Open train or val; a class is its number, three digits, and the folder of its images."""
    listed = _list(root, split)
    assert listed is not None
    rows = [line[0].rsplit(" ", 1) for line in read_rows(listed, 1)]
    wrong = next((r for r in rows if len(r) != 2 or not r[1].strip().isdecimal()), None)
    if wrong is not None:
        raise DataError(f"{listed} has the line {' '.join(wrong)!r}; a path and the number of a class are needed.")
    folders: dict[int, str] = {}
    for path, index in rows:  # the first folder of a class names it in both splits: one folder is one class
        folders.setdefault(int(index), path.strip("/").rsplit("/", 1)[0].split("/", 1)[-1])
    base = next((root / d for d in IMAGES if (root / d).is_dir()), root)
    labels = [f"{int(index):03d} {folders[int(index)]}" for _, index in rows]
    return Opened(listed_source(root, base, [path for path, _ in rows], labels, listed))


LAYOUTS = (
    Layout(
        "Places205", "classification",
        ("|".join(f"{d}/{s}_places205.csv".lstrip("/") for d in LISTS for s in ("train", "val")),),
        lambda root: [s for s in ("train", "val") if _list(root, s)], open_places,
    ),
)  # fmt: skip
