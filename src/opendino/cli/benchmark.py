# SPDX-License-Identifier: Apache-2.0
"""`opendino benchmark`: how fast, how large and how exact each way to run a model is on this machine."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from opendino.errors import ConfigError, DataError, WeightsError

if TYPE_CHECKING:
    from opendino.embed.runtimes.bench import Bench
    from opendino.embed.runtimes.bench_process import Plan

EXAMPLE = """Measure models on this machine: images/s, latency, memory, closeness to fp32 of each runtime and precision.

Example:
  opendino benchmark run --batch 1 8 --size 224 518 --out benchmark.json
  opendino benchmark vits14 vitb14 --random --runtime torch openvino --precision bf16

Each runtime has a process of its own and they take turns, A B C A B C, so what disturbs the machine disturbs all alike;
images/s is the median of the turns. Only the forward pass is timed, on photographs that lie ready in memory. torch fp32
is always measured: the others are compared with it. Ctrl-C keeps what is measured."""
DEFAULT_MODEL = "vits14"


@dataclass(frozen=True)
class Args:
    """Arguments of `opendino benchmark`."""

    models: tyro.conf.Positional[tuple[str, ...]] = ()
    """Model names, weight files, transformers folders or run folders; default: vits14."""
    runtime: tuple[str, ...] = ()
    """torch, torch-prepared, torch-compiled, onnx, openvino; default: all that serve here (compiled: on CUDA only)."""
    precision: tuple[str, ...] = ()
    """fp32, bf16, fp16; default: those that serve here."""
    batch: tuple[int, ...] = (1, 8)
    """Images in a call."""
    size: tuple[str, ...] = ()
    """Image sides in pixels, or HxW; default: the size that travels with the model."""
    seconds: float = 5.0
    """Of timing for each row."""
    rounds: int = 5
    """Turns that the seconds are spread over; a turn is at least one call."""
    random: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Random weights from seed 0 for models given by name: speed and memory are the same, closeness is not."""
    weights: str | None = None
    """Weight file for a single model given by name."""
    device: str | None = None
    """cpu, cuda, …; default: cuda if there is one."""
    threads: int | None = None
    """Of each process; default: as the environment says, else one a core."""
    out: Path | None = None
    """JSON file for the result; written anew after each size and batch."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the result as one JSON object."""


def main(argv: list[str]) -> int:
    """Measure and print; 1 when no row has figures, 130 after a Ctrl-C."""
    args = tyro.cli(Args, args=argv, prog="opendino benchmark", description=EXAMPLE)
    plans, notes = plans_of(args)
    from opendino.embed.runtimes.bench import Bench

    benches, stopped = [], False
    with progress() as bar:

        def on_step(text: str) -> None:
            bar.update(task, advance=1, description=text)

        benches = [Bench(plan, on_step) for plan in plans]
        task = bar.add_task("starting", total=sum(b.steps for b in benches))
        try:
            for bench in benches:
                bench.run(lambda: save(args.out, result(args, benches, notes, stopped=True)))
        except KeyboardInterrupt:
            stopped = True
    found = result(args, benches, notes, stopped)
    save(args.out, found)
    if args.json:
        print(json.dumps(found))
    else:
        show(found)
    if stopped:
        print("Stopped. What was measured is above.", file=sys.stderr)
        return 130
    return 0 if any(row["images_per_s"] for row in found["rows"]) else 1


def plans_of(args: Args) -> tuple[list[Plan], list[str]]:
    """Check the arguments and give what is to be measured of each model, and what the reader must know.

    Raises:
        ConfigError: for a setting out of range.
        WeightsError: when a model's weights are not at hand and cannot be fetched.
    """
    import torch

    from opendino.embed.runtimes.bench import pairs_of
    from opendino.embed.runtimes.bench_process import Plan
    from opendino.images.preprocess import parse_size

    for name, least in (("seconds", 0.01), ("rounds", 1), ("threads", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name} is {value}; give at least {least}.")
    if not args.batch or min(args.batch) < 1:
        raise ConfigError(f"--batch is {args.batch}; give one or more numbers of images, at least 1.")
    if args.weights and (len(args.models) != 1 or args.random):
        raise ConfigError("--weights is for one model given by name, and not with --random.")
    if args.out is not None and not args.out.resolve().parent.is_dir():
        raise DataError(f"--out is {args.out}, and the folder {args.out.resolve().parent} does not exist. Make it.")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    sizes = tuple(parse_size(s) for s in args.size) or (None,)
    pairs = pairs_of(args.runtime, args.precision, device)
    plans, notes = [], []
    for model in args.models or (DEFAULT_MODEL,):
        weights, note = weights_of(args, model)
        notes += [note] if note else []
        plans.append(
            Plan(model, weights, pairs, sizes, args.batch, args.seconds, args.rounds, device, args.threads)
        )  # fmt: skip
    return plans, notes


def weights_of(args: Args, model: str) -> tuple[str | None, str]:
    """Find the weights before processes look for them, all at once; give them, and what the reader must know.

    Raises:
        WeightsError: when they cannot be had.
    """
    from opendino.export.session import is_exported
    from opendino.models.files import fetch_published, find_published
    from opendino.models.registry import MODELS

    if is_exported(model):
        raise ConfigError(
            f"{model} is an exported file. Give the weights that it was made from: --runtime onnx and openvino export "
            "them to a cache and measure the file."
        )
    entry = MODELS.get(model.removeprefix("dinov2_"))
    note = f"{model} has random weights: speed and memory are those of the architecture; the distances to fp32 are not "
    note += "those of trained weights."
    if args.random and entry is None:
        raise ConfigError(f"--random is for models given by name, and {model} is none. Leave it out.")
    if entry is None or args.weights or (entry.packaged and not args.random):
        return args.weights, ""
    if args.random or (not args.models and find_published(entry) is None):
        return "random", note
    if not entry.published:
        raise WeightsError(f"No weights of {model} are published. Give --random to measure its shape, or a file.")
    try:
        fetch_published(entry)
    except WeightsError as error:
        raise WeightsError(f"{error} Or give --random to measure the architecture with random weights.") from error
    return None, ""


def result(args: Args, benches: list[Bench], notes: list[str], stopped: bool) -> dict[str, Any]:
    """Give all that is known, JSON-able."""
    import torch

    from opendino._version import __version__
    from opendino.embed.runtimes import machine

    notes = list(notes)
    for bench in benches:
        if not bench.in_turn:
            notes.append(
                f"The processes of {bench.plan.model} do not fit into memory together and ran one after the other: "
                "differences between them may be the machine's."
            )
    device = torch.device(benches[0].plan.device)
    return {
        "opendino": __version__, "torch": torch.__version__,
        "machine": {
            "name": machine.device_name(device), "device": device.type, "cores": machine.usable_cores(),
            "features": machine.cpu_features(), "memory_bytes": machine.memory()["total"],
        },
        "settings": {"seconds": args.seconds, "rounds": args.rounds, "threads": args.threads},
        "models": [{"model": b.plan.model, "weights": b.plan.weights, **b.about} for b in benches],
        "notes": notes, "stopped": stopped, "rows": [row.figures() for b in benches for row in b.rows],
    }  # fmt: skip


def save(path: Path | None, found: dict[str, Any]) -> None:
    """Write the result aside and rename it."""
    if path is None:
        return
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, path)


def progress() -> Any:
    """Make the progress line, on standard error."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), console=Console(stderr=True), transient=True,
    )  # fmt: skip


def show(found: dict[str, Any]) -> None:
    """Print tables for people, one for each model, size and batch."""
    from rich.console import Console

    console, at = Console(), found["machine"]
    console.print(f"{at['name']}, {at['cores']} cores, torch {found['torch']}", highlight=False, markup=False)
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for row in found["rows"]:
        size = row["size"]
        sides = "?" if size is None else str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"
        groups.setdefault((row["model"], sides, row["batch"]), []).append(row)
    for (model, sides, batch), rows in groups.items():
        console.print(f"\n{model}, {sides} px, batch {batch}", style="bold", highlight=False, markup=False)
        console.print(_table([row for row in rows if row["images_per_s"]]), highlight=False, markup=False)
        for row in rows:
            if not row["images_per_s"]:
                why = row["problem"] or "stopped before its first turn"
                console.print(f"  {row['runtime']} {row['precision']}: {why}", highlight=False, markup=False)
    console.print(
        "\n×: over torch fp32, median of the rounds. p99 of fewer than 100 calls is near the slowest one. MiB: peak of "
        "the process, or on CUDA of the card. cls, patches: 1 − cosine to torch fp32, worst and mean. auto: what the "
        "runtime auto would take.",
        highlight=False, markup=False, style="dim",
    )  # fmt: skip
    for note in found["notes"]:
        console.print(note, highlight=False, markup=False, style="yellow")


def _table(rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table("runtime", box=None)
    table.columns[0].min_width = len("torch-compiled bf16")
    for name in ("images/s", "×", "p50 ms", "p99 ms", "MiB", "cls", "patches"):
        table.add_column(name, justify="right", no_wrap=True, min_width=7 if "ms" in name else 5)
    table.add_column("")
    for row in rows:
        table.add_row(
            f"{row['runtime']} {row['precision']}", _cell(row["images_per_s"], ".2f"), _cell(row["speedup"], ".2f"),
            _cell(row["latency_p50_ms"], ".1f"), _cell(row["latency_p99_ms"], ".1f"),
            _cell(row["peak_memory_bytes"], ".0f", 1 / 2**20), _cell(row["cls_distance"], ".0e"),
            _cell(row["patch_distance"], ".0e"), "auto" if row["auto"] else "",
        )  # fmt: skip
    return table


def _cell(value: float | None, form: str, factor: float = 1.0) -> str:
    return "–" if value is None else format(value * factor, form)
