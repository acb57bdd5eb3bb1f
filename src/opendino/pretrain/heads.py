# SPDX-License-Identifier: Apache-2.0
"""Projection head of the DINO and iBOT losses. Shapes: n tokens, D width, K prototypes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opendino.distributed.collectives import all_sum, all_sum_with_grad, world_size
from opendino.pretrain.cross_entropy import RowLoss, compute_dtype, prototype_cross_entropy, unit_rows


class Prototypes(nn.Module):
    """Linear layer without bias whose rows are used at unit norm (Salimans & Kingma 2016, norms fixed to 1)."""

    def __init__(self, dim: int, num_prototypes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_prototypes, dim))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, x: Tensor | None, losses: Sequence[RowLoss] | None = None, student_temp: float = 0.1) -> Any:
        """Give logits (n, K); with `losses`, what `prototype_cross_entropy` gives; without rows, the unit rows."""
        if x is None:
            return unit_rows(self.weight, compute_dtype(self.weight))
        if losses is not None:
            return prototype_cross_entropy(x, self.weight, losses, student_temp)
        return F.linear(x, F.normalize(self.weight, dim=1).to(x.dtype))


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm1d over the rows of all processes, however many each has.

    Fewer than two rows in all have no variance, and are normalised by the running statistics.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training and world_size() > 1:
            return self._over_processes(x)
        if len(x) > 1 or not self.training:
            return super().forward(x)
        return self._by_running_statistics(x)

    def _by_running_statistics(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)

    def _over_processes(self, x: Tensor) -> Tensor:
        rows = float(all_sum(torch.tensor(float(len(x)), device=x.device)))
        if rows < 2:
            return self._by_running_statistics(x)
        with torch.autocast(x.device.type, enabled=False):
            wide = x if x.dtype is torch.float64 else x.float()
            mean = all_sum_with_grad(wide.sum(0)) / rows
            centered = wide - mean
            var = all_sum_with_grad(centered.square().sum(0)) / rows
            out = centered * torch.rsqrt(var + self.eps)
            if self.weight is not None:
                out = out * self.weight + self.bias
            self._track(mean.detach(), var.detach() * (rows / (rows - 1)))
        return out.to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
        self.running_var.lerp_(var.to(self.running_var), self.momentum)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)


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

    def forward(
        self, x: Tensor | Sequence[Tensor], losses: Sequence[RowLoss] | None = None, student_temp: float = 0.1
    ) -> Any:
        """Apply the head in one of three forms; each is one call, however many groups of rows there are.

        Args:
            x: tokens (n, D); or a list of groups, over each of which BatchNorm, if any, normalises by itself.
            losses: one per group.
            student_temp: softmax temperature of the student, for `losses`.

        Returns:
            For tokens: logits (n, K). For groups with losses: the total and its parts (`prototype_cross_entropy`).
            For groups alone, the logits as factors z·prototypesᵀ: a list of bottleneck rows (n_i, d) and the
            prototypes at unit norm (K, d), in the dtype of the products.
        """
        if isinstance(x, Tensor):
            return self.last_layer(self.bottleneck(x))
        rows = [self.bottleneck(group) for group in x]
        if losses is not None:
            return self.last_layer(torch.cat(rows), losses, student_temp)
        prototypes = self.last_layer(None)
        return [z.to(prototypes.dtype) for z in rows], prototypes

    def bottleneck(self, x: Tensor) -> Tensor:
        """Give the rows (n, d) at unit norm that are compared with the prototypes."""
        z = self.mlp(x)
        # fp16 cannot hold 1e-12; the norm itself is taken in fp32 or wider either way.
        wide = z if z.dtype is torch.float64 else z.float()
        return F.normalize(wide, dim=-1, eps=1e-6 if z.dtype is torch.float16 else 1e-12)
