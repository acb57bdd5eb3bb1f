# SPDX-License-Identifier: Apache-2.0
"""What continuing from a trained backbone gives on another kind of images: 500, 20 000 grey, four channels, and many.

    nice -n 10 python benchmarks/adaptation.py --sets SETS --start RUN --many LIST --out WORK
    python benchmarks/adaptation.py --out WORK --picture docs/pictures/adaptation.png

SETS is what benchmarks/real_sets/build.py made, RUN a run of vitt14_mixture. Every arm is a run of `opendino pretrain`
in WORK/runs; one that was killed is continued, one that is finished is not repeated. WORK/results.jsonl has a line an
arm: the k-NN score (k = 20, top 1, percent) and the rank of 256 images from step 0 on, and the seconds of processor
time. docs/adaptation.md shows what came out.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from opendino.cli.pretrain import read_arguments, run
from opendino.pretrain.guard import FeaturesError
from opendino.pretrain.history import read_metrics, series

FEW, GREY, DEPTH, GALLERY, QUERIES = 500, 20_000, 1_500, 500, 500
MIN_OBJECT = 48
"""Shorter side in pixels from which an object of a room is cut out."""
COMMON = [
    "--recipe", "vitt14_continue", "--batch-size", "32", "--crops.global-size", "56", "--crops.local-size", "28",
    "--optim.momentum", "0.9", "--device", "cpu",
]  # fmt: skip
SLOW = ["--init.backbone-lr", "0.1", "--init.layerwise-decay", "0.75", "--optim.momentum", "0.99"]
ARMS: dict[str, tuple[str, list[str] | None]] = {
    "few: continued, tenth of the rate, slow teacher": ("few", SLOW),
    "few: continued": ("few", []),
    "grey: continued": ("grey", ["--model.in-chans", "1"]),
    "depth: continued, mean": ("depth", ["--model.in-chans", "4", "--init.stem", "mean"]),
    "depth: continued, keep": ("depth", ["--model.in-chans", "4", "--init.stem", "keep"]),
    "few: from scratch": ("few", None),
    "grey: from scratch": ("grey", None),
    "depth: from scratch": ("depth", None),
    "few: continued, new heads": ("few", ["--init.heads", "new"]),
    "many: continued": ("many", []),
    "many: from scratch": ("many", None),
}
"""Kind of images, and flags beside --init; None starts at random."""
CHANNELS = {
    "few": (3, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "many": (3, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "grey": (1, [0.449], [0.226]),
    "depth": (4, [0.449] * 4, [0.226] * 4),
}
"""Channels of a kind and the statistics of its random start: those that the weights bring."""


# --- images ----------------------------------------------------------------------------------------------------------


def build(sets: Path, out: Path) -> None:
    """Make OUT/KIND/images.txt, and OUT/KIND/probe/train and test as class folders, of every kind."""
    if (out / "done").exists():
        return
    shutil.rmtree(out, ignore_errors=True)
    build_few(sets / "emoji", out / "few")
    build_grey(sets / "fashion-mnist", out / "grey")
    build_depth(sets / "rooms", out / "depth")
    (out / "done").touch()


def build_few(emoji: Path, out: Path) -> None:
    """500 drawings of one vendor that the start has not seen; queries are other drawings of the vendor."""
    own = [p for part in ("val", "test") for p in sorted((emoji / part).glob("*/*_google.png"))]
    own = [own[i] for i in np.random.default_rng(0).permutation(len(own))[:FEW]]
    copy_classes(own, out / "probe" / "train")
    others = sorted((emoji / "train").glob("*/*_google.png"))
    copy_classes(others[:: len(others) // QUERIES], out / "probe" / "test")
    write_list(sorted((out / "probe" / "train").glob("*/*")), out)


def build_grey(fashion: Path, out: Path) -> None:
    """20 000 grey photographs; 500 of them are the gallery, and 500 of the test split the queries."""
    rng = np.random.default_rng(0)
    train, test = (sorted((fashion / part).glob("*/*.png")) for part in ("train", "test"))
    own = [train[i] for i in rng.permutation(len(train))[:GREY]]
    copy_classes(own[:GALLERY], out / "probe" / "train")
    copy_classes([test[i] for i in rng.permutation(len(test))[:QUERIES]], out / "probe" / "test")
    write_list(own, out)


def build_depth(rooms: Path, out: Path) -> None:
    """Objects cut out of rendered rooms by their masks, as red, green, blue and depth (0 to 10 m as 0 to 255)."""
    names = (rooms / "classes.txt").read_text().split()
    for part, into, most in (("train", "train", DEPTH), ("val", "test", QUERIES)):
        count = 0
        for path in sorted((rooms / "images" / part).iterdir()):
            stem = path.stem
            colour = np.asarray(Image.open(path).convert("RGB"))
            mask = np.asarray(Image.open(rooms / "masks" / part / f"{stem}.png"))
            depth = np.asarray(Image.open(rooms / "depth" / part / f"{stem}.png"), dtype=np.float32) / 1000
            pixels = np.dstack([colour, (depth.clip(0, 10) * 25.5).round().astype(np.uint8)])
            for label in np.unique(mask):
                name = names[label] if label < len(names) else "background"
                rows, columns = np.nonzero(mask == label)
                box = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
                if name in ("background", "wall", "floor", "ceiling") or label == 255 or count >= most:
                    continue
                if min(box[1] - box[0], box[3] - box[2]) < MIN_OBJECT:
                    continue
                folder = out / "probe" / into / name
                folder.mkdir(parents=True, exist_ok=True)
                np.save(folder / f"{stem}_{name}.npy", np.ascontiguousarray(pixels[box[0] : box[1], box[2] : box[3]]))
                count += 1
    write_list(sorted((out / "probe" / "train").glob("*/*")), out)


def build_many(listed: Path, out: Path) -> None:
    """All images of a list, each once; the queries are those of `few`."""
    (out / "many").mkdir(exist_ok=True)
    write_list([Path(line) for line in sorted(set(listed.read_text().splitlines()))], out / "many")
    if not (out / "many" / "probe").exists():
        shutil.copytree(out / "few" / "probe", out / "many" / "probe")


def copy_classes(paths: list[Path], folder: Path) -> None:
    """Copy images of class folders into class folders."""
    for path in paths:
        target = folder / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def write_list(paths: list[Path], out: Path) -> None:
    """Write the images that are trained on as a list."""
    (out / "images.txt").write_text("".join(f"{p.resolve()}\n" for p in paths))


# --- runs ------------------------------------------------------------------------------------------------------------


def arguments(name: str, start: Path, out: Path, steps: int) -> list[str]:
    """Give the words after `opendino pretrain` of an arm."""
    kind, flags = ARMS[name]
    channels, mean, std = CHANNELS[kind]
    every = str(max(steps // 4, 1))
    words = [*COMMON, "--data", str(out / "kinds" / kind / "images.txt"), "--out", str(folder_of(name, out))]
    words += ["--probe", str(out / "kinds" / kind / "probe"), "--steps", str(steps)]
    words += ["--probe-every", every, "--guard.every", every, "--checkpoint-every", every, "--guard.enabled", "True"]
    if flags is None:
        statistics = ["--crops.mean", *map(str, mean), "--crops.std", *map(str, std)]
        return [*words, "--model.in-chans", str(channels), *statistics]
    return [*words, "--init", str(start), *flags]


def folder_of(name: str, out: Path) -> Path:
    """Where an arm's run is."""
    return out / "runs" / name.replace(":", "").replace(",", "").replace(" ", "-")


def run_arm(name: str, start: Path, out: Path, steps: int) -> dict[str, Any]:
    """Train an arm, or the rest of it, and give its line."""
    config = read_arguments(arguments(name, start, out, steps))[0]
    began, stopped = time.process_time(), ""
    fresh = not (Path(config.out) / "checkpoints").is_dir()
    try:
        run(config, quiet=True)
    except FeaturesError as error:
        stopped = str(error)
    records = read_metrics(Path(config.out))
    events = Path(config.out) / "events.jsonl"
    told = [json.loads(line) for line in events.read_text().splitlines()] if events.exists() else []
    return {
        "arm": name, "steps": config.steps, "images": config.steps * config.batch_size,
        "cpu_seconds": round(time.process_time() - began) if fresh else None,
        "knn": series(records, "probe/knn20_top1"), "rank": series(records, "guard/feature_rank"),
        "stopped": stopped, "events": [[e["event"], e["reason"]] for e in told],
    }  # fmt: skip


# --- picture and table -----------------------------------------------------------------------------------------------


def results(out: Path) -> list[dict[str, Any]]:
    """Read the lines of the arms that are finished."""
    path = out / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(lines: list[dict[str, Any]]) -> str:
    """Give the arms as rows of Markdown."""
    head = "| images and start | images seen | k-NN before → after | best | feature rank | processor time |"
    rows = [head, "| --- | ---: | ---: | ---: | ---: | ---: |"]
    for line in lines:
        knn, rank = line["knn"], line["rank"]
        ended = "stopped" if line["stopped"] else f"{knn[-1][1]:.1f}"
        rows.append(
            f"| {line['arm']} | {line['images']} | {knn[0][1]:.1f} → {ended} | {max(v for _, v in knn):.1f} | "
            f"{rank[0][1]:.1f} → {rank[-1][1]:.1f} | {line['cpu_seconds'] or '–'} s |"
        )
    return "\n".join(rows)


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """Draw the k-NN curves, a panel a kind."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = {
        "few": "500 drawings",
        "grey": "20 000 grey photographs",
        "depth": "colour and depth",
        "many": "many images",
    }
    kinds = {k: title for k, title in titles.items() if any(line["arm"].startswith(k) for line in lines)}
    figure, axes = plt.subplots(1, len(kinds), figsize=(10, 3), dpi=90)
    for axis, (kind, title) in zip(axes, kinds.items(), strict=True):
        for line in lines:
            if line["arm"].startswith(kind):
                axis.plot(*zip(*line["knn"], strict=True), marker=".", lw=1.2, label=line["arm"].split(": ")[1])
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step (32 images)", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=6.5, frameon=False)
    axes[0].set_ylabel("k-NN, %", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None} if path.suffix == ".png" else None)


def main() -> None:
    """Run the arms that WORK/results.jsonl does not hold yet; print the table; draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=Path)
    parser.add_argument("--start", type=Path)
    parser.add_argument("--many", type=Path, help="list of many images, such as open_model/train.py writes")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--only", nargs="*", choices=list(ARMS), default=list(ARMS), metavar="ARM")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.sets and args.start:
        build(args.sets, args.out / "kinds")
        if args.many:
            build_many(args.many, args.out / "kinds")
        for name in args.only:
            if ARMS[name][0] == "many" and not args.many:
                print(f"{name}: left out, there is no --many", flush=True)
            elif name not in [line["arm"] for line in results(args.out)]:
                line = json.dumps(run_arm(name, args.start, args.out, args.steps))
                with (args.out / "results.jsonl").open("a") as file:
                    file.write(line + "\n")
                print(line, flush=True)
    print(table(results(args.out)))
    if args.picture:
        draw(results(args.out), args.picture)


if __name__ == "__main__":
    main()
