# SPDX-License-Identifier: Apache-2.0
"""`opendino eval segmentation`: a linear head on frozen patch tokens, and its mIoU."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tyro

from opendino.cli.evaluate.common import BackboneArgs, cache_folder
from opendino.errors import ConfigError, DataError

if TYPE_CHECKING:
    from opendino.evaluate.datasets.types import SegmentationSet
    from opendino.heads.segmentation import Evaluation, OnProgress, Segmenter
    from opendino.report.segmentation import Example

EXAMPLE = """Train a linear segmentation head on frozen patch tokens and print its mIoU.

Example:
  opendino eval segmentation --model vits14 --data rooms --save-head rooms.safetensors --page rooms.html --json
  opendino eval segmentation --model vits14 --data rooms --head rooms.safetensors --json

ROOT holds images/SPLIT/NAME.jpg, masks/SPLIT/NAME.png (the class index at every pixel, 255 where it does not count)
and classes.txt. --head takes a file that --save-head wrote, or one of Meta's (dinov2_vits14_ade20k_linear_head.pth)."""

SHOWN = 12
"""Images of each kind on the page."""


@dataclass(frozen=True, kw_only=True)
class SegmentationArgs(BackboneArgs):
    """Arguments of `opendino eval segmentation`."""

    data: Path
    """Folder of images and masks."""
    train_split: str = "train"
    """Name of the part that the head is trained on."""
    val_split: str = "val"
    """Name of the part that is scored."""
    protocol: str = "linear"
    """linear: last block, windows of 512. ms: last four blocks, 640, five scales and mirrored images."""
    size: str | None = None
    """Shorter side of the images in pixels, and side of the windows; default: 512, or 640 with ms."""
    blocks: int | None = None
    """Last blocks whose patch tokens are concatenated; default: 1, or 4 with ms."""
    scales: tuple[float, ...] = ()
    """Factors on the size whose probabilities are averaged; default: 1, or 1 1.32 1.73 2.28 3 with ms."""
    flip: bool | None = None
    """Also average the mirrored image; default: only with ms."""
    features: str = "cached"
    """cached: tokens of fixed windows, computed once. augmented: random scale, crop, flip and colours as published;
    each step goes through the backbone."""
    mirror: bool = False
    """With cached features, train on mirrored images too."""
    steps: int = 2000
    """Training steps; published: 40000."""
    train_batch: int = 16
    """Windows in a training step."""
    learning_rate: float = 1e-3
    """Of AdamW."""
    weight_decay: float = 1e-4
    """Of AdamW."""
    balance: float = 0.0
    """0: the published head. 0.25 to 0.5 favours rare classes, as mIoU does (docs/evaluation-segmentation.md)."""
    seed: int = 0
    """Of the order, the augmentation and the first weights."""
    save_head: Path | None = None
    """File for the trained head."""
    head: Path | None = None
    """Score this head and train none."""
    page: Path | None = None
    """HTML file with pictures of images, truth and prediction."""


def main(argv: list[str]) -> int:
    """Print the segmentation scores of a model."""
    args = tyro.cli(SegmentationArgs, args=argv, prog="opendino eval segmentation", description=EXAMPLE)
    result = run_segmentation(args)
    if args.json:
        print(json.dumps(result))
    else:
        print_table(result)
    return 0


def open_set(root: Path, split: str) -> SegmentationSet:
    """Open one part of the data."""
    from opendino.evaluate.datasets.detect import open_segmentation

    return open_segmentation(root, split)


def run_segmentation(args: SegmentationArgs) -> dict[str, Any]:
    """Train or load a head, score it, and give the figures."""
    val = open_set(args.data, args.val_split)
    train = open_set(args.data, args.train_split) if args.head is None else None
    with stage_bars() as tell:
        if train is None:
            made = _loaded(args)
        else:
            _same_classes(train.classes, val.classes, f"--val-split {args.val_split}")
            made = _fresh(args).fit(train, on_progress=tell)
            if args.save_head is not None:
                made.save(args.save_head)
        remarks = _name_remarks(made, val)
        found = made.evaluate(val, tell)
    errors = {} if train is None else {train.name(i): why for i, why in made.errors.items()}
    errors |= {val.name(i): why for i, why in found.errors.items()}
    for path, why in errors.items():
        print(f"left out {path}: {why}", file=sys.stderr)
    if args.max_errors is not None and len(errors) > args.max_errors:
        raise DataError(f"{len(errors)} images cannot be read, more than --max-errors {args.max_errors}.")
    result = _figures(made, found, val)
    result |= {"num_train": None if train is None else len(train) - len(made.errors), "errors": len(errors)}
    remarks += _class_remarks(result)
    for remark in remarks:
        print(remark, file=sys.stderr)
    if args.page is not None:
        _write_page(args.page, args, made, found, val, result, remarks)
    return result


def print_table(result: dict[str, Any]) -> None:
    """Print the scores for people."""
    print(
        f"{result['num_val']} validation images, {result['num_classes']} classes"
        + (f", {result['errors']} unreadable images left out" if result["errors"] else "")
    )
    for name, iou in result["iou"].items():
        print(f"{name:>24}{'absent' if iou is None else f'{iou:.2f}':>10}")
    print(f"{'mIoU %':>24}{result['miou']:>10.2f}")
    print(f"{'pixel accuracy %':>24}{result['pixel_accuracy']:>10.2f}")
    print(f"{'mean class accuracy %':>24}{result['mean_class_accuracy']:>10.2f}")


@contextmanager
def stage_bars() -> Iterator[OnProgress]:
    """Show a progress line for each stage on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    names = {"masks": "masks", "tokens": "patch tokens", "train": "training", "score": "scoring"}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True)) as bar:
        tasks: dict[str, Any] = {}
        last = ""

        def tell(stage: str, done: int, total: int, note: str) -> None:
            nonlocal last
            if stage != last:
                tasks[stage] = bar.add_task(names.get(stage, stage), total=total, note="")
            last = stage
            bar.update(tasks[stage], completed=done, total=total, note=note)

        yield tell


def _model(args: SegmentationArgs) -> Any:
    from opendino.cli.embed import make_embedder

    if args.fit != "crop":
        raise ConfigError(
            f"--fit is {args.fit}; segmentation keeps the aspect ratio and slides windows over the whole image. Leave "
            "--fit out."
        )
    embedder = make_embedder(
        args.model, args.weights, batch_size=args.batch, workers=args.workers, precision=args.precision,
        device=args.device, what=("patches",),
    )  # fmt: skip
    return embedder.model


def _size(args: SegmentationArgs) -> int | None:
    from opendino.images.preprocess import parse_size

    size = parse_size(args.size)
    if isinstance(size, tuple):
        raise ConfigError(f"--size is {args.size}; give one number, the shorter side of an image in pixels.")
    return size


def _settings(args: SegmentationArgs) -> dict[str, Any]:
    return {
        "size": _size(args), "scales": args.scales or None, "flip": args.flip, "cache": cache_folder(args),
        "batch_size": args.batch, "precision": args.precision, "workers": args.workers, "name": args.model,
    }  # fmt: skip


def _fresh(args: SegmentationArgs) -> Segmenter:
    from opendino.heads.segmentation import Segmenter
    from opendino.heads.training import Training

    training = Training(args.steps, args.train_batch, args.learning_rate, args.weight_decay, seed=args.seed)
    return Segmenter(
        _model(args), args.protocol, blocks=args.blocks, training=training, features=args.features,  # type: ignore[arg-type]
        mirror=args.mirror, balance=args.balance, **_settings(args),
    )  # fmt: skip


def _loaded(args: SegmentationArgs) -> Segmenter:
    from opendino.heads.published_segmentation import load_published
    from opendino.heads.segmentation import Segmenter

    assert args.head is not None
    if args.head.suffix in (".pth", ".pt"):
        return load_published(args.head, _model(args), **_settings(args))
    return Segmenter.load(args.head, _model(args), **_settings(args))


def _same_classes(known: Any, given: Any, what: str) -> None:
    if list(known) != list(given):
        raise DataError(f"{what} has other classes than the training images: {_difference(known, given)}.")


def _difference(known: Any, given: Any) -> str:
    missing, added = [c for c in known if c not in given], [c for c in given if c not in known]
    parts = [
        f"{what} {', '.join(map(str, names[:10]))}" for what, names in (("without", missing), ("with", added)) if names
    ]
    return " and ".join(parts) or "the same names in another order"


def _name_remarks(made: Segmenter, val: SegmentationSet) -> list[str]:
    """Refuse another order of the classes; other names for as many classes are only mentioned."""
    if list(made.classes) == list(val.classes) or len(made.classes) != len(val.classes):
        return []  # `evaluate` refuses another number
    if set(made.classes) == set(val.classes):
        raise DataError("The head and the data name the same classes in another order; their indices differ.")
    first = next(i for i, (a, b) in enumerate(zip(made.classes, val.classes, strict=True)) if a != b)
    return [
        f"The head and the data name their {len(val.classes)} classes differently, first number {first}: "
        f"{made.classes[first]!r} and {val.classes[first]!r}. They are taken to be the same in the same order."
    ]


def _figures(made: Segmenter, found: Evaluation, val: SegmentationSet) -> dict[str, Any]:
    scores, classes = found.scores, list(val.classes)
    untrained = made.class_pixels is not None and (made.class_pixels == 0) & (scores.pixels > 0)
    return {
        "miou": scores.miou,
        "pixel_accuracy": scores.pixel_accuracy,
        "mean_class_accuracy": scores.mean_accuracy,
        "iou": _by_class(classes, scores.iou),
        "class_accuracy": _by_class(classes, scores.accuracy),
        "absent_classes": [classes[c] for c in scores.absent],
        "only_predicted_classes": [classes[c] for c in scores.only_predicted],
        "untrained_classes": [classes[c] for c in np.flatnonzero(untrained)],
        "num_val": len(found.images),
        "num_classes": len(classes),
        "protocol": asdict(made.protocol),
        "training": asdict(made.training) | {"features": made.features, "mirror": made.mirror, "balance": made.balance},
    }


def _by_class(classes: list[str], values: Any) -> dict[str, float | None]:
    return {c: None if np.isnan(v) else float(v) for c, v in zip(classes, values, strict=True)}


def _class_remarks(result: dict[str, Any]) -> list[str]:
    told = {
        "untrained_classes": "Without a training pixel, so never predicted and counted as 0",
        "only_predicted_classes": "Predicted but not in the validation masks, so counted as 0",
        "absent_classes": "Neither in the validation masks nor predicted, so left out of the mean",
    }
    return [f"{what}: {', '.join(result[k])}." for k, what in told.items() if result[k]]


def _write_page(
    path: Path, args: SegmentationArgs, made: Segmenter, found: Evaluation, val: SegmentationSet,
    result: dict[str, Any], remarks: list[str],
) -> None:  # fmt: skip
    from opendino.evaluate.segmentation import worst_confusions
    from opendino.report.segmentation import segmentation_page

    order = [int(i) for i in np.argsort(np.nan_to_num(found.image_miou, nan=np.inf), kind="stable")]
    worst = order[: min(SHOWN, len(order) // 2)]
    spread = [int(i) for i in np.linspace(0, len(order) - 1, SHOWN).round()]
    others = [i for i in dict.fromkeys(spread) if i not in worst]
    scores = found.scores
    share = 100 * scores.pixels / scores.pixels.sum()
    rows = zip(val.classes, scores.iou, scores.accuracy, share, strict=True)
    with stage_bars() as tell:
        examples = {}
        for done, place in enumerate([*worst, *others], 1):
            examples[place] = _example(made, found, val, place)
            tell("pictures", done, len(worst) + len(others), "")
    segmentation_page(
        path,
        f"Segmentation of {args.data.name} with {args.model}",
        classes=val.classes,
        summary=[(name, f"{result[key]:.2f}") for name, key in SUMMARY]
        + [("validation images", str(result["num_val"]))],
        per_class=[(c, _cell(iou), _cell(accuracy), f"{part:.2f}") for c, iou, accuracy, part in rows],
        confusions=worst_confusions(scores.matrix, val.classes, 15),
        worst=[examples[i] for i in worst],
        others=[examples[i] for i in others],
        remarks=remarks,
        about=[_about(made)],
    )


SUMMARY = (
    ("mIoU %", "miou"), ("pixel accuracy %", "pixel_accuracy"), ("mean class accuracy %", "mean_class_accuracy"),
)  # fmt: skip


def _about(made: Segmenter) -> str:
    p = made.protocol
    scales = ", ".join(f"{s:g}" for s in p.scales)
    return (
        f"BatchNorm and a 1×1 convolution on the patch tokens of the last {p.blocks} block(s); shorter side {p.size} "
        f"px, windows of {p.crop} px every {p.stride} px, scales {scales}{', mirrored too' if p.flip else ''}."
    )


def _cell(value: float) -> str:
    return "absent" if np.isnan(value) else f"{value:.1f}"


def _example(made: Segmenter, found: Evaluation, val: SegmentationSet, place: int) -> Example:
    from opendino.report.segmentation import Example

    index = found.images[place]
    image = val.image(index).permute(1, 2, 0).numpy().astype(np.uint8)
    name = Path(val.name(index)).name
    return Example(name, image, val.mask(index).numpy(), made.predict([image])[0], found.image_miou[place])
