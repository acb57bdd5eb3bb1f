# SPDX-License-Identifier: Apache-2.0
"""Image files to uint8 tensors, whatever their colour mode; what cannot be read says why."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from opendino.errors import DataError


def decode_image(source: str | Path | bytes, *, channels: int = 3) -> Tensor:
    """Read an image as uint8 (channels, H, W).

    EXIF orientation is applied, transparency is laid on white, CMYK and palettes become RGB, 16-bit grey is scaled to
    8 bits (divided by 257).

    Args:
        source: a path, or the bytes of a file.
        channels: 3 for RGB, 1 for grey.

    Raises:
        DataError: for a missing, truncated or corrupt file, with its path and the reason.
    """
    name = "<bytes>" if isinstance(source, bytes) else str(source)
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(file) as picture:
            picture.load()
            image = _to_mode(ImageOps.exif_transpose(picture), "RGB" if channels == 3 else "L")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{name} cannot be read as an image: {error or type(error).__name__}") from error
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        eight = values / 257 if values.max(initial=0) > 255 else values
        image = Image.fromarray(eight.round().clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert(mode)
