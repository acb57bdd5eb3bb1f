# SPDX-License-Identifier: Apache-2.0
"""The page of a classifier: its confusion matrix, its worst classes, and pictures of what it took for what."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from opendino.errors import DataError, MissingExtraError
from opendino.images.arrays import read_image
from opendino.report.page import Figure, Note, Section, write_page

THUMBNAIL = 96
NAMED_CLASSES, MAX_CELLS = 40, 100
"""Up to NAMED_CLASSES classes the matrix has their names; above MAX_CELLS neighbouring ones are drawn together."""
Ints = npt.NDArray[np.int64]
ReadImage = Callable[[int], str | Path | bytes]


class Scores(Protocol):
    """What the page needs to know (`opendino.evaluate.classification.ClassificationScores`)."""

    @property
    def top1(self) -> float: ...
    @property
    def top5(self) -> float: ...
    @property
    def mean_per_class(self) -> float: ...
    @property
    def per_class(self) -> npt.NDArray[np.float64]: ...
    @property
    def counts(self) -> Ints: ...
    @property
    def classes(self) -> list[str]: ...
    @property
    def predicted(self) -> Ints: ...
    @property
    def confusion(self) -> Ints: ...
    def worst(self, n: int = ...) -> Ints: ...
    def mistakes_of(self, class_index: int) -> Ints: ...


def classification_page(
    path: str | Path,
    title: str,
    scores: Scores,
    read: ReadImage,
    names: Sequence[str],
    *,
    worst: int = 10,
    examples: int = 6,
    notes: Sequence[str] = (),
) -> None:
    """Write the page.

    Args:
        path: of the HTML file.
        title: headline.
        scores: of the classifier.
        read: gives what `read_image` takes for scored image i.
        names: of the scored images, for captions.
        worst: classes that are shown with pictures.
        examples: mistakes of each.
        notes: further sentences for the top, such as how the classifier was made.
    """
    share = {"top-1": scores.top1, "top-5": scores.top5, "mean per class": scores.mean_per_class}
    empty = int((scores.counts == 0).sum())
    about = [f"{len(scores.predicted)} images of {len(scores.classes)} classes.", *notes]
    if empty:
        about.append(f"{empty} classes have no image here and count nowhere.")
    sections = [
        Section("Scores", text=about, columns=("", "%"), rows=[(k, f"{v:.2f}") for k, v in share.items()]),
        Section(
            "Confusion matrix",
            text=["Rows are the true classes, columns the predicted ones; each row is 100 %."],
            figures=[Figure(confusion_picture(scores.confusion, scores.classes), "confusion matrix", 720)],
        ),
    ]
    chosen = [int(c) for c in scores.worst(worst)]
    if not chosen:
        sections.append(Section("Worst classes", notes=[Note("ok", "There is no mistake.")]))
    else:
        sections.append(_table_of_worst(scores, chosen))
        sections += [_pictures_of(scores, c, read, names, examples) for c in chosen]
    write_page(Path(path), title, sections)


def _table_of_worst(scores: Scores, chosen: Sequence[int]) -> Section:
    rows = []
    for c in chosen:
        row = scores.confusion[c].copy()
        row[c] = 0
        other = int(row.argmax())
        taken = f"{scores.classes[other]} ({row[other]} times)"
        rows.append((scores.classes[c], str(scores.counts[c]), f"{scores.per_class[c]:.1f}", taken))
    return Section("Worst classes", columns=("class", "images", "top-1 %", "most often taken for"), rows=rows)


def _pictures_of(scores: Scores, c: int, read: ReadImage, names: Sequence[str], examples: int) -> Section:
    figures, unreadable = [], 0
    for i in scores.mistakes_of(c)[:examples]:
        caption = f"{scores.classes[c]} → {scores.classes[scores.predicted[i]]} · {Path(names[i]).name}"
        try:
            figures.append(Figure(thumbnail(read(int(i)), names[i]), caption, 2 * THUMBNAIL))
        except (DataError, OSError):
            unreadable += 1
    text = [f"{unreadable} pictures could not be read again."] if unreadable else []
    return Section(f"{scores.classes[c]}: {scores.per_class[c]:.1f} %", text=text, figures=figures)


def thumbnail(source: str | Path | bytes, name: str = "") -> bytes:
    """Give a small PNG of an image; of an image with other than three channels the first one in grey."""
    try:
        pixels = read_image(source, name=name)
    except DataError:
        pixels = read_image(source, channels=1, name=name)
    array = pixels.float().clamp(0, 255).round().byte().expand(3, -1, -1).permute(1, 2, 0).numpy()
    picture = Image.fromarray(np.ascontiguousarray(array))
    picture.thumbnail((2 * THUMBNAIL, 2 * THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def confusion_picture(confusion: Ints, classes: Sequence[str]) -> bytes:
    """Draw a confusion matrix (C, C) as PNG, each row in percent of its images."""
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise MissingExtraError("matplotlib", "report", "The page") from error
    counts, each = _grouped(confusion)
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    n = len(counts)
    side = min(4 + 0.25 * n, 9)
    figure = Canvas(figsize=(side + 0.8, side), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, vmin=0, vmax=100, cmap="viridis")
    figure.colorbar(image, ax=axes, label="% of the true class", shrink=0.8)
    axes.set_xlabel("predicted" if each == 1 else f"predicted ({each} neighbouring classes a cell)")
    axes.set_ylabel("true")
    if each == 1 and n <= NAMED_CLASSES:
        labels = [c if len(c) <= 18 else f"{c[:17]}…" for c in classes]
        axes.set_xticks(range(n), labels, rotation=90, fontsize=7)
        axes.set_yticks(range(n), labels, fontsize=7)
    if n <= 15:
        _write_shares(axes, shares)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _write_shares(axes: Any, shares: npt.NDArray[np.float64]) -> None:
    for i, row in enumerate(shares):
        for j, share in enumerate(row):
            if share >= 0.5:
                axes.text(j, i, f"{share:.0f}", ha="center", va="center", fontsize=7,
                          color="black" if share > 60 else "white")  # fmt: skip


def _grouped(confusion: Ints) -> tuple[Ints, int]:
    """Add up neighbouring classes until at most MAX_CELLS are left; gives the table and how many went into a cell."""
    each = -(-len(confusion) // MAX_CELLS)
    starts = np.arange(0, len(confusion), each)
    table: Ints = np.add.reduceat(np.add.reduceat(confusion, starts, 0), starts, 1)
    return table, each
