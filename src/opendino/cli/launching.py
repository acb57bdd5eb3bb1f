# SPDX-License-Identifier: Apache-2.0
"""Options of a run that are no settings of it: how many processes compute it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from opendino.distributed.launch import launch_local
from opendino.distributed.process import place_of
from opendino.errors import ConfigError


def start_processes(command: str, argv: Sequence[str], nproc: int) -> int | None:
    """Run `opendino COMMAND ARGV` in `nproc` local processes and give the exit code; None when it is to run right here.

    Under torchrun, SLURM or a launch of our own the processes are there already, and the environment says how many.

    Raises:
        ConfigError: for a number of processes below one.
    """
    if nproc < 1:
        raise ConfigError(f"--nproc is {nproc}; give the number of processes, 1 or more.")
    if nproc == 1 or place_of(os.environ).address is not None:
        return None
    sys.stderr.flush()
    return launch_local("opendino.cli", [command, *argv], nproc)
