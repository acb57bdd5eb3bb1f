# SPDX-License-Identifier: Apache-2.0
"""Depth metrics against a hand-computed case, a literal loop and torchmetrics."""

import math

import numpy as np
import pytest
import torch
from torchmetrics import MeanAbsolutePercentageError, MeanSquaredError

from opendino.errors import DataError
from opendino.evaluate.depth import METRICS, DepthScore, clip_prediction, crop_box, score_depth, valid_pixels


def slow_errors(prediction, truth, low, high, box):
    """Every metric of one map by a loop over its pixels; None without a valid pixel."""
    pairs = []
    for y in range(box[0], box[1]):
        for x in range(box[2], box[3]):
            t, p = float(truth[y, x]), float(prediction[y, x])
            if low < t < high:
                p = low if math.isnan(p) else p
                pairs.append((min(max(p, low), high), t))
    if not pairs:
        return None
    n = len(pairs)
    logs = [math.log(p) - math.log(t) for p, t in pairs]
    near = [sum(max(p / t, t / p) < 1.25**i for p, t in pairs) / n * 100 for i in (1, 2, 3)]
    return {
        "rmse": math.sqrt(sum((p - t) ** 2 for p, t in pairs) / n),
        "abs_rel": sum(abs(p - t) / t for p, t in pairs) / n,
        "log10": sum(abs(math.log10(p) - math.log10(t)) for p, t in pairs) / n,
        "d1": near[0],
        "d2": near[1],
        "d3": near[2],
        "sq_rel": sum((p - t) ** 2 / t for p, t in pairs) / n,
        "rmse_log": math.sqrt(sum(e * e for e in logs) / n),
        "silog": 100 * math.sqrt(sum(e * e for e in logs) / n - (sum(logs) / n) ** 2),
    }


def maps(n=3, shape=(24, 32), seed=0):
    rng = np.random.default_rng(seed)
    truths = rng.uniform(0.2, 12, (n, *shape)).astype(np.float32)
    truths[:, ::5] = 0
    predictions = (truths * rng.uniform(0.5, 1.6, truths.shape) + rng.normal(0, 0.1, truths.shape)).astype(np.float32)
    return predictions, truths


def test_a_case_computed_by_hand():
    truth, prediction = np.array([[1.0, 2.0], [0.0, 4.0]]), np.array([[1.0, 4.0], [3.0, 3.0]])
    got = score_depth([prediction], [truth])
    # Three pixels count: (1, 1), (4, 2), (3, 4).
    assert got["rmse"] == pytest.approx(math.sqrt(5 / 3), abs=1e-12)
    assert got["abs_rel"] == pytest.approx((0 + 1 + 0.25) / 3, abs=1e-12)
    assert got["log10"] == pytest.approx((math.log10(2) + math.log10(4 / 3)) / 3, abs=1e-12)
    assert got["sq_rel"] == pytest.approx((2 + 0.25) / 3, abs=1e-12)
    assert (got["d1"], got["d2"], got["d3"]) == pytest.approx((100 / 3, 200 / 3, 200 / 3))
    a, b = math.log(2), math.log(3 / 4)
    assert got["rmse_log"] == pytest.approx(math.sqrt((a * a + b * b) / 3), abs=1e-12)
    assert got["silog"] == pytest.approx(100 * math.sqrt((a * a + b * b) / 3 - ((a + b) / 3) ** 2), abs=1e-9)


@pytest.mark.parametrize("crop", ["none", "eigen", "garg"])
def test_equals_a_loop_averaged_over_images(crop):
    predictions, truths = maps()
    box = crop_box(truths.shape[1:], crop)
    slow = [slow_errors(p, t, 0.3, 9.0, box) for p, t in zip(predictions, truths)]
    got = score_depth(predictions, truths, min_depth=0.3, max_depth=9.0, crop=crop)
    for metric in METRICS:
        assert got[metric] == pytest.approx(np.mean([e[metric] for e in slow]), abs=1e-6), metric
    assert got["rmse"] != pytest.approx(got["rmse_pooled"], abs=1e-6)
    assert got["num_images"] == 3


def test_equals_torchmetrics():
    predictions, truths = maps()
    got = score_depth(predictions, truths, max_depth=10)
    rmse, relative, pooled = [], [], MeanSquaredError(squared=False).set_dtype(torch.float64)
    for p, t in zip(predictions, truths):
        mask = (t > 1e-3) & (t < 10)
        p, t = (torch.from_numpy(np.clip(a[mask], 1e-3, 10)).double() for a in (p, t))
        rmse.append(float(MeanSquaredError(squared=False).set_dtype(torch.float64)(p, t)))
        relative.append(float(MeanAbsolutePercentageError().set_dtype(torch.float64)(p, t)))
        pooled.update(p, t)
    assert got["rmse"] == pytest.approx(np.mean(rmse), abs=1e-6)
    assert got["abs_rel"] == pytest.approx(np.mean(relative), abs=1e-6)
    assert got["rmse_pooled"] == pytest.approx(float(pooled.compute()), abs=1e-6)


def test_crops_are_the_published_ones():
    assert crop_box((480, 640), "eigen") == (45, 471, 41, 601)
    assert crop_box((240, 320), "eigen") == (22, 235, 20, 300)
    assert crop_box((352, 1216), "garg") == (143, 349, 43, 1172)
    mask = valid_pixels(np.full((480, 640), 2.0), 1e-3, 10, "eigen")
    assert mask.sum() == (471 - 45) * (601 - 41)
    with pytest.raises(DataError, match="'kb'"):
        crop_box((4, 4), "kb")


def test_what_is_not_finite_is_counted_and_brought_into_the_range():
    truth = np.array([[1.0, 2.0, np.nan, np.inf]])
    prediction = np.array([[np.nan, np.inf, 5.0, 5.0]])
    assert clip_prediction(prediction, 0.5, 8).tolist() == [[0.5, 8, 5, 5]]
    score = DepthScore(0.5, 8)
    errors = score.add(prediction, truth)
    assert errors["rmse"] == pytest.approx(math.sqrt((0.5**2 + 6**2) / 2))
    assert score.result()["nonfinite_pixels"] == 2


def test_a_map_of_zeros_is_left_out_and_counted():
    predictions, truths = maps(2)
    alone = score_depth(predictions[:1], truths[:1])
    truths[1] = 0
    score = DepthScore()
    for name, p, t in zip("ab", predictions, truths):
        score.add(p, t, name)
    got = score.result()
    assert got["without_valid_depth"] == 1
    assert score.without_truth == ["b"]
    assert [got[m] for m in METRICS] == pytest.approx([alone[m] for m in METRICS])


def test_errors_say_what_is_wrong():
    with pytest.raises(DataError, match=r"None of 2 depth maps.*eigen crop.*scale"):
        score_depth(np.ones((2, 8, 8)), np.zeros((2, 8, 8)), crop="eigen")
    with pytest.raises(DataError, match=r"\(8, 8\).*\(4, 4\)"):
        score_depth([np.ones((8, 8))], [np.ones((4, 4))])
    with pytest.raises(DataError, match="only 0 true depth maps"):
        score_depth([np.ones((8, 8))], [])
