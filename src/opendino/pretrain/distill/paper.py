# SPDX-License-Identifier: Apache-2.0
"""Distillation as in the paper (DINOv2 §5): the losses of pre-training against the targets of a frozen larger teacher.

The student sees unmasked crops, iBOT looks at all patches of the global ones, and its moving average is the result.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from opendino.pretrain.distill.config import DistillConfig
from opendino.pretrain.distill.students import backbone_of, student_backbone
from opendino.pretrain.distill.teacher import FrozenTeacher
from opendino.pretrain.student_teacher import Crops, StudentTeacher, Targets, make_heads


class PaperDistillation(StudentTeacher):
    """A student with heads, its moving average `teacher`, and the frozen teacher whose heads give the targets.

    Args:
        config: of the distillation.
        frozen: the teacher, with heads.
    """

    teacher_fingerprint: Tensor

    def __init__(self, config: DistillConfig, frozen: FrozenTeacher) -> None:
        self._frozen = (frozen,)  # in a tuple: no part of this module
        super().__init__(config)
        self.register_buffer("teacher_fingerprint", torch.tensor(frozen.fingerprint))

    @property
    def frozen(self) -> FrozenTeacher:
        """The teacher."""
        return self._frozen[0]

    def make_student(self, config: DistillConfig) -> nn.ModuleDict:  # type: ignore[override]
        """Build the student's backbone and heads of its own width."""
        backbone = student_backbone(config)
        return nn.ModuleDict({"backbone": backbone, **make_heads(config, backbone.embed_dim)})

    @property
    def target_heads(self) -> nn.ModuleDict:
        """Heads of the frozen teacher."""
        assert self.frozen.heads is not None
        return self.frozen.heads

    @torch.no_grad()
    def targets(self, micro_batches: list[Crops], teacher_temp: float) -> list[Targets]:
        """Give the frozen teacher's targets; their `features` are the student's, once `loss` has seen them."""
        width = backbone_of(self.student).embed_dim
        return [
            replace(t, features=t.features.new_zeros(len(t.features), width))
            for t in super().targets(micro_batches, teacher_temp)
        ]

    def _teacher_tokens(self, crops: Crops) -> tuple[Tensor, Tensor]:
        """cls tokens (2B, D) and all patches (2B·P, D) of the global crops."""
        cls, patches = crops.teacher_tokens[:2] or self.frozen.tokens(crops.global_crops)
        return cls, patches.flatten(0, 1)

    def notice_student(self, cls: Tensor, targets: Targets) -> None:
        """Leave the student's cls tokens of the global crops for the health figures."""
        targets.features.copy_(cls.detach())
