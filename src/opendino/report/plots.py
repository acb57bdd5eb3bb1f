# SPDX-License-Identifier: Apache-2.0
"""Curves as PNG bytes (extra `report`)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from opendino.errors import MissingExtraError


def curves(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str, ylabel: str) -> bytes:
    """Draw lines of (steps, values) into one PNG.

    Args:
        series: name → (x, y); short series (probes) are drawn with markers.
        title: what the picture shows.
        ylabel: the quantity and its unit.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "report", "The report") from error
    figure = Figure(figsize=(5.2, 3.0), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for name, (x, y) in series.items():
        axes.plot(x, y, label=name, linewidth=1.4, marker="o" if len(x) < 25 else None, markersize=4)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
