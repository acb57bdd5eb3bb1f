# SPDX-License-Identifier: Apache-2.0
"""`opendino eval knn`: the weighted vote of the nearest labelled images."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import tyro

from opendino.cli.evaluate.common import LabelledArgs, check_classes, labelled_features, open_labelled, pooled_embedder

EXAMPLE = """Score frozen features with a weighted k-nearest-neighbour vote (cls token, cosine similarity).

Example:
  opendino eval knn --model vits14 --train photos/train --val photos/val --k 10 20 --json

--train and --val are folders with one folder of images per class, .csv files with path,label, tar shards or
Parquet files with labels, or ROOT:SPLIT of a named data set, such as food-101:test (docs/datasets.md)."""


@dataclass(frozen=True, kw_only=True)
class KnnArgs(LabelledArgs):
    """Arguments of `opendino eval knn`."""

    k: tuple[int, ...] = (10, 20, 100, 200)
    """Numbers of neighbours."""
    temperature: float = 0.07
    """Of the softmax over similarities."""
    n_per_class: tuple[int, ...] = ()
    """Also score with so many training images a class, drawn at random."""
    draws: int = 5
    """Random subsets for each --n-per-class; their mean is given."""
    seed: int = 0
    """Of the draws."""


def main(argv: list[str]) -> int:
    """Print the k-NN scores of a model on labelled images."""
    args = tyro.cli(KnnArgs, args=argv, prog="opendino eval knn", description=EXAMPLE)
    result = run_knn(args)
    if args.json:
        print(json.dumps(result))
    else:
        print_table(result)
    return 0


def run_knn(args: KnnArgs) -> dict[str, Any]:
    """Embed both sets and score them; see `opendino.evaluate.knn.knn_accuracy` for the figures."""
    from opendino.evaluate.knn import few_shot_accuracy, knn_accuracy

    sources = open_labelled(args)
    classes = check_classes(sources)
    embedder = pooled_embedder(args)
    parts = labelled_features(args, embedder, sources, classes)
    train, val = parts["train"], parts["val"]
    given = (train.last, train.labels, val.last, val.labels)
    settings: dict[str, Any] = {"k": args.k, "temperature": args.temperature, "device": embedder.device}
    result: dict[str, Any] = dict(knn_accuracy(*given, **settings))
    errors = len(train.unreadable) + len(val.unreadable)
    result |= {
        "num_train": len(train.labels),
        "num_val": len(val.labels),
        "num_classes": len(classes),
        "errors": errors,
    }
    if max(args.k) > len(train.labels):
        result["k_used"] = {str(k): min(k, len(train.labels)) for k in args.k}
    if args.n_per_class:
        result["n_per_class"] = {
            str(n): few_shot_accuracy(*given, n, draws=args.draws, seed=args.seed, **settings) for n in args.n_per_class
        }
    return result


def print_table(result: dict[str, Any]) -> None:
    """Print the scores for people."""
    print(
        f"{result['num_train']} training and {result['num_val']} validation images, {result['num_classes']} classes"
        + (f", {result['errors']} unreadable images left out" if result["errors"] else "")
    )
    print(f"{'':>14}{'k':>6}{'top-1 %':>10}{'top-5 %':>10}{'mean per class %':>18}")
    rows = {"all": result} | {f"{n} per class": r for n, r in result.get("n_per_class", {}).items()}
    for name, scores in rows.items():
        for k in scores["top1"]:
            top1, top5, mean = (scores[m][k] for m in ("top1", "top5", "mean_per_class"))
            print(f"{name:>14}{k:>6}{top1:>10.2f}{top5:>10.2f}{mean:>18.2f}")
