# SPDX-License-Identifier: Apache-2.0
"""`opendino report`: judge a pre-training run and write its page."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from opendino.errors import ConfigError
from opendino.pretrain.config import PretrainConfig, parse_config
from opendino.pretrain.history import read_metrics
from opendino.pretrain.stages import stage_rows
from opendino.pretrain.verdict import Finding, verdict

EXAMPLE = """Judge a pre-training run in plain words and write RUN/report.html. Works while the run goes on.

Example:
  opendino report runs/first
  opendino report runs/first --json"""
COLOURS = {"ok": "green", "watch": "yellow", "bad": "red"}


@dataclass(frozen=True)
class Args:
    """Arguments of `opendino report`."""

    run: tyro.conf.Positional[Path]
    """Folder that `opendino pretrain --out` made."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object instead of text"""


def main(argv: list[str]) -> int:
    """Write the page and print the verdict."""
    args = tyro.cli(Args, args=argv, prog="opendino report", description=EXAMPLE)
    path, findings = report_run(args.run)
    if args.json:
        print(json.dumps({"report": str(path), "findings": [f.as_dict() for f in findings]}))
        return 0
    show(findings)
    print(path)
    return 0


def judge_run(run: Path) -> list[Finding]:
    """Give the verdict on a run folder."""
    return verdict(read_metrics(run), read_config(run))


def read_config(run: Path) -> PretrainConfig:
    """Read RUN/config.yaml."""
    path = run / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run} has no config.yaml, so it is no run folder. Give the folder of --out.")
    return parse_config(path.read_text(), str(path))


def report_run(run: Path) -> tuple[Path, list[Finding]]:
    """Write RUN/report.html; give its path and the verdict in it."""
    from opendino.report.training import write_training_report

    findings = judge_run(run)
    stages = stage_rows(read_config(run))
    return write_training_report(run, [f.as_dict() for f in findings], stages), findings


def show(findings: list[Finding], stderr: bool = False) -> None:
    """Print a verdict, one paragraph a finding."""
    from rich.console import Console

    console = Console(stderr=stderr)
    for finding in findings:
        console.print(f"[{COLOURS[finding.level]}]{finding.level}[/]  ", end="")
        console.print(finding.text, highlight=False, markup=False)
