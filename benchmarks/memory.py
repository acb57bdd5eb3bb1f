# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a training step that never holds all prototype logits, against the same step with whole logits.

    python benchmarks/memory.py                          # ViT-S/14, batch 16, K = 131 072, Sinkhorn and moving centre
    python benchmarks/memory.py --prototypes 65536 --precision fp32

Each variant runs two steps of the real trainer in a process of its own on the same images; its figure is the largest
resident memory of that process, torch and all. "whole logits" is opendino.pretrain.materialized, which computes the
losses as their formulas are written; losses of both are printed, and are the same.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

VARIANTS = ("chunks", "whole logits")
STEPS = 2


def run_variant(args: argparse.Namespace) -> None:
    """Run one variant in this process and print its figures as JSON."""
    import torch

    from opendino.pretrain import engine
    from opendino.pretrain.config import PretrainConfig
    from opendino.pretrain.materialized import MaterializedStudentTeacher
    from opendino.pretrain.trainer import Trainer
    from worker import peak_rss_mib

    torch.set_num_threads(args.threads)
    if args.variant == "whole logits":
        engine.StudentTeacher = MaterializedStudentTeacher  # type: ignore[misc]
    never = 10**9
    config = PretrainConfig.model_validate(
        {
            "data": str(args.images), "out": args.out, "steps": 125_000, "batch_size": args.batch, "num_workers": 0,
            "device": "cpu", "precision": args.precision, "log_every": never, "checkpoint_every": never,
            "probe_every": never, "model": {"arch": args.arch}, "heads": {"num_prototypes": args.prototypes},
            "loss": {"centering": args.centering},
        }
    )  # fmt: skip
    trainer = Trainer(config)
    trainer.engine.telemetry.is_log_step = lambda step: False  # type: ignore[method-assign]
    batches = trainer.batches()
    losses = [trainer.advance(batches)["loss"] for _ in range(STEPS)]
    print(json.dumps({"peak_mib": peak_rss_mib(), "losses": losses}))


def measure(args: argparse.Namespace, variant: str, centering: str, out: str) -> dict[str, Any]:
    """Run one variant in a process of its own."""
    flags = {
        "--variant": variant, "--centering": centering, "--images": args.images, "--out": out, "--arch": args.arch,
        "--batch": args.batch, "--prototypes": args.prototypes, "--precision": args.precision,
        "--threads": args.threads,
    }  # fmt: skip
    words = [str(word) for pair in flags.items() for word in pair]
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure every variant and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--arch", default="vits14")
    add("--batch", type=int, default=16)
    add("--prototypes", type=int, default=131_072)
    add("--precision", choices=["fp32", "bf16"], default="bf16")
    add("--threads", type=int, default=2)
    add("--centering", choices=["sinkhorn", "moving"], help="default: both")
    for hidden in ("--variant", "--images", "--out"):
        add(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        run_variant(args)
        return
    from prepare import write_jpegs

    print("| targets | step | peak MiB | of whole logits | losses |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        args.images = str(Path(folder) / "images")
        write_jpegs(Path(args.images), args.batch * (STEPS + 1))
        for centering in [args.centering] if args.centering else ["sinkhorn", "moving"]:
            found = {v: measure(args, v, centering, f"{folder}/{centering}-{v[:5]}") for v in VARIANTS}
            for variant, figures in found.items():
                share = figures["peak_mib"] / found["whole logits"]["peak_mib"]
                losses = ", ".join(f"{loss:.5f}" for loss in figures["losses"])
                print(f"| {centering} | {variant} | {figures['peak_mib']:.0f} | {share:.3f} | {losses} |", flush=True)


if __name__ == "__main__":
    main()
