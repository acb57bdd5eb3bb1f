# SPDX-License-Identifier: Apache-2.0
"""Batched colour operations give what torchvision gives image by image, and only where they are drawn."""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from opendino.errors import ConfigError
from opendino.pretrain import colour_operations as ops
from opendino.pretrain import photometric as P
from opendino.pretrain.crops import CropsConfig, sample_rng

RAW = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
OPERATIONS = {
    "brightness": (ops.adjust_brightness_, F.adjust_brightness, [0.3, 0.9, 1.0, 1.7]),
    "contrast": (ops.adjust_contrast_, F.adjust_contrast, [0.3, 0.9, 1.0, 1.7]),
    "saturation": (ops.adjust_saturation_, F.adjust_saturation, [0.0, 0.9, 1.0, 1.7]),
    "hue": (ops.adjust_hue_, F.adjust_hue, [-0.5, -0.1, 0.0, 0.5]),
    "blur": (ops.blur, lambda x, s: F.gaussian_blur(x, [9, 9], [s, s]), [0.1, 0.5, 1.3, 2.0]),
}


def images(count=4, channels=3, size=17):
    """Random colours, and in the last image flat, grey and saturated areas."""
    x = torch.randint(0, 256, (count, channels, size, size), generator=torch.Generator().manual_seed(0))
    x[-1, :, :4] = 0
    x[-1, :, 4:8] = 255
    x[-1, 0, 8:10] = 255
    x[-1, 1:, 8:10] = 0
    x[-1, :, 10:12] = 77
    x[-1, -1, 12:] = x[-1, 0, 12:]
    return x.to(torch.uint8)


def params(count, **given):
    """Parameters that change nothing, but for `given`."""
    values = {
        "order": np.full(count, -1, np.int8),
        "factors": np.tile(P.IDENTITY, (count, 1)),
        "grey": np.zeros(count, bool),
        "sigma": np.zeros(count, np.float32),
        "solarize": np.zeros(count, bool),
    }
    return P.PhotometricParams(**{k: np.asarray(given.get(k, v), v.dtype) for k, v in values.items()})


def one_by_one(x, p, i):
    """The same with torchvision on image i."""
    y = x[i].float() / 255
    jitter = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    for k in P.ORDERS[p.order[i]] if p.order[i] >= 0 else ():
        y = jitter[k](y, float(p.factors[i, k]))
    if p.grey[i]:
        y = F.rgb_to_grayscale(y, 3)
    if p.sigma[i] > 0:
        y = F.gaussian_blur(y, [9, 9], [float(p.sigma[i])] * 2)
    return F.solarize(y, 128 / 255) if p.solarize[i] else y


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_equals_torchvision(name):
    ours, theirs, values = OPERATIONS[name]
    x = images().float() / 255
    expected = torch.stack([theirs(image, v) for image, v in zip(x, values)])
    torch.testing.assert_close(ours(x.clone(), torch.tensor(values)), expected, atol=1e-5, rtol=0)


def test_hue_of_every_shift_equals_torchvision():
    shifts = torch.linspace(-0.5, 0.5, 41)
    x = images(1).expand(41, -1, -1, -1) / 255
    expected = torch.stack([F.adjust_hue(image, float(s)) for image, s in zip(x, shifts)])
    torch.testing.assert_close(ops.adjust_hue_(x.clone(), shifts), expected, atol=1e-5, rtol=0)


def test_grey_and_solarize_equal_torchvision():
    x = images().float() / 255
    torch.testing.assert_close(ops.to_grey_(x.clone()), F.rgb_to_grayscale(x, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(ops.solarize_(x.clone()), F.solarize(x, 128 / 255), atol=0, rtol=0)


def test_solarize_starts_at_128():
    x = torch.tensor([0, 127, 128, 255], dtype=torch.uint8).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    y = P.apply_photometric(x, params(1, solarize=[True]), CropsConfig(**RAW))
    assert (y[0, 0].flatten() * 255).round().tolist() == [0, 127, 127, 0]


def test_all_together_equals_torchvision_one_by_one():
    x = images(48)
    drawn = [P.draw_photometric(CropsConfig(), (0.5, 0.5), (0.5, 0.5), sample_rng(0, i)) for i in range(24)]
    p = P.PhotometricParams.crop_major(drawn)
    assert len(np.unique(p.order)) > 12
    expected = torch.stack([one_by_one(x, p, i) for i in range(48)])
    off = (P.apply_photometric(x, p, CropsConfig(**RAW)) - expected).abs().amax((1, 2, 3))
    # solarize differs by up to 1/255 between 127/255 and 128/255, where the 8-bit values of the recipe have none
    assert off[torch.from_numpy(~p.solarize)].max() < 1e-5
    assert off.max() < 1 / 255 + 1e-5


def test_chunks_give_what_each_crop_alone_gives(monkeypatch):
    x = images(24)
    p = P.PhotometricParams.crop_major(
        [P.draw_photometric(CropsConfig(), (0.5, 0.5), (0.5, 0.5), sample_rng(1, i)) for i in range(12)]
    )
    together = P.apply_photometric(x, p, CropsConfig())
    of_each = [P.PhotometricParams(**{name: values[[i]] for name, values in vars(p).items()}) for i in range(24)]
    alone = torch.cat([P.apply_photometric(x[i : i + 1], of_each[i], CropsConfig()) for i in range(24)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    monkeypatch.setattr(P, "_chunks", lambda crops, params: [np.arange(len(params))])  # as on a GPU
    torch.testing.assert_close(P.apply_photometric(x, p, CropsConfig()), together, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(8, 8), (9, 31), (16, 17), (33, 98), (113, 15)])
def test_blur_of_any_size_equals_torchvision(size):
    x = torch.rand(3, 2, *size, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.1, 0.7, 2.0])
    expected = torch.stack([F.gaussian_blur(image, [9, 9], [s, s]) for image, s in zip(x, sigma.tolist())])
    torch.testing.assert_close(ops.blur(x, sigma), expected, atol=1e-5, rtol=0)


def test_solarize_between_8_bit_values_is_within_one_of_them():
    x = torch.linspace(0, 1, 255 * 40 + 1).expand(1, 3, 1, -1)
    assert (ops.solarize_(x.clone()) - F.solarize(x, 128 / 255)).abs().max() <= 1 / 255 + 1e-6


def test_identity_parameters_only_normalise():
    x, config = images(), CropsConfig()
    expected = F.normalize(x.float() / 255, list(config.mean), list(config.std))
    torch.testing.assert_close(P.apply_photometric(x, params(4), config), expected, atol=1e-5, rtol=0)


def test_operations_touch_only_their_crops_and_leave_the_input():
    x = images()
    before = x.clone()
    p = params(4, order=[5, -1, -1, -1], factors=np.tile([0.7, 1.2, 0.5, 0.1], (4, 1)), grey=[0, 1, 0, 0])
    y = P.apply_photometric(x, p, CropsConfig(**RAW))
    torch.testing.assert_close(y[2:], x[2:] / 255)
    assert not torch.allclose(y[0], x[0] / 255, atol=0.05)
    assert not torch.allclose(y[1], x[1] / 255, atol=0.05)
    assert torch.equal(x, before)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_other_channel_counts_skip_colour(channels):
    x = images(channels=channels)
    p = params(4, order=[0] * 4, factors=np.tile([1, 1, 0.0, 0.3], (4, 1)), grey=[1] * 4)
    config = CropsConfig(mean=(0.0,) * channels, std=(1.0,) * channels)
    torch.testing.assert_close(P.apply_photometric(x, p, config), x / 255)
    p = params(4, order=[0] * 4, factors=np.tile([0.5, 1, 1, 0], (4, 1)))
    torch.testing.assert_close(P.apply_photometric(x, p, config), x / 510)


def test_wrong_statistics_are_refused():
    with pytest.raises(ConfigError, match=r"3 values and the images 1 channels"):
        P.apply_photometric(images(channels=1), params(4), CropsConfig())


def test_no_crops_give_no_crops():
    assert P.apply_photometric(images()[:0], params(0), CropsConfig()).shape == (0, 3, 17, 17)


def test_drawn_parameters_follow_their_probabilities():
    config = CropsConfig()
    drawn = [P.draw_global_and_local(config, sample_rng(0, i)) for i in range(1000)]
    g = P.PhotometricParams.crop_major([d[0] for d in drawn])
    loc = P.PhotometricParams.crop_major([d[1] for d in drawn])
    assert len(g) == 2000
    assert len(loc) == 8000
    assert np.mean(loc.order >= 0) == pytest.approx(0.8, abs=0.02)
    counts = np.bincount(loc.order[loc.order >= 0], minlength=24) / 8000
    np.testing.assert_allclose(counts, 0.8 / 24, atol=0.01)
    assert np.mean(loc.grey) == pytest.approx(0.2, abs=0.02)
    assert np.mean(g.sigma[:1000] > 0) == 1
    assert np.mean(g.sigma[1000:] > 0) == pytest.approx(0.1, abs=0.03)
    assert np.mean(loc.sigma > 0) == pytest.approx(0.5, abs=0.02)
    assert not g.solarize[:1000].any()
    assert np.mean(g.solarize[1000:]) == pytest.approx(0.2, abs=0.04)
    assert not loc.solarize.any()
    low, high = loc.factors.min(0), loc.factors.max(0)
    np.testing.assert_allclose(low, [0.6, 0.6, 0.8, -0.1], atol=0.01)
    np.testing.assert_allclose(high, [1.4, 1.4, 1.2, 0.1], atol=0.01)
    assert 0.1 <= loc.sigma[loc.sigma > 0].min() < 0.11
    assert 1.99 < loc.sigma.max() <= 2.0


def test_without_local_crops_no_local_parameters():
    assert P.draw_global_and_local(CropsConfig(num_local=0), sample_rng(0, 0))[1] is None
