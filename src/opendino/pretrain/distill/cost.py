# SPDX-License-Identifier: Apache-2.0
"""What a distillation step costs in arithmetic: counted as `opendino.pretrain.flops` counts pre-training."""

from __future__ import annotations

import copy

import torch
from torch.utils.flop_counter import FlopCounterMode

from opendino.models.vit import VisionTransformer
from opendino.native.attention import let_torch_count
from opendino.pretrain.distill.config import DistillConfig
from opendino.pretrain.distill.students import backbone_of
from opendino.pretrain.distill.teacher import FrozenTeacher
from opendino.pretrain.flops import block_flops, embed_flops, head_flops
from opendino.pretrain.student_teacher import StudentTeacher


def distill_flops(config: DistillConfig, teacher: FrozenTeacher, model: StudentTeacher) -> float:
    """Count the FLOPs of one step per image: the teacher's forward, three times the student's, and the heads.

    A cached teacher is counted as if it ran.
    """
    crops, heads = config.crops, config.heads
    student = backbone_of(model.student)
    paper = "dino_head" in model.student

    def passes(backbone: VisionTransformer, local: bool) -> float:
        total = 2 * forward_flops(backbone, crops.global_size)
        return total + (crops.num_local * forward_flops(backbone, crops.local_size) if local and crops.num_local else 0)

    total = passes(teacher.backbone, local=not paper) + 3 * passes(student, local=True)
    blank = torch.empty(1, student.config.in_chans, crops.global_size, crops.global_size, device="meta")
    h, w = student.grid_of(blank)
    if not paper:
        return total + 6 * student.embed_dim * teacher.backbone.embed_dim * (2 * (1 + h * w) + crops.num_local)
    rows = {"dino": 2 + crops.num_local, "ibot": 2 * h * w}
    for name, count in rows.items():
        own = heads.dino_bottleneck_dim or heads.bottleneck_dim if name == "dino" else heads.bottleneck_dim
        total += 3 * count * head_flops(config, student.embed_dim, own)
        total += (2 if name == "dino" else count) * head_flops(config, teacher.backbone.embed_dim, own)
    return total


def forward_flops(backbone: VisionTransformer, size: int) -> float:
    """Count one crop's forward: by the formula for our backbones, by torch's counter for others."""
    if type(backbone) is VisionTransformer:
        patches = (size // backbone.patch_size) ** 2
        tokens = 1 + backbone.num_register_tokens + patches
        blocks = backbone.config.depth * block_flops(backbone.config, tokens)
        return blocks + embed_flops(backbone.config, patches)
    let_torch_count()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        x = torch.empty(1, backbone.config.in_chans, size, size, device="meta")
        copy.deepcopy(backbone).to("meta").eval().prepare_tokens(x)
    return float(counter.get_total_flops())
