# SPDX-License-Identifier: Apache-2.0
"""Do teacher, student and mode go together? Which mode is it, where that was left open?"""

from __future__ import annotations

import logging
from typing import Literal

import torch
from torch import nn

from opendino.errors import ConfigError
from opendino.models.vit import VisionTransformer
from opendino.pretrain.distill.config import DistillConfig
from opendino.pretrain.distill.teacher import FrozenTeacher, num_prototypes

log = logging.getLogger("opendino")


def choose_mode(config: DistillConfig, teacher: FrozenTeacher) -> Literal["paper", "features"]:
    """Say how the student will learn: as asked for, or as in the paper where heads and equal patches allow it.

    Raises:
        ConfigError: when paper mode was asked for and the teacher has no heads.
    """
    if config.mode == "features":
        return "features"
    if config.warm_heads:
        return "paper"
    if teacher.heads is None:
        if config.mode == "paper":
            raise ConfigError(
                f"The teacher {teacher.name} has no DINO and iBOT heads, and --mode paper needs them (published "
                "weights come without). Give --teacher-heads FILE, train heads for it first with --warm-heads 5000, or "
                "take --mode features, which needs none."
            )
        return "features"
    if config.mode == "auto" and (config.timm_name or _patch_size(config) != teacher.backbone.patch_size):
        return "features"
    return "paper"


def check_pair(config: DistillConfig, teacher: FrozenTeacher, student: nn.Module, mode: str) -> None:
    """Refuse a pair that cannot be trained, and warn of one that makes no sense.

    Raises:
        ConfigError: for other numbers of channels, crops that are no whole patches of the teacher, or in paper mode
            other patch grids or numbers of prototypes.
    """
    backbone, crops = teacher.backbone, config.crops
    if backbone.config.in_chans != config.model.in_chans:
        raise ConfigError(
            f"The teacher {teacher.name} is for images of {backbone.config.in_chans} channels and the student for "
            f"{config.model.in_chans}. Give --model.in-chans {backbone.config.in_chans}."
        )
    whole = type(backbone) is VisionTransformer  # a timm model sees to its grid itself
    sizes = [crops.global_size] + ([crops.local_size] if crops.num_local and mode == "features" else [])
    if odd := [s for s in sizes if whole and s % backbone.patch_size]:
        raise ConfigError(
            f"Crops of {odd[0]} px are no whole patches of the teacher {teacher.name}, whose patches have "
            f"{backbone.patch_size} px. Give --crops.global-size and --crops.local-size that are multiples of "
            f"{backbone.patch_size}, and of the student's patch."
        )
    if mode == "paper":
        _check_paper(config, teacher, student)
    ours, theirs = (sum(p.numel() for p in m.parameters()) for m in (student, backbone))
    if ours > theirs:
        log.warning(
            "The student (%.1f M parameters) is larger than its teacher %s (%.1f M): distillation is for the other way "
            "round. Training goes on.",
            ours / 1e6,
            teacher.name,
            theirs / 1e6,
        )


def _check_paper(config: DistillConfig, teacher: FrozenTeacher, student: nn.Module) -> None:
    check_grids(config, teacher.name, teacher.backbone, student)
    assert teacher.heads is not None
    prototypes = num_prototypes(teacher.heads["dino_head"])
    if config.heads.num_prototypes != prototypes:
        raise ConfigError(
            f"The heads of the teacher {teacher.name} have {prototypes} prototypes and the student's have "
            f"{config.heads.num_prototypes}; both must have the same. Give --heads.num-prototypes {prototypes}."
        )


def check_grids(config: DistillConfig, name: str, teacher: VisionTransformer, student: nn.Module) -> None:
    """Refuse a student whose patches are not those of the teacher, for paper mode.

    Raises:
        ConfigError: when they are not.
    """
    blank = torch.empty(1, config.model.in_chans, config.crops.global_size, config.crops.global_size, device="meta")
    grid, teacher_grid = student.grid_of(blank), teacher.grid_of(blank)  # type: ignore[operator]
    if grid != teacher_grid:
        raise ConfigError(
            f"The teacher {name} has patches of {teacher.patch_size} px and the student has "
            f"{student.patch_size} px, which gives {teacher_grid} and {grid} patches; iBOT compares patch by patch. "
            f"Give --model.patch-size {teacher.patch_size}, or --mode features, which aligns grids."
        )


def _patch_size(config: DistillConfig) -> int:
    from opendino.models.registry import get_config

    return config.model.patch_size or get_config(config.model.arch).patch_size
