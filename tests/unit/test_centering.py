# SPDX-License-Identifier: Apache-2.0
"""Sinkhorn–Knopp against a float64 loop, its sums, its extremes; the moving centre by its formula."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opendino.pretrain.centering import MovingCenter, TargetRows, sinkhorn_knopp, sinkhorn_offsets


def slow_sinkhorn(logits, temp, n_iterations):
    """Columns (samples) and rows (prototypes) of the transposed matrix, entry by entry."""
    q = np.exp(np.asarray(logits, np.float64) / temp).T  # (K, n)
    k, n = q.shape
    q = q / q.sum()
    for _ in range(n_iterations):
        for i in range(k):
            q[i] = q[i] / q[i].sum() / k
        for j in range(n):
            q[:, j] = q[:, j] / q[:, j].sum() / n
    return (q * n).T


@pytest.mark.parametrize("n_iterations", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", [(6, 4), (3, 8), (1, 5)])
def test_sinkhorn_equals_the_loop(shape, n_iterations):
    torch.manual_seed(0)
    logits = torch.randn(shape).clamp(-1, 1)
    found = sinkhorn_knopp(logits, 0.07, n_iterations)
    assert found.dtype is torch.float32
    np.testing.assert_allclose(found.numpy(), slow_sinkhorn(logits.numpy(), 0.07, n_iterations), rtol=2e-4, atol=1e-7)


def test_default_is_three_iterations():
    logits = torch.randn(6, 4)
    assert torch.equal(sinkhorn_knopp(logits, 0.1), sinkhorn_knopp(logits, 0.1, n_iterations=3))


def test_converged_rows_share_one_and_prototypes_share_the_samples():
    q = sinkhorn_knopp(torch.randn(12, 5), 0.5, n_iterations=100)
    torch.testing.assert_close(q.sum(1), torch.ones(12))
    torch.testing.assert_close(q.sum(0), torch.full((5,), 12 / 5), rtol=1e-3, atol=0)


def test_equal_logits_give_uniform_targets():
    torch.testing.assert_close(sinkhorn_knopp(torch.full((4, 8), 0.3), 0.04), torch.full((4, 8), 1 / 8))


def test_logits_of_a_thousand_are_finite_and_every_row_sums_to_one():
    torch.manual_seed(0)
    for logits in (torch.randn(20, 7) * 1e3, torch.tensor([[1e3, -1e3], [-1e3, 1e3], [-1e3, -1e3]])):
        q = sinkhorn_knopp(logits, 0.04)
        assert q.isfinite().all()
        torch.testing.assert_close(q.sum(1), torch.ones(len(logits)))


def test_a_sample_far_below_the_others_keeps_its_preference():
    """Adding a constant to one row changes only how much it counts in the first scaling of the prototypes."""
    logits = torch.tensor([[0.0, 1.0], [1.0, 0.0], [-99.0, -100.0]])
    q = sinkhorn_knopp(logits, 0.04, n_iterations=3)
    assert q[2, 0] > 0.99
    torch.testing.assert_close(q.sum(1), torch.ones(3))


def test_a_prototype_that_underflows_gets_the_share_of_the_formula():
    """exp(−100) is 0 in fp32 beside exp(100); in float64 it is not, and the formula then gives it its samples."""
    torch.manual_seed(0)
    logits = torch.randn(8, 4)
    logits[:, 2] -= 200
    assert (torch.exp(logits[:, 2] - logits.max()) == 0).all()
    found = sinkhorn_knopp(logits, 1.0)
    np.testing.assert_allclose(found.numpy(), slow_sinkhorn(logits.numpy(), 1.0, 3), rtol=1e-3)
    assert found[:, 2].sum() > 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_balanced_in_fp32(dtype):
    logits = torch.randn(6, 4).to(dtype)
    assert torch.equal(sinkhorn_knopp(logits, 0.04), sinkhorn_knopp(logits.float(), 0.04))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sinkhorn_knopp(logits, 0.04), sinkhorn_knopp(logits.float(), 0.04))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(2, 9), st.floats(0.02, 1.0), st.floats(0.0, 1e4), st.integers(0, 99))
def test_any_logits_give_a_probability_per_sample(n, k, temp, spread, seed):
    logits = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * spread
    q = sinkhorn_knopp(logits, temp)
    assert q.isfinite().all()
    assert (q >= 0).all()
    torch.testing.assert_close(q.sum(1), torch.ones(n))


def test_order_of_the_samples_does_not_matter():
    """Micro-batches come in another order than the whole batch."""
    logits, order = torch.randn(10, 4), torch.randperm(10)
    torch.testing.assert_close(sinkhorn_knopp(logits[order], 0.1), sinkhorn_knopp(logits, 0.1)[order])


def test_moving_centre_follows_its_formula():
    torch.manual_seed(0)
    center, expected = MovingCenter(4, momentum=0.9), np.zeros(4)
    for _ in range(5):
        logits = torch.randn(6, 4) + torch.tensor([1.0, 2.0, 3.0, 4.0])
        x = (logits.double().numpy() - expected) / 0.5
        soft = np.exp(x) / np.exp(x).sum(1, keepdims=True)
        np.testing.assert_allclose(center.probabilities(logits, 0.5).numpy(), soft, rtol=1e-5)
        center.update(logits)
        expected = 0.9 * expected + 0.1 * logits.double().numpy().mean(0)
        np.testing.assert_allclose(center.center[0].numpy(), expected, rtol=1e-5)


def test_moving_centre_by_hand():
    center = MovingCenter(2, momentum=0.75)
    center.update(torch.tensor([[4.0, 0.0], [0.0, 8.0]]))
    assert center.center.tolist() == [[0.5, 1.0]]
    ratio = center.probabilities(torch.tensor([[0.5, 1.0 + math.log(3)]]), 1.0)
    torch.testing.assert_close(ratio, torch.tensor([[0.25, 0.75]]))


def test_moving_centre_is_saved_with_the_run():
    center = MovingCenter(3)
    center.update(torch.ones(2, 3))
    other = MovingCenter(3)
    other.load_state_dict(center.state_dict())
    assert torch.equal(other.center, center.center)
    assert not list(center.parameters())


def factors(n, k, dim=5, dtype=torch.float64):
    torch.manual_seed(0)
    return [torch.nn.functional.normalize(torch.randn(rows, dim, dtype=dtype), dim=1) for rows in (n, k)]


@pytest.mark.parametrize("n_iterations", [1, 3, 5])
@pytest.mark.parametrize("chunk", [1, 4, None])
def test_streaming_sinkhorn_equals_the_loop(chunk, n_iterations):
    z, prototypes = factors(10, 7)
    offsets = sinkhorn_offsets(z, prototypes, 0.05, n_iterations, chunk)
    found = TargetRows(z, prototypes, 0.05, offsets).probabilities()
    np.testing.assert_allclose(found, slow_sinkhorn(z @ prototypes.T, 0.05, n_iterations), rtol=1e-9)


def test_streaming_sinkhorn_in_fp32_equals_whole_logits_however_far_they_spread():
    z, prototypes = factors(12, 6, dtype=torch.float32)
    for spread in (1.0, 1e3):
        offsets = sinkhorn_offsets(z * spread, prototypes, 0.04, chunk=5)
        found = TargetRows(z * spread, prototypes, 0.04, offsets).probabilities()
        torch.testing.assert_close(found, sinkhorn_knopp(z @ prototypes.T * spread, 0.04), rtol=1e-3, atol=1e-5)


def test_streaming_sinkhorn_of_bf16_factors_sums_in_fp32():
    z, prototypes = (t.bfloat16() for t in factors(300, 40))
    offsets = sinkhorn_offsets(z, prototypes, 0.07, n_iterations=30)
    found = TargetRows(z, prototypes, 0.07, offsets).probabilities()
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.sum(1), torch.ones(300))
    torch.testing.assert_close(found.sum(0), torch.full((40,), 300 / 40), rtol=1e-2, atol=0)


def test_moving_centre_of_rows_equals_that_of_their_logits():
    z, prototypes = factors(9, 6, dtype=torch.float32)
    rows, whole = MovingCenter(6), MovingCenter(6)
    for part in z.split(3):
        logits = part @ prototypes.T
        targets = TargetRows(part, prototypes, 0.06, rows.offsets(0.06))
        rows.update_rows(part, prototypes)  # does not reach the targets
        torch.testing.assert_close(targets.probabilities(), whole.probabilities(logits, 0.06))
        whole.update(logits)
        torch.testing.assert_close(rows.center, whole.center)
    before = rows.center.clone()
    rows.update_rows(z[:0], prototypes)
    rows.update(torch.zeros(0, 6))
    assert torch.equal(rows.center, before)


def test_targets_of_chosen_rows():
    z, prototypes = factors(9, 6)
    targets = TargetRows(z, prototypes, 0.06, torch.randn(6))
    chosen = torch.tensor([4, 4, 0])
    torch.testing.assert_close(targets.probabilities(chosen), targets.probabilities()[chosen])
    assert len(targets) == 9
    assert targets.probabilities(chosen[:0]).shape == (0, 6)
