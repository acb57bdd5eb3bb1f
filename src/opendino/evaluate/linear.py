# SPDX-License-Identifier: Apache-2.0
"""The published grid of linear classifiers on frozen features, all trained in one pass (DINOv2 §7.1; method.md §3).

{1, 4} last blocks' cls tokens × {without, with} the mean of the last patch tokens × 13 learning rates. Which samples a
step has and how weights begin are functions of (seed, step) and (seed, classifier); a run that goes on from its state
is the run that was never stopped, bit for bit.

Shapes: N items, B batch, L blocks, D width, K classes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from opendino.errors import ConfigError
from opendino.evaluate.linear_grid import Grid, GridSettings, Kind

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
"""Learning rates for a batch of 256; multiplied by batch / 256."""
BLOCKS, AVERAGES = (1, 4), (False, True)
PUBLISHED_STEPS, MIN_STEPS, PASSES = 12_500, 500, 100
BATCH = 1024
Samples = npt.NDArray[np.int64]
OnStep = Callable[[int, int], None]
"""Called with steps done and steps in all."""


class Batches(Protocol):
    """Features of training samples at a step."""

    def __len__(self) -> int: ...

    def at(self, step: int, samples: Samples) -> tuple[Tensor, Tensor, Tensor]:
        """Give cls (b, L, D), mean (b, D) and labels (b,) of samples at a step; b is smaller for unreadable ones."""

    def identity(self) -> str:
        """Give what tells these features from others, for resuming."""


class FixedBatches:
    """Features that are the same at every step.

    Args:
        cls: (N, L, D) cls tokens of the last blocks.
        mean: (N, D) mean patch tokens.
        labels: (N,) integers from 0.
    """

    def __init__(self, cls: Any, mean: Any, labels: Any) -> None:
        self.cls, self.mean = torch.as_tensor(cls), torch.as_tensor(mean)
        self.labels = torch.as_tensor(labels).long()

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, step: int, samples: Samples) -> tuple[Tensor, Tensor, Tensor]:
        """Give cls (b, L, D), mean (b, D) and labels (b,) of samples at a step."""
        index = torch.from_numpy(samples)
        return self.cls[index], self.mean[index], self.labels[index]

    def identity(self) -> str:
        """Give what tells these features from others, for resuming."""
        digest = hashlib.sha256()
        for tensor in (self.cls, self.mean, self.labels):
            digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def default_steps(num_items: int, batch_size: int = BATCH) -> int:
    """Give 100 passes over the set, at least 500 and at most the published 12 500 steps (10 passes over ImageNet)."""
    return min(max(math.ceil(PASSES * num_items / batch_size), MIN_STEPS), PUBLISHED_STEPS)


def grid_settings(
    num_items: int,
    num_blocks: int,
    *,
    blocks: Sequence[int] = BLOCKS,
    averages: Sequence[bool] = AVERAGES,
    rates: Sequence[float] = RATES,
    steps: int | None = None,
    batch_size: int = BATCH,
    seed: int = 0,
) -> GridSettings:
    """Fit the published settings to a training set.

    Args:
        num_items: N; a batch is at most that.
        num_blocks: L, blocks that features are there of; a kind with more of them takes these.
        blocks: numbers of last blocks.
        averages: without, with the mean patch token.
        rates: for a batch of 256.
        steps: None is `default_steps`.
        batch_size: samples a step, the same on any number of devices.
        seed: of weights and order.

    Raises:
        ConfigError: for a setting that is not positive.
    """
    if min((*rates, batch_size, 1 if steps is None else steps, *blocks), default=0) <= 0 or not rates or not blocks:
        raise ConfigError(
            f"The grid has the rates {tuple(rates)}, {steps} steps, batch {batch_size} and blocks {tuple(blocks)}; "
            "all must be positive, with at least one rate and one number of blocks."
        )
    kinds = sorted({Kind(min(b, num_blocks), a) for b in blocks for a in averages})
    size = min(batch_size, num_items)
    return GridSettings(tuple(kinds), tuple(rates), steps or default_steps(num_items, size), size, seed)


def samples_of(step: int, num_items: int, batch_size: int, seed: int) -> Samples:
    """Give the samples of a step (B,): each pass over the set is a permutation of its own, cut into batches."""
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    out = np.empty(batch_size, np.int64)
    for number in np.unique(places // num_items):
        order = np.random.default_rng([seed, int(number)]).permutation(num_items)
        own = places // num_items == number
        out[own] = order[places[own] % num_items]
    return out


def train_grid(
    batches: Batches,
    settings: GridSettings,
    num_classes: int,
    *,
    dim: int,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    state: Path | None = None,
    save_steps: int = 100,
    save_seconds: float = 30,
    on_step: OnStep | None = None,
) -> Grid:
    """Train all classifiers.

    Args:
        batches: gives features at a step.
        settings: of the grid.
        num_classes: K.
        dim: D.
        device: where the classifiers lie.
        dtype: of the classifiers.
        state: file to go on from and to save to; the caller removes it when the result is safe.
        save_steps: the state is saved at multiples of that …
        save_seconds: … when as many seconds went by since the last time.
        on_step: told about progress.
    """
    grid, key = Grid(settings, dim, num_classes, device, dtype), ""
    if state is not None:
        key = state_key(batches, settings, num_classes, dtype)
        grid.load(state, key)
    saved = monotonic()
    while grid.step < settings.steps:
        chosen = samples_of(grid.step, len(batches), settings.batch_size, settings.seed)
        cls, mean, labels = batches.at(grid.step, chosen)
        grid.train_step(cls, mean, labels)
        due = grid.step % save_steps == 0 or grid.step == settings.steps
        if state is not None and due and monotonic() - saved >= save_seconds:
            grid.save(state, key)
            saved = monotonic()
        if on_step is not None:
            on_step(grid.step, settings.steps)
    return grid


def state_key(batches: Batches, settings: GridSettings, num_classes: int, dtype: torch.dtype = torch.float32) -> str:
    """Give a hash of all that decides what a training does."""
    text = json.dumps([batches.identity(), asdict(settings), num_classes, str(dtype)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
