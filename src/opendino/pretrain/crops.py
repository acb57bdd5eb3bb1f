# SPDX-License-Identifier: Apache-2.0
"""Multi-crop geometry: which rectangles of an image become crops, and cutting them (method.md §2).

Randomness is a function of (seed, sample counter) only: the number of draws per sample is fixed, so a retry of the
rectangle search or another worker never shifts what the next sample gets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from torch.nn.functional import interpolate

from opendino.native import cutting
from opendino.native.build import kernels

Array = np.ndarray[Any, Any]
ASPECT = (3 / 4, 4 / 3)
TRIES = 10
CROP_STREAM, RETRY_STREAM, ORDER_STREAM = 0, 1, 2
"""Independent uses of one (seed, counter): a sample's crops, its replacement images, an epoch's order."""


class CropsConfig(BaseModel):
    """Settings of the multi-crop augmentation; the defaults are the published ones for patch 14."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    global_size: int = Field(224, ge=8, description="side of the two global crops, pixels")
    local_size: int = Field(98, ge=8, description="side of the local crops, pixels")
    num_local: int = Field(8, ge=0, description="local crops per image")
    global_scale: tuple[float, float] = Field((0.32, 1.0), description="share of the image area")
    local_scale: tuple[float, float] = Field((0.05, 0.32), description="share of the image area")
    flip: float = Field(0.5, ge=0, le=1, description="probability of a left-right flip")
    jitter: tuple[float, float, float, float] = Field(
        (0.4, 0.4, 0.2, 0.1), description="strength of brightness, contrast, saturation, hue"
    )
    jitter_prob: float = Field(0.8, ge=0, le=1)
    grey_prob: float = Field(0.2, ge=0, le=1)
    blur_probs: tuple[float, float, float] = Field((1.0, 0.1, 0.5), description="global 1, global 2, local crops")
    blur_sigma: tuple[float, float] = Field((0.1, 2.0), description="pixels")
    solarize_prob: float = Field(0.2, ge=0, le=1, description="on the second global crop")
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    @model_validator(mode="after")
    def _check(self) -> CropsConfig:
        for name, (low, high) in (("global_scale", self.global_scale), ("local_scale", self.local_scale)):
            if not 0 < low <= high <= 1:
                raise ValueError(f"{name} must be two rising shares of the area in (0, 1], got {[low, high]}")
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            raise ValueError(f"blur_sigma must be two positive rising values, got {list(self.blur_sigma)}")
        if not all(0 <= p <= 1 for p in self.blur_probs):
            raise ValueError(f"blur_probs must be probabilities, got {list(self.blur_probs)}")
        if min(self.jitter) < 0 or self.jitter[3] > 0.5:
            raise ValueError(f"jitter must be >= 0, and its last value (hue) <= 0.5, got {list(self.jitter)}")
        if len(self.mean) != len(self.std) or not self.mean or min(self.std) <= 0:
            raise ValueError("mean and std need one value per channel each, and std must be positive")
        return self


@dataclass(frozen=True)
class Boxes:
    """Rectangles of crops, in pixels.

    Attributes:
        top, left, height, width: (n,) int64, or (n, B) for n crops of each of B images.
        flip: bool, likewise.
    """

    top: np.ndarray[Any, np.dtype[np.int64]]
    left: np.ndarray[Any, np.dtype[np.int64]]
    height: np.ndarray[Any, np.dtype[np.int64]]
    width: np.ndarray[Any, np.dtype[np.int64]]
    flip: np.ndarray[Any, np.dtype[np.bool_]]


def sample_rng(seed: int, counter: int, stream: int = CROP_STREAM) -> np.random.Generator:
    """Give the generator of one sample: a pure function of its arguments.

    Args:
        seed: seed of the run.
        counter: step · batch size + position in the batch (or the epoch, for the order of an epoch).
        stream: which use of this counter.
    """
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, stream, counter]))


def draw_boxes(
    height: int, width: int, count: int, scale: tuple[float, float], flip: float, rng: np.random.Generator
) -> Boxes:
    """Draw rectangles of random area and aspect, each the first of ten draws that fits into the image.

    When none fits, the largest centred rectangle of allowed aspect is taken.

    Args:
        height: of the image, pixels.
        width: of the image, pixels.
        count: number of rectangles n.
        scale: range of their area as a share of the image.
        flip: probability of a flip.
        rng: always gives 23 · n numbers.
    """
    return boxes_from(rng.random((count, TRIES, 2)), rng.random((count, 3)), height, width, scale, flip)


def boxes_from(
    u: Array, place: Array, height: Array | int, width: Array | int, scale: tuple[float, float], flip: float
) -> Boxes:
    """Make the rectangles that `draw_boxes` draws out of uniform numbers.

    Args:
        u: (..., 10, 2), for area and aspect of each try.
        place: (..., 3), for row, column and flip.
        height: of the images, pixels; of a shape that fits (...).
        width: likewise.
        scale: range of the area as a share of the image.
        flip: probability of a flip.

    Returns:
        Rectangles whose arrays have the shape (...).
    """
    height, width = np.asarray(height), np.asarray(width)
    area = (height * width)[..., None] * (scale[0] + (scale[1] - scale[0]) * u[..., 0])
    low, high = np.log(ASPECT)
    aspect = np.exp(low + (high - low) * u[..., 1])
    w = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (w > 0) & (h > 0) & (w <= width[..., None]) & (h <= height[..., None])
    first, some = fits.argmax(-1)[..., None], fits.any(-1)
    whole_h = np.minimum(height, np.rint(width / ASPECT[0])).astype(np.int64)
    whole_w = np.minimum(width, np.rint(height * ASPECT[1])).astype(np.int64)
    h = np.where(some, np.take_along_axis(h, first, -1)[..., 0], whole_h)
    w = np.where(some, np.take_along_axis(w, first, -1)[..., 0], whole_w)
    top = np.where(some, np.floor(place[..., 0] * (height - h + 1)), (height - h) // 2).astype(np.int64)
    left = np.where(some, np.floor(place[..., 1] * (width - w + 1)), (width - w) // 2).astype(np.int64)
    return Boxes(top, left, h, w, place[..., 2] < flip)


def cut_crops(image: Tensor, boxes: Boxes, size: int) -> Tensor:
    """Cut rectangles out of an image and resize each to a square, bicubic with antialias.

    Args:
        image: uint8 (C, H, W); fastest when the channels of a pixel lie together in memory.
        boxes: n rectangles inside the image.
        size: side s of the crops.

    Returns:
        uint8 (n, C, s, s).
    """
    one = Boxes(*(getattr(boxes, f.name)[:, None] for f in fields(boxes)))
    return _cut([image], [(one, size)])[0]


def multi_crop(image: Tensor, config: CropsConfig, rng: np.random.Generator) -> tuple[Tensor, Tensor | None]:
    """Cut the two global crops and the local crops of one image.

    Args:
        image: uint8 (C, H, W).
        config: sizes and scales.
        rng: of this sample.

    Returns:
        Global crops uint8 (2, C, g, g), and local crops uint8 (L, C, l, l) or None when L is 0.
    """
    return multi_crops([image], config, rng.random((1, numbers_for_boxes(config))))


def numbers_for_boxes(config: CropsConfig) -> int:
    """Give how many uniform numbers the rectangles of one sample take."""
    return (2 * TRIES + 3) * (2 + config.num_local)


def multi_crops(images: Sequence[Tensor], config: CropsConfig, numbers: Array) -> tuple[Tensor, Tensor | None]:
    """Cut the global and local crops of several images.

    Args:
        images: B images, uint8 (C, H, W).
        config: sizes and scales.
        numbers: (B, `numbers_for_boxes`) uniform numbers.

    Returns:
        Global crops uint8 (2·B, C, g, g), and local crops uint8 (L·B, C, l, l) or None when L is 0; crop-major.
    """
    height, width = (np.array([image.shape[k] for image in images]) for k in (1, 2))
    wanted, begin = [], 0
    for count, size, scale in (
        (2, config.global_size, config.global_scale),
        (config.num_local, config.local_size, config.local_scale),
    ):
        middle, end = begin + 2 * TRIES * count, begin + (2 * TRIES + 3) * count
        u = numbers[:, begin:middle].reshape(len(images), count, TRIES, 2).swapaxes(0, 1)
        place = numbers[:, middle:end].reshape(len(images), count, 3).swapaxes(0, 1)
        if count:
            wanted.append((boxes_from(u, place, height, width, scale, config.flip), size))
        begin = end
    global_crops, *local_crops = _cut(images, wanted)
    return global_crops, local_crops[0] if local_crops else None


def _cut(images: Sequence[Tensor], wanted: Sequence[tuple[Boxes, int]]) -> list[Tensor]:
    """Cut (n, B) boxes, each set to its own size, out of B images; gives crop-major (n·B, C, s, s)."""
    images = [by_pixel(image) for image in images]
    out = [torch.empty((boxes.top.size, len(images[0]), size, size), dtype=torch.uint8) for boxes, size in wanted]
    library = kernels().library
    if library is None:
        for crops, (boxes, _) in zip(out, wanted, strict=True):
            _cut_by_torch(images, boxes, crops)
    else:
        rows = [np.stack([b.top, b.left, b.height, b.width, b.flip], axis=-1) for b, _ in wanted]
        cutting.cut_crops(library, images, np.concatenate(rows), out)
    return out


def _cut_by_torch(images: Sequence[Tensor], boxes: Boxes, out: Tensor) -> None:
    for i, place in enumerate(np.ndindex(boxes.top.shape)):
        top, left, h, w = (int(v[place]) for v in (boxes.top, boxes.left, boxes.height, boxes.width))
        part = images[place[1]][None, :, top : top + h, left : left + w]
        crop = interpolate(part, size=out.shape[-2:], mode="bicubic", antialias=True, align_corners=False)
        out[i] = crop[0].flip(-1) if boxes.flip[place] else crop[0]


def by_pixel(image: Tensor) -> Tensor:
    """Lay (C, H, W) out in memory with the channels of a pixel together, which is what resizing is fastest on."""
    return image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
