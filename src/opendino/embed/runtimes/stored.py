# SPDX-License-Identifier: Apache-2.0
"""A model that stays in its file: read for a moment when it is needed, and not kept."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from opendino.embed.runtimes.prepared import packs
from opendino.errors import WeightsError
from opendino.models.fingerprint import weights_fingerprint
from opendino.models.vit import VisionTransformer


@dataclass
class StoredModel:
    """Reads a model from its file as often as it is asked for.

    Args:
        model: whatever `opendino.load` takes.
        weights: see there; not "random", which would be another model each time.
    """

    model: str | Path
    weights: str | Path | None = None
    _stamp: tuple[str, int, int] | None = field(default=None, init=False)
    _sha256: str | None = field(default=None, init=False)

    def read(self, dtype: Literal["auto"] | None) -> VisionTransformer:
        """Read the model into CPU memory.

        Args:
            dtype: see `opendino.load`.

        Raises:
            WeightsError: when the file is another one than at the first reading.
        """
        from opendino.models.weights import load

        found = load(self.model, weights=self.weights, dtype=dtype)
        origin = found.load_report.origin
        status = os.stat(origin)
        stamp = (origin, status.st_size, status.st_mtime_ns)
        if self._stamp not in (None, stamp):
            raise WeightsError(
                f"{origin} has changed since the Embedder was made from it, and the Embedder now needs the model once "
                "more. Make the Embedder again."
            )
        self._stamp = stamp
        return found

    def weights_sha256(self) -> str:
        """Give the fingerprint of the model in fp32, as `opendino.load` gives it."""
        if self._sha256 is None:
            model = self.read("auto")
            self._sha256 = weights_fingerprint(model, dtype=torch.float32, consume=model.load_report.mapped)
        return self._sha256


def stays_stored(model: object, weights: object, device: torch.device | None, precision: str) -> bool:
    """Say whether an Embedder of these need not keep the model beside its copy prepared in bf16."""
    on_cpu = device == torch.device("cpu") if device is not None else not torch.cuda.is_available()
    named = isinstance(model, str | Path) and weights != "random"
    return named and on_cpu and precision == "bf16" and packs(torch.bfloat16)
