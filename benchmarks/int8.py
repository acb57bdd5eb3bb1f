# SPDX-License-Identifier: Apache-2.0
"""int8 feed-forward layers against bf16: speed on random weights, and closeness with k-NN answers of trained ones.

    python benchmarks/int8.py speed vits14 vitb14 --threads 1
    python benchmarks/int8.py agreement --model RUN --data DIR --cache DIR

Speed: 224 px, batch 8, both in turn; CPU time with one thread, else time on the wall; the median of the rounds' ratios.
Agreement: DIR/train and DIR/test hold a folder of images for each class; 20-NN (temperature 0.07) of the cls tokens,
and the share of test images that get the same class as by fp32 vectors. Vectors are kept in --cache, so that a run that
was ended goes on. A JSON line each on stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import opendino
from opendino.embed.embedder import Embedder
from opendino.embed.runtimes.int8 import MOST_CALIBRATION, Int8ViT
from opendino.embed.runtimes.measure import distances
from opendino.embed.runtimes.prepared import PreparedViT
from opendino.evaluate.knn import knn_predict

PRECISIONS = ("fp32", "bf16", "int8", "int8-calibrated")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    speed = commands.add_parser("speed")
    speed.add_argument("models", nargs="+")
    speed.add_argument("--threads", type=int, default=1)
    speed.add_argument("--batch", type=int, default=8)
    speed.add_argument("--rounds", type=int, default=9)
    agreement = commands.add_parser("agreement")
    for name in ("--model", "--data", "--cache"):
        agreement.add_argument(name, required=True)
    agreement.add_argument("--train", type=int, help="images of the training set, spread over it; default all")
    agreement.add_argument("--test", type=int)
    return parser.parse_args()


def speed(name: str, threads: int, batch: int, rounds: int) -> dict[str, Any]:
    """Time both prepared backbones in turn."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    model, images = opendino.load(name, weights="random"), torch.randn(batch, 3, 224, 224)
    peers = {"bf16": PreparedViT(model, "bf16"), "int8": Int8ViT(model)}
    del model
    clock = time.process_time if threads == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {peer: [] for peer in peers}
    for turn in range(rounds + 1):
        for peer, ready in peers.items():
            start = clock()
            ready.tokens(images)
            if turn:  # the first one warms up
                seconds[peer].append(clock() - start)
    ratios = [a / b for a, b in zip(seconds["bf16"], seconds["int8"], strict=True)]
    return {
        "model": name, "threads": threads, "batch": batch, "ratio": median(ratios), "least": min(ratios),
        "most": max(ratios), **{f"{p} images/s": batch / median(s) for p, s in seconds.items()},
    }  # fmt: skip


def files(root: Path, most: int | None) -> tuple[list[Path], torch.Tensor]:
    """Give image files and their classes, evenly spread over the classes when fewer are wanted."""
    classes = sorted(p for p in root.iterdir() if p.is_dir())
    found = [(file, label) for label, folder in enumerate(classes) for file in sorted(folder.iterdir())]
    chosen = [found[i * len(found) // most] for i in range(most)] if most else found
    return [f for f, _ in chosen], torch.tensor([c for _, c in chosen])


def agreement(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Compare each precision with fp32."""
    parts = {n: files(Path(args.data) / n, most) for n, most in (("train", args.train), ("test", args.test))}
    (train, classes), (test, truth) = parts["train"], parts["test"]
    answers, exact = None, None
    for precision in PRECISIONS:
        step = max(1, len(train) // MOST_CALIBRATION)
        images = train[::step][:MOST_CALIBRATION] if precision == "int8-calibrated" else None
        embedder = Embedder(
            args.model, precision=precision.split("-")[0], what=["cls"], batch_size=256, workers=0, calibration=images
        )
        vectors = [cached(embedder, part, Path(args.cache) / f"{precision}-{len(part)}.npy") for part in (train, test)]
        found = knn_predict(vectors[0], classes, vectors[1], k=20)
        if answers is None or exact is None:
            answers, exact = found, vectors[1]
        apart = distances(vectors[1], exact)
        yield {
            "precision": precision, "train": len(train), "test": len(test),
            "same": 100 * float((found == answers).double().mean()),
            "accuracy": 100 * float((found == truth).double().mean()),
            "cls mean": float(apart.mean()), "cls worst": float(apart.max()),
        }  # fmt: skip


def cached(embedder: Embedder, images: list[Path], path: Path) -> torch.Tensor:
    """Give cls vectors, (n, D), from the cache or made now."""
    if not path.exists():
        print(f"{path.name}: embedding {len(images)} images", file=sys.stderr)
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = np.concatenate([features.cls for features in embedder.stream(images) if features.cls is not None])
        aside = path.with_name(f"{path.stem}.part.npy")
        np.save(aside, rows)
        aside.rename(path)
    return torch.from_numpy(np.load(path))


def main() -> None:
    """Print a line for each result."""
    args = parse()
    if args.command == "speed":
        lines: Any = (speed(name, args.threads, args.batch, args.rounds) for name in args.models)
    else:
        lines = agreement(args)
    for line in lines:
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
