# SPDX-License-Identifier: Apache-2.0
"""Time the forward pass and one training step against transformers, timm and lightly-train, in turn.

    python benchmarks/run.py [--rounds 5] [--threads 2] [--only forward|step]

Each peer runs in a process of its own and is asked for one sample at a time, A B C A B C …, so that a change in the
machine's speed meets all of them; the figures are medians and the ratios medians of the per-round ratios. Peers that
are not installed in the environment are named and left out. Weights are random: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

WORKER = Path(__file__).with_name("worker.py")
FORWARD = ["opendino", "transformers", "timm"]
STEP = ["opendino", "lightly-train"]


class Worker:
    """A peer in its own process; answers each line `go` with the images/s of one sample, after a warm-up."""

    def __init__(self, task: str, peer: str, args: argparse.Namespace) -> None:
        command = [sys.executable, str(WORKER), task, peer, "--threads", str(args.threads), "--batch", str(args.batch)]
        self.peer = peer
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ready = self._answer()

    def _answer(self) -> dict[str, object]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        return {"error": f"ended with exit code {self.process.wait()}"}

    def sample(self) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return float(self._answer()["images_per_s"])  # type: ignore[arg-type]

    def close(self) -> None:
        if self.process.poll() is None and self.process.stdin is not None:
            self.process.stdin.close()
            self.process.wait()


def compare(task: str, peers: list[str], args: argparse.Namespace) -> list[dict[str, object]]:
    """Time the peers of one task in turn and give a row for each."""
    workers = [Worker(task, peer, args) for peer in peers]
    rows: list[dict[str, object]] = []
    for worker in workers:
        if "error" in worker.ready:
            rows.append({"task": task, "peer": worker.peer, "left_out": worker.ready["error"]})
    workers = [w for w in workers if "error" not in w.ready]
    samples: dict[str, list[float]] = {w.peer: [] for w in workers}
    for _ in range(args.rounds):
        for worker in workers:
            samples[worker.peer].append(worker.sample())
    for worker in workers:
        ours = samples["opendino"]
        own = samples[worker.peer]
        rows.append(
            {
                "task": task,
                "peer": worker.peer,
                "images_per_s": round(statistics.median(own), 2),
                "min": round(min(own), 2),
                "max": round(max(own), 2),
                "opendino_over_it": round(statistics.median([a / b for a, b in zip(ours, own)]), 3),
            }
        )
        worker.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--only", choices=["forward", "step"])
    args = parser.parse_args()
    for task, peers in (("forward", FORWARD), ("step", STEP)):
        if args.only in (None, task):
            for row in compare(task, peers, args):
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
