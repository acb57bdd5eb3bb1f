# SPDX-License-Identifier: Apache-2.0
"""The cheap first pass of a search for exact nearest neighbours: who could be among the k nearest?

**The bound.** q, x are unit vectors, c any vector, y = x − c; items are ranked for one query by q·y as by q·x, since
q·c is the same for all. With the rounded Q, Y that are multiplied, e = |Q − q|, f = |Y − y| measured for every row:
|Q·Y − q·y| = |Q·(Y − y) + (Q − q)·y| ≤ (1 + e) f + e |y|. Products of bf16 are exact in fp32, and summing D of them
there in any order costs at most D 2^-24 |Q| |Y| (1 + tiny); twice that is allowed for. Call the sum E. k items have a
first-pass value of at least A, the k-th best, so the k-th best cosine is at least A − E (less q·c), and no item below
A − 2E is needed. The result of a bf16 product is rounded once more, monotonely, by at most 2^-8 |A|. A centre c near
the mean of the items makes y short, and the bound tight for features that all point one way.

Shapes: N training items, m queries, D width, k neighbours, n items in a block.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

log = logging.getLogger(__name__)

BLOCK = 8192
"""Items compared at once in the first pass: with 1024 queries the products fill 16 MiB."""
PREPARED = 1024
"""Items that are normalised at once: freed parts of tens of MiB are kept by the allocator, and add up."""
GROUP = 16
"""Columns whose maximum is looked at first."""
MOST_HITS = 1 << 16
"""Groups that are looked into at once; bounds the memory of the first blocks, whose thresholds are low."""
PAIRS = 2048
"""Pairs whose float64 cosines are computed at once."""
LIMIT = 4096
"""Pairs a query may have, or 8 k if that is more; with more it is searched more precisely."""
SLACK = 2e-6
"""Above what fp32 rounding of unit vectors and of the measured distances can add to E."""
_T = TypeVar("_T")
_S = TypeVar("_S")
Found = tuple[Tensor, Tensor, Tensor]
"""Query rows, item indices, first-pass values; one entry a pair."""


def in_threads(function: Callable[[_T], _S], parts: Sequence[_T]) -> list[_S]:
    """Map with as many threads as torch has, each of which computes alone.

    Threads with work of their own do not wait for each other at every operation, as those that share one operation
    do: on a busy machine that is several times as fast.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(parts) < 2:
        return list(map(function, parts))
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(function, parts))
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class _Asked:
    """Queries as the first pass sees them: rounded (m, D), exact unit rows in float64, and E for each."""

    rounded: Tensor
    exact: Tensor
    error: Tensor


class FirstPass:
    """Training items, rounded, in blocks that are each a regular sample of them all, so that thresholds rise early.

    Args:
        train: (N, D) on the CPU.
        lengths: (N,) float64, above 0.
        dtype: bfloat16 keeps a rounded copy; float32 makes each block when it is needed.

    Attributes:
        error: largest |Y − y| of an item.
        length: largest |y|.
    """

    def __init__(self, train: Tensor, lengths: Tensor, dtype: torch.dtype) -> None:
        self.train, self.lengths, self.dtype = train, lengths, dtype
        self.num_blocks = -(-len(train) // BLOCK)
        step = max(len(train) // BLOCK, 1)
        self.centre = (train[::step].double() / lengths[::step, None]).mean(0)  # (D,)
        self.output_rounding = 2.0**-8 if dtype == torch.bfloat16 else 0.0
        self.error = self.length = 0.0
        self._copy: Tensor | None = None
        if dtype == torch.bfloat16:
            self._copy = self._rounded_copy()
        else:  # rounding moves a component of size ≤ 1 + |c| by a 2^-24th of it, twice
            self.error, self.length = 0.0, 1 + float(self.centre.norm())

    def block(self, number: int) -> Tensor:
        """Give the rounded y of the items number, number + num_blocks, …, (n, D)."""
        size = len(range(number, len(self.train), self.num_blocks))
        if self._copy is not None:
            rounded: Tensor = self._copy[number, :size]
            return rounded
        return self._centred(slice(number, None, self.num_blocks))

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Give cosines (m, k), indices (m, k), and which rows (m,) are certain; the others hold anything."""
        asked = self._asked(queries)
        found, certain = self._candidates(asked, k)
        values, index, sound = self._rank(asked, found, k)
        if not bool(sound[certain].all()):
            log.warning("Products in %s differ by more than their bound; those rows are searched again.", self.dtype)
        return values, index, certain & sound

    def _centred(self, rows: slice) -> Tensor:
        y: Tensor = (self.train[rows].double() / self.lengths[rows, None]).float() - self.centre.float()
        return y

    def _rounded_copy(self) -> Tensor:
        """Read the items once, in their order, and put item p·num_blocks + b at place p of block b."""
        total, width = self.train.shape
        copy = torch.zeros(self.num_blocks, -(-total // self.num_blocks), width, dtype=self.dtype)
        step = max(PREPARED // self.num_blocks, 1)

        def fill(place: int) -> tuple[float, float]:
            y = self._centred(slice(place * self.num_blocks, (place + step) * self.num_blocks))
            rounded = y.to(self.dtype)
            whole = len(y) // self.num_blocks
            edge = whole * self.num_blocks  # the last place has items in the first blocks only
            copy[:, place : place + whole] = rounded[:edge].unflatten(0, (whole, self.num_blocks)).transpose(0, 1)
            if edge < len(y):
                copy[: len(y) - edge, place + whole] = rounded[edge:]
            return float((rounded.float() - y).norm(dim=1).max()), float(y.norm(dim=1).max())

        sizes = in_threads(fill, range(0, copy.shape[1], step))
        self.error, self.length = (max(part) for part in zip(*sizes, strict=True))
        return copy

    def _asked(self, queries: Tensor) -> _Asked:
        exact = queries.double()
        exact = exact / exact.norm(dim=1, keepdim=True).clamp_min(1e-12)
        rounded = exact.to(self.dtype)
        off = (rounded.double() - exact).norm(dim=1)
        size = (1 + off) * (self.length + self.error)
        summing = 2 * exact.shape[1] * 2.0**-24 * size
        return _Asked(rounded, exact, (off * self.length + (1 + off) * self.error + summing + SLACK).float())

    def _threshold(self, best: Tensor, asked: _Asked) -> Tensor:
        lower = best - self.output_rounding * best.abs() if self.output_rounding else best
        return lower - 2 * asked.error

    def _candidates(self, asked: _Asked, k: int) -> tuple[Found, Tensor]:
        """Give every pair that may be among the k nearest of a row, and which rows (m,) kept to the limit."""
        m = len(asked.rounded)
        limit, certain = max(LIMIT, 8 * k), torch.ones(m, dtype=torch.bool)
        best = threshold = torch.full((m,), -torch.inf)
        found: list[Found] = []
        room = torch.empty(m * -(-len(self.train) // self.num_blocks), dtype=self.dtype)  # for one block's products
        for number in range(self.num_blocks):
            block = self.block(number)
            products = room[: m * len(block)].view(m, len(block))
            torch.mm(asked.rounded, block.T, out=products)
            if number == 0 and k <= products.shape[1]:
                best = products.topk(k, dim=1).values[:, -1].float()
                threshold = self._threshold(best, asked)
            rows, places, values = select(products, threshold)
            found.append((rows, places * self.num_blocks + number, values.float()))
            if sum(len(f[0]) for f in found[1:]) > 2 * k * m or number == self.num_blocks - 1:
                joined = _join(found)
                certain &= torch.bincount(joined[0], minlength=m) <= limit
                joined = _only(joined, certain[joined[0]])
                best = torch.maximum(best, _kth(joined, m, k))
                threshold = self._threshold(best, asked).masked_fill(~certain, torch.inf)
                found = [_only(joined, joined[2] >= threshold[joined[0]])]
        return found[0], certain

    def _rank(self, asked: _Asked, found: Found, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rank the pairs by their float64 cosines, equal ones by index; also say which rows keep to the bound."""
        m, shift = len(asked.exact), asked.exact @ self.centre
        rows, items, values = _only(found, torch.argsort(found[0] * len(self.train) + found[1]))
        counts = torch.bincount(rows, minlength=m)
        starts = counts.cumsum(0) - counts
        cosines, index = torch.zeros(m, k), torch.zeros(m, k, dtype=torch.long)
        sound = torch.ones(m, dtype=torch.bool)
        allowed = asked.error.double()
        for group in _groups(counts, PAIRS):
            width = int(counts[group].max())
            place = starts[group, None] + torch.arange(width)  # (g, width)
            there = torch.arange(width) < counts[group, None]
            place = place.clamp_max(len(items) - 1)
            which = items[place]
            vectors = self.train.index_select(0, which.flatten()).double().unflatten(0, which.shape)  # (g, width, D)
            exact = (vectors @ asked.exact[group, :, None])[..., 0] / self.lengths[which]
            off = (values[place] - (exact - shift[group, None])).abs() - self.output_rounding * values[place].abs()
            sound[group] = ((off <= allowed[group, None]) | ~there).all(1)
            ranked, order = exact.masked_fill(~there, -torch.inf).sort(dim=1, descending=True, stable=True)
            cosines[group], index[group] = ranked[:, :k].float(), which.gather(1, order[:, :k])
        return cosines, index, sound


def select(products: Tensor, threshold: Tensor) -> Found:
    """Give all entries of (m, n) that are at least their row's threshold (m,): rows, columns, values.

    Positive floats are ordered as their bits are, and all negative ones have smaller bits, so above 0 integers are
    compared: several times faster than bf16. Thresholds are rounded down. Groups of columns are looked at by their
    maxima first.
    """
    if bool((threshold > 0).all()):
        bits = threshold.float().contiguous().view(torch.int32)
        if products.dtype == torch.bfloat16:
            values, least = products.view(torch.int16), (bits >> 16).to(torch.int16)
        else:
            values, least = products.view(torch.int32), bits
    else:
        loose = threshold - 2.0**-7 * threshold.abs() if products.dtype == torch.bfloat16 else threshold
        values, least = products, loose.nan_to_num(nan=torch.inf, neginf=-torch.inf).to(products.dtype)  # inf − inf
    main = products.shape[1] // GROUP * GROUP
    found = []
    if main:
        tops = values[:, :main].unflatten(1, (GROUP, -1)).amax(1)  # (m, main / GROUP)
        for hits in (tops >= least[:, None]).nonzero().split(MOST_HITS):
            rows, group = hits.T
            columns = group[:, None] + torch.arange(GROUP) * (main // GROUP)  # (h, GROUP)
            keep = values.take(rows[:, None] * products.shape[1] + columns) >= least[rows, None]
            found.append((rows[:, None].expand_as(columns)[keep], columns[keep]))
    rows, columns = (values[:, main:] >= least[:, None]).nonzero(as_tuple=True)
    found.append((rows, columns + main))
    rows, columns = (torch.cat(part) for part in zip(*found, strict=True))
    return rows, columns, products[rows, columns]


def _join(found: list[Found]) -> Found:
    rows, items, values = (torch.cat(part) for part in zip(*found, strict=True))
    return rows, items, values


def _only(found: Found, which: Tensor) -> Found:
    return found[0][which], found[1][which], found[2][which]


def _kth(found: Found, m: int, k: int) -> Tensor:
    """Give the k-th best value of each row (m,), −inf for a row with fewer."""
    rows, order = found[0].sort(stable=True)
    counts = torch.bincount(rows, minlength=m)
    width = max(int(counts.max()), k)
    table = torch.full((m, width), -torch.inf)
    table[rows, torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]] = found[2][order]
    return table.topk(k, dim=1).values[:, -1]


def _groups(counts: Tensor, pairs: int) -> list[Tensor]:
    """Part the rows that have entries into groups of about `pairs` entries, padding counted."""
    rows = counts.argsort()
    rows = rows[counts[rows] > 0]
    groups, start, sizes = [], 0, counts[rows].tolist()
    while start < len(rows):
        stop = start + 1
        while stop < len(rows) and (stop + 1 - start) * sizes[stop] <= pairs:
            stop += 1
        groups.append(rows[start:stop])
        start = stop
    return groups
