# SPDX-License-Identifier: Apache-2.0
"""Logistic regression on frozen features (DINOv2 §7.1, "logistic regression"; method.md §3).

Minimises C·Σ cross-entropy + ½‖W‖² over weights and free intercepts in float64: the problem of scikit-learn's
LogisticRegression(C=C), whose solution is unique, so another way to it gives the same classifier. The way here is
Newton's method, each step solved by conjugate gradients along the principal axes of the features, where the curvature
is nearly diagonal; a grid of C goes upwards and starts each fit from the one before.

Shapes: N items, D width, K classes; r ≤ min(N, D) principal axes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from opendino.errors import ConfigError, DataError

log = logging.getLogger(__name__)

DEFAULT_C = tuple(float(c) for c in np.logspace(-6, 5, 45))
TOLERANCE, ROUGH = 1e-6, 1e-2
"""Distance to the solution at which the last step of a fit is taken, relative to the norm of the weights: for the
result, and for fits that only rank values of C or lead to the next one."""
EASY_C, STRIDE = 1e-4, 10.0
"""A single fit starts near EASY_C and goes up by STRIDE: from zero it would take several times as long."""
MAX_STEPS, MAX_INNER = 200, 1000
CHUNK_NUMBERS = 1 << 23
"""Logits computed at once, so that memory does not grow with the set."""
OnFit = Callable[[int, int], None]
"""Called with fits done and fits in all."""


@dataclass(frozen=True, eq=False)
class LogisticRegression:
    """A fitted classifier.

    Attributes:
        weight: (K, D) float64; with two classes the rows are ± half of what scikit-learn's one row is.
        bias: (K,).
        c: inverse strength of the penalty it was fitted with.
        steps: Newton steps taken.
        converged: whether the tolerance was reached.
    """

    weight: Tensor
    bias: Tensor
    c: float
    steps: int
    converged: bool

    def logits(self, x: Any) -> Tensor:
        """Give (M, K) float64 for features (M, D)."""
        return torch.as_tensor(x).to(self.weight) @ self.weight.T + self.bias

    def predict_proba(self, x: Any) -> Tensor:
        """Give (M, K) probabilities."""
        return self.logits(x).softmax(1)


@dataclass(frozen=True, eq=False)
class Choice:
    """How C was chosen.

    Attributes:
        c: the value with the highest top-1 on the held-out part; the smallest of equal ones.
        curve: (C, top-1 in percent) of every value tried.
        edge: "lowest" or "highest" when the chosen value is at that end of the grid, else "".
        num_held_out: items in the held-out part.
    """

    c: float
    curve: list[tuple[float, float]]
    edge: str
    num_held_out: int


def fit_logistic(
    x: Any,
    y: Any,
    c: float = 1.0,
    *,
    num_classes: int | None = None,
    tolerance: float = TOLERANCE,
    device: str | torch.device | None = None,
) -> LogisticRegression:
    """Fit one logistic regression.

    Args:
        x: (N, D) features.
        y: (N,) classes, integers from 0. A class without items gets zero weights and an intercept of -∞.
        c: inverse strength of the penalty, > 0.
        num_classes: K; default: the highest class + 1.
        tolerance: distance of the weights to the solution at which the fit ends, relative to their norm.
        device: where to compute; default: where `x` lies.

    Raises:
        ConfigError: for a c that is not positive.
        DataError: for shapes that do not go together, a single class, or features that are not finite.
    """
    problem, way = _Problem(x, y, num_classes, device), [c]
    while way[0] > EASY_C:
        way.insert(0, way[0] / STRIDE)
    return problem.fits(way, [ROUGH] * (len(way) - 1) + [tolerance])[-1]


def fit_path(
    x: Any,
    y: Any,
    c_values: Sequence[float],
    *,
    num_classes: int | None = None,
    tolerance: float = TOLERANCE,
    device: str | torch.device | None = None,
    on_fit: OnFit | None = None,
) -> list[LogisticRegression]:
    """Fit one logistic regression for each C, rising, each from the one before; arguments as in `fit_logistic`."""
    return _Problem(x, y, num_classes, device).fits(sorted(c_values), [tolerance] * len(c_values), on_fit)


def choose_c(
    x: Any,
    y: Any,
    c_values: Sequence[float] = DEFAULT_C,
    *,
    share: float = 0.1,
    seed: int = 0,
    tolerance: float = ROUGH,
    device: str | torch.device | None = None,
    on_fit: OnFit | None = None,
) -> Choice:
    """Pick C on a held-out part of the training set.

    Args:
        x: (N, D) features.
        y: (N,) classes.
        c_values: to try.
        share: held out of each class (`hold_out`).
        seed: of the part.
        tolerance: as in `fit_logistic`.
        device: where to compute.
        on_fit: told about progress.
    """
    if not c_values:
        raise ConfigError("There is no value of C to try; give at least one.")
    labels = np.asarray(torch.as_tensor(y).cpu())
    train, held_out = hold_out(labels, share, seed)
    features = torch.as_tensor(x)
    models = fit_path(
        features[train], labels[train], c_values, num_classes=int(labels.max()) + 1, tolerance=tolerance, device=device,
        on_fit=on_fit,
    )  # fmt: skip
    test, truth = features[held_out], torch.from_numpy(labels[held_out])
    curve = [(m.c, 100 * (m.logits(test).argmax(1).cpu() == truth).double().mean().item()) for m in models]
    best = max(range(len(curve)), key=lambda i: (curve[i][1], -i))
    edge = "" if len(curve) == 1 else {0: "lowest", len(curve) - 1: "highest"}.get(best, "")
    return Choice(curve[best][0], curve, edge, len(held_out))


def hold_out(
    labels: npt.NDArray[Any], share: float = 0.1, seed: int = 0
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Split items into a part to fit on and a held-out part, class by class.

    Of a class with n items round(share·n) are held out, at least one if n > 1, and never all. Depends on (labels,
    share, seed) only.

    Returns:
        Sorted indices of the two parts.

    Raises:
        DataError: when no class has two items.
    """
    if not 0 < share < 1:
        raise ConfigError(f"The held-out share is {share}; it must lie between 0 and 1.")
    rng, held_out = np.random.default_rng([seed, len(labels)]), []
    for c in np.unique(labels):
        own = rng.permutation(np.flatnonzero(labels == c))
        held_out.append(own[: min(max(round(share * len(own)), 1), len(own) - 1)])
    out = np.sort(np.concatenate(held_out))
    if not len(out):
        raise DataError(
            "Every class has a single training image, so none can be held out to choose a setting on. Add images, or "
            "give one value instead of a grid."
        )
    return np.setdiff1d(np.arange(len(labels)), out), out


class _Problem:
    """Features along their principal axes, and Newton's method on them.

    A centred, rotated feature changes neither the penalty nor, with free intercepts, the solution; axes without
    variance have weight 0 in it. Parameters are (r + 1, K), the intercepts last; only present classes are fitted.
    """

    def __init__(self, x: Any, y: Any, num_classes: int | None, device: str | torch.device | None) -> None:
        features, labels = torch.as_tensor(x), torch.as_tensor(y)
        _check(features, labels)
        features = features.to(device or features.device, torch.float64)
        present, self.labels = labels.to(features.device).long().unique(return_inverse=True)
        self.num_classes, self.present = num_classes or int(labels.max()) + 1, present
        self.mean = features.mean(0)
        self.axes = _principal_axes(features, self.mean)  # (D, r)
        ones = features.new_ones(len(features), 1)
        self.z = torch.cat([(features - self.mean) @ self.axes, ones], 1)  # (N, r + 1)
        rows = max(CHUNK_NUMBERS // len(present), 1)
        self.parts = list(zip(self.z.split(rows), self.labels.split(rows), strict=True))

    def fits(
        self, c_values: Sequence[float], tolerances: Sequence[float], on_fit: OnFit | None = None
    ) -> list[LogisticRegression]:
        """Fit each C to its tolerance, starting from the one before."""
        if min(c_values) <= 0:
            raise ConfigError(f"C is {min(c_values)}; it must be positive.")
        theta, models = self.z.new_zeros(self.z.shape[1], len(self.present)), []
        for i, (c, tolerance) in enumerate(zip(c_values, tolerances, strict=True)):
            theta, steps, converged = self._newton(theta, c, tolerance)
            if not converged:
                log.warning("Logistic regression at C = %g stopped after %d steps before it converged.", c, steps)
            models.append(self._model(theta, c, steps, converged))
            if on_fit is not None:
                on_fit(i + 1, len(c_values))
        return models

    def _newton(self, theta: Tensor, c: float, tolerance: float) -> tuple[Tensor, int, bool]:
        # With two classes ±w/2 is penalised half as much as the one row w of scikit-learn: C/2 makes them equal.
        penalty = theta.new_full((len(theta), 1), 1 / ((c / 2 if len(self.present) == 2 else c) * len(self.z)))
        penalty[-1] = 0
        value, gradient, curvature, probabilities = self._derivatives(theta, penalty)
        for step in range(MAX_STEPS):
            direction, decrement = self._direction(gradient, curvature, probabilities, penalty)
            # Near the solution decrement ≥ penalty·‖W − W*‖², and below 1e-18 of the value it is rounding.
            wanted = penalty[0] * tolerance**2 * theta[:-1].square().sum()
            if decrement <= torch.maximum(wanted, 1e-18 * value):
                return theta + direction, step, True
            moved, size = None, 1.0
            while size > 1e-10:
                tried = theta + size * direction
                found = self._derivatives(tried, penalty)
                # Near the solution the value's rounding hides the descent, so it is allowed for.
                if found[0] <= value - 1e-4 * size * decrement + 1e-14 * value:
                    moved = tried
                    break
                size /= 2
            if moved is None:
                return theta, step, False
            theta, (value, gradient, curvature, probabilities) = moved, found
        return theta, MAX_STEPS, False

    def _derivatives(self, theta: Tensor, penalty: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Give value, gradient and diagonal of the Hessian of the mean loss with penalty, and probabilities by part."""
        value = (penalty * theta.square()).sum() / 2
        gradient, curvature, probabilities = penalty * theta, penalty.expand_as(theta).clone(), []
        for z, labels in self.parts:
            logs = (z @ theta).log_softmax(1)
            value = value - logs.gather(1, labels[:, None]).sum() / len(self.z)
            p = logs.exp()
            probabilities.append(p)
            residual = p.scatter_add(1, labels[:, None], -torch.ones_like(p[:, :1]))
            gradient += z.T @ residual / len(self.z)
            curvature += z.square().T @ (p * (1 - p)) / len(self.z)
        return value, gradient, curvature, probabilities

    def _direction(
        self, gradient: Tensor, curvature: Tensor, probabilities: list[Tensor], penalty: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Solve H·d = −gradient by conjugate gradients; gives d and −gradient·d.

        Scaled by H's diagonal, within the steps that sum to 0 over the classes: the solution does, and all others only
        have the penalty's small curvature.
        """
        direction, residual = torch.zeros_like(gradient), -gradient
        inverse = 1 / curvature
        share = inverse / inverse.sum(1, keepdim=True)
        scaled = residual * inverse - share * (residual * inverse).sum(1, keepdim=True)
        search, product = scaled, (residual * scaled).sum()
        first = product
        for _ in range(MAX_INNER):
            if product <= 0:
                break
            along = self._hessian(search, probabilities, penalty)
            size = product / (search * along).sum()
            direction, residual = direction + size * search, residual - size * along
            scaled = residual * inverse - share * (residual * inverse).sum(1, keepdim=True)
            before, product = product, (residual * scaled).sum()
            # Closer as the gradient falls, for convergence faster than linear; but not into the rounding.
            if product <= first * min(max(float(first) ** 0.5, 1e-6), 0.25):
                break
            search = scaled + product / before * search
        return direction, -(gradient * direction).sum()

    def _hessian(self, v: Tensor, probabilities: list[Tensor], penalty: Tensor) -> Tensor:
        out = penalty * v
        for (z, _), p in zip(self.parts, probabilities, strict=True):
            s = p * (z @ v)
            s -= p * s.sum(1, keepdim=True)
            out += z.T @ s / len(self.z)
        return out

    def _model(self, theta: Tensor, c: float, steps: int, converged: bool) -> LogisticRegression:
        rows = (self.axes @ theta[:-1]).T  # (present, D)
        weight = rows.new_zeros(self.num_classes, rows.shape[1])
        bias = rows.new_full((self.num_classes,), -torch.inf)
        # A constant added to all intercepts changes nothing: they sum to 0.
        weight[self.present], bias[self.present] = rows, theta[-1] - theta[-1].mean() - rows @ self.mean
        return LogisticRegression(weight, bias, c, steps, converged)


def _principal_axes(features: Tensor, mean: Tensor) -> Tensor:
    """Give (D, r) orthonormal axes that the centred features lie in."""
    n, d = features.shape
    centred = features - mean
    if n <= d:
        axes: Tensor = torch.linalg.svd(centred, full_matrices=False)[2].T
        return axes
    axes = torch.linalg.eigh(centred.T @ centred)[1]
    return axes


def _check(features: Tensor, labels: Tensor) -> None:
    if features.ndim != 2 or labels.shape != (len(features),) or not len(features):
        raise DataError(
            f"Logistic regression was given features {tuple(features.shape)} and classes {tuple(labels.shape)}; it "
            "needs (N, D) and (N,) with at least one item."
        )
    if labels.is_floating_point() or labels.min() < 0:
        raise DataError(f"The classes are {labels.dtype} from {labels.min().item()}; they must be integers from 0.")
    if not torch.isfinite(features).all():
        raise DataError("The features hold NaN or infinity. Leave out the images that could not be read.")
    if len(labels.unique()) < 2:
        raise DataError(
            f"All {len(labels)} items are of class {int(labels[0])}; a classifier needs at least two classes."
        )
