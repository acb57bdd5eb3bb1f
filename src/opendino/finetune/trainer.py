# SPDX-License-Identifier: Apache-2.0
"""The training loop: every step is a function of the settings and the step, so that a killed run goes on bit for bit.

OUT/finetune.json                 settings, what was tuned on what, and the score of every epoch
OUT/state.pt                      step, weights that train, optimiser, best weights; written aside and renamed
OUT/weights/backbone.safetensors  the best epoch's backbone, adapters merged; `opendino.load(OUT)` reads it
OUT/head.safetensors              its head
OUT/probe.safetensors             the linear probe on the backbone as it was
"""

from __future__ import annotations

import json
import math
import os
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opendino.errors import ConfigError, DataError
from opendino.finetune.adapters import merge_lora, parameter_groups, trainable
from opendino.finetune.settings import FinetuneSettings, learning_rate
from opendino.finetune.storage import write_head
from opendino.finetune.tasks import Task
from opendino.models.files import TUNED_WEIGHTS
from opendino.models.vit import VisionTransformer
from opendino.models.weights import save_backbone

CLIP = 1.0
"""Largest norm of a step's gradient."""
Epoch = dict[str, Any]
OnEpoch = Callable[[Epoch], None]
OnStep = Callable[[int, int, float], None]


@dataclass
class Run:
    """A run and where it is.

    Attributes:
        step: steps done.
        history: one dict per finished epoch: epoch, lr (the last step's), loss (mean), score.
        best: score of the best epoch and its weights; empty before the first.
        losses: of the steps of the epoch in progress.
    """

    model: VisionTransformer
    head: nn.Module
    task: Task
    settings: FinetuneSettings
    folder: Path
    optimizer: torch.optim.AdamW
    steps_per_epoch: int
    precision: torch.dtype | None
    step: int
    history: list[Epoch]
    best: dict[str, Any]
    losses: list[float]

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.steps_per_epoch * self.settings.epochs

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return learning_rate(
            step, total_steps=self.total_steps, peak=self.settings.peak_lr, warmup=self.settings.warmup
        )


def open_run(
    model: VisionTransformer, head: nn.Module, task: Task, settings: FinetuneSettings, folder: Path,
    about: dict[str, Any], precision: torch.dtype | None = None,
) -> Run:  # fmt: skip
    """Begin a run, or go on with the one in the folder.

    Args:
        model: with what trains set by `adapters.prepare`.
        head: on the model's device.
        task: what to tune for.
        settings: of the run.
        folder: OUT.
        about: JSON-able; a folder with other settings or another `about` is refused.
        precision: half-precision type of autocast; None computes in fp32.

    Raises:
        ConfigError: when the folder holds another run.
        DataError: when its state cannot be read.
    """
    groups = parameter_groups(model, head, settings)
    optimizer = torch.optim.AdamW([{k: v for k, v in g.items() if k != "names"} for g in groups], lr=settings.peak_lr)
    steps = math.ceil(task.num_train / settings.batch_size)
    run = Run(model, head, task, settings, folder, optimizer, steps, precision, 0, [], {}, [])
    described = about | {"settings": settings.as_json()}
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "finetune.json"
    if record.exists():
        _check_same(record, described)
    else:
        _write(record, json.dumps(described | {"epochs": []}, indent=2) + "\n")
    if (folder / "state.pt").exists():
        _restore(run)
    return run


def train(run: Run, on_epoch: OnEpoch | None = None, on_step: OnStep | None = None) -> Run:
    """Train to the end; the score is taken after every epoch and the best weights are kept.

    Raises:
        DataError: when the loss is no number any more.
    """
    device = run.model.cls_token.device
    while run.step < run.total_steps:
        epoch, first = divmod(run.step, run.steps_per_epoch)
        run.model.train()
        for images, targets in run.task.batches(epoch, first, run.settings):
            loss = _step(run, images.to(device), targets.to(device))
            run.losses.append(loss)
            run.step += 1
            if run.step % run.steps_per_epoch == 0:
                _end_epoch(run, epoch)
            if run.step % run.steps_per_epoch == 0 or run.step % run.settings.checkpoint_steps == 0:
                save_state(run)
            if run.step % run.steps_per_epoch == 0 and on_epoch is not None:
                on_epoch(run.history[-1])
            if on_step is not None:
                on_step(run.step, run.total_steps, loss)
    return run


def _step(run: Run, images: Tensor, targets: Tensor) -> float:
    rate = run.rate(run.step)
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group["lr_multiplier"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed((run.settings.seed << 32) + run.step)  # of stochastic depth
        with _autocast(images.device.type, run.precision):
            logits = run.task.logits(run.model, run.head, images)
        loss = run.task.loss(logits, targets)
    value = loss.item()
    if not math.isfinite(value):
        raise DataError(
            f"The loss is {value} at step {run.step + 1} of {run.total_steps}, with a learning rate of {rate:.2g}. "
            "Give a smaller --lr and another --out; what was best until here is in the folder's state."
        )
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_([p for group in run.optimizer.param_groups for p in group["params"]], CLIP)
    run.optimizer.step()
    return value


def _end_epoch(run: Run, epoch: int) -> None:
    score = run.task.score(run.model, run.head, run.settings.batch_size)
    run.model.train()
    mean = sum(run.losses) / len(run.losses)
    run.history.append({"epoch": epoch + 1, "lr": run.rate(run.step - 1), "loss": mean, "score": score})
    run.losses = []
    if not run.best or score > run.best["score"]:
        run.best = {"epoch": epoch + 1, "score": score, "weights": _clone(run)}


def _clone(run: Run) -> dict[str, Tensor]:
    named = {f"backbone.{n}": p for n, p in trainable(run.model).items()}
    named |= {f"head.{n}": p for n, p in run.head.named_parameters()}
    return {name: p.detach().cpu().clone() for name, p in named.items()}


def _put(run: Run, weights: dict[str, Tensor]) -> None:
    named = {f"backbone.{n}": p for n, p in trainable(run.model).items()}
    named |= {f"head.{n}": p for n, p in run.head.named_parameters()}
    if {n: tuple(p.shape) for n, p in named.items()} != {n: tuple(w.shape) for n, w in weights.items()}:
        raise DataError(f"{run.folder / 'state.pt'} is of a run that trains other weights. Give another --out.")
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(weights[name])


def save_state(run: Run) -> None:
    """Write all that the rest of the run depends on, aside and renamed."""
    state = {
        "step": run.step, "history": run.history, "losses": run.losses, "best": run.best, "weights": _clone(run),
        "optimizer": run.optimizer.state_dict(),
    }  # fmt: skip
    aside = run.folder / ".state.pt.tmp"
    with aside.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, run.folder / "state.pt")
    record = json.loads((run.folder / "finetune.json").read_text())
    _write(run.folder / "finetune.json", json.dumps(record | {"epochs": run.history}, indent=2) + "\n")


def _restore(run: Run) -> None:
    path = run.folder / "state.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, pickle.UnpicklingError) as error:
        raise DataError(f"{path} cannot be read ({error!r}). Delete it to begin the run again.") from error
    _put(run, state["weights"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.step, run.history, run.best, run.losses = state["step"], state["history"], state["best"], state["losses"]


def write_result(run: Run) -> VisionTransformer:
    """Write the best epoch's backbone, adapters merged, and its head; gives the merged model, in eval mode."""
    _put(run, run.best["weights"])
    model = merge_lora(run.model).eval()
    (run.folder / TUNED_WEIGHTS).parent.mkdir(exist_ok=True)
    save_backbone(model, run.folder / TUNED_WEIGHTS, extra={"opendino.finetuned": json.dumps(run.settings.as_json())})
    write_head(run.folder / "head.safetensors", model, run.head, run.task, str(run.folder), run.settings)
    return model


def _check_same(record: Path, described: dict[str, Any]) -> None:
    try:
        found = json.loads(record.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{record} cannot be read: {error}. Give another --out.") from error
    now = json.loads(json.dumps(described))
    differing = [k for k in now if k != "settings" and found.get(k) != now[k]]
    differing += [k for k, v in now["settings"].items() if found.get("settings", {}).get(k) != v]
    if differing:
        raise ConfigError(
            f"{record.parent} holds a run that differs in {', '.join(differing)}. Give another --out, or the same "
            "settings to go on with it."
        )


def _autocast(device: str, precision: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if precision is None else torch.autocast(device, dtype=precision)


def _write(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(text)
    os.replace(aside, path)
