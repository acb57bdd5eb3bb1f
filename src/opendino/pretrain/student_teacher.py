# SPDX-License-Identifier: Apache-2.0
"""Student, teacher and their heads; the three losses of one batch (method.md §2).

Shapes: B images, L local crops each, P patches of a global crop, M masked patches, D width, K prototypes.
Crop order: all first global crops, then all second ones; local crops are crop-major.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from opendino.errors import ConfigError
from opendino.models.registry import get_config
from opendino.models.vit import DepthPlan, VisionTransformer
from opendino.pretrain.centering import MovingCenter, TargetRows, sinkhorn_offsets
from opendino.pretrain.config import LossSettings, PretrainConfig
from opendino.pretrain.cross_entropy import RowLoss
from opendino.pretrain.heads import DINOHead
from opendino.pretrain.hog import HogTargets
from opendino.pretrain.losses import koleo_loss, mask_weights


@dataclass(frozen=True)
class Crops:
    """Normalised crops of B images on the compute device.

    Attributes:
        global_crops: (2B, C, g, g).
        local_crops: (L·B, C, l, l), or None without local crops.
        masks: bool (2B, P), True where the student sees the mask token.
        scored: bool (2B, P), the patches that the iBOT loss looks at; None: the masked ones.
        identity: what the last numbers of patch tokens predict, (2B, P, I), where `loss.hog_identity` asks for it.
        teacher_tokens: what a frozen teacher made of the crops, when that is known already; crop-major.
    """

    global_crops: Tensor
    local_crops: Tensor | None
    masks: Tensor
    scored: Tensor | None = None
    identity: Tensor | None = None
    teacher_tokens: tuple[Tensor, ...] = ()

    @property
    def looked_at(self) -> Tensor:
        """Patches that the iBOT loss looks at, bool (2B, P)."""
        return self.masks if self.scored is None else self.scored

    @property
    def num_images(self) -> int:
        """Number B of images."""
        return self.global_crops.shape[0] // 2

    def split(self, parts: int) -> list[Crops]:
        """Cut into micro-batches of B / parts images, each with all crops of its images."""
        if parts == 1:
            return [self]
        size = self.num_images // parts

        def cut(x: Tensor, i: int) -> Tensor:
            by_crop: Tensor = x.unflatten(0, (-1, self.num_images))  # (crops, B, ...)
            return by_crop[:, i * size : (i + 1) * size].flatten(0, 1)

        def part(i: int) -> Crops:
            return replace(
                self,
                global_crops=cut(self.global_crops, i),
                local_crops=None if self.local_crops is None else cut(self.local_crops, i),
                masks=cut(self.masks, i),
                scored=None if self.scored is None else cut(self.scored, i),
                identity=None if self.identity is None else cut(self.identity, i),
                teacher_tokens=tuple(cut(tokens, i) for tokens in self.teacher_tokens),
            )

        return [part(i) for i in range(parts)]


@dataclass(frozen=True)
class Targets:
    """What the teacher says about one micro-batch.

    Attributes:
        cls_rows: of the 2B global crops; None when neither DINO nor iBOT has a weight.
        patch_rows: of the M masked (or scored) patches, in the order of `masks.flatten().nonzero()`; None likewise.
        features: (2B, D) teacher cls tokens, for the health figures; the student's, once `loss` has seen them, where
            the teacher is not asked.
    """

    cls_rows: TargetRows | None
    patch_rows: TargetRows | None
    features: Tensor

    @property
    def cls(self) -> Tensor | None:
        """Prototype probabilities of the global crops, (2B, K) fp32, computed at each call."""
        return None if self.cls_rows is None else self.cls_rows.probabilities()

    @property
    def patches(self) -> Tensor | None:
        """Prototype probabilities of the masked patches, (M, K) fp32, computed at each call."""
        return None if self.patch_rows is None else self.patch_rows.probabilities()


class StudentTeacher(nn.Module):
    """A student and its moving average, both with heads; `student` is trained, `teacher` is the result."""

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__()
        self.settings: LossSettings = config.loss
        self.student = self.make_student(config)
        if not self.settings.asks_teacher:  # heads that no loss looks at stay as they are
            for part in self.student.values():
                part.requires_grad_(not isinstance(part, DINOHead))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        for block in self.teacher["backbone"].blocks:  # type: ignore[union-attr]
            block.drop_path_rate = 0.0
        k = config.heads.num_prototypes
        self.centers = nn.ModuleDict({"dino": MovingCenter(k), "ibot": MovingCenter(k)})
        self.hog = make_hog(config) if config.loss.hog_weight else None

    def make_student(self, config: PretrainConfig) -> nn.ModuleDict:
        """Build what is trained: "backbone" and heads."""
        backbone = VisionTransformer(get_config(config.model.arch, **backbone_config(config)))
        return nn.ModuleDict({"backbone": backbone, **make_heads(config, backbone.embed_dim)})

    @property
    def target_heads(self) -> nn.ModuleDict:
        """Network whose heads make the targets."""
        return self.teacher

    def forward(
        self, crops: Crops, targets: Targets, depth: DepthPlan | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Give `loss`, so that a wrapper around the module sees the call."""
        return self.loss(crops, targets, depth)

    # --- teacher ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def targets(self, micro_batches: list[Crops], teacher_temp: float) -> list[Targets]:
        """Give the teacher's targets, centred over the batch of all processes however it is cut into micro-batches."""
        if not self.settings.asks_teacher:
            return [self._no_targets(crops) for crops in micro_batches]
        tokens = [self._teacher_tokens(crops) for crops in micro_batches]
        cls_rows, patch_rows = self._target_rows([t[0] for t in tokens], [t[1] for t in tokens], teacher_temp)
        return [Targets(c, p, t[0].float()) for c, p, t in zip(cls_rows, patch_rows, tokens, strict=True)]

    def _no_targets(self, crops: Crops) -> Targets:
        width = self.student["backbone"].embed_dim
        assert isinstance(width, int)
        return Targets(None, None, crops.global_crops.new_zeros(len(crops.global_crops), width))

    def _teacher_tokens(self, crops: Crops) -> tuple[Tensor, Tensor]:
        """cls tokens (2B, D) and masked patches (M, D) of the unmasked global crops."""
        [tokens] = self.teacher["backbone"].forward_selected(  # type: ignore[operator]
            [crops.global_crops], [None], [crops.looked_at]
        )
        return tokens  # type: ignore[no-any-return]

    def _target_rows(
        self, cls: list[Tensor], patches: list[Tensor], temp: float
    ) -> tuple[list[TargetRows], list[TargetRows]]:
        heads = self.target_heads
        if "ibot_head" in heads:
            cls_z, cls_prototypes = heads["dino_head"](cls)
            patch_z, patch_prototypes = heads["ibot_head"](patches)
        else:
            z, cls_prototypes = heads["dino_head"](cls + patches)
            cls_z, patch_z, patch_prototypes = z[: len(cls)], z[len(cls) :], cls_prototypes
        return self._center("dino", cls_z, cls_prototypes, temp), self._center("ibot", patch_z, patch_prototypes, temp)

    def _center(self, name: str, rows: list[Tensor], prototypes: Tensor, temp: float) -> list[TargetRows]:
        everything = torch.cat(rows)
        if self.settings.centering == "sinkhorn":
            offsets = sinkhorn_offsets(everything, prototypes, temp)
        else:
            center = self.centers[name]
            assert isinstance(center, MovingCenter)
            offsets = center.offsets(temp)
            center.update_rows(everything, prototypes)
        return [TargetRows(z, prototypes, temp, offsets) for z in rows]

    # --- student ---------------------------------------------------------------------------------------------------

    def loss(self, crops: Crops, targets: Targets, depth: DepthPlan | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the weighted sum of the losses of one micro-batch and its parts, detached.

        Each head is called once, with whatever number of rows.

        Args:
            crops: the crops; the student sees all of them, the globals masked.
            targets: what `targets` gave for the same crops.
            depth: the stochastic-depth draws of these images (`opendino.pretrain.depth.DepthDraws`).
        """
        groups = [crops.global_crops] + ([] if crops.local_crops is None else [crops.local_crops])
        looked_at = crops.looked_at
        every_patch = self.hog is not None and self.settings.hog_patches == "all"
        described = torch.ones_like(looked_at) if every_patch else looked_at
        masks, wanted = ([x, None][: len(groups)] for x in (crops.masks, described))
        student = self.student["backbone"].forward_selected(groups, masks, wanted, depth)  # type: ignore[operator]
        cls, patches = student[0]
        self.notice_student(cls, targets)
        total, parts = cls.new_zeros((), dtype=torch.float32), dict[str, Tensor]()
        if self.settings.asks_teacher:
            masked = patches[looked_at.flatten()] if every_patch else patches
            total, parts = self._cross_entropies([tokens for tokens, _ in student], masked, crops, targets)
            parts["dino"] = parts["dino_global"] + parts["dino_local"]
        if self.settings.koleo_weight:
            koleo = torch.stack([koleo_loss(group) for group in cls.chunk(2)]).sum()
            total = total + self.settings.koleo_weight * koleo
            parts["koleo"] = koleo.detach()
        if self.hog is not None:
            hog, more = self.hog.loss(cls, patches, crops.global_crops, described, crops.identity)
            total, parts = total + self.settings.hog_weight * hog, parts | more
        return total, parts

    def notice_student(self, cls: Tensor, targets: Targets) -> None:
        """See the student's cls tokens of the global crops, (2B, D)."""
        if not self.settings.asks_teacher:
            targets.features.copy_(cls.detach())

    def _cross_entropies(
        self, cls: list[Tensor], patches: Tensor, crops: Crops, targets: Targets
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """DINO and iBOT from the cls tokens of global (and local) crops and the masked patches."""
        s = self.settings
        assert targets.cls_rows is not None
        assert targets.patch_rows is not None
        dino = dino_rows(targets.cls_rows, len(cls[0]), [len(c) for c in cls[1:]], s.dino_weight)
        own = torch.arange(len(patches), device=patches.device).unsqueeze(1)
        weights = mask_weights(crops.looked_at) / len(crops.masks)
        ibot = [RowLoss(targets.patch_rows, own, weights, s.ibot_weight)] if s.ibot_weight else []
        extra = [patches][: len(ibot)]
        if "ibot_head" in self.student and ibot:
            total, cls_parts = self.student["dino_head"](cls, dino, s.student_temp)
            more, patch_parts = self.student["ibot_head"](extra, ibot, s.student_temp)
            total, values = total + more, torch.cat([cls_parts, patch_parts])
        else:
            total, values = self.student["dino_head"](cls + extra, dino + ibot, s.student_temp)
        names = ["dino_global", *["dino_local"] * (len(cls) - 1), *["ibot"] * len(ibot)]
        zero = {"dino_local": values.new_zeros(())}
        return total, zero | dict(zip(names, values.unbind(), strict=True))


def dino_rows(targets: TargetRows, num_global: int, num_local: Sequence[int], factor: float) -> list[RowLoss]:
    """Write `dino_loss` as rows: the other global crop's target for each global crop, both targets for each local.

    Args:
        targets: of the 2B global crops.
        num_global: 2B.
        num_local: [L·B], or [] without local crops.
        factor: weight of the loss.
    """
    images, device = num_global // 2, targets.z.device
    pairs = images * (2 + 2 * (sum(num_local) // images))
    image = torch.arange(images, device=device)

    def rows(index: Tensor) -> RowLoss:
        return RowLoss(targets, index, torch.full((len(index),), 1 / pairs, device=device), factor)

    result = [rows(torch.cat([image + images, image]).unsqueeze(1))]
    for count in num_local:
        result.append(rows(torch.stack([image, image + images], 1).repeat(count // images, 1)))
    return result


def make_hog(config: PretrainConfig) -> HogTargets:
    """Make the targets of `loss.hog_weight`, without their components.

    Raises:
        ConfigError: for images that are not of three channels, or more numbers of identity than a token has.
    """
    crops = config.crops
    if len(crops.mean) != 3:
        raise ConfigError(f"loss.hog_weight needs images of 3 channels, got {len(crops.mean)}. Set it to 0.")
    backbone = get_config(config.model.arch, **backbone_config(config))
    if config.loss.hog_identity >= backbone.embed_dim:
        raise ConfigError(
            f"loss.hog_identity must leave some of the {backbone.embed_dim} numbers of a patch token to the patch, got "
            f"{config.loss.hog_identity}. A third of them is a good start."
        )
    return HogTargets(backbone.embed_dim, backbone.patch_size, crops.mean, crops.std, config.loss.hog_identity)


def backbone_config(config: PretrainConfig) -> dict[str, object]:
    """Give the overrides of the named architecture that a run asks for."""
    wanted = config.model.model_dump(exclude={"arch"}, exclude_none=True)
    return {**wanted, "img_size": config.crops.global_size}


def make_heads(config: PretrainConfig, width: int) -> dict[str, DINOHead]:
    """Build the heads of a backbone of some width: "dino_head", and "ibot_head" where iBOT has its own."""
    heads = config.heads

    def head(bottleneck_dim: int) -> DINOHead:
        return DINOHead(
            width,
            heads.num_prototypes,
            hidden_dim=heads.hidden_dim,
            bottleneck_dim=bottleneck_dim,
            num_layers=heads.num_layers,
            batch_norm=heads.batch_norm,
        )

    found = {"dino_head": head(heads.dino_bottleneck_dim or heads.bottleneck_dim)}
    if heads.separate:
        found["ibot_head"] = head(heads.bottleneck_dim)
    return found
