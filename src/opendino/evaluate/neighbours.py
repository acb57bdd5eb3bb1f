# SPDX-License-Identifier: Apache-2.0
"""Exact nearest neighbours by cosine similarity, in memory that does not grow with the sets, fast on a CPU.

On a CPU large sets are searched twice. A cheap first pass (bf16 where the processor multiplies it, else fp32) finds for
each query every item that could be among its k nearest, by a bound on its own error (`first_pass`); their cosines are
then computed in float64 and ranked, so the ranking is that of float64. Rows for which the bound leaves too many items
go through a first pass in fp32, and what even that cannot part (thousands of items within 1e-4) is searched plainly in
float64. Small sets and other devices are searched plainly in fp32.

Shapes: N training items, m queries, D width, k neighbours, n items in a block.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from opendino.errors import DataError
from opendino.evaluate.first_pass import BLOCK, PREPARED, FirstPass, in_threads

log = logging.getLogger(__name__)

TRAIN_BLOCK = 65536
"""Items compared at once in the plain search."""
MIN_ITEMS, MIN_QUERIES = 4 * BLOCK, 128
"""Below these the plain search is as fast."""


def rows_of(features: Any) -> Tensor:
    """Give features as a tensor without copying them; read-only arrays and memory maps too."""
    if isinstance(features, np.ndarray):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch warns of arrays that cannot be written; none is
            return torch.from_numpy(features)
    return torch.as_tensor(features).detach()


def check_finite(features: Tensor, name: str) -> None:
    """Refuse NaN and infinity, block by block.

    Raises:
        DataError: naming the features.
    """
    if not all(in_threads(lambda part: bool(torch.isfinite(part).all()), features.split(PREPARED))):
        raise DataError(f"The {name} features hold NaN or infinity. Leave out the images that could not be read.")


def lengths_of(features: Tensor) -> Tensor:
    """Give the lengths of rows, (N,) float64, at least 1e-12."""
    lengths = torch.empty(len(features), dtype=torch.float64)

    def fill(start: int) -> None:
        # In place: small results kept between large freed parts would keep the allocator from using those again.
        lengths[start : start + PREPARED] = features[start : start + PREPARED].double().norm(dim=1)

    in_threads(fill, range(0, len(features), PREPARED))
    return lengths.clamp_min_(1e-12)


def nearest(queries: Tensor, train: Tensor, k: int, train_block: int = TRAIN_BLOCK) -> tuple[Tensor, Tensor]:
    """Find the k training items most similar to each query by plain products, block by block.

    Args:
        queries: (m, D), normalised; their dtype is computed in.
        train: (N, D); normalised here, block by block; k ≤ N.
        k: neighbours.
        train_block: training items compared at once.

    Returns:
        Similarities (m, k), falling, and indices (m, k).
    """
    best = queries.new_empty(len(queries), 0)
    index = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
    for start in range(0, len(train), train_block):
        block = F.normalize(train[start : start + train_block].to(queries.dtype), dim=1)
        similarity = queries @ block.T  # (m, block)
        here, where = similarity.topk(min(k, similarity.shape[1]), dim=1)
        best, order = torch.cat([best, here], 1).topk(min(k, best.shape[1] + here.shape[1]), dim=1)
        index = torch.cat([index, where + start], 1).gather(1, order)
    return best, index


def bf16_is_fast() -> bool:
    """Say whether this processor multiplies bf16 with sums in fp32, as the bound supposes."""
    from torch import cpu

    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    checks = [getattr(cpu, name)() for name in names if hasattr(cpu, name)]
    return bool(torch.backends.mkldnn.is_available()) and any(checks)


class Neighbours:
    """Training items that are searched.

    Args:
        train: (N, D) features as they are, on the device where they are to be searched; any float dtype.
        num_queries: how many will be asked for in all; few do not repay the preparation.
        k: the largest number of neighbours that will be asked for.
        first_pass: "bf16", "fp32" or "plain"; "auto" is the fastest that is exact here.
    """

    def __init__(self, train: Tensor, num_queries: int, k: int, first_pass: str = "auto") -> None:
        self.train, self.k = train, min(k, len(train))
        if first_pass == "auto":
            small = len(train) < MIN_ITEMS or num_queries < MIN_QUERIES or 4 * k > BLOCK
            first_pass = "plain" if small or train.device.type != "cpu" else "bf16" if bf16_is_fast() else "fp32"
        if first_pass == "plain" and (train.device.type != "cpu" or train.numel() <= 1 << 27):
            self.train = F.normalize(train.float(), dim=1)  # once, not for every chunk of queries
        self.passes: list[FirstPass] = []
        if first_pass != "plain":
            lengths = lengths_of(train)
            dtypes = (torch.bfloat16, torch.float32) if first_pass == "bf16" else (torch.float32,)
            self.passes = [FirstPass(train, lengths, dtype) for dtype in dtypes]

    def search(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Find the k nearest items of each query (m, D), any length.

        Returns:
            Cosines (m, k) fp32, falling, and indices (m, k).
        """
        if not self.passes:
            return nearest(F.normalize(queries.to(self.train.device).float(), dim=1), self.train, self.k)
        threads = torch.get_num_threads()
        parts = in_threads(self._search, queries.split(max(-(-len(queries) // threads), MIN_QUERIES)))
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def _search(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        cosines = torch.empty(len(queries), self.k)
        index = torch.empty(len(queries), self.k, dtype=torch.long)
        left = torch.arange(len(queries))
        for first in list(self.passes):
            if len(left):
                values, items, certain = first.search(queries[left], self.k)
                cosines[left[certain]], index[left[certain]] = values[certain], items[certain]
                if first.dtype == torch.bfloat16 and 2 * int(certain.sum()) < len(left):
                    log.info("bf16 cannot part these features; the search goes on in fp32.")
                    self.passes = self.passes[-1:]
                left = left[~certain]
        if len(left):
            values, index[left] = nearest(F.normalize(queries[left].double(), dim=1), self.train, self.k, BLOCK)
            cosines[left] = values.float()
        return cosines, index
