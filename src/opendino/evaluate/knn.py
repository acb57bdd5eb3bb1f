# SPDX-License-Identifier: Apache-2.0
"""Weighted k-nearest-neighbour classification of frozen features (DINOv2 §7, "k-NN"; method.md §3).

Features are L2-normalised and compared by cosine. A test item's k nearest training items vote for their class with the
weights softmax(similarity / temperature). Exact (`opendino.evaluate.neighbours`), block by block.

Shapes: N training items, M test items, D width, C classes, K the largest k.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opendino.errors import ConfigError, DataError
from opendino.evaluate.neighbours import Neighbours, check_finite, rows_of

log = logging.getLogger(__name__)

DEFAULT_K = (10, 20, 100, 200)
Scores = dict[str, dict[str, float]]


def vote(similarity: Tensor, labels: Tensor, num_classes: int, temperature: float) -> Tensor:
    """Weigh the neighbours' votes.

    Args:
        similarity: (m, k) cosine similarities.
        labels: (m, k) classes of the neighbours.
        num_classes: C.
        temperature: divides the similarities.

    Returns:
        (m, C), rows sum to 1.
    """
    weights = (similarity / temperature).softmax(dim=1)
    return weights.new_zeros(len(weights), num_classes).scatter_add_(1, labels, weights)


def knn_predict(
    train_x: Any,
    train_y: Any,
    test_x: Any,
    *,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = 1024,
    device: str | torch.device | None = None,
) -> Tensor:
    """Give the class of every test item, (M,) int64 on the CPU; arguments as in `knn_accuracy`."""
    train, labels, test = _checked(train_x, train_y, test_x, (k,), temperature, device)
    votes = _votes(train, labels, test, [min(k, len(train))], temperature, chunk, int(labels.max()) + 1)
    return torch.cat([torch.empty(0, dtype=torch.long), *(v[0].argmax(1).cpu() for v in votes)])


def knn_accuracy(
    train_x: Any,
    train_y: Any,
    test_x: Any,
    test_y: Any,
    k: Sequence[int] = DEFAULT_K,
    temperature: float = 0.07,
    chunk: int = 1024,
    device: str | torch.device | None = None,
) -> Scores:
    """Score frozen features with the weighted k-NN vote.

    Args:
        train_x: (N, D) features, array or tensor of any float dtype, or a memory map; normalised here, block by block.
        train_y: (N,) classes, integers from 0.
        test_x: (M, D).
        test_y: (M,) classes, each also in `train_y`.
        k: numbers of neighbours; one above N is taken as N, with a warning, and keeps its name in the result.
        temperature: of the softmax over similarities.
        chunk: test items compared at once.
        device: where to compute; default: where `train_x` lies.

    Returns:
        {"top1": {"10": …}, "top5": {…}, "mean_per_class": {…}} in percent, keyed by k. top5 counts an item whose
        class got votes and has fewer than 5 classes above it. mean_per_class is the mean of each test class' own top-1.

    Raises:
        ConfigError: for a k or temperature that is not positive.
        DataError: for empty sets, differing shapes, features that are not finite, or test classes without training
            items.
    """
    train, labels, test = _checked(train_x, train_y, test_x, k, temperature, device)
    truth = torch.as_tensor(test_y).long().to(train.device)
    _check_labels(labels, truth, len(test))
    used = [min(n, len(train)) for n in k]
    for asked, n in zip(k, used, strict=True):
        if asked != n:
            log.warning("k = %d is more than the %d training items: k = %d is used.", asked, n, n)
    top1: list[list[Tensor]] = [[] for _ in k]
    top5: list[list[Tensor]] = [[] for _ in k]
    votes = _votes(train, labels, test, used, temperature, chunk, int(labels.max()) + 1)
    for right, scores in zip(truth.split(chunk), votes, strict=True):
        for i, score in enumerate(scores):
            own = score.gather(1, right[:, None])
            top1[i].append((score.argmax(1) == right).cpu())
            top5[i].append(((own[:, 0] > 0) & ((score > own).sum(1) < 5)).cpu())
    hits = [torch.cat(t) for t in top1]
    return {
        "top1": {str(n): percent(h) for n, h in zip(k, hits, strict=True)},
        "top5": {str(n): percent(torch.cat(h)) for n, h in zip(k, top5, strict=True)},
        "mean_per_class": {str(n): mean_per_class(h, truth.cpu()) for n, h in zip(k, hits, strict=True)},
    }


def few_shot_accuracy(
    train_x: Any,
    train_y: Any,
    test_x: Any,
    test_y: Any,
    n_per_class: int,
    *,
    draws: int = 5,
    seed: int = 0,
    **settings: Any,
) -> dict[str, Any]:
    """Score with n training items a class, over several draws.

    Args:
        train_x: as in `knn_accuracy`, like the next three.
        train_y: classes.
        test_x: test features.
        test_y: their classes.
        n_per_class: items a class; a class that has fewer gives all.
        draws: how many subsets; draw i depends on (seed, i, n_per_class) only.
        seed: of the draws.
        settings: further arguments of `knn_accuracy`.

    Returns:
        Means over the draws as `knn_accuracy` gives them, {"std": the same with standard deviations, "draws": …}.
    """
    if n_per_class < 1 or draws < 1:
        raise ConfigError(f"n_per_class is {n_per_class} and draws {draws}; both must be at least 1.")
    features, labels = torch.as_tensor(train_x), torch.as_tensor(train_y)
    runs = []
    for draw in range(draws):
        keep = torch.from_numpy(subset(labels.cpu().numpy(), n_per_class, seed, draw))
        kept = keep.to(features.device), keep.to(labels.device)
        runs.append(knn_accuracy(features[kept[0]], labels[kept[1]], test_x, test_y, **settings))

    def over(function: Any) -> Scores:
        return {m: {n: float(function([r[m][n] for r in runs])) for n in of_k} for m, of_k in runs[0].items()}

    return {**over(np.mean), "std": over(np.std), "draws": draws}


def subset(labels: np.ndarray[Any, Any], n_per_class: int, seed: int, draw: int) -> np.ndarray[Any, Any]:
    """Draw n items of each class, sorted indices; a function of its arguments alone."""
    rng = np.random.default_rng([seed, draw, n_per_class])
    chosen = [rng.permutation(np.flatnonzero(labels == c))[:n_per_class] for c in np.unique(labels)]
    return np.sort(np.concatenate(chosen))


def percent(hits: Tensor) -> float:
    """Give the share of True, in percent."""
    return 100 * hits.double().mean().item()


def mean_per_class(hits: Tensor, truth: Tensor) -> float:
    """Give the mean over the classes in `truth` of the share of hits in each, in percent."""
    counts = truth.bincount()
    right = truth.bincount(weights=hits.double())
    return 100 * (right[counts > 0] / counts[counts > 0]).mean().item()


def _votes(
    train: Tensor, labels: Tensor, test: Tensor, k: list[int], temperature: float, chunk: int, num_classes: int
) -> Iterator[list[Tensor]]:
    """Yield, for each chunk of test items, one (m, C) vote table per k."""
    items = Neighbours(train, len(test), max(k))
    for many in test.split(chunk * torch.get_num_threads() if items.passes else chunk):
        similarity, index = items.search(many)
        for cosines, where in zip(similarity.split(chunk), index.split(chunk), strict=True):
            yield [vote(cosines[:, :n], labels[where[:, :n]], num_classes, temperature) for n in k]


def _checked(
    train_x: Any, train_y: Any, test_x: Any, k: Sequence[int], temperature: float, device: str | torch.device | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Give training features as they are, their labels, both on the device, and test features."""
    train, test, labels = rows_of(train_x), rows_of(test_x), torch.as_tensor(train_y)
    if not k or min(k) < 1 or temperature <= 0:
        raise ConfigError(f"k is {tuple(k)} and temperature {temperature}; both must be positive.")
    if train.ndim != 2 or test.ndim != 2 or train.shape[1] != test.shape[1] or not len(train) or not len(test):
        raise DataError(
            f"k-NN was given features of shapes {tuple(train.shape)} and {tuple(test.shape)}; it needs (N, D) and "
            "(M, D) with at least one row each and the same D."
        )
    if labels.shape != (len(train),) or labels.is_floating_point() or labels.min() < 0:
        raise DataError(f"{len(train)} training features need as many classes, integers from 0; got {labels.shape}.")
    check_finite(train, "training")
    check_finite(test, "test")
    train = train.to(device or train.device)
    return train, labels.long().to(train.device), test


def _check_labels(labels: Tensor, truth: Tensor, num_test: int) -> None:
    if truth.shape != (num_test,):
        raise DataError(f"{num_test} test features need as many classes; got shape {tuple(truth.shape)}.")
    unknown = sorted(set(truth.tolist()) - set(labels.tolist()))
    if unknown:
        raise DataError(
            f"Test classes {unknown[:10]} have no training items, so no neighbour can vote for them. "
            "Add training items or leave those classes out."
        )
