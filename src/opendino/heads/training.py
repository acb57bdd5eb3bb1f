# SPDX-License-Identifier: Apache-2.0
"""The loop that trains a head: AdamW, the published schedule, and a state from which a killed run goes on."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from opendino.errors import ConfigError, DataError

OnStep = Callable[[int, int, float], None]
"""Called with steps done, steps in all, and the loss of the last one."""
WARMUP_START = 1e-6
SAVE_EVERY = 200
"""Steps between two saved states."""


@dataclass(frozen=True)
class Training:
    """AdamW with a linear warm-up and a linear fall to zero.

    The published runs take 40 000 steps of 16 images with a warm-up of 1500; shorter ones keep the warm-up's share.

    Attributes:
        steps: in all.
        batch_size: samples in one.
        learning_rate: at the end of the warm-up, before the fall is taken off.
        weight_decay: on every parameter.
        warmup: steps; None is 1500/40000 of `steps`.
        seed: of the order, the augmentation and the first weights.
    """

    steps: int = 2000
    batch_size: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    warmup: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.learning_rate <= 0 or self.weight_decay < 0:
            raise ConfigError(
                f"learning_rate is {self.learning_rate} and weight_decay {self.weight_decay}; the first must be above "
                "0, the second not below."
            )

    def rate(self, step: int) -> float:
        """Give the learning rate of a step, counted from 0, as mmcv's "poly" policy of power 1 does."""
        warmup = round(self.steps * 1500 / 40000) if self.warmup is None else self.warmup
        rate = self.learning_rate * (1 - step / self.steps)
        return rate * (1 - (1 - step / warmup) * (1 - WARMUP_START)) if step < warmup else rate


def draw_rows(count: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Give the samples of a step: every sample once an epoch, in an order that (seed, epoch) decides.

    A batch may run over the end of an epoch.
    """
    rows: list[int] = []
    place = step * batch_size
    while len(rows) < batch_size:
        epoch, start = divmod(place, count)
        order = np.random.default_rng([seed, 1, epoch]).permutation(count)
        taken = order[start : start + batch_size - len(rows)].tolist()
        rows += taken
        place += len(taken)
    return rows


def fingerprint(*parts: Any) -> str:
    """Give the sha256 of JSON-able parts, to tell the runs that may go on from a state."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def train_head(
    head: nn.Module,
    loss_of: Callable[[int], Tensor],
    training: Training,
    *,
    state: str | Path | None = None,
    key: str = "",
    on_step: OnStep | None = None,
) -> list[float]:
    """Train a head in place.

    A run that was killed and is started again with the same `state` ends with the same bits as one that was not.

    Args:
        head: in training mode after the call too.
        loss_of: step → loss; a function of the step and the head's weights alone.
        training: the schedule.
        state: file to save to every SAVE_EVERY steps, written aside and renamed, and to go on from.
        key: what the run is (`fingerprint`); another one in the file is refused.
        on_step: told about progress.

    Returns:
        The loss of every step.

    Raises:
        ConfigError: for a state of another run.
        DataError: for a loss that is not finite.
    """
    optimizer = torch.optim.AdamW(
        head.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay, betas=(0.9, 0.999)
    )
    head.train()
    path = None if state is None else Path(state)
    key = fingerprint(key, asdict(training))
    losses = _restore(path, key, head, optimizer) if path is not None and path.exists() else []
    for step in range(len(losses), training.steps):
        for group in optimizer.param_groups:
            group["lr"] = training.rate(step)
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise DataError(
                f"The loss of step {step} is {losses[-1]}. Lower the learning rate of {training.learning_rate}, or "
                "look for features that are not finite."
            )
        if path is not None and ((step + 1) % SAVE_EVERY == 0 or step + 1 == training.steps):
            _save(path, key, head, optimizer, losses)
        if on_step is not None:
            on_step(step + 1, training.steps, losses[-1])
    return losses


def _save(path: Path, key: str, head: nn.Module, optimizer: torch.optim.Optimizer, losses: Sequence[float]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    saved = {"key": key, "losses": list(losses), "head": head.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(saved, aside)
    os.replace(aside, path)


def _restore(path: Path, key: str, head: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu")
        found, losses = str(saved["key"]), [float(x) for x in saved["losses"]]
    except Exception as error:  # torch raises many kinds for files that are none of its own
        raise ConfigError(f"{path} is no saved state of a head: {error} Delete it, or name another file.") from error
    if found != key:
        raise ConfigError(
            f"{path} is the state of a run with other settings, images or weights. Delete it, or name another file."
        )
    head.load_state_dict(saved["head"])
    optimizer.load_state_dict(saved["optimizer"])
    return losses
