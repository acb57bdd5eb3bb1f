# SPDX-License-Identifier: Apache-2.0
"""Batches of multi-crops for pre-training, the same for any number of workers and after any resume.

Sample i of step t has the counter t · batch + i. Which image it is, its crops and its colours follow from (seed,
counter) alone. An unreadable image is replaced by another one, drawn from the same pair, and reported.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from opendino.errors import DataError
from opendino.images.decode import decode_image
from opendino.images.sources import ImageSource
from opendino.pretrain.crops import ORDER_STREAM, RETRY_STREAM, CropsConfig, by_pixel, multi_crop, sample_rng
from opendino.pretrain.photometric import PhotometricParams, check_channels, draw_global_and_local

MAX_TRIES = 64
"""Images tried for one sample before the data set counts as unreadable."""
PREFETCH = 2
Request = tuple[int, int]
"""(image index, sample counter)."""
ImageError = tuple[str, str]
"""(path, reason)."""


@dataclass(frozen=True)
class Sample:
    """Crops of one image with their colour parameters.

    Attributes:
        global_crops: uint8 (2, C, g, g).
        local_crops: uint8 (L, C, l, l), or None without local crops.
        global_params: colours of the global crops.
        local_params: colours of the local crops, or None.
        index: the image that the crops are of.
        errors: (path, reason) of the images that could not be read before it.
    """

    global_crops: Tensor
    local_crops: Tensor | None
    global_params: PhotometricParams
    local_params: PhotometricParams | None
    index: int
    errors: tuple[ImageError, ...] = ()


@dataclass(frozen=True)
class Batch:
    """Crops of B images; crop-major, so that the first crops of all images come first.

    Attributes:
        global_crops: uint8 (2·B, C, g, g).
        local_crops: uint8 (L·B, C, l, l), or None without local crops.
        global_params: colours of the global crops, for `apply_photometric`.
        local_params: colours of the local crops, or None.
        indices: (B,) int64, the image of each sample.
        errors: (path, reason) of every image that could not be read and was replaced.
    """

    global_crops: Tensor
    local_crops: Tensor | None
    global_params: PhotometricParams
    local_params: PhotometricParams | None
    indices: Tensor
    errors: tuple[ImageError, ...] = ()

    def pin_memory(self) -> Batch:
        """Move the crops to page-locked memory; the loader calls this where there is a CUDA device."""
        local = None if self.local_crops is None else self.local_crops.pin_memory()
        return replace(self, global_crops=self.global_crops.pin_memory(), local_crops=local)


class PretrainDataset(Dataset[Sample]):
    """Images of a source as samples, requested by (index, counter).

    Args:
        source: where the images are; its labels are not used.
        crops: the augmentation.
        seed: of the run.
        cache: keep decoded images in memory, in each worker; for small sets.
        channels: colour channels to decode to.

    Raises:
        DataError: for a source without images.
        ConfigError: when `crops.mean` is for another number of channels.
    """

    def __init__(
        self, source: ImageSource, crops: CropsConfig, *, seed: int = 0, cache: bool = False, channels: int = 3
    ) -> None:
        check_channels(crops, channels)
        self.paths = _Paths([str(item.path) for item in source.items])
        if not len(self.paths):
            raise DataError("The data holds no image. Give a folder, list or CSV with at least one image.")
        self.crops, self.seed, self.channels = crops, seed, channels
        self._cache: dict[int, Tensor] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, request: Request) -> Sample:
        """Cut the crops of sample `counter` from image `index`, or from a replacement when it cannot be read.

        Raises:
            DataError: when 64 images one after the other cannot be read.
        """
        index, counter = request
        index, image, errors = self._read(index, counter)
        rng = sample_rng(self.seed, counter)
        global_params, local_params = draw_global_and_local(self.crops, rng)
        global_crops, local_crops = multi_crop(image, self.crops, rng)
        return Sample(global_crops, local_crops, global_params, local_params, index, errors)

    def _read(self, index: int, counter: int) -> tuple[int, Tensor, tuple[ImageError, ...]]:
        errors: list[ImageError] = []
        retries = sample_rng(self.seed, counter, RETRY_STREAM)
        for _ in range(MAX_TRIES):
            try:
                return index, self._decode(index), tuple(errors)
            except (DataError, OSError) as error:
                errors.append((self.paths[index], str(error)))
            index = int(retries.integers(len(self)))
        raise DataError(
            f"{MAX_TRIES} images drawn one after the other could not be read, the last one being {errors[-1][0]} "
            f"({errors[-1][1]}). Give a folder whose images are readable."
        )

    def _decode(self, index: int) -> Tensor:
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        image = by_pixel(decode_image(self.paths[index], channels=self.channels))
        if self._cache is not None:
            self._cache[index] = image
        return image


class StepSampler(Sampler[list[Request]]):
    """The (index, counter) pairs of each step, as a pure function of (seed, step).

    An epoch is a fresh order of all images, cut into whole batches; the images that are left over differ from epoch to
    epoch, and no batch has an image twice.

    Args:
        num_images: size of the data set.
        batch_size: images per step, at most `num_images`.
        seed: of the run.
        start_step: the first step to yield.
        num_steps: how many to yield; None goes on for ever.

    Raises:
        DataError: when there are fewer images than one batch needs.
    """

    def __init__(
        self, num_images: int, batch_size: int, seed: int, start_step: int = 0, num_steps: int | None = None
    ) -> None:
        if num_images < batch_size:
            raise DataError(
                f"There are {num_images} images and a batch is {batch_size}. Add images or lower the batch."
            )
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.start_step, self.num_steps = start_step, num_steps
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __iter__(self) -> Iterator[list[Request]]:
        step = self.start_step
        while self.num_steps is None or step < self.start_step + self.num_steps:
            yield self.at(step)
            step += 1

    def at(self, step: int) -> list[Request]:
        """Give the (index, counter) pairs of one step."""
        epoch, place = divmod(step, self.num_images // self.batch_size)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = sample_rng(self.seed, epoch, ORDER_STREAM).permutation(self.num_images)
        indices = self._order[place * self.batch_size : (place + 1) * self.batch_size].tolist()
        return [(index, step * self.batch_size + i) for i, index in enumerate(indices)]


def collate(samples: list[Sample]) -> Batch:
    """Put B samples together, crop-major."""
    local_crops = [s.local_crops for s in samples if s.local_crops is not None]
    local_params = [s.local_params for s in samples if s.local_params is not None]
    return Batch(
        global_crops=torch.stack([s.global_crops for s in samples], dim=1).flatten(0, 1),
        local_crops=torch.stack(local_crops, dim=1).flatten(0, 1) if local_crops else None,
        global_params=PhotometricParams.crop_major([s.global_params for s in samples]),
        local_params=PhotometricParams.crop_major(local_params) if local_params else None,
        indices=torch.tensor([s.index for s in samples]),
        errors=tuple(error for s in samples for error in s.errors),
    )


def make_loader(
    source: ImageSource,
    crops: CropsConfig,
    *,
    batch_size: int,
    seed: int = 0,
    start_step: int = 0,
    num_steps: int | None = None,
    num_workers: int = 0,
    cache: bool = False,
    channels: int = 3,
) -> Iterator[Batch]:
    """Give the batches of the steps from `start_step` on.

    Args:
        source: where the images are.
        crops: the augmentation.
        batch_size: images per step.
        seed: of the run.
        start_step: the first step.
        num_steps: how many steps; None goes on for ever.
        num_workers: processes that decode and crop; 0 does so in this one. The batches do not depend on it.
        cache: keep decoded images in memory, in each worker; for small sets.
        channels: colour channels of the images.

    Raises:
        DataError: when there are too few images, or too many in a row cannot be read.
        ConfigError: when `crops.mean` is for another number of channels.
    """
    dataset = PretrainDataset(source, crops, seed=seed, cache=cache, channels=channels)
    loader: DataLoader[Sample] = DataLoader(
        dataset,
        batch_sampler=StepSampler(len(dataset), batch_size, seed, start_step, num_steps),
        num_workers=num_workers,
        collate_fn=collate,
        prefetch_factor=PREFETCH if num_workers else None,
        pin_memory=torch.cuda.is_available(),
    )
    return _batches(loader)


def _batches(loader: DataLoader[Sample]) -> Iterator[Batch]:
    try:
        yield from loader
    except DataError as error:  # of a worker: its message carries a traceback that says nothing to users
        raise DataError(str(error).rstrip().rsplit("DataError: ", 1)[-1]) from None


class _Paths:
    """A list of paths in two arrays: worker processes share it without copying, however long it is."""

    def __init__(self, paths: list[str]) -> None:
        encoded = [p.encode("utf-8", "surrogateescape") for p in paths]
        self._text = np.frombuffer(b"".join(encoded), np.uint8)
        self._ends = np.cumsum([0] + [len(p) for p in encoded])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        part = self._text[self._ends[index] : self._ends[index + 1]]
        return part.tobytes().decode("utf-8", "surrogateescape")
