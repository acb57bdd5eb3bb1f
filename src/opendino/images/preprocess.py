# SPDX-License-Identifier: Apache-2.0
"""Evaluation preprocessing as an object, and the refusal of arrays that are no images."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from opendino.errors import ConfigError, DataError
from opendino.images.decode import as_tensor, flatten
from opendino.images.resizing import centre, resize
from opendino.models.config import PreprocessSpec

Fit = Literal["crop", "resize", "pad", "aspect"]
FITS: tuple[str, ...] = get_args(Fit)


def parse_size(text: str | int | tuple[int, int] | None) -> int | tuple[int, int] | None:
    """Read "224" as 224 and "336x448" (height x width) as (336, 448).

    Raises:
        ConfigError: for anything else.
    """
    if text is None or isinstance(text, int | tuple):
        return text
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise ConfigError(f"--size is {text!r}; give one side (224) or height x width (336x448), in pixels.")
    return int(parts[0]) if len(parts) == 1 else (int(parts[0]), int(parts[1]))


class Preprocess:
    """Resize, fit and normalise one image as a model expects it (DINOv2 model card; method.md §1).

    Args:
        spec: constants that travel with the model.
        size: side or (height, width) of the result, pixels; None is spec.crop.
        fit: "crop" resizes the shorter side and cuts the centre; "resize" changes the aspect ratio; "pad" keeps the
            whole image and fills the bottom and right with the mean colour; "aspect" keeps the whole image, in its own
            aspect ratio but for half a patch, with whole patches and at most as many as `size` has: results differ in
            shape.
        patch_size: of the model; but for "aspect" the result's sides need not be multiples, the model crops.
    """

    def __init__(
        self,
        spec: PreprocessSpec,
        *,
        size: int | tuple[int, int] | None = None,
        fit: Fit = "crop",
        patch_size: int = 14,
    ) -> None:
        side = spec.crop if size is None else size
        self.spec, self.fit, self.patch_size = spec, fit, patch_size
        self.height, self.width = (side, side) if isinstance(side, int) else side
        if fit not in FITS:
            raise ConfigError(f"fit is {fit!r}; it must be {', '.join(FITS[:-1])} or {FITS[-1]}.")
        if min(self.height, self.width) < patch_size:
            raise ConfigError(f"The size {self.height}x{self.width} is below one patch of {patch_size} pixels.")

    def __call__(self, image: Any) -> Tensor:
        """Give float32 (C, height, width) from a uint8 tensor (C, H, W), PIL image or uint8 array (H, W, C)."""
        return self.of_file(to_tensor(image, self.spec.num_channels))

    def of_file(self, pixels: Tensor) -> Tensor:
        """Give float32 (C, height, width) from what `read_image` gives: (C, H, W), uint8 or float32, 0–255."""
        return self.normalise(self.fitted(pixels))

    def fitted(self, pixels: Tensor, sides: tuple[int, int] | None = None) -> Tensor:
        """Give (C, height, width) in the dtype of what `read_image` gives, not yet normalised.

        Args:
            pixels: (C, H, W).
            sides: height and width of the picture, where `pixels` are a smaller copy of it.
        """
        height, width = self.resized(*(sides or pixels.shape[-2:]))
        out = resize(pixels, height, width, self.spec.interpolation)
        if self.fit == "crop":
            return centre(out, self.height, self.width)
        return self._filled_up(out) if self.fit == "pad" else out

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Give height and width that an image of these sides is resized to, before it is cut or filled up."""
        if self.fit == "resize":
            return self.height, self.width
        if self.fit == "aspect":
            return self._whole_patches(height, width)
        if self.fit == "pad":
            scale = min(self.height / height, self.width / width)
            return max(min(round(height * scale), self.height), 1), max(min(round(width * scale), self.width), 1)
        margin = self.spec.resize / self.spec.crop
        # The scale at which both sides hold the crop with the spec's margin around it.
        scale = max(round(self.height * margin) / height, round(self.width * margin) / width)
        return max(int(height * scale), self.height), max(int(width * scale), self.width)

    def normalise(self, fitted: Tensor) -> Tensor:
        """Give float32 from pixels 0–255 that have their size, by the spec's mean and std."""
        return normalise(fitted, self.spec)

    def __repr__(self) -> str:
        return f"Preprocess({self.height}x{self.width}, fit={self.fit!r}, {self.spec!r})"

    def _whole_patches(self, height: int, width: int) -> tuple[int, int]:
        p = self.patch_size
        budget = (self.height // p) * (self.width // p)
        rows = min(max(round(math.sqrt(budget * height / width)), 1), budget)
        columns = min(max(round(rows * width / height), 1), budget // rows)
        return rows * p, columns * p

    def _filled_up(self, pixels: Tensor) -> Tensor:
        fill = (torch.tensor(self.spec.mean) * 255).round().to(pixels.dtype).view(-1, 1, 1)
        canvas = fill.expand(-1, self.height, self.width).clone()
        canvas[:, : pixels.shape[-2], : pixels.shape[-1]] = pixels
        return canvas


def normalise(pixels: Tensor, spec: PreprocessSpec) -> Tensor:
    """Give float32 from pixels 0–255 (…, C, H, W), by the spec's mean and std, where the pixels lie."""
    mean, std = (torch.tensor(v, device=pixels.device).view(-1, 1, 1) for v in (spec.mean, spec.std))
    return (pixels.float().clamp(0, 255) / 255 - mean) / std  # floats overshoot where they are resized


def crop_box(pixels: Tensor, box: tuple[float, float, float, float], name: str) -> Tensor:
    """Give the part (left, upper, right, lower) of an image (C, H, W); sides are rounded, as Pillow's crop does.

    Raises:
        DataError: for a box of which nothing lies within the image; what lies outside is left out.
    """
    height, width = pixels.shape[-2:]
    left, upper, right, lower = (round(v) for v in box)
    part = pixels[:, max(upper, 0) : max(lower, 0), max(left, 0) : max(right, 0)]
    if 0 in part.shape:
        raise DataError(f"{name} is {width} x {height} pixels, and nothing of it lies in the box {box}.")
    return part


def to_tensor(image: Any, channels: int = 3) -> Tensor:
    """Check an image in memory and give it as uint8 (C, H, W).

    Args:
        image: a PIL image of any mode, a uint8 array (H, W, C), or a uint8 tensor (C, H, W). Two-dimensional arrays are
            grey and are repeated over the channels.
        channels: C, what the model takes.

    Raises:
        DataError: for anything else, with the reason. Floats may or may not be scaled, and a guess that is wrong costs
            accuracy silently.
    """
    if isinstance(image, Image.Image):
        return as_tensor(flatten(image, "RGB" if channels == 3 else "L"))
    is_tensor = isinstance(image, Tensor)
    if not is_tensor and not isinstance(image, np.ndarray):
        raise DataError(f"An image was given as {type(image).__name__}; give a path, a PIL image or a uint8 array.")
    if image.dtype not in (torch.uint8, np.uint8):
        raise DataError(
            f"An image array has dtype {image.dtype}{_range_of(image)}; it must be uint8 with values 0 to 255. If "
            "yours is scaled to 0–1, give (255 * x).round().astype('uint8')."
        )
    # A copy where the array is read-only, which torch does not take.
    tensor = image if is_tensor else torch.from_numpy(np.require(image, requirements=["C", "W"]))
    if tensor.ndim == 2 and 0 not in tensor.shape:
        return tensor[None].expand(channels, -1, -1)
    if not is_tensor and tensor.ndim == 3:
        tensor = tensor.permute(2, 0, 1)
    if tensor.ndim != 3 or tensor.shape[0] != channels or 0 in tensor.shape:
        raise DataError(_bad_shape(tuple(image.shape), channels, is_tensor))
    return tensor


def _range_of(image: Any) -> str:
    if 0 in image.shape or str(image.dtype).startswith(("complex", "<U", "object")):
        return ""
    return f" with values from {float(image.min()):.3g} to {float(image.max()):.3g}"


def _bad_shape(shape: tuple[int, ...], channels: int, is_tensor: bool) -> str:
    wanted = f"({channels}, height, width)" if is_tensor else f"(height, width, {channels})"
    hint = ""
    if len(shape) == 4:
        hint = " It looks like a batch: give a list of images."
    elif len(shape) == 3 and shape[-1 if is_tensor else 0] == channels:
        hint = " Its channels are at the other end: turn it with " + (
            "x.permute(2, 0, 1)." if is_tensor else "np.moveaxis(x, 0, -1)."
        )
    elif len(shape) == 3 and shape[0 if is_tensor else -1] == 4:
        hint = " It seems to have an alpha channel: lay it on a background, or give a PIL image."
    return f"An image array has shape {shape}; it must be {wanted}, one image at a time.{hint}"
