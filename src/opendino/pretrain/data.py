# SPDX-License-Identifier: Apache-2.0
"""Batches of multi-crops for pre-training, the same for any number of workers and after any resume.

Sample i of step t has the counter t · batch + i. Which image it is, its crops and its colours follow from (seed,
counter) alone, also when several processes share the batch. An unreadable image is replaced by another one, drawn from
the same pair, and reported. So the state of a loader is the number of the next step, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from opendino.errors import DataError, MissingExtraError
from opendino.images.arrays import read_image
from opendino.images.sources import ImageSource
from opendino.native.build import kernels
from opendino.pretrain.crops import (
    RETRY_STREAM,
    CropsConfig,
    by_pixel,
    multi_crop,
    multi_crops,
    numbers_for_boxes,
    sample_rng,
)
from opendino.pretrain.float_crops import multi_crop_float
from opendino.pretrain.order import Request, StepSampler, choose_order
from opendino.pretrain.photometric import (
    PhotometricParams,
    check_channels,
    draw_global_and_local,
    global_and_local_from,
    numbers_for_colours,
)
from opendino.pretrain.workers import leave_signals_to_parent, worker_deaths_explained

MAX_TRIES = 64
"""Images tried for one sample before the data set counts as unreadable."""
PREFETCH = 2
REMOTE_READS = 16
"""Images that one worker fetches from a network at a time."""
SHUFFLE_BUFFER = 8192
"""Images that are shuffled together where neighbours are read together."""
SampleRng = Callable[[int, int], np.random.Generator]
ImageError = tuple[str, str]
"""(path, reason)."""
Read = tuple[int, int, Tensor, tuple[ImageError, ...]]
"""(counter, index, image, images that could not be read before it)."""
HELD_BYTES = 64 * 2**20
"""Decoded images that are held at a time; their crops are cut when there are more."""


@dataclass(frozen=True)
class Sample:
    """Crops of one image with their colour parameters.

    Attributes:
        global_crops: (2, C, g, g), uint8, or float32 in 0–255 from 16-bit files.
        local_crops: (L, C, l, l) of the same type, or None without local crops.
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
        global_crops: (2·B, C, g, g), uint8, or float32 in 0–255 when an image is of 16 bits.
        local_crops: (L·B, C, l, l) of the same type, or None without local crops.
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
        rng_of: gives the generator of a sample from (index, counter); default: one of its own for each counter.

    Raises:
        DataError: for a source without images.
        ConfigError: when `crops.mean` is for another number of channels.
    """

    def __init__(
        self,
        source: ImageSource,
        crops: CropsConfig,
        *,
        seed: int = 0,
        cache: bool = False,
        channels: int = 3,
        rng_of: SampleRng | None = None,
    ) -> None:
        check_channels(crops, channels)
        if not len(source):
            raise DataError("The data holds no image. Give a folder, list or CSV with at least one image.")
        self.source, self.crops, self.seed, self.channels, self.rng_of = source, crops, seed, channels, rng_of
        self._cache: dict[str, Tensor] | None = {} if cache else None  # by name: a list may name an image often

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, request: Request) -> Sample:
        """Cut the crops of sample `counter` from image `index`, or from a replacement when it cannot be read.

        Raises:
            DataError: when 64 images one after the other cannot be read, or an optional package is missing for one.
        """
        index, counter = request
        return self._sample(counter, *self._read(index, counter, {}))

    def __getitems__(self, requests: list[Request]) -> Batch:
        """Cut the crops of a batch: what `collate` makes of its samples, in fewer and larger steps.

        A network is waited for once, numbers are drawn into one array, and one kernel cuts all crops.
        """
        fetched: dict[int, str | bytes | Exception] = {}
        if self.source.remote:
            known = self._cache or {}
            wanted = [i for i in dict.fromkeys(i for i, _ in requests) if self.source.name(i) not in known]
            with ThreadPoolExecutor(REMOTE_READS) as pool:
                fetched = dict(zip(wanted, pool.map(self._fetch, wanted), strict=True))
        parts: list[Batch] = []
        read: list[Read] = []
        for index, counter in requests:
            read.append((counter, *self._read(index, counter, fetched)))
            if sum(image.nbytes for _, _, image, _ in read) > HELD_BYTES:
                parts.append(self._cut(read))
                read = []
        if read:
            parts.append(self._cut(read))
        return _join(parts)

    def _cut(self, read: list[Read]) -> Batch:
        """Draw crops and colours of images that were read, and cut the crops."""
        counters, indices, images, errors = zip(*read, strict=True)
        if any(image.dtype != torch.uint8 for image in images):
            return collate([self._sample(*one) for one in read])
        colours = numbers_for_colours(self.crops)
        count = colours + numbers_for_boxes(self.crops)
        numbers = np.stack([self._rng(i, c).random(count) for i, c in zip(indices, counters, strict=True)])
        global_params, local_params = global_and_local_from(numbers[:, :colours], self.crops)
        global_crops, local_crops = multi_crops(images, self.crops, numbers[:, colours:])
        found = tuple(error for of_one in errors for error in of_one)
        return Batch(global_crops, local_crops, global_params, local_params, torch.tensor(indices), found)

    def _sample(self, counter: int, index: int, image: Tensor, errors: tuple[ImageError, ...]) -> Sample:
        rng = self._rng(index, counter)
        global_params, local_params = draw_global_and_local(self.crops, rng)
        cut = multi_crop if image.dtype == torch.uint8 else multi_crop_float
        global_crops, local_crops = cut(image, self.crops, rng)
        return Sample(global_crops, local_crops, global_params, local_params, index, errors)

    def _rng(self, index: int, counter: int) -> np.random.Generator:
        return self.rng_of(index, counter) if self.rng_of else sample_rng(self.seed, counter)

    def _fetch(self, index: int) -> str | bytes | Exception:
        try:
            return self.source.read(index)
        except (DataError, OSError) as error:
            return error

    def _read(
        self, index: int, counter: int, fetched: dict[int, str | bytes | Exception]
    ) -> tuple[int, Tensor, tuple[ImageError, ...]]:
        errors: list[ImageError] = []
        retries: np.random.Generator | None = None
        for _ in range(MAX_TRIES):
            try:
                return index, self._decode(index, fetched), tuple(errors)
            except MissingExtraError as error:  # every image of its kind would fail
                raise DataError(str(error)) from error
            except (DataError, OSError) as error:
                errors.append((self.source.name(index), str(error)))
            retries = retries or sample_rng(self.seed, counter, RETRY_STREAM)
            index = int(retries.integers(len(self)))
        raise DataError(
            f"{MAX_TRIES} images drawn one after the other could not be read, the last one being {errors[-1][0]} "
            f"({errors[-1][1]}). Give a folder whose images are readable."
        )

    def _decode(self, index: int, fetched: dict[int, str | bytes | Exception]) -> Tensor:
        name = self.source.name(index)
        if self._cache is not None and name in self._cache:
            return self._cache[name]
        data = fetched[index] if index in fetched else self.source.read(index)
        if isinstance(data, Exception):
            raise data
        image = by_pixel(read_image(data, channels=self.channels, name="" if isinstance(data, str) else name))
        if self._cache is not None:
            self._cache[name] = image
        return image


def collate(samples: list[Sample]) -> Batch:
    """Put B samples together, crop-major; 8-bit ones become floats when a 16-bit one is among them."""
    if len({s.global_crops.dtype for s in samples}) > 1:
        samples = [_as_floats(s) for s in samples]
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


def _join(parts: list[Batch]) -> Batch:
    """Put batches together, crop-major."""
    if len(parts) == 1:
        return parts[0]
    sizes = [len(part.indices) for part in parts]

    def tensors(crops: list[Tensor]) -> Tensor:
        floats = any(x.dtype != torch.uint8 for x in crops)
        by_crop = [x.unflatten(0, (-1, n)) for x, n in zip(crops, sizes, strict=True)]
        return torch.cat([x.float() if floats else x for x in by_crop], dim=1).flatten(0, 1)

    local_crops = [part.local_crops for part in parts if part.local_crops is not None]
    local_params = [part.local_params for part in parts if part.local_params is not None]
    return Batch(
        tensors([part.global_crops for part in parts]),
        tensors(local_crops) if local_crops else None,
        PhotometricParams.join([part.global_params for part in parts], sizes),
        PhotometricParams.join(local_params, sizes) if local_params else None,
        torch.cat([part.indices for part in parts]),
        tuple(error for part in parts for error in part.errors),
    )


def _as_it_is(batch: Any) -> Batch:
    assert isinstance(batch, Batch)
    return batch


def _as_floats(sample: Sample) -> Sample:
    local = None if sample.local_crops is None else sample.local_crops.float()
    return replace(sample, global_crops=sample.global_crops.float(), local_crops=local)


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
    shard: tuple[int, int] = (0, 1),
    shuffle_buffer: int = SHUFFLE_BUFFER,
    rng_of: SampleRng | None = None,
) -> Iterator[Batch]:
    """Give the batches of the steps from `start_step` on.

    Args:
        source: where the images are.
        crops: the augmentation.
        batch_size: images per step over all processes.
        seed: of the run.
        start_step: the first step.
        num_steps: how many steps; None goes on for ever.
        num_workers: processes that decode and crop; 0 does so in this one. The batches do not depend on it.
        cache: keep decoded images in memory, in each worker; for small sets.
        channels: colour channels of the images.
        shard: (r, n): this is process r of n, which gets batch_size / n images of each step.
        shuffle_buffer: images that are shuffled together, for tar shards and Parquet; Parquet takes fewer where so many
            would not fit into what a worker keeps decoded.
        rng_of: gives the generator of a sample from (index, counter), see `PretrainDataset`; picklable.

    Raises:
        DataError: when there are too few images, too many in a row cannot be read, or a worker process died.
        ConfigError: when `crops.mean` is for another number of channels, or the batch cannot be shared evenly.
    """
    kernels()  # made or loaded here, so that workers have them
    dataset = PretrainDataset(source, crops, seed=seed, cache=cache, channels=channels, rng_of=rng_of)
    order = choose_order(source, seed, shuffle_buffer)
    loader: DataLoader[Sample] = DataLoader(
        dataset,
        batch_sampler=StepSampler(len(dataset), batch_size, seed, start_step, num_steps, order=order, shard=shard),
        num_workers=num_workers,
        collate_fn=_as_it_is,
        prefetch_factor=PREFETCH if num_workers else None,
        worker_init_fn=leave_signals_to_parent,
        pin_memory=torch.cuda.is_available(),
    )
    return _batches(loader)


def _batches(loader: DataLoader[Sample]) -> Iterator[Batch]:
    try:
        with worker_deaths_explained():
            yield from loader
    except DataError as error:  # of a worker: its message carries a traceback that says nothing to users
        raise DataError(str(error).rstrip().rsplit("DataError: ", 1)[-1]) from None
