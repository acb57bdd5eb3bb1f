# SPDX-License-Identifier: Apache-2.0
"""The fine-grained and texture sets of the paper's table of linear probes, as their archives unpack.

Food-101            images/CLASS/*.jpg  meta/{train,test}.txt
SUN397              a/abbey/*.jpg  ClassName.txt  (Partitions/)Training_01.txt, Testing_01.txt
Stanford Cars       cars_train/  cars_test/  devkit/cars_meta.mat, cars_train_annos.mat  cars_test_annos_withlabels.mat
FGVC-Aircraft       data/images/*.jpg  data/images_variant_{train,val,trainval,test}.txt
DTD                 images/CLASS/*.jpg  labels/{train,val,test}{1…10}.txt
Oxford-IIIT Pets    images/*.jpg  annotations/{trainval,test}.txt
Caltech-101         101_ObjectCategories/CLASS/*.jpg
Flowers-102         jpg/image_*.jpg  imagelabels.mat  setid.mat
CUB-200-2011        images/CLASS/*.jpg  images.txt, image_class_labels.txt, classes.txt, train_test_split.txt

VOC2007's classification is multi-label and scored by average precision: voc.py.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from opendino.errors import DataError
from opendino.evaluate.datasets.layout import (
    Layout,
    Opened,
    class_folders,
    listed_source,
    read_lines,
    read_mat,
    read_rows,
    variable,
)
from opendino.images.sources import EXTENSIONS, FileSource

CALTECH_TRAIN = 30
"""Training images of a class of Caltech-101, the number that the published results use."""


def open_food(root: Path, split: str) -> Opened:
    """Open train or test of Food-101; lines are CLASS/NUMBER."""
    listed = root / "meta" / f"{split}.txt"
    lines = read_lines(listed)
    paths = [f"{line}.jpg" for line in lines]
    return Opened(listed_source(root, root / "images", paths, [p.split("/")[0] for p in lines], listed))


def sun_splits(root: Path) -> list[str]:
    """Name the partitions of SUN397 that lie there; `train` and `test` are the first."""
    numbers = sorted(p.stem.split("_")[-1] for p in _sun_lists(root).glob("Training_[0-9][0-9].txt"))
    later = [f"{part}_{n}" for n in numbers if n != "01" for part in ("train", "test")]
    return (["train", "test"] if "01" in numbers else []) + later + ["all"]


def open_sun(root: Path, split: str) -> Opened:
    """Open SUN397; a class is a path such as abbey or apartment_building/outdoor."""
    named = root / "ClassName.txt"
    classes = {line.strip("/") for line in read_lines(named)}
    if split == "all":
        paths = sorted(str(p.relative_to(root)).replace("\\", "/") for c in sorted(classes)
                       for p in (root / c).glob("[!.]*") if p.suffix.lower() in EXTENSIONS)  # fmt: skip
        listed, notes = named, () if len(sun_splits(root)) > 1 else (
            "The partitions are not there, so all images are one split; put Training_01.txt and Testing_01.txt of "
            "Partitions.zip into Partitions/ for the published one.",
        )  # fmt: skip
    else:
        part, _, number = split.partition("_")
        listed = _sun_lists(root) / f"{'Training' if part == 'train' else 'Testing'}_{number or '01'}.txt"
        paths, notes = [line.lstrip("/") for line in read_lines(listed)], ()
    folders = [p.rsplit("/", 1)[0] for p in paths]
    _known(set(folders), classes, listed, named)
    return Opened(listed_source(root, root, paths, [f.split("/", 1)[-1] for f in folders], listed), notes)


def _sun_lists(root: Path) -> Path:
    return root / "Partitions" if (root / "Partitions").is_dir() else root


def cars_splits(root: Path) -> list[str]:
    """Name the splits of Stanford Cars whose labels lie there."""
    return ["train"] + ["test"] * (_cars_test(root) is not None)


def open_cars(root: Path, split: str) -> Opened:
    """Open train or test of Stanford Cars."""
    meta = root / "devkit" / "cars_meta.mat"
    annotated = root / "devkit" / "cars_train_annos.mat" if split == "train" else _cars_test(root)
    assert annotated is not None
    names = np.atleast_1d(variable(read_mat(meta), "class_names", meta)).tolist()
    rows = np.atleast_1d(variable(read_mat(annotated), "annotations", annotated))
    if "class" not in (rows.dtype.names or ()):
        raise DataError(f"{annotated} has no classes. Take cars_test_annos_withlabels.mat from the set's page.")
    ids = [int(c) for c in rows["class"]]
    _within(ids, len(names), annotated, meta)
    folder = root / f"cars_{split}"
    notes = () if split == "test" or _cars_test(root) else (
        "cars_test_annos_withlabels.mat is not there, so the test images have no classes.",)  # fmt: skip
    paths = [str(f) for f in rows["fname"]]
    return Opened(listed_source(root, folder, paths, [str(names[i - 1]) for i in ids], annotated), notes)


def _cars_test(root: Path) -> Path | None:
    places = (root, root / "devkit")
    return next((p for d in places if (p := d / "cars_test_annos_withlabels.mat").is_file()), None)


def aircraft_splits(root: Path) -> list[str]:
    """Name the splits of FGVC-Aircraft."""
    return [s for s in ("train", "val", "trainval", "test") if (root / f"images_variant_{s}.txt").is_file()]


def open_aircraft(root: Path, split: str) -> Opened:
    """Open FGVC-Aircraft with its 100 variants as classes."""
    listed, named = root / f"images_variant_{split}.txt", root / "variants.txt"
    rows = read_rows(listed, 2)
    labels = [label for _, label in rows]
    if named.is_file():
        _known(set(labels), set(read_lines(named)), listed, named)
    note = "The lowest 20 pixel rows of each image name its photographer; they are left in."
    return Opened(listed_source(root, root / "images", [f"{i}.jpg" for i, _ in rows], labels, listed), (note,))


def dtd_splits(root: Path) -> list[str]:
    """Name the splits of DTD: train, val, test are partition 1, train2 … test10 the others."""
    found = [p.stem for p in (root / "labels").glob("*.txt")]
    matches = [m for name in found if (m := re.fullmatch(r"(train|val|test)(\d+)", name))]
    order = sorted(matches, key=lambda m: (int(m[2]), ("train", "val", "test").index(m[1])))
    return [m[1] if m[2] == "1" else m[0] for m in order]


def open_dtd(root: Path, split: str) -> Opened:
    """Open a split of DTD; lines are CLASS/NAME.jpg."""
    listed = root / "labels" / f"{split if split[-1].isdigit() else split + '1'}.txt"
    paths = read_lines(listed)
    return Opened(listed_source(root, root / "images", paths, [p.split("/")[0] for p in paths], listed))


def open_pets(root: Path, split: str) -> Opened:
    """Open trainval or test of Oxford-IIIT Pets; lines are NAME CLASS SPECIES BREED."""
    listed = root / "annotations" / f"{split}.txt"
    names = [row[0] for row in read_rows(listed, 4)]
    labels = [n.rsplit("_", 1)[0] for n in names]
    return Opened(listed_source(root, root / "images", [f"{n}.jpg" for n in names], labels, listed))


def open_caltech(root: Path, split: str) -> Opened:
    """Open Caltech-101: all of it, or 30 images a class for training and the others for testing."""
    base = root / "101_ObjectCategories"
    names, labels = class_folders(base)
    if split == "all":
        return Opened(FileSource(str(root), str(base), names, labels))
    order: dict[str, list[str]] = {}
    for name, label in zip(names, labels, strict=True):
        order.setdefault(label, []).append(name)
    train = {n for own in order.values() for n in sorted(own, key=_drawn)[:CALTECH_TRAIN]}
    kept = [n for n in names if (n in train) == (split == "train")]
    if not kept:
        raise DataError(f"{base} has no class of more than {CALTECH_TRAIN} images, so nothing is left for testing.")
    note = (
        f"Caltech-101 has no published split: {CALTECH_TRAIN} images of each class, drawn by the hash of their names, "
        "are for training. BACKGROUND_Google counts as a class, as in the published figures."
    )
    return Opened(FileSource(str(root), str(base), kept, [n.split("/")[0] for n in kept]), (note,))


def _drawn(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def open_flowers(root: Path, split: str) -> Opened:
    """Open train, val or test of Flowers-102; its classes have numbers only."""
    setid, labelled = root / "setid.mat", root / "imagelabels.mat"
    key = {"train": "trnid", "val": "valid", "test": "tstid"}[split]
    ids = np.atleast_1d(variable(read_mat(setid), key, setid)).tolist()
    labels = np.atleast_1d(variable(read_mat(labelled), "labels", labelled)).tolist()
    _within(ids, len(labels), setid, labelled)
    paths = [f"image_{i:05d}.jpg" for i in ids]
    return Opened(listed_source(root, root / "jpg", paths, [f"{labels[i - 1]:03d}" for i in ids], setid))


def open_cub(root: Path, split: str) -> Opened:
    """Open train or test of CUB-200-2011."""
    tables = {n: dict(read_rows(root / f"{n}.txt", 2))
              for n in ("images", "image_class_labels", "train_test_split", "classes")}  # fmt: skip
    images, labels, trains, classes = tables.values()
    for name, table in list(tables.items())[1:3]:
        lacking = sorted(set(images) ^ set(table), key=str)
        if lacking:
            raise DataError(
                f"{root / name}.txt and images.txt do not speak of the same images, such as number {lacking[0]} "
                f"({len(lacking)} of them). Take both from one download."
            )
    _known(set(labels.values()), set(classes), root / "image_class_labels.txt", root / "classes.txt")
    kept = [i for i in images if (trains[i] == "1") == (split == "train")]
    paths, names = [images[i] for i in kept], [classes[labels[i]] for i in kept]
    return Opened(listed_source(root, root / "images", paths, names, root / "images.txt"))


def _known(found: set[str], classes: set[str], listed: Path, named: Path) -> None:
    unknown = sorted(found - classes)
    if unknown:
        raise DataError(
            f"{listed} has the classes {', '.join(unknown[:5])} ({len(unknown)} of them) that {named} does not name. "
            "Take both from one download."
        )


def _within(ids: list[int], count: int, listed: Path, other: Path) -> None:
    wrong = [i for i in ids if not 1 <= i <= count]
    if wrong:
        raise DataError(
            f"{listed} has the number {wrong[0]}, but {other} ends at {count}. Take both from one download."
        )


def _train_test(root: Path) -> list[str]:
    return ["train", "test"]


def _txt(folder: str, *names: str) -> Callable[[Path], list[str]]:
    return lambda root: [n for n in names if (root / folder / f"{n}.txt").is_file()]


def _layout(
    name: str, signs: tuple[str, ...], splits: Callable[[Path], list[str]], opened: Callable[[Path, str], Opened],
    *folders: str,
) -> Layout:  # fmt: skip
    return Layout(name, "classification", signs, splits, opened, folders)


LAYOUTS = (
    _layout("Food-101", ("meta/train.txt|meta/test.txt", "images"), _txt("meta", "train", "test"), open_food,
            "food-101"),
    _layout("SUN397", ("ClassName.txt", "a"), sun_splits, open_sun, "SUN397"),
    _layout("Stanford Cars", ("cars_train", "devkit/cars_meta.mat"), cars_splits, open_cars, "stanford_cars"),
    _layout("FGVC-Aircraft", ("images_variant_*.txt", "images"), aircraft_splits, open_aircraft, "data",
            "fgvc-aircraft-2013b/data"),
    _layout("DTD", ("labels/train1.txt|labels/test1.txt", "images"), dtd_splits, open_dtd, "dtd", "dtd/dtd"),
    _layout("Oxford-IIIT Pets", ("annotations/trainval.txt|annotations/test.txt", "images"),
            _txt("annotations", "trainval", "test"), open_pets, "oxford-iiit-pet"),
    _layout("Caltech-101", ("101_ObjectCategories",), lambda root: ["train", "test", "all"], open_caltech,
            "caltech101", "caltech-101"),
    _layout("Flowers-102", ("setid.mat", "imagelabels.mat", "jpg"), lambda root: ["train", "val", "test"],
            open_flowers, "flowers-102", "oxford-102-flowers"),
    _layout("CUB-200-2011", ("images.txt", "image_class_labels.txt", "train_test_split.txt", "images"), _train_test,
            open_cub, "CUB_200_2011"),
)  # fmt: skip
