# SPDX-License-Identifier: Apache-2.0
"""Which data set lies at a path, and its splits as the protocols take them. Listings are read, never images."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opendino.errors import DataError, OpendinoError
from opendino.evaluate.datasets import (
    ade20k,
    amstertime,
    cifar,
    cityscapes,
    classification,
    generic,
    imagenet,
    inaturalist,
    kitti,
    met,
    nyu,
    places,
    revisited,
    sunrgbd,
    voc,
)
from opendino.evaluate.datasets.layout import Kind, Layout, Opened, has, resolve_split
from opendino.evaluate.datasets.multilabel import MultiLabelSource, open_table
from opendino.evaluate.datasets.types import DepthSet, RetrievalSet, SegmentationSet
from opendino.images import locations
from opendino.images.sources import EXTENSIONS, ImageSource, open_source

log = logging.getLogger("opendino")

MODULES = (
    cifar, classification, inaturalist, places, imagenet, ade20k, cityscapes, voc, nyu, sunrgbd, kitti, revisited, met,
    amstertime,
)  # fmt: skip
LAYOUTS: tuple[Layout, ...] = tuple(layout for module in MODULES for layout in module.LAYOUTS)
FALLBACK = {
    "classification": "SPLIT/CLASS/*.jpg or SPLIT.csv with path,label",
    "segmentation": "images/SPLIT/*.jpg with masks/SPLIT/*.png and classes.txt",
    "depth": "images/SPLIT/*.jpg with depth/SPLIT/*.png",
    "retrieval": "retrieval.json",
}


@dataclass(frozen=True)
class Found:
    """A data set that lies at a path.

    Attributes:
        name: of the set, or of the generic form.
        kind: classification, segmentation, depth or retrieval.
        root: the folder that has its signs.
        splits: name → number of images (of queries for retrieval).
        classes: their number; 0 for sets without.
        problems: what keeps a split from being read.
        notes: how a split is read otherwise than published.
    """

    name: str
    kind: Kind
    root: str
    splits: Mapping[str, int]
    classes: int
    problems: tuple[str, ...]
    notes: tuple[str, ...]


def detect(path: str | Path) -> list[Found]:
    """Give the data sets at a path, with the size of each split; see `matches` for those without sizes.

    Raises:
        DataError: when there is none, with the closest miss.
    """
    return [_found(layout, root) for layout, root in matches(path)]


def matches(path: str | Path, kind: Kind | None = None) -> list[tuple[Layout, Path]]:
    """Give the layouts that lie at a path with their roots, from a few look-ups. One's own forms count only when no
    named set does.

    Raises:
        DataError: when there is none, with the closest miss.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise DataError(f"{path} is no folder. Give the folder that a data set was unpacked into.")
    if not os.access(path, os.R_OK | os.X_OK):
        raise DataError(f"{path} cannot be listed: you have no permission. Ask its owner for it.")
    for layouts in (LAYOUTS, generic.LAYOUTS):
        found = [(x, root) for x in layouts if kind in (None, x.kind) and (root := x.root(path)) is not None]
        if found:
            return _distinct(found)
    raise DataError(_closest_miss(path, kind))


def open_classification(path: str | Path, split: str) -> ImageSource:
    """Open the images and labels of a split; a .csv, shards or Parquet files are opened as they are.

    Raises:
        DataError: when nothing is recognised, the split is not there or incomplete, or images have several classes.
    """
    if not Path(path).expanduser().is_dir():
        return open_source(path)
    opened: ImageSource = _open(path, split, "classification")
    if isinstance(opened, MultiLabelSource):
        raise DataError(
            f"The images of {opened.root} have several classes each, and this protocol needs one. Use `opendino eval "
            f"multilabel --data {path}`, which scores each class by its average precision."
        )
    return opened


def open_multilabel(path: str | Path, split: str) -> MultiLabelSource:
    """Open the images and classes of a split, or a .csv with `path` and `labels` (`multilabel.open_table`).

    Raises:
        DataError: when nothing is recognised, the split is not there or incomplete, or images have one class each.
    """
    place = Path(path).expanduser()
    if place.suffix.lower() == ".csv" and place.is_file():
        return open_table(place)
    opened = _open(path, split, "classification")
    if not isinstance(opened, MultiLabelSource):
        raise DataError(
            f"The images of {path} have one class each; use `opendino eval logreg`, `knn` or `linear` for them. "
            "Multi-label sets are VOC2007 and your own .csv files with the columns path,labels."
        )
    return opened


def open_labelled(place: str | Path) -> ImageSource:
    """Open labelled images as a command line names them: what `open_source` takes, or ROOT:SPLIT of a data set.

    Raises:
        DataError: for a data set of several splits without a name of one, so that its folders are not taken for
            classes; else as `open_classification` and `open_source`.
    """
    text = locations.as_location(place)
    root, _, split = text.rpartition(":")
    if root and split and not locations.is_url(text) and not os.path.exists(text) and os.path.isdir(root):
        return open_classification(root, split)
    if not os.path.isdir(text):
        return open_source(place)
    try:
        layout, found = matches(text, "classification")[0]
    except DataError:
        return open_source(place)  # tar shards, Parquet, or images without classes
    splits = layout.splits(found)
    if len(splits) == 1 and layout not in generic.LAYOUTS:
        return open_classification(text, splits[0])
    if layout.name == "tables" or (layout in generic.LAYOUTS and splits == ["all"]):
        return open_source(place)
    raise DataError(
        f"{text} is {layout.name}, with the splits {', '.join(splits[:20])}. Name one of them, such as "
        f"{text.rstrip('/')}:{splits[0]}."
        if splits else f"{text} looks like {layout.name}, but no split of it is complete."
    )  # fmt: skip


def open_segmentation(path: str | Path, split: str) -> SegmentationSet:
    """Open the images and masks of a split.

    Raises:
        DataError: when nothing is recognised, or the split is not there or incomplete.
    """
    opened: SegmentationSet = _open(path, split, "segmentation")
    return opened


def open_depth(path: str | Path, split: str) -> DepthSet:
    """Open the images and depths of a split.

    Raises:
        DataError: when nothing is recognised, or the split is not there or incomplete.
    """
    opened: DepthSet = _open(path, split, "depth")
    return opened


def open_retrieval(path: str | Path, split: str | None = None) -> RetrievalSet:
    """Open queries and gallery; without `split`, the first of the set (test).

    Raises:
        DataError: when nothing is recognised, or the set is incomplete.
    """
    opened: RetrievalSet = _open(path, split, "retrieval")
    return opened


def open_split(layout: Layout, root: Path, split: str | None) -> Opened:
    """Open a split of a layout that `matches` gave, under its own name or a usual one for it.

    Raises:
        DataError: when the split is not there or incomplete.
    """
    there = layout.splits(root)
    if split is None and there:
        split = there[0]
    name = resolve_split(split or "", there, f"{layout.name} in {root}")
    try:
        return layout.open(root, name)
    except OpendinoError:
        raise
    except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        raise DataError(  # a list or table of another make than the published one
            f"{root} looks like {layout.name}, but the files that describe its split {name} cannot be made sense of "
            f"({type(error).__name__}: {error}). Take them anew from the set's own page."
        ) from error


def _open(path: str | Path, split: str | None, kind: Kind) -> Any:
    layout, root = matches(path, kind)[0]
    opened = open_split(layout, root, split)
    for note in opened.notes:
        log.warning("%s: %s", root, note)
    return opened.data


def size(data: Any) -> int:
    """Give the number of images of a split, of queries for retrieval."""
    return len(data.queries) if isinstance(data, RetrievalSet) else len(data)


def num_classes(data: Any) -> int:
    """Give the number of classes of a split; 0 without."""
    return len(getattr(data, "classes", ()))


def _found(layout: Layout, root: Path) -> Found:
    splits, classes, problems, notes = {}, 0, [], []
    there = layout.splits(root)
    if not there:
        problems.append(f"{root} looks like {layout.name}, but no split of it is complete.")
    for split in there:
        try:
            opened = open_split(layout, root, split)
        except OpendinoError as error:
            if str(error) not in problems:  # what one file lacks, several splits may lack
                problems.append(str(error))
            continue
        splits[split] = size(opened.data)
        classes = max(classes, num_classes(opened.data))
        notes += [n for n in opened.notes if n not in notes]
    return Found(layout.name, layout.kind, str(root), splits, classes, tuple(problems), tuple(notes))


def _distinct(found: list[tuple[Layout, Path]]) -> list[tuple[Layout, Path]]:
    """Leave out a second reading of the same folder for the same kind, such as plain WordNet folders."""
    seen: set[tuple[Path, str]] = set()
    kept = []
    for layout, root in found:
        if (root, layout.kind) not in seen:
            kept.append((layout, root))
        seen.add((root, layout.kind))
    return kept


def _closest_miss(path: Path, kind: Kind | None) -> str:
    near = []
    for layout in (*LAYOUTS, *generic.LAYOUTS):
        present, missing = layout.missing(path)
        if kind in (None, layout.kind) and present and missing:
            depth = sum(s.count("/") for s in present)  # images/training says more than images
            near.append((len(present) / len(layout.signs), depth, layout.name, present, missing))
    near.sort(key=lambda n: (-n[0], -n[1]))
    above = next((p for p in list(path.resolve().parents)[:2] if _matches_named(p, kind)), None)
    parts = [f"{path} is no {kind or 'known'} data set."]
    if above is not None:
        parts.append(f"Its folder {above} is {_matches_named(above, kind)}: give that one.")
    if kind in (None, "classification") and has(path, "|".join(f"*{e}" for e in sorted(EXTENSIONS))):
        parts.append("It holds images, but not in one folder a class.")
    for _, _, name, present, missing in near[:2]:
        parts.append(f"For {name} there is {_words(present, ' and ')} but no {_words(missing, ' and no ')}.")
    forms = FALLBACK if kind is None else {kind: FALLBACK[kind]}
    names = dict.fromkeys(x.name for x in LAYOUTS if kind in (None, x.kind))
    parts.append(f"Looked for {', '.join(names)}; or your own: {'; '.join(forms.values())}.")
    return " ".join(parts)


def _matches_named(path: Path, kind: Kind | None) -> str:
    direct = (x for x in LAYOUTS if kind in (None, x.kind) and x.root(path) == path)
    return next((x.name for x in direct), "")


def _words(signs: list[str], between: str) -> str:
    return between.join(" or ".join(s.split("|")[:2]) for s in signs[:2])
