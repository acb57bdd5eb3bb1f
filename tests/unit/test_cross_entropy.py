# SPDX-License-Identifier: Apache-2.0
"""Chunked cross-entropy against whole logits and a loop: value, every gradient, half precision, no rows."""

import math

import pytest
import torch
import torch.nn.functional as F

from opendino.pretrain.centering import TargetRows
from opendino.pretrain.cross_entropy import RowLoss, prototype_cross_entropy

K, D, TEMP, TEACHER_TEMP = 11, 5, 0.1, 0.06


def case(dtype=torch.float64, rows=(7, 9)):
    torch.manual_seed(0)
    z = F.normalize(torch.randn(sum(rows), D, dtype=dtype), dim=1)
    prototypes = torch.randn(K, D, dtype=dtype) * 3
    losses = []
    for i, count in enumerate(rows):
        told = F.normalize(torch.randn(6, D, dtype=dtype), dim=1)
        unit = F.normalize(torch.randn(K, D, dtype=dtype), dim=1)
        targets = TargetRows(told, unit, TEACHER_TEMP, torch.randn(K, dtype=dtype))
        index = torch.randint(0, 6, (count, i + 1))
        losses.append(RowLoss(targets, index, torch.rand(count, dtype=dtype), factor=1.5 - i))
    return z, prototypes, losses


def slow(z, prototypes, losses):
    """One row, one target at a time, by autograd."""
    unit = torch.stack([row / row.norm() for row in prototypes])
    total, parts, first = 0.0, [], 0
    for loss in losses:
        rows = loss.targets
        value = 0.0
        for i in range(len(loss.index)):
            log_student = F.log_softmax(unit @ z[first + i] / TEMP, dim=0)
            for j in loss.index[i]:
                target = torch.softmax(rows.prototypes @ rows.z[j] / rows.temp - rows.offsets, dim=0)
                value = value - loss.weights[i] * (target * log_student).sum()
        first += len(loss.index)
        parts.append(float(value))
        total = total + loss.factor * value
    return total, parts


def gradients(function, z, prototypes, scale=1.0):
    z, prototypes = z.clone().requires_grad_(), prototypes.clone().requires_grad_()
    total, parts = function(z, prototypes)
    (total * scale).backward()
    return total.detach(), parts, z.grad, prototypes.grad


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_chunks_equal_the_loop_in_value_and_gradients(chunk, dtype, tolerance):
    z, prototypes, losses = case(dtype)
    found = gradients(lambda a, b: prototype_cross_entropy(a, b, losses, TEMP, chunk), z, prototypes, scale=3.0)
    wanted = gradients(lambda a, b: slow(a, b, losses), z, prototypes, scale=3.0)
    assert found[0].dtype is dtype
    for a, b in zip((found[0], *found[2:]), (wanted[0], *wanted[2:])):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert found[1].tolist() == pytest.approx(wanted[1], rel=tolerance)
    assert not found[1].requires_grad


def test_a_second_backward_pass_is_refused():
    """The first scales the gradients in place."""
    z, prototypes, losses = case()
    total, _ = prototype_cross_entropy(z.requires_grad_(), prototypes, losses, TEMP)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once only"):
        total.backward()


def test_a_prototype_of_norm_zero_gets_the_gradient_of_normalize():
    z, prototypes, losses = case()
    prototypes[3] = 0

    def whole(a, b):
        logits = a @ F.normalize(b, dim=1).T / TEMP
        first = len(losses[0].index)
        target = losses[0].targets.probabilities(losses[0].index[:, 0])
        return -(losses[0].weights[:, None] * target * F.log_softmax(logits[:first], 1)).sum(), None

    only = [RowLoss(losses[0].targets, losses[0].index, losses[0].weights)]
    first = len(only[0].index)
    found = gradients(lambda a, b: prototype_cross_entropy(a, b, only, TEMP), z[:first], prototypes)
    torch.testing.assert_close(found[2:], gradients(whole, z[:first], prototypes)[2:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_products_stay_close(dtype):
    z, prototypes, losses = case(torch.float32)
    exact = gradients(lambda a, b: prototype_cross_entropy(a, b, losses, TEMP), z, prototypes)
    with torch.autocast("cpu", dtype):
        mixed = gradients(lambda a, b: prototype_cross_entropy(a, b, losses, TEMP, 3), z, prototypes)
    assert all(t.dtype is torch.float32 for t in mixed)
    for a, b in zip(mixed, exact):
        assert (a - b).norm() < 0.02 * b.norm()


def test_fp16_holds_the_gradient_of_one_of_many_prototypes():
    """At K = 65 536 most probabilities lie below the smallest normal fp16 number."""
    torch.manual_seed(0)
    z, prototypes = F.normalize(torch.randn(4, D), dim=1), torch.randn(65_536, D)
    targets = TargetRows(z, F.normalize(prototypes, dim=1), 0.04, torch.zeros(65_536))
    losses = [RowLoss(targets, torch.tensor([[1], [0], [3], [2]]), torch.full((4,), 1e-3))]
    exact = gradients(lambda a, b: prototype_cross_entropy(a, b, losses, TEMP), z, prototypes)
    with torch.autocast("cpu", torch.float16):
        mixed = gradients(lambda a, b: prototype_cross_entropy(a, b, losses, TEMP), z, prototypes)
    for a, b in zip(mixed[2:], exact[2:]):
        assert (a - b).norm() < 0.02 * b.norm()


@pytest.mark.parametrize("autocast", [False, True])
def test_no_rows_give_zero_and_zero_gradients(autocast):
    _, prototypes, losses = case(torch.float32)
    nothing = RowLoss(losses[0].targets, torch.zeros(0, 1, dtype=torch.long), torch.zeros(0))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = gradients(
            lambda a, b: prototype_cross_entropy(a, b, [nothing], TEMP), torch.zeros(0, D), prototypes.float()
        )
    assert float(found[0]) == 0
    assert found[2].shape == (0, D)
    assert torch.equal(found[3], torch.zeros(K, D))


def test_extreme_logits_are_finite():
    z, prototypes, losses = case(torch.float32)
    found = gradients(lambda a, b: prototype_cross_entropy(a * 1e3, b, losses, 0.01), z, prototypes)
    assert math.isfinite(float(found[0]))
    assert all(g.isfinite().all() for g in found[2:])


def test_without_gradients_only_the_value_is_computed():
    z, prototypes, losses = case()
    with torch.no_grad():
        total, parts = prototype_cross_entropy(z, prototypes, losses, TEMP)
    assert float(total) == pytest.approx(float(slow(z, prototypes, losses)[0]), rel=1e-12)
    assert float(total) == pytest.approx(sum(x.factor * p for x, p in zip(losses, parts.tolist())), rel=1e-12)
