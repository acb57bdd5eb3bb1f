# SPDX-License-Identifier: Apache-2.0
"""The records of a run as series, and the few questions that the verdict asks of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

Record = Mapping[str, Any]
Series = list[tuple[int, float]]
"""(step, value) in the order of the run; values that are missing or not finite are left out."""


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Read RUN/metrics.jsonl; a missing file is an empty run, a line cut off by a kill is left out.

    The reason of a rollback in RUN/events.jsonl is put into the first record after it as "rollback_reason", that of the
    guard which ended the run into the last one as "stop_reason".
    """
    records = [r for r in _lines(run / "metrics.jsonl") if isinstance(r.get("step"), int)]
    for event in _lines(run / "events.jsonl"):
        if event.get("event") == "rollback":
            after = next((r for r in records if r["step"] > event.get("step", -1)), None)
            if after is not None:
                after["rollback_reason"] = str(event.get("reason", ""))
        elif event.get("event") == "stopped" and records and records[-1]["step"] == event.get("step"):
            records[-1]["stop_reason"] = str(event.get("reason", ""))
    return records


def _lines(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def series(records: Sequence[Record], key: str) -> Series:
    """Give one figure over the steps; "probe/NAME" reaches into the probe."""
    group, _, name = key.rpartition("/")
    found = []
    for record in records:
        value = (record.get(group) or {}).get(name) if group else record.get(name)
        if isinstance(value, int | float) and math.isfinite(value):
            found.append((int(record["step"]), float(value)))
    return found


def middle(values: Series) -> float:
    """Median of the values."""
    return median(v for _, v in values)


def smooth(values: Series, width: int = 3) -> Series:
    """Median over each value and those before it, `width` together, so that one odd batch does not count."""
    return [(values[i][0], middle(values[max(0, i - width + 1) : i + 1])) for i in range(len(values))]


def since(values: Series, holds: Callable[[float], bool]) -> int | None:
    """Give the first step of the unbroken stretch up to the end in which something holds; None when it does not now."""
    first = None
    for step, value in reversed(values):
        if not holds(value):
            break
        first = step
    return first


def count_since(values: Series, step: int | None) -> int:
    """Number of values from a step on; 0 for None."""
    return 0 if step is None else sum(s >= step for s, _ in values)
