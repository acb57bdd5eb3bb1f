# SPDX-License-Identifier: Apache-2.0
"""What the protocols need of a data set. Classification sets are `opendino.images.sources.ImageSource`s with labels.

Shapes: H, W pixels of an image as it lies on disk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

IGNORE = 255
"""Mask value of pixels that count nowhere."""
DepthCrop = Literal["none", "eigen", "garg"]
Box = tuple[float, float, float, float]


class DenseSet(ABC):
    """Images with something known at every pixel.

    Attributes:
        root: what was opened.
    """

    root: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """Give what an image is called, for messages and pages."""

    @abstractmethod
    def image(self, index: int) -> Tensor:
        """Read an image, uint8 (3, H, W).

        Raises:
            DataError: when it cannot be read.
        """


class SegmentationSet(DenseSet):
    """Images with a class at every pixel.

    Attributes:
        classes: names; class c is index c, at most 255 of them.
    """

    classes: Sequence[str]

    @abstractmethod
    def mask(self, index: int) -> Tensor:
        """Read a mask, uint8 (H, W): index in `classes`, or IGNORE.

        Raises:
            DataError: when it cannot be read, or holds ids that the set does not know.
        """


class DepthSet(DenseSet):
    """Images with depth.

    Attributes:
        min_depth: metres; smaller depths do not count.
        max_depth: metres; larger depths do not count.
        crop: the part of an image that is scored: "eigen" (NYU), "garg" (KITTI) or all of it.
    """

    min_depth: float
    max_depth: float
    crop: DepthCrop

    @abstractmethod
    def depth(self, index: int) -> Tensor:
        """Read depths, float32 (H, W) in metres along the optical axis, 0 where unknown.

        Raises:
            DataError: when it cannot be read.
        """


@dataclass(frozen=True)
class RetrievalSet:
    """Queries, a gallery, and what is to be found.

    Attributes:
        root: what was opened.
        gallery: paths of the images that are searched.
        queries: paths of the images that are looked for.
        boxes: part of each query that is shown to the model (left, upper, right, lower), pixels; None is all of it.
        relevant: per query the gallery indices "easy", "hard" and "junk"; a list that is missing is empty.
        gap: instead of levels, each image is of an instance, and queries without one are distractors (Met).
        gallery_ids: instance of each gallery image, for `gap`.
        query_ids: instance of each query, for `gap`; None is a distractor.
    """

    root: str
    gallery: Sequence[str]
    queries: Sequence[str]
    boxes: Sequence[Box | None]
    relevant: Sequence[Mapping[str, Sequence[int]]] = ()
    gap: bool = False
    gallery_ids: Sequence[str] = ()
    query_ids: Sequence[str | None] = ()
