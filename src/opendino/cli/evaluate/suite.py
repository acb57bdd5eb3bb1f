# SPDX-License-Identifier: Apache-2.0
"""`opendino eval suite`: every protocol that the given data allows, in one table beside the published figures."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from opendino.cli.evaluate.common import BackboneArgs
from opendino.cli.evaluate.suite_cells import TASKS, Cell, file_lines, find_cells
from opendino.errors import DataError, OpendinoError
from opendino.evaluate.published import COLUMNS
from opendino.report.suite import TableColumn

EXAMPLE = """Run every protocol that the given data allow and write one table in the order of the model card's.

Example:
  opendino eval suite --model run --data data/ --out suite

Each folder given with --data, and each folder below it, is looked at as `opendino data check` does: class folders get
k-NN, logistic regression and the linear grid; images with masks, segmentation; images with depth, a depth head (sets
without a training split are scored with the head of another: transfer); retrieval.json, retrieval. OUT gets table.md,
table.json and index.html, and a file per figure, so that a stopped suite goes on where it was."""


@dataclass(frozen=True, kw_only=True)
class SuiteArgs(BackboneArgs):
    """Arguments of `opendino eval suite`."""

    data: tuple[Path, ...]
    """Data sets, or folders that hold some."""
    out: Path
    """Folder of the table, the page and the single figures."""
    tasks: tuple[str, ...] = ()
    """Only these: knn, linear, logreg, other_test, depth, transfer, segmentation, fine_grained, retrieval."""
    steps: int | None = None
    """Optimiser steps of the linear, segmentation and depth heads; default: each protocol's own."""
    multi_scale: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Segmentation with four blocks, multi-scale and flip, as the card's column has it; many times slower."""
    depth_head: Literal["lin1", "lin4", "dpt"] = "lin4"
    """Depth head; the card's column has lin4, which needs four blocks."""
    redo: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Measure again what OUT already has."""


def main(argv: list[str]) -> int:
    """Run the suite and print the table."""
    args = tyro.cli(SuiteArgs, args=argv, prog="opendino eval suite", description=EXAMPLE)
    console = Console(stderr=True)
    cells, passed_over = find_cells(args)
    for line in passed_over:
        console.print(line, highlight=False, markup=False)
    if not cells:
        raise DataError(
            f"Nothing in {', '.join(map(str, args.data))} fits a protocol. Give class folders train/ and val/, images/ "
            "with masks/ or depth/, or a folder with retrieval.json; `opendino data check` says what it finds."
        )
    results = run_cells(args, cells, console)
    report = write_table(args, cells, results)
    print(json.dumps(report) if args.json else plain_table(report), end="\n" if args.json else "")
    console.print(
        f"{args.out / 'table.md'} has it as the card does, {args.out / 'index.html'} with pictures.", highlight=False
    )
    return 1 if any("error" in r for r in results) else 0


def run_cells(args: SuiteArgs, cells: Sequence[Cell], console: Console) -> list[dict[str, Any]]:
    """Measure every cell that OUT does not have yet; one that fails is told and does not stop the others.

    Returns:
        For each cell {"task", "data", "seconds", "result"}, or "error" instead of the result.
    """
    from opendino.cli.evaluate.common import pooled_embedder
    from opendino.embed.resume import describe

    folder = args.out / "results"
    folder.mkdir(parents=True, exist_ok=True)
    model = describe(pooled_embedder(args), "", "")
    results = []
    for number, cell in enumerate(cells, 1):
        console.print(f"[{number}/{len(cells)}] {cell.task} on {cell.place.name}", highlight=False, markup=False)
        key = cell_key(cell, model)
        path = folder / f"{cell.name}.json"
        known = read_result(path, key)
        if known is not None and not args.redo:
            console.print("  measured before; --redo measures again", highlight=False)
        else:
            known = measure(cell, key)
            if "error" in known:
                console.print(f"  {known['error']}", style="red", highlight=False, markup=False)
            else:
                write_text(path, json.dumps(known, indent=1))
        results.append(known | {"weights_sha256": model["weights_sha256"]})
    return results


def measure(cell: Cell, key: str) -> dict[str, Any]:
    """Run one cell."""
    start = time.perf_counter()
    found: dict[str, Any] = {"key": key, "task": cell.task, "data": cell.place.name, "root": str(cell.place.root)}
    try:
        found["result"] = cell.measure()
    except OpendinoError as error:
        found["error"] = str(error)
    return found | {"seconds": round(time.perf_counter() - start, 2)}


def cell_key(cell: Cell, model: dict[str, Any]) -> str:
    """Give a hash of all that a result depends on: weights, preprocessing, settings, and names, sizes and times of the
    set's files."""
    place = cell.place
    what = [cell.task, cell.settings, model, str(place.root.resolve()), place.learn, place.score]
    digest = hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode())
    for root in (place.root, cell.learned_from):
        for line in file_lines(root) if root is not None else ():
            digest.update(line.encode())
    return digest.hexdigest()


def read_result(path: Path, key: str) -> dict[str, Any] | None:
    """Give a result that was measured before under the same key."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if found.get("key") == key else None


def write_table(args: SuiteArgs, cells: Sequence[Cell], results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Write table.md, table.json and index.html, and give what table.json holds."""
    from opendino.report.suite import markdown_table, write_suite_page

    own = Path(args.model).name or args.model
    columns = tabulate(own, cells, results)
    rows = [own, *COLUMNS[0].scores]
    failed = {f"{r['task']} on {r['data']}": r["error"] for r in results if "error" in r}
    report = {
        "model": args.model,
        "weights_sha256": results[0]["weights_sha256"],
        "columns": [asdict(column) for column in columns],
        "failed": failed,
        "results": [{k: v for k, v in r.items() if k not in ("key", "weights_sha256")} for r in results],
    }
    write_text(args.out / "table.md", markdown_table(rows, columns))
    write_text(args.out / "table.json", json.dumps(report, indent=1))
    notes = [
        "Columns are in the order of the published model card. Its own figures stand in columns of their own sets; "
        "they compare with a figure on another set in nothing but the protocol.",
        *(f"Failed: {what}: {why}" for what, why in failed.items()),
    ]
    write_suite_page(args.out / "index.html", f"{own}: evaluation", rows, columns, notes)
    return report


def tabulate(model: str, cells: Sequence[Cell], results: Sequence[dict[str, Any]]) -> list[TableColumn]:
    """Give the columns: for each task of the card the sets that were measured, then the card's own set."""
    columns: list[TableColumn] = []
    for task in TASKS:
        published = {c.data: c for c in COLUMNS if c.task == task}
        for cell, found in zip(cells, results, strict=True):
            if cell.task != task or "error" in found:
                continue
            for figure in cell.figures:
                value = figure.get(found["result"])
                if value is None:
                    continue
                card = published.pop(cell.place.name, None)
                scores = {model: value} | (card.scores if card else {})
                columns.append(
                    TableColumn(figure.title, cell.place.name, figure.unit, figure.lower_is_better, scores, cell.note)
                )
        columns += [
            TableColumn(c.title, c.data, c.unit, c.lower_is_better, c.scores, "published") for c in published.values()
        ]
    return columns


def plain_table(report: dict[str, Any]) -> str:
    """Give the table turned, a line for each column, as it fits a terminal."""
    names = list(dict.fromkeys(name for column in report["columns"] for name in column["scores"]))
    own = Path(report["model"]).name or report["model"]
    rows = [["", "", "", own, *(name for name in names if name != own)]]
    for column in report["columns"]:
        digits = 3 if column["lower_is_better"] else 1
        scores = [f"{column['scores'][n]:.{digits}f}" if n in column["scores"] else "–" for n in rows[0][3:]]
        unit = f"{column['unit']} ↓" if column["lower_is_better"] else column["unit"]
        rows.append([column["title"], column["data"], unit, *scores])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write a file aside and put it in place."""
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
