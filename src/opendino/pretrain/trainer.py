# SPDX-License-Identifier: Apache-2.0
"""The training loop of one process: schedules, batch, teacher, student, clip, step, moving average, log, save.

Randomness is a function of (seed, step, sample): crops, masks and stochastic depth are drawn from generators keyed by
these, so a resumed run continues bit for bit.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from opendino.errors import ConfigError, DataError
from opendino.images.sources import open_source
from opendino.models.config import PreprocessSpec
from opendino.models.vit import VisionTransformer
from opendino.models.weights import save_backbone
from opendino.pretrain.checkpoint import load_checkpoint, save_checkpoint
from opendino.pretrain.config import PretrainConfig
from opendino.pretrain.data import Batch, make_loader
from opendino.pretrain.depth import DepthDraws
from opendino.pretrain.health import health
from opendino.pretrain.masking import batch_masks
from opendino.pretrain.memory import keep_freed_memory
from opendino.pretrain.optimizer import apply_schedule, build_adamw, clip_each, ema_update, parameter_groups
from opendino.pretrain.photometric import apply_photometric
from opendino.pretrain.schedules import cosine_schedule, linear_warmup, scaled_lr
from opendino.pretrain.student_teacher import Crops, StudentTeacher, Targets

log = logging.getLogger("opendino")
Record = dict[str, Any]
Probe = Callable[[VisionTransformer], dict[str, float]]
MASK_STREAM, INIT_STREAM = 1, 3


class Trainer:
    """One pre-training run in its folder.

    Args:
        config: the resolved settings; `config.data` and `config.out` must be set.
        probe: called with the teacher every `config.probe_every` steps; its figures go into the metrics.
        on_step: called with the record of every step.

    Raises:
        DataError: when the data holds no image or less than one batch.
        ConfigError: when the run folder belongs to a run with other settings.
    """

    def __init__(
        self, config: PretrainConfig, *, probe: Probe | None = None, on_step: Callable[[Record], None] | None = None
    ) -> None:
        self.config, self.probe, self.on_step = config, probe, on_step or (lambda record: None)
        self.run = Path(config.out)
        self.device = choose_device(config.device)
        self.amp_dtype = choose_precision(config.precision, self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.source = open_source(config.data)
        if len(self.source) < config.batch_size:
            raise DataError(
                f"{config.data} has {len(self.source)} images and a batch is {config.batch_size}. Add images, or lower "
                "--batch-size."
            )
        if config.loss.koleo_weight and config.batch_size // config.accumulate < 2:
            log.warning(
                "KoLeo is left out: it needs two images in a micro-batch, and there is one. Raise --batch-size."
            )
        torch.manual_seed(stream_seed(config.seed, INIT_STREAM, 0))
        self.model = StudentTeacher(config).to(self.device)
        self.networks = dict(self.model.student.items())
        optim = config.optim
        groups = parameter_groups(
            self.networks, layerwise_decay=optim.layerwise_decay, patch_embed_lr_mult=optim.patch_embed_lr_mult
        )
        self.optimizer = build_adamw(groups, betas=optim.betas)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp_dtype is torch.float16)
        self.step = self.bad_steps = self.bad_in_a_row = self.image_errors = 0
        self._open_run()

    # --- the loop --------------------------------------------------------------------------------------------------

    def train(self) -> Record:
        """Run to the last step and give its record. Ctrl-C saves a checkpoint before it leaves."""
        record: Record = {}
        if self.step == 0:
            self._probe(record | {"step": 0})
        batches = self._batches()
        try:
            while self.step < self.config.steps:
                started = time.perf_counter()
                batch = next(batches)
                waited = time.perf_counter() - started
                record = self._train_step(batch)
                seconds = time.perf_counter() - started
                record |= {"images_per_s": self.config.batch_size / seconds, "data_wait": waited / seconds}
                self.step += 1
                self._finish_step(record)
        except KeyboardInterrupt:
            self.save()
            log.warning("Stopped at step %d; continue with: opendino resume %s", self.step, self.run)
            raise
        return record

    def _train_step(self, batch: Batch) -> Record:
        values = self.schedules(self.step)
        apply_schedule(self.optimizer, values["lr"], values["weight_decay"], values["last_layer_lr"])
        centers = {k: v.clone() for k, v in self.model.centers.state_dict().items()}
        micro_batches = self._crops(batch).split(self.config.accumulate)
        with self._autocast():
            targets = self.model.targets(micro_batches, values["teacher_temp"])
        parts = self._backward(micro_batches, targets)
        self.scaler.unscale_(self.optimizer)
        norms = clip_each(self.networks, self.config.optim.clip_grad or math.inf)
        record = {"step": self.step + 1, **parts, **values, **{f"grad_norm_{k}": float(v) for k, v in norms.items()}}
        finite = all(math.isfinite(v) for v in (parts["loss"], *(float(n) for n in norms.values())))
        if finite:
            self.scaler.step(self.optimizer)
            ema_update(self.model.teacher.parameters(), self.model.student.parameters(), values["momentum"])
        else:
            self.model.centers.load_state_dict(centers)
        self.scaler.update()
        self._count_bad(finite)
        if self.step % self.config.log_every == 0:
            record |= health(torch.cat([t.cls for t in targets]), torch.cat([t.features for t in targets]))
        return record | {"bad_steps": self.bad_steps, "image_errors": self.image_errors}

    def _backward(self, micro_batches: list[Crops], targets: list[Targets]) -> dict[str, float]:
        self.optimizer.zero_grad(set_to_none=True)
        totals: dict[str, Tensor] = {}
        for i, (crops, target) in enumerate(zip(micro_batches, targets, strict=True)):
            images = crops.num_images
            depth = DepthDraws(self.config.seed, self.step, i * images, images, self.config.batch_size)
            with self._autocast():
                loss, parts = self.model.loss(crops, target, depth)
            scaled: Tensor = self.scaler.scale(loss / len(micro_batches))
            scaled.backward()
            for name, value in (parts | {"loss": loss.detach()}).items():
                totals[name] = totals.get(name, torch.zeros((), device=self.device)) + value / len(micro_batches)
        return {name: float(value) for name, value in totals.items()}

    def _count_bad(self, finite: bool) -> None:
        if finite:
            self.bad_in_a_row = 0
            return
        self.bad_steps += 1
        self.bad_in_a_row += 1
        if self.bad_in_a_row >= self.config.max_bad_steps:
            raise ConfigError(
                f"{self.bad_in_a_row} steps in a row gave a loss or gradient that is not finite (up to step "
                f"{self.step + 1}). The last checkpoint is untouched. Lower --optim.lr, or try --precision fp32."
            )

    def _finish_step(self, record: Record) -> None:
        last = self.step == self.config.steps
        if last or self.step % self.config.probe_every == 0:
            self._probe(record)
        with (self.run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        if last or self.step % self.config.checkpoint_every == 0:
            self.save()
        self.on_step(record)

    def _probe(self, record: Record) -> None:
        if self.probe is None:
            return
        teacher = self.teacher
        teacher.eval()
        record["probe"] = self.probe(teacher)
        teacher.train()
        if record.get("step") == 0:
            with (self.run / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")

    # --- parts of a step -------------------------------------------------------------------------------------------

    def schedules(self, step: int) -> dict[str, float]:
        """Give learning rates, weight decay, momentum and teacher temperature of a step (method.md §2)."""
        c, o, s = self.config, self.config.optim, self.config.loss
        lr = cosine_schedule(
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
            )
        )

    def _crops(self, batch: Batch) -> Crops:
        for path, reason in batch.errors:
            self.image_errors += 1
            log.warning("%s cannot be read (%s); another image takes its place.", path, reason)
        limit = self.config.max_errors
        if limit is not None and self.image_errors > limit:
            raise DataError(f"{self.image_errors} images could not be read, more than --max-errors {limit}.")
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
        rng = np.random.default_rng(stream_seed(self.config.seed, MASK_STREAM, self.step))
        m = self.config.masks
        masks = batch_masks(len(global_crops), (side, side), rng, ratio=m.ratio, share=m.share)
        return Crops(global_crops, local_crops, masks.to(self.device))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.amp_dtype or torch.bfloat16, enabled=self.amp_dtype is not None)

    # --- the run folder --------------------------------------------------------------------------------------------

    @property
    def teacher(self) -> VisionTransformer:
        """The teacher's backbone, which is the result of the run."""
        backbone = self.model.teacher["backbone"]
        assert isinstance(backbone, VisionTransformer)
        return backbone

    def save(self) -> None:
        """Write a checkpoint, weights/teacher.safetensors and heads.safetensors."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "counters": [self.step, self.bad_steps, self.bad_in_a_row, self.image_errors],
        }
        save_checkpoint(self.run, self.step, state, self.config.keep_checkpoints)
        (self.run / "weights").mkdir(exist_ok=True)
        self.teacher.preprocess = preprocessing_of(self.config)
        save_backbone(self.teacher, self.run / "weights" / "teacher.safetensors")
        heads = {k: v.contiguous() for k, v in self.model.teacher.state_dict().items() if "head" in k.split(".")[0]}
        aside = self.run / ".heads.safetensors"
        save_file(heads, aside)
        aside.rename(self.run / "heads.safetensors")

    def _open_run(self) -> None:
        resolved = yaml.safe_dump(json.loads(self.config.model_dump_json()), sort_keys=False)
        path = self.run / "config.yaml"
        if path.exists() and path.read_text() != resolved:
            raise ConfigError(
                f"{self.run} holds a run with other settings. Continue it with `opendino resume {self.run}`, or give "
                "another --out."
            )
        self.run.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            aside = self.run / ".config.yaml"
            aside.write_text(resolved)
            aside.rename(path)
        state = load_checkpoint(self.run)
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.step, self.bad_steps, self.bad_in_a_row, self.image_errors = state["counters"]
        self._trim_metrics()

    def _trim_metrics(self) -> None:
        """Drop the lines of steps that a kill undid, so that each step stands once."""
        path = self.run / "metrics.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # the line that was being written
                continue
            if 0 < record["step"] <= self.step or (record["step"] == 0 < self.step):
                kept.append(line + "\n")
        aside = self.run / ".metrics.jsonl"
        aside.write_text("".join(kept))
        aside.rename(path)


def stream_seed(seed: int, stream: int, index: int) -> int:
    """Derive an independent 63-bit seed for one use (`stream`) of one step or sample."""
    state = np.random.SeedSequence([seed, stream, index]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def choose_device(name: str) -> torch.device:
    """Resolve "auto" to CUDA, MPS or CPU, in this order."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def choose_precision(name: str, device: torch.device) -> torch.dtype | None:
    """Resolve the autocast dtype; None computes in fp32.

    "auto" is bf16 on CUDA, and on a CPU with matrix units for it (AMX); fp32 elsewhere, where bf16 would be slower.
    """
    if name == "auto":
        fast_cpu = device.type == "cpu" and torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if device.type == "cuda" or fast_cpu else None
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def preprocessing_of(config: PretrainConfig) -> PreprocessSpec:
    """Give the evaluation preprocessing that goes with a run: its global crop size and channel statistics."""
    size = config.crops.global_size
    return PreprocessSpec(
        resize=round(size * 256 / 224), crop=size, mean=tuple(config.crops.mean), std=tuple(config.crops.std)
    )
