# SPDX-License-Identifier: Apache-2.0
"""Patch tokens for heads that answer at every pixel: padding as published, chosen blocks, and a cache over data sets.

Shapes: B images, D width, L blocks, (h, w) patch grid, H × W pixels.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from opendino.embed.cache import FeatureStore, OnImages
from opendino.embed.embedder import resolve_precision
from opendino.embed.resume import weights_fingerprint
from opendino.errors import ConfigError, DataError
from opendino.evaluate.datasets.types import DenseSet
from opendino.images.ahead import map_ahead
from opendino.models.vit import VisionTransformer

Box = tuple[int, int, int, int]
"""Top, left, bottom, right in pixels of the resized image."""
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def center_pad(images: Tensor, multiple: int) -> tuple[Tensor, tuple[int, int, int, int]]:
    """Pad images to whole patches as Meta's segmentation and depth code does.

    Zeros go on both sides, half of them rounded down on the left and on the top. Normalised images are padded with the
    mean colour by this.

    Args:
        images: (B, C, H, W), normalised.
        multiple: the patch size.

    Returns:
        The padded images, and (left, right, top, bottom), pixels.
    """
    pads: list[int] = []
    for side in (images.shape[-1], images.shape[-2]):
        missing = math.ceil(side / multiple) * multiple - side
        pads += [missing // 2, missing - missing // 2]
    return F.pad(images, pads), (pads[0], pads[1], pads[2], pads[3])


def last_blocks(model: VisionTransformer, n: int) -> tuple[int, ...]:
    """Give the indices of the last n blocks.

    Raises:
        ConfigError: when the model has fewer.
    """
    if not 1 <= n <= model.n_blocks:
        raise ConfigError(f"blocks is {n}; the model has {model.n_blocks}: give 1 to that many.")
    return tuple(range(model.n_blocks - n, model.n_blocks))


def patch_tokens(
    model: VisionTransformer, images: Tensor, blocks: Sequence[int]
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """Give the tokens of chosen blocks after the final LayerNorm, of images padded by `center_pad`.

    Gradients flow unless the caller stops them; `frozen` does.

    Args:
        model: the backbone.
        images: (B, C, H, W), normalised, on the model's device.
        blocks: indices from 0, in rising order.

    Returns:
        One (B, D, h, w) and one cls token (B, D) per block, fp32.
    """
    padded, _ = center_pad(images, model.patch_size)
    outputs = model.get_intermediate_layers(padded, tuple(blocks), reshape=True, return_class_token=True)
    return [patches.float() for patches, _ in outputs], [cls.float() for _, cls in outputs]


@contextmanager
def frozen(model: VisionTransformer, precision: str = "auto") -> Iterator[None]:
    """Put a model into evaluation mode without gradients, in a precision of `Embedder`; restores the mode after."""
    was_training, own = model.training, model.cls_token.dtype
    dtype = _DTYPES.get(resolve_precision(precision, model.cls_token.device, own))
    device = model.cls_token.device.type
    cast: Any = nullcontext() if dtype in (None, own) else torch.autocast(device, dtype=dtype)
    model.eval()
    try:
        with torch.no_grad(), cast:
            yield
    finally:
        model.train(was_training)


@dataclass(frozen=True)
class Views:
    """The inputs of the backbone that one image becomes.

    Attributes:
        size: shorter side after resizing, pixels, or (height, width); None leaves the image as it is.
        crop: side of the windows; None gives the whole image.
        stride: pixels between windows.
        flip: also give the windows of the mirrored image.
    """

    size: int | tuple[int, int] | None = None
    crop: int | None = None
    stride: int | None = None
    flip: bool = False

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Give the height and width after resizing; the aspect ratio is kept when `size` is one number."""
        if self.size is None:
            return height, width
        if not isinstance(self.size, int):
            return self.size
        scale = self.size / min(height, width)
        return int(height * scale + 0.5), int(width * scale + 0.5)

    def boxes(self, height: int, width: int) -> list[Box]:
        """Give the windows of a resized image, row by row; the last ones are moved inwards to end at the border."""
        if self.crop is None:
            return [(0, 0, height, width)]
        tops, lefts = (_starts(side, self.crop, self.stride or self.crop) for side in (height, width))
        return [(t, s, min(t + self.crop, height), min(s + self.crop, width)) for t in tops for s in lefts]

    def windows(self, height: int, width: int) -> list[tuple[Box, bool]]:
        """Give (box in the resized image, mirrored) of every window of an image of height × width pixels."""
        height, width = self.resized(height, width)
        found = [(b, False) for b in self.boxes(height, width)]
        if self.flip:  # windows are laid over the mirrored image from its left
            found += [((t, width - r, b, width - s), True) for (t, s, b, r), _ in found]
        return found

    def keys(self, image: Tensor) -> list[View]:
        """Give the windows of an image (C, H, W) without making them."""
        pixels = hashlib.sha256(f"{tuple(image.shape)}".encode() + image.contiguous().numpy().tobytes()).hexdigest()
        windows = self.windows(*image.shape[-2:])
        return [View(-1, b, f, hashlib.sha256(f"{pixels} {b} {f}".encode()).hexdigest()) for b, f in windows]


@dataclass(frozen=True)
class View:
    """One input of the backbone: part `box` of the resized image number `image`, mirrored or not."""

    image: int
    box: Box
    flip: bool
    key: str

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width, pixels."""
        return self.box[2] - self.box[0], self.box[3] - self.box[1]


class TokenSet:
    """Patch and cls tokens of all views of a data set, computed once and kept in half precision.

    Args:
        model: the backbone.
        data: images; one that cannot be read has no views and is in `errors`.
        blocks: indices of the blocks whose tokens are kept.
        views: how an image is fed.
        root: folder of the stores; None keeps everything in memory.
        batch_size: views in one forward pass.
        precision: as for `Embedder`.
        workers: threads that read images.

    Attributes:
        views: after `compute`, what each row shows.
        errors: index of an image → why it cannot be read.
    """

    def __init__(
        self, model: VisionTransformer, data: DenseSet, blocks: Sequence[int], views: Views,
        root: str | Path | None = None, *, batch_size: int = 8, precision: str = "auto", workers: int | None = None,
    ) -> None:  # fmt: skip
        self.model, self.data, self.blocks, self.how, self.root = model, data, tuple(blocks), views, root
        self.batch_size, self.precision = batch_size, precision
        self.workers = min(os.cpu_count() or 1, 8) if workers is None else workers
        self.views: list[View] = []
        self.errors: dict[int, str] = {}
        self._stores: dict[tuple[int, int], FeatureStore | _Memory] = {}
        self._lock = threading.Lock()
        self._settings = {
            "kind": "tokens",
            "weights_sha256": weights_fingerprint(model),
            "config": model.config.model_dump(mode="json"),
            "preprocess": model.preprocess.model_dump(mode="json"),
            "precision": resolve_precision(precision, model.cls_token.device, model.cls_token.dtype),
            "blocks": list(self.blocks),
            "views": {name: value for name, value in asdict(views).items() if name != "flip"},
        }

    def __len__(self) -> int:
        return len(self.views)

    def grid(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Give the patch grid (h, w) of a view of `shape` pixels."""
        return math.ceil(shape[0] / self.model.patch_size), math.ceil(shape[1] / self.model.patch_size)

    def compute(self, on_images: OnImages | None = None) -> TokenSet:
        """Read all images and compute the tokens that the store does not hold; started again, it goes on.

        Args:
            on_images: told about images done, errors and images in all.
        """
        self.views, self.errors = [], {}
        waiting: dict[tuple[int, int], list[tuple[str, Tensor]]] = {}
        try:
            reads = map_ahead(self._read, range(len(self.data)), self.workers, 2 * self.batch_size)
            for index, read in enumerate(reads):
                if isinstance(read, str):
                    self.errors[index] = read
                    read = []
                for view, pixels in read:
                    self.views.append(view)
                    if pixels is not None:
                        batch = waiting.setdefault(view.shape, [])
                        batch.append((view.key, pixels))
                        if len(batch) == self.batch_size:
                            self._run(waiting.pop(view.shape))
                if on_images is not None:
                    on_images(index + 1, len(self.errors), len(self.data))
            for batch in waiting.values():
                self._run(batch)
        finally:
            for store in self._stores.values():
                store.flush()
        return self

    def tokens(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Gather rows whose views have one shape.

        Returns:
            Patch tokens (b, L·D, h, w) and cls tokens (b, L·D), fp32, the blocks one after the other.
        """
        shapes = {self.views[r].shape for r in rows}
        if len(shapes) != 1:
            raise DataError(f"The views have the sizes {sorted(shapes)}; a batch has views of one size.")
        shape = shapes.pop()
        found = torch.from_numpy(self._store(shape).rows([self.views[r].key for r in rows])).float()
        width = len(self.blocks) * self.model.embed_dim
        return found[:, width:].reshape(len(rows), width, *self.grid(shape)), found[:, :width]

    def _store(self, shape: tuple[int, int]) -> FeatureStore | _Memory:
        with self._lock:
            if shape not in self._stores:
                h, w = self.grid(shape)
                width = len(self.blocks) * self.model.embed_dim * (1 + h * w)
                self._stores[shape] = (
                    _Memory()
                    if self.root is None
                    else FeatureStore(self.root, self._settings | {"shape": list(shape)}, width, np.float16)
                )
            return self._stores[shape]

    def _read(self, index: int) -> list[tuple[View, Tensor | None]] | str:
        try:
            image = self.data.image(index)
        except (DataError, OSError) as error:
            return str(error) or type(error).__name__
        views = [View(index, v.box, v.flip, v.key) for v in self.how.keys(image)]
        if all(v.key in self._store(v.shape) for v in views):
            return [(v, None) for v in views]
        pixels = normalized(resize_pixels(image, self.how.resized(*image.shape[-2:])), self.model)
        return [(v, None if v.key in self._store(v.shape) else cut(pixels, v.box, v.flip)) for v in views]

    def _run(self, batch: list[tuple[str, Tensor]]) -> None:
        pixels = torch.stack([p for _, p in batch])
        with frozen(self.model, self.precision):
            where = self.model.cls_token
            patches, cls = patch_tokens(self.model, pixels.to(where.device, where.dtype), self.blocks)
            rows = torch.cat([*cls, *(p.flatten(1) for p in patches)], dim=1)
        self._store((pixels.shape[-2], pixels.shape[-1])).add([k for k, _ in batch], rows.half().cpu().numpy())


class _Memory:
    """A store without a folder."""

    def __init__(self) -> None:
        self._rows: dict[str, npt.NDArray[Any]] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def add(self, keys: Sequence[str], rows: npt.NDArray[Any]) -> None:
        self._rows.update(zip(keys, rows, strict=True))

    def flush(self) -> None:
        pass

    def rows(self, keys: Sequence[str]) -> npt.NDArray[Any]:
        return np.stack([self._rows[k] for k in keys])


def resize_pixels(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (C, H, W) bilinearly without antialiasing, as mmcv's `imresize` does; uint8 to within one grey level."""
    if tuple(image.shape[-2:]) == size:
        return image
    resized = F.interpolate(image[None].float(), size, mode="bilinear", align_corners=False)[0]
    return resized if image.is_floating_point() else resized.round().to(torch.uint8)


def normalized(pixels: Tensor, model: VisionTransformer) -> Tensor:
    """Give uint8 (…, C, H, W) as the model expects it, float32."""
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (model.preprocess.mean, model.preprocess.std))
    return (pixels.float() / 255 - mean) / std


def cut(plane: Tensor, box: Box, flip: bool = False) -> Tensor:
    """Cut a window out of a resized image or mask (…, H, W), mirrored or not."""
    top, left, bottom, right = box
    part = plane[..., top:bottom, left:right]
    return part.flip(-1) if flip else part


def _starts(side: int, crop: int, stride: int) -> list[int]:
    """Where windows begin along one side, as mmsegmentation places them."""
    count = max(side - crop + stride - 1, 0) // stride + 1
    return [max(min(i * stride + crop, side) - crop, 0) for i in range(count)]
