# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: written aside, renamed, the last few kept, the newest whole one found again."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from opendino.errors import ConfigError

log = logging.getLogger("opendino")
STATE = "state.pt"


def save_checkpoint(run: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write RUN/checkpoints/step_<step>/state.pt and drop all but the newest `keep` checkpoints.

    The folder appears under its name only when it is whole, so a kill at any moment leaves the previous one usable.
    """
    folder = run / "checkpoints"
    final, aside = folder / f"step_{step:08d}", folder / f".writing_{step:08d}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    with (aside / STATE).open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return final


def checkpoints(run: Path) -> list[Path]:
    """List the finished checkpoint folders of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step_*"))


def load_checkpoint(run: Path) -> dict[str, Any] | None:
    """Read the newest whole checkpoint, or None when the run has none yet.

    Raises:
        ConfigError: when there are checkpoints and none can be read; a run is never restarted from zero silently.
    """
    found = checkpoints(run)
    for folder in reversed(found):
        try:
            state: dict[str, Any] = torch.load(folder / STATE, map_location="cpu", weights_only=True)
            return state
        except Exception as error:
            log.warning("Checkpoint %s cannot be read (%s); trying the one before.", folder, error)
    if found:
        raise ConfigError(
            f"None of the {len(found)} checkpoints in {run / 'checkpoints'} can be read. Remove the folder to start "
            "afresh, or restore one of them."
        )
    return None
