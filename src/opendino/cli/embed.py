# SPDX-License-Identifier: Apache-2.0
"""`opendino embed`: images in, a folder of Parquet shards out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

EXAMPLE = """Turn images into feature vectors on disk.

Example:
  opendino embed photos/ --model vits14 --out features/ --what cls,mean --batch 64

The folder gets part-00000.parquet, … with one row per image (path, sha256, cls, mean, patches, error) and
manifest.json. Killed and started again with the same settings, it goes on where it stopped."""


@dataclass(frozen=True)
class Args:
    """Arguments of `opendino embed`."""

    input: tyro.conf.Positional[Path]
    """Folder, .txt or .csv list, tar shards or Parquet files of images, or a URL of these."""
    model: str
    """Model name, weight file, transformers folder or run folder."""
    out: Path
    """Folder for the shards."""
    what: str = "cls,mean"
    """Vectors to write: cls, mean, patches, with commas."""
    layers: int = 1
    """Concatenate the vectors of the last n blocks."""
    size: str | None = None
    """Image side in pixels, or HxW; default: the size that travels with the model."""
    fit: str = "crop"
    """How images get that size: crop, resize or pad."""
    batch: int = 32
    """Images in one forward pass."""
    workers: int | None = None
    """Threads that read images; default: one a core, at most 8."""
    max_errors: int | None = None
    """Fail when more images than this cannot be read; default: never."""
    weights: str | None = None
    """Weight file for a model given by name; 'random' draws them from seed 0."""
    precision: str = "auto"
    """auto, fp32, bf16 or fp16."""
    device: str | None = None
    """cpu, cuda, …; default: cuda if there is one."""
    shard_rows: int = 4096
    """Rows in a shard."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the counts as one JSON object."""


def main(argv: list[str]) -> int:
    """Embed INPUT and print how many images were done."""
    args = tyro.cli(Args, args=argv, prog="opendino embed", description=EXAMPLE)
    from opendino.embed.writer import embed_to_folder
    from opendino.images.sources import open_source

    source = open_source(args.input)
    embedder = make_embedder(
        args.model, args.weights, size=args.size, batch_size=args.batch, device=args.device, precision=args.precision,
        fit=args.fit, layers=args.layers, what=args.what.split(","), workers=args.workers,
    )  # fmt: skip
    start, before = perf_counter(), -1
    with images_progress() as bar:
        task = bar.add_task("embed", total=len(source), rate="", errors=0)

        def on_batch(rows: int, errors: int, total: int) -> None:
            nonlocal before
            before = rows if before < 0 else before
            show(bar, task, rows, errors, total, (rows - before) / (perf_counter() - start))

        progress = embed_to_folder(
            embedder, source, args.out, model_name=args.model, max_errors=args.max_errors,
            shard_rows=args.shard_rows, on_batch=on_batch,
        )  # fmt: skip
    seconds = perf_counter() - start
    new = progress.count - before
    figures = {"count": progress.count, "new": new, "errors": progress.errors, "images_per_s": round(new / seconds, 2)}
    if args.json:
        print(json.dumps(figures))
    else:
        print(
            f"{progress.count} images in {args.out} ({new} new, {progress.errors} unreadable), "
            f"{figures['images_per_s']} images/s"
        )
    return 0


def make_embedder(model: str, weights: str | None, *, size: str | None = None, **settings: Any) -> Any:
    """Load a model as the command line names it and make its Embedder."""
    import torch

    from opendino.embed.embedder import Embedder
    from opendino.images.preprocess import parse_size

    if weights == "random":
        torch.manual_seed(0)  # so that a second call, or one that goes on, has the same model
    return Embedder(model, weights=weights, size=parse_size(size), **settings)


def images_progress() -> Progress:
    """Make the progress line of commands that go through images, on standard error."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(), TextColumn("unreadable {task.fields[errors]}"), console=Console(stderr=True),
    )  # fmt: skip


def show(bar: Progress, task: Any, rows: int, errors: int, total: int, rate: float) -> None:
    """Bring a progress line up to date; `rate` in images/s."""
    bar.update(task, completed=rows, total=total, errors=errors, rate=f"{rate:.1f} images/s")
