# SPDX-License-Identifier: Apache-2.0
"""An extraction in plain words, so that other processes can be told what to do."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from opendino.images import locations


@dataclass(frozen=True)
class Job:
    """What is to be computed, and where it goes.

    Attributes:
        input: what `open_source` takes.
        model: what `opendino.load` takes.
        out: folder or URL for the shards.
        weights: weight file for a model given by name; "random" draws them from seed 0.
        embedder: further arguments of `Embedder`, JSON-able.
        shard_rows: rows in a shard.
        dtype: of the vectors on the disk.
        max_errors: how many unreadable images are accepted; None: any number.
    """

    input: str
    model: str
    out: str
    weights: str | None = None
    embedder: dict[str, Any] = field(default_factory=dict)
    shard_rows: int = 4096
    dtype: str = "float32"
    max_errors: int | None = None

    def json(self) -> str:
        """Give it as one line."""
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, text: str) -> Job:
        """Read what `json` gave."""
        return cls(**json.loads(text))

    def absolute(self) -> Job:
        """Give the same job with paths that hold in every folder of this machine."""
        model = str(Path(self.model).resolve()) if Path(self.model).exists() else self.model
        weights = str(Path(self.weights).resolve()) if self.weights and Path(self.weights).exists() else self.weights
        places = {"input": locations.absolute(self.input), "out": locations.absolute(self.out)}
        return Job(**(asdict(self) | places | {"model": model, "weights": weights}))

    def make_embedder(self, **more: Any) -> Any:
        """Load the model and make its Embedder; `more` goes before the job's own arguments."""
        return make_embedder(self.model, self.weights, **(self.embedder | more))


def make_embedder(model: str, weights: str | None, **settings: Any) -> Any:
    """Load a model as the command line names it and make its Embedder."""
    import torch

    from opendino.embed.embedder import Embedder

    if weights == "random":
        torch.manual_seed(0)  # so that a second call, or one that goes on, has the same model
    return Embedder(model, weights=weights, **settings)
