# SPDX-License-Identifier: Apache-2.0
"""Stochastic depth: how many images each group keeps, and that no cut of the batch changes which."""

import itertools

import numpy as np
import pytest
import torch

from opendino.models.config import ViTConfig
from opendino.models.layers import Block, Subset
from opendino.pretrain.depth import GROUP, DepthDraws

CPU = torch.device("cpu")
CROPS = (2, 3)


def kept(seed, step, first, images, batch, block=0, rate=0.3):
    """bool (2 branches, 5 crops, images) of what is kept, and the scale of every image."""
    shapes = [(c * images, 1) for c in CROPS]
    found, scales = [], []
    for subset in DepthDraws(seed, step, first, images, batch).subsets(block, rate, shapes, CPU):
        mask, scale = torch.zeros(sum(CROPS) * images), torch.zeros(sum(CROPS) * images)
        mask[subset.index] = 1
        scale[subset.index] = torch.as_tensor(subset.scale).flatten()
        found.append(mask.reshape(-1, images))
        scales.append(scale.reshape(-1, images))
        assert sum(b for b, _ in subset.shapes) == len(subset.index)
    return torch.stack(found), torch.stack(scales)


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.4, 0.99])
def test_every_group_keeps_its_share_and_the_mean(rate):
    mask, scale = kept(0, 5, 0, 37, 37, rate=rate)
    for first, size in ((0, 16), (16, 16), (32, 5)):
        count = max(int(size * (1 - rate)), 1)
        group = slice(first, first + size)
        assert (mask[..., group].sum(-1) == count).all()
        torch.testing.assert_close(scale[..., group].sum(-1), torch.full((2, 5), float(size)))


@pytest.mark.parametrize("cut", [(0, 10, 20, 37), (0, 1, 2, 3, 36, 37), (0, 16, 32, 37)])
@pytest.mark.parametrize("block", [0, 3])
def test_a_cut_of_the_batch_changes_nothing(cut, block):
    whole = kept(7, 11, 0, 37, 37, block)
    parts = [kept(7, 11, a, b - a, 37, block) for a, b in itertools.pairwise(cut)]
    for i in range(2):
        assert torch.equal(torch.cat([p[i] for p in parts], dim=-1), whole[i])


def test_seed_step_block_branch_crop_and_group_draw_apart_and_repeat():
    base = kept(0, 0, 0, 32, 32)[0]
    assert torch.equal(base, kept(0, 0, 0, 32, 32)[0])
    others = [kept(1, 0, 0, 32, 32)[0], kept(0, 1, 0, 32, 32)[0], kept(0, 0, 0, 32, 32, block=1)[0]]
    assert not any(torch.equal(base, other) for other in others)
    rows = {tuple(row.tolist()) for part in base.split(GROUP, dim=-1) for row in part.reshape(-1, GROUP)}
    assert len(rows) > 17  # of 20


def test_every_image_is_dropped_as_often_as_the_rate_says():
    dropped = 1 - torch.stack([kept(3, step, 0, 16, 16, rate=0.25)[0] for step in range(100)])
    assert dropped.mean() == 0.25
    np.testing.assert_allclose(dropped.mean((0, 1, 2)).numpy(), 0.25, atol=0.06)  # four standard deviations of 1000


def block():
    torch.manual_seed(0)
    config = ViTConfig(img_size=28, embed_dim=16, depth=1, num_heads=2, init_values=0.5, drop_path_rate=0.4)
    return Block(config).train()


def test_a_branch_adds_to_kept_images_only_and_equals_one_image_at_a_time():
    layer, shapes, draws = block(), [(10, 3), (5, 2)], DepthDraws(0, 0, 0, 5, 5)
    x = torch.randn(40, 16)
    subsets = draws.subsets(0, 0.4, shapes, CPU)
    out = layer(x, shapes, subsets)
    first = 0
    for batch, tokens in shapes:
        for image in range(batch):
            rows = torch.arange(first + image * tokens, first + (image + 1) * tokens)
            alone = x[rows]
            if torch.isin(rows, subsets[0].index).all():
                alone = alone + 5 / 3 * layer._attention_branch(alone[None], None)[0]
            if torch.isin(rows, subsets[1].index).all():
                alone = alone + 5 / 3 * layer._ffn_branch(alone)
            torch.testing.assert_close(out[rows], alone)
        first += batch * tokens


@pytest.mark.parametrize("drop", [False, True])
def test_kept_rows_of_the_last_block_equal_those_of_the_whole(drop):
    layer, shapes, draws = block(), [(10, 3), (5, 2)], DepthDraws(0, 1, 0, 5, 5)
    x, keep = torch.randn(40, 16), torch.tensor([0, 9, 3, 30, 38, 14])
    subsets = draws.subsets(0, 0.4, shapes, CPU) if drop else None
    if not drop:
        layer.drop_path_rate = 0.0
    torch.testing.assert_close(layer(x, shapes, subsets, keep), layer(x, shapes, subsets)[keep])


def test_a_branch_without_any_kept_image_is_still_computed():
    layer, shapes = block(), [(2, 3), (2, 2)]
    nothing = Subset(torch.zeros(0, dtype=torch.long), [(0, 3), (0, 2)], torch.zeros(0, 1))
    x, calls = torch.randn(10, 16), []
    layer.mlp.register_forward_hook(lambda *args: calls.append("mlp"))
    layer.attn.register_forward_hook(lambda *args: calls.append("attn"))
    out = layer(x, shapes, [nothing, nothing])
    out.sum().backward()
    assert calls == ["attn", "mlp"]
    assert torch.equal(out, x)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in layer.parameters())
