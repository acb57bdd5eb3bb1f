# SPDX-License-Identifier: Apache-2.0
"""What int8 needs to know: the range of every linear layer's input, channel by channel, on a user's images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from opendino.models.vit import VisionTransformer

Floats = npt.NDArray[np.float32]


@dataclass
class Range:
    """Smallest and largest input of a layer, per channel, (in,) each."""

    low: Floats
    high: Floats

    def widen(self, x: Tensor) -> None:
        """Take in inputs (…, in)."""
        flat = x.detach().float().flatten(0, -2)
        self.low = np.minimum(self.low, flat.amin(0).cpu().numpy())
        self.high = np.maximum(self.high, flat.amax(0).cpu().numpy())


@torch.inference_mode()
def input_ranges(model: VisionTransformer, batches: Sequence[Tensor]) -> dict[str, Range]:
    """Run batches of images through a model and give the input range of each linear layer by its name.

    Args:
        model: the backbone, fp32.
        batches: (B, C, H, W) each, normalised.
    """
    ranges: dict[str, Range] = {}
    hooks, was_training = [], model.training
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            zero = np.zeros(module.in_features, np.float32)
            ranges[name] = Range(zero, zero.copy())
            hooks.append(module.register_forward_pre_hook(_widening(ranges[name])))
    try:
        model.eval()
        for batch in batches:
            model.forward_features(batch)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    return ranges


def _widening(found: Range) -> Callable[[nn.Module, Any], None]:
    return lambda _, inputs: found.widen(inputs[0])
