# SPDX-License-Identifier: Apache-2.0
"""`opendino embed --verify`: whether a folder of features is what it should be."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from opendino.errors import OpendinoError

EXAMPLE = """Check a folder of features that `opendino embed` has written.

Example:
  opendino embed --verify features/ --sample 64

Every image has exactly one row; every shard has the bytes that were written; dtype and width are those of the manifest;
no row is empty without a reason; a sample of rows is computed again. Exit code 1 when something is wrong."""


@dataclass(frozen=True)
class Args:
    """Arguments of `opendino embed --verify`."""

    verify: Path
    """Folder of features, or its URL."""
    sample: int = 16
    """Rows that are computed again and compared; 0 leaves the model alone."""
    seed: int = 0
    """Of the choice of rows."""
    model: str | None = None
    """Where the model is now; default: where it was."""
    weights: str | None = None
    """Weight file for a model given by name; default: the one that was used."""
    batch: int = 32
    """Images in one forward pass."""
    device: str | None = None
    """cpu, cuda, …; default: cuda if there is one."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the verdict as one JSON object."""


def main(argv: list[str]) -> int:
    """Check a folder, print what is wrong, and give 1 if anything is."""
    args = tyro.cli(Args, args=argv, prog="opendino embed --verify", description=EXAMPLE)
    from opendino.embed.folder import open_folder
    from opendino.embed.verify import Check
    from opendino.images.sources import open_source

    folder = open_folder(args.verify)
    source, problem = None, ""
    check = Check(folder, None, args.sample, args.seed)
    try:
        source = open_source(check.manifest["input"])
    except OpendinoError as error:
        problem = f"The input cannot be opened, so the rows were not compared with its images: {error}"
    check.source = source
    with _bar() as bar:
        task = bar.add_task("check", total=None)
        verdict = check.run(lambda done, total: bar.update(task, completed=done, total=total))
    if problem:
        verdict.trouble(problem)
    elif args.sample and source is not None:
        try:
            _recompute(args, check, source)
        except OpendinoError as error:
            verdict.trouble(f"No row was computed again: {error} Give --model, or --sample 0 to leave this out.")
    _tell(args, verdict)
    return 1 if verdict.troubles else 0


def _recompute(args: Args, check: Any, source: Any) -> None:
    from opendino.embed.job import make_embedder
    from opendino.embed.resume import weights_fingerprint
    from opendino.embed.verify import recompute

    found = check.manifest
    size = tuple(found["size"]) if isinstance(found["size"], list) else found["size"]
    embedder = make_embedder(
        args.model or found["model"], args.weights or found.get("weights"), size=size, batch_size=args.batch,
        device=args.device, precision=found["precision"], fit=found["fit"], layers=found["layers"], what=found["what"],
        decode=found.get("decode", "exact"),
    )  # fmt: skip
    if weights_fingerprint(embedder.model) != found["weights_sha256"]:
        check.verdict.trouble(
            f"The weights of {args.model or found['model']} are not those that made the rows, so no row was computed "
            "again. Give the model with --model, or --sample 0."
        )
        return
    recompute(embedder, source, found, check.samples, check.verdict)


def _tell(args: Args, verdict: Any) -> None:
    if args.json:
        figures = {"ok": not verdict.troubles, "troubles": verdict.troubles, "notes": verdict.notes}
        figures |= {k: getattr(verdict, k) for k in ("rows", "errors", "shards", "sampled")}
        print(json.dumps(figures | {"largest_difference": verdict.largest}))
        return
    print(f"{args.verify}: {verdict.rows} rows in {verdict.shards} shards, {verdict.errors} of unreadable images")
    if verdict.sampled:
        print(f"{verdict.sampled} rows computed again; largest relative difference {verdict.largest:.2g}")
    for note in verdict.notes:
        print(f"note: {note}")
    for trouble in verdict.troubles:
        print(f"trouble: {trouble}")
    print("all is well" if not verdict.troubles else f"{len(verdict.troubles)} troubles")


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=Console(stderr=True), transient=True,
    )  # fmt: skip
