# SPDX-License-Identifier: Apache-2.0
"""What a fine-tuning run is told, checked before anything is computed; and its learning rate."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from opendino.errors import ConfigError

Mode = Literal["frozen", "lora", "last-k", "full"]
DEFAULT_LR: dict[str, float] = {"frozen": 1e-3, "lora": 5e-4, "last-k": 1e-4, "full": 5e-5}
FLOOR = 0.01
"""The learning rate never falls below this share of its peak, so that no schedule can switch training off unseen."""


@dataclass(frozen=True)
class FinetuneSettings:
    """Settings of a run.

    Attributes:
        mode: what trains beside the head: nothing, LoRA matrices, the last k blocks, or everything.
        epochs: passes over the training images.
        batch_size: images in a step.
        lr: peak of the learning rate; None takes the mode's default.
        weight_decay: of matrices.
        layer_decay: with "full", the rate of layer l is lr · layer_decay^(depth + 1 - l); the head's is lr.
        last_k: blocks that train with "last-k", and the final norm with them.
        lora_rank: r.
        lora_alpha: the adapters' output is multiplied by lora_alpha / lora_rank.
        lora_mlp: adapters in the feed-forward layers too, not only in attention.
        warmup: share of the steps in which the rate rises.
        head_lr_mult: the head's rate over lr.
        head_init: the head begins as the linear "probe", or with weights of "zero".
        drop_path: stochastic depth of the blocks that train.
        min_scale: smallest share of an image's area that a training crop covers.
        flip: mirror half of the training images.
        seed: of everything drawn.
        checkpoint_steps: steps between two states on disk; one is also written after every epoch.
    """

    mode: Mode = "lora"
    epochs: int = 10
    batch_size: int = 32
    lr: float | None = None
    weight_decay: float = 0.05
    layer_decay: float = 0.75
    last_k: int = 2
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_mlp: bool = False
    warmup: float = 0.1
    head_lr_mult: float = 1.0
    head_init: str = "probe"
    drop_path: float = 0.0
    min_scale: float = 0.35
    flip: bool = True
    seed: int = 0
    checkpoint_steps: int = 100

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ConfigError(f"--mode is {self.mode!r}; it must be one of {', '.join(get_args(Mode))}.")
        if self.head_init not in ("probe", "zero"):
            raise ConfigError(f"--head-init is {self.head_init!r}; it must be probe or zero.")
        for name in ("epochs", "batch_size", "last_k", "lora_rank", "checkpoint_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{_flag(name)} is {getattr(self, name)}; it must be at least 1.")
        for name, low, high in (
            ("layer_decay", 0, 1), ("min_scale", 0, 1), ("lora_alpha", 0, math.inf), ("head_lr_mult", 0, math.inf),
        ):  # fmt: skip
            if not low < getattr(self, name) <= high:
                raise ConfigError(f"{_flag(name)} is {getattr(self, name)}; it must be above {low} and at most {high}.")
        for name in ("warmup", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{_flag(name)} is {getattr(self, name)}; it must be from 0 to below 1.")
        if not 0 < self.peak_lr < 1:
            raise ConfigError(f"--lr is {self.peak_lr}; it must be above 0 and below 1. Leave it out for the default.")
        if self.weight_decay < 0:
            raise ConfigError(f"--weight-decay is {self.weight_decay}; it must not be negative.")

    @property
    def peak_lr(self) -> float:
        """The learning rate at its peak."""
        return DEFAULT_LR[self.mode] if self.lr is None else self.lr

    def as_json(self) -> dict[str, Any]:
        """Give all settings, with the learning rate that is used."""
        return asdict(self) | {"lr": self.peak_lr}


def _flag(name: str) -> str:
    return "--batch" if name == "batch_size" else "--" + name.replace("_", "-")


def learning_rate(step: int, *, total_steps: int, peak: float, warmup: float) -> float:
    """Give the rate of one step: linear warm-up, then half a cosine down to FLOOR · peak. It is never 0.

    Args:
        step: 0 … total_steps - 1.
        total_steps: optimiser steps of the whole run, not epochs.
        peak: highest rate.
        warmup: share of the steps in which it rises; less than one step is none.
    """
    rising = int(warmup * total_steps)
    if step < rising:
        return peak * max((step + 1) / (rising + 1), FLOOR)
    progress = (step - rising) / max(total_steps - rising - 1, 1)
    return peak * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
