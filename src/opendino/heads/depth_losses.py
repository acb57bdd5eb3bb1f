# SPDX-License-Identifier: Apache-2.0
"""What depth heads are trained with: a scale-invariant loss of log depth and one of its gradients.

Shapes: B images, H × W pixels. Depths are metres; pixels whose truth is 0 or above the largest depth do not count.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPS = 1e-3
"""Added to depths before the logarithm, metres."""
SCALES = (1, 2, 4, 6)
"""Every so many-th pixel of the map is looked at."""
GRADIENT_WEIGHT = 0.5
MEAN_WEIGHT = 0.15


def scale_invariant_loss(predicted: Tensor, true: Tensor, max_depth: float, *, mean_only: bool = False) -> Tensor:
    """Give sqrt(var(g) + 0.15 mean(g)²) over all valid pixels of a batch, g = log prediction − log truth.

    Args:
        predicted: (B, H, W), positive.
        true: (B, H, W), at least one of them valid.
        max_depth: deeper truth does not count.
        mean_only: leave the variance out; the first steps of a training learn the scale so.

    Source: Eigen et al. 2014, with the weights of AdaBins and of DINOv2's depth evaluation.
    """
    return _invariant(*_log_errors(predicted, true, max_depth), mean_only)


def gradient_loss(predicted: Tensor, true: Tensor, max_depth: float) -> Tensor:
    """Give the sum over 4 scales of mean |difference of log errors two pixels apart|, rows and columns (MegaDepth §4).

    Args:
        predicted: (B, H, W), positive.
        true: (B, H, W).
        max_depth: deeper truth does not count.

    Meta's code slices the first two axes of a (B, 1, H, W) tensor, that is the batch, and so compares images with each
    other; here the gradient is taken across the image, as the loss is described.
    """
    return _gradients(*_log_errors(predicted, true, max_depth))


def depth_loss(predicted: Tensor, true: Tensor, max_depth: float, *, warming_up: bool = False) -> Tensor | None:
    """Give the scale-invariant loss plus half the gradient loss, or None when no pixel of the batch is valid.

    Args:
        predicted: (B, H, W), at the size of the truth.
        true: (B, H, W).
        max_depth: of the head, metres.
        warming_up: see `scale_invariant_loss`.
    """
    g, valid = _log_errors(predicted, true, max_depth)
    if not valid.any():
        return None
    return _invariant(g, valid, warming_up) + GRADIENT_WEIGHT * _gradients(g, valid)


def _log_errors(predicted: Tensor, true: Tensor, max_depth: float) -> tuple[Tensor, Tensor]:
    """Give log prediction − log truth, 0 where there is none, and where there is one as 1 and 0, both (B, H, W)."""
    valid = ((true > 0) & (true <= max_depth)).to(predicted.dtype)
    return (torch.log(predicted + EPS) - torch.log(true.clamp_min(0) + EPS)) * valid, valid


def _invariant(g: Tensor, valid: Tensor, mean_only: bool) -> Tensor:
    count = valid.sum()
    mean = g.sum() / count
    if mean_only or count < 2:
        return math.sqrt(MEAN_WEIGHT) * mean.abs()  # the same as sqrt(0.15 mean²), whose gradient is undefined at 0
    variance = ((g - mean * valid) ** 2).sum() / (count - 1)
    squared: Tensor = variance + MEAN_WEIGHT * mean**2
    return squared.clamp_min(1e-16).sqrt()


def _gradients(g: Tensor, valid: Tensor) -> Tensor:
    total = g.new_zeros(())
    for step in SCALES:
        e, v = g[:, ::step, ::step], valid[:, ::step, ::step]
        down = (e[:, 2:] - e[:, :-2]).abs() * (v[:, 2:] * v[:, :-2])
        across = (e[:, :, 2:] - e[:, :, :-2]).abs() * (v[:, :, 2:] * v[:, :, :-2])
        total = total + (down.sum() + across.sum()) / v.sum().clamp_min(1)
    return total
