# SPDX-License-Identifier: Apache-2.0
"""Time the forward pass, one pre-training step and the augmentation against other packages, in turn.

    make bench                                   # everything, into an environment of its own
    python benchmarks/run.py --quick             # smoke run; its figures mean nothing
    python benchmarks/run.py --suite forward --dtypes fp32 --json out.json

Results go to stdout as Markdown, progress to stderr. What is measured, and how: benchmarks/README.md. Ends with 1 when
a peer failed or computes something else than opendino; a peer that is not installed is reported and is no failure.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from datetime import date
from pathlib import Path

from harness import OURS, Result, Spec, compare, differs, run_once
from table import as_json, commit, different_networks, has_bf16, machine, markdown

FORWARD = (OURS, "transformers", "timm", "lightly-train")
STEP = (OURS, "lightly-train")
AUGMENT = (OURS, "lightly-train", "torchvision")
PHOTOGRAPHS = 64
PEERS = tuple(dict.fromkeys(FORWARD + STEP + AUGMENT))
NO_STEP = {p: "the package has no DINOv2 pre-training" for p in FORWARD if p not in STEP}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--suite", choices=["forward", "step", "augment", "all"], default="all")
    add("--dtypes", nargs="+", choices=["fp32", "bf16"], help="default: both; the step without bf16 where it is slow")
    add("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    add("--rounds", type=int, default=5, help="samples of each peer")
    add("--warmup", type=int, default=1, help="rounds before them that do not count")
    add("--threads", type=int, default=2)
    add("--batch", type=int, default=8, help="of the forward pass")
    add("--step-batch", type=int, default=16, help="images of a training step")
    add("--large", action="store_true", help="also the forward pass at 518 px, batch 1")
    add("--quick", action="store_true", help="smoke run on small inputs: one round, no warm-up")
    add("--json", type=Path, metavar="OUT", help="also write every sample here")
    args = parser.parse_args(argv)
    if min(args.rounds, args.threads, args.batch, args.step_batch) < 1 or args.warmup < 0:
        parser.error("--rounds, --threads, --batch and --step-batch must be at least 1, --warmup at least 0")
    if args.quick:
        args.rounds, args.warmup, args.batch, args.step_batch = 1, 0, 2, 2
    return args


def plan(args: argparse.Namespace, work: str) -> list[tuple[str, list[Spec]]]:
    """Give the comparisons that are asked for: a title, and a spec for each peer."""
    base = Spec("forward", OURS, work, threads=args.threads, seconds=0.1 if args.quick else 1.5)
    comparisons = []
    if args.suite in ("forward", "all"):
        inputs = [(98 if args.quick else 224, args.batch)] + ([(518, 1)] if args.large else [])
        for size, batch in inputs:
            for dtype in args.dtypes or ("fp32", "bf16"):
                title = f"Forward, ViT-S/14, {size} px, batch {batch}, {dtype}"
                spec = replace(base, size=size, batch=batch, dtype=dtype)
                comparisons.append((title, [replace(spec, peer=p) for p in FORWARD if p in args.peers]))
    if args.suite in ("step", "all"):
        spec = replace(base, task="step", batch=args.step_batch)
        if args.quick:
            spec = replace(spec, size=98, local_size=42, num_local=2, prototypes=1024)
        crops = f"2 × {spec.size} + {spec.num_local} × {spec.local_size}"
        for dtype in args.dtypes or step_dtypes():
            title = f"Training step, ViT-S/14, {crops} px, batch {spec.batch}, K = {spec.prototypes:,}, {dtype}"
            comparisons.append((title, [replace(spec, peer=p, dtype=dtype) for p in FORWARD if p in args.peers]))
    if args.suite in ("augment", "all"):
        count = args.step_batch if args.quick else PHOTOGRAPHS
        spec = replace(base, task="augment", threads=1, batch=args.step_batch, num_images=count)
        title = (
            f"Augmentation, 2 × {spec.size} + {spec.num_local} × {spec.local_size} px, batch {spec.batch}, one thread"
        )
        comparisons.append((title, [replace(spec, peer=p) for p in AUGMENT if p in args.peers]))
    return comparisons


def step_dtypes() -> tuple[str, ...]:
    """Give what the training step is timed in when nothing else is asked for."""
    return ("fp32", "bf16") if has_bf16() else ("fp32",)


def measure(specs: list[Spec], args: argparse.Namespace) -> list[Result]:
    """Run one comparison; peers without this task get a row that says so."""
    able = [s for s in specs if s.task != "step" or s.peer in STEP]
    found = {r.spec.peer: r for r in compare(able, args.rounds, args.warmup, say)}
    return [found.get(s.peer) or Result(s, {"missing": NO_STEP[s.peer]}) for s in specs]


def prepare(comparisons: list[tuple[str, list[Spec]]], args: argparse.Namespace) -> None:
    """Write the shared weights, reference features and images of all comparisons."""
    specs = {(s.task, s.size): s for _, specs in comparisons for s in specs}
    files = args.step_batch * (args.rounds + args.warmup + 2)  # no peer may come to the end of an epoch
    for spec in specs.values():
        count = files if spec.task == "step" else 0
        task = "prepare"
        if spec.task == "augment":
            task, count = "photographs", spec.num_images
        answer = run_once(replace(spec, task=task, peer=OURS, dtype="fp32", num_images=count))
        if "error" in answer:
            raise SystemExit(f"The inputs could not be prepared: {answer['error']}")


def header(args: argparse.Namespace) -> str:
    """Say when, how and where the figures were taken."""
    lines = [
        f"Taken on {date.today().isoformat()} with `python benchmarks/run.py {' '.join(sys.argv[1:])}`".rstrip(" `")
        + "`.",
        f"opendino at commit {commit()}. Machine: {machine()}.",
    ]
    if args.quick:
        lines.append("**A smoke run: these figures mean nothing.**")
    left_out = [p for p in PEERS if p not in args.peers]
    if left_out:
        lines.append(f"Not asked for: {', '.join(left_out)}.")
    if args.suite in ("step", "all") and not args.dtypes and not has_bf16():
        lines.append(
            "This processor has no bf16 instructions; the training step was timed in fp32 alone (`--dtypes bf16` times "
            "it in bf16 all the same)."
        )
    return "\n".join(lines)


def say(text: str) -> None:
    """Tell progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    args = parse()
    started, failed, records = time.perf_counter(), False, []
    with tempfile.TemporaryDirectory(prefix="opendino-bench-") as work:
        comparisons = plan(args, work)
        say("Preparing weights, reference features and images")
        prepare(comparisons, args)
        print(header(args), end="\n\n", flush=True)
        for title, specs in comparisons:
            say(title)
            results = measure(specs, args)
            failed |= any("error" in r.ready or differs(r) for r in results) or bool(different_networks(results))
            print(markdown(title, results, args.rounds), end="\n\n", flush=True)
            records.append(as_json(title, results))
            if args.json:
                write_json(args.json, {"date": date.today().isoformat(), "machine": machine(), "comparisons": records})
    say(f"Done in {(time.perf_counter() - started) / 60:.1f} minutes")
    return int(failed)


def write_json(path: Path, record: dict[str, object]) -> None:
    """Write a record aside and rename it."""
    aside = path.with_name(f".{path.name}")
    aside.write_text(json.dumps(record, indent=1) + "\n")
    aside.rename(path)


if __name__ == "__main__":
    sys.exit(main())
