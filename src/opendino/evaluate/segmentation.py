# SPDX-License-Identifier: Apache-2.0
"""Scores of segmentations: a confusion matrix over pixels, and intersection over union from it.

Shapes: C classes, H × W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from opendino.errors import DataError
from opendino.evaluate.datasets.types import IGNORE

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Plane = npt.NDArray[Any] | Tensor


@dataclass(frozen=True)
class SegmentationScores:
    """Scores over all pixels of a set, in percent.

    A class that occurs neither in the truth nor in a prediction has no IoU and is left out of the mean; one that is
    only predicted counts as 0. This is what mmsegmentation and torchmetrics do.

    Attributes:
        miou: mean of `iou` over the classes that have one.
        iou: (C,) intersection over union, NaN where there is none.
        pixel_accuracy: share of pixels that are right.
        mean_accuracy: mean of `accuracy` over the classes of the truth.
        accuracy: (C,) share of a class's pixels that are right, NaN for a class without any.
        absent: classes neither in the truth nor predicted.
        only_predicted: classes that are predicted and not in the truth.
        pixels: (C,) pixels of the truth.
        matrix: (C, C) pixels, truth in rows and prediction in columns.
    """

    miou: float
    iou: Floats
    pixel_accuracy: float
    mean_accuracy: float
    accuracy: Floats
    absent: list[int]
    only_predicted: list[int]
    pixels: Counts
    matrix: Counts


class PixelConfusion:
    """Counts pixels by true and predicted class.

    Args:
        num_classes: C.
        ignore: value of the truth that counts nowhere.

    Example:
        >>> counts = PixelConfusion(2)
        >>> counts.add(np.array([[0, 1]]), np.array([[0, 255]]))
        >>> counts.matrix.tolist()
        [[1, 0], [0, 0]]
    """

    def __init__(self, num_classes: int, ignore: int = IGNORE) -> None:
        self.num_classes, self.ignore = num_classes, ignore
        self.matrix: Counts = np.zeros((num_classes, num_classes), np.int64)

    def add(self, prediction: Plane, truth: Plane, name: str = "a mask") -> Counts:
        """Count the pixels of one or more images.

        Args:
            prediction: integers of any shape, 0 to C - 1 wherever the truth counts.
            truth: integers of the same shape, 0 to C - 1 or `ignore`.
            name: of the image, for messages.

        Returns:
            (C, C), what was added.

        Raises:
            DataError: for unequal shapes or a value out of range.
        """
        predicted, true = _integers(prediction), _integers(truth)
        if predicted.shape != true.shape:
            raise DataError(
                f"The prediction for {name} has the shape {predicted.shape} and the truth {true.shape}; they must be "
                "equal."
            )
        counted = true != self.ignore
        predicted, true = predicted[counted], true[counted]
        for what, values in (("truth", true), ("prediction", predicted)):
            if values.size and not 0 <= values.min() <= values.max() < self.num_classes:
                raise DataError(
                    f"The {what} for {name} holds values from {values.min()} to {values.max()}; classes are 0 to "
                    f"{self.num_classes - 1}, and {self.ignore} in the truth where a pixel does not count."
                )
        flat = np.bincount(true * self.num_classes + predicted, minlength=self.num_classes**2)
        added: Counts = flat.reshape(self.num_classes, self.num_classes).astype(np.int64)
        self.matrix += added
        return added

    def scores(self) -> SegmentationScores:
        """Compute the scores of all pixels so far; see `scores_of`."""
        return scores_of(self.matrix)


def scores_of(matrix: Counts) -> SegmentationScores:
    """Compute the scores of a confusion matrix (C, C), truth in rows.

    Raises:
        DataError: for a matrix without a pixel.
    """
    total = int(matrix.sum())
    if total == 0:
        raise DataError("No pixel counts: all masks are ignored everywhere, or there are none.")
    right, true, predicted = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    union = true + predicted - right
    iou, accuracy = _ratio(right, union), _ratio(right, true)
    return SegmentationScores(
        miou=100 * float(np.nanmean(iou)),
        iou=100 * iou,
        pixel_accuracy=100 * int(right.sum()) / total,
        mean_accuracy=100 * float(np.nanmean(accuracy)),
        accuracy=100 * accuracy,
        absent=np.flatnonzero(union == 0).tolist(),
        only_predicted=np.flatnonzero((true == 0) & (predicted > 0)).tolist(),
        pixels=true,
        matrix=matrix.copy(),
    )


def worst_confusions(matrix: Counts, classes: Sequence[str], n: int = 10) -> list[tuple[str, str, float]]:
    """Give the n largest shares of a class's pixels that go to another class: (true, predicted, percent)."""
    share = _ratio(matrix, matrix.sum(axis=1, keepdims=True))
    np.fill_diagonal(share, 0)
    share = np.nan_to_num(share)
    order = np.argsort(-share, axis=None, kind="stable")[:n]
    pairs = zip(*np.unravel_index(order, share.shape), strict=True)
    return [(classes[t], classes[p], 100 * float(share[t, p])) for t, p in pairs if share[t, p] > 0]


def _ratio(part: Counts, whole: Counts) -> Floats:
    out = np.full(part.shape, np.nan)
    np.divide(part, whole, out=out, where=np.broadcast_to(whole > 0, part.shape))
    return out


def _integers(plane: Plane) -> Counts:
    array = plane.cpu().numpy() if isinstance(plane, Tensor) else np.asarray(plane)
    if array.dtype.kind not in "iu":
        raise DataError(f"A mask or prediction has the dtype {array.dtype}; class indices are integers.")
    return array.astype(np.int64)
