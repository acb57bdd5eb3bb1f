# SPDX-License-Identifier: Apache-2.0
"""Parameter groups by hand, clipping, moving average, frozen last layer."""

import pytest
import torch

from opendino.models.config import ViTConfig
from opendino.models.vit import VisionTransformer
from opendino.pretrain.heads import DINOHead
from opendino.pretrain.optimizer import apply_schedule, build_adamw, clip_each, ema_update, parameter_groups

DEPTH, DECAY, PATCH = 3, 0.5, 0.2


def networks():
    torch.manual_seed(0)
    config = ViTConfig(img_size=28, embed_dim=16, depth=DEPTH, num_heads=2, num_register_tokens=2)
    return {"backbone": VisionTransformer(config), "dino_head": DINOHead(16, 8, hidden_dim=12, bottleneck_dim=6)}


def wanted(name):
    """(lr multiplier, weight-decay multiplier, last layer) of a parameter, written out from method.md."""
    if name.startswith("dino_head."):
        last = name == "dino_head.last_layer.weight"
        return 1.0, 0.0 if name.endswith("bias") else 1.0, last
    part = name.removeprefix("backbone.")
    no_decay = part.endswith(("bias", "gamma")) or "norm" in part
    if part.startswith("blocks."):
        layer = int(part.split(".")[1]) + 1
    else:
        layer = DEPTH + 1 if part.startswith("norm.") else 0
    lr = DECAY ** (DEPTH + 1 - layer) * (PATCH if part.startswith("patch_embed.") else 1)
    return lr, 0.0 if no_decay else 1.0, False


def test_every_parameter_is_in_the_right_group_once():
    nets = networks()
    groups = parameter_groups(nets, layerwise_decay=DECAY, patch_embed_lr_mult=PATCH)
    found = {}
    for group in groups:
        for name in group["names"]:
            assert name not in found
            found[name] = (group["lr_multiplier"], group["wd_multiplier"], group["is_last_layer"])
    names = {f"{n}.{p}" for n, net in nets.items() for p, _ in net.named_parameters()}
    assert set(found) == names
    for name, values in found.items():
        assert values == pytest.approx(wanted(name)), name
    assert found["backbone.blocks.2.ls1.gamma"] == (0.5, 0.0, False)
    assert found["backbone.pos_embed"][1] == 1.0
    assert found["backbone.patch_embed.proj.weight"][0] == pytest.approx(DECAY**4 * PATCH)


def test_the_schedule_reaches_every_group():
    nets = networks()
    groups = parameter_groups(nets, layerwise_decay=DECAY, patch_embed_lr_mult=PATCH)
    optimizer = build_adamw(groups)
    apply_schedule(optimizer, lr=0.8, weight_decay=0.3, last_layer_lr=0.1)
    for group, source in zip(optimizer.param_groups, groups):
        lr = 0.1 if source["is_last_layer"] else 0.8
        assert group["lr"] == pytest.approx(lr * source["lr_multiplier"])
        assert group["weight_decay"] == pytest.approx(0.3 * source["wd_multiplier"])


def test_a_step_equals_adamw_by_hand():
    nets = networks()
    optimizer = build_adamw(parameter_groups(nets, layerwise_decay=1.0, patch_embed_lr_mult=1.0), betas=(0.9, 0.999))
    weight = nets["dino_head"].mlp[0].weight
    before, gradient = weight.detach().clone(), torch.randn_like(weight)
    weight.grad = gradient.clone()
    apply_schedule(optimizer, lr=0.01, weight_decay=0.2, last_layer_lr=0.01)
    optimizer.step()
    # First step: the bias-corrected moments are the gradient and its square.
    by_hand = before * (1 - 0.01 * 0.2) - 0.01 * gradient / (gradient.abs() + 1e-8)
    assert torch.allclose(weight, by_hand, atol=1e-7)


def test_a_frozen_last_layer_does_not_move():
    nets = networks()
    optimizer = build_adamw(parameter_groups(nets, layerwise_decay=1.0, patch_embed_lr_mult=1.0))
    for net in nets.values():
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
    last, first = nets["dino_head"].last_layer.weight, nets["dino_head"].mlp[0].weight
    before, first_before = last.detach().clone(), first.detach().clone()
    apply_schedule(optimizer, lr=0.01, weight_decay=0.4, last_layer_lr=0.0)
    optimizer.step()
    assert torch.equal(last, before)
    assert not torch.equal(first, first_before)


def test_each_network_is_clipped_by_its_own_norm():
    nets = networks()
    for scale, net in zip((100.0, 1e-3), nets.values()):
        for parameter in net.parameters():
            parameter.grad = torch.full_like(parameter, scale)
    norms = {n: torch.cat([p.grad.flatten() for p in net.parameters()]).norm() for n, net in nets.items()}
    found = clip_each(nets, 3.0)
    for name, net in nets.items():
        assert float(found[name]) == pytest.approx(float(norms[name]), rel=1e-5)
        after = torch.cat([p.grad.flatten() for p in net.parameters()]).norm()
        assert float(after) == pytest.approx(min(float(norms[name]), 3.0), rel=1e-4)


def test_the_moving_average():
    teacher, student = [torch.tensor([1.0, 2.0])], [torch.tensor([3.0, -2.0])]
    ema_update(teacher, student, 0.75)
    assert torch.allclose(teacher[0], torch.tensor([1.5, 1.0]))
    ema_update(teacher, student, 1.0)
    assert torch.allclose(teacher[0], torch.tensor([1.5, 1.0]))
