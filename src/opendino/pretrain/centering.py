# SPDX-License-Identifier: Apache-2.0
"""From teacher logits to targets: Sinkhorn–Knopp, or a moving centre. Shapes: n samples, K prototypes."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temp: float, n_iterations: int = 3) -> Tensor:
    """Balance exp(logits / temp) so that prototypes share the samples equally (Caron et al. 2020, SwAV §3.1).

    Each iteration scales prototypes to 1/K and samples to 1/n; the result is scaled so that each row sums to 1.

    The first iteration is done on logarithms: no prototype and no sample can underflow, however far the logits spread.
    After it every prototype and every sample has an entry of at least 1/(K·n²), so the others need no logarithms.

    Args:
        logits: (n, K).
        temp: teacher temperature.
        n_iterations: of scaling both ways, at least 1.

    Returns:
        (n, K) fp32.
    """
    n, k = logits.shape
    scaled = logits.float() / temp
    q = torch.softmax(scaled - scaled.logsumexp(0, keepdim=True), dim=1) / n
    for _ in range(n_iterations - 1):
        q /= q.sum(0, keepdim=True) * k
        q /= q.sum(1, keepdim=True) * n
    return q * n


class MovingCenter(nn.Module):
    """Subtracts a moving mean of the teacher's logits before the softmax (DINO eq. 4)."""

    center: Tensor

    def __init__(self, num_prototypes: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(1, num_prototypes))

    @torch.no_grad()
    def probabilities(self, logits: Tensor, temp: float) -> Tensor:
        """Give softmax((logits − centre) / temp), (n, K) fp32."""
        return torch.softmax((logits.float() - self.center) / temp, dim=-1)

    @torch.no_grad()
    def update(self, logits: Tensor) -> None:
        """Move the centre towards the mean of these logits (n, K)."""
        self.center.lerp_(logits.float().mean(0, keepdim=True), 1 - self.momentum)
