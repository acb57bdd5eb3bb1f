# SPDX-License-Identifier: Apache-2.0
"""One runtime of `opendino benchmark` in a process of its own, so that its peak memory is its own.

`bench` starts it and speaks with it, a JSON line each. It is told: what to run, then cells (image size and batch), and
turns. It says: ready, what a cell took, the seconds of each call of a turn with the peak memory so far, or an error.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
from collections.abc import Sequence
from time import perf_counter
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from opendino.embed.runtimes.base import Runtime
from opendino.embed.runtimes.calibration import CHECK_IMAGES, example_images, fetched
from opendino.embed.runtimes.machine import forget_peak, peak_memory
from opendino.embed.runtimes.variants import make_runtime
from opendino.images.preprocess import Preprocess
from opendino.models.vit import VisionTransformer
from opendino.models.weights import load


class Measured:
    """A runtime and the batch that it is timed on.

    Args:
        start: model, weights, runtime, precision and device.
    """

    def __init__(self, start: dict[str, Any]) -> None:
        if start["weights"] == "random":
            torch.manual_seed(0)
        self.model: VisionTransformer = load(start["model"], weights=start["weights"], device=start["device"])
        self.runtime: Runtime = make_runtime(self.model, start["runtime"], start["precision"])
        self.images = torch.empty(0)

    def exports(self) -> bool:
        """Export the model where its runtime needs that and it has not been done; say whether it was."""
        exported = getattr(self.runtime, "exported", None)
        if exported is None or exported():
            return False
        self.runtime.vectors(example_images(self.model, self._sides(None), 1), 1, ["cls"])
        return True

    def about(self) -> dict[str, Any]:
        """Say what runs."""
        config, parameters = self.model.config, sum(p.numel() for p in self.model.parameters())
        return {
            "arch": config.arch, "embed_dim": config.embed_dim, "depth": config.depth, "parameters": parameters,
            "threads": torch.get_num_threads(), "device": str(self.runtime.device), "precision": self.runtime.precision,
        }  # fmt: skip

    def cell(self, size: int | Sequence[int] | None, batch: int, path: str) -> dict[str, Any]:
        """Take a batch of photographs, keep the vectors of some in a file, warm up, and count memory from here."""
        sides = self._sides(size)
        images = example_images(self.model, sides, max(batch, CHECK_IMAGES))
        vectors = fetched(self.runtime, images[:CHECK_IMAGES], ("cls", "patches"))
        np.savez(path, cls=vectors["cls"].numpy(), patches=vectors["patches"].numpy())
        self.images = images[:batch].clone()
        del images, vectors
        before = perf_counter()
        self.call()
        seconds = perf_counter() - before
        _give_memory_back()
        if self.runtime.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.runtime.device)
        return {"size": list(sides), "seconds": seconds, "counts_memory": forget_peak()}

    def turn(self, seconds: float) -> dict[str, Any]:
        """Make calls for so long, at least one, and give the seconds of each."""
        times: list[float] = []
        while not times or sum(times) < seconds:
            before = perf_counter()
            self.call()
            times.append(perf_counter() - before)
        cuda = self.runtime.device.type == "cuda"
        memory = torch.cuda.max_memory_allocated(self.runtime.device) if cuda else peak_memory()
        return {"times": times, "peak_memory": memory}

    def call(self) -> dict[str, Tensor]:
        """Run the batch and fetch cls and mean vectors."""
        return fetched(self.runtime, self.images, ("cls", "mean"))

    def _sides(self, size: int | Sequence[int] | None) -> tuple[int, int]:
        wanted = cast("tuple[int, int]", tuple(size)) if isinstance(size, Sequence) else size
        shape = Preprocess(self.model.preprocess, size=wanted, patch_size=self.model.config.patch_size)
        return shape.height, shape.width


def _give_memory_back() -> None:
    """Return what the warm-up no longer needs to the system, where the C library can."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):
        return


def reason(error: BaseException) -> str:
    """Give the first line of an error."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def main() -> int:
    """Do what the lines say until they end."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever prints goes where messages go

    def say(**message: Any) -> None:
        out.write(json.dumps(message) + "\n")

    try:
        measured = Measured(json.loads(sys.stdin.readline()))
        exported = measured.exports()
        say(ready=measured.about(), exported=exported)
    except Exception as error:  # whatever a runtime raises is its row's reason
        say(error=reason(error))
        return 0
    if exported:  # exporting takes memory that running does not: a fresh process runs
        return 0
    for line in sys.stdin:
        message = json.loads(line)
        try:
            say(**(measured.cell(**message["cell"]) if "cell" in message else measured.turn(message["turn"])))
        except Exception as error:
            say(error=reason(error))
    return 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # runtimes' own threads may keep the interpreter's end waiting
