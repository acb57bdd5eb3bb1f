# SPDX-License-Identifier: Apache-2.0
"""`opendino eval robustness`: a trained classifier on other test sets."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro

from opendino.cli.evaluate.applying import CHUNK, Classifier, ClassifierArgs, open_classifier
from opendino.cli.evaluate.common import image_features, pooled_embedder
from opendino.errors import ConfigError, DataError

if TYPE_CHECKING:
    from opendino.embed.embedder import Embedder
    from opendino.evaluate.datasets.robustness_sets import LabelledSet

EXAMPLE = """Apply a trained classifier to other test sets.

Example:
  opendino eval robustness --model vits14 --train imagenet/train --imagenet-val imagenet/val --v2 imagenetv2 \\
      --a imagenet-a --r imagenet-r --sketch sketch --c imagenet-c --json
  opendino eval robustness --model run --head head.safetensors --test night=night/ --test rain=rain/

Sets that are not given are not in the table. Every set has one folder of images per class, named as the classifier's
classes; ImageNet-V2's folders are class indices."""


@dataclass(frozen=True, kw_only=True)
class RobustnessArgs(ClassifierArgs):
    """Arguments of `opendino eval robustness`."""

    imagenet_val: Path | None = None
    """Validation images of the training set itself; with class folders they are the first row."""
    v2: Path | None = None
    """ImageNet-V2: folders 0 to 999."""
    real: Path | None = None
    """ImageNet-ReaL: real.json with several labels per image of --imagenet-val."""
    a: Path | None = None
    """ImageNet-A: predictions among its own classes."""
    r: Path | None = None
    """ImageNet-R: predictions among its own classes."""
    sketch: Path | None = None
    """ImageNet-Sketch."""
    c: Path | None = None
    """ImageNet-C: CORRUPTION/SEVERITY/CLASS."""
    test: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=DIR, a set of your own; may be given several times."""
    restrict: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """In sets given with --test, predict only among the set's own classes."""
    known_only: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Leave out classes that the classifier does not know, and count them, instead of stopping."""


def main(argv: list[str]) -> int:
    """Print the scores of a classifier on other test sets."""
    args = tyro.cli(RobustnessArgs, args=argv, prog="opendino eval robustness", description=EXAMPLE)
    result = run_robustness(args)
    if args.json:
        print(json.dumps(result))
    else:
        print_table(result)
    return 0


def run_robustness(args: RobustnessArgs) -> dict[str, Any]:
    """Score the classifier on every set that is given.

    Returns:
        "sets": name → top1, top5 (None with fewer than 6 classes to choose from), top1_all_classes, num_images,
        classes_to_choose, left_out, unreadable; "corruptions": see `opendino.evaluate.robustness.corruption_error`;
        "classifier", "num_classes".
    """
    wanted = _wanted(args)
    embedder = pooled_embedder(args)
    classifier = open_classifier(args, embedder)
    opened = {name: open_set(classifier.names) for name, open_set in wanted.items()}
    corrupted = _open_corrupted(args, classifier)
    result: dict[str, Any] = {"classifier": classifier.origin, "num_classes": len(classifier.names)}
    result["sets"] = {name: _score(args, embedder, classifier, found, name) for name, found in opened.items()}
    if corrupted:
        result["corruptions"] = _score_corrupted(args, embedder, classifier, corrupted)
    unreadable = sum(row["unreadable"] for row in result["sets"].values())
    unreadable += result.get("corruptions", {}).get("unreadable", 0)
    if args.max_errors is not None and unreadable > args.max_errors:
        raise DataError(f"{unreadable} images cannot be read, more than --max-errors {args.max_errors}.")
    return result


def _wanted(args: RobustnessArgs) -> dict[str, Callable[[Sequence[str]], LabelledSet]]:
    """Give for each set how it is opened; mistakes of the command line are found before anything is computed."""
    from opendino.evaluate.datasets.robustness_sets import open_indexed, open_named, open_real
    from opendino.images.sources import open_source

    known = args.known_only
    sets: dict[str, Callable[[Sequence[str]], LabelledSet]] = {}
    if args.real is not None and args.imagenet_val is None:
        raise ConfigError("--real needs the images it is about: give --imagenet-val as well.")
    if args.imagenet_val is not None:
        val = args.imagenet_val
        if open_source(val).classes:
            sets["val"] = lambda classes: open_named(val, classes, known_only=known)
        elif args.real is None:
            raise DataError(f"--imagenet-val {val} has no class folders; without --real there is nothing to score.")
        if args.real is not None:
            real = args.real
            sets["ReaL"] = lambda classes: open_real(val, real, classes)
    if args.v2 is not None:
        v2 = args.v2
        sets["V2"] = lambda classes: open_indexed(v2, classes)
    own = dict(_name_and_path(text) for text in args.test)
    if len(own) < len(args.test) or set(own) & (set(sets) | {"A", "R", "Sketch"}):
        raise ConfigError("Two sets have the same name; give each --test another one, and none that ImageNet's have.")
    named = [("A", args.a, True), ("R", args.r, True), ("Sketch", args.sketch, False)]
    named += [(name, path, args.restrict) for name, path in own.items()]
    for name, path, restricted in named:
        if path is not None:
            sets[name] = lambda classes, path=path, restricted=restricted: open_named(  # type: ignore[misc]
                path, classes, restricted=restricted, known_only=known
            )
    if not sets and args.c is None:
        raise ConfigError(
            "No test set is given. Give --imagenet-val, --v2, --a, --r, --sketch, --c or --test NAME=DIR."
        )
    return sets


def _name_and_path(text: str) -> tuple[str, Path]:
    name, _, path = text.partition("=")
    if not name or not path:
        raise ConfigError(f"--test is {text!r}; give NAME=DIR, such as night=photos/night.")
    return name, Path(path)


def _score(
    args: RobustnessArgs, embedder: Embedder, classifier: Classifier, found: LabelledSet, name: str
) -> dict[str, Any]:
    from opendino.cli.embed import images_progress
    from opendino.evaluate.robustness import best_ranks, topk

    with images_progress() as bar:
        features = image_features(args, embedder, found.source, bar, name)
    labels = [found.labels[i] for i in features.index]
    ranks, all_ranks = [], []
    for start in range(0, len(labels), CHUNK):
        part = slice(start, start + CHUNK)
        scores = classifier.scores(features.cls[part], features.mean[part])
        ranks.append(best_ranks(scores, labels[part], found.allowed))
        all_ranks.append(best_ranks(scores, labels[part]) if found.allowed is not None else ranks[-1])
    whole, choose = np.concatenate(ranks), len(classifier.names) if found.allowed is None else len(found.allowed)
    return {
        "top1": topk(whole, 1),
        "top5": topk(whole, 5) if choose > 5 else None,
        "top1_all_classes": topk(np.concatenate(all_ranks), 1),
        "num_images": len(whole),
        "classes_to_choose": choose,
        "left_out": found.left_out,
        "unreadable": len(features.unreadable),
    }


def _open_corrupted(args: RobustnessArgs, classifier: Classifier) -> dict[str, dict[int, LabelledSet]]:
    from opendino.evaluate.datasets.robustness_sets import corruption_folders, open_named

    if args.c is None:
        return {}
    return {
        name: {level: open_named(path, classifier.names, known_only=args.known_only) for level, path in levels.items()}
        for name, levels in corruption_folders(args.c).items()
    }


def _score_corrupted(
    args: RobustnessArgs, embedder: Embedder, classifier: Classifier, sets: dict[str, dict[int, LabelledSet]]
) -> dict[str, Any]:
    from opendino.evaluate.robustness import corruption_error

    rows = {
        name: {level: _score(args, embedder, classifier, found, f"{name} {level}") for level, found in levels.items()}
        for name, levels in sets.items()
    }
    errors = {name: {level: 100 - row["top1"] for level, row in levels.items()} for name, levels in rows.items()}
    every = [row for levels in rows.values() for row in levels.values()]
    result = corruption_error(errors) | {
        "num_images": sum(row["num_images"] for row in every),
        "unreadable": sum(row["unreadable"] for row in every),
        "left_out": sum(sum(row["left_out"].values()) for row in every),
    }
    if len(classifier.names) != 1000:
        result["note"] = (
            f"CE and mCE divide by AlexNet's errors among 1000 classes; this classifier has {len(classifier.names)}: "
            "they compare with nothing published. The mean error is in order."
        )
    return result


def print_table(result: dict[str, Any]) -> None:
    """Print the scores for people."""
    print(f"{result['classifier']}, {result['num_classes']} classes")
    if result["sets"]:
        print(f"{'set':>14}{'images':>9}{'choices':>9}{'top-1 %':>10}{'top-5 %':>10}{'all classes %':>15}")
    for name, row in result["sets"].items():
        top5 = "–" if row["top5"] is None else f"{row['top5']:.2f}"
        print(
            f"{name:>14}{row['num_images']:>9}{row['classes_to_choose']:>9}{row['top1']:>10.2f}{top5:>10}"
            f"{row['top1_all_classes']:>15.2f}" + _left_out(row)
        )
    corrupted = result.get("corruptions")
    if corrupted:
        print(f"{'corruption':>20}{'error %':>10}{'CE %':>10}")
        for name, row in corrupted["corruptions"].items():
            print(f"{name:>20}{row['error']:>10.2f}{_or_dash(row['ce']):>10}")
        print(f"{'mean':>20}{corrupted['mean_error']:>10.2f}{_or_dash(corrupted['mce']):>10}")
        if corrupted["missing"]:
            print(f"No mCE: {len(corrupted['missing'])} of 75 corruptions and severities are missing.")
        print(*[corrupted["note"]] * ("note" in corrupted), end="\n" * ("note" in corrupted))


def _or_dash(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _left_out(row: dict[str, Any]) -> str:
    parts = [f"{count} left out ({why})" for why, count in row["left_out"].items()]
    parts += [f"{row['unreadable']} unreadable"] * (row["unreadable"] > 0)
    return "  " + ", ".join(parts) if parts else ""
