# SPDX-License-Identifier: Apache-2.0
"""Curves as PNG bytes (extra `report`)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from opendino.errors import MissingExtraError

FEW, MANY = 25, 200
"""Up to FEW points a series has markers; from MANY on the points are faint and a running mean is drawn over them."""


def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    title: str,
    ylabel: str,
    *,
    marks: Mapping[str, float] | None = None,
    log: bool = False,
) -> bytes:
    """Draw lines of (steps, values) into one PNG.

    Args:
        series: name → (x, y); short series (probes) are drawn with markers, long ones with a running mean.
        title: what the picture shows.
        ylabel: the quantity and its unit.
        marks: name → height of dotted lines to compare with.
        log: logarithmic height, for quantities that spread over decades; values of 0 are left out.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "report", "The report") from error
    figure = Figure(figsize=(5.2, 3.0), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for i, (name, (x, y)) in enumerate(series.items()):
        color = f"C{i}"
        if log:
            x, y = [a for a, b in zip(x, y, strict=True) if b > 0], [b for b in y if b > 0]
        if len(x) >= MANY:
            axes.plot(x, y, color=color, linewidth=0.7, alpha=0.25)
            x, y = running_mean(x, y, len(x) // 40)
        axes.plot(x, y, color=color, label=name, linewidth=1.4, marker="o" if len(x) < FEW else None, markersize=4)
    for name, height in (marks or {}).items():
        axes.axhline(height, color="#888", linestyle=":", linewidth=1.2, label=name)
    if log:
        axes.set_yscale("log")
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def running_mean(x: Sequence[float], y: Sequence[float], width: int) -> tuple[list[float], list[float]]:
    """Average each value with those before it, `width` together; gives (x, y) from the first whole window on."""
    total, means = sum(y[:width]), [sum(y[:width]) / width]
    for i in range(width, len(y)):
        total += y[i] - y[i - width]
        means.append(total / width)
    return list(x[width - 1 :]), means
