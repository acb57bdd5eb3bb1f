# SPDX-License-Identifier: Apache-2.0
"""`opendino demo`: the features of `vitt14_open`, and what training on real photographs changes; a report of both."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from opendino.cli.demo_report import write_report
from opendino.cli.pretrain import run as pretrain
from opendino.embed.embedder import Embedder
from opendino.evaluate.knn import knn_accuracy
from opendino.evaluate.retrieval import mean_average_precision, same_source_recall
from opendino.images.decode import decode_image
from opendino.images.sources import open_source
from opendino.models.vit import VisionTransformer
from opendino.pretrain.config import PretrainConfig, load_recipe, parse_config
from opendino.pretrain.initialise import with_start
from opendino.pretrain.lengths import with_steps
from opendino.pretrain.trainer import Trainer
from opendino.sample_data.demo import DemoData, build_demo_data

K = 20
WARM_STEPS, TIMED_STEPS = 5, 20
Describe = Callable[[list[str]], Tensor]
SCORES = {
    "emoji": "emoji k-NN, mean per class",
    "objects": "cut-outs k-NN",
    "labelled": "photographs k-NN",
    "retrieval": "emoji retrieval mAP medium",
    "heldout": "other crops of a photograph",
}


@dataclass(frozen=True)
class Args:
    """Arguments of `opendino demo`."""

    out: Path = Path("demo")
    """folder of the data, the run and report.html"""
    recipe: str = "vitt14_demo_open"
    """recipe to train by; this one goes on with vitt14_open, vitt14_demo begins at random"""
    steps: int | None = None
    """optimiser steps; the recipe's by default, fewer when they would take longer than --minutes"""
    minutes: float = 4.0
    """longest training time: on a slow machine the recipe is shortened to fit, and says so"""
    seed: int = 0


def main(argv: list[str]) -> int:
    """Build the small sets, train, score and write the report."""
    import tyro

    description = (
        "Score a small open DINOv2, train it further on real photographs, score it again.\n\n"
        "Example:\n  opendino demo --out demo --steps 100"
    )
    run_demo(tyro.cli(Args, args=argv, prog="opendino demo", description=description))
    return 0


def run_demo(args: Args) -> dict[str, dict[str, float]]:
    """Run the demo and give the score table: row → score → percent."""
    console = Console()
    started = time.perf_counter()
    data = build_demo_data(args.out / "data")
    update = {
        "data": str(training_list(data, args.out)),
        "out": str(args.out / f"run-seed{args.seed}"),
        "seed": args.seed,
    }
    config = load_recipe(args.recipe).model_copy(update=update)
    if config.init.weights:
        config = with_start(config)
    start = config.init.weights or "before training"
    console.print(f"Scoring raw pixels and {config.init.weights or 'the untrained model'} …")
    table = {"raw 16×16 pixels": score_all(data, raw_pixels)}
    with tempfile.TemporaryDirectory() as folder:
        fresh = Trainer(config.model_copy(update={"out": folder})).teacher
        table[start] = score_all(data, describe_with(fresh))
    config = with_length(config, args, console)
    pretrain(config)
    trained = Trainer(config).teacher
    console.print("Scoring the trained model …")
    table["after training"] = score_all(data, describe_with(trained))
    show(console, table)
    (args.out / f"scores-seed{args.seed}.json").write_text(json.dumps(table, indent=1))
    minutes = (time.perf_counter() - started) / 60
    report = write_report(args.out, Path(config.out), data, table, trained, describe_with(trained), minutes)
    console.print(f"{minutes:.1f} minutes. Open {report}")
    return table


def with_length(config: PretrainConfig, args: Args, console: Console) -> PretrainConfig:
    """Fix the number of steps: that of --steps or of the run being continued, else the recipe's or what time allows."""
    begun = Path(config.out) / "config.yaml"
    if args.steps:
        return with_steps(config, args.steps)
    if begun.is_file():
        return with_steps(config, parse_config(begun.read_text(), str(begun)).steps)
    allowed = int(args.minutes * 60 / seconds_per_step(config))
    if allowed >= config.steps:
        return config
    console.print(
        f"This machine makes about {allowed} steps in {args.minutes:g} minutes; the recipe's {config.steps} are "
        f"shortened to that. --minutes gives it longer.",
        highlight=False,
    )
    return with_steps(config, max(allowed, 1))


def seconds_per_step(config: PretrainConfig) -> float:
    """Time a few steps of a run that is thrown away; its first steps, which warm up, do not count."""
    times: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        short = config.model_copy(update={"out": folder, "steps": WARM_STEPS + TIMED_STEPS, "checkpoint_every": 10**9})
        Trainer(short, on_step=lambda record: times.append(config.batch_size / record["images_per_s"])).train()
    return sum(times[WARM_STEPS:]) / TIMED_STEPS


def training_list(data: DemoData, out: Path) -> Path:
    """Write the file list that is trained on: photograph tiles, and the training splits of emoji and cut-outs."""
    folders = [data.tiles, *(f / "train" for f in (data.emoji, data.objects) if f)]
    path = out / "train.txt"
    path.write_text("".join(f"{Path(item.path).resolve()}\n" for f in folders for item in open_source(f).items))
    return path


def show(console: Console, table: dict[str, dict[str, float]]) -> None:
    """Print the score table."""
    drawn = Table(Column("percent", no_wrap=True, min_width=max(map(len, table))), *SCORES.values())
    for row, scores in table.items():
        drawn.add_row(row, *(f"{scores[s]:.1f}" if s in scores else "–" for s in SCORES))
    console.print(drawn)


def describe_with(model: VisionTransformer) -> Describe:
    """Make a function from paths to L2-normalised cls tokens (n, D); each image is embedded once."""
    model.eval()
    embedder = Embedder(model, precision="fp32", batch_size=64, what=("cls",))
    known: dict[str, Tensor] = {}

    def describe(paths: list[str]) -> Tensor:
        new = [path for path in dict.fromkeys(paths) if path not in known]
        if new:
            known.update(zip(new, normalize(torch.as_tensor(embedder(new).cls), dim=1), strict=True))
        return torch.stack([known[path] for path in paths])

    return describe


def raw_pixels(paths: list[str]) -> Tensor:
    """The baseline: 16×16 pixels, mean taken off, L2-normalised, (n, 768)."""
    small = [interpolate(decode_image(p)[None].float(), size=(16, 16), mode="area").flatten() for p in paths]
    x = torch.stack(small)
    return normalize(x - x.mean(1, keepdim=True), dim=1)


def score_all(data: DemoData, describe: Describe) -> dict[str, float]:
    """Give every score of SCORES that the data allows, in percent."""
    scores = {}
    if data.emoji:
        scores["emoji"] = knn_score(data.emoji / "train", data.emoji / "test", describe, "mean_per_class")
        scores["retrieval"] = emoji_retrieval(data.emoji, describe)
    if data.objects:
        scores["objects"] = knn_score(data.objects / "train", data.objects / "val", describe, "top1")
    if data.labelled:
        scores["labelled"] = knn_score(data.labelled / "train", data.labelled / "test", describe, "top1")
    paths = [item.path for item in open_source(data.heldout).items]
    groups = [Path(p).stem.rsplit("_", 1)[0] for p in paths]
    scores["heldout"] = same_source_recall(describe(paths), groups)
    return scores


def knn_score(train: Path, test: Path, describe: Describe, figure: str) -> float:
    """k-NN of one pair of class folders, percent."""
    a, b = open_source(train), open_source(test)
    number = {name: i for i, name in enumerate(a.classes)}
    x, tx = (describe([i.path for i in s.items]) for s in (a, b))
    y, ty = (torch.tensor([number[str(i.label)] for i in s.items]) for s in (a, b))
    return float(knn_accuracy(x, y, tx, ty, k=(K,))[figure][str(K)])


def emoji_retrieval(root: Path, describe: Describe) -> float:
    """mAP medium of finding the same emoji by other vendors, percent."""
    task = json.loads((root / "retrieval.json").read_text())
    number = {p: i for i, p in enumerate(task["gallery"])}
    features = describe([str(root / p) for p in task["gallery"]])
    queries, rows = [], []
    for query in task["queries"]:
        row = number[query["query"]]
        lists = {kind: [number[p] for p in query[kind]] for kind in ("easy", "hard", "junk")}
        lists["junk"].append(row)
        queries.append(lists)
        rows.append(row)
    return mean_average_precision(features[rows] @ features.T, queries)["medium"]
