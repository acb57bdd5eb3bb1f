# SPDX-License-Identifier: Apache-2.0
"""Counted arithmetic against torch's own counter, and what is measured on this machine."""

import itertools
import time

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from opendino.models.registry import get_config
from opendino.models.vit import VisionTransformer
from opendino.pretrain.config import parse_config
from opendino.pretrain.flops import measured_peak_flops, model_flops_per_image, peak_memory_gb, speed_figures
from opendino.pretrain.student_teacher import backbone_config

BATCH = 4
TINY = """
batch_size: 4
model: {patch_size: 7, embed_dim: 32, depth: 2, num_heads: 2}
crops: {global_size: 56, local_size: 28, num_local: 3}
heads: {num_prototypes: 96, hidden_dim: 48, bottleneck_dim: 16}
masks: {ratio: [0.5, 0.5]}
"""


def head_of(config, width, bottleneck):
    """The linear layers of a head."""
    heads = config.heads
    dims = [width, *[heads.hidden_dim] * (heads.num_layers - 1), bottleneck, heads.num_prototypes]
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(dims)))


def tokens_of(backbone, crops, masks, kept):
    """All tokens of a batch; each residual block on the first `kept` share of the crops, as stochastic depth would."""
    tokens, rows = backbone.prepare_tokens(crops, masks), int(len(crops) * kept)
    for block in backbone.blocks:
        tokens = torch.cat([block(tokens[:rows]), tokens[rows:]])
    return tokens


def counted(config):
    """FLOPs per image of one step written out plainly, by torch's counter: every block over every token."""
    torch.manual_seed(0)
    c, heads = config.crops, config.heads
    plain = backbone_config(config) | {"drop_path_rate": 0.0}
    backbone = VisionTransformer(get_config(config.model.arch, **plain))
    dino = head_of(config, backbone.embed_dim, heads.dino_bottleneck_dim or heads.bottleneck_dim)
    ibot = head_of(config, backbone.embed_dim, heads.bottleneck_dim) if heads.separate else dino
    patches = (c.global_size // 7) ** 2
    masks = torch.zeros(2 * BATCH, patches, dtype=torch.bool)
    masks[: int(2 * BATCH * config.masks.share), : patches // 2] = True
    large = torch.randn(2 * BATCH, 3, c.global_size, c.global_size)
    small = torch.randn(c.num_local * BATCH, 3, c.local_size, c.local_size)
    first, kept = 1 + backbone.num_register_tokens, 1 - config.model.drop_path_rate
    # torch's counter knows no CPU flash attention; the explicit products are the same arithmetic.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            tokens = tokens_of(backbone, large, None, 1.0)
            dino(tokens[:, 0]), ibot(tokens[:, first:][masks])
        tokens = tokens_of(backbone, large, masks, kept)
        loss = dino(tokens[:, 0]).sum() + ibot(tokens[:, first:][masks]).sum()
        if c.num_local:
            loss = loss + dino(tokens_of(backbone, small, None, kept)[:, 0]).sum()
        loss.backward()
    return counter.get_total_flops() / BATCH


@pytest.mark.parametrize(
    "change",
    [
        "{}",
        "crops: {global_size: 28, local_size: 14, num_local: 0}",
        "heads: {num_prototypes: 4096, separate: true, dino_bottleneck_dim: 24, num_layers: 2}",
        "masks: {share: 1.0, ratio: [0.5, 0.5]}",
        "model: {arch: vits14_reg, patch_size: 7, embed_dim: 32, depth: 3, num_heads: 2, drop_path_rate: 0.25}",
        "model: {arch: vitg14, patch_size: 7, embed_dim: 48, depth: 2, num_heads: 2}",
    ],
)
def test_counted_flops_equal_those_of_a_plain_step(change):
    config = parse_config(TINY, "test")
    changes = parse_config(change, "test")
    update = {k: getattr(changes, k) for k in changes.model_fields_set}
    if "crops" not in update:
        update["crops"] = config.crops
    config = config.model_copy(update=update)
    assert model_flops_per_image(config) == pytest.approx(counted(config), rel=0.01)


def test_without_dino_and_ibot_only_the_students_backbone_is_counted():
    config = parse_config(TINY + "loss: {dino_weight: 0.0, ibot_weight: 0.0, hog_weight: 1.0}\n", "test")
    config = config.model_copy(update={"crops": config.crops.model_copy(update={"num_local": 0})})
    backbone = VisionTransformer(get_config(config.model.arch, **backbone_config(config)))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        tokens_of(backbone, torch.randn(2, 3, 56, 56), None, 1.0).sum().backward()
    assert model_flops_per_image(config) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_the_peak_is_measured_once_and_quickly():
    measured_peak_flops.cache_clear()
    began = time.perf_counter()
    peak = measured_peak_flops(torch.device("cpu"), torch.float32)
    assert time.perf_counter() - began < 2  # 0.5 on a quiet machine
    assert 1e8 < peak < 1e15
    assert measured_peak_flops(torch.device("cpu"), torch.float32) == peak


def test_peak_memory_grows_with_what_is_held():
    before = peak_memory_gb(torch.device("cpu"))
    held = torch.ones(int((before + 0.2) * 1e9 / 4))
    assert peak_memory_gb(torch.device("cpu")) >= before + 0.15
    assert held.numel()


def test_speed_figures_agree_with_each_other():
    config = parse_config(TINY, "test")
    figures = speed_figures(config, seconds=0.5, waited=0.1, device=torch.device("cpu"))
    assert figures["images_per_s"] == 8
    assert figures["data_wait"] == pytest.approx(0.2)
    assert figures["tflops"] == pytest.approx(8 * model_flops_per_image(config) / 1e12)
    assert 0 < figures["mfu"] < 1
    two = speed_figures(config, seconds=0.5, waited=0.1, device=torch.device("cpu"), processes=2)
    assert two["mfu"] == pytest.approx(figures["mfu"] / 2)
