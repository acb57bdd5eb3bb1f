# SPDX-License-Identifier: Apache-2.0
"""Distillation of features: the student's cls and patch tokens, through one linear adapter each, are to equal the
teacher's on the same crop. Needs no heads and no prototypes.

The losses are those of AM-RADIO (Ranzinger et al. 2024, §3.4): 1 − cosine for the cls token; 0.9 · (1 − cosine) + 0.1 ·
smooth L1 for patches. Before, each channel of the teacher is brought to mean 0 and variance 1 over what was seen so far
("standardisation" in PHI-S, Ranzinger et al. 2024): else the mean that all tokens share is most of every cosine.

Shapes: n crops, P patches, D width of the student, T width of the teacher.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opendino.distributed.collectives import all_sum
from opendino.models.vit import DepthPlan
from opendino.pretrain.distill.config import DistillConfig, FeatureSettings
from opendino.pretrain.distill.students import backbone_of, student_backbone
from opendino.pretrain.distill.teacher import FrozenTeacher
from opendino.pretrain.losses import koleo_loss
from opendino.pretrain.student_teacher import Crops, StudentTeacher

Tokens = tuple[Tensor, Tensor]
"""cls (n, T), patches (n, P, T)."""


@dataclass(frozen=True)
class FeatureTargets:
    """What the teacher made of one micro-batch.

    Attributes:
        tokens: of the global crops, then of the local ones if there are any.
        features: (2B, D), the student's cls tokens of the global crops, filled in by the loss; for the health figures.
    """

    tokens: list[Tokens]
    features: Tensor

    cls: None = None
    """There are no prototypes."""


class FeatureDistillation(StudentTeacher):
    """A student with two adapters, its moving average `teacher`, and the frozen teacher whose tokens are matched.

    Args:
        config: of the distillation.
        frozen: the teacher; its heads are not used.
    """

    teacher_fingerprint: Tensor

    def __init__(self, config: DistillConfig, frozen: FrozenTeacher) -> None:
        self._frozen = (frozen,)  # in a tuple: no part of this module
        super().__init__(config)
        self.features: FeatureSettings = config.features
        width = frozen.backbone.embed_dim
        self.centers = nn.ModuleDict({"cls": ChannelStatistics(width), "patches": ChannelStatistics(width)})
        self.register_buffer("teacher_fingerprint", torch.tensor(frozen.fingerprint))

    @property
    def frozen(self) -> FrozenTeacher:
        """The teacher."""
        return self._frozen[0]

    def make_student(self, config: DistillConfig) -> nn.ModuleDict:  # type: ignore[override]
        """Build the student's backbone and the adapters to the teacher's width."""
        backbone, width = student_backbone(config), self.frozen.backbone.embed_dim
        adapters = {name: nn.Linear(backbone.embed_dim, width) for name in ("cls_adapter", "patch_adapter")}
        return nn.ModuleDict({"backbone": backbone, **adapters})

    # --- teacher ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def targets(self, micro_batches: list[Crops], teacher_temp: float) -> list[FeatureTargets]:  # type: ignore[override]
        """Give the teacher's tokens of every crop, normalised; the temperature is not used."""
        found = [self._all_teacher_tokens(crops) for crops in micro_batches]
        if self.features.standardize:
            every = [tokens for of_one in found for tokens in of_one]
            self._statistics("cls").update([cls for cls, _ in every])
            self._statistics("patches").update([patches.flatten(0, 1) for _, patches in every])
            found = [
                [(self._statistics("cls")(cls), self._statistics("patches")(patches)) for cls, patches in of_one]
                for of_one in found
            ]
        width = backbone_of(self.student).embed_dim
        return [FeatureTargets(t, t[0][0].new_zeros(len(t[0][0]), width)) for t in found]

    def _statistics(self, name: str) -> ChannelStatistics:
        found = self.centers[name]
        assert isinstance(found, ChannelStatistics)
        return found

    def _all_teacher_tokens(self, crops: Crops) -> list[Tokens]:
        if crops.teacher_tokens:
            cls, patches = crops.teacher_tokens[::2], crops.teacher_tokens[1::2]
            return list(zip(cls, patches, strict=True))
        return [self.frozen.tokens(x) for x in (crops.global_crops, crops.local_crops) if x is not None]

    # --- student ---------------------------------------------------------------------------------------------------

    def loss(  # type: ignore[override]
        self, crops: Crops, targets: FeatureTargets, depth: DepthPlan | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the weighted sum of both losses, means over all crops, and of KoLeo if it has a weight.

        Args:
            crops: the student sees all of them, by default unmasked.
            targets: what `targets` gave for the same crops.
            depth: the stochastic-depth draws of these images.
        """
        groups = [crops.global_crops] + ([] if crops.local_crops is None else [crops.local_crops])
        backbone = backbone_of(self.student)
        grids = [backbone.grid_of(x) for x in groups]
        every = [x.new_ones(len(x), h * w, dtype=torch.bool) for x, (h, w) in zip(groups, grids, strict=True)]
        masks = [crops.masks, None][: len(groups)]
        student = backbone.forward_selected(groups, masks, every, depth)
        count = sum(len(x) for x in groups)
        total_cls = total_patches = torch.zeros((), device=crops.global_crops.device)
        for crop, (cls, patches), grid, (target, target_patches) in zip(
            groups, student, grids, targets.tokens, strict=True
        ):
            share = len(crop) / count
            mapped = self.student["patch_adapter"](patches).unflatten(0, (len(crop), -1))
            pair = aligned(mapped, grid, target_patches, self.frozen.backbone.grid_of(crop))
            total_cls = total_cls + share * cosine_distance(self.student["cls_adapter"](cls), target).mean()
            total_patches = total_patches + share * patch_loss(*pair, self.features.cosine_share)
        targets.features.copy_(student[0][0].detach())
        parts = {"feature_cls": total_cls.detach(), "feature_patch": total_patches.detach()}
        total = self.features.cls_weight * total_cls + self.features.patch_weight * total_patches
        if self.settings.koleo_weight:
            koleo = torch.stack([koleo_loss(group) for group in student[0][0].chunk(2)]).sum()
            total = total + self.settings.koleo_weight * koleo
            parts["koleo"] = koleo.detach()
        return total, parts


class ChannelStatistics(nn.Module):
    """Mean and variance of each channel over all rows seen so far, of all processes."""

    count: Tensor
    mean: Tensor
    square: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("square", torch.zeros(width, dtype=torch.float64))

    @torch.no_grad()
    def update(self, rows: list[Tensor]) -> None:
        """Take up rows (m, T); the sums do not depend on how they are cut into groups."""
        values = torch.cat(rows).double()
        sums = all_sum(torch.cat([values.sum(0), values.square().sum(0), values.new_tensor([float(len(values))])]))
        total, squares, number = sums[: len(self.mean)], sums[len(self.mean) : -1], sums[-1]
        count = self.count + number
        self.mean += (total - number * self.mean) / count
        self.square += (squares - number * self.square) / count
        self.count.copy_(count)

    def forward(self, x: Tensor, eps: float = 1e-6) -> Tensor:
        """Bring the channels of (…, T) to mean 0 and variance 1, fp32."""
        scale = (self.square - self.mean.square()).clamp_min(0).add(eps).rsqrt()
        return (x - self.mean.float()) * scale.float()


def aligned(student: Tensor, grid: tuple[int, int], teacher: Tensor, teacher_grid: tuple[int, int]) -> Tokens:
    """Bring patches (n, P, T) of both to the coarser grid of the two, by averaging the patches of the finer one.

    Args:
        student: on `grid`, (h, w).
        grid: of the student.
        teacher: on `teacher_grid`.
        teacher_grid: of the teacher.
    """
    if grid == teacher_grid:
        return student, teacher
    common = (min(grid[0], teacher_grid[0]), min(grid[1], teacher_grid[1]))

    def pooled(x: Tensor, own: tuple[int, int]) -> Tensor:
        picture = x.float().transpose(1, 2).unflatten(2, own)
        return F.adaptive_avg_pool2d(picture, common).flatten(2).transpose(1, 2)

    return pooled(student, grid), pooled(teacher, teacher_grid)


def cosine_distance(x: Tensor, y: Tensor) -> Tensor:
    """Give 1 − cosine of the last axis, in fp32 or wider."""
    wide = x if x.dtype is torch.float64 else x.float()
    return 1 - F.cosine_similarity(wide, y.to(wide.dtype), dim=-1)


def patch_loss(x: Tensor, y: Tensor, cosine_share: float) -> Tensor:
    """Give cosine_share · (1 − cosine) + (1 − cosine_share) · smooth L1, a mean over patches and channels."""
    wide = x if x.dtype is torch.float64 else x.float()
    l1 = F.smooth_l1_loss(wide, y.to(wide.dtype))
    return cosine_share * cosine_distance(wide, y).mean() + (1 - cosine_share) * l1
