# SPDX-License-Identifier: Apache-2.0
"""DINO, iBOT and KoLeo against double loops in float64, and KoLeo where logarithms and roots go wrong."""

import math

import numpy as np
import pytest
import torch

from opendino.pretrain.losses import dino_loss, ibot_loss, koleo_loss, mask_weights


def log_softmax(row):
    row = row.astype(np.float64)
    return row - row.max() - math.log(np.exp(row - row.max()).sum())


def cross_entropy(target, logits, temp):
    return -float((target.astype(np.float64) * log_softmax(logits.astype(np.float64) / temp)).sum())


def probabilities(rows, columns):
    return torch.softmax(torch.randn(rows, columns), dim=-1)


@pytest.mark.parametrize("num_local", [0, 1, 3])
def test_dino_equals_the_mean_over_all_pairs(num_local):
    torch.manual_seed(num_local)
    images, k = 3, 7
    first, second = torch.randn(images, k), torch.randn(images, k)
    local = [torch.randn(images, k) for _ in range(num_local)]
    targets = [probabilities(images, k), probabilities(images, k)]
    global_pairs, local_pairs = [], []
    for i in range(images):
        for t, target in enumerate(targets):
            for s, student in enumerate((first, second)):
                if s != t:
                    global_pairs.append(cross_entropy(target[i].numpy(), student[i].numpy(), 0.2))
            for student in local:
                local_pairs.append(cross_entropy(target[i].numpy(), student[i].numpy(), 0.2))
    assert len(global_pairs) + len(local_pairs) == images * (2 + 2 * num_local)
    loss, parts = dino_loss(
        torch.cat([first, second]), torch.cat(local) if local else None, torch.cat(targets), student_temp=0.2
    )
    assert loss.item() == pytest.approx(np.mean(global_pairs + local_pairs), rel=1e-5)
    pairs = images * (2 + 2 * num_local)
    assert parts["dino_global"].item() == pytest.approx(sum(global_pairs) / pairs, rel=1e-5)
    assert parts["dino_local"].item() == pytest.approx(sum(local_pairs) / pairs, rel=1e-5)


def test_dino_parts_add_up_and_carry_no_graph():
    logits = torch.randn(4, 5, requires_grad=True)
    loss, parts = dino_loss(logits, torch.randn(6, 5), probabilities(4, 5))
    assert loss.item() == pytest.approx(sum(p.item() for p in parts.values()), rel=1e-6)
    assert not any(p.requires_grad for p in parts.values())


def test_dino_by_hand_for_certain_targets():
    """Student 1 votes for prototype 0 with probability 1/2 at temperature 1, and so on: −log of what it gave."""
    given = torch.tensor([[0.5, 0.5], [0.25, 0.75]])  # first and second global crop of one image
    target = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    loss, _ = dino_loss(given.log(), None, target, student_temp=1.0)
    assert loss.item() == pytest.approx(-(math.log(0.5) + math.log(0.25)) / 2, rel=1e-6)


def test_dino_of_the_published_crops_weighs_global_2_and_local_16_of_18():
    images, k = 2, 4
    _, parts = dino_loss(torch.zeros(2 * images, k), torch.zeros(8 * images, k), probabilities(2 * images, k))
    assert parts["dino_global"].item() == pytest.approx(math.log(k) * 2 / 18, rel=1e-5)
    assert parts["dino_local"].item() == pytest.approx(math.log(k) * 16 / 18, rel=1e-5)


def test_a_crop_is_not_its_own_target():
    """The gradient of the first global crop does not depend on the first target."""
    logits = torch.randn(2, 5, requires_grad=True)
    a, b = probabilities(2, 5), probabilities(2, 5)
    b[1] = a[1]
    grads = [torch.autograd.grad(dino_loss(logits, None, t)[0], logits)[0] for t in (a, b)]
    assert torch.equal(grads[0][0], grads[1][0])
    assert not torch.equal(grads[0][1], grads[1][1])


def test_ibot_equals_the_loop_over_all_global_crops():
    torch.manual_seed(0)
    masks = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 1]], dtype=torch.bool)
    student, teacher = torch.randn(6, 5), probabilities(6, 5)
    total, row = 0.0, 0
    for crop in masks.numpy():
        terms = []
        for hidden in crop:
            if hidden:
                terms.append(cross_entropy(teacher[row].numpy(), student[row].numpy(), 0.3))
                row += 1
        total += float(np.mean(terms)) if terms else 0.0
    loss = ibot_loss(student, teacher, mask_weights(masks), num_crops=4, student_temp=0.3)
    assert loss.item() == pytest.approx(total / 4, rel=1e-5)


def test_mask_weights_by_hand():
    masks = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 0, 0]], dtype=torch.bool)
    assert mask_weights(masks).tolist() == [0.5, 0.5, 1.0]
    assert mask_weights(torch.zeros(2, 3, dtype=torch.bool)).shape == (0,)


@pytest.mark.parametrize("loss", ["dino", "ibot"])
def test_cross_entropies_are_fp32_for_half_precision_logits(loss):
    logits = (torch.randn(4, 9) * 3).half()
    targets = probabilities(4, 9)
    if loss == "dino":
        half, exact = (dino_loss(x, None, targets, 0.1)[0] for x in (logits, logits.double()))
    else:
        half, exact = (ibot_loss(x, targets, torch.ones(4), 4) for x in (logits, logits.double()))
    assert half.dtype is torch.float32
    assert half.item() == pytest.approx(exact.item(), rel=1e-6)


def slow_koleo(x):
    x = x.astype(np.float64)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    nearest = [min(np.linalg.norm(x[i] - x[j]) for j in range(len(x)) if j != i) for i in range(len(x))]
    return -float(np.mean(np.log(nearest)))


def test_koleo_equals_the_loop_and_ignores_length():
    torch.manual_seed(0)
    x = torch.randn(9, 5)
    assert koleo_loss(x).item() == pytest.approx(slow_koleo(x.numpy()), rel=1e-5)
    assert koleo_loss(x * torch.rand(9, 1).add(0.1)).item() == pytest.approx(slow_koleo(x.numpy()), rel=1e-5)


def test_koleo_by_hand():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    assert koleo_loss(x).item() == pytest.approx(-math.log(math.sqrt(2)), rel=1e-6)


def test_koleo_gradient_is_that_of_finite_differences():
    torch.manual_seed(1)
    x = torch.randn(4, 3)
    moved, step = x.clone().requires_grad_(), 1e-5
    koleo_loss(moved).backward()
    for i in range(4):
        for j in range(3):
            a, b = x.double().numpy().copy(), x.double().numpy().copy()
            a[i, j] += step
            b[i, j] -= step
            slope = (slow_koleo(a) - slow_koleo(b)) / (2 * step)
            assert moved.grad[i, j].item() == pytest.approx(slope, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [None, torch.float16, torch.bfloat16])
def test_koleo_of_duplicates_is_finite_in_value_and_gradient(dtype, autocast):
    torch.manual_seed(0)
    rows = torch.randn(3, 16)
    x = torch.cat([rows, rows, rows[:1], torch.randn(2, 16)]).to(dtype).requires_grad_()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        loss = koleo_loss(x)
    loss.backward()
    assert loss.dtype is torch.float32
    assert math.isfinite(loss.item())
    assert x.grad.isfinite().all()
    assert loss.item() > 5  # duplicates cost: seven of nine rows at the smallest distance


def test_koleo_of_equal_rows_has_the_value_of_the_smallest_distance_and_no_gradient():
    x = torch.ones(4, 8, requires_grad=True)
    loss = koleo_loss(x, eps=1e-6)
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(1e-6), rel=1e-5)
    assert torch.equal(x.grad, torch.zeros(4, 8))


def test_koleo_of_nearly_equal_and_of_zero_rows_is_finite():
    x = torch.randn(1, 8).repeat(4, 1)
    x[1, 0] += 1e-7
    x[3] = 0
    x.requires_grad_()
    koleo_loss(x).backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("value", [1.0, math.inf])
def test_koleo_of_one_row_is_zero(value):
    x = torch.full((1, 4), value, requires_grad=True)
    loss = koleo_loss(x)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(x.grad, torch.zeros(1, 4))


def test_koleo_under_autocast_equals_fp32():
    x = torch.randn(6, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(koleo_loss(x), koleo_loss(x.clone()))
        found = koleo_loss(x)
    assert found.item() == pytest.approx(slow_koleo(x.numpy()), rel=1e-5)
