# SPDX-License-Identifier: Apache-2.0
"""Make a run's backbone deeper without changing what it computes, as the start of another run.

Between the blocks there are, copies are put whose LayerScale is zero: they pass every token on as it is, and training
opens them. Heads come along. Shapes: D width.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

import opendino
from opendino.errors import ConfigError
from opendino.models.vit import VisionTransformer
from opendino.models.weights import save_backbone
from opendino.pretrain.initialise import HEADS_FILE


def deepen(model: VisionTransformer, depth: int) -> VisionTransformer:
    """Give a deeper backbone of the same function.

    Args:
        model: with LayerScale.
        depth: blocks wanted, a multiple of those there are.

    Raises:
        ConfigError: for another depth, or a backbone without LayerScale.
    """
    copies, rest = divmod(depth, model.config.depth)
    if rest or model.config.init_values is None:
        raise ConfigError(f"{model.config.depth} blocks with LayerScale become a multiple of them, got {depth}.")
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        head, _, rest_of = name.partition(".")
        if head != "blocks":
            state[name] = value
            continue
        number, _, inner = rest_of.partition(".")
        for copy in range(copies):
            zero = copy > 0 and inner.endswith(".gamma")
            state[f"blocks.{int(number) * copies + copy}.{inner}"] = torch.zeros_like(value) if zero else value.clone()
    deeper = VisionTransformer(model.config.model_copy(update={"depth": depth}), model.preprocess)
    deeper.load_state_dict(state)
    return deeper


def deepened_run(run: Path, out: Path, depth: int) -> Path:
    """Write the deeper teacher of a run, with its heads, as a folder that --init takes; give the folder."""
    (out / "weights").mkdir(parents=True, exist_ok=True)
    save_backbone(deepen(opendino.load(str(run), device="cpu"), depth), out / "weights" / "teacher.safetensors")
    shutil.copy(run / HEADS_FILE, out / HEADS_FILE)
    return out
