# SPDX-License-Identifier: Apache-2.0
"""Student, teacher and their heads; the three losses of one batch (method.md §2).

Shapes: B images, L local crops each, P patches of a global crop, M masked patches, D width, K prototypes.
Crop order: all first global crops, then all second ones; local crops are crop-major.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from opendino.models.registry import get_config
from opendino.models.vit import VisionTransformer
from opendino.pretrain.centering import MovingCenter, sinkhorn_knopp
from opendino.pretrain.config import LossSettings, PretrainConfig
from opendino.pretrain.heads import DINOHead
from opendino.pretrain.losses import dino_loss, ibot_loss, koleo_loss, mask_weights


@dataclass(frozen=True)
class Crops:
    """Normalised crops of B images on the compute device.

    Attributes:
        global_crops: (2B, C, g, g).
        local_crops: (L·B, C, l, l), or None without local crops.
        masks: bool (2B, P), True where the student sees the mask token.
    """

    global_crops: Tensor
    local_crops: Tensor | None
    masks: Tensor

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

        local = self.local_crops
        return [
            Crops(cut(self.global_crops, i), None if local is None else cut(local, i), cut(self.masks, i))
            for i in range(parts)
        ]


@dataclass(frozen=True)
class Targets:
    """What the teacher says: prototype probabilities, fp32.

    Attributes:
        cls: (2B, K) of the global crops.
        patches: (M, K) of the masked patches, in the order of `masks.flatten().nonzero()`.
        features: (2B, D) teacher cls tokens, for the health figures.
    """

    cls: Tensor
    patches: Tensor
    features: Tensor


class StudentTeacher(nn.Module):
    """A student and its moving average, both with heads; `student` is trained, `teacher` is the result."""

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__()
        self.settings: LossSettings = config.loss
        self.student = _network(config)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        for block in self.teacher["backbone"].blocks:  # type: ignore[union-attr]
            block.drop_path_rate = 0.0
        k = config.heads.num_prototypes
        self.centers = nn.ModuleDict({"dino": MovingCenter(k), "ibot": MovingCenter(k)})

    # --- teacher ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def teacher_logits(self, crops: Crops) -> tuple[Tensor, Tensor, Tensor]:
        """Give cls logits (2B, K), masked-patch logits (M, K) and cls tokens (2B, D) of the unmasked global crops."""
        features = self.teacher["backbone"].forward_features(crops.global_crops)  # type: ignore[operator]
        cls, patches = features["x_norm_clstoken"], features["x_norm_patchtokens"][crops.masks]
        return self.teacher["dino_head"](cls).float(), self._ibot(self.teacher, patches).float(), cls.float()

    @torch.no_grad()
    def targets(self, micro_batches: list[Crops], teacher_temp: float) -> list[Targets]:
        """Give the teacher's targets, centred over the whole batch however it is cut into micro-batches."""
        outputs = [self.teacher_logits(crops) for crops in micro_batches]
        cls = self._center("dino", torch.cat([o[0] for o in outputs]), teacher_temp)
        patches = self._center("ibot", torch.cat([o[1] for o in outputs]), teacher_temp)
        cls_parts = cls.split([len(o[0]) for o in outputs])
        patch_parts = patches.split([len(o[1]) for o in outputs])
        return [Targets(c, p, o[2]) for c, p, o in zip(cls_parts, patch_parts, outputs, strict=True)]

    def _center(self, name: str, logits: Tensor, temp: float) -> Tensor:
        if not len(logits):
            return logits
        if self.settings.centering == "sinkhorn":
            balanced: Tensor = sinkhorn_knopp(logits, temp)
            return balanced
        center = self.centers[name]
        probabilities: Tensor = center.probabilities(logits, temp)  # type: ignore[operator]
        center.update(logits)  # type: ignore[operator]
        return probabilities

    # --- student ---------------------------------------------------------------------------------------------------

    def loss(
        self, crops: Crops, targets: Targets, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the weighted sum of the losses of one micro-batch and its parts, detached.

        Args:
            crops: the crops; the student sees all of them, the globals masked.
            targets: what `targets` gave for the same crops.
            generator: CPU generator of the stochastic-depth subsets.
        """
        groups = [crops.global_crops] + ([] if crops.local_crops is None else [crops.local_crops])
        masks = [crops.masks, None][: len(groups)]
        student = self.student["backbone"].forward_packed(groups, masks, generator)  # type: ignore[operator]
        cls = student[0]["x_norm_clstoken"]
        head = self.student["dino_head"]
        local_logits = head(student[1]["x_norm_clstoken"]) if len(groups) > 1 else None
        s = self.settings
        dino, parts = dino_loss(head(cls), local_logits, targets.cls, s.student_temp)
        total = s.dino_weight * dino
        if s.ibot_weight and len(targets.patches):
            logits = self._ibot(self.student, student[0]["x_norm_patchtokens"][crops.masks])
            weights = mask_weights(crops.masks)
            ibot = ibot_loss(logits, targets.patches, weights, crops.masks.shape[0], s.student_temp)
            total = total + s.ibot_weight * ibot
            parts["ibot"] = ibot.detach()
        if s.koleo_weight:
            koleo = torch.stack([koleo_loss(group) for group in cls.chunk(2)]).sum()
            total = total + s.koleo_weight * koleo
            parts["koleo"] = koleo.detach()
        parts["dino"] = dino.detach()
        return total, parts

    def _ibot(self, network: nn.ModuleDict, patches: Tensor) -> Tensor:
        head = network["ibot_head"] if "ibot_head" in network else network["dino_head"]
        logits: Tensor = head(patches)
        return logits


def backbone_config(config: PretrainConfig) -> dict[str, object]:
    """Give the overrides of the named architecture that a run asks for."""
    wanted = config.model.model_dump(exclude={"arch"}, exclude_none=True)
    return {**wanted, "img_size": config.crops.global_size}


def _network(config: PretrainConfig) -> nn.ModuleDict:
    backbone = VisionTransformer(get_config(config.model.arch, **backbone_config(config)))
    heads = config.heads

    def head(bottleneck_dim: int) -> DINOHead:
        return DINOHead(
            backbone.embed_dim,
            heads.num_prototypes,
            hidden_dim=heads.hidden_dim,
            bottleneck_dim=bottleneck_dim,
            num_layers=heads.num_layers,
            batch_norm=heads.batch_norm,
        )

    network = nn.ModuleDict(
        {"backbone": backbone, "dino_head": head(heads.dino_bottleneck_dim or heads.bottleneck_dim)}
    )
    if heads.separate:
        network["ibot_head"] = head(heads.bottleneck_dim)
    return network
