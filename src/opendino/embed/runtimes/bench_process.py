# SPDX-License-Identifier: Apache-2.0
"""One process of `opendino benchmark` as its leader sees it: asked a line, it answers one, or it has died."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opendino.embed.runtimes.remembered import Pair


@dataclass(frozen=True)
class Plan:
    """What is to be measured of one model.

    Attributes:
        model: what `opendino.load` takes.
        weights: a file, "random", or None.
        pairs: runtimes and precisions; the fp32 reference is measured whether it is here or not.
        sizes: image sides or (height, width); None is the model's crop.
        batches: images in a call.
        seconds: of timing for a row.
        rounds: turns that they are spread over.
        device: "cpu", "cuda", …
        threads: of each process; None: as the environment says.
    """

    model: str
    weights: str | None
    pairs: tuple[Pair, ...]
    sizes: tuple[int | tuple[int, int] | None, ...] = (None,)
    batches: tuple[int, ...] = (1, 8)
    seconds: float = 5.0
    rounds: int = 5
    device: str = "cpu"
    threads: int | None = None


class BenchProcess:
    """A worker (`bench_worker`) that has loaded its model, or says why not.

    Args:
        plan: what it runs.
        pair: runtime and precision.
        log: file for its messages.

    Attributes:
        about: what it said when it was ready.
        exported: whether it has exported the model and ended; a fresh one is to be started.
        problem: why it gives no answers, or "".
        died: whether it was ready and has died since.
    """

    def __init__(self, plan: Plan, pair: Pair, log: Path) -> None:
        threads = {} if plan.threads is None else dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), plan.threads)
        environment = {**os.environ, **{k: str(v) for k, v in threads.items()}}
        self.log, self.problem, self.died = log, "", False
        with open(log, "w") as file:
            self.process: subprocess.Popen[str] | None = subprocess.Popen(
                [sys.executable, "-m", "opendino.embed.runtimes.bench_worker"], text=True, env=environment,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file,
                start_new_session=True,  # a Ctrl-C reaches the leading process alone
            )  # fmt: skip
        try:
            answer = self.ask(
                model=plan.model, weights=plan.weights, runtime=pair[0], precision=pair[1], device=plan.device
            )
        except BaseException:
            self.close(kill=True)
            raise
        self.about: dict[str, Any] = answer.get("ready", {})
        self.exported = bool(answer.get("exported"))
        self.problem, self.died = answer.get("error", ""), False  # what cannot start is not started again

    @classmethod
    def absent(cls, problem: str) -> BenchProcess:
        """Stand for a process that cannot be."""
        self = cls.__new__(cls)
        self.process, self.problem, self.about, self.exported, self.died = None, problem, {}, False, False
        return self

    def ask(self, **message: Any) -> dict[str, Any]:
        """Send a line and wait for the answer; a death is an error."""
        if self.process is None or self.problem:
            return {"error": self.problem}
        assert self.process.stdin
        assert self.process.stdout
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line.endswith("\n"):
            answer: dict[str, Any] = json.loads(line)
            return answer
        self.problem, self.died = _fate(self.process.wait(), self.log), True
        return {"error": self.problem}

    def close(self, kill: bool = False) -> None:
        """End it and wait."""
        if self.process is None:
            return
        if kill:
            self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(OSError):
                if pipe:
                    pipe.close()
        self.process.wait()


def _fate(code: int, log: Path) -> str:
    if code < 0:
        hint = ", as the system does when memory runs out" if code == -9 else ""
        return f"the process was ended by signal {-code}{hint}"
    try:
        said = log.read_text(errors="replace").strip().splitlines()[-1:]
    except OSError:
        said = []
    return f"the process ended with code {code}" + (f": {said[0]}" if said else "")
