# SPDX-License-Identifier: Apache-2.0
"""From teacher logits to targets: Sinkhorn–Knopp, or a moving centre. Shapes: n samples, K prototypes, d bottleneck.

Both end as softmax(logits / temp − offsets) with one offset per prototype: the centre, or the logarithm of Sinkhorn's
scaling of the prototypes, because its last act is to scale every sample to 1. So the targets of a batch are stored as
the teacher's bottleneck rows and the offsets, and probabilities are made for some rows at a time.

Sums over samples go over all processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from opendino.distributed.collectives import all_max, all_sum

CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**27}
"""Logits that exist at a time: 32 MiB of fp32 on a CPU, half a GiB on a GPU; measured."""


def chunk_rows(num_prototypes: int, device: torch.device) -> int:
    """Number of rows whose logits over K prototypes are worked off at a time."""
    return max(CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cpu"]) // num_prototypes, 16)


@dataclass(frozen=True)
class TargetRows:
    """Teacher targets that are computed when they are asked for.

    Attributes:
        z: bottleneck rows, (n, d), in the dtype of the products.
        prototypes: at unit norm, (K, d), same dtype.
        temp: teacher temperature.
        offsets: (K,) fp32, subtracted from logits / temp.
    """

    z: Tensor
    prototypes: Tensor
    temp: float
    offsets: Tensor

    def __len__(self) -> int:
        return len(self.z)

    @torch.no_grad()
    def probabilities(self, index: Tensor | None = None) -> Tensor:
        """Give softmax(z·prototypesᵀ / temp − offsets) of the rows `index`, or of all: (m, K) fp32, rows sum to 1."""
        z = self.z if index is None else self.z[index]
        return torch.softmax(logits_over(z, self.prototypes, self.temp).sub_(self.offsets), dim=1)


@torch.no_grad()
def logits_over(z: Tensor, prototypes: Tensor, temp: float) -> Tensor:
    """Give z·prototypesᵀ / temp as fp32 (n, K); the product runs in the dtype of the prototypes."""
    with torch.autocast(z.device.type, enabled=False):
        product = (z / temp).to(prototypes.dtype) @ prototypes.T
    return product if product.dtype is torch.float64 else product.float()


@torch.no_grad()
def sinkhorn_offsets(
    z: Tensor, prototypes: Tensor, temp: float, n_iterations: int = 3, chunk: int | None = None
) -> Tensor:
    """Compute the offsets with which `TargetRows` equals `sinkhorn_knopp` over the rows of all processes.

    Logits are made again for every pass instead of being kept; n_iterations passes, each with one sum over processes.

    Args:
        z: (n, d) of this process, n may be 0.
        prototypes: (K, d) at unit norm.
        temp: teacher temperature.
        n_iterations: of scaling both ways, at least 1.
        chunk: rows whose logits exist at a time; None fits the device.

    Returns:
        (K,) fp32; useful when any process has a row.
    """
    step = chunk or chunk_rows(len(prototypes), z.device)

    def logits() -> Iterator[Tensor]:
        return (logits_over(part, prototypes, temp) for part in z.split(step) if len(part))

    offsets = _log_sum_over_samples(logits(), len(prototypes), z)
    for _ in range(n_iterations - 1):
        totals = torch.zeros_like(offsets)
        for part in logits():
            totals += torch.softmax(part.sub_(offsets), dim=1).sum(0)
        offsets = offsets + all_sum(totals).log()
    return offsets


def _log_sum_over_samples(parts: Iterator[Tensor], num_prototypes: int, like: Tensor) -> Tensor:
    """Logarithm of Σ exp over the rows of all parts and processes; no prototype can underflow."""
    wide = torch.float64 if like.dtype is torch.float64 else torch.float32
    largest = torch.full((num_prototypes,), -torch.inf, dtype=wide, device=like.device)
    total = torch.zeros_like(largest)
    for part in parts:
        higher = torch.maximum(largest, part.amax(0))
        total = total * (largest - higher).exp() + part.sub_(higher).exp_().sum(0)
        largest = higher
    highest = all_max(largest)
    return highest + all_sum(total * (largest - highest).exp()).log()


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temp: float, n_iterations: int = 3) -> Tensor:
    """Balance exp(logits / temp) so that prototypes share the samples equally (Caron et al. 2020, SwAV §3.1).

    The readable form, over the samples of one process, with all logits in memory; training uses `sinkhorn_offsets`.

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
    def offsets(self, temp: float) -> Tensor:
        """Give what `TargetRows` subtracts, centre / temp, (K,); a copy that a later update leaves alone."""
        return self.center.squeeze(0) / temp

    @torch.no_grad()
    def update(self, logits: Tensor) -> None:
        """Move the centre towards the mean of the logits (n, K) of all processes; without any row it stays."""
        self._move(logits.float().sum(0), len(logits))

    @torch.no_grad()
    def update_rows(self, z: Tensor, prototypes: Tensor) -> None:
        """Do `update` for the logits z·prototypesᵀ, whose mean is mean(z)·prototypesᵀ: no logits are made."""
        with torch.autocast(z.device.type, enabled=False):
            total = z.float().sum(0)
            self._move(torch.cat([part.float() @ total for part in prototypes.split(2**14)]), len(z))

    def _move(self, total: Tensor, rows: int) -> None:
        count = all_sum(torch.tensor(float(rows), device=total.device))
        mean = all_sum(total) / count.clamp_min(1)
        weight = torch.where(count > 0, 1 - self.momentum, 0.0)
        self.center.lerp_(mean.to(self.center).unsqueeze(0), weight.to(self.center))
