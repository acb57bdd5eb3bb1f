# SPDX-License-Identifier: Apache-2.0
"""Which settings leave the plateau at ln K soonest? One-factor trials of the small recipe at an equal number of images.

    python benchmarks/small_runs.py --data demo/train.txt --probe demo/data/emoji --out trials --images 4800

Every trial writes one JSON line to OUT/trials.jsonl: the settings it changes, the first and last DINO loss as a gap to
ln K, teacher entropy, feature rank, and the k-NN score (k = 20, mean per class) of PROBE before and after. Trials that
are in the file already are not repeated. docs/small-runs.md shows what came out.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from opendino.cli.probing import knn_probe
from opendino.pretrain.config import PretrainConfig, load_recipe
from opendino.pretrain.lengths import with_steps
from opendino.pretrain.trainer import Trainer

Change = dict[str, Any]
BASE: Change = {
    "batch_size": 64, "model.depth": 6, "crops.num_local": 6, "loss.teacher_temp": 0.05,
    "loss.warmup_teacher_temp": 0.04, "loss.warmup_teacher_temp_steps": 214, "optim.lr": 1.5e-3,
    "optim.min_lr": 1.5e-5, "optim.momentum": 0.99,
}  # fmt: skip
"""Where the trials started from; vitt14_demo is what came out of them ("together")."""
TRIALS: dict[str, Change] = {
    "none": {},
    "seed 1": {"seed": 1},
    "together": {
        "optim.lr": 5e-4,
        "optim.momentum": 0.98,
        "batch_size": 32,
        "loss.teacher_temp": 0.04,
        "model.depth": 4,
        "crops.num_local": 4,
    },
    "no BatchNorm in the heads": {"heads.batch_norm": False},
    "LayerScale 1e-5": {"model.init_values": 1e-5},
    "LayerScale 0.1": {"model.init_values": 0.1},
    "teacher temperature 0.04 to 0.07": {"loss.teacher_temp": 0.07, "loss.warmup_teacher_temp": 0.04},
    "teacher temperature 0.04": {"loss.teacher_temp": 0.04, "loss.warmup_teacher_temp": 0.04},
    "prototypes 256": {"heads.num_prototypes": 256},
    "prototypes 4096": {"heads.num_prototypes": 4096},
    "lr 5e-4": {"optim.lr": 5e-4},
    "lr 3e-3": {"optim.lr": 3e-3},
    "batch 32": {"batch_size": 32},
    "batch 128": {"batch_size": 128},
    "published crop scales": {"crops.global_scale": (0.32, 1.0), "crops.local_scale": (0.05, 0.32)},
    "momentum 0.98": {"optim.momentum": 0.98},
    "momentum 0.996": {"optim.momentum": 0.996},
    "moving centre": {"loss.centering": "moving"},
    "no KoLeo": {"loss.koleo_weight": 0.0},
    "two local crops": {"crops.num_local": 2},
    "depth 3": {"model.depth": 3},
    "depth 12": {"model.depth": 12},
    "crops of 84 and 42 px": {"crops.global_size": 84, "crops.local_size": 42},
}


def changed(config: PretrainConfig, change: Change) -> PretrainConfig:
    """Give the config with dotted settings replaced."""
    values = config.model_dump()
    for key, value in change.items():
        *groups, name = key.split(".")
        place = values
        for group in groups:
            place = place[group]
        place[name] = value
    return PretrainConfig(**values)


def run_trial(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train one variant over `args.images` images and give its line."""
    config = changed(changed(load_recipe(args.recipe), BASE), TRIALS[name])
    config = with_steps(config, args.images // config.batch_size)
    out = args.out / name.replace(" ", "_").replace(",", "")
    update = {"data": args.data, "out": str(out), "num_workers": 0, "checkpoint_every": 10**9, "log_every": 5}
    records: list[dict[str, Any]] = []
    probe = knn_probe(Path(args.probe))
    trainer = Trainer(config.model_copy(update=update), on_step=records.append)
    before = probe(trainer.teacher.eval())
    started = time.perf_counter()
    trainer.train()
    minutes = (time.perf_counter() - started) / 60
    last, ln_k = records[-10:], math.log(config.heads.num_prototypes)
    health = [r for r in records if "teacher_entropy" in r][-1]
    return {
        "trial": name, "change": TRIALS[name], "images": args.images, "steps": config.steps, "minutes": minutes,
        "dino_gap": ln_k - sum(r["dino"] for r in last) / len(last),
        "ibot_gap": ln_k - 2 * sum(r["ibot"] for r in last) / len(last),
        "dino_gap_curve": [round(ln_k - r["dino"], 4) for r in records[:: max(len(records) // 20, 1)]],
        "teacher_entropy_gap": ln_k - health["teacher_entropy"], "feature_rank": health["feature_rank"],
        "before": before, "after": probe(trainer.teacher.eval()),
    }  # fmt: skip


def main() -> None:
    """Run the trials that OUT/trials.jsonl does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--probe", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", default="vitt14_demo")
    parser.add_argument("--images", type=int, default=4_800)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=list(TRIALS), default=list(TRIALS), metavar="TRIAL")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "trials.jsonl"
    done = {json.loads(line)["trial"] for line in path.read_text().splitlines()} if path.exists() else set()
    for name in args.only:
        if name in done:
            continue
        line = json.dumps(run_trial(name, args))
        with path.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)


if __name__ == "__main__":
    main()
