# SPDX-License-Identifier: Apache-2.0
"""ImageNet-1k and the test sets that share its classes. Class names are WordNet ids, so that they match between sets.

train/WNID/*.JPEG  val/WNID/*.JPEG                      class folders
ILSVRC/Data/CLS-LOC/{train/WNID,val}  LOC_*.csv         as Kaggle has it, val flat
val/ILSVRC2012_val_*.JPEG  ground truth                 as unpacked, val flat
0/ … 999/                                               ImageNet-V2: index among the sorted WordNet ids
WNID/*                                                  ImageNet-A, -R, -Sketch
CORRUPTION/SEVERITY/WNID/*                              ImageNet-C
real.json                                               ImageNet-ReaL: for val images in order, lists of indices
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path

from opendino.errors import DataError
from opendino.evaluate.datasets.layout import (
    Layout,
    Opened,
    class_folders,
    first,
    listed_source,
    read_json,
    read_lines,
    read_mat,
    read_text,
    subfolders,
    variable,
)
from opendino.images.sources import FileSource

WNID = re.compile(r"n\d{8}")
VAL = re.compile(r"ILSVRC2012_val_(\d{8})\.\w+")
WNIDS = "n[0-9][0-9][0-9][0-9][0-9][0-9][0-9][0-9]"
KAGGLE = "ILSVRC/Data/CLS-LOC"
REAL = ("real.json", "reassessed-imagenet/real.json")


class ManyLabels(FileSource):
    """Images each of which may be called by several classes.

    Attributes:
        label_sets: per image the names of the classes that count as right; `label_ids` has the first of them.
    """

    def __init__(self, root: str, base: str, paths: Iterable[str], labels: Sequence[tuple[str, ...]]) -> None:
        super().__init__(root, base, paths, [names[0] for names in labels])
        self.label_sets = labels


@lru_cache(maxsize=1)
def wnids() -> tuple[str, ...]:
    """Give the 1000 WordNet ids of ImageNet-1k, sorted; the place in it is the published class index."""
    return tuple((resources.files(__package__) / "imagenet_wnids.txt").read_text().split())


def splits(root: Path) -> list[str]:
    """Name the splits of an ImageNet-1k folder."""
    there = [s for s in ("train", "val") if subfolders(root / s) or first(root / s, "ILSVRC2012_val_*")]
    return there + ["real"] * ("val" in there and _upwards(root, REAL) is not None)


def open_imagenet(root: Path, split: str) -> Opened:
    """Open train or val of ImageNet-1k, or its val images with the ReaL labels."""
    if split == "real":
        return _real(root)
    base = root / split
    if first(base, "ILSVRC2012_val_*") is not None:
        names, labels, truth = _flat_val(root)
        source = listed_source(root, base, names, labels, truth)
    else:
        source = _wnid_folders(root, base)
    count = len(source.classes)
    note = f"{split} has {count} classes; ImageNet-1k has 1000." if count != 1000 else ""
    return Opened(source, (note,) if note else ())


def open_wnids(root: Path, split: str) -> Opened:
    """Open class folders named by WordNet ids (ImageNet-A, -R, -Sketch)."""
    return Opened(_wnid_folders(root, root))


def open_v2(root: Path, split: str) -> Opened:
    """Open ImageNet-V2, whose folders are numbers of classes."""
    names, folders = class_folders(root)
    wrong = sorted({f for f in folders if not (f.isdecimal() and int(f) < 1000)})
    if wrong:
        raise DataError(f"{root} holds the folders {wrong[:5]}; ImageNet-V2 has 0 to 999. Move them away.")
    source = FileSource(str(root), str(root), names, [wnids()[int(f)] for f in folders])
    count = len(source.classes)
    return Opened(source, (f"{count} of 1000 class folders hold images.",) if count < 1000 else ())


def corruptions(root: Path) -> list[str]:
    """Name the splits of ImageNet-C: CORRUPTION/SEVERITY, or GROUP/CORRUPTION/SEVERITY as the archives unpack."""
    found = []
    for one in subfolders(root):
        for two in subfolders(root / one):
            if two in "12345" and first(root / one / two, WNIDS):
                found.append(f"{one}/{two}")
            else:
                found += [f"{one}/{two}/{s}" for s in subfolders(root / one / two) if s in "12345"]
    return found


def open_corruption(root: Path, split: str) -> Opened:
    """Open one corruption at one severity."""
    return Opened(_wnid_folders(root, root / split))


def _wnid_folders(root: Path, base: Path) -> FileSource:
    names, labels = class_folders(base)
    wrong = sorted({f for f in labels if not WNID.fullmatch(f)})
    if wrong:
        raise DataError(
            f"{base} holds the folders {wrong[:5]} beside classes; classes are named by WordNet ids such as "
            "n01440764. Move the others away."
        )
    return FileSource(str(root), str(base), names, labels)


def _flat_val(root: Path) -> tuple[list[str], list[str], Path]:
    """Give the names of the val images in their order, the class of each, and the file that says so."""
    names = sorted(p.name for p in (root / "val").iterdir() if VAL.fullmatch(p.name))
    if found := _upwards(root, ("LOC_val_solution.csv", "val/LOC_val_solution.csv")):
        rows = csv.DictReader(read_text(found).splitlines())
        if not {"ImageId", "PredictionString"} <= set(rows.fieldnames or ()):
            raise DataError(f"{found} has the columns {rows.fieldnames}; ImageId and PredictionString are needed.")
        known = {row["ImageId"]: row["PredictionString"].split()[0] for row in rows if row["PredictionString"].strip()}
        return names, _each(names, lambda n: known.get(n.split(".")[0]), found), found
    by_line, found = _by_line(root)
    return names, _each(names, lambda n: by_line.get(_number(n)), found), found


def _by_line(root: Path) -> tuple[dict[int, str], Path]:
    """Read a ground truth of one line an image, as WordNet ids or as the devkit's ids."""
    found = _upwards(root, ("imagenet_2012_validation_synset_labels.txt",))
    if found:
        return dict(enumerate(read_lines(found), 1)), found
    data = ("", "data/", "ILSVRC2012_devkit_t12/data/")
    found = _upwards(root, [f"{d}ILSVRC2012_validation_ground_truth.txt" for d in data])
    meta = _upwards(root, [f"{d}meta.mat" for d in data])
    if found is None or meta is None:
        raise DataError(
            f"{root / 'val'} is flat and the classes of its images are not there. Put LOC_val_solution.csv (Kaggle), "
            "imagenet_2012_validation_synset_labels.txt, or the devkit's ILSVRC2012_validation_ground_truth.txt and "
            f"meta.mat into {root}; or sort the images into class folders."
        )
    synsets = variable(read_mat(meta), "synsets", meta)
    wnid = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets}
    return {i: wnid[int(line)] for i, line in enumerate(read_lines(found), 1)}, found


def _each(names: Sequence[str], label: Callable[[str], str | None], truth: Path) -> list[str]:
    labels = {n: found for n in names if (found := label(n)) is not None}
    unknown = [n for n in names if n not in labels]
    if unknown:
        raise DataError(
            f"{truth} does not say the class of {len(unknown)} of {len(names)} val images, such as {unknown[0]}. Take "
            "it anew from the download, or move those images away."
        )
    return [labels[n] for n in names]


def _real(root: Path) -> Opened:
    found = _upwards(root, REAL)
    if found is None:
        raise DataError(f"real.json is missing in {root}. It comes with ImageNet-ReaL.")
    sets = read_json(found)
    if not isinstance(sets, list) or not all(isinstance(s, list) for s in sets):
        raise DataError(f"{found} is no list of lists of class indices, one for each val image.")
    wrong = next((i for own in sets for i in own if not (isinstance(i, int) and 0 <= i < len(wnids()))), None)
    if wrong is not None:
        raise DataError(f"{found} has the class {wrong!r}; class indices are 0 to 999. Take it anew.")
    base = root / "val"
    names = sorted(_val_names(base), key=_number)
    beyond = [n for n in names if not 1 <= _number(n) <= len(sets)]
    if beyond:
        raise DataError(f"{found} has {len(sets)} lists, none for {beyond[0]} and {len(beyond) - 1} more val images.")
    labels = {n: tuple(wnids()[i] for i in sets[_number(n) - 1]) for n in names}
    kept = [n for n in names if labels[n]]
    if not kept:
        raise DataError(f"{base} has no image that {found} gives a class.")
    note = f"{len(names) - len(kept)} of {len(names)} val images have no ReaL label and are left out, as published."
    source = ManyLabels(str(root), str(base), kept, [labels[n] for n in kept])
    return Opened(source, (note,) if len(kept) < len(names) else ())


def _val_names(base: Path) -> list[str]:
    folders = ["", *subfolders(base)]
    return [
        f"{f}/{p.name}".lstrip("/") for f in folders for p in (base / f).iterdir() if VAL.fullmatch(p.name)
    ]  # fmt: skip


def _number(name: str) -> int:
    match = VAL.fullmatch(name.rsplit("/", 1)[-1])
    assert match is not None
    return int(match[1])


def _upwards(root: Path, names: Iterable[str]) -> Path | None:
    """Look for a file in a folder and, for the Kaggle layout, in the three above it."""
    above = [root, *list(root.parents)[:3]] if str(root).replace("\\", "/").endswith(KAGGLE) else [root]
    return next((p for folder in above for name in names if (p := folder / name).is_file()), None)


def _is_v2(root: Path) -> bool:
    names = subfolders(root)
    called = re.search(r"imagenet-?v2", str(root.name).lower()) is not None
    return bool(names) and all(n.isdecimal() for n in names) and (called or names == sorted(map(str, range(1000))))


V2_FOLDERS = tuple(
    f"imagenetv2-{v}" for v in ("matched-frequency-format-val", "threshold0.7-format-val", "top-images-format-val")
)


def _one(root: Path) -> list[str]:
    return ["test"]


def _is_c(root: Path) -> bool:
    """Look at a few folders only, because a folder of classes may hold a million files."""
    return any(True for one in subfolders(root)[:20] for _ in _severities(root, one))


def _severities(root: Path, one: str) -> list[str]:
    if WNID.fullmatch(one):
        return []
    below = subfolders(root / one)
    if any(WNID.fullmatch(b) for b in below[:1]):
        return []
    deeper = [f"{two}/{s}" for two in below[:20] if two not in "12345" for s in subfolders(root / one / two)[:5]]
    return [s for s in [*below, *deeper] if s[-1] in "12345" and first(root / one / s, WNIDS)]


def _wnid_layout(name: str, *parts: str) -> Layout:
    def called(root: Path) -> bool:
        return not parts or any(p in root.name.lower().replace("_", "-") for p in parts)

    return Layout(name, "classification", (WNIDS,), _one, open_wnids, parts, called)


LAYOUTS = (
    Layout(
        "ImageNet-1k", "classification", (f"train/{WNIDS}|val/{WNIDS}|val/ILSVRC2012_val_*",), splits, open_imagenet,
        (KAGGLE,),
    ),
    Layout("ImageNet-V2", "classification", ("[0-9]*",), _one, open_v2, V2_FOLDERS, _is_v2),
    Layout(
        "ImageNet-C", "classification", ("*",), corruptions, open_corruption, ("ImageNet-C", "imagenet-c"), _is_c,
    ),
    _wnid_layout("ImageNet-A", "imagenet-a"),
    _wnid_layout("ImageNet-R", "imagenet-r"),
    _wnid_layout("ImageNet-Sketch", "sketch"),
    _wnid_layout("WordNet class folders"),
)  # fmt: skip
