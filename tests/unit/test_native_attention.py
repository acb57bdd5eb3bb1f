# SPDX-License-Identifier: Apache-2.0
"""The attention kernels give what a float64 softmax and its gradients give; addition and norm what torch's give."""

import pytest
import torch

from opendino.models.config import ViTConfig
from opendino.models.layers import Attention
from opendino.native import attention
from opendino.native.build import Kernels, kernels

LIBRARY = kernels().library
HAS_ATTENTION = LIBRARY is not None and attention.attention_supported(LIBRARY)
needs_attention = pytest.mark.skipif(not HAS_ATTENTION, reason="this processor has no AVX-512 products of bf16")
needs_kernels = pytest.mark.skipif(LIBRARY is None, reason="there is no C compiler")


def softmax_attention(qkv, heads):
    q, k, v = qkv.unflatten(-1, (3, heads, 64)).permute(2, 0, 3, 1, 4)
    return ((q @ k.transpose(-1, -2) / 8).softmax(-1) @ v).transpose(1, 2).flatten(2)


def relative(a, b):
    return float((a - b).detach().double().norm() / b.detach().double().norm())


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
    got = attention.attend(LIBRARY, qkv.bfloat16(), 1, 1)
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


@needs_attention
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    "shapes", [[(2, 257)], [(4, 17), (6, 5)], [(1, 1), (2, 33)], [(3, 16)], [(0, 5), (2, 6), (1, 70)]]
)
def test_packed_attention_and_its_gradients_equal_float64(shapes, threads):
    torch.manual_seed(len(shapes))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    rows = [b * n for b, n in shapes]
    qkv = torch.randn(sum(rows), 3 * 2 * 64).bfloat16().requires_grad_()
    gradient = torch.randn(sum(rows), 2 * 64).bfloat16()
    try:
        got = attention.packed_attention(qkv, [side for shape in shapes for side in shape], 2)[0]
        got.backward(gradient)
    finally:
        torch.set_num_threads(before)
    exact = qkv.detach().double().requires_grad_()
    parts = [
        softmax_attention(x.unflatten(0, s), 2).flatten(0, 1) for x, s in zip(exact.split(rows), shapes, strict=True)
    ]
    expected = torch.cat(parts)
    expected.backward(gradient.double())
    assert relative(got, expected) < 0.004  # one rounding to bf16 is 0.002
    assert relative(qkv.grad, exact.grad) < 0.006


@needs_attention
def test_gradients_of_large_scores_are_finite():
    qkv = (torch.randn(8, 3 * 64) * 60).bfloat16().requires_grad_()
    attention.packed_attention(qkv, [1, 8], 1)[0].float().square().sum().backward()
    assert qkv.grad.isfinite().all()


@needs_attention
@pytest.mark.parametrize("keep", [None, torch.tensor([0, 9, 17])])
def test_the_layer_uses_the_kernel_for_packed_bf16_tokens_and_agrees_with_the_other_way(keep, monkeypatch):
    torch.manual_seed(0)
    layer = Attention(ViTConfig(img_size=28, embed_dim=128, num_heads=2, depth=1))
    x, shapes, used = torch.randn(18, 128), [(1, 8), (2, 5)], []
    kernel = attention.packed_attention
    monkeypatch.setattr("opendino.models.layers.packed_attention", lambda *args: used.append(1) or kernel(*args))

    def outcome():
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x, shapes, keep)
        out.float().square().sum().backward()
        return out, layer.qkv.weight.grad.clone()

    first = outcome()
    assert used
    monkeypatch.setattr("opendino.models.layers.kernels", lambda: Kernels(None, "off"))
    second = outcome()
    assert len(used) == 1
    assert relative(first[0], second[0]) < 0.02
    assert relative(first[1], second[1]) < 0.02


@needs_attention
def test_heads_of_another_width_and_fp32_go_the_other_way(monkeypatch):
    monkeypatch.setattr("opendino.models.layers.packed_attention", None)
    for heads, dtype in ((4, torch.bfloat16), (2, None)):
        layer = Attention(ViTConfig(img_size=28, embed_dim=128, num_heads=heads, depth=1))
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            assert layer(torch.randn(10, 128), [(2, 5)]).isfinite().all()


@needs_attention
def test_torch_counts_the_products_and_traces_without_data():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    attention.let_torch_count()
    qkv = torch.randn(22, 3 * 2 * 64).bfloat16().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        attention.packed_attention(qkv, [2, 8, 1, 6], 2)[0].float().sum().backward()
    one_product = 2 * (2 * 8 * 8 + 6 * 6) * 2 * 64
    assert counter.get_total_flops() == 6 * one_product
    with FakeTensorMode():
        traced = torch.empty(22, 3 * 2 * 64, dtype=torch.bfloat16, requires_grad=True)
        out, _ = attention.packed_attention(traced, [2, 8, 1, 6], 2)
        out.float().sum().backward()
    assert out.shape == (22, 128)
    assert traced.grad.shape == traced.shape
