# SPDX-License-Identifier: Apache-2.0
"""AdamW with per-parameter multipliers, clipping by network, and the teacher's moving average (method.md §2)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from opendino.distributed.sharding import local

Group = dict[str, Any]


def parameter_groups(
    networks: Mapping[str, nn.Module], *, layerwise_decay: float, patch_embed_lr_mult: float
) -> list[Group]:
    """Sort parameters by their multipliers of learning rate and weight decay.

    Layer 0 is the embeddings and tokens, block i is layer i + 1, the final norm is depth + 1; a backbone parameter of
    layer l gets lr × layerwise_decay^(depth + 1 − l), the patch embedding another × patch_embed_lr_mult. Heads get
    lr × 1. Biases and all 1-D tensors (norms, LayerScale gammas) get no weight decay.

    Args:
        networks: "backbone" and heads.
        layerwise_decay: 1.0 turns the decay by layer off.
        patch_embed_lr_mult: for the patch convolution.
    """
    groups: dict[tuple[float, float, bool, bool], Group] = {}
    for network, module in networks.items():
        depth = len(module.blocks) if network == "backbone" else 0  # type: ignore[arg-type]
        for name, parameter in module.named_parameters():
            lr = 1.0
            if network == "backbone":
                lr = layerwise_decay ** (depth + 1 - _layer(name, depth))
                lr *= patch_embed_lr_mult if name.startswith("patch_embed.") else 1.0
            decay = 0.0 if parameter.ndim < 2 or name.endswith(".bias") else 1.0
            last_layer = "last_layer" in name
            key = (lr, decay, last_layer, network == "backbone")
            new: Group = {"params": [], "names": [], "lr_multiplier": lr, "wd_multiplier": decay}
            kind = {"is_last_layer": last_layer, "is_backbone": network == "backbone"}
            group = groups.setdefault(key, new | kind)
            group["params"].append(parameter)
            group["names"].append(f"{network}.{name}")
    return list(groups.values())


def _layer(name: str, depth: int) -> int:
    block = re.match(r"blocks\.(\d+)\.", name)
    if block:
        return int(block[1]) + 1
    return depth + 1 if name.startswith("norm.") else 0


def build_adamw(groups: list[Group], betas: tuple[float, float] = (0.9, 0.999)) -> torch.optim.AdamW:
    """Make the optimiser; rates are set by `apply_schedule` before every step."""
    fused = all(p.device.type in ("cpu", "cuda", "mps") for g in groups for p in g["params"])
    keep = [{k: v for k, v in g.items() if k != "names"} for g in groups]
    return torch.optim.AdamW(keep, lr=0.0, betas=betas, weight_decay=0.0, fused=fused)


def apply_schedule(
    optimizer: torch.optim.Optimizer,
    lr: float,
    weight_decay: float,
    last_layer_lr: float,
    backbone_lr: float | None = None,
) -> None:
    """Set the learning rate and weight decay of every group by its multipliers; the backbone may have its own rate."""
    of_backbone = lr if backbone_lr is None else backbone_lr
    for group in optimizer.param_groups:
        base = last_layer_lr if group["is_last_layer"] else of_backbone if group["is_backbone"] else lr
        group["lr"] = base * group["lr_multiplier"]
        group["weight_decay"] = weight_decay * group["wd_multiplier"]


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]) -> dict[str, Tensor]:
    """Give AdamW's state by parameter names, for a checkpoint that any number of processes can read.

    A parameter without a state yet gets the one that its first step would give it, so that there is always something to
    load into. Sharded parameters have sharded moments.

    Args:
        optimizer: AdamW of `build_adamw`.
        names: of every parameter.

    Returns:
        "<name>.exp_avg", "<name>.exp_avg_sq" and "<name>.step", the tensors themselves.
    """
    tensors = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device if group["fused"] else "cpu")
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            tensors.update({f"{names[p]}.{key}": value for key, value in state.items()})
    return tensors


def clip_each(networks: Mapping[str, nn.Module], max_norm: float) -> dict[str, Tensor]:
    """Clip the gradient of each network to `max_norm` and give the norms before clipping."""
    return {name: nn.utils.clip_grad_norm_(module.parameters(), max_norm) for name, module in networks.items()}


@torch.no_grad()
def ema_update(teacher: Iterable[Tensor], student: Iterable[Tensor], momentum: float) -> None:
    """teacher ← momentum · teacher + (1 − momentum) · student, in one pass; sharded tensors shard by shard.

    Both sides must be sharded alike: then each process averages what it holds, without talking to the others.
    """
    torch._foreach_lerp_([local(t) for t in teacher], [local(s) for s in student], 1 - momentum)
