# SPDX-License-Identifier: Apache-2.0
"""Images of any number of channels and of 8 or 16 bits: `.npy` arrays and TIFF beside what Pillow reads.

16-bit values are divided by 257 and stay floats, so that 8 and 16 bits share the range 0–255 and no precision is lost.
"""

from __future__ import annotations

import io
import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from opendino.errors import DataError, MissingExtraError
from opendino.images.decode import Enough, decode_image

log = logging.getLogger("opendino")

NPY = b"\x93NUMPY"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
PEEKED = frozenset([".npy", ".tif", ".tiff", ".png"])
GREY_MODES = ("L", "I;16", "I;16B", "I;16L", "I;16N")


def read_image(
    source: str | Path | bytes, *, channels: int = 3, name: str = "", enough: Enough | None = None
) -> Tensor:
    """Read an image file or array of `channels` channels.

    - `.npy`: uint8 or uint16, (H, W, C), or (H, W) for one channel (repeated for three).
    - TIFF: samples of a pixel are channels; or as many grey pages as there are channels, one a channel. 16-bit grey
      keeps its precision for one-channel models, as it does in PNG.
    - Everything else: `decode_image`, for 3 or 1 channels.

    Args:
        source: a path, or the bytes of a file.
        channels: C, what the model takes.
        name: what messages call the image when bytes are given.
        enough: lets JPEG files be decoded at a fraction of their sides, see `decode_image`.

    Returns:
        (C, H, W), uint8 0–255, or float32 0–255 for 16-bit data (value / 257).

    Raises:
        DataError: for a file that cannot be read, with the reason, and one with another number of channels.
        MissingExtraError: for a TIFF of other than 1 or 3 channels that needs tifffile, without it.
    """
    name = name or ("<bytes>" if isinstance(source, bytes) else str(source))
    try:
        head = _head(source)
        if head.startswith(NPY):
            return _from_array(_load_npy(source, name), channels, name)
        if head.startswith(TIFF) and (pixels := _read_tiff(source, channels, name)) is not None:
            return pixels
        if channels == 1 and head[:8] == b"\x89PNG\r\n\x1a\n" and head[24:26] == b"\x10\0":  # 16 bits, grey
            with Image.open(_file(source)) as picture:
                return _from_array(np.array(picture, dtype=np.uint16), channels, name)
        if channels in (1, 3):
            return decode_image(source, channels=channels, enough=enough)
    except MissingExtraError:
        raise
    except DataError as error:
        raise DataError(str(error).replace("<bytes>", name, 1)) from error
    except Exception as error:  # parsers of headers let all sorts through on damaged files
        raise DataError(f"{name} cannot be read as an image: {error or type(error).__name__}") from error
    raise DataError(
        f"{name} is read as 3 channels (RGB) or 1 (grey), and the model takes {channels}. Give .npy arrays (height, "
        f"width, {channels}) or TIFF files with {channels} samples or pages, or set model.in_chans to 3."
    )


def _head(source: str | Path | bytes) -> bytes:
    if isinstance(source, bytes):
        return source[:32]
    if Path(source).suffix.lower() not in PEEKED:
        return b""
    with open(source, "rb") as file:
        return file.read(32)


def _file(source: str | Path | bytes) -> Any:
    return io.BytesIO(source) if isinstance(source, bytes) else source


def _load_npy(source: str | Path | bytes, name: str) -> np.ndarray[Any, Any]:
    try:
        array: np.ndarray[Any, Any] = np.load(_file(source), allow_pickle=False)
    except ValueError as error:
        raise DataError(f"{name} cannot be read as an array: {error}") from error
    return array


def _from_array(array: np.ndarray[Any, Any], channels: int, name: str) -> Tensor:
    """Check an array (H, W) or (H, W, C) and give it as (C, H, W)."""
    if array.dtype.newbyteorder("=") not in (np.uint8, np.uint16):
        raise DataError(
            f"{name} holds {array.dtype} values; uint8 or uint16 are needed, whose white is known. Scale your values "
            "to 0–65535 with one factor for the whole data set, and save them as uint16."
        )
    if array.ndim == 2 and channels in (1, 3):
        array = np.repeat(array[:, :, None], channels, axis=2)
    if array.ndim != 3 or array.shape[2] != channels or 0 in array.shape:
        hint = ""
        if array.ndim == 3 and array.shape[0] == channels:
            hint = " Its channels come first: save np.moveaxis(x, 0, -1)."
        found = f"{array.shape[2]} channels" if array.ndim == 3 else f"{array.ndim} dimensions"
        raise DataError(
            f"{name} has the shape {array.shape}, {found}; the model takes {channels} channels, (height, width, "
            f"{channels}).{hint}"
        )
    if array.dtype.itemsize == 2:
        return torch.from_numpy(np.moveaxis(array, 2, 0).astype(np.float32) / np.float32(257))
    return torch.from_numpy(np.require(array, requirements=["C", "W"])).permute(2, 0, 1)


def _read_tiff(source: str | Path | bytes, channels: int, name: str) -> Tensor | None:
    """Read a TIFF of C channels or C grey pages; None leaves it to `decode_image`."""
    try:
        with Image.open(_file(source)) as picture:
            pages = getattr(picture, "n_frames", 1)
            bits = getattr(picture, "tag_v2", {}).get(258, (8,))
            colour16 = picture.mode not in GREY_MODES and len(bits) > 1 and max(bits) == 16
            sixteen = picture.mode.startswith("I;16")
            if picture.mode in GREY_MODES and (sixteen if channels == 1 else pages == channels):
                return _from_array(_grey_pages(picture, channels), channels, name)
            if channels in (1, 3) and not colour16:
                return None
            if channels == 3 and not _has_tifffile():
                _warn_of_eight_bits(name)
                return None
    except UnidentifiedImageError:  # damaged, or of so many samples that Pillow does not know them
        if channels in (1, 3) and not _has_tifffile():
            return None
    return _from_array(_by_tifffile(source, name), channels, name)


def _has_tifffile() -> bool:
    try:
        import tifffile  # noqa: F401
    except ImportError:
        return False
    return True


@lru_cache(maxsize=1)
def _warn_of_eight_bits(name: str) -> None:
    log.warning(
        "%s and maybe others are 16-bit colour TIFFs, read at 8 bits. Install opendino[scientific] for all 16.",
        name,
    )


def _grey_pages(picture: Image.Image, pages: int) -> np.ndarray[Any, Any]:
    arrays = []
    for page in range(pages):
        picture.seek(page)
        if picture.mode not in GREY_MODES:
            raise DataError(f"Page {page} of the TIFF is {picture.mode}, the first one grey; all must be alike.")
        arrays.append(np.array(picture, dtype=np.uint8 if picture.mode == "L" else np.uint16))
    return np.stack(arrays, axis=-1)


def _by_tifffile(source: str | Path | bytes, name: str) -> np.ndarray[Any, Any]:
    try:
        import tifffile
    except ImportError as error:
        raise MissingExtraError("tifffile", "scientific", f"Reading {name}, a TIFF that Pillow cannot read,") from error
    with tifffile.TiffFile(_file(source)) as file:
        series = file.series[0]
        array: np.ndarray[Any, Any] = series.asarray()
        axes = series.axes
    if array.ndim == 3 and axes[-1] not in "S" and axes[0] in "SCQIZ":  # planes or pages first
        array = np.moveaxis(array, 0, -1)
    return array
