# SPDX-License-Identifier: Apache-2.0
"""`opendino embed`: images in, a folder of Parquet shards out."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from opendino.errors import ConfigError

EXAMPLE = """Turn images into feature vectors on disk.

Example:
  opendino embed photos/ --model vits14 --out features/ --what cls,mean --batch 64
  opendino embed --verify features/

The folder gets part-*.parquet with one row per image (path, sha256, cls, mean, patches, error), manifest.json, and
errors.csv with the images that could not be read. Killed and started again with the same settings, it goes on where it
stopped. --verify checks a finished folder; its own --help has more."""


@dataclass(frozen=True)
class Args:
    """Arguments of `opendino embed`."""

    input: tyro.conf.Positional[Path]
    """Folder, .txt or .csv list, tar shards or Parquet files of images, or a URL of these."""
    model: str
    """Model name, weight file, transformers folder or run folder."""
    out: Path
    """Folder for the shards, or a URL that fsspec knows."""
    what: str = "cls,mean"
    """Vectors to write: cls, mean, patches, with commas."""
    layers: int = 1
    """Concatenate the vectors of the last n blocks."""
    size: str | None = None
    """Image side in pixels, or HxW; default: the size that travels with the model."""
    fit: str = "crop"
    """How images get that size: crop, resize, pad, or aspect (about as many patches, in the image's own aspect)."""
    decode: Literal["exact", "scaled"] = "exact"
    """scaled: decode large JPEGs at a fraction of their sides; faster, and some grey levels away."""
    batch: int = 32
    """Images in one forward pass."""
    workers: int | None = None
    """Threads that read images; default: one a core, at most 8."""
    max_errors: int | None = None
    """Fail when more images than this cannot be read; default: never."""
    weights: str | None = None
    """Weight file for a model given by name; 'random' draws them from seed 0."""
    precision: str = "auto"
    """auto, fp32, bf16 or fp16; bf16 is the fast one on a processor that has it."""
    runtime: str = "auto"
    """auto measures once which is fastest here and close enough to fp32 (docs/runtimes.md). Or torch, torch-prepared,
    torch-compiled, onnx, openvino. A folder that was begun goes on as it was begun."""
    device: str | None = None
    """cpu, cuda, …; default: cuda if there is one."""
    shard_rows: int = 4096
    """Rows in a shard, rounded up to whole batches."""
    dtype: Literal["float32", "float16"] = "float32"
    """Of the vectors on the disk."""
    nproc: int | None = None
    """Processes that compute, each with its share of the cores, or a GPU; default: 1, and with Ray all that it has."""
    engine: Literal["local", "ray"] = "local"
    """local: this machine. ray: a Ray cluster."""
    address: str | None = None
    """Of the Ray cluster; default: RAY_ADDRESS, or Ray on this machine alone."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the counts as one JSON object."""


def main(argv: list[str]) -> int:
    """Embed INPUT and print how many images were done."""
    if any(word == "--verify" or word.startswith("--verify=") for word in argv):
        from opendino.cli.embed_verify import main as verify

        return verify(argv)
    args = tyro.cli(Args, args=argv, prog="opendino embed", description=EXAMPLE)
    if args.nproc is not None and args.nproc < 1:
        raise ConfigError(f"--nproc is {args.nproc}; give the number of processes, 1 or more.")
    if args.address is not None and args.engine != "ray":
        raise ConfigError("--address is that of a Ray cluster. Give --engine ray with it.")
    start, before = perf_counter(), -1
    with images_progress() as bar, ended_by_sigterm():
        task = bar.add_task("embed", total=None, rate="", errors=0)

        def on_batch(rows: int, errors: int, total: int) -> None:
            nonlocal before, start
            if before < 0:  # images/s begin when the model is loaded, and what auto means is known
                before, start = rows, perf_counter()
            show(bar, task, rows, errors, total, (rows - before) / max(perf_counter() - start, 1e-6))

        try:
            progress, choice = run(args, on_batch)
        except KeyboardInterrupt as stop:
            raise Interrupted(getattr(stop, "number", 2), args.out) from None
    tell(args, progress, perf_counter() - start, choice)
    return 0


def run(args: Args, on_batch: Any) -> tuple[Any, Any]:
    """Do the job with the engine that is asked for; give the progress, and what `auto` chose or None."""
    from opendino.embed.settled import settle
    from opendino.images.sources import open_source

    alone = args.engine == "local" and (args.nproc or 1) == 1
    source = open_source(args.input) if alone else None  # a wrong path is told before anything is measured
    settled = settle(job_of(args), ray=args.engine == "ray")
    job = settled.job
    if args.engine == "ray":
        from opendino.embed.ray_backend import embed_with_ray

        return embed_with_ray(job, address=args.address, actors=args.nproc, on_batch=on_batch), settled.choice
    if source is None:
        from opendino.embed.pool import embed_with_processes

        return embed_with_processes(job, args.nproc or 1, on_batch), settled.choice
    from opendino.embed.writer import embed_to_folder

    progress = embed_to_folder(
        job.make_embedder(), source, job.out, model_name=job.model, weights=job.weights, max_errors=job.max_errors,
        shard_rows=job.shard_rows, dtype=job.dtype, on_batch=on_batch,
    )  # fmt: skip
    return progress, settled.choice


def job_of(args: Args) -> Any:
    """Put the arguments in the words that other processes understand."""
    from opendino.embed.job import Job
    from opendino.images.locations import as_location
    from opendino.images.preprocess import parse_size

    embedder = {
        "size": parse_size(args.size), "batch_size": args.batch, "device": args.device, "precision": args.precision,
        "fit": args.fit, "layers": args.layers, "what": args.what.split(","), "workers": args.workers,
        "runtime": args.runtime, "decode": args.decode,
    }  # fmt: skip
    return Job(
        as_location(args.input), args.model, as_location(args.out), args.weights, embedder, args.shard_rows,
        args.dtype, args.max_errors,
    ).absolute()  # fmt: skip


def tell(args: Args, progress: Any, seconds: float, choice: Any = None) -> None:
    """Print what was done, what could not be read, and what `auto` chose."""
    new, bad = progress.count - progress.before, progress.errors
    figures = {"count": progress.count, "new": new, "errors": bad, "images_per_s": round(new / max(seconds, 1e-6), 2)}
    if args.json:
        print(json.dumps(figures | ({"auto": choice.summary()} if choice else {})))
        return
    rate = figures["images_per_s"]
    print(f"{progress.count} images in {args.out} ({new} new, {bad} unreadable), {rate} images/s")
    if choice:
        print(f"  by {choice.runtime} {choice.precision}: {choice.why}")
    for path, error in progress.examples:
        print(f"  {error if error.startswith(path) else f'{path}: {error}'}")
    if bad:
        more = f"{bad - len(progress.examples)} more; all" if bad > len(progress.examples) else "All"
        print(f"  {more} in {args.out / 'errors.csv'}.")


class Interrupted(KeyboardInterrupt):
    """The command was asked to stop; what was computed is on the disk.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int, out: Path) -> None:
        self.number = number
        super().__init__(f"Stopped. What was computed is in {out}; the same command goes on from there.")


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Take SIGTERM, which batch systems send before they kill, like Ctrl-C."""

    def stop(number: int, frame: Any) -> None:
        raise Interrupted(number, Path())

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def make_embedder(model: str, weights: str | None, *, size: str | None = None, **settings: Any) -> Any:
    """Load a model as the command line names it and make its Embedder."""
    from opendino.embed.job import make_embedder
    from opendino.images.preprocess import parse_size

    return make_embedder(model, weights, size=parse_size(size), **settings)


def images_progress() -> Progress:
    """Make the progress line of commands that go through images, on standard error."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(), TextColumn("unreadable {task.fields[errors]}"), console=Console(stderr=True),
    )  # fmt: skip


def show(bar: Progress, task: Any, rows: int, errors: int, total: int, rate: float) -> None:
    """Bring a progress line up to date; `rate` in images/s."""
    bar.update(task, completed=rows, total=total, errors=errors, rate=f"{rate:.1f} images/s")
