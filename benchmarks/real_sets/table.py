# SPDX-License-Identifier: Apache-2.0
"""The table of docs/real-sets.md: descriptors by hand, a random and a trained backbone, on all real sets.

    python benchmarks/real_sets/table.py --sets SETS --work WORK --run RUN
    python benchmarks/real_sets/table.py --sets SETS --work WORK --rows raw hog

WORK/truth holds what is right; WORK/ROW-KEY the vectors of a row and, in cells/, the figures of each task. What is
there is not made again; another checkpoint is another KEY. WORK/table.json and WORK/table.md are written after every
cell, so the script may be stopped and started at any time. `check.py` computes the same figures from the same vectors
by other means.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from dense import depth_errors, depths, fit_depth, fit_segmenter, mean_iou, segment
from describers import ROWS, Describer, describer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from truths import TASKS, Part, load_truths, write_truths

from opendino.errors import DataError, OpendinoError
from opendino.evaluate.knn import knn_accuracy
from opendino.evaluate.retrieval import mean_average_precision

K = 20
C = 10.0
"""Inverse strength of the logistic regression's penalty, on vectors of length one."""
Vectors = Mapping[str, npt.NDArray[Any]]
Figures = dict[str, float]


@dataclass(frozen=True)
class Column:
    """One figure of the table: the task and its figure, the heading, and whether more is better."""

    task: str
    figure: str
    heading: str
    rising: bool = True


COLUMNS = (
    Column("emoji", "knn", "emoji k-NN, mean per class"),
    Column("emoji", "logistic", "emoji logistic, mean per class"),
    Column("fashion", "knn", "Fashion-MNIST k-NN, 60k/10k"),
    Column("cutouts", "miou", "cut-outs mIoU"),
    Column("rooms", "rmse", "rooms depth RMSE, m", rising=False),
    Column("rooms", "second_rmse", "second cameras RMSE, m", rising=False),
    Column("emoji", "map_medium", "emoji mAP M"),
    Column("emoji", "map_hard", "emoji mAP H"),
    Column("room_retrieval", "map_medium", "rooms mAP M"),
    Column("room_retrieval", "map_hard", "rooms mAP H"),
)
TITLES = {
    "raw": "raw pixels 16×16",
    "hog": "HOG",
    "hog+colour": "HOG + colour",
    "random": "ViT, random",
    "trained": "ViT, trained",
}


# --- figures -------------------------------------------------------------------------------------------------------


def score_emoji(vectors: Vectors, truth: Mapping[str, Any]) -> Figures:
    """Classify test drawings by train drawings; find drawings of other vendors."""
    x, task = unit(vectors["emoji"]), truth["emoji"]
    split, label = np.array(task["split"]), np.array(task["label"])
    train, test = split == "train", split == "test"
    knn = knn_accuracy(x[train], label[train], x[test], label[test], k=(K,))
    figures = {"knn": knn["mean_per_class"][str(K)], "knn_top1": knn["top1"][str(K)]}
    figures["logistic"] = logistic(x[train], label[train], x[test], label[test])
    return figures | retrieval(x[[q["row"] for q in task["queries"]]], x, task["queries"])


def score_fashion(vectors: Vectors, truth: Mapping[str, Any]) -> Figures:
    """Classify the 10 000 test images by all training images."""
    given = [vectors["fashion_train"], truth["fashion_train"], vectors["fashion_test"], truth["fashion_test"]]
    return {"knn": knn_accuracy(*(np.array(a) for a in given), k=(K,))["top1"][str(K)]}


def score_room_retrieval(vectors: Vectors, truth: Mapping[str, Any]) -> Figures:
    """Find views of the piece of furniture in a box."""
    queries = truth["room_retrieval"]["queries"]
    return retrieval(unit(vectors["room_queries"]), unit(vectors["room_gallery"]), queries)


def score_cutouts(vectors: Vectors, truth: Mapping[str, Any]) -> Figures:
    """Segment unseen objects on unseen backgrounds."""
    classes, masks = truth["cutouts_classes"], truth["cutouts_val"]
    head = fit_segmenter(vectors["cutouts_train"], truth["cutouts_train"], len(classes))
    predicted = np.concatenate(list(segment(head, vectors["cutouts_val"], masks.shape[1])))
    return {"miou": mean_iou(predicted, masks, len(classes))}


def score_rooms(vectors: Vectors, truth: Mapping[str, Any]) -> Figures:
    """Estimate depth in unseen rooms, by the cameras that the head was fitted on and by others."""
    head = fit_depth(vectors["rooms_train"], truth["rooms_train"])
    figures = {}
    for prefix, name in (("", "rooms_val"), ("second_", "rooms_second")):
        predicted = np.concatenate(list(depths(head, vectors[name], truth[name].shape[1])))
        figures |= {prefix + k: v for k, v in depth_errors(predicted, truth[name]).items()}
    return figures


SCORES: dict[str, Callable[[Vectors, Mapping[str, Any]], Figures]] = {
    "emoji": score_emoji,
    "room_retrieval": score_room_retrieval,
    "cutouts": score_cutouts,
    "rooms": score_rooms,
    "fashion": score_fashion,
}
"""Task → its figures; the slowest last."""


VERSIONS = {"emoji": 1, "room_retrieval": 1, "cutouts": 2, "rooms": 2, "fashion": 1}
"""Raise one when its figures are computed in another way: the cells are then made again from the same vectors."""


def retrieval(queries: npt.NDArray[Any], gallery: npt.NDArray[Any], lists: list[dict[str, Any]]) -> Figures:
    """Give mAP of the three levels, percent."""
    levels = ("easy", "hard", "junk")
    found = mean_average_precision(queries @ gallery.T, [{k: q[k] for k in levels} for q in lists])
    return {f"map_{level}": value for level, value in found.items()}


def logistic(x: npt.NDArray[Any], y: npt.NDArray[Any], tx: npt.NDArray[Any], ty: npt.NDArray[Any]) -> float:
    """Give the mean accuracy per class of a multinomial logistic regression, percent."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score

    fitted = LogisticRegression(C=C, max_iter=2000, tol=1e-6).fit(x.astype(np.float64), y)
    return 100 * float(balanced_accuracy_score(ty, fitted.predict(tx.astype(np.float64))))


def unit(x: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Scale rows to length one, in float64."""
    wide = np.asarray(x, np.float64)
    return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)


# --- vectors and cells ---------------------------------------------------------------------------------------------


def vectors_of(folder: Path, parts: Mapping[str, Part], row: Describer, progress: Progress) -> Vectors:
    """Describe what has not been described yet, and open it all."""
    for name, part in parts.items():
        path = folder / f"{name}.npy"
        if not path.exists():
            task = progress.add_task(f"{row.name}: {name}", total=len(part.paths))
            save_blocks(path, _blocks(row, part, lambda n, task=task: progress.advance(task, n)), len(part.paths))
            progress.remove_task(task)
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in parts}


def _blocks(row: Describer, part: Part, done: Callable[[int], None]) -> Iterator[npt.NDArray[Any]]:
    boxes = part.boxes or [None] * len(part.paths)
    blocks: Iterator[npt.NDArray[Any]] = (
        row.patches(part.paths, part.size) if part.dense else row.images(part.paths, boxes, part.size)
    )
    for block in blocks:
        yield block
        done(len(block))


def save_blocks(path: Path, blocks: Iterator[npt.NDArray[Any]], total: int) -> None:
    """Write blocks of rows as one array, aside and then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside, at, out = path.with_suffix(".part"), 0, None
    for block in blocks:
        if out is None:
            out = np.lib.format.open_memmap(aside, "w+", block.dtype, (total, *block.shape[1:]))
        out[at : at + len(block)] = block
        at += len(block)
    if out is None or at != total:
        raise DataError(f"{path} needs {total} rows and got {at}. Build the sets again.")
    out.flush()
    os.replace(aside, path)


def make_cell(task: str, row: Describer, sets: Path, work: Path, progress: Progress) -> Figures:
    """Give the figures of a task in a row, from WORK if they are there."""
    folder = row_folder(work, row)
    path = folder / "cells" / f"{task}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    if known.get("version") == VERSIONS[task]:
        return dict(known["figures"])
    parts, truth = TASKS[task](sets)
    write_truths(task, truth, work / "truth")
    vectors = vectors_of(folder, parts, row, progress)
    start = time.perf_counter()
    figures = SCORES[task](vectors, load_truths(task, work / "truth"))
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    aside.write_text(
        json.dumps({"version": VERSIONS[task], "figures": figures, "seconds": time.perf_counter() - start}, indent=1)
    )
    os.replace(aside, path)
    return figures


def row_folder(work: Path, row: Describer) -> Path:
    """Give the folder of a row's vectors, which changes with all that decides them."""
    folder = work / f"{row.name}-{hashlib.sha256(row.key.encode()).hexdigest()[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# --- the table -----------------------------------------------------------------------------------------------------


def markdown(table: Mapping[str, Mapping[str, Figures]]) -> str:
    """Write rows × columns; the best of each column is bold."""
    values = {row: [cells.get(c.task, {}).get(c.figure) for c in COLUMNS] for row, cells in table.items()}
    best = []
    for i, column in enumerate(COLUMNS):
        there = [v[i] for v in values.values() if v[i] is not None]
        best.append((max if column.rising else min)(there) if there else None)
    lines = ["| | " + " | ".join(c.heading for c in COLUMNS) + " |", "| --- |" + " ---: |" * len(COLUMNS)]
    for row, figures in values.items():
        cells = [_shown(v, c, v == b) for v, c, b in zip(figures, COLUMNS, best)]
        lines.append(f"| {TITLES[row]} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _shown(value: float | None, column: Column, best: bool) -> str:
    if value is None:
        return "–"
    text = f"{value:.1f}" if column.rising else f"{value:.3f}"
    return f"**{text}**" if best else text


def main() -> None:
    """Fill the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=Path, required=True, help="folder that build.py filled")
    parser.add_argument("--work", type=Path, required=True, help="folder of vectors and figures")
    parser.add_argument("--run", type=Path, help="run folder of train.py, or a model name such as vitt14_open")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--tasks", nargs="+", choices=list(SCORES), default=list(SCORES))
    args = parser.parse_args()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console, table = Console(stderr=True), dict[str, dict[str, Figures]]()
    rows = {name: describer(name, args.run) for name in args.rows}
    with Progress(*columns, console=console) as progress:
        for task in args.tasks:
            for name, row in rows.items():
                figures = make_cell(task, row, args.sets, args.work, progress)
                table.setdefault(name, {})[task] = figures
                shown = ", ".join(f"{k} {v:.3f}" for k, v in figures.items())
                console.print(f"{name}, {task}: {shown}", highlight=False)
                save_table(args.work, table, rows)
    print(markdown(table))


def save_table(work: Path, table: Mapping[str, Mapping[str, Figures]], rows: Mapping[str, Describer]) -> None:
    """Write table.json and table.md."""
    folders = {name: row_folder(work, row).name for name, row in rows.items()}
    (work / "table.json").write_text(json.dumps({"rows": table, "folders": folders}, indent=1))
    (work / "table.md").write_text(markdown(table))


if __name__ == "__main__":
    try:
        main()
    except OpendinoError as error:
        raise SystemExit(f"Error: {error}") from None
