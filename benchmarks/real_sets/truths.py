# SPDX-License-Identifier: Apache-2.0
"""What is right: labels, lists of relevant images, masks and depths of the built sets, in the order they are described.

Written once to WORK/truth, from where table.py and check.py both read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from opendino.errors import DataError
from opendino.evaluate.datasets.folders import open_folder_depth, open_folder_masks
from opendino.images.sources import open_source

LARGE = 224
"""Side at which rendered or pasted scenes are shown to a backbone, pixels."""


@dataclass(frozen=True)
class Part:
    """Images that are described together.

    Attributes:
        paths: of the images.
        size: side at which a backbone sees them; None: that of its preprocessing, which a run has from its crops.
        dense: a vector per patch is wanted.
        boxes: part of each that is described.
    """

    paths: Sequence[Path]
    size: int | None = None
    dense: bool = False
    boxes: Sequence[Any] | None = None


def emoji(sets: Path) -> tuple[dict[str, Part], dict[str, Any]]:
    """Give all drawings, their classes and splits, and the queries as gallery numbers; test drawings are queries."""
    task = _read_json(sets / "emoji" / "retrieval.json")
    split, label = zip(*(Path(p).parts[:2] for p in task["gallery"]))
    classes = sorted(set(label))
    truth = {"split": split, "label": [classes.index(x) for x in label], "classes": classes, **_queries(task)}
    parts = {"emoji": Part([sets / "emoji" / p for p in task["gallery"]])}
    return parts, {"emoji": truth}


def fashion(sets: Path) -> tuple[dict[str, Part], dict[str, Any]]:
    """Give the 60 000 and 10 000 images of Fashion-MNIST with their classes."""
    parts, truth = {}, {}
    for split in ("train", "test"):
        source = open_source(sets / "fashion-mnist" / split)
        parts[f"fashion_{split}"] = Part([Path(item.path) for item in source.items])
        truth[f"fashion_{split}"] = np.asarray(source.label_ids(), np.int64)
    return parts, truth


def room_retrieval(sets: Path) -> tuple[dict[str, Part], dict[str, Any]]:
    """Give views of furniture, the boxes that are looked for, and what is to be found."""
    root = sets / "room-retrieval"
    task = _read_json(root / "retrieval.json")
    boxes = [q["box"] for q in task["queries"]]
    parts = {
        "room_gallery": Part([root / p for p in task["gallery"]], LARGE),
        "room_queries": Part([root / q["query"] for q in task["queries"]], LARGE, boxes=boxes),
    }
    return parts, {"room_retrieval": _queries(task)}


def cutouts(sets: Path) -> tuple[dict[str, Part], dict[str, Any]]:
    """Give composites and their masks, uint8 (n, 224, 224)."""
    parts, truth = {}, {}
    for split in ("train", "val"):
        data = open_folder_masks(sets / "cutouts", split)
        parts[f"cutouts_{split}"] = Part(data.images, LARGE, dense=True)
        truth[f"cutouts_{split}"] = np.stack([data.mask(i).numpy() for i in range(len(data))])
        truth["cutouts_classes"] = list(data.classes)
    return parts, truth


def rooms(sets: Path) -> tuple[dict[str, Part], dict[str, Any]]:
    """Give rooms of both camera sets and their depth, uint16 millimetres (n, 224, 224)."""
    parts, truth = {}, {}
    for name, folder, split in (
        ("rooms_train", "rooms", "train"), ("rooms_val", "rooms", "val"), ("rooms_second", "rooms-second", "val"),
    ):  # fmt: skip
        data = open_folder_depth(sets / folder, split)
        parts[name] = Part(data.images, LARGE, dense=True)
        truth[name] = np.stack([(data.depth(i) * 1000).round().numpy().astype(np.uint16) for i in range(len(data))])
    return parts, truth


TASKS: dict[str, Callable[[Path], tuple[dict[str, Part], dict[str, Any]]]] = {
    "emoji": emoji,
    "fashion": fashion,
    "cutouts": cutouts,
    "rooms": rooms,
    "room_retrieval": room_retrieval,
}


def load_truths(task: str, folder: Path) -> dict[str, Any]:
    """Read what `write_truths` wrote of a task."""
    found: dict[str, Any] = {}
    for path in sorted((folder / task).iterdir()):
        found[path.stem] = np.load(path) if path.suffix == ".npy" else _read_json(path)
    return found


def write_truths(task: str, truth: Mapping[str, Any], folder: Path) -> None:
    """Write arrays as .npy and the rest as .json."""
    (folder / task).mkdir(parents=True, exist_ok=True)
    for name, value in truth.items():
        if isinstance(value, np.ndarray):
            np.save(folder / task / f"{name}.npy", value)
        else:
            (folder / task / f"{name}.json").write_text(json.dumps(value))


def _queries(task: Mapping[str, Any]) -> dict[str, Any]:
    """Give the queries as gallery numbers; the query itself is passed over."""
    number = {path: i for i, path in enumerate(task["gallery"])}
    queries = []
    for query in task["queries"]:
        lists = {level: [number[p] for p in query[level]] for level in ("easy", "hard", "junk")}
        own = number[query["query"]]
        queries.append({"row": own, **lists, "junk": [*lists["junk"], own]})
    return {"queries": queries}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}. Build the sets with build.py.") from error


Arrays = dict[str, npt.NDArray[Any]]
