# SPDX-License-Identifier: Apache-2.0
"""Crop rectangles: inside the image, of the wanted area and aspect, a function of (seed, counter) only."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from opendino.pretrain.crops import Boxes, CropsConfig, cut_crops, draw_boxes, multi_crop, sample_rng

SMALL = CropsConfig(global_size=28, local_size=14, num_local=3)


def picture(height=40, width=60, channels=3):
    size = (channels, height, width)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_defaults_are_the_published_settings():
    c = CropsConfig()
    assert (c.global_size, c.local_size, c.num_local) == (224, 98, 8)
    assert (c.global_scale, c.local_scale, c.flip) == ((0.32, 1.0), (0.05, 0.32), 0.5)
    assert (c.jitter, c.jitter_prob, c.grey_prob) == ((0.4, 0.4, 0.2, 0.1), 0.8, 0.2)
    assert (c.blur_probs, c.blur_sigma, c.solarize_prob) == ((1.0, 0.1, 0.5), (0.1, 2.0), 0.2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"global_scale": (0.5, 0.1)},
        {"local_scale": (0.0, 0.3)},
        {"blur_sigma": (0.0, 1.0)},
        {"blur_probs": (1.0, 2.0, 0.0)},
        {"jitter": (0.4, 0.4, 0.2, 0.6)},
        {"mean": (0.5,)},
        {"std": (0.0, 1.0, 1.0)},
        {"num_locals": 3},
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        CropsConfig(**wrong)


def test_same_seed_and_counter_give_the_same_numbers_and_others_do_not():
    draws = [sample_rng(s, c, k).random() for s in (0, 1) for c in (0, 1, 2**40) for k in (0, 1)]
    assert len(set(draws)) == len(draws)
    assert sample_rng(3, 5).random() == sample_rng(3, 5).random()


@pytest.mark.parametrize(("height", "width"), [(300, 400), (400, 300), (37, 500), (500, 37), (1, 1), (1, 90), (90, 1)])
def test_boxes_lie_inside_any_image(height, width):
    b = draw_boxes(height, width, 500, (0.05, 1.0), 0.5, sample_rng(0, 0))
    assert min(b.top.min(), b.left.min()) >= 0
    assert min(b.height.min(), b.width.min()) >= 1
    assert (b.top + b.height <= height).all()
    assert (b.left + b.width <= width).all()


def test_boxes_have_the_wanted_area_aspect_and_place():
    b = draw_boxes(1000, 1000, 4000, (0.05, 0.32), 0.5, sample_rng(0, 0))
    share = b.height * b.width / 1e6
    assert 0.049 < share.min() < 0.055
    assert 0.315 < share.max() < 0.322
    assert share.mean() == pytest.approx(0.185, abs=0.005)
    aspect = np.log(b.width / b.height)
    assert np.abs(aspect).max() < np.log(4 / 3) + 0.01
    assert aspect.mean() == pytest.approx(0, abs=0.01)
    assert b.flip.mean() == pytest.approx(0.5, abs=0.03)
    middle = b.top + b.height / 2
    assert middle.mean() == pytest.approx(500, abs=15)
    assert b.top.min() < 10
    assert (b.top + b.height).max() > 990


def test_an_image_too_long_for_any_box_gives_its_centre():
    b = draw_boxes(30, 3000, 4, (0.9, 1.0), 0.0, sample_rng(0, 0))
    assert set(b.height) == {30}
    assert set(b.width) == {40}
    assert set(b.left) == {1480}
    b = draw_boxes(3000, 30, 4, (0.9, 1.0), 0.0, sample_rng(0, 0))
    assert (set(b.height), set(b.width), set(b.top)) == ({40}, {30}, {1480})


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_crops_equal_torchvision(channels):
    image = picture(50, 70, channels)
    boxes = Boxes(*np.array([[0, 3, 10], [5, 0, 7], [50, 31, 12], [41, 60, 9]]), flip=np.array([False, True, False]))
    ours = cut_crops(image, boxes, 21)
    assert ours.shape == (3, channels, 21, 21)
    for i, crop in enumerate(ours):
        place = [int(v[i]) for v in (boxes.top, boxes.left, boxes.height, boxes.width)]
        cut = F.resized_crop(image, *place, [21, 21], interpolation=InterpolationMode.BICUBIC, antialias=True)
        cut = F.horizontal_flip(cut) if boxes.flip[i] else cut
        assert (crop.int() - cut.int()).abs().max() <= 1


def test_multi_crop_is_repeatable_and_independent_of_memory_layout():
    image = picture()
    by_pixel = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    one, two = multi_crop(image, SMALL, sample_rng(0, 7)), multi_crop(by_pixel, SMALL, sample_rng(0, 7))
    assert one[0].shape == (2, 3, 28, 28)
    assert one[1].shape == (3, 3, 14, 14)
    assert one[0].dtype == torch.uint8
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert not torch.equal(one[0], multi_crop(image, SMALL, sample_rng(0, 8))[0])


def test_without_local_crops_there_are_none():
    assert multi_crop(picture(), SMALL.model_copy(update={"num_local": 0}), sample_rng(0, 0))[1] is None
