# SPDX-License-Identifier: Apache-2.0
"""Training speed of this checkout against another revision of it, in turn, by a recipe on the command line.

    python benchmarks/revision.py 95d5012                        # vitt14_demo, three rounds
    python benchmarks/revision.py HEAD~5 --recipe vitt7_fashion --steps 100

Both run the same `opendino pretrain` in processes of their own, on the same 512 square JPEG files of 160 px; a round's
figure is the median images/s of its steps after the first ten, as metrics.jsonl has it. Each revision chooses precision
and the like by itself, as users get it; `--precision fp32` fixes it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import paired_ratio, spread

ROOT = Path(__file__).resolve().parents[1]
WARM_UP, IMAGES, SIDE = 10, 512, 160


def write_images(folder: Path) -> None:
    """Cut square JPEG files from scikit-learn's photographs."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_images

    folder.mkdir()
    rng, photographs = np.random.default_rng(0), load_sample_images().images
    for i in range(IMAGES):
        pixels = photographs[i % len(photographs)]
        top, left = rng.integers(0, pixels.shape[0] - SIDE), rng.integers(0, pixels.shape[1] - SIDE)
        Image.fromarray(pixels[top : top + SIDE, left : left + SIDE]).save(folder / f"{i:04d}.jpg", quality=90)


def rate(source: Path, images: Path, out: Path, args: argparse.Namespace) -> float:
    """Run one revision and give its images/s."""
    words = ["--recipe", args.recipe, "--data", images, "--out", out, "--steps", args.steps, "--device", "cpu"]
    words += ["--precision", args.precision] if args.precision else []
    command = [sys.executable, "-m", "opendino.cli", "pretrain", *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    lines = (out / "metrics.jsonl").read_text().splitlines()
    rates = [r["images_per_s"] for r in map(json.loads, lines) if "images_per_s" in r]
    return statistics.median(rates[WARM_UP:])


def main() -> None:
    """Take rounds in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("revision", help="what git calls it")
    add("--recipe", default="vitt14_demo")
    add("--steps", type=int, default=60)
    add("--rounds", type=int, default=3)
    add("--threads", type=int, default=2)
    add("--precision", choices=["fp32", "bf16"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        other, images = Path(folder) / "other", Path(folder) / "images"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", str(other), args.revision], check=True, capture_output=True)
        try:
            write_images(images)
            found: dict[str, list[float]] = {"this checkout": [], args.revision: []}
            for number in range(args.rounds):
                for name, source in zip(found, (ROOT / "src", other / "src"), strict=True):
                    found[name].append(rate(source, images, Path(folder) / f"{name}-{number}", args))
                    print(f"round {number + 1}: {name} {found[name][-1]:.1f} images/s", file=sys.stderr, flush=True)
        finally:
            subprocess.run([*git, "remove", "--force", str(other)], check=True, capture_output=True)
    ours = found["this checkout"]
    print(f"| {args.recipe} | images/s, median [min..max] | this checkout ÷ it |\n| --- | --- | --- |")
    for name, rates in found.items():
        median, low, high = spread(rates)
        print(f"| {name} | {median:.1f} [{low:.1f}..{high:.1f}] | {paired_ratio(ours, rates):.2f} |")


if __name__ == "__main__":
    main()
