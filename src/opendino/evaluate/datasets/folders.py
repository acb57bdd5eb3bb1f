# SPDX-License-Identifier: Apache-2.0
"""The generic folder forms of images with masks and images with depth.

ROOT/images/SPLIT/NAME.jpg   ROOT/masks/SPLIT/NAME.png   ROOT/classes.txt    class index at every pixel, 255 ignored
ROOT/images/SPLIT/NAME.jpg   ROOT/depth/SPLIT/NAME.png   ROOT/depth.json     16 bits; {"scale": 0.001, "max": 10}
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from opendino.errors import DataError
from opendino.evaluate.datasets.types import IGNORE, DepthCrop, DepthSet, SegmentationSet
from opendino.images.arrays import read_image
from opendino.images.sources import EXTENSIONS

UNKNOWN = 254
"""In a lookup: a value that the set does not publish, which is an error."""


class FolderMasks(SegmentationSet):
    """Pairs of image and mask files.

    Args:
        root: what was opened.
        images: paths.
        masks: paths, one per image.
        classes: names, in the order of the ids.
        lookup: uint8 (65536,): raw mask value → class index, IGNORE, or UNKNOWN; None takes values as they are.
    """

    def __init__(
        self, root: str, images: Sequence[Path], masks: Sequence[Path], classes: Sequence[str],
        lookup: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.root, self.images, self.masks, self.classes, self.lookup = root, images, masks, tuple(classes), lookup

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """Give the path of the image."""
        return str(self.images[index])

    def image(self, index: int) -> Tensor:
        """Read an image, uint8 (3, H, W)."""
        return read_pixels(self.images[index])

    def mask(self, index: int) -> Tensor:
        """Read a mask, uint8 (H, W)."""
        raw = read_plane(self.masks[index])
        values = raw if self.lookup is None else self.lookup[raw.long().clamp(0, 65535)]
        unknown = raw[((values < 0) | (values >= len(self.classes))) & (values != IGNORE)].unique().tolist()
        if unknown:
            needed = f"class indices 0 to {len(self.classes) - 1}, and {IGNORE} where a pixel does not count"
            raise DataError(
                f"{self.masks[index]} holds the values {unknown[:10]}, but there are {len(self.classes)} classes. A "
                f"mask holds {needed if self.lookup is None else 'the ids that the set publishes'}."
            )
        return values.to(torch.uint8)


class FolderDepth(DepthSet):
    """Pairs of image and depth files.

    Args:
        root: what was opened.
        images: paths.
        depths: paths of 16-bit images or .npy arrays, one per image.
        scale: metres per unit of a depth file.
        min_depth: metres.
        max_depth: metres.
        crop: the part that is scored.
    """

    def __init__(
        self, root: str, images: Sequence[Path], depths: Sequence[Path], *, scale: float, min_depth: float = 1e-3,
        max_depth: float = 10.0, crop: DepthCrop = "none",
    ) -> None:  # fmt: skip
        self.root, self.images, self.depths, self.scale = root, images, depths, scale
        self.min_depth, self.max_depth, self.crop = min_depth, max_depth, crop

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """Give the path of the image."""
        return str(self.images[index])

    def image(self, index: int) -> Tensor:
        """Read an image, uint8 (3, H, W)."""
        return read_pixels(self.images[index])

    def depth(self, index: int) -> Tensor:
        """Read depths, float32 (H, W) in metres, 0 where unknown."""
        return read_plane(self.depths[index]).float() * self.scale


def open_folder_masks(root: str | Path, split: str) -> FolderMasks:
    """Open ROOT/images/SPLIT with ROOT/masks/SPLIT and ROOT/classes.txt.

    Raises:
        DataError: for a missing folder, list of classes or mask.
    """
    root = Path(root)
    images, masks = pairs(root / "images" / split, root / "masks" / split, (".png",))
    listed = root / "classes.txt"
    if not listed.is_file():
        raise DataError(f"{listed} is missing; it needs one class name a line, in the order of the mask values.")
    classes = [line.strip() for line in listed.read_text().splitlines() if line.strip()]
    return FolderMasks(str(root), images, masks, classes)


def open_folder_depth(root: str | Path, split: str) -> FolderDepth:
    """Open ROOT/images/SPLIT with ROOT/depth/SPLIT; ROOT/depth.json may hold scale, min, max and crop.

    Raises:
        DataError: for a missing folder or depth file.
    """
    root = Path(root)
    images, depths = pairs(root / "images" / split, root / "depth" / split, (".png", ".tif", ".tiff", ".npy"))
    described = root / "depth.json"
    given: dict[str, Any] = json.loads(described.read_text()) if described.is_file() else {}
    return FolderDepth(
        str(root), images, depths, scale=float(given.get("scale", 0.001)), min_depth=float(given.get("min", 1e-3)),
        max_depth=float(given.get("max", 10.0)), crop=given.get("crop", "none"),
    )  # fmt: skip


def make_lookup(known: Mapping[int, int]) -> Tensor:
    """Make a FolderMasks lookup from raw value → class index or IGNORE; every other value is UNKNOWN."""
    lookup = torch.full((65536,), UNKNOWN, dtype=torch.uint8)
    lookup[torch.tensor(list(known))] = torch.tensor(list(known.values()), dtype=torch.uint8)
    return lookup


def pairs(images: Path, others: Path, suffixes: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """Give the images of a folder and for each the file of the same name in another.

    Raises:
        DataError: when a folder is missing or empty, or an image has no partner.
    """
    for folder in (images, others):
        if not folder.is_dir():
            raise DataError(
                f"{folder} does not exist. Images and their partners lie in images/SPLIT and masks/SPLIT or "
                "depth/SPLIT, under the same names."
            )
    found = sorted(p for p in images.rglob("*") if p.suffix.lower() in EXTENSIONS and not p.name.startswith("."))
    if not found:
        raise DataError(f"{images} holds no images.")
    partners, lonely = [], []
    for path in found:
        stem = others / path.relative_to(images).with_suffix("")
        partner = next((p for s in suffixes if (p := stem.with_name(stem.name + s)).is_file()), None)
        if partner is None:
            lonely.append(path)
        else:
            partners.append(partner)
    if lonely:
        raise DataError(
            f"{len(lonely)} of {len(found)} images in {images} have no file of the same name in {others}, such as "
            f"{lonely[0].name}. Add them or move those images away."
        )
    return found, partners


def read_pixels(path: Path) -> Tensor:
    """Read an image of any mode, uint8 (3, H, W)."""
    return read_image(str(path), channels=3, name=str(path))


def read_plane(path: Path) -> Tensor:
    """Read one channel without changing its values, int32 or float32 (H, W).

    Raises:
        DataError: for a file that cannot be read or has several channels.
    """
    try:
        if path.suffix == ".npy":
            array = np.load(path)
        else:
            with Image.open(path) as file:
                array = np.array(file)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    if array.ndim != 2:
        raise DataError(f"{path} has the shape {array.shape}; one channel (height, width) is needed.")
    return torch.from_numpy(array.astype(np.float32 if array.dtype.kind == "f" else np.int32))
