# SPDX-License-Identifier: Apache-2.0
"""Retrieval scores against values worked out by hand."""

import math

import numpy as np
import pytest
import torch

from opendino.errors import DataError
from opendino.evaluate.retrieval import average_precision, mean_average_precision, same_source_recall


@pytest.mark.parametrize(
    ("ranks", "num", "expected"),
    [
        ([0, 1, 2], 3, 1.0),
        # rank 0: (1 + 1)/2; rank 2: (1/2 + 2/3)/2 -> (1 + 7/12)/2
        ([0, 2], 2, 19 / 24),
        # rank 1: (0/1 + 1/2)/2, one of two found
        ([1], 2, 1 / 8),
        ([2, 0], 2, 19 / 24),
        ([], 4, 0.0),
    ],
)
def test_average_precision_is_the_trapezoid_area(ranks, num, expected):
    assert average_precision(ranks, num) == pytest.approx(expected)


def test_levels_pass_over_junk():
    # Order of the gallery for the query: junk 0, hard 1, negative 2, easy 3.
    similarity = [[0.9, 0.8, 0.7, 0.6]]
    got = mean_average_precision(similarity, [{"easy": [3], "hard": [1], "junk": [0]}])
    # easy: list is [negative, easy], rank 1 -> (0 + 1/2)/2
    # medium: list is [hard, negative, easy], ranks 0 and 2 -> (1 + (1/2 + 2/3)/2)/2
    # hard: list is [hard, negative], rank 0 -> 1
    assert got == pytest.approx({"easy": 25.0, "medium": 100 * 19 / 24, "hard": 100.0})


def test_queries_without_positives_do_not_count():
    similarity = torch.tensor([[0.9, 0.1], [0.9, 0.1]])
    got = mean_average_precision(similarity, [{"easy": [0]}, {"junk": [1]}])
    assert got["easy"] == got["medium"] == 100
    assert math.isnan(got["hard"])


def test_mean_is_over_queries():
    got = mean_average_precision(np.array([[2.0, 1.0], [2.0, 1.0]]), [{"easy": [0]}, {"easy": [1]}])
    assert got["easy"] == pytest.approx((100 + 25) / 2)


@pytest.mark.parametrize("query", [{"easy": [4]}, {"easy": [-1]}, {"easy": [1], "junk": [1]}])
def test_wrong_lists_are_refused(query):
    with pytest.raises(DataError, match="Query 0"):
        mean_average_precision(np.zeros((1, 3)), [query])


@pytest.mark.parametrize("similarity", [np.zeros((2, 3)), np.zeros(3), np.full((1, 3), np.nan)])
def test_wrong_similarities_are_refused(similarity):
    with pytest.raises(DataError):
        mean_average_precision(similarity, [{"easy": [0]}])


def test_same_source_recall_by_hand():
    angles = np.deg2rad([0, 10, 90, 95, 14])
    x = np.stack([np.cos(angles), np.sin(angles)], 1) * [[1], [5], [1], [2], [1]]
    groups = ["a", "a", "b", "b", "c"]
    # Nearest other: 0→1 yes, 1→4 no, 2→3 yes, 3→2 yes, 4→1 no. With two: 1→4,0 yes.
    assert same_source_recall(x, groups) == 60
    assert same_source_recall(x, groups, k=2, chunk=2) == 80


def test_recall_needs_two_rows_and_their_groups():
    for x, groups in ((np.ones((1, 2)), [0]), (np.ones((3, 2)), [0, 1])):
        with pytest.raises(DataError, match="at least two rows"):
            same_source_recall(x, groups)
