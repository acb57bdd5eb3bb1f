# SPDX-License-Identifier: Apache-2.0
"""`opendino resume`: continue an interrupted pre-training run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from opendino.cli.launching import start_processes
from opendino.cli.pretrain import run
from opendino.errors import ConfigError
from opendino.pretrain.config import parse_config


@dataclass(frozen=True)
class Args:
    """Arguments of `opendino resume`."""

    run: tyro.conf.Positional[Path]
    """Folder that `opendino pretrain --out` made."""
    nproc: int = 1
    """local processes to continue with; need not be as many as before"""
    data: str | None = None
    """where the images are now, if they were moved"""
    data_may_change: bool = False
    """go on although the list of images has changed"""
    device: str | None = None
    """another device than before"""
    num_workers: int | None = None
    """another number of loader processes than before"""


def main(argv: list[str]) -> int:
    """Continue at the newest whole checkpoint; the result equals that of an uninterrupted run."""
    description = (
        "Continue an interrupted run.\n\nExample:\n  opendino resume runs/first\n  opendino resume runs/first --nproc 4"
    )
    args = tyro.cli(Args, args=argv, prog="opendino resume", description=description)
    path = args.run / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{args.run} has no config.yaml, so it is no run folder. Give the folder of --out.")
    code = start_processes("resume", argv, args.nproc)
    if code is None:
        moved = {"data": args.data, "device": args.device, "num_workers": args.num_workers, "out": str(args.run)}
        changes: dict[str, object] = {name: value for name, value in moved.items() if value is not None}
        if args.data_may_change:
            changes["data_may_change"] = True
        run(parse_config(path.read_text(), str(path)).model_copy(update=changes))
    return code or 0
