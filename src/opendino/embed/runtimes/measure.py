# SPDX-License-Identifier: Apache-2.0
"""How far vectors are from the fp32 model's, how far they may be, and how long calls take that are made in turn.

Shapes: B images, P patches, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Closeness:
    """1 − cosine to the fp32 model's vectors, 0 to 2; infinite where a vector is not finite.

    Attributes:
        cls: of the cls token, the worst image.
        patches: of the patch tokens, mean over patches and images.
    """

    cls: float
    patches: float


FLOORS: dict[str, Closeness] = {
    "fp32": Closeness(2e-6, 2e-6),
    "bf16": Closeness(2e-4, 3e-5),
    "fp16": Closeness(2e-4, 3e-5),
}
"""The most that a precision may differ to be chosen by `auto`; one that is not here is never chosen by itself.

The default modes promise, for trained weights and many images, 1e-6 in fp32, and in half precisions 1e-4 for cls and
1e-5 for patches. Twice and three times that, because a handful of images scatters, and rounding adds up over blocks:
patches of a random ViT-S, B and L in bf16 are at 0.8e-5, 1.3e-5 and 1.9e-5.
"""


def closeness(found: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> Closeness:
    """Compare cls (B, D) and patches (B, P, D) with those of the fp32 model."""
    cls = distances(found["cls"], reference["cls"])
    return Closeness(float(cls.max()), float(distances(found["patches"], reference["patches"]).mean()))


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Give 1 − cosine along the last axis of (…, D), float64 on the CPU; infinite where it is not finite.

    It is half the squared distance of the unit vectors, which keeps its digits where the cosine is nearly 1.
    """
    x, y = (F.normalize(t.detach().cpu().double(), dim=-1, eps=0.0) for t in (a, b))
    apart = (x - y).square().sum(-1) / 2
    return apart.nan_to_num(nan=math.inf, posinf=math.inf)


def refusal(precision: str, close: Closeness) -> str | None:
    """Say why vectors are too far from fp32 to be chosen without being asked for, or give None."""
    floor = FLOORS.get(precision)
    if floor is None:
        return f"{precision} is only used when it is named"
    for name in ("cls", "patches"):
        value, most = getattr(close, name), getattr(floor, name)
        if not value <= most:
            return f"1 − cosine of {name} is {value:.1e}, more than {most:.0e}"
    return None


def time_in_turn(
    calls: Mapping[str, Callable[[], object]],
    seconds: float,
    min_rounds: int = 2,
    max_rounds: int = 20,
    clock: Callable[[], float] = perf_counter,
) -> dict[str, list[float]]:
    """Make calls in turn, A B C A B C …, so that what disturbs the machine for a while disturbs all alike.

    Args:
        calls: by name; each has run before, so that nothing is built in its first turn.
        seconds: after which no new round begins, once there are `min_rounds`.
        min_rounds: whatever they take.
        max_rounds: even if there is time left.
        clock: seconds.

    Returns:
        Seconds of each call, by name, one a round.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = clock()
    for number in range(max_rounds):
        if number >= min_rounds and clock() - start >= seconds:
            break
        for name, call in calls.items():
            before = clock()
            call()
            times[name].append(clock() - before)
    return times


def speedup(times: Mapping[str, list[float]], name: str, plain: str) -> float:
    """Give how many times as fast a call is as another one: the median of the ratios of their rounds."""
    return median(b / a for a, b in zip(times[name], times[plain], strict=True))
