# SPDX-License-Identifier: Apache-2.0
"""Settings of a distillation, and of a run that trains heads for a frozen teacher. They are those of pre-training and
some more, so a run folder, its checkpoints and its report are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from opendino.pretrain.config import MaskSettings, PretrainConfig, Settings

TIMM = "timm:"
WARM_FOLDER = "warm_heads"
"""Folder, inside that of the distillation, of the run that trains heads."""
Mode = Literal["auto", "paper", "features"]


class FeatureSettings(Settings):
    """How features are compared (AM-RADIO §3.4, PHI-S on normalising; both by Ranzinger et al. 2024)."""

    cls_weight: float = Field(1.0, ge=0, description="of 1 − cosine of the cls tokens")
    patch_weight: float = Field(1.0, ge=0, description="of the loss of the patch tokens")
    cosine_share: float = Field(0.9, ge=0, le=1, description="of the patch loss; the rest is smooth L1")
    standardize: bool = Field(True, description="bring each channel of the teacher to mean 0 and variance 1 first")


class DistillConfig(PretrainConfig):
    """Everything that defines a distillation."""

    teacher: str = Field("", description="frozen teacher: model name, weight file or run folder")
    teacher_heads: str | None = Field(None, description="file with the teacher's heads; default: beside its weights")
    mode: Mode = Field("auto", description="auto: paper where the teacher has heads that fit, else features")
    student: str = Field("vits14", description="architecture, or timm:NAME")
    warm_heads: int = Field(0, ge=0, description="steps in which heads are trained for the frozen teacher first")
    views: int = Field(0, ge=0, description="fixed augmentations of each image; 0 draws fresh ones at every step")
    cache_teacher: str | None = Field(None, description="folder that keeps what the teacher makes of the fixed views")
    cache_dtype: Literal["fp32", "fp16"] = Field("fp32", description="to which the teacher's tokens are rounded")
    features: FeatureSettings = FeatureSettings()
    masks: MaskSettings = MaskSettings(share=0.0)  # the paper's student sees whole crops

    @property
    def timm_name(self) -> str | None:
        """Name of a timm student, or None."""
        return self.student.removeprefix(TIMM) if self.student.startswith(TIMM) else None

    @property
    def heads_file(self) -> str | None:
        """File with the teacher's heads that is not beside its weights, or None."""
        return str(Path(self.out) / WARM_FOLDER / "heads.safetensors") if self.warm_heads else self.teacher_heads

    @model_validator(mode="after")
    def _check_distillation(self) -> DistillConfig:
        if self.stages:
            raise ValueError("a distillation has no stages; for larger crops start another from the first, by --init")
        if self.loss.hog_weight:
            raise ValueError("a distillation learns from its teacher alone; set loss.hog_weight to 0")
        if self.cache_teacher and not self.views:
            raise ValueError("cache_teacher needs fixed augmentations: set views to how many each image gets, e.g. 4")
        if self.timm_name and self.sharding == "fsdp":
            raise ValueError("a timm student cannot be sharded; set sharding to ddp")
        if self.timm_name and self.masks.share:
            raise ValueError("a timm student has no mask token; set masks.share to 0")
        if self.warm_heads and (self.teacher_heads or self.mode == "features"):
            other = "teacher_heads gives some" if self.teacher_heads else "mode features uses none"
            raise ValueError(f"warm_heads trains heads for the teacher, and {other}; leave one of the two out")
        return self


class WarmHeadsConfig(PretrainConfig):
    """A run that trains DINO and iBOT heads for a frozen backbone."""

    frozen_teacher: str = Field("", description="frozen backbone: model name, weight file or run folder")
