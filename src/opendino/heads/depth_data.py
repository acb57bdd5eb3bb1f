# SPDX-License-Identifier: Apache-2.0
"""What depth heads are trained on: depth maps, the order of a training, and batches of tokens from the store.

Shapes: B images of a batch, L blocks, D width, (h, w) patch grid, H × W pixels. The order is a function of
(seed, epoch).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from opendino.errors import DataError, OpendinoError
from opendino.evaluate.datasets.types import DepthCrop, DepthSet
from opendino.heads.depth_modules import block_tokens
from opendino.heads.tokens import TokenSet, frozen
from opendino.images.ahead import map_ahead
from opendino.images.arrays import read_image
from opendino.images.preprocess import to_tensor

ORDER_STREAM = 71
TRUTH_BYTES = 2 << 30
"""Depth maps are kept in memory up to so much, and read again beyond."""
KITTI_SHAPE = (352, 1216)
FP16_MAX = 65504.0


@dataclass(frozen=True)
class Batch:
    """What a step trains on.

    Attributes:
        patches: L of (B, D, h, w).
        cls: L of (B, D).
        truth: (B, H, W) metres, 0 where unknown.
    """

    patches: list[Tensor]
    cls: list[Tensor]
    truth: Tensor


class Batches(Protocol):
    """Batches by the number of the step."""

    def at(self, step: int) -> Batch:
        """Give the batch of a step, the same at every call."""


class KittiCropped(DepthSet):
    """KITTI's images as depth is trained and scored on them: the lowest 352 rows and the middle 1216 columns.

    Args:
        data: the whole images.
    """

    def __init__(self, data: DepthSet) -> None:
        self.data, self.root = data, data.root
        self.min_depth, self.max_depth, self.crop = data.min_depth, data.max_depth, data.crop

    def __len__(self) -> int:
        return len(self.data)

    def name(self, index: int) -> str:
        """Give the path of the image."""
        return self.data.name(index)

    def image(self, index: int) -> Tensor:
        """Read the part of an image, uint8 (3, h, w)."""
        return kitti_part(self.data.image(index))

    def depth(self, index: int) -> Tensor:
        """Read the part of a depth map, float32 (h, w)."""
        return kitti_part(self.data.depth(index))


def kitti_part(plane: Tensor) -> Tensor:
    """Give the lowest 352 rows and the middle 1216 columns of (…, H, W); what is smaller stays as it is."""
    (height, width), (rows, columns) = plane.shape[-2:], KITTI_SHAPE
    if height < rows or width < columns:
        return plane
    left = (width - columns) // 2
    return plane[..., height - rows :, left : left + columns]


class ArrayDepth(DepthSet):
    """Images and depth maps that are in memory, or paths of images.

    Args:
        images: paths, PIL images or uint8 arrays (H, W, C).
        depths: arrays (H, W) in metres, 0 where unknown; None for images without.
        min_depth: metres.
        max_depth: metres.
        crop: the part that is scored.
    """

    def __init__(
        self, images: Sequence[Any], depths: Sequence[Any] | None, *, min_depth: float = 1e-3, max_depth: float = 10.0,
        crop: DepthCrop = "none",
    ) -> None:  # fmt: skip
        if depths is not None and len(images) != len(depths):
            raise DataError(f"There are {len(images)} images and {len(depths)} depth maps; give one map per image.")
        self.root, self.images, self.depths = "arrays", images, depths
        self.min_depth, self.max_depth, self.crop = min_depth, max_depth, crop

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """Give the path, or the place in the list."""
        item = self.images[index]
        return f"image {index}" if hasattr(item, "shape") or hasattr(item, "mode") else str(item)

    def image(self, index: int) -> Tensor:
        """Give uint8 (3, H, W)."""
        item = self.images[index]
        in_memory = hasattr(item, "shape") or hasattr(item, "mode")
        return to_tensor(item) if in_memory else read_image(str(item), channels=3, name=str(item))

    def depth(self, index: int) -> Tensor:
        """Give float32 (H, W)."""
        if self.depths is None:
            raise DataError("These images have no depth.")
        return torch.as_tensor(np.asarray(self.depths[index], dtype=np.float32))


class Truths:
    """Depth maps, looked at once: their shapes, and which have a pixel to learn from or cannot be read.

    Args:
        data: the set.
        workers: threads that read.

    Attributes:
        shapes: index → (H, W), of readable maps with a depth above 0 and up to `data.max_depth`.
        empty: indices of maps without one.
        errors: index → why it cannot be read.
    """

    def __init__(self, data: DepthSet, workers: int = 0) -> None:
        self.data = data
        self.shapes: dict[int, tuple[int, int]] = {}
        self.empty: list[int] = []
        self.errors: dict[int, str] = {}
        self._kept: dict[int, Tensor] = {}
        bytes_kept = 0
        for i, depth in enumerate(map_ahead(self._try, range(len(data)), workers, 4 * max(workers, 1))):
            if isinstance(depth, str):
                self.errors[i] = depth
            elif not ((depth > 0) & (depth <= data.max_depth)).any():
                self.empty.append(i)
            else:
                self.shapes[i] = (depth.shape[0], depth.shape[1])
                bytes_kept += depth.numel() * 4
                if bytes_kept <= TRUTH_BYTES:
                    self._kept[i] = depth

    def depth(self, index: int) -> Tensor:
        """Give a readable map, float32 (H, W), 0 where unknown or not finite."""
        return self._kept[index] if index in self._kept else self._read(index)

    def _read(self, index: int) -> Tensor:
        return torch.nan_to_num(self.data.depth(index).float(), nan=0.0, posinf=0.0, neginf=0.0)

    def _try(self, index: int) -> Tensor | str:
        try:
            return self._read(index)
        except (OpendinoError, OSError) as error:
            return str(error) or type(error).__name__


class Order:
    """Which rows a step has: shuffled in each epoch, rows of one kind in a batch.

    Args:
        kinds: of each row; rows that cannot be stacked have different ones.
        batch_size: B; a kind with fewer rows gives smaller batches, else incomplete ones are left out of the epoch.
        seed: of the training.
    """

    def __init__(self, kinds: Sequence[Hashable], batch_size: int, seed: int) -> None:
        groups: dict[Hashable, list[int]] = {}
        for row, kind in enumerate(kinds):
            groups.setdefault(kind, []).append(row)
        self.groups, self.batch_size, self.seed = list(groups.values()), batch_size, seed
        self.per_epoch = sum(max(len(g) // batch_size, 1) for g in self.groups)
        self._epoch, self._batches = -1, list[npt.NDArray[np.int64]]()

    def at(self, step: int) -> list[int]:
        """Give the rows of a step."""
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, ORDER_STREAM, epoch])
            self._epoch, self._batches = epoch, []
            for group in self.groups:
                rows = np.array(group)[rng.permutation(len(group))]
                size = min(self.batch_size, len(rows))
                self._batches += [rows[i : i + size] for i in range(0, len(rows) // size * size, size)]
            self._order = rng.permutation(len(self._batches))
        return [int(r) for r in self._batches[self._order[place]]]


class RawTokenSet(TokenSet):
    """Tokens as they leave the blocks, without the final LayerNorm, as the published depth heads read them."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        own: dict[str, Any] = dict(self._settings)
        self._settings = own | {"norm": False}

    def _run(self, batch: list[tuple[str, Tensor]]) -> None:
        pixels = torch.stack([p for _, p in batch])
        where = self.model.cls_token
        with frozen(self.model, self.precision):
            patches, cls = block_tokens(self.model, pixels.to(where.device, where.dtype), self.blocks, norm=False)
            rows = torch.cat([*cls, *(p.flatten(1) for p in patches)], dim=1).clamp(-FP16_MAX, FP16_MAX)
        self._store((pixels.shape[-2], pixels.shape[-1])).add([k for k, _ in batch], rows.half().cpu().numpy())


class CachedBatches:
    """Tokens that were computed once; a view mirrored left to right counts as another image.

    Args:
        tokens: computed.
        truths: of the same data.
        batch_size: B.
        seed: of the training.
    """

    def __init__(self, tokens: TokenSet, truths: Truths, batch_size: int, seed: int) -> None:
        self.tokens, self.truths = tokens, truths
        self.device = tokens.model.cls_token.device
        self.rows = [r for r, view in enumerate(tokens.views) if view.image in truths.shapes]
        kinds = [(tokens.views[r].shape, truths.shapes[tokens.views[r].image]) for r in self.rows]
        self.order = Order(kinds, batch_size, seed)

    def at(self, step: int) -> Batch:
        """Give the batch of a step."""
        rows = [self.rows[r] for r in self.order.at(step)]
        patches, cls = (t.to(self.device) for t in self.tokens.tokens(rows))
        views = [self.tokens.views[r] for r in rows]
        truths = [self.truths.depth(v.image) for v in views]
        truth = torch.stack([t.flip(-1) if v.flip else t for t, v in zip(truths, views, strict=True)])
        blocks = len(self.tokens.blocks)
        return Batch(list(patches.chunk(blocks, 1)), list(cls.chunk(blocks, 1)), truth.to(self.device))
