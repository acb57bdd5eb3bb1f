# SPDX-License-Identifier: Apache-2.0
"""Random resized crops and mirroring, each draw a function of (seed, epoch, sample); masks are cut with their image."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from opendino.finetune.settings import FinetuneSettings
from opendino.models.config import PreprocessSpec

ASPECT = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Cut:
    """A part of an image (top, left, height, width in pixels), mirrored or not."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


def draw_cut(height: int, width: int, settings: FinetuneSettings, epoch: int, sample: int) -> Cut:
    """Draw a part with an area of min_scale to 1 of the image and an aspect ratio of 3/4 to 4/3, then mirror half."""
    rng = np.random.default_rng([settings.seed, 1, epoch, sample])
    area = height * width * rng.uniform(settings.min_scale, 1.0)
    ratio = math.exp(rng.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
    h = min(max(round(math.sqrt(area / ratio)), 1), height)
    w = min(max(round(math.sqrt(area * ratio)), 1), width)
    top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
    return Cut(top, left, h, w, settings.flip and bool(rng.random() < 0.5))


def cut_image(pixels: Tensor, cut: Cut, size: tuple[int, int], spec: PreprocessSpec) -> Tensor:
    """Give float32 (C, *size), normalised, from (C, H, W) with values 0 to 255."""
    mode = InterpolationMode.BICUBIC if spec.interpolation == "bicubic" else InterpolationMode.BILINEAR
    out: Tensor = tv.resized_crop(
        pixels, cut.top, cut.left, cut.height, cut.width, list(size), interpolation=mode, antialias=True
    )
    out = out.flip(-1) if cut.flip else out
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (spec.mean, spec.std))
    return (out.float().clamp(0, 255) / 255 - mean) / std


def cut_mask(mask: Tensor, cut: Cut, size: tuple[int, int]) -> Tensor:
    """Give int64 `size` from a mask (H, W), by the nearest pixel."""
    part = mask[None, cut.top : cut.top + cut.height, cut.left : cut.left + cut.width]
    out: Tensor = tv.resize(part, list(size), interpolation=InterpolationMode.NEAREST_EXACT)[0].long()
    return out.flip(-1) if cut.flip else out
