# SPDX-License-Identifier: Apache-2.0
"""Orders of an epoch: nothing twice, nothing lost, near neighbours stay near, and any part can be asked for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opendino.errors import ConfigError
from opendino.pretrain.order import FullShuffle, StepSampler, WindowedShuffle, choose_order

groups_of = st.lists(st.integers(0, 30), min_size=1, max_size=25).filter(lambda g: sum(g) > 0).map(np.array)


@given(groups_of, st.integers(1, 60), st.integers(0, 2**32), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_an_epoch_has_every_image_once(groups, window, seed, epoch):
    order = WindowedShuffle(groups, window, seed)
    n = int(groups.sum())
    assert sorted(order.at(epoch, 0, n).tolist()) == list(range(n))


@given(groups_of, st.integers(1, 60), st.integers(0, 99), st.data())
@settings(max_examples=60, deadline=None)
def test_any_part_of_an_epoch_is_the_same_whoever_asks(groups, window, seed, data):
    n = int(groups.sum())
    first = data.draw(st.integers(0, n))
    last = data.draw(st.integers(first, n))
    epoch = data.draw(st.integers(0, 3))
    used = WindowedShuffle(groups, window, seed)
    for _ in range(2):  # with what it has kept, after other epochs too
        whole = used.at(epoch, 0, n)
        assert WindowedShuffle(groups, window, seed).at(epoch, first, last).tolist() == whole[first:last].tolist()
        assert used.at(epoch, first, last).tolist() == whole[first:last].tolist()
        used.at(epoch + 1, 0, n)


@given(groups_of, st.integers(1, 60), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_a_window_holds_whole_groups_but_for_its_ends(groups, window, seed):
    """Against the whole order written down: permuted groups end to end, each window a shuffle of its part."""
    order = WindowedShuffle(groups, window, seed)
    n = int(groups.sum())
    shuffled = order.at(0, 0, n)
    group_of = np.repeat(np.arange(len(groups)), groups)
    firsts = np.cumsum(groups) - groups
    laid_out = np.concatenate([firsts[g] + np.arange(groups[g]) for g in order._order])
    for start in range(0, n, window):
        assert sorted(shuffled[start : start + window]) == sorted(laid_out[start : start + window])
        inside = group_of[shuffled[start : start + window]]
        cut = [g for g in set(inside.tolist()) if (inside == g).sum() < groups[g]]
        assert len(cut) <= 2


def test_windows_and_groups_are_shuffled_anew_in_each_epoch():
    order = WindowedShuffle(np.full(100, 10), 100, seed=0)
    first, second = order.at(0, 0, 1000), order.at(1, 0, 1000)
    assert (first == second).mean() < 0.02
    assert (np.diff(first[:100]) == 1).mean() < 0.1
    assert len(set((first[:100] // 10).tolist())) <= 11
    other = WindowedShuffle(np.full(100, 10), 100, seed=1).at(0, 0, 1000)
    assert (first == other).mean() < 0.02
    assert abs(np.corrcoef(np.arange(1000), first)[0, 1]) < 0.2  # groups come from all over the data


def test_a_hundred_million_images_cost_one_window():
    order = WindowedShuffle(np.full(400_000, 256), 8192, seed=0)
    part = order.at(7, 50_000_000, 50_000_064)
    assert len(set(part.tolist())) == 64
    assert sum(w.nbytes for w in order._windows.values()) < 1_000_000


def test_sources_get_the_order_that_suits_them():
    class Source:
        groups, max_window = None, None

        def __len__(self):
            return 10

    assert isinstance(choose_order(Source(), 0, 5), FullShuffle)
    Source.groups = np.array([5, 5])
    assert choose_order(Source(), 0, 5).window == 5
    Source.max_window = 3
    assert choose_order(Source(), 0, 5).window == 3
    with pytest.raises(ConfigError, match="shuffle_buffer is 0"):
        choose_order(Source(), 0, 0)


@given(
    groups_of.filter(lambda g: g.sum() >= 12),
    st.integers(1, 3),
    st.sampled_from([1, 2, 3, 4, 6, 12]),
    st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_processes_share_each_batch_and_keep_its_counters(groups, epochs, processes, seed):
    n = int(groups.sum())
    make = lambda shard: StepSampler(n, 12, seed, order=WindowedShuffle(groups, 7, seed), shard=shard)  # noqa: E731
    samplers = [make((r, processes)) for r in range(processes)]
    whole = make((0, 1))
    for step in range(epochs * (n // 12)):
        parts = [s.at(step) for s in samplers]
        assert [r for part in parts for r in part] == whole.at(step)
        assert {len(p) for p in parts} == {12 // processes}
        assert [c for _, c in whole.at(step)] == list(range(12 * step, 12 * step + 12))


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(ConfigError, match=r"batch of 10 images cannot be shared evenly by 4 processes"):
        StepSampler(20, 10, 0, shard=(0, 4))
