# SPDX-License-Identifier: Apache-2.0
"""The same training step with whole logits, as the formulas are written: for tests and for comparisons of memory.

Every token goes through the last block, and logits, log-softmax and targets exist for all rows at once; `loss` and
`targets` give what those of `StudentTeacher` give. One process only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opendino.models.vit import DepthPlan
from opendino.pretrain.centering import MovingCenter, sinkhorn_knopp
from opendino.pretrain.losses import dino_loss, ibot_loss, koleo_loss, mask_weights
from opendino.pretrain.student_teacher import Crops, StudentTeacher


@dataclass(frozen=True)
class WholeTargets:
    """Prototype probabilities of a micro-batch, fp32: `cls` (2B, K), `patches` (M, K); `features` (2B, D)."""

    cls: Tensor
    patches: Tensor
    features: Tensor


class MaterializedStudentTeacher(StudentTeacher):
    """A `StudentTeacher` whose losses are computed by `dino_loss` and `ibot_loss` from whole logits."""

    @torch.no_grad()
    def targets(self, micro_batches: list[Crops], teacher_temp: float) -> list[WholeTargets]:  # type: ignore[override]
        """Give the teacher's targets, centred over all micro-batches."""
        outputs = [self._teacher_logits(crops) for crops in micro_batches]
        parts = []
        for i, name in enumerate(("dino", "ibot")):
            probabilities = self._probabilities(name, torch.cat([o[i] for o in outputs]), teacher_temp)
            parts.append(probabilities.split([len(o[i]) for o in outputs]))
        return [WholeTargets(c, p, o[2]) for c, p, o in zip(*parts, outputs, strict=True)]

    def _teacher_logits(self, crops: Crops) -> tuple[Tensor, Tensor, Tensor]:
        features = self.teacher["backbone"].forward_features(crops.global_crops)  # type: ignore[operator]
        cls, patches = features["x_norm_clstoken"], features["x_norm_patchtokens"][crops.masks]
        heads = self.teacher["dino_head"], self.teacher["ibot_head" if "ibot_head" in self.teacher else "dino_head"]
        return heads[0](cls).float(), heads[1](patches).float(), cls.float()

    def _probabilities(self, name: str, logits: Tensor, temp: float) -> Tensor:
        if not len(logits):
            return logits
        if self.settings.centering == "sinkhorn":
            return sinkhorn_knopp(logits, temp)
        center = self.centers[name]
        assert isinstance(center, MovingCenter)
        probabilities = center.probabilities(logits, temp)
        center.update(logits)
        return probabilities

    def loss(  # type: ignore[override]
        self, crops: Crops, targets: WholeTargets, depth: DepthPlan | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the weighted sum of the losses of one micro-batch and its parts, detached."""
        s = self.settings
        groups = [crops.global_crops] + ([] if crops.local_crops is None else [crops.local_crops])
        masks = [crops.masks, None][: len(groups)]
        student = self.student["backbone"].forward_packed(groups, masks, depth)  # type: ignore[operator]
        cls, head = student[0]["x_norm_clstoken"], self.student["dino_head"]
        global_logits = head(cls)
        local_logits = head(student[1]["x_norm_clstoken"]) if len(groups) > 1 else None
        dino, parts = dino_loss(global_logits, local_logits, targets.cls, s.student_temp)
        parts["dino"] = dino.detach()
        total = s.dino_weight * dino
        if s.ibot_weight:
            own = self.student["ibot_head" if "ibot_head" in self.student else "dino_head"]
            logits = own(student[0]["x_norm_patchtokens"][crops.masks])
            ibot = ibot_loss(logits, targets.patches, mask_weights(crops.masks), len(crops.masks), s.student_temp)
            total = total + s.ibot_weight * ibot
            parts["ibot"] = ibot.detach()
        if s.koleo_weight:
            koleo = torch.stack([koleo_loss(group) for group in cls.chunk(2)]).sum()
            total = total + s.koleo_weight * koleo
            parts["koleo"] = koleo.detach()
        return total, parts
