# SPDX-License-Identifier: Apache-2.0
"""What a segmentation head is trained on: masks in memory, kept tokens, or augmented images through the backbone.

Shapes: B samples, D channels of the head's input, C classes, (h, w) patch grid, k `loss_scale`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opendino.errors import DataError
from opendino.evaluate.datasets.folders import read_plane
from opendino.evaluate.datasets.types import IGNORE, SegmentationSet
from opendino.heads.augment import Augmentation, resize_mask
from opendino.heads.sliding import stretch
from opendino.heads.tokens import TokenSet, Views, cut, frozen, normalized, patch_tokens
from opendino.heads.training import Training, draw_rows, fingerprint
from opendino.images.ahead import map_ahead
from opendino.images.arrays import read_image
from opendino.images.preprocess import to_tensor
from opendino.models.vit import VisionTransformer

OnCount = Callable[[int, int], None]
"""Called with images done and images in all."""


class GivenMasks(SegmentationSet):
    """Images and masks that were given as lists.

    Args:
        images: paths, PIL images or uint8 arrays (H, W, C).
        masks: paths or integer arrays (H, W): index in `classes`, or IGNORE.
        classes: names; None numbers the values up to the largest.
    """

    def __init__(self, images: Sequence[Any], masks: Sequence[Any], classes: Sequence[str] | None = None) -> None:
        if len(images) != len(masks) or not images:
            raise DataError(f"{len(images)} images and {len(masks)} masks were given; each image needs one mask.")
        self.root, self.images, self.masks = "given", images, masks
        if classes is None:
            found = [int(m[m != IGNORE].max(initial=0)) for m in map(_as_plane, masks)]
            classes = [str(c) for c in range(max(found) + 1)]
        self.classes = tuple(classes)

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """Give the path of an image, or its place in the list."""
        return str(self.images[index]) if _is_path(self.images[index]) else f"image {index}"

    def image(self, index: int) -> Tensor:
        """Read an image, uint8 (3, H, W)."""
        return as_pixels(self.images[index])

    def mask(self, index: int) -> Tensor:
        """Read a mask, uint8 (H, W)."""
        plane = _as_plane(self.masks[index])
        unknown = np.setdiff1d(plane, [*range(len(self.classes)), IGNORE])
        if unknown.size:
            raise DataError(
                f"The mask of {self.name(index)} holds the values {unknown[:10].tolist()}, but there are "
                f"{len(self.classes)} classes. A mask holds 0 to {len(self.classes) - 1}, and {IGNORE} where a pixel "
                "does not count."
            )
        return torch.from_numpy(plane.astype(np.uint8))


def as_pixels(image: Any) -> Tensor:
    """Give an image as uint8 (3, H, W)."""
    return read_image(image, channels=3, name=str(image)) if _is_path(image) else to_tensor(image, 3)


class Samples(Protocol):
    """Gives the loss of a step, a function of the step and the head's weights alone."""

    key: str

    def loss(self, head: nn.Module, step: int) -> Tensor:
        """Compute the mean cross-entropy of the step's batch."""


def pixel_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Give the cross-entropy of logits (B, C, h, w) stretched over targets (B, H, W); IGNORE does not count.

    A batch in which nothing counts has the loss 0.
    """
    stretched = stretch(logits, (targets.shape[-2], targets.shape[-1]))
    total = F.cross_entropy(stretched, targets.long(), ignore_index=IGNORE, reduction="sum")
    return total / (targets != IGNORE).sum().clamp(min=1)


class MaskWindows:
    """The masks of a set: how many pixels each class has, and the windows of a head's training, made smaller.

    Args:
        data: the set; every mask is read once, and a wrong one is an error.
        views: the windows of the images.
        grid_of: view's (H, W) → its patch grid.
        loss_scale: k; a window's mask is kept at (k·h, k·w), nearest pixels.
        workers: threads that read.
        on_count: told about progress.

    Attributes:
        pixels: (C,) pixels of each class at full size.
        shapes: (H, W) of each mask.
        key: of the masks' content.
    """

    def __init__(
        self, data: SegmentationSet, views: Views | None, grid_of: Callable[[tuple[int, int]], tuple[int, int]],
        loss_scale: int, workers: int = 0, on_count: OnCount | None = None,
    ) -> None:  # fmt: skip
        self.pixels = np.zeros(len(data.classes), np.int64)
        self.shapes: list[tuple[int, int]] = []
        self._windows: dict[tuple[Any, ...], Tensor] = {}
        counts = []
        for index, mask in enumerate(map_ahead(data.mask, range(len(data)), workers, 4 * max(workers, 1))):
            count = mask.flatten().bincount(minlength=256)[: len(data.classes)].numpy()
            self.pixels += count
            counts.append((tuple(mask.shape), hashlib.sha256(mask.contiguous().numpy().tobytes()).hexdigest()))
            self.shapes.append((mask.shape[0], mask.shape[1]))
            if views is not None:
                resized = resize_mask(mask, views.resized(*mask.shape))
                for box, flip in views.windows(*mask.shape):
                    window = cut(resized, box, flip)
                    h, w = grid_of((window.shape[0], window.shape[1]))
                    small = F.interpolate(window[None, None], (loss_scale * h, loss_scale * w), mode="nearest-exact")
                    self._windows[index, box, flip] = small[0, 0]
            if on_count is not None:
                on_count(index + 1, len(data))
        self.key = fingerprint(counts)
        if not self.pixels.any():
            raise DataError(f"No pixel of the masks of {data.root} counts; all are {IGNORE}.")

    def window(self, image: int, box: Any, flip: bool) -> Tensor | None:
        """Give the mask of a window, or None for one that the mask's size does not have."""
        return self._windows.get((image, box, flip))


class CachedSamples:
    """Kept tokens of the windows of all images, and their masks; every window is one sample."""

    def __init__(self, tokens: TokenSet, masks: MaskWindows, data: SegmentationSet, training: Training) -> None:
        self.tokens, self.training, self.targets = tokens, training, []
        for view in tokens.views:
            target = masks.window(view.image, view.box, view.flip)
            if target is None:
                raise DataError(
                    f"{data.name(view.image)} and its mask of {masks.shapes[view.image]} pixels differ in height or "
                    "width. A mask has one value for every pixel of its image."
                )
            self.targets.append(target)
        if not self.targets:
            raise DataError(f"No image of {data.root} could be read.")
        self.key = fingerprint([v.key for v in tokens.views], masks.key)

    def loss(self, head: nn.Module, step: int) -> Tensor:
        """Compute the loss of a step."""
        rows = draw_rows(len(self.targets), self.training.batch_size, step, self.training.seed)
        where = next(head.parameters()).device
        patches, _ = self.tokens.tokens(rows)
        targets = torch.stack([self.targets[r] for r in rows])
        return pixel_loss(head(patches.to(where)), targets.to(where))


class AugmentedSamples:
    """Published augmentation: every sample is drawn anew and goes through the backbone."""

    def __init__(
        self, model: VisionTransformer, data: SegmentationSet, blocks: Sequence[int], augmentation: Augmentation,
        training: Training, loss_scale: int, *, masks: MaskWindows, precision: str, workers: int,
    ) -> None:  # fmt: skip
        self.model, self.data, self.blocks, self.augmentation = model, data, blocks, augmentation
        self.training, self.loss_scale, self.precision, self.workers = training, loss_scale, precision, workers
        self.errors: dict[int, str] = {}
        side = -(-augmentation.crop // model.patch_size)
        self.side = loss_scale * side
        self.key = fingerprint(masks.key, str(augmentation), loss_scale)

    def loss(self, head: nn.Module, step: int) -> Tensor:
        """Compute the loss of a step."""
        rows = draw_rows(len(self.data), self.training.batch_size, step, self.training.seed)
        jobs = [(row, step, place) for place, row in enumerate(rows)]
        samples = [s for s in map_ahead(self._sample, jobs, self.workers, len(jobs)) if s is not None]
        if not samples:
            raise DataError(f"No image of step {step} could be read; the last reason: {[*self.errors.values()][-1]}")
        where = self.model.cls_token
        images = torch.stack([pixels for pixels, _ in samples]).to(where.device, where.dtype)
        with frozen(self.model, self.precision):
            patches, _ = patch_tokens(self.model, images, self.blocks)
        targets = torch.stack([target for _, target in samples]).to(where.device)
        return pixel_loss(head(torch.cat(patches, dim=1)), targets)

    def _sample(self, job: tuple[int, int, int]) -> tuple[Tensor, Tensor] | None:
        row, step, place = job
        try:
            image = self.data.image(row)
        except (DataError, OSError) as error:
            self.errors[row] = str(error)
            return None
        mask = self.data.mask(row)
        if mask.shape != image.shape[-2:]:
            raise DataError(
                f"{self.data.name(row)} has {tuple(image.shape[-2:])} pixels and its mask {tuple(mask.shape)}; they "
                "must be equal."
            )
        rng = np.random.default_rng([self.training.seed, 2, step, place])
        pixels, mask, inside = self.augmentation(image, mask, rng)
        # Zero after normalisation, as published: the mean colour.
        target = F.interpolate(mask[None, None], (self.side, self.side), mode="nearest-exact")[0, 0]
        return normalized(pixels, self.model) * inside, target


def _is_path(image: Any) -> bool:
    return isinstance(image, str) or hasattr(image, "__fspath__")


def _as_plane(mask: Any) -> npt.NDArray[Any]:
    plane = read_plane(mask).numpy() if _is_path(mask) else np.asarray(mask)
    if plane.ndim != 2 or plane.dtype.kind not in "iu":
        raise DataError(f"A mask has the shape {plane.shape} and dtype {plane.dtype}; give integers (height, width).")
    return plane
