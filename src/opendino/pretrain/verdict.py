# SPDX-License-Identifier: Apache-2.0
"""How a run is doing, in plain words: what is wrong, since which step, which setting to move and in which direction."""

from __future__ import annotations

import math
from collections.abc import Sequence

from opendino.pretrain.config import PretrainConfig
from opendino.pretrain.findings import MIN_RECORDS, RECENT, Finding, knn_series, rank_ceiling, winners
from opendino.pretrain.history import Record, middle, series
from opendino.pretrain.rules_features import alike, certain, collapsed, knn_fell, outlier_norms, plateau, rank_fell
from opendino.pretrain.rules_guard import below_start, stopped
from opendino.pretrain.rules_steps import (
    gradients,
    loader_limits,
    loss_rose,
    lr_too_high,
    not_finite,
    rolled_back,
    unreadable,
)  # fmt: skip

__all__ = ["RULES", "Finding", "figures_line", "verdict"]

RULES = (
    not_finite, rolled_back, below_start, collapsed, rank_fell, alike, lr_too_high, gradients, plateau, certain,
    knn_fell, loss_rose, outlier_norms, loader_limits, unreadable,
)  # fmt: skip


def verdict(records: Sequence[Record], config: PretrainConfig) -> list[Finding]:
    """Judge a run by its records so far: the bad first, then what to watch; one "ok" line when there is neither.

    Args:
        records: lines of metrics.jsonl in order, whole or the recent part; any figure may be missing.
        config: of the run.
    """
    if ended := stopped(records, config):
        return [ended]
    steps = [r for r in records if r["step"] > 0]
    if len(steps) < MIN_RECORDS:
        return [Finding("ok", 0, f"Too early to say: {len(steps)} steps are recorded.")]
    found = [f for rule in RULES if (f := rule(records, config)) is not None]
    if not found:
        return [Finding("ok", steps[0]["step"], "Nothing is wrong: " + figures_line(records, config))]
    return sorted(found, key=lambda f: f.level != "bad")


def figures_line(records: Sequence[Record], config: PretrainConfig) -> str:
    """Put the last figures of a run on one line, each beside what it is measured against."""
    parts = [f"step {records[-1]['step']} of {config.steps}"]
    log_k = math.log(config.heads.num_prototypes)
    if dino := series(records, "dino")[-RECENT:]:
        parts.append(f"DINO loss {middle(dino):.2f} (guessing: {log_k:.2f})")
    if entropy := series(records, "teacher_entropy")[-MIN_RECORDS:]:
        parts.append(f"teacher entropy {middle(entropy) / log_k:.0%} of ln K")
    if won := winners(records, config):
        parts.append(f"{won[-1][1]:.0f} of {won[-1][2]:.0f} prototypes won")
    if rank := series(records, "feature_rank")[-MIN_RECORDS:]:
        parts.append(f"feature rank {middle(rank):.1f} of at most {rank_ceiling(records, config)}")
    if knn := knn_series(records):
        parts.append(f"k-NN {knn[0][1]:.1f} → {knn[-1][1]:.1f} %")
    if speed := series(records, "images_per_s")[-RECENT:]:
        parts.append(f"{middle(speed):.3g} images/s")
    return ", ".join(parts) + "."
