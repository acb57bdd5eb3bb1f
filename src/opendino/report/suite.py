# SPDX-License-Identifier: Apache-2.0
"""The table of `opendino eval suite`: Markdown, and a page with a picture for each kind of task (extra `report`)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opendino.errors import MissingExtraError
from opendino.report.page import Figure, Section, write_page


@dataclass(frozen=True)
class TableColumn:
    """One column of the table.

    Attributes:
        title: the task.
        data: the set.
        unit: of the figures.
        lower_is_better: for errors.
        scores: row name → figure; a row that is missing was not measured.
        note: how it was measured, in a few words.
    """

    title: str
    data: str
    unit: str
    lower_is_better: bool
    scores: dict[str, float]
    note: str = ""


def markdown_table(rows: Sequence[str], columns: Sequence[TableColumn]) -> str:
    """Give the table as Markdown: three header lines (task, set, unit), then one line a row."""
    heads = [
        ["task", *(c.title for c in columns)],
        [":--", *("--:" for _ in columns)],
        ["data", *(c.data for c in columns)],
        ["unit", *map(_unit, columns)],
    ]
    body = [[row, *(_figure(c, row) for c in columns)] for row in rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [*heads, *body]) + "\n"


def write_suite_page(
    path: Path, title: str, rows: Sequence[str], columns: Sequence[TableColumn], notes: Sequence[str]
) -> None:
    """Write one page with the table and bars for each column that more than one row, or our own row, fills."""
    table = Section(
        "Table",
        text=notes,
        columns=["", *(f"{c.title}: {c.data}, {_unit(c)}" for c in columns)],
        rows=[[row, *(_figure(c, row) for c in columns)] for row in rows],
    )  # fmt: skip
    figures = [Figure(bars(c, rows), f"{c.title}, {c.data}. {c.note}".strip()) for c in columns if c.scores]
    write_page(path, title, [table, Section("Pictures", figures=figures)])


def bars(column: TableColumn, rows: Sequence[str]) -> bytes:
    """Draw one column as horizontal bars, in the order of the rows, as PNG."""
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise MissingExtraError("matplotlib", "report", "The page") from error
    names = [row for row in rows if row in column.scores]
    figure = Canvas(figsize=(4.6, 0.6 + 0.34 * len(names)), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    drawn = axes.barh(names[::-1], [column.scores[n] for n in names[::-1]], color="#4c78a8", height=0.7)
    axes.bar_label(drawn, fmt="%.3g", padding=3, fontsize=8)
    axes.margins(x=0.15)
    axes.set_title(f"{column.title}, {column.data}", fontsize=9)
    axes.set_xlabel(column.unit + (" (lower is better)" if column.lower_is_better else ""), fontsize=8)
    axes.tick_params(labelsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _unit(column: TableColumn) -> str:
    return f"{column.unit} ↓" if column.lower_is_better else column.unit


def _figure(column: TableColumn, row: str) -> str:
    if row not in column.scores:
        return "–"
    return f"{column.scores[row]:.3f}" if column.lower_is_better else f"{column.scores[row]:.1f}"
