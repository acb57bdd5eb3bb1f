# SPDX-License-Identifier: Apache-2.0
"""Hours that a run took, from its own files, and the energy that follows from them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]


def measured_time(
    run: Path, records: Sequence[Record], sessions: Sequence[Record], batch: Callable[[int], int | None]
) -> dict[str, Any] | None:
    """Add up the time that a run took.

    A session that ended counts from beginning to end by the clock. Steps of a session that was killed, and those of
    before sessions were recorded, count with their own duration: batch(step) / images_per_s. RUN/sessions/*.json, which
    some training scripts write, count where they add up to more.

    Returns:
        None when nothing was measured; else "seconds"; "device_seconds", the same times the devices at work (GPUs, or
        machines where a CPU computes), None when these were not recorded; "cpu_seconds" of processes, or None;
        "sessions", their number; "source", in words.
    """
    steps = [
        (r["step"], size / r["images_per_s"])
        for r in records
        if r["step"] > 0
        and (size := batch(r["step"]))
        and isinstance(r.get("images_per_s"), int | float)
        and r["images_per_s"] > 0
    ]
    starts = [s for s in sessions if s.get("event") == "start"]
    whole = _ended(sessions)
    seconds, device_seconds = 0.0, 0.0
    for start, end in whole:
        seconds += end["wall_s"]
        device_seconds += end["wall_s"] * devices_of(start)
    unknown, loose = False, 0.0
    for step, spent in steps:
        if any(start["step"] < step <= end["step"] for start, end in whole):
            continue
        owner = next((s for s in reversed(starts) if s["step"] < step), None)
        unknown |= owner is None
        loose += spent
        device_seconds += spent * (devices_of(owner) if owner else 0)
    seconds += loose
    scripts = _script_sessions(run)
    if sum(s["wall_s"] for s in scripts) > seconds:
        total = sum(s["wall_s"] for s in scripts)
        known = device_seconds if starts and not unknown else None
        return {
            "seconds": total, "device_seconds": None if known is None else known / seconds * total,
            "cpu_seconds": sum(s.get("cpu_s", 0.0) for s in scripts) or None, "sessions": len(scripts),
            "source": "by the clock, from beginning to end of each session",
        }  # fmt: skip
    if not math.isfinite(seconds) or seconds <= 0:
        return None
    source = "by the clock, from beginning to end of each session"
    if loose:
        source = "the steps alone, without start, probes and checkpoints"
        source += f", where a session was killed or not recorded ({loose / seconds:.0%} of the time)" if whole else ""
    cpu = sum(end.get("cpu_s", 0.0) for _, end in whole)
    return {
        "seconds": seconds, "device_seconds": None if unknown else device_seconds,
        "cpu_seconds": cpu if whole and not loose else None, "sessions": len(starts) or None, "source": source,
    }  # fmt: skip


def devices_of(session: Record) -> int:
    """Give how many devices were at work: one GPU a process, or machines where the CPU computes."""
    key = "machines" if session.get("device") == "cpu" else "processes"
    return int(session.get(key) or 1)


def _ended(sessions: Sequence[Record]) -> list[tuple[Record, Record]]:
    """Pair each beginning with the end that follows it before the next beginning."""
    pairs, open_ = [], None
    for record in sessions:
        if record.get("event") == "start":
            open_ = record
        elif record.get("event") == "end" and open_ is not None:
            pairs.append((open_, record))
            open_ = None
    return pairs


def _script_sessions(run: Path) -> list[dict[str, Any]]:
    found = []
    for path in sorted((run / "sessions").glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and isinstance(record.get("wall_s"), int | float):
            found.append(record)
    return found


def energy(
    device_hours: float | None, watts: float | None, pue: float, grid: float, assumptions: Sequence[str]
) -> dict[str, Any]:
    """Give kWh = device hours · watts / 1000 · PUE and kg CO₂eq = kWh · grid, None when hours or watts are not known.

    Args:
        device_hours: hours times devices.
        watts: of a device.
        pue: energy of the building over that of the devices.
        grid: kg CO₂eq a kWh.
        assumptions: what was assumed, in words.
    """
    known = device_hours is not None and watts is not None
    kwh = device_hours * watts / 1000 * pue if device_hours is not None and watts is not None else None
    return {
        "device_hours": device_hours, "watts": watts, "pue": pue, "grid_kg_per_kwh": grid, "kwh": kwh,
        "co2_kg": None if kwh is None else kwh * grid, "assumptions": list(assumptions) if known else [],
    }  # fmt: skip
