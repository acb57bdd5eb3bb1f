# SPDX-License-Identifier: Apache-2.0
"""One pre-training step of each peer that has one, in its own training loop, on the same JPEG files.

Both loops run in one process without loader workers, which would go on while the other peer is timed, and stop at the
end of each step until their turn. Two clocks start with the turn:

seconds: teacher, student, losses, backward, clipping, optimiser and the teacher's moving average; crops are ready.
with_data: the same, with reading, decoding, cropping and colours of the batch before it.

Both train the same network with the same losses: no stochastic depth, shared head, moving centre, KoLeo on both global
crops, layer-wise learning rates, clipping at 3, AdamW. Neither writes a checkpoint or scores a probe within a step.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import Spec
from worker import Turns, versions

STEPS = 125_000
"""Length of the schedules; the run ends long before."""


def serve(spec: Spec, turns: Turns) -> None:
    """Train until there is no next turn; the first step is the peer's own warm-up and answers "ready"."""
    PEERS[spec.peer](spec, turns)


def describe(spec: Spec, setting: str, parameters: int, loss: float) -> dict[str, Any]:
    """Give what a peer says when it is ready: what it trains, and the loss of its first step."""
    import torch

    return {
        "versions": versions(spec.peer),
        "setting": setting,
        "parameters": parameters,
        "first_loss": loss,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


# --- opendino ------------------------------------------------------------------------------------------------------


def opendino(spec: Spec, turns: Turns) -> None:
    """`Trainer.train` with a callback at the end of each step."""
    from opendino.pretrain import engine as module
    from opendino.pretrain.trainer import Trainer

    colours = Stopwatch(module.apply_photometric)
    module.apply_photometric = colours  # the part of the augmentation that the step does on the device
    run: Any = None

    def on_step(record: dict[str, Any]) -> None:
        total = time.perf_counter() - turns.started
        if not turns.about:
            count = sum(p.numel() for p in run.model.student.parameters() if p.requires_grad)
            turns.about = describe(spec, "Trainer", count, record["loss"])
        data = record["data_wait"] * spec.batch / record["images_per_s"] + colours.take()
        turns.done(images=spec.batch, seconds=total - data, with_data=total)

    run = Trainer(opendino_config(spec), on_step=on_step)
    run.train()


def opendino_config(spec: Spec) -> Any:
    """Give the recipe vits14 at the size of the benchmark, without stochastic depth."""
    from opendino.pretrain.config import PretrainConfig

    dim, depth, heads = spec.shape
    never = 10**9
    return PretrainConfig.model_validate(
        {
            "data": str(Path(spec.work) / "images"),
            "out": str(Path(spec.work) / f"run-opendino-{spec.dtype}"),
            "steps": STEPS,
            "batch_size": spec.batch,
            "precision": spec.dtype,
            "device": "cpu",
            "num_workers": 0,
            "log_every": never,
            "checkpoint_every": never,
            "probe_every": never,
            "model": {"arch": "vits14", "embed_dim": dim, "depth": depth, "num_heads": heads, "drop_path_rate": 0.0},
            "crops": {"global_size": spec.size, "local_size": spec.local_size, "num_local": spec.num_local},
            "heads": {"num_prototypes": spec.prototypes},
            "loss": {"centering": "moving"},
        }
    )


class Stopwatch:
    """A function that adds up how long its calls take."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.seconds = function, 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return self.function(*args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - started

    def take(self) -> float:
        """Give the seconds since the last call of this method."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


# --- lightly-train -------------------------------------------------------------------------------------------------


def lightly_train(spec: Spec, turns: Turns) -> None:
    """`lightly_train.pretrain(method="dinov2")`, with the method's hooks around a step wrapped."""
    os.environ |= {"LIGHTLY_TRAIN_EVENTS_DISABLED": "1", "LIGHTLY_DID_VERSION_CHECK": "True"}  # asks no server
    import lightly_train as package
    from lightly_train._methods.dinov2.dinov2 import DINOv2

    begin, end = DINOv2.on_train_batch_start, DINOv2.on_train_batch_end
    begun = 0.0

    def on_train_batch_start(self: Any, *args: Any) -> None:
        nonlocal begun
        begun = time.perf_counter()  # the batch has been read and cropped
        begin(self, *args)

    def on_train_batch_end(self: Any, outputs: Any, *args: Any) -> None:
        end(self, outputs, *args)  # the teacher's moving average is in here
        ended = time.perf_counter()
        if not turns.about:
            trained = (p.numel() for group in self.trainer.optimizers[0].param_groups for p in group["params"])
            setting = 'pretrain(method="dinov2"), without xFormers'
            turns.about = describe(spec, setting, sum(trained), float(outputs["loss"]))
        turns.done(images=spec.batch, seconds=ended - begun, with_data=ended - turns.started)

    DINOv2.on_train_batch_start, DINOv2.on_train_batch_end = on_train_batch_start, on_train_batch_end
    package.pretrain(**lightly_settings(spec))


def lightly_settings(spec: Spec) -> dict[str, Any]:
    """Give the arguments of `pretrain` that are the same training as `opendino_config`."""
    return {
        "out": str(Path(spec.work) / f"run-lightly-{spec.dtype}"),
        "data": str(Path(spec.work) / "images"),
        "model": "dinov2/vits14-noreg-notpretrained",
        "model_args": {"drop_path_rate": 0.0},
        "method": "dinov2",
        "method_args": {"output_dim": spec.prototypes},
        "batch_size": spec.batch,
        "num_workers": 0,
        "epochs": 10**6,
        "accelerator": "cpu",
        "precision": "bf16-mixed" if spec.dtype == "bf16" else "32-true",
        "loggers": {"jsonl": None, "tensorboard": None},
        "callbacks": {"learning_rate_monitor": None, "device_stats_monitor": None, "model_checkpoint": None},
        "trainer_args": {"max_steps": STEPS, "enable_checkpointing": False},
        "transform_args": {
            "image_size": (spec.size, spec.size),
            "local_view": {"num_views": spec.num_local, "view_size": (spec.local_size, spec.local_size)},
        },
    }


PEERS: dict[str, Callable[[Spec, Turns], None]] = {"opendino": opendino, "lightly-train": lightly_train}
