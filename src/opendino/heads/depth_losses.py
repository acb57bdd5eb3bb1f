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
    valid = (true > 0) & (true <= max_depth)
    g = torch.log(predicted[valid] + EPS) - torch.log(true[valid] + EPS)
    if mean_only or g.numel() < 2:
        return math.sqrt(MEAN_WEIGHT) * g.mean().abs()  # the same as sqrt(0.15 mean²), whose gradient is undefined at 0
    squared: Tensor = g.var() + MEAN_WEIGHT * g.mean() ** 2
    return squared.clamp_min(1e-16).sqrt()


def gradient_loss(predicted: Tensor, true: Tensor, max_depth: float) -> Tensor:
    """Give the sum over 4 scales of mean |difference of log errors two pixels apart|, rows and columns (MegaDepth §4).

    Args:
        predicted: (B, H, W), positive.
        true: (B, H, W).
        max_depth: deeper truth does not count.

    Meta's code slices the first two axes of a (B, 1, H, W) tensor, that is the batch, and so compares images with each
    other; here the gradient is taken across the image, as the loss is described.
    """
    total = predicted.new_zeros(())
    for step in SCALES:
        p, t = predicted[:, ::step, ::step], true[:, ::step, ::step]
        valid = (t > 0) & (t <= max_depth)
        g = torch.log(p + EPS) - torch.log(t.clamp_min(0) + EPS)
        down = (g[:, 2:] - g[:, :-2]).abs() * (valid[:, 2:] & valid[:, :-2])
        across = (g[:, :, 2:] - g[:, :, :-2]).abs() * (valid[:, :, 2:] & valid[:, :, :-2])
        total = total + (down.sum() + across.sum()) / valid.sum().clamp_min(1)
    return total


def depth_loss(predicted: Tensor, true: Tensor, max_depth: float, *, warming_up: bool = False) -> Tensor | None:
    """Give the scale-invariant loss plus half the gradient loss, or None when no pixel of the batch is valid.

    Args:
        predicted: (B, H, W), at the size of the truth.
        true: (B, H, W).
        max_depth: of the head, metres.
        warming_up: see `scale_invariant_loss`.
    """
    if not ((true > 0) & (true <= max_depth)).any():
        return None
    invariant = scale_invariant_loss(predicted, true, max_depth, mean_only=warming_up)
    return invariant + GRADIENT_WEIGHT * gradient_loss(predicted, true, max_depth)
