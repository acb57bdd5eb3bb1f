# SPDX-License-Identifier: Apache-2.0
"""What the protocols share: the arguments about model and images, and labelled features from the cache."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import numpy.typing as npt
import tyro

from opendino.cli.embed import images_progress, make_embedder, show
from opendino.errors import ConfigError, DataError

if TYPE_CHECKING:
    from opendino.embed.embedder import Embedder
    from opendino.images.sources import ImageSource


@dataclass(frozen=True, kw_only=True)
class BackboneArgs:
    """The model, how images reach it, and where features are kept."""

    model: str
    """Model name, weight file, transformers folder or run folder."""
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
    cache: str = field(default_factory=lambda: os.environ.get("OPENDINO_FEATURES", "~/.cache/opendino/features"))
    """Folder where features are kept, by content of weights, preprocessing and file; 'none' keeps nothing. The variable
    OPENDINO_FEATURES changes the default."""
    max_errors: int | None = None
    """Fail when more images than this cannot be read; default: never."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the figures as one JSON object."""


@dataclass(frozen=True, kw_only=True)
class LabelledArgs(BackboneArgs):
    """Where labelled images for training and validation lie: one data set with splits, or two places."""

    data: Path | None = None
    """Data set with splits, as `opendino data check` finds it; instead of --train and --val."""
    train_split: str = "train"
    """Split of --data that is learned from."""
    val_split: str = "val"
    """Split of --data that is scored."""
    train: Path | None = None
    """Labelled images to learn from: class folders, .csv with path,label, shards, Parquet, or ROOT:SPLIT of a set."""
    val: Path | None = None
    """Labelled images that are scored."""


@dataclass(frozen=True)
class Labelled:
    """Features of the readable images of a labelled source.

    Attributes:
        cls: (n, L, D) cls tokens of the last L blocks, in their order, after the final LayerNorm.
        mean: (n, D) mean of the last block's patch tokens.
        labels: (n,) int64, index in the classes that were given.
        paths: n names.
        unreadable: (path, reason) of those left out.
    """

    cls: npt.NDArray[np.float32]
    mean: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    paths: list[str]
    unreadable: list[tuple[str, str]]

    @property
    def last(self) -> npt.NDArray[np.float32]:
        """The final cls tokens (n, D)."""
        return self.cls[:, -1]


def pooled_embedder(args: BackboneArgs) -> Embedder:
    """Make the embedder that all protocols on image vectors share, so that they share its features."""
    from opendino.embed.cache import POOLED_BLOCKS

    embedder: Embedder = make_embedder(
        args.model, args.weights, size=args.size, fit=args.fit, batch_size=args.batch, workers=args.workers,
        precision=args.precision, device=args.device, what=("cls", "mean"),
    )  # fmt: skip
    embedder.layers = min(POOLED_BLOCKS, embedder.config.depth)
    return embedder


def cache_folder(args: BackboneArgs) -> Path | None:
    """Give the folder of the feature store, or None for 'none'."""
    return None if args.cache == "none" else Path(args.cache).expanduser()


def open_labelled(args: LabelledArgs) -> dict[str, ImageSource]:
    """Open the images to learn from and those to score, as "train" and "val".

    Raises:
        ConfigError: when neither --data nor both of --train and --val are given.
        DataError: when they cannot be opened.
    """
    from opendino.evaluate.datasets import detect

    if args.data is not None and args.train is None and args.val is None:
        splits = {"train": args.train_split, "val": args.val_split}
        return {name: detect.open_classification(args.data, split) for name, split in splits.items()}
    if args.data is not None or args.train is None or args.val is None:
        raise ConfigError(
            "Labelled images are missing: give --train and --val, one folder of images per class each, or --data with "
            "a set that has splits."
        )
    return {"train": detect.open_labelled(args.train), "val": detect.open_labelled(args.val)}


def labelled_features(
    args: BackboneArgs, embedder: Embedder, sources: dict[str, ImageSource], classes: list[str]
) -> dict[str, Labelled]:
    """Embed labelled sources, with a progress line each; unreadable images are named and left out.

    Raises:
        DataError: when more images than --max-errors cannot be read, or none of a source.
    """
    with images_progress() as bar:
        parts = {name: _features(args, embedder, source, classes, bar, name) for name, source in sources.items()}
    errors = sum(len(p.unreadable) for p in parts.values())
    if args.max_errors is not None and errors > args.max_errors:
        raise DataError(f"{errors} images cannot be read, more than --max-errors {args.max_errors}.")
    return parts


def check_classes(sources: dict[str, ImageSource]) -> list[str]:
    """Give the classes of the source "train", after seeing that they can answer for the images of the others.

    Raises:
        DataError: for images without a class, a single class, or a class that only another source has.
    """
    for name, source in sources.items():
        if not source.classes or (source.label_ids() < 0).any():
            raise DataError(
                f"--{name} {source.root} has images without a class; it needs one folder of images per class, or a "
                ".csv with the columns path,label. Where images have several classes, use `opendino eval multilabel`."
            )
    known = sources["train"].classes
    for name, source in sources.items():
        missing = sorted(set(source.classes) - set(known))
        if missing:
            raise DataError(
                f"{len(missing)} classes of --{name} are not in --train: {', '.join(missing[:10])}. They cannot be "
                "predicted: add training images or remove them."
            )
    return list(known)


@dataclass(frozen=True)
class Readable:
    """Features of the readable images of any source; as in `Labelled`, with their places instead of labels.

    Attributes:
        index: (n,) int64, place of each image in the source.
    """

    cls: npt.NDArray[np.float32]
    mean: npt.NDArray[np.float32]
    index: npt.NDArray[np.int64]
    unreadable: list[tuple[str, str]]


def image_features(args: BackboneArgs, embedder: Embedder, source: ImageSource, bar: Any, name: str) -> Readable:
    """Embed a source, with or without labels, on the progress line `name` of `bar`.

    Raises:
        DataError: when no image can be read.
    """
    from opendino.embed.cache import pooled_features

    task, start = bar.add_task(name, total=len(source), rate="", errors=0), perf_counter()
    begun = -1

    def on_images(done: int, errors: int, total: int) -> None:
        nonlocal begun
        begun = done if begun < 0 else begun
        show(bar, task, done, errors, total, (done - begun) / (perf_counter() - start))

    cls, mean, errors = pooled_features(embedder, source, cache_folder(args), on_images)
    bad = [(source.name(i), why) for i, why in enumerate(errors) if why]
    for path, why in bad:
        bar.console.print(f"left out {path}: {why}", highlight=False, markup=False)
    good = np.flatnonzero([why is None for why in errors]).astype(np.int64)
    if not len(good):
        raise DataError(f"No image of {source.root} could be read.")
    return Readable(cls[good], mean[good], good, bad)


def _features(
    args: BackboneArgs, embedder: Embedder, source: ImageSource, classes: list[str], bar: Any, name: str
) -> Labelled:
    number = {c: i for i, c in enumerate(classes)}
    to_given = np.array([number[c] for c in source.classes], dtype=np.int64)
    found = image_features(args, embedder, source, bar, name)
    paths = [source.name(int(i)) for i in found.index]
    return Labelled(found.cls, found.mean, to_given[source.label_ids()][found.index], paths, found.unreadable)
