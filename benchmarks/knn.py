# SPDX-License-Identifier: Apache-2.0
"""Exact nearest neighbours at ImageNet size: opendino and faiss's IndexFlatIP, asked in turn.

    python benchmarks/knn.py                                     # 1 281 167 x 384, 50 000 queries, k = 200
    python benchmarks/knn.py --rows 100000 --queries 4096        # smaller
    python benchmarks/knn.py --rounds 5                          # only so many bunches of queries
    python benchmarks/knn.py --work DIR                          # keep features and answers; go on where it stopped

Needs faiss-cpu (requirements-faiss.txt). Each peer is a process of its own with the same number of threads; both
answer one bunch of queries after the other, in turn, so that a busy machine disturbs both. The features are a file that
both map: a mixture of 1000 classes in 50 families, whose siblings are nearly as close as a class is to itself. A peer's
preparation (faiss: normalising and copying; ours: norms and a rounded copy) is timed once and counted in full.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

CLASSES, FAMILIES = 1000, 50
OWN, NOISE = 0.2, 1.0
"""Standard deviations of a class around its family, and of an item around its class, where families have 1."""
PEERS = ("opendino", "faiss")
Search = Callable[[np.ndarray], np.ndarray]


def main() -> None:
    """Make the features, ask the peers in turn, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_281_167)
    parser.add_argument("--queries", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--k", type=int, default=200)
    parser.add_argument("--bunch", type=int, default=2000, help="queries that a peer is asked at once")
    parser.add_argument("--rounds", type=int, help="bunches; default: all")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        serve(args)
        return
    with tempfile.TemporaryDirectory(prefix="knn-") as temporary:
        args.work = args.work or Path(temporary)
        args.work.mkdir(parents=True, exist_ok=True)
        make_features(args)
        compare(args)


def make_features(args: argparse.Namespace) -> None:
    """Write train.npy, test.npy and their labels; a function of the sizes alone."""
    settings = {name: getattr(args, name) for name in ("rows", "queries", "dim", "k", "bunch")}
    described = args.work / "settings.json"
    if described.exists():
        if json.loads(described.read_text()) != settings:
            sys.exit(f"{args.work} is of a run with other settings: {described.read_text()}; give another --work.")
        return
    rng = np.random.default_rng(0)
    families = rng.standard_normal((FAMILIES, args.dim), np.float32)
    classes = families[np.arange(CLASSES) % FAMILIES] + OWN * rng.standard_normal((CLASSES, args.dim), np.float32)
    for name, count in (("train", args.rows), ("test", args.queries)):
        labels = rng.integers(0, CLASSES, count)
        np.save(args.work / f"{name}-labels.npy", labels)
        out = np.lib.format.open_memmap(args.work / f"{name}.npy", "w+", np.float32, (count, args.dim))
        for start in range(0, count, 65536):
            own = labels[start : start + 65536]
            out[start : start + len(own)] = classes[own] + NOISE * rng.standard_normal((len(own), args.dim), np.float32)
        out.flush()
    described.write_text(json.dumps(settings))


def serve(args: argparse.Namespace) -> None:
    """Be one peer: prepare, then answer lines "first last" on standard input."""
    train = np.load(args.work / "train.npy", mmap_mode="r")
    test = np.load(args.work / "test.npy", mmap_mode="r")
    if args.peer == "opendino":
        import opendino.evaluate.knn  # noqa: F401  importing is not searching
    else:
        import faiss  # noqa: F401
    start = time.perf_counter()
    search = {"opendino": ours, "faiss": faiss_flat}[args.peer](train, args)
    print(json.dumps({"prepare": time.perf_counter() - start}), flush=True)
    for line in sys.stdin:
        first, last = map(int, line.split())
        start = time.perf_counter()
        index = search(test[first:last])
        seconds = time.perf_counter() - start
        np.save(args.work / f"{args.peer}-{first}.npy", index.astype(np.int32))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({"seconds": seconds, "peak_gib": peak}), flush=True)


def ours(train: np.ndarray, args: argparse.Namespace) -> Search:
    """Prepare opendino's search."""
    import torch

    from opendino.evaluate.neighbours import Neighbours, check_finite, rows_of

    torch.set_num_threads(args.threads)
    check_finite(rows_of(train), "training")
    items = Neighbours(rows_of(train), args.queries, args.k)
    return lambda queries: items.search(rows_of(queries))[1].numpy()


def faiss_flat(train: np.ndarray, args: argparse.Namespace) -> Search:
    """Prepare faiss's exact index of inner products, fed in parts so that its copy is the only one."""
    import faiss

    faiss.omp_set_num_threads(args.threads)
    index = faiss.IndexFlatIP(args.dim)
    for start in range(0, len(train), 65536):
        part = np.array(train[start : start + 65536])
        faiss.normalize_L2(part)
        index.add(part)

    def search(queries: np.ndarray) -> np.ndarray:
        unit = np.array(queries)
        faiss.normalize_L2(unit)
        return index.search(unit, args.k)[1]

    return search


def compare(args: argparse.Namespace) -> None:
    """Ask the peers in turn and print what came out; answers of an earlier call are kept."""
    kept = args.work / "seconds.jsonl"
    done = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    firsts = range(0, args.queries, args.bunch)[: args.rounds]
    workers = {peer: Worker(peer, args) for peer in PEERS}
    try:
        for number, first in enumerate(firsts[len(done) :]):
            order = PEERS if number % 2 == 0 else PEERS[::-1]
            last = min(first + args.bunch, args.queries)
            answers = {peer: workers[peer].ask(first, last) for peer in order}
            done.append({"first": first, "last": last} | answers)
            with kept.open("a") as file:
                file.write(json.dumps(done[-1]) + "\n")
            ratio = answers["faiss"]["seconds"] / answers["opendino"]["seconds"]
            print(f"queries {first}-{last}: {json.dumps(answers)}, faiss / opendino {ratio:.2f}", file=sys.stderr)
    finally:
        for worker in workers.values():
            worker.close()
    print_table(args, done, {peer: worker.prepare for peer, worker in workers.items()})


class Worker:
    """A peer in a process of its own."""

    def __init__(self, peer: str, args: argparse.Namespace) -> None:
        words = [f"--{name}={getattr(args, name)}" for name in ("queries", "dim", "k", "threads", "work")]
        self.process = subprocess.Popen(
            [sys.executable, __file__, f"--peer={peer}", *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=os.environ | {"OMP_NUM_THREADS": str(args.threads)},
        )  # fmt: skip
        self.prepare = float(self._answer()["prepare"])

    def ask(self, first: int, last: int) -> dict[str, float]:
        """Let it search for some queries."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{first} {last}\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"A peer ended with code {self.process.wait()}; what it said stands above.")
        answer: dict[str, Any] = json.loads(line)
        return answer


def print_table(args: argparse.Namespace, done: list[dict[str, Any]], prepare: dict[str, float]) -> None:
    """Print seconds, ratios, peak memory, and whether the answers are the same."""
    count = sum(d["last"] - d["first"] for d in done)
    print(f"{args.rows} x {args.dim}, {count} of {args.queries} queries, k = {args.k}, {args.threads} threads\n")
    print(
        "| peer | prepare s | search s | both s | queries/s | peak GiB | 20-NN % |\n"
        "| --- | --- | --- | --- | --- | --- | --- |"
    )
    labels, truth = (np.load(args.work / f"{name}-labels.npy") for name in ("train", "test"))
    answers = {peer: np.concatenate([np.load(args.work / f"{peer}-{d['first']}.npy") for d in done]) for peer in PEERS}
    truth = np.concatenate([truth[d["first"] : d["last"]] for d in done])
    for peer, index in answers.items():
        seconds = sum(d[peer]["seconds"] for d in done)
        peak = max(d[peer]["peak_gib"] for d in done)
        votes = np.array([np.bincount(labels[row[:20]], minlength=CLASSES).argmax() for row in index])
        both = seconds + prepare[peer]
        print(
            f"| {peer} | {prepare[peer]:.1f} | {seconds:.1f} | {both:.1f} | {count / seconds:.1f} | {peak:.2f} "
            f"| {100 * (votes == truth).mean():.2f} |"
        )
    ratios = [d["faiss"]["seconds"] / d["opendino"]["seconds"] for d in done]
    print(f"\nfaiss / opendino, bunch by bunch: {statistics.median(ratios):.2f} [{min(ratios):.2f}..{max(ratios):.2f}]")
    print_agreement(args, answers)


def print_agreement(args: argparse.Namespace, answers: dict[str, np.ndarray]) -> None:
    """Compare the answers, and settle in float64 who is right where they differ."""
    mine, other = answers["opendino"], answers["faiss"]
    differing = np.flatnonzero((mine != other).any(1))
    shared = np.mean([len(np.intersect1d(a, b)) / args.k for a, b in zip(mine, other, strict=True)])
    print(f"Shared neighbours: {shared:.7f}; {len(differing)} of {len(mine)} rankings differ in some place.")
    train, test = (np.load(args.work / f"{name}.npy", mmap_mode="r") for name in ("train", "test"))
    for peer, index in answers.items():
        falls, worst = 0, 0.0
        for row in differing[:2000]:
            x, q = train[index[row]].astype(np.float64), test[row].astype(np.float64)
            rises = np.diff(x @ q / np.linalg.norm(x, axis=1) / np.linalg.norm(q))
            falls, worst = falls + int((rises > 0).sum()), max(worst, float(rises.max()))
        print(f"{peer}: {falls} neighbours there stand in the wrong order by float64, by at most {worst:.1e}.")


if __name__ == "__main__":
    main()
