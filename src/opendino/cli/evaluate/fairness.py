# SPDX-License-Identifier: Apache-2.0
"""`opendino eval fairness`: accuracy by group and the gaps between groups."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from opendino.cli.evaluate.applying import CHUNK, ClassifierArgs, open_classifier
from opendino.cli.evaluate.common import image_features, pooled_embedder
from opendino.cli.evaluate.grouped_table import Table, read_table, right_classes
from opendino.errors import ConfigError, DataError

EXAMPLE = """Score a classifier by group: region, income, camera, or whatever columns a table has.

Example:
  opendino eval fairness --model vits14 --train imagenet/train --csv dollarstreet --out fairness
  opendino eval fairness --model run --head head.safetensors --csv homes.csv --groups region income --bins income=3
  opendino eval fairness --csv predicted.csv --groups region --json

The table has a column image (or path, counted from the table's folder), label (several with | between them) and the
group columns. A column prediction (best first, | between them) makes a model needless. The Dollar Street data set is
read as it is: its folder, or one of its tables."""


@dataclass(frozen=True, kw_only=True)
class FairnessArgs(ClassifierArgs):
    """Arguments of `opendino eval fairness`."""

    model: str = ""
    """Model name, weight file, transformers folder or run folder; not needed where predictions are in the table."""
    csv: Path
    """Table of the images, or the folder of Dollar Street."""
    groups: tuple[str, ...] = ()
    """Group columns; default for Dollar Street: region.id and income."""
    bins: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """COLUMN=EDGES for a column of numbers, such as income=200,2000; or COLUMN=3 for three buckets of about as many
    images each."""
    cross: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also all combinations of the group columns."""
    label: str = "label"
    """Column of the right classes."""
    k: int | None = None
    """An image is right when one of the k best classes is; default 1, for Dollar Street 5."""
    draws: int = 1000
    """Of the bootstrap."""
    confidence: float = 95.0
    """Of the intervals, percent."""
    min_images: int = 20
    """Smaller groups are flagged and left out of the gap."""
    seed: int = 0
    """Of the bootstrap."""
    known_only: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Leave out images of which the classifier knows no class, and count them, instead of stopping."""
    out: Path | None = None
    """Folder for fairness.html, fairness.json and predictions.csv."""


def main(argv: list[str]) -> int:
    """Print accuracy by group."""
    args = tyro.cli(FairnessArgs, args=argv, prog="opendino eval fairness", description=EXAMPLE)
    result = run_fairness(args)
    if args.json:
        print(json.dumps(result))
    else:
        print_table(result)
    return 0


def run_fairness(args: FairnessArgs) -> dict[str, Any]:
    """Score by group.

    Returns:
        "columns": name → see `opendino.evaluate.fairness.group_accuracy`; "model", "k", "num_images", "left_out"
        by reason, "classifier", "confidence".
    """
    table = read_table(args.csv, args.label, args.groups, args.bins)
    k = args.k or (5 if table.dollar_street else 1)
    scored = _from_predictions(table, k) if table.predictions is not None else _from_model(args, table, k)
    result = _by_group(args, table, k, *scored)
    if args.out is not None:
        from opendino.report.fairness import write_fairness

        args.out.mkdir(parents=True, exist_ok=True)
        _write_text(args.out / "fairness.json", json.dumps(result, indent=2) + "\n")
        _write_predictions(args.out / "predictions.csv", table, scored)
        write_fairness(args.out / "fairness.html", result)
    return result


Scored = tuple[list[int], list[bool], list[str], dict[str, int], str]
"""Rows of the table that were scored, whether each is right, its predictions, rows left out by reason, classifier."""


def _from_predictions(table: Table, k: int) -> Scored:
    assert table.predictions is not None
    named = [i for i, row in enumerate(table.predictions) if row]
    if k > 1 and max((len(table.predictions[i]) for i in named), default=0) < 2:
        raise ConfigError(f"--k is {k}, but the column prediction holds one class per image. Give --k 1.")
    right = [bool(set(table.predictions[i][:k]) & set(table.labels[i])) for i in named]
    left = {"no prediction": len(table.predictions) - len(named)}
    return named, right, ["|".join(table.predictions[i]) for i in named], left, "Predictions from the table"


def _from_model(args: FairnessArgs, table: Table, k: int) -> Scored:
    from opendino.cli.embed import images_progress
    from opendino.evaluate.robustness import best_ranks
    from opendino.images.sources import FileSource

    if not args.model:
        raise ConfigError(f"{table.path} has no column prediction, so --model and --head or --train are needed.")
    embedder = pooled_embedder(args)
    classifier = open_classifier(args, embedder)
    right_of, unknown = right_classes(table, classifier.names, args.known_only)
    rows = sorted(right_of)
    source = FileSource(str(table.path), str(table.folder), [table.images[i] for i in rows], [None] * len(rows))
    with images_progress() as bar:
        features = image_features(args, embedder, source, bar, "images")
    if args.max_errors is not None and len(features.unreadable) > args.max_errors:
        raise DataError(f"{len(features.unreadable)} images cannot be read, more than --max-errors {args.max_errors}.")
    kept = [rows[i] for i in features.index]
    right: list[bool] = []
    predicted: list[str] = []
    for start in range(0, len(kept), CHUNK):
        part = slice(start, start + CHUNK)
        scores = classifier.scores(features.cls[part], features.mean[part])
        right += (best_ranks(scores, [right_of[i] for i in kept[part]]) < k).tolist()
        best = np.argsort(-scores, axis=1, kind="stable")[:, : max(k, 5)]
        predicted += ["|".join(classifier.names[c] for c in row) for row in best]
    left = {"no class that the classifier knows": unknown, "unreadable": len(features.unreadable)}
    return kept, right, predicted, left, classifier.origin


def _by_group(
    args: FairnessArgs, table: Table, k: int, rows: list[int], right: list[bool], predicted: Sequence[str],
    left: dict[str, int], origin: str,
) -> dict[str, Any]:  # fmt: skip
    from opendino.evaluate.fairness import cross, group_accuracy

    if not rows:
        raise DataError(f"No image of {table.path} could be scored: {left}.")
    columns = {name: [values[i] for i in rows] for name, values in table.groups.items()}
    if args.cross:
        if len(columns) < 2:
            raise ConfigError("--cross needs two or more group columns.")
        columns[" × ".join(columns)] = cross(dict(columns))
    settings: dict[str, Any] = {
        "draws": args.draws, "seed": args.seed, "confidence": args.confidence, "min_images": args.min_images,
    }  # fmt: skip
    found = {
        name: group_accuracy(right, values, column=name, order=table.orders.get(name), **settings)
        for name, values in columns.items()
    }
    return {
        "model": args.model, "classifier": origin, "k": k, "num_images": len(rows),
        "accuracy": 100 * sum(right) / len(right), "left_out": {"no label": table.without_label} | left, **settings,
        "columns": found,
    }  # fmt: skip


def _write_predictions(path: Path, table: Table, scored: Scored) -> None:
    """Write a table that this command takes in turn, with one row per scored image."""
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "label", "prediction", "right", *table.groups])
        for row, right, predicted in zip(*scored[:3], strict=True):
            groups = [values[row] for values in table.groups.values()]
            writer.writerow([table.images[row], "|".join(table.labels[row]), predicted, int(right), *groups])
    os.replace(aside, path)


def _write_text(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def print_table(result: dict[str, Any]) -> None:
    """Print the scores for people."""
    from opendino.report.fairness import CAUTIONS, gap_note

    print(
        f"{result['num_images']} images, top-{result['k']} accuracy {result['accuracy']:.2f} %. {result['classifier']}."
    )
    for why, count in result["left_out"].items():
        if count:
            print(f"{count} left out: {why}.")
    for name, found in result["columns"].items():
        width = max(8, *(len(group) for group in found["groups"]))
        print(f"\n{name:{width}}{'images':>9}{'accuracy %':>12}{'interval':>16}{'against all':>13}")
        for group, row in found["groups"].items():
            low, high = row["interval"]
            print(
                f"{group:{width}}{row['n']:>9}{row['accuracy']:>12.1f}{f'{low:.1f} to {high:.1f}':>16}"
                f"{row['against_overall']:>+13.1f}" + ("  small" if row["small"] else "")
            )
        print(gap_note(found["gap"]).text)
    print()
    print(*CAUTIONS, sep="\n")
