# SPDX-License-Identifier: Apache-2.0
"""How long from scratch to a stated k-NN on Fashion-MNIST? opendino and lightly-train, one after the other.

    python benchmarks/fashion_mnist.py --peer opendino --minutes 6 --out DIR
    python benchmarks/fashion_mnist.py --peer lightly-train --minutes 14 --out DIR
    python benchmarks/fashion_mnist.py --peer lightly-train-matched --minutes 14 --out DIR
    python benchmarks/fashion_mnist.py --table DIR

Same backbone, crops, augmentations and images (60 000 PNG files, no labels); every peer in its own training loop, with
the precision and the number of loader workers that are fastest for it, found before the run. Schedules are as long as
the run. The clock stands still while features are scored: k = 20, temperature 0.07, cls token of the teacher, 10 000
training images (1 000 a class) against the 10 000 test images, in fp32, the same code for all.

DIR/PEER.json holds the settings of a run, DIR/PEER.jsonl a line per score. A run that was interrupted goes on where it
was (opendino) or starts again (lightly-train); a finished one is left alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fashion_mnist_lightly import VARIANTS, lightly_train_run
from opendino.evaluate.knn import knn_accuracy
from opendino.pretrain.config import PretrainConfig, load_recipe
from opendino.pretrain.lengths import with_steps
from opendino.pretrain.trainer import Trainer
from opendino.sample_data.fashion_mnist import FashionMnist, build_fashion_mnist, load_fashion_mnist

RECIPE = "vitt7_fashion"
TARGETS = (72.0, 73.0, 74.0, 75.0, 76.0, 77.0)
CHOICES = [(precision, workers) for precision in ("fp32", "bf16") for workers in (0, 2)]
PROBE_STEPS, PROBE_SECONDS, PROBE_WARMUP = 20, 20.0, 3
PEERS = ("opendino", *VARIANTS)
Settings = dict[str, Any]


class Scorer:
    """k-NN of a backbone that gives its cls token, on images held in memory."""

    def __init__(self, data: FashionMnist, config: PretrainConfig) -> None:
        self.config, bank = config, data.bank()
        self.train, self.train_y = self._prepare(data.train_images[bank]), torch.tensor(data.train_labels[bank]).long()
        self.test, self.test_y = self._prepare(data.test_images), torch.tensor(data.test_labels).long()

    def _prepare(self, images: Any) -> torch.Tensor:
        c = self.config.crops
        x = torch.tensor(images)[:, None].float() / 255  # (n, 1, 28, 28)
        if c.global_size != x.shape[-1]:
            x = F.interpolate(x, size=(c.global_size,) * 2, mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (c.mean, c.std))
        return (x - mean) / std

    def __call__(self, model: torch.nn.Module) -> float:
        """Give top-1 in percent."""
        was_training = model.training
        model.eval()
        with torch.inference_mode(), torch.autocast("cpu", enabled=False):
            train, test = (torch.cat([model(x) for x in part.split(250)]) for part in (self.train, self.test))
        model.train(was_training)
        scores = knn_accuracy(train, self.train_y, test, self.test_y, k=(20,), temperature=0.07)
        return scores["top1"]["20"]


class Clock:
    """Training seconds without those of scoring; scores every so many of them, into a file.

    Args:
        path: the file of lines; existing ones are kept.
        every: training seconds between scores.
        score: gives the k-NN of now.
        start: seconds already spent by an earlier part of the run.
    """

    def __init__(self, path: Path, every: float, score: Callable[[], float], start: float = 0.0) -> None:
        self.path, self.every, self.score, self.spent = path, every, score, start
        self.next = every * (start // every + 1)
        self.running_since = time.perf_counter()

    def begin(self) -> None:
        """Start counting: the first batch has not been asked for."""
        self.running_since = time.perf_counter()

    def step(self, steps: int, loss: float, last: bool) -> bool:
        """Count a step that just ended; say whether it was scored."""
        now = time.perf_counter()
        self.spent, self.running_since = self.spent + now - self.running_since, now
        if self.spent < self.next and not last:
            return False
        while self.next <= self.spent:
            self.next += self.every
        self.write(steps, loss)
        self.running_since = time.perf_counter()
        return True

    def write(self, steps: int, loss: float | None = None) -> None:
        """Score and append a line."""
        line = json.dumps({"seconds": round(self.spent, 2), "steps": steps, "knn": self.score(), "loss": loss})
        with self.path.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)


# --- opendino ------------------------------------------------------------------------------------------------------


def opendino_config(settings: Settings, data: Path, run: Path) -> PretrainConfig:
    """Give the recipe over the steps of this run."""
    config = with_steps(recipe(settings), settings["steps"])
    never = {"checkpoint_every": 10**9, "probe_every": 10**9, "log_every": 100}
    place = {"data": str(data), "out": str(run), "device": "cpu"}
    loop = {"precision": settings["precision"], "num_workers": settings["workers"]}
    return config.model_copy(update=never | place | loop)


def recipe(settings: Settings) -> PretrainConfig:
    """Give the recipe with the settings that the command line replaces."""
    values = load_recipe(RECIPE).model_dump()
    for key, value in settings["set"].items():
        *groups, name = key.split(".")
        place = values
        for group in groups:
            place = place[group]
        assert name in place, key
        place[name] = value
    return PretrainConfig(**values)


def opendino_run(settings: Settings, data: Path, out: Path, score: Callable[[torch.nn.Module], float]) -> None:
    """Train, or go on from the last score, at which a checkpoint is written off the clock."""
    path = out / "opendino.jsonl"
    trainer = Trainer(opendino_config(settings, data, out / "run-opendino"))
    lines = [line for line in read_lines(path) if line["steps"] <= trainer.step] if trainer.step else []
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    start = lines[-1]["seconds"] if lines else 0.0
    clock = Clock(path, settings["every"], lambda: score(trainer.teacher), start)

    def on_step(record: dict[str, Any]) -> None:
        if clock.step(trainer.step, record["loss"], trainer.step == settings["steps"]):
            trainer.save()
            clock.begin()

    trainer.on_step = on_step
    if not lines:
        clock.write(0)
    clock.begin()
    trainer.train()


def opendino_speed(settings: Settings, data: Path, run: Path) -> float:
    """Give steps a second."""
    times: list[float] = []

    def on_step(record: dict[str, Any]) -> None:
        times.append(time.perf_counter())
        if enough(times):
            raise EnoughError

    trainer = Trainer(opendino_config(settings, data, run), on_step=on_step)
    with contextlib.suppress(EnoughError):
        trainer.train()
    return rate(times)


class EnoughError(Exception):
    """Leaves a training loop once its speed is known."""


def enough(times: list[float]) -> bool:
    """Say whether the ends of steps so far tell the speed."""
    counted = len(times) - PROBE_WARMUP
    return counted >= PROBE_STEPS or (counted >= 2 and times[-1] - times[PROBE_WARMUP - 1] > PROBE_SECONDS)


def rate(times: list[float]) -> float:
    """Give steps a second after the warm-up steps."""
    return (len(times) - PROBE_WARMUP) / (times[-1] - times[PROBE_WARMUP - 1])


# --- settings and table --------------------------------------------------------------------------------------------


def probe(args: argparse.Namespace, data: Path) -> None:
    """Print the speed of one precision and number of workers, in a process of its own."""
    precision, workers = args.probe
    settings = {"steps": 10**6, "precision": precision, "workers": int(workers), "set": args.set, "every": 1e9}
    run = args.out / f"probe-{args.peer}-{precision}-{workers}"
    shutil.rmtree(run, ignore_errors=True)
    if args.peer == "opendino":
        speed = opendino_speed(settings, data, run)
    else:
        times: list[float] = []

        def on_step(step: int, loss: float, model: torch.nn.Module) -> bool:
            times.append(time.perf_counter())
            return enough(times)

        lightly_train_run(args.peer, recipe(settings), settings, data, run, lambda model: None, on_step)
        speed = rate(times)
    shutil.rmtree(run, ignore_errors=True)
    print(f"\nsteps a second: {speed}", flush=True)


def choose(args: argparse.Namespace) -> Settings:
    """Find the fastest precision and number of workers, and how many steps the minutes hold."""
    speeds = {}
    for precision, workers in CHOICES:
        command = [sys.executable, __file__, *sys.argv[1:], "--probe", precision, str(workers)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = [line for line in done.stdout.splitlines() if line.startswith("steps a second: ")]
        if not found:
            raise SystemExit(f"{args.peer} did not train in {precision} with {workers} workers:\n{done.stderr[-3000:]}")
        speeds[precision, workers] = float(found[-1].split(": ")[1])
        print(f"{args.peer}: {precision}, {workers} workers: {speeds[precision, workers]:.3f} steps/s", flush=True)
    precision, workers = max(speeds, key=lambda choice: speeds[choice])
    return {
        "peer": args.peer, "precision": precision, "workers": workers, "set": args.set, "every": args.every,
        "minutes": args.minutes, "steps": max(int(speeds[precision, workers] * args.minutes * 60), 10),
        "speeds": {f"{p}, {w} workers": v for (p, w), v in speeds.items()}, "threads": args.threads,
        "torch": torch.__version__, "cpu": f"{platform.processor()} {torch.backends.cpu.get_cpu_capability()}",
        "amx": torch.cpu._is_amx_tile_supported(),
    }  # fmt: skip


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL file; what an interruption left half-written is dropped."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def table(out: Path) -> str:
    """Give the Markdown table of the times to each target, with the ratio to opendino."""
    runs = {peer: read_lines(out / f"{peer}.jsonl") for peer in PEERS}
    rows = [
        "| peer | " + " | ".join(f"{t:g}" for t in TARGETS) + " | start | best | last | minutes | steps |",
        "| --- |" + " --- |" * (len(TARGETS) + 5),
    ]
    ours = [first_time(runs["opendino"], t) for t in TARGETS]
    for peer, lines in runs.items():
        if not lines:
            continue
        cells = []
        for target, own in zip(TARGETS, ours):
            seconds = first_time(lines, target)
            ratio = f" ({seconds / own:.1f}×)" if peer != "opendino" and seconds is not None and own else ""
            cells.append("–" if seconds is None else f"{seconds:.0f} s{ratio}")
        scores = [line["knn"] for line in lines]
        last = lines[-1]
        ends = f"{scores[0]:.1f} | {max(scores):.1f} | {scores[-1]:.1f} | {last['seconds'] / 60:.1f} | {last['steps']}"
        rows.append(f"| {peer} | {' | '.join(cells)} | {ends} |")
    return "\n".join(rows)


def first_time(lines: list[dict[str, Any]], target: float) -> float | None:
    """Give the training seconds of the first score that reaches the target."""
    return next((line["seconds"] for line in lines if line["knn"] >= target), None)


def main() -> None:
    """Run one peer, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=PEERS)
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--every", type=float, default=20.0, help="training seconds between scores")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", type=json.loads, default={}, help='settings of the recipe, as {"optim.lr": 1e-3}')
    parser.add_argument("--table", type=Path, metavar="DIR", help="print the table of DIR and end")
    parser.add_argument("--probe", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.table:
        print(table(args.table))
        return
    if not args.peer or not args.out:
        parser.error("give --peer and --out, or --table")
    os.environ |= {"OMP_NUM_THREADS": str(args.threads), "MKL_NUM_THREADS": str(args.threads)}
    torch.set_num_threads(args.threads)
    run(args)


def run(args: argparse.Namespace) -> None:
    """Make the images, find the settings, train."""
    args.out = args.out.resolve()
    data, images = load_fashion_mnist(), args.out / "images"
    if not (images / "done").exists():
        build_fashion_mnist(data, images)
        (images / "done").touch()
    if args.probe:
        probe(args, images / "train")
        return
    path, settings_path = args.out / f"{args.peer}.jsonl", args.out / f"{args.peer}.json"
    if not settings_path.exists():
        settings_path.write_text(json.dumps(choose(args), indent=1))
    settings = json.loads(settings_path.read_text())
    lines = read_lines(path)
    if lines and lines[-1]["steps"] >= settings["steps"]:
        print(f"{path} is finished.")
        return
    score = Scorer(data, recipe(settings))
    if args.peer == "opendino":
        opendino_run(settings, images / "train", args.out, score)
        return
    path.unlink(missing_ok=True)
    lightly(args, settings, images / "train", path, score)


def lightly(args: argparse.Namespace, settings: Settings, data: Path, path: Path, score: Scorer) -> None:
    """Train lightly-train from scratch with the same clock."""
    models: list[torch.nn.Module] = []
    clock = Clock(path, settings["every"], lambda: score(models[0]))

    def on_start(model: torch.nn.Module) -> None:
        models.append(model)
        clock.write(0)
        clock.begin()

    def on_step(step: int, loss: float, model: torch.nn.Module) -> bool:
        clock.step(step, loss, step == settings["steps"])
        return False

    folder = args.out / f"run-{args.peer}"
    shutil.rmtree(folder, ignore_errors=True)
    lightly_train_run(args.peer, recipe(settings), settings, data, folder, on_start, on_step)


if __name__ == "__main__":
    main()
