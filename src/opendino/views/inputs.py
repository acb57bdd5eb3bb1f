# SPDX-License-Identifier: Apache-2.0
"""What both views share: a whole picture as model input, and a patch grid enlarged to the picture's own pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from opendino.errors import ConfigError
from opendino.images.decode import decode_image
from opendino.images.preprocess import Preprocess, to_tensor
from opendino.models.vit import VisionTransformer


def model_input(model: VisionTransformer, image: Any, size: int | None = None) -> tuple[Tensor, tuple[int, int]]:
    """Turn a whole picture, nothing cropped away, into a batch of one.

    The shorter side becomes `size` and the longer one keeps the proportions, both rounded to whole patches.

    Args:
        model: gives preprocessing, patch size and device.
        image: path, PIL image or uint8 HWC array.
        size: shorter side, pixels; None is the crop that travels with the model.

    Returns:
        (1, C, h, w) normalised, on the model's device, and the picture's own (height, width).

    Raises:
        DataError: for an image that cannot be read.
        ConfigError: for a size below one patch.
    """
    size, patch = size or model.preprocess.crop, model.patch_size
    if size < patch:
        raise ConfigError(f"The size is {size} pixels; the model needs at least one patch, {patch} pixels.")
    channels = model.config.in_chans
    pixels = decode_image(image, channels=channels) if isinstance(image, str | Path) else to_tensor(image)
    height, width = pixels.shape[-2:]
    factor = size / min(height, width)
    h, w = (max(round(side * factor / patch), 1) * patch for side in (height, width))
    x = Preprocess(model.preprocess, size=(h, w), fit="resize", patch_size=patch)(pixels)
    return x.unsqueeze(0).to(next(model.parameters()).device), (height, width)


def enlarge(grid: np.ndarray, shape: tuple[int, int]) -> Image.Image:
    """Enlarge a uint8 patch grid (h, w, 3) to (height, width) pixels; patches stay sharp-edged."""
    return Image.fromarray(grid).resize((shape[1], shape[0]), Image.Resampling.NEAREST)
