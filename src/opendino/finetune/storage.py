# SPDX-License-Identifier: Apache-2.0
"""Linear heads of a fine-tuning run as head files, in the layouts of `heads.Linear` and `heads.Segmenter`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opendino.finetune.settings import FinetuneSettings
from opendino.finetune.tasks import Task
from opendino.heads.storage import describe_backbone, load_head, save_head
from opendino.models.vit import VisionTransformer

BN_EPS = 1e-5


def write_head(
    path: Path, model: VisionTransformer, head: nn.Module, task: Task, name: str, settings: FinetuneSettings,
    **more: float,
) -> None:  # fmt: skip
    """Write a linear head with its classes and a reference to the backbone of its features.

    Args:
        path: of the file.
        model: the backbone.
        head: a linear layer on its cls or patch tokens.
        task: what it is for.
        name: what `opendino.load` takes for the backbone.
        settings: of the run.
        more: further numbers kept with the head.
    """
    state = {key: value.detach().float().cpu() for key, value in head.state_dict().items()}
    if task.name == "classification":
        kind, tensors, described = "Linear", state, _as_linear(task, settings)
    else:
        kind, tensors, described = "Segmenter", _as_decode_head(state), _as_segmenter(task, settings)
    save_head(path, kind, tensors, described | {"finetune": more}, describe_backbone(model, name))


def read_linear(path: Path) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Read what `write_head` wrote: weight (C, D), bias (C,), and "kind", "settings", "backbone"."""
    tensors, described = load_head(path)
    if described["kind"] == "Segmenter":
        return tensors["conv_seg.weight"].flatten(1), tensors["conv_seg.bias"], described
    return tensors["weight"], tensors["bias"], described


def _as_linear(task: Task, settings: FinetuneSettings) -> dict[str, Any]:
    params = {
        "blocks": [1], "averages": [False], "rates": [settings.peak_lr], "steps": None,
        "batch_size": settings.batch_size, "seed": settings.seed,
    }  # fmt: skip
    state = {"kind": [1, False], "rate": settings.peak_lr, "curve": []}
    return {"params": params, "classes": task.classes, "images": task.images, "state": state}


def _as_segmenter(task: Task, settings: FinetuneSettings) -> dict[str, Any]:
    # One square window; an image that is not square is covered by several of them there.
    side = max(task.size)
    protocol = {
        "blocks": 1, "size": side, "crop": side, "stride": side, "scales": [1.0], "flip": False, "ratios": [0.5, 2.0],
    }  # fmt: skip
    training = {
        "steps": settings.epochs * math.ceil(task.num_train / settings.batch_size), "batch_size": settings.batch_size,
        "learning_rate": settings.peak_lr, "weight_decay": settings.weight_decay, "warmup": None, "seed": settings.seed,
    }  # fmt: skip
    return {
        "protocol": protocol, "features": "augmented", "mirror": False, "loss_scale": 1, "classes": task.classes,
        "training": training, "class_pixels": None,
    }  # fmt: skip


def _as_decode_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put a linear layer behind a BatchNorm that changes nothing, which that layout has."""
    width = state["weight"].shape[1]
    return {
        "bn.weight": torch.full((width,), math.sqrt(1 + BN_EPS)),
        "bn.bias": torch.zeros(width),
        "bn.running_mean": torch.zeros(width),
        "bn.running_var": torch.ones(width),
        "bn.num_batches_tracked": torch.tensor(0),
        "conv_seg.weight": state["weight"][:, :, None, None],
        "conv_seg.bias": state["bias"],
    }
