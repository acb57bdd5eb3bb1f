# SPDX-License-Identifier: Apache-2.0
"""Masks: the exact count, blocks, the share of masked crops and the spread of their ratios."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opendino.pretrain.masking import MIN_ASPECT, _add_block, batch_masks, block_mask


def rng(seed=0):
    return np.random.default_rng(seed)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 18), st.integers(1, 18), st.floats(0, 1), st.integers(0, 2**32))
def test_any_grid_gets_exactly_the_wanted_count(height, width, share, seed):
    wanted = int(height * width * share)
    mask = block_mask(height, width, wanted, rng(seed))
    assert mask.shape == (height, width)
    assert mask.dtype == bool
    assert mask.sum() == wanted


@pytest.mark.parametrize("side", [1, 2, 4])
def test_tiny_grids_take_every_count(side):
    for wanted, seed in itertools.product(range(side * side + 1), range(5)):
        assert block_mask(side, side, wanted, rng(seed)).sum() == wanted


@settings(max_examples=150, deadline=None)
@given(st.integers(3, 18), st.integers(3, 18), st.integers(1, 80), st.integers(0, 2**32))
def test_the_first_block_is_a_rectangle_of_the_right_size_and_shape(height, width, missing, seed):
    mask = np.zeros((height, width), dtype=bool)
    if not _add_block(mask, missing, rng(seed)):
        assert not mask.any()
        return
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    h, w = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    assert mask.sum() == h * w
    assert min(4, missing) <= h * w <= missing
    # Sides are rounded: there is an allowed aspect whose sides round to these.
    assert (h - 0.5) / (w + 0.5) <= 1 / MIN_ASPECT
    assert (h + 0.5) / (w - 0.5) >= MIN_ASPECT


def test_blocks_of_all_shapes_and_places_come_up():
    shapes, corners = set(), set()
    for seed in range(300):
        mask = np.zeros((8, 8), dtype=bool)
        if _add_block(mask, 16, rng(seed)):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            shapes.add((len(rows) > len(columns)) - (len(rows) < len(columns)))
            corners |= {(int(r), int(c)) for r in (rows[0], rows[-1]) for c in (columns[0], columns[-1])}
    assert shapes == {-1, 0, 1}
    assert {(0, 0), (0, 7), (7, 0), (7, 7)} <= corners


def test_masks_are_made_of_blocks_and_not_of_single_patches():
    """Neighbours of masked patches are masked far more often than their share."""
    together = []
    for seed in range(50):
        mask = block_mask(16, 16, 64, rng(seed))
        together.append((mask[:, 1:] & mask[:, :-1]).sum() / mask[:, 1:].sum())
    assert np.mean(together) > 0.6  # 0.25 for single patches


@pytest.mark.parametrize(("crops", "share", "masked"), [(8, 0.5, 4), (10, 0.3, 3), (6, 0.5, 3), (4, 1.0, 4), (4, 0, 0)])
def test_share_of_masked_crops(crops, share, masked):
    masks = batch_masks(crops // 2, (16, 16), share=share)
    assert masks.shape == (crops, 256)
    assert int(masks.any(1).sum()) == masked


def test_one_ratio_from_each_sub_interval():
    for seed in range(20):
        counts = batch_masks(8, (16, 16), seed=seed, ratio=(0.1, 0.5), share=0.5).sum(1)
        counts = sorted(counts[counts > 0].tolist())
        assert len(counts) == 8
        for i, count in enumerate(counts):
            low, high = 0.1 + 0.05 * i, 0.1 + 0.05 * (i + 1)
            assert math.floor(256 * low) <= count <= 256 * high


def test_masked_crops_are_shuffled():
    found = np.stack([batch_masks(4, (6, 6), seed=seed).any(1).numpy() for seed in range(200)])
    assert (np.abs(found.mean(0) - 0.5) < 0.15).all()
    counts = np.stack([batch_masks(4, (16, 16), step=seed, share=1.0).sum(1).numpy() for seed in range(50)])
    assert np.ptp(counts.mean(0)) < 30  # no crop always has the largest ratio


def test_masks_follow_from_seed_and_step_alone():
    np.random.seed(1)
    a = batch_masks(3, (8, 8), seed=3, step=5)
    np.random.seed(2)
    assert (a == batch_masks(3, (8, 8), seed=3, step=5)).all()
    assert (a != batch_masks(3, (8, 8), seed=3, step=6)).any()
    assert (a != batch_masks(3, (8, 8), seed=4, step=5)).any()


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_processes_together_draw_the_masks_of_one(parts):
    whole = batch_masks(6, (8, 8), seed=1, step=2).reshape(2, 6, 64)
    size = 6 // parts
    for i in range(parts):
        mine = slice(i * size, (i + 1) * size)
        part = batch_masks(6, (8, 8), seed=1, step=2, images=mine)
        assert (part.reshape(2, size, 64) == whole[:, mine]).all()


def test_grids_that_are_not_square_are_row_major():
    masks = batch_masks(20, (2, 12), ratio=(0.3, 0.3), share=1.0)
    assert (masks.sum(1) == 7).all()
    grids = masks.reshape(40, 2, 12)
    assert (grids[:, 0, 1:] & grids[:, 0, :-1]).sum() > 40  # blocks run along the long side
