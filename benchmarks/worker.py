# SPDX-License-Identifier: Apache-2.0
"""One peer of `run.py` in its own process.

Reads its spec from the command line. Writes one line of JSON when it is ready and one for each line it reads: the
sample. Ends when its input ends. Everything else that is printed goes to stderr.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
from importlib import metadata
from typing import IO, Any

from harness import Spec


class EndOfInput(Exception):  # noqa: N818 (no error)
    """The parent wants no further sample."""


class Turns:
    """The worker's end of the pipe; a peer's own loop calls `done` at the end of each step and blocks there.

    Attributes:
        started: clock at the begin of this turn, s.
    """

    def __init__(self, source: IO[str], sink: IO[str], about: dict[str, Any]) -> None:
        self.source, self.sink, self.about = source, sink, about
        self.started, self._cpu, self._first = 0.0, 0.0, True

    def done(self, images: int = 0, **clocks: float) -> None:
        """Answer, then wait for the next turn. The first call says that the peer is ready.

        Args:
            images: how many were computed in this turn.
            clocks: `seconds`, and other clocks that started with the turn, s.

        Raises:
            EndOfInput: when there is no next turn.
        """
        if self._first:
            answer: dict[str, Any] = self.about
        else:
            answer = {"images": images, **clocks, "cpu": time.process_time() - self._cpu, "rss_mib": peak_rss_mib()}
        self._first = False
        self.sink.write(json.dumps(answer) + "\n")
        self.sink.flush()
        if not self.source.readline():
            raise EndOfInput
        self._cpu, self.started = time.process_time(), time.perf_counter()


def peak_rss_mib() -> float:
    """Give the largest resident memory so far, MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def versions(peer: str) -> dict[str, str]:
    """Give the versions of torch and of the peer's package."""
    return {name: metadata.version(name) for name in ("torch", peer)}


def run(spec: Spec, source: IO[str], sink: IO[str]) -> None:
    """Serve turns until the input ends; say so when the peer is not installed."""
    import torch

    torch.set_num_threads(spec.threads)
    torch.manual_seed(0)
    turns = Turns(source, sink, {})
    try:
        if spec.task == "forward":
            import forward

            forward.serve(spec, turns)
        elif spec.task == "inference":
            import inference_peers

            inference_peers.serve(spec, turns)
        elif spec.task == "step":
            import step

            step.serve(spec, turns)
        elif spec.task in ("folder", "folder-files"):
            import folder

            folder.serve(spec, turns)
        elif spec.task in ("augment", "photographs"):
            import augment

            augment.serve(spec, turns)
        else:
            import prepare

            prepare.serve(spec, turns)
    except ImportError as error:
        if (error.name or "").split(".")[0].replace("_", "-") not in (spec.peer, spec.peer.split("-")[0]):
            raise
        sink.write(json.dumps({"missing": f"not installed ({error})"}) + "\n")


def main() -> None:
    sink = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a peer prints must not get between the answers
    with contextlib.suppress(EndOfInput):
        run(Spec.loads(sys.argv[1]), sys.stdin, sink)
    sink.flush()
    sys.stderr.flush()
    os._exit(0)  # a peer's own end of training would write checkpoints


if __name__ == "__main__":
    main()
