# SPDX-License-Identifier: Apache-2.0
"""Heads for a frozen backbone that came without: DINO and iBOT as in pre-training, with the backbone held still.

Student and teacher share the frozen weights and differ in their heads only; the teacher's heads, a moving average, are
what a distillation takes its targets from.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opendino.errors import ConfigError
from opendino.models.registry import MODELS
from opendino.models.weights import load
from opendino.pretrain.checkpoint import list_checkpoints, step_of
from opendino.pretrain.config import PretrainConfig
from opendino.pretrain.distill.config import WARM_FOLDER, DistillConfig, WarmHeadsConfig
from opendino.pretrain.distill.matching import check_grids
from opendino.pretrain.distill.students import student_backbone
from opendino.pretrain.distill.teacher import HEADS_FILE, fingerprint_of
from opendino.pretrain.engine import Engine
from opendino.pretrain.lengths import with_steps
from opendino.pretrain.student_teacher import StudentTeacher, make_heads

log = logging.getLogger("opendino")
MASKS = {"share": 0.5, "ratio": (0.1, 0.5)}


class WarmHeads(StudentTeacher):
    """Student and teacher with the same frozen backbone; only the student's heads are trained."""

    def make_student(self, config: WarmHeadsConfig) -> nn.ModuleDict:  # type: ignore[override]
        """Load the backbone and build fresh heads."""
        backbone = load(config.frozen_teacher).train()
        if odd := [s for s in (config.crops.global_size, config.crops.local_size) if s % backbone.patch_size]:
            raise ConfigError(
                f"Crops of {odd[0]} px are no whole patches of {config.frozen_teacher}, whose patches have "
                f"{backbone.patch_size} px. Give --crops.global-size and --crops.local-size that are multiples of it."
            )
        heads = make_heads(config, backbone.embed_dim)
        return nn.ModuleDict({"backbone": backbone.requires_grad_(False), **heads})


class WarmHeadsEngine(Engine):
    """What computes such a run in this process."""

    config: WarmHeadsConfig

    def make_model(self) -> StudentTeacher:
        """Load the backbone and build heads."""
        model = WarmHeads(self.config)
        fingerprint = fingerprint_of(dict(model.student["backbone"].state_dict()))
        model.register_buffer("backbone_fingerprint", torch.tensor(fingerprint))
        return model

    def trained_networks(self) -> dict[str, nn.Module]:
        """Give the student's heads."""
        return {name: module for name, module in self.model.student.items() if name != "backbone"}


def warm_heads_config(config: DistillConfig) -> WarmHeadsConfig:
    """Give the run that trains heads for the teacher of a distillation, in a folder inside that of the distillation.

    Heads, losses, crops, batch, rates and schedules are those of the distillation, over `warm_heads` steps; masks are
    those of pre-training, from which iBOT learns.

    Raises:
        ConfigError: when the student's patches are not those of the teacher, so that paper mode is not to be had.
    """
    values: dict[str, Any] = {k: v for k, v in config.model_dump().items() if k in PretrainConfig.model_fields}
    teacher = load(config.teacher)
    check_grids(config, config.teacher, teacher, student_backbone(config))  # before the time is spent
    backbone = teacher.config
    known = backbone.arch in MODELS
    shape = {"patch_size": backbone.patch_size, "embed_dim": backbone.embed_dim, "depth": backbone.depth}
    values["model"] |= shape | {"num_heads": backbone.num_heads, "in_chans": backbone.in_chans}
    values["model"]["arch"] = backbone.arch if known else "vits14"
    values["masks"] |= MASKS
    values["loss"] |= {"koleo_weight": 0.0}  # it acts on the backbone's tokens, which do not move
    values |= {"probe": None, "out": str(Path(config.out) / WARM_FOLDER)}
    warm = WarmHeadsConfig.model_validate({**values, "frozen_teacher": config.teacher})
    resized = with_steps(warm, config.warm_heads)
    assert isinstance(resized, WarmHeadsConfig)
    return resized


def is_trained(config: WarmHeadsConfig) -> bool:
    """Say whether the run has come to its end."""
    found = list_checkpoints(Path(config.out))
    return bool(found) and step_of(found[-1]) >= config.steps and (Path(config.out) / HEADS_FILE).is_file()
