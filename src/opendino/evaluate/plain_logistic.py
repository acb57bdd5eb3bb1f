# SPDX-License-Identifier: Apache-2.0
"""A logistic classifier fitted in place, for protocols that need some classifier and were given none."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from opendino.errors import DataError


def fit_logistic(
    x: Any, y: Any, num_classes: int, *, c: float = 1.0, max_iter: int = 1000
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Fit a multinomial logistic regression on standardised features and fold the standardisation into it.

    Args:
        x: (n, F) features.
        y: (n,) classes 0 … num_classes - 1, each with at least one row.
        num_classes: C.
        c: inverse strength of the L2 penalty, as in scikit-learn.
        max_iter: of L-BFGS.

    Returns:
        weight (C, F) and bias (C,), float64: scores are x @ weight.T + bias.

    Raises:
        DataError: for fewer than two classes, or one without rows.
    """
    from sklearn.linear_model import LogisticRegression

    x, y = np.asarray(x, dtype=np.float64), np.asarray(y)
    counts = np.bincount(y, minlength=num_classes)
    if num_classes < 2 or (counts == 0).any():
        raise DataError(
            f"A classifier needs two or more classes with at least one readable training image each; of {num_classes}, "
            f"{int((counts == 0).sum())} have none."
        )
    mean, std = x.mean(0), x.std(0)
    std[std < 1e-12] = 1.0
    fitted = LogisticRegression(C=c, max_iter=max_iter).fit((x - mean) / std, y)
    weight, bias = fitted.coef_, fitted.intercept_
    if num_classes == 2:  # scikit-learn keeps one row for two classes
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    weight = weight / std
    return weight, bias - weight @ mean
