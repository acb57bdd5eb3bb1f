# SPDX-License-Identifier: Apache-2.0
"""Does a small student learn more from a larger trained teacher than by itself? Goes on after a kill.

    python benchmarks/real_sets/build.py --out SETS
    python benchmarks/real_sets/train.py --sets SETS --out TEACHER --steps 2400
    nice -n 10 python benchmarks/distillation.py --sets SETS --teacher TEACHER --out OUT --steps 600

Arms, each with the same student, images, crops, batch and number of steps, by the recipe of the teacher's run:

- alone: `opendino pretrain`;
- paper: `opendino distill --mode paper`;
- features: `opendino distill --mode features`.

Every model is scored by k-NN (k = 20, cls token at the size of the crops) on emoji, train against test, mean per class,
and on Fashion-MNIST, 1 000 training images of each class against the 10 000 test images, top-1. The random start is
scored too. OUT/scores.jsonl has a line for each model; what is in it already is not done again. docs/distillation.md
shows what came out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from opendino.cli.distill import distill_defaults
from opendino.cli.pretrain import run
from opendino.embed.embedder import Embedder
from opendino.evaluate.knn import knn_accuracy
from opendino.images.sources import open_source
from opendino.models.registry import get_config
from opendino.models.vit import VisionTransformer
from opendino.models.weights import load
from opendino.pretrain.config import PretrainConfig, parse_config
from opendino.pretrain.lengths import with_steps
from opendino.pretrain.student_teacher import backbone_config
from real_sets.train import training_list

ARMS = ("alone", "paper", "features")
STUDENT = {"embed_dim": 96, "depth": 3, "num_heads": 3}
K = 20
PER_CLASS = 1000
Scores = dict[str, float]


def main() -> None:
    """Train and score what is not there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=Path, required=True, help="folder that real_sets/build.py filled")
    parser.add_argument("--teacher", type=Path, required=True, help="run folder with heads")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    images = args.out / "train.txt"
    if not images.is_file():
        training_list(args.sets, args.out)
    probes, done = Probes(args.sets), read_scores(args.out)
    teacher = load(args.teacher)
    if "teacher" not in done:
        write_score(args.out, "teacher", probes.score(teacher), 0.0)
    wanted = [(arm, seed) for arms in (ARMS, ("random",)) for seed in args.seeds for arm in arms]
    for arm, seed in wanted:
        if (name := f"{arm} {seed}") not in done:
            config = configure(arm, args.teacher, images, args.out / f"{arm}-{seed}", seed, args.steps, args.batch_size)
            began = time.process_time()
            if arm == "random":
                torch.manual_seed(seed)
                backbone = VisionTransformer(
                    get_config(config.model.arch, **backbone_config(config)), teacher.preprocess
                )
            else:
                run(config, quiet=True)
                backbone = load(config.out)
            spent = time.process_time() - began
            write_score(args.out, name, probes.score(backbone.eval()), spent)
    print(table(read_scores(args.out), args.seeds))


def configure(
    arm: str, teacher: Path, images: Path, out: Path, seed: int, steps: int, batch_size: int
) -> PretrainConfig:
    """Give the settings of one arm: those of the teacher's run with the student's shape."""
    if arm in ("alone", "random"):
        config = parse_config((teacher / "config.yaml").read_text(), str(teacher))
    else:
        config = distill_defaults(str(teacher), "vitt14", mode=arm)  # type: ignore[arg-type]
    model = config.model.model_copy(update=STUDENT)
    place: dict[str, Any] = {"data": str(images), "out": str(out), "seed": seed, "milestone_every": None}
    return with_steps(config, steps).model_copy(update=place | {"model": model, "batch_size": batch_size})


class Probes:
    """The images that models are scored on, listed once."""

    def __init__(self, sets: Path) -> None:
        self.parts = {
            "emoji": (labelled(sets / "emoji/train"), labelled(sets / "emoji/test")),
            "fashion": (labelled(sets / "fashion-mnist/train", PER_CLASS), labelled(sets / "fashion-mnist/test")),
        }

    def score(self, backbone: VisionTransformer) -> Scores:
        """Give k-NN scores in percent."""
        embedder = Embedder(backbone, batch_size=128, size=backbone.preprocess.crop, what=("cls",))
        found = {}
        for name, (train, test) in self.parts.items():
            arrays = [torch.as_tensor(embedder(paths).cls) for paths, _ in (train, test)]
            scores = knn_accuracy(arrays[0], torch.tensor(train[1]), arrays[1], torch.tensor(test[1]), k=(K,))
            found[name] = scores["mean_per_class" if name == "emoji" else "top1"][str(K)]
        return found


def labelled(folder: Path, per_class: int | None = None) -> tuple[list[str], list[int]]:
    """Give paths and classes of a folder, the first so many of each class."""
    source = open_source(folder)
    numbers = {name: i for i, name in enumerate(source.classes)}
    counts = dict.fromkeys(numbers, 0)
    paths, classes = [], []
    for item in source.items:
        counts[item.label] += 1
        if per_class is None or counts[item.label] <= per_class:
            paths.append(str(item.path))
            classes.append(numbers[item.label])
    return paths, classes


def read_scores(out: Path) -> dict[str, dict[str, Any]]:
    """Read OUT/scores.jsonl by model."""
    path = out / "scores.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return {record["model"]: record for record in map(json.loads, lines)}


def write_score(out: Path, model: str, scores: Scores, cpu_s: float) -> None:
    """Add a line to OUT/scores.jsonl and print it."""
    record = {"model": model, **{k: round(v, 2) for k, v in scores.items()}, "cpu_s": round(cpu_s, 1)}
    with (out / "scores.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(record, flush=True)


def table(scores: dict[str, dict[str, Any]], seeds: list[int]) -> str:
    """Write the scores of each arm: every seed, and the mean."""
    columns = ("emoji", "fashion")
    lines = ["| arm | emoji, mean per class | Fashion-MNIST, top-1 | CPU seconds |", "| --- | --- | --- | --- |"]
    if "teacher" in scores:
        lines.append(f"| teacher | {scores['teacher']['emoji']:.1f} | {scores['teacher']['fashion']:.1f} | |")
    for arm in ("random", *ARMS):
        rows = [scores[f"{arm} {seed}"] for seed in seeds if f"{arm} {seed}" in scores]
        if rows:
            cells = [
                ", ".join(f"{r[c]:.1f}" for r in rows) + f" (**{statistics.mean(r[c] for r in rows):.1f}**)"
                for c in columns
            ]
            lines.append(f"| {arm} | {cells[0]} | {cells[1]} | {statistics.mean(r['cpu_s'] for r in rows):.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
