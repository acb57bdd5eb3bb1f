# SPDX-License-Identifier: Apache-2.0
"""Workers in processes of their own, asked in turn, and the arithmetic of their answers. Standard library only.

The parent imports no torch: a child's peak memory would otherwise begin at the parent's.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("worker.py")
OURS = "opendino"
TOLERANCE = {"fp32": 1e-3, "bf16": 1e-1}
"""Largest relative distance ‖peer − opendino fp32‖ / ‖opendino fp32‖ of the features of two images."""


@dataclass(frozen=True)
class Spec:
    """What one worker is to run.

    Attributes:
        task: prepare, forward, inference, step, photographs, augment, folder-files or folder.
        peer: opendino, transformers, timm, lightly-train or torchvision; of the inference, a way of inference_peers.py.
        work: folder shared by the workers of a run: weights, reference features, images, run folders.
        dtype: fp32 or bf16.
        threads: of torch.
        batch: images per call or step, or per batch of the augmentation.
        size: side of the images, or of the global crops, pixels; of a folder the width of its files.
        seconds: length that a sample of the forward pass aims at.
        shape: width, depth and heads of the backbone.
        local_size, num_local, prototypes: of the training step.
        num_images: JPEG files to prepare; one sample of the augmentation reads them all.
    """

    task: str
    peer: str
    work: str
    dtype: str = "fp32"
    threads: int = 2
    batch: int = 8
    size: int = 224
    seconds: float = 1.0
    shape: tuple[int, int, int] = (384, 12, 6)
    local_size: int = 98
    num_local: int = 8
    prototypes: int = 65_536
    num_images: int = 0

    def dumps(self) -> str:
        """Give the spec as one line of JSON."""
        return json.dumps(asdict(self))

    @staticmethod
    def loads(text: str) -> Spec:
        """Read what `dumps` wrote."""
        values = json.loads(text)
        return Spec(**{**values, "shape": tuple(values["shape"])})


@dataclass
class Result:
    """Samples of one peer of a comparison, or why there are none."""

    spec: Spec
    ready: dict[str, Any]
    samples: list[dict[str, float]] = field(default_factory=list)

    @property
    def problem(self) -> str | None:
        """Why the peer has no figures, or None."""
        return self.ready.get("missing") or self.ready.get("error")

    def rates(self, seconds: str = "seconds") -> list[float]:
        """Give the images/s of each round, by one of the sample's clocks."""
        return [s["images"] / s[seconds] for s in self.samples]


class Worker:
    """A peer in its own process; `sample` has it do one round. Its log lies in the work folder."""

    def __init__(self, spec: Spec) -> None:
        self.log = Path(spec.work) / f"{spec.task}-{spec.peer}-{spec.dtype}-{spec.size}.log"
        threads = str(spec.threads)
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(WORKER), spec.dumps()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )
        self.result = Result(spec, {})
        self.result.ready = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        tail = self.log.read_text(errors="replace").strip().splitlines()[-1:] or ["no message"]
        return {"error": f"ended with exit code {self.process.wait()}: {tail[0][:300]}"}

    def sample(self, keep: bool) -> dict[str, Any]:
        """Have one sample taken; a worker that ends instead loses its samples."""
        assert self.process.stdin is not None
        busy, started = machine_busy(), time.perf_counter()
        try:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        answer = self._answer()
        if "error" in answer:
            self.result.ready, self.result.samples = answer, []
        elif keep:
            seconds = time.perf_counter() - started
            others = (machine_busy() - busy - answer["cpu"]) / seconds / (os.cpu_count() or 1)
            self.result.samples.append({**answer, "others": max(others, 0.0)})
        return answer

    def close(self) -> None:
        """End the process: its input ends."""
        if self.process.stdin is not None and not self.process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


def machine_busy() -> float:
    """Give the CPU seconds that all processes have used so far; 0 where the system does not say."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    user, nice, system, _idle, _wait, irq, softirq = (int(v) for v in fields[:7])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def run_once(spec: Spec) -> dict[str, Any]:
    """Start a worker, wait until it is ready, end it, and give what it said."""
    worker = Worker(spec)
    worker.close()
    return worker.result.ready


def compare(specs: list[Spec], rounds: int, warmup: int, say: Callable[[str], None]) -> list[Result]:
    """Time peers in turn, A B C A B C …, after warm-up rounds that do not count.

    Args:
        specs: one per peer.
        rounds: samples of each.
        warmup: rounds before them.
        say: where progress goes.
    """
    workers: list[Worker] = []
    try:
        for spec in specs:
            workers.append(Worker(spec))
            problem = workers[-1].result.problem
            say(f"  {spec.peer}: {problem or 'ready'}")
        for number in range(warmup + rounds):
            for worker in workers:
                if worker.result.problem is None:
                    answer = worker.sample(keep=number >= warmup)
                    name = f"round {number - warmup + 1}" if number >= warmup else "warm-up"
                    say(f"  {name} of {rounds}: {worker.result.spec.peer} {_progress(answer)}")
    finally:
        for worker in workers:
            worker.close()
    return [w.result for w in workers]


def _progress(answer: dict[str, Any]) -> str:
    if "error" in answer:
        return str(answer["error"])
    return f"{answer['images'] / answer['seconds']:.2f} images/s"


def spread(values: list[float]) -> tuple[float, float, float]:
    """Give median, smallest and largest."""
    return statistics.median(values), min(values), max(values)


def paired_ratio(ours: list[float], theirs: list[float]) -> float:
    """Give the median of the per-round ratios: what slows a whole round down cancels out."""
    return statistics.median([a / b for a, b in zip(ours, theirs, strict=True)])


def differs(result: Result) -> bool:
    """Say whether a peer computes something else than opendino: not the same features, or not the same parameters."""
    distance = result.ready.get("distance")
    return distance is not None and not distance <= TOLERANCE[result.spec.dtype]
