# SPDX-License-Identifier: Apache-2.0
"""`opendino eval depth`: a depth head on frozen patch tokens, trained and scored."""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from opendino.cli.embed import images_progress, show
from opendino.cli.evaluate.common import BackboneArgs, cache_folder
from opendino.errors import ConfigError, DataError

if TYPE_CHECKING:
    from opendino.evaluate.datasets.types import DepthSet
    from opendino.heads.depth import DepthEstimator, Prediction

EXAMPLE = """Train a depth head on frozen patch tokens and score it (RMSE, AbsRel, log10, δ1–3; mean over images).

Example:
  opendino eval depth --model vits14 --data rooms --head-kind lin4 --save-head depth.safetensors --json

ROOT has images/train, images/val and depth/train, depth/val with 16-bit PNGs under the same names; ROOT/depth.json may
say {"scale": 0.001, "min": 0.001, "max": 10, "crop": "none"}. Images are used at their own size unless --size is given.
Tokens are computed once and kept; a killed call goes on where it stopped."""
SHOWN = ("rmse", "abs_rel", "log10", "d1", "d2", "d3")


@dataclass(frozen=True, kw_only=True)
class DepthArgs(BackboneArgs):
    """Arguments of `opendino eval depth`."""

    data: Path
    """Images with depth."""
    train_split: str = "train"
    """Part of --data to train on."""
    val_split: str = "val"
    """Part of --data and of --transfer to score."""
    head_kind: Literal["lin1", "lin4", "dpt"] = "lin4"
    """Linear on the last block, linear on four blocks, or DPT."""
    head: Path | None = None
    """Score this head without training: what --save-head wrote, or a released .pth (NYU, KITTI)."""
    save_head: Path | None = None
    """Write the trained head here."""
    transfer: tuple[Path, ...] = ()
    """Other images with depth, scored with the same head and no training (SUN-RGBD in the paper)."""
    features: Literal["cached", "augmented"] = "cached"
    """cached computes tokens once; augmented crops, turns and colours images at each step, as published."""
    steps: int = 2000
    """Updates; the published training has 38400, with --features augmented --lr 1e-4."""
    batch_size: int = 16
    """Images in a step."""
    lr: float | None = None
    """Highest learning rate; default: 1e-2 for linear heads, 1e-3 for dpt."""
    weight_decay: float = 0.01
    """Of AdamW."""
    seed: int = 0
    """Of the head's first weights, the order and the augmentation."""
    channels: int = 256
    """Width of the DPT head."""
    flip: bool = True
    """Mean with the prediction of the mirrored image."""
    norm: bool = False
    """Read tokens after the final LayerNorm; the published heads read them without it."""
    max_depth: float | None = None
    """Metres; default: the data's, or what a released head was trained for."""
    page: Path | None = None
    """Write an HTML page with images, truth, predictions and errors."""
    pictures: int = 8
    """Images a set on the page: the worst and the best halves."""


def main(argv: list[str]) -> int:
    """Print the depth scores of a model."""
    args = tyro.cli(DepthArgs, args=argv, prog="opendino eval depth", description=EXAMPLE)
    result = run_depth(args)
    if args.json:
        print(json.dumps(result))
    else:
        print_table(result)
    return 0


def open_set(root: str | Path, split: str) -> DepthSet:
    """Open images with depth."""
    from opendino.evaluate.datasets.detect import open_depth

    return open_depth(root, split)


def run_depth(args: DepthArgs) -> dict[str, Any]:
    """Train, or load, and score; the figures of `opendino.evaluate.depth` for --data and each --transfer."""
    if args.fit != "crop":
        raise ConfigError(
            f"--fit is {args.fit!r}, but depth is predicted for the whole image: it is never cropped, and --size HxW "
            "gives it another shape. Leave --fit out."
        )
    if args.page is not None:
        from opendino.report.depth import check_extra

        check_extra()
    sets = {str(root): open_set(root, args.val_split) for root in (args.data, *args.transfer)}
    training: dict[str, Any] = {}
    with progress() as line:
        if args.head is None:
            estimator = _estimator(args, sets[str(args.data)])
            training = _train(args, estimator, line)
        else:
            estimator = _loaded(args)
        pages: dict[str, list[Any]] = {}
        scores = {root: _score(args, estimator, data, line, pages) for root, data in sets.items()}
    if args.save_head is not None:
        estimator.save(args.save_head)
    result = scores.pop(str(args.data)) | {"head": estimator.head, "data": str(args.data), **training}
    if args.transfer:
        result["transfer"] = scores
    if args.page is not None:
        _write_page(args, estimator, result, pages)
    return result


def _common(args: DepthArgs) -> dict[str, Any]:
    return {
        "cache": cache_folder(args), "weights": args.weights, "device": args.device, "precision": args.precision,
        "batch": args.batch, "workers": args.workers,
    }  # fmt: skip


def _estimator(args: DepthArgs, data: DepthSet) -> DepthEstimator:
    import torch

    from opendino.heads.depth import DepthEstimator
    from opendino.images.preprocess import parse_size

    if args.weights == "random":
        torch.manual_seed(0)  # the same model as in other commands
    return DepthEstimator(
        args.model, args.head_kind, min_depth=data.min_depth, max_depth=args.max_depth or data.max_depth,
        size=parse_size(args.size), flip=args.flip, norm=args.norm, features=args.features, steps=args.steps,
        batch_size=args.batch_size, lr=args.lr, weight_decay=args.weight_decay, seed=args.seed,
        channels=args.channels, **_common(args),
    )  # fmt: skip


def _loaded(args: DepthArgs) -> DepthEstimator:
    import torch

    from opendino.heads.hub_depth import open_depth_head
    from opendino.images.preprocess import parse_size

    if args.weights == "random":
        torch.manual_seed(0)
    assert args.head is not None
    estimator = open_depth_head(args.head, args.model, max_depth=args.max_depth, **_common(args))
    if args.size is not None:
        estimator.size = parse_size(args.size)
    estimator.flip = args.flip
    return estimator


def _train(args: DepthArgs, estimator: DepthEstimator, line: Any) -> dict[str, Any]:
    data = open_set(args.data, args.train_split)
    folder = cache_folder(args)
    state = None if folder is None else folder / "depth-heads" / f"{estimator.described(data)}.pt"
    estimator.fit(
        data, state=state, on_images=line("train: tokens"),
        on_step=lambda step, steps, loss: line.steps(step, steps, loss),
    )  # fmt: skip
    for name, why in estimator.left_out_:
        line.say(f"left out {name}: {why}")
    _check_errors(args, len(estimator.left_out_))
    tail = [x for x in estimator.losses_[-100:] if x == x]
    return {
        "num_train": len(data) - len(estimator.left_out_),
        "left_out_of_training": len(estimator.left_out_),
        "steps": args.steps,
        "final_loss": sum(tail) / max(len(tail), 1),
    }


def _score(
    args: DepthArgs, estimator: DepthEstimator, data: DepthSet, line: Any, pages: dict[str, list[Any]]
) -> dict[str, Any]:
    kept: list[tuple[float, int, Any]] = []
    best: list[tuple[float, int, Any]] = []
    half = max(args.pictures // 2, 1)

    def keep(prediction: Prediction, errors: dict[str, float] | None) -> None:
        if errors is None:
            line.say(f"left out {data.name(prediction.index)}: no pixel with a depth in the range")
        elif args.page is not None:
            found = (prediction, errors)
            for heap, key in ((kept, errors["rmse"]), (best, -errors["rmse"])):
                heapq.heappush(heap, (key, prediction.index, found))
                if len(heap) > half:
                    heapq.heappop(heap)

    result = estimator.score(data, on_images=line(f"score {data.root}"), on_prediction=keep)
    _check_errors(args, result["unreadable"])
    if args.page is not None:
        pages[data.root] = [(data, *found) for _, _, found in sorted(kept, reverse=True) + sorted(best)]
    return result


def _check_errors(args: DepthArgs, errors: int) -> None:
    if args.max_errors is not None and errors > args.max_errors:
        raise DataError(f"{errors} images cannot be used, more than --max-errors {args.max_errors}.")


def _write_page(
    args: DepthArgs, estimator: DepthEstimator, result: dict[str, Any], pages: dict[str, list[Any]]
) -> None:
    from opendino.report.depth import DepthExample, write_depth_page

    assert args.page is not None
    examples: dict[str, list[DepthExample]] = {}
    for root, shown in pages.items():
        seen: set[int] = set()
        examples[root] = []
        for data, prediction, errors in shown:
            if prediction.index not in seen:
                seen.add(prediction.index)
                image = data.image(prediction.index).permute(1, 2, 0).numpy()
                name = Path(data.name(prediction.index)).name
                examples[root].append(DepthExample(name, image, prediction.truth, prediction.depth, errors))
    rows = [[name, str(found["num_images"]), *(_figure(found, m) for m in SHOWN)] for name, found in _rows(result)]
    write_depth_page(
        args.page, f"Depth: {estimator.name}, {estimator.head}", ["set", "images", *SHOWN], rows, examples,
        estimator.min_depth, estimator.max_depth,
    )  # fmt: skip


def _rows(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(result["data"], result), *result.get("transfer", {}).items()]


def _figure(found: dict[str, Any], metric: str) -> str:
    return f"{found[metric]:.2f} %" if metric.startswith("d") else f"{found[metric]:.4f}"


def print_table(result: dict[str, Any]) -> None:
    """Print the scores for people."""
    if "num_train" in result:
        print(f"{result['head']} head, {result['num_train']} training images, {result['steps']} steps")
    width = max(len(name) for name, _ in _rows(result))
    print(f"{'':>{width}}{'images':>8}" + "".join(f"{m:>10}" for m in SHOWN))
    for name, found in _rows(result):
        left = found["without_valid_depth"] + found["unreadable"]
        note = f"  ({left} left out: no valid depth, or unreadable)" if left else ""
        print(f"{name:>{width}}{found['num_images']:>8}" + "".join(f"{_figure(found, m):>10}" for m in SHOWN) + note)


class Lines:
    """Progress lines on standard error: one per pass over images, one for the training."""

    def __init__(self, bar: Any) -> None:
        self.bar, self._training = bar, None

    def __call__(self, name: str) -> Any:
        """Add a line and give what moves it."""
        from time import perf_counter

        task, start = self.bar.add_task(name, total=None, rate="", errors=0), perf_counter()
        return lambda done, errors, total: show(
            self.bar, task, done, errors, total, done / max(perf_counter() - start, 1e-9)
        )

    def steps(self, step: int, steps: int, loss: float) -> None:
        """Move the line of the training."""
        if self._training is None:
            self._training = self.bar.add_task("train: steps", total=steps, rate="", errors=0)
        self.bar.update(self._training, completed=step, rate=f"loss {loss:.3f}")

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self.bar.console.print(text, highlight=False, markup=False)


@contextmanager
def progress() -> Iterator[Lines]:
    """Show progress lines."""
    with images_progress() as bar:
        yield Lines(bar)
