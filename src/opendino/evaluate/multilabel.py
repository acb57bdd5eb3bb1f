# SPDX-License-Identifier: Apache-2.0
"""Multi-label classification on frozen features: one-vs-rest logistic regression, scored by average precision.

As VOC2007 is scored by Kornblith et al. 2019 and in DINOv2's table of linear probes on fine-grained sets: learned on
train and val, scored on test. Targets are 1 (there), -1 (not there) and 0 (difficult: the image counts neither way for
this class).

Shapes: N, M items, D width, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from opendino.errors import ConfigError, DataError
from opendino.evaluate.logistic import ROUGH, Choice, LogisticRegression, OnFit, fit_logistic, fit_path

SHORT_C = tuple(float(c) for c in np.logspace(-6, 5, 12))
"""The decades of the grid that single-label logistic regression has."""
Figures = dict[str, float | None]
Fit = Callable[[Tensor, Tensor], list[LogisticRegression]]
"""Fits one class: features (n, D) and (n,) of 0 and 1 to a classifier for each C."""


@dataclass(frozen=True, eq=False)
class OneVsRest:
    """One two-class logistic regression for each class, all with one C.

    Attributes:
        weight: (C, D) float64 on the CPU, the rows that scikit-learn's LogisticRegression has for two classes.
        bias: (C,).
        fitted: (C,) bool; False where the training items are all of one kind, and the logit is 0.
        c: inverse strength of the penalty.
        converged: whether all of them did.
    """

    weight: Tensor
    bias: Tensor
    fitted: npt.NDArray[np.bool_]
    c: float
    converged: bool

    def logits(self, x: Any) -> Tensor:
        """Give (M, C) float64 for features (M, D): log-odds of each class on its own."""
        return torch.as_tensor(x).to(self.weight) @ self.weight.T + self.bias


@dataclass(frozen=True, eq=False)
class MultiLabelScores:
    """Average precision of each class, in percent.

    Attributes:
        area: class → area under the stepwise precision-recall curve; None without a positive item.
        eleven_point: class → VOC2007's 11-point interpolation; None without a positive item.
        positives: class → number of positive items.
        ignored: pairs of item and class that did not count.
        left_out: classes without a positive item, which no mean holds.
    """

    area: Figures
    eleven_point: Figures
    positives: dict[str, int]
    ignored: int
    left_out: list[str]

    @property
    def map_area(self) -> float:
        """Mean of `area`."""
        return float(np.mean([v for v in self.area.values() if v is not None]))

    @property
    def map_eleven_point(self) -> float:
        """Mean of `eleven_point`."""
        return float(np.mean([v for v in self.eleven_point.values() if v is not None]))


def average_precision(scores: npt.ArrayLike, targets: npt.ArrayLike) -> float:
    """Give the area under the stepwise precision-recall curve of one class, 0 to 1.

    Σ (recall gained at a threshold) · (precision there), as scikit-learn's average_precision_score: items with equal
    scores are at one threshold, so their order does not matter.

    Args:
        scores: (M,), higher for "there".
        targets: (M,) of 1, -1 and 0; those of 0 are left out.

    Returns:
        NaN without a positive item.
    """
    found, taken = _curve(scores, targets)
    if not len(found) or not found[-1]:
        return math.nan
    gained = np.diff(found, prepend=0)
    return float((gained * found / taken).sum() / found[-1])


def eleven_point_precision(scores: npt.ArrayLike, targets: npt.ArrayLike) -> float:
    """Give VOC2007's average precision of one class, 0 to 1 (Everingham et al. 2010, §4.2).

    The mean, over recalls of 0, 0.1, …, 1, of the highest precision at that recall or a higher one. Items with equal
    scores are at one threshold; arguments and NaN as in `average_precision`.
    """
    found, taken = _curve(scores, targets)
    if not len(found) or not found[-1]:
        return math.nan
    highest = np.maximum.accumulate((found / taken)[::-1])[::-1]
    # Whole numbers: 3 found of 10 is a recall of 0.3, which 3 * 0.1 in floating point is above.
    reached = [int(np.argmax(10 * found >= tenth * found[-1])) for tenth in range(11)]
    return float(highest[reached].mean())


def multilabel_scores(scores: Any, targets: npt.NDArray[np.int8], classes: Sequence[str]) -> MultiLabelScores:
    """Score each class by its average precision.

    Args:
        scores: (M, C), higher for "there".
        targets: (M, C) of 1, -1 and 0.
        classes: C names.

    Raises:
        DataError: when shapes do not go together, a score is NaN, or no class has a positive item.
    """
    given = np.asarray(torch.as_tensor(scores).cpu(), np.float64)
    if given.shape != targets.shape or given.ndim != 2 or given.shape[1] != len(classes):
        raise DataError(
            f"Average precision was given scores {given.shape}, targets {targets.shape} and {len(classes)} classes; "
            "it needs (M, C), (M, C) and C."
        )
    if np.isnan(given).any():
        raise DataError("The scores hold NaN, so items cannot be put in order. Look at the features.")
    positives = {name: int(n) for name, n in zip(classes, (targets > 0).sum(0), strict=True)}
    left_out = [name for name, n in positives.items() if not n]
    if len(left_out) == len(classes):
        raise DataError("No image that is scored has any of the classes, so there is no average precision.")

    def percent(measure: Any) -> Figures:
        found = [measure(given[:, i], targets[:, i]) for i in range(len(classes))]
        return {c: None if math.isnan(v) else 100 * v for c, v in zip(classes, found, strict=True)}

    return MultiLabelScores(
        percent(average_precision), percent(eleven_point_precision), positives, int((targets == 0).sum()), left_out
    )


def learnable(targets: npt.NDArray[np.int8]) -> npt.NDArray[np.bool_]:
    """Give (C,) bool: whether a class has items with it and items without it among (N, C) targets."""
    return np.asarray((targets > 0).any(0) & (targets < 0).any(0))


def fit_one_vs_rest(
    x: Any,
    targets: npt.NDArray[np.int8],
    c: float = 1.0,
    *,
    device: str | torch.device | None = None,
    on_fit: OnFit | None = None,
) -> OneVsRest:
    """Fit a logistic regression for each class, on the items that count for it.

    Args:
        x: (N, D) features.
        targets: (N, C) of 1, -1 and 0.
        c: inverse strength of the penalty, > 0.
        device: where to compute; default: where `x` lies.
        on_fit: told about progress, after each class.

    Raises:
        ConfigError: for a c that is not positive.
        DataError: for shapes that do not go together, or features that are not finite.
    """
    return _fit(x, targets, [c], lambda own, truth: [fit_logistic(own, truth, c, device=device)], on_fit)[0]


def choose_c(
    x: Any,
    targets: npt.NDArray[np.int8],
    c_values: Sequence[float] = SHORT_C,
    *,
    share: float = 0.1,
    seed: int = 0,
    tolerance: float = ROUGH,
    device: str | torch.device | None = None,
    on_fit: OnFit | None = None,
) -> Choice:
    """Pick one C for all classes by the mean average precision (area) on a held-out part of the training set.

    The part depends on (N, share, seed) only. Classes without a positive item in it, or of one kind only outside of it,
    have no part in the choice.

    Args:
        x: (N, D) features.
        targets: (N, C) of 1, -1 and 0.
        c_values: to try.
        share: of the items that is held out.
        seed: of the part.
        tolerance: as in `fit_logistic`.
        device: where to compute.
        on_fit: told about progress, after each class.

    Returns:
        Its `curve` is (C, mean average precision in percent).

    Raises:
        ConfigError: without a value, or for a share that is not between 0 and 1.
        DataError: when no class can be scored on the held-out part.
    """
    if not c_values:
        raise ConfigError("There is no value of C to try; give at least one.")
    if not 0 < share < 1:
        raise ConfigError(f"The held-out share is {share}; it must lie between 0 and 1.")
    order = np.random.default_rng([seed, len(targets)]).permutation(len(targets))
    split = max(round(share * len(targets)), 1)
    held_out, rest = np.sort(order[:split]), np.sort(order[split:])
    usable = learnable(targets[rest]) & (targets[held_out] > 0).any(0)
    if not usable.any():
        raise DataError(
            f"None of the classes is both in the {split} of {len(targets)} training images that are held out and in "
            "the others, so C cannot be chosen. Add images, or give one value with --c-values."
        )
    features, own = torch.as_tensor(x), targets[:, usable]
    rising = sorted(c_values)

    def fit(features: Tensor, truth: Tensor) -> list[LogisticRegression]:
        return fit_path(features, truth, rising, tolerance=tolerance, device=device)

    models = _fit(features[rest], own[rest], rising, fit, on_fit)
    names = [str(i) for i in range(own.shape[1])]
    curve = [(m.c, multilabel_scores(m.logits(features[held_out]), own[held_out], names).map_area) for m in models]
    best = max(range(len(curve)), key=lambda i: (curve[i][1], -i))
    edge = "" if len(curve) == 1 else {0: "lowest", len(curve) - 1: "highest"}.get(best, "")
    return Choice(curve[best][0], curve, edge, split)


def _fit(
    x: Any, targets: npt.NDArray[np.int8], c_values: list[float], fit: Fit, on_fit: OnFit | None
) -> list[OneVsRest]:
    """Fit all classes, and give them together for each value of C."""
    features = torch.as_tensor(x)
    if features.ndim != 2 or targets.ndim != 2 or len(targets) != len(features):
        raise DataError(
            f"One-vs-rest was given features {tuple(features.shape)} and targets {targets.shape}; it needs (N, D) and "
            "(N, C)."
        )
    fitted, shape = learnable(targets), (len(c_values), targets.shape[1])
    weight, bias = torch.zeros(*shape, features.shape[1], dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    converged = [True] * len(c_values)
    for i, usable in enumerate(fitted):
        own = np.flatnonzero(targets[:, i])
        truth = torch.from_numpy((targets[own, i] > 0).astype(np.int64))
        for j, model in enumerate(fit(features[own], truth) if usable else ()):
            weight[j, i], bias[j, i] = model.weight[1] - model.weight[0], model.bias[1] - model.bias[0]
            converged[j] &= model.converged
        if on_fit is not None:
            on_fit(i + 1, len(fitted))
    return [OneVsRest(weight[j], bias[j], fitted, c, converged[j]) for j, c in enumerate(c_values)]


def _curve(scores: npt.ArrayLike, targets: npt.ArrayLike) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Give, for each threshold from the highest score down, the positive items and all items at or above it."""
    given, truth = np.asarray(scores, np.float64), np.asarray(targets)
    counts = truth != 0
    given, truth = given[counts], truth[counts]
    order = np.argsort(-given, kind="stable")
    given = given[order]
    ends = np.flatnonzero(np.append(given[1:] != given[:-1], True)) if len(given) else np.array([], np.int64)
    return np.cumsum(truth[order] > 0, dtype=np.int64)[ends], ends + 1
