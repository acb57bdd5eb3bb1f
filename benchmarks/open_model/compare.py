# SPDX-License-Identifier: Apache-2.0
"""Short trainings of the open model's backbone by opendino and lightly-train, on the same images, scored alike.

    python benchmarks/open_model/compare.py train --peer opendino --sets SETS --out OUT --steps 1500
    python benchmarks/open_model/compare.py train --peer lightly-train --sets SETS --out OUT --steps 1500
    python benchmarks/open_model/compare.py table --real-sets REAL --out OUT

lightly-train needs an environment of its own (benchmarks/requirements-lightly-train.txt). The recipe is that of the
second stage from a random start, twelve blocks and two crops of 56 px, with gradients and colours of every patch.

Same backbone, crops, colours, batch and list of images; each side has the learning rate that its recipe or its
defaults have. `--seconds` ends a training after so long, its schedules being those of --steps: a run of equal steps
and one of equal time are two runs. A peer and a seed are trained once; what is there is left alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fashion_mnist_lightly import VARIANTS, lightly_train_run
from open_model.train import training_list
from opendino.errors import OpendinoError
from opendino.models.registry import get_config
from opendino.models.vit import VisionTransformer
from opendino.models.weights import save_backbone
from opendino.pretrain.config import InitSettings, PretrainConfig, load_recipe
from opendino.pretrain.lengths import with_steps
from opendino.pretrain.student_teacher import backbone_config
from opendino.pretrain.trainer import Trainer, preprocessing_of

RECIPE, TARGETS = "vitt14_open_2", "vitt14_open_3"
PEERS = ("opendino", "opendino-dinov2", "opendino-targets", *VARIANTS)
"""opendino-dinov2 is the recipe without its targets of gradients and colours, opendino-targets that of the third stage:
nothing but those, without masks."""

FOLLOWS = {"lr": 1.0e-3, "momentum": 0.98, "momentum_end": 0.98}
"""Nobody asks the teacher there, so that it need not be steady: it is the student's mean over the last fifty steps."""


def recipe(peer: str, steps: int, seed: int) -> PretrainConfig:
    """Give the settings of a run."""
    name = TARGETS if peer == "opendino-targets" else RECIPE
    config = with_steps(load_recipe(name), steps).model_copy(update={"seed": seed, "init": InitSettings()})
    if peer == "opendino-targets":
        optim = config.optim.model_copy(update=FOLLOWS)
        return config.model_copy(update={"cache_images": False, "crops": load_recipe(RECIPE).crops, "optim": optim})
    targets = {"hog_patches": "all"} if peer == "opendino" else {"hog_weight": 0.0}
    return config.model_copy(update={"loss": config.loss.model_copy(update=targets)})


def name_of(args: argparse.Namespace) -> str:
    """Name a run by all that decides it."""
    limit = f"-{args.seconds:g}s" if args.seconds else ""
    return f"{args.peer}-{args.steps}{limit}-seed{args.seed}"


def train(args: argparse.Namespace) -> None:
    """Train one peer with one seed and keep the teacher's backbone and what it took."""
    folder = args.out / name_of(args)
    if (folder / "backbone.safetensors").exists():
        print(f"{folder} is there")
        return
    folder.mkdir(parents=True, exist_ok=True)
    config, done = recipe(args.peer, args.steps, args.seed), {"steps": 0}
    begun: list[float] = []

    def on_step(steps: int) -> bool:
        done["steps"] = steps
        return bool(args.seconds) and time.perf_counter() - begun[0] > args.seconds

    teacher = (opendino_run if args.peer.startswith("opendino") else lightly_run)(args, config, folder, begun, on_step)
    seconds = time.perf_counter() - begun[0]
    shape = get_config(config.model.arch, **backbone_config(config))
    model = VisionTransformer(shape, preprocessing_of(config))
    model.load_state_dict({k: v.detach().float().cpu() for k, v in teacher.state_dict().items()})
    facts = {"peer": args.peer, "seed": args.seed, "seconds": round(seconds, 1), **done}
    save_backbone(model, folder / "backbone.safetensors", extra={"opendino.compare": json.dumps(facts)})
    (folder / "facts.json").write_text(json.dumps(facts))
    print(json.dumps(facts))


class EnoughError(Exception):
    """The time is up."""


def opendino_run(
    args: argparse.Namespace, config: PretrainConfig, folder: Path, begun: list[float], on_step: Any
) -> torch.nn.Module:
    """Train by opendino; the clock starts with the first batch asked for."""
    data = training_list(args.sets, folder)
    place = {"data": str(data), "out": str(folder / "run"), "checkpoint_every": 10**9, "probe_every": 10**9}

    def step(record: dict[str, Any]) -> None:
        if on_step(int(record["step"])):
            raise EnoughError

    trainer = Trainer(config.model_copy(update=place), on_step=step)
    begun.append(time.perf_counter())
    with contextlib.suppress(EnoughError):
        trainer.train()
    return trainer.teacher


def lightly_run(
    args: argparse.Namespace, config: PretrainConfig, folder: Path, begun: list[float], on_step: Any
) -> torch.nn.Module:
    """Train by lightly-train, on a folder of links to the same images, each as often as the list has it."""
    links, found = folder / "images", list[torch.nn.Module]()
    links.mkdir(exist_ok=True)
    for i, line in enumerate(training_list(args.sets, folder).read_text().splitlines()):
        link = links / f"{i:06d}{Path(line).suffix}"
        if not link.is_symlink():
            link.symlink_to(line)
    torch.manual_seed(args.seed)

    def start(model: torch.nn.Module) -> None:
        found.append(model)
        begun.append(time.perf_counter())

    def step(steps: int, loss: float, model: torch.nn.Module) -> bool:
        return bool(on_step(steps))

    settings = {"steps": args.steps, "precision": args.precision, "workers": args.workers}
    lightly_train_run(args.peer, config, settings, links, folder / "run", start, step)
    return found[0]


def table(args: argparse.Namespace) -> None:
    """Score every run that is there by the tasks of the real sets, and write OUT/table.json and OUT/table.md."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "real_sets"))  # its table.py, not ours
    from describers import Backbone
    from rich.progress import Progress

    import opendino
    from table import COLUMNS, SCORES, make_cell

    lines = ["| | steps | seconds | " + " | ".join(c.heading for c in COLUMNS) + " |"]
    lines.append("| --- |" + " ---: |" * (2 + len(COLUMNS)))
    rows = []
    with Progress(transient=True) as progress:
        for facts_file in sorted(args.out.glob("*/facts.json")):
            facts = json.loads(facts_file.read_text())
            model = opendino.load(str(facts_file.parent / "backbone.safetensors"), device="cpu")
            row = Backbone(facts_file.parent.name, model)
            cells = {t: make_cell(t, row, args.real_sets, args.out / "vectors", progress) for t in SCORES}
            rows.append(facts | {"cells": cells})
            shown = [f"{cells[c.task][c.figure]:.{1 if c.rising else 3}f}" for c in COLUMNS]
            lines.append(
                f"| {facts['peer']}, seed {facts['seed']} | {facts['steps']} | {facts['seconds']:.0f} | "
                + " | ".join(shown) + " |"
            )  # fmt: skip
            print(lines[-1])
    (args.out / "table.json").write_text(json.dumps(rows, indent=1))
    (args.out / "table.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Train or score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("train", help="train one peer with one seed")
    command.set_defaults(run=train)
    command.add_argument("--peer", choices=PEERS, required=True)
    command.add_argument("--sets", type=Path, required=True, help="folder that build.py filled")
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--steps", type=int, required=True, help="length of the schedules, and of the run")
    command.add_argument("--seconds", type=float, help="end the run after so long")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of lightly-train")
    command.add_argument("--workers", type=int, default=0, help="of lightly-train's loader")
    command = commands.add_parser("table", help="score what was trained")
    command.set_defaults(run=table)
    command.add_argument(
        "--real-sets", type=Path, required=True, help="folder that benchmarks/real_sets/build.py filled"
    )
    command.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    try:
        main()
    except OpendinoError as error:
        raise SystemExit(f"Error: {error}") from None
