# SPDX-License-Identifier: Apache-2.0
"""Figures that tell a healthy run from a collapsing one.

Shapes: n samples, K prototypes, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def entropy(probabilities: Tensor) -> float:
    """Mean entropy of target rows (n, K), nats; ln K when the teacher is undecided, 0 when it is certain."""
    return float(-torch.xlogy(probabilities, probabilities).sum(1).mean())


@torch.no_grad()
def prototype_use(probabilities: Tensor) -> float:
    """Share of the most prototypes that n rows can win which do win one; 1/min(n, K) after a collapse."""
    winners = probabilities.argmax(1).unique().numel()
    return float(winners / min(probabilities.shape))


@torch.no_grad()
def rank_me(features: Tensor) -> float:
    """Effective rank of features (n, D): exponential of the entropy of the singular values (Garrido et al. 2023)."""
    values = torch.linalg.svdvals(features.float())
    share = values / values.sum().clamp_min(1e-12) + 1e-7
    return float(torch.exp(-(share * share.log()).sum()))


def health(cls_targets: Tensor, features: Tensor) -> dict[str, float]:
    """Give the figures of one batch from the teacher's cls targets (2B, K) and cls tokens (2B, D)."""
    return {
        "teacher_entropy": entropy(cls_targets),
        "prototype_use": prototype_use(cls_targets),
        "feature_rank": rank_me(features),
    }
