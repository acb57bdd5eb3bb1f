# SPDX-License-Identifier: Apache-2.0
"""The rows of the table: ways to turn images into vectors, and into a vector per patch.

Shapes: n images, D width, g patches a side.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from handmade import IMAGE, describe_images, describe_patches
from PIL import Image

import opendino
from opendino.embed.embedder import Embedder
from opendino.embed.resume import weights_fingerprint
from opendino.errors import DataError
from opendino.models.vit import VisionTransformer

ROWS = ("raw", "hog", "hog+colour", "random", "trained")
SEED = 0  # of the random backbone
BATCH = 32
Box = Sequence[float] | None
Half, Single = npt.NDArray[np.float16], npt.NDArray[np.float32]


class Describer(ABC):
    """One row.

    Attributes:
        name: of the row.
        key: names everything that decides its vectors.
    """

    name: str
    key: str

    @abstractmethod
    def images(self, paths: Sequence[Path], boxes: Sequence[Box], size: int | None) -> Iterator[Single]:
        """Iterate over blocks (b, D) of vectors of images or of boxes in them, shown at size × size (None: its own)."""

    @abstractmethod
    def patches(self, paths: Sequence[Path], size: int | None) -> Iterator[Half]:
        """Iterate over blocks (b, g, g, D) of vectors of patches."""


class Handmade(Describer):
    """Descriptors without learning; they have sizes of their own."""

    def __init__(self, name: str) -> None:
        self.name, self.key = name, f"{name} 2"

    def images(self, paths: Sequence[Path], boxes: Sequence[Box], size: int | None) -> Iterator[Single]:
        """See `Describer`."""
        for start in range(0, len(paths), BATCH):
            part = slice(start, start + BATCH)
            yield describe_images(self.name, [read(p, b) for p, b in zip(paths[part], boxes[part])])

    def patches(self, paths: Sequence[Path], size: int | None) -> Iterator[Half]:
        """See `Describer`."""
        for path in paths:
            assert size is not None, "a descriptor by hand has no size of its own for patches"
            image = read(path).resize((size, size), Image.Resampling.BICUBIC)
            yield describe_patches(self.name, np.asarray(image))[None].astype(np.float16)


class Backbone(Describer):
    """A ViT: cls tokens for images, patch tokens of the last block for patches."""

    def __init__(self, name: str, model: VisionTransformer) -> None:
        self.name, self.model = name, model.eval()
        self.key = f"{weights_fingerprint(model)} 1"

    def images(self, paths: Sequence[Path], boxes: Sequence[Box], size: int | None) -> Iterator[Single]:
        """See `Describer`."""
        inputs: list[Any] = [p if b is None else read(p, b) for p, b in zip(paths, boxes)]
        for part in self._embedder(size, "cls").stream(inputs):
            _check(part.errors)
            assert part.cls is not None
            yield part.cls

    def patches(self, paths: Sequence[Path], size: int | None) -> Iterator[Half]:
        """See `Describer`."""
        for part in self._embedder(size, "patches").stream(list(paths)):
            _check(part.errors)
            assert part.patches is not None
            yield part.patches.reshape(len(part), *part.grid, -1).astype(np.float16)

    def _embedder(self, size: int | None, what: str) -> Embedder:
        own = self.model.preprocess.crop
        return Embedder(self.model, precision="fp32", batch_size=BATCH, size=size or own, fit="resize", what=(what,))


def describer(row: str, run: Path | None) -> Describer:
    """Make the describer of a row.

    Args:
        row: one of `ROWS`.
        run: run folder or model name, whose architecture "random" takes too; others need none.

    Raises:
        DataError: when a row needs a run folder.
    """
    if row in IMAGE:
        return Handmade(row)
    if run is None:
        raise DataError(f"The row {row!r} needs a trained run: give its folder with --run.")
    model = opendino.load(str(run), device="cpu")
    if row == "random":
        torch.manual_seed(SEED)
        model.init_weights()
    return Backbone(row, model)


def read(path: Path, box: Box = None) -> Image.Image:
    """Read an image, or the part in a box, as RGB."""
    with Image.open(path) as file:
        image: Image.Image = file.convert("RGB")
    return image if box is None else image.crop(tuple(box))


def _check(errors: Sequence[str | None]) -> None:
    wrong = [e for e in errors if e]
    if wrong:
        raise DataError(f"{len(wrong)} images of the sets cannot be read: {wrong[0]}. Build the sets again.")
