# SPDX-License-Identifier: Apache-2.0
"""Pictures of depth: image, truth, prediction and where it is wrong, in one row (extra `report`)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from opendino.errors import MissingExtraError
from opendino.report.page import Figure, Section, write_page

PANEL = 160
"""Height of a panel, pixels."""
WORST_ERROR = 0.5
"""|prediction − truth| / truth that gets the strongest colour."""
Depth = npt.NDArray[np.floating]


@dataclass(frozen=True)
class DepthExample:
    """One image of the page.

    Attributes:
        name: what it is called.
        image: uint8 (H, W, 3).
        truth: (H, W) metres, 0 where unknown.
        prediction: (H, W) metres.
        errors: its metrics.
    """

    name: str
    image: npt.NDArray[np.uint8]
    truth: Depth
    prediction: Depth
    errors: Mapping[str, float]


def check_extra() -> None:
    """Say at once, not after an hour of training, that a page cannot be written.

    Raises:
        MissingExtraError: naming what to install.
    """
    for package in ("matplotlib", "jinja2"):
        if find_spec(package) is None:
            raise MissingExtraError(package, "report", "A page of depth")


def depth_row(example: DepthExample, low: float, high: float) -> bytes:
    """Draw image, truth, prediction and relative error as one PNG; near is bright, unknown is grey."""
    known = (example.truth > low) & (example.truth < high)
    near, far = np.quantile(example.truth[known], [0.02, 0.98]) if known.any() else (low, high)
    relative = np.abs(example.prediction - example.truth) / np.where(known, example.truth, 1)
    panels = [
        example.image,
        _coloured(1 - _scaled(example.truth, near, far), "viridis", known),
        _coloured(1 - _scaled(example.prediction, near, far), "viridis", None),
        _coloured(np.clip(relative / WORST_ERROR, 0, 1), "inferno", known),
    ]
    return _beside(panels)


def write_depth_page(
    path: Path, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]],
    examples: Mapping[str, Sequence[DepthExample]], low: float, high: float,
) -> None:  # fmt: skip
    """Write a page with the table of figures and, per set, rows of pictures.

    Args:
        path: of the .html file.
        title: of the page.
        columns: of the table.
        rows: of the table, as text.
        examples: heading → images in the order they are shown.
        low: metres; truth outside low to high counts as unknown.
        high: metres.
    """
    sections = [Section("Figures", columns=columns, rows=rows)]
    explained = (
        "Image, true depth, predicted depth, relative error. Both depths of a row share one colour scale, near is "
        f"bright; the error is black at 0 and brightest from {WORST_ERROR:.0%} on; grey is where depth is unknown."
    )
    for heading, shown in examples.items():
        figures = [
            Figure(depth_row(e, low, high), f"{e.name}: RMSE {e.errors['rmse']:.3f} m, δ1 {e.errors['d1']:.1f} %")
            for e in shown
        ]  # fmt: skip
        sections.append(Section(heading, text=[explained], figures=figures))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_page(path, title, sections)


def _scaled(depth: Depth, near: float, far: float) -> Depth:
    scaled: Depth = np.clip((depth - near) / max(far - near, 1e-6), 0, 1)
    return scaled


def _coloured(values: Depth, name: str, known: npt.NDArray[np.bool_] | None) -> npt.NDArray[np.uint8]:
    from matplotlib import colormaps

    rgb: npt.NDArray[np.uint8] = colormaps[name](np.asarray(values, np.float64), bytes=True)[..., :3].copy()
    if known is not None:
        rgb[~known] = 128
    return rgb


def _beside(panels: Sequence[Any]) -> bytes:
    from PIL import Image

    images = []
    for panel in panels:
        image = Image.fromarray(panel)
        images.append(image.resize((max(round(image.width * PANEL / image.height), 1), PANEL)))
    row = Image.new("RGB", (sum(i.width for i in images) + 4 * (len(images) - 1), PANEL), "white")
    left = 0
    for image in images:
        row.paste(image, (left, 0))
        left += image.width + 4
    buffer = io.BytesIO()
    row.save(buffer, format="PNG")
    return buffer.getvalue()
