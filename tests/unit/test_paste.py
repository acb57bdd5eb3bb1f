# SPDX-License-Identifier: Apache-2.0
"""Drawings pasted on other crops of the batch, and what their patches are then told."""

import numpy as np
import torch
from scipy import ndimage

from opendino.pretrain.paste import foreground, paste, plain_borders

SIDE, PATCH = 56, 14
DRAWN = (0.9, 0.1, 0.2)


def drawings(number, colour=DRAWN, ground=1.0):
    """Discs of one colour with a hole on a plain ground."""
    y, x = np.mgrid[:SIDE, :SIDE] - SIDE / 2 + 0.5
    disc = torch.from_numpy((np.hypot(y, x) < 20) & (np.hypot(y, x) > 6))
    out = torch.full((number, 3, SIDE, SIDE), ground)
    out[:, :, disc] = torch.tensor(colour).view(1, 3, 1)
    return out


def noise(number):
    return torch.rand(number, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 0.3


def chance(seed=0):
    return torch.Generator().manual_seed(seed)


def test_plain_borders_are_found_with_their_colour():
    mostly = drawings(1)
    mostly[:, :, 20:30, -2:] = 0.0  # a tenth of two rows of one side
    plain, colour = plain_borders(torch.cat([drawings(1), noise(1), mostly, drawings(1, ground=0.25)]))
    assert plain.tolist() == [True, False, True, True]
    torch.testing.assert_close(colour[[0, 2]], torch.ones(2, 3))
    torch.testing.assert_close(colour[3], torch.full((3,), 0.25))


def test_a_drawing_is_cut_out_along_its_outline_with_its_holes_filled():
    rgb = drawings(1)
    found = foreground(rgb, torch.ones(1, 3))[0, 0].numpy() == 1
    assert np.array_equal(found, ndimage.binary_fill_holes((rgb[0] < 0.95).any(0).numpy()))


def test_a_plain_crop_has_no_foreground():
    assert foreground(torch.full((1, 3, 20, 20), 0.5), torch.full((1, 3), 0.51)).sum() == 0


def test_patches_are_told_which_crop_most_of_them_is_from():
    rgb = torch.cat([noise(6), drawings(2)])
    pasted, source = paste(rgb, 1.0, PATCH, chance())
    assert pasted.shape == rgb.shape
    assert source.shape == (8, (SIDE // PATCH) ** 2)
    assert source.dtype == torch.int64
    red = ((pasted - torch.tensor(DRAWN).view(3, 1, 1)).abs().amax(1) < 0.05)[:6]  # in crops that had none
    share = torch.nn.functional.avg_pool2d(red.float()[:, None], PATCH).flatten(1)
    told = source[:6] >= 6
    assert red.flatten(1).any(1).all(), "every crop got at least one"
    assert told.any(1).sum() >= 4  # a small one may be most of no patch
    assert told[share > 0.55].all()
    untouched = (pasted[:6] == rgb[:6]).all(1)[:, None].float()
    assert not told[torch.nn.functional.avg_pool2d(untouched, PATCH).flatten(1) > 0.55].any()
    own = torch.arange(6)[:, None].expand(-1, 16)
    assert torch.equal(source[:6][~told], own[~told])


def test_what_is_not_chosen_stays_bit_for_bit():
    rgb = torch.cat([noise(30), drawings(10)])
    pasted, source = paste(rgb, 0.5, PATCH, chance(3))
    same = (pasted == rgb).flatten(1).all(1)
    assert 8 <= int(same.sum()) <= 32
    assert (source[same] == torch.arange(40)[same][:, None]).all()
    nothing, own = paste(rgb, 0.0, PATCH, chance())
    assert torch.equal(nothing, rgb)
    assert (own == torch.arange(40)[:, None]).all()


def test_without_drawings_nothing_is_pasted():
    pasted, source = paste(noise(4), 1.0, PATCH, chance())
    assert torch.equal(pasted, noise(4))
    assert (source == torch.arange(4)[:, None]).all()


def test_the_same_generator_pastes_the_same():
    rgb = torch.cat([noise(4), drawings(4)])
    first, second, other = (paste(rgb, 0.8, PATCH, chance(s)) for s in (5, 5, 6))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], other[0])
