# SPDX-License-Identifier: Apache-2.0
"""The backbone prepared for a CPU gives the plain one's tokens."""

import numpy as np
import pytest
import torch

from opendino.embed.embedder import Embedder
from opendino.embed.runtimes import prepared
from opendino.embed.runtimes.prepared import PreparedViT, packs
from opendino.embed.runtimes.pytorch import TorchRuntime
from opendino.images.preprocess import normalise
from opendino.models.config import PreprocessSpec, ViTConfig
from opendino.models.vit import VisionTransformer
from opendino.native.build import Kernels

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


def test_an_embedder_in_bf16_is_prepared_and_sees_later_changes_of_the_weights():
    model = make_model()
    embedder = Embedder(model, precision="bf16", size=56, what=["cls"])
    picture = np.random.default_rng(0).integers(0, 256, (60, 70, 3), dtype=np.uint8)
    exact = Embedder(model, size=56, what=["cls"])
    before = embedder([picture]).cls
    np.testing.assert_allclose(before, exact([picture]).cls, atol=0.15)
    assert isinstance(embedder.runtime._prepared, PreparedViT) == packs(torch.bfloat16)
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.mul_(2)
    after = embedder([picture]).cls
    assert np.abs(after - before).max() > 0.3
    np.testing.assert_allclose(after, exact([picture]).cls, atol=0.15)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", ["mlp", "four channels"])
def test_pixels_give_the_tokens_of_normalised_images(precision, shape):
    model = make_model(**SHAPES[shape])
    channels = model.config.in_chans
    model.preprocess = PreprocessSpec(mean=(0.485, 0.02, 0.999, 0.4)[:channels], std=(0.2, 0.03, 0.5, 1)[:channels])
    pixels = torch.randint(0, 256, (3, channels, 61, 75), dtype=torch.uint8)
    want = plain_tokens(model, normalise(pixels, model.preprocess))
    tokens = PreparedViT(model, precision).tokens(pixels)
    if precision == "fp32":
        torch.testing.assert_close(tokens, want, atol=2e-5, rtol=2e-5)
    away = one_minus_cosine(tokens, want)
    assert away.mean() < 5e-5
    # Pixels are exact in bf16; normalised values are two numbers each. What is left is the rounding of the weights.
    assert (
        away.mean()
        < 1.5 * one_minus_cosine(PreparedViT(model, precision).tokens(normalise(pixels, model.preprocess)), want).mean()
        + 1e-12
    )


def test_a_prepared_runtime_takes_pixels_and_a_plain_one_normalises_them():
    model = make_model()
    pixels = torch.randint(0, 256, (2, 3, 56, 56), dtype=torch.uint8)
    fast, plain = TorchRuntime(model, "bf16"), TorchRuntime(model, "fp32")
    assert fast.takes_pixels == packs(torch.bfloat16)
    assert not plain.takes_pixels
    want = plain.tokens(normalise(pixels, model.preprocess), 1)
    assert torch.equal(plain.tokens(pixels, 1), want)
    assert one_minus_cosine(fast.tokens(pixels, 1), want).mean() < 5e-5


@pytest.mark.parametrize(
    ("threads", "batch", "size"), [(2, 32, 4), (2, 8, 4), (2, 1, 1), (1, 32, 5), (3, 32, 4), (2, 11, 3)]
)
def test_every_thread_gets_as_many_pieces(monkeypatch, threads, batch, size):
    monkeypatch.setattr(prepared, "PIECE_VALUES", 5 * 17 * 128)  # five images of 16 patches and a cls token
    images = torch.zeros(batch, 3, 56, 56, dtype=torch.uint8)
    assert PreparedViT(make_model(), "fp32", threads).piece_size(images) == size


def test_a_model_made_in_inference_mode_is_prepared_too():
    picture = np.random.default_rng(0).integers(0, 256, (60, 70, 3), dtype=np.uint8)
    with torch.inference_mode():
        inside = Embedder(make_model(), precision="bf16", size=56, what=["cls"])([picture]).cls
    np.testing.assert_array_equal(
        inside, Embedder(make_model(), precision="bf16", size=56, what=["cls"])([picture]).cls
    )
