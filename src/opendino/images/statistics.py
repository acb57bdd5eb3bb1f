# SPDX-License-Identifier: Apache-2.0
"""Mean and standard deviation of each channel over a data set, which `crops.mean` and `crops.std` normalise by."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from opendino.errors import ConfigError, DataError, MissingExtraError
from opendino.images.ahead import map_ahead
from opendino.images.arrays import read_image
from opendino.images.sources import ImageSource

SAMPLE_SEED = 0
"""Of the choice of images when only some are read."""
Sums = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ChannelStatistics:
    """What the pixels of a data set are like; every pixel of every image counts the same.

    Attributes:
        mean: C values, 1 is white.
        std: C values, of the population.
        images: read.
        pixels: of these images.
        errors: (path, reason) of images that could not be read and are left out.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    images: int
    pixels: int
    errors: tuple[tuple[str, str], ...]


def channel_statistics(
    source: ImageSource,
    *,
    channels: int = 3,
    max_images: int | None = None,
    workers: int | None = None,
    on_image: Callable[[int, int, int], None] | None = None,
) -> ChannelStatistics:
    """Go through the images of a source once, in bounded memory.

    Args:
        source: the images.
        channels: C, what they are read as.
        max_images: read at most so many, drawn at random (always the same ones); None reads all.
        workers: threads; default one a core, at most 8.
        on_image: called with (images done, errors, images in all).

    Raises:
        DataError: when no image can be read.
        ConfigError: for a number of channels or images below 1.
    """
    if channels < 1 or (max_images is not None and max_images < 1):
        raise ConfigError(f"channels is {channels} and images is {max_images}; both must be at least 1.")
    chosen: Any = range(len(source))
    if max_images is not None and max_images < len(source):
        rng = np.random.default_rng(SAMPLE_SEED)
        chosen = np.sort(rng.choice(len(source), max_images, replace=False)).tolist()
    threads = min(os.cpu_count() or 1, 8) if workers is None else workers
    totals, pixels, errors, images = np.zeros((2, channels)), 0, [], 0
    read = map_ahead(lambda i: _sums_of(source, i, channels), chosen, threads, 4 * threads)
    for found in read:
        if isinstance(found, tuple) and isinstance(found[0], str):
            errors.append((found[0], str(found[1])))
        else:
            totals += found[0]
            pixels, images = pixels + int(found[1]), images + 1
        if on_image is not None:
            on_image(images + len(errors), len(errors), len(chosen))
    if not images:
        raise DataError(f"No image of {source.root} could be read; the first is {errors[0][0]}: {errors[0][1]}")
    mean = totals[0] / pixels
    std = np.sqrt(np.maximum(totals[1] / pixels - mean**2, 0))
    return ChannelStatistics(tuple((mean / 255).tolist()), tuple((std / 255).tolist()), images, pixels, tuple(errors))


def _sums_of(source: ImageSource, index: int, channels: int) -> tuple[Sums, int] | tuple[str, str]:
    """Give the sums of values and squares of one image's channels and its pixels, or its path and what is wrong."""
    name = source.name(index)
    try:
        image = read_image(source.read(index), channels=channels, name=name)
    except MissingExtraError:
        raise
    except (DataError, OSError) as error:
        return name, str(error)
    return np.stack([_sums(plane) for plane in image], axis=1), image[0].numel()


def _sums(plane: Tensor) -> Sums:
    """Give the sum of values and of squares; exact for 8 bits, by counting them."""
    if plane.dtype == torch.uint8:
        counts = np.bincount(plane.numpy().ravel(), minlength=256)
        levels = np.arange(256)
        return np.array([counts @ levels, counts @ levels**2], np.float64)
    x = plane.double()
    return np.array([float(x.sum()), float((x * x).sum())])
