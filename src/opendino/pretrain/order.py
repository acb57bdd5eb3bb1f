# SPDX-License-Identifier: Apache-2.0
"""Which images a step has, as a pure function of (seed, step), for any number of processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from opendino.errors import ConfigError, DataError
from opendino.images.sources import ImageSource
from opendino.pretrain.crops import ORDER_STREAM, sample_rng

WINDOW_STREAM = 16
"""Use of (seed, epoch) for the shuffles inside windows; the low numbers are the crops'."""
WINDOWS_KEPT = 2
Request = tuple[int, int]
"""(image index, sample counter)."""
Indices = npt.NDArray[np.int64]


class Order(Protocol):
    """An order of all images in each epoch."""

    def at(self, epoch: int, first: int, last: int) -> Indices:
        """Give the images at the places from `first` to before `last` of an epoch."""


class FullShuffle:
    """A permutation of all images; for sources whose images can be read in any order.

    Args:
        num_images: n.
        seed: of the run.
    """

    def __init__(self, num_images: int, seed: int) -> None:
        self.num_images, self.seed = num_images, seed
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def at(self, epoch: int, first: int, last: int) -> Indices:
        """Give the images at the places from `first` to before `last` of an epoch."""
        if epoch != self._epoch:
            self._epoch, self._order = epoch, sample_rng(self.seed, epoch, ORDER_STREAM).permutation(self.num_images)
        return self._order[first:last]


class WindowedShuffle:
    """A permutation that keeps neighbours near each other, and is computed where it is looked at.

    The groups of neighbouring images are permuted and laid end to end; then each window of `window` images is shuffled.
    A window mixes window / (size of a group) groups from all over the data.

    Args:
        groups: (G,) sizes of runs of neighbouring images; their sum is n.
        window: images that are shuffled together.
        seed: of the run.
    """

    def __init__(self, groups: Indices, window: int, seed: int) -> None:
        self.groups, self.window, self.seed = groups, window, seed
        self.num_images = int(groups.sum())
        self._firsts = np.concatenate([np.zeros(1, np.int64), np.cumsum(groups)])
        self._epoch = -1
        self._windows: dict[int, Indices] = {}

    def at(self, epoch: int, first: int, last: int) -> Indices:
        """Give the images at the places from `first` to before `last` of an epoch."""
        if epoch != self._epoch:
            self._epoch, self._windows = epoch, {}
            self._order = sample_rng(self.seed, epoch, ORDER_STREAM).permutation(len(self.groups))
            self._places = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.groups[self._order])])
        parts = []
        for number in range(first // self.window, -(-last // self.window)):
            start = number * self.window
            parts.append(self._shuffled(number)[max(first - start, 0) : last - start])
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _shuffled(self, number: int) -> Indices:
        if number not in self._windows:
            while len(self._windows) >= WINDOWS_KEPT:
                del self._windows[next(iter(self._windows))]
            first = number * self.window
            images = self._laid_out(first, min(first + self.window, self.num_images))
            bits = np.random.Philox(key=self.seed, counter=[0, number, WINDOW_STREAM, self._epoch])
            self._windows[number] = np.random.Generator(bits).permutation(images)
        return self._windows[number]

    def _laid_out(self, first: int, last: int) -> Indices:
        """Give the images at places before the shuffle inside windows."""
        begin = int(np.searchsorted(self._places, first, side="right")) - 1
        end = int(np.searchsorted(self._places, last, side="left"))
        pieces = []
        for k in range(begin, end):
            shift = self._firsts[self._order[k]] - self._places[k]
            pieces.append(np.arange(max(first, self._places[k]), min(last, self._places[k + 1])) + shift)
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)


def choose_order(source: ImageSource, seed: int, shuffle_buffer: int) -> Order:
    """Give the order that suits a source: windows where neighbours are read together, else a full shuffle.

    Raises:
        ConfigError: for a buffer below one image.
    """
    if shuffle_buffer < 1:
        raise ConfigError(f"shuffle_buffer is {shuffle_buffer}; it must be at least 1, and 8192 mixes well.")
    if source.groups is None:
        return FullShuffle(len(source), seed)
    return WindowedShuffle(source.groups, min(shuffle_buffer, source.max_window or shuffle_buffer), seed)


class StepSampler(Sampler[list[Request]]):
    """The (index, counter) pairs of each step, as a pure function of (seed, step).

    An epoch is a fresh order of all images, cut into whole batches; the images that are left over differ from epoch to
    epoch, and no batch has an image twice.

    Args:
        num_images: size of the data set.
        batch_size: images per step over all processes, at most `num_images`.
        seed: of the run.
        start_step: the first step to yield.
        num_steps: how many to yield; None goes on for ever.
        order: of the images in each epoch; default: a full shuffle.
        shard: (r, n): this is process r of n, which takes the r-th n-th of each batch. The counters stay those of the
            whole batch, so what a sample becomes does not depend on n.

    Raises:
        DataError: when there are fewer images than one batch needs.
        ConfigError: when the batch does not divide by the number of processes.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        num_steps: int | None = None,
        *,
        order: Order | None = None,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        if num_images < batch_size:
            raise DataError(
                f"There are {num_images} images and a batch is {batch_size}. Add images or lower the batch."
            )
        rank, processes = shard
        assert 0 <= rank < processes
        if batch_size % processes:
            raise ConfigError(
                f"A batch of {batch_size} images cannot be shared evenly by {processes} processes. Give a batch size "
                f"that is a multiple of {processes}."
            )
        self.num_images, self.batch_size = num_images, batch_size
        self.start_step, self.num_steps = start_step, num_steps
        self.order = order or FullShuffle(num_images, seed)
        self._first, self._count = rank * (batch_size // processes), batch_size // processes

    def __iter__(self) -> Iterator[list[Request]]:
        step = self.start_step
        while self.num_steps is None or step < self.start_step + self.num_steps:
            yield self.at(step)
            step += 1

    def at(self, step: int) -> list[Request]:
        """Give the (index, counter) pairs of one step for this process."""
        epoch, place = divmod(step, self.num_images // self.batch_size)
        first = place * self.batch_size + self._first
        indices = self.order.at(epoch, first, first + self._count).tolist()
        return [(index, step * self.batch_size + self._first + i) for i, index in enumerate(indices)]
