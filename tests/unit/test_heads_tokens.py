# SPDX-License-Identifier: Apache-2.0
"""Patch tokens of padded images, windows, and the cache over a data set."""

import numpy as np
import pytest
import torch

from opendino.errors import ConfigError, DataError
from opendino.evaluate.datasets.types import DenseSet
from opendino.heads.tokens import (
    TokenSet,
    Views,
    center_pad,
    cut,
    frozen,
    last_blocks,
    normalized,
    patch_tokens,
    resize_pixels,
)
from opendino.models.config import ViTConfig
from opendino.models.vit import VisionTransformer


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = ViTConfig(
        img_size=28, patch_size=7, embed_dim=16, depth=3, num_heads=2, num_register_tokens=2, init_values=1.0
    )
    return VisionTransformer(config).eval()


class Pictures(DenseSet):
    """Images in memory; a string in place of one is the reason why it cannot be read."""

    def __init__(self, images):
        self.root, self.images, self.reads = "memory", images, 0

    def __len__(self):
        return len(self.images)

    def name(self, index):
        return str(index)

    def image(self, index):
        self.reads += 1
        if isinstance(self.images[index], str):
            raise DataError(self.images[index])
        return self.images[index]


def picture(height, width, seed=0):
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(14, 14, (0, 0, 0, 0)), (12, 8, (3, 3, 1, 1)), (13, 9, (2, 3, 0, 1)), (15, 1, (6, 7, 6, 7))],
)
def test_center_padding_puts_the_odd_pixel_right_and_below(height, width, expected):
    image = torch.rand(2, 3, height, width)
    padded, pads = center_pad(image, 14)
    assert pads == expected
    assert not padded.shape[-2] % 14
    assert not padded.shape[-1] % 14
    left, _, top, _ = pads
    assert torch.equal(padded[..., top : top + height, left : left + width], image)
    assert padded.sum() == pytest.approx(float(image.sum()), rel=1e-5)  # the rest is zero


def test_patch_tokens_are_those_of_the_padded_image(model):
    images = torch.randn(2, 3, 25, 31)
    patches, cls = patch_tokens(model, images, (0, 2))
    by_hand = torch.zeros(2, 3, 28, 35)
    by_hand[..., 1:26, 2:33] = images
    with torch.no_grad():
        whole = model.forward_features(by_hand)
    assert [tuple(p.shape) for p in patches] == [(2, 16, 4, 5)] * 2
    torch.testing.assert_close(patches[1].flatten(2).mT, whole["x_norm_patchtokens"])
    torch.testing.assert_close(cls[1], whole["x_norm_clstoken"])
    assert not torch.allclose(patches[0], patches[1])


def test_frozen_stops_gradients_and_restores_the_mode(model):
    model.train()
    with frozen(model):
        assert not model.training
        assert not patch_tokens(model, torch.randn(1, 3, 14, 14), (2,))[0][0].requires_grad
    assert model.training
    model.eval()
    assert patch_tokens(model, torch.randn(1, 3, 14, 14), (2,))[0][0].requires_grad


def test_last_blocks(model):
    assert last_blocks(model, 2) == (1, 2)
    with pytest.raises(ConfigError, match="the model has 3"):
        last_blocks(model, 4)


@pytest.mark.parametrize(
    ("side", "crop", "stride", "starts"),
    [(512, 512, 341, [0]), (683, 512, 341, [0, 171]), (1024, 512, 341, [0, 341, 512]), (300, 512, 341, [0]),
     (960, 640, 320, [0, 320]), (961, 640, 320, [0, 320, 321])],
)  # fmt: skip
def test_windows_cover_the_side_and_end_at_the_border(side, crop, stride, starts):
    boxes = Views(crop=crop, stride=stride).boxes(10, side)
    assert [b[1] for b in boxes] == starts
    assert boxes[-1][3] == side
    assert all(b[3] - b[1] == min(crop, side) and b[:1] + b[2:3] == (0, 10) for b in boxes)


def test_windows_of_the_mirrored_image_are_those_of_an_image_mirrored_beforehand():
    image = picture(10, 61)
    windows = Views(crop=24, stride=17, flip=True).windows(10, 61)
    plain = [cut(image.flip(-1), box) for box, flip in windows if not flip]
    mirrored = [cut(image, box, flip) for box, flip in windows if flip]
    assert len(plain) == len(mirrored) == 4
    assert all(torch.equal(p, m) for p, m in zip(plain, mirrored, strict=True))


def test_resizing_keeps_the_aspect_ratio_on_the_shorter_side():
    views = Views(size=512)
    assert views.resized(480, 640) == (512, 683)
    assert views.resized(1000, 333) == (1538, 512)
    assert Views(size=(10, 20)).resized(5, 5) == (10, 20)
    assert Views().resized(5, 6) == (5, 6)


def test_resizing_is_bilinear_without_antialiasing():
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    image[:, ::2] = 100
    # Factor 4 down samples rows 1.5 and 5.5: halfway between a dark and a bright one. Antialiasing would see more rows.
    assert resize_pixels(image, (2, 8)).unique().tolist() == [50]


def test_a_token_set_holds_every_window_in_half_precision(model, tmp_path):
    pictures = Pictures([picture(28, 40), picture(56, 56, 1), "damaged"])
    views = Views(size=28, crop=28, stride=14, flip=True)
    told = []
    tokens = TokenSet(model, pictures, (1, 2), views, tmp_path, batch_size=3)
    tokens.compute(lambda *numbers: told.append(numbers))
    assert told[-1] == (3, 1, 3)
    assert tokens.errors == {2: "damaged"}
    assert [v.image for v in tokens.views] == [0] * 4 + [1] * 2
    assert [v.flip for v in tokens.views] == [False, False, True, True, False, True]
    assert [v.box[1] for v in tokens.views] == [0, 12, 12, 0, 0, 0]
    patches, cls = tokens.tokens([1, 2])
    whole = normalized(resize_pixels(pictures.images[0], (28, 40)), model)
    inputs = torch.stack([whole[..., 12:40], whole[..., 12:40].flip(-1)])
    with frozen(model):
        expected, expected_cls = patch_tokens(model, inputs, (1, 2))
    torch.testing.assert_close(patches, torch.cat(expected, 1), atol=4e-3, rtol=0)
    torch.testing.assert_close(cls, torch.cat(expected_cls, 1), atol=4e-3, rtol=0)
    mask = torch.arange(28 * 40).reshape(28, 40)
    assert torch.equal(cut(mask, tokens.views[2].box, True), mask[:, 12:].flip(-1))


def test_tokens_are_computed_once_and_shared_by_content(model, tmp_path, monkeypatch):
    pictures, views = Pictures([picture(28, 28), picture(28, 28, 1)]), Views(size=28, crop=28)
    first = TokenSet(model, pictures, (2,), views, tmp_path).compute()
    ran = []
    monkeypatch.setattr(TokenSet, "_run", lambda self, batch: ran.append(len(batch)))
    again = TokenSet(model, Pictures([picture(28, 28, 1), picture(28, 28)]), (2,), views, tmp_path).compute()
    assert ran == []
    assert torch.equal(again.tokens([1])[0], first.tokens([0])[0])
    TokenSet(model, pictures, (2,), Views(size=35, crop=35), tmp_path).compute()
    assert ran == [2]


def test_a_killed_pass_goes_on(model, tmp_path):
    pictures, views = Pictures([picture(28, 28, s) for s in range(4)]), Views()

    def stop(done, errors, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TokenSet(model, pictures, (2,), views, tmp_path, batch_size=2).compute(stop)
    kept = TokenSet(model, pictures, (2,), views, tmp_path, batch_size=2)
    sizes = []
    run = kept._run
    kept._run = lambda batch: (sizes.append(len(batch)), run(batch))
    kept.compute()
    assert sum(sizes) == 2
    plain = TokenSet(model, pictures, (2,), views).compute()
    np.testing.assert_allclose(kept.tokens(range(4))[0], plain.tokens(range(4))[0], atol=2e-3)


def test_views_of_several_sizes_cannot_be_one_batch(model):
    tokens = TokenSet(model, Pictures([picture(28, 28), picture(28, 35)]), (2,), Views()).compute()
    with pytest.raises(DataError, match="one size"):
        tokens.tokens([0, 1])
    assert tokens.tokens([1])[0].shape == (1, 16, 4, 5)
