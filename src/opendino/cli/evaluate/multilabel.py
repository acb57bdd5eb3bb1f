# SPDX-License-Identifier: Apache-2.0
"""`opendino eval multilabel`: images of several classes, one-vs-rest logistic regression, mean average precision."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tyro

from opendino.cli.evaluate.common import BackboneArgs, Readable, image_features, pooled_embedder
from opendino.errors import ConfigError, DataError

if TYPE_CHECKING:
    from opendino.evaluate.datasets.multilabel import MultiLabelSource, Targets
    from opendino.evaluate.multilabel import OneVsRest

EXAMPLE = """Score frozen features on images that have several classes each, such as Pascal VOC 2007.

Example:
  opendino eval multilabel --model vits14 --data VOCdevkit/VOC2007

One logistic regression a class is fitted on the cls token. C, the inverse strength of their L2 penalty, is one for all
classes, chosen by mean average precision on a tenth of the training images; the classifiers are fitted again on all of
them, and --val is only scored. Images that a class has as difficult do not count for it.

--train and --val are .csv files with path,labels, the classes of an image separated by |, such as a.jpg,cat|sofa."""


@dataclass(frozen=True, kw_only=True)
class MultilabelArgs(BackboneArgs):
    """Arguments of `opendino eval multilabel`."""

    data: Path | None = None
    """Pascal VOC 2007 as it unpacks; instead of --train and --val."""
    train_split: str = "trainval"
    """Split of --data that is learned from."""
    val_split: str = "test"
    """Split of --data that is scored."""
    train: Path | None = None
    """Table to learn from: .csv with path,labels."""
    val: Path | None = None
    """Table that is scored."""
    c_values: tuple[float, ...] = ()
    """Values of C to choose from; default: 12 from 1e-6 to 1e5. A single one is taken as it is."""
    seed: int = 0
    """Of the held-out tenth."""


def main(argv: list[str]) -> int:
    """Print the average precision of each class."""
    args = tyro.cli(MultilabelArgs, args=argv, prog="opendino eval multilabel", description=EXAMPLE)
    result = run_multilabel(args)
    if args.json:
        print(json.dumps(result))
    else:
        print_result(result)
    return 0


def run_multilabel(args: MultilabelArgs) -> dict[str, Any]:
    """Embed both sets, choose C, fit and score; see `opendino.evaluate.multilabel`."""
    from opendino.cli.embed import images_progress
    from opendino.evaluate.multilabel import multilabel_scores

    sources = open_sources(args)
    classes = check_sources(sources)
    embedder = pooled_embedder(args)
    with images_progress() as bar:
        parts = {name: image_features(args, embedder, source, bar, name) for name, source in sources.items()}
    errors = sum(len(part.unreadable) for part in parts.values())
    if args.max_errors is not None and errors > args.max_errors:
        raise DataError(f"{errors} images cannot be read, more than --max-errors {args.max_errors}.")
    targets = {name: source.targets_for(classes)[parts[name].index] for name, source in sources.items()}
    check_learnable(targets, classes)
    model, fitted = _fit(args, embedder.device, parts["train"], targets["train"])
    scored = [c for i, c in enumerate(classes) if model.fitted[i]]
    scores = multilabel_scores(
        model.logits(_last(parts["val"]))[:, model.fitted.tolist()], targets["val"][:, model.fitted], scored
    )
    return {
        "map_11_point": scores.map_eleven_point,
        "map": scores.map_area,
        "per_class": {
            c: {"ap_11_point": scores.eleven_point[c], "ap": scores.area[c], "positives": scores.positives[c]}
            for c in scored
        },
        "left_out": dict.fromkeys(scores.left_out, "no image that is scored has it")
        | {c: "all training images are alike in it" for c in classes if c not in scored},
        "difficult": {name: int((own == 0).sum()) for name, own in targets.items()},
        **fitted,
        "num_train": len(targets["train"]),
        "num_val": len(targets["val"]),
        "num_classes": len(classes),
        "errors": errors,
    }


def open_sources(args: MultilabelArgs) -> dict[str, MultiLabelSource]:
    """Open what is learned from and what is scored, as "train" and "val".

    Raises:
        ConfigError: when neither --data nor both of --train and --val are given.
        DataError: when they cannot be opened.
    """
    from opendino.evaluate.datasets.detect import open_multilabel

    if args.data is not None and args.train is None and args.val is None:
        splits = {"train": args.train_split, "val": args.val_split}
        return {name: open_multilabel(args.data, split) for name, split in splits.items()}
    if args.data is not None or args.train is None or args.val is None:
        raise ConfigError(
            "Images of several classes are missing: give --data with Pascal VOC 2007, or --train and --val, a .csv "
            "each with the columns path and labels (cat|sofa)."
        )
    return {"train": open_multilabel(args.train, args.train_split), "val": open_multilabel(args.val, args.val_split)}


def check_sources(sources: dict[str, MultiLabelSource]) -> list[str]:
    """Give the classes of "train", after seeing that "val" has no other.

    Raises:
        DataError: for a class that only "val" has.
    """
    known = sources["train"].classes
    missing = sorted(set(sources["val"].classes) - set(known))
    if missing:
        raise DataError(
            f"{len(missing)} classes of --val are not in --train: {', '.join(missing[:10])}. They cannot be predicted: "
            "add training images or remove them."
        )
    return list(known)


def check_learnable(targets: dict[str, Targets], classes: list[str]) -> None:
    """See that what can be scored can be learned from the images that can be read.

    Raises:
        DataError: for a class that is scored and that no training image has, or when all training images are alike.
    """
    from opendino.evaluate.multilabel import learnable

    if not learnable(targets["train"]).any():
        raise DataError("Every training image has the same classes, so there is nothing to learn. Add other images.")
    found = {name: (own > 0).sum(0) for name, own in targets.items()}
    unlearned = [c for i, c in enumerate(classes) if found["val"][i] and not found["train"][i]]
    if unlearned:
        raise DataError(
            f"No training image that can be read has {', '.join(unlearned[:10])} ({len(unlearned)} classes of the "
            "images that are scored). Add training images or remove these classes."
        )


def _last(part: Readable) -> Any:
    return part.cls[:, -1]


def _fit(args: MultilabelArgs, device: Any, part: Readable, targets: Targets) -> tuple[OneVsRest, dict[str, Any]]:
    from opendino.cli.embed import images_progress
    from opendino.evaluate.multilabel import SHORT_C, choose_c, fit_one_vs_rest

    values, found = args.c_values or SHORT_C, {}
    c, x = values[0], np.ascontiguousarray(_last(part))
    with images_progress() as bar:

        def told(name: str) -> Any:
            task = bar.add_task(name, total=targets.shape[1], rate="", errors=0)
            return lambda done, total: bar.update(task, completed=done, total=total)

        if len(values) > 1:
            choice = choose_c(x, targets, values, seed=args.seed, device=device, on_fit=told("C"))
            c = choice.c
            found = {"c_edge": choice.edge, "c_curve": choice.curve, "num_held_out": choice.num_held_out}
        model = fit_one_vs_rest(x, targets, c, device=device, on_fit=told("fit"))
    return model, {"c": c, "converged": model.converged} | found


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
        print("A fit stopped before it converged: the figures are of the classifiers as far as they got.")
    if any(result["difficult"].values()):
        train, val = result["difficult"]["train"], result["difficult"]["val"]
        print(f"difficult, not counted: {train} pairs of image and class for training, {val} for validation")
    rows = {c: row for c, row in result["per_class"].items() if row["ap"] is not None}
    wide = max(len("mean"), *map(len, rows)) + 2
    print(f"{'':>{wide}}{'images':>8}{'AP % (11-point)':>18}{'AP % (area)':>14}")
    for name, row in rows.items():
        print(f"{name:>{wide}}{row['positives']:>8}{row['ap_11_point']:>18.2f}{row['ap']:>14.2f}")
    print(f"{'mean':>{wide}}{'':>8}{result['map_11_point']:>18.2f}{result['map']:>14.2f}")
    for name, why in result["left_out"].items():
        print(f"left out of the mean: {name} ({why})")
