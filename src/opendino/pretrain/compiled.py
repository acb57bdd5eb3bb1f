# SPDX-License-Identifier: Apache-2.0
"""torch.compile for a training step, block by block: fused LayerNorm, GELU, LayerScale and residuals.

One block is compiled and its code serves all blocks of its kind, so the time to compile does not grow with the depth.
Losses, heads and optimiser stay as they are: their time is in matrix products and in passes that are already fused.
On a CPU without matrix units a step is nearly all matrix products, and compiling gains nothing there.
"""

from __future__ import annotations

import shutil

import torch
from torch import nn

from opendino.models.layers import Block


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile can build code here: on a CPU it needs a C++ compiler, on CUDA Triton."""
    if device.type == "cpu":
        return any(shutil.which(name) for name in ("g++", "clang++", "c++"))
    return device.type == "cuda" and bool(torch.utils._triton.has_triton())


def compile_blocks(model: nn.Module) -> int:
    """Compile every transformer block of a model in place and give their number.

    Names of parameters and state-dict keys stay. Call it after the model is on its device, and before a wrapper such as
    FSDP is put around the blocks.
    """
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    # Sizes of micro-batches and stochastic-depth subsets change between steps: the second size seen makes the code
    # general instead of building it anew for each.
    for block in blocks:
        block.compile(dynamic=None)
    return len(blocks)
