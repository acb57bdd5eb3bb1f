# SPDX-License-Identifier: Apache-2.0
"""A look at a data set before it is used: balance of classes, sizes, files and masks that cannot be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opendino.errors import OpendinoError
from opendino.evaluate.datasets.detect import matches, num_classes, open_split, size
from opendino.evaluate.datasets.layout import Layout, subfolders
from opendino.evaluate.datasets.multilabel import MultiLabelSource
from opendino.evaluate.datasets.types import IGNORE, DepthSet, RetrievalSet, SegmentationSet
from opendino.images.ahead import map_ahead
from opendino.images.arrays import read_image
from opendino.images.sources import ImageSource, open_source

SAMPLE = 64
"""Images of a split that are read without `deep`, spread evenly over it."""
SHOWN = 5
TRAINING = ("train", "training", "trainval")

OnImage = Callable[[str, int, int], None]
"""Is told what is read, how many images of it are, and of how many."""


@dataclass
class Checked:
    """What was found out about one set, or one split of it.

    Attributes:
        facts: figures by name.
        problems: in plain words, what should be mended before use.
        notes: in plain words, what a user should know.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Look:
    """One image as it was read; sums of many make a split's figures.

    Attributes:
        size: (H, W) of the image; None if it could not be read.
        error: why not, or what is wrong with its mask or depth.
        values: pixels by class for a mask, (smallest, largest) metres for depth.
    """

    size: tuple[int, int] | None = None
    error: str = ""
    values: Mapping[int, int] | tuple[float, float] | None = None


def check(path: str | Path, *, deep: bool = False, on_image: OnImage | None = None) -> list[dict[str, Any]]:
    """Look at every data set at a path.

    Args:
        path: folder of a data set, or a table, list, shards or Parquet files of images.
        deep: read every image, not a sample of 64 a split.
        on_image: is told of progress.

    Returns:
        Per set: name, kind, root, splits (name → facts), problems, notes.

    Raises:
        DataError: when there is no known set at the path.
    """
    place = Path(path).expanduser()
    if place.is_dir() or not place.exists():
        return [_check_set(layout, root, deep, on_image) for layout, root in matches(place)]
    part = _check_split(place, "all", open_source(place), deep, on_image)
    return [_described("images", "classification", place, Checked({"all": part.facts}, part.problems, part.notes))]


def _check_set(layout: Layout, root: Path, deep: bool, on_image: OnImage | None) -> dict[str, Any]:
    whole, opened = Checked(), {}
    names = layout.splits(root)
    if not names:
        whole.problems.append(f"{root} looks like {layout.name}, but no split of it is complete.")
    for split in names:
        try:
            found = open_split(layout, root, split)
        except OpendinoError as error:
            whole.problems += [str(error)] if str(error) not in whole.problems else []
            continue
        opened[split] = found.data
        part = _check_split(root, split, found.data, deep, on_image)
        whole.facts[split] = part.facts
        whole.problems += [f"{split}: {p}" for p in part.problems]
        whole.notes += [f"{split}: {n}" for n in part.notes] + [n for n in found.notes if n not in whole.notes]
    _compare_classes(opened, whole)
    return _described(layout.name, layout.kind, root, whole)


def _described(name: str, kind: str, root: Path, found: Checked) -> dict[str, Any]:
    return {
        "name": name, "kind": kind, "root": str(root), "splits": found.facts, "problems": found.problems,
        "notes": found.notes,
    }  # fmt: skip


def _check_split(root: Path, split: str, data: Any, deep: bool, on_image: OnImage | None) -> Checked:
    part = Checked({"images": size(data)})
    if num_classes(data):
        part.facts["classes"] = num_classes(data)
    if isinstance(data, ImageSource):
        _balance(root, split, data, part)
        look: Callable[[int], Look] = partial(_look_at_image, lambda i: data.read(i), data.name)
        total = len(data)
    elif isinstance(data, RetrievalSet):
        _targets(data, part)
        paths = [*data.queries, *data.gallery]
        look, total = partial(_look_at_query, data, paths), len(paths)
    else:
        look, total = partial(_look_at_dense, data), len(data)
    chosen = range(total) if deep else _spread(total)
    looks = list(_told(map_ahead(look, chosen, 4, 16), split, len(chosen), on_image))
    _sum_up(data, looks, part, deep)
    return part


def _spread(total: int) -> list[int]:
    return sorted(set(np.linspace(0, total - 1, min(total, SAMPLE)).astype(int).tolist()))


def _told(looks: Iterator[Look], split: str, total: int, on_image: OnImage | None) -> Iterator[Look]:
    for done, look in enumerate(looks, 1):
        if on_image is not None:
            on_image(split, done, total)
        yield look


def _look_at_image(read: Callable[[int], str | bytes], name: Callable[[int], str], index: int) -> Look:
    try:
        height, width = read_image(read(index), name=name(index)).shape[1:]
    except (OpendinoError, OSError) as error:
        return Look(error=f"{name(index)}: {error}" if name(index) not in str(error) else str(error))
    return Look((height, width))


def _look_at_query(data: RetrievalSet, paths: list[str], index: int) -> Look:
    look = _look_at_image(lambda i: paths[i], lambda i: paths[i], index)
    box = data.boxes[index] if index < len(data.queries) else None
    if look.size is not None and box is not None:
        height, width = look.size
        left, upper, right, lower = box
        if not (left < right and upper < lower and right > 0 and lower > 0 and left < width and upper < height):
            return Look(look.size, f"{paths[index]}: its box {box} lies outside of its {width} × {height} pixels.")
    return look


def _look_at_dense(data: SegmentationSet | DepthSet, index: int) -> Look:
    try:
        height, width = data.image(index).shape[1:]
        plane = data.mask(index) if isinstance(data, SegmentationSet) else data.depth(index)
    except (OpendinoError, OSError) as error:
        return Look(error=str(error))
    if plane.shape != (height, width):
        other = f"{plane.shape[1]} × {plane.shape[0]}"
        return Look((height, width), f"{data.name(index)} has {width} × {height} pixels, what belongs to it {other}.")
    if isinstance(data, SegmentationSet):
        ids, counts = torch.unique(plane, return_counts=True)
        return Look((height, width), values=dict(zip(ids.tolist(), counts.tolist(), strict=True)))
    usable = plane[(plane >= data.min_depth) & (plane <= data.max_depth)]
    if not plane.any():
        return Look((height, width), f"{data.name(index)} has a depth map of zeros only.")
    if not len(usable):
        low, high = float(plane.min()), float(plane.max())
        return Look(
            (height, width),
            f"{data.name(index)} has depths from {low:.3g} to {high:.3g} m, none between {data.min_depth:g} and "
            f"{data.max_depth:g} m. The scale may be wrong.",
        )
    return Look((height, width), values=(float(usable.min()), float(usable.max())))


def _sum_up(data: Any, looks: list[Look], part: Checked, deep: bool) -> None:
    part.facts["read"] = len(looks)
    sizes = [look.size for look in looks if look.size is not None]
    if sizes:
        heights, widths = zip(*sizes, strict=True)
        part.facts |= {"height": [min(heights), max(heights)], "width": [min(widths), max(widths)]}
    errors = [look.error for look in looks if look.error]
    part.facts["unusable"] = len(errors)
    if errors:
        part.problems.append(f"{len(errors)} of {len(looks)} images that were read cannot be used:")
        part.problems += errors[:SHOWN] + ([f"… and {len(errors) - SHOWN} more"] if len(errors) > SHOWN else [])
    values = [look.values for look in looks if look.values is not None]
    if isinstance(data, SegmentationSet):
        _sum_masks(data, [v for v in values if isinstance(v, dict)], part, deep)
    elif isinstance(data, DepthSet) and values:
        ranges = [v for v in values if isinstance(v, tuple)]
        part.facts["depth_m"] = [round(min(v[0] for v in ranges), 3), round(max(v[1] for v in ranges), 3)]


def _sum_masks(data: SegmentationSet, masks: list[dict[int, int]], part: Checked, deep: bool) -> None:
    total: Counter[int] = Counter()
    for mask in masks:
        total.update(mask)
    pixels = sum(total.values())
    if not pixels:
        return
    part.facts["ignored_percent"] = round(100 * total[IGNORE] / pixels, 2)
    unseen = [name for c, name in enumerate(data.classes) if not total[c]]
    part.facts["classes_seen"] = len(data.classes) - len(unseen)
    if unseen and deep:
        part.notes.append(f"no pixel belongs to {_some(unseen)}.")
    empty = sum(set(mask) == {IGNORE} for mask in masks)
    if empty:
        part.notes.append(f"{empty} of {len(masks)} masks have no pixel that counts.")


def _balance(root: Path, split: str, data: ImageSource, part: Checked) -> None:
    if isinstance(data, MultiLabelSource):
        _extremes(data.classes, (data.targets > 0).sum(0), part)
        several, difficult = int(((data.targets > 0).sum(1) > 1).sum()), int((data.targets == 0).sum())
        part.notes.append(
            f"{several} of {len(data)} images have several classes (`opendino eval multilabel`); {difficult} times an "
            "image does not count for a class."
        )
        return
    ids = data.label_ids()
    bare = int((ids < 0).sum())
    if not data.classes:
        part.notes.append("no image has a class.")
        return
    if bare:
        part.problems.append(f"{bare} of {len(data)} images have no class.")
        return
    least, most = _extremes(data.classes, np.bincount(ids, minlength=len(data.classes)), part)
    if most > 10 * least:
        part.notes.append(f"classes are uneven, {least} to {most} images; look at the mean per class as well.")
    empty = _empty_folders(root, split, data.classes)
    if empty:
        part.facts["empty_classes"] = len(empty)
        part.problems.append(f"{len(empty)} class folders hold no image: {_some(empty)}. Fill or remove them.")


def _extremes(classes: list[str], counts: Any, part: Checked) -> tuple[int, int]:
    """Keep the classes with the fewest and the most images, and give their numbers of images."""
    least, most = int(counts.argmin()), int(counts.argmax())
    part.facts |= {"smallest": [classes[least], int(counts[least])], "largest": [classes[most], int(counts[most])]}
    return int(counts[least]), int(counts[most])


def _empty_folders(root: Path, split: str, classes: list[str]) -> list[str]:
    """Give the class folders without images, where all classes are folders."""
    for base in (root / split, root):
        folders = subfolders(base)
        if set(classes) <= set(folders):
            return sorted(set(folders) - set(classes))
    return []


def _targets(data: RetrievalSet, part: Checked) -> None:
    part.facts["gallery"] = len(data.gallery)
    if data.gap:
        distractors = sum(i is None for i in data.query_ids)
        absent = len({i for i in data.query_ids if i is not None} - set(data.gallery_ids))
        part.facts |= {"instances": len(set(data.gallery_ids)), "distractors": distractors}
        if absent:
            part.notes.append(f"{absent} instances of queries are not in the gallery, so they cannot be found.")
        return
    alone = [q for q, r in zip(data.queries, data.relevant, strict=True) if not (r.get("easy") or r.get("hard"))]
    if alone:
        part.notes.append(f"{len(alone)} queries have nothing to be found and do not count: {_some(alone)}.")


def _compare_classes(opened: dict[str, Any], whole: Checked) -> None:
    trains = [s for s in TRAINING if isinstance(opened.get(s), ImageSource)]
    if not trains:
        return
    known = set(opened[trains[-1]].classes)
    for split, data in opened.items():
        if split in trains or not isinstance(data, ImageSource):
            continue
        lone = sorted(set(data.classes) - known)
        if lone:
            whole.problems.append(
                f"{split}: {len(lone)} classes are not in {trains[-1]} and cannot be predicted: {_some(lone)}."
            )
        missing = sorted(known - set(data.classes))
        if missing:
            whole.notes.append(f"{split}: {len(missing)} classes of {trains[-1]} have no images: {_some(missing)}.")


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
