# SPDX-License-Identifier: Apache-2.0
"""The two things a backbone is tuned for: the class of an image, and the class of every pixel.

Shapes: B images, D width, C classes, P = h·w patches, H, W pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opendino.errors import DataError
from opendino.evaluate.datasets.types import IGNORE, SegmentationSet
from opendino.evaluate.segmentation import PixelConfusion
from opendino.finetune.augment import cut_image, cut_mask, draw_cut
from opendino.finetune.settings import FinetuneSettings
from opendino.images.ahead import map_ahead
from opendino.images.arrays import read_image
from opendino.images.preprocess import Preprocess
from opendino.images.sources import SourceImage
from opendino.models.vit import VisionTransformer

Sample = tuple[Tensor, Tensor]


class Task(ABC):
    """What a training loop needs to know.

    Attributes:
        name: "classification" or "segmentation".
        metric: what `score` gives, in percent.
        classes: names, in the order of the head's outputs.
        num_train: training images.
        num_val: validation images.
        images: how images reach the backbone, JSON-able, for the head's file.
    """

    name: str
    metric: str

    def __init__(
        self, classes: Sequence[str], num_train: int, num_val: int, preprocess: Preprocess, workers: int
    ) -> None:
        self.classes, self.num_train, self.num_val = list(classes), num_train, num_val
        self.preprocess, self.workers = preprocess, workers
        self.images: dict[str, Any] = {}
        self.size = (preprocess.height, preprocess.width)

    @abstractmethod
    def sample(self, epoch: int, index: int, settings: FinetuneSettings) -> Sample:
        """Give one augmented training image (channels, H, W) and its target."""

    @abstractmethod
    def logits(self, model: VisionTransformer, head: nn.Module, images: Tensor) -> Tensor:
        """Give (B, C), or (B, C, h, w) on patches."""

    @abstractmethod
    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Give the mean cross-entropy."""

    @abstractmethod
    def score(self, model: VisionTransformer, head: nn.Module, batch_size: int) -> float:
        """Give the metric on the validation images, percent; the model is in eval mode afterwards."""

    def batches(self, epoch: int, first: int, settings: FinetuneSettings) -> Iterator[Sample]:
        """Go through an epoch's batches from number `first` on; each is a function of (seed, epoch, its number)."""
        order = np.random.default_rng([settings.seed, 0, epoch]).permutation(self.num_train)
        rest = order[first * settings.batch_size :].tolist()
        samples = map_ahead(
            lambda i: self.sample(epoch, i, settings), rest, self.workers, 2 * settings.batch_size
        )  # fmt: skip
        while batch := list(islice(samples, settings.batch_size)):
            yield torch.stack([image for image, _ in batch]), torch.stack([target for _, target in batch])


class Classification(Task):
    """One class per image, a linear layer on the cls token.

    Args:
        train: images.
        train_labels: (n,) their classes.
        val: images.
        val_labels: (m,).
        classes: names.
        preprocess: of the evaluation; its size is also that of training.
        workers: threads that read.
    """

    name, metric = "classification", "top-1 %"

    def __init__(
        self, train: Sequence[SourceImage], train_labels: npt.NDArray[np.int64], val: Sequence[SourceImage],
        val_labels: npt.NDArray[np.int64], classes: Sequence[str], preprocess: Preprocess, workers: int,
    ) -> None:  # fmt: skip
        super().__init__(classes, len(train), len(val), preprocess, workers)
        self.train, self.train_labels, self.val, self.val_labels = train, train_labels, val, val_labels

    def sample(self, epoch: int, index: int, settings: FinetuneSettings) -> Sample:
        """Give one augmented training image (channels, H, W) and its class."""
        pixels = self._read(self.train[index])
        cut = draw_cut(pixels.shape[-2], pixels.shape[-1], settings, epoch, index)
        return cut_image(pixels, cut, self.size, self.preprocess.spec), torch.tensor(int(self.train_labels[index]))

    def logits(self, model: VisionTransformer, head: nn.Module, images: Tensor) -> Tensor:
        """Give (B, C)."""
        out: Tensor = head(model.forward_features(images)["x_norm_clstoken"].float())
        return out

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Give the mean cross-entropy."""
        return F.cross_entropy(logits.float(), targets)

    @torch.inference_mode()
    def score(self, model: VisionTransformer, head: nn.Module, batch_size: int) -> float:
        """Give top-1 accuracy, percent."""
        device, right, place = model.cls_token.device, 0, 0
        images = map_ahead(
            lambda item: self.preprocess.of_file(self._read(item)), self.val, self.workers, 2 * batch_size
        )
        model.eval()
        while batch := list(islice(images, batch_size)):
            found = self.logits(model, head, torch.stack(batch).to(device)).argmax(1).cpu().numpy()
            right += int((found == self.val_labels[place : place + len(batch)]).sum())
            place += len(batch)
        return 100 * right / len(self.val)

    def _read(self, item: SourceImage) -> Tensor:
        return read_image(item.data(), channels=self.preprocess.spec.num_channels, name=item.path)


class Segmentation(Task):
    """One class per pixel, a linear layer on the patch tokens whose outputs are interpolated.

    Images are resized to one size, which changes their aspect ratio; the score compares with masks of full size.
    """

    name, metric = "segmentation", "mIoU %"

    def __init__(self, train: SegmentationSet, val: SegmentationSet, preprocess: Preprocess, workers: int) -> None:
        if list(train.classes) != list(val.classes):
            raise DataError("The training and the validation masks have other classes; one classes.txt is for both.")
        super().__init__(train.classes, len(train), len(val), preprocess, workers)
        self.train, self.val = train, val

    def sample(self, epoch: int, index: int, settings: FinetuneSettings) -> Sample:
        """Give one augmented training image (3, H, W) and its mask (H, W)."""
        pixels, mask = read_pair(self.train, index)
        cut = draw_cut(pixels.shape[-2], pixels.shape[-1], settings, epoch, index)
        return cut_image(pixels, cut, self.size, self.preprocess.spec), cut_mask(mask, cut, self.size)

    def logits(self, model: VisionTransformer, head: nn.Module, images: Tensor) -> Tensor:
        """Give (B, C, h, w)."""
        grid = model.grid_of(images)
        tokens = model.forward_features(images)["x_norm_patchtokens"].float()
        out: Tensor = head(tokens).unflatten(1, grid).permute(0, 3, 1, 2)
        return out

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Give the mean cross-entropy of the pixels that count; 0 when none does."""
        whole = F.interpolate(logits.float(), targets.shape[-2:], mode="bilinear", align_corners=False)
        total = F.cross_entropy(whole, targets, ignore_index=IGNORE, reduction="sum")
        return total / (targets != IGNORE).sum().clamp(min=1)

    @torch.inference_mode()
    def score(self, model: VisionTransformer, head: nn.Module, batch_size: int) -> float:
        """Give the mean intersection over union, percent."""
        device, counts = model.cls_token.device, PixelConfusion(len(self.classes))
        pairs = map_ahead(lambda i: read_pair(self.val, i), range(len(self.val)), self.workers, 2 * batch_size)
        model.eval()
        while batch := list(islice(pairs, batch_size)):
            images = torch.stack([self.preprocess.of_file(pixels) for pixels, _ in batch]).to(device)
            for logits, (_, mask) in zip(self.logits(model, head, images), batch, strict=True):
                whole = F.interpolate(logits[None], mask.shape, mode="bilinear", align_corners=False)
                counts.add(whole[0].argmax(0), mask)
        return counts.scores().miou


def read_pair(data: SegmentationSet, index: int) -> Sample:
    """Read an image and its mask, and see that they fit.

    Raises:
        DataError: when their sizes differ.
    """
    pixels, mask = data.image(index), data.mask(index)
    if pixels.shape[-2:] != mask.shape:
        raise DataError(
            f"{data.name(index)} is {tuple(pixels.shape[-2:])} pixels (height, width) and its mask "
            f"{tuple(mask.shape)}; they must be alike."
        )
    return pixels, mask
