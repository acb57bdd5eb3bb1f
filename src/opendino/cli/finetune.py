# SPDX-License-Identifier: Apache-2.0
"""`opendino finetune`: labels in, a tuned backbone and head out, and whether that beat a linear probe."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from opendino.cli.evaluate.common import BackboneArgs, check_classes, labelled_features, pooled_embedder
from opendino.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch

    from opendino.finetune.probe import Probe
    from opendino.finetune.settings import FinetuneSettings
    from opendino.finetune.tasks import Task
    from opendino.finetune.trainer import Run
    from opendino.models.vit import VisionTransformer

EXAMPLE = """Tune a backbone with labels: classes of images, or classes of pixels.

Example:
  opendino finetune --model vits14 --train photos/train --val photos/val --mode lora --epochs 10 --out tuned
  opendino finetune --model run --masks rooms --mode last-k --last-k 2 --out tuned

The first thing printed is the score to beat: a linear probe on the frozen backbone, on the same images. OUT gets
weights/backbone.safetensors (opendino.load(OUT) reads it), head.safetensors and probe.safetensors. Killed and started
again with the same settings, it goes on where it stopped."""


@dataclass(frozen=True, kw_only=True)
class FinetuneArgs(BackboneArgs):
    """Arguments of `opendino finetune`."""

    batch: int = 32
    """Images in a training step and in a forward pass."""
    fit: str = "crop"
    """How images get their size where they are scored: crop, resize or pad; segmentation always resizes."""
    train: Path | None = None
    """Labelled training images: one folder per class, or a .csv with path,label."""
    val: Path | None = None
    """Labelled validation images."""
    masks: Path | None = None
    """Instead, for segmentation: a folder with images/SPLIT, masks/SPLIT and classes.txt."""
    splits: tuple[str, str] = ("train", "val")
    """The splits of --masks."""
    out: Path
    """Folder for the weights, the heads and the state."""
    mode: str = "lora"
    """What trains beside the head: frozen (nothing), lora, last-k or full."""
    epochs: int = 10
    """Passes over the training images."""
    lr: float | None = None
    """Peak learning rate; default: 1e-3 frozen, 5e-4 lora, 1e-4 last-k, 5e-5 full."""
    weight_decay: float = 0.05
    """Of matrices."""
    layer_decay: float = 0.75
    """Factor of the rate from each block to the one before it, with --mode full."""
    last_k: int = 2
    """Blocks that train with --mode last-k."""
    lora_rank: int = 8
    """Rank of the LoRA matrices."""
    lora_alpha: float = 16.0
    """Their output is multiplied by this over the rank."""
    lora_mlp: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """LoRA in the feed-forward layers as well as in attention."""
    warmup: float = 0.1
    """Share of the steps in which the rate rises."""
    head_lr_mult: float = 1.0
    """The head's learning rate over that of the backbone."""
    head_init: str = "probe"
    """The head begins as the linear probe, or with zeros: probe or zero."""
    drop_path: float = 0.0
    """Stochastic depth of the blocks that train."""
    min_scale: float = 0.35
    """Smallest share of an image that a training crop covers."""
    flip: bool = True
    """Mirror half of the training images."""
    seed: int = 0
    """Of everything that is drawn."""
    checkpoint_steps: int = 100
    """Steps between two states on disk, beside the one after each epoch."""


def main(argv: list[str]) -> int:
    """Tune a backbone and print how it compares with the probe."""
    args = tyro.cli(FinetuneArgs, args=argv, prog="opendino finetune", description=EXAMPLE)
    result = run_finetune(args)
    if args.json:
        print(json.dumps(result))
    else:
        print(verdict(result))
        print(f"{args.out}/weights/backbone.safetensors, {args.out}/head.safetensors")
    return 0


def run_finetune(args: FinetuneArgs) -> dict[str, Any]:
    """Probe, train, write the weights.

    Returns:
        "task", "metric", "mode", "probe" (score, chosen), "best" (score, epoch), "gain" in points, "beats_probe",
        "standard_error" of a score (classification), "epochs", "num_train", "num_val", "trainable", "unreadable",
        "out".
    """
    settings = _settings(args)
    precision_of = _precision(args)
    if (args.masks is None) == (args.train is None) or (args.train is None) != (args.val is None):
        raise ConfigError("Give --train and --val, folders of labelled images; or --masks, images with masks.")
    model, task, probe, about = _segmentation(args) if args.masks is not None else _classification(args)
    say(args, f"Score to beat, linear probe on the frozen backbone: {task.metric} {probe.score:.2f}")
    from opendino.finetune.adapters import prepare, trainable
    from opendino.finetune.storage import write_head
    from opendino.finetune.trainer import open_run, write_result

    head = probe.head()
    args.out.mkdir(parents=True, exist_ok=True)
    figures = {"score": probe.score, "chosen": probe.chosen}
    write_head(args.out / "probe.safetensors", model, head, task, args.model, settings, **figures)
    if settings.head_init == "zero":
        for parameter in head.parameters():
            parameter.data.zero_()
    device = model.cls_token.device
    prepare(model, settings)
    weights = sum(p.numel() for p in trainable(model).values())
    run = open_run(model, head.to(device), task, settings, args.out, about["record"], precision_of(device))
    say(args, f"{args.mode}: {weights:,} weights of the backbone train, {run.total_steps} steps of {args.batch} images"
        + (f"; {run.step} are done" if run.step else ""))  # fmt: skip
    _train(args, run, probe)
    result = _result(run, probe, weights, about["unreadable"])
    write_result(run)
    record = json.loads((args.out / "finetune.json").read_text()) | {"result": result}
    (args.out / "finetune.json").write_text(json.dumps(record, indent=2) + "\n")
    return result


def say(args: FinetuneArgs, text: str) -> None:
    """Print for people; with --json on standard error, so that standard output is the object alone."""
    print(text, file=sys.stderr if args.json else sys.stdout, flush=True)


def _settings(args: FinetuneArgs) -> FinetuneSettings:
    from dataclasses import fields

    from opendino.finetune.settings import FinetuneSettings

    names = [f.name for f in fields(FinetuneSettings) if f.name != "batch_size"]
    return FinetuneSettings(batch_size=args.batch, **{name: getattr(args, name) for name in names})


def _precision(args: FinetuneArgs) -> Any:
    if args.precision not in ("auto", "fp32", "bf16"):
        raise ConfigError(f"--precision is {args.precision!r}; fine-tuning takes auto, fp32 or bf16.")

    def of(device: torch.device) -> torch.dtype | None:
        import torch

        fit = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if args.precision == "bf16" or (args.precision == "auto" and fit) else None

    return of


def _classification(args: FinetuneArgs) -> tuple[VisionTransformer, Task, Probe, dict[str, Any]]:
    from opendino.embed.resume import weights_fingerprint
    from opendino.finetune.probe import probe_classes, saved_probe
    from opendino.finetune.tasks import Classification
    from opendino.images.sources import open_source

    assert args.train is not None
    assert args.val is not None
    sources = {"train": open_source(args.train), "val": open_source(args.val)}
    classes = check_classes(sources)
    if len(classes) < 2:
        raise DataError(f"{args.train} has one class; a classifier needs two or more.")
    embedder = pooled_embedder(args)
    parts = labelled_features(args, embedder, sources, classes)
    train, val = parts["train"], parts["val"]
    images = {}
    for name, source in sources.items():
        bad = {path for path, _ in parts[name].unreadable}
        images[name] = [item for item in source.images() if item.path not in bad]
    probe = saved_probe(args.out / "probe.safetensors", embedder.model, len(classes)) or probe_classes(
        train.last, train.labels, val.last, val.labels, len(classes)
    )
    task = Classification(
        images["train"], train.labels, images["val"], val.labels, classes, embedder.preprocess, embedder.workers
    )
    task.images = {
        "size": list(embedder.size) if isinstance(embedder.size, tuple) else embedder.size, "fit": embedder.fit,
        "input_shape": list(embedder.input_shape), "precision": embedder.precision,
    }  # fmt: skip
    record = {
        "task": task.name, "backbone_sha256": weights_fingerprint(embedder.model), "classes": classes,
        "num_train": task.num_train, "num_val": task.num_val, "size": list(task.size), "fit": args.fit,
        "train_names": sources["train"].names_hash(), "val_names": sources["val"].names_hash(),
    }  # fmt: skip
    return embedder.model, task, probe, {"record": record, "unreadable": len(train.unreadable) + len(val.unreadable)}


def _segmentation(args: FinetuneArgs) -> tuple[VisionTransformer, Task, Probe, dict[str, Any]]:
    from opendino.cli.embed import images_progress, show
    from opendino.embed.resume import weights_fingerprint
    from opendino.evaluate.datasets.detect import open_segmentation
    from opendino.finetune.probe import probe_pixels, saved_probe
    from opendino.finetune.tasks import Segmentation
    from opendino.images.preprocess import Preprocess

    assert args.masks is not None
    train, val = (open_segmentation(args.masks, split) for split in args.splits)
    embedder = pooled_embedder(args)
    model = embedder.model
    # Masks are of whole images, so images are resized and not cut.
    preprocess = Preprocess(model.preprocess, size=embedder.size, fit="resize", patch_size=model.config.patch_size)
    task = Segmentation(train, val, preprocess, embedder.workers)
    probe = saved_probe(args.out / "probe.safetensors", model, len(task.classes))
    if probe is None:
        with images_progress() as bar:
            line, start = bar.add_task("probe", total=len(train), rate="", errors=0), perf_counter()
            probe = probe_pixels(
                model, task, args.batch, args.seed,
                lambda done, total: show(bar, line, done, 0, total, done / (perf_counter() - start)),
            )  # fmt: skip
    record = {
        "task": task.name, "backbone_sha256": weights_fingerprint(model), "classes": task.classes,
        "num_train": task.num_train, "num_val": task.num_val, "size": list(task.size), "splits": list(args.splits),
    }  # fmt: skip
    return model, task, probe, {"record": record, "unreadable": 0}


def _train(args: FinetuneArgs, run: Run, probe: Probe) -> None:
    from opendino.cli.embed import images_progress
    from opendino.finetune.trainer import train

    def on_epoch(epoch: dict[str, Any]) -> None:
        so_far = max(e["score"] for e in run.history[: epoch["epoch"]])
        say(
            args,
            f"epoch {epoch['epoch']:>3}/{args.epochs}  lr {epoch['lr']:.2g}  loss {epoch['loss']:.4f}  "
            f"{run.task.metric} {epoch['score']:.2f}  (probe {probe.score:.2f}, best {so_far:.2f})",
        )

    for epoch in run.history:
        on_epoch(epoch)
    with images_progress() as bar:
        begun, start = run.step, perf_counter()
        line = bar.add_task("train", total=run.total_steps, completed=begun, rate="", errors=0)

        def on_step(step: int, total: int, loss: float) -> None:
            rate = (step - begun) * run.settings.batch_size / (perf_counter() - start)
            bar.update(line, completed=step, rate=f"{rate:.1f} images/s, loss {loss:.3f}")

        train(run, on_epoch, on_step)


def _result(run: Run, probe: Probe, weights: int, unreadable: int) -> dict[str, Any]:
    task, best = run.task, run.best["score"]
    share = best / 100
    error = 100 * math.sqrt(share * (1 - share) / task.num_val) if task.name == "classification" else None
    return {
        "task": task.name, "metric": task.metric, "mode": run.settings.mode,
        "probe": {"score": probe.score, "chosen": probe.chosen},
        "best": {"score": best, "epoch": run.best["epoch"]}, "gain": best - probe.score,
        "beats_probe": best - probe.score > 1e-9, "standard_error": error, "epochs": run.history,
        "num_train": task.num_train, "num_val": task.num_val, "trainable": weights, "unreadable": unreadable,
        "out": str(run.folder),
    }  # fmt: skip


def verdict(result: dict[str, Any]) -> str:
    """Say in plain words whether tuning was worth it."""
    best, probe, metric = result["best"], result["probe"]["score"], result["metric"]
    figures = f"{metric} {best['score']:.2f} at epoch {best['epoch']}, linear probe {probe:.2f}"
    if not result["beats_probe"]:
        return (
            f"WARNING: fine-tuning did not beat the linear probe on the frozen backbone ({figures}). Keep the backbone "
            "as it was, with probe.safetensors. If you try again: a smaller --lr, another --mode (lora changes least), "
            "more labelled images, or fewer --epochs."
        )
    text = f"Fine-tuning is {result['gain']:.2f} points ahead: {figures}."
    error = result["standard_error"]
    if error is not None and result["gain"] < 2 * error:
        text += (
            f" That is little: a score from {result['num_val']} images has a standard error of {error:.1f} points, so "
            "it may be chance."
        )
    return text + " Both were chosen on these validation images, which flatters both; judge on images not used yet."
