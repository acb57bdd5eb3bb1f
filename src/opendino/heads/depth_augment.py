# SPDX-License-Identifier: Apache-2.0
"""Training batches for depth heads from augmented images, which go through the backbone at each step.

Shapes: B images of a batch, L blocks, D width, (h, w) patch grid, H × W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from opendino.errors import DataError, OpendinoError
from opendino.evaluate.datasets.types import DepthCrop
from opendino.evaluate.depth import NYU_SHAPE
from opendino.heads.depth_data import Batch, Order, Truths
from opendino.heads.depth_modules import block_tokens
from opendino.heads.tokens import Views, frozen, normalized, resize_pixels
from opendino.images.ahead import map_ahead
from opendino.models.vit import VisionTransformer

SAMPLE_STREAM = 72
NYU_INNER = (45, 472, 43, 608)
"""Rows and columns of NYU's 480×640 images inside their white border."""
MAX_TURN = 2.5
"""Degrees."""


class AugmentedBatches:
    """Images that are turned, mirrored, cropped and coloured anew at each step, and go through the backbone then.

    Args:
        model: the backbone.
        blocks: whose tokens are given.
        norm: after the final LayerNorm or as they are.
        truths: of the data.
        usable: indices of the images to draw from.
        batch_size: B.
        seed: of the training.
        size: the shorter side, or (height, width), that images are brought to first; None leaves them.
        crop: (height, width) of the crops; None follows the data set (`crop_size`).
        precision: of the backbone.
        workers: threads that read and augment.

    Attributes:
        errors: index → why an image could not be read when it was drawn; nothing is learnt from it.

    Raises:
        DataError: when no image can be read.
    """

    def __init__(
        self, model: VisionTransformer, blocks: Sequence[int], norm: bool, truths: Truths, usable: Sequence[int],
        batch_size: int, seed: int, *, size: int | tuple[int, int] | None = None, crop: tuple[int, int] | None = None,
        precision: str = "auto", workers: int = 0,
    ) -> None:  # fmt: skip
        self.model, self.blocks, self.norm, self.truths, self.usable = model, blocks, norm, truths, list(usable)
        self.seed, self.size, self.precision, self.workers = seed, size, precision, workers
        self.order = Order([0] * len(self.usable), batch_size, seed)
        self.errors: dict[int, str] = {}
        first = next((s for i in self.usable if (s := self._sized(i)) is not None), None)
        if first is None:
            raise DataError(f"No image of {truths.data.root} could be read; the first: {self.errors[self.usable[0]]}")
        self.crop = crop or crop_size((first[1].shape[0], first[1].shape[1]), truths.data.crop)

    def at(self, step: int) -> Batch:
        """Give the batch of a step."""
        rows = self.order.at(step)
        made = list(map_ahead(lambda k: self._sample(rows[k], step, k), range(len(rows)), self.workers, len(rows)))
        where = self.model.cls_token
        images = torch.stack([image for image, _ in made]).to(where.device, where.dtype)
        with frozen(self.model, self.precision):
            patches, cls = block_tokens(self.model, images, self.blocks, self.norm)
        return Batch(patches, cls, torch.stack([depth for _, depth in made]).to(where.device))

    def _sized(self, index: int) -> tuple[Tensor, Tensor] | None:
        """Read an image and its depth, both at the size that is trained at; None, and a word in `errors`, if not."""
        try:
            image, depth = self.truths.data.image(index), self.truths.depth(index)
        except (OpendinoError, OSError) as error:
            self.errors[index] = str(error) or type(error).__name__
            return None
        height, width = Views(size=self.size).resized(*image.shape[-2:])
        if tuple(depth.shape) != (height, width):  # the nearest pixel: depths are not to be mixed over an edge
            depth = F.interpolate(depth[None, None], (height, width), mode="nearest-exact")[0, 0]
        return resize_pixels(image, (height, width)), depth

    def _sample(self, row: int, step: int, place: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng([self.seed, SAMPLE_STREAM, step, place])
        found = self._sized(self.usable[row])
        if found is None:  # a grey image of unknown depth, from which nothing is learnt
            return torch.zeros(self.model.config.in_chans, *self.crop), torch.zeros(self.crop)
        image, depth = augment(*found, rng, self.crop, self.truths.data.crop)
        missing = [self.crop[1] - image.shape[-1], self.crop[0] - image.shape[-2]]
        pad = [0, max(missing[0], 0), 0, max(missing[1], 0)]
        return F.pad(normalized(image, self.model), pad), F.pad(depth, pad)


def crop_size(shape: tuple[int, int], crop: DepthCrop) -> tuple[int, int]:
    """Give the size of the crops to train on: the published one for KITTI, and NYU's shares of the image elsewhere.

    416 × 544 of 480 × 640 (NYU) and 352 × 704 (KITTI).
    """
    if crop == "garg":
        return min(352, shape[0]), min(704, shape[1])
    return shape[0] * 416 // NYU_SHAPE[0], shape[1] * 544 // NYU_SHAPE[1]


def augment(
    image: Tensor, depth: Tensor, rng: np.random.Generator, crop: tuple[int, int], kind: DepthCrop = "none"
) -> tuple[Tensor, Tensor]:
    """Turn, mirror, crop and colour an image and its depth as DINOv2's depth training does.

    In this order: NYU's white border off; turned by up to 2.5° (p 0.5; what comes in from outside is black and of
    unknown depth); mirrored (p 0.5); a random crop; gamma 0.9–1.1 on values 0–255, brightness 0.75–1.25 (KITTI
    0.9–1.1) and a factor 0.9–1.1 per channel (p 0.5).

    Args:
        image: uint8 (3, H, W).
        depth: (H, W).
        rng: gives all draws.
        crop: (height, width) of the result; a smaller image stays as it is.
        kind: "eigen" and "garg" name the set.

    Returns:
        The image, float32 0–255, and its depth, of one size.
    """
    if kind == "eigen" and tuple(depth.shape) == NYU_SHAPE:
        top, bottom, left, right = NYU_INNER
        image, depth = image[:, top:bottom, left:right], depth[top:bottom, left:right]
    turned, angle, mirrored, coloured = rng.random(), rng.uniform(-MAX_TURN, MAX_TURN), rng.random(), rng.random()
    out = image.float()
    if turned < 0.5:
        out = tv.rotate(out, angle, InterpolationMode.BILINEAR)
        depth = tv.rotate(depth[None], angle, InterpolationMode.NEAREST)[0]
    if mirrored < 0.5:
        out, depth = out.flip(-1), depth.flip(-1)
    h, w = min(crop[0], out.shape[-2]), min(crop[1], out.shape[-1])
    y, x = (int(rng.integers(0, side - part + 1)) for side, part in ((out.shape[-2], h), (out.shape[-1], w)))
    out, depth = out[:, y : y + h, x : x + w], depth[y : y + h, x : x + w]
    if coloured < 0.5:
        dark = 0.1 if kind == "garg" else 0.25
        gamma, brightness = rng.uniform(0.9, 1.1), rng.uniform(1 - dark, 1 + dark)
        factors = torch.from_numpy(rng.uniform(0.9, 1.1, 3) * brightness).float().view(3, 1, 1)
        out = (out**gamma * factors).clamp(0, 255)
    return out, depth
