# SPDX-License-Identifier: Apache-2.0
"""The projection head: shapes, unit norms, the published weight normalisation, half precision."""

import math

import pytest
import torch
from torch import nn

from opendino.pretrain.heads import DINOHead, Prototypes


def head(**options) -> DINOHead:
    torch.manual_seed(0)
    return DINOHead(12, 20, **{"hidden_dim": 16, "bottleneck_dim": 6, **options})


def test_shapes_of_the_published_head():
    with torch.device("meta"):
        published = DINOHead(384, 65_536)
    shapes = {name: tuple(p.shape) for name, p in published.named_parameters()}
    assert shapes == {
        "mlp.0.weight": (2048, 384), "mlp.0.bias": (2048,), "mlp.2.weight": (2048, 2048), "mlp.2.bias": (2048,),
        "mlp.4.weight": (256, 2048), "mlp.4.bias": (256,), "last_layer.weight": (65_536, 256),
    }  # fmt: skip
    assert head()(torch.randn(5, 12)).shape == (5, 20)
    assert head()(torch.randn(0, 12)).shape == (0, 20)


@pytest.mark.parametrize("num_layers", [1, 2, 4])
def test_number_of_layers(num_layers):
    linear = [m for m in head(num_layers=num_layers).mlp if isinstance(m, nn.Linear)]
    assert next((m.in_features, m.out_features) for m in linear)[0] == 12
    assert [(m.in_features, m.out_features) for m in linear][-1][1] == 6
    assert len(linear) == num_layers


def test_forward_equals_the_formula_step_by_step():
    network, x = head(), torch.randn(3, 12)
    first, second, third = (m for m in network.mlp if isinstance(m, nn.Linear))

    def gelu(t):
        return 0.5 * t * (1 + torch.erf(t / math.sqrt(2)))

    z = gelu(gelu(x @ first.weight.T + first.bias) @ second.weight.T + second.bias) @ third.weight.T + third.bias
    z = z / z.norm(dim=1, keepdim=True)
    rows = network.last_layer.weight / network.last_layer.weight.norm(dim=1, keepdim=True)
    torch.testing.assert_close(network(x), z @ rows.T)


def test_logits_are_cosines():
    """Both sides have unit norm: a row put in as the bottleneck gives exactly 1 at its own prototype."""
    layer = Prototypes(6, 20)
    rows = nn.functional.normalize(layer.weight.detach() * 7, dim=1)
    logits = layer(rows)
    torch.testing.assert_close(logits.diagonal(), torch.ones(20))
    assert logits.abs().max() <= 1 + 1e-6
    seen = []
    network = head()
    network.last_layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    network(torch.randn(9, 12) * 100)
    torch.testing.assert_close(seen[0].norm(dim=1), torch.ones(9))


def test_prototypes_equal_torchs_weight_norm_with_fixed_norms_in_value_and_gradient():
    ours = Prototypes(6, 20)
    theirs = nn.utils.parametrizations.weight_norm(nn.Linear(6, 20, bias=False))
    theirs.parametrizations.weight.original0.data.fill_(1)
    theirs.parametrizations.weight.original1.data.copy_(ours.weight)
    x, probe = torch.randn(5, 6), torch.randn(5, 20)
    grads = []
    for layer, weight in ((ours, ours.weight), (theirs, theirs.parametrizations.weight.original1)):
        out = layer(x)
        (out * probe).sum().backward()
        grads.append((out, weight.grad))
    torch.testing.assert_close(grads[0], grads[1])


def test_initial_weights_are_narrow_and_biases_zero():
    network = head(hidden_dim=200)
    weights = torch.cat([m.weight.flatten() for m in network.mlp if isinstance(m, nn.Linear)])
    assert weights.std().item() == pytest.approx(0.02, rel=0.05)
    assert all((m.bias == 0).all() for m in network.mlp if isinstance(m, nn.Linear))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_and_close(dtype):
    network, x = head(), torch.randn(5, 12)
    exact = network(x)
    with torch.autocast("cpu", dtype):
        mixed = network(x)
    torch.testing.assert_close(mixed.float(), exact, atol=0.02, rtol=0)
    torch.testing.assert_close(head().to(dtype)(x.to(dtype)).float(), exact, atol=0.02, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_bottleneck_of_zeros_is_finite_in_value_and_gradient(dtype):
    network = head().to(dtype)
    x = torch.zeros(4, 12, dtype=dtype, requires_grad=True)  # all biases start at 0
    out = network(x)
    out.float().square().sum().backward()
    assert (out == 0).all()
    assert all(p.grad.isfinite().all() for p in network.parameters())


def test_batch_norm_standardises_hidden_layers_and_bottleneck():
    network = head(batch_norm=True)
    kinds = [type(m).__name__ for m in network.mlp]
    assert kinds == ["Linear", "BatchNorm", "GELU", "Linear", "BatchNorm", "GELU", "Linear", "BatchNorm"]
    z = network.mlp(torch.randn(64, 12) * 1e-2 + 3)  # nearly equal features
    torch.testing.assert_close(z.mean(0), torch.zeros(6), atol=1e-5, rtol=0)
    assert (z.std(0, unbiased=False) > 0.9).all()
    assert not any("running" in n for n, _ in network.named_parameters())


@pytest.mark.parametrize("rows", [0, 1])
def test_batch_norm_of_fewer_than_two_rows_takes_the_running_statistics(rows):
    network = head(batch_norm=True)
    network(torch.randn(32, 12))
    before = {k: v.clone() for k, v in network.named_buffers()}
    x = torch.randn(rows, 12)
    out = network(x)
    assert all(torch.equal(v, before[k]) for k, v in network.named_buffers())
    torch.testing.assert_close(out, network.eval()(x))
