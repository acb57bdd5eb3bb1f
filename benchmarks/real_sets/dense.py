# SPDX-License-Identifier: Apache-2.0
"""One linear head for every row: ridge regression from patches to what is there, enlarged to pixels.

It sees the vector of the patch, the mean over the image's patches, and the place in the image, whatever the row. It has
a closed form and no settings to tune, so rows differ by their vectors alone. The published heads, which are trained for
thousands of steps, are `opendino eval segmentation` and `opendino eval depth`.

Shapes: n images, g patches a side, D width, C classes, s pixels a side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import interpolate

RIDGE = 1e-4  # per row of the regression, on standardised vectors
RARE = 1e-4
NEAREST, FARTHEST = 0.3, 10.0  # metres
IGNORE = 255
CHUNK = 50  # images
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Ridge:
    """A fitted regression on patches in context: (x − mean) / std @ weight + bias."""

    mean: Floats
    std: Floats
    weight: Floats
    bias: Floats

    def __call__(self, x: npt.NDArray[Any]) -> Floats:
        """Predict (…, g, g, T) from patch vectors (…, g, g, D)."""
        out: Floats = (in_context(x) - self.mean) / self.std @ self.weight + self.bias
        return out


def in_context(x: npt.NDArray[Any]) -> Floats:
    """Add the mean over the image and the place (y, x, y², x², xy, y³) to vectors (…, g, g, D): (…, g, g, 2·D + 6)."""
    own = x.astype(np.float64)
    mean = np.broadcast_to(own.mean((-3, -2), keepdims=True), own.shape)
    rows, columns = x.shape[-3:-1]
    v, u = np.meshgrid(np.arange(rows) / rows - 0.5, np.arange(columns) / columns - 0.5, indexing="ij")
    place = np.stack([v, u, v * v, u * u, v * u, v**3], -1)
    return np.concatenate([own, mean, np.broadcast_to(place, (*own.shape[:-1], 6))], -1)


def fit_ridge(x: npt.NDArray[Any], y: Floats, counts: npt.NDArray[np.bool_] | None = None) -> Ridge:
    """Fit (n, g, g, D) to (n, g, g, T), image block by image block, so that vectors may stay float16 on a disk.

    Args:
        x: vectors of patches.
        y: what is there.
        counts: (n, g, g), which patches count; default: all.
    """
    width, depth = in_context(x[:1]).shape[-1], y.shape[-1]
    total, sum_x, sum_y = 0, np.zeros(width), np.zeros(depth)
    xx, xy = np.zeros((width, width)), np.zeros((width, depth))
    for start in range(0, len(x), CHUNK):
        part = slice(start, start + CHUNK)
        keep = np.ones(x[part].shape[:3], bool) if counts is None else counts[part]
        a, b = in_context(x[part])[keep], y[part][keep]
        total, sum_x, sum_y = total + len(a), sum_x + a.sum(0), sum_y + b.sum(0)
        xx, xy = xx + a.T @ a, xy + a.T @ b
    mean, bias = sum_x / total, sum_y / total
    covariance = xx / total - np.outer(mean, mean)
    std = np.sqrt(np.maximum(np.diag(covariance), 1e-12))
    correlation = covariance / np.outer(std, std) + RIDGE * np.eye(width)
    weight = np.linalg.solve(correlation, (xy / total - np.outer(mean, bias)) / std[:, None])
    return Ridge(mean, std, weight, bias)


def enlarge(grid: Floats, side: int) -> torch.Tensor:
    """Enlarge predictions (b, g, g, T) to (b, T, s, s), bilinear between the middles of patches."""
    return interpolate(
        torch.from_numpy(grid).permute(0, 3, 1, 2), size=(side, side), mode="bilinear", align_corners=False
    )


# --- segmentation --------------------------------------------------------------------------------------------------


def class_shares(masks: npt.NDArray[np.uint8], grid: int, num_classes: int) -> Floats:
    """Give the share of each class in each patch, (n, g, g, C)."""
    n, side = len(masks), masks.shape[1] // grid
    patches = masks.reshape(n, grid, side, grid, side).transpose(0, 1, 3, 2, 4).reshape(n, grid, grid, -1)
    return np.stack([(patches == c).mean(-1) for c in range(num_classes)], -1)


def fit_segmenter(x: npt.NDArray[Any], masks: npt.NDArray[np.uint8], num_classes: int) -> Ridge:
    """Regress class shares, each divided by the root of its mean, so that rare classes are found at all."""
    shares = class_shares(masks, x.shape[1], num_classes)
    return fit_ridge(x, shares / np.sqrt(np.maximum(shares.mean((0, 1, 2)), RARE)))


def segment(head: Ridge, x: npt.NDArray[Any], side: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Iterate over blocks of predicted masks (b, s, s)."""
    for start in range(0, len(x), CHUNK):
        yield enlarge(head(x[start : start + CHUNK]), side).argmax(1).numpy().astype(np.uint8)


def mean_iou(predicted: npt.NDArray[np.uint8], true: npt.NDArray[np.uint8], num_classes: int) -> float:
    """Give the mean over classes of intersection over union of all pixels, percent; 255 in the truth does not count.

    Classes that are neither in the truth nor predicted are left out.
    """
    counted = true != IGNORE
    pairs = true[counted].astype(np.int64) * num_classes + predicted[counted]
    matrix = np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)
    union = matrix.sum(0) + matrix.sum(1) - np.diag(matrix)
    return 100 * float((np.diag(matrix)[union > 0] / union[union > 0]).mean())


# --- depth ---------------------------------------------------------------------------------------------------------


def fit_depth(x: npt.NDArray[Any], millimetres: npt.NDArray[np.uint16]) -> Ridge:
    """Regress the mean depth of each patch, metres; patches without a known depth do not count."""
    n, grid = x.shape[:2]
    side = millimetres.shape[1] // grid
    metres = millimetres.astype(np.float64) / 1000
    patches = metres.reshape(n, grid, side, grid, side).transpose(0, 1, 3, 2, 4).reshape(n, grid, grid, -1)
    known = patches > 0
    mean = patches.sum(-1) / np.maximum(known.sum(-1), 1)
    return fit_ridge(x, mean[..., None], known.any(-1))


def depths(head: Ridge, x: npt.NDArray[Any], side: int) -> Iterator[Floats]:
    """Iterate over blocks of predicted depth (b, s, s), metres."""
    for start in range(0, len(x), CHUNK):
        yield enlarge(head(x[start : start + CHUNK]), side)[:, 0].numpy().clip(NEAREST, FARTHEST)


def depth_errors(predicted: Floats, millimetres: npt.NDArray[np.uint16]) -> dict[str, float]:
    """Give RMSE (m), AbsRel and the share within a factor of 1.25 (percent): means over images, as for NYUd."""
    found = []
    for prediction, truth in zip(predicted, millimetres):
        known = truth > 0
        true, guess = truth[known] / 1000, prediction[known]
        ratio = np.maximum(true / guess, guess / true)
        found.append([
            np.sqrt(((true - guess) ** 2).mean()), (np.abs(true - guess) / true).mean(), 100 * (ratio < 1.25).mean()
        ])  # fmt: skip
    rmse, abs_rel, within = np.mean(found, axis=0)
    return {"rmse": float(rmse), "abs_rel": float(abs_rel), "d1": float(within)}
