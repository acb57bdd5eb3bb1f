# SPDX-License-Identifier: Apache-2.0
"""Where the time of a step goes, and whether loading or compute is the limit (`opendino pretrain --profile N`)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from rich.table import Table

SPANS = (
    "data wait", "augment", "teacher forward", "student forward + losses", "backward", "clip", "optimizer", "ema",
    "log",
)  # fmt: skip
"""The parts of a step, in its order; a clock takes other names too and puts them last."""
NEAR = 1.1
"""Rates closer than this factor count as equal: measurements differ by as much."""
NOTHING: AbstractContextManager[None] = nullcontext()


class StepClock:
    """Adds up the time of named parts of a step.

    Off, `span` gives one shared empty context and reads no clock. On, a CUDA device is synchronised at both ends of
    each span, so that kernels count where they were started; this costs overlap, so totals are a little slower than
    without a clock. Spans must not be nested: each would count the inner one's time again.

    Args:
        device: of the step.
        on: whether to measure.

    Example:
        >>> clock = StepClock(torch.device("cpu"), on=True)
        >>> with clock.span("backward"):
        ...     pass
        >>> clock.step_done()
        >>> clock.steps, list(clock.seconds)
        (1, ['backward'])
    """

    def __init__(self, device: torch.device, on: bool = False) -> None:
        self.on = on
        self.device = device
        self.seconds: dict[str, float] = {}
        self.steps = 0
        self.total = 0.0
        self._began: float | None = None

    def span(self, name: str) -> AbstractContextManager[None]:
        """Time what is done inside; may be entered several times a step."""
        return _Span(self, name) if self.on else NOTHING

    def step_done(self) -> None:
        """Count one step; its whole time runs from its first span, so that what no span covers shows as "other"."""
        if self.on and self._began is not None:
            self.steps += 1
            self.total += self.now() - self._began
            self._began = None

    def reset(self) -> None:
        """Forget everything: call it after the first steps, which warm up caches and workers."""
        self.seconds, self.steps, self.total, self._began = {}, 0, 0.0, None

    def now(self) -> float:
        """Seconds on a clock that only runs forward, once the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def add(self, name: str, began: float, ended: float) -> None:
        """Add one stretch of time to a part."""
        self._began = began if self._began is None else self._began
        self.seconds[name] = self.seconds.get(name, 0.0) + ended - began


class _Span:
    def __init__(self, clock: StepClock, name: str) -> None:
        self.clock, self.name = clock, name

    def __enter__(self) -> None:
        self.began = self.clock.now()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clock.add(self.name, self.began, self.clock.now())


@dataclass(frozen=True)
class Profile:
    """What was measured.

    Attributes:
        spans: seconds of each part, all steps together, in the order of the step; "other" is what no span covers.
        steps: number of steps.
        batch_size: images a step, of this process.
        loader_rate: images/s of the loader alone; None when it was not measured.
        operators: (name, seconds of one step, calls), the costliest first.
        num_workers: of the loader.
    """

    spans: Mapping[str, float]
    steps: int
    batch_size: int
    loader_rate: float | None = None
    operators: list[tuple[str, float, int]] = field(default_factory=list)
    num_workers: int = 1

    @property
    def limit(self) -> str:
        """Say whether the loader or compute is the limit."""
        return limit_sentence(self.loader_rate, self.compute_rate, self.num_workers)

    @property
    def rate(self) -> float:
        """Images/s of whole steps."""
        return self.steps * self.batch_size / sum(self.spans.values())

    @property
    def compute_rate(self) -> float:
        """Images/s without the wait for data."""
        return self.steps * self.batch_size / (sum(self.spans.values()) - self.spans.get("data wait", 0.0))

    def as_dict(self) -> dict[str, Any]:
        """Give plain data for JSON."""
        return {
            "seconds_per_step": {name: s / self.steps for name, s in self.spans.items()}, "steps": self.steps,
            "images_per_s": self.rate, "compute_images_per_s": self.compute_rate,
            "loader_images_per_s": self.loader_rate, "limit": self.limit,
            "operators": [{"name": n, "seconds": s, "calls": c} for n, s, c in self.operators],
        }  # fmt: skip


def make_profile(
    clock: StepClock,
    batch_size: int,
    *,
    loader_rate: float | None = None,
    operators: list[tuple[str, float, int]] | None = None,
    num_workers: int = 1,
) -> Profile:
    """Put a clock's spans in order, with what they leave of the steps as "other"."""
    assert clock.steps, "a profile needs a step"
    known = [n for n in SPANS if n in clock.seconds] + sorted(set(clock.seconds) - set(SPANS))
    spans = {n: clock.seconds[n] for n in known}
    spans["other"] = max(0.0, clock.total - sum(spans.values()))
    return Profile(spans, clock.steps, batch_size, loader_rate, operators or [], num_workers)


def profile_table(spans: Mapping[str, float], steps: int, batch_size: int) -> Table:
    """Lay the parts of a step out as a table: milliseconds a step, share, a bar.

    Args:
        spans: seconds of each part, all steps together.
        steps: how many.
        batch_size: images a step.
    """
    from rich.table import Table

    total = sum(spans.values()) or 1e-12
    table = Table(
        "part", "ms a step", "share", "", box=None, title=f"One step of {batch_size} images", title_justify="left"
    )
    for column in (1, 2):
        table.columns[column].justify = "right"
    for name, seconds in spans.items():
        share = seconds / total
        table.add_row(name, f"{1000 * seconds / steps:.1f}", f"{share:.1%}", "█" * round(30 * share))
    rate = steps * batch_size / total
    table.add_row("whole step", f"{1000 * total / steps:.1f}", "", f"{rate:.3g} images/s")
    return table


def operator_table(operators: list[tuple[str, float, int]]) -> Table:
    """Lay the costliest operators of a step out as a table."""
    from rich.table import Table

    table = Table("operator", "ms a step", "calls", box=None, title="Costliest operators", title_justify="left")
    for column in (1, 2):
        table.columns[column].justify = "right"
    for name, seconds, calls in operators:
        table.add_row(name, f"{1000 * seconds:.1f}", str(calls))
    return table


def limit_sentence(loader_rate: float | None, compute_rate: float, num_workers: int = 1) -> str:
    """Say whether the loader or compute is the limit, and by how much.

    Args:
        loader_rate: images/s that the loader reaches alone; None when it was not measured.
        compute_rate: images/s of the steps without their wait for data.
        num_workers: of the loader; without workers the two take turns.
    """
    if loader_rate is None:
        return f"Compute alone reaches {compute_rate:.3g} images/s; the loader was not measured."
    rates = f"(loader {loader_rate:.3g}, compute {compute_rate:.3g} images/s)"
    factor = loader_rate / compute_rate
    if not num_workers:
        share = compute_rate / (loader_rate + compute_rate)
        return (
            f"Without workers loading and compute take turns {rates}: loading is {share:.0%} of a step. Raise "
            "--num-workers to load beside compute."
        )
    if factor >= NEAR:
        return f"Compute is the limit: the loader could feed {factor:.1f}× more {rates}."
    if factor <= 1 / NEAR:
        return (
            f"The loader is the limit: compute could take {1 / factor:.1f}× more {rates}. Raise --num-workers, set "
            "--cache-images True if the decoded images fit into memory, or store smaller images."
        )
    return f"Loading and compute are equally fast {rates}: speeding up one alone gains nothing."


def measure_loader(batches: Iterator[Any], batch_size: int, *, warm_up: int = 2, budget_s: float = 5.0) -> float:
    """Give the images/s that a loader reaches when nothing else runs.

    Workers share the cores with compute in training on a CPU, so there this is an upper bound.

    Args:
        batches: a fresh loader (`make_loader` without `num_steps`, or with enough of them).
        batch_size: images in each batch.
        warm_up: batches that are not counted; the first one starts the workers.
        budget_s: stops after so many seconds, but not before one counted batch.
    """
    for _ in range(warm_up):
        next(batches, None)
    count, began = 0, time.perf_counter()
    while True:
        if next(batches, None) is None:
            break
        count += 1
        if time.perf_counter() - began >= budget_s:
            break
    return count * batch_size / (time.perf_counter() - began)


def top_operators(step: Callable[[], Any], device: torch.device, count: int = 12) -> list[tuple[str, float, int]]:
    """Run one step under torch's profiler and give (operator, own seconds, calls), the costliest first.

    On a CUDA device the seconds are those of its kernels.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its notes on devices that are not there say nothing to users
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with profile(activities=activities) as found:
        step()
        if cuda:
            torch.cuda.synchronize(device)
    rows = []
    for event in found.key_averages():
        microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
        if microseconds:
            rows.append((str(event.key), microseconds / 1e6, int(event.count)))
    return sorted(rows, key=lambda r: -r[1])[:count]


def show_profile(profile: Profile) -> None:
    """Print the tables and the sentence."""
    from rich.console import Console

    console = Console()
    console.print(profile_table(profile.spans, profile.steps, profile.batch_size))
    if profile.operators:
        console.print(operator_table(profile.operators))
    console.print(profile.limit, highlight=False)
