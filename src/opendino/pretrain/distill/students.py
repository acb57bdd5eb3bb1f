# SPDX-License-Identifier: Apache-2.0
"""The student's backbone: one of our architectures, or any model of timm."""

from __future__ import annotations

import torch
from torch import nn

from opendino.models.registry import get_config
from opendino.models.vit import VisionTransformer
from opendino.pretrain.distill.config import DistillConfig
from opendino.pretrain.student_teacher import backbone_config


def student_backbone(config: DistillConfig) -> VisionTransformer:
    """Build the student with fresh weights from torch's generator.

    Raises:
        MissingExtraError: for a timm student without timm.
        ConfigError: for an unknown name.
    """
    if config.timm_name is None:
        return VisionTransformer(get_config(config.model.arch, **backbone_config(config)))
    from opendino.models.timm_backbone import TimmBackbone
    from opendino.pretrain.trainer import preprocessing_of

    backbone = TimmBackbone(
        config.timm_name,
        img_size=config.crops.global_size,
        in_chans=config.model.in_chans,
        preprocess=preprocessing_of(config),
    )
    freeze_unused(backbone, config.crops.global_size)
    return backbone


def freeze_unused(backbone: VisionTransformer, size: int) -> None:
    """Hold still what no token depends on, such as layers of timm's classifier; DDP would wait for its gradients."""
    training = backbone.training
    backbone.eval().prepare_tokens(torch.zeros(1, backbone.config.in_chans, size, size)).sum().backward()
    backbone.train(training)
    for parameter in backbone.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None


def backbone_of(network: nn.ModuleDict) -> VisionTransformer:
    """Give the backbone of a network with heads or adapters."""
    backbone = network["backbone"]
    assert isinstance(backbone, VisionTransformer)
    return backbone
