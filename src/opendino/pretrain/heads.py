# SPDX-License-Identifier: Apache-2.0
"""Projection head of the DINO and iBOT losses. Shapes: n tokens, D width, K prototypes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Prototypes(nn.Module):
    """Linear layer without bias whose rows are used at unit norm (Salimans & Kingma 2016, norms fixed to 1)."""

    def __init__(self, dim: int, num_prototypes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_prototypes, dim))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.weight, dim=1).to(x.dtype))


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm1d that takes the running statistics for fewer than two rows, which have no variance."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 1 or not self.training:
            return super().forward(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class DINOHead(nn.Module):
    """MLP, L2-normalised bottleneck and unit-norm prototypes: (n, D) → logits (n, K) (DINO §3.1; method.md §2).

    `batch_norm` normalises hidden layers and bottleneck over the batch. It is a named deviation for small runs, where
    nearly equal features at the start would otherwise give every image the same target.
    """

    def __init__(
        self,
        in_dim: int,
        num_prototypes: int,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        num_layers: int = 3,
        batch_norm: bool = False,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        dims = [in_dim, *[hidden_dim] * (num_layers - 1), bottleneck_dim]
        layers: list[nn.Module] = []
        for i in range(num_layers):
            last = i == num_layers - 1
            layers.append(nn.Linear(dims[i], dims[i + 1]))
            if batch_norm:
                layers.append(BatchNorm(dims[i + 1], affine=not last))
            if not last:
                layers.append(nn.GELU())
        self.mlp = nn.Sequential(*layers)
        self.last_layer = Prototypes(bottleneck_dim, num_prototypes)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=init_std)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        z = self.mlp(x)
        # fp16 cannot hold 1e-12; the norm itself is taken in fp32 either way.
        z = F.normalize(z.float(), dim=-1, eps=1e-6 if z.dtype is torch.float16 else 1e-12)
        logits: Tensor = self.last_layer(z)
        return logits
