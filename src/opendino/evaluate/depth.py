# SPDX-License-Identifier: Apache-2.0
"""Errors of metric depth, image by image, as the published evaluations count them (Eigen et al. 2014; AdaBins §4).

Shapes: H, W pixels of a depth map; n valid pixels of an image. Depths are metres; computed in float64.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np
import numpy.typing as npt

from opendino.errors import DataError
from opendino.evaluate.datasets.types import DepthCrop

METRICS = ("rmse", "abs_rel", "log10", "d1", "d2", "d3", "sq_rel", "rmse_log", "silog")
"""rmse m; abs_rel, sq_rel (m), log10, rmse_log as they are; d1, d2, d3 and silog in percent."""
NYU_SHAPE, NYU_BOX = (480, 640), (45, 471, 41, 601)
GARG = (0.40810811, 0.99189189, 0.03594771, 0.96405229)
Depth = npt.NDArray[np.floating]
Mask = npt.NDArray[np.bool_]


def crop_box(shape: tuple[int, int], crop: DepthCrop) -> tuple[int, int, int, int]:
    """Give the part of a map that is scored: rows top to before bottom, columns left to before right.

    "eigen" is rows 45–471 and columns 41–601 of NYU's 480×640, in proportion at any other size (the published
    evaluation knows that one size only); "garg" is KITTI's, given as shares of height and width; "none" is all.
    """
    height, width = shape
    if crop == "none":
        return 0, height, 0, width
    if crop == "garg":
        top, bottom, left, right = GARG
        return int(top * height), int(bottom * height), int(left * width), int(right * width)
    if crop != "eigen":
        raise DataError(f"The crop is {crop!r}; it must be none, eigen or garg.")
    rows, columns = NYU_SHAPE
    top_, bottom_, left_, right_ = NYU_BOX
    return top_ * height // rows, bottom_ * height // rows, left_ * width // columns, right_ * width // columns


def valid_pixels(truth: Depth, min_depth: float, max_depth: float, crop: DepthCrop = "none") -> Mask:
    """Give bool (H, W): inside the crop, and min_depth < depth < max_depth; NaN and infinity are not."""
    top, bottom, left, right = crop_box((truth.shape[0], truth.shape[1]), crop)
    mask = np.zeros(truth.shape, dtype=bool)
    part = truth[top:bottom, left:right]
    mask[top:bottom, left:right] = (part > min_depth) & (part < max_depth)
    return mask


def clip_prediction(prediction: Depth, min_depth: float, max_depth: float) -> npt.NDArray[np.float64]:
    """Bring a predicted map into the range, float64; NaN becomes min_depth and infinity the end it points to."""
    filled = np.nan_to_num(np.asarray(prediction, np.float64), nan=min_depth, posinf=max_depth, neginf=min_depth)
    return np.clip(filled, min_depth, max_depth)


def depth_errors(predicted: Depth, true: Depth) -> dict[str, float]:
    """Give every metric of `METRICS` over n paired depths, all positive and finite."""
    p, t = np.asarray(predicted, np.float64), np.asarray(true, np.float64)
    difference, logs = p - t, np.log(p) - np.log(t)
    ratio = np.maximum(p / t, t / p)
    variance = max(float((logs**2).mean() - logs.mean() ** 2), 0.0)  # rounding can make it negative
    return {
        "rmse": float(np.sqrt((difference**2).mean())),
        "abs_rel": float((np.abs(difference) / t).mean()),
        "log10": float(np.abs(logs).mean() / np.log(10)),
        **{f"d{i}": 100 * float((ratio < 1.25**i).mean()) for i in (1, 2, 3)},
        "sq_rel": float((difference**2 / t).mean()),
        "rmse_log": float(np.sqrt((logs**2).mean())),
        "silog": 100 * float(np.sqrt(variance)),
    }


@dataclass
class DepthScore:
    """Adds up images: the mean of each metric over images, and what was left out.

    Args:
        min_depth: metres; predictions are clipped to the range, truth outside it does not count.
        max_depth: metres.
        crop: part of each map that counts.
    """

    min_depth: float = 1e-3
    max_depth: float = 10.0
    crop: DepthCrop = "none"
    per_image: list[dict[str, float]] = field(default_factory=list)
    without_truth: list[str] = field(default_factory=list)
    nonfinite: int = 0
    _squares: float = 0.0
    _pixels: int = 0

    def add(self, prediction: Depth, truth: Depth, name: str = "") -> dict[str, float] | None:
        """Score an image; None, and a place in `without_truth`, when none of its pixels is valid.

        Args:
            prediction: (H, W) metres.
            truth: (H, W) metres, 0 or NaN where unknown.
            name: for messages.

        Raises:
            DataError: when the two have different shapes.
        """
        prediction, truth = np.asarray(prediction), np.asarray(truth)
        if prediction.shape != truth.shape or truth.ndim != 2:
            raise DataError(
                f"The prediction of {name or 'an image'} has the shape {prediction.shape} and its depth map "
                f"{truth.shape}; both must be (height, width) of the same size. Resize the prediction first."
            )
        mask = valid_pixels(truth, self.min_depth, self.max_depth, self.crop)
        if not mask.any():
            self.without_truth.append(name)
            return None
        self.nonfinite += int((~np.isfinite(prediction[mask])).sum())
        clipped = clip_prediction(prediction[mask], self.min_depth, self.max_depth)
        errors = depth_errors(clipped, truth[mask])
        self.per_image.append(errors)
        self._squares += errors["rmse"] ** 2 * clipped.size
        self._pixels += clipped.size
        return errors

    def result(self) -> dict[str, float | int]:
        """Give the mean of each metric over images, `rmse_pooled` over all pixels at once, and the counts.

        Raises:
            DataError: when no image had a valid pixel.
        """
        if not self.per_image:
            part = "" if self.crop == "none" else f" inside the {self.crop} crop"
            raise DataError(
                f"None of {len(self.without_truth)} depth maps has a pixel between {self.min_depth:g} and "
                f"{self.max_depth:g} m{part}, so nothing can be scored. Depth files hold 0 where depth is unknown: "
                "check that they are not empty, and their unit (scale in depth.json) and range."
            )
        means: dict[str, float | int] = {m: float(np.mean([e[m] for e in self.per_image])) for m in METRICS}
        return means | {
            "rmse_pooled": float(np.sqrt(self._squares / self._pixels)),
            "num_images": len(self.per_image),
            "without_valid_depth": len(self.without_truth),
            "nonfinite_pixels": self.nonfinite,
        }


def score_depth(
    predictions: Iterable[Depth], truths: Iterable[Depth], *, min_depth: float = 1e-3, max_depth: float = 10.0,
    crop: DepthCrop = "none",
) -> dict[str, float | int]:  # fmt: skip
    """Score predicted depth maps against true ones.

    Args:
        predictions: maps (H, W), metres; may be lazy.
        truths: as many maps of the same sizes, 0 where unknown.
        min_depth: metres; see `valid_pixels` and `clip_prediction`.
        max_depth: metres.
        crop: "eigen" (NYU), "garg" (KITTI) or "none".

    Returns:
        See `DepthScore.result`. Maps without a valid pixel are left out and counted in "without_valid_depth".

    Raises:
        DataError: for maps of different shapes or numbers, or when no map has a valid pixel.
    """
    score = DepthScore(min_depth, max_depth, crop)
    for i, (prediction, truth) in enumerate(zip_longest(predictions, truths)):
        if prediction is None or truth is None:
            short = "predictions" if prediction is None else "true depth maps"
            raise DataError(f"There are only {i} {short}; there must be as many of both.")
        score.add(prediction, truth, f"map {i}")
    return score.result()
