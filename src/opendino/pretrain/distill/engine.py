# SPDX-License-Identifier: Apache-2.0
"""The engine of a distillation: that of pre-training with a frozen teacher beside student and moving average."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from opendino.distributed.collectives import barrier, is_main
from opendino.errors import ConfigError
from opendino.images.sources import ImageSource
from opendino.pretrain.data import Batch
from opendino.pretrain.distill.cache import TeacherCache, describe_cache
from opendino.pretrain.distill.config import DistillConfig
from opendino.pretrain.distill.cost import distill_flops
from opendino.pretrain.distill.features import FeatureDistillation
from opendino.pretrain.distill.matching import check_pair, choose_mode
from opendino.pretrain.distill.paper import PaperDistillation
from opendino.pretrain.distill.teacher import FrozenTeacher
from opendino.pretrain.distill.views import FixedViews
from opendino.pretrain.engine import Engine
from opendino.pretrain.photometric import PhotometricParams, apply_photometric
from opendino.pretrain.run_folder import Record
from opendino.pretrain.student_teacher import Crops

log = logging.getLogger("opendino")


class DistillEngine(Engine):
    """What computes a distillation in this process.

    Args:
        config: the resolved settings.

    Attributes:
        frozen: the teacher.

    Raises:
        WeightsError: when the teacher cannot be read.
        ConfigError: when teacher, student and mode do not go together.
    """

    config: DistillConfig
    model: PaperDistillation | FeatureDistillation

    def __init__(self, config: DistillConfig) -> None:
        self.views: FixedViews | None = None
        self.cache: TeacherCache | None = None
        super().__init__(config)

    def make_model(self) -> PaperDistillation | FeatureDistillation:
        """Load the teacher and build the student for it."""
        self.frozen = FrozenTeacher(self.config.teacher, self.config.heads_file).to(self.device)
        mode = choose_mode(self.config, self.frozen)
        self.config = self.config.model_copy(update={"mode": mode})
        kind = PaperDistillation if mode == "paper" else FeatureDistillation
        model = kind(self.config, self.frozen)
        check_pair(self.config, self.frozen, model.student["backbone"], mode)
        return model

    @property
    def about(self) -> str:
        """Say who learns what from whom."""
        what = "prototypes of its heads" if self.config.mode == "paper" else "cls and patch features"
        return f"{self.config.student} learns from {self.config.teacher}: {what} (--mode {self.config.mode})."

    def begin(self, source: ImageSource) -> None:
        """Fix the views of the images, and open the cache, where these are wanted."""
        c = self.config
        if not c.views:
            return
        self.views = FixedViews(c.views, len(source), c.batch_size)
        if c.cache_teacher:
            about = describe_cache(
                c, self.frozen, source, local_crops=self._matches_local_crops, amp_dtype=self.amp_dtype
            )
            if is_main():  # makes the folder
                TeacherCache(c.cache_teacher, about)
            barrier()
            self.cache = TeacherCache(c.cache_teacher, about)

    @property
    def _matches_local_crops(self) -> bool:
        return isinstance(self.model, FeatureDistillation) and self.config.crops.num_local > 0

    @property
    def loader_options(self) -> dict[str, Any]:
        """Fixed views for the loader."""
        return {} if self.views is None else {"rng_of": self.views}

    @functools.cached_property
    def flops_per_image(self) -> float:
        """FLOPs of one optimiser step per image."""
        return distill_flops(self.config, self.frozen, self.model)

    def run(self, batch: Batch, step: int, values: Mapping[str, float], signal: int = 0) -> Record:
        """Do one step; see `Engine.run`.

        Raises:
            ConfigError: when a resumed run has another teacher than before.
        """
        if int(self.model.teacher_fingerprint) != self.frozen.fingerprint:
            raise ConfigError(
                f"{self.config.teacher} holds other weights than when this run was begun, so its targets are others. "
                "Bring the old teacher back, or start a new run in another --out."
            )
        return super().run(batch, step, values, signal)

    def _crops(self, batch: Batch, step: int) -> Crops:
        crops = super()._crops(batch, step)
        h, w = self.teacher.grid_of(crops.global_crops)
        if crops.masks.shape[1] != h * w:  # a timm student with a grid of its own; there are no masks
            crops = replace(crops, masks=crops.masks.new_zeros(len(crops.masks), h * w))
        tokens = () if self.views is None else self._tokens_of_views(batch, self.views.of_step(step))
        return replace(crops, scored=torch.ones_like(crops.masks), teacher_tokens=tokens)

    @torch.no_grad()
    def _tokens_of_views(self, batch: Batch, view: int) -> tuple[Tensor, ...]:
        """Give the teacher's tokens of fixed views, each image by itself: so they do not depend on its batch."""
        with self._autocast():
            per_image = [self._tokens_of_one(batch, i, (index, view)) for i, index in enumerate(batch.indices.tolist())]
        return tuple(torch.stack(parts, 1).flatten(0, 1) for parts in zip(*per_image, strict=True))

    def _tokens_of_one(self, batch: Batch, place: int, key: tuple[int, int]) -> list[Tensor]:
        """Tokens of one image's global crops, and where they are matched of its local ones: cls, patches, cls, …"""
        cached = self.cache.read(*key) if self.cache is not None else None
        if cached is not None:
            return [t.to(self.device) for t in cached]
        groups = [self._crops_of_one(batch.global_crops, batch.global_params, place, len(batch.indices))]
        if self._matches_local_crops and batch.local_crops is not None and batch.local_params is not None:
            groups.append(self._crops_of_one(batch.local_crops, batch.local_params, place, len(batch.indices)))
        dtype = torch.float16 if self.config.cache_dtype == "fp16" else torch.float32
        tokens = [t.to(dtype) for x in groups for t in self.frozen.tokens(x)]
        if self.cache is not None:
            self.cache.write(*key, tokens)
        return [t.float() for t in tokens]

    def _crops_of_one(self, crops: Tensor, params: PhotometricParams, place: int, images: int) -> Tensor:
        """Colour the crops of one image by themselves; in a batch the last bit may depend on the others."""
        rows = slice(place, None, images)
        own = PhotometricParams(**{f.name: getattr(params, f.name)[rows] for f in fields(params)})
        return apply_photometric(crops[rows].contiguous().to(self.device), own, self.config.crops)

    def _update(self, momentum: float, step: int) -> dict[str, float]:
        figures = super()._update(momentum, step)
        self._copy_buffers()
        return figures

    def _copy_buffers(self) -> None:
        """Give the moving average the student's buffers (statistics of BatchNorm): it sees no batches of its own."""
        for own, of_student in zip(self.model.teacher.buffers(), self.model.student.buffers(), strict=True):
            own.copy_(of_student)
