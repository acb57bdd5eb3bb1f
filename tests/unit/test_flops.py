# SPDX-License-Identifier: Apache-2.0
"""Counted arithmetic against torch's own counter, and what is measured on this machine."""

import time

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from opendino.pretrain.config import parse_config
from opendino.pretrain.flops import measured_peak_flops, model_flops_per_image, peak_memory_gb, speed_figures
from opendino.pretrain.masking import batch_masks
from opendino.pretrain.student_teacher import Crops, StudentTeacher

BATCH = 4
TINY = """
batch_size: 4
model: {patch_size: 7, embed_dim: 32, depth: 2, num_heads: 2}
crops: {global_size: 56, local_size: 28, num_local: 3}
heads: {num_prototypes: 96, hidden_dim: 48, bottleneck_dim: 16}
masks: {ratio: [0.5, 0.5]}
"""


def counted(config):
    """FLOPs per image of one real step, by torch's counter."""
    torch.manual_seed(0)
    model = StudentTeacher(config)
    c = config.crops
    side = c.global_size // 7
    masks = batch_masks(2 * BATCH, (side, side), np.random.default_rng(0), config.masks.ratio, config.masks.share)
    local = torch.randn(c.num_local * BATCH, 3, c.local_size, c.local_size) if c.num_local else None
    crops = Crops(torch.randn(2 * BATCH, 3, c.global_size, c.global_size), local, masks)
    # torch's counter knows no CPU flash attention; the explicit products are the same arithmetic.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss, _ = model.loss(crops, model.targets([crops], 0.07)[0], torch.Generator().manual_seed(0))
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
def test_counted_flops_equal_those_of_a_real_step(change):
    config = parse_config(TINY, "test")
    changes = parse_config(change, "test")
    update = {k: getattr(changes, k) for k in changes.model_fields_set}
    if "crops" not in update:
        update["crops"] = config.crops
    config = config.model_copy(update=update)
    assert model_flops_per_image(config) == pytest.approx(counted(config), rel=0.03)


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
