# SPDX-License-Identifier: Apache-2.0
"""What the suite can measure on given data: one cell for each protocol and set."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opendino.cli.evaluate.common import BackboneArgs
from opendino.errors import ConfigError, DataError

if TYPE_CHECKING:
    from opendino.cli.evaluate.suite import SuiteArgs

DEPTH_OF_SEARCH = 3
"""Levels below a given folder that are searched for data sets."""
TASKS = (
    "knn",
    "linear",
    "logreg",
    "multilabel",
    "other_test",
    "depth",
    "transfer",
    "segmentation",
    "fine_grained",
    "retrieval",
)
"""In the order of the model card's columns; logistic regressions beside the linear one."""
LEARN = ("train", "training")
SCORE = ("val", "validation", "valid", "test", "testing")
Result = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """One number of a cell's result.

    Attributes:
        title: of its column.
        unit: of the number.
        get: takes it out of the result; None where the result has none.
        lower_is_better: for errors.
    """

    title: str
    unit: str
    get: Callable[[Result], float | None]
    lower_is_better: bool = False


@dataclass(frozen=True)
class Place:
    """A data set that was found.

    Attributes:
        name: in the table: of a named set, or its folder.
        kind: what it can score.
        root: its folder.
        learn: split to learn from, or None.
        score: split to score, or None.
    """

    name: str
    kind: str
    root: Path
    learn: str | None
    score: str | None


@dataclass(frozen=True)
class Cell:
    """One protocol on one set.

    Attributes:
        task: one of TASKS.
        place: the set.
        measure: runs the protocol.
        figures: what of its result goes into the table.
        settings: JSON-able; what the result depends on beside weights, preprocessing and data.
        note: how it is measured, in a few words.
    """

    task: str
    place: Place
    measure: Callable[[], Result]
    figures: tuple[Figure, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    learned_from: Path | None = None
    """Other data that the result depends on: of the training that is applied here."""

    @property
    def name(self) -> str:
        """File name of its result."""
        return f"{self.task}--{self.place.name}".replace("/", "_").replace(" ", "-")


def find_cells(args: SuiteArgs) -> tuple[list[Cell], list[str]]:
    """Give the cells that the data allow, in the order of the table, and what was passed over, in words.

    Raises:
        ConfigError: for an unknown task.
        DataError: for a folder that does not exist.
    """
    unknown = set(args.tasks) - set(TASKS)
    if unknown:
        raise ConfigError(f"--tasks has {', '.join(sorted(unknown))}; there is {', '.join(TASKS)}.")
    places, passed_over = find_places(args.data)
    cells = [cell for place in places for cell in _cells(args, place, places)]
    wanted = [cell for cell in cells if not args.tasks or cell.task in args.tasks]
    return sorted(wanted, key=lambda c: TASKS.index(c.task)), passed_over


def find_places(roots: tuple[Path, ...]) -> tuple[list[Place], list[str]]:
    """Search folders for data sets; a set that no protocol fits is passed over, and its folders are searched."""
    places: list[Place] = []
    passed_over: list[str] = []
    for root in roots:
        root = root.expanduser()
        if not root.is_dir():
            raise DataError(f"--data {root} is no folder. Give a data set, or a folder that holds some.")
        found = list(_search(root, root, DEPTH_OF_SEARCH))
        places += found
        if not found:
            passed_over.append(f"{root}: no data set that a protocol fits.")
    return places, passed_over


def _search(path: Path, above: Path, levels: int) -> Iterator[Place]:
    from opendino.evaluate.datasets.detect import matches
    from opendino.evaluate.datasets.layout import subfolders

    try:
        layouts = matches(path)
    except DataError:
        layouts = []
    found = []
    for layout, root in layouts:
        named = layout.name not in (
            "class folders",
            "tables",
            "images with masks",
            "images with depth",
            "retrieval.json",
        )
        splits = layout.splits(root)
        learn = next((s for s in LEARN if s in splits), None)
        score = next((s for s in SCORE if s in splits), None)
        name = layout.name if named else path.relative_to(above).as_posix()
        name = path.resolve().name if name == "." else name
        if layout.kind == "retrieval":
            score = splits[0]
        if layout.name == "ImageNet-V2":
            score = splits[0]
        if score is not None and (learn is not None or layout.kind in ("retrieval", "depth") or named):
            found.append(Place(name, layout.kind, root, learn, score))
    yield from found
    if not found and levels:
        for name in subfolders(path):
            yield from _search(path / name, above, levels - 1)


def shared(args: BackboneArgs) -> dict[str, Any]:
    """Give the settings of model and images that every protocol takes."""
    kept = {f.name: getattr(args, f.name) for f in fields(BackboneArgs)}
    return kept | {"json": True}


def _cells(args: SuiteArgs, place: Place, places: list[Place]) -> list[Cell]:
    from opendino.evaluate.datasets import voc

    if place.kind == "classification" and place.name == "ImageNet-V2":
        return _other_test(args, place, places)
    if place.name == voc.MULTILABEL:
        return [_multilabel(args, place)]
    if place.kind == "classification" and place.learn is not None:
        return _classification(args, place)
    if place.kind == "segmentation" and place.learn is not None:
        return [_segmentation(args, place)]
    if place.kind == "depth":
        return _depth(args, place, places)
    return [_retrieval(args, place)] if place.kind == "retrieval" else []


def _splits(place: Place) -> dict[str, Any]:
    return {"data": place.root, "train_split": place.learn, "val_split": place.score}


def _classification(args: SuiteArgs, place: Place) -> list[Cell]:
    def knn() -> Result:
        from opendino.cli.evaluate.knn import KnnArgs, run_knn

        return run_knn(KnnArgs(**shared(args), **_splits(place), k=(10, 20, 100, 200)))

    def linear() -> Result:
        from opendino.cli.evaluate.linear import LinearArgs, run_linear

        return run_linear(LinearArgs(**shared(args), **_splits(place), **_steps(args)))

    def logreg() -> Result:
        from opendino.cli.evaluate.logreg import LogregArgs, run_logreg

        return run_logreg(LogregArgs(**shared(args), **_splits(place)))

    top1 = Figure("classification, k-NN", "%", lambda r: r["top1"]["20"])
    linear_task = "fine_grained" if place.name.startswith("iNaturalist") else "linear"
    return [
        Cell("knn", place, knn, (top1,), note="top-1, 20 neighbours"),
        Cell(
            linear_task, place, linear, (Figure("classification, linear", "%", lambda r: r["top1"]),),
            _steps(args), "top-1 of the best of the grid",
        ),
        Cell(
            "logreg", place, logreg, (Figure("classification, logistic", "%", lambda r: r["top1"]),),
            note="top-1, penalty picked on a tenth of the training images",
        ),
    ]  # fmt: skip


def _multilabel(args: SuiteArgs, place: Place) -> Cell:
    tested = place.root / "ImageSets" / "Main" / "aeroplane_test.txt"
    splits = ("trainval", "test") if tested.is_file() else ("train", "val")

    def multilabel() -> Result:
        from opendino.cli.evaluate.multilabel import MultilabelArgs, run_multilabel

        given: dict[str, Any] = {"data": place.root, "train_split": splits[0], "val_split": splits[1]}
        return run_multilabel(MultilabelArgs(**shared(args), **given))

    figure = Figure("classification, several classes", "mAP, %", lambda r: r["map_11_point"])
    note = f"logistic regression a class on {splits[0]}, 11-point average precision on {splits[1]}"
    return Cell("multilabel", place, multilabel, (figure,), note=note)


def _other_test(args: SuiteArgs, place: Place, places: list[Place]) -> list[Cell]:
    imagenet = next((p for p in places if p.name == "ImageNet-1k" and p.learn is not None), None)
    if imagenet is None:
        return []

    def other_test() -> Result:
        from opendino.cli.evaluate.robustness import RobustnessArgs, run_robustness

        assert imagenet is not None
        assert imagenet.learn is not None
        given: dict[str, Any] = {"train": imagenet.root / imagenet.learn, "v2": place.root}
        return run_robustness(RobustnessArgs(**shared(args), **given))

    figure = Figure("classification, other test set", "%", lambda r: r["sets"]["V2"]["top1"])
    note = "logistic regression on the training images"
    return [Cell("other_test", place, other_test, (figure,), note=note, learned_from=imagenet.root)]


def _steps(args: SuiteArgs) -> dict[str, Any]:
    return {} if args.steps is None else {"steps": args.steps}


def _segmentation(args: SuiteArgs, place: Place) -> Cell:
    settings = {"protocol": "ms" if args.multi_scale else "linear"} | _steps(args)

    def segmentation() -> Result:
        from opendino.cli.evaluate.segmentation import SegmentationArgs, run_segmentation

        return run_segmentation(SegmentationArgs(**shared(args), **_splits(place), **settings))

    title = "segmentation, multi-scale" if args.multi_scale else "segmentation, linear"
    figure = Figure(title, "mIoU, %", lambda r: r["miou"])
    return Cell("segmentation", place, segmentation, (figure,), settings, "linear head on patch tokens")


def _depth(args: SuiteArgs, place: Place, places: list[Place]) -> list[Cell]:
    teachers = [p for p in places if p.kind == "depth" and p.learn is not None]
    settings: dict[str, Any] = {"head_kind": args.depth_head} | _steps(args)
    title = {"lin1": "depth, linear, 1 layer", "lin4": "depth, linear, 4 layers", "dpt": "depth, DPT"}[args.depth_head]
    rmse = Figure(title, "RMSE, m", lambda r: r["rmse"], lower_is_better=True)
    if place.learn is not None:

        def depth() -> Result:
            from opendino.cli.evaluate.depth import DepthArgs, run_depth

            head = _depth_head(args, place, settings)
            return run_depth(DepthArgs(**shared(args), **_splits(place), **settings, save_head=head))

        return [Cell("depth", place, depth, (rmse,), settings, "head trained on frozen patch tokens")]
    return [_transfer(args, place, teacher, settings) for teacher in teachers[:1]]


def _transfer(args: SuiteArgs, place: Place, teacher: Place, settings: dict[str, Any]) -> Cell:
    def transfer() -> Result:
        from opendino.cli.evaluate.depth import DepthArgs, run_depth

        head = _depth_head(args, teacher, settings)
        if not head.is_file():
            run_depth(DepthArgs(**shared(args), **_splits(teacher), **settings, save_head=head))
        return run_depth(DepthArgs(**shared(args), data=place.root, val_split=str(place.score), head=head))

    figure = Figure(f"depth, transfer from {teacher.name}", "RMSE, m", lambda r: r["rmse"], lower_is_better=True)
    return Cell(
        "transfer", place, transfer, (figure,), settings | {"from": teacher.name}, "head untouched", teacher.root
    )


def _depth_head(args: SuiteArgs, place: Place, settings: dict[str, Any]) -> Path:
    """Give the file of a trained head; another model, other settings or other files have another one."""
    digest = hashlib.sha256(json.dumps([args.model, args.weights, args.size, settings], default=str).encode())
    for line in file_lines(place.root):
        digest.update(line.encode())
    return args.out / "heads" / f"depth--{place.name.replace('/', '_')}--{digest.hexdigest()[:12]}.safetensors"


def file_lines(root: Path) -> Iterator[str]:
    """Give path, size and time of every file below a folder, in a fixed order, to see whether anything changed."""
    for folder, inside, names in os.walk(root, followlinks=True):
        inside.sort()
        for name in sorted(names):
            status = os.stat(os.path.join(folder, name))
            yield f"{folder}/{name} {status.st_size} {status.st_mtime_ns}\n"


def _retrieval(args: SuiteArgs, place: Place) -> Cell:
    def retrieval() -> Result:
        from opendino.cli.evaluate.retrieval import RetrievalArgs, run_retrieval

        return run_retrieval(RetrievalArgs(**shared(args), data=place.root))

    levels = tuple(_level(level) for level in ("medium", "hard"))
    gap = Figure("retrieval, GAP", "%", lambda r: r.get("gap"))
    return Cell("retrieval", place, retrieval, (*levels, gap), note="nearest neighbours on the cls token")


def _level(level: str) -> Figure:
    return Figure(f"retrieval, {level}", "mAP, %", lambda r: r.get("map", {}).get(level))
