# SPDX-License-Identifier: Apache-2.0
"""`opendino eval logreg`: logistic regression on frozen cls tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro

from opendino.cli.evaluate.common import (
    Labelled,
    LabelledArgs,
    check_classes,
    labelled_features,
    open_labelled,
    pooled_embedder,
)

if TYPE_CHECKING:
    from opendino.evaluate.classification import ClassificationScores
    from opendino.evaluate.logistic import LogisticRegression
    from opendino.images.sources import ImageSource

EXAMPLE = """Score frozen features with a logistic regression on the cls token.

Example:
  opendino eval logreg --model vits14 --train photos/train --val photos/val --page mistakes.html

C, the inverse strength of the L2 penalty, is chosen on a tenth of --train (of each class), and the classifier is fitted
again on all of it: --val is only scored. The result is that of scikit-learn's LogisticRegression at this C.

--train and --val are folders with one folder of images per class, .csv files with path,label, or tar shards
or Parquet files with labels."""


@dataclass(frozen=True, kw_only=True)
class LogregArgs(LabelledArgs):
    """Arguments of `opendino eval logreg`."""

    c_values: tuple[float, ...] = ()
    """Values of C to choose from; default: 45 from 1e-6 to 1e5. A single one is taken as it is."""
    n_per_class: tuple[int, ...] = ()
    """Also score with so many training images a class, drawn at random."""
    draws: int = 5
    """Random subsets for each --n-per-class; their mean is given."""
    seed: int = 0
    """Of the held-out tenth and of the draws."""
    confusion: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also give the confusion matrix."""
    page: Path | None = None
    """HTML file with the confusion matrix, the worst classes and pictures of their mistakes."""
    save_head: Path | None = None
    """Keep the classifier as a file for opendino.heads.Logistic.load."""


def main(argv: list[str]) -> int:
    """Print the scores of a logistic regression on labelled images."""
    args = tyro.cli(LogregArgs, args=argv, prog="opendino eval logreg", description=EXAMPLE)
    result = run_logreg(args)
    if args.json:
        print(json.dumps(result))
    else:
        print_result(result)
    return 0


def run_logreg(args: LogregArgs) -> dict[str, Any]:
    """Embed both sets, choose C, fit and score; see `opendino.evaluate.logistic`."""

    sources = open_labelled(args)
    classes = check_classes(sources)
    embedder = pooled_embedder(args)
    parts = labelled_features(args, embedder, sources, classes)
    train, val = parts["train"], parts["val"]
    model, fitted, scores = _fit_and_score(args, embedder, train.last, train.labels, val, classes)
    result = scores.summary() | fitted
    result |= {
        "per_class": scores.by_class(),
        "num_train": len(train.labels),
        "num_val": len(val.labels),
        "num_classes": len(classes),
        "errors": len(train.unreadable) + len(val.unreadable),
    }
    if args.n_per_class:
        result["n_per_class"] = {str(n): _few_shot(args, embedder, train, val, classes, n) for n in args.n_per_class}
    if args.save_head:
        from opendino.heads.classifier import Logistic

        Logistic.from_model(model, classes, embedder, args.model).save(args.save_head)
        result["head"] = str(args.save_head)
    if args.confusion:
        result["confusion"] = scores.confusion.tolist()
    if args.page:
        write_mistakes(args.page, "Logistic regression", scores, sources["val"], val.paths)
        result["page"] = str(args.page)
    return result


def _fit_and_score(
    args: LogregArgs, embedder: Any, x: Any, y: Any, val: Labelled, classes: list[str]
) -> tuple[LogisticRegression, dict[str, Any], ClassificationScores]:
    from opendino.cli.embed import images_progress
    from opendino.evaluate.classification import class_scores
    from opendino.evaluate.logistic import DEFAULT_C, choose_c, fit_logistic

    values, found = args.c_values or DEFAULT_C, {}
    c = values[0]
    if len(values) > 1:
        with images_progress() as bar:
            task = bar.add_task("C", total=len(values), rate="", errors=0)
            choice = choose_c(
                x, y, values, seed=args.seed, device=embedder.device,
                on_fit=lambda done, total: bar.update(task, completed=done),
            )  # fmt: skip
        c = choice.c
        found = {"c_edge": choice.edge, "c_curve": choice.curve, "num_held_out": choice.num_held_out}
    model = fit_logistic(x, y, c, num_classes=len(classes), device=embedder.device)
    scores = class_scores(model.logits(val.last), val.labels, classes)
    return model, {"c": c, "converged": model.converged} | found, scores


def _few_shot(
    args: LogregArgs, embedder: Any, train: Labelled, val: Labelled, classes: list[str], n: int
) -> dict[str, Any]:
    from opendino.evaluate.knn import subset

    runs = []
    for draw in range(args.draws):
        keep = subset(train.labels, n, args.seed, draw)
        _, fitted, scores = _fit_and_score(args, embedder, train.last[keep], train.labels[keep], val, classes)
        runs.append(scores.summary() | {"c": fitted["c"]})
    names = ("top1", "top5", "mean_per_class")
    mean = {m: float(np.mean([r[m] for r in runs])) for m in names}
    std = {m: float(np.std([r[m] for r in runs])) for m in names}
    return {**mean, "std": std, "draws": args.draws, "c": [r["c"] for r in runs]}


def write_mistakes(page: Path, title: str, scores: ClassificationScores, source: ImageSource, names: list[str]) -> None:
    """Write the page of a classifier; `names` are those of the scored images, as `Labelled.paths` has them."""
    from opendino.report.classification import classification_page

    place = {source.name(i): i for i in range(len(source))}
    classification_page(page, title, scores, lambda i: source.read(place[names[i]]), names)


def print_result(result: dict[str, Any]) -> None:
    """Print the scores for people."""
    print(
        f"{result['num_train']} training and {result['num_val']} validation images, {result['num_classes']} classes"
        + (f", {result['errors']} unreadable images left out" if result["errors"] else "")
    )
    held_out = f", chosen on {result['num_held_out']} training images held out" if "c_curve" in result else ""
    print(f"C = {result['c']:.3g}{held_out}")
    if result.get("c_edge"):
        print(f"C is the {result['c_edge']} value of the grid: a wider grid (--c-values) may be better.")
    if not result["converged"]:
        print("The fit stopped before it converged: the figures are of the classifier as far as it got.")
    print_scores(result)


def print_scores(result: dict[str, Any]) -> None:
    """Print top-1, top-5 and mean per class, few-shot rows and the worst classes."""
    print(f"{'':>14}{'top-1 %':>10}{'top-5 %':>10}{'mean per class %':>18}")
    for name, row in (
        {"all": result} | {f"{n} per class": r for n, r in result.get("n_per_class", {}).items()}
    ).items():
        print(f"{name:>14}{row['top1']:>10.2f}{row['top5']:>10.2f}{row['mean_per_class']:>18.2f}")
    worst = sorted((share, name) for name, share in result["per_class"].items() if share is not None and share < 100)
    if worst:
        print("worst classes: " + ", ".join(f"{name} {share:.1f} %" for share, name in worst[:5]))
    if "page" in result:
        print(f"mistakes with pictures: {result['page']}")
