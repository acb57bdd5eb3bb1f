# SPDX-License-Identifier: Apache-2.0
"""The training loop of one or many processes: data, step, probe, log, checkpoint; stopping, going back, continuing.

Randomness is a function of (seed, step, sample): crops, masks and stochastic depth are drawn from generators keyed by
these, so a resumed run continues bit for bit, and any number of processes draws the same.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from opendino.distributed.collectives import barrier, broadcast_object, is_main, rank, world_size
from opendino.distributed.sharding import whole
from opendino.errors import ConfigError, DataError
from opendino.images.fingerprint import explain_change, fingerprint
from opendino.images.sources import ImageSource
from opendino.models.config import PreprocessSpec
from opendino.models.vit import VisionTransformer
from opendino.pretrain.checkpoint import Checkpointer
from opendino.pretrain.config import PretrainConfig
from opendino.pretrain.data import Batch, make_loader
from opendino.pretrain.engine import Engine
from opendino.pretrain.engines import make_engine
from opendino.pretrain.flops import speed_figures
from opendino.pretrain.guard import Answer, FeaturesError, Guard
from opendino.pretrain.hog import TARGETS
from opendino.pretrain.initialise import Start, backbone_rate
from opendino.pretrain.interrupts import StopRequest, TrainingStopped
from opendino.pretrain.loggers import Logger, open_loggers
from opendino.pretrain.run_folder import Record, RunFolder
from opendino.pretrain.schedules import cosine_schedule, linear_warmup, scaled_lr
from opendino.pretrain.session import describe_session, recorded_session
from opendino.pretrain.spread import whole_teacher
from opendino.pretrain.stages import Stage, naming, open_sources, stage_after, stage_before, timeline
from opendino.pretrain.student_teacher import StudentTeacher
from opendino.pretrain.switch import move_state
from opendino.pretrain.workers import worker_deaths_explained

log = logging.getLogger("opendino")
Probe = Callable[[VisionTransformer], dict[str, float]]
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

    engine: Engine
    source: ImageSource

    def __init__(
        self, config: PretrainConfig, *, probe: Probe | None = None, on_step: Callable[[Record], None] | None = None
    ) -> None:
        self.config, self.probe, self.on_step = config, probe, on_step or (lambda record: None)
        self.stages = timeline(config)
        self.sources = open_sources(self.stages)
        self._enter(self.stages[0])
        if not config.stages:  # the engine may have settled what was left open
            self.config = config = self.engine.config
            self.stages = timeline(config)
            self.stage = self.stages[0]
        for stage in self.stages:
            with naming(stage):
                check_batch(stage.config, len(self.sources[stage.config.data]))
        self.guard = Guard(config, self.source)
        self.engine.begin(self.source)
        self.step = self.bad_steps = self.bad_in_a_row = self.image_errors = self.rollbacks = 0
        self.lr_factor = 1.0
        self.loggers: list[Logger] = []
        self.run = Path(config.out)
        self.folder = RunFolder(config) if is_main() else None
        barrier()
        self.checkpointer = Checkpointer(
            self.run,
            keep=config.keep_checkpoints,
            milestone_every=config.milestone_every,
            background=config.async_checkpoints,
        )
        self._load()
        if self.folder:
            self.folder.trim_metrics(self.step)

    @property
    def model(self) -> StudentTeacher:
        """Student and teacher."""
        return self.engine.model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW over the student."""
        return self.engine.optimizer

    @property
    def teacher(self) -> VisionTransformer:
        """The teacher's backbone, which is the result of the run; sharded when the run is."""
        return self.engine.teacher

    # --- the loop --------------------------------------------------------------------------------------------------

    def train(self) -> Record:
        """Run to the last step and give its record.

        Raises:
            TrainingStopped: after SIGINT, SIGTERM or SIGUSR1, when the checkpoint is safe.
            FeaturesError: when the guard ends the run; the best checkpoint and its weights are in place.
        """
        record: Record = {}
        with self._folder_held(), self._logging(), StopRequest() as stop, worker_deaths_explained():
            self._take_up_stopped()
            if self.step == 0:
                self._begin()
            batches = self.batches()
            while self.step < self.config.steps:
                if self.step == self.stage.end:
                    self._switch()
                    batches = self.batches()
                record = self.advance(batches, stop.number)
                if self._rolled_back():
                    batches = self.batches()
                    continue
                signal = record.pop("signal")
                if self._finish_step(record) == "back":
                    self._go_back()
                    batches = self.batches()
                if signal:
                    self._stop(signal)
        self.checkpointer.finish(required=True)
        self._compare_with_start()
        return record

    def advance(self, batches: Iterator[Batch], signal: int = 0) -> Record:
        """Do one step on the next batch and give its record; nothing is written.

        Args:
            batches: of this process, from `batches`.
            signal: number of a signal that this process got, 0 for none.
        """
        started = time.perf_counter()
        with self.engine.clock.span("data wait"):
            batch = next(batches)
        waited = time.perf_counter() - started
        for path, reason in batch.errors:
            log.warning("%s cannot be read (%s); another image takes its place.", path, reason)
        values = self.schedules(self.step)
        record = self.engine.run(batch, self.step, values, signal)
        self._count(record)
        self.step += 1
        self.engine.clock.step_done()
        counts = {"bad_steps": self.bad_steps, "image_errors": self.image_errors, "rollbacks": self.rollbacks}
        seconds = time.perf_counter() - started
        return {
            "step": self.step, **self.stage.label, **record, **values, **counts, **self._speed(seconds, waited)
        }  # fmt: skip

    def _count(self, record: Record) -> None:
        """Count unreadable images and skipped steps; an fp16 overflow alone only lowers the loss scale."""
        self.image_errors += record.pop("image_errors")
        limit = self.config.max_errors
        if limit is not None and self.image_errors > limit:
            raise DataError(f"{self.image_errors} images could not be read, more than --max-errors {limit}.")
        finite, scale = record.pop("finite"), self.engine.loss_scale
        only_overflow = not finite and math.isfinite(record["loss"]) and scale.value > 1
        scale.update(finite)
        if finite:
            self.bad_in_a_row = 0
        elif not only_overflow:
            self.bad_steps += 1
            self.bad_in_a_row += 1

    def _speed(self, seconds: float, waited: float) -> Record:
        engine = self.engine
        return speed_figures(
            self.stage.config,
            seconds=seconds,
            waited=waited,
            device=engine.device,
            dtype=engine.amp_dtype,
            processes=world_size(),
            flops_per_image=engine.flops_per_image,
        )

    def _finish_step(self, record: Record) -> Answer:
        last = self.step == self.stage.end
        self.checkpointer.poll()
        due = last or self.step % self.config.probe_every == 0 or self.guard.due(self.step)
        answer = self._probe(record) if due else "fine"
        if answer != "back":
            self._write(record)
            if last or answer == "best" or (self.step % self.config.checkpoint_every == 0 and not self.bad_in_a_row):
                self.save()
        self.on_step(record)
        return answer

    def _stop(self, number: int) -> None:
        self.save()
        self.checkpointer.finish(required=True)
        raise TrainingStopped(number, self.step, self.run)

    def _folder_held(self) -> contextlib.AbstractContextManager[None]:
        return self.folder.held() if self.folder else contextlib.nullcontext()

    @contextlib.contextmanager
    def _logging(self) -> Iterator[None]:
        """Keep the loggers that were asked for open in process 0, and note on what it is computed and how long."""
        run = self.run if self.folder else None
        if is_main():
            self.loggers = open_loggers(self.config.loggers, self.run, self.config.model_dump(mode="json"))
        try:
            with recorded_session(run, lambda: describe_session(self.engine, self.source), lambda: self.step):
                yield
        finally:
            for logger in self.loggers:
                logger.close()

    def _write(self, record: Record) -> None:
        if self.folder:
            self.folder.append(record)
        for logger in self.loggers:
            logger.log(record)

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
        if self.folder:
            self.folder.trim_metrics(self.step)
            self.folder.append({"event": "rollback", "from": at, "step": self.step, "reason": reason}, event=True)
        return True

    # --- probe and samples -----------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Measure what the run begins with, and keep it as its first checkpoint when it is guarded."""
        if self.engine.start.text:
            self._event("start", step=0, reason=self.engine.start.text)
        record: Record = {"step": 0}
        answer = self._probe(record)
        if len(record) > 1:
            self._write(record)
        if answer == "best":
            self.save()

    def _probe(self, record: Record) -> Answer:
        guarded = self.guard.due(record["step"])
        if self.probe is None and not guarded:
            return "fine"
        teacher = whole_teacher(self.model)
        if is_main():
            training = teacher.training
            teacher.eval()
            if self.probe is not None:
                record["probe"] = self.probe(teacher)
            if guarded:
                record["guard"] = self.guard.measure(teacher)
            teacher.train(training)
        record |= broadcast_object({k: record[k] for k in ("probe", "guard") if k in record})
        return self.guard.check(record) if guarded else "fine"

    # --- the guard ---------------------------------------------------------------------------------------------------

    def _go_back(self) -> None:
        """Go back to the best checkpoint with a lower learning rate; after `max_rollbacks` of that, stop there.

        Raises:
            FeaturesError: when it stops.
        """
        at, what, bad = self.step, self.guard.worse(), self.guard.bad
        rollbacks, lr_factor = self.rollbacks, self.lr_factor * self.config.guard.lr_factor
        self.checkpointer.finish()
        if not self._load(before=self.guard.best_step + 1):
            raise FeaturesError(f"{what} No checkpoint from before is left. Start again with a lower --optim.lr.")
        self.lr_factor, self.rollbacks = lr_factor, rollbacks
        if rollbacks >= self.config.max_rollbacks:
            reason = self.guard.stop(what, rollbacks, self.step)
        else:
            self.rollbacks += 1
            reason = f"{what} Went back to step {self.step}, the best, with the learning rate × {lr_factor:.3g}."
        self.checkpointer.rewind(self.step, self._extras())
        self._write_weights()
        if self.folder:
            self.folder.trim_metrics(self.step)
        if self.step == 0:
            self._begin()
        self._event("stopped" if self.guard.stopped else "rollback", step=self.step, reason=reason, at=at, checks=bad)
        if self.guard.stopped:
            raise FeaturesError(reason)

    def _take_up_stopped(self) -> None:
        """Refuse to go on with a run that its guard has ended, unless it may go back more often now."""
        if not self.guard.stopped:
            return
        if self.rollbacks >= self.config.max_rollbacks and self.guard.active:
            raise FeaturesError(self.guard.stopped)
        self.rollbacks, self.guard.stopped = self.rollbacks + 1, ""

    def _compare_with_start(self) -> None:
        if self.guard.below_start():
            self._event("below_start", step=self.step, reason=self.guard.compared())

    def _event(self, event: str, *, step: int, reason: str, at: int | None = None, **more: object) -> None:
        """Log what happened and keep it in RUN/events.jsonl."""
        if not self.folder:
            return
        log.warning(reason)
        self.folder.append(
            {"event": event, "from": step if at is None else at, "step": step, "reason": reason} | more, event=True
        )

    # --- schedules and data ----------------------------------------------------------------------------------------

    def schedules(self, step: int) -> dict[str, float]:
        """Give learning rates, weight decay, momentum and teacher temperature of a step (method.md §2)."""
        stage = stage_after(self.stages, step)
        c, o, s = stage.config, stage.config.optim, stage.config.loss
        step -= stage.schedule_first
        lr = self.lr_factor * cosine_schedule(
            step,
            start=scaled_lr(o.lr, c.batch_size, o.lr_rule),
            end=o.min_lr,
            total_steps=c.steps,
            warmup_steps=o.warmup_steps,
        )
        warm = max(self.engine.start.warm_steps - stage.schedule_first, 0)
        return {
            "lr": lr,
            **({"backbone_lr": backbone_rate(c, step, lr, warm)} if c.init.weights else {}),
            "last_layer_lr": 0.0 if step < o.freeze_last_layer_steps else lr,
            "weight_decay": cosine_schedule(step, start=o.weight_decay, end=o.weight_decay_end, total_steps=c.steps),
            "momentum": cosine_schedule(step, start=o.momentum, end=o.momentum_end, total_steps=c.steps),
            "teacher_temp": linear_warmup(step, s.warmup_teacher_temp, s.teacher_temp, s.warmup_teacher_temp_steps),
        }

    def batches(self) -> Iterator[Batch]:
        """Give the batches of this process from the current step to the last of its stage."""
        c = self.stage.config
        return iter(
            make_loader(
                self.source,
                c.crops,
                batch_size=c.batch_size,
                seed=c.seed,
                start_step=self.step,
                num_steps=self.stage.end - self.step,
                num_workers=c.num_workers,
                cache=c.cache_images,
                channels=c.model.in_chans,
                shard=(rank(), world_size()),
                shuffle_buffer=c.shuffle_buffer,
                **self.engine.loader_options,
            )
        )

    # --- stages ----------------------------------------------------------------------------------------------------

    def _enter(self, stage: Stage) -> None:
        """Make data and engine those of a stage; the weights are fresh."""
        self.stage, self.source = stage, self.sources[stage.config.data]
        self.engine = make_engine(stage.config)
        self.teacher.preprocess = preprocessing_of(stage.config)

    def _switch(self) -> None:
        """Go on to the next stage with everything that was learned; both engines are in memory for a moment."""
        self.checkpointer.finish()  # so that the new engine sees a run that has one, and does not begin from weights
        if self.folder:
            self.folder.keep_weights(self.stage.name)
        old = self.engine
        self._enter(self.stages[self.stage.number + 1])
        self.engine.begin(self.source)
        move_state(
            old.tensors(), self.engine.tensors(), self.teacher.config.pos_resize, moments=self.stage.resume_optimizer
        )
        self.engine.loss_scale.restore(old.loss_scale.state())
        self.engine.start = old.start
        del old
        gc.collect()  # its modules refer to themselves, and would stay in the device's memory

    def _tensors_at(self, step: int) -> dict[str, Tensor]:
        """Give the tensors of the engine that made the checkpoint of a step: at a switch that of the stage before."""
        stage = stage_before(self.stages, step)
        if stage is not self.stage:
            self._enter(stage)
            self.engine.begin(self.source)
        return self.engine.tensors()

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Begin a checkpoint, and write weights/teacher.safetensors and heads.safetensors."""
        self.checkpointer.pinned = self.guard.best_step if self.guard.best else None
        self.checkpointer.save(self.step, self.engine.tensors(), self._extras())
        self._write_weights()

    def _extras(self) -> Record:
        return {
            "counters": [self.bad_steps, self.image_errors, self.rollbacks],
            "lr_factor": self.lr_factor,
            "loss_scale": self.engine.loss_scale.state(),
            "data": fingerprint(self.source),
            "start": self.engine.start.state(),
            "guard": self.guard.state(),
        }

    def _write_weights(self) -> None:
        teacher = whole_teacher(self.model)
        heads = {k: whole(v) for k, v in self.model.teacher.state_dict().items() if k.split(".")[0] != "backbone"}
        if self.model.hog is not None:
            heads |= {TARGETS + k: v for k, v in self.model.hog.state_dict().items()}
        if self.folder:
            self.folder.write_weights(teacher, heads, self.step)

    def _load(self, before: int | None = None) -> bool:
        """Take up the newest checkpoint, of an earlier step than `before`; False when there is none."""
        extras = self.checkpointer.load(self._tensors_at, before)
        if extras is None:
            return False
        self.step = extras["step"]
        self.bad_steps, self.image_errors, self.rollbacks = extras["counters"]
        self.lr_factor = extras["lr_factor"]
        self.engine.loss_scale.restore(extras["loss_scale"])
        self.engine.start = Start(**extras.get("start", {"text": ""}))
        self.guard.restore(extras.get("guard", {}))
        change = explain_change(extras["data"], fingerprint(self.source))
        if change and not self.config.data_may_change:
            raise ConfigError(f"{change} `opendino resume RUN --data-may-change` goes on all the same.")
        return True


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


def preprocessing_of(config: PretrainConfig) -> PreprocessSpec:
    """Give the evaluation preprocessing that goes with a run: its global crop size and channel statistics."""
    size = config.crops.global_size
    return PreprocessSpec(
        resize=round(size * 256 / 224), crop=size, mean=tuple(config.crops.mean), std=tuple(config.crops.std)
    )
