# SPDX-License-Identifier: Apache-2.0
"""Spreading a model over processes: FSDP2 for large ones, DDP for small ones, nothing for one process."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint


def shard_fully(
    module: nn.Module,
    parts: Iterable[nn.Module],
    *,
    device: torch.device,
    compute_dtype: torch.dtype | None,
    entry_points: Sequence[str] = (),
    reshard_after_forward: bool = True,
) -> None:
    """Shard a module's parameters over all processes, in place (FSDP2).

    Masters stay fp32; parameters are gathered in `compute_dtype` and gradients are reduced in fp32.

    Args:
        module: what is sharded; parameters outside `parts` form one more unit.
        parts: modules inside it that are gathered and freed one after the other, such as blocks.
        device: of the computation.
        compute_dtype: bf16 or fp16, or None for fp32.
        entry_points: methods other than forward that are called from outside.
        reshard_after_forward: free gathered parameters after the forward pass. Must be True for a module whose
            parameters change without a backward pass, such as a teacher: it would go on with the old ones.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    wrap = partial(fully_shard, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    for part in parts:
        wrap(part)
    wrap(module)
    for name in entry_points:
        register_fsdp_forward_method(module, name)
    # The tokens of each crop are views of packed ones; nothing here changes them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def replicate(module: nn.Module, device: torch.device) -> nn.Module:
    """Average the gradients of a module's parameters over all processes (DDP); alone, the module itself."""
    if not (dist.is_available() and dist.is_initialized()):
        return module
    ids = [device.index] if device.type == "cuda" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the argument has another name in newer versions of torch
        # Buffers are equal everywhere already: they are updated from sums over all processes.
        return DistributedDataParallel(module, device_ids=ids, broadcast_buffers=False)


@contextlib.contextmanager
def reduce_gradients(modules: Iterable[nn.Module], now: bool) -> Iterator[None]:
    """Within it, a backward pass reduces gradients over the processes, or with `now=False` only accumulates them."""
    with contextlib.ExitStack() as stack:
        for module in modules:
            if isinstance(module, DistributedDataParallel) and not now:
                stack.enter_context(module.no_sync())
            elif isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(now)
        yield


def checkpoint_activations(modules: Iterable[nn.Module]) -> None:
    """Have each module recompute its activations in the backward pass instead of keeping them; no name changes."""
    for module in modules:
        module.forward = partial(checkpoint, module.forward, use_reentrant=False)


def local(x: Tensor) -> Tensor:
    """Give the part of a sharded tensor that this process holds; any other tensor itself."""
    return x.to_local() if isinstance(x, DTensor) else x


@torch.no_grad()
def whole(x: Tensor) -> Tensor:
    """Gather a sharded tensor; any other tensor is given detached. Every process must call it."""
    return x.full_tensor() if isinstance(x, DTensor) else x.detach()


def staged(x: Tensor) -> Tensor:
    """Copy a tensor to CPU memory of its own; a sharded one stays sharded, over a mesh of CPUs."""
    if not isinstance(x, DTensor):
        return x.detach().to("cpu", copy=True)
    part = x.to_local().detach().to("cpu", copy=True)
    mesh = x.device_mesh if x.device_mesh.device_type == "cpu" else init_device_mesh("cpu", (dist.get_world_size(),))
    copied: Tensor = DTensor.from_local(part, mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride())
    return copied
