# SPDX-License-Identifier: Apache-2.0
"""Rules on how a run stands beside its start: ended by its guard, or finished below what it began with."""

from __future__ import annotations

from collections.abc import Sequence

from opendino.pretrain.config import PretrainConfig
from opendino.pretrain.findings import Finding, knn_series
from opendino.pretrain.history import Record, series


def stopped(records: Sequence[Record], config: PretrainConfig) -> Finding | None:
    """The guard ended the run."""
    if not records or not records[-1].get("stop_reason"):
        return None
    return Finding("bad", int(records[-1]["step"]), str(records[-1]["stop_reason"]))


def below_start(records: Sequence[Record], config: PretrainConfig) -> Finding | None:
    """A run that started from weights has finished with less than it began with."""
    knn, rank = knn_series(records), series(records, "guard/feature_rank")
    if not config.init.weights or records[-1]["step"] < config.steps:
        return None
    found = []
    if len(knn) > 1 and knn[0][0] == 0 and knn[-1][1] < knn[0][1]:
        found.append(f"k-NN is {knn[-1][1]:.1f} %, it was {knn[0][1]:.1f} % in the weights it began with")
    if len(rank) > 1 and rank[-1][1] < rank[0][1] * (1 - config.guard.rank_drop):
        found.append(f"the feature rank of your own images is {rank[-1][1]:.1f}, it was {rank[0][1]:.1f}")
    if not found:
        return None
    return Finding(
        "bad",
        config.steps,
        f"The run ended below its start: {' and '.join(found)}. Use the weights it began with or the best checkpoint, "
        f"or run again with a lower --init.backbone-lr (now {config.init.backbone_lr:g}) or fewer --steps.",
    )
