# SPDX-License-Identifier: Apache-2.0
"""What a calibration has measured, and the files in the user's cache that keep it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from opendino.embed.runtimes.machine import cache_folder
from opendino.errors import ConfigError

log = logging.getLogger(__name__)

FORMAT = 1
Pair = tuple[str, str]
"""Runtime and precision."""


class Candidate(BaseModel):
    """One runtime and precision, and what was measured.

    Attributes:
        runtime: one of `variants.RUNTIMES`.
        precision: fp32, bf16 or fp16.
        images_per_s: median of the rounds; None when it did not run.
        speedup: over plain torch, median of the rounds' ratios.
        cls: 1 − cosine to fp32 of the cls token, worst image.
        patches: the same of the patch tokens, mean.
        refused: why it may not be chosen, or None.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    runtime: str
    precision: str
    images_per_s: float | None = None
    speedup: float | None = None
    cls: float | None = None
    patches: float | None = None
    refused: str | None = None


class Calibration(BaseModel):
    """What was measured on one machine for one model, image size and batch.

    Attributes:
        format: of the file.
        key: all that the figures depend on.
        when: it was measured, UTC.
        seconds: that measuring took.
        plain: runtime and precision of plain torch, which the others are compared with.
        chosen: runtime and precision.
        candidates: in the order in which they took turns.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int
    key: dict[str, Any]
    when: str
    seconds: float
    plain: Pair
    chosen: Pair
    candidates: list[Candidate]

    @property
    def best(self) -> Candidate:
        """The chosen candidate."""
        return next(c for c in self.candidates if (c.runtime, c.precision) == self.chosen)


def calibrations_folder() -> Path:
    """Give the folder of the calibrations: OPENDINO_CALIBRATIONS, else one in the user's cache."""
    return cache_folder("calibrations", "OPENDINO_CALIBRATIONS")


def calibration_path(key: dict[str, Any]) -> Path:
    """Give the file of a calibration."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return calibrations_folder() / f"{digest[:24]}.json"


def read_calibration(path: Path, key: dict[str, Any] | None = None) -> Calibration | None:
    """Read a calibration; one that is damaged, or of another format or key, is told and counts as missing."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        log.warning("%s cannot be read and is made again: %s", path, error)
        return None
    try:
        found = Calibration.model_validate_json(text)
        if found.format != FORMAT or (key is not None and found.key != key):
            raise ConfigError("it was made for something else")
        found.best  # noqa: B018 - a choice that is not among the candidates
    except (ValidationError, ConfigError, StopIteration) as error:
        reason = str(error).splitlines()[0] if str(error) else "its choice is not among its candidates"
        log.warning("%s is damaged and is made again: %s", path, reason)
        return None
    return found


def write_calibration(path: Path, found: Calibration) -> None:
    """Write a calibration aside and rename it; a cache that cannot be written to is told and costs nothing else."""
    aside = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", suffix=".part", delete=False) as file:
            aside = file.name
            file.write(found.model_dump_json(indent=1) + "\n")
        os.replace(aside, path)
    except OSError as error:
        log.warning("What was measured cannot be kept in %s, so it is measured again next time: %s", path, error)
        if aside:
            with suppress(OSError):
                os.unlink(aside)


def list_calibrations() -> list[tuple[Path, Calibration]]:
    """Read all calibrations that are kept, the newest first."""
    found = ((path, read_calibration(path)) for path in sorted(calibrations_folder().glob("*.json")))
    return sorted(((p, c) for p, c in found if c), key=lambda pair: pair[1].when, reverse=True)
