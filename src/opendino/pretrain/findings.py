# SPDX-License-Identifier: Apache-2.0
"""What a rule of the verdict gives, and the thresholds and readings that the rules share.

n is the number of target rows that a process logs (2B in one process), K the number of prototypes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from opendino.models.registry import get_config
from opendino.pretrain.config import PretrainConfig
from opendino.pretrain.history import Record, Series, series

Level = Literal["ok", "watch", "bad"]

MIN_RECORDS = 3
"""Records before anything is said, and log points over which a state must hold: one odd batch is no state."""
MIN_ROWS = 8
"""Target rows below which one winner can be chance."""
FEW_WINNERS = 2
"""Prototypes won by at least 32 rows that count as a collapse: small runs that learn win half of what they can."""
CERTAIN = 0.02
"""Share of ln K below which the teacher's targets are one-hot: softer targets carry what images have in common."""
UNIFORM = 0.98
"""Share of ln K above which the teacher's targets say nothing."""
PLATEAU = 0.01
"""Share of ln K by which the DINO loss must be below it to count as having left; its noise is a third of that."""
PLATEAU_STEPS, PLATEAU_SHARE_BAD = 100, 0.2
"""Small runs that work leave ln K within a hundred steps (docs/small-runs.md); one that is there for a fifth of
its steps will hardly learn anything in the rest."""
RANK_FELL, RANK_COLLAPSED = 0.5, 0.25
"""Share of its best that the feature rank keeps: without KoLeo it kept 0.4 in docs/small-runs.md and k-NN fell."""
RANK_FLOOR = 2.0
"""Effective rank that means one direction, as after a complete collapse."""
DUPLICATES, ALL_ALIKE = 0.02, 0.5
"""Share of images with a near duplicate in their batch: batches are without repetition, so it should be near 0. Above
one half the features, not the data, are alike."""
OUTLIERS = 0.002
"""Share of outlier tokens: Darcet et al. 2023 count about 2 % of the patches in ViT-g; a tenth of that is a start."""
CLIPPED = 0.95
"""Share of recent steps clipped: clipping is for rare steps; when it is always on, it sets the step size."""
EXPLODED = 10.0
"""Growth of the recent gradient norm over the run's median."""
UPDATE_HIGH, UPDATE_TOO_LARGE = 0.01, 0.05
"""Relative size of one update of the backbone. Tiny runs that learn stay near 0.002; above 0.01 they sat at ln K, so it
is named as the cause there; 0.05 replaces the weights within tens of steps and is too much by itself."""
LOSS_ROSE = 0.02
"""Rise of DINO + iBOT above its lowest level, in ln K, at a constant teacher temperature."""
KNN_NOISE, KNN_FELL = 1.0, 2.0
"""k-NN points: smaller differences are within one seed's noise on a thousand test images."""
WAIT = 0.2
"""Share of a step spent waiting for data: above it a faster loader saves a noticeable part of the run."""
BAD_SHARE = 0.005
"""Share of skipped steps that is more than bad luck."""
UNREADABLE = 0.01
"""Share of samples whose image could not be read."""
RECENT = 50
"""Steps that count as recent."""


@dataclass(frozen=True)
class Finding:
    """One sentence or two about a run.

    Attributes:
        level: "ok", "watch" (look at it) or "bad" (change something).
        since_step: first step at which it holds without a break.
        text: what is so, and which flag to change in which direction.
    """

    level: Level
    since_step: int
    text: str

    def as_dict(self) -> dict[str, Any]:
        """Give the finding as plain data, for JSON and for `opendino.report`."""
        return asdict(self)


def winners(records: Sequence[Record], config: PretrainConfig) -> list[tuple[int, float, float]]:
    """(step, prototypes won, the most that could be) at each log point."""
    won = dict(series(records, "prototypes_won"))
    most = float(min(2 * config.batch_size, config.heads.num_prototypes))
    found = []
    for step, use in series(records, "prototype_use"):
        possible = won[step] / use if won.get(step) and use else most
        found.append((step, won.get(step, use * possible), possible))
    return found


def knn_series(records: Sequence[Record]) -> Series:
    names = [k for r in records for k in (r.get("probe") or {}) if k.startswith("knn")]
    return series(records, f"probe/{names[0]}") if names else []


def rank_ceiling(records: Sequence[Record], config: PretrainConfig) -> int:
    """The largest rank that the features of a log point can have: their number or their width."""
    width = config.model.embed_dim or get_config(config.model.arch).embed_dim
    rows, won = 2 * config.batch_size, winners(records, config)
    if won and won[-1][2] < config.heads.num_prototypes:  # then it is the number of rows, fewer in several processes
        rows = round(won[-1][2])
    return rows if getattr(config, "timm_name", None) else min(rows, width)  # timm's width is not in the settings


def either(cures: list[str]) -> str:
    return cures[0] if len(cures) == 1 else ", ".join(cures[:-1]) + " or " + cures[-1]


def sentence(cures: list[str]) -> str:
    """Join the cures into a sentence."""
    text = either(cures)
    return text[0].upper() + text[1:] + "."
