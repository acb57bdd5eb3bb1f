# SPDX-License-Identifier: Apache-2.0
"""A trained classifier on other test sets: several labels an image, fewer classes, corrupted images.

Shapes: n images, C classes of the classifier. Figures are percent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from opendino.errors import DataError

Array = npt.NDArray[Any]
SEVERITIES = (1, 2, 3, 4, 5)
ALEXNET_ERROR: dict[str, float] = {
    "gaussian_noise": 88.6428, "shot_noise": 89.4468, "impulse_noise": 92.2640,
    "defocus_blur": 81.9880, "glass_blur": 82.6268, "motion_blur": 78.5948, "zoom_blur": 79.8360,
    "snow": 86.6816, "frost": 82.6572, "fog": 81.9324, "brightness": 56.4592,
    "contrast": 85.3204, "elastic_transform": 64.6056, "pixelate": 71.7840, "jpeg_compression": 60.6500,
}  # fmt: skip
"""Top-1 error of AlexNet on each corruption of ImageNet-C, mean over the five severities, as its authors publish it
(Hendrycks & Dietterich 2019)."""
CORRUPTIONS = tuple(ALEXNET_ERROR)


def best_ranks(scores: Array, labels: Sequence[Sequence[int]], allowed: Sequence[int] | None = None) -> Array:
    """Find how many classes are ranked above the best-ranked true label of each image; 0 is a correct prediction.

    Classes with equal scores are ranked by their index.

    Args:
        scores: (n, C), larger is likelier.
        labels: for each image the classes that are right, at least one.
        allowed: classes that may be predicted; None is all. Every label must be among them.

    Returns:
        (n,) int64.

    Raises:
        DataError: for an image without labels, a label out of range or not allowed, or a score that is NaN.
    """
    scores = np.asarray(scores)
    if len(scores) != len(labels):
        raise DataError(f"There are {len(scores)} rows of scores and labels for {len(labels)} images.")
    if np.isnan(scores).any():
        raise DataError("The classifier gave NaN for some images; look at its weights and the images' features.")
    order = np.arange(scores.shape[1]) if allowed is None else np.unique(np.asarray(allowed, dtype=np.int64))
    place = np.full(scores.shape[1], -1)
    place[order] = np.arange(len(order))
    shown = scores[:, order]
    ranks = np.empty(len(scores), dtype=np.int64)
    for i, right in enumerate(labels):
        where = _places(right, place)
        best = where[np.lexsort((where, -shown[i, where]))[0]]
        ranks[i] = (shown[i] > shown[i, best]).sum() + (shown[i, :best] == shown[i, best]).sum()
    return ranks


def _places(right: Sequence[int], place: Array) -> Array:
    given = np.asarray(list(right), dtype=np.int64)
    if not len(given) or given.min() < 0 or given.max() >= len(place) or (place[given] < 0).any():
        raise DataError(
            f"An image has the labels {list(right)}; it needs one or more of the {int((place >= 0).sum())} classes "
            "that may be predicted. Leave images without a label out before scoring."
        )
    return np.asarray(place[given])


def topk(ranks: Array, k: int) -> float:
    """Give the share of images with a rank below k, percent; NaN without images."""
    return float((np.asarray(ranks) < k).mean() * 100) if len(ranks) else float("nan")


def corruption_error(errors: Mapping[str, Mapping[int, float]]) -> dict[str, Any]:
    """Sum up errors on corrupted images (Hendrycks & Dietterich 2019, §4.1).

    CE of a corruption is its error summed over the five severities, divided by AlexNet's; mCE is the mean of the 15.

    Args:
        errors: top-1 error in percent by corruption and severity.

    Returns:
        "corruptions": by name "error" (mean over the severities given), "ce" (None where a severity is missing or
        AlexNet's figure is unknown) and "severities"; "mean_error": the mean of "error" over the corruptions given that
        are among the 15, or over all when none is; "mce": None unless all 15 are complete; "missing": what is lacking.

    Raises:
        DataError: without any error, or for a corruption without one.
    """
    if not errors or not all(errors.values()):
        raise DataError("There are no errors on corrupted images, or a corruption has no severity.")
    rows: dict[str, dict[str, Any]] = {}
    for name, by_severity in errors.items():
        mean = float(np.mean([by_severity[s] for s in sorted(by_severity)]))
        whole = name in ALEXNET_ERROR and set(SEVERITIES) <= set(by_severity)
        ce = 100 * sum(by_severity[s] for s in SEVERITIES) / (5 * ALEXNET_ERROR[name]) if whole else None
        rows[name] = {"error": mean, "ce": ce, "severities": {str(s): by_severity[s] for s in sorted(by_severity)}}
    missing = [f"{c}/{s}" for c in CORRUPTIONS for s in SEVERITIES if s not in errors.get(c, {})]
    counted = [row["error"] for name, row in rows.items() if name in ALEXNET_ERROR] or [
        row["error"] for row in rows.values()
    ]
    mce = None if missing else float(np.mean([rows[c]["ce"] for c in CORRUPTIONS]))
    return {"corruptions": rows, "mean_error": float(np.mean(counted)), "mce": mce, "missing": missing}
