# SPDX-License-Identifier: Apache-2.0
"""Pre-train the small backbone of docs/real-sets.md on the training splits of the real sets; go on after a kill.

    python benchmarks/real_sets/build.py --out SETS
    nice -n 19 python benchmarks/real_sets/train.py --sets SETS --out RUN --minutes 90

No image of a split that is scored is shown: emoji, composites of cut-outs and rooms by their train splits,
Fashion-MNIST by its 60 000 training images, photograph tiles without the backgrounds of the cut-outs' val split. Images
of a small set are named several times in the list, so that each set has its share of the steps.

RUN/sessions/*.json holds wall and CPU seconds of each time the script was started.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from opendino.cli.demo import seconds_per_step
from opendino.cli.pretrain import run
from opendino.errors import OpendinoError
from opendino.images.sources import open_source
from opendino.pretrain.config import PretrainConfig, load_recipe, parse_config
from opendino.pretrain.interrupts import TrainingStopped
from opendino.pretrain.lengths import with_steps

RECIPE = "vitt14_mixture"
NOTE_EVERY = 20.0  # seconds


@dataclass(frozen=True)
class Part:
    """A folder that is trained on, and how often each of its images is in an epoch."""

    folder: str
    repeats: int


MIXTURE = (
    Part("fashion-mnist/train", 1),
    Part("emoji/train", 22),
    Part("cutouts/images/train", 16),
    Part("rooms/images/train", 24),
    Part("room-objects/train", 16),
    Part("tiles", 6),
)
"""About 25, 31, 10, 12, 7 and 15 % of the images of an epoch."""


def main() -> None:
    """Start the run, or go on with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=Path, required=True, help="folder that build.py filled")
    parser.add_argument("--out", type=Path, required=True, help="run folder")
    parser.add_argument("--recipe", default=RECIPE)
    parser.add_argument(
        "--steps", type=int, help="of the whole schedule; default: the recipe's, or what --minutes allows"
    )
    parser.add_argument("--minutes", type=float, help="make the schedule as long as this, at the speed of now")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    config = configure(args.sets, args.out, args.recipe, args.seed)
    config = with_steps(config, length(config, args.steps, args.minutes))
    with Session(args.out / "sessions"):
        run(config)


def configure(sets: Path, out: Path, recipe: str, seed: int) -> PretrainConfig:
    """Give the recipe on the mixture of `sets`."""
    place = {"data": str(training_list(sets, out)), "out": str(out), "seed": seed}
    return load_recipe(recipe).model_copy(update=place)


def length(config: PretrainConfig, steps: int | None, minutes: float | None) -> int:
    """Give the number of steps: as asked for, of the run that is there, what the time allows, or the recipe's."""
    begun = Path(config.out) / "config.yaml"
    if steps:
        return steps
    if begun.is_file():
        return parse_config(begun.read_text(), str(begun)).steps
    return max(1, int(minutes * 60 / seconds_per_step(config))) if minutes else config.steps


def training_list(sets: Path, out: Path, mixture: tuple[Part, ...] = MIXTURE) -> Path:
    """Write the list of all images that are trained on, each as often as its set is repeated."""
    lines: list[str] = []
    for part in mixture:
        paths = [str(Path(item.path).resolve()) for item in open_source(sets / part.folder).items]
        lines += paths * part.repeats
        print(f"{part.folder}: {len(paths)} images, {part.repeats} times", flush=True)
    path = out / "train.txt"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


class Session:
    """Notes how long this process has been training, every few seconds, so that a kill loses little of the count."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.path = folder / f"{int(time.time())}-{os.getpid()}.json"
        self.start, self.cpu, self.done = time.time(), time.process_time(), threading.Event()
        self.thread = threading.Thread(target=self._keep, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *error: object) -> None:
        self.done.set()
        self.thread.join()

    def _keep(self) -> None:
        while True:
            ended = self.done.wait(NOTE_EVERY)
            spent = {"wall_s": time.time() - self.start, "cpu_s": time.process_time() - self.cpu}
            aside = self.path.with_suffix(".tmp")
            aside.write_text(json.dumps({"started": self.start, **spent, "nice": os.nice(0)}))
            aside.replace(self.path)
            if ended:
                return


if __name__ == "__main__":
    try:
        main()
    except OpendinoError as error:
        raise SystemExit(f"Error: {error}") from None
    except TrainingStopped as stopped:
        raise SystemExit(str(stopped)) from None
