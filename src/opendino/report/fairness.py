# SPDX-License-Identifier: Apache-2.0
"""The page of `opendino eval fairness`: accuracy by group, drawn and in numbers, and what to keep in mind."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opendino.errors import MissingExtraError
from opendino.report.page import Figure, Note, Section, write_page

CAUTIONS = (
    "The authors of DINOv2 measured that their models recognise things better in pictures from wealthy households and "
    "from Western countries, although they were trained without labels. Weights that started from theirs, or from "
    "pictures collected in the same way, must be expected to do so too.",
    "They expect fine-tuning to widen such gaps, because the features then follow the labels that they are tuned to. "
    "Measure again after it.",
    "An interval says how much a figure would move with other images drawn like these. It does not cover labels that "
    "are themselves unfair, groups that are not in the table, nor images of one household that resemble each other.",
    "A small gap here is no proof of fairness elsewhere: it holds for these images, these classes and this classifier.",
)
"""What to keep in mind, in words; the first two say in our words what the model card of DINOv2 says."""


def write_fairness(path: Path, result: Mapping[str, Any]) -> None:
    """Write the page of a result of `opendino eval fairness`."""
    overall = f"{result['num_images']} images, top-{result['k']} accuracy. {result['classifier']}."
    left = "; ".join(f"{count} left out: {why}" for why, count in result["left_out"].items() if count)
    sections = [Section("What was measured", text=[overall, *[f"{left}."] * bool(left)])]
    sections += [_column(name, found, float(result["confidence"])) for name, found in result["columns"].items()]
    sections.append(Section("To keep in mind", text=CAUTIONS))
    write_page(path, "Accuracy by group", sections)


def _column(name: str, found: Mapping[str, Any], confidence: float) -> Section:
    rows = [
        (
            group + (" (small)" if row["small"] else ""), str(row["n"]), f"{row['accuracy']:.1f}",
            _between(row["interval"]), f"{row['against_overall']:+.1f}",
            _between(row["against_overall_interval"], "+.1f"),
        )
        for group, row in found["groups"].items()
    ]  # fmt: skip
    total = found["overall"]
    rows.append(("all", str(total["n"]), f"{total['accuracy']:.1f}", _between(total["interval"]), "", ""))
    span = f"{confidence:g} % interval"
    notes = [gap_note(found["gap"])]
    if found["without_group"]:
        notes.append(Note("watch", f"{found['without_group']} images have no value in this column and count nowhere."))
    return Section(
        name, notes=notes, columns=("group", "images", "accuracy %", span, "against all", span), rows=rows,
        figures=[Figure(bars(found, name), f"Accuracy by {name}; lines are {confidence:g} % intervals.")],
    )  # fmt: skip


def gap_note(gap: Mapping[str, Any] | None) -> Note:
    """Say in a sentence how large the gap is and whether group sizes alone would explain it."""
    if gap is None:
        return Note("watch", "Fewer than two groups have enough images, so no gap is given.")
    text = (
        f"{gap['best']} is {gap['points']:.1f} points ahead of {gap['worst']} (interval {_between(gap['interval'])}). "
        f"Were all groups alike, their sizes alone would make a gap of {gap['by_chance']:.1f} points on average"
    )
    if gap["p"] > 0.05:
        return Note("ok", f"{text}; one of this size is no surprise (p = {gap['p']:.2g}).")
    return Note("bad", f"{text}; one of this size would be rare (p = {gap['p']:.2g}).")


def bars(found: Mapping[str, Any], title: str) -> bytes:
    """Draw a bar with its interval for each group as PNG; small groups are pale, the dotted line is all images."""
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise MissingExtraError("matplotlib", "report", "The report") from error
    rows = list(found["groups"].items())
    canvas = Canvas(figsize=(6.4, 1.1 + 0.34 * len(rows)), dpi=110, layout="constrained")
    axes = canvas.add_subplot()
    for place, (_, row) in enumerate(rows):
        low, high = row["interval"]
        axes.barh(place, row["accuracy"], color="#4a7fb5", alpha=0.35 if row["small"] else 0.9, height=0.66)
        axes.plot([low, high], [place, place], color="#222", linewidth=1.4, marker="|", markersize=7)
    axes.axvline(found["overall"]["accuracy"], color="#666", linestyle=":", linewidth=1.3)
    axes.set_yticks(range(len(rows)), [f"{group}  n = {row['n']}" for group, row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("accuracy, %", fontsize=9)
    axes.set_title(title, fontsize=10)
    axes.grid(axis="x", alpha=0.25)
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png")
    return buffer.getvalue()


def _between(ends: list[float], form: str = ".1f") -> str:
    return f"{ends[0]:{form}} to {ends[1]:{form}}"
