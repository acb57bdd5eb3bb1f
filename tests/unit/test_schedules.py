# SPDX-License-Identifier: Apache-2.0
"""Schedules at points that are known by hand, and at their edges."""

import math

import pytest

from opendino.pretrain.schedules import cosine_schedule, linear_warmup, scaled_lr


@pytest.mark.parametrize(
    ("step", "value"),
    [(0, 0.0), (1, 0.2), (5, 1.0), (10, 0.9 * (2 + math.sqrt(2)) / 4 + 0.1), (15, 0.55), (25, 0.1), (30, 0.1)],
)
def test_warmup_then_half_a_cosine(step, value):
    found = cosine_schedule(step, start=1.0, end=0.1, total_steps=25, warmup_steps=5)
    assert found == pytest.approx(value, rel=1e-12)


def test_cosine_goes_up_as_well():
    at = [cosine_schedule(s, start=0.04, end=0.4, total_steps=6) for s in (0, 2, 3, 4, 6)]
    assert at == pytest.approx([0.04, 0.13, 0.22, 0.31, 0.4])


def test_warmup_starts_where_it_is_told_and_is_linear():
    at = [cosine_schedule(s, start=1, end=0, total_steps=100, warmup_steps=4, warmup_start=0.6) for s in range(5)]
    assert at == pytest.approx([0.6, 0.7, 0.8, 0.9, 1.0])


@pytest.mark.parametrize(("warmup", "last"), [(10, 0.9), (20, 0.45)])
def test_a_run_no_longer_than_its_warmup(warmup, last):
    found = [cosine_schedule(s, start=1.0, end=0.0, total_steps=10, warmup_steps=warmup) for s in range(10)]
    assert found[0] == 0
    assert found[-1] == pytest.approx(last)
    assert found == sorted(found)


def test_no_steps_and_constant_schedules():
    assert cosine_schedule(0, start=1.0, end=0.5, total_steps=0) == 0.5
    assert {cosine_schedule(s, start=0.3, end=0.3, total_steps=7) for s in range(9)} == {0.3}


def test_the_end_is_reached_exactly():
    assert cosine_schedule(125_000, start=0.992, end=1.0, total_steps=125_000) == 1.0


def test_linear_warmup():
    at = [linear_warmup(s, 0.04, 0.07, 3) for s in (0, 1, 2, 3, 99)]
    assert at == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07])
    assert linear_warmup(0, 0.04, 0.07, 0) == 0.07


@pytest.mark.parametrize(
    ("rule", "batch", "factor"),
    [("sqrt_wrt_1024", 1024, 1), ("sqrt_wrt_1024", 4096, 2), ("sqrt_wrt_1024", 64, 0.25),
     ("linear_wrt_256", 512, 2), ("linear_wrt_256", 64, 0.25), ("none", 64, 1)],
)  # fmt: skip
def test_learning_rate_by_batch_size(rule, batch, factor):
    assert scaled_lr(4e-3, batch, rule) == pytest.approx(4e-3 * factor)
