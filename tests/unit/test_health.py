# SPDX-License-Identifier: Apache-2.0
"""Health figures on cases whose values are known by hand."""

import math

import pytest
import torch

from opendino.pretrain.health import entropy, prototype_use, rank_me


def test_entropy_of_uniform_and_certain_targets():
    assert entropy(torch.full((5, 8), 1 / 8)) == pytest.approx(math.log(8), rel=1e-6)
    assert entropy(torch.eye(4)) == 0


def test_prototype_use_counts_winners():
    assert prototype_use(torch.eye(4)) == 1
    assert prototype_use(torch.tensor([[0.9, 0.1, 0.0], [0.8, 0.1, 0.1]])) == 0.5


def test_feature_rank_counts_directions():
    assert rank_me(torch.eye(6)) == pytest.approx(6, rel=1e-4)
    assert rank_me(torch.ones(10, 1) @ torch.randn(1, 6)) == pytest.approx(1, abs=0.01)
