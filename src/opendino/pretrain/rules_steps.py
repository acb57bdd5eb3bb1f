# SPDX-License-Identifier: Apache-2.0
"""Rules on how the steps go: not finite, rolled back, gradients, step size, rising loss, the loader, the images.

Each reads the records of metrics.jsonl and gives one `Finding`, or None when it does not hold or figures are missing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from opendino.pretrain.config import PretrainConfig
from opendino.pretrain.findings import (
    BAD_SHARE,
    CLIPPED,
    EXPLODED,
    LOSS_ROSE,
    MIN_RECORDS,
    RECENT,
    UNREADABLE,
    UPDATE_TOO_LARGE,
    WAIT,
    Finding,
    sentence,
)
from opendino.pretrain.history import Record, count_since, middle, series, since, smooth


def not_finite(records: Sequence[Record], config: PretrainConfig) -> Finding | None:
    """Steps that were skipped because a loss or gradient was not finite."""
    bad = series(records, "bad_steps")
    if not bad or not bad[-1][1]:
        return None
    recent = bad[-20:]
    now = recent[-1][1] - recent[0][1]
    first = next(step for step, n in bad if n)
    text = f"{bad[-1][1]:.0f} of {bad[-1][0]} steps were skipped because a loss or gradient was not finite"
    cure = f"Lower --optim.lr (now {config.optim.lr:g}), or try --precision fp32."
    if now >= len(recent) / 2:
        return Finding("bad", first, f"{text}, {now:.0f} of them in the last {len(recent)}. {cure}")
    warm_up = 0 if config.precision != "fp16" else 20  # fp16's loss scale finds its level by skipping
    if bad[-1][1] - warm_up > max(1.0, BAD_SHARE * bad[-1][0]):
        return Finding("watch", first, f"{text}. The run goes on, but it is near its limit. {cure}")
    return None


def rolled_back(records: Sequence[Record], config: PretrainConfig) -> Finding | None:
    """The run went back to an earlier checkpoint by itself."""
    count = series(records, "rollbacks")
    if not count or not count[-1][1]:
        return None
    first = next(step for step, n in count if n)
    reason = next(
        (r["rollback_reason"] for r in reversed(records) if r.get("rollback_reason")), "steps in a row failed"
    )
    times = "once" if count[-1][1] == 1 else f"{count[-1][1]:.0f} times"
    return Finding(
        "watch" if count[-1][1] == 1 else "bad",
        first,
        f"The run went back to an earlier checkpoint {times} ({reason.rstrip('.')}). For the next run lower --optim.lr "
        f"(now {config.optim.lr:g}) or lengthen --optim.warmup-steps; with --precision fp16 try bf16 or fp32.",
    )


def gradients(records: Sequence[Record], config: PretrainConfig) -> Finding | None:
    """Gradients that explode, or that the clip cuts at every step."""
    warm = max(config.optim.warmup_steps, 1)
    names = sorted({k for r in records[-RECENT:] for k in r if k.startswith("grad_norm_")})
    limit = config.optim.clip_grad
    for key in names:
        norms = [x for x in series(records, key) if x[0] > warm]
        if len(norms) < 2 * RECENT:
            continue
        name, recent = key.removeprefix("grad_norm_"), norms[-RECENT:]
        now, usual = middle(recent), middle(norms)
        if now > EXPLODED * max(usual, 1e-12):
            text = (
                f"The gradient of {name} has grown to {now:.3g}, {now / usual:.0f} times its median. Lower --optim.lr "
            )
            return Finding("bad", recent[0][0], text + f"(now {config.optim.lr:g}) or lengthen --optim.warmup-steps.")
        if limit and sum(v > limit for _, v in recent) >= CLIPPED * len(recent):
            first = since(smooth(norms, 9), lambda v: v > limit) or recent[0][0]
            return Finding(
                "watch",
                first,
                f"The gradient of {name} is clipped at every step (median {now:.3g}, --optim.clip-grad {limit:g}): the "
                f"clip sets the step size. Lower --optim.lr (now {config.optim.lr:g}), or raise --optim.clip-grad.",
            )
    return None


def lr_too_high(records: Sequence[Record], config: PretrainConfig) -> Finding | None:
    """Updates that are large against the weights."""
    high = [u for u in smooth(series(records, "update_norm_backbone")) if u[1] > UPDATE_TOO_LARGE]
    if len(high) < MIN_RECORDS:
        return None
    return Finding(
        "bad",
        high[0][0],
        f"A step moved the backbone by up to {max(v for _, v in high):.1%} of its size, which replaces it within tens "
        f"of steps. The learning rate is too high: lower --optim.lr (now {config.optim.lr:g}, --optim.lr-rule "
        f"{config.optim.lr_rule}) to a third.",
    )


def loss_rose(records: Sequence[Record], config: PretrainConfig) -> Finding | None:
    """The loss climbs although the teacher's temperature, which moves it by itself, is constant; within a stage."""
    records = [r for r in records if r.get("stage") == records[-1].get("stage")]
    temp = series(records, "teacher_temp")
    start = since(temp, lambda t: abs(t - temp[-1][1]) < 1e-6) if temp else 0
    ibot = dict(series(records, "ibot"))
    total = [(s, v + ibot.get(s, 0.0)) for s, v in series(records, "dino") if s >= (start or 0)]
    if len(total) < 4 * RECENT:
        return None
    level = smooth(total, RECENT)[RECENT - 1 :]
    best_step, best = min(level, key=lambda r: r[1])
    rise = LOSS_ROSE * math.log(config.heads.num_prototypes)
    first = since(level, lambda v: v > best + rise)
    if first is None or count_since(level, first) < RECENT:
        return None
    return Finding(
        "watch",
        first,
        f"DINO + iBOT has risen from {best:.2f} (step {best_step}) to {level[-1][1]:.2f} at a constant teacher "
        f"temperature. If k-NN or the feature rank falls too, lower --optim.lr (now {config.optim.lr:g}); else "
        "the teacher only gives other targets than before.",
    )


def loader_limits(records: Sequence[Record], config: PretrainConfig) -> Finding | None:
    """Training waits for data."""
    wait = series(records, "data_wait")
    recent = wait[1:][-RECENT:]  # the first step waits for the workers to start
    if len(recent) < MIN_RECORDS or middle(recent) <= WAIT:
        return None
    cures = [f"raise --num-workers (now {config.num_workers}) up to the number of cores"]
    if not config.cache_images:
        cures.append("set --cache-images True if the decoded images fit into memory")
    cures.append("store images no larger than they are used")
    first = since(smooth(wait[1:], 9), lambda v: v > WAIT)
    return Finding(
        "watch",
        recent[0][0] if first is None else first,
        f"The loader is the limit: a step spends {middle(recent):.0%} of its time waiting for data. {sentence(cures)}",
    )


def unreadable(records: Sequence[Record], config: PretrainConfig) -> Finding | None:
    """Many images could not be read."""
    errors = series(records, "image_errors")
    if not errors or errors[-1][1] <= UNREADABLE * errors[-1][0] * config.batch_size:
        return None
    share = errors[-1][1] / (errors[-1][0] * config.batch_size)
    first = next(step for step, n in errors if n)
    text = (
        f"{share:.0%} of the images drawn could not be read; others took their place. See the warnings for their paths."
    )
    return Finding("watch", first, text)
