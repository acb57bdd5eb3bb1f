# SPDX-License-Identifier: Apache-2.0
"""A classifier of image features on the command line: read from a head file, or fitted in place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from opendino.cli.evaluate.common import BackboneArgs, check_classes, labelled_features
from opendino.errors import ConfigError, DataError, WeightsError

if TYPE_CHECKING:
    from opendino.embed.embedder import Embedder

CHUNK = 4096


@dataclass(frozen=True, kw_only=True)
class ClassifierArgs(BackboneArgs):
    """Where the classifier comes from."""

    head: Path | None = None
    """Head file of a classifier on features of this model."""
    train: Path | None = None
    """Instead: labelled images to fit a logistic regression on, in place."""
    penalty: float = 1.0
    """Inverse strength C of that regression's penalty."""
    classes: Path | None = None
    """Text file with one class name a line, in the order of the head's outputs, for a head that does not know them."""


@dataclass(frozen=True)
class Classifier:
    """A linear classifier of pooled features.

    Attributes:
        names: of its C classes, in the order of its scores.
        weight: (C, F).
        bias: (C,).
        blocks: cls tokens of so many last blocks are its inputs, in the order of the blocks.
        with_mean: the mean patch token follows them.
        origin: in words.
    """

    names: list[str]
    weight: npt.NDArray[Any]
    bias: npt.NDArray[Any]
    blocks: int
    with_mean: bool
    origin: str

    def scores(self, cls: npt.NDArray[Any], mean: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Give (n, C) from cls (n, L, D) and mean (n, D)."""
        parts = [cls[:, -self.blocks :].reshape(len(cls), -1)] + [mean] * self.with_mean
        out: npt.NDArray[Any] = np.concatenate(parts, axis=1) @ self.weight.T + self.bias
        return out


def open_classifier(args: ClassifierArgs, embedder: Embedder) -> Classifier:
    """Read the head, or fit one on --train.

    Raises:
        ConfigError: when neither or both are given.
    """
    if (args.head is None) == (args.train is None):
        raise ConfigError(
            "One of --head and --train is needed: the head file of a trained classifier, or labelled images to fit one."
        )
    found = _read(args, embedder, args.head) if args.head is not None else _fit(args, embedder)
    if args.classes is None:
        return found
    if not args.classes.is_file():
        raise DataError(f"{args.classes} does not exist; --classes is a text file with one class name a line.")
    lines = [line.strip() for line in args.classes.read_text().splitlines() if line.strip()]
    if len(lines) != len(found.bias) or len(set(lines)) != len(lines):
        raise DataError(
            f"{args.classes} has {len(lines)} lines, {len(set(lines))} of them different; the classifier has "
            f"{len(found.bias)} classes. Give one name a line, in the order of its outputs."
        )
    return Classifier(lines, found.weight, found.bias, found.blocks, found.with_mean, found.origin)


def _fit(args: ClassifierArgs, embedder: Embedder) -> Classifier:
    from opendino.evaluate.datasets.detect import open_labelled
    from opendino.evaluate.logistic import fit_logistic

    assert args.train is not None
    source = open_labelled(args.train)
    classes = check_classes({"train": source})
    train = labelled_features(args, embedder, {"train": source}, classes)["train"]
    empty = sorted(set(classes) - {classes[i] for i in train.labels})
    if empty:
        raise DataError(
            f"{len(empty)} classes of --train have no readable image: {', '.join(empty[:10])}. Mend their images or "
            "take the classes out."
        )
    fitted = fit_logistic(train.last, train.labels, args.penalty, num_classes=len(classes), device=embedder.device)
    weight, bias = fitted.weight.cpu().numpy(), fitted.bias.cpu().numpy()
    return Classifier(classes, weight, bias, 1, False, f"logistic regression on {len(train.labels)} images")


def _read(args: ClassifierArgs, embedder: Embedder, path: Path) -> Classifier:
    from opendino.heads.storage import check_backbone, load_head

    tensors, described = load_head(path)
    check_backbone(embedder.model, described["backbone"], str(path))
    settings = described["settings"]
    images, now = settings.get("images"), (list(embedder.input_shape), embedder.fit)
    if images and (images["input_shape"], images["fit"]) != now:
        raise ConfigError(
            f"{path} was fitted on images of {images['input_shape']} (channels, height, width), fit {images['fit']}; "
            f"now they are {now[0]}, fit {now[1]}. Give --size and --fit as they were."
        )
    if not {"weight", "bias"} <= set(tensors) or tensors["weight"].ndim != 2:
        raise WeightsError(f"{path} holds a {described['kind']}, which is no linear classifier of images.")
    weight, bias = tensors["weight"].double().numpy(), tensors["bias"].double().numpy()
    names = [str(c) for c in settings.get("classes") or range(len(bias))]
    blocks, with_mean = (settings.get("state") or {}).get("kind") or (1, False)  # of a heads.Linear
    width = (blocks + with_mean) * embedder.model.config.embed_dim
    if blocks > embedder.layers or weight.shape != (len(names), width):
        raise WeightsError(
            f"{path} has weights {weight.shape} for {len(names)} classes on {blocks} blocks; with this model that must "
            f"be {(len(names), width)}, and at most {embedder.layers} blocks. It is of another model."
        )
    return Classifier(names, weight, bias, blocks, with_mean, f"{described['kind']} {path.name}")
