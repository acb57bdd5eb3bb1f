# SPDX-License-Identifier: Apache-2.0
"""The backbone itself: sizes, outputs, packing, stochastic depth, export."""

import pytest
import torch

from opendino.errors import ConfigError, DataError
from opendino.models import layers
from opendino.models.config import ViTConfig
from opendino.models.layers import Block, add_rows, random_subset
from opendino.models.registry import MODELS, get_config
from opendino.models.vit import VisionTransformer

PUBLISHED_KEYS_PER_BLOCK = {
    "norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias",
    "ls1.gamma", "norm2.weight", "norm2.bias", "ls2.gamma",
}  # fmt: skip


def tiny(**overrides) -> VisionTransformer:
    torch.manual_seed(0)
    shape = {"img_size": 28, "patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return VisionTransformer(ViTConfig(**{**shape, **overrides})).eval()


def test_vitg14_has_the_published_keys_and_parameter_count():
    with torch.device("meta"):
        model = VisionTransformer(get_config("vitg14"))
    ffn = {f"mlp.{n}.{e}" for n in ("w12", "w3") for e in ("weight", "bias")}
    expected = {"cls_token", "pos_embed", "mask_token", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    expected |= {"norm.weight", "norm.bias"}
    expected |= {f"blocks.{i}.{k}" for i in range(40) for k in PUBLISHED_KEYS_PER_BLOCK | ffn}
    assert set(model.state_dict()) == expected
    assert sum(p.numel() for p in model.parameters()) == 1_136_480_768


@pytest.mark.parametrize("name", MODELS)
def test_every_named_model_builds_on_meta_with_a_518_px_table(name):
    with torch.device("meta"):
        model = VisionTransformer(get_config(name))
    assert model.pos_embed.shape == (1, 1 + 37 * 37, model.embed_dim)
    assert model.num_register_tokens == (4 if name.endswith("_reg") else 0)


def test_output_dict_has_the_published_entries():
    out = tiny(num_register_tokens=3).forward_features(torch.randn(2, 3, 28, 42))
    assert out["x_norm_clstoken"].shape == (2, 32)
    assert out["x_norm_regtokens"].shape == (2, 3, 32)
    assert out["x_norm_patchtokens"].shape == (2, 24, 32)
    assert out["x_prenorm"].shape == (2, 28, 32)


def test_sides_are_cropped_at_the_bottom_and_right():
    model, x = tiny(), torch.randn(1, 3, 34, 30)
    assert torch.equal(model(x), model(x[..., :28, :28]))


@pytest.mark.parametrize("shape", [(1, 3, 6, 28), (3, 28, 28), (1, 1, 28, 28)])
def test_what_is_no_image_batch_is_refused(shape):
    with pytest.raises(DataError, match="needs|at least one patch"):
        tiny()(torch.zeros(shape))


def test_masked_patches_do_not_reach_the_output():
    model = tiny()
    masks = torch.zeros(1, 16, dtype=torch.bool)
    masks[0, 0] = True
    a = torch.randn(1, 3, 28, 28)
    b = a.clone()
    b[..., :7, :7] += 1
    assert torch.equal(model(a, masks), model(b, masks))
    assert not torch.equal(model(a), model(b))


def test_intermediate_layers_reshape_and_class_token():
    model, x = tiny(num_register_tokens=2), torch.randn(2, 3, 28, 42)
    (patches, cls), (last, last_cls) = model.get_intermediate_layers(x, n=2, reshape=True, return_class_token=True)
    features = model.forward_features(x)
    assert patches.shape == last.shape == (2, 32, 4, 6)
    assert cls.shape == (2, 32)
    assert torch.equal(last_cls, features["x_norm_clstoken"])
    assert torch.equal(last.flatten(2).transpose(1, 2), features["x_norm_patchtokens"])
    with pytest.raises(DataError):
        model.get_intermediate_layers(x, n=3)


@pytest.mark.parametrize("registers", [0, 4])
def test_packed_forward_equals_separate_forwards_in_values_and_gradients(registers):
    model = tiny(num_register_tokens=registers, init_values=0.7).train()
    big, small = torch.randn(3, 3, 28, 28), torch.randn(5, 3, 14, 21)
    masks = torch.rand(3, 16) < 0.4
    packed = model.forward_packed([big, small], [masks, None])
    separate = [model.forward_features(big, masks), model.forward_features(small)]
    weights = [torch.randn_like(s["x_prenorm"]) for s in separate]
    grads = []
    for outputs in (packed, separate):
        model.zero_grad()
        sum((o["x_prenorm"] * w).sum() + o["x_norm_clstoken"].sum() for o, w in zip(outputs, weights)).backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    for a, b in zip(packed, separate):
        torch.testing.assert_close(a["x_norm_patchtokens"], b["x_norm_patchtokens"], atol=1e-5, rtol=1e-5)
    for name in grads[1]:
        torch.testing.assert_close(grads[0][name], grads[1][name], atol=1e-5, rtol=1e-5)


def test_stochastic_depth_keeps_the_mean_and_whole_samples():
    x = torch.zeros(8 * 3, 4)
    generator = torch.Generator().manual_seed(0)
    subsets = [random_subset([(8, 3)], 0.5, generator) for _ in range(500)]
    draws = torch.stack([add_rows(x, s.index, torch.ones_like(x[s.index]), s.scale) for s in subsets])
    draws = draws.unflatten(1, (8, 3))
    assert set(draws.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(draws.amin((2, 3)), draws.amax((2, 3)))
    assert draws.mean().item() == pytest.approx(1.0)  # exactly half of each batch is kept
    assert (draws.mean((0, 2, 3)) - 1).abs().max() < 0.2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(dtype):
    model, x = tiny(), torch.randn(2, 3, 28, 42)
    exact = model(x)
    assert torch.cosine_similarity(model.to(dtype)(x.to(dtype)).float(), exact).min() > 0.999


def test_export_gives_the_same_tokens():
    model, x = tiny(num_register_tokens=1), torch.randn(2, 3, 35, 28)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))


def test_unknown_names_and_settings_are_refused_with_the_closest_match():
    with pytest.raises(ConfigError, match="vits14"):
        get_config("vits41")
    with pytest.raises(ConfigError, match="embed_dimm"):
        get_config("vits14", embed_dimm=3)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_model_gives_the_same_tokens_and_gradients(backend):
    torch.manual_seed(0)
    model = VisionTransformer(ViTConfig(img_size=28, embed_dim=16, depth=2, num_heads=2, num_register_tokens=2))
    x = torch.randn(2, 3, 28, 42)
    plain = model(x)
    plain.sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    compiled = torch.compile(model, backend=backend, fullgraph=True)(x)
    compiled.sum().backward()
    assert torch.allclose(compiled, plain, atol=1e-5)
    for name, parameter in model.named_parameters():
        if name in gradients:
            assert torch.allclose(parameter.grad, gradients[name], atol=1e-4), name


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_training_mode_computes_the_same_tokens_and_gradients(ffn):
    """In training LayerScale lies in the weights and, on a CPU, attention is written out."""
    torch.manual_seed(0)
    config = ViTConfig(img_size=28, embed_dim=16, depth=2, num_heads=2, init_values=0.3, ffn=ffn)
    model, x = VisionTransformer(config).double(), torch.randn(3, 3, 28, 42, dtype=torch.float64)
    results = []
    for training in (True, False):
        model.train(training).zero_grad()
        out = model.forward_features(x)["x_norm_patchtokens"]
        out.sin().sum().backward()
        results.append((out.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)
    assert "blocks.0.ls2.gamma" in results[0][1]


def test_fp16_training_keeps_a_small_layer_scale():
    model = VisionTransformer(ViTConfig(img_size=28, embed_dim=16, depth=1, num_heads=2, init_values=1e-5)).train()
    with torch.autocast("cpu", torch.float16):
        model.forward_features(torch.randn(2, 3, 28, 28))["x_prenorm"].float().pow(2).sum().backward()
    assert model.blocks[0].ls1.gamma.grad.abs().max() > 0


@pytest.mark.parametrize("registers", [0, 2])
def test_selected_tokens_equal_those_of_the_packed_forward(registers):
    model = tiny(num_register_tokens=registers).train()
    big, small = torch.randn(3, 3, 56, 56), torch.randn(4, 3, 28, 28)
    masks = torch.rand(3, (56 // model.patch_size) ** 2) < 0.4
    packed = model.forward_packed([big, small], [masks, None])
    selected = model.forward_selected([big, small], [masks, None], [masks, None])
    torch.testing.assert_close(selected[0][0], packed[0]["x_norm_clstoken"])
    torch.testing.assert_close(selected[0][1], packed[0]["x_norm_patchtokens"][masks])
    torch.testing.assert_close(selected[1][0], packed[1]["x_norm_clstoken"])
    assert selected[1][1].shape == (0, model.embed_dim)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_autocast_training_does_not_lose_small_branches(drop, weights):
    """The sum over blocks is kept in fp32: at 1e-5 a branch is below the last bit of a bf16 token."""
    torch.manual_seed(0)
    config = ViTConfig(img_size=28, embed_dim=16, depth=1, num_heads=2, init_values=1e-5, drop_path_rate=drop)
    block = Block(config).train().to(weights)
    with torch.no_grad():
        for parameter in (block.attn.proj.weight, block.mlp.fc2.weight):
            parameter.normal_()
    x = torch.randn(4, 3, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x)
    assert out.dtype is torch.float32
    changed = (out != x.float()).float().mean()
    assert changed > 0.9 if not drop else 0.2 < changed < 1


def test_gelu_made_again_gives_the_gradients_of_gelu_kept(monkeypatch):
    mlp = layers.Mlp(8, 32).train()
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    found = []
    for limit in (10**9, 0):
        monkeypatch.setattr(layers, "RECOMPUTE_GELU_FROM", limit)
        kept: list[torch.Size] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.shape) or t, lambda t: t):
            out = mlp(x)
        found.append((kept.count(torch.Size([5, 32])), *torch.autograd.grad(out.square().sum(), mlp.parameters())))
    assert [f[0] for f in found] == [2, 1]  # of the hidden layer and its GELU, the former alone
    for one, other in zip(found[0][1:], found[1][1:]):
        torch.testing.assert_close(one, other)


def test_patches_in_training_are_those_of_the_convolution():
    torch.manual_seed(0)
    model = VisionTransformer(ViTConfig(img_size=28, embed_dim=16, num_heads=2, depth=1))
    x = torch.randn(2, 3, 42, 28)
    expected = model.eval().patch_embed(x)
    torch.testing.assert_close(model.train().patch_embed(x), expected, atol=1e-5, rtol=1e-5)
