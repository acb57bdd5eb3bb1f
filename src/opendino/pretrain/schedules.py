# SPDX-License-Identifier: Apache-2.0
"""Schedules as pure functions of the step, so that a resume needs no state (method.md §2)."""

from __future__ import annotations

import math
from typing import Literal

LrRule = Literal["sqrt_wrt_1024", "linear_wrt_256", "none"]


def cosine_schedule(
    step: int, *, start: float, end: float, total_steps: int, warmup_steps: int = 0, warmup_start: float = 0.0
) -> float:
    """Go linearly from `warmup_start` to `start`, then by half a cosine to `end`, which is reached at `total_steps`."""
    if step < warmup_steps:
        return warmup_start + (start - warmup_start) * step / warmup_steps
    if step >= total_steps:
        return end
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def linear_warmup(step: int, start: float, end: float, warmup_steps: int) -> float:
    """Go linearly from `start` to `end` over the warm-up and stay there."""
    return end if step >= warmup_steps else start + (end - start) * step / warmup_steps


def scaled_lr(base_lr: float, batch_size: int, rule: LrRule) -> float:
    """Scale a learning rate by the batch size; the published recipes use lr·sqrt(batch / 1024)."""
    if rule == "sqrt_wrt_1024":
        return base_lr * math.sqrt(batch_size / 1024)
    return base_lr * batch_size / 256 if rule == "linear_wrt_256" else base_lr
