# SPDX-License-Identifier: Apache-2.0
"""Image files to uint8 tensors, whatever their colour mode; what cannot be read says why."""

from __future__ import annotations

import importlib.util
import io
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from opendino.errors import DataError

# What Pillow and its plug-ins raise on damaged files, beside OSError which is what they promise.
DAMAGED = (
    OSError, ValueError, SyntaxError, EOFError, ArithmeticError, LookupError, TypeError, AttributeError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip

ORIENTATION = 0x0112
"""The Exif tag of how a picture is to be turned: 1 is upright, 2–8 are turned or mirrored."""
Enough = Callable[[int, int], tuple[int, int]]
"""From the height and width of a picture to the least height and width that will do."""
GREY, RGB = 1, 3
"""What torchvision's decoder calls them."""


def decode_image(source: str | Path | bytes, *, channels: int = 3, enough: Enough | None = None) -> Tensor:
    """Read an image as uint8 (channels, H, W).

    EXIF orientation is applied, transparency is laid on white, CMYK, palettes and the like become RGB; of an animation
    the first frame is taken. 16-bit grey is divided by 257; 32-bit and float grey have no declared white, and are
    divided by 257 when a value is above 255.

    Args:
        source: a path, or the bytes of a file.
        channels: 3 for RGB, 1 for grey.
        enough: from (height, width) of a picture to sides that suffice; a JPEG file is then decoded at an eighth, a
            quarter or half of its sides where neither is smaller than that. Far cheaper for large photographs, and
            grey levels away from resizing all of it (docs/extraction.md).

    Raises:
        DataError: for a missing, truncated or corrupt file, with its path and the reason, and for another number of
            channels.
    """
    if channels not in (1, 3):
        raise DataError(
            f"Image files are read as 3 channels (RGB) or 1 (grey), and {channels} were asked for. Give arrays of "
            "(height, width, channels) to a model with other channels."
        )
    name = "<bytes>" if isinstance(source, bytes) else str(source)
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        with Image.open(io.BytesIO(data)) as picture:
            shrunk = enough is not None and _shrink(picture, enough)
            pixels = None if shrunk else _decode_jpeg(data, picture, channels)
            if pixels is not None:
                return pixels
            picture.load()
            image = flatten(ImageOps.exif_transpose(picture), "RGB" if channels == 3 else "L")
    except UnidentifiedImageError as error:
        raise DataError(f"{name} cannot be read as an image: its bytes are of no known format.") from error
    except DAMAGED as error:
        raise DataError(f"{name} cannot be read as an image: {error or type(error).__name__}") from error
    return as_tensor(image)


def _shrink(picture: Image.Image, enough: Enough) -> bool:
    """Have a JPEG picture decoded at a fraction of its sides, if one suffices."""
    if picture.format != "JPEG":
        return False
    width, height = picture.size
    if picture.getexif().get(ORIENTATION, 1) in range(5, 9):  # lies on its side
        least = enough(width, height)
    else:
        least = enough(height, width)[::-1]
    picture.draft(None, least)  # type: ignore[no-untyped-call, unused-ignore]
    return bool(picture.size != (width, height))


def _decode_jpeg(data: bytes, picture: Image.Image, channels: int) -> Tensor | None:
    """Decode a plain JPEG file without Pillow's copies, to the same pixels; None for a file that Pillow must judge.

    Plain is upright, and RGB or grey as asked for. A file that torchvision refuses, or a torchvision without JPEG, is
    left to Pillow too, so that what counts as damaged and the message do not depend on who decodes.
    """
    plain = picture.mode == "L" or (picture.mode == "RGB" and channels == 3)
    if picture.format != "JPEG" or not plain:
        return None
    if picture.getexif().get(ORIENTATION, 1) in range(2, 9):
        return None
    decode = jpeg_decoder()
    if decode is None:
        return None
    try:
        return decode(torch.frombuffer(bytearray(data), dtype=torch.uint8), RGB if channels == 3 else GREY)
    except RuntimeError:
        return None


@cache
def jpeg_decoder() -> Callable[[Tensor, int], Tensor] | None:
    """Give torchvision's decoder of JPEG files, or None where it has none.

    Only the library that holds it is loaded: importing torchvision brings torch's compiler with it, which takes 150 MiB
    and more than a second.
    """
    found = importlib.util.find_spec("torchvision")
    folders = (found.submodule_search_locations if found else None) or []
    for path in (path for folder in folders for path in sorted(Path(folder).glob("image*"))):
        if path.suffix in (".so", ".pyd", ".dylib"):
            with suppress(OSError, RuntimeError):
                torch.ops.load_library(path)
    try:
        decoder: Callable[[Tensor, int], Tensor] = torch.ops.image.decode_jpeg
    except AttributeError:
        return None
    return decoder


def flatten(image: Image.Image, mode: str) -> Image.Image:
    """Bring a Pillow image of any mode to "RGB" or "L", transparency laid on white."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        sixteen = image.mode.startswith("I;16") or values.max(initial=0) > 255
        eight = values / 257 if sixteen else values
        image = Image.fromarray(eight.round().clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    converted: Image.Image = image.convert(mode)
    return converted


def as_tensor(image: Image.Image) -> Tensor:
    """Give the pixels of an "RGB" or "L" image as uint8 (C, H, W)."""
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
