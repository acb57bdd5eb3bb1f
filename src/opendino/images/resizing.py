# SPDX-License-Identifier: Apache-2.0
"""Resizing and cutting of one image in memory: what torchvision's transforms compute, without importing them.

They bring torch's compiler along, 150 MiB that an Embedder does not need; the arithmetic is torch's own.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def resize(pixels: Tensor, height: int, width: int, mode: str) -> Tensor:
    """Give an image (C, H, W) as (C, height, width), with antialias.

    Args:
        pixels: uint8, or float of any range; whatever lies between the channels of a pixel in memory stays.
        height: at least 1.
        width: at least 1.
        mode: "bicubic" or "bilinear".

    Returns:
        The dtype of `pixels`. uint8 is rounded and cut off after each axis, the columns first, as Pillow does; floats
        may overshoot.
    """
    channels, old_height, old_width = pixels.shape
    if (old_height, old_width) == (height, width):
        return pixels
    batch = pixels[None]
    if pixels.stride() == (1, old_width * channels, channels):
        # The stride of a batch of one says nothing; torch takes pixels with their channels together by it.
        batch = pixels.as_strided((1, *pixels.shape), (pixels.numel(), *pixels.stride()))
    return F.interpolate(batch, (height, width), mode=mode, antialias=True)[0]


def centre(pixels: Tensor, height: int, width: int) -> Tensor:
    """Give the middle (C, height, width) of an image that is at least so large; a view."""
    top, left = (round((n - m) / 2) for n, m in zip(pixels.shape[-2:], (height, width), strict=True))
    return pixels[:, top : top + height, left : left + width]
