# SPDX-License-Identifier: Apache-2.0
"""Pre-train the stages of `vitt14_open` on images whose licences allow it; go on after a kill, or another day.

    python benchmarks/open_model/build.py --out SETS
    nice python benchmarks/open_model/train.py --sets SETS --out RUNS --stage 1

Each stage is a run folder RUNS/stage1, RUNS/stage2 … that is trained by the recipe vitt14_open_1, … and starts from the
one before; where that folder is not there, from the released `vitt14_open` if it ended with that stage. Each set has
its share of the images of an epoch, whatever its size: images of a small set are named several times in the list.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from open_model.deepen import deepened_run
from opendino.cli.pretrain import run
from opendino.errors import DataError, OpendinoError
from opendino.images.sources import open_source
from opendino.models.packaged import packaged_weights
from opendino.models.registry import get_config
from opendino.pretrain.config import PretrainConfig, load_recipe
from opendino.pretrain.initialise import HEADS_FILE, with_start
from opendino.pretrain.interrupts import TrainingStopped
from opendino.pretrain.student_teacher import backbone_config
from real_sets.train import Session

SHARES = {
    "fashion-mnist": 1.0, "emoji": 0.8, "emoji-more": 0.6, "openclipart": 0.4, "icons": 0.2, "rooms": 0.5, "photos": 0.6
}  # fmt: skip
"""Images of a set in an epoch, as a part of Fashion-MNIST's 60 000; sets that are not there yet are left out."""
EPOCH = 60_000
NAME = "vitt14_open"


def main() -> None:
    """Start the stage, or go on with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=Path, required=True, help="folder that build.py filled")
    parser.add_argument("--out", type=Path, required=True, help="folder of the stages' run folders")
    parser.add_argument("--stage", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    out = args.out / f"stage{args.stage}"
    out.mkdir(parents=True, exist_ok=True)
    place = {"data": str(training_list(args.sets, out)), "data_may_change": True, "out": str(out), "seed": args.seed}
    config = load_recipe(f"{NAME}_{args.stage}").model_copy(update=place)
    if args.stage > 1:
        config = with_start(started_from(config, args.out / f"stage{args.stage - 1}", out / "start"))
    with Session(out / "sessions"):
        run(config)


def started_from(config: PretrainConfig, before: Path, start: Path) -> PretrainConfig:
    """Give the settings of a stage that starts from the teacher and heads of the one before, made as deep as it is."""
    weights = str(start)
    if not before.is_dir() and not start.is_dir():
        last = released_stages()[-1]["recipe"]
        if last != f"{NAME}_{before.name.removeprefix('stage')}":
            raise DataError(f"{before} is not there, and the released {NAME} ends with {last}. Train the stage before.")
        weights = NAME
    elif not (start / HEADS_FILE).exists():
        deepened_run(before, start, get_config(config.model.arch, **backbone_config(config)).depth)
    return config.model_copy(update={"init": config.init.model_copy(update={"weights": weights})})


def released_stages() -> list[dict[str, Any]]:
    """Give what the released file says of the stages that it was trained in."""
    path = packaged_weights(NAME)
    assert path is not None
    with safe_open(path, "pt") as file:
        return list(json.loads(file.metadata()["opendino.training"]))


def training_list(sets: Path, out: Path) -> Path:
    """Write the list of all images that are trained on, each as often as its set's share asks for."""
    lines: list[str] = []
    for name, share in SHARES.items():
        if not (sets / name).is_dir():
            print(f"{name}: not there, left out", flush=True)
            continue
        paths = [str(Path(item.path).resolve()) for item in open_source(sets / name).items]
        repeats = max(1, round(share * EPOCH / len(paths)))
        lines += paths * repeats
        print(f"{name}: {len(paths)} images, {repeats} times", flush=True)
    path = out / "train.txt"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


if __name__ == "__main__":
    try:
        main()
    except OpendinoError as error:
        raise SystemExit(f"Error: {error}") from None
    except TrainingStopped as stopped:
        raise SystemExit(str(stopped)) from None
