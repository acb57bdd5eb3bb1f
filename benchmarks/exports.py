# SPDX-License-Identifier: Apache-2.0
"""How close and how fast exported files are, against PyTorch in fp32, taken in turn within one process.

    python benchmarks/exports.py runs/first vits14 vits14_reg --images photos/ --rounds 9

A name gets random weights that are spread out (official ones differ little from zero and hide errors). Results go to
stdout as Markdown, progress to stderr. Needs the extra `export`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import opendino
from opendino.export.exporter import export_backbone
from opendino.export.images import batch_of, photographs
from opendino.export.session import open_session
from opendino.export.verify import one_minus_cosine, reference
from opendino.images.preprocess import Preprocess
from opendino.models.registry import MODELS
from opendino.models.vit import VisionTransformer

HEAD = (
    "| model | file | MB | export s | max abs | cls 1−cos | patch 1−cos | speed ÷ torch fp32 |\n" + "| --- " * 8 + "|"
)
CASES = [
    (".onnx", "fp32", None), (".onnx", "fp16", None), (".onnx", "int8", None),
    (".xml", "fp32", None), (".xml", "fp32", "bf16"), (".xml", "fp16", None), (".xml", "int8", None),
]  # fmt: skip


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--images", help="default: two photographs that scikit-learn carries")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dynamic", action="store_true")
    return parser.parse_args()


def spread_out(name: str) -> VisionTransformer:
    """Give an architecture with weights as different from each other as trained ones are."""
    torch.manual_seed(0)
    model = opendino.load(name, weights="random")
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "norm" in key and key.endswith("weight"):
                p.copy_(1 + 0.2 * torch.randn_like(p))
            elif key.endswith("gamma"):
                p.copy_(0.5 * torch.exp(0.5 * torch.randn_like(p)))
            elif key.endswith("bias"):
                p.normal_(std=0.05)
            elif "pos_embed" in key or "token" in key:
                p.normal_(std=0.5)
            else:
                p.mul_(2)
    return model


def main() -> None:
    """Export every case of every model, compare, time in turn, print the table."""
    args = parse()
    images = photographs(args.images, 3)
    print(HEAD)
    for name in args.models:
        model = spread_out(name) if name in MODELS else opendino.load(name)
        with tempfile.TemporaryDirectory() as folder:
            for row in rows_of(model, images, args, Path(folder)):
                print(f"| {Path(name).name} | {row} |", flush=True)


def rows_of(model: VisionTransformer, images: list[torch.Tensor], args: argparse.Namespace, folder: Path) -> list[str]:
    """Give the table's rows of one model."""
    pixels = batch_of(images, model.preprocess, (args.size, args.size), args.batch, model.config.patch_size)
    x = Preprocess(model.preprocess).normalise(pixels)
    want, rows = reference(model, x), []
    calls: dict[str, Callable[[], object]] = {"torch": lambda: reference(model, x)}
    for suffix, precision, compute in CASES:
        path = folder / f"{precision}{suffix}"
        start = time.perf_counter()
        if not path.exists():
            size = {"dynamic": True} if args.dynamic else {"size": args.size}
            export_backbone(model, path, precision=precision, images=images, allow=True, **size)
        seconds = time.perf_counter() - start
        session = open_session(path, precision=compute)
        got = session.run(x.numpy())
        away = max(float(abs(got[n] - want[n]).max()) for n in ("cls", "patches"))
        cls, patch = (one_minus_cosine(got[n], want[n]) for n in ("cls", "patches"))
        label = f"{suffix} {precision}" + (f", run in {compute}" if compute else "")
        calls[label] = lambda session=session: session.run(x.numpy())
        megabytes = sum(p.stat().st_size for p in (path, path.with_suffix(".bin")) if p.exists()) / 1e6
        export = "" if compute else f"{seconds:.0f}"
        rows.append([label, f"{megabytes:.0f}", export, f"{away:.1e}", f"{cls.max():.1e}", f"{patch.mean():.1e}"])
        print(f"{label}: {seconds:.0f} s", file=sys.stderr)
    ratios = in_turn(calls, args.rounds)
    return [" | ".join([*row, ratios[row[0]]]) for row in rows]


def in_turn(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, str]:
    """Time every call once a round; give torch's time over each one's, median and range of the rounds."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number:  # the first is a warm-up
                times[name].append(time.perf_counter() - start)
    out = {}
    for name, own in times.items():
        each = [t / o for t, o in zip(times["torch"], own)]
        out[name] = f"{statistics.median(each):.2f} [{min(each):.2f}..{max(each):.2f}]"
    return out


if __name__ == "__main__":
    main()
