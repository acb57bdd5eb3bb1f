# SPDX-License-Identifier: Apache-2.0
"""Rules on what is learned: collapse, plateau, rank, duplicates, outliers, the probe.

Each reads the records of metrics.jsonl and gives one `Finding`, or None when it does not hold or figures are missing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from opendino.pretrain.config import PretrainConfig
from opendino.pretrain.findings import (
    ALL_ALIKE,
    CERTAIN,
    DUPLICATES,
    FEW_WINNERS,
    KNN_FELL,
    KNN_NOISE,
    MIN_RECORDS,
    MIN_ROWS,
    OUTLIERS,
    PLATEAU,
    PLATEAU_SHARE_BAD,
    PLATEAU_STEPS,
    RANK_COLLAPSED,
    RANK_FELL,
    RANK_FLOOR,
    RECENT,
    UNIFORM,
    UPDATE_HIGH,
    Finding,
    either,
    knn_series,
    rank_ceiling,
    sentence,
    winners,
)
from opendino.pretrain.history import Record, Series, count_since, middle, series, since, smooth
from opendino.pretrain.rules_guard import below_start


def collapsed(records: Sequence[Record], config: PretrainConfig) -> Finding | None:
    """Every image gets the same prototype."""
    won = [w for w in winners(records, config) if w[2] >= MIN_ROWS]
    if not won:
        return None
    log_k = math.log(config.heads.num_prototypes)
    undecided = {step for step, e in series(records, "teacher_entropy") if e > UNIFORM * log_k}
    rows: Series = [
        (step, float(n <= (FEW_WINNERS if possible >= 32 else 1) and step not in undecided))
        for step, n, possible in won
    ]
    first = since(rows, bool)
    if count_since(rows, first) < MIN_RECORDS or first is None:
        return None
    cures = [
        f"lower --optim.lr (now {config.optim.lr:g})",
        f"raise --loss.teacher-temp (now {config.loss.teacher_temp:g})",
    ]
    if config.loss.centering == "moving":
        cures.insert(0, "set --loss.centering sinkhorn")
    if not config.loss.koleo_weight:
        cures.append("raise --loss.koleo-weight to 0.1")
    return Finding(
        "bad",
        first,
        f"The teacher has collapsed to {'one prototype' if won[-1][1] == 1 else f'{won[-1][1]:.0f} prototypes'} "
        f"({won[-1][2]:.0f} could be won) since step {first}: every image gets the same target and nothing is learned "
        f"any more. Start again, or from a checkpoint before that step, and {either(cures)}.",
    )


def certain(records: Sequence[Record], config: PretrainConfig) -> Finding | None:
    """Targets are one-hot, each image on a prototype of its own."""
    log_k = math.log(config.heads.num_prototypes)
    entropy = series(records, "teacher_entropy")
    first = since(entropy, lambda e: e < CERTAIN * log_k)
    if first is None or count_since(entropy, first) < MIN_RECORDS or collapsed(records, config):
        return None
    return Finding(
        "watch",
        first,
        f"The teacher is certain of every image since step {first} (entropy {entropy[-1][1]:.3f}, ln K = {log_k:.2f}): "
        "its targets say nothing about what images share. Raise --loss.teacher-temp and --loss.warmup-teacher-temp "
        f"(now {config.loss.teacher_temp:g} and {config.loss.warmup_teacher_temp:g}).",
    )


def plateau(records: Sequence[Record], config: PretrainConfig) -> Finding | None:
    """The DINO loss does not get below ln K, where the student guesses."""
    log_k = math.log(config.heads.num_prototypes)
    dino = smooth(series(records, "dino"), 5)
    first = since(dino, lambda v: v > (1 - PLATEAU) * log_k)
    if first is None or not config.loss.dino_weight:
        return None
    length = dino[-1][0] - first + 1
    if length < PLATEAU_STEPS:
        return None
    entropy = series(records, "teacher_entropy")
    undecided = bool(entropy) and middle(entropy[-MIN_RECORDS:]) > UNIFORM * log_k
    why = "the teacher's targets are uniform" if undecided else "the student does not follow the teacher"
    return Finding(
        "bad" if length >= PLATEAU_SHARE_BAD * config.steps else "watch",
        first,
        f"The DINO loss has not been below ln K = {log_k:.2f} by more than 1 % for {length} steps: {why}. To leave the "
        "plateau " + "; then ".join(_plateau_cures(records, config)) + ".",
    )


def _plateau_cures(records: Sequence[Record], config: PretrainConfig) -> list[str]:
    """Name what moves a run off ln K, the likeliest first."""
    loss, cures = config.loss, []
    update = smooth(series(records, "update_norm_backbone"))
    if update and (largest := max(v for _, v in update)) > UPDATE_HIGH:
        cures.append(f"lower --optim.lr (now {config.optim.lr:g}): a step moved the backbone by up to {largest:.1%}")
    if not loss.koleo_weight:
        cures.append("raise --loss.koleo-weight to 0.1")
    if records[-1]["step"] <= config.optim.warmup_steps:
        cures.append(f"wait for the end of the warm-up (step {config.optim.warmup_steps})")
    cures.append(
        f"cool the teacher: lower --loss.teacher-temp (now {loss.teacher_temp:g}) and --loss.warmup-teacher-temp"
    )
    if not config.heads.batch_norm:
        cures.append("for a small run set --heads.batch-norm True")
    if config.model.init_values < 0.1:
        cures.append("for a small run set --model.init-values 1.0")
    return cures


def rank_fell(records: Sequence[Record], config: PretrainConfig) -> Finding | None:
    """Features use fewer and fewer directions."""
    rank = smooth(series(records, "feature_rank"))
    if len(rank) < 2 * MIN_RECORDS or rank_ceiling(records, config) < MIN_ROWS:
        return None
    best_step, best = max(rank, key=lambda r: r[1])
    now = rank[-1][1]
    settled = rank[-1][0] >= max(PLATEAU_STEPS, config.steps // 10)  # published starts have rank 1 by design
    one = now < RANK_FLOOR and (settled or best > 2 * RANK_FLOOR)
    if not one and now >= RANK_FELL * best:
        return None
    limit = RANK_FLOOR if one and best <= 2 * RANK_FLOOR else RANK_FELL * best
    first = since(rank, lambda v: v < limit)
    if first is None or count_since(rank, first) < MIN_RECORDS or collapsed(records, config):
        return None
    cures = [f"lower --optim.lr (now {config.optim.lr:g})"]
    if config.loss.koleo_weight < 0.1:
        cures.insert(0, f"raise --loss.koleo-weight (now {config.loss.koleo_weight:g}) to 0.1")
    return Finding(
        "bad" if one or now < RANK_COLLAPSED * best else "watch",
        first,
        f"The features collapse to few directions: feature rank {now:.1f}, it was {best:.1f} at step {best_step} (at "
        f"most {rank_ceiling(records, config)}). The loss can fall all the same. {sentence(cures)}",
    )


def alike(records: Sequence[Record], config: PretrainConfig) -> Finding | None:
    """Different images have the same features: duplicates in the data, or a collapse."""
    share = smooth(series(records, "near_duplicates"))
    settled = bool(share) and share[-1][0] >= max(PLATEAU_STEPS, config.steps // 10)
    first = since(share, lambda v: v > DUPLICATES) if settled else None
    if first is None or count_since(share, first) < MIN_RECORDS or collapsed(records, config):
        return None
    now = share[-1][1]
    if now > ALL_ALIKE or not config.loss.koleo_weight:
        return Finding(
            "bad" if now > ALL_ALIKE else "watch",
            first,
            f"{now:.0%} of the images have a cls token that hardly differs from another image's. Raise "
            f"--loss.koleo-weight (now {config.loss.koleo_weight:g}; 0.1 is usual) or lower --optim.lr (now "
            f"{config.optim.lr:g}).",
        )
    return Finding(
        "watch",
        first,
        f"{now:.0%} of the images of a batch have a near duplicate in it. If the data holds copies or frames of a "
        "film, remove them; KoLeo pushes copies apart, which they cannot follow.",
    )


def outlier_norms(records: Sequence[Record], config: PretrainConfig) -> Finding | None:
    """A few tokens have norms far above the rest."""
    for kind, cure in (
        ("patch", "They disturb dense features (attention maps, PCA). Train with registers: --model.arch "
                  f"{config.model.arch.removesuffix('_reg')}_reg."),
        ("cls", "Look for blank or broken images among the data."),
    ):  # fmt: skip
        share = smooth(series(records, f"{kind}_norm_outliers"))
        first = since(share, lambda v: v > OUTLIERS)
        if first is None or count_since(share, first) < MIN_RECORDS:
            continue
        if kind == "patch" and config.model.arch.endswith("_reg"):
            cure = "They disturb dense features although there are registers; longer training at this width makes more."
        largest = series(records, f"{kind}_norm_max")
        times = f", the largest {largest[-1][1]:.0f} times" if largest else ""
        text = f"{share[-1][1]:.1%} of the {kind} tokens have a norm above 4 times the median{times}. {cure}"
        return Finding("watch", first, text)
    return None


def knn_fell(records: Sequence[Record], config: PretrainConfig) -> Finding | None:
    """The probe gets worse while training goes on."""
    knn = knn_series(records)
    if len(knn) < 2 or below_start(records, config):
        return None
    (start, before), (last, now) = knn[0], knn[-1]
    best_step, best = max(knn, key=lambda k: k[1])
    loss = series(records, "loss")
    old, new = [x for x in loss if x[0] <= best_step][-RECENT:] or loss[:RECENT], loss[-RECENT:]
    falling = bool(old and new) and middle(new) < middle(old)
    during = "while the loss falls" if falling else "and the loss does not fall either"
    cure = f"Lower --optim.lr (now {config.optim.lr:g})" + (
        "." if config.loss.koleo_weight else ", and raise --loss.koleo-weight to 0.1."
    )
    if now < before - KNN_NOISE and start == 0:
        text = (
            f"k-NN is {now:.1f} %, below the {before:.1f} % before training, {during}: the features get worse. {cure}"
        )
        return Finding("bad", best_step, text)
    if now < best - KNN_FELL:
        text = (
            f"k-NN has fallen from {best:.1f} % (step {best_step}) to {now:.1f} % {during}. {cure} The checkpoint near "
        )
        return Finding("watch", best_step, text + f"step {best_step} is the better one.")
    if start == 0 and last >= config.steps / 2 and now < before + KNN_NOISE:
        text = (
            f"k-NN has not risen above the {before:.1f} % before training in {last} steps: nothing useful is learned."
        )
        return Finding("watch", 0, f"{text} Check that --probe is like the data; {cure[0].lower()}{cure[1:]}")
    return None
