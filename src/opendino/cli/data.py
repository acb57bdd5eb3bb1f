# SPDX-License-Identifier: Apache-2.0
"""`opendino data check`: which data set lies at a path, and whether it can be used as it is."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from opendino.errors import ConfigError

EXAMPLE = """Say which data set lies at a path, and whether it can be used as it is.

Example:
  opendino data check photos/ --deep

Named sets are known by their files (ImageNet, ADE20k, NYU-Depth v2, revisited Oxford, …; docs/datasets.md lists them),
others are read as class folders, images with masks, or images with depth. Each split is opened, and 64 of its images
are read, with --deep all of them. Exit code 0: fine, 1: something should be mended first."""

USAGE = "usage: opendino data check PATH [--deep] [--json]\n\nopendino data check --help tells more, with an example."
LABELS = {
    "images": "images", "classes": "classes", "gallery": "in the gallery", "instances": "instances",
    "distractors": "queries of nothing in it",
}  # fmt: skip


@dataclass(frozen=True)
class Args:
    """Arguments of `opendino data check`."""

    path: tyro.conf.Positional[Path]
    """Folder that a data set was unpacked into."""
    deep: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Read every image, mask and depth map, not a sample."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print what was found as one JSON object."""


def main(argv: list[str]) -> int:
    """Check PATH and print what was found."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] != "check":
        raise ConfigError(f"{argv[0]!r} is nothing that `opendino data` does; there is check.")
    args = tyro.cli(Args, args=argv[1:], prog="opendino data check", description=EXAMPLE)
    from opendino.evaluate.datasets.check import check

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console,
        transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    with bar:
        task = bar.add_task("read", total=None)
        found = check(
            args.path, deep=args.deep,
            on_image=lambda split, done, total: bar.update(task, description=split, completed=done, total=total),
        )  # fmt: skip
    problems = sum(len(f["problems"]) for f in found)
    if args.json:
        print(json.dumps({"path": str(args.path), "found": found}))
    else:
        for one in found:
            print_set(one)
        print("Something should be mended first: see above." if problems else "Nothing stands against using it.")
    return 1 if problems else 0


def print_set(found: dict[str, Any]) -> None:
    """Print what is known of one set, for people."""
    print(f"{found['name']} ({found['kind']}) in {found['root']}")
    for split, facts in found["splits"].items():
        print(f"  {split:12}{'; '.join(_words(facts))}")
    for title, lines in (("mend", found["problems"]), ("note", found["notes"])):
        for line in lines:
            print(f"  {title}: {line}")


def _words(facts: dict[str, Any]) -> list[str]:
    words = [f"{facts[key]} {label}" for key, label in LABELS.items() if key in facts]
    if "smallest" in facts:
        (least, few), (most, many) = facts["smallest"], facts["largest"]
        words.append(f"{few} ({least}) to {many} ({most}) in a class")
    if "classes_seen" in facts:
        words.append(f"{facts['classes_seen']} classes seen, {facts['ignored_percent']} % of pixels ignored")
    if "depth_m" in facts:
        words.append(f"depths {facts['depth_m'][0]:g} to {facts['depth_m'][1]:g} m")
    if "height" in facts:
        (low, high), (narrow, wide) = facts["height"], facts["width"]
        words.append(f"{facts['read']} read: {narrow}–{wide} × {low}–{high} pixels")
    return words
