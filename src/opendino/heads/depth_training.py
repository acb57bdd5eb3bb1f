# SPDX-License-Identifier: Apache-2.0
"""Training of a depth head on frozen features; killed and started again, it ends in the same bits."""

from __future__ import annotations

import json
import math
import os
import pickle
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from opendino.errors import ConfigError, WeightsError
from opendino.heads.depth_data import Batches
from opendino.heads.depth_losses import depth_loss
from opendino.heads.depth_modules import HeadKind

OnStep = Callable[[int, int, float], None]
"""Called with steps done, steps in all, and the loss."""
WARMUP_SHARE = 1 / 3
"""12 800 of the published 38 400 steps."""
WARMUP_FLOOR = 1e-3
SCALE_STEPS = 100
"""Steps at the start whose loss is of the mean alone; at most a twentieth of the training."""
MAX_NORM = 35.0
SAVE_EVERY_S = 30.0
"""Seconds; at most so much is done again after a kill."""


@dataclass(frozen=True)
class DepthRecipe:
    """How a head is trained. AdamW with betas 0.9 and 0.999, cosine decay after a linear warm-up over a third.

    Attributes:
        steps: updates; 38 400 in the published training.
        batch_size: 16 there.
        lr: highest learning rate; 1e-4 there.
        weight_decay: 0.01 there.
        seed: of the head's first weights, the order and the augmentation.
    """

    steps: int = 2000
    batch_size: int = 16
    lr: float = 1e-2
    weight_decay: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or self.lr <= 0 or self.weight_decay < 0:
            raise ConfigError(
                f"The training has steps {self.steps}, batch_size {self.batch_size}, lr {self.lr:g}, weight_decay "
                f"{self.weight_decay:g}; the first two must be at least 1, lr above 0, weight_decay at least 0."
            )

    def lr_at(self, step: int) -> float:
        """Give the learning rate of a step, from 0."""
        warmup = self.steps * WARMUP_SHARE
        rising = 1 - (1 - step / warmup) * (1 - WARMUP_FLOOR) if step < warmup else 1.0
        return self.lr * rising * 0.5 * (1 + math.cos(math.pi * step / self.steps))


def train_head(
    head: nn.Module, batches: Batches, recipe: DepthRecipe, max_depth: float, *, described: dict[str, Any],
    state: Path | None = None, on_step: OnStep | None = None,
) -> list[float]:  # fmt: skip
    """Train a head in place.

    Args:
        head: of `opendino.heads.depth_modules`, on the device of the batches.
        batches: by step.
        recipe: see there.
        max_depth: deeper truth does not count, metres.
        described: JSON-able; what decides the result besides the recipe. A state file of another training is refused.
        state: file that keeps the training, written every `SAVE_EVERY_S`; None keeps nothing.
        on_step: told about progress.

    Returns:
        The loss of each step; NaN for a step whose batch had no valid pixel, which changes nothing.

    Raises:
        ConfigError: when the state file belongs to another training, or the loss is no longer finite.
    """
    text = json.dumps({"recipe": asdict(recipe), **described}, sort_keys=True)
    optimizer = torch.optim.AdamW(head.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    losses = _resume(state, text, head, optimizer)
    saved = monotonic()
    head.train()
    for step in range(len(losses), recipe.steps):
        losses.append(_step(head, optimizer, batches, recipe, step, max_depth))
        if on_step is not None:
            on_step(step + 1, recipe.steps, losses[-1])
        # Never on an exception: an interrupt inside the optimizer leaves half a step.
        if state is not None and (step + 1 == recipe.steps or monotonic() - saved >= SAVE_EVERY_S):
            _save(state, text, head, optimizer, losses)
            saved = monotonic()
    head.eval()
    return losses


def _step(
    head: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches, recipe: DepthRecipe, step: int,
    max_depth: float,
) -> float:  # fmt: skip
    for group in optimizer.param_groups:
        group["lr"] = recipe.lr_at(step)
    batch = batches.at(step)
    loss = loss_of(head, batch.patches, batch.cls, batch.truth, max_depth, step < scale_steps(recipe.steps))
    if loss is None:
        return math.nan
    value = float(loss.detach())
    if not math.isfinite(value):
        raise ConfigError(
            f"The loss is {value} at step {step} with lr {recipe.lr:g}, so the head cannot be trained so. Give a tenth "
            "of the learning rate, and see that images and depths are sound."
        )
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(head.parameters(), MAX_NORM)
    optimizer.step()
    return value


def default_lr(kind: HeadKind) -> float:
    """Give the highest learning rate for a training of some thousand steps; a linear head bears ten times DPT's."""
    return 1e-3 if kind == "dpt" else 1e-2


def scale_steps(steps: int) -> int:
    """Give the number of first steps that learn the mean of log depth alone."""
    return min(SCALE_STEPS, steps // 20)


def loss_of(
    head: nn.Module, patches: list[Tensor], cls: list[Tensor], truth: Tensor, max_depth: float, warming_up: bool
) -> Tensor | None:
    """Give the loss of what the head says about a batch, enlarged to the truth (B, H, W)."""
    depth = interpolate(head(patches, cls), truth.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    return depth_loss(depth, truth, max_depth, warming_up=warming_up)


def _save(path: Path, text: str, head: nn.Module, optimizer: torch.optim.Optimizer, losses: list[float]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    state = {"settings": text, "head": head.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}
    torch.save(state, aside)
    os.replace(aside, path)


def _resume(path: Path | None, text: str, head: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    if path is None or not path.is_file():
        return []
    try:
        found = torch.load(path, map_location=next(head.parameters()).device, weights_only=True)
        same, losses = found["settings"] == text, [float(v) for v in found["losses"]]
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise WeightsError(f"{path} is damaged or no state of a depth training: {error}. Delete it.") from error
    if not same:
        before, now = json.loads(found["settings"]), json.loads(text)
        differing = [k for k in sorted({*before, *now}) if before.get(k) != now.get(k)]
        raise ConfigError(
            f"{path} holds a training with other settings ({', '.join(differing)} differ). Give another file, or "
            "delete it to begin anew."
        )
    head.load_state_dict(found["head"])
    optimizer.load_state_dict(found["optimizer"])
    return losses
