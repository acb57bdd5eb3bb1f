# SPDX-License-Identifier: Apache-2.0
"""Weights to 8 bits so that a layer's outputs on given inputs change least (Frantar et al. 2023, GPTQ).

One input channel after the other is rounded, and what that does to the outputs is made up for by the weights of the
channels that are not rounded yet, by least squares.

Shapes: n inputs, K channels of them, M outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opendino.native.int8 import MOST_WEIGHT, quantise_weight

COLUMNS = 128
"""Channels after which the weights of all later ones are brought up to date at once."""
DAMPING = 0.01
"""Of the mean square of a channel, added to each: without it, few inputs would be fitted too closely."""


def round_for(weight: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Give int8 (M, K) and its scales (M,), those of `quantise_weight`.

    Args:
        weight: fp32 (M, K).
        inputs: fp32 (n, K), typical ones of the layer.
    """
    scale = quantise_weight(weight)[1]
    left, factor = weight.clone(), _factor(inputs.T @ inputs)
    out = torch.empty_like(weight, dtype=torch.int8)
    for start in range(0, weight.shape[1], COLUMNS):
        columns = slice(start, min(start + COLUMNS, weight.shape[1]))
        part, own = left[:, columns], factor[columns, columns]
        errors = torch.empty_like(part)
        for k in range(part.shape[1]):
            whole = (part[:, k] / scale).round().clamp(-MOST_WEIGHT, MOST_WEIGHT)
            out[:, start + k] = whole.to(torch.int8)
            errors[:, k] = (part[:, k] - whole * scale) / own[k, k]
            part[:, k:] -= errors[:, k : k + 1] * own[k, k:]
        left[:, columns.stop :] -= errors @ factor[columns, columns.stop :]
    return out, scale


def _factor(moments: Tensor) -> Tensor:
    """Give the upper triangular factor of the inverse of (K, K) second moments: its rows say what makes up for what."""
    mean = moments.diagonal().mean().clamp_min(1e-12)
    upper: Tensor
    for damping in (DAMPING, 10 * DAMPING, 100 * DAMPING):
        lower, failed = torch.linalg.cholesky_ex(moments + damping * mean * torch.eye(len(moments)))
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
    return torch.eye(len(moments))  # inputs that are not finite: rounding to the nearest
