# SPDX-License-Identifier: Apache-2.0
"""The figures of table.py once more, from the saved vectors alone, by scikit-learn, torchmetrics, scipy and loops.

    python benchmarks/real_sets/check.py --work WORK

Nothing of opendino is imported. Every figure must agree to 1e-6 (percent, or metres), except Fashion-MNIST,
whose votes are taken in single precision, where another order of sums may turn a close one: two images of 10 000.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize
from sklearn.linear_model import Ridge
from sklearn.metrics import balanced_accuracy_score, mean_absolute_percentage_error, root_mean_squared_error
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import LabelBinarizer, StandardScaler, normalize

K, TEMPERATURE, C, RIDGE, RARE = 20, 0.07, 10.0, 1e-4, 1e-4
NEAREST, FARTHEST, IGNORE = 0.3, 10.0, 255
EXACT = 1e-6
TURNED = 2  # images of Fashion-MNIST whose close vote may turn
Array = np.ndarray[Any, Any]
Checked = dict[str, tuple[float, float]]
"""Figure → (value, how far table.py may be from it)."""


# --- vectors of images ---------------------------------------------------------------------------------------------


def check_emoji(x: Mapping[str, Array], truth: Mapping[str, Any]) -> Checked:
    """k-NN, logistic regression and retrieval of emoji."""
    task = truth["emoji"]
    split, label = np.array(task["split"]), np.array(task["label"])
    train, test = split == "train", split == "test"
    vectors = normalize(x["emoji"].astype(np.float64))
    given = vectors[train], label[train], vectors[test]
    guess, fitted = vote(*given), logistic(*given)
    figures = {
        "knn": (100 * balanced_accuracy_score(label[test], guess), EXACT),
        "knn_top1": (100 * float((guess == label[test]).mean()), EXACT),
        "logistic": (100 * balanced_accuracy_score(label[test], fitted), EXACT),
    }
    rows = [q["row"] for q in task["queries"]]
    return figures | mean_precisions(vectors[rows], vectors, task["queries"])


def check_fashion(x: Mapping[str, Array], truth: Mapping[str, Any]) -> Checked:
    """k-NN of Fashion-MNIST."""
    train, test = (normalize(x[f"fashion_{s}"].astype(np.float32)) for s in ("train", "test"))
    right = vote(train, truth["fashion_train"], test) == truth["fashion_test"]
    return {"knn": (100 * float(right.mean()), 100 * TURNED / len(test))}


def check_room_retrieval(x: Mapping[str, Array], truth: Mapping[str, Any]) -> Checked:
    """Retrieval of furniture."""
    queries, gallery = (x[f"room_{n}"].astype(np.float64) for n in ("queries", "gallery"))
    return mean_precisions(queries, gallery, truth["room_retrieval"]["queries"])


def vote(train: Array, labels: Array, test: Array) -> Array:
    """Give the class of each test item by the weighted vote of its nearest training items."""
    distance, index = NearestNeighbors(n_neighbors=K, metric="cosine", algorithm="brute").fit(train).kneighbors(test)
    guesses = []
    for row, neighbours in zip(distance.astype(np.float64), labels[index]):
        weights = np.exp((1 - row) / TEMPERATURE - 1 / TEMPERATURE)
        guesses.append(np.bincount(neighbours, weights).argmax())
    return np.array(guesses)


def logistic(train: Array, labels: Array, test: Array) -> Array:
    """Fit a multinomial logistic regression by L-BFGS on its loss as written, and classify the test items."""
    classes, (n, width) = np.unique(labels), train.shape
    target = LabelBinarizer().fit_transform(labels)

    def loss(flat: Array) -> tuple[float, Array]:
        weight, bias = flat[: -len(classes)].reshape(width, -1), flat[-len(classes) :]
        scores = train @ weight + bias
        scores -= scores.max(1, keepdims=True)
        logs = scores - np.log(np.exp(scores).sum(1, keepdims=True))
        slope = np.exp(logs) - target
        value = -C * (logs * target).sum() + (weight**2).sum() / 2
        return value / n, np.concatenate([(C * train.T @ slope + weight).ravel(), C * slope.sum(0)]) / n

    start = np.zeros((width + 1) * len(classes))
    best = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 5000, "ftol": 1e-14, "gtol": 1e-8}).x
    return classes[(test @ best[: -len(classes)].reshape(width, -1) + best[-len(classes) :]).argmax(1)]


def mean_precisions(queries: Array, gallery: Array, lists: list[dict[str, Any]]) -> Checked:
    """Walk down every ranking, item by item."""
    sums: dict[str, list[float]] = {"easy": [], "medium": [], "hard": []}
    for similar, query in zip(cosine_similarity(queries, gallery), lists):
        order = np.argsort(-similar, kind="stable").tolist()
        easy, hard, junk = (set(query[k]) for k in ("easy", "hard", "junk"))
        for level, wanted, passed in (
            ("easy", easy, junk | hard), ("medium", easy | hard, junk), ("hard", hard, junk | easy),
        ):  # fmt: skip
            if wanted:
                sums[level].append(walk(order, wanted, passed))
    return {f"map_{level}": (100 * float(np.mean(v)), EXACT) for level, v in sums.items()}


def walk(order: list[int], wanted: set[int], passed: set[int]) -> float:
    """Give average precision: the mean of the precision before and after each item that is found."""
    seen = found = 0
    area = 0.0
    for item in order:
        if item in passed:
            continue
        if item in wanted:
            before = found / seen if seen else 1.0
            area += (before + (found + 1) / (seen + 1)) / 2
            found += 1
        seen += 1
    return area / len(wanted)


# --- vectors of patches --------------------------------------------------------------------------------------------


def check_cutouts(x: Mapping[str, Array], truth: Mapping[str, Any]) -> Checked:
    """Linear segmentation of cut-outs, scored by torchmetrics."""
    import torch
    from torchmetrics.classification import MulticlassConfusionMatrix

    num, grid = len(truth["cutouts_classes"]), x["cutouts_train"].shape[1]
    patches = in_patches(truth["cutouts_train"], grid)
    shares = np.stack([np.mean(patches == c, axis=1) for c in range(num)], 1)
    weights = 1 / np.sqrt(np.maximum(shares.mean(0), RARE))
    predict = ridge(x["cutouts_train"], shares * weights)
    metric = MulticlassConfusionMatrix(num, ignore_index=IGNORE)
    masks = truth["cutouts_val"]
    for tokens, mask in zip(x["cutouts_val"], masks):
        guess = bilinear(predict(tokens), mask.shape[0]).argmax(-1)
        metric.update(torch.from_numpy(guess)[None], torch.from_numpy(mask.astype(np.int64))[None])
    matrix = metric.compute().numpy().astype(np.float64)  # its own Jaccard index would be in single precision
    union = matrix.sum(0) + matrix.sum(1) - np.diag(matrix)
    return {"miou": (100 * float(np.mean(np.diag(matrix)[union > 0] / union[union > 0])), EXACT)}


def check_rooms(x: Mapping[str, Array], truth: Mapping[str, Any]) -> Checked:
    """Linear depth of rooms, scored by scikit-learn."""
    grid = x["rooms_train"].shape[1]
    patches = in_patches(truth["rooms_train"], grid) / 1000
    known = (patches > 0).sum(1)
    predict = ridge(x["rooms_train"], patches.sum(1)[known > 0] / known[known > 0], known > 0)
    figures: Checked = {}
    for prefix, name in (("", "rooms_val"), ("second_", "rooms_second")):
        errors = list(depth_errors(predict, x[name], truth[name]))
        for i, figure in enumerate(("rmse", "abs_rel", "d1")):
            value = float(np.mean([e[i] for e in errors]))
            figures[prefix + figure] = (value, EXACT)
    return figures


def depth_errors(predict: Callable[[Array], Array], tokens: Array, depths: Array) -> Iterator[tuple[float, ...]]:
    """Iterate over RMSE, relative error and the share within 1.25 of the images."""
    for row, millimetres in zip(tokens, depths):
        guess = np.clip(bilinear(predict(row), len(millimetres))[..., 0], NEAREST, FARTHEST)
        true, guess = millimetres[millimetres > 0] / 1000, guess[millimetres > 0]
        within = np.maximum(true / guess, guess / true) < 1.25
        yield root_mean_squared_error(true, guess), mean_absolute_percentage_error(true, guess), 100 * within.mean()


def ridge(tokens: Array, target: Array, keep: Array | None = None) -> Callable[[Array], Array]:
    """Fit scikit-learn's ridge regression to standardised tokens; give a function from (g, g, D) to (g, g, T)."""
    rows = np.concatenate([with_surroundings(t) for t in tokens])
    rows = rows if keep is None else rows[keep]
    scaler = StandardScaler(copy=False).fit(rows)
    fitted = Ridge(alpha=RIDGE * len(rows), solver="cholesky", copy_X=False).fit(scaler.transform(rows), target.copy())

    def predict(grid: Array) -> Array:
        flat = scaler.transform(with_surroundings(grid))
        return fitted.predict(flat).reshape(*grid.shape[:2], -1)

    return predict


def with_surroundings(grid: Array) -> Array:
    """Give each patch of an image (g, g, D) as a row: its vector, the mean of all, and powers of where it is."""
    side, width = len(grid), grid.shape[-1]
    rows = np.zeros((side * side, 2 * width + 6))
    rows[:, :width] = grid.reshape(-1, width)
    rows[:, width:-6] = rows[:, :width].mean(0)
    for i in range(side * side):
        y, x = i // side / side - 0.5, i % side / side - 0.5
        rows[i, -6:] = y, x, y**2, x**2, x * y, y**3
    return rows


def in_patches(planes: Array, grid: int) -> Array:
    """Give the pixels of each patch in a row: (n·g·g, pixels)."""
    step = planes.shape[1] // grid
    rows = [planes[:, i * step : (i + 1) * step, j * step : (j + 1) * step] for i in range(grid) for j in range(grid)]
    return np.stack([r.reshape(len(planes), -1) for r in rows], 1).reshape(-1, step * step)


def bilinear(grid: Array, side: int) -> Array:
    """Enlarge (g, g, T) to (s, s, T), linear between the middles of cells and constant beyond the outer ones."""
    place = np.clip((np.arange(side) + 0.5) * len(grid) / side - 0.5, 0, len(grid) - 1)
    low = np.floor(place).astype(int)
    high, part = np.minimum(low + 1, len(grid) - 1), place - low
    weights = np.zeros((side, len(grid)))
    np.add.at(weights, (np.arange(side), low), 1 - part)
    np.add.at(weights, (np.arange(side), high), part)
    return np.einsum("si,tj,ijc->stc", weights, weights, grid, optimize=True)


# --- comparison ----------------------------------------------------------------------------------------------------

CHECKS = {
    "emoji": check_emoji,
    "fashion": check_fashion,
    "room_retrieval": check_room_retrieval,
    "cutouts": check_cutouts,
    "rooms": check_rooms,
}


def check_cell(row: Path, truth: Path, task: str) -> list[str]:
    """Compare one cell; give a line for each figure that differs by more than it may."""
    told = json.loads((row / "cells" / f"{task}.json").read_text())["figures"]
    vectors = {p.stem: np.load(p, mmap_mode="r") for p in row.glob("*.npy")}
    right = {p.stem: np.load(p) if p.suffix == ".npy" else json.loads(p.read_text()) for p in (truth / task).iterdir()}
    wrong = []
    for figure, (value, allowed) in CHECKS[task](vectors, right).items():
        difference = abs(value - told[figure])
        line = f"{row.name} {task} {figure}: {told[figure]:.8f}, here {value:.8f}, {difference:.1e} of {allowed:.1e}"
        print(line, flush=True)
        if not difference <= allowed:
            wrong.append(line)
    return wrong


def main() -> None:
    """Check every cell that is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder that table.py filled")
    parser.add_argument("--tasks", nargs="+", choices=list(CHECKS), default=list(CHECKS))
    args = parser.parse_args()
    cells = [p for p in sorted(args.work.glob("*/cells/*.json")) if p.stem in args.tasks]
    wrong = [line for p in cells for line in check_cell(p.parent.parent, args.work / "truth", p.stem)]
    print(f"{len(cells)} cells, {len(wrong)} figures differ")
    sys.exit(f"Error: {len(wrong)} figures differ:\n" + "\n".join(wrong) if wrong or not cells else 0)


if __name__ == "__main__":
    main()
