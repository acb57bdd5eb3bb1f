# SPDX-License-Identifier: Apache-2.0
"""A page about a segmentation: scores, classes, and pictures with truth and prediction side by side."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from opendino.report.page import Figure, Note, Section, write_page

Pixels = npt.NDArray[np.uint8]
IGNORED = (255, 255, 255)
GAP = 6
SHOWN_SIDE = 320
"""Longest side of a picture on the page, pixels."""


@dataclass(frozen=True)
class Example:
    """One image of the page.

    Attributes:
        name: of the file.
        image: (H, W, 3).
        truth: (H, W), class indices; values from C on are ignored.
        prediction: (H, W).
        miou: of this image, percent.
    """

    name: str
    image: Pixels
    truth: Pixels
    prediction: Pixels
    miou: float


def palette(classes: int) -> Pixels:
    """Give a colour to each class, (C, 3): hues a golden section apart, in three lightnesses; class 0 is dark grey."""
    colours = [(60, 60, 60)]
    for c in range(1, classes):
        rgb = colorsys.hls_to_rgb(c * 0.618034 % 1, (0.5, 0.68, 0.34)[c % 3], 0.75)
        colours.append(tuple(round(255 * v) for v in rgb))  # type: ignore[arg-type]
    return np.array(colours, np.uint8)


def coloured(mask: npt.NDArray[Any], colours: Pixels) -> Pixels:
    """Draw class indices (H, W) as (H, W, 3); what is no class is white."""
    table = np.full((256, 3), IGNORED, np.uint8)
    table[: len(colours)] = colours
    out: Pixels = table[mask]
    return out


def side_by_side(example: Example, colours: Pixels) -> bytes:
    """Draw image, truth and prediction next to each other as PNG; wrong pixels of the prediction keep their colour."""
    parts = [example.image, coloured(example.truth, colours), coloured(example.prediction, colours)]
    height, width = example.truth.shape
    scale = min(1.0, SHOWN_SIDE / max(height, width))
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    sheet = Image.new("RGB", (3 * size[0] + 2 * GAP, size[1]), "white")
    for i, part in enumerate(parts):
        how = Image.Resampling.BILINEAR if i == 0 else Image.Resampling.NEAREST
        sheet.paste(Image.fromarray(part).resize(size, how), (i * (size[0] + GAP), 0))
    return _png(sheet)


def legend(classes: Sequence[str], colours: Pixels, columns: int = 4) -> bytes:
    """Draw each class's colour with its name as PNG."""
    cell, line = 190, 20
    rows = -(-len(classes) // columns)
    sheet = Image.new("RGB", (cell * columns, line * rows), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (name, colour) in enumerate(zip(classes, colours, strict=True)):
        x, y = i // rows * cell, i % rows * line
        draw.rectangle((x, y + 3, x + 22, y + line - 3), fill=tuple(int(v) for v in colour))
        draw.text((x + 28, y + 4), name[:26].encode("latin-1", "replace").decode("latin-1"), fill=(40, 40, 40))
    return _png(sheet)


def segmentation_page(
    path: Path,
    title: str,
    *,
    classes: Sequence[str],
    summary: Sequence[tuple[str, str]],
    per_class: Sequence[tuple[str, str, str, str]],
    confusions: Sequence[tuple[str, str, float]],
    worst: Sequence[Example],
    others: Sequence[Example],
    remarks: Sequence[str] = (),
    about: Sequence[str] = (),
) -> None:
    """Write the page.

    Args:
        path: of the HTML file.
        title: heading.
        classes: names, C.
        summary: (name, value) rows.
        per_class: (class, IoU, accuracy, share of the pixels) rows.
        confusions: (true, predicted, percent of the true class).
        worst: images with the lowest mIoU.
        others: images from all over the set.
        remarks: what a reader must know, such as classes without a training pixel.
        about: paragraphs on how it was measured.
    """
    colours = palette(len(classes))
    key = Figure(legend(classes, colours), "colours of the classes; white does not count")

    def figures(examples: Sequence[Example]) -> list[Figure]:
        captions = [f"{e.name}: image, truth, prediction; mIoU {e.miou:.1f} %" for e in examples]
        return [Figure(side_by_side(e, colours), c) for e, c in zip(examples, captions, strict=True)]

    write_page(
        path,
        title,
        [
            Section("Scores", about, ("", ""), summary, notes=[Note("watch", text) for text in remarks]),
            Section("The worst images", figures=[key, *figures(worst)]),
            Section("Images from all over the set", figures=figures(others)),
            Section("Classes", columns=("class", "IoU %", "accuracy %", "pixels %"), rows=per_class),
            Section(
                "What is taken for what",
                columns=("truth", "prediction", "% of the true class's pixels"),
                rows=[(t, p, f"{share:.1f}") for t, p, share in confusions],
            ),
        ],
    )


def _png(sheet: Image.Image) -> bytes:
    buffer = io.BytesIO()
    sheet.save(buffer, format="png", optimize=True)
    return buffer.getvalue()
