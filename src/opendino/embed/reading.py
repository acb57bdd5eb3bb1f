# SPDX-License-Identifier: Apache-2.0
"""From files and images in memory to what a runtime takes: pixels that stay uint8 until the runtime, where it can.

Shapes: C channels, H × W pixels, B images of one shape.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from opendino.embed.runtimes.base import Runtime
from opendino.errors import ConfigError, DataError, MissingExtraError
from opendino.images.arrays import read_image
from opendino.images.preprocess import Preprocess, crop_box, normalise, to_tensor
from opendino.images.sources import SourceImage

Decode = Literal["exact", "scaled"]
MARGIN = 1.4
"""A picture that is decoded at a fraction keeps at least so many times the sides it is resized to: nearer to them, the
coarse filter of the decoding would be most of what is seen."""


@dataclass(frozen=True)
class Read:
    """One image as a runtime takes it, or why there is none.

    Attributes:
        path: as text, or "" for an image given in memory.
        pixels: (C, H, W), uint8 or normalised float32; None where it could not be read.
        sha256: of the file's bytes; None for an image in memory or a file that could not be opened.
        error: None, or the reason.
    """

    path: str
    pixels: Tensor | None
    sha256: str | None = None
    error: str | None = None


class Reader:
    """Reads images for a runtime; it may be called from several threads at once.

    Args:
        runtime: what the images are for.
        preprocess: how they get their size.
        decode: "exact" decodes whole pictures; "scaled" decodes JPEG files at a fraction of their sides where that is
            enough for the size.

    Raises:
        ConfigError: for another name.
    """

    def __init__(self, runtime: Runtime, preprocess: Preprocess, decode: Decode = "exact") -> None:
        if decode not in get_args(Decode):
            raise ConfigError(f"decode is {decode!r}; it must be one of {', '.join(get_args(Decode))}.")
        self.runtime, self.preprocess = runtime, preprocess
        self.channels = runtime.config.in_chans
        self.decode = decode

    def __call__(self, item: Any) -> Read:
        """Read a path, an image of a source, or an image in memory.

        Raises:
            DataError: for an object in memory that is no image. A file that cannot be read is a `Read` with an error.
        """
        if not isinstance(item, str | Path | SourceImage):
            return Read("", self._fitted(to_tensor(item, self.channels)))
        path, sha256 = item.path if isinstance(item, SourceImage) else str(item), None
        box = item.box if isinstance(item, SourceImage) else None
        try:
            data = item.data() if isinstance(item, SourceImage) else Path(path).read_bytes()
            sha256 = hashlib.sha256(data).hexdigest()
            if self.decode == "scaled" and box is None:
                return Read(path, self._scaled(data, path), sha256)
            pixels = read_image(data, channels=self.channels, name=path)
            if box is not None:
                pixels = crop_box(pixels, box, path)
            return Read(path, self._fitted(pixels), sha256)
        except MissingExtraError:
            raise
        except (DataError, OSError) as error:
            return Read(path, None, sha256, str(error) or type(error).__name__)

    def prepared(self, fitted: Tensor) -> Tensor:
        """Give what the runtime takes from pixels 0–255 (C, H, W) that have their size: uint8, or normalised floats.

        Floats in 0–255 come from files of 16 bits: they become uint8 only where the runtime takes nothing else.
        """
        if not self.runtime.takes_pixels:
            return self.preprocess.normalise(fitted)
        if fitted.dtype is not torch.uint8:
            if self.runtime.takes_floats:
                return self.preprocess.normalise(fitted)
            fitted = fitted.clamp(0, 255).round().to(torch.uint8)
        # The channels of a pixel together, as patches are read, and nothing kept of what was cut off. NumPy copies in
        # this thread alone, where torch would wake its others, which have the forward pass to do.
        return torch.from_numpy(fitted.permute(1, 2, 0).numpy().copy()).permute(2, 0, 1)

    def stacked(self, images: Sequence[Tensor]) -> Tensor:
        """Give images of one shape as a batch (B, C, H, W); floats if one of them is."""
        if all(image.dtype is torch.uint8 for image in images):
            if not self.runtime.takes_floats:
                return torch.stack(list(images))
            batch = np.stack([image.permute(1, 2, 0).numpy() for image in images])
            return torch.from_numpy(batch).permute(0, 3, 1, 2)
        spec = self.preprocess.spec
        return torch.stack([normalise(image, spec) if image.dtype is torch.uint8 else image for image in images])

    def _scaled(self, data: bytes, name: str) -> Tensor:
        """Read a file, decoding no more of a JPEG than is needed."""
        sides: list[tuple[int, int]] = []

        def enough(height: int, width: int) -> tuple[int, int]:
            sides.append((height, width))
            rows, columns = self.preprocess.resized(height, width)
            return math.ceil(MARGIN * rows), math.ceil(MARGIN * columns)

        pixels = read_image(data, channels=self.channels, name=name, enough=enough)
        return self._fitted(pixels, *sides)

    def _fitted(self, pixels: Tensor, sides: tuple[int, int] | None = None) -> Tensor:
        if pixels.shape[0] != self.channels:
            raise DataError(
                f"An image has {pixels.shape[0]} channels, and the model takes {self.channels}. Give an image with the "
                "model's number of channels."
            )
        return self.prepared(self.preprocess.fitted(pixels, sides))
