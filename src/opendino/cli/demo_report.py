# SPDX-License-Identifier: Apache-2.0
"""The page that `opendino demo` leaves: curves, scores, PCA and attention pictures, nearest neighbours."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from opendino.images.sources import open_source
from opendino.models.vit import VisionTransformer
from opendino.report.page import Figure, Section, write_page
from opendino.report.plots import curves
from opendino.sample_data.demo import DemoData
from opendino.views.attention import attention_pictures
from opendino.views.pca import pca_pictures

QUERIES, NEIGHBOURS, TILE, PICTURES = 5, 6, 96, 6
SCORE_NAMES = {
    "emoji": "emoji k-NN",
    "objects": "cut-outs k-NN",
    "labelled": "photographs k-NN",
    "retrieval": "emoji retrieval",
    "heldout": "other crops",
}


def write_report(
    out: Path,
    run: Path,
    data: DemoData,
    table: dict[str, dict[str, float]],
    model: VisionTransformer,
    describe: Callable[[list[str]], Tensor],
    minutes: float,
) -> Path:
    """Write OUT/report.html and give its path."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    photographs = [i.path for i in open_source(data.heldout).items]
    every = max(1, len(photographs) // PICTURES)
    shown = photographs[::every][:PICTURES]
    sections = [
        Section("What this is", [introduction(data, records, minutes)]),
        Section("Scores, percent", score_notes(data), ["", *SCORE_NAMES.values()], score_rows(table)),
        Section("Training", figures=training_figures(records)),
        Section("Patch features, first three components", figures=pairs(shown, pca_pictures(model, shown))),
        Section("Attention of the cls token, last layer", figures=pairs(shown, attention_pictures(model, shown))),
        Section("Nearest neighbours", ["The query stands first; the others are its nearest by cosine."],
                figures=neighbour_figures(data, photographs, describe)),
    ]  # fmt: skip
    path = out / "report.html"
    write_page(path, "opendino demo", sections)
    return path


def introduction(data: DemoData, records: list[dict[str, Any]], minutes: float) -> str:
    """Say what was trained, on what, for how long."""
    steps = records[-1]["step"]
    fallback = (
        " The registries were out of reach: only the images shipped with the package were used."
        if data.fallback
        else ""
    )
    return (
        f"A small Vision Transformer, pre-trained without labels for {steps} steps in {minutes:.1f} minutes.{fallback}"
    )


def score_notes(data: DemoData) -> list[str]:
    """Say what the columns are."""
    return [
        "emoji k-NN: held-out emoji in their classes, mean per class. cut-outs k-NN: held-out photographed objects. "
        "photographs k-NN: five classes; the same photographs, without their labels, are part of the training tiles. "
        "emoji retrieval: mAP (medium) of finding the same emoji drawn by others. other crops: share of crops of "
        "held-out photographs whose nearest neighbour is another crop of the same photograph. All k = 20, cosine."
    ]


def score_rows(table: dict[str, dict[str, float]]) -> list[list[str]]:
    """Format the score table."""
    return [[name, *(f"{s[c]:.1f}" if c in s else "–" for c in SCORE_NAMES)] for name, s in table.items()]


def training_figures(records: list[dict[str, Any]]) -> list[Figure]:
    """Draw the losses and the health figures over the steps."""

    def line(key: str) -> tuple[list[float], list[float]]:
        rows = [r for r in records if key in r]
        return [r["step"] for r in rows], [r[key] for r in rows]

    pictures = [
        Figure(curves({"DINO": line("dino"), "iBOT": line("ibot")}, "Losses", "nats"), "DINO and iBOT losses"),
        Figure(curves({"KoLeo": line("koleo")}, "KoLeo", "nats"), "KoLeo: how evenly features spread"),
        Figure(curves({"teacher entropy": line("teacher_entropy")}, "Teacher entropy", "nats"), "0 would be collapse"),
        Figure(curves({"feature rank": line("feature_rank")}, "Feature rank", "RankMe"), "higher uses more directions"),
    ]
    return pictures


def pairs(paths: list[str], pictures: list[Image.Image]) -> list[Figure]:
    """Put each photograph beside its picture."""
    figures = []
    for path, picture in zip(paths, pictures, strict=True):
        photograph = Image.open(path).convert("RGB").resize((224, 224))
        figures.append(Figure(png(strip([photograph, picture.convert("RGB").resize((224, 224), 0)])), Path(path).stem))
    return figures


def neighbour_figures(data: DemoData, photographs: list[str], describe: Callable[[list[str]], Tensor]) -> list[Figure]:
    """Show the nearest neighbours of a few queries among photographs, and among emoji when they are there."""
    sets = [("photograph", photographs)]
    if data.emoji:
        sets.append(("emoji", [i.path for i in open_source(data.emoji / "test").items]))
    figures = []
    for name, paths in sets:
        features = describe(paths)
        queries = torch.linspace(0, len(paths) - 1, QUERIES).long()
        nearest = (features[queries] @ features.T).topk(NEIGHBOURS + 1, dim=1).indices
        for row in nearest.tolist():
            tiles = [Image.open(paths[i]).convert("RGB").resize((TILE, TILE)) for i in row]
            figures.append(Figure(png(strip(tiles)), f"{name} {Path(paths[row[0]]).stem}"))
    return figures


def strip(tiles: list[Image.Image]) -> Image.Image:
    """Put pictures of one size side by side."""
    width, height = tiles[0].size
    out = Image.new("RGB", (width * len(tiles) + 4 * (len(tiles) - 1), height), "white")
    for i, tile in enumerate(tiles):
        out.paste(tile, (i * (width + 4), 0))
    return out


def png(picture: Image.Image) -> bytes:
    """Encode a picture."""
    buffer = io.BytesIO()
    picture.save(buffer, format="png")
    return buffer.getvalue()
