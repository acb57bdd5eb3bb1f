# SPDX-License-Identifier: Apache-2.0
"""The backbone prepared for a CPU gives the plain one's tokens; its attention kernel those of a float64 softmax."""

import pytest
import torch

from opendino.embed.runtimes import prepared
from opendino.embed.runtimes.prepared import PreparedViT
from opendino.models.config import ViTConfig
from opendino.models.vit import VisionTransformer
from opendino.native import attention
from opendino.native.build import Kernels, kernels

LIBRARY = kernels().library
HAS_ATTENTION = LIBRARY is not None and attention.attention_supported(LIBRARY)
needs_attention = pytest.mark.skipif(not HAS_ATTENTION, reason="this processor has no AVX-512 products of bf16")
needs_kernels = pytest.mark.skipif(LIBRARY is None, reason="there is no C compiler")
SHAPES = {
    "mlp": {},
    "registers": {"num_register_tokens": 4, "pos_resize": "size_antialias"},
    "swiglu": {"ffn": "swiglu", "depth": 3},
    "narrow heads": {"num_heads": 8},
    "no LayerScale, no qkv bias": {"init_values": None, "qkv_bias": False},
    "four channels": {"in_chans": 4},
}


def make_model(seed=0, **overrides):
    torch.manual_seed(seed)
    model = VisionTransformer(
        ViTConfig(**{"img_size": 56, "embed_dim": 128, "depth": 2, "num_heads": 2, "init_values": 0.5, **overrides})
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # biases, norms and LayerScale all different from their start
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif "weight" in name:
                parameter.mul_(3)
    return model


def plain_tokens(model, images, layers=1):
    with torch.inference_mode():
        tokens, outputs = model.prepare_tokens(images), []
        for block in model.blocks:
            tokens = block(tokens)
            outputs.append(model.norm(tokens))
    return torch.cat(outputs[-layers:], -1)


def one_minus_cosine(a, b):
    return 1 - torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [(56, 56), (84, 42), (61, 75)])
def test_fp32_equals_the_plain_model(shape, size):
    model = make_model(**SHAPES[shape])
    images = torch.randn(3, model.config.in_chans, *size)
    tokens = PreparedViT(model, "fp32").tokens(images)
    torch.testing.assert_close(tokens, plain_tokens(model, images), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_is_close_to_the_plain_model_in_fp32(shape):
    model = make_model(**SHAPES[shape])
    images = torch.randn(3, model.config.in_chans, 84, 56)
    away = one_minus_cosine(PreparedViT(model, "bf16").tokens(images), plain_tokens(model, images))
    assert away.mean() < 5e-5
    assert away.max() < 5e-4


def test_bf16_is_close_without_kernels_too(monkeypatch):
    monkeypatch.setattr(prepared, "kernels", lambda: Kernels(None, "off"))
    model = make_model()
    images = torch.randn(2, 3, 56, 56)
    away = one_minus_cosine(PreparedViT(model, "bf16").tokens(images), plain_tokens(model, images))
    assert away.mean() < 5e-5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_tokens_of_several_blocks_in_their_order(precision):
    model = make_model(depth=3)
    images = torch.randn(2, 3, 56, 56)
    tokens = PreparedViT(model, precision).tokens(images, layers=2)
    assert tokens.shape == (2, 17, 256)
    assert one_minus_cosine(tokens, plain_tokens(model, images, layers=2)).max() < 5e-4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_row_does_not_depend_on_pieces_and_threads(precision, monkeypatch):
    model = make_model()
    images = torch.randn(7, 3, 56, 56)
    together = PreparedViT(model, precision, threads=1)
    assert together.piece_size(images) == 7
    whole = together.tokens(images)
    monkeypatch.setattr(prepared, "PIECE_VALUES", 2 * 17 * 128)
    in_pieces = PreparedViT(model, precision, threads=3)
    assert in_pieces.piece_size(images) == 2
    torch.testing.assert_close(in_pieces.tokens(images), whole, atol=1e-5, rtol=1e-5)


def test_the_weights_are_a_copy_and_the_model_is_left_alone():
    model = make_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    images = torch.randn(1, 3, 56, 56)
    ready = PreparedViT(model, "fp32")
    first = ready.tokens(images)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(ready.tokens(images), first)


@needs_attention
@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 33, 50, 64, 65, 257])
@pytest.mark.parametrize("threads", [1, 3])
def test_attention_equals_a_float64_softmax(tokens, threads):
    torch.manual_seed(tokens)
    qkv = (torch.randn(2, tokens, 3 * 3 * 64) * 2).bfloat16()
    q, k, v = qkv.double().unflatten(-1, (3, 3, 64)).permute(2, 0, 3, 1, 4)
    expected = ((q @ k.transpose(-1, -2) / 8).softmax(-1) @ v).transpose(1, 2).flatten(2)
    got = attention.attend(LIBRARY, qkv, 3, threads)
    assert (got.double() - expected).abs().max() < 0.03
    assert (got.double() - expected).square().mean().sqrt() < 0.004  # a bf16 result of size 1 is off by 0.002


@needs_attention
def test_attention_of_large_scores_is_finite_and_picks_the_largest():
    qkv = torch.zeros(1, 20, 3 * 64)
    qkv[0, :, :64] = 30
    qkv[0, :, 64:128] = torch.linspace(-30, 30, 20).unsqueeze(1)
    qkv[0, :, 128:] = torch.arange(20.0).unsqueeze(1)
    got = attention.attend(LIBRARY, qkv.bfloat16(), 1)
    assert torch.equal(got.float(), torch.full((1, 20, 64), 19.0))


@needs_kernels
@pytest.mark.parametrize("branch", [True, False])
def test_addition_and_norm_equal_torch(branch):
    torch.manual_seed(0)
    stream, weight, bias = torch.randn(5, 48) * 3 + 7, torch.randn(48), torch.randn(48)
    added = torch.randn(5, 48).bfloat16() if branch else None
    total = stream + added.float() if branch else stream.clone()
    expected = torch.nn.functional.layer_norm(total.double(), (48,), weight.double(), bias.double(), 1e-6)
    got = attention.add_and_normalize(LIBRARY, stream, added, weight, bias, 1e-6)
    assert torch.equal(stream, total)
    torch.testing.assert_close(got.double(), expected, atol=1e-3, rtol=2**-8)


@needs_kernels
def test_a_nan_in_the_stream_stays_a_nan():
    stream = torch.zeros(2, 16)
    stream[0, 3] = torch.nan
    got = attention.add_and_normalize(LIBRARY, stream, None, torch.ones(16), torch.zeros(16), 1e-6)
    assert got[0].isnan().all()
    assert not got[1].isnan().any()
