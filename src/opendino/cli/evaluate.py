# SPDX-License-Identifier: Apache-2.0
"""`opendino eval`: scores of frozen features. So far: knn."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import tyro

from opendino.cli.embed import images_progress, make_embedder, show
from opendino.errors import ConfigError, DataError

EXAMPLE = """Score frozen features with a weighted k-nearest-neighbour vote (cls token, cosine similarity).

Example:
  opendino eval knn --model vits14 --train photos/train --val photos/val --k 10 20 --json

--train and --val are folders with one folder of images per class, .csv files with path,label, or tar shards
or Parquet files with labels."""


@dataclass(frozen=True)
class KnnArgs:
    """Arguments of `opendino eval knn`."""

    model: str
    """Model name, weight file, transformers folder or run folder."""
    train: Path
    """Labelled images that vote."""
    val: Path
    """Labelled images that are classified."""
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
    size: str | None = None
    """Image side in pixels, or HxW; default: the size that travels with the model."""
    fit: str = "crop"
    """How images get that size: crop, resize or pad."""
    batch: int = 32
    """Images in one forward pass."""
    workers: int | None = None
    """Threads that read images; default: one a core, at most 8."""
    weights: str | None = None
    """Weight file for a model given by name; 'random' draws them from seed 0."""
    precision: str = "auto"
    """auto, fp32, bf16 or fp16."""
    device: str | None = None
    """cpu, cuda, …; default: cuda if there is one."""
    max_errors: int | None = None
    """Fail when more images than this cannot be read; default: never."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the figures as one JSON object."""


def main(argv: list[str]) -> int:
    """Dispatch on the first word."""
    protocols = {"knn": knn}
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: opendino eval PROTOCOL …\n\nPROTOCOL is one of: {', '.join(protocols)}\n\n{EXAMPLE}")
        return 0 if argv else 2
    if argv[0] not in protocols:
        raise ConfigError(f"{argv[0]!r} is no protocol of `opendino eval`; there is {', '.join(protocols)}.")
    return protocols[argv[0]](argv[1:])


def knn(argv: list[str]) -> int:
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
    from opendino.images.sources import open_source

    sources = {"train": open_source(args.train), "val": open_source(args.val)}
    classes = check_classes(sources)
    embedder = make_embedder(
        args.model, args.weights, size=args.size, fit=args.fit, batch_size=args.batch, workers=args.workers,
        precision=args.precision, device=args.device, what=("cls",),
    )  # fmt: skip
    with images_progress() as bar:
        parts = [embed_labelled(embedder, source, classes, bar, name) for name, source in sources.items()]
    (x, y, bad), (tx, ty, bad_val) = parts
    errors = bad + bad_val
    if args.max_errors is not None and errors > args.max_errors:
        raise DataError(f"{errors} images cannot be read, more than --max-errors {args.max_errors}.")
    settings = {"k": args.k, "temperature": args.temperature, "device": embedder.device}
    result: dict[str, Any] = dict(knn_accuracy(x, y, tx, ty, **settings))
    result |= {"num_train": len(y), "num_val": len(ty), "num_classes": len(classes), "errors": errors}
    if max(args.k) > len(y):
        result["k_used"] = {str(k): min(k, len(y)) for k in args.k}
    if args.n_per_class:
        result["n_per_class"] = {
            str(n): few_shot_accuracy(x, y, tx, ty, n, draws=args.draws, seed=args.seed, **settings)
            for n in args.n_per_class
        }
    return result


def check_classes(sources: dict[str, Any]) -> list[str]:
    """Give the training classes, after seeing that they can answer for the validation images."""
    for name, source in sources.items():
        if not source.classes or any(item.label is None for item in source.items):
            raise DataError(
                f"--{name} {source.root} has images without a class; k-NN needs one folder of images per class, "
                "or a .csv with the columns path,label."
            )
    missing = sorted(set(sources["val"].classes) - set(sources["train"].classes))
    if missing:
        raise DataError(
            f"{len(missing)} classes of --val are not in --train: {', '.join(missing[:10])}. No neighbour can vote for "
            "them; add training images or remove them."
        )
    return list(sources["train"].classes)


def embed_labelled(embedder: Any, source: Any, classes: list[str], bar: Any, name: str) -> tuple[Any, Any, int]:
    """Embed a labelled source: features (n, D), labels (n,) counted in `classes`, and how many could not be read."""
    import numpy as np

    number = {c: i for i, c in enumerate(classes)}
    labels = np.array([number[item.label] for item in source.items], dtype=np.int64)
    task, start = bar.add_task(name, total=len(source), rate="", errors=0), perf_counter()
    features, good = [], []
    for batch in embedder.stream(source):
        features.append(batch.cls)
        good += [e is None for e in batch.errors]
        show(bar, task, len(good), good.count(False), len(source), len(good) / (perf_counter() - start))
        for path, error in zip(batch.paths, batch.errors, strict=True):
            if error:
                bar.console.print(f"left out {path}: {error}", highlight=False, markup=False)
    kept = np.array(good, dtype=bool)
    if not kept.any():
        raise DataError(f"No image of {source.root} could be read.")
    return np.concatenate(features)[kept], labels[kept], int((~kept).sum())


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
