# SPDX-License-Identifier: Apache-2.0
"""The picture of crops and masks shows the pixels that the networks get."""

import numpy as np
import pytest
import torch

from opendino.pretrain.samples import GAP, GREY, grey_out, sample_pictures

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def normalised(value, size, count, channels=3):
    """`count` crops of one colour, normalised."""
    colour = torch.tensor([value, value / 2, 0.0][:channels])[:, None, None]
    shift, scale = (torch.tensor(v[:channels])[:, None, None] for v in (MEAN, STD))
    return ((colour - shift) / scale).expand(count, channels, size, size)


def test_crops_masks_and_local_crops_are_where_they_belong():
    batch, g, small = 3, 112, 56
    crops = torch.cat([normalised(1.0, g, batch), normalised(0.6, g, batch)])
    local = torch.cat([normalised(0.24, small, batch), normalised(0.8, small, batch)])
    masks = torch.zeros(2 * batch, 16, dtype=torch.bool)
    masks[0, 5] = True  # row 1, column 1 of the first crop of the first image
    picture = np.asarray(sample_pictures(crops, local, masks, MEAN, STD, num_images=2))
    assert picture.shape == (2 * (g + GAP + small) + 3 * GAP, 4 * g + 3 * GAP, 3)
    assert picture[10, 10].tolist() == [255, 128, 0]
    masked = picture[:g, g + GAP : 2 * g + GAP]
    assert (masked[28:56, 28:56] == GREY).all()
    assert (masked == GREY).all(-1).sum() == 28 * 28
    second = picture[:g, 2 * (g + GAP) : 3 * g + 2 * GAP]
    assert (second == [153, 76, 0]).all()
    assert (picture[:g, 3 * (g + GAP) :] == second).all()
    assert picture[g + GAP, 0].tolist() == [61, 31, 0]
    assert picture[g + GAP, small + GAP].tolist() == [204, 102, 0]


def test_small_crops_are_enlarged_and_other_channels_are_grey():
    masks = torch.ones(2, 16, dtype=torch.bool)
    crops = normalised(1.0, 28, 2, channels=1)
    picture = np.asarray(sample_pictures(crops, None, masks, MEAN[:1], STD[:1]))
    assert picture.shape == (112, 4 * 112 + 3 * GAP, 3)
    assert (picture[:, :112] == 255).all()
    assert (picture[:, 112 + GAP : 224 + GAP] == GREY).all()


@pytest.mark.parametrize("size", [28, 30])
def test_grey_out_covers_whole_patches_only(size):
    mask = np.zeros(16, bool)
    mask[[0, 15]] = True
    out = grey_out(np.zeros((size, size, 3), np.uint8), mask)
    assert (out[:7, :7] == GREY).all()
    assert (out[21:28, 21:28] == GREY).all()
    assert (out == GREY).all(-1).sum() == 2 * 49
