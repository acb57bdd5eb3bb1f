# SPDX-License-Identifier: Apache-2.0
"""`opendino resume`: continue an interrupted pre-training run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from opendino.cli.pretrain import run
from opendino.errors import ConfigError
from opendino.pretrain.config import parse_config


@dataclass(frozen=True)
class Args:
    """Arguments of `opendino resume`."""

    run: tyro.conf.Positional[Path]
    """Folder that `opendino pretrain --out` made."""


def main(argv: list[str]) -> int:
    """Continue at the newest whole checkpoint; the result equals that of an uninterrupted run."""
    description = "Continue an interrupted run.\n\nExample:\n  opendino resume runs/first"
    args = tyro.cli(Args, args=argv, prog="opendino resume", description=description)
    path = args.run / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{args.run} has no config.yaml, so it is no run folder. Give the folder of --out.")
    run(parse_config(path.read_text(), str(path)))
    return 0
