# SPDX-License-Identifier: Apache-2.0
"""Scores of a classifier against a hand-computed case, scikit-learn and torchmetrics."""

import warnings

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torchmetrics.functional.classification import multiclass_accuracy

from opendino.errors import DataError
from opendino.evaluate.classification import class_scores

CLASSES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]


def case(n=200, seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 6, n)  # no image of the last class
    scores = rng.normal(size=(n, 7))
    scores[np.arange(n), truth] += 1
    return scores, truth


def test_a_case_by_hand():
    scores = [[5, 1, 0], [0, 2, 1], [3, 4, 0], [0, 1, 2]]
    got = class_scores(scores, [0, 0, 1, 1], ["a", "b", "c"])
    assert (got.top1, got.top5, got.mean_per_class) == (50, 100, 50)
    assert got.per_class[:2].tolist() == [50, 50]
    assert np.isnan(got.per_class[2])
    assert got.confusion.tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 0]]
    assert got.counts.tolist() == [2, 2, 0]
    assert got.by_class() == {"a": 50, "b": 50, "c": None}


def test_top5_by_hand():
    scores = np.tile([7.0, 6, 5, 4, 3, 2, 1], (3, 1))
    got = class_scores(scores, [0, 4, 5], CLASSES)
    assert got.top1 == pytest.approx(100 / 3)
    assert got.top5 == pytest.approx(200 / 3)


def test_equals_scikit_learn_and_torchmetrics():
    scores, truth = case()
    got = class_scores(torch.from_numpy(scores).float(), truth, CLASSES)
    predicted = scores.argmax(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert got.top1 == pytest.approx(100 * sk.accuracy_score(truth, predicted), abs=1e-6)
        assert got.mean_per_class == pytest.approx(100 * sk.balanced_accuracy_score(truth, predicted), abs=1e-6)
        top5 = sk.top_k_accuracy_score(truth, scores, k=5, labels=range(7))
        assert got.top5 == pytest.approx(100 * top5, abs=1e-6)
    assert np.array_equal(got.confusion, sk.confusion_matrix(truth, predicted, labels=range(7)))
    settings = {"num_classes": 7, "average": "micro"}
    logits, right = torch.from_numpy(scores), torch.from_numpy(truth)
    for k, ours in ((1, got.top1), (5, got.top5)):
        theirs = multiclass_accuracy(logits, right, top_k=k, **settings).item()
        assert ours == pytest.approx(100 * theirs, abs=2e-5)  # theirs is a float32
    per_class = multiclass_accuracy(logits, right, num_classes=7, average="none")
    np.testing.assert_allclose(got.per_class[:6], 100 * per_class[:6], atol=2e-5)
    assert 20 < got.top1 < got.top5 < 100, "the case decides nothing"


def test_worst_classes_and_their_mistakes():
    scores = np.eye(4)[[0, 0, 1, 2, 2, 0, 2, 3]]
    got = class_scores(scores, [0, 0, 1, 1, 1, 1, 2, 2], "abcd")
    assert got.worst().tolist() == [1, 2]  # 25 % and 50 %; a is right throughout, d has no images
    assert got.worst(1).tolist() == [1]
    assert got.mistakes_of(1).tolist() == [3, 4, 5]  # twice for c, then once for a
    assert got.mistakes_of(0).tolist() == []


@pytest.mark.parametrize(
    ("scores", "truth", "classes", "words"),
    [
        (np.zeros((2, 3)), [0], 3, "as many names"),
        (np.zeros((2, 3)), [0, 1], 2, "as many names"),
        (np.zeros((0, 3)), [], 3, "at least one"),
        (np.zeros((2, 3)), [0, 3], 3, "from 0 to 2"),
        (np.zeros((2, 3)), [0.0, 1.0], 3, "integers"),
        (np.full((2, 3), np.nan), [0, 1], 3, "NaN"),
    ],
)
def test_what_cannot_be_scored_is_refused(scores, truth, classes, words):
    with pytest.raises(DataError, match=words):
        class_scores(scores, truth, classes)
