# SPDX-License-Identifier: Apache-2.0
"""Time the forward pass of frozen backbones against what users run today, in turn, with closeness to fp32.

    python benchmarks/inference.py --out DIR                           # all; goes on where it was stopped
    python benchmarks/inference.py --out DIR --sizes S --pixels 224 --batches 1 8 --rounds 3 --seconds 0.3
    python benchmarks/inference.py --out DIR --peers opendino-bf16 openvino-bf16-latency openvino-bf16-throughput
    python benchmarks/inference.py --out DIR --competitor              # the Embedder beside a busy process
    python benchmarks/inference.py --out DIR --table                   # the tables of what there is

Every way runs in a process of its own, all alive, asked in turn: A B C A B C … A ratio is the median of the ratios of
the rounds. DIR/results.json holds every sample; a comparison that is in it with enough rounds is not measured again.
Ways: benchmarks/inference_peers.py. "eager" is our plain VisionTransformer, which has the official model's operations.
CPU time stands beside the clock's: it tells more than the clock on a machine that others use.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from harness import Spec, Worker, compare, paired_ratio, run_once, spread
from run import say, write_json
from table import commit, machine

SHAPES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16)}
INPUTS = {"S": ((224, (1, 8, 32)), (518, (1, 4))), "B": ((224, (1, 8, 32)), (518, (1, 4))), "L": ((224, (1, 8, 32)),)}
"""Side in pixels and the batches at it."""
OURS = "opendino-bf16"
PEERS = (
    OURS, "opendino-fp32", "eager-fp32", "eager-bf16", "transformers-fp32", "transformers-bf16", "timm-fp32",
    "timm-bf16", "openvino-bf16-latency", "openvino-bf16-throughput", "openvino-fp32-latency", "onnxruntime-fp32",
)  # fmt: skip
OPENVINO = ("openvino-bf16-latency", "openvino-bf16-throughput")
KEPT_SPEED = 0.45
SPIN = "while True: pass"


@dataclass(frozen=True)
class Aim:
    """A ratio of speed that is to be reached."""

    peers: tuple[str, ...]
    least: float


def aims(size: str, pixels: int, batch: int) -> list[Aim]:
    """Give what the forward pass is held to (images/s of opendino in bf16 over that of each peer)."""
    fp32, bf16 = ("transformers-fp32", "timm-fp32"), ("transformers-bf16", "timm-bf16")
    if pixels == 518:
        return [Aim(OPENVINO, {"S": 1.0, "B": 1.1}.get(size, 1.0))]
    if batch < 8:
        return [Aim(fp32, 3.3 if size == "S" else 4.7), Aim(OPENVINO, 1.0)]
    return [
        Aim(fp32, {"S": 5.0, "B": 6.0, "L": 5.5}[size]),
        Aim(bf16, 1.25 if size == "L" else 1.7),
        Aim(OPENVINO, 1.15),
    ]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the results, and of weights and converted models")
    add("--sizes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    add("--pixels", nargs="+", type=int, choices=[224, 518], default=[224, 518])
    add("--batches", nargs="+", type=int, help="default: 1, 8 and 32 at 224 px, 1 and 4 at 518 px")
    add("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    add("--rounds", type=int, default=5)
    add("--warmup", type=int, default=1, help="rounds before them that do not count")
    add("--seconds", type=float, default=1.0, help="length that a sample aims at")
    add("--threads", type=int, default=2)
    add("--again", action="store_true", help="measure also what is there")
    add("--competitor", action="store_true", help="the Embedder's speed beside a busy process ÷ that in the quiet")
    add("--table", action="store_true", help="measure nothing")
    return parser.parse_args(argv)


def main() -> int:
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "results.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if args.competitor:
        return int(not beside_a_busy_process(args))
    for size in args.sizes:
        for pixels, batches in INPUTS[size]:
            for batch in args.batches or batches:
                if pixels in args.pixels:
                    title = f"ViT-{size}/14, {pixels} px, batch {batch}"
                    if not args.table and not is_there(found.get(title), args):
                        found[title] = measured(size, pixels, batch, title, args)
                        write_json(path, found)
                    if title in found:
                        print(markdown(found[title], size, pixels, batch), end="\n\n", flush=True)
    return 0


def is_there(record: dict[str, Any] | None, args: argparse.Namespace) -> bool:
    """Say whether a comparison has all peers that are asked for, with enough rounds, or why not."""
    if record is None or args.again:
        return False
    ways = record["ways"]
    return all(p in ways and ("problem" in ways[p] or len(ways[p]["samples"]) >= args.rounds) for p in args.peers)


def measured(size: str, pixels: int, batch: int, title: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one comparison."""
    say(title)
    base = prepared(size, pixels, args)
    specs = [replace(base, task="inference", peer=peer, batch=batch) for peer in args.peers]
    ways: dict[str, Any] = {}
    for result in compare(specs, args.rounds, args.warmup, say):
        problem = {"problem": result.problem} if result.problem else {}
        ways[result.spec.peer] = {"ready": result.ready, "samples": result.samples, **problem}
    about = {"date": date.today().isoformat(), "commit": commit(), "machine": machine(), "threads": args.threads}
    return {"title": title, **about, "ways": ways}


def prepared(size: str, pixels: int, args: argparse.Namespace) -> Spec:
    """Write weights and fp32 features of a model, once."""
    work = args.out / f"work-{size}"
    work.mkdir(exist_ok=True)
    spec = Spec(
        "prepare", "opendino", str(work), threads=args.threads, batch=8, size=pixels, shape=SHAPES[size],
        seconds=args.seconds,
    )  # fmt: skip
    if not (work / f"features-{pixels}-scale_offset.npy").exists():
        answer = run_once(spec)
        if "error" in answer:
            raise SystemExit(f"The inputs could not be prepared: {answer['error']}")
    return spec


# --- tables --------------------------------------------------------------------------------------------------------


def rates(way: dict[str, Any], clock: str = "seconds") -> list[float]:
    """Give images per second of each round."""
    return [s["images"] / s[clock] for s in way["samples"]]


def ratio(ways: dict[str, Any], peer: str, clock: str = "seconds") -> float | None:
    """Give how many times as fast as a peer opendino in bf16 is; None without both."""
    ours, theirs = ways.get(OURS), ways.get(peer)
    if not (ours and theirs and ours["samples"] and len(ours["samples"]) == len(theirs["samples"])):
        return None
    return paired_ratio(rates(ours, clock), rates(theirs, clock))


def markdown(record: dict[str, Any], size: str, pixels: int, batch: int) -> str:
    """Give one comparison as a heading, a table, and what was aimed at."""
    head = ["way", "version", "images/s, median [min..max]", "opendino bf16 ÷ way", "the same by CPU time"]
    head += ["CPU ms/image", "peak MiB", "1 − cos, worst cls", "1 − cos, patches"]
    lines = [f"### Inference, {record['title']}", "", f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    ways = record["ways"]
    for name, way in ways.items():
        lines.append(f"| {' | '.join(_cells(name, way, ways, len(head)))} |")
    return "\n".join([*lines, "", *_notes(record), *_reached(ways, aims(size, pixels, batch))])


def _cells(name: str, way: dict[str, Any], ways: dict[str, Any], width: int) -> list[str]:
    ready = way["ready"]
    if not way["samples"]:
        reason = str(way.get("problem", "no samples")).replace("|", "/")
        return [name, "–", f"**not measured: {reason}**"] + [""] * (width - 3)
    package = name.split("-")[0]
    median, low, high = spread(rates(way))
    cells = [name, ready["versions"].get(package, "–"), f"{median:.2f} [{low:.2f}..{high:.2f}]"]
    for clock in ("seconds", "cpu"):
        found = ratio(ways, name, clock)
        cells.append("–" if found is None else f"{found:.2f}")
    cells.append(f"{spread([1e3 / r for r in rates(way, 'cpu')])[0]:.1f}")
    cells.append(f"{max(s['rss_mib'] for s in way['samples']):.0f}")
    return [*cells, f"{ready['cls']:.1e}", f"{ready['patches']:.1e}"]


def _notes(record: dict[str, Any]) -> list[str]:
    samples = [s for way in record["ways"].values() for s in way["samples"]]
    if not samples:
        return ["Nothing was measured."]
    others = [s["others"] for s in samples]
    rounds = max(len(way["samples"]) for way in record["ways"].values())
    return [
        f"- {record['date']}, commit {record['commit']}, {record['machine']}. {rounds} rounds in turn, "
        f"{record['threads']} threads; other processes used {spread(others)[0]:.0%} of the machine (at most "
        f"{max(others):.0%}).",
        *(f"- {name}: {way['ready']['setting']}." for name, way in record["ways"].items() if way["samples"]),
        "- Cosines are to opendino's fp32 with the way's own resizing of the position table; random weights.",
    ]


def _reached(ways: dict[str, Any], wanted: list[Aim]) -> list[str]:
    """Say which aims are reached; a peer with several modes counts in its fastest."""
    lines = []
    for aim in wanted:
        found = {p: r for p in aim.peers if (r := ratio(ways, p)) is not None}
        if not found:
            continue
        shown = ", ".join(f"{p} {r:.2f}" for p, r in found.items())
        said = "reached" if min(found.values()) >= aim.least else "**not reached**"
        lines.append(f"- Aim of {aim.least:g} × {' and '.join(aim.peers)}: {said} ({shown}).")
    return lines


# --- a busy process ------------------------------------------------------------------------------------------------


def beside_a_busy_process(args: argparse.Namespace) -> bool:
    """Time the Embedder in the quiet and beside one process that computes without end, in turn."""
    size = args.sizes[0]
    base = prepared(size, 224, args)
    worker = Worker(replace(base, task="inference", peer="embedder-bf16", batch=32))
    if worker.result.problem:
        raise SystemExit(worker.result.problem)
    quiet, busy = [], []
    try:
        worker.sample(keep=False)
        for _ in range(args.rounds):
            quiet.append(_rate(worker.sample(keep=False)))
            with subprocess.Popen([sys.executable, "-c", SPIN]) as other:
                try:
                    busy.append(_rate(worker.sample(keep=False)))
                finally:
                    other.kill()
    finally:
        worker.close()
    kept = paired_ratio(busy, quiet)
    print(
        f"Embedder, ViT-{size}/14, bf16, 224 px: {spread(quiet)[0]:.2f} images/s in the quiet, {spread(busy)[0]:.2f} "
        f"beside a busy process; kept {kept:.2f} of its speed (median of {args.rounds} rounds), aim {KEPT_SPEED}: "
        f"{'reached' if kept >= KEPT_SPEED else 'not reached'}. Commit {commit()}, {machine()}."
    )
    return kept >= KEPT_SPEED


def _rate(answer: dict[str, Any]) -> float:
    return float(answer["images"] / answer["seconds"])


if __name__ == "__main__":
    sys.exit(main())
