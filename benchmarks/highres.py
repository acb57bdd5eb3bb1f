# SPDX-License-Identifier: Apache-2.0
"""Does a short stage at twice the resolution pay? A stage at 196 px against as many steps at 98 px, two seeds.

    nice -n 10 python benchmarks/highres.py --sets SETS --out WORK
    nice -n 10 python benchmarks/highres.py --sets SETS --out WORK --base RUN --arms high steps --more 50

SETS is what benchmarks/real_sets/build.py makes. A small ViT/14 is trained at 98 px on the training splits of cut-outs,
rooms and emoji, and on tiles; this stage is shared. Or it is RUN, which real_sets/train.py made at 84 px, shared by all
seeds. Then it goes on in one of three ways, with the same schedules, compressed:

    high     at 196 px
    steps    at 98 px, for as many steps
    time     at 98 px, for as many steps as take the CPU time of `high`

Every teacher is scored at 98 and 196 px: k-NN (k = 20, mean per class) on emoji and on single pieces of furniture, and
mIoU on the cut-outs' val split by the closed-form linear head of benchmarks/real_sets/dense.py. All held-out images
count; of the labelled training images one in --thin. Runs continue after a kill, scores that are in WORK/scores are not
computed again, WORK/table.md is written after each.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

import opendino
from opendino.embed.embedder import Embedder
from opendino.errors import OpendinoError
from opendino.evaluate.knn import knn_accuracy
from opendino.evaluate.segmentation import PixelConfusion
from opendino.images.sources import open_source
from opendino.models.vit import VisionTransformer
from opendino.pretrain.config import PretrainConfig, load_recipe, parse_config
from opendino.pretrain.interrupts import TrainingStopped
from opendino.pretrain.lengths import with_steps
from opendino.pretrain.trainer import Trainer
from real_sets.dense import fit_segmenter, segment
from real_sets.train import Part, training_list

MIXTURE = (Part("emoji/train", 2), Part("cutouts/images/train", 3), Part("rooms/images/train", 3), Part("tiles", 1))
"""About 32, 22, 17 and 29 % of the images of an epoch."""
LOW, HIGH, LOCAL = 98, 196, 42
K = 20
COLUMNS = (("emoji", "emoji k-NN"), ("objects", "furniture k-NN"), ("cutouts", "cut-outs mIoU"))


# --- training ------------------------------------------------------------------------------------------------------


def configure(args: argparse.Namespace, seed: int, arm: str, steps: int) -> PretrainConfig:
    """Give the run of one arm: the shared stage, and what follows it."""
    data, base = str(args.out / "train.txt"), with_steps(load_recipe("vitt14_mixture"), args.steps)
    values: dict[str, Any] = base.model_dump() | {"batch_size": args.batch, "data": data}
    values["crops"] |= {"global_size": LOW, "local_size": LOCAL}
    values["optim"] |= {"momentum": 0.98}
    if args.base:
        base = parse_config((args.base / "config.yaml").read_text(), str(args.base))
        values = base.model_dump()
    stage: dict[str, Any] = {"name": arm, "steps": steps, "compress_schedules": True, "data": data}
    stage |= {"batch_size": args.batch, "crops": {"global_size": HIGH if arm == "high" else LOW}}
    # The teacher is what is scored: in so few steps it would hardly move at the momentum of a whole run.
    stage["optim"] = {"lr": base.optim.lr / 2, "momentum": 0.9}
    values |= {"seed": seed, "out": str(folder(args, seed, arm)), "checkpoint_every": 20, "probe_every": 10**6}
    values |= {"steps": base.steps + steps, "milestone_every": base.steps, "probe": None, "num_workers": 0}
    return PretrainConfig.model_validate(values | {"stages": [{"name": "low", "steps": base.steps}, stage]})


def folder(args: argparse.Namespace, seed: int, arm: str) -> Path:
    """Where a run lies."""
    return Path(args.out) / f"seed{seed}-{arm}"


def train(config: PretrainConfig, begin: Path | None = None) -> None:
    """Train to the end, or go on; from the checkpoint at the switch of the run `begin`, or from nothing."""
    out, switch = Path(config.out), f"step_{config.stages[0].steps:08d}"
    if begin is not None and not (out / "checkpoints").exists():
        aside = out / ".checkpoints"
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(begin / "checkpoints" / switch, aside / switch)
        aside.rename(out / "checkpoints")
    began = time.process_time()

    def on_step(record: dict[str, Any]) -> None:
        nonlocal began
        now = time.process_time()
        with (out / "cpu.jsonl").open("a") as file:
            file.write(json.dumps({"stage": record["stage"], "cpu_s": now - began}) + "\n")
        began = now
        if record["step"] % 20 == 0:
            print(f"{out.name} step {record['step']}/{config.steps} loss {record['loss']:.3f}", flush=True)

    Trainer(config, on_step=on_step).train()


def seconds_per_step(run: Path, stage: str) -> float:
    """CPU seconds of the middle step of a stage."""
    lines = [json.loads(line) for line in (run / "cpu.jsonl").read_text().splitlines()]
    return median(line["cpu_s"] for line in lines if line["stage"] == stage)


# --- scores --------------------------------------------------------------------------------------------------------


def vectors(model: VisionTransformer, paths: list[str], size: int, what: str) -> npt.NDArray[np.float32]:
    """cls tokens (n, D), or patch tokens (n, g, g, D)."""
    found = Embedder(model, precision="bf16", batch_size=32, size=size, fit="resize", what=(what,))(paths)
    assert not any(found.errors), found.errors
    if what == "cls":
        assert found.cls is not None
        return found.cls
    assert found.patches is not None
    return found.patches.reshape(len(paths), *found.grid, -1)


def knn(model: VisionTransformer, root: Path, size: int, every: int) -> float:
    """Mean per class of k-NN from ROOT/train to ROOT/test or ROOT/val, percent."""
    held_out = root / "test" if (root / "test").is_dir() else root / "val"
    sides: list[npt.NDArray[Any]] = []
    number = {name: i for i, name in enumerate(open_source(root / "train").classes)}
    for place, step in ((root / "train", every), (held_out, 1)):
        items = open_source(place).items[::step]
        sides += [vectors(model, [i.path for i in items], size, "cls"), np.array([number[i.label] for i in items])]
    return float(knn_accuracy(*sides, k=(K,))["mean_per_class"][str(K)])


def miou(model: VisionTransformer, root: Path, size: int, every: int) -> float:
    """MIoU of the linear head over all classes of the cut-outs' val split, percent."""
    classes = (root / "classes.txt").read_text().split("\n")
    classes = [c for c in classes if c]
    parts = {}
    for split in ("train", "val"):
        paths = [i.path for i in open_source(root / "images" / split).items][:: every if split == "train" else 1]
        files = [root / "masks" / split / f"{Path(p).stem}.png" for p in paths]
        parts[split] = vectors(model, paths, size, "patches"), np.stack([np.array(Image.open(f)) for f in files])
    head = fit_segmenter(*parts["train"], len(classes))
    x, masks = parts["val"]
    confusion = PixelConfusion(len(classes))
    predicted = np.concatenate(list(segment(head, x, masks.shape[1])))
    for prediction, truth in zip(predicted, masks, strict=True):
        confusion.add(prediction, truth)
    return float(confusion.scores().miou)


def score(args: argparse.Namespace, name: str, weights: Path) -> None:
    """Compute the figures of a teacher that are not in WORK/scores yet."""
    for size in (LOW, HIGH):
        path = args.out / "scores" / f"{name}-{size}.json"
        if path.exists():
            continue
        began = time.process_time()
        model = opendino.load(weights).eval()
        figures = {
            "emoji": knn(model, args.sets / "emoji", size, args.thin),
            "objects": knn(model, args.sets / "room-objects", size, args.thin),
            "cutouts": miou(model, args.sets / "cutouts", size, args.thin),
            "cpu_s": time.process_time() - began,
        }
        aside = path.with_suffix(".tmp")
        aside.write_text(json.dumps(figures))
        aside.rename(path)
        print(name, size, {k: round(v, 2) for k, v in figures.items()}, flush=True)
        write_table(args)


# --- the table -----------------------------------------------------------------------------------------------------

ROWS = (("low", "after the shared stage"), ("high", "+ stage at 196 px"), ("steps", "+ as many steps at 98 px"),
        ("time", "+ as much CPU time at 98 px"))  # fmt: skip


def write_table(args: argparse.Namespace) -> None:
    """Write WORK/table.md: a row for each way to go on, the mean over seeds and each seed's figure behind it."""
    heads = [f"{title}, {size} px" for _, title in COLUMNS for size in (LOW, HIGH)]
    lines = ["| | steps | CPU s | " + " | ".join(heads) + " |", "| --- " * (3 + len(heads)) + "|"]
    for row, title in ROWS:
        cells = []
        for key, _ in COLUMNS:
            for size in (LOW, HIGH):
                found = [
                    json.loads(p.read_text())[key] for p in sorted((args.out / "scores").glob(f"*-{row}-{size}.json"))
                ]
                each = " / ".join(f"{v:.1f}" for v in found)
                cells.append(f"{mean(found):.1f} ({each})" if len(found) > 1 else each)
        lines.append(f"| {title} | {' | '.join(cost(args, row))} | {' | '.join(cells)} |")
    (args.out / "table.md").write_text("\n".join(lines) + "\n")


def cost(args: argparse.Namespace, row: str) -> list[str]:
    """Steps and CPU seconds of a row's own stage, the mean over seeds."""
    steps, seconds = [], []
    for seed in args.seeds:
        run = folder(args, seed, "high" if row == "low" else row)
        if (run / "cpu.jsonl").exists() and f'"{row}"' in (run / "cpu.jsonl").read_text():
            steps.append(json.loads((run / "stages.json").read_text())[row])
            seconds.append(steps[-1] * seconds_per_step(run, row))
    return [f"{mean(steps):.0f}", f"{mean(seconds):.0f}"] if steps else ["", ""]


def main() -> None:
    """Train and score what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=Path, required=True, help="folder that real_sets/build.py filled")
    parser.add_argument("--out", type=Path, required=True, help="work folder")
    parser.add_argument("--base", type=Path, help="a run that is the shared stage")
    parser.add_argument("--steps", type=int, default=320, help="of the shared stage")
    parser.add_argument("--more", type=int, default=100, help="of the stage after it")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--thin", type=int, default=4, help="one in so many labelled training images counts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--arms", nargs="+", default=["high", "steps", "time"], choices=["high", "steps", "time"])
    args = parser.parse_args()
    (args.out / "scores").mkdir(parents=True, exist_ok=True)
    if not (args.out / "train.txt").exists():
        training_list(args.sets, args.out, MIXTURE)
    for seed in args.seeds:
        for arm in args.arms:
            go_on(args, seed, arm)
    print((args.out / "table.md").read_text())


def go_on(args: argparse.Namespace, seed: int, arm: str) -> None:
    """Train and score one arm of one seed; the shared stage is trained with `high` and scored with it."""
    shared, steps = folder(args, seed, "high"), args.more
    if arm == "time":
        ratio = seconds_per_step(shared, "high") / seconds_per_step(folder(args, seed, "steps"), "steps")
        steps = round(args.more * ratio)
    config = configure(args, seed, arm, steps)
    run = Path(config.out)
    run.mkdir(exist_ok=True)
    if (run / "stages.json").exists():  # the length was measured when the run began
        steps = json.loads((run / "stages.json").read_text())[arm]
        config = configure(args, seed, arm, steps)
    (run / "stages.json").write_text(json.dumps({s.name: s.steps for s in config.stages}))
    if args.base:
        if seed == args.seeds[0]:
            score(args, f"seed{seed}-low", args.base / "weights" / "teacher.safetensors")
        train(config, args.base)
    else:
        train(config, None if arm == "high" else shared)
        if arm == "high":
            score(args, f"seed{seed}-low", run / "weights" / "teacher_low.safetensors")
    score(args, f"seed{seed}-{arm}", run)


if __name__ == "__main__":
    try:
        main()
    except OpendinoError as error:
        raise SystemExit(f"Error: {error}") from None
    except TrainingStopped as stopped:
        raise SystemExit(str(stopped)) from None
