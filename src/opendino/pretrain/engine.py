# SPDX-License-Identifier: Apache-2.0
"""Student, teacher and optimiser of one process, and one training step of them.

A step is: crops and masks, teacher, student and losses, backward, clip, optimiser, moving average. It changes nothing
when its loss or a gradient is not finite.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from opendino.distributed.collectives import all_sum, rank, world_size
from opendino.distributed.process import join, local_device
from opendino.distributed.sharding import reduce_gradients, whole
from opendino.images.sources import ImageSource
from opendino.models.vit import VisionTransformer
from opendino.pretrain.checkpoint import list_checkpoints
from opendino.pretrain.config import PretrainConfig
from opendino.pretrain.data import Batch, PretrainDataset
from opendino.pretrain.depth import DepthDraws
from opendino.pretrain.device import LossScale, choose_precision
from opendino.pretrain.flops import model_flops_per_image
from opendino.pretrain.initialise import Start, initialise, layerwise_decay
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
from opendino.pretrain.profile import StepClock
from opendino.pretrain.run_folder import Record
from opendino.pretrain.spread import spread
from opendino.pretrain.student_teacher import Crops, StudentTeacher, Targets
from opendino.pretrain.telemetry import Telemetry

INIT_STREAM = 3
PASTE_STREAM = 1 << 16
"""Of the first process; one more for each other, which all paste from their own crops."""
HOG_IMAGES, HOG_BATCH = 2048, 64
"""Images whose crops the components of `loss.hog_weight` are found in, and how many are held decoded."""


class Engine:
    """What computes a run in this process; joins the other processes of the run.

    Args:
        config: the resolved settings.

    Attributes:
        model: student, teacher and centres.
        optimizer: AdamW over the student.
        loss_scale: of fp16.
        start: what the run began with.
        clock: times the parts of a step when it is on.
        telemetry: gives the health figures.
    """

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config
        self.device = local_device(config.device)
        join(self.device)
        self.amp_dtype = choose_precision(config.precision, self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.num_images = config.batch_size // world_size()
        self.first_image = rank() * self.num_images
        torch.manual_seed(stream_seed(config.seed, INIT_STREAM, 0))
        self.model = self.make_model()
        self.start = Start("")  # a run that has a checkpoint takes it from there
        if config.init.weights and not (config.out and list_checkpoints(Path(config.out))):
            self.start = initialise(self.model, config)
        self.compute_loss = spread(self.model, config, self.device, self.amp_dtype)
        self.networks = self.trained_networks()
        optim = config.optim
        groups = parameter_groups(
            self.networks, layerwise_decay=layerwise_decay(config), patch_embed_lr_mult=optim.patch_embed_lr_mult
        )
        self.optimizer = build_adamw(groups, betas=optim.betas)
        self.loss_scale = LossScale(self.amp_dtype is torch.float16)
        self.clock = StepClock(self.device)
        self.telemetry = Telemetry(config, self.networks)

    # --- what other kinds of training change -------------------------------------------------------------------------

    def make_model(self) -> StudentTeacher:
        """Build student and teacher, on the CPU; torch's generator is seeded."""
        return StudentTeacher(self.config)

    def trained_networks(self) -> dict[str, nn.Module]:
        """Give the networks that the optimiser moves, by name."""
        return dict(self.model.student.items())

    @property
    def about(self) -> str:
        """Say what is trained, where that is not plain from the command; else nothing."""
        return ""

    def begin(self, source: ImageSource) -> None:
        """Hear which images the run has, before its first step or before a checkpoint is loaded."""
        if self.model.hog is not None and not self.model.hog.complete:
            self.model.hog.fit(self._some_crops(source))

    @property
    def loader_options(self) -> dict[str, Any]:
        """Further arguments of `make_loader`."""
        return {}

    @functools.cached_property
    def flops_per_image(self) -> float:
        """FLOPs of one optimiser step per image."""
        return model_flops_per_image(self.config)

    # -----------------------------------------------------------------------------------------------------------------

    @property
    def teacher(self) -> VisionTransformer:
        """The teacher's backbone; sharded when the run is."""
        backbone = self.model.teacher["backbone"]
        assert isinstance(backbone, VisionTransformer)
        return backbone

    def run(self, batch: Batch, step: int, values: Mapping[str, float], signal: int = 0) -> Record:
        """Do one step and give its record.

        Args:
            batch: of this process.
            step: number of the step, from 0.
            values: of the schedules; what `Trainer.schedules` gives.
            signal: number of a signal that this process got, 0 for none.

        Returns:
            Loss parts as means over the processes, gradient norms, at log steps health figures, and of all processes
            "finite", "image_errors" and "signal".
        """
        rates = values["lr"], values["weight_decay"], values["last_layer_lr"], values.get("backbone_lr")
        apply_schedule(self.optimizer, *rates)
        frozen = self._hold_backbone(step)
        centers = {k: v.clone() for k, v in self.model.centers.state_dict().items()}
        with self.clock.span("augment"):
            micro_batches = self._crops(batch, step).split(self.config.accumulate)
        with self.clock.span("teacher forward"), self._autocast():
            targets = self.model.targets(micro_batches, values["teacher_temp"])
        record = self._agree(self._backward(micro_batches, targets, step), len(batch.errors), signal)
        if frozen:
            self.networks["backbone"].zero_grad(set_to_none=True)
        with self.clock.span("clip"):
            self.loss_scale.unscale(self.model.student.parameters())
            clipped = clip_each(self.networks, self.config.optim.clip_grad or math.inf)
            record |= {f"grad_norm_{k}": float(whole(v)) for k, v in clipped.items()}
        record["finite"] = all(math.isfinite(v) for v in record.values())
        if record["finite"]:
            record |= self._update(values["momentum"], step)
        else:
            self.model.centers.load_state_dict(centers)
        with self.clock.span("log"):
            record |= self.telemetry.figures(step, self.teacher, micro_batches, targets, self._autocast())
        return record

    def _hold_backbone(self, step: int) -> bool:
        """Say whether the backbone stands still at a step; alone, this process then does not differentiate it either.

        DDP and FSDP expect every gradient, so with several processes they are computed and dropped.
        """
        frozen = step < self.start.warm_steps
        if world_size() == 1 and "backbone" in self.networks:  # there is none where heads alone are trained
            self.networks["backbone"].requires_grad_(not frozen)
        return frozen

    def _crops(self, batch: Batch, step: int) -> Crops:
        crops, m = self.config.crops, self.config.masks
        global_crops = apply_photometric(
            batch.global_crops.to(self.device, non_blocking=True), batch.global_params, crops
        )
        local_crops = None
        if batch.local_crops is not None and batch.local_params is not None:
            local_crops = apply_photometric(
                batch.local_crops.to(self.device, non_blocking=True), batch.local_params, crops
            )
        side = crops.global_size // self.teacher.patch_size
        masks = batch_masks(
            self.config.batch_size,
            (side, side),
            seed=self.config.seed,
            step=step,
            images=slice(self.first_image, self.first_image + self.num_images),
            ratio=m.ratio,
            share=m.share,
        )
        identity = None
        if self.model.hog is not None and self.model.hog.identity:
            chance = torch.Generator().manual_seed(stream_seed(self.config.seed, PASTE_STREAM + rank(), step))
            global_crops, identity = self.model.hog.identified(global_crops, self.config.loss.hog_paste, chance)
        return Crops(global_crops, local_crops, masks.to(self.device), identity=identity)

    def _some_crops(self, source: ImageSource) -> Tensor:
        """Cut global crops of images from all over a source, normalised, (2·n, C, g, g); the same in every process."""
        crops = self.config.crops.model_copy(update={"num_local": 0})
        dataset = PretrainDataset(source, crops, seed=self.config.seed, channels=self.config.model.in_chans)
        wanted = torch.linspace(0, len(source) - 1, min(HOG_IMAGES, len(source))).long().unique().tolist()
        found = []
        for start in range(0, len(wanted), HOG_BATCH):
            batch = dataset.__getitems__([(i, i) for i in wanted[start : start + HOG_BATCH]])
            found.append(apply_photometric(batch.global_crops, batch.global_params, crops))
        return torch.cat(found).to(self.device)

    def _backward(self, micro_batches: list[Crops], targets: list[Targets], step: int) -> dict[str, Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        totals: dict[str, Tensor] = {}
        first = self.first_image
        for i, (crops, target) in enumerate(zip(micro_batches, targets, strict=True)):
            depth = DepthDraws(self.config.seed, step, first, crops.num_images, self.config.batch_size)
            first += crops.num_images
            last = i == len(micro_batches) - 1
            with reduce_gradients([self.compute_loss, *self.networks.values()], now=last):
                with self.clock.span("student forward + losses"), self._autocast():
                    loss, parts = self.compute_loss(crops, target, depth)
                with self.clock.span("backward"):
                    (loss * (self.loss_scale.value / len(micro_batches))).backward()
            for name, value in (parts | {"loss": loss.detach()}).items():
                totals[name] = totals.get(name, torch.zeros((), device=self.device)) + value / len(micro_batches)
        return totals

    def _agree(self, parts: dict[str, Tensor], errors: int, signal: int) -> Record:
        """Average the loss parts over the processes, add up unreadable images, hear of signals that any process got."""
        means = torch.stack([parts[k].float() for k in sorted(parts)]) / world_size()
        counts = means.new_tensor([float(errors), float(signal), float(signal > 0)])
        *values, errors_everywhere, numbers, signalled = all_sum(torch.cat([means, counts])).tolist()
        found: Record = dict(zip(sorted(parts), values, strict=True))
        return found | {"image_errors": int(errors_everywhere), "signal": round(numbers / max(signalled, 1))}

    def _update(self, momentum: float, step: int) -> dict[str, float]:
        self.telemetry.before_update(step)
        with self.clock.span("optimizer"):
            self.optimizer.step()
        with self.clock.span("ema"):
            ema_update(self.model.teacher.parameters(), self.model.student.parameters(), momentum)
        return self.telemetry.after_update(step)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.amp_dtype or torch.bfloat16, enabled=self.amp_dtype is not None)

    def tensors(self) -> dict[str, Tensor]:
        """Give everything that a checkpoint holds and that is restored in place, by unique names."""
        names = {p: n for n, p in self.model.student.named_parameters()}
        model = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        return model | {f"optimizer.{k}": v for k, v in optimizer_tensors(self.optimizer, names).items()}


def stream_seed(seed: int, stream: int, index: int) -> int:
    """Derive an independent 63-bit seed for one use (`stream`) of one step or sample."""
    state = np.random.SeedSequence([seed, stream, index]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))
