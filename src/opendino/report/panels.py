# SPDX-License-Identifier: Apache-2.0
"""The curves on the page of a pre-training run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opendino.report.page import Figure
from opendino.report.plots import curves

Record = dict[str, Any]
CURVE_WIDTH = 430
LN_K = "ln K"


@dataclass(frozen=True)
class Panel:
    """One picture of curves: which figures of the records, as NAME or PREFIX*, and what to see in it."""

    title: str
    unit: str
    keys: tuple[str, ...]
    caption: str
    log: bool = False
    marks: tuple[str, ...] = ()


PANELS: dict[str, tuple[Panel, ...]] = {
    "Losses": (
        Panel("DINO and iBOT", "nats", ("dino", "ibot"), "DINO at ln K means that the student guesses.", marks=(LN_K,)),
        Panel("DINO by crops", "nats", ("dino_global", "dino_local"), "The shares of global and local crops in DINO."),
        Panel(
            "Features",
            "loss",
            ("feature_cls", "feature_patch"),
            "Distance of the student's tokens from the teacher's: 1 − cosine, and for patches a share of smooth L1.",
        ),
        Panel(
            "Gradients and colours",
            "1 − cosine",
            ("hog_cls", "hog_patch", "hog_identity"),
            "Distance from histograms: of the crop, of the patch, and of the crop that the patch is from.",
        ),
        Panel("KoLeo", "nats", ("koleo",), "Falls as the features of a batch spread."),
    ),
    "What is learned": (
        Panel("k-NN probe", "%", ("probe/*",), "Should rise from its first value; the loss alone does not tell."),
        Panel(
            "Feature rank", "RankMe", ("feature_rank",), "Directions the features use. A lasting fall is a collapse."
        ),
        Panel(
            "Feature rank of the same images",
            "RankMe",
            ("guard/feature_rank",),
            "Of a fixed set of your own images, from the start on.",
        ),
        Panel(
            "Nearest neighbours",
            "distance, share",
            ("koleo_distance", "near_duplicates"),
            "Distance to the nearest other image of a batch, 0 to 1.41 and more; share of images with a copy.",
        ),
        Panel(
            "Largest token norms",
            "× median",
            ("cls_norm_max", "patch_norm_max"),
            "Above 4 they are outliers, which disturb dense features.",
            marks=("4",),
        ),
    ),
    "Teacher": (
        Panel(
            "Teacher entropy",
            "nats",
            ("teacher_entropy",),
            "At ln K the teacher says nothing, at 0 it is certain. In between is sound.",
            marks=(LN_K,),
        ),
        Panel("Prototype use", "share", ("prototype_use",), "Near 0 every image gets the same target: a collapse."),
    ),
    "Steps": (
        Panel(
            "Gradient norms",
            "before clipping",
            ("grad_norm_*",),
            "Rare peaks are cut by the clip (dotted).",
            True,
            ("clip",),
        ),
        Panel(
            "Update norms",
            "‖Δθ‖ / ‖θ‖",
            ("update_norm_*",),
            "Change of a network by one step; above 0.01 is high.",
            True,
        ),
    ),
    "Speed": (
        Panel("Images per second", "images/s", ("images_per_s",), "Of whole steps, loading included."),
        Panel(
            "Waiting for data", "share of a step", ("data_wait",), "Above 0.2 the loader is the limit.", marks=("0.2",)
        ),
        Panel(
            "Use of the machine", "share of the peak", ("mfu",), "Model FLOPs beside a matrix product measured here."
        ),
        Panel("Memory", "GB", ("peak_memory_gb",), "The most used so far."),
    ),
    "Schedules": (
        Panel(
            "Learning rate",
            "",
            ("lr", "last_layer_lr", "backbone_lr"),
            "Of the heads; the backbone's layers have their multiples of it.",
        ),
        Panel("Weight decay", "", ("weight_decay",), "Of matrices only."),
        Panel("Teacher momentum", "", ("momentum",), "Of the moving average."),
        Panel("Teacher temperature", "", ("teacher_temp",), "Lower makes surer targets."),
    ),
}


def panels(records: Sequence[Record], config: Mapping[str, Any], chosen: Sequence[Panel]) -> list[Figure]:
    """Draw those panels that have data."""
    pictures = []
    for panel in chosen:
        lines = {
            name: line
            for key in names(records, panel.keys)
            if (line := line_of(records, key))[0]
            for name in [short(key)]
        }
        if lines:
            marks = {m: height for m in panel.marks if (height := mark(m, config)) is not None}
            png = curves(lines, panel.title, panel.unit, marks=marks, log=panel.log)
            pictures.append(Figure(png, panel.caption, CURVE_WIDTH))
    return pictures


def names(records: Sequence[Record], keys: Sequence[str]) -> list[str]:
    """Resolve NAME, PREFIX* and probe/* to the figures that the records have."""
    found: list[str] = []
    for key in keys:
        if not key.endswith("*"):
            found.append(key)
            continue
        have = {f"probe/{k}" for r in records for k in r.get("probe") or {}} | {k for r in records for k in r}
        found += sorted(k for k in have if k.startswith(key[:-1]))
    return found


def line_of(records: Sequence[Record], key: str) -> tuple[list[float], list[float]]:
    """Give the steps and values of one figure; missing and non-finite ones are left out."""
    group, _, name = key.rpartition("/")
    x, y = [], []
    for record in records:
        value = (record.get(group) or {}).get(name) if group else record.get(name)
        if isinstance(value, int | float) and math.isfinite(value):
            x.append(float(record["step"]))
            y.append(float(value))
    return x, y


def short(key: str) -> str:
    """Name a figure for a legend."""
    for prefix in ("probe/", "guard/", "grad_norm_", "update_norm_"):
        key = key.removeprefix(prefix)
    return key.replace("_", " ")


def mark(name: str, config: Mapping[str, Any]) -> float | None:
    """Give the height of a dotted line: ln K and the clip come from the settings, others are numbers."""
    if name == LN_K:
        prototypes = (config.get("heads") or {}).get("num_prototypes")
        return math.log(prototypes) if prototypes else None
    if name == "clip":
        return (config.get("optim") or {}).get("clip_grad") or None
    return float(name)
