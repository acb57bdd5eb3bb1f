# SPDX-License-Identifier: Apache-2.0
"""mIoU and its relatives against hand-computed cases, torchmetrics, scikit-learn and a literal loop."""

import numpy as np
import pytest
import sklearn.metrics
import torch
import torchmetrics.functional.classification as tm

from opendino.errors import DataError
from opendino.evaluate.segmentation import PixelConfusion, scores_of, worst_confusions


def scores(prediction, truth, num_classes):
    counts = PixelConfusion(num_classes)
    counts.add(np.array(prediction), np.array(truth))
    return counts.scores()


def test_a_case_by_hand():
    truth = [[0, 0, 0, 1], [1, 1, 2, 255]]
    prediction = [[0, 0, 1, 1], [1, 0, 2, 2]]
    result = scores(prediction, truth, 3)
    # Class 0: 2 right, union 4. Class 1: 2 right, union 4. Class 2: 1 of 1; the ignored pixel counts for nobody.
    np.testing.assert_allclose(result.iou, [50, 50, 100])
    assert result.miou == pytest.approx(200 / 3)
    assert result.pixel_accuracy == pytest.approx(500 / 7)
    np.testing.assert_allclose(result.accuracy, [200 / 3, 200 / 3, 100])
    assert result.mean_accuracy == pytest.approx((200 / 3 + 200 / 3 + 100) / 3)
    assert result.pixels.tolist() == [3, 3, 1]
    assert result.matrix.tolist() == [[2, 1, 0], [1, 2, 0], [0, 0, 1]]


def test_classes_that_do_not_occur_are_left_out_and_those_only_predicted_count_zero():
    result = scores([0, 0, 3], [0, 0, 0], 5)
    assert result.absent == [1, 2, 4]
    assert result.only_predicted == [3]
    assert result.miou == pytest.approx((200 / 3 + 0) / 2)
    assert result.mean_accuracy == pytest.approx(200 / 3)  # of the classes in the truth
    assert np.isnan(result.iou).tolist() == [False, True, True, False, True]
    assert np.isnan(result.accuracy).tolist() == [False, True, True, True, True]


def test_a_class_only_in_the_truth_counts_zero():
    result = scores([0, 0], [0, 1], 2)
    assert result.iou.tolist() == [50, 0]
    assert result.miou == 25
    assert result.absent == result.only_predicted == []


def literal(prediction, truth, num_classes):
    """Class by class, pixel by pixel."""
    iou, accuracy = [], []
    for c in range(num_classes):
        both = either = true = 0
        for p, t in zip(prediction.ravel(), truth.ravel(), strict=True):
            if t == 255:
                continue
            both += p == c and t == c
            either += p == c or t == c
            true += t == c
        if either:
            iou.append(both / either)
        if true:
            accuracy.append(both / true)
    return 100 * sum(iou) / len(iou), 100 * sum(accuracy) / len(accuracy)


@pytest.mark.parametrize("seed", range(4))
def test_equal_to_torchmetrics_scikit_learn_and_a_loop(seed):
    rng = np.random.default_rng(seed)
    classes, used = 7, (6, 7, 4, 2)[seed]  # some seeds leave classes out
    truth = rng.integers(0, used, (3, 12, 10))
    prediction = np.where(rng.random(truth.shape) < 0.5, truth, rng.integers(0, min(used + 1, classes), truth.shape))
    truth[rng.random(truth.shape) < 0.1] = 255
    counts = PixelConfusion(classes)
    for p, t in zip(prediction, truth, strict=True):
        counts.add(p, torch.from_numpy(t).to(torch.uint8))
    result = counts.scores()

    p, t = torch.from_numpy(prediction), torch.from_numpy(truth)
    arguments = {"num_classes": classes, "ignore_index": 255}
    np.testing.assert_array_equal(result.matrix, tm.multiclass_confusion_matrix(p, t, **arguments))
    assert result.miou == pytest.approx(100 * float(tm.multiclass_jaccard_index(p, t, **arguments)), abs=1e-4)
    accuracy = tm.multiclass_accuracy(p, t, average="micro", **arguments)
    assert result.pixel_accuracy == pytest.approx(100 * float(accuracy), abs=1e-4)

    kept = truth != 255
    y, z = truth[kept], prediction[kept]
    occurring = sorted(set(y) | set(z))
    assert result.miou == pytest.approx(
        100 * sklearn.metrics.jaccard_score(y, z, labels=occurring, average="macro"), rel=1e-9
    )
    assert result.mean_accuracy == pytest.approx(
        100 * sklearn.metrics.recall_score(y, z, labels=sorted(set(y)), average="macro"), rel=1e-9
    )
    assert result.pixel_accuracy == pytest.approx(100 * sklearn.metrics.accuracy_score(y, z), rel=1e-9)
    np.testing.assert_allclose(
        result.iou[occurring], 100 * sklearn.metrics.jaccard_score(y, z, labels=occurring, average=None), rtol=1e-9
    )
    assert (result.miou, result.mean_accuracy) == pytest.approx(literal(prediction, truth, classes), rel=1e-9)


def test_sums_over_images_and_not_means_of_images():
    counts = PixelConfusion(2)
    counts.add(np.zeros((1, 90), int), np.zeros((1, 90), int))
    counts.add(np.ones((1, 10), int), np.zeros((1, 10), int))
    assert counts.scores().iou.tolist() == [90, 0]


@pytest.mark.parametrize(
    ("prediction", "truth", "words"),
    [
        ([[0, 1]], [[0, 1, 1]], "shape"),
        ([0, 3], [0, 1], "prediction for x.png holds values from 0 to 3"),
        ([0, 1], [0, 7], "truth for x.png holds values from 0 to 7"),
        ([0, -1], [0, 1], "prediction for x.png holds values from -1"),
        ([0.0, 1.0], [0, 1], "dtype float64"),
    ],
)
def test_what_cannot_be_counted_is_refused(prediction, truth, words):
    with pytest.raises(DataError, match=words):
        PixelConfusion(3).add(np.array(prediction), np.array(truth), "x.png")


def test_a_prediction_under_an_ignored_pixel_may_be_anything():
    counts = PixelConfusion(2)
    counts.add(np.array([0, 99]), np.array([0, 255]))
    assert counts.matrix.sum() == 1


def test_no_pixel_is_no_score():
    counts = PixelConfusion(2)
    counts.add(np.array([0, 1]), np.array([255, 255]))
    with pytest.raises(DataError, match="No pixel counts"):
        counts.scores()


def test_worst_confusions_are_shares_of_the_true_class():
    matrix = np.array([[8, 2, 0], [0, 1, 3], [0, 0, 0]])
    assert worst_confusions(matrix, ["a", "b", "c"]) == [("b", "c", 75.0), ("a", "b", 20.0)]
    assert worst_confusions(matrix, ["a", "b", "c"], 1) == [("b", "c", 75.0)]
    assert scores_of(matrix).miou == pytest.approx((80 + 100 / 6 + 0) / 3)
