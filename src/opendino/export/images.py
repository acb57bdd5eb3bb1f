# SPDX-License-Identifier: Apache-2.0
"""Real photographs to check and to calibrate exported files on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from opendino.errors import DataError, OpendinoError
from opendino.images.arrays import read_image
from opendino.images.preprocess import Preprocess
from opendino.images.sources import open_source
from opendino.models.config import PreprocessSpec

MAX_IMAGES = 64


def photographs(source: str | Path | None, channels: int, limit: int = MAX_IMAGES) -> list[Tensor]:
    """Read images, spread evenly over a source; without one the two photographs that scikit-learn carries.

    Args:
        source: something `open_source` takes.
        channels: C, what the model takes.
        limit: at most so many.

    Returns:
        (C, H, W) each, uint8 or float 0–255.

    Raises:
        DataError: when none can be read.
    """
    if source is None:
        return _carried(channels)
    found = open_source(source)
    step = max(len(found) / limit, 1.0)
    images, reason = [], ""
    for number in range(min(limit, len(found))):
        index = int(number * step)
        try:
            images.append(read_image(found.read(index), channels=channels, name=found.name(index)))
        except (OpendinoError, OSError) as error:
            reason = str(error)
    if not images:
        raise DataError(f"No image in {source} can be read: {reason or 'it is empty.'} Give a folder of images.")
    return images


def _carried(channels: int) -> list[Tensor]:
    from sklearn.datasets import load_sample_images

    pictures = [torch.from_numpy(image.copy()).permute(2, 0, 1) for image in load_sample_images().images]
    if channels == 3:
        return pictures
    grey = [p.float().mean(0, keepdim=True).round().to(torch.uint8) for p in pictures]
    return [g.expand(channels, -1, -1) for g in grey]


def batch_of(
    images: Sequence[Tensor], spec: PreprocessSpec, size: tuple[int, int], batch: int, patch_size: int, first: int = 0
) -> Tensor:
    """Give (batch, C, height, width) pixels 0–255, uint8, of images brought to a size; a second time round mirrored."""
    fit = Preprocess(spec, size=size, patch_size=patch_size)
    rows = []
    for number in range(first, first + batch):
        pixels = fit.fitted(images[number % len(images)])
        rows.append(pixels.flip(-1) if (number // len(images)) % 2 else pixels)
    return torch.stack(rows).float().clamp(0, 255).round().to(torch.uint8)
