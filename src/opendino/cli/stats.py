# SPDX-License-Identifier: Apache-2.0
"""`opendino stats`: mean and standard deviation of each channel, for a recipe's normalisation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import tyro

from opendino.cli.embed import images_progress, show

EXAMPLE = """Compute the mean and standard deviation of each channel over a data set.

Example:
  opendino stats photos/ --out stats.yaml

Prints them as lines for a recipe and as flags for `opendino pretrain`. Values are 0 for black and 1 for white."""
DIGITS = 4
SHOWN = 5
"""Unreadable images that are named."""


@dataclass(frozen=True)
class Args:
    """Arguments of `opendino stats`."""

    data: tyro.conf.Positional[str]
    """Folder, list, CSV, tar shards or Parquet files of images."""
    channels: int = 3
    """Channels of the images; that of --model.in-chans."""
    images: int | None = None
    """Read only so many, drawn at random; default: all."""
    workers: int | None = None
    """Threads that read images; default: one a core, at most 8."""
    out: Path | None = None
    """Also write the lines for a recipe to this file."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the figures as one JSON object."""


def main(argv: list[str]) -> int:
    """Read the images once and print the figures."""
    args = tyro.cli(Args, args=argv, prog="opendino stats", description=EXAMPLE)
    from opendino.images.sources import open_source
    from opendino.images.statistics import channel_statistics

    source, start = open_source(args.data), perf_counter()
    with images_progress() as bar:
        task = bar.add_task("read", total=args.images or len(source), rate="", errors=0)

        def on_image(done: int, errors: int, total: int) -> None:
            show(bar, task, done, errors, total, done / (perf_counter() - start))

        found = channel_statistics(
            source, channels=args.channels, max_images=args.images, workers=args.workers, on_image=on_image
        )
        for path, reason in found.errors[:SHOWN]:
            bar.console.print(f"left out {path}: {reason}", highlight=False, markup=False)
    if args.out is not None:
        args.out.write_text(as_recipe(found))
    if args.json:
        figures = {"mean": found.mean, "std": found.std, "images": found.images, "pixels": found.pixels}
        print(json.dumps(figures | {"errors": len(found.errors)}))
    else:
        left_out = f", {len(found.errors)} unreadable left out" if found.errors else ""
        print(f"# {found.images} images, {found.pixels} pixels{left_out}")
        print(f"{as_recipe(found)}\n# or as flags:\n# {as_flags(found)}")
    return 0


def as_recipe(found: Any) -> str:
    """Give the lines for a recipe."""
    return f"crops:\n  mean: {_rounded(found.mean)}\n  std: {_rounded(found.std)}\n"


def as_flags(found: Any) -> str:
    """Give the flags of `opendino pretrain`."""
    parts = [(f"--crops.{name}", _rounded(getattr(found, name))) for name in ("mean", "std")]
    return " ".join(" ".join([flag, *map(str, values)]) for flag, values in parts)


def _rounded(values: tuple[float, ...]) -> list[float]:
    return [round(v, DIGITS) for v in values]
