# SPDX-License-Identifier: Apache-2.0
"""Sums and rows over all processes of a run; with one process every call returns its input.

Convention of the losses: the loss of a run is the mean over processes of what each computes, because both DDP and FSDP
average gradients. So the gradient of a differentiable collective is the sum over processes of the gradients that its
output got, and nothing here divides.

Shapes: W processes, n rows of each.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number W of processes."""
    return dist.get_world_size() if _running() else 1


def rank() -> int:
    """Number of this process, 0 to W − 1."""
    return dist.get_rank() if _running() else 0


def is_main() -> bool:
    """Whether this is process 0, the one that prints and writes single files."""
    return rank() == 0


@torch.no_grad()
def all_sum(x: Tensor) -> Tensor:
    """Sum a tensor over the processes, element by element; no gradient. The input is left as it is."""
    if world_size() == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total


@torch.no_grad()
def all_max(x: Tensor) -> Tensor:
    """Largest value over the processes, element by element; no gradient. The input is left as it is."""
    if world_size() == 1:
        return x
    largest = x.detach().clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def all_sum_with_grad(x: Tensor) -> Tensor:
    """Sum a tensor over the processes; its gradient is the sum of the gradients of all processes."""
    if world_size() == 1:
        return x
    total: Tensor = _AllSum.apply(x)
    return total


def gather_rows(x: Tensor) -> Tensor:
    """Put the rows of all processes together, process 0 first: (n, …) → (W·n, …), n the same everywhere.

    Differentiable: each row gets the sum of the gradients that it received in all processes.
    """
    if world_size() == 1:
        return x
    rows: Tensor = _GatherRows.apply(x)
    return rows


def all_true(flag: bool, device: torch.device | str = "cpu") -> bool:
    """Say whether `flag` holds in every process."""
    return bool(all_sum(torch.tensor(float(not flag), device=device)) == 0)


def broadcast_object(value: Any) -> Any:
    """Give every process the value that process 0 holds; it must be picklable."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        dist.barrier()


def _running() -> bool:
    return dist.is_available() and dist.is_initialized()


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_sum(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return all_sum(grads[0])


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        # gloo has no reduce-scatter in every version; the sum of all rows is small (a batch of cls tokens).
        return all_sum(grads[0]).chunk(world_size())[rank()]
