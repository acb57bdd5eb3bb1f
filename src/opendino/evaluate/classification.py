# SPDX-License-Identifier: Apache-2.0
"""Scores of a classifier: top-1, top-5, mean per class, the confusion matrix, and what goes wrong most.

Shapes: M images, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from opendino.errors import DataError

TOP = 5
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ClassificationScores:
    """What a classifier reached on M images; shares are in percent.

    Attributes:
        top1: share of images whose highest score is that of their class.
        top5: share of images with fewer than five classes scored above their own.
        mean_per_class: mean of `per_class` over the classes that have images.
        per_class: (C,) top-1 of the images of each class, NaN for a class without images.
        counts: (C,) images of each class.
        classes: C names.
        truth: (M,) class of each image.
        predicted: (M,) class with the highest score.
    """

    top1: float
    top5: float
    mean_per_class: float
    per_class: Floats
    counts: Ints
    classes: list[str]
    truth: Ints
    predicted: Ints

    @cached_property
    def confusion(self) -> Ints:
        """(C, C) images of the class of the row that were taken for the class of the column."""
        c = len(self.classes)
        return np.bincount(self.truth * c + self.predicted, minlength=c * c).reshape(c, c)

    def worst(self, n: int = 10) -> Ints:
        """Give the n classes with the lowest top-1, worst first; classes without images and ones with 100 % are out."""
        order = np.argsort(self.per_class, kind="stable")  # NaN comes last
        return order[self.per_class[order] < 100][:n]

    def mistakes_of(self, class_index: int) -> Ints:
        """Give the images of a class that were taken for another one, the commonest mistake first."""
        wrong = np.flatnonzero((self.truth == class_index) & (self.predicted != class_index))
        taken_for = np.bincount(self.predicted[wrong], minlength=len(self.classes))
        return wrong[np.argsort(-taken_for[self.predicted[wrong]], kind="stable")]

    def summary(self) -> dict[str, float]:
        """Give {"top1", "top5", "mean_per_class"}."""
        return {"top1": self.top1, "top5": self.top5, "mean_per_class": self.mean_per_class}

    def by_class(self) -> dict[str, float | None]:
        """Give the top-1 of each class by name; None for a class without images."""
        return {
            name: float(share) if n else None
            for name, share, n in zip(self.classes, self.per_class, self.counts, strict=True)
        }


def class_scores(scores: Any, truth: Any, classes: Sequence[str] | int) -> ClassificationScores:
    """Score a classifier.

    Args:
        scores: (M, C) array or tensor, larger is likelier: logits, probabilities or votes. Of equal highest scores the
            first class is predicted.
        truth: (M,) class of each image, 0 to C - 1.
        classes: names of the C classes, or C.

    Raises:
        DataError: for no images, shapes or classes that do not go together, or scores with NaN.
    """
    table = torch.as_tensor(scores)
    right = torch.as_tensor(truth).to(table.device)
    names = [str(i) for i in range(classes)] if isinstance(classes, int) else [str(c) for c in classes]
    _check(table, right, len(names))
    right = right.long()
    predicted = table.argmax(1)
    counts, hits = right.bincount(minlength=len(names)).double(), predicted == right
    per_class = 100 * right.bincount(weights=hits.double(), minlength=len(names)) / counts
    return ClassificationScores(
        100 * hits.double().mean().item(), 100 * top_k_hits(table, right, TOP).double().mean().item(),
        per_class[counts > 0].mean().item(), per_class.cpu().numpy(), counts.long().cpu().numpy(), names,
        right.cpu().numpy(), predicted.cpu().numpy(),
    )  # fmt: skip


def top_k_hits(scores: Tensor, truth: Tensor, k: int) -> Tensor:
    """Give (M,) bool, whether fewer than k classes have a higher score than the image's own."""
    own = scores.gather(1, truth[:, None])
    return (scores > own).sum(1) < k


def _check(scores: Tensor, truth: Tensor, num_classes: int) -> None:
    if scores.ndim != 2 or scores.shape[1] != num_classes or not len(scores) or truth.shape != (len(scores),):
        raise DataError(
            f"A classifier was to be scored with scores {tuple(scores.shape)}, classes of images {tuple(truth.shape)} "
            f"and {num_classes} class names; they must be (images, classes), (images,) and as many names as classes, "
            "with at least one image."
        )
    if truth.is_floating_point() or truth.min() < 0 or truth.max() >= num_classes:
        raise DataError(
            f"The classes of the images run from {truth.min().item()} to {truth.max().item()} ({truth.dtype}); they "
            f"must be integers from 0 to {num_classes - 1}. Number them as the classifier does."
        )
    if torch.isnan(scores).any():
        raise DataError("The scores hold NaN. Leave out the images that could not be read.")
