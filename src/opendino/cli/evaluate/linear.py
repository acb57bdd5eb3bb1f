# SPDX-License-Identifier: Apache-2.0
"""`opendino eval linear`: the published grid of linear classifiers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro

from opendino.cli.evaluate.common import (
    Labelled,
    LabelledArgs,
    cache_folder,
    check_classes,
    labelled_features,
    open_labelled,
    pooled_embedder,
)
from opendino.cli.evaluate.logreg import print_scores, write_mistakes

if TYPE_CHECKING:
    from opendino.embed.embedder import Embedder
    from opendino.evaluate.linear import Batches
    from opendino.evaluate.linear_grid import Grid
    from opendino.images.sources import ImageSource

EXAMPLE = """Train the published grid of linear classifiers on frozen features and score the best.

Example:
  opendino eval linear --model vits14 --train photos/train --val photos/val --save-head head.safetensors

{1, 4} last blocks' cls tokens, without and with the mean patch token, times 13 learning rates: 52 classifiers
trained together. The best on --val is reported, as in the paper: its score is an optimistic one where --val is
small. Give --test for images that have no part in the choice.

--features cached embeds each image once and trains on that; it leaves out the paper's augmentation, random
crops of 8-100 % of the image and flips. --features augmented is the paper's: each step's crops go through the
backbone, which takes steps x batch forward passes (12 500 x 1024 at the size of ImageNet).

A killed run goes on where its state was last saved (in --cache)."""


@dataclass(frozen=True, kw_only=True)
class LinearArgs(LabelledArgs):
    """Arguments of `opendino eval linear`."""

    test: Path | None = None
    """Labelled images on which the picked classifier is scored too."""
    features: Literal["cached", "augmented"] = "cached"
    """One embedding of each image, or new random crops at each step (the paper's)."""
    steps: int | None = None
    """Steps of SGD; default: 100 passes over --train, at least 500, at most the published 12500."""
    batch_size: int = 1024
    """Images in a step, at most all; learning rates are multiplied by this / 256."""
    rates: tuple[float, ...] = ()
    """Learning rates for a batch of 256; default: the 13 published ones from 1e-5 to 0.1."""
    seed: int = 0
    """Of first weights, order and crops."""
    save_every: int = 100
    """Steps between saved states, where these take longer than half a minute."""
    confusion: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also give the confusion matrix."""
    page: Path | None = None
    """HTML file with the confusion matrix, the worst classes and pictures of their mistakes."""
    save_head: Path | None = None
    """Keep the best classifier as a file for opendino.heads.Linear.load."""


def main(argv: list[str]) -> int:
    """Print the scores of the best linear classifier."""
    args = tyro.cli(LinearArgs, args=argv, prog="opendino eval linear", description=EXAMPLE)
    result = run_linear(args)
    if args.json:
        print(json.dumps(result))
    else:
        print_result(args, result)
    return 0


def run_linear(args: LinearArgs) -> dict[str, Any]:
    """Train the grid, pick on --val and score; see `opendino.evaluate.linear`."""
    from opendino.evaluate.classification import class_scores
    from opendino.evaluate.datasets import detect

    sources = open_labelled(args)
    if args.test:
        sources["test"] = detect.open_labelled(args.test)
    classes = check_classes(sources)
    embedder = pooled_embedder(args)
    embedded = {name: s for name, s in sources.items() if name != "train" or args.features == "cached"}
    parts = labelled_features(args, embedder, embedded, classes)
    grid, report, state = _train(args, embedder, sources["train"], parts.get("train"), len(classes))
    val, models = parts["val"], grid.models
    top1 = grid.top1(val.cls, val.mean, val.labels).tolist()
    best = models[int(np.argmax(top1))]
    rates = sorted({m.rate for m in models})
    edge = "" if len(rates) == 1 else {rates[0]: "lowest", rates[-1]: "highest"}.get(best.rate, "")
    scores = class_scores(best.logits(val.cls, val.mean), val.labels, classes)
    result = scores.summary() | report
    result |= {
        "best": {
            "name": best.name,
            "blocks": best.kind.blocks,
            "average": best.kind.average,
            "rate": best.rate,
            "edge": edge,
        },
        "grid": [{"name": m.name, "top1": share} for m, share in zip(models, top1, strict=True)],
        "per_class": scores.by_class(),
        "num_val": len(val.labels),
        "num_classes": len(classes),
    }
    result["errors"] += sum(len(p.unreadable) for p in parts.values())
    if args.test:
        test = parts["test"]
        found = class_scores(best.logits(test.cls, test.mean), test.labels, classes)
        result["test"] = found.summary() | {"per_class": found.by_class(), "num_test": len(test.labels)}
    if args.save_head:
        from opendino.heads.classifier import Linear

        Linear.from_model(best, classes, embedder, args.model).save(args.save_head)
        result["head"] = str(args.save_head)
    if args.confusion:
        result["confusion"] = scores.confusion.tolist()
    if args.page:
        write_mistakes(args.page, f"Linear classifier: {best.name}", scores, sources["val"], val.paths)
        result["page"] = str(args.page)
    if state is not None:
        state.unlink(missing_ok=True)
    return result


def _train(
    args: LinearArgs, embedder: Embedder, source: ImageSource, train: Labelled | None, num_classes: int
) -> tuple[Grid, dict[str, Any], Path | None]:
    """Train or go on, with a progress line; gives the grid, what the output says about it, and its state file."""
    from opendino.cli.embed import images_progress
    from opendino.evaluate.linear import RATES, grid_settings, state_key, train_grid

    batches = _batches(args, embedder, source, train)
    settings = grid_settings(
        len(batches), embedder.layers, rates=args.rates or RATES, steps=args.steps, batch_size=args.batch_size,
        seed=args.seed,
    )  # fmt: skip
    root, state = cache_folder(args), None
    if root is not None:
        state = root / "linear" / f"{state_key(batches, settings, num_classes)[:24]}.safetensors"
    start, begun = perf_counter(), -1
    with images_progress() as bar:
        task = bar.add_task("step", total=settings.steps, rate="", errors=0)

        def on_step(done: int, total: int) -> None:
            nonlocal begun
            begun = done - 1 if begun < 0 else begun
            rate = f"{(done - begun) / (perf_counter() - start):.1f} steps/s"
            bar.update(task, completed=done, rate=rate, errors=len(getattr(batches, "unreadable", ())))

        grid = train_grid(
            batches, settings, num_classes, dim=embedder.model.config.embed_dim, device=embedder.device, state=state,
            save_steps=args.save_every, on_step=on_step,
        )  # fmt: skip
        unreadable: dict[str, str] = getattr(batches, "unreadable", {})
        for path, why in unreadable.items():
            bar.console.print(f"left out {path}: {why}", highlight=False, markup=False)
    report = {
        "features": args.features, "steps": settings.steps, "batch_size": settings.batch_size,
        "num_train": len(batches), "passes": settings.steps * settings.batch_size / len(batches),
        "errors": len(unreadable),
    }  # fmt: skip
    return grid, report, state


def _batches(args: LinearArgs, embedder: Embedder, source: ImageSource, train: Labelled | None) -> Batches:
    from opendino.embed.augmented import AugmentedFeatures
    from opendino.evaluate.linear import FixedBatches

    if train is not None:
        return FixedBatches(train.cls, train.mean, train.labels)
    return AugmentedFeatures(embedder, source, source.label_ids().astype(np.int64), args.seed)


def print_result(args: LinearArgs, result: dict[str, Any]) -> None:
    """Print the scores for people."""
    print(
        f"{result['num_train']} training and {result['num_val']} validation images, {result['num_classes']} classes"
        + (f", {result['errors']} unreadable images left out" if result["errors"] else "")
    )
    print(
        f"{len(result['grid'])} classifiers, {result['steps']} steps of {result['batch_size']} images "
        f"({result['passes']:.0f} passes; the published setting is 12500 steps of 1024), {args.features} features"
    )
    if args.features == "cached":
        print("Each image was embedded once; --features augmented trains on random crops as the paper does.")
    print(f"best on --val: {result['best']['name']}")
    if result["best"]["edge"]:
        print(
            f"Its rate is the {result['best']['edge']} of the grid: others (--rates), or more --steps, may be better."
        )
    print_scores(result)
    if "test" in result:
        print(f"on --test ({result['test']['num_test']} images):")
        print_scores(result["test"])
