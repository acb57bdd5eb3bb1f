# SPDX-License-Identifier: Apache-2.0
"""Compiled blocks: same names, same losses and gradients, whatever the sizes of a step."""

import pytest
import torch

from opendino.models.config import ViTConfig
from opendino.models.vit import VisionTransformer
from opendino.pretrain.compiled import can_compile, compile_blocks
from opendino.pretrain.depth import DepthDraws


def network():
    torch.manual_seed(0)
    config = ViTConfig(img_size=28, embed_dim=16, depth=2, num_heads=2, init_values=0.3, drop_path_rate=0.4)
    return VisionTransformer(config).train()


def step(model, images):
    torch.manual_seed(images)
    big, small = torch.randn(2 * images, 3, 28, 28), torch.randn(3 * images, 3, 14, 14)
    masks = torch.rand(2 * images, 4) < 0.5
    out = model.forward_selected([big, small], [masks, None], [masks, None], DepthDraws(0, 1, 0, images, images))
    model.zero_grad()
    sum(t.sin().sum() for pair in out for t in pair).backward()
    return [t.detach() for pair in out for t in pair], {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def test_names_stay_and_every_block_is_compiled():
    model = network()
    keys = list(model.state_dict())
    assert compile_blocks(model) == 2
    assert list(model.state_dict()) == keys
    assert all(block._compiled_call_impl is not None for block in model.blocks)


@pytest.mark.slow
def test_compiled_blocks_equal_plain_ones_for_several_sizes():
    if not can_compile(torch.device("cpu")):
        pytest.skip("no C++ compiler")
    plain, compiled = network(), network()
    compile_blocks(compiled)
    for images in (4, 6, 5):
        torch.testing.assert_close(step(compiled, images), step(plain, images), rtol=1e-4, atol=1e-5)
