# SPDX-License-Identifier: Apache-2.0
"""How student and teacher are spread over the processes of a run, and how the whole teacher comes back."""

from __future__ import annotations

import torch
from torch import nn

from opendino.distributed.collectives import world_size
from opendino.distributed.sharding import checkpoint_activations, replicate, shard_fully, whole
from opendino.errors import ConfigError
from opendino.models.vit import VisionTransformer
from opendino.pretrain.compiled import can_compile, compile_blocks
from opendino.pretrain.config import PretrainConfig
from opendino.pretrain.student_teacher import StudentTeacher

FSDP_FROM = 100_000_000
"""Trained parameters from which `--sharding auto` shards instead of keeping copies: ViT-L and larger."""
ENTRY_POINTS = ("forward_features", "forward_selected")
"""Methods of the backbone that training calls."""


def spread(
    model: StudentTeacher, config: PretrainConfig, device: torch.device, compute_dtype: torch.dtype | None
) -> nn.Module:
    """Put the model on its device and spread it over the processes; give the module whose call computes the loss.

    One process: as it is. Several: FSDP2 shards student and teacher by blocks, or DDP keeps copies and averages the
    student's gradients (`config.sharding`).
    """
    student = model.student["backbone"]
    if config.activation_checkpointing:
        checkpoint_activations(student.blocks)  # type: ignore[arg-type]
    if wants_compile(config, device):
        for network in (model.student, model.teacher):
            compile_blocks(network["backbone"])
    if not uses_fsdp(model, config):
        return replicate(model.to(device), device)
    for network in (model.student, model.teacher):
        for name, module in network.items():
            is_backbone = name == "backbone"
            shard_fully(
                module,
                module.blocks if is_backbone else (),  # type: ignore[arg-type]
                device=device,
                compute_dtype=compute_dtype,
                entry_points=ENTRY_POINTS if is_backbone else (),
            )
    return model.to(device)


def wants_compile(config: PretrainConfig, device: torch.device) -> bool:
    """Say whether blocks are to be compiled.

    Auto compiles on CUDA only: on a CPU it gains nothing and takes a minute (benchmarks/RESULTS.md).

    Raises:
        ConfigError: when it was asked for and there is no compiler.
    """
    if config.compile == "auto":
        return device.type == "cuda" and can_compile(device)
    if config.compile == "on" and not can_compile(device):
        raise ConfigError(
            "--compile on needs a C++ compiler on a CPU and Triton on CUDA, and none was found. Install one (g++ or "
            "clang++), or leave --compile at auto."
        )
    return config.compile == "on"


def uses_fsdp(model: StudentTeacher, config: PretrainConfig) -> bool:
    """Say whether the model is to be sharded."""
    if world_size() == 1 or config.sharding == "ddp":
        return False
    return config.sharding == "fsdp" or sum(p.numel() for p in model.student.parameters()) >= FSDP_FROM


def whole_teacher(model: StudentTeacher) -> VisionTransformer:
    """Give the teacher's backbone with all of its weights; every process must call it.

    A sharded one is gathered into a fresh backbone on the CPU.
    """
    backbone = model.teacher["backbone"]
    assert isinstance(backbone, VisionTransformer)
    state = backbone.state_dict()
    gathered = {k: whole(v) for k, v in state.items()}
    if all(gathered[k].data_ptr() == state[k].data_ptr() for k in state):
        return backbone
    with torch.device("meta"):
        fresh = VisionTransformer(backbone.config, backbone.preprocess)
    fresh.load_state_dict({k: v.cpu() for k, v in gathered.items()}, assign=True)
    return fresh
