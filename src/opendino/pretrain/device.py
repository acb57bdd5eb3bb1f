# SPDX-License-Identifier: Apache-2.0
"""Which number format a machine computes fastest in, and loss scaling for the one that needs it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from opendino.distributed.sharding import local


def choose_precision(name: str, device: torch.device) -> torch.dtype | None:
    """Resolve the autocast dtype; None computes in fp32.

    "auto" is bf16 on CUDA, and on a CPU with instructions for its products (AMX, AVX512-BF16); fp32 elsewhere, where
    bf16 would be slower.
    """
    if name == "auto":
        fast = device.type == "cuda" or (device.type == "cpu" and cpu_has_bf16())
        return torch.bfloat16 if fast else None
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def cpu_has_bf16() -> bool:
    """Whether this processor multiplies bf16 matrices faster than fp32 ones."""
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)


class LossScale:
    """The factor that keeps small fp16 gradients from vanishing; 1 and inert when not enabled.

    The same in all processes, because whether a step overflowed is decided from norms over all of them
    (`torch.amp.GradScaler` decides in each process by itself).

    Args:
        enabled: for fp16.
        scale: to start with.
        growth_interval: steps without overflow after which the scale doubles; an overflow halves it.
    """

    def __init__(self, enabled: bool, scale: float = 2.0**16, growth_interval: int = 2000) -> None:
        self.enabled, self.growth_interval = enabled, growth_interval
        self.value, self.good_steps = scale if enabled else 1.0, 0

    @torch.no_grad()
    def unscale(self, parameters: Iterable[Tensor]) -> None:
        """Divide the gradients by the scale, in place."""
        if self.enabled:
            grads = [local(p.grad) for p in parameters if p.grad is not None]
            torch._foreach_mul_(grads, 1 / self.value)

    def update(self, finite: bool) -> None:
        """Halve after an overflow, double after long without one."""
        if not self.enabled:
            return
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value = max(self.value / 2, 1.0)
        elif self.good_steps == self.growth_interval:
            self.value, self.good_steps = self.value * 2, 0

    def state(self) -> list[float]:
        """Give what a checkpoint keeps."""
        return [self.value, float(self.good_steps)]

    def restore(self, state: Any) -> None:
        """Take up what `state` gave."""
        if self.enabled:
            self.value, self.good_steps = float(state[0]), int(state[1])
