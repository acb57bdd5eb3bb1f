# SPDX-License-Identifier: Apache-2.0
"""Training samples of segmentation as published: resize, crop, flip, colours.

The constants are those of Meta's head configurations and of mmsegmentation. Every draw comes from the generator that
is given.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from opendino.evaluate.datasets.types import IGNORE
from opendino.heads.tokens import Views, resize_pixels

CROP_TRIES = 10
MOST_OF_A_CLASS = 0.75
"""A crop of which one class takes this share or more is drawn again."""
HUE_STEPS = 180
"""Hues of an 8-bit image in OpenCV, whose unit the published range of ±18 is in."""


@dataclass(frozen=True)
class Augmentation:
    """Resize, crop, flip and change of colours of one image with its mask.

    Attributes:
        size: shorter side at ratio 1, pixels.
        crop: side of the result.
        ratios: range of the uniform factor on `size`; published: 0.5 to 2 for the linear head, 1 to 3 for +ms.
    """

    size: int
    crop: int
    ratios: tuple[float, float] = (0.5, 2.0)

    def __call__(self, image: Tensor, mask: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Draw one sample.

        Args:
            image: uint8 (3, H, W).
            mask: uint8 (H, W).
            rng: where the draws come from.

        Returns:
            uint8 image (3, crop, crop); mask (crop, crop), IGNORE outside the image; and bool (crop, crop), True inside
            it. What lies outside is below and on the right.
        """
        size = Views(size=int(self.size * rng.uniform(*self.ratios))).resized(*mask.shape)
        image, mask = resize_pixels(image, size), resize_mask(mask, size)
        top, left = self._corner(mask, rng)
        image = image[:, top : top + self.crop, left : left + self.crop]
        mask = mask[top : top + self.crop, left : left + self.crop]
        if rng.random() < 0.5:
            image, mask = image.flip(-1), mask.flip(-1)
        image = distort(image, rng)
        pads = (0, self.crop - mask.shape[1], 0, self.crop - mask.shape[0])
        inside = F.pad(torch.ones(mask.shape, dtype=torch.bool), pads, value=False)
        return F.pad(image, pads), F.pad(mask, pads, value=IGNORE), inside

    def _corner(self, mask: Tensor, rng: np.random.Generator) -> tuple[int, int]:
        room = [max(side - self.crop, 0) + 1 for side in mask.shape]
        for _ in range(CROP_TRIES):
            top, left = int(rng.integers(room[0])), int(rng.integers(room[1]))
            counts = mask[top : top + self.crop, left : left + self.crop].flatten().bincount(minlength=256)[:IGNORE]
            if (counts > 0).sum() > 1 and counts.max() < MOST_OF_A_CLASS * counts.sum():
                break
        return top, left


def resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a mask (H, W) to the nearest pixel, rounding down as OpenCV does."""
    return mask if tuple(mask.shape) == size else F.interpolate(mask[None, None], size, mode="nearest")[0, 0]


def distort(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Change brightness, contrast, saturation and hue of uint8 (3, H, W), each with probability 0.5.

    Brightness ±32; contrast and saturation (in HSV) ×0.5 to 1.5; hue ±18 of 180. Contrast comes second or last.
    """
    contrast_last = bool(rng.integers(2))
    if rng.random() < 0.5:
        image = _as_pixels(image + rng.uniform(-32.0, 32.0))
    factor = float(rng.uniform(0.5, 1.5)) if rng.random() < 0.5 else 1.0
    if not contrast_last:
        image = _as_pixels(image * factor)
    if rng.random() < 0.5:
        image = saturate(image, float(rng.uniform(0.5, 1.5)))
    if rng.random() < 0.5:
        image = tv.adjust_hue(image, int(rng.integers(-18, 18)) / HUE_STEPS)
    return _as_pixels(image * factor) if contrast_last else image


def saturate(image: Tensor, factor: float) -> Tensor:
    """Multiply the saturation of HSV, at most to 1, at the same hue and value; uint8 (3, H, W)."""
    values = image.float()
    value = values.amax(0)
    saturation = (value - values.amin(0)) / value.clamp(min=1)
    applied = torch.where(saturation > 0, (saturation * factor).clamp(max=1) / saturation.clamp(min=1e-6), 1.0)
    return _as_pixels(value - (value - values) * applied)


def _as_pixels(values: Tensor) -> Tensor:
    return values.round().clamp(0, 255).to(torch.uint8)
