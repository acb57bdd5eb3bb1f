# SPDX-License-Identifier: Apache-2.0
"""Evaluation preprocessing as an object, and the refusal of arrays that are no images."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from opendino.errors import ConfigError, DataError
from opendino.models.config import PreprocessSpec

Fit = Literal["crop", "resize", "pad"]


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
            whole image and fills the bottom and right with the mean colour.
        patch_size: of the model; the result's sides need not be multiples, the model crops.
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
        if fit not in ("crop", "resize", "pad"):
            raise ConfigError(f"fit is {fit!r}; it must be crop, resize or pad.")
        if min(self.height, self.width) < patch_size:
            raise ConfigError(f"The size {self.height}x{self.width} is below one patch of {patch_size} pixels.")
        self.mode = InterpolationMode.BICUBIC if spec.interpolation == "bicubic" else InterpolationMode.BILINEAR

    def __call__(self, image: Any) -> Tensor:
        """Give float32 (C, height, width) from a uint8 tensor (C, H, W), PIL image or uint8 array (H, W, C)."""
        pixels = to_tensor(image, self.spec.num_channels)
        fitted = {"crop": self._crop, "resize": self._resize, "pad": self._pad}[self.fit](pixels)
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.spec.mean, self.spec.std))
        return (fitted.float() / 255 - mean) / std

    def _scaled(self, pixels: Tensor, height: int, width: int) -> Tensor:
        out: Tensor = tv.resize(pixels, [max(height, 1), max(width, 1)], interpolation=self.mode, antialias=True)
        return out

    def _crop(self, pixels: Tensor) -> Tensor:
        h, w = pixels.shape[-2:]
        margin = self.spec.resize / self.spec.crop
        # The scale at which both sides hold the crop with the spec's margin around it.
        scale = max(round(self.height * margin) / h, round(self.width * margin) / w)
        resized = self._scaled(pixels, max(int(h * scale), self.height), max(int(w * scale), self.width))
        out: Tensor = tv.center_crop(resized, [self.height, self.width])
        return out

    def _resize(self, pixels: Tensor) -> Tensor:
        return self._scaled(pixels, self.height, self.width)

    def _pad(self, pixels: Tensor) -> Tensor:
        h, w = pixels.shape[-2:]
        scale = min(self.height / h, self.width / w)
        resized = self._scaled(pixels, min(round(h * scale), self.height), min(round(w * scale), self.width))
        fill = (torch.tensor(self.spec.mean) * 255).round().to(torch.uint8).view(-1, 1, 1)
        canvas = fill.expand(-1, self.height, self.width).clone()
        canvas[:, : resized.shape[-2], : resized.shape[-1]] = resized
        return canvas


def to_tensor(image: Any, channels: int = 3) -> Tensor:
    """Check an image in memory and give it as uint8 (C, H, W).

    Raises:
        DataError: for arrays that are not uint8 (H, W, C), with the reason: floats may or may not be scaled, and
            guessing wrong costs 10 points silently.
    """
    if isinstance(image, Image.Image):
        mode = "RGB" if channels == 3 else "L"
        pixels = torch.from_numpy(np.array(image.convert(mode)))
        return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    is_tensor = isinstance(image, Tensor)
    if not is_tensor and not isinstance(image, np.ndarray):
        raise DataError(f"An image was given as {type(image).__name__}; give a path, a PIL image or a uint8 array.")
    if image.dtype not in (torch.uint8, np.uint8):
        raise DataError(
            f"An image array has dtype {image.dtype}; it must be uint8 with values 0–255. If yours is scaled to 0–1, "
            "give (255 * x).round().astype('uint8')."
        )
    tensor = image if is_tensor else torch.from_numpy(np.ascontiguousarray(image))
    if not is_tensor:
        tensor = tensor[..., None] if tensor.ndim == 2 and channels == 1 else tensor
        tensor = tensor.permute(2, 0, 1) if tensor.ndim == 3 else tensor
    if tensor.ndim != 3 or tensor.shape[0] != channels or 0 in tensor.shape:
        wanted = f"({channels}, height, width)" if is_tensor else f"(height, width, {channels})"
        raise DataError(f"An image array has shape {tuple(image.shape)}; it must be {wanted}, one image at a time.")
    return tensor
