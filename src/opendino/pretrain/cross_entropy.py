# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy over prototypes that never holds all logits: rows are worked off in chunks, gradients included.

With student logits s = z·ŵᵀ/τ, ŵ the prototypes at unit norm, and a target t that sums to J, the gradient of one row's
cross-entropy with respect to its logits is J·softmax(s) − t. So a chunk's logits and targets are used once, in the
forward pass, and only the gradients of z (n, d) and of the prototypes (K, d) stay for the backward pass.

Products run in the autocast dtype, sums over a row and over chunks in fp32 (float64 stays float64).

Shapes: n student rows, d bottleneck, K prototypes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opendino.pretrain.centering import TargetRows, chunk_rows

FP16_GAIN = 64.0
"""Factor on logit gradients in fp16, where one of 65 536 prototypes would fall below the smallest normal number."""
BLOCK = 2**14
"""Prototypes whose gradient is added at a time, so that half-precision products do not become fp32 all at once."""


@dataclass(frozen=True)
class RowLoss:
    """One loss over some student rows: factor · Σ_i weights_i · cross-entropy(Σ_j targets[index_ij], row i).

    Attributes:
        targets: what the teacher says.
        index: (n, J) int64, the target rows whose sum row i is compared with.
        weights: (n,) fp32, of the rows.
        factor: of the whole loss in the total.
    """

    targets: TargetRows
    index: Tensor
    weights: Tensor
    factor: float = 1.0


def prototype_cross_entropy(
    z: Tensor, prototypes: Tensor, losses: Sequence[RowLoss], student_temp: float, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Compute several losses of student rows over the same prototypes.

    Args:
        z: bottleneck rows of all losses one after the other, (n, d).
        prototypes: (K, d), of any norm; used at unit norm.
        losses: the rows of each, in the order of z.
        student_temp: softmax temperature τ of the student.
        chunk: rows whose logits exist at a time; None fits the device.

    Returns:
        Σ factor · loss, and the losses without their factors, (len(losses),), detached.
    """
    assert len(z) == sum(len(loss.index) for loss in losses), "a row belongs to exactly one loss"
    out: tuple[Tensor, Tensor] = _CrossEntropy.apply(z, prototypes, losses, student_temp, chunk)
    return out


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast gives a product of x, or that of x."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype is not torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


@torch.no_grad()
def unit_rows(weight: Tensor, dtype: torch.dtype, eps: float = 1e-12) -> Tensor:
    """Divide each row by its norm, which is taken in fp32 or wider, and round to `dtype`."""
    out = torch.empty_like(weight, dtype=dtype)
    for rows, source in zip(out.split(BLOCK), weight.split(BLOCK), strict=True):
        rows.copy_(F.normalize(_wide(source), dim=1, eps=eps))
    return out


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float64 else x.float()


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, prototypes: Tensor, losses: Sequence[RowLoss], temp: float, chunk: int | None
    ) -> tuple[Tensor, Tensor]:
        dtype = compute_dtype(z)
        with torch.autocast(z.device.type, enabled=False):
            work = _Work(z, prototypes, dtype, temp, losses, with_grad=any(ctx.needs_input_grad[:2]))
            start, parts = 0, []
            for loss in losses:
                parts.append(work.add(loss, start, chunk))
                start += len(loss.index)
            grad_z, grad_prototypes = work.gradients(prototypes)
        ctx.gradients = [grad_z, grad_prototypes]
        values = torch.stack(parts)
        total = sum((value * loss.factor for value, loss in zip(parts, losses, strict=True)), z.new_zeros(()))
        ctx.mark_non_differentiable(values)
        return total.to(values.dtype), values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("The chunked cross-entropy can be differentiated once only.")
        # Handed over and scaled in place: memory is at its peak, and autograd copies what anybody else still holds.
        scaled, ctx.gradients = [saved.mul_(grads[0].to(saved.dtype)) for saved in ctx.gradients], None
        return *scaled, None, None, None


class _Work:
    """The sums that grow from chunk to chunk."""

    def __init__(
        self,
        z: Tensor,
        prototypes: Tensor,
        dtype: torch.dtype,
        temp: float,
        losses: Sequence[RowLoss],
        with_grad: bool,
    ) -> None:
        self.temp, self.dtype, self.with_grad = temp, dtype, with_grad
        self.gain = FP16_GAIN if dtype is torch.float16 else 1.0
        self.z = _wide(z)
        self.unit = unit_rows(prototypes, dtype)
        self.grad_z = torch.zeros_like(self.z) if with_grad else self.z.new_zeros(0)
        self.grad_unit = torch.zeros_like(prototypes, dtype=self.z.dtype) if with_grad else self.z.new_zeros(0)
        self.z_dtype = z.dtype
        weights = [loss.weights.amax() * abs(loss.factor) for loss in losses if len(loss.weights)]
        self.largest = torch.stack([self.z.new_tensor(1e-30), *weights]).amax().to(self.z.dtype)

    def add(self, loss: RowLoss, start: int, chunk: int | None) -> Tensor:
        """Add one loss, whose rows begin at `start`, and give its value without its factor."""
        rows, total = len(loss.index), self.z.new_zeros(())
        # Rows with the same targets side by side, so that a chunk makes each target once.
        order = loss.index[:, 0].argsort(stable=True)
        for part in order.split(chunk or chunk_rows(len(self.unit), self.z.device)) if rows else ():
            total = total + self._chunk(loss, part, start)
        return total

    def _chunk(self, loss: RowLoss, part: Tensor, start: int) -> Tensor:
        z, weights = self.z[start + part], loss.weights[part].to(self.z.dtype)
        target = _targets(loss.targets, loss.index[part])
        mass = float(loss.index.shape[1])
        logits = _wide((z / self.temp).to(self.dtype) @ self.unit.T)
        agreement = torch.bmm(target.unsqueeze(1), logits.unsqueeze(2)).flatten()
        largest = logits.amax(1, keepdim=True)
        p = logits.sub_(largest).exp_()
        norm = p.sum(1, keepdim=True)
        value = ((norm.log() + largest).squeeze(1) * mass - agreement) @ weights
        if self.with_grad:
            # Weights, divided by their largest, go on the small side of both products; so the large side stays in the
            # range of fp16. What is left out here is multiplied in at the end.
            grad = p.mul_(mass * self.gain / norm).sub_(target, alpha=self.gain).to(self.dtype)
            share = (weights * (loss.factor / self.largest)).unsqueeze(1)
            self.grad_z[start + part] = _wide(grad @ self.unit) * share
            small = (z * share).to(self.dtype)
            for sums, columns in zip(self.grad_unit.split(BLOCK), grad.split(BLOCK, dim=1), strict=True):
                sums.add_(columns.T @ small)
        return value

    def gradients(self, prototypes: Tensor, eps: float = 1e-12) -> tuple[Tensor, Tensor]:
        """Give the gradients of z and, through the normalisation, of the prototypes."""
        if not self.with_grad:
            return self.grad_z, self.grad_unit
        weight, grad = _wide(prototypes), self.grad_unit
        norm = torch.linalg.vector_norm(weight, dim=1, keepdim=True)
        along = torch.bmm(weight.unsqueeze(1), grad.unsqueeze(2)).squeeze(2) / norm.square().clamp_min(eps**2)
        along = along.masked_fill(norm < eps, 0)  # a row at the bound is only divided by it
        left_out = self.largest / (self.temp * self.gain)
        grad.addcmul_(weight, along, value=-1).mul_(left_out / norm.clamp_min(eps))
        return self.grad_z.mul_(left_out).to(self.z_dtype), grad.to(prototypes.dtype)


def _targets(rows: TargetRows, index: Tensor) -> Tensor:
    """Sum the target rows of each line of an index (n, J) → (n, K)."""
    if index.shape[1] == 1:
        return rows.probabilities(index[:, 0])
    unique, where = index.unique(return_inverse=True)
    single = rows.probabilities(unique)
    total = single[where[:, 0]]
    for column in where.T[1:]:
        total += single[column]
    return total
