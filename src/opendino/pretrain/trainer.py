# SPDX-License-Identifier: Apache-2.0
"""The training loop of one or many processes: schedules, batch, teacher, student, step, moving average, log, save.

Randomness is a function of (seed, step, sample): crops, masks and stochastic depth are drawn from generators keyed by
these, so a resumed run continues bit for bit, and any number of processes draws the same.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from opendino.distributed.collectives import all_sum, barrier, is_main, rank, world_size
from opendino.distributed.process import join, local_device
from opendino.distributed.sharding import local, reduce_gradients, whole
from opendino.errors import ConfigError, DataError
from opendino.images.fingerprint import explain_change, fingerprint
from opendino.images.sources import open_source
from opendino.models.config import PreprocessSpec
from opendino.models.vit import VisionTransformer
from opendino.pretrain.checkpoint import Checkpointer
from opendino.pretrain.config import PretrainConfig
from opendino.pretrain.data import Batch, make_loader, worker_deaths_explained
from opendino.pretrain.depth import DepthDraws
from opendino.pretrain.device import LossScale, choose_precision
from opendino.pretrain.health import health
from opendino.pretrain.interrupts import StopRequest, TrainingStopped
from opendino.pretrain.masking import batch_masks
from opendino.pretrain.memory import keep_freed_memory
from opendino.pretrain.optimizer import (
    apply_schedule,
    build_adamw,
    clip_each,
    ema_update,
    optimizer_tensors,
    parameter_groups,
)
from opendino.pretrain.photometric import apply_photometric
from opendino.pretrain.run_folder import Record, RunFolder
from opendino.pretrain.schedules import cosine_schedule, linear_warmup, scaled_lr
from opendino.pretrain.spread import spread, whole_teacher
from opendino.pretrain.student_teacher import Crops, StudentTeacher, Targets

log = logging.getLogger("opendino")
Probe = Callable[[VisionTransformer], dict[str, float]]
INIT_STREAM = 3
ROLLBACK_LR = 0.5
"""A rollback halves the learning rate of what follows: the same steps again would end the same way."""


class Trainer:
    """One pre-training run in its folder.

    Args:
        config: the resolved settings; `config.data` and `config.out` must be set.
        probe: called with the teacher every `config.probe_every` steps, in process 0; its figures go into the metrics.
        on_step: called with the record of every step.

    Raises:
        DataError: when the data holds no image or less than one batch.
        ConfigError: when the run folder belongs to a run with other settings, or the batch cannot be shared out.
    """

    def __init__(
        self, config: PretrainConfig, *, probe: Probe | None = None, on_step: Callable[[Record], None] | None = None
    ) -> None:
        self.config, self.probe, self.on_step = config, probe, on_step or (lambda record: None)
        self.device = local_device(config.device)
        join(self.device)
        self.amp_dtype = choose_precision(config.precision, self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.source = open_source(config.data)
        check_batch(config, len(self.source))
        self.num_images = config.batch_size // world_size()
        self.first_image = rank() * self.num_images
        torch.manual_seed(stream_seed(config.seed, INIT_STREAM, 0))
        self.model = StudentTeacher(config)
        self.compute_loss = spread(self.model, config, self.device, self.amp_dtype)
        self.networks = dict(self.model.student.items())
        optim = config.optim
        groups = parameter_groups(
            self.networks, layerwise_decay=optim.layerwise_decay, patch_embed_lr_mult=optim.patch_embed_lr_mult
        )
        self.optimizer = build_adamw(groups, betas=optim.betas)
        self.loss_scale = LossScale(self.amp_dtype is torch.float16)
        self.step = self.bad_steps = self.bad_in_a_row = self.image_errors = self.rollbacks = 0
        self.lr_factor = 1.0
        if is_main():
            self.folder = RunFolder(config)
        barrier()
        self.run = Path(config.out)
        self.checkpointer = Checkpointer(
            self.run,
            keep=config.keep_checkpoints,
            milestone_every=config.milestone_every,
            background=config.async_checkpoints,
        )
        self._restore()

    # --- the loop --------------------------------------------------------------------------------------------------

    def train(self) -> Record:
        """Run to the last step and give its record.

        Raises:
            TrainingStopped: after SIGINT, SIGTERM or SIGUSR1, when the checkpoint is safe.
        """
        record: Record = {}
        if self.step == 0:
            self._probe_start()
        with self._folder_held(), StopRequest() as stop, worker_deaths_explained():
            batches = self._batches()
            while self.step < self.config.steps:
                started = time.perf_counter()
                batch = next(batches)
                waited = time.perf_counter() - started
                record = self._train_step(batch, stop)
                seconds = time.perf_counter() - started
                record |= {"images_per_s": self.config.batch_size / seconds, "data_wait": waited / seconds}
                self.step += 1
                if self._rolled_back():
                    batches = self._batches()
                    continue
                self._finish_step(record)
                if number := record.pop("stop"):
                    self._stop(number)
        self.checkpointer.finish(required=True)
        return record

    def _folder_held(self) -> contextlib.AbstractContextManager[None]:
        return self.folder.held() if is_main() else contextlib.nullcontext()

    def _train_step(self, batch: Batch, stop: StopRequest) -> Record:
        values = self.schedules(self.step)
        apply_schedule(self.optimizer, values["lr"], values["weight_decay"], values["last_layer_lr"])
        centers = {k: v.clone() for k, v in self.model.centers.state_dict().items()}
        micro_batches = self._crops(batch).split(self.config.accumulate)
        with self._autocast():
            targets = self.model.targets(micro_batches, values["teacher_temp"])
        parts = self._agree(self._backward(micro_batches, targets), len(batch.errors), stop)
        self.loss_scale.unscale(self.model.student.parameters())
        clipped = clip_each(self.networks, self.config.optim.clip_grad or math.inf)
        norms = {f"grad_norm_{k}": float(whole(v)) for k, v in clipped.items()}
        finite = all(math.isfinite(v) for v in (parts["loss"], *norms.values()))
        if finite:
            self.optimizer.step()
            ema_update(
                [local(p) for p in self.model.teacher.parameters()],
                [local(p) for p in self.model.student.parameters()],
                values["momentum"],
            )
        else:
            self.model.centers.load_state_dict(centers)
        self._count_bad(finite, math.isfinite(parts["loss"]))
        record = {"step": self.step + 1, **parts, **values, **norms}
        if self.step % self.config.log_every == 0:
            record |= health(torch.cat([t.cls for t in targets]), torch.cat([t.features for t in targets]))
        counts = {"bad_steps": self.bad_steps, "image_errors": self.image_errors, "rollbacks": self.rollbacks}
        return record | counts

    def _backward(self, micro_batches: list[Crops], targets: list[Targets]) -> dict[str, Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        totals: dict[str, Tensor] = {}
        first = self.first_image
        for i, (crops, target) in enumerate(zip(micro_batches, targets, strict=True)):
            depth = DepthDraws(self.config.seed, self.step, first, crops.num_images, self.config.batch_size)
            first += crops.num_images
            last = i == len(micro_batches) - 1
            with reduce_gradients([self.compute_loss, *self.networks.values()], now=last):
                with self._autocast():
                    loss, parts = self.compute_loss(crops, target, depth)
                (loss * (self.loss_scale.value / len(micro_batches))).backward()
            for name, value in (parts | {"loss": loss.detach()}).items():
                totals[name] = totals.get(name, torch.zeros((), device=self.device)) + value / len(micro_batches)
        return totals

    def _agree(self, parts: dict[str, Tensor], errors: int, stop: StopRequest) -> Record:
        """Average the loss parts over the processes, add up unreadable images, hear of signals that any process got."""
        means = torch.stack([parts[k].float() for k in sorted(parts)]) / world_size()
        counts = means.new_tensor([float(errors), float(stop.number), float(stop.number > 0)])
        *values, errors_everywhere, numbers, stopping = all_sum(torch.cat([means, counts])).tolist()
        self.image_errors += int(errors_everywhere)
        limit = self.config.max_errors
        if limit is not None and self.image_errors > limit:
            raise DataError(f"{self.image_errors} images could not be read, more than --max-errors {limit}.")
        return {**dict(zip(sorted(parts), values, strict=True)), "stop": round(numbers / max(stopping, 1))}

    def _finish_step(self, record: Record) -> None:
        last = self.step == self.config.steps
        self.checkpointer.poll()
        if last or self.step % self.config.probe_every == 0:
            self._probe(record)
        if is_main():
            self.folder.append({k: v for k, v in record.items() if k != "stop"})
        if last or (self.step % self.config.checkpoint_every == 0 and not self.bad_in_a_row):
            self.save()
        self.on_step(record)

    def _stop(self, number: int) -> None:
        self.save()
        self.checkpointer.finish(required=True)
        raise TrainingStopped(number, self.step, self.run)

    # --- when a step goes wrong ------------------------------------------------------------------------------------

    def _count_bad(self, finite: bool, loss_finite: bool) -> None:
        """Count a skipped step; an fp16 overflow of the gradients alone only lowers the loss scale."""
        only_overflow = not finite and loss_finite and self.loss_scale.value > 1
        self.loss_scale.update(finite)
        if finite:
            self.bad_in_a_row = 0
        elif not only_overflow:
            self.bad_steps += 1
            self.bad_in_a_row += 1

    def _rolled_back(self) -> bool:
        """After too many bad steps in a row, go back to the last good checkpoint with a lower learning rate.

        Raises:
            ConfigError: when there is none, or after `max_rollbacks` of them.
        """
        if self.bad_in_a_row < self.config.max_bad_steps:
            return False
        since, at = self.step - self.bad_in_a_row, self.step
        what = f"{self.bad_in_a_row} steps in a row gave a loss or gradient that is not finite (up to step {at})."
        bad_steps, rollbacks, lr_factor = self.bad_steps, self.rollbacks + 1, self.lr_factor * ROLLBACK_LR
        self.checkpointer.finish()
        if rollbacks > self.config.max_rollbacks or not self._load(before=since + 1):
            raise ConfigError(
                f"{what} The last checkpoint is untouched"
                + (f", and going back {rollbacks - 1} times did not help" if rollbacks > 1 else "")
                + ". Lower --optim.lr, or try --precision fp32."
            )
        self.bad_steps, self.rollbacks, self.lr_factor, self.bad_in_a_row = bad_steps, rollbacks, lr_factor, 0
        reason = f"{what} Went back to step {self.step} with the learning rate × {lr_factor:g}."
        log.warning(reason)
        if is_main():
            self.folder.trim_metrics(self.step)
            self.folder.append({"event": "rollback", "from": at, "step": self.step, "reason": reason}, event=True)
        return True

    # --- probe -----------------------------------------------------------------------------------------------------

    def _probe_start(self) -> None:
        record: Record = {"step": 0}
        self._probe(record)
        if "probe" in record:
            self.folder.append(record)

    def _probe(self, record: Record) -> None:
        if self.probe is None:
            return
        teacher = whole_teacher(self.model)
        if is_main():
            training = teacher.training
            record["probe"] = self.probe(teacher.eval())
            teacher.train(training)
        barrier()

    # --- parts of a step -------------------------------------------------------------------------------------------

    def schedules(self, step: int) -> dict[str, float]:
        """Give learning rates, weight decay, momentum and teacher temperature of a step (method.md §2)."""
        c, o, s = self.config, self.config.optim, self.config.loss
        lr = self.lr_factor * cosine_schedule(
            step,
            start=scaled_lr(o.lr, c.batch_size, o.lr_rule),
            end=o.min_lr,
            total_steps=c.steps,
            warmup_steps=o.warmup_steps,
        )
        return {
            "lr": lr,
            "last_layer_lr": 0.0 if step < o.freeze_last_layer_steps else lr,
            "weight_decay": cosine_schedule(step, start=o.weight_decay, end=o.weight_decay_end, total_steps=c.steps),
            "momentum": cosine_schedule(step, start=o.momentum, end=o.momentum_end, total_steps=c.steps),
            "teacher_temp": linear_warmup(step, s.warmup_teacher_temp, s.teacher_temp, s.warmup_teacher_temp_steps),
        }

    def _batches(self) -> Iterator[Batch]:
        c = self.config
        return iter(
            make_loader(
                self.source,
                c.crops,
                batch_size=c.batch_size,
                seed=c.seed,
                start_step=self.step,
                num_steps=c.steps - self.step,
                num_workers=c.num_workers,
                cache=c.cache_images,
                channels=c.model.in_chans,
                shard=(rank(), world_size()),
                shuffle_buffer=c.shuffle_buffer,
            )
        )

    def _crops(self, batch: Batch) -> Crops:
        for path, reason in batch.errors:
            log.warning("%s cannot be read (%s); another image takes its place.", path, reason)
        crops = self.config.crops
        global_crops = apply_photometric(
            batch.global_crops.to(self.device, non_blocking=True), batch.global_params, crops
        )
        local_crops = None
        if batch.local_crops is not None and batch.local_params is not None:
            local_crops = apply_photometric(
                batch.local_crops.to(self.device, non_blocking=True), batch.local_params, crops
            )
        side = crops.global_size // self.teacher.patch_size
        m = self.config.masks
        masks = batch_masks(
            self.config.batch_size,
            (side, side),
            seed=self.config.seed,
            step=self.step,
            images=slice(self.first_image, self.first_image + self.num_images),
            ratio=m.ratio,
            share=m.share,
        )
        return Crops(global_crops, local_crops, masks.to(self.device))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.amp_dtype or torch.bfloat16, enabled=self.amp_dtype is not None)

    # --- checkpoints -----------------------------------------------------------------------------------------------

    @property
    def teacher(self) -> VisionTransformer:
        """The teacher's backbone, which is the result of the run; sharded when the run is."""
        backbone = self.model.teacher["backbone"]
        assert isinstance(backbone, VisionTransformer)
        return backbone

    def save(self) -> None:
        """Begin a checkpoint, and write weights/teacher.safetensors and heads.safetensors."""
        extras = {
            "counters": [self.bad_steps, self.image_errors, self.rollbacks],
            "lr_factor": self.lr_factor,
            "loss_scale": self.loss_scale.state(),
            "data": fingerprint(self.source),
        }
        self.checkpointer.save(self.step, self._tensors(), extras)
        teacher = whole_teacher(self.model)
        heads = {k: whole(v) for k, v in self.model.teacher.state_dict().items() if "head" in k.split(".")[0]}
        if is_main():
            teacher.preprocess = preprocessing_of(self.config)
            self.folder.write_weights(teacher, heads)

    def _tensors(self) -> dict[str, Tensor]:
        names = {p: n for n, p in self.model.student.named_parameters()}
        model = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        return model | {f"optimizer.{k}": v for k, v in optimizer_tensors(self.optimizer, names).items()}

    def _load(self, before: int | None = None) -> bool:
        extras = self.checkpointer.load(self._tensors(), before)
        if extras is None:
            return False
        self.step = extras["step"]
        self.bad_steps, self.image_errors, self.rollbacks = extras["counters"]
        self.lr_factor = extras["lr_factor"]
        self.loss_scale.restore(extras["loss_scale"])
        change = explain_change(extras["data"], fingerprint(self.source))
        if change and not self.config.data_may_change:
            raise ConfigError(f"{change} `opendino resume RUN --data-may-change` goes on all the same.")
        return True

    def _restore(self) -> None:
        self._load()
        if is_main():
            self.folder.trim_metrics(self.step)


def check_batch(config: PretrainConfig, num_images: int) -> None:
    """Refuse a batch that the data or the processes cannot make.

    Raises:
        DataError: when there are fewer images than a batch.
        ConfigError: when the processes and micro-batches cannot share the batch evenly.
    """
    if num_images < config.batch_size:
        raise DataError(
            f"{config.data} has {num_images} images and a batch is {config.batch_size}. Add images, or lower "
            "--batch-size."
        )
    parts = world_size() * config.accumulate
    if config.batch_size % parts:
        raise ConfigError(
            f"--batch-size {config.batch_size} cannot be shared by {world_size()} processes with --accumulate "
            f"{config.accumulate}: it must be a multiple of {parts}."
        )
    if config.loss.koleo_weight and config.batch_size // config.accumulate < 2:
        log.warning("KoLeo is left out: it needs two images in a micro-batch, and there is one. Raise --batch-size.")


def stream_seed(seed: int, stream: int, index: int) -> int:
    """Derive an independent 63-bit seed for one use (`stream`) of one step or sample."""
    state = np.random.SeedSequence([seed, stream, index]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def preprocessing_of(config: PretrainConfig) -> PreprocessSpec:
    """Give the evaluation preprocessing that goes with a run: its global crop size and channel statistics."""
    size = config.crops.global_size
    return PreprocessSpec(
        resize=round(size * 256 / 224), crop=size, mean=tuple(config.crops.mean), std=tuple(config.crops.std)
    )
